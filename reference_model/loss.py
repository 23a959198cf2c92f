"""The training loss: queries are paired with a picture's segments, then compared with them.

It is Mask2Former's (Cheng et al., arXiv 2112.01527, sections 3.3 and 4.1), which EoMT uses too.
Random numbers are drawn in the same order as in transformers: the same seed gives the same loss.
Only the divisor of the mask losses can differ: see `mean_num_pairs`.
"""

from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reference_model.config import EomtDinov3Config

Match = tuple[Tensor, Tensor]  # indices of queries and of the segments they are paired with


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
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of one prediction, always in float32, whatever the logits' dtype and autocast.

        Args:
            masks_queries_logits: (batch, queries, H', W').
            class_queries_logits: (batch, queries, classes + 1).
            mask_labels: per picture (segments, height, width), 1 or True within a segment; they
                cover the same area as the logits, at any resolution.
            class_labels: per picture (segments,), class ids.

        Returns:
            `loss_mask`, `loss_dice` and `loss_cross_entropy`, scalars, times the config's weights.

        Raises:
            ValueError: the labels do not fit each other, the batch or the model's classes.
            ImportError: SciPy is not installed.
        """
        check_labels(mask_labels, class_labels, len(masks_queries_logits), self.config.num_labels)
        with torch.autocast(masks_queries_logits.device.type, enabled=False):
            masks, classes = masks_queries_logits.float(), class_queries_logits.float()
            mask_labels = [labels.to(masks) for labels in mask_labels]
            class_labels = [labels.to(masks.device, torch.long) for labels in class_labels]
            matches = [
                self.match(*picture)
                for picture in zip(masks, classes, mask_labels, class_labels, strict=True)
            ]
            mask_loss, dice_loss = self.mask_losses(masks, mask_labels, matches)
            class_loss = self.class_loss(classes, class_labels, matches)
            num_pairs = mean_num_pairs(matches)
        return {
            "loss_mask": self.config.mask_weight * mask_loss / num_pairs,
            "loss_dice": self.config.dice_weight * dice_loss / num_pairs,
            "loss_cross_entropy": self.config.class_weight * class_loss,
        }

    @torch.no_grad()
    def match(
        self, masks: Tensor, classes: Tensor, mask_labels: Tensor, class_labels: Tensor
    ) -> Match:
        """Pairs one picture's queries and segments, one to one, at the lowest total cost.

        Args:
            masks: (queries, H', W') logits.
            classes: (queries, classes + 1) logits.
            mask_labels: (segments, height, width).
            class_labels: (segments,).

        Returns:
            Indices, each (min(queries, segments),).
        """
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError(
                "the training loss needs SciPy; to install it: pip install 'eomt-convert[train]'"
            ) from error

        points = torch.rand(1, self.config.train_num_points, 2, device=masks.device)
        logits = sample(masks[None], points)[0]  # (queries, points)
        labels = sample(mask_labels[None], points)[0]  # (segments, points)

        # (queries, segments), like all that follow
        inside, outside = F.softplus(-logits) @ labels.T, F.softplus(logits) @ (1 - labels).T
        probabilities = logits.sigmoid()
        dice = dice_distance(
            probabilities @ labels.T, probabilities.sum(dim=1)[:, None], labels.sum(dim=1)
        )
        cost = (
            self.config.mask_weight * (inside + outside) / self.config.train_num_points
            + self.config.dice_weight * dice
            - self.config.class_weight * classes.softmax(dim=1)[:, class_labels]
        )
        # gradient scaling skips a step that overflowed: matching must not fail in it
        worst = torch.finfo(cost.dtype).max
        cost = cost.nan_to_num(nan=worst, posinf=worst, neginf=worst)
        queries, segments = linear_sum_assignment(cost.cpu().numpy())
        return (
            torch.as_tensor(queries, device=masks.device),
            torch.as_tensor(segments, device=masks.device),
        )

    def mask_losses(
        self, masks: Tensor, mask_labels: Sequence[Tensor], matches: Sequence[Match]
    ) -> tuple[Tensor, Tensor]:
        """Binary cross entropy and dice loss at sampled points, each summed over the pairs."""
        # (pairs, 1, height, width)
        predicted = torch.cat([m[queries] for m, (queries, _) in zip(masks, matches, strict=True)])
        targets = torch.cat([m[own] for m, (_, own) in zip(mask_labels, matches, strict=True)])
        predicted, targets = predicted[:, None], targets[:, None]

        points = self.uncertain_points(predicted)
        # (pairs, points)
        logits, labels = sample(predicted, points)[:, 0], sample(targets, points)[:, 0]
        cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        probabilities = logits.sigmoid()
        dice = dice_distance(
            (probabilities * labels).sum(dim=1), probabilities.sum(dim=1), labels.sum(dim=1)
        )
        return cross_entropy.mean(dim=1).sum(), dice.sum()

    @torch.no_grad()
    def uncertain_points(self, masks: Tensor) -> Tensor:
        """Draws points, most of them where a mask is undecided (PointRend, arXiv 1912.08193).

        Args:
            masks: (pairs, 1, H', W') logits.

        Returns:
            (pairs, points, 2), x and y in [0, 1]. The share `importance_sample_ratio` of the points
            has the logits nearest to 0 among `oversample_ratio` times as many candidates as there
            are points; the others are uniform.
        """
        count = self.config.train_num_points
        num_candidates = int(count * self.config.oversample_ratio)
        num_uncertain = int(count * self.config.importance_sample_ratio)

        candidates = torch.rand(len(masks), num_candidates, 2, device=masks.device)
        uncertainty = -sample(masks, candidates)[:, 0].abs()  # (pairs, candidates)
        chosen = uncertainty.topk(num_uncertain, dim=1).indices
        uncertain = candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        uniform = torch.rand(len(masks), count - num_uncertain, 2, device=masks.device)
        return torch.cat((uncertain, uniform), dim=1)

    def class_loss(
        self, classes: Tensor, class_labels: Sequence[Tensor], matches: Sequence[Match]
    ) -> Tensor:
        """Cross entropy of all queries; those without a segment are "no object"."""
        targets = classes.new_full(classes.shape[:2], self.config.num_labels, dtype=torch.long)
        for row, labels, (queries, segments) in zip(targets, class_labels, matches, strict=True):
            row[queries] = labels[segments]
        return F.cross_entropy(classes.mT, targets, weight=self.empty_weight.float())


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


def mean_num_pairs(matches: Sequence[Match]) -> Tensor:
    """Number of pairs in a batch, at least 1; in distributed training, the mean of the processes.

    As in github.com/tue-mps/eomt training/mask_classification_loss.py. transformers 5.23 counts
    segments instead (a picture may have more segments than there are queries), and leaves
    distributed training to accelerate.
    """
    count = torch.tensor(float(sum(len(own) for _, own in matches)), device=matches[0][1].device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1)


def check_labels(
    mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], batch: int, num_labels: int
) -> None:
    """Checks that labels fit a batch and the model.

    Raises:
        ValueError: the labels do not fit each other, the batch or the model's classes.
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
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(
                f"class_labels[{index}] goes from {classes.min()} to {classes.max()}; "
                f"expected class ids from 0 to {num_labels - 1}"
            )
