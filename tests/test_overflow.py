"""What is too large for float16."""

from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_model
from torch import Tensor

from converter.checks.diagnosis.overflow import Overflow, find_overflow
from converter.weights.merge import round_to
from reference_model import EomtDinov3ForUniversalSegmentation

Model = EomtDinov3ForUniversalSegmentation


@pytest.fixture
def model() -> Model:
    model = small_model(use_gated_mlp=True, hidden_act="silu")
    model.attn_mask_probs.zero_()
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def enlarge(model: Model, *names: str, factor: float = 1e4) -> None:
    for name in names:
        model.get_parameter(name).mul_(factor)


def test_nothing_overflows_in_an_ordinary_model(model: Model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert find_overflow(model, pixels()) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_largest_value_of_all_calls_of_a_module_is_named(model: Model) -> None:
    class Twice(Model):
        def forward(self, pixel_values: Tensor) -> Any:  # type: ignore[override]
            output = super().forward(pixel_values)
            super().forward(torch.zeros_like(pixel_values))  # whose values are smaller
            return output

    enlarge(model, "layers.1.mlp.up_proj.weight", factor=1e5)
    model.get_parameter("layers.1.mlp.up_proj.weight").data.clamp_(-6e4, 6e4)
    expected = find_overflow(model, pixels())
    model.__class__ = Twice

    assert expected is not None
    assert find_overflow(model, pixels()) == expected


@pytest.mark.numbers
@pytest.mark.parametrize(
    "place",
    [
        "embeddings.patch_embeddings",
        "layers.0.attention.v_proj",
        "layers.1.mlp.up_proj",
        "layers.2.mlp.down_proj",
        "class_predictor",
        "upscale_block.block.1.conv1",
    ],
)
def test_the_first_module_that_overflows_is_named_with_its_largest_value(
    model: Model, place: str
) -> None:
    largest = []
    enlarge(model, f"{place}.weight", factor=1e5)
    model.get_parameter(f"{place}.weight").data.clamp_(-6e4, 6e4)
    hook = model.get_submodule(place).register_forward_hook(
        lambda _, __, output: largest.append(float(output.abs().max()))
    )
    with torch.no_grad():
        model(pixels())
    hook.remove()

    found = find_overflow(model, pixels())
    assert found == Overflow("activation", place, largest[0])
    assert largest[0] > 65504


@pytest.mark.numbers
def test_a_product_between_modules_is_their_modules(model: Model) -> None:
    """Gate and value are in range, and their product is not."""
    enlarge(model, "layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight", factor=300)
    found = find_overflow(model, pixels())

    assert found is not None
    assert found.place == "layers.1.mlp"
    assert 65504 < found.largest < 1e7


@pytest.mark.numbers
def test_mask_logits_that_overflow_are_named(model: Model) -> None:
    enlarge(model, "mask_head.fc3.weight", factor=3000)
    enlarge(model, "upscale_block.block.1.layernorm2d.weight", factor=300)
    found = find_overflow(model, pixels())

    assert found is not None
    assert (found.kind, found.place) == ("activation", "masks_queries_logits")
    assert found.largest > 65504


@torch.no_grad()
def test_a_weight_that_overflows_comes_before_what_is_computed(model: Model) -> None:
    weight = model.get_parameter("layers.2.norm1.weight")
    weight[3] = -65519  # rounded down, and in range

    found = find_overflow(model, pixels())
    assert found is None or found.kind == "activation"
    weight[3] = -65520
    assert find_overflow(model, pixels()) == Overflow("weight", "layers.2.norm1.weight", 65520)


def test_torch_rounds_to_float16_as_a_conversion_does() -> None:
    """All float16 numbers, what lies half-way between them, and their neighbours in float32."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    edges = np.array([65504, 65519.996, 65520, 1e38, 2**-24, 2**-25, 1e-40], np.float32)
    found = np.concatenate([numbers, middles, edges, -edges])
    found = np.concatenate(
        [found, np.nextafter(found, np.float32(np.inf)), np.nextafter(found, -np.float32(np.inf))]
    )
    with np.errstate(over="ignore"):
        expected = round_to(found, "F16")

    assert np.array_equal(
        torch.from_numpy(found).half().numpy().view(np.uint16), expected.view(np.uint16)
    )
