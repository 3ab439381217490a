"""Steps of a training that took many times the usual: what its curves say of one, in words."""

from collections.abc import Mapping, Sequence

from finetune.run.progress import plural

SECONDS, USUAL_S = "slow/seconds", "slow/usual_seconds"
OTHERS_CPU, SWAPPED_MIB = "slow/others_cpu_ratio", "slow/swapped_mib"
THROTTLED, GPU_PROGRAMS = "slow/gpu_throttled", "slow/other_gpu_programs"
"""Tags of curves: of the CPUs' time since the last look what others took, memory moved to and from disk since then, and
at this moment whether heat, a power brake or the hardware slows the GPU down, and how many others compute on it. What
can't be told is absent."""
MUCH = {THROTTLED: 0.0, SWAPPED_MIB: 100.0, OTHERS_CPU: 0.25, GPU_PROGRAMS: 0.0}
"""Above this it is a cause."""


def causes(values: Mapping[str, float]) -> list[str]:
    """The tags that stand out."""
    return [tag for tag, limit in MUCH.items() if values.get(tag, 0.0) > limit]


def line(step: int, values: Mapping[str, float]) -> str:
    """One sentence about one step."""
    seconds, usual_s = values[SECONDS], values[USUAL_S]
    words = {
        THROTTLED: "heat, a power brake or the hardware slowed the GPU down",
        SWAPPED_MIB: f"{values.get(SWAPPED_MIB, 0.0):,.0f} MiB moved between memory and swap",
        OTHERS_CPU: f"other programs took {values.get(OTHERS_CPU, 0.0):.0%} of the CPUs",
        GPU_PROGRAMS: f"{plural(int(values.get(GPU_PROGRAMS, 0)), 'other program')} computed on the GPU",
    }
    found = "; ".join(words[tag] for tag in causes(values))
    return (
        f"step {step} took {seconds:.3g} s, {seconds / usual_s:.0f} times the usual {usual_s:.2g} s; "
        f"{found or 'what is known of the machine does not explain it'}"
    )


def lines(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """Of all that a run's curves have."""
    steps: dict[float, dict[str, float]] = {}
    for tag in (SECONDS, USUAL_S, *MUCH):
        for step, value in curves.get(tag, ()):
            steps.setdefault(step, {})[tag] = value
    return [line(int(step), values) for step, values in sorted(steps.items()) if {SECONDS, USUAL_S} <= values.keys()]
