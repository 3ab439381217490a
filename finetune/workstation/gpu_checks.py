"""What the facts of driver, torch and GPUs mean; see `checks`."""

from collections import Counter
from collections.abc import Iterator

from finetune.run.progress import plural
from finetune.workstation.nvml import POWER_CAP
from finetune.workstation.verdicts import Check, Facts, Verdict, check_of

REBOOT = "sudo reboot (it ends all that is at work)"
SILENT = "the driver does not say"
MISMATCH = "version mismatch"  # of driver and library, as NVML says it
IDLE_GIB = 1.0  # a desktop and a context or two
WIDTH, GENERATION = 16, 4  # of PCIe
PROGRAM_XIDS = (8, 13, 31, 43, 45, 69)  # NVIDIA's catalogue of Xids tells to restart the program, or nothing
XIDS = {
    13: " (exception in a kernel)",
    31: " (access outside memory)",
    43: " (a program's channel was reset)",
    45: " (a program was ended)",
    48: " (uncorrectable memory error)",
    63: " (memory row remapped)",
    64: " (remapping failed)",
    74: " (NVLink)",
    79: " (fallen off the bus)",
    94: " (contained memory error)",
    95: " (uncontained memory error)",
    119: " (its processor does not answer)",
}


def judge(facts: Facts) -> Iterator[Check]:
    """Every check of driver, torch and each GPU."""
    yield from _driver(facts)
    yield from _torch(facts)
    yield from _gpus(facts)
    yield from _xids(facts)


def _driver(facts: Facts) -> Iterator[Check]:
    found = facts["nvml"]
    error = found.get("error")
    if error and MISMATCH in error.lower():
        yield Check(
            "driver", Verdict.bad, error, "one version of the NVIDIA driver's module and library", "NVIDIA driver",
            "no program can use the GPU", REBOOT,
        )  # fmt: skip
    elif error:
        yield Check(
            "driver", Verdict.warn, f"no NVIDIA driver answers ({error})", "a driver that answers", "NVML",
            "training runs on the CPU: enough for the embedded models",
            "start the container with --gpus all" if facts["container"] else "install your system's NVIDIA driver",
        )  # fmt: skip
    else:
        counts = Counter(str(gpu["name"]) for gpu in found["gpus"])
        names = ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items()) or "no GPU"
        yield check_of(
            "driver", not found["gpus"], Verdict.bad, f"driver {found['driver']} with {names}",
            limit="at least one GPU", source="NVML", cost="training runs on the CPU", cure="lspci | grep -i nvidia",
        )  # fmt: skip


def _torch(facts: Facts) -> Iterator[Check]:
    torch, gpus = facts["torch"], facts["nvml"].get("gpus") or []
    build = f"torch {torch['version']}" + (f" for CUDA {torch['cuda']}" if torch["cuda"] else ", a build without CUDA")
    plain, faulty = torch["version"].partition("+")[0], bool(gpus and not torch["cuda"]) or bool(torch["broken"])
    yield check_of(
        "torch-build", faulty if gpus or torch["cuda"] else None, Verdict.bad,
        build + (f", which can't be imported ({torch['broken']})" if torch["broken"] else ""),
        limit="a build with CUDA where there is a GPU", source="torch.version.cuda", cost="the GPU stays unused",
        cure=f"python -m pip install --force-reinstall torch=={plain}",
    )  # fmt: skip
    if not gpus or not torch["cuda"]:
        return
    needs, has = int(torch["cuda"].partition(".")[0]), facts["nvml"].get("cuda")
    yield check_of(
        "driver-for-torch", has and has // 1000 < needs, Verdict.bad,
        f"the driver runs CUDA {has // 1000}.{has % 1000 // 10}" if has else "the driver does not say",
        limit=f"CUDA {needs}", source="the CUDA that torch was built for; minor versions are compatible",
        cost="torch finds no GPU", cure=f"update the NVIDIA driver, then: {REBOOT}",
    )  # fmt: skip
    yield from _reached(facts["visible_devices"], torch, gpus)
    for gpu in gpus:
        yield _architecture(gpu, torch["architectures"])


def _reached(visible: str | None, torch: Facts, gpus: list[Facts]) -> Iterator[Check]:
    """visible: CUDA_VISIBLE_DEVICES. By choice it hides some GPUs, hardly all; without it CUDA shows every one."""
    shown, mig = torch["gpus"], any(gpu["mig"] for gpu in gpus)
    hidden = visible is not None and shown == 0
    fact = "CUDA_VISIBLE_DEVICES is not set" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}"
    yield check_of(
        "hidden", None if visible is not None and shown is None else hidden, Verdict.bad,
        f"{fact} hides every GPU" if hidden else fact,
        limit="unset, or numbers of GPUs", source="CUDA", cost="the GPU stays unused",
        cure="unset CUDA_VISIBLE_DEVICES",
    )  # fmt: skip
    seen = "CUDA does not say which GPUs it shows" if shown is None else f"CUDA shows {shown} of {len(gpus)} GPUs"
    fewer = shown is not None and visible is None and (shown == 0 or (shown < len(gpus) and not mig))
    yield check_of(
        "cuda-gpus", None if shown is None else fewer, Verdict.warn if shown else Verdict.bad,
        f"{seen}: {torch['error']}" if torch["error"] else seen,
        limit="at least one" if visible is not None or mig else "all", source="cuDeviceGetCount of the NVIDIA driver",
        cost="the others stay unused" if shown else "training runs on the CPU",
        cure="make an instance: sudo nvidia-smi mig -cgi 0 -C" if mig else REBOOT,
    )  # fmt: skip


def _architecture(gpu: Facts, built: list[str]) -> Check:
    """Code for one compute capability runs on all of the same generation that are not older."""
    capability = gpu["capability"]
    known = capability is not None and bool(built)
    codes = [(int(code[3:].rstrip("af")[:-1]), int(code[3:].rstrip("af")[-1])) for code in built if code[:3] == "sm_"]
    runs = known and any(major == capability[0] and minor <= capability[1] for major, minor in codes)
    name = "?" if capability is None else f"sm_{capability[0]}{capability[1]}"
    return check_of(
        f"architecture-{gpu['index']}", not runs if known else None, Verdict.bad, f"{gpu['name']} is {name}",
        limit=", ".join(built) or SILENT, source="torch.cuda.get_arch_list",
        cost="programs end with 'no kernel image'", cure="install a torch that was built for this GPU",
    )  # fmt: skip


def _gpus(facts: Facts) -> Iterator[Check]:
    for gpu in facts["nvml"].get("gpus") or []:
        yield _others(gpu)
        yield _throttling(gpu)
        yield _power_limit(gpu)
        yield _link(gpu)
        yield _slot(gpu)
        yield from _health(gpu)


def _others(gpu: Facts) -> Check:
    used, programs = gpu["used_gib"], gpu["processes"] or []
    names = ", ".join(f"{one['name'] or 'a program'} ({one['pid']}): {one['mib'] or '?'} MiB" for one in programs)
    fact = SILENT if used is None else f"{used:.1f} of {gpu['memory_gib']:.1f} GiB in use"
    known = ",".join(str(one["pid"]) for one in programs if one["name"])  # the others are of another container
    return check_of(
        f"memory-in-use-{gpu['index']}", None if used is None else used > IDLE_GIB, Verdict.warn,
        fact + (f" by {names}" if names else ""),
        limit=f"under {IDLE_GIB:.0f} GiB before training", source="NVML", cost="that much less for training",
        cure="wait until it is over, or have it ended" + (f"; whose it is: ps -o user,etime,args -p {known}" if known
        else ", perhaps outside this container"),
    )  # fmt: skip


def _throttling(gpu: Facts) -> Check:
    found = gpu["throttling"]
    serious = [reason for reason in found or [] if reason != POWER_CAP]
    fact = SILENT if found is None else ", ".join(found) or "nothing slows it down now"
    temperature = f" at {gpu['temperature_c']} °C" if gpu["temperature_c"] is not None and found else ""
    return check_of(
        f"throttling-{gpu['index']}", None if found is None else bool(serious), Verdict.bad, fact + temperature,
        limit="none", source="NVML's clock event reasons", cost="lower clocks: slower steps",
        cure="clean the fans and check the airflow and the power cables",
    )  # fmt: skip


def _power_limit(gpu: Facts) -> Check:
    limit, usual = gpu["power_limit_w"], gpu["power_default_w"]
    known = limit is not None and usual is not None
    return check_of(
        f"power-limit-{gpu['index']}", limit < usual - 1 if known else None, Verdict.warn,
        f"{limit:.0f} W" if limit is not None else SILENT,
        limit=f"{usual:.0f} W" if usual is not None else SILENT, source="the card's default",
        cost="lower clocks under load; wanted by some, for noise and heat",
        cure=f"sudo nvidia-smi -i {gpu['index']} -pl {usual:.0f}" if known else "",
    )  # fmt: skip


def _link(gpu: Facts) -> Check:
    """The width alone: an idle GPU lowers the link's generation."""
    width, most = gpu["pcie"]["width"], gpu["pcie"]["most_width"]
    known = width is not None and most is not None
    return check_of(
        f"pcie-width-{gpu['index']}", width < most if known else None, Verdict.warn,
        f"x{width}, generation {gpu['pcie']['generation']} now" if known else SILENT,
        limit=f"x{most}, generation {gpu['pcie']['most_generation']} under load" if known else SILENT,
        source="what card and slot can do", cost="offloaded blocks and batches arrive slower",
        cure="put the card into the slot next to the CPU, and check the slot's setting in the firmware",
    )  # fmt: skip


def _slot(gpu: Facts) -> Check:
    """Whether the slot is made for the card. A card for generation 5 loses little in one for 4."""
    pcie = gpu["pcie"]
    ends = (
        ("x", pcie["card_width"], pcie["slot_width"], WIDTH),
        ("generation ", pcie["card_generation"], pcie["most_generation"], GENERATION),
    )
    known = [(unit, card, slot, enough) for unit, card, slot, enough in ends if None not in (card, slot)]
    held_back = any(slot < min(card, enough) for _, card, slot, enough in known)
    return check_of(
        f"pcie-slot-{gpu['index']}", held_back if known else None, Verdict.warn,
        "; ".join(f"card {unit}{card}, slot {unit}{slot}" for unit, card, slot, _ in known) or SILENT,
        limit=f"x{WIDTH}, generation {GENERATION}, as far as the card can", source="16 GT/s feed a 24 GB GPU",
        cost="offloaded blocks and batches arrive slower",
        cure="put the card into another slot, in most machines the one next to the CPU",
    )  # fmt: skip


def _xids(facts: Facts) -> Iterator[Check]:
    found = facts["xids"]
    if not found and not facts["nvml"].get("gpus"):
        return
    codes = Counter(xid["code"] for xid in found or [])
    serious = [code for code in codes if code not in PROGRAM_XIDS]
    words = [f"Xid {code}{XIDS.get(code, '')}, {plural(count, 'time')}" for code, count in codes.items()]
    told = "none since the machine started" if found is not None else "only root may read the kernel's log here: sudo"
    last = f"; the last {found[-1]['hours_ago']:.1f} hours ago at {found[-1]['bus']}" if found else ""
    yield check_of(
        "xid", None if found is None else bool(found), Verdict.bad if serious else Verdict.warn,
        "; ".join(words) + last or told,
        limit="none", source="the kernel's log", cost="runs end with CUDA errors; of hardware it comes again",
        cure=(
            f"{REBOOT}; if it comes again: power cables, riser, heat, remapped rows; else have the card replaced"
            if serious
            else "look at what ran then: most such errors are of a program"
        ),
    )  # fmt: skip


def _health(gpu: Facts) -> Iterator[Check]:
    index = gpu["index"]
    yield check_of(
        f"recovery-{index}", None if gpu["recovery"] is None else bool(gpu["recovery"]), Verdict.bad,
        SILENT if gpu["recovery"] is None else gpu["recovery"] or "the driver requires no reset",
        limit="no reset required", source="the driver", cost="results may be wrong until then",
        cure=f"end all programs, then: {REBOOT}",
    )  # fmt: skip
    errors = gpu["ecc_errors"]
    yield check_of(
        f"ecc-{index}", None if errors is None else errors > 0, Verdict.bad,
        f"{SILENT}; most GeForce cards have no ECC" if errors is None else f"{errors} uncorrected memory errors",
        limit="0 since the driver was loaded", source="NVML", cost="results may be wrong", cure=REBOOT,
    )  # fmt: skip
    rows = gpu["remapped_rows"]
    failing = None if rows is None else bool(rows["pending"] or rows["failed"] or rows["uncorrected"])
    yield check_of(
        f"remapped-rows-{index}", failing, Verdict.bad,
        SILENT if rows is None else ", ".join(f"{count} {name}" for name, count in rows.items()),
        limit="0 uncorrected, pending or failed", source="NVML", cost="the card's memory is wearing out",
        cure=f"{REBOOT}; where rows have failed, have the card replaced",
    )  # fmt: skip
