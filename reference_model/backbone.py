"""The DINOv3 vision transformer: embeddings, layers, rotary positions.

Siméoni et al., "DINOv3" (arXiv 2508.10104), and github.com/facebookresearch/dinov3
dinov3/models/vision_transformer.py. Parameter names are those of transformers'
EomtDinov3ForUniversalSegmentation.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reference_model.activations import ACTIVATIONS
from reference_model.config import EomtDinov3Config


class Dinov3Backbone(nn.Module):
    """The bare backbone. Its parameters have the segmentation model's names.

    A DINOv3 file in transformers' layout fits once `layer.N.` is renamed to `layers.N.`, `norm.`
    to `layernorm.`, and `embeddings.mask_token`, which only pretraining uses, is left out.
    """

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.embeddings = Embeddings(config)
        self.rope_embeddings = RotaryEmbedding(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised tokens (batch, 1 + registers + patches, hidden).

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        grid = patch_grid(pixel_values, self.patch_size)
        x = self.embeddings(pixel_values)  # (batch, 1 + registers + patches, hidden)
        rope = self.rope_embeddings(grid, x.dtype, x.device)
        for layer in self.layers:
            x = layer(x, rope)
        output: Tensor = self.layernorm(x)
        return output


class Embeddings(nn.Module):
    """Class token, register tokens and a token per patch, row by row: (batch, tokens, hidden)."""

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, size))
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        # (batch, channels, height, width) -> (batch, hidden, rows, columns)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (batch, rows * columns, hidden)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        register_tokens = self.register_tokens.expand(patches.shape[0], -1, -1)
        return torch.cat((cls_token, register_tokens, patches), dim=1)


class Layer(nn.Module):
    def __init__(self, config: EomtDinov3Config, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, attn_implementation)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GatedMlp(config) if config.use_gated_mlp else Mlp(config)
        self.layer_scale2 = LayerScale(config)
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """One transformer layer.

        Args:
            x: (batch, tokens, hidden), patches last.
            rope: cosine and sine of the patches' angles, each (patches, head size).
            mask: (batch, 1, tokens, tokens); True where a token of the third axis may look at one
                of the last.
        """
        x = x + self.drop_path(self.layer_scale1(self.attention(self.norm1(x), rope, mask)))
        output: Tensor = x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))
        return output

    def attention_weights(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The layer's attention weights for the same arguments: (batch, heads, tokens, tokens)."""
        query, key, _ = self.attention.query_key_value(self.norm1(x), rope)
        return self.attention.weights(query, key, mask)


class Attention(nn.Module):
    def __init__(self, config: EomtDinov3Config, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        self.attn_implementation = attn_implementation
        self.q_proj = nn.Linear(size, size, bias=config.query_bias)
        self.k_proj = nn.Linear(size, size, bias=config.key_bias)
        self.v_proj = nn.Linear(size, size, bias=config.value_bias)
        self.o_proj = nn.Linear(size, size, bias=config.proj_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        query, key, value = self.query_key_value(x, rope)
        if self.attn_implementation == "eager":
            x = F.dropout(self.weights(query, key, mask), self.dropout, self.training) @ value
        else:
            dropout = self.dropout if self.training else 0.0
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        output: Tensor = self.o_proj(x.transpose(1, 2).flatten(2))  # (batch, tokens, hidden)
        return output

    def query_key_value(
        self, x: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # (batch, tokens, hidden) -> (batch, heads, tokens, head size)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate_patches(query, *rope), rotate_patches(key, *rope), value

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, heads, tokens, tokens): how much a token of the third axis takes of the last."""
        scores = query @ key.mT / math.sqrt(self.head_size)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1)


class RotaryEmbedding(nn.Module):
    """Angles by which pairs of a head's dimensions turn at a patch's position.

    Coordinates of patch centres in [-1, 1] times 2π times theta^(-4k / head size), the first
    quarter of the dimensions for rows, the second for columns, and both again for the partners. In
    training the coordinates are shifted, jittered and rescaled at random. As in DINOv3's
    dinov3/layers/rope_position_encoding.py.
    """

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.theta = config.rope_theta
        self.shift = config.pos_embed_shift
        self.jitter = config.pos_embed_jitter
        self.rescale = config.pos_embed_rescale

    def forward(
        self, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every patch's angles, each (rows * columns, head size)."""
        rows, columns = (
            torch.arange(0.5, count, dtype=torch.float32, device=device) / count for count in grid
        )
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        coordinates = 2 * centres.flatten(0, 1) - 1  # (patches, 2)
        if self.training:
            coordinates = self.augment(coordinates)

        # float32 whatever the dtype: in bfloat16, neighbouring patches would have the same angles
        exponents = torch.arange(0, 1, 4 / self.head_size, dtype=torch.float32, device=device)
        frequencies = 1 / self.theta**exponents  # (head size / 4,)
        angles = 2 * math.pi * coordinates[:, :, None] * frequencies  # (patches, 2, head size / 4)
        angles = torch.cat((angles.flatten(1),) * 2, dim=-1)  # (patches, head size)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def augment(self, coordinates: Tensor) -> Tensor:
        if self.shift is not None:  # per axis, uniform in [-shift, shift]
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-self.shift, self.shift)
        if self.jitter is not None:  # per axis, log-uniform in [1 / jitter, jitter]
            bound = math.log(self.jitter)
            coordinates = coordinates * coordinates.new_empty(2).uniform_(-bound, bound).exp()
        if self.rescale is not None:  # both axes alike, log-uniform in [1 / rescale, rescale]
            bound = math.log(self.rescale)
            coordinates = coordinates * coordinates.new_empty(1).uniform_(-bound, bound).exp()
        return coordinates


def rotate_patches(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the patch tokens, which are the last; not queries, class and register tokens.

    Args:
        x: queries or keys of the attention, (batch, heads, tokens, head size).
        cos: of the patches' angles, (patches, head size).
        sin: likewise.
    """
    others, patches = x[:, :, : -cos.shape[0]], x[:, :, -cos.shape[0] :]
    first, second = patches.chunk(2, dim=-1)
    patches = patches * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((others, patches), dim=2)


class Mlp(nn.Module):
    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return output


class GatedMlp(Mlp):
    """As dinov3/layers/ffn_layers.py's SwiGLUFFN (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return output


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., arXiv 2103.17239, section 2)."""

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), config.layerscale_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class DropPath(nn.Module):
    """In training, leaves a branch out for random pictures (Huang et al., arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device) >= self.rate
        return x / (1 - self.rate) * kept


def patch_grid(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in (batch, channels, height, width).

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"pixel_values are {height} pixels high and {width} wide; "
            f"expected multiples of the patch size {patch_size}"
        )
    return height // patch_size, width // patch_size
