"""The verdict on a delta: what a conversion of it gives, beside the model that it was made of."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from converter.checks.verdict import ROUND_TRIP, Level, Verdict
from converter.weights.sums import TensorChange

if TYPE_CHECKING:
    from torch import Tensor

    from converter.checks.pixels import Normalisation
    from reference_model import EomtDinov3Config

# patches along each side of the pictures for a model whose image size is not known
_PATCHES = 16

# what the outputs were compared with, as the figures of the level have it
_RESTS_ON = {"basis": "reference", "recorded_by": ROUND_TRIP, "known_recording": False}


def verdict_on_round_trip(changes: Mapping[str, TensorChange], numbers: Level) -> Verdict:
    """The verdict on a delta.

    Args:
        changes: how each tensor differs from the model's.
        numbers: how the outputs do.
    """
    return Verdict((_check_arithmetic(changes), numbers))


def _check_arithmetic(changes: Mapping[str, TensorChange]) -> Level:
    inexact = {name: change for name, change in changes.items() if change.inexact}
    figures = {
        "tensors": len(changes) - len(inexact),
        "against": "the model",
        "different": list(inexact),
    }
    # what is copied has to come back; a sum may be as far off as the delta's last place
    wrong = [
        name
        for name, change in inexact.items()
        if change.mean_change is None or not change.max_ulps <= 1
    ]
    if wrong:
        reason = f"{wrong[0]} does not come back: the sum with the backbone is another tensor."
        return Level("arithmetic", "failed", reason, figures)
    return Level("arithmetic", "passed", inexact_sentence(changes), figures)


def inexact_sentence(changes: Mapping[str, TensorChange]) -> str:
    """Says which elements do not come back bit for bit; empty if all do."""
    inexact = {name: change for name, change in changes.items() if change.inexact}
    if not inexact:
        return ""
    elements = sum(change.elements for change in changes.values())
    count = sum(change.inexact for change in inexact.values())
    largest = max(change.max_abs for change in inexact.values())
    if largest == 0:
        return f"{count:,} of {elements:,} elements come back with the other sign of zero."
    ulps = max(change.max_ulps for change in inexact.values())
    return (
        f"{count:,} of {elements:,} elements, in {len(inexact)} of {len(changes)} tensors, come "
        f"back rounded, off by at most {largest:.2g} or {ulps:.2g} units in the last place of the "
        "delta: no float32 number, added to the backbone, gives them."
    )


def same_numbers() -> Level:
    """The level of the outputs where every tensor has the bits of the model's."""
    from converter.checks.comparison import FLOAT32

    reason = "Every tensor has the bits of the model's, so the outputs are the model's."
    figures = {
        "tolerance": FLOAT32.absolute,
        "relative_tolerance": FLOAT32.relative,
        "max_abs": 0.0,
        **_RESTS_ON,
    }
    return Level("numbers", "passed", reason, figures)


def check_round_trip_numbers(
    config: "EomtDinov3Config",
    normalisation: "Normalisation",
    model: "Callable[[], Mapping[str, Tensor]]",
    came_back: "Callable[[], Mapping[str, Tensor]]",
    image_size: tuple[int, int] | None,
) -> Level:
    """Compares the outputs of a model with those of the model that its delta gives.

    Args:
        config: of both.
        normalisation: of the pixels.
        model: reads the weights of the model, in float32, by canonical name.
        came_back: computes the sums of its delta and the backbone. Only the weights of one of the
            two are held at a time.
        image_size: (height, width) of the random pixels that both get; None if unknown.
    """
    from converter.checks.comparison import FLOAT32
    from converter.checks.diagnosis.stages import Network, Skeleton
    from converter.checks.exported_numbers import computed_by, random_pixels
    from converter.checks.numbers import judge_as_reference, judge_outputs
    from converter.checks.precision import full_float32

    side = _PATCHES * config.patch_size
    pixels = random_pixels((1, config.num_channels, *(image_size or (side, side))))
    skeleton = Skeleton(config)
    with full_float32():
        expected = computed_by(Network(skeleton, model(), normalisation), pixels)
        outputs = Network(skeleton, came_back(), normalisation).run(pixels)
        # in random pixels there is nothing for classes and masks to agree on
        tolerance = replace(FLOAT32, best_class=0.0, mask_iou=0.0)
        found = judge_outputs(outputs, expected, tolerance)
        if found.level.status == "failed":
            original = Network(skeleton, model(), normalisation).build()
            inputs = normalisation(pixels)
            found = judge_as_reference(outputs, expected, tolerance, original, inputs)
    return replace(found.level, figures={**found.level.figures, **_RESTS_ON})
