"""EoMT: a plain vision transformer that segments, on a DINOv3 backbone.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model" (arXiv 2503.19108).
"""

# ModelHubMixin builds a config that __init__ asks for by class itself, past from_dict; one that
# it asks for by a class's name, as annotations are with this import, it leaves to from_pretrained.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from reference_model.backbone import Embeddings, Layer, RotaryEmbedding, patch_grid
from reference_model.config import EomtDinov3Config
from reference_model.loss import SetCriterion
from reference_model.mask_schedule import MaskSchedule
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
        loss: scalar, float32, where labels were given; the sum of `loss_dict`.
        loss_dict: the weighted losses of every prediction: `loss_mask`, `loss_dice` and
            `loss_cross_entropy` of the final one, `loss_mask_0` and so on of those before the last
            `num_blocks` layers.
    """

    masks_queries_logits: Tensor
    class_queries_logits: Tensor
    last_hidden_state: Tensor
    patch_offsets: list[Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    block_logits: tuple[Prediction, ...] | None = None
    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None


torch.export.register_dataclass(
    EomtDinov3ForUniversalSegmentationOutput,
    serialized_type_name="EomtDinov3ForUniversalSegmentationOutput",
)


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
        output: Tensor = self.layernorm2d(self.conv2(F.gelu(self.conv1(x))))
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


class EomtDinov3ForUniversalSegmentation(EomtDinov3PreTrainedModel):
    """EoMT-DINOv3. Built from a config it has random weights, as before training.

    Attributes:
        attn_mask_probs: (num_blocks,) buffer: for each of the last layers, the probability that a
            query's attention stays within its predicted mask; 0 switches masking off. 1 in a new
            model; training fades it to 0. In evaluation mode, each graph that is compiled or
            exported keeps the masks that were on when it was made. Call `eval()` after writing
            through `.data`, `numpy()` or torch.distributed, which torch does not count as changes.
    """

    attn_mask_probs: Tensor
    _mask_schedule: MaskSchedule | None = None

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embeddings = Embeddings(config)
        self.rope_embeddings = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        # an Embedding that draws its own values imports half of torch to do so on the meta device
        self.query = nn.Embedding.from_pretrained(
            torch.empty(config.num_queries, size), freeze=False
        )
        self.class_predictor = nn.Linear(size, config.num_labels + 1)
        self.mask_head = MaskHead(size)
        self.upscale_block = ScaleBlock(config)
        self.criterion = SetCriterion(config)
        self.register_buffer("attn_mask_probs", torch.ones(config.num_blocks))
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]  # torch's own
            type(self)._refresh_mask_schedule
        )
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
    ) -> EomtDinov3ForUniversalSegmentationOutput:
        """Masks and classes of every query, and the loss where labels are given.

        As in transformers, the loss is over the predictions that the pass needs: in training mode
        that of every block; in evaluation mode the final one, those of blocks with masked
        attention, and all with `output_block_logits`.

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.
            mask_labels: per picture its segments' masks, (segments, height, width), 0 or 1.
            class_labels: per picture its segments' class ids, (segments,).
            patch_offsets: windows of the pictures, handed through to the output.
            output_hidden_states: also give every layer's tokens.
            output_block_logits: also give the predictions before each of the last layers.
            block_mask_logits: for each of the last `num_blocks` layers, mask logits (batch,
                queries, H', W') that take the place of its own prediction where masking is on.

        Raises:
            ValueError: height or width is not a multiple of the patch size; only one kind of
                labels is given, or they do not fit each other, the batch or the classes; there
                are not mask logits for every block.
            ImportError: there are labels, but no SciPy.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("the loss needs both mask_labels and class_labels; found one of them")
        if block_mask_logits is not None and len(block_mask_logits) != self.config.num_blocks:
            raise ValueError(
                f"block_mask_logits has {len(block_mask_logits)} tensors; expected "
                f"{self.config.num_blocks}, one for each block"
            )
        grid = patch_grid(pixel_values, self.config.patch_size)
        x = self.dropout(self.embeddings(pixel_values))  # (batch, prefix + patches, hidden)
        rope = self.rope_embeddings(grid, x.dtype, x.device)
        hidden_states = [x] if output_hidden_states else []
        predictions: dict[int, Prediction] = {}  # by the block that they are made before

        first_block = len(self.layers) - self.config.num_blocks
        keep_probabilities = self.mask_probabilities()
        for block, layer in enumerate(self.layers, start=-first_block):
            if block == 0:
                queries = self.query.weight.expand(x.shape[0], -1, -1)
                x = torch.cat((queries, x), dim=1)  # (batch, queries + prefix + patches, hidden)
            mask = None
            # the original's training draws queries to mask with probability 0 too
            masking = block >= 0 and (self.training or keep_probabilities[block] > 0)
            if masking or (block >= 0 and output_block_logits):
                prediction = self.predict(self.layernorm(x), grid)
                predictions[block] = prediction
                if masking:
                    mask_logits = prediction.masks_queries_logits
                    if block_mask_logits is not None:
                        mask_logits = block_mask_logits[block]
                    mask = self.attention_mask(mask_logits, grid, keep_probabilities[block])
            x = layer(x, rope, mask)
            if output_hidden_states:
                hidden_states.append(x)

        x = self.layernorm(x)
        prediction = self.predict(x, grid)
        predictions[self.config.num_blocks] = prediction

        loss_dict: dict[str, Tensor] = {}
        if mask_labels is not None and class_labels is not None:
            for block, (masks, classes) in predictions.items():
                losses = self.criterion(masks, classes, mask_labels, class_labels)
                suffix = f"_{block}" if block < self.config.num_blocks else ""
                loss_dict |= {f"{name}{suffix}": loss for name, loss in losses.items()}
        return EomtDinov3ForUniversalSegmentationOutput(
            *prediction,
            last_hidden_state=x,
            patch_offsets=patch_offsets,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            block_logits=tuple(predictions.values()) if output_block_logits else None,
            loss=torch.stack(list(loss_dict.values())).sum() if loss_dict else None,
            loss_dict=loss_dict or None,
        )

    @torch.no_grad()
    def anneal_attention_masks(
        self,
        step: int,
        start_steps: Sequence[int],
        end_steps: Sequence[int],
        power: float = 0.9,
    ) -> None:
        """Fades masked attention out, block by block: sets `attn_mask_probs` after a step.

        A block's probability is 1 before its start, (1 - progress) ** power on the way, and 0 from
        its end on. The original's training/lightning_module.py (`mask_annealing`) and its default
        power; its configs have the published models' steps, such as 14782, 29564, 44346, 59128 and
        29564, 44346, 59128, 73910 for ViT-L on COCO.

        Args:
            step: how many steps the optimiser has taken.
            start_steps: for each of the last `num_blocks` layers.
            end_steps: likewise.
            power: of the polynomial.

        Raises:
            ValueError: there is not one start and one end for every block.
        """
        if not len(start_steps) == len(end_steps) == self.config.num_blocks:
            raise ValueError(
                f"start_steps has {len(start_steps)} values and end_steps {len(end_steps)}; "
                f"expected {self.config.num_blocks}, one for each block"
            )
        for block, (start, end) in enumerate(zip(start_steps, end_steps, strict=True)):
            remaining = min(max((end - step) / max(end - start, 1), 0.0), 1.0)
            self.attn_mask_probs[block] = remaining**power

    def predict(self, x: Tensor, grid: tuple[int, int]) -> Prediction:
        """Reads masks and classes from normalised tokens (batch, tokens, hidden)."""
        queries = x[:, : self.config.num_queries]
        patches = x[:, self.config.num_queries + self.config.num_prefix_tokens :]
        # (batch, patches, hidden) -> (batch, hidden, rows, columns) -> (batch, hidden, H', W')
        pixels = self.upscale_block(patches.mT.reshape(x.shape[0], -1, *grid))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), pixels)
        return Prediction(masks, self.class_predictor(queries))

    def mask_probabilities(self) -> Sequence[float | Tensor]:
        """Of every block; as numbers, unless a training step is compiled.

        Raises:
            RuntimeError: in an export, where they may have changed since they were last read.
        """
        if self.training and torch.compiler.is_compiling():
            return self.attn_mask_probs.unbind(0)  # masks are drawn whatever they are
        if self.training:  # where the loss waits for the GPU too, and processes write unnoticed
            return tuple(self.attn_mask_probs.tolist())
        probabilities: tuple[float, ...] = self._read_mask_probabilities()
        return probabilities

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's own
    def _read_mask_probabilities(self) -> tuple[float, ...]:
        schedule = self._mask_schedule
        if schedule is None or not schedule.is_of(self.attn_mask_probs):
            if isinstance(self.attn_mask_probs, FakeTensor):
                raise RuntimeError(
                    "attn_mask_probs may have changed since the model was run; call eval() on the "
                    "model before exporting it, with its weights loaded and outside of "
                    "torch.inference_mode"
                )
            schedule = self._mask_schedule = MaskSchedule(self.attn_mask_probs)
        return schedule.probabilities

    def attention_mask(
        self, mask_logits: Tensor, grid: tuple[int, int], keep_probability: float | Tensor
    ) -> Tensor:
        """Lets queries look only at the patches of their own masks.

        Args:
            mask_logits: (batch, queries, H', W').
            grid: rows and columns of patches.
            keep_probability: of a query to be masked; a scalar.

        Returns:
            (batch, 1, tokens, tokens), bool; False where a query may not look at a patch.
        """
        # (batch, queries, H', W') -> (batch, queries, patches)
        logits = F.interpolate(mask_logits, grid, mode="bilinear").flatten(2)
        inside = logits > 0
        batch, queries, patches = inside.shape
        if isinstance(keep_probability, Tensor) or keep_probability < 1:
            unmasked = torch.rand(batch, queries, device=inside.device) > keep_probability
            inside = inside | unmasked[:, :, None]
        tokens = queries + self.config.num_prefix_tokens + patches
        mask = inside.new_ones(batch, 1, tokens, tokens)
        mask[:, 0, :queries, -patches:] = inside
        return mask

    def train(self, mode: bool = True) -> Self:
        """Switches to training mode, or to evaluation mode, as `nn.Module.train` does."""
        super().train(mode)
        self._refresh_mask_schedule()
        return self

    def _apply(self, *arguments: Any, **options: Any) -> Self:  # what to() and its like call
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch's own
        self._refresh_mask_schedule()
        return self

    def _refresh_mask_schedule(self, *_: object) -> None:
        """Reads what an export will need, which cannot."""
        self._mask_schedule = None
        if not (self.attn_mask_probs.is_meta or isinstance(self.attn_mask_probs, FakeTensor)):
            self._read_mask_probabilities()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mask_schedule": None}  # a copy has memory of its own

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
