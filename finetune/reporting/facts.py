"""Records as rows of plain text: the one place for labels, number formats and wording.

Terminal, notebook, report and model card take their figures from here; they only lay them out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from finetune.config.schema import ExportFormat
from finetune.planning.plan import Plan, Setting
from finetune.run.progress import plural, size_text
from finetune.run.records import Adapter, CaptionSet, Dataset, Run, TextSet
from finetune.run.slow_steps import MUCH, OTHERS_CPU
from finetune.run.step_time import MEANINGS, Profile, StepTime


class Fact(NamedTuple):
    """One row. note: what the value means or how it came about."""

    label: str
    value: str
    note: str = ""

    @property
    def text(self) -> str:
        """The value, with the note in brackets."""
        return f"{self.value} ({self.note})" if self.note else self.value


class Table(NamedTuple):
    """Rows of cells under a title. head: of every column but the first."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def run_facts(
    run: Run, dataset: Dataset | TextSet | None = None, settings: Mapping[str, Any] | None = None
) -> list[Fact]:
    """What a finished run did and took, on which data set and with which settings, as far as these are known."""
    share = run.trainable / run.total if run.total else 0.0
    found = [Fact("loss", f"{run.first_loss:.4f} → {run.last_loss:.4f}", "first step → end, smoothed")]
    if run.first_validation is not None and run.best_validation is not None:
        at = [] if run.best_step is None else [f"best at step {run.best_step:,}"]
        where = ["on training examples"] if dataset and not dataset.validation else []
        losses = f"{run.first_validation:.4f} → {run.best_validation:.4f}"
        found.append(Fact("validation loss", losses, ", ".join(at + where)))
    found += [
        Fact(
            "trained on",
            plural(run.items, run.unit.removesuffix("s")),
            f"in {plural(run.steps, 'step')}{_visits(run, dataset)}",
        ),
        *_batch(run),
        *_rate(settings or {}),
        Fact("trained parameters", f"{run.trainable:,}", f"{share:.2%} of {run.total:,}"),
        Fact("training time", duration(run.seconds)),
        Fact("speed", f"{rate(run.items_per_s)} {run.unit}/s"),
        Fact("peak memory", f"{run.peak_gib:.2f} GiB", _memory(run)),
    ]
    if run.oom_fallbacks:
        found.append(Fact("memory ran out", f"continued with {run.oom_fallbacks}"))
    if run.skipped_steps:
        found.append(Fact("skipped steps", f"{run.skipped_steps:,}", "loss or gradient not finite"))
    return [*found, *_energy(run, settings or {})]


def _energy(run: Run, settings: Mapping[str, Any]) -> list[Fact]:
    """What the GPU took and what that cost, as far as both are known; nothing without a GPU that tells."""
    if run.energy_j is None or not run.energy_s:
        return []
    kwh, hours, cost = run.energy_j / JOULES_PER_KWH, run.energy_s / 3600, settings.get("cost")
    known = cost if isinstance(cost, Mapping) else {}
    price, per_hour = (
        number if isinstance(number := known.get(key), int | float) else 0.0 for key in ("per_kwh", "rented_per_hour")
    )
    currency, gpu = known.get("currency", ""), known.get("rented_gpu") or "a rented GPU"
    watts = run.energy_j / run.energy_s
    found = [Fact("GPU energy", f"{kwh:.3g} kWh", f"{watts:.0f} W for {duration(run.energy_s)}, the GPU alone")]
    if price > 0:
        found.append(Fact("electricity", f"{_money(kwh * price)} {currency}", f"{price:g} {currency}/kWh"))
    if per_hour > 0:
        as_fast = f"{gpu} at {per_hour:g} {currency}/h, if it is as fast"
        found.append(Fact("rented instead", f"{_money(hours * per_hour)} {currency}", as_fast))
    return found


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.1 else f"{amount:.2g}"


def _visits(run: Run, dataset: Dataset | TextSet | None) -> str:
    """How often the run saw an example; empty where nobody knows."""
    if isinstance(dataset, Dataset) and dataset.train:
        return f", {visits(run.items / dataset.train, 'images')}"
    if isinstance(dataset, TextSet) and dataset.packs and run.effective:
        return f", {visits(run.steps * run.effective / dataset.packs, 'tokens')}"
    return ""


def visits(epochs: float, unit: str) -> str:
    """Such as "44 visits an image": what people count who train on few images; of texts the passes."""
    count = f"{epochs:,.0f}" if epochs >= 9.95 else f"{epochs:.1f}"
    return f"{count} visits an image" if unit == "images" else f"{count} passes over the data"


def update_scale(lora: Mapping[str, Any]) -> float:
    """What the update of an adapter with these settings is scaled by, alpha / rank mostly."""
    rank = lora["rank"] ** 0.5 if lora.get("rslora") else lora["rank"]
    return float(lora["alpha"] / rank)


def rate_fact(lr: float, scale: float) -> Fact:
    """The learning rate, and times `update_scale` the one by which different tools compare."""
    return Fact("learning rate", f"{lr:g}", f"× alpha / rank = {lr * scale:g}")


def _rate(settings: Mapping[str, Any]) -> list[Fact]:
    """Nothing where a run folder of other days or another person doesn't say."""
    optim, lora = settings.get("optim", {}), settings.get("lora", {})
    numbers = (optim.get("lr"), lora.get("rank"), lora.get("alpha"))
    said = all(isinstance(number, int | float) and number > 0 for number in numbers)
    return [rate_fact(optim["lr"], update_scale(lora))] if said else []


def _batch(run: Run) -> list[Fact]:
    """How many examples an optimiser step takes, and how it is cut up; nothing where an old record doesn't say."""
    one = run.effective // run.processes
    if not one or not run.micro_batch:
        return []
    parts = f"{run.micro_batch} × {one // run.micro_batch} accumulated"
    if one % run.micro_batch:  # half of an odd micro-batch leaves a rest
        parts = f"micro-batch {run.micro_batch} at most"
    of_all = f", {run.processes} processes" if run.processes > 1 else ""
    return [Fact("effective batch", f"{run.effective}", parts + of_all)]


def _memory(run: Run) -> str:
    """GiB of the training alone; empty without a GPU or with trainer.autotune=off."""
    figures = {"planned": run.planned_gib, "dry run": run.dry_run_gib, "training": run.measured_gib}
    return ", ".join(f"{name} {gib:.2f}" for name, gib in figures.items() if gib is not None)


def caption_counts(captions: CaptionSet) -> str:
    """Such as "40 images, 12 captioned by the model, 28 by you"."""
    generated = sum(item.source == "generated" for item in captions.items)
    bad = f", {len(captions.skipped):,} unreadable and left out" if captions.skipped else ""
    by_hand = len(captions.items) - generated
    return f"{plural(len(captions.items), 'image')}, {generated:,} captioned by the model, {by_hand:,} by you{bad}"


def dataset_facts(dataset: Dataset) -> list[Fact]:
    """How many images, in which buckets, and what the cache saved."""
    buckets = [f"{count} of {name} pixels" for name, count in dataset.buckets.items()]
    return [
        Fact("to train on", f"{dataset.train:,}"),
        Fact("held out", f"{dataset.validation:,}"),
        Fact("buckets", ", ".join(buckets) or "–"),
        Fact("smaller than their bucket", f"{dataset.upscaled:,}"),
        Fact("encoded", f"{dataset.encoded:,} now, {dataset.cached:,} found in the cache"),
    ]


def text_set_facts(texts: TextSet) -> list[Fact]:
    """What became of the conversations."""
    share = texts.trained / texts.tokens if texts.tokens else 0.0
    fill = f"{texts.fill_share:.1%} filled, {texts.trained_share:.1%} with trained tokens"
    found = [
        Fact("read from", texts.source),
        Fact("rows to train on", f"{texts.train:,}"),
        Fact("rows held out", f"{texts.validation:,}"),
        Fact("tokens", f"{texts.tokens:,}"),
        Fact("trained tokens", f"{texts.trained:,}", f"{share:.1%}"),
        Fact("one epoch", f"{plural(texts.packs, 'pack')}, {fill}"),
        Fact("encoded", "earlier, found in the cache" if texts.cached else "now"),
    ]
    if texts.truncated_share:
        found.append(Fact("trained tokens cut off by the length", f"{texts.truncated_share:.2%}"))
    if texts.bad:
        found.append(Fact("unusable rows, left out", f"{texts.bad:,}"))
    return found


def record_facts(record: Any) -> list[Fact]:
    """The fields of a record that nobody has described, a row for each entry of a mapping."""
    found: list[Fact] = []
    for name, value in ((field.name.replace("_", " "), getattr(record, field.name)) for field in fields(record)):
        entries = value.items() if isinstance(value, Mapping) else [(name, value)]
        found += [
            Fact(str(label), f"{entry:.4g}" if isinstance(entry, float) else str(entry)) for label, entry in entries
        ]
    return found


def adapter_table(adapter: Adapter) -> Table:
    """A row for each exported file."""
    rows = [
        (name, file, file_size(Path(adapter.folder) / file), difference(name, adapter.differences))
        for name, file in adapter.files.items()
    ]
    return Table("format", ("file", "size", "difference to the trained model"), rows)


IN_NATS = {export_format.name for export_format in ExportFormat if export_format.limit == "divergence"}


def difference(export_format: str, differences: Mapping[str, float]) -> str:
    """How far an exported file is from the trained model: relative, or in nats per token for whole models."""
    if export_format not in differences:
        return "average of the weights"
    unit = " nats per token (KL)" if export_format in IN_NATS else ""
    return f"{differences[export_format]:.1e}{unit}" if differences[export_format] else "no difference"


JOULES_PER_KWH = 3.6e6
LONGEST_NAME = 56  # characters of a kernel's
BAR = 24  # characters of a bar against the budget
OFFLOADED = {"offload_activations": "activations", "offload": "blocks"}


def plan_tables(plan: Plan) -> list[Table]:
    """What was planned for what, settings, a training step, and all phases against the budget."""
    step = plan.chosen or plan.requested
    return [
        Table("plan", ("",), [(fact.label, fact.text) for fact in _plan_facts(plan)]),
        Table(
            "settings that train the same",
            ("micro-batch", "checkpointing", "offload", "GiB", "s/step", f"{plan.unit}/s"),
            _settings(plan),
        ),
        Table("a training step", ("GiB",), [(name, f"{gib:.2f}") for name, gib in step.parts.items() if gib >= 0.005]),
        Table("all phases, each at its largest", ("GiB", "time", ""), _phases(plan)),
    ]


def _phases(plan: Plan) -> list[tuple[str, ...]]:
    """Memory and time of each, and the time of all."""
    rows = [
        (name, f"{gib:.2f}" if gib else "–", _about(plan.seconds.get(name)), _bar(gib, plan.budget_gib))
        for name, gib in plan.phases.items()
    ]
    known = [seconds for seconds in plan.seconds.values() if seconds is not None]
    unknown = "" if len(known) == len(plan.phases) else "and what is unknown"
    return [*rows, ("together", "", _about(sum(known)), unknown)]


def _about(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds) if seconds else "none"


def _plan_facts(plan: Plan) -> list[Fact]:
    stored = f", base in {plan.quantize}" if plan.quantize != "none" else ""
    found = [
        Fact("base", plan.base),
        Fact("GPU", f"{plan.gpu}; {plan.budget_gib:.1f} GiB for this process"),
        Fact("precision", plan.precision + stored),
    ]
    if plan.lr:
        found.append(rate_fact(plan.lr, plan.lr_scale))
    if plan.steps:
        about = "roughly " if plan.guessed else ""
        seen = "" if plan.epochs is None else about + visits(plan.epochs, plan.unit)
        found.append(Fact("training", f"{plural(plan.steps, 'step')} of {plan.effective}", seen))
    if plan.download:
        sizes = ", ".join(f"{size / 1e9:.1f} GB for {name}" for name, size in plan.download.items())
        found.append(Fact("to download", f"about {sizes}"))
    if plan.disk:
        cache = "" if plan.cache_bytes is None else f", {size_text(plan.cache_bytes)} of cache"
        free = "" if plan.free_bytes is None else f"; {size_text(plan.free_bytes)} free"
        most = size_text(plan.disk.bytes + (plan.cache_bytes or 0.0))
        found.append(Fact("disk", f"about {most} ({plan.disk.parts}{cache}){free}"))
    if plan.cpu_gib:
        uses = ", ".join(f"{gib:.1f} GiB for {name}" for name, gib in plan.cpu_gib.items())
        found.append(Fact("CPU memory", f"at most {uses}"))
    return found


def _settings(plan: Plan) -> list[tuple[str, ...]]:
    """The chosen setting, the next best that fit, and the recipe's own if it is none of these, each with what it is."""
    named = [("fastest", plan.chosen)] if plan.chosen else []
    named += [("next", other) for other in plan.others]
    own = plan.requested.overrides
    rows = [(f"{name}, own" if setting.overrides == own else name, setting) for name, setting in named]
    if all(setting.overrides != own for _, setting in named):
        rows.append(("recipe's own" if plan.requested.gib <= plan.budget_gib else "own, too large", plan.requested))
    return [(name, *_setting(setting)) for name, setting in rows]


def _setting(setting: Setting) -> list[str]:
    """Micro-batch × accumulation, activation checkpointing, offloading, GiB, seconds per step, throughput."""
    per_s = setting.count / setting.seconds
    return [
        f"{setting.micro_batch} × {setting.accumulate}",
        {0: "none", 1: "all blocks"}.get(setting.checkpointing, f"1 block in {setting.checkpointing}"),
        " + ".join(OFFLOADED[name] for name in OFFLOADED if getattr(setting, name)) or "no",
        f"{setting.gib:.1f}",
        f"{setting.seconds:.2f}" if setting.seconds < 100 else f"{setting.seconds:.0f}",
        f"{per_s:,.{0 if per_s > 100 else 1 if per_s > 1 else 2}f}",
    ]


def _bar(gib: float, budget_gib: float) -> str:
    if not gib:
        return "in CPU memory"
    length = max(1, round(BAR * gib / budget_gib)) if budget_gib else 0
    return "█" * min(BAR, length) + (" too large" if gib > budget_gib else "")


def profile_tables(profile: Profile) -> list[Table]:
    """What was profiled where, a step of the setting that trains, others beside it, and what takes most."""
    own, (unit, several) = profile.times[0], (profile.times[0].unit, profile.times)
    if profile.checked:
        several = (*several, profile.checked)
    spread = f"fastest {_ms(own.fastest_s)}, slowest {_ms(own.slowest_s)}"
    threads = f", {plural(profile.threads, 'thread')}" if profile.threads else ""
    facts = [
        Fact("machine", profile.device + threads),
        Fact("a step", f"{_ms(own.seconds)} ms", f"{spread}; {_ms(own.traced_s)} while it is traced"),
        Fact("speed", f"{rate(own.items_per_s)} {unit}/s", f"micro-batch × accumulation {own.name}"),
        Fact("precision", profile.precision),
        Fact("peak memory", f"{own.peak_gib:.2f} GiB"),
    ]
    facts += [Fact("memory ran out", f"continued with {each.oom_fallbacks}") for each in several if each.oom_fallbacks]
    parts = [
        (part, _ms(own.parts[part]), f"{own.share(part):.0%}", meaning)
        for part, meaning in MEANINGS.items()
        if part in own.parts
    ]
    largest = [
        (name[:LONGEST_NAME], _ms(seconds), f"{seconds / own.seconds:.0%}") for name, seconds in own.largest.items()
    ]
    found = [
        Table("profile", ("",), [(fact.label, fact.text) for fact in facts]),
        Table("a training step", ("ms", "share", ""), parts),
        Table("what takes most", ("ms", "share"), largest),
    ]
    return found if len(several) == 1 else [*found, _beside(several, profile)]


def _beside(several: Sequence[StepTime], profile: Profile) -> Table:
    """Settings beside one another, a column each."""
    head = [each.name + (" checked" if each is profile.checked else "") for each in several]
    rows = [
        ("ms", *(_ms(each.seconds) for each in several)),
        (f"{several[0].unit}/s", *(rate(each.items_per_s) for each in several)),
        ("peak GiB", *(f"{each.peak_gib:.2f}" for each in several)),
        *((part, *(f"{each.share(part):.0%}" for each in several)) for part in several[0].parts),
    ]
    return Table("by micro-batch × accumulation", tuple(head), rows)


def verdict_lines(profile: Profile) -> list[str]:
    """What holds the step back, what the change would gain and gained, and what this machine can't tell."""
    lines = [profile.verdict]
    if profile.expected is not None:
        lines.append(f"expected gain: {profile.expected:.0%} more {profile.times[0].unit}/s")
    if profile.gain is not None:
        lines.append(f"measured gain: {profile.gain:+.0%} {profile.times[0].unit}/s")
    elif profile.check:
        lines.append("measured gain: " + ("the change failed" if profile.change else "there is no change to measure"))
    if profile.others_cpu > MUCH[OTHERS_CPU]:
        lines.append(
            f"other programs took {profile.others_cpu:.0%} of the CPUs meanwhile: a step is shorter without them"
        )
    if profile.unknown:
        lines.append(f"cannot tell without a GPU: {', '.join(profile.unknown)}")
    return lines


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def rate(per_s: float) -> str:
    """ "18.5", "7,120"."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}"


def duration(seconds: float) -> str:
    """ "0.4 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def file_size(path: Path) -> str:
    """Size of a file, or of everything in a folder, such as "5.7 MB"; "gone" where there is nothing."""
    found = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    return size_text(found) if found else "gone"
