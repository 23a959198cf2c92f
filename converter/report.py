"""What was planned, done and found, for people who read a terminal."""

from collections.abc import Iterable

from converter.catalog import CATALOG
from converter.conversion import Conversion
from converter.inspection import Inspection
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
        *_tensors(conversion.plan),
        f"output    {place} ({_size(sum(size for size, _ in conversion.files.values()))})",
        *verdict(conversion.verdict),
    ]
    height, width = conversion.job.image_size
    if height != width:
        lines.append(
            f"note      transformers builds square models only: at {height}x{width} this one runs "
            "in reference_model, not there"
        )
    return "\n".join(lines)


def _source(source: Fetched) -> str:
    size = _size(source.weights.stat().st_size)
    if source.repo_id:
        return f"{source.repo_id} at {source.revision}, {source.weights.name} ({size})"
    return f"{source.weights} ({size})"


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
            line += f": {_differences(figures['compared'], figures['tolerance'])}"
        elif level.reason and level.reason != found.reason:
            line += f": {level.reason}"
        lines.append(line)
    return lines


def _differences(compared: dict[str, dict[str, float | None]], tolerance: float) -> str:
    """The largest difference of each kind of tensor, such as hidden_states for all its layers."""
    largest: dict[str, float | None] = {}
    for name, figures in compared.items():
        kind = name.rstrip("0123456789").rstrip(".")
        values = [figures["max_abs"], largest.get(kind, 0.0)]
        largest[kind] = None if None in values else max(v for v in values if v is not None)
    shown = ", ".join(
        f"{kind} {'shape differs' if value is None else f'{value:.2g}'}"
        for kind, value in largest.items()
    )
    return f"largest differences {shown} (tolerance {tolerance:g})"


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
