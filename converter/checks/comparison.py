"""Tensors held against recorded ones: how far apart they are, and what a user would notice."""

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# Largest difference in float32 between two right computations of a model whose logits reach 60:
# other kernels and another order of summation move them by up to 1.1e-4 (benchmarks/tolerances.py).
TOLERANCE = 2e-4

# Where values are larger, so are their rounding errors: up to 4e-6 of the range.
FLOAT32_TOLERANCE = 1e-5

# Weights that were rounded move the outputs by a share of their range, for each element type.
ROUNDED_TOLERANCES = {"BF16": 0.04, "F16": 0.005}


@dataclass(frozen=True)
class Tolerance:
    """How far apart two tensors may be: the larger of two differences.

    Attributes:
        absolute: the one that holds whatever the range.
        relative: the other, as a share of the recorded range, for weights that were rounded; with
            0 it is `FLOAT32_TOLERANCE` of the range.
    """

    absolute: float = TOLERANCE
    relative: float = 0.0

    @property
    def share(self) -> float:
        """Of the recorded range, that is allowed where it is more than ``absolute``."""
        return self.relative or FLOAT32_TOLERANCE

    def of(self, recorded: Tensor) -> float:
        """The largest difference from this tensor that is none."""
        values = recorded.double()  # in 16 bits, and near the largest of 32, a range overflows
        return max(self.absolute, self.share * float(values.max() - values.min()))


def tolerance_for(dtypes: Set[str]) -> Tolerance:
    """The tolerance for weights of these element types, by safetensors' names."""
    return Tolerance(relative=max((ROUNDED_TOLERANCES.get(d, 0.0) for d in dtypes), default=0.0))


@dataclass(frozen=True)
class Comparison:
    """A tensor beside the recorded one.

    Attributes:
        max_abs, mean_abs: largest and mean absolute difference.
        spread: standard deviation of the recorded values, to judge the others by.
        relative: largest difference in spreads.
        cosine: similarity of the two as vectors, 1 where they have one direction.
        same_shape: whether they can be compared at all.
        failure: what is wrong, in a sentence; empty if nothing is.
    """

    max_abs: float
    mean_abs: float
    spread: float
    relative: float
    cosine: float
    same_shape: bool
    failure: str

    def to_dict(self) -> dict[str, float | None]:
        """The figures as JSON shows them; null for what is no number."""
        figures = asdict(self)
        del figures["same_shape"], figures["failure"]
        return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def compare(name: str, ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> Comparison:
    """Compares a tensor with the recorded one.

    Args:
        name: what a failure calls it.
        ours: what was computed.
        theirs: what was recorded.
        tolerance: how far apart they may be.
    """
    spread = float(theirs.float().std(correction=0))
    if ours.shape != theirs.shape:
        failure = (
            f"{name} has the shape {list(ours.shape)}, recorded is the shape {list(theirs.shape)}."
        )
        return Comparison(math.nan, math.nan, spread, math.nan, math.nan, False, failure)
    a, b = ours.double().flatten(), theirs.double().flatten()
    difference = (a - b).abs()
    largest, allowed = float(difference.max()), tolerance.of(theirs)
    failure = ""
    if not largest <= allowed:
        failure = f"{name} differs by up to {largest:.3g}, more than {allowed:.3g}."
    return Comparison(
        max_abs=largest,
        mean_abs=float(difference.mean()),
        spread=spread,
        relative=largest / spread if spread else (math.inf if largest else 0.0),
        cosine=float(torch.cosine_similarity(a, b, dim=0)),
        same_shape=True,
        failure=failure,
    )


def largest_difference(compared: Mapping[str, Comparison]) -> float | None:
    """The largest of the differences; None where one is no number."""
    largest = [comparison.max_abs for comparison in compared.values()]
    return max(largest) if largest and all(map(math.isfinite, largest)) else None


def agreement(
    ours: Mapping[str, Tensor], recorded: Mapping[str, Tensor]
) -> dict[str, float | None]:
    """What a user would notice of a difference, as shares of all from 0 to 1.

    Args:
        ours: ``mask_logits`` (batch, queries, height, width) and ``class_logits``
            (batch, queries, classes + 1).
        recorded: the same, as recorded.

    Returns:
        ``best_class``: queries whose best class is the recorded one. ``mask_iou``: intersection
        over union of the masks, which are where logits are above 0, as the mean over queries; 1
        where both are empty. ``same_segment``: pixels of the masks that go to the recorded query.
        None where shapes differ.
    """
    names = ("mask_logits", "class_logits")
    if any(ours[name].shape != recorded[name].shape for name in names):
        return dict.fromkeys(("best_class", "mask_iou", "same_segment"))
    (masks, classes), (recorded_masks, recorded_classes) = (
        (tensors["mask_logits"], tensors["class_logits"]) for tensors in (ours, recorded)
    )
    same_class = classes.argmax(-1) == recorded_classes.argmax(-1)
    inside, recorded_inside = masks > 0, recorded_masks > 0
    intersection = (inside & recorded_inside).sum((-2, -1))
    union = (inside | recorded_inside).sum((-2, -1))
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    same_segment = segments(masks, classes) == segments(recorded_masks, recorded_classes)
    return {
        "best_class": float(same_class.double().mean()),
        "mask_iou": float(iou.double().mean()),
        "same_segment": float(same_segment.double().mean()),
    }


def segments(masks: Tensor, classes: Tensor) -> Tensor:
    """The query that each pixel goes to, (batch, height, width) int64.

    It is the one with the highest product of class probability, "no object" left out, and mask
    probability, as in github.com/tue-mps/eomt training/mask_classification_panoptic.py, before
    queries are dropped by score and overlap.

    Args:
        masks: logits (batch, queries, height, width).
        classes: logits (batch, queries, classes + 1).
    """
    scores = classes.softmax(-1)[..., :-1].amax(-1)
    return (scores[..., None, None] * masks.sigmoid()).argmax(1)
