"""What the facts of a machine mean: pure functions of them, so that a recorded machine is judged as the one at hand.

Where a fact is missing the verdict is `unknown`, never `ok`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from finetune.workstation.nvml import POWER_CAP

Facts = dict[str, Any]


class Verdict(Enum):
    """In the order of weight."""

    ok = 0
    unknown = 1
    warn = 2
    bad = 3


@dataclass(frozen=True)
class Check:
    """id: stable, for scripts. fact: as found. limit: what it should be, and source: who says so. cost: what the fault
    costs. cure: a command to copy, or what to do by hand; empty where all is well."""

    id: str
    verdict: Verdict
    fact: str
    limit: str = ""
    source: str = ""
    cost: str = ""
    cure: str = ""


MISMATCH = "version mismatch"  # of driver and library, as NVML says it
RAM_GIB, THREADS, OPEN_FILES, SHM_GIB = 64, 16, 1_000_000, 1.0
LEAST_RAM_GIB, LEAST_THREADS, LEAST_FILES = 8, 2, 1_024  # of a machine without a GPU
MOST_SWAPPINESS = 10
FREE_GIB, TIGHT_GIB = 50.0, 10.0
IDLE_GIB = 1.0  # a desktop and a context or two
ADVICE = "what finetune's memory plans and data workers take"
DYNAMIC_DRIVERS = ("intel_pstate", "amd-pstate-epp")  # their powersave raises the clock under load
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")


def judge(facts: Facts) -> list[Check]:
    """Every check of these facts, in a fixed order."""
    return [
        *_driver(facts),
        *_torch(facts),
        *_gpus(facts),
        *_memory(facts),
        *_cpu(facts),
        *_disks(facts),
        *_rest(facts),
    ]


def worst(checks: list[Check]) -> Verdict:
    return max((check.verdict for check in checks), key=lambda verdict: verdict.value, default=Verdict.unknown)


def _of(id_: str, faulty: bool | None, verdict: Verdict, fact: str, **more: str) -> Check:
    """A check with this verdict where there is a fault; `ok`, without cost and cure, where not; None: can't be told."""
    if faulty:
        return Check(id_, verdict, fact, **more)
    kept = {name: text for name, text in more.items() if name in ("limit", "source")}
    return Check(id_, Verdict.ok if faulty is False else Verdict.unknown, fact, **kept)


def _driver(facts: Facts) -> Iterator[Check]:
    found = facts["nvml"]
    error = found.get("error")
    if error and MISMATCH in error.lower():
        yield Check(
            "driver", Verdict.bad, error, "one version of the NVIDIA driver's module and library", "NVIDIA driver",
            "no program can use the GPU", "sudo reboot",
        )  # fmt: skip
    elif error:
        yield Check(
            "driver", Verdict.warn, f"no NVIDIA driver answers ({error})", "a driver that answers", "NVML",
            "training runs on the CPU: enough for the embedded models",
            "start the container with --gpus all" if facts["container"] else "install your system's NVIDIA driver",
        )  # fmt: skip
    else:
        names = ", ".join(str(gpu["name"]) for gpu in found["gpus"]) or "no GPU"
        yield _of(
            "driver", not found["gpus"], Verdict.bad, f"driver {found['driver']} with {names}",
            limit="at least one GPU", source="NVML", cost="training runs on the CPU", cure="lspci | grep -i nvidia",
        )  # fmt: skip


def _torch(facts: Facts) -> Iterator[Check]:
    torch, gpus = facts["torch"], facts["nvml"].get("gpus") or []
    build = f"torch {torch['version']}" + (f" for CUDA {torch['cuda']}" if torch["cuda"] else ", a build without CUDA")
    plain = torch["version"].partition("+")[0]
    yield _of(
        "torch-build", bool(gpus and not torch["cuda"]) if gpus or torch["cuda"] else None, Verdict.bad, build,
        limit="a build with CUDA where there is a GPU", source="torch.version.cuda", cost="the GPU stays unused",
        cure=f"python -m pip install --force-reinstall torch=={plain}",
    )  # fmt: skip
    if not gpus or not torch["cuda"]:
        return
    needs, has = int(torch["cuda"].partition(".")[0]), facts["nvml"].get("cuda")
    yield _of(
        "driver-for-torch", has and has // 1000 < needs, Verdict.bad,
        f"the driver runs CUDA {has // 1000}.{has % 1000 // 10}" if has else "the driver does not say",
        limit=f"CUDA {needs}", source="the CUDA that torch was built for; minor versions are compatible",
        cost="torch finds no GPU", cure="update the NVIDIA driver, then reboot",
    )  # fmt: skip
    hiding = {name: value for name, value in facts["hiding"].items() if value.strip() in ("", "-1", "none", "void")}
    shown = ", ".join(f"{name}={value!r}" for name, value in hiding.items()) or "no variable hides a GPU"
    name = next(iter(hiding), "")
    yield _of(
        "hidden", bool(hiding), Verdict.bad, shown, limit="unset", source="CUDA", cost="the GPU stays unused",
        cure=f"unset {name}",
    )  # fmt: skip
    mig = [gpu for gpu in gpus if gpu["mig"]]
    seen = f"torch sees {torch['gpus']} of {len(gpus)} GPUs"
    blind = torch["gpus"] == 0 and not hiding
    yield _of(
        "torch-sees", blind, Verdict.bad, f"{seen}: {torch['error']}" if torch["error"] else seen, limit="at least one",
        source="torch.cuda", cost="training runs on the CPU",
        cure="make an instance: sudo nvidia-smi mig -cgi 0 -C" if mig else "sudo reboot",
    )  # fmt: skip
    for gpu in gpus:
        yield _architecture(gpu, torch["architectures"])


def _architecture(gpu: Facts, built: list[str]) -> Check:
    """Code for one compute capability runs on all of the same generation that are not older."""
    capability = gpu["capability"]
    known = capability is not None and bool(built)
    codes = [(int(code[3:].rstrip("af")[:-1]), int(code[3:].rstrip("af")[-1])) for code in built if code[:3] == "sm_"]
    runs = known and any(major == capability[0] and minor <= capability[1] for major, minor in codes)
    name = "?" if capability is None else f"sm_{capability[0]}{capability[1]}"
    return _of(
        f"architecture-{gpu['index']}", not runs if known else None, Verdict.bad, f"{gpu['name']} is {name}",
        limit=", ".join(built) or "not told", source="torch.cuda.get_arch_list",
        cost="programs end with 'no kernel image'", cure="install a torch that was built for this GPU",
    )  # fmt: skip


def _gpus(facts: Facts) -> Iterator[Check]:
    for gpu in facts["nvml"].get("gpus") or []:
        yield _others(gpu)
        yield _throttling(gpu)
        yield _power_limit(gpu)
        yield _link(gpu)
        yield from _health(gpu)


def _others(gpu: Facts) -> Check:
    used, programs = gpu["used_gib"], gpu["processes"] or []
    names = ", ".join(f"{one['name'] or 'a program'} ({one['pid']}): {one['mib'] or '?'} MiB" for one in programs)
    fact = (
        "not told"
        if used is None
        else f"{used:.1f} of {gpu['memory_gib']:.1f} GiB in use" + (f" by {names}" if names else "")
    )
    return _of(
        f"memory-in-use-{gpu['index']}", None if used is None else used > IDLE_GIB, Verdict.warn, fact,
        limit=f"under {IDLE_GIB:.0f} GiB before training", source="NVML", cost="that much less for training",
        cure=f"kill {programs[0]['pid']}" if programs else "end other programs that use the GPU",
    )  # fmt: skip


def _throttling(gpu: Facts) -> Check:
    found = gpu["throttling"]
    serious = [reason for reason in found or [] if reason != POWER_CAP]
    fact = "not told" if found is None else ", ".join(found) or "nothing slows it down now"
    temperature = f" at {gpu['temperature_c']} °C" if gpu["temperature_c"] is not None and found else ""
    return _of(
        f"throttling-{gpu['index']}", None if found is None else bool(serious), Verdict.bad, fact + temperature,
        limit="none", source="NVML's clock event reasons", cost="lower clocks: slower steps",
        cure="clean the fans and check the airflow and the power cables",
    )  # fmt: skip


def _power_limit(gpu: Facts) -> Check:
    limit, usual = gpu["power_limit_w"], gpu["power_default_w"]
    known = limit is not None and usual is not None
    return _of(
        f"power-limit-{gpu['index']}", limit < usual - 1 if known else None, Verdict.warn,
        f"{limit:.0f} W" if limit is not None else "not told",
        limit=f"{usual:.0f} W" if usual is not None else "not told", source="the card's default",
        cost="lower clocks under load; wanted by some, for noise and heat",
        cure=f"sudo nvidia-smi -i {gpu['index']} -pl {usual:.0f}" if known else "",
    )  # fmt: skip


def _link(gpu: Facts) -> Check:
    """The width alone: an idle GPU lowers the link's generation."""
    width, most = gpu["pcie"]["width"], gpu["pcie"]["most_width"]
    known = width is not None and most is not None
    return _of(
        f"pcie-width-{gpu['index']}", width < most if known else None, Verdict.warn,
        f"x{width}, generation {gpu['pcie']['generation']} now" if known else "not told",
        limit=f"x{most}, generation {gpu['pcie']['most_generation']} under load" if known else "not told",
        source="what card and slot can do", cost="offloaded blocks and batches arrive slower",
        cure="put the card into the slot next to the CPU, and check the slot's setting in the firmware",
    )  # fmt: skip


def _health(gpu: Facts) -> Iterator[Check]:
    index = gpu["index"]
    yield _of(
        f"recovery-{index}", None if gpu["recovery"] is None else bool(gpu["recovery"]), Verdict.bad,
        "not told" if gpu["recovery"] is None else gpu["recovery"] or "no action wanted", limit="no action wanted",
        source="the driver", cost="results may be wrong until then", cure="end all programs, then: sudo reboot",
    )  # fmt: skip
    errors = gpu["ecc_errors"]
    yield _of(
        f"ecc-{index}", None if errors is None else errors > 0, Verdict.bad,
        "not told; most GeForce cards have no ECC" if errors is None else f"{errors} uncorrected memory errors",
        limit="0 since the driver was loaded", source="NVML", cost="results may be wrong", cure="sudo reboot",
    )  # fmt: skip
    rows = gpu["remapped_rows"]
    failing = None if rows is None else bool(rows["pending"] or rows["failed"] or rows["uncorrected"])
    yield _of(
        f"remapped-rows-{index}", failing, Verdict.bad,
        "not told" if rows is None else ", ".join(f"{count} {name}" for name, count in rows.items()),
        limit="0 uncorrected, pending or failed", source="NVML", cost="the card's memory is wearing out",
        cure="sudo reboot; where rows have failed, have the card replaced",
    )  # fmt: skip


def _memory(facts: Facts) -> Iterator[Check]:
    ram = min(facts["ram_gib"], facts["ram_limit_gib"] or facts["ram_gib"])
    on_gpu = bool(facts["nvml"].get("gpus"))
    yield _of(
        "ram", ram < 0.9 * (RAM_GIB if on_gpu else LEAST_RAM_GIB), Verdict.warn,
        f"{ram:.0f} GiB, {facts['ram_free_gib']:.0f} free",
        limit=f"{RAM_GIB} GiB to offload the largest models" if on_gpu else f"{LEAST_RAM_GIB} GiB", source=ADVICE,
        cost="model.offload=true does not fit for large models", cure="add memory, or choose a smaller base",
    )  # fmt: skip
    swappiness = facts["swappiness"]
    swapping = None if swappiness is None else on_gpu and swappiness > MOST_SWAPPINESS
    yield _of(
        "swappiness", swapping, Verdict.warn, "not told" if swappiness is None else str(swappiness),
        limit=f"1 to {MOST_SWAPPINESS}" if on_gpu else "any, without a GPU",
        source="offloaded weights must stay in memory", cost="steps wait for the disk",
        cure=f"echo vm.swappiness={MOST_SWAPPINESS} | sudo tee /etc/sysctl.d/90-finetune.conf && sudo sysctl --system",
    )  # fmt: skip
    yield _of(
        "swap-in-use", facts["swap_used_gib"] > 1, Verdict.warn, f"{facts['swap_used_gib']:.1f} GiB",
        limit="under 1 GiB", source="psutil", cost="what was swapped out comes back slowly",
        cure="sudo swapoff -a && sudo swapon -a",
    )  # fmt: skip


def _cpu(facts: Facts) -> Iterator[Check]:
    usable = min(facts["threads_usable"], facts["threads_quota"] or facts["threads_usable"])
    on_gpu = bool(facts["nvml"].get("gpus"))
    limit = THREADS if on_gpu else LEAST_THREADS
    yield _of(
        "cpu-threads", usable < limit, Verdict.warn, f"{usable:g} of {facts['threads']} for this program",
        limit=f"{limit}", source=ADVICE, cost="images and texts are prepared more slowly",
        cure="give the container or job more CPUs",
    )  # fmt: skip
    governor = facts["governor"]
    slow = governor == "powersave" and facts["frequency_driver"] not in DYNAMIC_DRIVERS
    yield _of(
        "cpu-governor", None if governor is None else slow, Verdict.warn, governor or "not told",
        limit="performance or schedutil", source="Linux cpufreq", cost="kernels are launched more slowly",
        cure="sudo cpupower frequency-set -g performance",
    )  # fmt: skip
    files, least = facts["open_files"], OPEN_FILES if on_gpu else LEAST_FILES
    yield _of(
        "open-files", 0 <= files < least, Verdict.warn, "unlimited" if files < 0 else f"{files:,}", limit=f"{least:,}",
        source=ADVICE, cost="many workers with many shards end with 'too many open files'",
        cure=f"ulimit -n {OPEN_FILES}; for good: /etc/security/limits.conf",
    )  # fmt: skip


def _disks(facts: Facts) -> Iterator[Check]:
    for name, place in facts["places"].items():
        id_ = name.replace(" ", "-")
        where = (
            f"{place['free_gib']:.0f} of {place['size_gib']:.0f} GiB free at {place['path']}, {place['file_system']}"
        )
        if name == "shared memory":
            yield _of(
                id_, place["size_gib"] < SHM_GIB, Verdict.warn, where, limit=f"{SHM_GIB:.0f} GiB", source=ADVICE,
                cost="loaders with workers end with a bus error", cure="start the container with --shm-size 8g",
            )  # fmt: skip
            continue
        tight = place["free_gib"] < TIGHT_GIB
        over_network = place["file_system"] in NETWORK
        read_only = "ro" in (place["options"] or "").split(",")
        too_small = tight or (name == "downloaded models" and place["free_gib"] < FREE_GIB)
        yield _of(
            id_, too_small or over_network or read_only,
            Verdict.bad if tight or read_only else Verdict.warn, where + (", read-only" if read_only else ""),
            limit=f"{FREE_GIB if name == 'downloaded models' else TIGHT_GIB:.0f} GiB free, on a disk of this machine",
            source="a large base takes 24 GiB",
            cost="a run ends when the disk is full; a network is slow to read",
            cure="du -xh --max-depth=2 . | sort -h | tail" if not over_network else "choose a local folder: run_dir=…",
        )  # fmt: skip


def _rest(facts: Facts) -> Iterator[Check]:
    synchronized = facts["clock_synchronized"]
    yield _of(
        "clock", None if synchronized is None else not synchronized, Verdict.warn,
        "not told" if synchronized is None else "synchronized" if synchronized else "not synchronized",
        limit="synchronized", source="systemd-timesyncd", cost="certificates and times of runs may be wrong",
        cure="sudo timedatectl set-ntp true",
    )  # fmt: skip
    wrong = {name: found for name, found in facts["packages"].items() if not found["fits"]}
    yield _of(
        "packages", bool(wrong) if facts["packages"] else None, Verdict.bad,
        ", ".join(f"{name} {found['version'] or 'is missing'}" for name, found in wrong.items())
        or f"{len(facts['packages'])} packages fit",
        limit=", ".join(f"{name}{found['wanted']}" for name, found in wrong.items()) or "what finetune asks for",
        source="the package's own requirements", cost="errors in the middle of a run",
        cure="python -m pip install " + " ".join(f"'{name}{found['wanted']}'" for name, found in wrong.items()),
    )  # fmt: skip
    hub = facts["hub"]
    yield _of(
        "model-cache", not hub["writable"], Verdict.bad, hub["cache"], limit="can be written", source="huggingface_hub",
        cost="no base can be downloaded", cure="export HF_HOME=$HOME/.cache/huggingface",
    )  # fmt: skip
    yield _of(
        "hub-token", None if not hub["token"] else False, Verdict.warn, "there" if hub["token"] else "none",
        limit="one, for gated bases such as Llama and FLUX", source="huggingface_hub",
    )  # fmt: skip
