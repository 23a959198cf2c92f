"""Published outputs of the published checkpoints: a few values for one picture.

Data from huggingface/transformers tests/models/eomt_dinov3/test_modeling_eomt_dinov3.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checks.pixels import Normalisation, fit, read_picture
from converter.checks.verdict import Level
from converter.errors import AccessError
from converter.hub.access import Access
from converter.hub.recorded_picture import recorded_picture

if TYPE_CHECKING:
    from reference_model import EomtDinov3ForUniversalSegmentation

# absolute, plus the same share of the recorded value, as in the test that the values are from
TOLERANCE = 1e-3

Corner = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Slices:
    """Corners of a checkpoint's outputs, in float32, on `converter.hub.recorded_picture`.

    The picture was resized and padded to ``side`` by `converter.checks.pixels.fit`.

    Attributes:
        side: side of the square input, in pixels.
        class_logits: logits of the first three queries and classes.
        mask_logits: first three rows and columns of the first query's mask.
    """

    side: int
    class_logits: Corner
    mask_logits: Corner


PUBLISHED: Mapping[str, Slices] = {
    "coco_panoptic_large_640": Slices(
        side=640,
        class_logits=(
            (-0.318, -5.6188, -0.7154),
            (0.0837, -6.8066, -2.1033),
            (-1.4065, -5.9924, -5.466),
        ),
        mask_logits=(
            (-1.6251, -1.1417, -1.0285),
            (2.5673, 5.338, 6.2132),
            (3.7562, 7.1667, 8.1707),
        ),
    ),
    "ade20k_semantic_large_512": Slices(
        side=512,
        class_logits=(
            (-0.8774, -3.2156, -3.5122),
            (-0.8454, -4.5418, -4.2628),
            (2.5385, -4.1147, -3.1046),
        ),
        mask_logits=(
            (-37.6081, -37.5875, -38.8876),
            (-38.285, -51.4408, -51.4456),
            (-42.462, -53.738, -66.6535),
        ),
    ),
    "coco_instance_large_640": Slices(
        side=640,
        class_logits=(
            (-1.3013, -6.0043, -2.2048),
            (1.9109, -2.3819, -3.3945),
            (-0.9235, -4.5945, -0.4908),
        ),
        mask_logits=(
            (-11.2059, -11.1473, -10.5228),
            (-10.6254, -9.2761, -9.8643),
            (-10.3746, -11.5448, -10.9008),
        ),
    ),
}


def check_published(
    model: "EomtDinov3ForUniversalSegmentation",
    normalisation: Normalisation,
    slices: Slices,
    image: Path | None,
    access: Access,
) -> Level:
    """Runs a model on the picture that the published outputs were recorded on.

    Args:
        model: on any device, float32.
        normalisation: from its preprocessor_config.json.
        slices: the published values.
        image: the picture; None to take it from the cache, or download it.
        access: how the Hub is reached.

    Raises:
        UnreadableFileError: the picture cannot be read.
    """
    import torch

    from converter.checks.numbers import run

    try:
        picture = image or recorded_picture(access)
    except AccessError as error:
        return Level("published", "not checked", f"{error.message} {error.remedy}")
    outputs = run(model, normalisation(fit(read_picture(picture), slices.side)))
    compared, failures = {}, []
    for name, corner in (
        ("class_logits", outputs["class_logits"][0, :3, :3]),
        ("mask_logits", outputs["mask_logits"][0, 0, :3, :3]),
    ):
        recorded = torch.tensor(getattr(slices, name))
        difference = (corner - recorded).abs()
        compared[name] = {
            "max_abs": float(difference.max()),
            "mean_abs": float(difference.mean()),
        }
        if not bool((difference <= TOLERANCE + TOLERANCE * recorded.abs()).all()):
            failures.append(
                f"The first {name} differ from the published ones by up to "
                f"{float(difference.max()):.2g}."
            )
    figures = {"tolerance": TOLERANCE, "compared": compared}
    if failures:
        return Level("published", "failed", failures[0], figures)
    return Level("published", "passed", figures=figures)
