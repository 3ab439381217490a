"""What the facts of a machine mean: pure functions of them, so that a recorded machine is judged as the one at hand.

Where a fact is missing the verdict is `unknown`, never `ok`.
"""

import shlex
from collections.abc import Iterator

from finetune.workstation import gpu_checks, history, load_checks
from finetune.workstation.verdicts import Check, Facts, Verdict, check_of, place_id

RAM_GIB, THREADS, OPEN_FILES, SHM_GIB = 64, 16, 1_000_000, 1.0
LEAST_RAM_GIB, LEAST_THREADS, LEAST_FILES = 8, 2, 1_024  # of a machine without a GPU
MOST_SWAPPINESS = 10
FREE_GIB, TIGHT_GIB = 50.0, 10.0
ADVICE = "what finetune's memory plans and data workers take"
DYNAMIC_DRIVERS = ("intel_pstate", "amd-pstate-epp")  # their powersave raises the clock under load
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")
FOREIGN = ("fuseblk", "ntfs3", "exfat", "vfat")  # of Windows: no links, which the cache of models needs
SLOW_OPTIONS = {"sync": "every write waits for the disk", "strictatime": "every read writes a time"}


def judge(facts: Facts) -> list[Check]:
    """Every check of these facts, in a fixed order."""
    return [
        *gpu_checks.judge(facts),
        *_memory(facts),
        *_cpu(facts),
        *_disks(facts),
        *_rest(facts),
        *load_checks.judge(facts),
        *history.judge(facts),
    ]


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
    swapping = None if swappiness is None else on_gpu and swappiness > MOST_SWAPPINESS
    yield check_of(
        "swappiness", swapping, Verdict.warn, "not told" if swappiness is None else str(swappiness),
        limit=f"1 to {MOST_SWAPPINESS}" if on_gpu else "any, without a GPU",
        source="offloaded weights must stay in memory", cost="steps wait for the disk",
        cure=f"echo vm.swappiness={MOST_SWAPPINESS} | sudo tee /etc/sysctl.d/90-finetune.conf && sudo sysctl --system",
    )  # fmt: skip
    yield check_of(
        "swap-in-use", facts["swap_used_gib"] > 1, Verdict.warn, f"{facts['swap_used_gib']:.1f} GiB",
        limit="under 1 GiB", source="psutil", cost="what was swapped out comes back slowly",
        cure="sudo swapoff -a && sudo swapon -a",
    )  # fmt: skip


def _cpu(facts: Facts) -> Iterator[Check]:
    usable = min(facts["threads_usable"], facts["threads_quota"] or facts["threads_usable"])
    on_gpu = bool(facts["nvml"].get("gpus"))
    limit = THREADS if on_gpu else LEAST_THREADS
    yield check_of(
        "cpu-threads", usable < limit, Verdict.warn, f"{usable:g} of {facts['threads']} for this program",
        limit=f"{limit}", source=ADVICE, cost="images and texts are prepared more slowly",
        cure="give the container or job more CPUs",
    )  # fmt: skip
    governor = facts["governor"]
    slow = governor == "powersave" and facts["frequency_driver"] not in DYNAMIC_DRIVERS
    yield check_of(
        "cpu-governor", None if governor is None else slow, Verdict.warn, governor or "not told",
        limit="performance or schedutil", source="Linux cpufreq", cost="kernels are launched more slowly",
        cure="sudo cpupower frequency-set -g performance",
    )  # fmt: skip
    files, least = facts["open_files"], OPEN_FILES if on_gpu else LEAST_FILES
    yield check_of(
        "open-files", 0 <= files < least, Verdict.warn, "unlimited" if files < 0 else f"{files:,}", limit=f"{least:,}",
        source=ADVICE, cost="many workers with many shards end with 'too many open files'",
        cure=f"ulimit -n {OPEN_FILES}; for good: /etc/security/limits.conf",
    )  # fmt: skip


def _disks(facts: Facts) -> Iterator[Check]:
    for name, place in facts["places"].items():
        id_ = place_id(name)
        where = (
            f"{place['free_gib']:.0f} of {place['size_gib']:.0f} GiB free at {place['path']}, {place['file_system']}"
        )
        if name == "shared memory":
            yield check_of(
                id_, place["size_gib"] < SHM_GIB, Verdict.warn, where, limit=f"{SHM_GIB:.0f} GiB", source=ADVICE,
                cost="loaders with workers end with a bus error", cure="start the container with --shm-size 8g",
            )  # fmt: skip
            continue
        tight, least = place["free_gib"] < TIGHT_GIB, FREE_GIB if name == "downloaded models" else TIGHT_GIB
        yield check_of(
            id_, place["free_gib"] < least, Verdict.bad if tight else Verdict.warn, where,
            limit=f"{least:.0f} GiB free", source="a large base takes 24 GiB", cost="a run ends when the disk is full",
            cure="du -xh --max-depth=2 . | sort -h | tail",
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
        ", ".join([kind, *told]) if kind else "not told",
        limit="a writable disk of this machine, without sync and strictatime", source="the kernel's list of mounts",
        cost="; ".join(faults), cure=cure,
    )  # fmt: skip


def _rest(facts: Facts) -> Iterator[Check]:
    yield _containers(facts)
    synchronized = facts["clock_synchronized"]
    yield check_of(
        "clock", None if synchronized is None else not synchronized, Verdict.warn,
        "not told" if synchronized is None else "synchronized" if synchronized else "not synchronized",
        limit="synchronized", source="the kernel, by adjtimex", cost="certificates and times of runs may be wrong",
        cure="on the host: sudo timedatectl set-ntp true" if facts["container"] else "sudo timedatectl set-ntp true",
    )  # fmt: skip
    wrong = {name: found for name, found in facts["packages"].items() if not found["fits"]}
    yield check_of(
        "packages", bool(wrong) if facts["packages"] else None, Verdict.bad,
        ", ".join(f"{name} {found['version'] or 'is missing'}" for name, found in wrong.items())
        or f"{len(facts['packages'])} packages fit",
        limit=", ".join(f"{name}{found['wanted']}" for name, found in wrong.items()) or "what finetune asks for",
        source="the package's own requirements", cost="errors in the middle of a run",
        cure="python -m pip install " + " ".join(f"'{name}{found['wanted']}'" for name, found in wrong.items()),
    )  # fmt: skip
    newer = {name: found for name, found in facts["packages"].items() if found["newer"]}
    untested = bool(facts["packages"]) and any(found["tested"] for found in facts["packages"].values())
    yield check_of(
        "tested-versions", bool(newer) if untested else None, Verdict.warn,
        ", ".join(f"{name} {found['version']}" for name, found in newer.items())
        or ("none is a major version newer than tested" if untested else "not told"),
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
        cost="bases can't be downloaded or loaded", cure=f"sudo chown -R $USER {shlex.quote(hub['cache'])}",
    )  # fmt: skip
    yield check_of(
        "hub-token", None if not hub["token"] else False, Verdict.warn, "there" if hub["token"] else "none",
        limit="one, for gated bases such as Llama and FLUX", source="huggingface_hub",
    )  # fmt: skip


def _containers(facts: Facts) -> Check:
    engines, on_gpu = facts["containers"]["engines"], bool(facts["nvml"].get("gpus"))
    there = facts["containers"]["gpu_support"]
    if facts["container"]:
        return Check("container-gpu", Verdict.unknown, "this is a container, which can't see the toolkit of its host")
    if not engines or not on_gpu:
        why = "no GPU to hand to a container" if engines else "no docker or podman here"
        return Check("container-gpu", Verdict.unknown, why)
    return check_of(
        "container-gpu", not there, Verdict.warn, ", ".join(engines) + (" with" if there else " without")
        + " the NVIDIA Container Toolkit",
        limit="with it", source="its files", cost="containers see no GPU",
        cure="sudo apt install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker "
        "&& sudo systemctl restart docker",
    )  # fmt: skip
