"""Takes pictures through the image processor, the network and the post-processing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from converter.checks.numbers import LOGITS, run
from reference_model import (
    EomtDinov3ForUniversalSegmentationOutput,
    EomtImageProcessor,
)

if TYPE_CHECKING:
    from converter.models import Network

# Score and overlap thresholds of the recorded panoptic maps: the original's
# (github.com/tue-mps/eomt training/mask_classification_panoptic.py), and lower ones that keep more
# segments.
PANOPTIC_THRESHOLDS = ((0.8, 0.8), (0.3, 0.1))

# number of (query, class) pairs in an instance result, as in the original's evaluation
# (training/mask_classification_instance.py)
TOP_K = 100


@dataclass(frozen=True)
class Prepared:
    """Pictures, prepared as inputs of the network.

    Attributes:
        pixels: (inputs, 3, height, width) uint8, before rescaling and normalisation.
        values: the same after rescaling and normalisation, float32.
        origins: where windows were cut: (inputs, 3) int64 with the picture's index, and the
            window's start and end in pixels along the resized picture's longer side; None without
            windows.
        sizes: (height, width) of every picture.
    """

    pixels: Tensor
    values: Tensor
    origins: Tensor | None
    sizes: tuple[tuple[int, int], ...]

    def named(self) -> dict[str, Tensor]:
        """The inputs by the names of recorded tensors."""
        if self.origins is None:
            return {"pipeline.pixels": self.pixels}
        return {"pipeline.crops": self.pixels, "pipeline.origins": self.origins}


def prepare(processor: EomtImageProcessor, images: Sequence[Image.Image]) -> Prepared:
    """Prepares pictures in RGB as inputs of the network.

    Raises:
        ValueError: the processor cannot prepare these pictures.
    """
    found = processor(images, do_rescale=False, do_normalize=False)
    offsets = found.get("patch_offsets")
    return Prepared(
        found.pixel_values.to(torch.uint8),
        processor(images).pixel_values,
        torch.stack(offsets) if offsets else None,
        tuple((image.height, image.width) for image in images),
    )


def compute_logits(model: "Network", inputs: Prepared) -> dict[str, Tensor]:
    """A model's logits for pictures, by the names of recorded tensors, on the CPU.

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """
    outputs = run(model, inputs.values, layers=False)
    return {f"pipeline.{name}": outputs[name] for name in LOGITS}


def segment(
    processor: EomtImageProcessor,
    task: str,
    logits: Mapping[str, Tensor],
    inputs: Prepared,
    *,
    stuff_classes: Sequence[int] | None = None,
    top_k: int = TOP_K,
) -> dict[str, Tensor]:
    """The results for pictures, by the names of recorded tensors.

    Args:
        processor: its post-processing is run.
        task: panoptic, instance or semantic.
        logits: as `compute_logits` returns them.
        inputs: the inputs that the logits were computed from.
        stuff_classes: ids of the classes whose segments are merged; by default the processor's.
        top_k: how many (query, class) pairs an instance result has.
    """
    masks, classes = (logits[f"pipeline.{name}"] for name in LOGITS)
    offsets = None if inputs.origins is None else list(inputs.origins)
    outputs = EomtDinov3ForUniversalSegmentationOutput(masks, classes, torch.empty(0), offsets)
    results: dict[str, Tensor] = {}
    if task == "panoptic":
        for threshold, overlap in PANOPTIC_THRESHOLDS:
            found = processor.post_process_panoptic_segmentation(
                outputs,
                inputs.sizes,
                threshold=threshold,
                overlap_mask_area_threshold=overlap,
                stuff_classes=stuff_classes,
            )
            for index, result in enumerate(found):
                labels = [segment["label_id"] for segment in result["segments_info"]]
                # the last one is for pixels without a segment, whose id is -1
                classes_by_id = torch.tensor([*labels, classes.shape[-1] - 1])
                ids = result["segmentation"]
                results[f"pipeline.{index}.panoptic@{threshold}"] = torch.stack(
                    (classes_by_id[ids], ids), dim=-1
                )
    elif task == "semantic":
        maps = processor.post_process_semantic_segmentation(outputs, inputs.sizes)
        results |= {f"pipeline.{index}.semantic": found for index, found in enumerate(maps)}
    else:
        found = processor.post_process_instance_segmentation(
            outputs, inputs.sizes, top_k=top_k, return_binary_maps=True
        )
        for index, result in enumerate(found):
            # in the same order as the post-processing
            probabilities = classes[index].float().softmax(-1)[:, :-1]
            ranked = probabilities.flatten().sort(descending=True, stable=True).indices[:top_k]
            instances = {
                "scores": torch.tensor([s["score"] for s in result["segments_info"]]),
                "labels": torch.tensor([s["label_id"] for s in result["segments_info"]]),
                "queries": ranked // probabilities.shape[1],
                "areas": result["binary_maps"].flatten(1).sum(1),
            }
            results |= {f"pipeline.{index}.instance_{k}": v for k, v in instances.items()}
    return results
