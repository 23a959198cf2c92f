"""The basis of a verdict: no sentence about a model claims more than its evidence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import Result
from conftest import FIXTURES
from hub_server import Hub
from safetensors.torch import load_file, save_file

import converter
from converter.catalog import find
from converter.checks.provenance import is_published
from converter.checks.recorded import ORIGINAL, Origin, known_recordings, read_recorded
from converter.checks.recording import record
from converter.checks.verdict import Level, Status, Verdict
from converter.errors import NotVerifiedError, UnreadableFileError
from converter.history import read_history
from converter.hub.access import Access
from converter.hub.sources import fetch
from converter.places import HubSource
from converter.testing import assert_matches_recorded

Command = Callable[..., Result]

NAMES = ("tiny_panoptic_64", "tiny_semantic_48", "tiny_instance_64_gated")


def swap_query_and_key(model: Path) -> None:
    """Makes a model wrong in a way that only its outputs show."""
    weights = load_file(model / "model.safetensors")
    query, key = (f"layers.1.attention.{part}_proj.weight" for part in "qk")
    weights[query], weights[key] = weights[key], weights[query]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def own_copy(converted: Callable[[str], Path], name: str, place: Path) -> Path:
    return Path(shutil.copytree(converted(name), place / name))


def change_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_the_original_are_a_basis(converted: Callable[[str], Path], name: str) -> None:
    verdict = converter.verify(converted(name))
    kept = json.loads((converted(name) / "conversion.json").read_text())["verdict"]

    assert (verdict.verdict, verdict.basis, verdict.proven) == ("passed", "original", True)
    assert (kept["verdict"], kept["basis"]) == ("passed", "original")
    assert verdict.to_dict()["basis"] == "original"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_cannot_certify_itself(
    command: Command, converted: Callable[[str], Path], tmp_path: Path, hub: Hub, me: str, name: str
) -> None:
    """A wrong model is recorded, and converted again with that recording."""
    wrong = own_copy(converted, name, tmp_path)
    (wrong / "conversion.json").unlink()
    swap_query_and_key(wrong)
    record(wrong, tmp_path / "own", random=1)

    arguments = ("--delta", wrong, "--recorded", tmp_path / "own", "--output", "again")
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    assert "basis     reference: compared with outputs of the reference model" in result.stdout
    assert command(*arguments, "--force", "--require-verified").exit_code == 1

    pushed = command("push", "again", "me/model", "--license-file", FIXTURES.parent / "LICENSE")
    assert pushed.exit_code == 1
    assert "was not verified against the original" in pushed.stderr
    assert hub.repo_ids == []
    options = ("--license-file", FIXTURES.parent / "LICENSE", "--allow-unverified")
    assert command("push", "again", "me/model", *options).exit_code == 0
    card = hub.files("me/model")["README.md"].decode()
    assert "**Not verified against the original.**" in card
    assert "recorded from the original" not in card


def test_a_reference_is_enough_to_show_that_nothing_changed(
    command: Command, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = own_copy(converted, "tiny_panoptic_64", tmp_path)
    (model / "conversion.json").unlink()
    record(model, tmp_path / "own", random=1)

    assert converter.verify(model, recorded=tmp_path / "own").basis == "reference"
    assert_matches_recorded(model, tmp_path / "own")
    verify = ("verify", model, "--recorded", tmp_path / "own")
    assert command(*verify).exit_code == 0
    assert command(*verify, "--require-verified").exit_code == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_passes_on_the_basis_of_its_model(
    converted: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """But only for the tensors that were recorded."""
    record(converted(name), tmp_path / "own", random=1)
    verdict = converter.verify(converted(name), recorded=tmp_path / "own")
    assert verdict.basis == "original"
    assert verdict.compared_with.startswith("outputs of the reference model, recorded from exactly")

    other = own_copy(converted, name, tmp_path)
    (other / "conversion.json").unlink()
    weights = load_file(other / "model.safetensors")
    weights["criterion.empty_weight"][0] = 0.5  # which no output depends on
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    verdict = converter.verify(other, recorded=tmp_path / "own")
    assert (verdict.verdict, verdict.basis) == ("passed", "reference")


def test_a_recording_of_the_package_is_known_by_its_digest_alone(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    source = FIXTURES / "tiny_panoptic_64"
    shutil.copy(source / "recorded.safetensors", tmp_path)
    (tmp_path / "recorded.json").write_text('{"provenance": {"implementation": "somebody"}}')

    assert converter.verify(converted(source.name), recorded=tmp_path).basis == "original"


def test_a_recording_without_recorded_json_is_of_unknown_origin(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    record(converted("tiny_panoptic_64"), tmp_path / "own", random=1)
    (tmp_path / "own" / "recorded.json").unlink()
    found = converter.verify(converted("tiny_panoptic_64"), recorded=tmp_path / "own")

    assert found.basis == "reference"
    assert found.compared_with.startswith("outputs of unknown origin")


def test_recorded_json_does_not_apply_to_a_renamed_recording(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    record(converted("tiny_panoptic_64"), tmp_path / "own", random=1)
    recording = (tmp_path / "own" / "recorded.safetensors").rename(
        tmp_path / "own/mine.safetensors"
    )

    assert converter.verify(converted("tiny_panoptic_64"), recorded=recording).basis == "reference"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5}}),
        ("preprocessor_config.json", {"rescale_factor": 1.0}),
    ],
)
def test_a_basis_is_not_passed_on_to_another_configuration(
    converted: Callable[[str], Path], tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    """Neither shows in a single black patch: all its rotary angles and pixels are 0."""
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    model = converted("tiny_panoptic_64")
    record(model, tmp_path / "own", images=[tmp_path / "black.png"], image_size=(16, 16))
    wrong = own_copy(converted, "tiny_panoptic_64", tmp_path)
    change_json(wrong / file, lambda content: content.update(change))
    (wrong / "conversion.json").unlink()
    found = converter.verify(wrong, recorded=tmp_path / "own")

    assert (found.verdict, found.basis) == ("passed", "reference")
    assert converter.verify(model, recorded=tmp_path / "own").basis == "original"
    assert converter.verify(wrong, recorded=FIXTURES / "tiny_panoptic_64").verdict == "failed"


def test_a_recording_of_0_1_is_a_reference(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its recorded.json has neither basis nor digests of tensors."""
    record(converted("tiny_panoptic_64"), tmp_path / "own", random=1)

    def as_0_1(content: dict[str, Any]) -> None:
        for key in ("verdict", "basis", "tensors"):
            del content["model"][key]

    change_json(tmp_path / "own" / "recorded.json", as_0_1)
    verdict = converter.verify(converted("tiny_panoptic_64"), recorded=tmp_path / "own")
    assert verdict.basis == "reference"


def test_a_recorded_json_of_another_recording_is_refused(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    record(converted("tiny_panoptic_64"), tmp_path / "own", random=1)
    shutil.copy(FIXTURES / "tiny_panoptic_64" / "recorded.json", tmp_path / "own")

    with pytest.raises(
        UnreadableFileError, match=r"does not belong to the recorded\.safetensors beside"
    ):
        converter.verify(converted("tiny_panoptic_64"), recorded=tmp_path / "own")


@pytest.mark.parametrize(
    "model", [None, 3, [], {"basis": "mine"}, {"basis": ["original"], "tensors": 3}]
)
def test_a_malformed_recorded_json_proves_nothing(
    converted: Callable[[str], Path], tmp_path: Path, model: object
) -> None:
    record(converted("tiny_panoptic_64"), tmp_path / "own", random=1)
    change_json(tmp_path / "own" / "recorded.json", lambda c: c.update(model=model, provenance=7))

    verdict = converter.verify(converted("tiny_panoptic_64"), recorded=tmp_path / "own")
    assert verdict.basis == "reference"


def test_the_recordings_of_the_package_are_known() -> None:
    files = list(FIXTURES.glob("*/recorded.safetensors"))

    assert len(files) == 5
    assert {read_recorded(file).sha256 for file in files} == set(known_recordings())
    assert all(read_recorded(file).origin == Origin("original", known=True) for file in files)


def test_a_claim_of_recorded_json_is_attributed_to_it(
    command: Command, converted: Callable[[str], Path], tmp_path: Path, hub: Hub, me: str
) -> None:
    """Somebody else's recording, which claims that the original computed it."""
    record(converted("tiny_panoptic_64"), tmp_path / "own", random=1)
    change_json(
        tmp_path / "own" / "recorded.json",
        lambda content: content["provenance"].update(implementation=ORIGINAL),
    )
    arguments = ("--checkpoint", "tiny_panoptic_64", "--recorded", tmp_path / "own")
    result = command(*arguments, "--output", "model", "--push-to", "me/model")

    assert result.exit_code == 0, result.output
    stated = "recorded from the original implementation, as recorded.json states"
    assert stated in in_one_line(result.stdout)
    assert stated in in_one_line(hub.files("me/model")["README.md"].decode())
    assert stated in in_one_line((Path("model") / "verdict.html").read_text())


# published numbers -----------------------------------------------------------------------------


def levels(of_published: bool, arithmetic: Status = "passed") -> tuple[Level, ...]:
    return (
        Level("structure", "passed"),
        Level("arithmetic", arithmetic, figures={"of_published": of_published}),
        Level("published", "passed"),
    )


def test_published_numbers_are_a_basis_with_every_tensor_proven() -> None:
    verdict = Verdict(levels(True))

    assert (verdict.verdict, verdict.basis, verdict.proven) == ("passed", "published", True)
    assert "every tensor is proven to come" in verdict.compared_with


@pytest.mark.parametrize(("of_published", "arithmetic"), [(False, "passed"), (True, "not checked")])
def test_published_numbers_alone_are_a_spot_check(
    of_published: bool, arithmetic: Literal["passed", "not checked"]
) -> None:
    verdict = Verdict(levels(of_published, arithmetic))

    assert (verdict.verdict, verdict.basis, verdict.proven) == ("unverified", None, False)
    assert "spot check" in verdict.reason


def test_of_two_bases_the_stronger_one_counts() -> None:
    numbers = Level("numbers", "passed", figures={"basis": "reference"})

    assert Verdict((*levels(True), numbers)).basis == "published"
    assert Verdict((*levels(False), numbers)).basis == "reference"


def test_an_origin_counts_for_its_own_model_only() -> None:
    origin = Origin("reference", basis="original", model={"a": "1"})

    assert origin.figures({"a": "1"})["basis"] == "original"
    assert origin.figures({"a": "2"})["basis"] == "reference"
    assert Origin("reference", model={"a": "1"}).figures({"a": "1"})["basis"] == "reference"
    assert Origin().figures({})["basis"] == "reference"


# conversion.json of 0.1 ------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_conversion_of_0_1_counts_as_what_its_recording_proves(
    converted: Callable[[str], Path], tmp_path: Path, hub: Hub, me: str, known: bool
) -> None:
    model = own_copy(converted, "tiny_panoptic_64", tmp_path)

    def as_0_1(content: dict[str, Any]) -> None:
        del content["verdict"]["basis"]
        for level in content["verdict"]["levels"]:
            level["figures"].pop("basis", None)
            if "recorded_sha256" in level["figures"] and not known:
                level["figures"]["recorded_sha256"] = "0" * 64

    change_json(model / "conversion.json", as_0_1)
    if known:
        converter.publish(model, "me/model")
        assert "**Verified.**" in hub.files("me/model")["README.md"].decode()
    else:
        with pytest.raises(NotVerifiedError, match="not verified against the original"):
            converter.publish(model, "me/model")


# recordings that any model would pass ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_recording_that_is_not_finite_is_refused(
    converted: Callable[[str], Path], tmp_path: Path, name: str, value: float
) -> None:
    tensors = load_file(FIXTURES / name / "recorded.safetensors")
    tensors["mask_logits"].view(-1)[0] = value
    save_file(tensors, tmp_path / "recorded.safetensors")

    with pytest.raises(UnreadableFileError, match=r"mask_logits in .* holds NaN or infinity"):
        converter.verify(converted(name), recorded=tmp_path)


@pytest.mark.parametrize("name", ["tiny_semantic_48", "tiny_instance_64_gated"])
@pytest.mark.parametrize(("dtype", "value"), [("float32", 3e38), ("float16", 6e4)])
def test_a_recording_of_huge_values_makes_no_tolerance_infinite(
    converted: Callable[[str], Path], tmp_path: Path, name: str, dtype: str, value: float
) -> None:
    """Their range overflows in their own type."""
    import torch

    found = load_file(FIXTURES / name / "recorded.safetensors")
    kept = {key: found[key] for key in ("pixels", "mask_logits", "class_logits")}
    for key in ("mask_logits", "class_logits"):
        kept[key] = kept[key].to(getattr(torch, dtype))
        kept[key].view(-1)[:2] = torch.tensor([value, -value])
    save_file(kept, tmp_path / "recorded.safetensors")
    wrong = own_copy(converted, name, tmp_path)
    (wrong / "conversion.json").unlink()
    swap_query_and_key(wrong)

    assert converter.verify(wrong, recorded=tmp_path / "recorded.safetensors").verdict == "failed"


@pytest.mark.parametrize("form", ["scalar", "boolean"])
def test_a_recording_of_scalars_or_booleans_is_refused(
    converted: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    import torch

    found = load_file(FIXTURES / "tiny_panoptic_64" / "recorded.safetensors")
    if form == "scalar":
        found["hidden_states.0"] = torch.tensor(1.0)
    else:
        found["mask_logits"] = found["mask_logits"] > 0
    save_file(found, tmp_path / "recorded.safetensors")

    with pytest.raises(UnreadableFileError, match=r"a single number|expected floating point"):
        converter.verify(converted("tiny_panoptic_64"), recorded=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_one_rounded_tensor_does_not_loosen_the_tolerance_of_all(
    converted: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    import torch

    wrong = own_copy(converted, name, tmp_path)
    (wrong / "conversion.json").unlink()
    change_json(wrong / "config.json", lambda content: content.pop("dtype"))
    weights = load_file(wrong / "model.safetensors")
    weights["criterion.empty_weight"] = weights["criterion.empty_weight"].to(torch.bfloat16)
    weights["class_predictor.bias"] += 0.01
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})

    assert converter.verify(wrong, recorded=FIXTURES / name).verdict == "failed"


# conversion.json that claims more than it shows -------------------------------------------------


def as_numbers(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def edit(content: dict[str, Any]) -> None:
        for level in content["verdict"]["levels"]:
            if level["level"] == "numbers":
                level.update({k: v for k, v in changes.items() if k != "figures"})
                level["figures"].update(changes.get("figures", {}))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["verdict"].update(levels=[]),
        lambda content: content["verdict"].update(levels=None),
        lambda content: content["verdict"].update(basis="published"),
        lambda content: content["verdict"].update(basis=["original"]),
        as_numbers(status="failed"),
        as_numbers(status="not checked"),
        as_numbers(status="fine"),
        as_numbers(figures={"basis": "reference"}),
        as_numbers(figures={"basis": "mine\n**Verified.**"}),
        as_numbers(figures={"recorded_sha256": ["x"]}),
    ],
)
def test_a_verdict_that_its_levels_contradict_is_not_pushed(
    converted: Callable[[str], Path],
    tmp_path: Path,
    hub: Hub,
    me: str,
    edit: Callable[[dict[str, Any]], object],
) -> None:
    model = own_copy(converted, "tiny_panoptic_64", tmp_path)
    change_json(model / "conversion.json", edit)

    with pytest.raises(UnreadableFileError, match=r"conversion\.json"):
        converter.publish(model, "me/model", allow_unverified=True)
    assert hub.repo_ids == []


# what counts as the published files --------------------------------------------------------------


def test_the_published_delta_is_what_its_main_branch_has(hub: Hub, derived: Path) -> None:
    """Anybody may propose other weights in the same repository."""
    checkpoint, history = find("coco_panoptic_small_640"), read_history(derived)
    assert is_published(checkpoint, history, Access())

    hub.commit(checkpoint.delta, {"README.md": b"newer"})
    fetch(HubSource(checkpoint.delta), Access())  # which notes where main is
    assert not is_published(checkpoint, history, Access())
    assert not is_published(checkpoint, None, Access())
    assert not is_published(None, history, Access())


def test_without_the_repository_in_the_cache_nothing_counts_as_published(
    hub: Hub, derived: Path, tmp_path: Path
) -> None:
    elsewhere = Access(cache_dir=tmp_path / "empty")
    checkpoint = find("coco_panoptic_small_640")

    assert not is_published(checkpoint, read_history(derived), elsewhere)
