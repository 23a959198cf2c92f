"""The DINOv3 backbone and its parts, against what the original computed."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from recorded_models import (
    NAMES,
    backbone_state_dict,
    config_values,
    pixel_values,
    recorded_backbone,
    recordings,
)
from torch import Tensor
from torch.testing import assert_close
from transformers.activations import ACT2FN

from reference_model import Dinov3Backbone, EomtDinov3Config
from reference_model.activations import ACTIVATIONS
from reference_model.allowed import ACTIVATION_NAMES
from reference_model.backbone import RotaryEmbedding, rotate_patches

pytestmark = pytest.mark.numbers

CPU = torch.device("cpu")


def small_config(**changes: Any) -> EomtDinov3Config:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_blocks": 1,
        "image_size": 64,
    }
    return EomtDinov3Config(**(sizes | changes))


def rope(
    config: EomtDinov3Config, grid: tuple[int, int], train: bool = False
) -> tuple[Tensor, ...]:
    tables: tuple[Tensor, ...] = RotaryEmbedding(config).train(train)(grid, torch.float32, CPU)
    return tables


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_bare_backbone_reproduces_the_recording(name: str) -> None:
    expected = recordings(name)["backbone.last_hidden_state"]
    output = recorded_backbone(name)(pixel_values(name)[: len(expected)])
    assert_close(output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rotary_positions_reproduce_the_recording(name: str) -> None:
    recorded = recordings(name)
    config = EomtDinov3Config.from_dict(config_values(name))
    height, width = recorded["pixels"].shape[-2:]
    cos, sin = rope(config, (height // config.patch_size, width // config.patch_size))
    assert_close(cos, recorded["rope.cos"], rtol=0, atol=1e-6)
    assert_close(sin, recorded["rope.sin"], rtol=0, atol=1e-6)


def test_rotary_angles_stay_float32_in_a_bfloat16_model() -> None:
    backbone = Dinov3Backbone(small_config()).bfloat16().eval()
    cos, sin = backbone.rope_embeddings((4, 4), torch.bfloat16, CPU)
    exact_cos, exact_sin = rope(small_config(), (4, 4))
    assert torch.equal(cos, exact_cos.bfloat16())
    assert torch.equal(sin, exact_sin.bfloat16())


def test_rotary_angles_follow_rope_theta() -> None:
    slow, fast = (
        rope(small_config(rope_parameters={"rope_type": "default", "rope_theta": theta}), (3, 2))
        for theta in (100.0, 10.0)
    )
    assert not torch.allclose(slow[0], fast[0])


def test_only_patch_tokens_are_rotated() -> None:
    cos, sin = rope(small_config(), (2, 3))
    tokens = torch.randn(1, 2, 5 + 6, 16)
    rotated = rotate_patches(tokens.clone(), cos, sin)
    assert torch.equal(rotated[:, :, :5], tokens[:, :, :5])
    assert_close(rotated.norm(dim=-1), tokens.norm(dim=-1))  # a rotation keeps lengths
    assert not torch.allclose(rotated[:, :, 5:], tokens[:, :, 5:])


def test_positions_are_augmented_in_training_only() -> None:
    config = small_config(pos_embed_rescale=2.0, pos_embed_shift=0.1, pos_embed_jitter=1.5)
    assert torch.equal(rope(config, (4, 4))[0], rope(config, (4, 4))[0])
    assert not torch.equal(rope(config, (4, 4), train=True)[0], rope(config, (4, 4))[0])


def test_every_supported_activation_has_a_function() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_every_activation_is_that_of_transformers(name: str) -> None:
    x = torch.linspace(-20, 20, 401)
    assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=0, atol=2e-6)


def test_hidden_act_is_used_in_the_layers() -> None:
    layer: Any = Dinov3Backbone(small_config(hidden_act="silu")).layers[0]
    assert torch.equal(
        layer.mlp(x := torch.randn(3, 32)),
        layer.mlp.down_proj(F.silu(layer.mlp.up_proj(x))),
    )


@pytest.mark.parametrize("projection", ["query", "key", "value", "proj", "mlp"])
@pytest.mark.parametrize("gated", [False, True])
def test_each_bias_can_be_there_or_not(projection: str, gated: bool) -> None:
    parameters = {
        bias: dict(
            Dinov3Backbone(
                small_config(**{f"{projection}_bias": bias}, use_gated_mlp=gated)
            ).named_parameters()
        )
        for bias in (True, False)
    }
    modules = {
        "query": ["attention.q_proj"],
        "key": ["attention.k_proj"],
        "value": ["attention.v_proj"],
        "proj": ["attention.o_proj"],
        "mlp": ["mlp.up_proj", "mlp.down_proj"] + ["mlp.gate_proj"] * gated,
    }[projection]
    assert parameters[True].keys() - parameters[False].keys() == {
        f"layers.{layer}.{module}.bias" for layer in (0, 1) for module in modules
    }


@pytest.mark.parametrize("registers", [0, 1, 7])
@torch.inference_mode()
def test_any_number_of_registers_goes_through(registers: int) -> None:
    backbone = Dinov3Backbone(small_config(num_register_tokens=registers)).eval()
    assert backbone(torch.randn(2, 3, 32, 48)).shape == (2, 1 + registers + 2 * 3, 32)


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (8, 8)])
def test_a_size_that_patches_do_not_divide_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height} pixels high and {width} wide.* 16"):
        Dinov3Backbone(small_config())(torch.zeros(1, 3, height, width))


def test_rotary_positions_are_not_parameters() -> None:
    name = "tiny_panoptic_64"
    assert recorded_backbone(name).state_dict().keys() == backbone_state_dict(name).keys()


def test_remaining_paths_are_scaled_up_for_dropped_ones() -> None:
    config = small_config(drop_path_rate=0.5)
    layer: Any = Dinov3Backbone(config).train().layers[0]
    branch = layer.drop_path(torch.ones(1000, 1, 1))
    assert set(branch.unique().tolist()) == {0.0, 2.0}
    assert math.isclose(branch.mean().item(), 1, abs_tol=0.2)
