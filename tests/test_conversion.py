"""The whole job, from a name to a verified folder."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digests
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES, NAMES
from hub_server import Hub
from safetensors.torch import load_file, save_file

import converter
from converter.errors import (
    EomtConvertError,
    NotVerifiedError,
    OutputError,
    OutputsDifferError,
    PlanError,
    UnreadableFileError,
    UsageError,
)
from converter.history import read_history

TINY = FIXTURES / "tiny_panoptic_64"
BACKBONE, DELTA = str(TINY / "backbone"), str(TINY / "delta")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def history(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "conversion.json").read_text())
    return content


@pytest.mark.parametrize("name", NAMES)
def test_an_offline_checkpoint_is_converted_and_passes(
    name: str, converted: Callable[[str], Path]
) -> None:
    folder = converted(name)

    right = json.loads((FIXTURES / name / "converted.json").read_text())["tensors"]
    stored = load_file(folder / "model.safetensors")
    assert digests.of_tensors(stored) == {n: entry["sha256"] for n, entry in right.items()}
    assert {n: list(t.shape) for n, t in stored.items()} == {
        n: entry["shape"] for n, entry in right.items()
    }
    assert history(folder)["verdict"]["verdict"] == "passed"
    assert names(folder) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
        "preprocessor_config.json",
        "verdict.html",
    ]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    # from files elsewhere, as another user on another day would have them
    for place in ("one", "two"):
        shutil.copytree(TINY, tmp_path / place / "in")
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / place / "out",
            delta=str(tmp_path / place / "in" / "delta"),
            backbone=str(tmp_path / place / "in" / "backbone"),
        )

    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    assert names(one) == names(two)
    for name in names(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_no_output_file_holds_a_path_or_a_token(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out", token="hf_secret")

    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert str(FIXTURES).encode() not in content, path.name
        assert str(tmp_path).encode() not in content, path.name
        assert b"hf_secret" not in content, path.name


def test_the_history_names_sources_recipes_digests_and_verdict(
    converted: Callable[[str], Path],
) -> None:
    folder = converted("tiny_panoptic_64")
    told = history(folder)
    recorded = json.loads((TINY / "recorded.json").read_text())["sha256"]

    assert told["tool"] == {"name": "eomt-convert", "version": converter.__version__}
    assert told["checkpoint"] == "tiny_panoptic_64"
    files = told["sources"]["backbone"]["files"]
    assert files["model.safetensors"]["sha256"] == recorded["backbone/model.safetensors"]
    assert files["config.json"]["sha256"] == recorded["backbone/config.json"]
    files = told["sources"]["delta"]["files"]
    assert files["pytorch_model.bin"]["sha256"] == recorded["delta/pytorch_model.bin"]
    for name, entry in told["files"].items():
        assert entry["sha256"] == digests.of_file(folder / name)
        assert entry["size"] == (folder / name).stat().st_size
    row = told["tensors"]["layernorm.weight"]
    assert row["recipe"] == "backbone:norm.weight + delta:network.encoder.backbone.norm.weight"
    assert row["shape"] == [64]
    assert len(told["tensors"]) == 95
    assert {entry["tensor"] for entry in told["dropped"]} == {
        "backbone:embeddings.mask_token",
        "delta:network.attn_mask_probs",
        "delta:network.encoder.pixel_mean",
        "delta:network.encoder.pixel_std",
    }


def test_a_conversion_returns_what_it_did(tmp_path: Path) -> None:
    conversion = converter.convert("tiny_semantic_48", tmp_path / "out")

    assert conversion.output == tmp_path / "out"
    assert conversion.verdict.verdict == "passed"
    assert conversion.plan.counts()["added"] == 57
    assert conversion.sources["delta"].weights.name == "pytorch_model.bin"
    assert set(conversion.files) == set(names(tmp_path / "out"))
    size, digest = conversion.files["model.safetensors"]
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_users_own_files_need_no_checkpoint_name(tmp_path: Path) -> None:
    conversion = converter.convert(
        output=tmp_path / "out", delta=DELTA, backbone=BACKBONE, task="panoptic", image_size=64
    )

    assert conversion.verdict.verdict == "unverified"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"]["0"] == "LABEL_0"
    assert config["stuff_classes"] == []
    assert history(tmp_path / "out")["checkpoint"] is None


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ("delta", "--delta"),
        ("backbone", "--backbone"),
        ("task", "--task"),
        ("image_size", "--image-size"),
    ],
)
def test_options_that_are_needed_without_a_checkpoint_are_listed(
    tmp_path: Path, left_out: str, missing: str
) -> None:
    given: dict[str, Any] = {"delta": DELTA, "backbone": BACKBONE, "task": "panoptic"}
    given |= {"image_size": 64, "output": tmp_path / "out"}
    del given[left_out]

    with pytest.raises(UsageError, match=f"{missing} must be given"):
        converter.convert(**given)


def test_labels_name_the_classes(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefg"))

    converter.convert("tiny_panoptic_64", tmp_path / "out", labels=labels)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate("abcdefg")}
    assert config["stuff_classes"] == [4, 5, 6]  # which names alone do not tell


def categories(folder: Path, *, isthing: bool) -> Path:
    """COCO's form: ids with gaps, of which the last three are stuff if that is said at all."""
    entries = [
        {"id": i * i + 1, "name": name} | ({"isthing": int(i < 4)} if isthing else {})
        for i, name in enumerate("abcdefg")
    ]
    labels = folder / "labels.json"
    labels.write_text(json.dumps({"categories": entries}))
    return labels


def test_category_ids_with_gaps_are_mapped_in_order_and_kept(tmp_path: Path) -> None:
    labels = categories(tmp_path, isthing=True)
    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", labels=labels)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    history = read_history(tmp_path / "out")
    assert history is not None
    assert history.category_ids == [1, 2, 5, 10, 17, 26, 37]
    assert config["id2label"] == {str(i): name for i, name in enumerate("abcdefg")}
    assert config["stuff_classes"] == [4, 5, 6]
    assert (conversion.verdict.verdict, conversion.warnings()) == ("passed", [])


OWN: dict[str, Any] = {"delta": DELTA, "backbone": BACKBONE, "image_size": 64, "verify": False}


def test_a_panoptic_model_whose_labels_do_not_say_what_is_stuff_is_warned_of(
    tmp_path: Path, command: Callable[..., Result]
) -> None:
    labels = categories(tmp_path, isthing=False)
    result = command(
        *("--delta", DELTA, "--backbone", BACKBONE, "--image-size", 64, "--task", "panoptic"),
        *("--labels", labels, "--output", tmp_path / "out", "--no-verify"),
    )

    assert result.exit_code == 0
    assert "Warning: Nothing says which classes are stuff" in result.stderr
    assert "warning   Nothing says which classes are stuff" in result.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["stuff_classes"] == []


def test_stuff_says_what_labels_do_not(tmp_path: Path) -> None:
    labels = categories(tmp_path, isthing=False)
    conversion = converter.convert(
        output=tmp_path / "out", task="panoptic", labels=labels, stuff="e,f,g", **OWN
    )

    assert json.loads((tmp_path / "out" / "config.json").read_text())["stuff_classes"] == [4, 5, 6]
    assert conversion.warnings() == []
    assert (
        "--stuff e,f,g" in json.loads((tmp_path / "out" / "conversion.json").read_text())["command"]
    )


def test_other_tasks_are_not_warned_of_and_have_no_stuff(tmp_path: Path) -> None:
    labels = categories(tmp_path, isthing=False)
    plan: dict[str, Any] = {
        "output": tmp_path / "out",
        "task": "instance",
        "labels": labels,
        "dry_run": True,
    }

    assert converter.convert(**plan, **OWN).warnings() == []
    with pytest.raises(UsageError, match="--stuff is for panoptic models"):
        converter.convert(**plan, stuff="e", **OWN)


def test_a_wrong_number_of_labels_is_refused(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb")

    with pytest.raises(EomtConvertError, match="has 2 class names; expected 7"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", labels=labels)
    assert names(tmp_path) == ["labels.txt"]


def test_an_image_size_that_patches_do_not_fill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="65x64; expected multiples of the patch size 16"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", image_size=(65, 64))


def test_a_conversion_that_differs_from_its_recording_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputsDifferError) as caught:
        converter.convert(
            "tiny_panoptic_64", tmp_path / "out", recorded=FIXTURES / "tiny_semantic_48"
        )

    verdict = caught.value.conversion.verdict
    assert verdict.verdict == "failed"
    assert "has the shape" in caught.value.message
    assert names(tmp_path) == []


def test_a_model_that_fails_is_kept_on_request(tmp_path: Path) -> None:
    with pytest.raises(OutputsDifferError, match=r"kept as .*out\.unverified"):
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / "out",
            recorded=FIXTURES / "tiny_instance_64_gated",
            keep_unverified=True,
        )

    assert names(tmp_path) == ["out.unverified"]
    assert history(tmp_path / "out.unverified")["verdict"]["verdict"] == "failed"


def changed_recording(folder: Path, name: str, difference: float) -> Path:
    tensors = load_file(TINY / "recorded.safetensors")
    tensors[name].view(-1)[3] += difference
    save_file(tensors, folder / "recorded.safetensors")
    return folder / "recorded.safetensors"


@pytest.mark.parametrize(
    "name", ["mask_logits", "class_logits", "masked.mask_logits.1", "hidden_states.2"]
)
def test_one_number_off_by_more_than_the_tolerance_fails(tmp_path: Path, name: str) -> None:
    recorded = changed_recording(tmp_path, name, 1e-3)

    with pytest.raises(OutputsDifferError, match=rf"{name} differs by up to 0\.00[01]"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", recorded=recorded)


def test_a_model_without_a_recording_is_unverified_not_passed(tmp_path: Path) -> None:
    conversion = converter.convert(
        output=tmp_path / "out", delta=DELTA, backbone=BACKBONE, task="panoptic", image_size=64
    )

    statuses = {level.level: level.status for level in conversion.verdict.levels}
    assert statuses == {
        "structure": "passed",
        "arithmetic": "passed",
        "numbers": "not checked",
        "pictures": "not checked",
        "peers": "not checked",
        "published": "not checked",
    }


def test_verification_can_be_left_out(tmp_path: Path) -> None:
    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", verify=False)

    assert conversion.verdict.verdict == "unverified"
    assert history(tmp_path / "out")["verdict"]["verdict"] == "unverified"


def test_a_required_check_without_recordings_is_refused_before_anything_is_read(
    tmp_path: Path, hub: Hub
) -> None:
    with pytest.raises(NotVerifiedError, match="no recorded outputs"):
        converter.convert("coco_panoptic_small_640", tmp_path / "out", require_verified=True)
    assert hub.requests == []


def test_requiring_and_switching_off_the_check_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        converter.convert("tiny_panoptic_64", require_verified=True, verify=False)


def test_a_dry_run_plans_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.weights.tensorfiles import TensorFile

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(TensorFile, "read", refuse)
    monkeypatch.setattr(TensorFile, "sha256", refuse)

    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", dry_run=True)

    assert conversion.plan.counts()["tensors"] == 95
    assert conversion.output is None
    assert names(tmp_path) == []


def test_an_output_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out", verify=False)
    with pytest.raises(OutputError, match="--force replaces it"):
        converter.convert("tiny_panoptic_64", tmp_path / "out")
    assert history(tmp_path / "out")["verdict"]["verdict"] == "unverified"

    converter.convert("tiny_panoptic_64", tmp_path / "out", force=True)
    assert history(tmp_path / "out")["verdict"]["verdict"] == "passed"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(("force", "exist_ok"), [(True, False), (False, True), (False, False)])
def test_files_that_others_put_into_an_output_stop_the_run(
    tmp_path: Path, force: bool, exist_ok: bool
) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("precious")

    with pytest.raises(OutputError, match=r"did not make \(notes\.txt\)"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", force=force, exist_ok=exist_ok)

    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_force_does_not_replace_a_model_that_was_changed_in_its_place(
    tmp_path: Path, name: str
) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out", verify=False)
    changed = (tmp_path / "out" / name).read_bytes() + b" "
    (tmp_path / "out" / name).write_bytes(changed)

    with pytest.raises(OutputError, match=rf"changed since eomt-convert made them \({name}\)"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", force=True)

    assert (tmp_path / "out" / name).read_bytes() == changed


@pytest.mark.parametrize("history", [None, "[]", '{"tool": {"name": "other"}, "files": {"a": {}}}'])
def test_force_replaces_no_folder_without_our_conversion_json(
    tmp_path: Path, history: str | None
) -> None:
    (tmp_path / "config.json").write_text("{}")
    if history:
        (tmp_path / "conversion.json").write_text(history)

    with pytest.raises(OutputError, match=r"config\.json.*force does not replace them"):
        converter.convert("tiny_panoptic_64", tmp_path, force=True)

    assert (tmp_path / "config.json").read_text() == "{}"


def test_conversion_json_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out")
    told = history(tmp_path / "out")
    told["files"]["mine/thesis.tex"] = told["files"]["config.json"]
    (tmp_path / "out" / "conversion.json").write_text(json.dumps(told))
    (tmp_path / "out" / "mine").mkdir()
    (tmp_path / "out" / "mine" / "thesis.tex").write_text("precious")

    with pytest.raises(OutputError, match=r"did not make \(mine\)"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", force=True)


def test_a_model_that_fails_is_kept_beside_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)

    with pytest.raises(OutputsDifferError, match=r"kept as .*out\.unverified"):
        converter.convert(
            "tiny_panoptic_64",
            place,
            recorded=FIXTURES / "tiny_instance_64_gated",
            keep_unverified=True,
        )

    assert history(tmp_path / "out.unverified")["verdict"]["verdict"] == "failed"
    assert names(tmp_path) == ["out", "out.unverified"]
    assert names(place) == []


@pytest.mark.parametrize("name", [".out.eomt-convert", ".out.unverified.eomt-convert"])
def test_a_planted_link_does_not_delete_what_it_leads_to(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.tex").write_text("precious")
    (tmp_path / name).symlink_to("victim")

    converter.convert("tiny_panoptic_64", tmp_path / "out", keep_unverified=True)

    assert (tmp_path / "victim" / "thesis.tex").read_text() == "precious"
    assert names(tmp_path) == [name, "out", "victim"]


def test_an_output_that_exists_survives_a_replacement_that_fails(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out")
    with pytest.raises(OutputsDifferError):
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / "out",
            force=True,
            recorded=FIXTURES / "tiny_semantic_48",
        )

    assert history(tmp_path / "out")["verdict"]["verdict"] == "passed"
    assert names(tmp_path) == ["out"]


def test_a_swapped_backbone_is_detected(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="made for another backbone"):
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / "out",
            backbone=str(FIXTURES / "tiny_semantic_48" / "backbone"),
        )
    assert names(tmp_path) == []


def test_a_backbone_of_unknown_size_needs_its_config(tmp_path: Path) -> None:
    shutil.copy(TINY / "backbone" / "model.safetensors", tmp_path / "backbone.safetensors")
    files: dict[str, Any] = {"delta": DELTA, "backbone": str(tmp_path / "backbone.safetensors")}

    with pytest.raises(PlanError, match="--backbone-config"):
        converter.convert(output=tmp_path / "out", task="panoptic", image_size=64, **files)

    conversion = converter.convert(
        output=tmp_path / "out",
        task="panoptic",
        image_size=64,
        backbone_config=TINY / "backbone" / "config.json",
        recorded=TINY,
        **files,
    )
    assert conversion.verdict.verdict == "passed"


def test_nonfinite_weights_are_converted_on_request(tmp_path: Path) -> None:
    state = torch.load(TINY / "delta" / "pytorch_model.bin")
    state["network.q.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "delta.bin")
    files: dict[str, Any] = {"delta": str(tmp_path / "delta.bin"), "backbone": BACKBONE}
    files |= {"output": tmp_path / "out", "task": "panoptic", "image_size": 64}

    with pytest.raises(UnreadableFileError, match=r"network\.q\.weight .* NaN or infinity"):
        converter.convert(**files)
    assert names(tmp_path) == ["delta.bin"]

    conversion = converter.convert(**files, allow_nonfinite=True)
    assert conversion.verdict.verdict == "unverified"
    with pytest.raises(OutputsDifferError):
        converter.convert(**files, allow_nonfinite=True, force=True, recorded=TINY)


@pytest.fixture
def published(hub: Hub) -> Hub:
    """A Hub where the small panoptic checkpoint is published, with tiny weights."""
    delta, backbone = (
        "tue-mps/coco_panoptic_eomt_small_640_dinov3",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
    )
    hub.create_repo(delta, {"pytorch_model.bin": TINY / "delta" / "pytorch_model.bin"})
    hub.create_repo(
        backbone,
        {name: TINY / "backbone" / name for name in ("config.json", "model.safetensors")},
    )
    return hub


def test_a_published_checkpoint_is_fetched_at_a_commit(published: Hub, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(list("abcdefg")))

    conversion = converter.convert("coco_panoptic_small_640", tmp_path / "out", labels=labels)

    assert conversion.verdict.verdict == "unverified"
    source = history(tmp_path / "out")["sources"]["delta"]
    assert source["repo"] == "tue-mps/coco_panoptic_eomt_small_640_dinov3"
    assert source["revision"] == conversion.sources["delta"].revision
    assert len(source["revision"]) == 40
    assert set(source["files"]) == {"pytorch_model.bin"}


def test_a_published_checkpoint_is_converted_offline_from_the_cache(
    published: Hub, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(list("abcdefg")))
    online = converter.convert("coco_panoptic_small_640", tmp_path / "online", labels=labels)
    published.requests.clear()

    offline = converter.convert(
        "coco_panoptic_small_640", tmp_path / "offline", labels=labels, local_files_only=True
    )

    assert published.requests == []
    assert offline.files == online.files


def test_a_report_in_the_output_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gets its own verdict\.html"):
        converter.convert(
            "tiny_panoptic_64", tmp_path / "out", report=tmp_path / "out" / "page.html"
        )

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_the_working_directory_is_filled_and_stays_the_same_folder(
    force: bool, command: Callable[..., Result], tmp_path: Path
) -> None:
    arguments = ("--checkpoint", "tiny_panoptic_64", "--no-verify", "--output", ".")
    number = tmp_path.stat().st_ino
    if force:
        assert command(*arguments).exit_code == 0
    result = command(*arguments, *(["--force"] if force else []))

    assert result.exit_code == 0, result.output
    assert tmp_path.stat().st_ino == number
    assert (tmp_path / "conversion.json").is_file()
    assert not list(tmp_path.glob(".*eomt-convert*"))
