"""Checks whether a delta and a backbone belong together, without running the result.

The shapes of any two trainings of one architecture agree, so a delta can be added to backbone
weights that it was not made from. The result runs, but its segments are nonsense.
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from converter.weights.plan import Operand, Plan, Row
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array

File = TensorFile | ShardedTensorFile

# how many of the largest tensors are checked, and how many elements of each
_TENSORS, _ELEMENTS = 12, 1 << 16

# The weights of two independent trainings have a correlation near 0; weights that were trained
# further, or rounded, have a higher one (benchmarks/tolerances.py).
UNRELATED = 0.2

# number of standard deviations by which a right pair must differ from other weights
_SIGNIFICANT = 6.0


@dataclass(frozen=True)
class PairCheck:
    """One check of whether a delta and a backbone belong together.

    Attributes:
        check: its name.
        status: its result; ``flagged`` if statistics are unusual, which can have other causes.
        finding: what was found, or why nothing could be checked, in a sentence.
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
    """Runs every check that needs only the two files.

    Args:
        backbone: the backbone's file.
        delta: the delta's file.
        plan: how they are added.
        expected_data: the data that the delta's backbone was trained on, such as ``lvd1689m``; None
            if that is not known.
    """
    return (
        check_file_name(backbone, expected_data),
        check_local_norm(backbone, expected_data),
        check_norms(backbone, delta, plan),
        check_rounding(backbone, delta, plan),
    )


def check_absolute(evidence: Sequence[Sign]) -> PairCheck:
    """Checks whether weights that were given as absolute look like a delta."""
    kind = decide(evidence)
    findings = "; ".join(sign.finding for sign in evidence)
    if kind == "delta":
        return PairCheck("weights", "flagged", f"The weights look like a delta: {findings}.")
    if kind is None:
        return PairCheck("weights", "not checked", "The weights show no sign of being a delta.")
    return PairCheck("weights", "passed", f"The weights are absolute: {findings}.")


def check_file_name(backbone: File, expected_data: str | None) -> PairCheck:
    """Compares the digits in the name of one of Meta's files with the file's SHA-256."""
    name = backbone.path.name
    match = re.search(r"-([0-9a-f]{8})\.pth$", name)
    if match is None or isinstance(backbone, ShardedTensorFile):
        return PairCheck("file-name", "not checked", "Only Meta's file names contain a digest.")
    digest = backbone.sha256()
    if not digest.startswith(match[1]):
        return PairCheck(
            "file-name",
            "failed",
            f"The SHA-256 of {name} is {digest[:8]}..., expected {match[1]}...: the file is "
            "damaged, or it is another file under this name.",
        )
    data = {
        file[-12:-4]: data for known in KNOWN_BACKBONES for data, file in known.meta_files.items()
    }.get(match[1])
    if data and expected_data and data != expected_data:
        return PairCheck(
            "file-name",
            "failed",
            f"{name} was trained on {data}; the delta was made from weights trained on "
            f"{expected_data}.",
        )
    return PairCheck(
        "file-name", "passed", f"The file's SHA-256 begins with {match[1]}, as its name says."
    )


def check_local_norm(backbone: File, expected_data: str | None) -> PairCheck:
    """Checks which data one of Meta's ViT-L files was trained on: sat493m has local_cls_norm."""
    layout = recognise(backbone.tensors)
    if layout is not DINOV3_META:
        return PairCheck("local-cls-norm", "not checked", "Only Meta's layout has local_cls_norm.")
    size = size_of(translate(backbone.tensors, layout))
    known = find_backbone(size)
    if known is None or known.name != "vitl16":
        return PairCheck(
            "local-cls-norm",
            "not checked",
            f"local_cls_norm shows the data of ViT-L only; the backbone is {describe(size)}.",
        )
    data = "sat493m" if "local_cls_norm.weight" in backbone.tensors else "lvd1689m"
    finding = f"The backbone was trained on {data}"
    if expected_data is None:
        return PairCheck(
            "local-cls-norm",
            "not checked",
            f"{finding}; it is not known which data the delta needs.",
        )
    if data != expected_data:
        return PairCheck(
            "local-cls-norm",
            "failed",
            f"{finding}; the delta was made from weights trained on {expected_data}.",
        )
    return PairCheck("local-cls-norm", "passed", f"{finding}, as the delta expects.")


def check_norms(backbone: File, delta: File, plan: Plan) -> PairCheck:
    """Compares layer norm weights of the sum with the backbone's.

    Training changes them by a fraction. Absolute weights, added to a backbone, about double them.
    """
    import numpy as np

    ratios = [
        np.abs(base + change).mean() / np.abs(base).mean()
        for base, change in _pairs(backbone, delta, _norm_rows(plan))
        if base.any()
    ]
    if not ratios:
        return PairCheck("layer-norms", "not checked", "There are no layer norms to compare.")
    ratio = float(np.median(ratios))
    finding = f"Layer norm weights of the sum are {ratio:.2f} times the backbone's"
    if ratio > 1.7:
        return PairCheck(
            "layer-norms", "flagged", f"{finding}: the delta may in fact be absolute weights."
        )
    if ratio < 0.3:
        return PairCheck(
            "layer-norms", "flagged", f"{finding}: the delta may not be one to this backbone."
        )
    return PairCheck("layer-norms", "passed", f"{finding}.")


def check_rounding(backbone: File, delta: File, plan: Plan) -> PairCheck:
    """Looks for the trace that a subtraction leaves in the last bits of a delta.

    A delta is trained - base, rounded to float32. If the two differ by at most a factor of two, the
    difference is exact (Sterbenz' lemma). Then the delta is a multiple of the spacing of float32
    numbers near the base, and adding it to the base needs no rounding. As a control, the delta is
    added to the base with neighbouring elements swapped, which keeps their sizes. For weights of
    another training, the sum is exact no more often than for this control. The check does not
    distinguish the base from weights that were fine-tuned from it.
    """
    traces = [_trace(base, change) for base, change in _pairs(backbone, delta, _large_rows(plan))]
    traces = [trace for trace in traces if trace.count]
    if not traces:
        return PairCheck("rounding", "flagged", "The delta is zero in every large tensor.")
    unlike = sum(not trace.significant for trace in traces)
    total = sum(trace.count for trace in traces)
    finding = (
        f"{sum(trace.exact for trace in traces) / total:.1%} of the delta's elements add to the "
        "backbone without rounding, to other weights "
        f"{sum(trace.control for trace in traces) / total:.1%} would"
    )
    if not unlike:
        return PairCheck("rounding", "passed", f"{finding}.")
    if sum(trace.coarse for trace in traces) > 0.9 * total:
        return PairCheck("rounding", "not checked", "The delta itself was rounded to 16 bits.")
    return PairCheck(
        "rounding",
        "flagged",
        f"{finding}: {unlike} of {len(traces)} large tensors may come from other weights.",
    )


@dataclass(frozen=True)
class _Trace:
    """Counts of elements of one tensor.

    Attributes:
        count: elements of the delta that are not zero.
        exact: those among them that add up with the base without rounding.
        control: those that add up without rounding after neighbours in the base were swapped.
        coarse: those that have no more significant bits than float16.
    """

    count: int
    exact: int
    control: int
    coarse: int

    @property
    def significant(self) -> bool:
        """Whether sums with the base are exact significantly more often than with the control."""
        return _is_significant(self.exact / self.count, self.control / self.count, self.count)


def _is_significant(share: float, chance: float, count: int) -> bool:
    """Whether a share of elements is larger than that of a control by more than chance explains."""
    # the standard deviation of the difference of two shares
    deviation = math.sqrt((share * (1 - share) + chance * (1 - chance)) / count)
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
    # a float32 sum is exact if it equals the sum in float64
    return int((total.astype("f8") == base.astype("f8") + change.astype("f8")).sum())


def _is_coarse(values: "Array") -> "Array":
    """Whether float32 numbers have no more significant bits than float16, which has 11."""
    import numpy as np

    coarse: Array = (values.view(np.uint32) & ((1 << 13) - 1)) == 0
    return coarse


def check_fine_tune(backbone: File, model: File, plan: Plan) -> tuple[PairCheck, ...]:
    """Checks whether a model was trained from a backbone, by the values of their weights.

    Args:
        backbone: the backbone's file.
        model: the model's file.
        plan: of the model's delta to the backbone.
    """
    files: Files = {"backbone": backbone, "weights": model}
    rows = sorted(
        (row for row in plan.rows if row.operation == "subtract"),
        key=lambda row: row.size,
        reverse=True,
    )
    matrices = [row for row in rows if len(row.shape) > 1][:_TENSORS]
    pairs = {
        row.name: tuple(_first_rows(operand, row, files) for operand in row.operands)
        for row in matrices
    }
    return (check_likeness(pairs), check_exact_differences(list(pairs.values())))


def check_likeness(pairs: "Mapping[str, tuple[Array, ...]]") -> PairCheck:
    """Checks that the matrices of a model and of a backbone are correlated, each by itself.

    Args:
        pairs: matrices of the same shape, by name.
    """
    alike = {name: correlation([pair]) for name, pair in pairs.items()}
    if not alike:
        return PairCheck("likeness", "not checked", "There are no matrices to compare.")
    median = statistics.median(alike.values())
    finding = (
        f"The {len(alike)} largest matrices of model and backbone have correlations from "
        f"{min(alike.values()):.3f} to {max(alike.values()):.3f}, {median:.3f} in the median"
    )
    unlike = [name for name, each in alike.items() if each <= UNRELATED]
    if median <= UNRELATED:
        return PairCheck(
            "likeness",
            "failed",
            f"{finding}: the model was not trained from this backbone. Two independent trainings "
            "have one near 0.",
        )
    if unlike:
        return PairCheck(
            "likeness",
            "flagged",
            f"{finding}: {unlike[0]} and {len(unlike) - 1} more may not be trained from this "
            "backbone."
            if len(unlike) > 1
            else f"{finding}: {unlike[0]} may not be trained from this backbone.",
        )
    return PairCheck("likeness", "passed", f"{finding}.")


def check_exact_differences(pairs: "Sequence[tuple[Array, ...]]") -> PairCheck:
    """Looks for differences that float32 holds exactly.

    The difference of two numbers within a factor of two of each other is exact (Sterbenz' lemma),
    and training moves most weights by less. As a control, the backbone's neighbouring elements are
    swapped.

    Args:
        pairs: matrices of the model, each with the backbone's of the same shape.
    """
    exact = control = count = 0
    for model, backbone in pairs:
        size = model.size // 2 * 2
        ours, base = model.reshape(-1)[:size], backbone.reshape(-1)[:size]
        swapped = base.reshape(-1, 2)[:, ::-1].reshape(-1)
        count += size
        exact += _added_exactly(ours, -base)
        control += _added_exactly(ours, -swapped)
    if not count:
        return PairCheck("rounding", "not checked", "There are no matrices to compare.")
    if min(exact, control) == count:  # as of two models in 16 bits
        return PairCheck("rounding", "not checked", "Any two such weights have exact differences.")
    finding = (
        f"{exact / count:.1%} of the differences are exact in float32, {control / count:.1%} would "
        "be with other weights"
    )
    if _is_significant(exact / count, control / count, count):
        return PairCheck("rounding", "passed", f"{finding}.")
    return PairCheck(
        "rounding", "flagged", f"{finding}: the model may not be trained from this backbone."
    )


def correlation(pairs: "Iterable[tuple[Array, ...]]") -> float:
    """The correlation of two sets of matrices, from -1 to 1, after removing the columns' means.

    Args:
        pairs: pairs of matrices of the same shape.
    """
    product = ours = theirs = 0.0
    for pair in pairs:
        a, b = (matrix.astype("f8") - matrix.mean(0, dtype="f8") for matrix in pair)
        product += float((a * b).sum())
        ours += float((a * a).sum())
        theirs += float((b * b).sum())
    return product / math.sqrt(ours * theirs) if ours and theirs else 0.0


def _first_rows(operand: Operand, row: Row, files: Files) -> "Array":
    """The first rows of a tensor, as a matrix of about `_ELEMENTS` float32."""
    columns = row.size // row.shape[0]
    count = min(row.shape[0], max(2, _ELEMENTS // columns))
    return read_operand(operand, row, files, 0, count * columns).reshape(count, columns)


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
