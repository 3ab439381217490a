"""A memory plan as rows of text, for the terminal and for notebooks."""

from finetune.planning.plan import Plan, Setting

OFFLOADED = {"offload_activations": "activations", "offload": "blocks"}
BAR = 24  # characters of a bar


def settings_row(setting: Setting) -> list[str]:
    """Micro-batch × accumulation, recomputing, offloading, GiB, seconds a step, throughput."""
    checkpointed = {0: "none", 1: "all"}.get(setting.checkpointing, f"every {setting.checkpointing}.")
    rate = setting.count / setting.seconds
    return [
        f"{setting.micro_batch} × {setting.accumulate}",
        checkpointed,
        " + ".join(OFFLOADED[name] for name in OFFLOADED if getattr(setting, name)) or "no",
        f"{setting.gib:.1f}",
        f"{setting.seconds:.2f}" if setting.seconds < 100 else f"{setting.seconds:.0f}",
        f"{rate:,.{0 if rate > 100 else 1 if rate > 1 else 2}f}",
    ]


def settings_head(unit: str) -> tuple[str, ...]:
    """What the columns of `settings_row` say."""
    return ("micro-batch", "recomputed", "offload", "GiB", "s/step", f"{unit}/s")


def choices(plan: Plan) -> list[tuple[str, list[str]]]:
    """The chosen setting, the next best that fit, and the recipe's own, each with what it is."""
    rows = [("fastest", settings_row(plan.chosen))] if plan.chosen else []
    rows += [("next", settings_row(other)) for other in plan.others]
    fits = "recipe's own" if plan.requested.gib <= plan.budget_gib else "own, too large"
    return [*rows, (fits, settings_row(plan.requested))]


def memory(plan: Plan) -> list[tuple[str, str]]:
    """What holds memory in a training step, GiB."""
    setting = plan.chosen or plan.requested
    return [(name, f"{gib:.2f}") for name, gib in setting.parts.items() if gib >= 0.005]


def phases(plan: Plan) -> list[tuple[str, str, str]]:
    """Every phase: GiB, and a bar against the budget."""
    rows = []
    for name, gib in plan.phases.items():
        length = max(1, round(BAR * gib / plan.budget_gib)) if gib and plan.budget_gib else 0
        over = " too large" if gib > plan.budget_gib else ""
        bar = "█" * min(BAR, length) + over if gib else "in CPU memory"
        rows.append((name, f"{gib:.2f}" if gib else "–", bar))
    return rows


def facts(plan: Plan) -> list[tuple[str, str]]:
    """What was planned for what."""
    stored = f", base in {plan.quantize}" if plan.quantize != "none" else ""
    found = [
        ("base", plan.base),
        ("GPU", f"{plan.gpu}; {plan.budget_gib:.1f} GiB for this process"),
        ("arithmetic", plan.precision + stored),
    ]
    if plan.cpu_gib:
        uses = ", ".join(f"{gib:.1f} GiB for {name}" for name, gib in plan.cpu_gib.items())
        found.append(("CPU memory", f"at most {uses}"))
    return found
