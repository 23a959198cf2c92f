"""Runs the reference model on a recorded input and compares the outputs with the recorded ones."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from converter.checks.comparison import (
    FLOAT32,
    Comparison,
    Tolerance,
    agreement,
    compare,
    disagreement,
    largest_difference,
)
from converter.checks.diagnosis.stages import first_block, named_outputs
from converter.checks.pixels import Normalisation
from converter.checks.provenance import Provenance
from converter.checks.recorded import Recorded
from converter.checks.verdict import FirstDifference, Level, Status
from reference_model import Dinov3Backbone, EomtDinov3Config, EomtDinov3ForUniversalSegmentation

if TYPE_CHECKING:
    from converter.models import Network

# a model's outputs, in this order
LOGITS = ("mask_logits", "class_logits")

# the output of the bare backbone, without the delta
_BARE = "backbone.last_hidden_state"

# A difference of up to this many tolerances may be caused by rounding alone, in a network that
# magnifies rounding errors.
_NEAR_TOLERANCES = 10.0

# The recording was made in float32 too, so it may be off by this many times the float32 error
# measured in this network, up to this many tolerances.
_RECORDING_ERRORS = 2.0
_MAX_WIDENING = 5.0


@dataclass(frozen=True)
class Numbers:
    """The result of running a model on a recorded input.

    Attributes:
        level: the level's line in the verdict.
        compared: the comparison of each recorded tensor with the model's, in the network's order.
        outputs: the model's outputs, by the names of recorded tensors.
    """

    level: Level
    compared: Mapping[str, Comparison]
    outputs: Mapping[str, Tensor]

    @property
    def comparable(self) -> bool:
        """Whether all tensors have the shapes that were recorded."""
        return bool(self.compared) and all(c.same_shape for c in self.compared.values())


def check_numbers(
    model: EomtDinov3ForUniversalSegmentation,
    normalisation: Normalisation,
    recorded: Recorded,
    tolerance: Tolerance,
    backbone: Dinov3Backbone | None,
) -> Numbers:
    """Runs a model on the recorded pixels, and again with masked attention if that was recorded.

    Args:
        model: on the device where it is to run.
        normalisation: from its preprocessor_config.json.
        recorded: the recording to compare it with.
        tolerance: how far apart they may be.
        backbone: the bare backbone, if available, on the same device.
    """
    if recorded.pixels.shape[1] != model.config.num_channels:
        return _no_numbers(f"it has {recorded.pixels.shape[1]} channels")
    inputs = normalisation(recorded.pixels)
    theirs = _comparable(recorded, bare=backbone is not None)
    modules = [model, *([backbone] if backbone else [])]
    try:
        found = compare_outputs(
            lambda: compute_outputs(model, inputs, recorded, backbone), modules, theirs, tolerance
        )
    except ValueError as error:
        return _no_numbers(str(error))
    return _judge(found, recorded, tolerance)


def judge_outputs(
    outputs: Mapping[str, Tensor],
    recorded: Recorded,
    tolerance: Tolerance,
    widened: Mapping[str, float] | None = None,
) -> Numbers:
    """Compares outputs with recorded ones, whatever program computed them.

    Args:
        outputs: ``mask_logits``, ``class_logits`` and any others that a recording may have, by the
            names of recorded tensors, on the CPU; only these are compared.
        recorded: the recording to compare them with.
        tolerance: how far apart they may be.
        widened: factors of the tolerance by tensor name; 1 by default.
    """
    theirs = {
        name: tensor for name, tensor in _comparable(recorded, bare=True).items() if name in outputs
    }
    compared = compare_all(outputs, theirs, tolerance, widened)
    return _judge(Compared(dict(outputs), compared, widened or {}), recorded, tolerance)


def judge_as_reference(
    outputs: Mapping[str, Tensor],
    recorded: Recorded,
    tolerance: Tolerance,
    model: EomtDinov3ForUniversalSegmentation,
    inputs: Tensor,
) -> Numbers:
    """Compares float32 outputs like `judge_outputs`, and allows for rounding errors if they fail.

    Some networks magnify the rounding errors of float32, by an amount that depends on the machine.
    What they do to the reference model with the same weights is allowed for.

    Args:
        outputs: as in `judge_outputs`.
        recorded: the recording to compare them with.
        tolerance: how far apart they may be.
        model: the reference model with the weights that the outputs were computed with, in float32.
        inputs: what they were computed from: (batch, channels, height, width), normalised.
    """
    numbers = judge_outputs(outputs, recorded, tolerance)
    if numbers.level.status != "failed" or not numbers.comparable:
        return numbers
    theirs = {name: recorded.tensors[name] for name in numbers.compared}
    layers = not set(theirs) <= {*LOGITS, "last_hidden_state"}
    wider = widening(lambda: run(model, inputs, layers=layers), [model], theirs, tolerance)
    return judge_outputs(outputs, recorded, tolerance, wider)


def judge_again(numbers: Numbers, recorded: Recorded, tolerance: Tolerance) -> Numbers:
    """Compares the same outputs with the same recording again, with another tolerance."""
    theirs = {name: recorded.tensors[name] for name in numbers.compared}
    compared = compare_all(numbers.outputs, theirs, tolerance)
    return _judge(Compared(dict(numbers.outputs), compared), recorded, tolerance)


def compute_outputs(
    model: EomtDinov3ForUniversalSegmentation,
    inputs: Tensor,
    recorded: Recorded,
    backbone: Dinov3Backbone | None = None,
) -> dict[str, Tensor]:
    """Computes every output that a recording has, by the names of recorded tensors, on the CPU.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.
        recorded: the recording; its masks, if any, are the ones that mask each block's attention.
        backbone: the bare backbone, on the same device; None to leave its output out.

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """
    outputs = run(model, inputs)
    outputs |= _masked_as_recorded(model, inputs, recorded, outputs["mask_logits"].shape)
    bare = recorded.tensors.get(_BARE)
    if backbone and bare is not None:
        with torch.inference_mode():
            outputs[_BARE] = backbone(inputs[: len(bare)].to(model.device)).cpu()
    return outputs


def _judge(found: "Compared", recorded: Recorded, tolerance: Tolerance) -> Numbers:
    agreed = agreement(found.outputs, recorded.tensors)
    # a wrong shape says more than a wrong number, so it is reported first
    by_shape = sorted(found.compared.values(), key=lambda comparison: comparison.same_shape)
    failures = [comparison.failure for comparison in by_shape if comparison.failure]
    failures += disagreement(agreed, recorded.tensors["class_logits"][..., 0].numel(), tolerance)
    figures = {
        "recorded_sha256": recorded.sha256,
        "tolerance": tolerance.absolute,
        "relative_tolerance": tolerance.relative,
        "widened": dict(found.widened),
        "max_abs": largest_difference(found.compared),
        **agreed,
        "compared": {name: comparison.to_dict() for name, comparison in found.compared.items()},
    }
    status: Status = "failed" if failures else "passed"
    level = Level("numbers", status, failures[0] if failures else found.note, figures)
    return Numbers(level, found.compared, found.outputs)


def _comparable(recorded: Recorded, *, bare: bool) -> dict[str, Tensor]:
    """The recorded tensors that a model is compared with.

    Args:
        recorded: the recording.
        bare: whether to include the output of the bare backbone.
    """
    blocks = range(len(_masks(recorded)))
    names = {
        *("patch_embeddings", "last_hidden_state", *LOGITS),
        *(name for name in recorded.tensors if re.fullmatch(r"hidden_states\.\d+", name)),
        *(f"masked.{kind}.{block}" for kind in LOGITS for block in blocks),
        *([_BARE] if bare else []),
    }
    return {name: tensor for name, tensor in recorded.tensors.items() if name in names}


def _masks(recorded: Recorded) -> list[Tensor]:
    """Recorded mask logits before every block and at the end; empty if there are none."""
    masks = recorded.numbered("masked.mask_logits")
    return masks if len(masks) == len(recorded.numbered("masked.class_logits")) else []


def _no_numbers(reason: str) -> Numbers:
    reason = f"The model cannot run on the recorded input: {reason}."
    return Numbers(Level("numbers", "failed", reason.replace("..", ".")), {}, {})


@dataclass(frozen=True)
class Compared:
    """Outputs and how they compare with recorded ones.

    Attributes:
        outputs: in float32.
        compared: the comparison of each recorded tensor with the computed one, in the network's
            order.
        widened: factor of the tolerance by tensor name, only where it is larger than 1.
        note: a sentence that says how the outputs were computed, if not in float32.
    """

    outputs: dict[str, Tensor]
    compared: dict[str, Comparison]
    widened: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def compare_outputs(
    compute: Callable[[], dict[str, Tensor]],
    modules: Sequence[nn.Module],
    recorded: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> Compared:
    """Computes outputs in float32 and compares them; also in float64 if they nearly agree.

    Some networks magnify the rounding errors of float32 beyond any fixed tolerance, by an amount
    that depends on the machine. So if the float32 outputs nearly agree, float64 outputs, which are
    the same on every machine, are compared instead. The recording was made in float32, so it may
    have an error as large as the one measured here, within limits.

    Args:
        compute: runs the modules in their current dtype.
        modules: in float32.
        recorded: the recorded tensors; all of them are compared.
        tolerance: how far apart they may be.

    Raises:
        ValueError: height or width of the input is not a multiple of the patch size.
    """
    outputs = compute()
    found = Compared(outputs, compare_all(outputs, recorded, tolerance))
    failed = {name: c.max_abs for name, c in found.compared.items() if c.failure}
    near = all(
        largest <= _NEAR_TOLERANCES * tolerance.of(recorded[n]) for n, largest in failed.items()
    )
    if not failed or not near or tolerance.relative > FLOAT32.relative or not _has_float64(modules):
        return found
    try:
        exact = _in_float64(compute, modules)
    except torch.cuda.OutOfMemoryError:
        return found
    errors = _errors(outputs, exact, recorded, tolerance)
    factors = {n: min(max(1.0, _RECORDING_ERRORS * e), _MAX_WIDENING) for n, e in errors.items()}
    compared = compare_all(exact, recorded, tolerance, factors)
    if any(comparison.failure for comparison in compared.values()):
        return found
    note = (
        "Computed in float64: float32 alone moves outputs of this network by up to "
        f"{max(errors.values()):.2g} of the tolerance."
    )
    return Compared(outputs, compared, {n: f for n, f in factors.items() if f > 1}, note)


def widening(
    compute: Callable[[], dict[str, Tensor]],
    modules: Sequence[nn.Module],
    recorded: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> dict[str, float]:
    """By how much the tolerance must be widened for float32 outputs that are computed otherwise.

    Neither they nor the recording can be computed in float64, so both may have an error as large as
    the one measured in this network.

    Args:
        compute: runs the modules in their current dtype.
        modules: in float32.
        recorded: the recorded tensors.
        tolerance: how far apart they may be.

    Returns:
        Factors above 1, by tensor name.
    """
    if not _has_float64(modules):
        return {}
    outputs = compute()
    try:
        exact = _in_float64(compute, modules)
    except torch.cuda.OutOfMemoryError:
        return {}
    errors = _errors(outputs, exact, recorded, tolerance)
    factors = {n: min(2 * _RECORDING_ERRORS * e, _MAX_WIDENING) for n, e in errors.items()}
    return {name: factor for name, factor in factors.items() if factor > 1}


def _errors(
    outputs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> dict[str, float]:
    """How far float32 outputs are from exact ones, in tolerances, by tensor name."""
    return {
        name: float(
            (outputs[name][: len(theirs)].double() - exact[name][: len(theirs)]).abs().max()
        )
        / tolerance.of(theirs)
        for name, theirs in recorded.items()
    }


def _has_float64(modules: Sequence[nn.Module]) -> bool:
    """Whether the device supports float64; Apple's GPUs do not."""
    return all(p.device.type != "mps" for module in modules for p in module.parameters())


def _in_float64(
    compute: Callable[[], dict[str, Tensor]], modules: Sequence[nn.Module]
) -> dict[str, Tensor]:
    for module in modules:
        module.double()
    try:
        return compute()
    finally:
        for module in modules:
            module.float()


def compare_all(
    outputs: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor],
    tolerance: Tolerance,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Comparison]:
    """Compares every recorded tensor with the computed one, in the network's order.

    Args:
        outputs: what was computed.
        recorded: what was recorded.
        tolerance: how far apart they may be.
        factors: factor of the tolerance, by tensor name; 1 by default.
    """
    names = [name for name in outputs if name in recorded]
    # a recording may have more layers than the model: that is a difference too
    names += [name for name in recorded if name not in names]
    return {
        name: compare(
            name,
            _recorded_part(name, outputs.get(name, torch.empty(0)), recorded[name]),
            recorded[name],
            tolerance.widened((factors or {}).get(name, 1.0)),
        )
        for name in names
    }


def _recorded_part(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """The part of an output that was recorded: hidden states, for the first pictures only."""
    return ours[: len(theirs)] if ours.ndim and name not in LOGITS else ours


def run(model: "Network", inputs: Tensor, *, layers: bool = True) -> dict[str, Tensor]:
    """A model's outputs by the names of recorded tensors, on the CPU.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.
        layers: whether to return every layer's output, too.

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """
    inputs = inputs.to(model.device)
    with torch.inference_mode():
        # without the argument, as its users call it: a compiled network is another one with it
        output = model(inputs, output_hidden_states=True) if layers else model(inputs)
    return {name: tensor.cpu() for name, tensor in named_outputs(output).items()}


def _masked_as_recorded(
    model: EomtDinov3ForUniversalSegmentation,
    inputs: Tensor,
    recorded: Recorded,
    shape: torch.Size,
) -> dict[str, Tensor]:
    """Every block's predictions with masked attention on, if those were recorded.

    The edge of a mask is where a logit is 0, and there rounding decides: two correct computations
    can differ by hundreds of tolerances two blocks later. So each block is masked by the recorded
    logits, and the model's own logits are compared with them. Resizing the masks averages four
    recorded logits, which torch adds up in the same order on every CPU.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.
        recorded: the recording to compare it with.
        shape: shape of the model's mask logits.
    """
    masks = _masks(recorded)
    if not masks:
        return {}
    fit = len(masks) == model.config.num_blocks + 1 and all(m.shape == shape for m in masks)
    # masks of a wrong shape are not used: the comparison then fails and names the shapes
    return masked_predictions(model, inputs, masks[:-1] if fit else None)


def masked_predictions(
    model: EomtDinov3ForUniversalSegmentation,
    inputs: Tensor,
    masks: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every block's predictions with masked attention on, by the names of recorded tensors.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.
        masks: mask logits (batch, queries, height, width) for each block, used to mask its
            attention; by default the model's own.
    """
    if masks is not None:
        masks = [mask.float().to(model.device) for mask in masks]
    off, model.attn_mask_probs = model.attn_mask_probs, torch.ones_like(model.attn_mask_probs)
    with torch.inference_mode():
        blocks = model(
            inputs.to(model.device), output_block_logits=True, block_mask_logits=masks
        ).block_logits
    model.attn_mask_probs = off
    return {
        f"masked.{kind}.{block}": logits.cpu()
        for block, prediction in enumerate(blocks or ())
        for kind, logits in zip(LOGITS, prediction, strict=True)
    }


def first_difference(
    compared: Mapping[str, Comparison], config: EomtDinov3Config | None
) -> FirstDifference | None:
    """The first place in the network where a model differs from the recording.

    Args:
        compared: its outputs, in the network's order.
        config: of the model; only needed if outputs with masked attention are among them.

    Returns:
        None if nothing differs, or only logits do and what they are computed from is unknown.
    """
    for name, comparison in compared.items():
        if comparison.failure:
            if name in LOGITS and "last_hidden_state" not in compared:
                return None
            max_abs = comparison.to_dict()["max_abs"]
            return FirstDifference(_layer_of(name, config), name, max_abs)
    return None


def _layer_of(name: str, config: EomtDinov3Config | None) -> str:
    """The part of the network that computes a recorded tensor."""
    kind, _, number = name.rpartition(".")
    if kind == "hidden_states":
        return f"layers.{number}"
    if (
        kind.startswith("masked.") and config
    ):  # computed from the output of the layer before this block
        return f"layers.{first_block(config) + int(number) - 1}"
    return {
        "patch_embeddings": "embeddings",
        "last_hidden_state": "layernorm",
        "class_logits": "class_predictor",
        "mask_logits": "mask_head",
        _BARE: "backbone",
        "rope": "rope_embeddings",
    }[name]


def bare_backbone(provenance: Provenance) -> Dinov3Backbone:
    """The backbone that a model's delta was added to, without the delta."""
    state = {}
    for row in provenance.plan.rows:
        values = provenance.operand(row.name, "backbone")
        if values is not None:
            state[row.name] = torch.from_numpy(values)
    with torch.device("meta"):
        backbone = Dinov3Backbone(provenance.plan.config)
    backbone.load_state_dict(state, assign=True)
    return backbone.eval()
