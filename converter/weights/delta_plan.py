"""The plan of a delta: how each tensor of TU/e's layout is made of a model and its backbone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from converter.weights.layouts import EOMT_TUE, Dropped, Layout, Translation
from converter.weights.plan import Operand, Plan, Row, Source
from reference_model.config import EomtDinov3Config

# the mean and standard deviation of pixels: buffers of the original's encoder, which are the same
# in every backbone, so that their differences are zeros
_PIXEL_STATISTICS = ("network.encoder.pixel_mean", "network.encoder.pixel_std")


def stored_rows(layout: Layout, weights: Translation, source: Source) -> Iterator[Row]:
    """How a file of another layout is made of the tensors of a model or backbone, in float32.

    Args:
        layout: of the file.
        weights: the tensors that it gets, by their canonical names.
        source: the file that they are in.
    """
    for name, parts in layout.stored(weights.parts).items():
        kept = next(part for part in parts if not isinstance(part, Dropped))
        shape = weights.shape(kept) or ()
        operands = tuple(
            Operand(source, None if isinstance(part, Dropped) else weights.parts[part])
            for part in parts
        )
        if len(parts) == 1:
            yield Row(name, shape, "F32", "copy", operands)
        else:
            yield Row(name, (len(parts) * shape[0], *shape[1:]), "F32", "join", operands)


def delta_rows(model: Translation, config: EomtDinov3Config) -> tuple[Row, ...]:
    """The tensors of a delta, with the names and shapes of a published one, before subtraction.

    Args:
        model: the tensors of the model.
        config: its configuration.
    """
    rows = list(stored_rows(EOMT_TUE, model, "weights"))
    schedule = next(part for part, _ in model.dropped if part.name.endswith("attn_mask_probs"))
    # The original's loader adds everything to the network that it has made. It sets parameters
    # outside the encoder to zeros before, but these are a buffer of ones.
    rows.append(
        Row(
            "network.attn_mask_probs",
            (config.num_blocks,),
            "F32",
            "minus one",
            (Operand("weights", schedule),),
        )
    )
    statistics = (1, config.num_channels, 1, 1)
    rows += [Row(name, statistics, "F32", "zeros", ()) for name in _PIXEL_STATISTICS]
    if "criterion.empty_weight" not in model.parts:
        shape = (config.num_labels + 1,)
        rows.append(Row("criterion.empty_weight", shape, "F32", "class weights", ()))
    return tuple(rows)


def plan_delta(rows: Sequence[Row], sums: Plan) -> Plan:
    """The plan of a delta, the reverse of how it is added to the backbone.

    Args:
        rows: the tensors of the delta, as `delta_rows` gives them.
        sums: how a model is made of them and of the backbone.
    """
    bases = {}
    for row in sums.rows:
        if row.operation == "add":
            base, change = row.operands
            if change.part:
                bases[change.part.name] = base
    subtracted = tuple(
        replace(row, operation="subtract", operands=(*row.operands, bases[row.name]))
        if row.name in bases
        else row
        for row in rows
    )
    return Plan(subtracted, (), sums.config)
