"""The plan: complete, or refused with the reason."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FIXTURES, NAMES
from small_models import small_config

from converter.configs import read_backbone_config
from converter.errors import PlanError
from converter.weights.backbones import config_from_shapes
from converter.weights.headers import TensorInfo
from converter.weights.layouts import BACKBONE_LAYOUTS, model_shapes, recognise, translate
from converter.weights.plan import Plan, make_plan
from converter.weights.tensorfiles import TensorFile
from reference_model import EomtDinov3ForUniversalSegmentation
from reference_model.config import Dinov3Config

LAYOUTS = json.loads((FIXTURES / "layouts.json").read_text())

Tensors = dict[str, TensorInfo]


def tensors(shapes: Mapping[str, list[int]]) -> Tensors:
    return {name: TensorInfo("F32", tuple(shape), 0) for name, shape in shapes.items()}


def config(backbone: str) -> Dinov3Config:
    values = dict(LAYOUTS["backbones"][backbone])
    del values["layouts"]
    return Dinov3Config.from_dict(values)


def backbone(name: str) -> Tensors:
    return tensors(LAYOUTS["backbones"][name]["layouts"]["transformers"])


def published(name: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = LAYOUTS["checkpoints"][name]
    return checkpoint


SMALL = published("coco_panoptic_eomt_small_640_dinov3")


def plan_of_small(base: Tensors | None = None, delta: Tensors | None = None) -> Plan:
    return make_plan(
        tensors(SMALL["delta"]) if delta is None else delta,
        backbone("vits16") if base is None else base,
        config("vits16"),
    )


PAIRS = [
    (name, layout)
    for name, checkpoint in LAYOUTS["checkpoints"].items()
    for layout in LAYOUTS["backbones"][checkpoint["backbone"]]["layouts"]
]


@pytest.mark.parametrize("known_config", [True, False])
@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_published_checkpoints_give_the_tensors_of_the_model_from_every_layout(
    name: str, layout: str, known_config: bool
) -> None:
    """With the backbone's config.json, or with what its shapes and the table of sizes give."""
    checkpoint = published(name)
    base = tensors(LAYOUTS["backbones"][checkpoint["backbone"]]["layouts"][layout])
    delta = tensors(checkpoint["delta"])
    plan = make_plan(delta, base, config(checkpoint["backbone"]) if known_config else None)

    assert {row.name: list(row.shape) for row in plan.rows} == checkpoint["converted"]
    assert plan.config.num_queries == checkpoint["num_queries"]
    assert plan.config.num_labels == checkpoint["num_classes"]
    assert plan.config.num_blocks == checkpoint["num_blocks"]


@pytest.mark.parametrize("name", LAYOUTS["checkpoints"])
def test_absolute_weights_give_the_same_tensors_without_a_backbone(name: str) -> None:
    checkpoint = published(name)
    plan = make_plan(tensors(checkpoint["delta"]), None, None)

    assert {row.name: list(row.shape) for row in plan.rows} == checkpoint["converted"]
    assert {row.operation for row in plan.rows} == {"copy", "zeros"}


@pytest.mark.parametrize("layout", ["transformers", "meta", "timm"])
@pytest.mark.parametrize("name", LAYOUTS["backbones"])
def test_the_config_of_every_size_is_derived_from_its_shapes(name: str, layout: str) -> None:
    known = LAYOUTS["backbones"][name]
    derived = config_from_shapes(
        translate(tensors(known["layouts"][layout]), BACKBONE_LAYOUTS[layout])
    )

    for key, value in known.items():
        if key != "layouts":
            assert getattr(derived, key) == value, key
    assert derived.hidden_act == ("silu" if known["use_gated_mlp"] else "gelu")


@pytest.mark.parametrize(
    ("layout", "recognised"),
    [
        ("transformers", "dinov3-transformers"),
        ("meta", "dinov3-meta"),
        ("meta_sat493m", "dinov3-meta"),
        ("timm", "dinov3-timm"),
        ("timm_qkvb", "dinov3-timm"),
    ],
)
def test_every_layout_is_recognised_by_its_names(layout: str, recognised: str) -> None:
    found = recognise(LAYOUTS["backbones"]["vitl16"]["layouts"][layout])

    assert found is not None
    assert found.name == recognised


def test_biases_that_a_file_leaves_out_are_zeros() -> None:
    plan = plan_of_small(base=tensors(LAYOUTS["backbones"]["vits16"]["layouts"]["timm"]))

    row = next(row for row in plan.rows if row.name == "layers.3.attention.v_proj.bias")
    assert row.recipe == ("zeros + delta:network.encoder.backbone.blocks.3.attention.v_proj.bias")


def test_a_fused_projection_is_taken_apart() -> None:
    plan = plan_of_small(base=tensors(LAYOUTS["backbones"]["vits16"]["layouts"]["meta"]))

    row = next(row for row in plan.rows if row.name == "layers.3.attention.v_proj.weight")
    assert row.recipe.startswith("backbone:blocks.3.attn.qkv.weight[3/3] + delta:")
    dropped = {str(entry.operand): entry.reason for entry in plan.dropped}
    assert "switches it off" in dropped["backbone:blocks.3.attn.qkv.bias[2/3]"]
    assert "rope_theta" in dropped["backbone:rope_embed.periods"]


def test_a_size_that_is_not_published_needs_a_config() -> None:
    base = backbone("vits16")
    for name in [name for name in base if name.startswith("layer.11.")]:
        del base[name]

    with pytest.raises(PlanError, match=r"384 wide, 11 layers.*no published backbone"):
        make_plan(tensors(SMALL["delta"]), base, None)


def test_prefixes_of_torch_compile_are_ignored() -> None:
    compiled = {
        name.replace("network.", "network._orig_mod."): shape
        for name, shape in SMALL["delta"].items()
    }

    plan = plan_of_small(delta=tensors(compiled))

    row = next(row for row in plan.rows if row.name == "query.weight")
    assert row.recipe == "delta:network._orig_mod.q.weight"


def test_a_duplicate_tensor_is_refused() -> None:
    delta = tensors(SMALL["delta"] | {"network._orig_mod.q.weight": [200, 384]})

    with pytest.raises(PlanError, match=r"are both query\.weight"):
        plan_of_small(delta=delta)


def test_a_converted_model_passes_through() -> None:
    plan = make_plan(tensors(SMALL["converted"]), None, config("vits16"))

    assert {row.name: list(row.shape) for row in plan.rows} == SMALL["converted"]
    assert plan.counts()["renamed"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_input_is_used_once_or_dropped_for_a_reason(name: str) -> None:
    folder = FIXTURES / name
    with (
        TensorFile(folder / "backbone" / "model.safetensors") as base,
        TensorFile(folder / "delta" / "pytorch_model.bin") as delta,
    ):
        plan = make_plan(
            delta.tensors, base.tensors, read_backbone_config(folder / "backbone" / "config.json")
        )
        given = [f"backbone:{n}" for n in base.tensors] + [f"delta:{n}" for n in delta.tensors]

    used = [str(operand) for row in plan.rows for operand in row.operands]
    dropped = [str(entry.operand) for entry in plan.dropped]
    assert sorted(used + dropped) == sorted(given)
    assert all(entry.reason for entry in plan.dropped)


def test_backbone_tensors_are_sums_and_heads_are_copies() -> None:
    rows = {row.name: row.recipe for row in plan_of_small().rows}

    assert rows["layers.3.norm1.bias"] == (
        "backbone:layer.3.norm1.bias + delta:network.encoder.backbone.blocks.3.norm1.bias"
    )
    assert rows["mask_head.fc2.weight"] == "delta:network.mask_head.2.weight"
    assert rows["attn_mask_probs"] == "zeros"


@pytest.mark.parametrize("classes", [10**12, 2**16 + 2])
def test_a_number_of_classes_beyond_the_limit_is_refused_at_once(classes: int) -> None:
    """An empty tensor of any length takes no room in a file; a name for each class would."""
    delta = tensors(SMALL["delta"])
    delta["network.class_head.weight"] = TensorInfo("F32", (classes, 0), 0)

    with pytest.raises(PlanError, match=r"num_labels is \d+; expected an integer from 1 to 65,536"):
        plan_of_small(delta=delta)


def test_class_weights_that_the_delta_lacks_are_made() -> None:
    delta = tensors(SMALL["delta"])
    del delta["criterion.empty_weight"]

    rows = {row.name: row for row in plan_of_small(delta=delta).rows}

    assert rows["criterion.empty_weight"].recipe == "ones, 0.1 last"
    assert rows["criterion.empty_weight"].shape == (134,)


def test_counts_add_up() -> None:
    assert plan_of_small().counts() == {
        "tensors": 231,
        "added": 210,
        "copied": 20,
        "filled": 1,
        "renamed": 229,
        "dropped": 4,
    }


def test_a_delta_for_another_backbone_is_refused_with_both_sizes() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(tensors(SMALL["delta"]), backbone("vitb16"), config("vitb16"))

    assert "[1, 1, 384]" in caught.value.message
    assert "[1, 1, 768]" in caught.value.message
    assert "it fits ViT-S (384 wide, 12 layers)" in caught.value.remedy
    assert "the given backbone is ViT-B (768 wide, 12 layers)" in caught.value.remedy


def test_a_gated_backbone_of_the_same_width_is_refused() -> None:
    with pytest.raises(PlanError, match=r"ViT-S\+ \(384 wide, 12 layers, gated\)"):
        make_plan(tensors(SMALL["delta"]), backbone("vits16plus"), config("vits16plus"))


def test_swapped_files_are_refused_as_swapped() -> None:
    with pytest.raises(PlanError, match="Are --delta and --backbone swapped"):
        make_plan(backbone("vits16"), tensors(SMALL["delta"]), config("vits16"))


def test_a_config_of_another_backbone_than_its_weights_is_named_as_the_cause() -> None:
    with pytest.raises(
        PlanError, match=r"config\.json describes ViT-B .* its weights are those of ViT-S"
    ):
        make_plan(tensors(SMALL["delta"]), backbone("vits16"), config("vitb16"))


@pytest.mark.parametrize(
    "name", ["layer.7.mlp.up_proj.weight", "norm.bias", "embeddings.register_tokens"]
)
def test_a_missing_backbone_tensor_is_named_with_its_shape(name: str) -> None:
    base = backbone("vits16")
    shape = list(base.pop(name).shape)

    with pytest.raises(PlanError, match="missing from the backbone") as caught:
        plan_of_small(base=base)
    assert str(shape) in caught.value.message


@pytest.mark.parametrize(
    "name", ["network.mask_head.4.bias", "network.encoder.backbone.blocks.11.norm2.weight"]
)
def test_a_missing_delta_tensor_is_named(name: str) -> None:
    delta = tensors(SMALL["delta"])
    del delta[name]

    with pytest.raises(PlanError, match="missing from the delta"):
        plan_of_small(delta=delta)


def test_a_tensor_that_is_left_over_is_named() -> None:
    delta = tensors(SMALL["delta"] | {"network.surprise": [3, 4]})

    with pytest.raises(PlanError, match=r"network\.surprise \[3, 4\] in the delta is unexpected"):
        plan_of_small(delta=delta)


def test_a_layer_too_many_is_left_over() -> None:
    extra = {"network.encoder.backbone.blocks.12.norm1.bias": [384]}

    with pytest.raises(PlanError, match=r"blocks\.12\.norm1\.bias \[384\] .* unexpected"):
        plan_of_small(delta=tensors(SMALL["delta"] | extra))


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    delta = tensors(SMALL["delta"] | {"network.q.weight": [200, 383]})

    with pytest.raises(PlanError, match=r"\[200, 383\], expected \[200, 384\]"):
        plan_of_small(delta=delta)


def test_integers_are_refused_as_weights() -> None:
    delta = tensors(SMALL["delta"])
    delta["network.q.weight"] = TensorInfo("I64", (200, 384), 0)

    with pytest.raises(PlanError, match=r"network\.q\.weight in the delta has dtype I64, expected"):
        plan_of_small(delta=delta)


def test_a_config_with_absurdly_many_layers_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000; expected an integer"):
        replace(config("vits16"), num_hidden_layers=10**9)

    with pytest.raises(PlanError, match="is missing from the backbone") as caught:
        make_plan(
            tensors(SMALL["delta"]),
            backbone("vits16"),
            replace(config("vits16"), num_hidden_layers=1000),
        )
    assert "384 wide, 1000 layers" in caught.value.remedy


def test_weights_with_more_blocks_than_layers_are_refused() -> None:
    delta = tensors(SMALL["delta"] | {"network.attn_mask_probs": [13]})

    with pytest.raises(PlanError, match="num_blocks is 13; expected at most the 12 hidden layers"):
        plan_of_small(delta=delta)


SWITCHES = ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("without", [(), *((switch,) for switch in SWITCHES), SWITCHES])
def test_names_and_shapes_are_those_of_the_reference_model(
    gated: bool, without: tuple[str, ...]
) -> None:
    switches = {switch: switch not in without for switch in SWITCHES}
    config = small_config(patch_size=32, num_register_tokens=3, use_gated_mlp=gated, **switches)
    with torch.device("meta"):
        state = EomtDinov3ForUniversalSegmentation(config).state_dict()

    assert model_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_a_file_of_no_known_layout_is_refused_with_what_it_has() -> None:
    with pytest.raises(PlanError, match=r"it has fc\.weight"):
        plan_of_small(delta=tensors({"fc.weight": [1]}))


def test_a_converted_model_is_not_taken_for_a_delta() -> None:
    with pytest.raises(PlanError, match="converted already"):
        plan_of_small(delta=tensors(SMALL["converted"]))
