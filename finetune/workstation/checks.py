"""What the facts of a machine mean: pure functions of them, so that a recorded machine is judged as the one at hand.

Where a fact is missing the verdict is `unknown`, never `ok`.
"""

import shlex
from collections.abc import Iterator
from dataclasses import replace

from finetune.workstation import gpu_checks, history, load_checks
from finetune.workstation.verdicts import Check, Facts, Verdict, check_of, place_id

RAM_GIB, THREADS, OPEN_FILES, SHM_GIB = 64, 16, 1_000_000, 1.0
LEAST_RAM_GIB, LEAST_THREADS, LEAST_FILES = 8, 2, 1_024  # of a machine without a GPU
MOST_SWAPPINESS = 10
FREE_GIB, TIGHT_GIB = 50.0, 10.0
SILENT = "the kernel does not say"
NO_LIST = "nothing says what finetune needs; type: python -m pip install -e ."
ADVICE = "what finetune's memory plans and data workers take"
DYNAMIC_DRIVERS = ("intel_pstate", "amd-pstate-epp")  # their powersave raises the clock under load
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")
FOREIGN = ("fuseblk", "ntfs3", "exfat", "vfat")  # of Windows: no links, which the cache of models needs
SLOW_OPTIONS = {"sync": "every write waits for the disk", "strictatime": "every read writes a time"}


def judge(facts: Facts) -> list[Check]:
    """Every check of these facts, in a fixed order."""
    checks = [
        *gpu_checks.judge(facts),
        *_memory(facts),
        *_cpu(facts),
        *_disks(facts),
        *_rest(facts),
        *load_checks.judge(facts),
        *history.judge(facts),
    ]
    return [_on_the_host(check) for check in checks] if facts["container"] else checks


def _on_the_host(check: Check) -> Check:
    """A container shares the kernel and the GPUs of its host, and may change neither."""
    return replace(check, cure=f"on the host: {check.cure}") if "sudo " in check.cure else check


def _memory(facts: Facts) -> Iterator[Check]:
    ram = min(facts["ram_gib"], facts["ram_limit_gib"] or facts["ram_gib"])
    limited = ", by a limit of this container or slice" if ram < facts["ram_gib"] else ""
    on_gpu = bool(facts["nvml"].get("gpus"))
    yield check_of(
        "ram", ram < 0.9 * (RAM_GIB if on_gpu else LEAST_RAM_GIB), Verdict.warn,
        f"{ram:.0f} GiB{limited}, {min(ram, facts['ram_free_gib']):.0f} free",
        limit=f"{RAM_GIB} GiB to offload the largest models" if on_gpu else f"{LEAST_RAM_GIB} GiB", source=ADVICE,
        cost="model.offload=true does not fit for large models", cure="add memory, or choose a smaller base",
    )  # fmt: skip
    swappiness = facts["swappiness"]
    swaps = facts["swap_gib"] > 0
    swapping = None if swappiness is None else on_gpu and swaps and swappiness > MOST_SWAPPINESS
    yield check_of(
        "swappiness", swapping, Verdict.warn,
        SILENT if swappiness is None else f"{swappiness}" + ("" if swaps else ", and there is no swap"),
        limit=f"1 to {MOST_SWAPPINESS}" if on_gpu and swaps else "any, without a GPU or without swap",
        source="offloaded weights must stay in memory", cost="steps wait for the disk",
        cure=f"sudo sysctl vm.swappiness={MOST_SWAPPINESS}; for good: "
        f"echo vm.swappiness={MOST_SWAPPINESS} | sudo tee /etc/sysctl.d/90-finetune.conf",
    )  # fmt: skip
    yield check_of(
        "swap-in-use", facts["swap_used_gib"] > 1, Verdict.warn, f"{facts['swap_used_gib']:.1f} GiB",
        limit="under 1 GiB", source="psutil", cost="what was swapped out comes back slowly",
        cure="end what takes the memory; then: sudo swapoff -a && sudo swapon -a",
    )  # fmt: skip


def _cpu(facts: Facts) -> Iterator[Check]:
    usable = min(facts["threads_usable"], facts["threads_quota"] or facts["threads_usable"])
    on_gpu = bool(facts["nvml"].get("gpus"))
    limit = THREADS if on_gpu else LEAST_THREADS
    yield check_of(
        "cpu-threads", usable < limit, Verdict.warn, f"{usable:g} of {facts['threads']} for this program",
        limit=f"{limit}", source=ADVICE, cost="images and texts are prepared more slowly",
        cure="give the container or job more CPUs" if usable < facts["threads"] else "take a processor with more cores",
    )  # fmt: skip
    governor = facts["governor"]
    slow = governor == "powersave" and facts["frequency_driver"] not in DYNAMIC_DRIVERS
    yield check_of(
        "cpu-governor", None if governor is None else slow, Verdict.warn,
        governor or f"{SILENT}, as in most virtual machines",
        limit="performance or schedutil", source="Linux cpufreq", cost="kernels are launched more slowly",
        cure="sudo cpupower frequency-set -g performance",
    )  # fmt: skip
    files, least = facts["open_files"], OPEN_FILES if on_gpu else LEAST_FILES
    yield check_of(
        "open-files", 0 <= files < least, Verdict.warn, "unlimited" if files < 0 else f"{files:,}", limit=f"{least:,}",
        source=ADVICE, cost="many workers with many shards end with 'too many open files'",
        cure=_more_files(facts, least),
    )  # fmt: skip


def _more_files(facts: Facts, least: int) -> str:
    """Up to the hard limit anyone may raise it, in each shell; the hard limit itself is set from outside."""
    most = facts["open_files_most"]
    if most < 0 or most >= least:
        return f"ulimit -n {least}"
    if facts["container"]:
        return f"start the container with --ulimit nofile={least}"
    return f"echo '* - nofile {least}' | sudo tee /etc/security/limits.d/90-finetune.conf; then log in again"


def _disks(facts: Facts) -> Iterator[Check]:
    for name, place in facts["places"].items():
        id_ = place_id(name)
        where = (
            f"{place['free_gib']:.0f} of {place['size_gib']:.0f} GiB free at {place['path']}, {place['file_system']}"
        )
        if name == "shared memory":
            inside, cure = "start the container with --shm-size 8g", "sudo mount -o remount,size=8G /dev/shm"
            yield check_of(
                id_, place["size_gib"] < SHM_GIB, Verdict.warn, where, limit=f"{SHM_GIB:.0f} GiB", source=ADVICE,
                cost="loaders with workers end with a bus error", cure=inside if facts["container"] else cure,
            )  # fmt: skip
            continue
        tight, least = place["free_gib"] < TIGHT_GIB, FREE_GIB if name == "downloaded models" else TIGHT_GIB
        yield check_of(
            id_, place["free_gib"] < least, Verdict.bad if tight else Verdict.warn, where,
            limit=f"{least:.0f} GiB free", source="a large base takes 24 GiB", cost="a run ends when the disk is full",
            cure=f"see what is large: du -xh --max-depth=2 {shlex.quote(place['path'])} | sort -h | tail",
        )  # fmt: skip
        if name != "temporary files":
            yield _mount(f"{id_}-mount", place, facts)


def _mount(id_: str, place: Facts, facts: Facts) -> Check:
    """What the disk is and how it is attached."""
    kind, options = place["file_system"], (place["options"] or "").split(",")
    faults = [
        *(["read-only: nothing can be written"] if "ro" in options else []),
        *(["a network is slow to read"] if kind in NETWORK else []),
        *(["it is lost with the container"] if kind == "overlay" and facts["container"] else []),
        *(["it is lost when the machine restarts, and takes its memory"] if kind == "tmpfs" else []),
        *(["a file system of Windows: slow, without links and rights"] if kind in FOREIGN else []),
        *(cost for option, cost in SLOW_OPTIONS.items() if option in options),
    ]
    told = [option for option in options if option in ("ro", "rw", "noatime", "relatime", *SLOW_OPTIONS)]
    if kind == "overlay":
        cure = "mount a folder of the host there: docker run --volume"
    else:
        cure = "choose another folder: run_dir=…" if id_ == "outputs-mount" else "export HF_HOME=… on another disk"
    return check_of(
        id_, bool(faults) if kind else None, Verdict.bad if "ro" in options else Verdict.warn,
        ", ".join([kind, *told]) if kind else SILENT,
        limit="a writable disk of this machine, without sync and strictatime", source="the kernel's list of mounts",
        cost="; ".join(faults), cure=cure,
    )  # fmt: skip


def _rest(facts: Facts) -> Iterator[Check]:
    yield _containers(facts)
    synchronized = facts["clock_synchronized"]
    yield check_of(
        "clock", None if synchronized is None else not synchronized, Verdict.warn,
        SILENT if synchronized is None else "synchronized" if synchronized else "not synchronized",
        limit="synchronized", source="the kernel, by adjtimex", cost="certificates and times of runs may be wrong",
        cure="sudo timedatectl set-ntp true",
    )  # fmt: skip
    wrong = {name: found for name, found in facts["packages"].items() if not found["fits"]}
    yield check_of(
        "packages", bool(wrong) if facts["packages"] else None, Verdict.bad,
        ", ".join(f"{name} {found['version'] or 'is missing'}" for name, found in wrong.items())
        or (f"{len(facts['packages'])} packages fit" if facts["packages"] else NO_LIST),
        limit=", ".join(f"{name}{found['wanted']}" for name, found in wrong.items()) or "what finetune asks for",
        source="the package's own requirements", cost="errors in the middle of a run",
        cure="python -m pip install " + " ".join(f"'{name}{found['wanted']}'" for name, found in wrong.items()),
    )  # fmt: skip
    newer = {name: found for name, found in facts["packages"].items() if found["newer"]}
    listed = any(found["tested"] for found in facts["packages"].values())
    untold = "there is no constraints.txt to compare with" if facts["packages"] else NO_LIST
    yield check_of(
        "tested-versions", bool(newer) if listed else None, Verdict.warn,
        ", ".join(f"{name} {found['version']}" for name, found in newer.items())
        or ("none is a major version newer than tested" if listed else untold),
        limit=", ".join(f"{name} {found['tested']}" for name, found in newer.items()), source="constraints.txt",
        cost="what changed there was never tried with finetune",
        cure="python -m pip install " + " ".join(f"{name}=={found['tested']}" for name, found in newer.items()),
    )  # fmt: skip
    hub = facts["hub"]
    unreadable = hub["unreadable"]
    yield check_of(
        "model-cache", not hub["writable"] or bool(unreadable), Verdict.bad,
        hub["cache"] + (f", {len(unreadable)} unreadable, such as {unreadable[0]}" if unreadable else ""),
        limit="can be written and read", source="rights of its files",
        cost="bases can't be downloaded or loaded",
        cure=f"have its owner type: chmod -R a+rX {shlex.quote(hub['cache'])}" if hub["writable"]
        else "export HF_HOME=… with a folder that you may write to",
    )  # fmt: skip
    yield check_of(
        "hub-token", None if not hub["token"] else False, Verdict.warn,
        "there" if hub["token"] else "none; only gated bases such as Llama and FLUX require one",
        limit="one, for gated bases such as Llama and FLUX", source="huggingface_hub",
    )  # fmt: skip


def _containers(facts: Facts) -> Check:
    engines, on_gpu = facts["containers"]["engines"], bool(facts["nvml"].get("gpus"))
    there = facts["containers"]["gpu_support"]
    if facts["container"]:
        inside = "this is a container, and it has GPUs" if on_gpu else "this is a container, without a GPU"
        return check_of("container-gpu", False if on_gpu else None, Verdict.warn, inside, limit="GPUs", source="NVML")
    if not engines or not on_gpu:
        why = "no GPU to hand to a container" if engines else "no docker or podman here"
        return Check("container-gpu", Verdict.unknown, why)
    return check_of(
        "container-gpu", not there, Verdict.warn, ", ".join(engines) + (" with" if there else " without")
        + " the NVIDIA Container Toolkit",
        limit="with it", source="its files", cost="containers see no GPU",
        cure="install your system's nvidia-container-toolkit; for Docker then: "
        "sudo nvidia-ctk runtime configure --runtime=docker; restart Docker, which ends its containers",
    )  # fmt: skip
