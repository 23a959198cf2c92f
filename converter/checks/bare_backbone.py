"""Compares the outputs of the backbone alone, without a delta, with those of Meta's weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from converter.checks.provenance import Provenance
from converter.configs import IMAGE_MEAN, IMAGE_STD
from converter.hub.access import Access
from converter.hub.recorded_picture import recorded_picture
from converter.weights.backbones import find_backbone, size_in
from converter.weights.merge import Files
from converter.weights.pairing import PairCheck
from converter.weights.plan import Plan

if TYPE_CHECKING:
    import torch

# largest difference from the recorded outputs; the test they were taken from allows the same
_OUTPUT_TOLERANCE = 1e-4


def check_outputs(files: Files, plan: Plan, image: Path | None, access: Access) -> PairCheck:
    """Runs the bare backbone and compares its outputs with those recorded from Meta's weights.

    Raises:
        AccessError: the picture was not given and cannot be downloaded.
        UnreadableFileError: the picture cannot be read.
    """
    name = "backbone-outputs"
    known = find_backbone(size_in(plan.config))
    if "backbone" not in files or known is None:
        return PairCheck(name, "not checked", "Nothing is recorded for this backbone.")
    picture = image or recorded_picture(access)
    tokens = _run_backbone(files, plan, picture)
    first_patch = plan.config.num_prefix_tokens
    difference = max(
        abs(value - recorded)
        for values, outputs in (
            (tokens[0, 0, :5], known.outputs.cls),
            (tokens[0, first_patch, :5], known.outputs.patch0),
        )
        for value, recorded in zip(values.tolist(), outputs, strict=True)
    )
    finding = (
        f"The outputs of {known.title} differ from the recorded ones by up to {difference:.2g}"
    )
    if not difference <= _OUTPUT_TOLERANCE:
        return PairCheck(
            name, "failed", f"{finding}: these are other weights than those trained on lvd1689m."
        )
    return PairCheck(name, "passed", f"{finding}.")


def _run_backbone(files: Files, plan: Plan, picture: Path) -> "torch.Tensor":
    """Normalised tokens (1, 1 + registers + patches, hidden) of a picture, in float32."""
    import torch

    from converter.checks.numbers import bare_backbone
    from converter.checks.pixels import read_picture
    from converter.checks.precision import full_float32

    # resized in the same way as for the recorded outputs: on float pixels, antialiased
    resized = torch.nn.functional.interpolate(
        read_picture(picture).float() / 255,
        size=(224, 224),
        mode="bilinear",
        antialias=True,
    )
    channels = (1, -1, 1, 1)
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    model = bare_backbone(Provenance(files, plan))
    with torch.inference_mode(), full_float32():
        tokens: torch.Tensor = model((resized - mean.view(channels)) / std.view(channels))
    return tokens
