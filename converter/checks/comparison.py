"""Compares tensors with recorded ones: how far apart they are, and what a user would notice."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from converter.configs import coarsest

# Largest allowed difference in float32. Two correct computations of a model whose logits reach 60
# differ by up to 1.1e-4, because kernels and the order of summation differ
# (benchmarks/tolerances.py).
TOLERANCE = 2e-4

# Rounding errors grow with the values: up to 4e-6 of the range was measured.
FLOAT32_TOLERANCE = 1e-5

# Correct models were measured to use up to 0.6 of a tolerance (benchmarks/tolerances.py). A model
# only counts as repaired if it uses hardly more than that.
RIGHT = 2 / 3


@dataclass(frozen=True)
class Tolerance:
    """How far a model may be from what was recorded.

    Two tensors may differ by ``absolute`` or by ``relative`` times the range, whichever is larger.
    The other three limit what a user would notice.

    Attributes:
        absolute: the difference that is always allowed.
        relative: the allowed difference as a share of the recorded range.
        equal_pixels: the smallest share of a picture's pixels that must have the recorded result.
        best_class: the smallest share of queries whose best class must be the recorded one, where
            one query may always differ; 0 to check only the differences.
        mask_iou: the smallest allowed mask IoU, as the mean over queries; 0 likewise.
    """

    absolute: float = TOLERANCE
    relative: float = FLOAT32_TOLERANCE
    equal_pixels: float = 0.995
    best_class: float = 0.0
    mask_iou: float = 0.0

    def of(self, recorded: Tensor) -> float:
        """The largest difference from this tensor that is allowed."""
        values = recorded.double()  # in 16 bits, and near the largest of 32, a range overflows
        return max(self.absolute, self.relative * float(values.max() - values.min()))

    def widened(self, factor: float) -> "Tolerance":
        """The tolerance with its two differences multiplied by a factor."""
        return replace(self, absolute=factor * self.absolute, relative=factor * self.relative)


FLOAT32 = Tolerance()

# Rounding to bfloat16 and float16 moves outputs by up to 1.6% and 0.2% of their range; it changes
# 1.7% and 0.24% of a result's pixels, 4.5% and 0.5% of the best classes, and leaves masks an IoU of
# 0.981 and 0.996 (benchmarks/tolerances.py). The margin is for smaller pictures and fewer queries,
# where a single one counts for more.
ROUNDED = {
    "bfloat16": Tolerance(relative=0.04, equal_pixels=0.9, best_class=0.9, mask_iou=0.97),
    "float16": Tolerance(relative=0.005, equal_pixels=0.98, best_class=0.95, mask_iou=0.99),
}

# Computing in bfloat16 and float16, which rounds weights and activations, moves outputs by up to
# 2.5% and 0.36% of their range; it changes 4.0% and 0.47% of a result's pixels, 4.2% and 0.5% of
# the best classes, and leaves masks an IoU of 0.973 and 0.994 (benchmarks/computed.py). The margin
# is for smaller pictures, as above, and for runtimes that add up in 16 bits.
COMPUTED = {
    "bfloat16": Tolerance(relative=0.06, equal_pixels=0.9, best_class=0.9, mask_iou=0.94),
    "float16": Tolerance(relative=0.01, equal_pixels=0.98, best_class=0.95, mask_iou=0.985),
}


def computed_tolerance(*types: str) -> Tolerance:
    """How far two outputs of the same weights may be apart that were computed in these types."""
    coarse = coarsest(types)
    return COMPUTED[coarse] if coarse else FLOAT32


@dataclass(frozen=True)
class Comparison:
    """How a tensor compares with the recorded one.

    Attributes:
        max_abs, mean_abs: largest and mean absolute difference.
        spread: standard deviation of the recorded values.
        relative: largest difference divided by ``spread``.
        cosine: cosine similarity of the two as vectors.
        same_shape: whether both have the same shape, so that they can be compared.
        failure: a sentence that says what is wrong; empty if nothing is.
    """

    max_abs: float
    mean_abs: float
    spread: float
    relative: float
    cosine: float
    same_shape: bool
    failure: str

    def to_dict(self) -> dict[str, float | None]:
        """The figures as JSON shows them; null for NaN and infinity."""
        figures = asdict(self)
        del figures["same_shape"], figures["failure"]
        return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def compare(name: str, ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> Comparison:
    """Compares a tensor with the recorded one.

    Args:
        name: the tensor's name in the failure message.
        ours: what was computed.
        theirs: what was recorded.
        tolerance: how far apart they may be.
    """
    spread = float(theirs.float().std(correction=0))
    if ours.shape != theirs.shape:
        failure = (
            f"{name} has the shape {list(ours.shape)}, expected {list(theirs.shape)} as recorded."
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
    """The largest of the differences; None if one of them is NaN or infinite."""
    largest = [comparison.max_abs for comparison in compared.values()]
    return max(largest) if largest and all(map(math.isfinite, largest)) else None


# the keys of what `agreement` returns
AGREEMENT = ("best_class", "mask_iou", "same_segment")


def agreement(
    ours: Mapping[str, Tensor], recorded: Mapping[str, Tensor]
) -> dict[str, float | None]:
    """How far two results agree in what a user would notice, as shares from 0 to 1.

    Args:
        ours: ``mask_logits`` (batch, queries, height, width) and ``class_logits``
            (batch, queries, classes + 1).
        recorded: the same, as recorded.

    Returns:
        ``best_class``: share of queries whose best class is the recorded one. ``mask_iou``:
        intersection over union of the masks (logits above 0), as the mean over queries; 1 if both
        masks are empty. ``same_segment``: share of mask pixels assigned to the recorded query. All
        are None if the shapes differ.
    """
    names = ("mask_logits", "class_logits")
    if any(ours[name].shape != recorded[name].shape for name in names):
        return dict.fromkeys(AGREEMENT)
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


def disagreement(
    found: Mapping[str, float | None], queries: int, tolerance: Tolerance
) -> Iterator[str]:
    """Says, in sentences, which figures of `agreement` are too low.

    Args:
        found: what `agreement` returned.
        queries: number of queries in all pictures together.
        tolerance: how much must agree. One query may always have another class, because its two
            best classes may have the same probability.
    """
    best_class, mask_iou = found["best_class"], found["mask_iou"]
    if best_class is not None and 1 - best_class > max(1 - tolerance.best_class, 1.01 / queries):
        yield (
            f"{best_class:.1%} of the queries have the recorded best class, fewer than "
            f"{tolerance.best_class:.1%}."
        )
    if mask_iou is not None and mask_iou < tolerance.mask_iou:
        yield f"The masks have a mean IoU of {mask_iou:.4f}, less than {tolerance.mask_iou:g}."


def segments(masks: Tensor, classes: Tensor) -> Tensor:
    """The query that each pixel is assigned to, (batch, height, width) int64.

    It is the one with the highest product of class probability, "no object" left out, and mask
    probability, as in github.com/tue-mps/eomt training/mask_classification_panoptic.py, before
    queries are dropped by score and overlap.

    Args:
        masks: logits (batch, queries, height, width).
        classes: logits (batch, queries, classes + 1).
    """
    scores = classes.softmax(-1)[..., :-1].amax(-1)
    return (scores[..., None, None] * masks.sigmoid()).argmax(1)


def equal_pixels(ours: Tensor, theirs: Tensor) -> float:
    """The share of pixels with the recorded class and, if there are segments, the same segment.

    Segment ids change when one segment is added or missing. So segments are matched by their
    pixels: two are the same if neither shares more pixels with a third one.

    Args:
        ours: class ids (height, width), or class and segment ids (height, width, 2), int64.
        theirs: the same, as recorded; if the shapes differ, the share is 0.
    """
    if ours.shape != theirs.shape:
        return 0.0
    if ours.ndim == 2:
        return float((ours == theirs).double().mean())
    same_class = ours[..., 0] == theirs[..., 0]
    (_, mine), (their_ids, recorded) = (
        side[..., 1][same_class].unique(return_inverse=True) for side in (ours, theirs)
    )
    # each pair as one number: sorting pairs as rows takes twenty times as long
    pairs, times = (mine * len(their_ids) + recorded).unique(return_counts=True)
    found = [divmod(pair, len(their_ids)) for pair in pairs.tolist()]
    counts: list[int] = times.tolist()
    most: dict[tuple[int, int], int] = {}  # pixels shared with another segment, by side and id
    for pair, count in zip(found, counts, strict=True):
        for segment in enumerate(pair):
            most[segment] = max(count, most.get(segment, 0))
    matched = (
        count
        for pair, count in zip(found, counts, strict=True)
        if all(count == most[segment] for segment in enumerate(pair))
    )
    return sum(matched) / same_class.numel()


def equal_areas(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The share of the instances' area that matches the recording, from 0 to 1.

    Args:
        ours: ``labels``, ``queries`` and ``areas`` in pixels, each (instances,), in any order.
        theirs: the same, as recorded. An instance that only one side has counts with area 0 on the
            other.
    """
    mine, recorded = (
        {
            (query, label): area
            for query, label, area in zip(
                *(result[key].tolist() for key in ("queries", "labels", "areas")), strict=True
            )
        }
        for result in (ours, theirs)
    )
    areas = [(mine.get(pair, 0), recorded.get(pair, 0)) for pair in {*mine, *recorded}]
    larger = sum(map(max, areas))
    return sum(map(min, areas)) / larger if larger else 1.0


def equal_results(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of each result matches the recording, from 0 to 1, by the names of results.

    For instances, which overlap, it is a share of the area of their masks; else of the pixels.
    """
    shares = {}
    for name in sorted(ours.keys() & theirs.keys()):
        stem, _, kind = name.rpartition("_")
        if not stem.endswith(".instance"):
            shares[name] = equal_pixels(ours[name], theirs[name])
        elif kind == "areas":
            mine, recorded = (
                {key: results[f"{stem}_{key}"] for key in ("queries", "labels", "areas")}
                for results in (ours, theirs)
            )
            shares[name] = equal_areas(mine, recorded)
    return shares
