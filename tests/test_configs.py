"""config.json and preprocessor_config.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

from converter.catalog import Task
from converter.class_names import ClassNames
from converter.configs import (
    model_config,
    preprocessor_config,
    read_backbone_config,
    read_model_config,
)
from converter.errors import UnreadableFileError
from reference_model.config import EomtDinov3Config

SMALL = EomtDinov3Config(
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    intermediate_size=1536,
    num_blocks=3,
)


def config_with(folder: Path, **changes: Any) -> Path:
    values = json.loads((FIXTURES / "tiny_panoptic_64" / "backbone" / "config.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (values | changes).items() if v != "absent"}))
    return path


def test_a_backbone_config_is_read(tmp_path: Path) -> None:
    config = read_backbone_config(config_with(tmp_path))

    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 4, 4)
    assert (config.patch_size, config.rope_theta, config.layer_norm_eps) == (16, 100.0, 1e-5)


def test_the_rotary_base_is_found_where_transformers_5_keeps_it(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 50.0}
    path = config_with(tmp_path, rope_theta="absent", rope_parameters=rope)

    assert read_backbone_config(path).rope_theta == 50.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "vit"}, "is 'vit', expected 'dinov3_vit'"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected an integer"),
        ({"hidden_size": True}, "hidden_size is True; expected an integer"),
        ({"hidden_act": "gluu"}, "hidden_act is 'gluu'; expected a supported activation: gelu, "),
        ({"use_gated_mlp": 1}, "use_gated_mlp is 1; expected true or false"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer from 1"),
        ({"num_attention_heads": 7}, "hidden_size is 64; expected a multiple of 7 heads"),
        ({"patch_size": 14}, "patch_size is 14; expected a power of two"),
        ({"patch_size": [16, 16]}, r"patch_size is \[16, 16\]; expected a power of two"),
        ({"rope_theta": "100"}, "rope_theta is '100'; expected a positive number"),
    ],
)
def test_invalid_values_are_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    path = config_with(tmp_path, **changes)

    with pytest.raises(UnreadableFileError, match=complaint) as caught:
        read_backbone_config(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(UnreadableFileError):
        read_backbone_config(tmp_path / "config.json")


def test_what_a_config_leaves_out_is_the_default_of_its_own_kind(tmp_path: Path) -> None:
    absent = dict.fromkeys(("layer_norm_eps", "num_register_tokens"), "absent")
    backbone = read_backbone_config(config_with(tmp_path, **absent))
    model = read_model_config(config_with(tmp_path, model_type="eomt_dinov3", **absent))

    assert (backbone.layer_norm_eps, backbone.num_register_tokens) == (1e-5, 0)
    assert (model.layer_norm_eps, model.num_register_tokens) == (1e-6, 4)


def test_classes_are_in_id2label_and_label2id() -> None:
    config = model_config(SMALL, (640, 640), ClassNames(("cat", "sky"), (1,)))

    assert config["id2label"] == {"0": "cat", "1": "sky"}
    assert config["label2id"] == {"cat": 0, "sky": 1}
    assert config["stuff_classes"] == [1]


def test_a_square_size_is_one_number_and_any_other_is_two() -> None:
    classes = ClassNames(("cat", "sky"))

    assert model_config(SMALL, (640, 640), classes)["image_size"] == 640
    assert model_config(SMALL, (480, 640), classes)["image_size"] == [480, 640]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_pictures_are_padded_for_panoptic_and_instance_segmentation(task: Task) -> None:
    config = preprocessor_config(task, (640, 640))

    assert config["size"] == {"shortest_edge": 640, "longest_edge": 640}
    assert (config["do_pad"], config["do_split_image"]) == (True, False)


def test_windows_slide_over_pictures_for_semantic_segmentation() -> None:
    config = preprocessor_config("semantic", (512, 512))

    assert config["size"] == {"shortest_edge": 512, "longest_edge": None}
    assert (config["do_pad"], config["do_split_image"]) == (False, True)


def test_a_size_that_is_not_square_is_height_and_width() -> None:
    assert preprocessor_config("panoptic", (48, 80))["size"] == {"height": 48, "width": 80}


def test_files_of_a_conversion_carry_the_recorded_sizes(converted: Callable[[str], Path]) -> None:
    folder = converted("tiny_panoptic_48x80")

    config = json.loads((folder / "config.json").read_text())
    assert config["image_size"] == [48, 80]
    assert (config["num_queries"], config["num_blocks"], config["num_upscale_blocks"]) == (8, 1, 2)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100.0}
    assert "rope_theta" not in config
