"""Checkpoints of LightlyTrain: their weights in TU/e's form give the same model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import FIXTURES
from test_layouts import absolute

import converter
from converter.errors import PlanError, UnreadableFileError, UsageError
from converter.files import sha256

NAME = "tiny_panoptic_64"
CLASS_PATH = (
    "lightly_train._task_models.dinov3_eomt_{0}_segmentation.task_model.DINOv3EoMT{1}Segmentation"
)
THINGS = {1: "cat", 2: "dog", 7: "tree", 90: "toothbrush"}
STUFF = {3: "sky", 200: "sea", 92: "banner"}
ARGUMENTS: dict[str, Any] = {
    "model_name": "dinov3/vits16-eomt",
    "thing_classes": THINGS,
    "stuff_classes": STUFF,
    "image_size": (64, 64),
    "image_normalize": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "num_queries": 16,
    "num_joint_blocks": 2,
    "backbone_freeze": False,
    "backbone_args": None,
}

# names in a layer of TU/e's layout, and LightlyTrain's
IN_LAYER = {
    "norm1": "norm1",
    "attention.o_proj": "attn.proj",
    "norm2": "norm2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
OUTSIDE = {
    "network.encoder.backbone.patch_embed.cls_token": "backbone.cls_token",
    "network.encoder.backbone.patch_embed.register_tokens": "backbone.storage_tokens",
    "network.encoder.backbone.patch_embed.patch_embeddings.": "backbone.patch_embed.proj.",
    "network.encoder.backbone.norm.": "backbone.norm.",
    "network.q.": "queries.",
    "network.class_head.": "class_head.",
    "network.mask_head.": "mask_head.",
    "network.upscale.": "upscale.",
}
LAYER = "network.encoder.backbone.blocks."


def lightly_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in TU/e's form under the names of LightlyTrain."""
    renamed = {
        name.replace(theirs, ours): values
        for name, values in state.items()
        for theirs, ours in OUTSIDE.items()
        if name.startswith(theirs)
    }
    size = state["network.q.weight"].shape[1]
    for number in sorted({name.split(".")[4] for name in state if name.startswith(LAYER)}):
        of, block = f"{LAYER}{number}.", f"backbone.blocks.{number}."
        for theirs, ours in IN_LAYER.items():
            for kind in ("weight", "bias"):
                renamed[f"{block}{ours}.{kind}"] = state[f"{of}{theirs}.{kind}"]
        for scale in "12":
            renamed[f"{block}ls{scale}.gamma"] = state[f"{of}layer_scale{scale}.lambda1"]
        query, key, value = (f"{of}attention.{part}_proj." for part in "qkv")
        weights = [state[f"{part}weight"] for part in (query, key, value)]
        biases = [state[f"{query}bias"], torch.ones(size), state[f"{value}bias"]]
        mask = [torch.ones(size), torch.zeros(size), torch.ones(size)]
        renamed[f"{block}attn.qkv.weight"] = torch.cat(weights)
        renamed[f"{block}attn.qkv.bias"] = torch.cat(biases)
        renamed[f"{block}attn.qkv.bias_mask"] = torch.cat(mask)
    return renamed | {
        "backbone.mask_token": torch.zeros(1, size),
        "backbone.rope_embed.periods": torch.ones(4),
    }


def written(folder: Path, task: str = "panoptic", **changes: Any) -> Path:
    """A file as LightlyTrain exports it; ``changes`` of its arguments, None to leave one out."""
    state = absolute(NAME)
    weights = {f"model.{name}": values for name, values in lightly_names(state).items()}
    criterion = {name: values for name, values in state.items() if name.startswith("criterion.")}
    content = {
        "model_class_path": CLASS_PATH.format(task, task.capitalize()),
        "model_init_args": {
            name: value for name, value in {**ARGUMENTS, **changes}.items() if value is not None
        },
        "train_model": weights | criterion,
        "license_info": "",
    }
    torch.save(content, folder / "exported_best.pt")
    return folder / "exported_best.pt"


OPTIONS: dict[str, Any] = {
    "backbone_config": FIXTURES / NAME / "backbone" / "config.json",
    "verify": False,
}


def convert(file: Path, output: Path, **options: Any) -> converter.Conversion:
    return converter.convert(output=output, delta=str(file), **{**OPTIONS, **options})


def test_the_model_is_that_of_the_same_weights_in_tues_form(tmp_path: Path) -> None:
    torch.save(absolute(NAME), tmp_path / "tue.pth")
    categories = [
        {"id": number, "name": name, "isthing": int(number < 4)}
        for number, name in enumerate([*THINGS.values(), *STUFF.values()])
    ]
    (tmp_path / "labels.json").write_text(json.dumps({"categories": categories}))
    given = {"task": "panoptic", "image_size": 64, "labels": tmp_path / "labels.json"}
    convert(tmp_path / "tue.pth", tmp_path / "expected", **given)

    found = convert(written(tmp_path), tmp_path / "found")

    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert sha256(tmp_path / "found" / name) == sha256(tmp_path / "expected" / name)
    history = json.loads((tmp_path / "found" / "conversion.json").read_text())
    assert (history["task"], history["weights"]) == ("panoptic", "absolute")
    assert history["category_ids"] == [*THINGS, *STUFF]
    assert found.inputs.settings is not None


def test_it_passes_against_the_recording_and_verify_finds_its_source(tmp_path: Path) -> None:
    """The recorded network is TU/e's, so only the epsilon of the file's own differs."""
    file, recorded = written(tmp_path), FIXTURES / NAME
    made = convert(file, tmp_path / "out", verify=True, recorded=recorded)
    again = converter.verify(tmp_path / "out", recorded=recorded, delta=str(file))

    assert (made.verdict.verdict, again.verdict) == ("passed", "passed")
    assert {level.level: level.status for level in again.levels}["arithmetic"] == "passed"


def test_size_and_normalisation_are_the_files(tmp_path: Path) -> None:
    statistics = {"mean": [0.5, 0.4, 0.3], "std": [1, 0.2, 0.1]}
    changes: dict[str, Any] = {"image_size": [32, 48], "image_normalize": statistics}
    convert(written(tmp_path, **changes, backbone_args={"patch_size": 16}), tmp_path / "out")

    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 48}
    assert (processor["image_mean"], processor["image_std"]) == ([0.5, 0.4, 0.3], [1.0, 0.2, 0.1])


def test_options_come_before_what_the_file_says(tmp_path: Path) -> None:
    conversion = convert(written(tmp_path), tmp_path / "out", image_size=32, task="instance")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (conversion.inputs.task, config["image_size"]) == ("instance", 32)
    assert config["stuff_classes"] == []


def test_what_the_file_says_comes_before_the_catalogue(tmp_path: Path) -> None:
    conversion = converter.convert(
        NAME, tmp_path / "out", delta=str(written(tmp_path, image_size=(32, 32))), verify=False
    )

    assert conversion.inputs.image_size == (32, 32)
    assert conversion.classes.names[0] == "cat"


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_other_tasks_have_one_list_of_classes(task: str, tmp_path: Path) -> None:
    file = written(tmp_path, task, classes=THINGS | STUFF, thing_classes=None, stuff_classes=None)
    conversion = convert(file, tmp_path / "out")

    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert conversion.inputs.task == task
    assert conversion.classes.names == tuple((THINGS | STUFF).values())
    assert processor["do_split_image"] == (task == "semantic")


def test_the_difference_from_lightlytrains_network_is_said(
    tmp_path: Path, command: Callable[..., Result]
) -> None:
    result = command(
        *("--delta", written(tmp_path), "--backbone-config", OPTIONS["backbone_config"]),
        *("--output", tmp_path / "out"),
    )

    assert "verdict   unverified" in result.stdout
    assert "Warning: LightlyTrain's upscaling blocks have the layer norm epsilon" in result.stderr
    assert "warning   LightlyTrain's upscaling blocks" in result.stdout
    (warning,) = json.loads((tmp_path / "out" / "conversion.json").read_text())["warnings"]
    assert warning.startswith("LightlyTrain's upscaling blocks")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_joint_blocks": 0}, "num_joint_blocks is 0; expected a number above 0"),
        ({"image_size": (64,)}, r"image_size is \(64,\); expected 2 positive numbers"),
        ({"image_size": "64"}, "image_size is '64'; expected 2 positive numbers"),
        ({"image_normalize": {}}, "mean is None; expected 3 positive numbers"),
        ({"stuff_classes": ["sky"]}, r"stuff_classes is \['sky'\]; expected a dict"),
        ({"stuff_classes": {1: "sky"}}, "category ids in exported_best.pt are not valid"),
        ({"backbone_args": {"n_storage_tokens": 3}}, "its backbone_args have n_storage_tokens"),
    ],
)
def test_arguments_that_are_not_lightlytrains_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnreadableFileError, match=said):
        convert(written(tmp_path, **changes), tmp_path / "out")


def test_weights_without_the_arguments_are_refused(tmp_path: Path) -> None:
    torch.save(lightly_names(absolute(NAME)), tmp_path / "weights.pt")
    with pytest.raises(UnreadableFileError, match="it has no model_init_args"):
        convert(tmp_path / "weights.pt", tmp_path / "out")


def test_the_weights_are_not_added_to_a_backbone(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="LightlyTrain's layout, which are absolute"):
        converter.convert(
            NAME, tmp_path / "out", delta=str(written(tmp_path)), weights="delta", verify=False
        )


def test_a_delta_is_made_of_the_converted_model_only(tmp_path: Path) -> None:
    backbone = FIXTURES / NAME / "backbone"
    with pytest.raises(UsageError, match="in LightlyTrain's layout"):
        converter.make_delta(written(tmp_path), backbone, tmp_path / "delta")
