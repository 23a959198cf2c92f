"""What is in a file of weights."""

from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, NAMES

from converter.weights.inspection import decide, inspect, signs_of_a_delta
from converter.weights.tensorfiles import TensorFile


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_is_recognised_by_its_statistics(name: str) -> None:
    with TensorFile(FIXTURES / name / "delta" / "pytorch_model.bin") as file:
        found = inspect(file)

    assert (found.layout, found.weights, found.format) == ("eomt-tue", "delta", "torch")
    assert [sign.speaks_for for sign in found.evidence] == ["delta", "delta"]


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_is_absolute(name: str) -> None:
    with TensorFile(FIXTURES / name / "backbone" / "model.safetensors") as file:
        found = inspect(file)

    assert (found.layout, found.weights) == ("dinov3-transformers", "absolute")
    assert found.format == "safetensors"


def test_parameters_are_counted() -> None:
    with TensorFile(FIXTURES / "tiny_panoptic_64" / "backbone" / "model.safetensors") as file:
        found = inspect(file)
        counted = sum(info.size for info in file.tensors.values())

    assert found.parameters == counted
    assert found.tensors["embeddings.cls_token"] == ("F32", (1, 1, 64))


def written(folder: Path, std: float, norm: torch.Tensor) -> Path:
    torch.save(
        {
            "network.q.weight": torch.zeros(2, 4),
            "network.class_head.weight": torch.zeros(3, 4),
            "network.encoder.pixel_std": torch.full((1, 3, 1, 1), std),
            "network.encoder.backbone.norm.weight": norm,
        },
        folder / "weights.bin",
    )
    return folder / "weights.bin"


def test_absolute_weights_are_recognised_by_their_statistics(tmp_path: Path) -> None:
    with TensorFile(written(tmp_path, 0.225, torch.full((64,), 0.9))) as file:
        found = inspect(file)

    assert found.weights == "absolute"


def test_mixed_evidence_decides_nothing(tmp_path: Path) -> None:
    with TensorFile(written(tmp_path, 0.0, torch.full((64,), 0.9))) as file:
        signs = signs_of_a_delta(file)

    assert [sign.speaks_for for sign in signs] == ["delta", "absolute"]
    assert decide(signs) is None


def test_weights_of_an_unknown_layout_are_listed(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "other.pth")
    with TensorFile(tmp_path / "other.pth") as file:
        found = inspect(file)

    assert (found.layout, found.weights, found.parameters) == (None, None, 6)
    assert found.to_dict()["tensors"] == {"fc.weight": {"dtype": "F32", "shape": [2, 3]}}
