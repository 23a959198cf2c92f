"""The model's outputs."""

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """What the heads predict from the tokens.

    Attributes:
        masks_queries_logits: (batch, queries, H', W'), the patch grid enlarged by the upscaling
            blocks; a quarter of the input's height and width for patches of 8 pixels and more.
        class_queries_logits: (batch, queries, classes + 1); the last stands for "no object".
    """

    masks_queries_logits: Tensor
    class_queries_logits: Tensor


# as in transformers, whose outputs do not have the last two
TUPLE_ORDER = (
    "loss",
    "class_queries_logits",
    "masks_queries_logits",
    "last_hidden_state",
    "hidden_states",
    "attentions",
    "patch_offsets",
    "block_logits",
    "loss_dict",
)


@dataclass
class EomtDinov3ForUniversalSegmentationOutput:
    """Outputs of the segmentation model, in the model's dtype.

    `outputs[name]` and `outputs[position]` work too; positions are those of `to_tuple`.

    Attributes:
        masks_queries_logits: as in Prediction.
        class_queries_logits: as in Prediction.
        last_hidden_state: normalised tokens after the last layer, (batch, tokens, hidden):
            queries, class token, register tokens, patches row by row.
        patch_offsets: as given to `forward`, for the image processor.
        hidden_states: on request, layers + 1 tensors (batch, tokens, hidden): the embeddings, then
            each layer's output, not normalised. From the first of the last `num_blocks` layers on,
            the queries are in front.
        block_logits: on request, num_blocks + 1 predictions: one from the tokens that enter each
            of the last `num_blocks` layers (it masks that layer's attention where masking is on),
            then the final one.
        loss: scalar, float32, where labels were given; the sum of `loss_dict`.
        loss_dict: the weighted losses of every prediction: `loss_mask`, `loss_dice` and
            `loss_cross_entropy` of the final one, `loss_mask_0` and so on of those before the last
            `num_blocks` layers.
        attentions: on request, every layer's attention weights, (batch, heads, tokens, tokens),
            without dropout.
    """

    masks_queries_logits: Tensor
    class_queries_logits: Tensor
    last_hidden_state: Tensor
    patch_offsets: list[Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    block_logits: tuple[Prediction, ...] | None = None
    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs that are not None, in transformers' order."""
        return tuple(self._present().values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "outputs are not iterable: to_tuple() has their values (transformers' give names)"
        )

    def _present(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in TUPLE_ORDER}
        return {name: value for name, value in values.items() if value is not None}


torch.export.register_dataclass(
    EomtDinov3ForUniversalSegmentationOutput,
    serialized_type_name="EomtDinov3ForUniversalSegmentationOutput",
)
