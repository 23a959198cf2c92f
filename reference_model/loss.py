"""The training loss: queries are paired with a picture's segments, then compared with them.

It is Mask2Former's (Cheng et al., arXiv 2112.01527, sections 3.3 and 4.1), which EoMT uses too.
Random numbers are drawn in the same order as in transformers: the same seed gives the same loss.
Only the divisor of the mask losses can differ: see `mean_num_pairs`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reference_model.config import EomtDinov3Config
from reference_model.outputs import Prediction


class Labels(NamedTuple):
    """The labels of a batch: the segments of its pictures, one picture after another.

    Attributes:
        masks: (segments, height, width), float32.
        classes: (segments,), class ids.
        counts: the number of segments of each picture.
    """

    masks: Tensor
    classes: Tensor
    counts: list[int]


class Points(NamedTuple):
    """Where the masks of one prediction are compared: random x and y in [0, 1].

    Attributes:
        matching: for each picture (1, points, 2).
        candidates: (pairs, candidates, 2), of which the loss takes the least decided.
        uniform: (pairs, other points of the loss, 2).
    """

    matching: list[Tensor]
    candidates: Tensor
    uniform: Tensor


class SetCriterion(nn.Module):
    """Compares a set of queries with a set of segments, neither of which has an order.

    Attributes:
        empty_weight: (classes + 1,) buffer, the classes' weights in the cross entropy. The last
            class, "no object", has `config.no_object_weight`: most queries have no segment.
    """

    empty_weight: Tensor

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))
        self.empty_weight[-1] = config.no_object_weight

    def forward(
        self,
        predictions: Sequence[Prediction],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[dict[str, Tensor]]:
        """The losses of each prediction, always in float32, whatever the logits' dtype or autocast.

        The host pairs queries and segments. It waits for the device once, whatever the number of
        predictions and pictures: all costs are copied to it together. So the points of all
        predictions are in memory at once, 300 kB for every pair of each with the usual numbers.

        Args:
            predictions: of the same pictures, such as those of every block.
            mask_labels: per picture (segments, height, width), 1 or True within a segment; they
                cover the same area as the logits, at any resolution.
            class_labels: per picture (segments,), class ids.

        Returns:
            For each prediction `loss_mask`, `loss_dice` and `loss_cross_entropy`, scalars, times
            the config's weights.

        Raises:
            ValueError: the labels do not fit each other, the batch or the model's classes.
            ImportError: SciPy is not installed.
        """
        batch, queries = predictions[0].class_queries_logits.shape[:2]
        device = predictions[0].class_queries_logits.device
        check_shapes(mask_labels, class_labels, batch)
        with torch.autocast(device.type, enabled=False):
            segments = Labels(
                joined(mask_labels, device, torch.float32),
                joined(class_labels, device, torch.long),
                [len(classes) for classes in class_labels],
            )
            points = [self.draw_points(segments.counts, queries, device) for _ in predictions]
            costs = [
                self.costs(prediction, segments, drawn.matching)
                for prediction, drawn in zip(predictions, points, strict=True)
            ]
            classes = segments.classes.to("cpu", non_blocking=True)
            all_costs = torch.stack(costs).cpu()  # waits for the device, also for the classes
            check_classes(classes.split(segments.counts), self.config.num_labels)
            pairs = match(all_costs, segments.counts).to(device, non_blocking=True)
            num_pairs = mean_num_pairs(pairs.shape[2], device)
            return [
                self.losses(prediction, segments, own_pairs, drawn, num_pairs)
                for prediction, own_pairs, drawn in zip(predictions, pairs, points, strict=True)
            ]

    def draw_points(self, counts: Sequence[int], queries: int, device: torch.device) -> Points:
        """Draws the points of one prediction: `counts` segments in the pictures, and queries."""
        count = self.config.train_num_points
        num_candidates = int(count * self.config.oversample_ratio)
        num_uniform = count - int(count * self.config.importance_sample_ratio)
        pairs = sum(min(queries, segments) for segments in counts)
        return Points(
            [torch.rand(1, count, 2, device=device) for _ in counts],
            torch.rand(pairs, num_candidates, 2, device=device),
            torch.rand(pairs, num_uniform, 2, device=device),
        )

    @torch.no_grad()
    def costs(self, prediction: Prediction, segments: Labels, points: Sequence[Tensor]) -> Tensor:
        """What pairing a query with a segment of the same picture costs.

        Args:
            prediction: of all pictures.
            segments: likewise.
            points: per picture (1, points, 2).

        Returns:
            (queries, segments), finite.
        """
        # a class that does not exist is an error, but of the host: a device would not recover
        classes = segments.classes.clamp(0, self.config.num_labels)
        costs = []
        for mask_logits, class_logits, masks, own_classes, own_points in zip(
            *prediction,
            segments.masks.split(segments.counts),
            classes.split(segments.counts),
            points,
            strict=True,
        ):
            logits = sample(mask_logits[None].float(), own_points)[0]  # (queries, points)
            labels = sample(masks[None], own_points)[0]  # (segments, points)

            # (queries, segments), like all that follow
            inside, outside = F.softplus(-logits) @ labels.T, F.softplus(logits) @ (1 - labels).T
            probabilities = logits.sigmoid()
            dice = dice_distance(
                probabilities @ labels.T, probabilities.sum(dim=1)[:, None], labels.sum(dim=1)
            )
            costs.append(
                self.config.mask_weight * (inside + outside) / self.config.train_num_points
                + self.config.dice_weight * dice
                - self.config.class_weight * class_logits.float().softmax(dim=1)[:, own_classes]
            )
        # gradient scaling skips a step that overflowed: matching must not fail in it
        worst = torch.finfo(torch.float32).max
        return torch.cat(costs, dim=1).nan_to_num(nan=worst, posinf=worst, neginf=worst)

    def losses(
        self,
        prediction: Prediction,
        segments: Labels,
        pairs: Tensor,
        points: Points,
        num_pairs: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of one prediction; `pairs` as `match` returns them for it."""
        queries, own = pairs
        mask_loss, dice_loss = self.mask_losses(
            # (pairs, 1, height, width)
            prediction.masks_queries_logits.flatten(0, 1)[queries, None].float(),
            segments.masks[own, None],
            points,
        )
        class_logits = prediction.class_queries_logits.float()
        # cross entropy of all queries; those without a segment are "no object"
        targets = torch.full_like(class_logits[..., 0], self.config.num_labels, dtype=torch.long)
        targets.view(-1)[queries] = segments.classes[own]
        class_loss = F.cross_entropy(class_logits.mT, targets, weight=self.empty_weight.float())
        return {
            "loss_mask": self.config.mask_weight * mask_loss / num_pairs,
            "loss_dice": self.config.dice_weight * dice_loss / num_pairs,
            "loss_cross_entropy": self.config.class_weight * class_loss,
        }

    def mask_losses(
        self, predicted: Tensor, targets: Tensor, points: Points
    ) -> tuple[Tensor, Tensor]:
        """Binary cross entropy and dice loss at points of masks, each summed over the pairs."""
        where = self.uncertain_points(predicted, points)
        # (pairs, points)
        logits, labels = sample(predicted, where)[:, 0], sample(targets, where)[:, 0]
        cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        probabilities = logits.sigmoid()
        dice = dice_distance(
            (probabilities * labels).sum(dim=1), probabilities.sum(dim=1), labels.sum(dim=1)
        )
        return cross_entropy.mean(dim=1).sum(), dice.sum()

    @torch.no_grad()
    def uncertain_points(self, masks: Tensor, points: Points) -> Tensor:
        """Points, most of them where a mask is undecided (PointRend, arXiv 1912.08193).

        Args:
            masks: (pairs, 1, H', W') logits.
            points: drawn for them.

        Returns:
            (pairs, points, 2), x and y in [0, 1]. The share `importance_sample_ratio` of the points
            has the logits nearest to 0 among `oversample_ratio` times as many candidates as there
            are points; the others are uniform.
        """
        num_uncertain = self.config.train_num_points - points.uniform.shape[1]
        uncertainty = -sample(masks, points.candidates)[:, 0].abs()  # (pairs, candidates)
        chosen = uncertainty.topk(num_uncertain, dim=1).indices
        uncertain = points.candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        return torch.cat((uncertain, points.uniform), dim=1)


def joined(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Tensors one after another, on a device; those in pinned memory do not make the host wait."""
    # moved as they are: converted first, they would not be in pinned memory
    return torch.cat([tensor.to(device, non_blocking=True).to(dtype) for tensor in tensors])


def match(costs: Tensor, counts: Sequence[int]) -> Tensor:
    """Pairs each picture's queries and segments, one to one, at the lowest total cost.

    Args:
        costs: (predictions, queries, segments), on the CPU, finite; the segments are those of all
            pictures, one picture after another.
        counts: the number of segments of each picture.

    Returns:
        (predictions, 2, pairs): the pairs of all pictures, min(queries, segments) of each. A pair
        is the index of a query, among those of all pictures, and of its segment, likewise.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "the training loss needs SciPy; to install it: pip install 'eomt-convert[train]'"
        ) from error

    pairs, first_query, first_segment = [], 0, 0
    for own in costs.split(list(counts), dim=2):  # of one picture
        found = np.array([linear_sum_assignment(cost) for cost in own.numpy()])
        pairs.append(found + np.array([[first_query], [first_segment]]))
        first_query += own.shape[1]
        first_segment += own.shape[2]
    return torch.from_numpy(np.concatenate(pairs, axis=2))


def sample(masks: Tensor, points: Tensor) -> Tensor:
    """Reads masks between their pixels, bilinearly, with zeros outside them.

    Args:
        masks: (batch, channels, height, width).
        points: (batch, points, 2), x and y in [0, 1] from the outer edge of the first pixel to
            that of the last.

    Returns:
        (batch, channels, points).
    """
    grid = 2 * points[:, :, None] - 1  # grid_sample counts from -1
    return F.grid_sample(masks, grid, align_corners=False).squeeze(3)


def dice_distance(overlap: Tensor, predicted: Tensor, target: Tensor) -> Tensor:
    """1 - Dice coefficient; 1 is added above and below, as in Mask2Former, for empty masks.

    Args:
        overlap: area where the masks overlap, a sum over points, like the others.
        predicted: area of the predicted mask.
        target: area of the segment.
    """
    return 1 - (2 * overlap + 1) / (predicted + target + 1)


def mean_num_pairs(pairs: int, device: torch.device) -> Tensor:
    """Number of pairs in a batch, at least 1; in distributed training, the mean of the processes.

    As in github.com/tue-mps/eomt training/mask_classification_loss.py. transformers 5.23 counts
    segments instead (a picture may have more segments than there are queries), and leaves
    distributed training to accelerate.
    """
    count = torch.full((), float(pairs), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1)


def check_shapes(mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], batch: int) -> None:
    """Checks that labels fit each other and a batch.

    Raises:
        ValueError: they do not.
    """
    if not len(mask_labels) == len(class_labels) == batch:
        raise ValueError(
            f"mask_labels are for {len(mask_labels)} pictures and class_labels for "
            f"{len(class_labels)}; expected both for the {batch} of pixel_values"
        )
    size = mask_labels[0].shape[1:]
    for index, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if masks.ndim != 3 or masks.shape[1:] != size or classes.shape != masks.shape[:1]:
            raise ValueError(
                f"mask_labels[{index}] has the shape {tuple(masks.shape)} and "
                f"class_labels[{index}] {tuple(classes.shape)}; expected (segments, height, "
                "width), with the same height and width for every picture, and (segments,)"
            )


def check_classes(class_labels: Sequence[Tensor], num_labels: int) -> None:
    """Checks that the model has the classes of labels on the CPU.

    Raises:
        ValueError: it does not.
    """
    for index, classes in enumerate(class_labels):
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(
                f"class_labels[{index}] goes from {classes.min()} to {classes.max()}; "
                f"expected class ids from 0 to {num_labels - 1}"
            )
