"""The reference model beside the installed transformers."""

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

import converter
from converter.checks.verdict import Level, Verdict
from converter.errors import UsageError

pytestmark = pytest.mark.numbers

TRANSFORMERS = f"transformers {version('transformers')}"


def peers(found: Verdict) -> Level:
    return next(level for level in found.levels if level.level == "peers")


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48"])
def test_transformers_agrees_layer_by_layer(name: str, converted: Callable[[str], Path]) -> None:
    level = peers(converter.verify(converted(name), against="transformers", level=4))

    assert level.status == "passed"
    assert level.reason == ""
    layers = {n for n in load_file(FIXTURES / name / "recorded.safetensors") if "hidden_" in n}
    layers = {n for n in layers if not n.startswith("backbone.")}
    logits = {"patch_embeddings", "class_logits", "mask_logits"}
    assert set(level.figures["compared"]) == layers | logits
    assert level.figures["max_abs"] < 1e-4
    assert (level.figures["peer"], level.figures["version"]) == tuple(TRANSFORMERS.split())


def test_where_transformers_is_wrong_the_recorded_original_decides(
    converted: Callable[[str], Path],
) -> None:
    found = converter.verify(converted("tiny_instance_64_gated"), against="transformers")

    level = peers(found)
    assert found.verdict == "passed"
    assert level.status == "passed"
    assert level.reason.startswith(f"{TRANSFORMERS} is wrong here, by up to 10.5 in mask_logits")
    assert "silu in the mask head and in upscaling, where the original applies GELU" in level.reason
    assert level.figures["compared"]["class_logits"]["max_abs"] < 1e-4


def test_without_a_recording_random_pixels_are_used(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(converted("tiny_panoptic_64"), model)
    (model / "conversion.json").unlink()

    found = converter.verify(model, against="transformers", level=4)

    assert peers(found).status == "passed"
    assert found.verdict == "unverified"  # both implementations may have the same fault


def test_without_a_recording_any_difference_fails(
    converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model, other):
        shutil.copytree(converted("tiny_panoptic_64"), folder)
        (folder / "conversion.json").unlink()
    state = load_file(other / "model.safetensors")
    state["layers.2.norm1.bias"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("converter.checks.peers._load", _load_from(other))

    level = peers(converter.verify(model, against="transformers", level=4))

    assert level.status == "failed"
    assert f"Ours and {TRANSFORMERS} differ: hidden_states.2" in level.reason


def _load_from(folder: Path) -> Callable[[Path], object]:
    from converter.checks.peers import _load

    return lambda _: _load(folder)


def test_pictures_that_are_not_square_are_not_checked(converted: Callable[[str], Path]) -> None:
    level = peers(
        converter.verify(converted("tiny_panoptic_48x80"), against="transformers", level=4)
    )

    assert level.status == "not checked"
    assert "square" in level.reason


@pytest.mark.parametrize("package", ["transformers", "scipy"])
def test_a_missing_package_is_named(
    package: str, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "converter.checks.peers.find_spec", lambda name: None if name == package else True
    )

    with pytest.raises(UsageError, match=f"needs {package}"):
        converter.verify(converted("tiny_panoptic_64"), against="transformers")


def test_no_peer_is_run_unless_named(converted: Callable[[str], Path]) -> None:
    level = peers(converter.verify(converted("tiny_panoptic_64")))

    assert (level.status, "--against" in level.reason) == ("not checked", True)
