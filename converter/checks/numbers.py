"""The reference model run on a recorded input, beside what was recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from converter.checks.comparison import (
    Comparison,
    Tolerance,
    agreement,
    compare,
    largest_difference,
)
from converter.checks.pixels import Normalisation
from converter.checks.provenance import Provenance
from converter.checks.recorded import Recorded
from converter.checks.stages import first_block, named_outputs
from converter.checks.verdict import FirstDifference, Level
from reference_model import Dinov3Backbone, EomtDinov3Config, EomtDinov3ForUniversalSegmentation

# what a model puts out, in this order
LOGITS = ("mask_logits", "class_logits")


@dataclass(frozen=True)
class Numbers:
    """What came of running a model on a recorded input.

    Attributes:
        level: the level's line in the verdict.
        compared: every recorded tensor beside the model's own, in the network's order.
        outputs: what the model put out, by the names of recorded tensors.
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
    """Runs a model on the recorded pixels, and once more where masked attention was recorded.

    Args:
        model: on the device where it is to run.
        normalisation: of its preprocessor_config.json.
        recorded: what to hold it against.
        tolerance: how far apart they may be.
        backbone: the bare backbone, if it is at hand, on the same device.
    """
    inputs = normalisation(recorded.pixels)
    if recorded.pixels.shape[1] != model.config.num_channels:
        return _no_numbers(f"it has {recorded.pixels.shape[1]} channels")
    try:
        outputs = run(model, inputs)
        compared = _compare(outputs, recorded.tensors, tolerance)
    except ValueError as error:
        return _no_numbers(str(error))
    compared |= _compare_masked(model, inputs, recorded, tolerance, outputs["mask_logits"].shape)
    if backbone and (theirs := recorded.tensors.get("backbone.last_hidden_state")) is not None:
        with torch.inference_mode():
            tokens = backbone(inputs[: len(theirs)].to(model.device)).cpu()
        name = "backbone.last_hidden_state"
        compared[name] = compare(name, tokens, theirs, tolerance)
    # another shape says more than another number
    by_shape = sorted(compared.values(), key=lambda comparison: comparison.same_shape)
    failures = [comparison.failure for comparison in by_shape if comparison.failure]
    figures = {
        "recorded_sha256": recorded.sha256,
        "tolerance": tolerance.absolute,
        "relative_tolerance": tolerance.share,
        "max_abs": largest_difference(compared),
        **agreement(outputs, recorded.tensors),
        "compared": {name: comparison.to_dict() for name, comparison in compared.items()},
    }
    if failures:
        return Numbers(Level("numbers", "failed", failures[0], figures), compared, outputs)
    return Numbers(Level("numbers", "passed", figures=figures), compared, outputs)


def _no_numbers(reason: str) -> Numbers:
    reason = f"The recorded input does not suit the model: {reason}."
    return Numbers(Level("numbers", "failed", reason.replace("..", ".")), {}, {})


def run(model: EomtDinov3ForUniversalSegmentation, inputs: Tensor) -> dict[str, Tensor]:
    """A model's outputs by the names of recorded tensors, on the CPU.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """
    with torch.inference_mode():
        output = model(inputs.to(model.device), output_hidden_states=True)
    return {name: tensor.cpu() for name, tensor in named_outputs(output).items()}


def _compare(
    outputs: Mapping[str, Tensor], recorded: Mapping[str, Tensor], tolerance: Tolerance
) -> dict[str, Comparison]:
    names = [name for name in outputs if name in recorded]
    # a recording may have more layers than the model: that is a difference too
    names += [name for name in recorded if name.startswith("hidden_states.") and name not in names]
    return {
        # hidden states may be those of the first pictures only
        name: compare(
            name,
            outputs.get(name, torch.empty(0))[: len(recorded[name])],
            recorded[name],
            tolerance,
        )
        for name in names
    }


def _compare_masked(
    model: EomtDinov3ForUniversalSegmentation,
    inputs: Tensor,
    recorded: Recorded,
    tolerance: Tolerance,
    shape: torch.Size,
) -> dict[str, Comparison]:
    """Compares the predictions of every block with masked attention on.

    A mask ends where a logit is 0, and there rounding decides: two right computations can differ by
    hundreds of tolerances two blocks later. So each block is masked by the recorded logits, and the
    model's own are compared with them. Resizing makes means of four recorded logits, which torch
    adds up in one order whatever the CPU.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.
        recorded: what to hold it against.
        tolerance: how far apart they may be.
        shape: of the model's mask logits.
    """
    masks = recorded.numbered("masked.mask_logits")
    if not masks or len(masks) != len(recorded.numbered("masked.class_logits")):
        return {}
    fit = len(masks) == model.config.num_blocks + 1 and all(m.shape == shape for m in masks)
    # masks that do not fit mask nothing: the comparison fails, and says which shapes differ
    predictions = masked_predictions(model, inputs, masks[:-1] if fit else None)
    compared = {}
    for i in range(len(masks)):
        for kind in LOGITS:
            name = f"masked.{kind}.{i}"
            ours = predictions.get(name, torch.empty(0))
            compared[name] = compare(name, ours, recorded.tensors[name], tolerance)
    return compared


def masked_predictions(
    model: EomtDinov3ForUniversalSegmentation,
    inputs: Tensor,
    masks: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every block's predictions with masked attention on, by the names of recorded tensors.

    Args:
        model: on any device.
        inputs: (batch, channels, height, width), rescaled and normalised.
        masks: for each block the mask logits (batch, queries, height, width) that mask its
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
    compared: Mapping[str, Comparison], config: EomtDinov3Config
) -> FirstDifference | None:
    """Where in the network a model first departs from the recording."""
    for name, comparison in compared.items():
        if comparison.failure:
            max_abs = comparison.to_dict()["max_abs"]
            return FirstDifference(_layer_of(name, config), name, max_abs)
    return None


def _layer_of(name: str, config: EomtDinov3Config) -> str:
    """The part of the network that puts out a recorded tensor."""
    kind, _, number = name.rpartition(".")
    if kind == "hidden_states":
        return f"layers.{number}"
    if kind.startswith("masked."):  # read from what enters this block
        return f"layers.{first_block(config) + int(number) - 1}"
    return {
        "patch_embeddings": "embeddings",
        "last_hidden_state": "layernorm",
        "class_logits": "class_predictor",
        "mask_logits": "mask_head",
        "backbone.last_hidden_state": "backbone",
    }[name]


def bare_backbone(provenance: Provenance) -> Dinov3Backbone:
    """The backbone that a model's delta was added to, without the delta."""
    state = {}
    for row in provenance.plan.rows:
        values = provenance.operand(row.name, "backbone")
        if values is not None:
            state[row.name] = torch.from_numpy(values)
    # of EoMT's own sizes, only that no backbone has fewer layers than one matters here
    config = EomtDinov3Config.from_dict({**asdict(provenance.plan.config), "num_blocks": 1})
    with torch.device("meta"):
        backbone = Dinov3Backbone(config)
    backbone.load_state_dict(state, assign=True)
    return backbone.eval()
