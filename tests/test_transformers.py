"""What transformers makes of a converted folder."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file
from transformers import EomtDinov3ForUniversalSegmentation, EomtImageProcessorPil

pytestmark = pytest.mark.numbers

SQUARE = ("shapes_panoptic_128", "tiny_panoptic_64", "tiny_semantic_48")
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _without_progress_bars() -> None:
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("name", SQUARE)
def test_transformers_loads_every_key_without_a_warning(
    name: str, converted: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded: Any = EomtDinov3ForUniversalSegmentation.from_pretrained(
                converted(name), output_loading_info=True
            )
            model, info = loaded
    finally:
        logger.removeHandler(caplog.handler)

    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert not any(info.values())
    assert model.dtype == torch.float32
    assert (
        model.config.stuff_classes
        == json.loads((FIXTURES / name / "recorded.json").read_text())["stuff_classes"]
    )


@pytest.mark.parametrize("name", SQUARE)
def test_transformers_computes_what_was_recorded(
    name: str, converted: Callable[[str], Path]
) -> None:
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    processor = EomtImageProcessorPil.from_pretrained(converted(name))
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(converted(name)).eval()
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)

    with torch.inference_mode():
        output = model((recorded["pixels"] * processor.rescale_factor - mean) / std)

    difference = (output.masks_queries_logits - recorded["mask_logits"]).abs().max()
    assert difference <= TOLERANCE
    difference = (output.class_queries_logits - recorded["class_logits"]).abs().max()
    assert difference <= TOLERANCE


def test_class_names_reach_the_config(converted: Callable[[str], Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(converted("shapes_panoptic_128"))

    assert config.id2label[3] == "sky"
    assert config.label2id["sand"] == 5
    assert config.num_labels == 6
    assert config.stuff_classes == [3, 4, 5]


def test_the_processor_pads_panoptic_pictures(converted: Callable[[str], Path]) -> None:
    processor = EomtImageProcessorPil.from_pretrained(converted("shapes_panoptic_128"))

    inputs = processor(images=Image.new("RGB", (160, 96)), return_tensors="pt")

    assert inputs["pixel_values"].shape == (1, 3, 128, 128)


def test_the_processor_slides_windows_over_semantic_pictures(
    converted: Callable[[str], Path],
) -> None:
    processor = EomtImageProcessorPil.from_pretrained(converted("tiny_semantic_48"))

    inputs = processor(images=Image.new("RGB", (96, 48)), return_tensors="pt")

    assert inputs["pixel_values"].shape == (2, 3, 48, 48)
