"""Holding a converted model against evidence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, NAMES
from safetensors.torch import load_file, save_file

import converter
from converter.errors import UnreadableFileError
from converter.verification import TOLERANCE, Verdict

TINY = FIXTURES / "tiny_panoptic_64"


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def statuses(verdict: Verdict) -> dict[str, str]:
    return {level.level: level.status for level in verdict.levels}


@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_with_figures(name: str, converted: Callable[[str], Path]) -> None:
    verdict = converter.verify(converted(name), recorded=FIXTURES / name)

    assert verdict.verdict == "passed"
    assert statuses(verdict) == {"structure": "passed", "arithmetic": "passed", "numbers": "passed"}
    numbers = verdict.levels[-1].figures
    assert 0 <= numbers["max_abs"] <= TOLERANCE
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    skipped = ("pipeline.", "rope.", "backbone.", "pixels")
    assert set(numbers["compared"]) == {n for n in recorded if not n.startswith(skipped)}


def test_the_recording_of_an_offline_checkpoint_is_found(model: Path) -> None:
    assert converter.verify(model).verdict == "passed"


def test_without_a_recording_a_model_is_unverified(model: Path) -> None:
    change_json(model / "conversion.json", checkpoint=None)

    verdict = converter.verify(model)

    assert verdict.verdict == "unverified"
    assert verdict.reason == "No recorded outputs to check against."


def test_changed_weights_fail_with_figures(model: Path) -> None:
    change_weights(model, lambda state: state["mask_head.fc2.bias"].add_(0.5))

    verdict = converter.verify(model, recorded=TINY)

    assert verdict.verdict == "failed"
    arithmetic, numbers = verdict.levels[1], verdict.levels[2]
    assert arithmetic.figures["different"] == ["mask_head.fc2.bias"]
    assert numbers.status == "failed"
    assert numbers.figures["compared"]["mask_logits"]["max_abs"] > TOLERANCE
    assert numbers.figures["compared"]["class_logits"]["max_abs"] <= TOLERANCE


def test_weights_changed_beyond_notice_are_told_by_their_digest(model: Path) -> None:
    change_weights(model, lambda state: state["layernorm.weight"].view(-1)[0].mul_(1 + 1e-6))

    verdict = converter.verify(model, recorded=TINY)

    assert statuses(verdict)["numbers"] == "passed"
    assert verdict.verdict == "failed"
    assert "layernorm.weight is not what conversion.json says" in verdict.reason


def test_one_flipped_bit_names_the_tensor(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # in the last tensor, by name
    weights.write_bytes(content)

    verdict = converter.verify(model)

    assert verdict.levels[1].figures["different"] == ["upscale_block.block.1.layernorm2d.weight"]


def test_a_changed_config_is_noticed_by_the_numbers(model: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    change_json(model / "config.json", rope_parameters=rope)

    verdict = converter.verify(model, recorded=TINY)

    assert statuses(verdict) == {"structure": "passed", "arithmetic": "passed", "numbers": "failed"}


def test_another_normalisation_is_noticed(model: Path) -> None:
    change_json(model / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])

    assert statuses(converter.verify(model, recorded=TINY))["numbers"] == "failed"


def test_weights_that_are_not_numbers_fail_and_stay_valid_json(model: Path) -> None:
    change_weights(model, lambda state: state["query.weight"].view(-1)[5].fill_(float("nan")))

    verdict = converter.verify(model, recorded=TINY)

    assert statuses(verdict)["structure"] == "failed"
    assert "query.weight holds NaN" in verdict.reason
    json.loads(json.dumps(verdict.to_dict(), allow_nan=False))


def test_another_number_of_classes_fails_with_both_shapes(
    converted: Callable[[str], Path],
) -> None:
    verdict = converter.verify(
        converted("tiny_panoptic_64"), recorded=FIXTURES / "tiny_instance_64_gated"
    )

    assert verdict.verdict == "failed"
    assert "[2, 16, 16, 16], recorded is the shape [2, 12, 16, 16]" in verdict.reason


def test_pictures_that_patches_do_not_fill_fail(model: Path, tmp_path: Path) -> None:
    recorded = load_file(TINY / "recorded.safetensors")
    recorded["pixels"] = torch.zeros(1, 3, 65, 64, dtype=torch.uint8)
    save_file(recorded, tmp_path / "recorded.safetensors")

    verdict = converter.verify(model, recorded=tmp_path / "recorded.safetensors")

    assert verdict.verdict == "failed"
    assert "does not suit the model" in verdict.reason


@pytest.mark.parametrize("name", ["layers.2.norm1.bias", "attn_mask_probs"])
def test_a_missing_tensor_fails_the_structure_by_name(model: Path, name: str) -> None:
    change_weights(model, lambda state: state.pop(name))

    verdict = converter.verify(model, recorded=TINY)

    assert statuses(verdict) == {
        "structure": "failed",
        "arithmetic": "failed",
        "numbers": "not checked",
    }
    assert name in verdict.reason


def test_a_model_without_its_history_is_checked_by_its_numbers(model: Path) -> None:
    (model / "conversion.json").unlink()

    verdict = converter.verify(model, recorded=TINY)

    assert verdict.verdict == "passed"
    assert statuses(verdict)["arithmetic"] == "not checked"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\x00" * 100])
def test_a_missing_or_broken_file_is_unreadable(
    model: Path, name: str, content: bytes | None
) -> None:
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)

    with pytest.raises(UnreadableFileError, match=r"model\.safetensors|config\.json"):
        converter.verify(model, recorded=TINY)


@pytest.mark.parametrize("changes", [{"hidden_act": "warp"}, {"num_blocks": 99}, {"id2label": 3}])
def test_a_config_that_cannot_be_is_unreadable(model: Path, changes: dict[str, Any]) -> None:
    change_json(model / "config.json", **changes)

    with pytest.raises(UnreadableFileError, match=next(iter(changes))):
        converter.verify(model, recorded=TINY)


def test_a_folder_without_recordings_is_unreadable(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="no recorded outputs"):
        converter.verify(model, recorded=tmp_path)


@pytest.mark.parametrize("name", ["pixels", "mask_logits", "class_logits"])
def test_a_recording_without_its_essentials_is_unreadable(
    model: Path, tmp_path: Path, name: str
) -> None:
    recorded = load_file(TINY / "recorded.safetensors")
    del recorded[name]
    save_file(recorded, tmp_path / "recorded.safetensors")

    with pytest.raises(UnreadableFileError, match=f"has no {name}"):
        converter.verify(model, recorded=tmp_path)


def test_a_model_on_the_move_is_checked_where_it_is(model: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(model, tmp_path / "elsewhere"))

    assert converter.verify(moved).verdict == "passed"
