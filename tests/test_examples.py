"""The examples: a fine-tune, and the way to its delta and back."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune
import numpy as np
import pytest
import scenes
import torch
from conftest import HANGS
from crops import Crops
from PIL import Image
from safetensors.torch import load_file
from small_models import small_model

from converter.pictures.datasets import Example, Segments
from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four annotated scenes to train on, and two to measure with."""
    folder = tmp_path_factory.mktemp("scenes")
    for number, (part, count) in enumerate({"train": 4, "val": 2}.items()):
        scenes.write(folder / part, count, np.random.default_rng(number))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the two classes LABEL_0 and LABEL_1."""
    folder = tmp_path_factory.mktemp("model")
    small_model(train_num_points=100).save_pretrained(folder)
    EomtImageProcessor(size={"height": 64, "width": 64}, do_pad=True).save_pretrained(folder)
    return folder


def train(
    monkeypatch: pytest.MonkeyPatch, model: Path, data: Path, output: Path, *options: str
) -> None:
    arguments: list[Any] = ["finetune.py", model, "--output", output, "--workers", "0"]
    arguments += ["--train", data / "train", "--val", data / "val", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), *options])
    finetune.main()


@pytest.mark.smoke
def test_a_fine_tune_becomes_a_delta_and_a_model_again(tmp_path: Path) -> None:
    scripts = sysconfig.get_path("scripts")
    process = subprocess.run(
        ["/bin/sh", EXAMPLES / "circle.sh", "circle", "--steps", "3", "--batch-size", "1"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )

    assert process.returncode == 0, process.stderr
    # a conversion, its delta, and the model made of it; between them one without a recording
    assert re.findall(r"^verdict +(\w+)", process.stdout, re.M) == [
        "passed",
        "passed",
        "unverified",
        "unverified",
        "passed",
    ]
    tuned, home = (
        EomtDinov3ForUniversalSegmentation.from_pretrained(tmp_path / "circle" / folder)
        for folder in ("run/model", "model")
    )
    assert tuple(home.config.id2label.values()) == tuple(scenes.CLASSES)
    assert home.config.stuff_classes == (4, 5, 6)
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(home.state_dict()[name], value, rtol=0, atol=1e-7)


def test_a_training_that_is_stopped_goes_on_as_if_it_was_not(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--steps", "6", "--save-every", "2")
    train(monkeypatch, model, data, tmp_path / "whole", *options)

    with monkeypatch.context() as patch:
        save = finetune.save

        def save_and_stop(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(finetune, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(patch, model, data, tmp_path / "stopped", *options)
    assert not (tmp_path / "stopped/model").exists()
    # blocks fade out from step 1 to 3, and from 3 to 4
    state = load_file(tmp_path / "stopped/checkpoint-2/model.safetensors")
    assert state["attn_mask_probs"].tolist() == pytest.approx([0.5**0.9, 1])
    train(monkeypatch, model, data, tmp_path / "stopped", *options, "--resume")

    whole, stopped = (
        (
            json.loads((tmp_path / name / "checkpoint-6/progress.json").read_text())["losses"],
            load_file(tmp_path / name / "model/model.safetensors"),
        )
        for name in ("whole", "stopped")
    )
    assert stopped[0] == whole[0]
    assert len(whole[0]) == 6
    torch.testing.assert_close(stopped[1], whole[1], rtol=0, atol=0)
    assert not whole[1]["attn_mask_probs"].any()
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        "checkpoint-6",
        "evaluation.json",
        "loss.png",
        "model",
    }
    with Image.open(tmp_path / "stopped/loss.png") as picture:
        assert min(picture.size) > 300

    with pytest.raises(SystemExit, match=r"made with another lr: 0\.0002"):
        train(monkeypatch, model, data, tmp_path / "stopped", *options, "--resume", "--lr", "1")


def test_learning_rates_are_those_of_the_original() -> None:
    # configs/dinov3/coco/panoptic/eomt_large_640.yaml, with fewer layers
    args = Namespace(lr=2e-4, llrd=0.8, warmup=(2000, 3000), steps=88716)
    model = small_model(num_hidden_layers=5, num_blocks=2)
    optimizer, schedule = finetune.optimizer_and_schedule(model, args)

    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {
        names[parameter]: group["initial_lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates.keys() == set(names.values())
    assert {name.split(".")[0]: rate for name, rate in rates.items() if "layers" not in name} == {
        "embeddings": 2e-4 * 0.8**4,
        "layernorm": 2e-4,
        "query": 2e-4,
        "class_predictor": 2e-4,
        "mask_head": 2e-4,
        "upscale_block": 2e-4,
    }
    by_layer = {int(name.split(".")[1]): rate for name, rate in rates.items() if "layers." in name}
    assert by_layer == {
        0: 2e-4 * 0.8**4,
        1: 2e-4 * 0.8**3,
        2: 2e-4 * 0.8**2,
        3: 2e-4,
        4: 2e-4,
    }

    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}

    # training/two_stage_warmup_poly_schedule.py
    for step, backbone, other in (
        (0, 0, 0),
        (1000, 0, 0.5),
        (2000, 0, 1),
        (3500, 0.5, (1 - 1500 / 86716) ** 0.9),
        (5000, 1, (1 - 3000 / 86716) ** 0.9),
        (46858, 0.5**0.9, (1 - 44858 / 86716) ** 0.9),
        (88716, 0, 0),
    ):
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            for parameter in group["params"]:
                is_backbone = names[parameter].startswith(("embeddings", "layers", "layernorm"))
                assert factor(step) == pytest.approx(backbone if is_backbone else other)


def test_masks_and_classes_are_cropped_with_a_picture_that_has_some() -> None:
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
    ids = np.full((40, 60), -1)
    ids[:20, :30], ids[:20, 30:], ids[20:, :30] = 0, 1, 2
    example = Example(
        Image.fromarray(colours[ids + 1]), Segments(ids, (5, 3, 4), (False, False, True))
    )
    processor = EomtImageProcessor(
        size={"height": 64, "width": 64}, image_mean=(0, 0, 0), image_std=(1, 1, 1)
    )
    crowds = replace(example, target=replace(example.target, crowd=(True, True, True)))
    pictures: Any = type("Pictures", (list,), {"read": list.__getitem__})([crowds, example])
    crops = Crops(pictures, processor, Namespace(seed=0, scale=(0.5, 2.5)), 40)

    shapes, seen = set(), set()
    for number in range(len(crops)):
        item = crops[number]
        shapes.add(tuple(item["pixel_values"].shape))
        assert item["mask_labels"].shape == (len(item["class_labels"]), 64, 64)
        for mask, label in zip(item["mask_labels"], item["class_labels"].tolist(), strict=True):
            seen.add(label)
            channel = {5: 0, 3: 1}[label]  # the crowd has no mask
            values = item["pixel_values"][channel] * 255
            # bilinear and nearest resizing place an edge alike, to half the colour, save in corners
            assert (values[mask] < 99).sum() <= 4
            assert (values[~mask] > 101).sum() <= 4
    assert shapes == {(3, 64, 64)}
    assert seen == {3, 5}

    pictures.remove(example)
    with pytest.raises(ValueError, match="no picture has a segment"):
        crops[0]
