"""Outputs of a model that is compiled or computed in 16 bits, compared with recorded ones.

The model as it is, in float32, is compared before. So if it is wrong here, the fault lies in the
computation and not in the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from converter.checks.comparison import Tolerance, compare, computed_tolerance
from converter.checks.computation import Computation
from converter.checks.diagnosis.overflow import find_overflow
from converter.checks.numbers import (
    LOGITS,
    Numbers,
    first_difference,
    judge_as_reference,
    judge_outputs,
    run,
)
from converter.checks.pixels import Normalisation
from converter.checks.recorded import Recorded
from converter.checks.verdict import Cause, FirstDifference
from converter.models import compiler_errors
from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

# of the level in float32
_FIGURES = ("tolerance", "relative_tolerance", "max_abs")


@dataclass(frozen=True)
class Computed:
    """The numbers of a computation.

    Attributes:
        computation: how the model was computed.
        model: the model that computes in this way.
        numbers: its numbers; those of layers are only known in float32.
        tolerance: how far its outputs may be off.
        rounded: whether they are compared with those of the same weights in float32.
        difference: where it first differs from float32, if it fails and that was found.
        cause: why it fails.
    """

    computation: Computation
    model: EomtDinov3ForUniversalSegmentation
    numbers: Numbers
    tolerance: Tolerance
    rounded: bool
    difference: FirstDifference | None = None
    cause: Cause | None = None


def check_computed(
    computation: Computation,
    model: EomtDinov3ForUniversalSegmentation,
    in_float32: Numbers,
    normalisation: Normalisation,
    recorded: Recorded,
    *,
    rounded: bool,
) -> Computed:
    """Computes a model that is right in float32 in another way, and compares its logits.

    Those of weights that were rounded are compared with the same weights in float32: the recording
    is further from them than a fault of the computation may be.

    Args:
        computation: how to compute it.
        model: with its own weights, in float32, not compiled.
        in_float32: its numbers, which passed; their outputs are those of these weights.
        normalisation: of its preprocessor_config.json.
        recorded: the recording to compare it with.
        rounded: whether its weights were rounded after the recording.

    Raises:
        EomtConvertError: the model cannot be compiled.
    """
    tolerance = computed_tolerance(computation.dtype, recorded.origin.computed_in)
    inputs = normalisation(recorded.pixels)
    computed = computation.applied_to(model)
    with compiler_errors():
        outputs = _in_float32(run(computed, inputs, layers=False))
    logits = {name: outputs[name] for name in LOGITS}
    expected = recorded
    if rounded:
        own = {name: in_float32.outputs[name] for name in LOGITS}
        expected = replace(recorded, tensors={**recorded.tensors, **own})
    if computation.dtype == "float32":
        numbers = judge_as_reference(logits, expected, tolerance, model, inputs)
    else:
        numbers = judge_outputs(logits, expected, tolerance)
    figures = {
        **in_float32.level.figures,
        **numbers.level.figures,
        **computation.figures,
        "beside": "float32" if rounded else "recording",
        "in_float32": {key: in_float32.level.figures[key] for key in _FIGURES},
    }
    found = Computed(computation, computed, numbers, tolerance, rounded)
    if numbers.level.status == "failed":
        reason = f"The model is right in float32, but not {computation}: {numbers.level.reason}"
        found = _blamed(found, model, in_float32, inputs)
    else:
        reason = _remark(found, in_float32, expected)
    level = replace(numbers.level, reason=reason, figures=figures)
    return replace(found, numbers=replace(numbers, level=level))


def _in_float32(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in outputs.items()}


def _remark(found: Computed, in_float32: Numbers, expected: Recorded) -> str:
    """What a computation costs, and what was compared in float32 only."""
    moved = []
    for name in LOGITS:
        values = expected.tensors[name].double()
        size = float(values.max() - values.min()) or 1.0  # all values may be the same
        moved.append(found.numbers.compared[name].max_abs / size)
    against = "the same weights in float32" if found.rounded else "the recording"
    kinds = {
        "layers": ("patch_embeddings", "hidden_states.", "last_hidden_state"),
        "masked attention": ("masked.",),
        "the backbone alone": ("backbone.",),
    }
    compared = tuple(in_float32.compared)
    left = [kind for kind, names in kinds.items() if any(n.startswith(names) for n in compared)]
    only = f" These were compared in float32 only: {', '.join(left)}." if left else ""
    return (
        f"The figures are for the model {found.computation}, compared with {against}: logits move "
        f"by up to {100 * max(moved):.2g}% of their range. Before, it passed in float32 and not "
        f"compiled, with a largest difference of {in_float32.level.figures['max_abs']:.2g}.{only} "
        f"{in_float32.level.reason}"
    ).strip()


def _blamed(
    found: Computed,
    model: EomtDinov3ForUniversalSegmentation,
    in_float32: Numbers,
    inputs: Tensor,
) -> Computed:
    """Says where a computation begins to differ, and why."""
    how = found.computation
    overflow = find_overflow(model, inputs) if how.dtype == "float16" else None
    with compiler_errors():
        outputs = _in_float32(run(found.model, inputs))
    difference = place_difference(outputs, in_float32.outputs, found.tolerance, model.config)
    all_outputs = (*found.numbers.outputs.values(), *outputs.values())
    if overflow and not all(bool(tensor.isfinite().all()) for tensor in all_outputs):
        explanation = f"{overflow}; bfloat16 has the range of float32"
        return replace(
            found, difference=difference, cause=Cause("activation-overflow", (), None, explanation)
        )
    explanation = f"the model is right in float32 without compiling, and wrong when {how}"
    if difference is None:
        explanation += "; it is right again if every layer's output is returned, too"
    cause = Cause("computation", (), None, explanation)
    return replace(found, difference=difference, cause=cause)


def place_difference(
    computed: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: Tolerance,
    config: EomtDinov3Config,
) -> FirstDifference | None:
    """The first place where two computations of the same weights differ; None if they agree.

    Args:
        computed: outputs by the names of recorded tensors, in the network's order, with those of
            layers where they are known.
        expected: the same, as the reference model computes them in float32.
        tolerance: how far apart they may be.
        config: the model's configuration.
    """
    compared = {
        name: compare(name, ours, expected[name], tolerance)
        for name, ours in computed.items()
        if name in expected
    }
    return first_difference(compared, config)
