"""Each fault is found by its own check and by no other, and a healthy machine raises no alarm."""

import copy
from typing import Any

import pytest

from finetune.workstation import checks
from finetune.workstation.checks import judge
from finetune.workstation.verdicts import Facts, Verdict, worst

GPU: Facts = {
    "index": 0,
    "name": "NVIDIA GeForce RTX 4090",
    "uuid": "GPU-0",
    "capability": [8, 9],
    "memory_gib": 23.99,
    "used_gib": 0.6,
    "processes": [],
    "power_limit_w": 450.0,
    "power_default_w": 450.0,
    "power_w": 21.0,
    "temperature_c": 38,
    "most_clock_mhz": 3105,
    "throttling": [],
    "pcie": {  # as an idle one has it
        "generation": 1, "width": 16, "most_generation": 4, "most_width": 16,
        "card_generation": 4, "card_width": 16, "slot_width": 16,
    },
    "ecc_errors": None,
    "remapped_rows": None,
    "recovery": "",
    "mig": None,
}  # fmt: skip
DISK = {"path": "/home/me", "free_gib": 700.0, "size_gib": 900.0, "file_system": "ext4", "options": "rw,relatime"}
HEALTHY: Facts = {
    "time": 0.0,
    "host": "desk",
    "system": "Linux 6.8",
    "container": False,
    "nvml": {"driver": "580.95.05", "cuda": 13000, "gpus": [GPU]},
    "torch": {
        "version": "2.13.0+cu130", "cuda": "13.0", "broken": None, "architectures": ["sm_80", "sm_86", "sm_90"],
        "gpus": 1, "error": None,
    },
    "visible_devices": None,
    "ram_gib": 62.6,
    "ram_free_gib": 55.0,
    "ram_limit_gib": None,
    "swap_gib": 8.0,
    "swap_used_gib": 0.0,
    "swappiness": 10,
    "threads": 32,
    "threads_usable": 32,
    "threads_quota": None,
    "governor": "powersave",
    "frequency_driver": "amd-pstate-epp",
    "open_files": 1_048_576,
    "open_files_most": 1_048_576,
    "places": {
        "outputs": DISK,
        "temporary files": DISK,
        "shared memory": DISK | {"file_system": "tmpfs"},
        "downloaded models": DISK,
    },
    "clock_synchronized": True,
    "xids": [],
    "containers": {"engines": ["docker"], "gpu_support": True},
    "packages": {
        "torch": {"version": "2.13.0+cu130", "wanted": ">=2.11", "tested": "2.13.0", "fits": True, "newer": False},
    },
    "hub": {"cache": "/home/me/.cache/huggingface/hub", "writable": True, "unreadable": [], "token": True},
    "load": None,
    "records": {},
}  # fmt: skip


def changed(facts: Facts = HEALTHY, **places: Any) -> Facts:
    """The facts with others in places such as `nvml__gpus__0__mig`."""
    facts = copy.deepcopy(facts)
    for place, value in places.items():
        *above, last = (int(part) if part.isdigit() else part.replace("-", " ") for part in place.split("__"))
        owner: Any = facts
        for part in above:
            owner = owner[part]
        owner[last] = value
    return facts


def verdicts(facts: Facts) -> dict[str, Verdict]:
    return {check.id: check.verdict for check in judge(facts)}


def test_a_healthy_machine_raises_no_alarm() -> None:
    found = verdicts(HEALTHY)
    assert worst(judge(HEALTHY)) is Verdict.unknown
    # A GeForce has neither error-correcting memory nor rows to remap.
    assert [id_ for id_, verdict in found.items() if verdict is not Verdict.ok] == ["ecc-0", "remapped-rows-0"]


TORCH = HEALTHY["packages"]["torch"]
PROGRAM = {"pid": 4321, "name": "python3", "mib": 9000}
FAULTS = [
    ("driver-for-torch", Verdict.bad, {"nvml__cuda": 12080}),
    ("torch-build", Verdict.bad, {"torch__broken": "ModuleNotFoundError: No module named 'sympy'"}),
    ("cuda-gpus", Verdict.bad, {"torch__gpus": 0, "torch__error": "unknown error"}),
    ("hidden", Verdict.bad, {"visible_devices": "", "torch__gpus": 0}),
    ("hidden", Verdict.bad, {"visible_devices": "7", "torch__gpus": 0}),
    ("architecture-0", Verdict.bad, {"torch__architectures": ["sm_90", "sm_100"]}),
    ("memory-in-use-0", Verdict.warn, {"nvml__gpus__0__used_gib": 9.5, "nvml__gpus__0__processes": [PROGRAM]}),
    ("throttling-0", Verdict.bad, {"nvml__gpus__0__throttling": ["heat (hardware)"]}),
    ("power-limit-0", Verdict.warn, {"nvml__gpus__0__power_limit_w": 300.0}),
    ("pcie-width-0", Verdict.warn, {"nvml__gpus__0__pcie__width": 8}),
    ("pcie-slot-0", Verdict.warn, {"nvml__gpus__0__pcie__slot_width": 4}),
    ("pcie-slot-0", Verdict.warn, {"nvml__gpus__0__pcie__most_generation": 3}),
    ("xid", Verdict.bad, {"xids": [{"bus": "0000:01:00", "code": 79, "hours_ago": 2.5}]}),
    ("xid", Verdict.warn, {"xids": [{"bus": "0000:01:00", "code": 31, "hours_ago": 2.5}]}),
    ("recovery-0", Verdict.bad, {"nvml__gpus__0__recovery": "reset the GPU"}),
    ("ecc-0", Verdict.bad, {"nvml__gpus__0__ecc_errors": 2}),
    (
        "remapped-rows-0",
        Verdict.bad,
        {"nvml__gpus__0__remapped_rows": {"corrected": 0, "uncorrected": 1, "pending": 1, "failed": 0}},
    ),
    ("ram", Verdict.warn, {"ram_gib": 31.2}),
    ("ram", Verdict.warn, {"ram_limit_gib": 16.0}),
    ("swappiness", Verdict.warn, {"swappiness": 60}),
    ("swap-in-use", Verdict.warn, {"swap_used_gib": 7.0}),
    ("cpu-threads", Verdict.warn, {"threads_usable": 4}),
    ("cpu-threads", Verdict.warn, {"threads_quota": 2.0}),
    ("cpu-governor", Verdict.warn, {"frequency_driver": "acpi-cpufreq"}),
    ("open-files", Verdict.warn, {"open_files": 1024}),
    ("outputs", Verdict.bad, {"places__outputs": DISK | {"free_gib": 3.0}}),
    ("outputs-mount", Verdict.bad, {"places__outputs": DISK | {"options": "ro,relatime"}}),
    ("outputs-mount", Verdict.warn, {"places__outputs": DISK | {"file_system": "nfs4"}}),
    ("outputs-mount", Verdict.warn, {"places__outputs": DISK | {"file_system": "tmpfs"}}),
    ("outputs-mount", Verdict.warn, {"places__outputs": DISK | {"options": "rw,sync,relatime"}}),
    ("models-mount", Verdict.warn, {"places__downloaded-models": DISK | {"file_system": "fuseblk"}}),
    ("models-mount", Verdict.warn, {"places__downloaded-models": DISK | {"options": "rw,strictatime"}}),
    ("models", Verdict.warn, {"places__downloaded-models": DISK | {"free_gib": 30.0}}),
    ("shared-memory", Verdict.warn, {"places__shared-memory": DISK | {"size_gib": 0.06}}),
    ("clock", Verdict.warn, {"clock_synchronized": False}),
    ("container-gpu", Verdict.warn, {"containers__gpu_support": False}),
    ("packages", Verdict.bad, {"packages__torch": TORCH | {"version": None, "fits": False}}),
    ("tested-versions", Verdict.warn, {"packages__torch": TORCH | {"version": "3.0.1", "newer": True}}),
    ("model-cache", Verdict.bad, {"hub__writable": False}),
    ("model-cache", Verdict.bad, {"hub__unreadable": ["models--a--b/blobs"]}),
]


@pytest.mark.parametrize(("id_", "verdict", "places"), FAULTS, ids=[f"{row[0]}-{n}" for n, row in enumerate(FAULTS)])
def test_a_fault_is_found_and_nothing_else(id_: str, verdict: Verdict, places: dict[str, Any]) -> None:
    before, facts = verdicts(HEALTHY), changed(**places)
    (check,) = [check for check in judge(facts) if check.verdict is not before[check.id]]
    assert (check.id, check.verdict) == (id_, verdict)
    assert check.limit
    assert check.source
    assert check.cost
    assert check.cure


MISMATCH = "Driver/library version mismatch"
WITHOUT_CUDA = {"version": "2.13.0+cpu", "cuda": None, "broken": None, "architectures": [], "gpus": None, "error": None}


@pytest.mark.parametrize(
    ("places", "id_", "verdict", "cure"),
    [
        ({"nvml": {"error": MISMATCH}}, "driver", Verdict.bad, "reboot"),
        ({"nvml": {"error": "NVML Shared Library Not Found"}}, "driver", Verdict.warn, "driver"),
        ({"nvml": {"error": "Driver Not Loaded"}, "container": True}, "driver", Verdict.warn, "--gpus all"),
        ({"nvml": {"driver": "580", "cuda": 13000, "gpus": []}}, "driver", Verdict.bad, "lspci"),
        ({"torch": WITHOUT_CUDA}, "torch-build", Verdict.bad, "--force-reinstall torch==2.13.0"),
        ({"nvml__gpus__0__mig": True, "torch__gpus": 0}, "cuda-gpus", Verdict.bad, "mig -cgi"),
    ],
)
def test_what_leaves_torch_without_a_gpu(places: dict[str, Any], id_: str, verdict: Verdict, cure: str) -> None:
    (check,) = [check for check in judge(changed(**places)) if check.id == id_]
    assert check.verdict is verdict
    assert cure in check.cure


TWO = {"nvml__gpus": [GPU, GPU | {"index": 1}]}
MIG = {"nvml__gpus": [GPU | {"mig": True}, GPU | {"index": 1}]}


@pytest.mark.parametrize(
    ("visible", "shown", "gpus", "hidden", "cuda"),
    [
        (None, 2, TWO, Verdict.ok, Verdict.ok),
        ("0", 1, TWO, Verdict.ok, Verdict.ok),  # by choice
        (None, 1, TWO, Verdict.ok, Verdict.warn),
        (None, 1, MIG, Verdict.ok, Verdict.ok),
        (None, None, TWO, Verdict.ok, Verdict.unknown),
        ("0", None, TWO, Verdict.unknown, Verdict.unknown),
        ("", 0, TWO, Verdict.bad, Verdict.ok),
    ],
)
def test_gpus_are_shown_hidden_or_missing(
    visible: str | None, shown: int | None, gpus: dict[str, Any], hidden: Verdict, cuda: Verdict
) -> None:
    found = verdicts(changed(visible_devices=visible, torch__gpus=shown, **gpus))
    assert (found["hidden"], found["cuda-gpus"]) == (hidden, cuda)


@pytest.mark.parametrize("container", [False, True])
def test_no_cure_harms_what_is_at_work_or_reaches_for_the_host(container: bool) -> None:
    for _, _, places in FAULTS:
        for check in judge(changed(container=container, **places)):
            assert "kill" not in check.cure
            assert "reboot" not in check.cure or "(it ends all that is at work)" in check.cure
            assert check.cure.startswith("on the host: ") == (container and "sudo " in check.cure)


def test_programs_on_a_gpu_are_to_be_looked_at() -> None:
    for program, cure in (
        (PROGRAM, "wait until it is over, or have it ended; whose it is: ps -o user,etime,args -p 4321"),
        (PROGRAM | {"name": None}, "wait until it is over, or have it ended, perhaps outside this container"),
    ):
        facts = changed(nvml__gpus__0__used_gib=9.5, nvml__gpus__0__processes=[program])
        assert next(check.cure for check in judge(facts) if check.id == "memory-in-use-0") == cure


@pytest.mark.parametrize(
    ("most", "container", "cure"),
    [
        (1_048_576, False, "ulimit -n 1000000"),
        (-1, True, "ulimit -n 1000000"),
        (20_000, True, "start the container with --ulimit nofile=1000000"),
        (
            20_000,
            False,
            "echo '* - nofile 1000000' | sudo tee /etc/security/limits.d/90-finetune.conf; then log in again",
        ),
    ],
)
def test_more_open_files_are_had_where_their_limit_is_set(most: int, container: bool, cure: str) -> None:
    facts = changed(open_files=1024, open_files_most=most, container=container)
    assert next(check.cure for check in judge(facts) if check.id == "open-files") == cure


def test_without_swap_nothing_is_swapped() -> None:
    assert verdicts(changed(swappiness=60, swap_gib=0.0))["swappiness"] is Verdict.ok


def blank(value: Any) -> Any:
    """What a driver that answers nothing leaves of a GPU."""
    return {name: blank(part) for name, part in value.items()} if isinstance(value, dict) else None


def test_what_can_not_be_told_is_never_well() -> None:
    facts = changed(nvml__gpus__0=blank(GPU) | {"index": 0, "name": "GPU"}, swappiness=None, governor=None)
    facts |= {"clock_synchronized": None, "packages": {}, "xids": None}
    facts["places"]["outputs"] |= {"file_system": None, "options": None}
    of_the_gpu = {id_: verdict for id_, verdict in verdicts(facts).items() if id_.endswith("-0")}
    assert len(of_the_gpu) == 9
    assert set(of_the_gpu.values()) == {Verdict.unknown}
    said = {check.id: check.fact for check in judge(facts)}
    assert said["packages"] == said["tested-versions"] == checks.NO_LIST
    unpinned = changed(packages__torch=TORCH | {"tested": None})
    (untold,) = [check for check in judge(unpinned) if check.id == "tested-versions"]
    assert (untold.verdict, untold.fact) == (Verdict.unknown, "there is no constraints.txt to compare with")
    for id_ in ("swappiness", "cpu-governor", "clock", "packages", "tested-versions", "xid", "outputs-mount"):
        assert verdicts(facts)[id_] is Verdict.unknown


@pytest.mark.parametrize("amount", [0.5, 2.0])
def test_a_machine_without_a_gpu_needs_less(amount: float) -> None:
    facts = changed(nvml={"error": "NVML Shared Library Not Found"}, torch=WITHOUT_CUDA, swappiness=60)
    facts |= {"ram_gib": 8 * amount, "threads_usable": int(2 * amount), "open_files": int(1024 * amount)}
    limited = {id_: verdicts(facts)[id_] for id_ in ("ram", "cpu-threads", "open-files")}
    assert set(limited.values()) == {Verdict.warn if amount < 1 else Verdict.ok}
    assert verdicts(facts)["swappiness"] is Verdict.ok


def test_in_a_container_other_things_are_at_fault() -> None:
    inside = changed(container=True, places__outputs=DISK | {"file_system": "overlay"}, clock_synchronized=False)
    found = {check.id: check for check in judge(inside)}
    assert verdicts(changed(places__outputs=DISK | {"file_system": "overlay"}))["outputs-mount"] is Verdict.ok
    assert found["outputs-mount"].verdict is Verdict.warn
    assert "docker run --volume" in found["outputs-mount"].cure
    assert found["container-gpu"].verdict is Verdict.ok  # the driver answers in here
    assert verdicts(changed(container=True, nvml={"error": "Driver Not Loaded"}))["container-gpu"] is Verdict.unknown
    assert found["clock"].cure.startswith("on the host: ")


def test_where_no_container_needs_a_gpu_nothing_is_wrong_with_them() -> None:
    for places in ({"containers__engines": []}, {"nvml": {"error": "NVML Shared Library Not Found"}}):
        assert verdicts(changed(containers__gpu_support=False, **places))["container-gpu"] is Verdict.unknown


def test_every_check_has_its_fault() -> None:
    named = {id_ for id_, *_ in FAULTS} | {"driver", "torch-build", "hub-token"}
    assert set(verdicts(HEALTHY)) - named == {"temporary-files"}  # judged as the outputs are
