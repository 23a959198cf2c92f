"""What was planned, done and found, for people who read a terminal."""

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converter.catalog import CATALOG
from converter.conversion import Conversion
from converter.inspection import Inspection
from converter.pairing import PairCheck
from converter.plan import Plan
from converter.sources import Fetched
from converter.verification import Verdict


def summary(conversion: Conversion, place: str) -> str:
    """What was read, what became of its tensors, where the output is, and the verdict.

    Args:
        conversion: a conversion that was carried out.
        place: the output, as the user named it.
    """
    lines = [
        *(f"{role:<9} {_source(source)}" for role, source in conversion.sources.items()),
        *(
            f"note      {source.repo_id} is called {source.moved_to} now"
            for source in conversion.sources.values()
            if source.moved_to
        ),
        *(f"weights   {sign.finding}: {sign.speaks_for}" for sign in conversion.inputs.evidence),
        *_pair(conversion.pair),
        *_tensors(conversion.plan),
        f"output    {place} ({_size(sum(size for size, _ in conversion.files.values()))})",
        *verdict(conversion.verdict),
    ]
    height, width = conversion.job.image_size or (0, 0)
    if conversion.job.dtype == "float16":
        lines.append(
            "note      float16 overflows at 65504: activations may where float32's do not; "
            "bfloat16 is the safer choice"
        )
    if height != width:
        lines.append(
            f"note      transformers builds square models only: at {height}x{width} this one runs "
            "in reference_model, not there"
        )
    return "\n".join(lines)


def _source(source: Fetched) -> str:
    size = _size(source.size)
    if source.repo_id:
        return f"{source.repo_id} at {source.revision}, {source.weights.name} ({size})"
    path = source.weights.absolute()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path} ({size})"


def _pair(pair: Iterable[PairCheck]) -> list[str]:
    made = [check for check in pair if check.status in ("passed", "failed")]
    left = [check.check for check in pair if check.status == "not checked"]
    lines = [f"pair      {check.check} {check.status}: {check.finding}" for check in made]
    return lines + ([f"pair      not checked: {', '.join(left)}"] if left else [])


def warnings(pair: Iterable[PairCheck]) -> list[str]:
    """What may be wrong with a pair, a line each."""
    return [f"Warning: {check.finding}" for check in pair if check.status == "flagged"]


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


def verdict(found: Verdict) -> list[str]:
    """A line per check, and the largest differences."""
    lines = [f"verdict   {found.verdict}" + (f": {found.reason}" if found.reason else "")]
    for level in found.levels:
        figures = level.figures
        line = f"  {level.level:<10} {level.status}"
        if level.level == "arithmetic" and level.status == "passed":
            line += f": {figures['tensors']} tensors as conversion.json has them"
        elif level.level == "structure" and level.status == "passed":
            line += f": {figures['tensors']} tensors, {figures['parameters']:,} parameters"
        elif level.level == "numbers" and figures:
            line += f": {_differences(figures)}"
        elif level.reason and level.reason != found.reason:
            line += f": {level.reason}"
        lines += textwrap.wrap(line, 100, subsequent_indent=" " * 13, break_on_hyphens=False)
    return lines


def _differences(figures: Mapping[str, Any]) -> str:
    """The largest difference of each kind of tensor, such as hidden_states for all its layers."""
    largest: dict[str, float] = {}
    for name, compared in figures["compared"].items():
        kind = name.rstrip("0123456789").rstrip(".")
        if compared["max_abs"] is not None:  # None where shapes differ, or a value is no number
            largest[kind] = max(compared["max_abs"], largest.get(kind, 0.0))
    if not largest:
        return "no tensor can be compared"
    shown = ", ".join(f"{kind} {value:.2g}" for kind, value in largest.items())
    relative = figures["relative_tolerance"]
    tolerance = f"{relative:.1%} of the range" if relative else f"{figures['tolerance']:g}"
    return f"tolerance {tolerance}, largest differences {shown}"


def plan_table(plan: Plan) -> str:
    """The plan, a line per tensor."""
    rows = [(row.name, _shape(row.shape), row.dtype, row.recipe) for row in plan.rows]
    dropped = [(str(entry.operand), "", "", f"dropped: {entry.reason}") for entry in plan.dropped]
    return "\n".join([*_aligned(rows), *(f"{name}  {reason}" for name, _, _, reason in dropped)])


def catalogue_table() -> str:
    """The catalogue, a line per checkpoint."""
    rows = [("CHECKPOINT", "TASK", "SIZE", "PUBLISHED", "BACKBONE")]
    for entry in CATALOG:
        height, width = entry.image_size
        published = f"{entry.metric.name} {entry.metric.value}" if entry.metric else "-"
        backbone = entry.note if entry.offline else entry.backbone
        rows.append((entry.name, entry.task, f"{height}x{width}", published, backbone))
    return "\n".join(_aligned(rows))


def inspection(found: Inspection) -> str:
    """What is in a file: a line per tensor, then what it all is."""
    rows = [(name, _shape(shape), dtype) for name, (dtype, shape) in found.tensors.items()]
    lines = [
        *_aligned(rows),
        f"layout      {found.layout or 'unknown'}: {found.title}",
        f"format      {found.format}",
        f"tensors     {len(found.tensors)}",
        f"parameters  {found.parameters:,}",
        f"weights     {found.weights or 'not to be told: delta or absolute'}",
    ]
    lines += [f"  {sign.finding} ({sign.speaks_for})" for sign in found.evidence]
    return "\n".join(lines)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _size(count: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
