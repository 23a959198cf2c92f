"""Masked attention: queries look only at the patches of their own predicted masks.

Kerssies et al. (arXiv 2503.19108), after Cheng et al., "Masked-attention Mask Transformer" (arXiv
2112.01527). Training fades it out, block by block; trained models run without it.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses import FakeTensor

from reference_model.config import EomtDinov3Config
from reference_model.pretrained import EomtDinov3PreTrainedModel


def attention_mask(
    mask_logits: Tensor,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    keep_probability: float | Tensor,
) -> Tensor:
    """Which tokens may look at which.

    Args:
        mask_logits: (batch, queries, H', W').
        grid: rows and columns of patches.
        num_prefix_tokens: tokens between the queries and the patches.
        keep_probability: that a query is masked; a scalar.

    Returns:
        (batch, 1, tokens, tokens), bool; False where a query may not look at a patch.
    """
    # (batch, queries, H', W') -> (batch, queries, patches)
    inside = F.interpolate(mask_logits, grid, mode="bilinear").flatten(2) > 0
    batch, queries, patches = inside.shape
    if isinstance(keep_probability, Tensor) or keep_probability < 1:
        unmasked = torch.rand(batch, queries, device=inside.device) > keep_probability
        inside = inside | unmasked[:, :, None]
    tokens = queries + num_prefix_tokens + patches
    mask = inside.new_ones(batch, 1, tokens, tokens)
    mask[:, 0, :queries, -patches:] = inside
    return mask


class MaskedAttentionModel(EomtDinov3PreTrainedModel):
    """A model whose last blocks have masked attention, with a probability for each block.

    Evaluation does without masks where the probability is 0. To find that out the values must be
    read, which waits for the GPU and which neither an export nor a compiler can do. So they are
    read when the buffer has changed, and kept.

    Attributes:
        attn_mask_probs: (num_blocks,) buffer, the probability of each block; 1 in a new model.
    """

    attn_mask_probs: Tensor
    _read_probabilities: "_ReadProbabilities | None" = None

    def __init__(self, config: EomtDinov3Config, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.register_buffer("attn_mask_probs", torch.ones(config.num_blocks))
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]  # torch's own
            type(self)._refresh_mask_schedule
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
        its end on, as in github.com/tue-mps/eomt training/lightning_module.py (`mask_annealing`).
        The original's configs have the published models' steps, such as 14782, 29564, 44346, 59128
        and 29564, 44346, 59128, 73910 for ViT-L on COCO.

        Args:
            step: how many steps the optimiser has taken.
            start_steps: for each of the blocks.
            end_steps: likewise.
            power: of the polynomial; 0.9 in the original's training/mask_classification_*.py.

        Raises:
            ValueError: there is not one start and one end for every block.
        """
        blocks = self.config.num_blocks
        if not len(start_steps) == len(end_steps) == blocks:
            raise ValueError(
                f"start_steps has {len(start_steps)} values and end_steps {len(end_steps)}; "
                f"expected {blocks}, one for each block"
            )
        for block, (start, end) in enumerate(zip(start_steps, end_steps, strict=True)):
            remaining = min(max((end - step) / max(end - start, 1), 0.0), 1.0)
            self.attn_mask_probs[block] = remaining**power

    def mask_probabilities(self) -> Sequence[float | Tensor]:
        """The probability of each block; as numbers, unless a training step is compiled.

        Raises:
            RuntimeError: in an export, if they may have changed since they were last read.
        """
        if self.training and torch.compiler.is_compiling():
            return self.attn_mask_probs.unbind(0)  # training draws masks whatever the values are
        if self.training:  # 1 draws no random numbers, as in transformers; torch may miss changes
            return tuple(self.attn_mask_probs.tolist())
        return self._known_probabilities()

    def _known_probabilities(self) -> tuple[float, ...]:
        known = self._read_probabilities
        if known is None or not known.are_of(self.attn_mask_probs):
            if isinstance(self.attn_mask_probs, FakeTensor):
                raise RuntimeError(
                    "attn_mask_probs may have changed since the model was run; call eval() on the "
                    "model before exporting it, with its weights loaded and outside of "
                    "torch.inference_mode"
                )
            known = self._read_probabilities = _ReadProbabilities(self.attn_mask_probs)
        return known.values

    # as torch.compiler.assume_constant_result marks it, which imports all of the compiler to do so:
    # a second and 80 MB
    _known_probabilities._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _refresh_mask_schedule(self, *_: object) -> None:
        """Reads the values ahead of an export, which cannot read them."""
        self._read_probabilities = None
        if not (self.attn_mask_probs.is_meta or isinstance(self.attn_mask_probs, FakeTensor)):
            self._known_probabilities()

    def train(self, mode: bool = True) -> Self:
        """Switches to training mode, or to evaluation mode, as `nn.Module.train` does."""
        super().train(mode)
        if mode:
            self._read_probabilities = None  # read by every step: not also here, to wait but once
        else:
            self._refresh_mask_schedule()
        return self

    def _apply(self, *arguments: Any, **options: Any) -> Self:  # which to() and its like call
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch's own
        self._refresh_mask_schedule()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read_probabilities": None}  # a copy has memory of its own


class _ReadProbabilities:
    """The values of a buffer when it was last read.

    Attributes:
        values: one for each block.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.values: tuple[float, ...] = tuple(buffer.tolist())
        self._buffer = buffer
        self._memory = buffer.detach()  # kept, so that no other tensor gets its address
        self._version = None if buffer.is_inference() else buffer._version

    def are_of(self, buffer: Tensor) -> bool:
        """Whether a buffer, or the one that a fake tensor stands for, still has these values.

        An export puts a fake tensor, which has no values, in the buffer's place.
        """
        if isinstance(buffer, FakeTensor):
            return _stands_for(buffer, self._buffer) and self._is_unchanged()
        return buffer is self._buffer and self._is_unchanged()

    def _is_unchanged(self) -> bool:
        if self._version is None:  # torch does not count changes of inference tensors
            return False
        same_memory = self._buffer.data_ptr() == self._memory.data_ptr()
        return same_memory and self._buffer._version == self._version


def _stands_for(fake: FakeTensor, buffer: Tensor) -> bool:
    try:
        return fake.fake_mode.from_tensor(buffer) is fake
    except RuntimeError:  # a tensor that the export does not know
        return False
