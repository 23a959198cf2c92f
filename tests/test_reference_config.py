"""EomtDinov3Config: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from recorded_models import NAMES, config_values
from transformers import DINOv3ViTConfig
from transformers import EomtDinov3Config as TransformersConfig

from reference_model import EomtDinov3Config
from reference_model.allowed import ALLOWED
from reference_model.config import Dinov3Config

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_blocks": 1,
    "image_size": 64,
}


@pytest.mark.parametrize("given", [{}, {"rope_type": "default"}, {"rope_theta": 100}])
def test_rope_parameters_that_are_not_given_have_their_defaults(given: dict[str, Any]) -> None:
    config = EomtDinov3Config(rope_parameters=given)

    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100.0}
    assert config.rope_theta == 100.0


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    config = EomtDinov3Config.from_dict(config_values(name))
    config.save_pretrained(tmp_path)
    assert EomtDinov3Config.from_pretrained(tmp_path) == config
    assert EomtDinov3Config.from_dict(config.to_dict()) == config


def test_keys_and_defaults_are_those_of_transformers() -> None:
    theirs = json.loads(TransformersConfig().to_json_string(use_diff=True))
    theirs.pop("transformers_version")
    ours = json.loads(json.dumps(EomtDinov3Config().to_dict()))
    assert {key: ours[key] for key in theirs} == theirs
    assert ours.keys() - theirs.keys() == {"id2label", "label2id"}


def test_a_backbones_defaults_are_those_of_transformers() -> None:
    theirs = DINOv3ViTConfig().to_dict()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ours = Dinov3Config(**{key: theirs[key] for key in sizes})
    shared = {entry.name for entry in fields(Dinov3Config)} - {"rope_parameters"}
    assert {key: getattr(ours, key) for key in shared} == {key: theirs[key] for key in shared}
    assert ours.rope_theta == theirs["rope_theta"]


def test_a_size_that_a_backbone_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"^it lacks intermediate_size$"):
        Dinov3Config.from_dict({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})


def test_the_table_has_the_valid_values_of_every_field() -> None:
    own = {entry.name for entry in fields(EomtDinov3Config)} - {"extra"}
    assert own <= ALLOWED.keys()
    assert {key for key in ALLOWED if "." not in key} - own == {"rope_theta"}


HOSTILE: list[Any] = [None, True, -1, 0, 10**330, float("nan"), float("inf"), "16", "\ud800"]
HOSTILE += [[], [None], [[]], [1, 2, 3], ["gelu"], {}, {"0": None}, {"0": []}, {"rope_theta": {}}]


@pytest.mark.parametrize("kind", [Dinov3Config, EomtDinov3Config])
@pytest.mark.parametrize("key", [key for key in ALLOWED if "." not in key])
def test_any_value_of_a_key_is_accepted_or_refused_by_name(
    kind: type[Dinov3Config], key: str
) -> None:
    complaints = []
    for value in HOSTILE:
        try:
            kind.from_dict({**SMALL, key: value})
        except ValueError as error:
            complaints.append(str(error))
    assert len(complaints) > len(HOSTILE) / 2
    assert all(re.match(rf"{key}[\w.]* is .*; expected ", complaint) for complaint in complaints)


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    config = EomtDinov3Config(**SMALL, id2label={0: "sky", 1: "sea", 2: "sand"}, stuff_classes=(1,))
    config.save_pretrained(tmp_path)
    theirs = TransformersConfig.from_pretrained(tmp_path)
    assert theirs.hidden_size == 32
    assert theirs.id2label == {0: "sky", 1: "sea", 2: "sand"}
    assert theirs.stuff_classes == [1]


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    EomtDinov3Config.from_dict({**SMALL, "_source": {"commit": "abc"}}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_source"] == {"commit": "abc"}
    assert EomtDinov3Config.from_pretrained(tmp_path).extra["_source"] == {"commit": "abc"}


def test_class_ids_are_numbers_in_python_and_text_in_json(tmp_path: Path) -> None:
    config = EomtDinov3Config.from_dict({"id2label": {"0": "Öl", "1": "sea"}})
    assert config.id2label == {0: "Öl", 1: "sea"}
    assert config.num_labels == 2
    assert config.label2id == {"Öl": 0, "sea": 1}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "Öl", "1": "sea"}


def test_num_labels_gives_unnamed_classes() -> None:
    assert EomtDinov3Config.from_dict({"num_labels": 3}).id2label == {
        0: "LABEL_0",
        1: "LABEL_1",
        2: "LABEL_2",
    }


def test_stuff_classes_may_be_absent() -> None:
    assert EomtDinov3Config.from_dict({}).stuff_classes is None
    assert "stuff_classes" not in EomtDinov3Config.from_dict({}).to_dict()


def test_a_height_and_a_width_are_kept() -> None:
    assert EomtDinov3Config.from_dict({"image_size": [48, 80]}).image_size == (48, 80)


@pytest.mark.parametrize(
    ("patch_size", "blocks"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 2), (32, 3), (64, 4)]
)
def test_upscaling_follows_from_the_patch_size(patch_size: int, blocks: int) -> None:
    assert EomtDinov3Config(patch_size=patch_size).num_upscale_blocks == blocks


@pytest.mark.parametrize("key", ["layerscale_value", "layer_norm_eps", "pos_embed_rescale"])
def test_an_integer_is_accepted_for_a_float(key: str) -> None:
    assert type(getattr(EomtDinov3Config.from_dict({key: 1}), key)) is float


def test_given_upscaling_is_kept() -> None:
    assert EomtDinov3Config(patch_size=16, num_upscale_blocks=3).num_upscale_blocks == 3


def test_a_rope_theta_of_an_older_config_is_used() -> None:
    config = EomtDinov3Config.from_dict({"rope_theta": 50.0})
    assert config.rope_theta == 50
    assert config.to_dict()["rope_parameters"] == {"rope_type": "default", "rope_theta": 50.0}
    assert "rope_theta" not in config.to_dict()


def test_rope_parameters_win_over_an_older_rope_theta() -> None:
    values = {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}
    assert EomtDinov3Config.from_dict(values).rope_theta == 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 33),
        ("hidden_size", 4 * 3),  # 6 dimensions per head cannot hold two coordinates' angles
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("intermediate_size", 1.5),
        ("num_register_tokens", -1),
        ("num_queries", 0),
        ("num_blocks", 3),
        ("num_blocks", 0),
        ("num_upscale_blocks", 0),
        ("patch_size", 14),
        ("patch_size", [16, 16]),
        ("image_size", 100),
        ("image_size", [64]),
        ("image_size", [64, 70]),
        ("hidden_act", "gluu"),
        ("hidden_act", ["gelu"]),
        ("mlp_bias", "yes"),
        ("attention_dropout", 1.0),
        ("layer_norm_eps", "tiny"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 100.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}),
        ("hidden_size", 2**40),
        ("num_hidden_layers", 10_000_000),
        ("num_upscale_blocks", 10_000_000),
        ("num_register_tokens", 10**30),
        ("num_labels", 10**12),
        ("image_size", 2**40),
        ("layerscale_value", float("inf")),
        ("layer_norm_eps", float("nan")),
        ("pos_embed_rescale", float("inf")),
        ("id2label", {"0": "sky", "2": "sea"}),
        ("id2label", {"zero": "sky"}),
        ("id2label", {}),
        ("stuff_classes", [2]),
        ("stuff_classes", "all"),
        ("num_labels", "many"),
        ("model_type", "eomt"),
    ],
)
def test_an_invalid_value_is_refused_by_key_and_value(key: str, value: Any) -> None:
    shown = list(value.values()) if isinstance(value, dict) and key != "id2label" else [value]
    with pytest.raises(ValueError, match=f"^{key}") as caught:
        EomtDinov3Config.from_dict({**SMALL, key: value})
    assert any(repr(part) in str(caught.value) for part in shown)


def test_a_class_name_that_is_not_text_is_refused() -> None:
    for name in ([1], None, "\ud800"):
        with pytest.raises(ValueError, match=r"^id2label\.0 is .* expected a name"):
            EomtDinov3Config.from_dict({"id2label": {"0": name}})


def test_an_unknown_activation_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gluu'.*gelu.*silu"):
        EomtDinov3Config(hidden_act="gluu")


def test_a_number_of_labels_that_contradicts_the_names_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels is 3"):
        EomtDinov3Config.from_dict({"id2label": {"0": "sky"}, "num_labels": 3})


@pytest.mark.parametrize("text", ["[]", "{", '{"patch_size": 3}'])
def test_a_bad_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        EomtDinov3Config.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        EomtDinov3Config.from_pretrained(tmp_path)
