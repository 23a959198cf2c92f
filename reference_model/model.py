"""EoMT: a plain vision transformer that segments, on a DINOv3 backbone.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model" (arXiv 2503.19108).
"""

# ModelHubMixin builds a config that __init__ asks for by class itself, past from_dict; one that
# it asks for by a class's name, as annotations are with this import, it leaves to from_pretrained.
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reference_model.backbone import Embeddings, Layer, RotaryEmbedding, patch_grid
from reference_model.config import EomtDinov3Config
from reference_model.pretrained import EomtDinov3PreTrainedModel


class Prediction(NamedTuple):
    """What the heads read from the tokens.

    Attributes:
        masks_queries_logits: (batch, queries, H', W'), the patch grid enlarged by the upscaling
            blocks; a quarter of the input's height and width for patches of 8 pixels and more.
        class_queries_logits: (batch, queries, classes + 1); the last stands for "no object".
    """

    masks_queries_logits: Tensor
    class_queries_logits: Tensor


@dataclass
class EomtDinov3ForUniversalSegmentationOutput:
    """Outputs of the segmentation model, in the model's dtype.

    Attributes:
        masks_queries_logits: as in Prediction.
        class_queries_logits: as in Prediction.
        last_hidden_state: normalised tokens after the last layer, (batch, tokens, hidden):
            queries, class token, register tokens, patches row by row.
        patch_offsets: as handed to `forward`, for the image processor.
        hidden_states: on request, layers + 1 tensors (batch, tokens, hidden): the embeddings, then
            what each layer puts out, not normalised. The queries stand in front from the output of
            the first of the last `num_blocks` layers on.
        block_logits: on request, num_blocks + 1 predictions: one from the tokens that enter each
            of the last `num_blocks` layers (it masks that layer's attention where masking is on),
            then the final one.
    """

    masks_queries_logits: Tensor
    class_queries_logits: Tensor
    last_hidden_state: Tensor
    patch_offsets: list[Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    block_logits: tuple[Prediction, ...] | None = None


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (batch, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)  # timm's LayerNorm2d, which the original uses

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScaleLayer(nn.Module):
    """Doubles height and width of (batch, hidden, height, width)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(size, size, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(size, size, kernel_size=3, padding=1, groups=size, bias=False)
        self.layernorm2d = LayerNorm2d(size)

    def forward(self, x: Tensor) -> Tensor:
        # in place: another copy of the widest tensor costs more in fresh memory than in arithmetic
        x = torch.ops.aten.gelu_(self.conv1(x))
        output: Tensor = self.layernorm2d(self.conv2(x))
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


class MaskHead(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, size)
        self.fc2 = nn.Linear(size, size)
        self.fc3 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
        return output


class SetCriterion(nn.Module):
    """The weights of the classes in the training loss, which checkpoints hold."""

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.empty_weight: Tensor
        self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))
        self.empty_weight[-1] = config.no_object_weight


class EomtDinov3ForUniversalSegmentation(EomtDinov3PreTrainedModel):
    """EoMT-DINOv3. Built from a config it has random weights, as before training.

    Attributes:
        attn_mask_probs: (num_blocks,) buffer: for each of the last layers, the probability that a
            query's attention stays within its predicted mask; 0 switches masking off. 1 in a new
            model; training fades it to 0.
    """

    attn_mask_probs: Tensor

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embeddings = Embeddings(config)
        self.rope_embeddings = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.query = nn.Embedding(config.num_queries, size)
        self.class_predictor = nn.Linear(size, config.num_labels + 1)
        self.mask_head = MaskHead(size)
        self.upscale_block = ScaleBlock(config)
        self.criterion = SetCriterion(config)
        self.register_buffer("attn_mask_probs", torch.ones(config.num_blocks))
        self.apply(self._init_weights)

    def forward(
        self,
        pixel_values: Tensor,
        patch_offsets: list[Tensor] | None = None,
        output_hidden_states: bool = False,
        output_block_logits: bool = False,
    ) -> EomtDinov3ForUniversalSegmentationOutput:
        """Masks and classes of every query.

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.
            patch_offsets: windows of the pictures, handed through to the output.
            output_hidden_states: also give every layer's tokens.
            output_block_logits: also give the predictions before each of the last layers.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        grid = patch_grid(pixel_values, self.config.patch_size)
        x = self.dropout(self.embeddings(pixel_values))  # (batch, prefix + patches, hidden)
        rope = self.rope_embeddings(grid, x.dtype, x.device)
        hidden_states = [x] if output_hidden_states else []
        block_logits: list[Prediction] = []

        first_block = len(self.layers) - self.config.num_blocks
        keep_probabilities = [0.0] * first_block + self.attn_mask_probs.tolist()
        for index, (layer, keep_probability) in enumerate(
            zip(self.layers, keep_probabilities, strict=True)
        ):
            if index == first_block:
                queries = self.query.weight.expand(x.shape[0], -1, -1)
                x = torch.cat((queries, x), dim=1)  # (batch, queries + prefix + patches, hidden)
            mask = None
            if index >= first_block and (keep_probability > 0 or output_block_logits):
                prediction = self.predict(self.layernorm(x), grid)
                if output_block_logits:
                    block_logits.append(prediction)
                if keep_probability > 0:
                    mask = self.attention_mask(prediction, grid, keep_probability)
            x = layer(x, rope, mask)
            if output_hidden_states:
                hidden_states.append(x)

        x = self.layernorm(x)
        prediction = self.predict(x, grid)
        return EomtDinov3ForUniversalSegmentationOutput(
            *prediction,
            last_hidden_state=x,
            patch_offsets=patch_offsets,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            block_logits=(*block_logits, prediction) if output_block_logits else None,
        )

    def predict(self, x: Tensor, grid: tuple[int, int]) -> Prediction:
        """Reads masks and classes from normalised tokens (batch, tokens, hidden)."""
        queries = x[:, : self.config.num_queries]
        patches = x[:, self.config.num_queries + self.config.num_prefix_tokens :]
        # (batch, patches, hidden) -> (batch, hidden, rows, columns) -> (batch, hidden, H', W')
        pixels = self.upscale_block(patches.mT.reshape(x.shape[0], -1, *grid))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), pixels)
        return Prediction(masks, self.class_predictor(queries))

    def attention_mask(
        self, prediction: Prediction, grid: tuple[int, int], keep_probability: float
    ) -> Tensor:
        """Lets queries look only at the patches of their own masks.

        Returns:
            (batch, 1, tokens, tokens), bool; False where a query may not look at a patch.
        """
        # (batch, queries, H', W') -> (batch, queries, patches)
        logits = F.interpolate(prediction.masks_queries_logits, grid, mode="bilinear").flatten(2)
        inside = logits > 0
        batch, queries, patches = inside.shape
        if keep_probability < 1:
            unmasked = torch.rand(batch, queries, device=inside.device) > keep_probability
            inside = inside | unmasked[:, :, None]
        tokens = queries + self.config.num_prefix_tokens + patches
        mask = inside.new_ones(batch, 1, tokens, tokens)
        mask[:, 0, :queries, -patches:] = inside
        return mask

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
