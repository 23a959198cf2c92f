"""Holding a converted model against evidence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import FIXTURES, NAMES
from hub_server import Hub
from safetensors.torch import load_file, save_file

import converter
from converter.checks import verification
from converter.checks.comparison import TOLERANCE
from converter.checks.structure import StoredModel, check_structure
from converter.checks.verdict import LEVELS, NUMBERED, Level, Verdict
from converter.errors import UnreadableFileError, UsageError
from converter.testing import assert_matches_recorded
from reference_model import EomtDinov3ForUniversalSegmentation

pytestmark = pytest.mark.numbers

TINY = FIXTURES / "tiny_panoptic_64"

Command = Callable[..., Result]


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def statuses(verdict: Verdict) -> dict[str, str]:
    """The status of each level up to numbers."""
    return {level.level: level.status for level in verdict.levels[:3]}


def level_of(verdict: Verdict, name: str) -> Level:
    return verdict.levels[LEVELS.index(name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_with_figures(name: str, converted: Callable[[str], Path]) -> None:
    verdict = converter.verify(converted(name), recorded=FIXTURES / name)

    assert verdict.verdict == "passed"
    assert statuses(verdict) == {"structure": "passed", "arithmetic": "passed", "numbers": "passed"}
    numbers = level_of(verdict, "numbers").figures
    assert 0 <= numbers["max_abs"] <= TOLERANCE
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    skipped = ("pipeline.", "rope.", "backbone.", "pixels")
    assert set(numbers["compared"]) == {n for n in recorded if not n.startswith(skipped)}
    assert (numbers["best_class"], numbers["mask_iou"], numbers["same_segment"]) == (1, 1, 1)
    for figures in numbers["compared"].values():
        assert set(figures) == {"max_abs", "mean_abs", "spread", "relative", "cosine"}
        assert figures["cosine"] == pytest.approx(1)


def test_the_recording_of_an_offline_checkpoint_is_found(model: Path) -> None:
    assert converter.verify(model).verdict == "passed"


def test_without_a_recording_a_model_is_unverified(model: Path) -> None:
    change_json(model / "conversion.json", checkpoint=None)

    verdict = converter.verify(model)

    assert verdict.verdict == "unverified"
    assert verdict.reason == "No recorded outputs to compare the model with."


@pytest.mark.parametrize("recorded", [True, False])
def test_weights_are_kept_only_for_a_network_that_is_run(
    recorded: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def count(found: StoredModel, *arguments: Any, **options: Any) -> Level:
        kept.append(len(found.weights))
        return check_structure(found, *arguments, **options)

    monkeypatch.setattr(verification, "check_structure", count)
    change_json(model / "conversion.json", checkpoint=None)
    converter.verify(model, recorded=TINY if recorded else None)

    assert kept == [len(load_file(model / "model.safetensors")) if recorded else 0]


def test_what_differs_is_diagnosed_where_nothing_is_recorded(model: Path) -> None:
    change_json(model / "conversion.json", checkpoint=None)
    change_weights(model, lambda state: state["layernorm.weight"].zero_())
    verdict = converter.verify(model)

    assert level_of(verdict, "numbers").status == "not checked"
    assert verdict.cause is not None
    assert verdict.cause.tensors == ("layernorm.weight",)


def test_changed_weights_fail_with_figures(model: Path) -> None:
    change_weights(model, lambda state: state["mask_head.fc2.bias"].add_(0.5))

    verdict = converter.verify(model, recorded=TINY)

    assert verdict.verdict == "failed"
    arithmetic, numbers = verdict.levels[1], verdict.levels[2]
    assert arithmetic.figures["different"] == ["mask_head.fc2.bias"]
    assert numbers.status == "failed"
    assert numbers.figures["compared"]["mask_logits"]["max_abs"] > TOLERANCE
    assert numbers.figures["compared"]["class_logits"]["max_abs"] <= TOLERANCE


def test_tiny_changes_of_weights_are_detected_by_the_digest(model: Path) -> None:
    change_weights(model, lambda state: state["layernorm.weight"].view(-1)[0].mul_(1 + 1e-6))

    verdict = converter.verify(model, recorded=TINY)

    assert statuses(verdict)["numbers"] == "passed"
    assert verdict.verdict == "failed"
    assert verdict.reason == (
        "layernorm.weight is not what its sources give: "
        "backbone:norm.weight + delta:network.encoder.backbone.norm.weight."
    )


def test_one_flipped_bit_names_the_tensor(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # in the last tensor, by name
    weights.write_bytes(content)

    verdict = converter.verify(model)

    name = "upscale_block.block.1.layernorm2d.weight"
    assert verdict.levels[1].figures["different"] == [name]
    assert name in verdict.reason
    assert verdict.cause is not None
    assert (verdict.cause.name, verdict.cause.tensors) == ("tensor-replaced", (name,))


def test_a_changed_config_is_detected_by_the_numbers(model: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    change_json(model / "config.json", rope_parameters=rope)

    verdict = converter.verify(model, recorded=TINY)

    assert statuses(verdict) == {"structure": "passed", "arithmetic": "failed", "numbers": "failed"}
    assert level_of(verdict, "arithmetic").figures["different_files"] == ["config.json"]


def test_a_wrong_normalisation_is_detected(model: Path) -> None:
    change_json(model / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])

    assert statuses(converter.verify(model, recorded=TINY))["numbers"] == "failed"


@pytest.mark.parametrize("history", [True, False])
def test_weights_that_are_not_numbers_fail_and_stay_valid_json(history: bool, model: Path) -> None:
    change_weights(model, lambda state: state["query.weight"].view(-1)[5].fill_(float("nan")))
    if not history:
        (model / "conversion.json").unlink()

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
    assert "the shape [2, 21, 64], expected [2, 33, 64] as recorded" in verdict.reason
    assert verdict.cause is None
    assert {trial.status for trial in verdict.tried} == {"not tried"}


def test_a_recorded_tensor_with_an_unknown_name_is_not_compared(
    model: Path, tmp_path: Path
) -> None:
    recorded = load_file(TINY / "recorded.safetensors")
    recorded["hidden_states.2.0"] = recorded["hidden_states.2"] + 1
    save_file(recorded, tmp_path / "recorded.safetensors")

    verdict = converter.verify(model, recorded=tmp_path / "recorded.safetensors", level=3)

    assert verdict.verdict == "passed"


def test_pictures_that_patches_do_not_fill_fail(
    model: Path, command: Command, tmp_path: Path
) -> None:
    recorded = load_file(TINY / "recorded.safetensors")
    recorded["pixels"] = torch.zeros(1, 3, 65, 64, dtype=torch.uint8)
    save_file(recorded, tmp_path / "recorded.safetensors")

    verdict = converter.verify(model, recorded=tmp_path / "recorded.safetensors")

    assert verdict.verdict == "failed"
    assert "The model cannot run on the recorded input" in verdict.reason
    result = command("verify", model, "--recorded", tmp_path / "recorded.safetensors")
    assert result.exit_code == 3
    assert "The model cannot run on the recorded input" in result.stdout


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
def test_an_invalid_config_is_unreadable(model: Path, changes: dict[str, Any]) -> None:
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


def test_a_moved_model_is_checked_in_its_new_place(model: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(model, tmp_path / "elsewhere"))

    assert converter.verify(moved).verdict == "passed"


# structure --------------------------------------------------------------------------------------


def problems(model: Path, **options: Any) -> list[str]:
    verdict = converter.verify(model, level=1, **options)
    found: list[str] = level_of(verdict, "structure").figures["problems"]
    return found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("query.weight"), "query.weight is missing."),
        (
            lambda state: state.update(spare=torch.zeros(3)),
            "spare is unexpected: the model in config.json has no such tensor.",
        ),
        (
            lambda state: state.update({"layernorm.bias": torch.zeros(63)}),
            "layernorm.bias has the shape [63], expected [64] by config.json.",
        ),
        (
            lambda state: state.update({"layernorm.bias": torch.zeros(64, dtype=torch.int64)}),
            "layernorm.bias has dtype I64, expected floating point numbers.",
        ),
        (
            lambda state: state.update({"layernorm.bias": torch.zeros(64).half()}),
            "layernorm.bias has dtype F16, config.json says float32.",
        ),
        (
            lambda state: state["query.weight"].view(-1)[3].fill_(float("inf")),
            "query.weight holds NaN or infinity.",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], problem: str, model: Path
) -> None:
    change_weights(model, change)

    assert problem in problems(model)


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("config.json", {"num_blocks": 3}, "attn_mask_probs has the shape [2]"),
        ("config.json", {"num_hidden_layers": 3}, "layers.3.attention.k_proj.weight is unexpected"),
        ("config.json", {"id2label": {"0": "a"}, "stuff_classes": []}, "class_predictor.weight"),
        ("config.json", {"label2id": {"LABEL_0": 1}}, "label2id in config.json"),
        ("config.json", {"image_size": 128}, "image_size in config.json is [128, 128]"),
        ("preprocessor_config.json", {"do_split_image": True}, "expected False for panoptic"),
    ],
)
def test_files_that_contradict_each_other_fail(
    file: str, changes: dict[str, Any], problem: str, model: Path
) -> None:
    change_json(model / file, **changes)

    assert any(problem in found for found in problems(model))


def test_the_backbones_config_is_compared_where_it_is_given(model: Path) -> None:
    change_json(model / "config.json", layer_norm_eps=1e-6)

    assert problems(model) == []
    assert problems(model, backbone=str(TINY / "backbone")) == [
        "layer_norm_eps in config.json is 1e-06, the backbone's says 1e-05."
    ]


# arithmetic --------------------------------------------------------------------------------------


def test_given_sources_decide(model: Path) -> None:
    (model / "conversion.json").unlink()
    sources: Any = {"delta": str(TINY / "delta"), "backbone": str(TINY / "backbone")}

    right = level_of(converter.verify(model, level=2, **sources), "arithmetic")
    change_weights(model, lambda state: state["query.weight"].view(-1)[0].add_(1))
    wrong = level_of(converter.verify(model, level=2, **sources), "arithmetic")

    assert (right.status, right.figures["against"]) == ("passed", "sources")
    assert wrong.status == "failed"
    assert wrong.reason == "query.weight is not what its sources give: delta:network.q.weight."


@pytest.mark.parametrize("layout", ["backbone_meta", "backbone_timm"])
def test_sources_in_other_layouts_give_the_same_tensors(layout: str, model: Path) -> None:
    level = level_of(
        converter.verify(model, level=2, delta=str(TINY / "delta"), backbone=str(TINY / layout)),
        "arithmetic",
    )

    assert level.status == "passed"


def test_absolute_weights_are_sources_too(model: Path) -> None:
    (model / "conversion.json").unlink()

    found = converter.verify(model, level=2, delta=str(TINY / "absolute.ckpt"))

    assert level_of(found, "arithmetic").figures["against"] == "sources"


def test_sources_are_found_in_the_cache_at_the_revisions_of_conversion_json(
    hub: Hub, tmp_path: Path
) -> None:
    hub.create_repo("me/delta", {"pytorch_model.bin": TINY / "delta" / "pytorch_model.bin"})
    files = {name: TINY / "backbone" / name for name in ("config.json", "model.safetensors")}
    hub.create_repo("me/backbone", files)
    converter.convert(
        output=tmp_path / "out",
        delta="me/delta",
        backbone="me/backbone",
        task="panoptic",
        image_size=64,
        verify=False,
    )
    hub.requests.clear()

    level = level_of(converter.verify(tmp_path / "out"), "arithmetic")

    assert (level.status, level.figures["against"]) == ("passed", "sources")
    assert level.figures["sources"]["delta"]["repo"] == "me/delta"
    assert hub.requests == []


def test_without_the_sources_conversion_json_decides(model: Path) -> None:
    change_json(model / "conversion.json", checkpoint=None)

    level = level_of(converter.verify(model), "arithmetic")

    assert (level.status, level.figures["against"]) == ("passed", "conversion.json")


def test_without_either_arithmetic_is_not_checked(model: Path) -> None:
    (model / "conversion.json").unlink()

    level = level_of(converter.verify(model), "arithmetic")

    assert (level.status, "--delta" in level.reason) == ("not checked", True)


def test_rounded_weights_are_what_their_sources_give_rounded(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out", dtype="bfloat16", verify=False)

    found = converter.verify(tmp_path / "out", recorded=TINY)

    assert statuses(found) == {"structure": "passed", "arithmetic": "passed", "numbers": "passed"}


# the rest ----------------------------------------------------------------------------------------


def test_the_bare_backbone_is_run_where_it_is_given(model: Path) -> None:
    sources: Any = {"delta": str(TINY / "delta"), "backbone": str(TINY / "backbone")}

    compared = level_of(converter.verify(model, **sources), "numbers").figures["compared"]

    assert compared["backbone.last_hidden_state"]["max_abs"] < 1e-5


@pytest.mark.parametrize("level", range(1, 6))
def test_levels_are_checked_up_to_the_one_asked_for(level: int, model: Path) -> None:
    found = converter.verify(model, level=level)

    assert [entry.level for entry in found.levels] == list(LEVELS)
    checked = {entry.level for entry in found.levels if entry.status != "not checked"}
    expected = {"structure", "arithmetic", "numbers", "pictures"}
    assert checked == (expected if level > 3 else set(NUMBERED[:level]))
    assert found.verdict == ("passed" if level >= 3 else "unverified")


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 6}, {"device": "abacus"}])
def test_an_unknown_level_or_device_is_wrong_usage(options: dict[str, Any], model: Path) -> None:
    with pytest.raises(UsageError, match=r"level|device"):
        converter.verify(model, **options)


def test_threads_are_set_for_the_check_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)

    converter.verify(model, threads=3, level=1)

    assert asked == [3, before]


def test_pictures_have_no_number() -> None:
    assert NUMBERED == ("structure", "arithmetic", "numbers", "peers", "published")
    assert [level for level in LEVELS if level not in NUMBERED] == ["pictures"]
    assert LEVELS.index("pictures") == LEVELS.index("numbers") + 1


def test_a_right_model_is_run_once_for_each_recorded_set(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    forward = EomtDinov3ForUniversalSegmentation.forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        runs.append("masked" if self.attn_mask_probs.any() else "unmasked")
        return forward(self, *args, **options)

    monkeypatch.setattr(EomtDinov3ForUniversalSegmentation, "forward", counted)

    assert converter.verify(model, recorded=TINY).verdict == "passed"
    assert runs == ["unmasked", "masked", "unmasked"]  # the last one for the pictures


def test_a_model_on_the_hub_is_checked(model: Path, hub: Hub) -> None:
    hub.create_repo("me/model", {path.name: path for path in model.iterdir()})

    assert converter.verify("me/model").verdict == "passed"


def test_json_has_the_first_difference_the_cause_and_what_was_tried(model: Path) -> None:
    change_weights(model, lambda state: state["layers.1.norm1.bias"].add_(1))

    content = json.loads(json.dumps(converter.verify(model).to_dict(), allow_nan=False))

    assert list(content) == ["verdict", "basis", "levels", "first_difference", "cause", "tried"]
    assert content["first_difference"]["layer"] == "layers.1"
    assert content["cause"]["tensors"] == ["layers.1.norm1.bias"]
    assert set(content["cause"]) == {"name", "tensors", "residual", "explained"}
    assert {trial["name"] for trial in content["tried"]} >= {"rope-base", "tensor-replaced"}


def test_the_record_has_nothing_that_was_measured(model: Path) -> None:
    change_weights(model, lambda state: state["layers.1.norm1.bias"].add_(1))

    record = json.dumps(converter.verify(model).record())

    assert "failed" in record
    assert "max_abs" not in record


def test_another_project_can_assert_that_a_model_matches(model: Path) -> None:
    assert_matches_recorded(model, TINY)
    change_weights(model, lambda state: state["layers.1.norm1.bias"].add_(1))

    with pytest.raises(AssertionError, match=r"begins    in layers\.1: hidden_states\.1"):
        assert_matches_recorded(model, TINY)


def test_unverified_is_an_error_on_request(command: Command, model: Path) -> None:
    change_json(model / "conversion.json", checkpoint=None)

    assert command("verify", model).exit_code == 0
    assert command("verify", model, "--require-verified").exit_code == 1
