"""Metrics of segmentation: panoptic quality, mask AP and mIoU.

Each is a torchmetrics `Metric`; `compute` gathers its states from all processes.
"""

import contextlib
import io
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from converter.pictures.datasets import IGNORED, Instances, Segments


class Figures(NamedTuple):
    """The result of a metric.

    Attributes:
        images: number of pictures.
        overall: the metric itself first, then its parts; in percent, NaN for the mean of no values.
        means_over: which classes those are means over, and what the original does with the others.
        per_class: the metric and counts for every class, in the order of the class ids.
    """

    images: int
    overall: dict[str, float]
    means_over: str
    per_class: list[dict[str, float]]


class PanopticQuality(Metric):
    """Panoptic quality as the original counts it.

    Kirillov et al., "Panoptic Segmentation" (arXiv 1801.00868), with these rules of
    github.com/tue-mps/eomt training/lightning_module.py:

    - Pixels without a predicted segment count against the prediction.
    - A predicted segment is not a false positive if more than half of it is in unannotated pixels
      or in a crowd of its class. A crowd is never matched, and never a false negative.
    - Of several crowds of a class in a picture only one counts: here the last. The original takes
      the last of a Python set, whose order is arbitrary, and panopticapi's evaluation.py the last
      one in the annotation file.
    - All stuff of a picture counts as crowd if the first annotated segment is a crowd: the original
      gives stuff the instance id 0, and looks up crowds by instance id. This happens in few of
      COCO's pictures, and the published figures include it.

    Means are over the classes with a segment that counts, annotated or predicted; the original
    counts the others as 0.
    """

    higher_is_better = True
    full_state_update = False

    images: Tensor
    iou_sum: Tensor
    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor

    def __init__(self, num_classes: int, stuff_classes: Collection[int]) -> None:
        super().__init__()
        self.is_stuff = [i in stuff_classes for i in range(num_classes)]
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state(
            "iou_sum", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum"
        )
        for count in ("true_positives", "false_positives", "false_negatives"):
            zeros = torch.zeros(num_classes, dtype=torch.int64)
            self.add_state(count, zeros, dist_reduce_fx="sum")

    def update(self, prediction: Segments, target: Segments) -> None:
        """Counts a picture."""
        ids, classes, crowd = self._merge_stuff(target)
        predicted_ids, predicted, _ = self._merge_stuff(prediction)

        # number of pixels that each annotated segment shares with each predicted one; row and
        # column 0 are for pixels outside all segments
        shape = (len(classes) + 1, len(predicted) + 1)
        pairs = np.ravel_multi_index((ids + 1, predicted_ids + 1), shape)
        pixels = np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        unannotated, common = pixels[0, 1:], pixels[1:, 1:]
        areas, predicted_areas = pixels[1:].sum(1), pixels[:, 1:].sum(0)

        same_class = classes[:, None] == predicted
        union = areas[:, None] + predicted_areas - unannotated - common
        iou = common / union
        matched = same_class & ~crowd[:, None] & (iou > 0.5)
        last_crowds = {class_id: i for i, class_id in enumerate(classes.tolist()) if crowd[i]}
        forgives = np.isin(np.arange(len(classes)), list(last_crowds.values()))
        ignored = unannotated + (common * (same_class & forgives[:, None])).sum(0)

        missed = ~matched.any(1) & ~crowd
        wrong = ~matched.any(0) & (ignored / predicted_areas <= 0.5)
        matched_rows, matched_columns = np.nonzero(matched)
        found = predicted[matched_columns]
        self.images += 1
        self.iou_sum += self._per_class(found, iou[matched_rows, matched_columns])
        self.true_positives += self._per_class(found)
        self.false_positives += self._per_class(predicted[wrong])
        self.false_negatives += self._per_class(classes[missed])

    def compute(self) -> Figures:
        """PQ, SQ and RQ of everything, of things and of stuff; counts per class."""
        iou_sum, tp, fp, fn = (
            state.cpu().numpy()
            for state in (
                self.iou_sum,
                self.true_positives,
                self.false_positives,
                self.false_negatives,
            )
        )
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN for a class that does not occur
            rq = tp / (tp + fp / 2 + fn / 2)
            sq = np.where(tp + fp + fn > 0, iou_sum / np.maximum(tp, 1), np.nan)
        qualities = {"PQ": 100 * sq * rq, "SQ": 100 * sq, "RQ": 100 * rq}
        stuff = np.array(self.is_stuff)
        groups = {"": np.full_like(stuff, True), "_things": ~stuff, "_stuff": stuff}
        columns = qualities | {"iou_sum": iou_sum, "tp": tp, "fp": fp, "fn": fn}
        return Figures(
            int(self.images),
            {
                name + group: _mean(values[chosen])
                for group, chosen in groups.items()
                for name, values in qualities.items()
            },
            _describe_classes(
                rq,
                "that have at least one counted segment, annotated or predicted; the original "
                "counts the other classes as 0",
            ),
            _rows(columns),
        )

    def _merge_stuff(
        self, segments: Segments
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Segments with the stuff of each class as one: pixels' indices, classes, crowd flags."""
        keys = [
            (class_id, 0 if self.is_stuff[class_id] else i)
            for i, class_id in enumerate(segments.classes)
        ]
        merged = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        indices = np.array([*(merged[key] for key in keys), -1])  # the index -1 stays -1
        return (
            indices[segments.ids],
            np.array([class_id for class_id, _ in merged], dtype=np.int64),
            np.array([segments.crowd[i] for _, i in merged], dtype=np.bool_),
        )

    def _per_class(
        self, classes: NDArray[np.int64], weights: NDArray[np.float64] | None = None
    ) -> Tensor:
        counted = np.bincount(classes, weights, minlength=len(self.is_stuff))
        return torch.from_numpy(counted).to(self.device)


class MaskAveragePrecision(Metric):
    """Mask AP as computed by COCO's own tool, with up to 100 objects per picture.

    As in the original, the area of its mask makes an object small, medium or large, and means are
    over the classes with an annotated object of that size that is not a crowd.
    """

    higher_is_better = True
    full_state_update = False

    images: Tensor
    targets: list[Tensor]
    predictions: list[Tensor]
    target_counts: list[Tensor]
    prediction_counts: list[Tensor]
    scores: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        for state in ("targets", "predictions", "target_counts", "prediction_counts", "scores"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, prediction: Instances, target: Instances) -> None:
        """Adds a picture's objects, as run lengths."""
        self.images += 1
        for instances, rows, counts in (
            (target, self.targets, self.target_counts),
            (prediction, self.predictions, self.prediction_counts),
        ):
            packed_rows, packed_counts = _pack(instances)
            rows.append(packed_rows.to(self.device))
            counts.append(packed_counts.to(self.device))
        self.scores.append(torch.tensor(prediction.scores, dtype=torch.float64).to(self.device))

    def compute(self) -> Figures:
        """AP over IoU 0.50 to 0.95, at 0.50, at 0.75, and of small, medium and large objects."""
        targets = _unpack(self.targets, self.target_counts)
        found = _unpack(self.predictions, self.prediction_counts)
        for entry, score in zip(found, _joined(self.scores).tolist(), strict=True):
            entry["score"] = score
        sizes = {a["image_id"]: a["segmentation"]["size"] for a in targets + found}
        content = {
            "images": [
                {"id": image_id, "height": height, "width": width}
                for image_id, (height, width) in sizes.items()
            ],
            "categories": [{"id": class_id} for class_id in range(self.num_classes)],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            evaluation = COCOeval(
                _coco(content | {"annotations": targets}),
                _coco(content | {"annotations": found}),
                "segm",
            )
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = ("AP", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large")
        # (IoU thresholds, recall thresholds, classes), of all areas, for 100 objects per picture
        precision = evaluation.eval["precision"][..., 0, -1]
        ap = np.where(precision < 0, np.nan, precision)
        return Figures(
            int(self.images),
            {
                name: 100 * value if value >= 0 else np.nan
                for name, value in zip(names, evaluation.stats[:6].tolist(), strict=True)
            },
            _describe_classes(ap.mean((0, 1)), "that have an annotated object that is not a crowd")
            + "; AP_small, AP_medium and AP_large are means over the classes that have an object "
            "of that size; the original does the same",
            _rows({"AP": 100 * ap.mean((0, 1)), "AP_50": 100 * ap[0].mean(0)}),
        )


class MeanIoU(Metric):
    """Mean intersection over union of the classes' pixels in all pictures together.

    The mean is over the classes with an annotated or a predicted pixel among the annotated ones;
    the original counts the others as 0.
    """

    higher_is_better = True
    full_state_update = False

    images: Tensor
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        # pixels by annotated class and predicted class
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", confusion, dist_reduce_fx="sum")

    def update(self, prediction: NDArray[np.integer], target: NDArray[np.integer]) -> None:
        """Counts a picture's pixels, except those that are IGNORED in the target."""
        annotated = target != IGNORED
        pairs = np.ravel_multi_index(
            (target[annotated], prediction[annotated]), self.confusion.shape
        )
        counts = np.bincount(pairs, minlength=self.confusion.numel())
        self.images += 1
        self.confusion += torch.from_numpy(counts).view_as(self.confusion).to(self.device)

    def compute(self) -> Figures:
        """The mean, and the IoU of every class."""
        confusion = self.confusion.cpu().numpy()
        common = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - common
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN for a class that does not occur
            iou = 100 * common / union
        return Figures(
            int(self.images),
            {"mIoU": _mean(iou)},
            _describe_classes(
                iou,
                "that are annotated, or predicted in annotated pixels; the original counts the "
                "other classes as 0",
            ),
            _rows({"IoU": iou}),
        )


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _describe_classes(values: NDArray[np.float64], counted: str) -> str:
    """Says how many of the classes have a value, and which ones, unless all have one."""
    number = np.count_nonzero(~np.isnan(values))
    if number == len(values):
        return f"all {len(values)} classes"
    return f"the {number} of {len(values)} classes {counted}"


def _rows(columns: Mapping[str, NDArray[Any]]) -> list[dict[str, float]]:
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def _pack(instances: Instances) -> tuple[Tensor, Tensor]:
    """Objects as tensors, which processes can exchange.

    Returns:
        (objects, 6) int64: picture, class, crowd, height, width, bytes of run lengths;
        (bytes,) uint8: the run lengths of all masks.
    """
    rows = [
        (instances.image_id, class_id, is_crowd, *encoded["size"], len(encoded["counts"]))
        for encoded, class_id, is_crowd in zip(
            instances.masks, instances.classes, instances.crowd, strict=True
        )
    ]
    counts = bytearray().join(encoded["counts"] for encoded in instances.masks)
    return (
        torch.tensor(rows, dtype=torch.int64).reshape(-1, 6),
        torch.frombuffer(counts, dtype=torch.uint8)
        if counts
        else torch.empty(0, dtype=torch.uint8),
    )


def _unpack(rows: list[Tensor] | Tensor, counts: list[Tensor] | Tensor) -> list[dict[str, Any]]:
    """Packed objects as COCO annotations, numbered from 1 because 0 means "none" in COCOeval."""
    lengths = io.BytesIO(_joined(counts).numpy().tobytes())
    annotations = []
    for i, row in enumerate(_joined(rows).tolist(), start=1):
        image_id, class_id, is_crowd, height, width, length = row
        encoded = {"size": [height, width], "counts": lengths.read(length)}
        annotations.append(
            {
                "id": i,
                "image_id": image_id,
                "category_id": class_id,
                "iscrowd": is_crowd,
                "segmentation": encoded,
                "area": float(mask.area(encoded)),
            }
        )
    return annotations


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """A "cat" state, which is a list until torchmetrics has gathered it."""
    return dim_zero_cat(state).cpu()


def _coco(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco
