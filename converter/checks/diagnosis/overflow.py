"""Finds the layer whose activations overflow float16."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.models import in_dtype
from reference_model import EomtDinov3ForUniversalSegmentation


@dataclass(frozen=True)
class Overflow:
    """Where activations overflow float16.

    Attributes:
        layer: the first module with infinity or NaN in its output: ``layers.7.mlp.down_proj``.
        largest: largest absolute value of the same output in float32.
    """

    layer: str
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.layer} overflows float16: its output reaches {self.largest:.4g} in float32, "
            f"and float16 ends at {torch.finfo(torch.float16).max:g}"
        )


def find_overflow(
    model: EomtDinov3ForUniversalSegmentation, pixel_values: Tensor
) -> Overflow | None:
    """Runs a model in float16 and finds the first layer whose activations overflow.

    Args:
        model: in float32, on any device.
        pixel_values: (batch, channels, height, width), rescaled and normalised.

    Returns:
        None if all of its activations are finite.
    """
    found: list[str] = []
    largest: list[float] = []

    def note(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if not found and not all(bool(t.isfinite().all()) for t in _tensors(output)):
                found.append(name)

        return hook

    half = in_dtype(model, "float16")
    for name, module in half.named_modules():
        if name:
            module.register_forward_hook(note(name))
    with torch.inference_mode():
        half(pixel_values.to(model.device))
        if not found:
            return None

        def measure(_module: Any, _inputs: Any, output: Any) -> None:
            largest.extend(float(tensor.abs().max()) for tensor in _tensors(output))

        handle = model.get_submodule(found[0]).register_forward_hook(measure)
        try:
            model(pixel_values.to(model.device))
        finally:
            handle.remove()
    return Overflow(found[0], max(largest))


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a module returned: one, or the two of the rotary positions."""
    return (output,) if isinstance(output, Tensor) else tuple(output)
