"""EoMT: a plain vision transformer that segments, on a DINOv3 backbone.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model" (arXiv 2503.19108), and
github.com/tue-mps/eomt models/eomt.py and models/scale_block.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reference_model.backbone import Embeddings, Layer, RotaryEmbedding, patch_grid
from reference_model.config import EomtDinov3Config
from reference_model.loss import SetCriterion
from reference_model.masked_attention import MaskedAttentionModel, attention_mask
from reference_model.outputs import EomtDinov3ForUniversalSegmentationOutput, Prediction


class EomtDinov3ForUniversalSegmentation(MaskedAttentionModel):
    """EoMT-DINOv3. A model that is built from a config has random weights.

    Args:
        config: the sizes of the model.
        attn_implementation: "sdpa", torch's fused attention, or "eager", which computes the
            attention weights, for `output_attentions`.

    Attributes:
        attn_mask_probs: (num_blocks,) buffer: for each of the last layers, the probability that a
            query's attention stays within its predicted mask; 0 switches masking off. 1 in a new
            model; training fades it to 0. In evaluation mode, a compiled or exported graph keeps
            the probabilities it was made with. Call `eval()` after writing through `.data`,
            `numpy()` or torch.distributed, which torch does not count as changes.
    """

    def __init__(self, config: EomtDinov3Config, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        size = config.hidden_size
        self.embeddings = Embeddings(config)
        self.rope_embeddings = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            Layer(config, attn_implementation) for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        # an Embedding that draws its values itself imports half of torch on the meta device
        queries = torch.empty(config.num_queries, size)
        self.query = nn.Embedding.from_pretrained(queries, freeze=False)
        self.class_predictor = nn.Linear(size, config.num_labels + 1)
        self.mask_head = MaskHead(size)
        self.upscale_block = ScaleBlock(config)
        self.criterion = SetCriterion(config)
        self.apply(self._init_weights)

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        patch_offsets: list[Tensor] | None = None,
        output_hidden_states: bool = False,
        output_block_logits: bool = False,
        block_mask_logits: Sequence[Tensor] | None = None,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> EomtDinov3ForUniversalSegmentationOutput | tuple[Any, ...]:
        """Masks and classes of every query, and the loss where labels are given.

        As in transformers, the loss is over the predictions that the pass needs: in training mode
        that of every block; in evaluation mode the final one, those of blocks with masked
        attention, and all with `output_block_logits`.

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.
            mask_labels: for each picture its segments' masks, (segments, height, width), 0 or 1.
            class_labels: for each picture its segments' class ids, (segments,).
            patch_offsets: windows of the pictures, passed on to the output.
            output_hidden_states: also return every layer's tokens.
            output_block_logits: also return the predictions before each of the last layers.
            block_mask_logits: for each of the last `num_blocks` layers, mask logits (batch,
                queries, H', W') that take the place of its own prediction where masking is on.
            output_attentions: also return every layer's attention weights, which are computed once
                more; only with `attn_implementation="eager"`.
            return_dict: whether to return an output with names, or its `to_tuple()`.

        Raises:
            ValueError: height or width is not a multiple of the patch size; only one kind of
                labels is given, or they do not fit each other, the batch or the classes; mask
                logits are not given for every block; attention weights are not computed.
            ImportError: there are labels, but no SciPy.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("the loss needs both mask_labels and class_labels; found one of them")
        if block_mask_logits is not None and len(block_mask_logits) != self.config.num_blocks:
            raise ValueError(
                f"block_mask_logits has {len(block_mask_logits)} tensors; expected "
                f"{self.config.num_blocks}, one for each block"
            )
        if output_attentions and self.attn_implementation != "eager":
            raise ValueError(
                "output_attentions needs a model with attention weights: "
                'from_pretrained(..., attn_implementation="eager")'
            )
        grid = patch_grid(pixel_values, self.config.patch_size)
        x = self.dropout(self.embeddings(pixel_values))  # (batch, prefix + patches, hidden)
        rope = self.rope_embeddings(grid, x.dtype, x.device)
        hidden_states = [x] if output_hidden_states else []
        attentions: list[Tensor] = []
        layers: list[Any] = list(self.layers)
        first_block = len(layers) - self.config.num_blocks
        for layer in layers[:first_block]:
            if output_attentions:
                attentions.append(layer.attention_weights(x, rope))
            x = layer(x, rope)
            if output_hidden_states:
                hidden_states.append(x)

        queries = self.query.weight.expand(x.shape[0], -1, -1)
        x = torch.cat((queries, x), dim=1)  # (batch, queries + prefix + patches, hidden)
        predictions: dict[int, Prediction] = {}  # by the block that they are made before
        keep_probabilities = self.mask_probabilities()
        for block, layer in enumerate(layers[first_block:]):
            mask = None
            # the original's training draws queries to mask with probability 0 too
            masking = self.training or keep_probabilities[block] > 0
            if masking or output_block_logits:
                predictions[block] = self.predict(self.layernorm(x), grid)
            if masking:
                mask_logits = (
                    predictions[block].masks_queries_logits
                    if block_mask_logits is None
                    else block_mask_logits[block]
                )
                prefix = self.config.num_prefix_tokens
                mask = attention_mask(mask_logits, grid, prefix, keep_probabilities[block])
            if output_attentions:
                attentions.append(layer.attention_weights(x, rope, mask))
            x = layer(x, rope, mask)
            if output_hidden_states:
                hidden_states.append(x)

        x = self.layernorm(x)
        final = predictions[self.config.num_blocks] = self.predict(x, grid)

        output = EomtDinov3ForUniversalSegmentationOutput(
            *final,
            last_hidden_state=x,
            patch_offsets=patch_offsets,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            block_logits=tuple(predictions.values()) if output_block_logits else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        if mask_labels is not None and class_labels is not None:
            add_losses = self.add_losses
            if torch.compiler.is_compiling():  # a graph cannot match, nor depend on how many labels
                torch._dynamo.step_unsupported()  # the graph ends here; as in torch 2.13
                add_losses = torch.compiler.disable(add_losses)
            add_losses(output, predictions, mask_labels, class_labels)
        return output if return_dict else output.to_tuple()

    def add_losses(
        self,
        output: EomtDinov3ForUniversalSegmentationOutput,
        predictions: Mapping[int, Prediction],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> None:
        """Adds the losses of predictions to an output; predictions by the block that follows."""
        losses = self.criterion(list(predictions.values()), mask_labels, class_labels)
        output.loss_dict = {
            name if block == self.config.num_blocks else f"{name}_{block}": loss
            for block, parts in zip(predictions, losses, strict=True)
            for name, loss in parts.items()
        }
        output.loss = torch.stack(list(output.loss_dict.values())).sum()

    def predict(self, x: Tensor, grid: tuple[int, int]) -> Prediction:
        """Reads masks and classes from normalised tokens (batch, tokens, hidden)."""
        queries = x[:, : self.config.num_queries]
        patches = x[:, self.config.num_queries + self.config.num_prefix_tokens :]
        # (batch, patches, hidden) -> (batch, hidden, rows, columns) -> (batch, hidden, H', W')
        pixels = self.upscale_block(patches.mT.reshape(x.shape[0], -1, *grid))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), pixels)
        return Prediction(masks, self.class_predictor(queries))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DINOv3's initialisation, also for what EoMT adds."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, Embeddings):
            nn.init.trunc_normal_(module.cls_token, std=std)
            nn.init.trunc_normal_(module.register_tokens, std=std)


class MaskHead(nn.Module):
    """(batch, queries, hidden) to the same shape; with GELU whatever `config.hidden_act` is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, size)
        self.fc2 = nn.Linear(size, size)
        self.fc3 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
        return output


class ScaleBlock(nn.Module):
    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ScaleLayer(config.hidden_size) for _ in range(config.num_upscale_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = layer(x)
        return x


class ScaleLayer(nn.Module):
    """Doubles height and width of (batch, hidden, height, width)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(size, size, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(size, size, kernel_size=3, padding=1, groups=size, bias=False)
        self.layernorm2d = LayerNorm2d(size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layernorm2d(self.conv2(F.gelu(self.conv1(x))))
        return output


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (batch, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)  # timm's LayerNorm2d, which the original uses

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
