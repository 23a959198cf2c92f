"""Looks for what is too large for float16: weights, and values that the layers compute."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from converter.models import in_dtype
from reference_model import EomtDinov3ForUniversalSegmentation

# of the model's output, which is computed from that of two modules
_MASKS = "masks_queries_logits"


@dataclass(frozen=True)
class Overflow:
    """Where float16 overflows first.

    Attributes:
        kind: what overflows: a weight that is rounded, or a value that is computed.
        place: the weight's name, or that of the innermost module that computes the value, such as
            ``layers.7.mlp.down_proj``; ``masks_queries_logits`` for the product of mask head and
            upscaling.
        largest: the largest absolute value there in float32.
    """

    kind: Literal["weight", "activation"]
    place: str
    largest: float

    def __str__(self) -> str:
        what = "is a weight that" if self.kind == "weight" else "has an output that"
        limit = torch.finfo(torch.float16).max
        return (
            f"{self.place} overflows float16: it {what} reaches {self.largest:.4g} in float32, and "
            f"float16 ends at {limit:g}"
        )


def find_large_weight(model: EomtDinov3ForUniversalSegmentation) -> Overflow | None:
    """Finds the first weight that float16 cannot hold; None if there is none.

    Args:
        model: in float32.
    """
    for name, weight in model.named_parameters():
        if not weight.half().isfinite().all():
            return Overflow("weight", name, _largest(weight))
    return None


def find_overflow(
    model: EomtDinov3ForUniversalSegmentation, pixel_values: Tensor
) -> Overflow | None:
    """Finds what overflows first, in the order of computation, if the model runs in float16.

    Args:
        model: in float32, on any device; it is not changed.
        pixel_values: (batch, channels, height, width), rescaled and normalised.

    Returns:
        The first overflow: of a weight if there is one, else of a value; None if there is none.
    """
    if large := find_large_weight(model):
        return large
    rounded = in_dtype(model, "float16")
    seen: list[_Point] = []

    def look(point: "_Point", values: tuple[Tensor, ...]) -> None:
        if not seen and any(not value.isfinite().all() for value in values):
            seen.append(point)

    _run(rounded, pixel_values, look)
    if not seen:
        return None
    (first,) = seen
    largest = 0.0

    def measure(point: "_Point", values: tuple[Tensor, ...]) -> None:
        nonlocal largest
        if point == first:
            largest = max(largest, *map(_largest, values))

    _run(model, pixel_values, measure)
    return Overflow("activation", first.place, largest)


@dataclass(frozen=True)
class _Point:
    """A point of the computation.

    Attributes:
        place: as in `Overflow`.
        module: the module that takes or returns the value.
        is_input: whether it takes it.
    """

    place: str
    module: str
    is_input: bool


def _run(
    model: EomtDinov3ForUniversalSegmentation,
    pixel_values: Tensor,
    visit: Callable[[_Point, tuple[Tensor, ...]], None],
) -> None:
    """Runs the model and visits the inputs and outputs of its modules, in the order of computation.

    What a module takes was computed by the module around it, unless another returned it before.
    """

    def before(point: _Point, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        visit(point, _tensors(arguments))

    def after(point: _Point, _: nn.Module, __: Any, output: Any) -> None:
        visit(point, _tensors(output))

    hooks = []
    for name, module in model.named_modules():
        if name:
            around = name.rpartition(".")[0] or name
            point = partial(_Point, module=name)
            take, give = point(around, is_input=True), point(name, is_input=False)
            hooks.append(module.register_forward_pre_hook(partial(before, take)))
            hooks.append(module.register_forward_hook(partial(after, give)))
    try:
        with torch.inference_mode():
            output = model(pixel_values.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    visit(_Point(_MASKS, "", is_input=False), (output.masks_queries_logits,))


def _tensors(values: Any) -> tuple[Tensor, ...]:
    found = values if isinstance(values, tuple) else (values,)
    return tuple(value for value in found if isinstance(value, Tensor))


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max())
