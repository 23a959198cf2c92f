"""What rounding its weights to 16 bits does to a network, so that no other fault hides behind it.

A network whose weights were rounded is off in every part, by an amount that depends on the network.
Weights that round to the same values are drawn at random: as far as those move a part, rounding may
have moved it, and no further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converter.checks.comparison import ROUNDED, agreement
from converter.checks.numbers import LOGITS, Numbers, check_numbers
from converter.checks.recorded import Recorded
from converter.checks.stages import Network, Stage, cut
from reference_model import Dinov3Backbone, EomtDinov3ForUniversalSegmentation

# How much further than random weights that round to the same values a part may be off; right ones
# were seen to be off by as much as the second (benchmarks/tolerances.py).
EXCESS = 2.0
RIGHT_EXCESS = 1.5

# Of as many draws, the one that moves a part furthest is taken.
_DRAWS = 8


def with_cost_of_rounding(
    of_sums: Numbers, of_rounded: Numbers, recorded: Recorded, dtype: str
) -> Numbers:
    """The numbers of the sums that weights were rounded from, and what rounding adds to them.

    Args:
        of_sums: what decides.
        of_rounded: of the model itself, whose outputs are kept.
        recorded: what both were held against.
        dtype: ``bfloat16`` or ``float16``.
    """
    level = of_sums.level
    agreed = agreement(of_rounded.outputs, recorded.tensors)
    shares = []
    for name in LOGITS:
        values = recorded.tensors[name].double()
        shares.append(of_rounded.compared[name].max_abs / float(values.max() - values.min()))
    figures = {
        **level.figures,
        "rounded_to": dtype,
        "unrounded": True,
        "rounding": {"share_of_range": max(shares), **agreed},
    }
    if level.status == "failed":
        reason = f"{level.reason} That is so before rounding, with the float32 sums."
    else:
        reason = (
            f"{level.reason} The numbers are those of the float32 sums that the weights are "
            f"rounded from. Rounding to {dtype} moves logits by up to {max(shares):.2%} of their "
            f"range: same best class {agreed['best_class']:.1%}, mask IoU "
            f"{agreed['mask_iou']:.3f}, same segment {agreed['same_segment']:.1%}."
        )
    level = replace(level, reason=reason.strip(), figures=figures)
    return replace(of_sums, level=level, outputs=of_rounded.outputs)


def check_rounded(
    model: EomtDinov3ForUniversalSegmentation,
    network: Network,
    recorded: Recorded,
    dtype: str,
    backbone: Dinov3Backbone | None,
) -> Numbers:
    """Holds rounded weights against what was recorded without rounding.

    Outputs may be off by as much as rounding was measured to make them, and every part of the
    network by no more than it makes this part of this network.

    Args:
        model: on the device where it is to run.
        network: the same weights.
        recorded: what to hold them against.
        dtype: ``bfloat16`` or ``float16``.
        backbone: the bare backbone, if it is at hand, on the same device.
    """
    numbers = check_numbers(model, network.normalisation, recorded, ROUNDED[dtype], backbone)
    types = dict.fromkeys(network.weights, dtype)
    excess, failures = {}, {}
    for stage in allowing_for_rounding(cut(recorded, network.config), network, types):
        difference = stage.difference(network)
        if stage.mean_square:
            excess[stage.name] = EXCESS * difference / stage.tolerance
        if difference > stage.tolerance:
            failures[stage.name] = (
                f"{stage.name} is off by {excess[stage.name]:.1f} times as much as rounding to "
                f"{dtype} makes it, more than {EXCESS:g} times."
                if stage.mean_square
                else f"{stage.name} differs by up to {difference:.3g}, which no rounding makes it."
            )
    level = numbers.level
    if failures:
        level = replace(level, status="failed", reason=next(iter(failures.values())))
    elif level.status == "passed":
        part = "each layer" if "hidden_states.0" in numbers.compared else "the outputs"
        reason = (
            f"Weights in {dtype} cannot show a fault that moves {part} by less than {EXCESS:g} "
            "times as much as rounding does, such as a layer norm epsilon of 1e-06 in place of "
            "1e-05. With --delta and --backbone it would show."
        )
        level = replace(level, reason=reason)
    figures = {"rounded_to": dtype, "rounding_excess": max(excess.values(), default=None)}
    compared = {
        name: replace(comparison, failure=failures.get(name, comparison.failure))
        for name, comparison in numbers.compared.items()
    }
    level = replace(level, figures={**level.figures, **figures})
    return replace(numbers, level=level, compared=compared)


def allowing_for_rounding(
    stages: Sequence[Stage], network: Network, types: Mapping[str, str]
) -> tuple[Stage, ...]:
    """The stages with tolerances for weights that were rounded.

    A stage that uses such weights is judged by the root mean square of its difference, which
    scatters less than the largest one.

    Args:
        stages: of the network.
        network: with the rounded weights.
        types: ``bfloat16`` or ``float16``, by the names of the tensors that were rounded.
    """
    return tuple(_allowing(stage, network, types) for stage in stages)


def _allowing(stage: Stage, network: Network, types: Mapping[str, str]) -> Stage:
    generator = torch.Generator().manual_seed(0)
    rounded = [name for name in stage.tensors(network) if name in types]
    output = stage.run(network).double()
    usual = 0.0
    for _ in range(_DRAWS if rounded else 0):
        drawn = {
            name: with_rounding_error(network.weights[name], types[name], generator)
            for name in rounded
        }
        moved = stage.run(network.with_weights(drawn)).double() - output
        usual = max(usual, float(moved.square().mean().sqrt()))
    if EXCESS * usual <= stage.tolerance:  # also where nothing was rounded
        return stage
    return replace(stage, tolerance=EXCESS * usual, right=RIGHT_EXCESS * usual, mean_square=True)


def with_rounding_error(values: Tensor, dtype: str, generator: torch.Generator) -> Tensor:
    """Values as they may have been before they were rounded, drawn from all that round to them.

    Args:
        values: float32, that fit in the type.
        dtype: ``bfloat16`` or ``float16``.
        generator: to draw with.

    Returns:
        float32 values; zeros stay what they are, for they were rarely anything else.
    """
    limits = torch.finfo(getattr(torch, dtype))
    mantissa, exponent = torch.frexp(values)
    step = torch.ldexp(torch.ones_like(values), exponent - 1) * limits.eps
    step.clamp_(min=limits.smallest_normal * limits.eps)  # between numbers below the normal ones
    error = (torch.rand(values.shape, generator=generator) - 0.5) * step
    # towards 0 from a power of 2, the next number is half as far
    error = torch.where((mantissa.abs() == 0.5) & (error * values < 0), error / 2, error)
    return torch.where(values == 0, values, values + error)
