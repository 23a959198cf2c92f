"""Turns the masks and classes of queries into segments, as the original does.

Source: github.com/tue-mps/eomt training/lightning_module.py and training/mask_classification_*.py.

One query's mask is enlarged at a time, or some rows of all queries' masks: this takes little memory
and gives, bit for bit, what enlarging all of them at once gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Elements of masks or scores that are computed at a time, 16 MB in float32: small beside those of a
# picture, large enough that threads rarely wait for each other.
WORKING_ELEMENTS = 2**22


@dataclass(frozen=True)
class Placement:
    """Where a picture is in the network's input. Sizes are (height, width) in pixels.

    Attributes:
        input_size: of the input.
        scaled_size: of the resized picture, which is in the input's top left corner or, where
            windows slide over it, is wider or higher than the input.
        target_size: of the segmentation.
    """

    input_size: tuple[int, int]
    scaled_size: tuple[int, int]
    target_size: tuple[int, int]

    def enlarge(self, mask_logits: Tensor) -> Tensor:
        """Mask logits (H', W') of the network as logits of every pixel of the target."""
        height, width = self.scaled_size
        return _resize(
            _resize(mask_logits[None], self.input_size)[:, :height, :width], self.target_size
        )[0]


@dataclass(frozen=True)
class Window:
    """A window on a resized picture: the network's outputs for it, and its top left corner.

    Attributes:
        mask_logits: (queries, H', W').
        class_logits: (queries, classes + 1).
        top, left: in pixels of the resized picture.
    """

    mask_logits: Tensor
    class_logits: Tensor
    top: int = 0
    left: int = 0


def panoptic_segmentation(
    mask_logits: Tensor,
    class_logits: Tensor,
    placement: Placement,
    *,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    stuff_classes: Collection[int],
) -> dict[str, Any]:
    """Every pixel's segment, from logits (queries, H', W') and (queries, classes + 1).

    A pixel belongs to the query with the largest product of score and mask probability. Thresholds
    as in EomtImageProcessor.post_process_panoptic_segmentation.
    """
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > threshold)
    queries = kept.nonzero().flatten()
    scores, mask_logits = scores[queries], mask_logits[queries]

    device = mask_logits.device
    largest = torch.full(placement.target_size, -1.0, device=device)
    # of every pixel: twice the index of its query, plus 1 inside of that query's mask. In float32,
    # like the results of comparisons: on the CPU, this takes a third less time than other dtypes.
    owner = torch.zeros(placement.target_size, device=device)
    height, width = placement.target_size
    band = _rows_at_a_time(device, width) or height
    working = torch.empty(2, min(band, height), width, device=device)
    row_areas = torch.zeros(len(queries), height, device=device)  # of masks; exact in float32
    for index, (rows, columns) in enumerate(
        _regions(mask_logits, scores, placement, mask_threshold)
    ):
        enlarged = placement.enlarge(mask_logits[index])
        for start in range(rows.start, rows.stop, band):
            part = slice(start, min(start + band, rows.stop))
            probability = enlarged[part, columns].sigmoid_()
            inside, larger = working[:, : part.stop - start, columns]
            torch.ge(probability, mask_threshold, out=inside)
            torch.sum(inside, 1, out=row_areas[index, part])
            product = probability.mul_(scores[index])
            best = largest[part, columns]
            torch.gt(product, best, out=larger)
            torch.maximum(best, product, out=best)
            owner[part, columns].lerp_(inside.add_(2 * index), larger)

    count = len(queries)
    owners = owner.flatten().int()
    # together, as every transfer waits for the device
    visible_areas = owners.bincount(minlength=2 * count)
    areas = torch.cat([visible_areas, row_areas.long().sum(1)]).tolist()
    queries_labels = labels[queries].tolist()
    queries_scores = scores.tolist()

    segment_ids = [-1] * max(1, 2 * count)
    segments: list[dict[str, Any]] = []
    stuff_segments: dict[int, int] = {}
    for index, (label, score) in enumerate(zip(queries_labels, queries_scores, strict=True)):
        hidden_area, visible_area = areas[2 * index : 2 * index + 2]
        if visible_area == 0:
            continue
        mask_area = areas[2 * count + index]
        if (hidden_area + visible_area) / mask_area < overlap_mask_area_threshold:
            continue
        if label in stuff_segments:
            segment_ids[2 * index + 1] = stuff_segments[label]
            continue
        if label in stuff_classes:
            stuff_segments[label] = len(segments)
        segment_ids[2 * index + 1] = len(segments)
        segments.append({"id": len(segments), "label_id": label, "score": round(score, 6)})
    table = torch.tensor(segment_ids, device=device)
    segmentation = table.index_select(0, owners).view(placement.target_size)
    return {"segmentation": segmentation, "segments_info": segments}


def _rows_at_a_time(device: torch.device, width: int) -> int | None:
    """Rows of so many pixels that what is computed of them stays in the caches of a CPU's cores.

    None on other devices, which are faster with all rows.
    """
    if device.type != "cpu":
        return None
    return max(1, 2**16 * torch.get_num_threads() // width)


# side, in mask logits, of the blocks that are compared to leave parts of a picture out
_BLOCK = 2


def _regions(
    mask_logits: Tensor, scores: Tensor, placement: Placement, mask_threshold: float
) -> list[tuple[slice, slice]]:
    """The rows and columns of the target outside of which a query changes nothing, for each query.

    Between pixels, interpolated logits lie between the smallest and the largest of the logits
    around them. So a query has no part in a place where its largest probability is below the
    threshold of a mask, and its product with the score is below the smallest of another query.

    Args:
        mask_logits: (queries, H', W').
        scores: (queries,).
        placement: as in `panoptic_segmentation`.
        mask_threshold: the least mask probability of a pixel inside a mask.
    """
    if len(mask_logits) == 0:
        return []
    scales = [  # logits of the mask per pixel of the input, and per pixel of the target
        (logits / inputs, scaled / target * logits / inputs)
        for logits, inputs, scaled, target in zip(
            mask_logits.shape[1:],
            placement.input_size,
            placement.scaled_size,
            placement.target_size,
            strict=True,
        )
    ]
    if max(per_input for per_input, _ in scales) > _BLOCK - 1.5:
        everything = slice(0, placement.target_size[0]), slice(0, placement.target_size[1])
        return [everything] * len(mask_logits)
    # a pixel's value comes from logits that are at most 1 + per_input away from its place, so from
    # its block and those around it
    shape = [
        math.ceil(target * per_target / _BLOCK)
        for target, (_, per_target) in zip(placement.target_size, scales, strict=True)
    ]
    visible = mask_logits[:, : (shape[0] + 1) * _BLOCK, : (shape[1] + 1) * _BLOCK].float()
    high, low = (
        F.max_pool2d(F.max_pool2d(values[None], _BLOCK, ceil_mode=True), 3, 1, 1)[0]
        for values in (visible, -visible)
    )
    high, low = high[:, : shape[0], : shape[1]], -low[:, : shape[0], : shape[1]]
    # float32 rounds interpolated logits, probabilities and products by less than this
    slack = 1e-5 * torch.maximum(high.abs(), low.abs())
    highest, lowest = (high + slack).sigmoid(), (low - slack).sigmoid()
    weights = scores[:, None, None]
    surest = (lowest * weights).amax(0) * (1 - 1e-5) - 1e-37
    # where a comparison is with NaN, the query stays
    needed = ~((highest * weights < surest) & (highest < mask_threshold * (1 - 1e-5)))
    rows, columns = needed.any(2).cpu(), needed.any(1).cpu()
    return [
        (
            _extent(row, scales[0][1], placement.target_size[0]),
            _extent(column, scales[1][1], placement.target_size[1]),
        )
        for row, column in zip(rows, columns, strict=True)
    ]


def _extent(needed: Tensor, per_target: float, length: int) -> slice:
    """The pixels from the first block that is needed to the last one, with one more each side."""
    blocks = needed.nonzero().flatten().tolist()
    if not blocks:
        return slice(0, 0)
    first, last = (block * _BLOCK / per_target for block in (blocks[0], blocks[-1] + 1))
    return slice(max(0, math.floor(first) - 1), min(length, math.ceil(last) + 1))


def instance_segmentation(
    mask_logits: Tensor,
    class_logits: Tensor,
    placement: Placement,
    *,
    threshold: float,
    top_k: int | None,
    return_binary_maps: bool,
) -> dict[str, Any]:
    """Instances, from logits (queries, H', W') and (queries, classes + 1).

    A segment's score is its class probability times the mean probability inside its mask.
    Arguments as in EomtImageProcessor.post_process_instance_segmentation.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    if top_k is None:
        best, labels = probabilities.max(-1)
        queries = torch.arange(len(best), device=best.device)
    else:
        ranked = probabilities.flatten().sort(descending=True, stable=True)
        best, pairs = ranked.values[:top_k], ranked.indices[:top_k]
        queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]

    # times a mean of at most 1, others cannot reach the threshold
    likely = (~(best < threshold)).nonzero().flatten()
    best, queries = best[likely], queries[likely]
    known: dict[int, tuple[Tensor, Tensor]] = {}  # by query: one may be in several pairs
    pairs_queries = queries.tolist()
    for query in pairs_queries:
        if query not in known:
            known[query] = _mask_and_mean(placement.enlarge(mask_logits[query]))
    means = torch.stack([known[query][1] for query in pairs_queries]) if known else best
    scores = (best * means).tolist()
    is_empty = (means == 0).tolist()

    masks: list[Tensor] = []
    segments: list[dict[str, Any]] = []
    for query, label, score, empty in zip(
        pairs_queries, labels[likely].tolist(), scores, is_empty, strict=True
    ):
        if score < threshold or (top_k is None and empty):
            continue
        if top_k is None:
            score = round(score, 6)  # as transformers does; not where scores are for ranking
        segments.append({"id": len(masks), "label_id": label, "score": score})
        masks.append(known[query][0])

    segmentation = torch.full(placement.target_size, -1, device=mask_logits.device)
    drawn = list(enumerate(masks))
    # later queries cover earlier ones, as in transformers; of pairs, the best is on top
    for segment_id, mask in drawn if top_k is None else reversed(drawn):
        segmentation[mask] = segment_id
    result = {"segmentation": segmentation, "segments_info": segments}
    if return_binary_maps:
        empty = segmentation.new_empty((0, *placement.target_size), dtype=torch.bool)
        result["binary_maps"] = torch.stack(masks) if masks else empty
    return result


def semantic_segmentation(
    windows: Sequence[Window], placement: Placement, *, return_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Every pixel's class, and on request the scores (classes, height, width).

    A class's score is the sum over the queries of class probability times mask probability; where
    windows overlap, it is the mean over the windows.
    """
    classes = windows[0].class_logits.shape[-1] - 1
    device = windows[0].class_logits.device
    sums = torch.zeros((classes, *placement.scaled_size), device=device)
    counts = torch.zeros(placement.scaled_size, device=device)
    for window in windows:
        region = sums[:, window.top :, window.left :]
        height, width = map(min, region.shape[1:], placement.input_size)  # the rest is padding
        for rows, scores in _class_scores(window, placement.input_size, (height, width)):
            region[:, rows, :width] += scores
        counts[window.top :, window.left :][:height, :width] += 1
    scores = sums.div_(counts.clamp(min=1))  # in place: 410 MB for 150 classes, else 670

    largest = torch.full(placement.target_size, -torch.inf, device=device)
    segmentation = torch.zeros(placement.target_size, dtype=torch.long, device=device)
    all_scores = scores.new_empty((classes, *placement.target_size)) if return_scores else None
    for label in range(classes) if return_scores else _possible_classes(scores):
        score = _resize(scores[label, None], placement.target_size)[0]
        segmentation[score > largest] = label
        largest = torch.maximum(largest, score)
        if all_scores is not None:
            all_scores[label] = score
    return segmentation, all_scores


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (channels, height, width), in float32 whatever the dtype."""
    return F.interpolate(x[None].float(), size, mode="bilinear")[0]


def _mask_and_mean(mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The mask (height, width), bool, and the mean probability inside it, 0 if it is empty."""
    mask = mask_logits > 0
    # in place: 7% less time for instances at 1080x1920
    probabilities = mask_logits.sigmoid().masked_fill_(~mask, 0).flatten()
    # torch splits a single sum among threads, which changes its last bits. Each of two sums is done
    # by one thread, in the same order as if the masks of all queries were summed at once.
    total = probabilities.expand(2, -1).sum(1)[0]
    return mask, total / (mask.count_nonzero() + 1e-6)  # mask_classification_instance.py


def _class_scores(
    window: Window, input_size: tuple[int, int], visible_size: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """Scores (classes, rows, width) of the visible part of the input, a band of rows at a time."""
    probabilities = window.class_logits.float().softmax(-1)[:, :-1]
    queries, mask_height, _ = window.mask_logits.shape
    height, width = input_size
    visible_height, visible_width = visible_size
    band = max(1, WORKING_ELEMENTS * mask_height // (queries * width * height))
    if height % mask_height or (height // mask_height).bit_count() > 1:
        band = mask_height  # positions between rows are rounded differently within a band
    for start in range(0, mask_height, band):
        stop = min(start + band, mask_height)
        # with a row more on both sides, from which the outer rows are interpolated
        first, last = max(start - 1, 0), min(stop + 1, mask_height)
        top, bottom, masks_top, masks_bottom = (
            row * height // mask_height for row in (start, stop, first, last)
        )
        bottom = min(bottom, visible_height)
        if top >= bottom:
            break
        masks = _resize(window.mask_logits[:, first:last], (masks_bottom - masks_top, width))
        masks = masks[:, top - masks_top : bottom - masks_top, :visible_width].sigmoid()
        yield slice(top, bottom), torch.einsum("qc,qhw->chw", probabilities, masks)


def _possible_classes(scores: Tensor) -> list[int]:
    """The classes whose scores can be the largest anywhere, also between pixels.

    Between four neighbours, a class's interpolated score lies between their smallest and their
    largest score. So a class cannot win where its largest score is below another class's smallest.

    Args:
        scores: (classes, height, width).
    """
    _, height, width = scores.shape
    chunks = scores.split(max(1, WORKING_ELEMENTS // (height * width)))
    least = (_over_neighbours(torch.minimum, chunk).amax(0) for chunk in chunks)
    # float32 rounds the interpolation by less than 1e-5 of its value
    guaranteed = reduce(torch.maximum, least) * (1 - 1e-5)
    possible = [
        (_over_neighbours(torch.maximum, chunk) >= guaranteed).flatten(1).any(1) for chunk in chunks
    ]
    labels: list[int] = torch.cat(possible).nonzero().flatten().tolist()
    return labels


def _over_neighbours(function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a function to every four pixels around a corner of (classes, height, width)."""
    for axis in (1, 2):
        if x.shape[axis] > 1:
            length = x.shape[axis] - 1
            x = function(x.narrow(axis, 0, length), x.narrow(axis, 1, length))
    return x
