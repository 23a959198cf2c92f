"""Does the pair belong together? What can be known of it before anyone loads the result.

Shapes agree for any two trainings of one architecture, so a delta can be added to backbone weights
that it was not made from. The result runs, and segments nonsense.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from converter.weights.backbones import (
    KNOWN_BACKBONES,
    describe,
    find_backbone,
    size_of,
)
from converter.weights.inspection import Sign, decide
from converter.weights.layouts import DINOV3_META, recognise, translate
from converter.weights.merge import Files, read_operand
from converter.weights.plan import Plan, Row
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array

File = TensorFile | ShardedTensorFile

# Of the largest tensors, this many are looked at, and of each this many elements.
_TENSORS, _ELEMENTS = 12, 1 << 16

# Standard deviations by which a right pair must stand out from other weights.
_SIGNIFICANT = 6.0


@dataclass(frozen=True)
class PairCheck:
    """One check of whether a delta and a backbone belong together.

    Attributes:
        check: its name.
        status: what came of it; ``flagged`` is what statistics say, which may have their reasons.
        finding: what was found, or why nothing could be, in a sentence.
    """

    check: str
    status: Literal["passed", "failed", "flagged", "not checked"]
    finding: str

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON shows it."""
        return {"check": self.check, "status": self.status, "finding": self.finding}


def check_pair(
    backbone: File, delta: File, plan: Plan, *, expected_data: str | None
) -> tuple[PairCheck, ...]:
    """Every check that needs nothing but the two files.

    Args:
        backbone: the backbone's file.
        delta: the delta's file.
        plan: how they are added.
        expected_data: the data that the delta's backbone was trained on, such as ``lvd1689m``,
            where that is known.
    """
    return (
        check_file_name(backbone, expected_data),
        check_local_norm(backbone, expected_data),
        check_norms(backbone, delta, plan),
        check_rounding(backbone, delta, plan),
    )


def check_absolute(evidence: Sequence[Sign]) -> PairCheck:
    """Whether weights that are said to be absolute look like a delta."""
    kind = decide(evidence)
    findings = "; ".join(sign.finding for sign in evidence)
    if kind == "delta":
        return PairCheck("weights", "flagged", f"The weights look like a delta: {findings}.")
    if kind is None:
        return PairCheck("weights", "not checked", "The weights show no sign of being a delta.")
    return PairCheck("weights", "passed", f"The weights are absolute: {findings}.")


def check_file_name(backbone: File, expected_data: str | None) -> PairCheck:
    """Holds the digits in the name of one of Meta's files against the file's SHA-256."""
    name = backbone.path.name
    match = re.search(r"-([0-9a-f]{8})\.pth$", name)
    if match is None or isinstance(backbone, ShardedTensorFile):
        return PairCheck("file-name", "not checked", "Only Meta's file names carry a digest.")
    digest = backbone.sha256()
    if not digest.startswith(match[1]):
        return PairCheck(
            "file-name",
            "failed",
            f"{name} should have a SHA-256 that begins with {match[1]}; it is {digest[:8]}...: the "
            "file is damaged, or another one was given its name.",
        )
    data = {
        file[-12:-4]: data for known in KNOWN_BACKBONES for data, file in known.meta_files.items()
    }.get(match[1])
    if data and expected_data and data != expected_data:
        return PairCheck(
            "file-name",
            "failed",
            f"{name} was trained on {data}, the delta was made from weights trained on "
            f"{expected_data}.",
        )
    return PairCheck(
        "file-name", "passed", f"The SHA-256 begins with {match[1]}, as its name says."
    )


def check_local_norm(backbone: File, expected_data: str | None) -> PairCheck:
    """Of Meta's ViT-L files, the one trained on sat493m has local_cls_norm, the other has not."""
    layout = recognise(backbone.tensors)
    if layout is not DINOV3_META:
        return PairCheck("local-cls-norm", "not checked", "Only Meta's layout has local_cls_norm.")
    size = size_of(translate(backbone.tensors, layout))
    known = find_backbone(size)
    if known is None or known.name != "vitl16":
        return PairCheck("local-cls-norm", "not checked", f"It tells nothing of {describe(size)}.")
    data = "sat493m" if "local_cls_norm.weight" in backbone.tensors else "lvd1689m"
    finding = f"The backbone was trained on {data}"
    if expected_data is None:
        return PairCheck(
            "local-cls-norm", "not checked", f"{finding}; what the delta needs is not known."
        )
    if data != expected_data:
        return PairCheck(
            "local-cls-norm", "failed", f"{finding}, the delta was made from {expected_data}."
        )
    return PairCheck("local-cls-norm", "passed", f"{finding}, as the delta needs it.")


def check_norms(backbone: File, delta: File, plan: Plan) -> PairCheck:
    """Compares layer norm weights of the sum with the backbone's.

    Training changes them by a fraction. Absolute weights added to a backbone about double them.
    """
    import numpy as np

    ratios = [
        np.abs(base + change).mean() / np.abs(base).mean()
        for base, change in _pairs(backbone, delta, _norm_rows(plan))
        if base.any()
    ]
    if not ratios:
        return PairCheck("layer-norms", "not checked", "There is no layer norm to compare.")
    ratio = float(np.median(ratios))
    finding = f"Layer norm weights of the sum are {ratio:.2f} times the backbone's"
    if ratio > 1.7:
        return PairCheck(
            "layer-norms", "flagged", f"{finding}: absolute weights may be taken for a delta."
        )
    if ratio < 0.3:
        return PairCheck("layer-norms", "flagged", f"{finding}: this may be no delta to it.")
    return PairCheck("layer-norms", "passed", f"{finding}.")


def check_rounding(backbone: File, delta: File, plan: Plan) -> PairCheck:
    """Looks for the trace that a subtraction leaves in the last bits of a delta.

    A delta is trained - base, rounded to float32. Where the two are within a factor of two that is
    exact (Sterbenz' lemma), so that the delta is a multiple of the spacing of numbers around the
    base, and adding it back needs no rounding. To weights of another training it adds up without
    rounding no more often than to its base with neighbours swapped, which have the same sizes.
    Weights that were fine-tuned from the base can't be told from it in this way.
    """
    traces = [_trace(base, change) for base, change in _pairs(backbone, delta, _large_rows(plan))]
    traces = [trace for trace in traces if trace.count]
    if not traces:
        return PairCheck("rounding", "flagged", "The delta is zero in every large tensor.")
    unlike = sum(not trace.significant for trace in traces)
    total = sum(trace.count for trace in traces)
    finding = (
        f"{sum(trace.exact for trace in traces) / total:.1%} of the delta's elements add up "
        f"without rounding, to other weights {sum(trace.control for trace in traces) / total:.1%} "
        "would"
    )
    if not unlike:
        return PairCheck("rounding", "passed", f"{finding}.")
    if sum(trace.coarse for trace in traces) > 0.9 * total:
        return PairCheck("rounding", "not checked", "The delta itself was rounded to 16 bits.")
    return PairCheck(
        "rounding",
        "flagged",
        f"{finding}: {unlike} of {len(traces)} large tensors may be made from other weights.",
    )


@dataclass(frozen=True)
class _Trace:
    """Elements of one tensor, counted.

    Attributes:
        count: of the delta, that are not zero.
        exact: that add up with the base without rounding.
        control: likewise, with the base after its neighbours were swapped.
        coarse: that have no more significant bits than float16 has.
    """

    count: int
    exact: int
    control: int
    coarse: int

    @property
    def significant(self) -> bool:
        """Whether the base stands out from the control."""
        share, chance = self.exact / self.count, self.control / self.count
        # the standard deviation of the difference of two shares
        deviation = math.sqrt((share * (1 - share) + chance * (1 - chance)) / self.count)
        return share - chance > _SIGNIFICANT * deviation


def _trace(base: "Array", change: "Array") -> _Trace:
    size = base.size // 2 * 2
    base, change = base[:size], change[:size]
    swapped = base.reshape(-1, 2)[:, ::-1].reshape(-1)
    changed = change != 0
    return _Trace(
        count=int(changed.sum()),
        exact=_added_exactly(base[changed], change[changed]),
        control=_added_exactly(swapped[changed], change[changed]),
        coarse=int(_is_coarse(change[changed]).sum()),
    )


def _added_exactly(base: "Array", change: "Array") -> int:
    total = base + change
    # the error of a float32 sum is what float64 still sees of it
    return int((total.astype("f8") == base.astype("f8") + change.astype("f8")).sum())


def _is_coarse(values: "Array") -> "Array":
    """Whether float32 numbers have no more significant bits than float16, which has 11."""
    import numpy as np

    coarse: Array = (values.view(np.uint32) & ((1 << 13) - 1)) == 0
    return coarse


def _norm_rows(plan: Plan) -> list[Row]:
    norms = ("norm.weight", "norm1.weight", "norm2.weight")
    return [row for row in plan.rows if row.operation == "add" and row.name.endswith(norms)]


def _large_rows(plan: Plan) -> list[Row]:
    added = [row for row in plan.rows if row.operation == "add"]
    return sorted(added, key=lambda row: row.size, reverse=True)[:_TENSORS]


def _pairs(backbone: File, delta: File, rows: list[Row]) -> "Iterator[tuple[Array, Array]]":
    """The first elements of the two operands of each row, as flat float32 arrays."""
    files: Files = {"backbone": backbone, "delta": delta}
    for row in rows:
        first, second = (
            read_operand(operand, row, files, 0, min(row.size, _ELEMENTS))
            for operand in row.operands
        )
        yield first, second
