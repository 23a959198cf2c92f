"""Formats plans, results and verdicts as text for the terminal."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from converter.catalog import CATALOG
from converter.checks.verdict import Level, Trial, Verdict
from converter.configs import DTYPES
from converter.conversion import Conversion
from converter.deltas import Delta
from converter.hub.sources import Fetched
from converter.outside import LONGEST_CELL, visible
from converter.publishing.push import Publication
from converter.publishing.release import Release
from converter.sizes import size_text
from converter.weights.inspection import Inspection
from converter.weights.pairing import PairCheck
from converter.weights.plan import Plan


def summary(conversion: Conversion, place: str) -> list[str]:
    """Lines about a conversion: its sources, its tensors, the output and the verdict.

    Args:
        conversion: a finished conversion.
        place: the output, as the user named it.
    """
    lines = [
        *(f"{role:<9} {_source(source)}" for role, source in conversion.sources.items()),
        *(
            f"note      {source.repo_id} was renamed to {source.moved_to}"
            for source in conversion.sources.values()
            if source.moved_to
        ),
        *_notes(conversion),
        *(f"weights   {sign.finding}: {sign.speaks_for}" for sign in conversion.inputs.evidence),
        *_pair(conversion.pair),
        *_tensors(conversion.plan),
        f"output    {place} ({size_text(sum(size for size, _ in conversion.files.values()))})",
        *verdict(conversion.verdict),
    ]
    height, width = conversion.inputs.image_size or (0, 0)
    if conversion.job.dtype == "float16":
        lines.append(
            "note      float16 overflows at 65504, so activations may overflow that do not in "
            "float32; bfloat16 is safer"
        )
    if height != width:
        lines.append(
            f"note      transformers only builds square models: at {height}x{width} this one runs "
            "in reference_model only"
        )
    return lines


def _notes(conversion: Conversion) -> list[str]:
    lines = [f"note      {note}" for note in conversion.notes()]
    return lines + [f"warning   {warning}" for warning in conversion.warnings()]


def _source(source: Fetched) -> str:
    size = size_text(source.size)
    if source.repo_id:
        return f"{source.repo_id} at {source.revision}, {source.weights.name} ({size})"
    path = source.weights
    with suppress(FileNotFoundError, ValueError):  # the working directory may have been deleted
        path = path.absolute().relative_to(Path.cwd())
    return f"{path} ({size})"


def _pair(pair: Iterable[PairCheck]) -> list[str]:
    made = [check for check in pair if check.status in ("passed", "failed")]
    left = [check.check for check in pair if check.status == "not checked"]
    lines = [f"pair      {check.check} {check.status}: {check.finding}" for check in made]
    return lines + ([f"pair      not checked: {', '.join(left)}"] if left else [])


def warnings(conversion: Conversion) -> list[str]:
    """Warnings about a conversion, one line each."""
    return [*flagged(conversion.pair), *(f"Warning: {each}" for each in conversion.warnings())]


def flagged(pair: Iterable[PairCheck]) -> list[str]:
    """Warnings about a pair, one line each."""
    return [f"Warning: {check.finding}" for check in pair if check.status in ("flagged", "failed")]


def _tensors(plan: Plan) -> list[str]:
    counts = plan.counts()
    lines = [
        f"tensors   {counts['tensors']}: {counts['added']} added, {counts['copied']} copied, "
        f"{counts['filled']} filled; {counts['renamed']} of them renamed",
    ]
    by_reason: dict[str, list[str]] = {}
    for dropped in plan.dropped:
        by_reason.setdefault(dropped.reason, []).append(str(dropped.operand))
    for reason, names in by_reason.items():
        shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        lines.append(f"dropped   {shown}: {reason}")
    return lines


def delta(done: Delta, place: Path) -> list[str]:
    """Lines about a delta: its sources, its size and the verdict on the way back.

    Args:
        done: a finished delta.
        place: its folder, as the user named it.
    """
    changes = [each.mean_change for each in done.changes.values() if each.mean_change is not None]
    needed = {"task": "--task", "image_size": "--image-size", "classes": "--labels"}
    options = [option for key, option in needed.items() if not done.content[key]]
    rounded = [
        name for name, dtype in DTYPES.items() if dtype in done.content["dtypes"] and dtype != "F32"
    ]
    return [
        f"model     {_source(done.model)}",
        f"backbone  {_source(done.backbone)}",
        *(f"note      the model's weights in {dtype} were widened to float32" for dtype in rounded),
        *(f"note      {note}" for note in done.notes),
        *([f"note      its conversion needs {' and '.join(options)}"] if options else []),
        *_pair(done.pair),
        f"tensors   {len(done.content['tensors'])}: {len(changes)} are differences",
        f"output    {place} ({size_text(sum(size for size, _ in done.files.values()))})",
        *verdict(done.verdict),
    ]


def verdict(found: Verdict) -> list[str]:
    """A line per check with its largest differences, then the diagnosis if it failed."""
    lines = _wrapped(f"verdict   {found.verdict}" + (f": {found.reason}" if found.reason else ""))
    if found.basis:
        lines += _wrapped(f"basis     {found.basis}: compared with {found.compared_with}")
    for level in found.levels:
        said = _finding(level)
        if level.reason and (level.reason != found.reason or level.status == "not checked"):
            parts = [level.reason, said]
            if level.level in ("numbers", "pictures"):  # figures first, then remarks
                parts = [f"{said}." if said else "", level.reason]
            said = " ".join(filter(None, parts))
        line = f"  {level.level:<10} {level.status}" + (f": {said}" if said else "")
        lines += _wrapped(line)
    return [*lines, *_diagnosis(found)]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(visible(line), 100, subsequent_indent=" " * 13, break_on_hyphens=False)


def _finding(level: Level) -> str:
    """The result of a level in words, without its reason."""
    figures = level.figures
    match level.level, level.status:
        case "structure", "passed":
            size = f"{figures['tensors']} tensors, {figures['parameters']:,} parameters"
            opset = f"opset {figures['opset']}, " if figures.get("opset") else ""
            return f"{opset}{size}"
        case "arithmetic", "passed":
            given = {"sources": "their sources give", "the model": "the model has"}.get(
                figures["against"], "conversion.json says"
            )
            return f"{figures['tensors']} tensors are what {given}"
        case "arithmetic", "failed":
            return f"{len(figures['different'])} of {figures['tensors']} tensors differ"
        case "numbers" | "peers" | "published", _ if "compared" in figures:
            return _differences(figures)
        case "pictures", _ if "compared" in figures:
            return f"{figures['pictures']} pictures, {_differences(figures)}{_results(figures)}"
    return ""


def _differences(figures: Mapping[str, Any]) -> str:
    """The largest difference of each kind of tensor, such as hidden_states for all its layers."""
    largest: dict[str, float] = {}
    for name, compared in figures["compared"].items():
        kind = name.rstrip("0123456789").rstrip(".").removeprefix("pipeline.")
        if compared["max_abs"] is not None:  # None if shapes differ, or for NaN and infinity
            largest[kind] = max(compared["max_abs"], largest.get(kind, 0.0))
    if not largest:
        return "no tensor can be compared"
    outputs = [kind for kind in ("mask_logits", "class_logits") if kind in largest]
    kinds = dict.fromkeys([*outputs, *largest])
    shown = ", ".join(f"{kind} {largest[kind]:.2g}" for kind in kinds)
    share = figures.get("relative_tolerance")
    tolerance = f"{figures['tolerance']:g}" + (f" or {share:g} of the range" if share else "")
    return f"tolerance {tolerance}, largest differences {shown}{_agreement(figures)}"


def _agreement(figures: Mapping[str, Any]) -> str:
    if figures.get("best_class") is None:
        return ""
    return (
        f"; same best class {figures['best_class']:.1%}, mask IoU {figures['mask_iou']:.3f}, same "
        f"segment {figures['same_segment']:.1%}"
    )


def _results(figures: Mapping[str, Any]) -> str:
    if "equal_pixels" not in figures:
        return ""
    return (
        f"; results equal in {figures['equal_pixels']:.1%} of the pixels (at least "
        f"{figures['least_equal_pixels']:.1%})"
    )


def _diagnosis(found: Verdict) -> list[str]:
    """Lines about where a difference begins, what explains it, and what was tried."""
    lines = []
    if first := found.first_difference:
        size = "an unknown amount" if first.max_abs is None else f"up to {first.max_abs:.2g}"
        lines.append(f"begins    in {first.layer}: {first.tensor} is off by {size}")
    if cause := found.cause:
        lines.append(f"cause     {cause.name}: {cause.explanation}")
        shown = ", ".join(cause.tensors[:4])
        if len(cause.tensors) > 4:
            shown += f" and {len(cause.tensors) - 4} more"
        lines += [f"tensors   {shown}"] if shown else []
    elif found.tried:
        lines.append("cause     not found: no fault that was tried explains the difference")
    by_reason: dict[str, list[str]] = {}
    for trial in found.tried:
        if trial.status == "not tried":
            by_reason.setdefault(trial.reason, []).append(trial.name)
        elif trial.status == "explains nothing":
            by_reason.setdefault("tried, without effect", []).append(trial.name)
        elif not cause or trial.name != cause.name:
            lines.append(f"also      {trial.name}: {trial.reason}{_explained(trial)}")
    lines += [f"          {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return [wrapped for line in lines for wrapped in _wrapped(line)]


def _explained(trial: Trial) -> str:
    return "" if trial.explained is None else f" It explains {trial.explained:.0%}."


def publication(found: Publication) -> list[str]:
    """Lines about what was, or would be, done with every file, and its address on the Hub.

    Sizes are those of the files, even if the Hub already had them.
    """
    rows = [
        (change.action, change.name, size_text(change.size) if change.size else "")
        for change in found.changes
    ]
    seen_by = "private" if found.private else "public"
    lines = aligned(rows)
    if found.commit is None:
        lines.append(f"nothing was sent to {found.url} ({seen_by}), because of --dry-run")
        return lines
    unchanged = all(change.action == "keep" for change in found.changes)
    lines += [
        f"commit    {found.commit}" + (" (nothing had to change)" if unchanged else ""),
        *([f"tag       {found.tag}"] if found.tag else []),
        f"url       {found.url} ({seen_by})",
        f"remote    read back: {len(found.changes) - len(found.unchecked)} files as they were sent",
    ]
    if found.unchecked:
        lines.append(
            f"remote    not checked: {', '.join(found.unchecked)}, because the Hub gives no digest"
        )
    if found.verdict:
        lines += verdict(found.verdict)
    return lines


def pushed(found: Publication) -> str:
    """What was published, in a sentence; empty if nothing was sent."""
    return "" if found.commit is None else f"Published commit {found.commit} at {found.url}."


def release_table(found: Release) -> list[str]:
    """The result for every checkpoint of a release, a line each, and the errors."""
    rows = [("CHECKPOINT", "REPOSITORY", "STATUS", "VERDICT", "BASIS", "COMMIT")]
    for step in found.steps:
        outcome = (step.status, step.verdict or "-", step.basis or "-", (step.commit or "-")[:12])
        rows.append((step.checkpoint, step.repo_id, *outcome))
    reasons = [f"{step.checkpoint}: {step.error}" for step in found.steps if step.error]
    return [*aligned(rows), *(line for reason in reasons for line in indented(reason))]


def indented(text: str) -> list[str]:
    """The lines of a text, such as an error and its remedy, indented except the first."""
    first, *others = text.split("\n")
    return [first, *(f"  {line}" for line in others)]


def released(found: Release) -> str:
    """What was published, in a sentence; empty if nothing was."""
    names = [step.repo_id for step in found.steps if step.commit]
    return f"Published: {', '.join(names)}." if names else ""


def plan_table(conversion: Conversion) -> list[str]:
    """The plan, a line per tensor, and how the files were read."""
    plan = conversion.plan
    rows = [(row.name, shape_text(row.shape), row.dtype, row.recipe) for row in plan.rows]
    dropped = [(str(entry.operand), "", "", f"dropped: {entry.reason}") for entry in plan.dropped]
    lines = [f"{name}  {reason}" for name, _, _, reason in dropped]
    return [*aligned(rows), *lines, *_notes(conversion)]


def catalogue_table() -> list[str]:
    """The catalogue, a line per checkpoint."""
    rows = [("CHECKPOINT", "TASK", "SIZE", "PUBLISHED", "BACKBONE")]
    for entry in CATALOG:
        height, width = entry.image_size
        published = f"{entry.metric.name} {entry.metric.value}" if entry.metric else "-"
        backbone = entry.note if entry.offline else entry.backbone
        rows.append((entry.name, entry.task, f"{height}x{width}", published, backbone))
    return aligned(rows)


def inspection(found: Inspection) -> list[str]:
    """The content of a file of weights: a line per tensor, then a summary."""
    rows = [(name, shape_text(shape), dtype) for name, (dtype, shape) in found.tensors.items()]
    lines = [
        *aligned(rows),
        f"layout      {found.layout or 'unknown'}: {found.title}",
        f"format      {found.format}",
        f"tensors     {len(found.tensors)}",
        f"parameters  {found.parameters:,}",
        f"weights     {found.weights or 'unknown: delta or absolute'}",
    ]
    lines += [f"  {sign.finding} ({sign.speaks_for})" for sign in found.evidence]
    return lines + [f"note        {note}" for note in found.notes]


def aligned(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Rows as lines of left-aligned columns; with ``numbers``, all but the first right-aligned."""
    shown = [[visible(cell, LONGEST_CELL) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def shape_text(shape: tuple[int, ...]) -> str:
    """A tensor's shape, such as 3x224x224; ``scalar`` where it has no axes."""
    return "x".join(map(str, shape)) or "scalar"
