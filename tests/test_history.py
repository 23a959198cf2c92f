"""conversion.json: malformed content is refused, with what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

import converter
from converter.errors import OutputError, UnreadableFileError
from converter.files import sha256
from converter.history import read_history


def test_what_a_conversion_wrote_is_read(model: Path) -> None:
    content = json.loads((model / "conversion.json").read_text())
    history = read_history(model)

    assert history is not None
    assert history.checkpoint is not None
    assert (history.tool, history.version) == tuple(content["tool"].values())
    assert history.command == content["command"] == "eomt-convert --checkpoint tiny_panoptic_64"
    assert (history.checkpoint.name, history.task) == ("tiny_panoptic_64", "panoptic")
    assert (history.dtype, history.weights) == ("float32", "delta")
    assert set(history.sources) == {"backbone", "delta"}
    assert history.to_dict() == content
    assert history.files["config.json"].sha256 == sha256(model / "config.json")
    assert history.tensors == {name: row["sha256"] for name, row in content["tensors"].items()}
    assert history.rows["query.weight"].shape == tuple(content["tensors"]["query.weight"]["shape"])


def test_a_model_without_conversion_json_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tool": None}, "tool is None; expected an object"),
        ({"tool": {"name": "x"}}, "tool lacks 'version'; expected text"),
        ({"files": []}, r"files is \[\]; expected an object"),
        ({"files": {"a": 1}}, "files.a is 1; expected an object"),
        ({"verdict": 2}, "verdict is 2; expected an object"),
        ({"verdict": {"verdict": "passed", "levels": 5}}, "verdict.levels is 5; expected a list"),
        (
            {"verdict": {"verdict": "passed", "levels": [{"level": "a", "status": "passed"}]}},
            "verdict.levels.0 lacks 'figures'; expected an object",
        ),
        (
            {
                "verdict": {
                    "verdict": "passed",
                    "levels": [
                        {"level": "a", "status": "b", "figures": {"relative_tolerance": "c"}}
                    ],
                }
            },
            "verdict.levels.0.figures.relative_tolerance is 'c'; expected a number",
        ),
        ({"sources": {"delta": []}}, r"sources.delta is \[\]; expected an object"),
        ({"sources": {"other": {}}}, "sources has 'other'; expected backbone, delta, weights"),
        (
            {"sources": {"delta": {"repo": 1, "revision": None, "files": {}}}},
            "sources.delta.repo is 1; expected text or null",
        ),
        ({"state_key": 1}, "state_key is 1; expected text"),
        ({"warnings": [1]}, r"warnings is \[1\]; expected a list of texts"),
        ({"category_ids": ["1"]}, r"category_ids is \['1'\]; expected a list of ids"),
        ({"command": ["eomt-convert"]}, "command is .* expected text"),
        ({"dtype": "`float32`"}, "dtype is '`float32`'; expected one of float32, bfloat16"),
        ({"weights": []}, r"weights is \[\]; expected one of delta, absolute"),
        (
            {"task": "panoptic\n# x"},
            "task is .* expected one of panoptic, instance, semantic, null",
        ),
        (
            {"tensors": {"a": {"shape": [1], "dtype": "F32", "recipe": "", "sha256": ["b"]}}},
            r"tensors.a.sha256 is \['b'\]; expected text",
        ),
        (
            {"tensors": {"a": {"shape": [-1], "dtype": "F32", "recipe": "", "sha256": "b"}}},
            "tensors.a.shape is .* expected a list of sizes",
        ),
    ],
)
def test_a_conversion_json_that_no_conversion_wrote_is_refused(
    model: Path, changes: dict[str, Any], said: str
) -> None:
    history = json.loads((model / "conversion.json").read_text())
    (model / "conversion.json").write_text(json.dumps(history | changes))

    said = rf"conversion\.json was not written by a conversion: {said}"
    for call in (lambda: converter.publish(model, "me/model"), lambda: converter.verify(model)):
        with pytest.raises(UnreadableFileError, match=said):
            call()


@pytest.mark.parametrize("lost", ["tool", "sources", "tensors", "verdict", "command"])
def test_a_conversion_json_that_lacks_something_is_refused(model: Path, lost: str) -> None:
    history = json.loads((model / "conversion.json").read_text())
    del history[lost]
    (model / "conversion.json").write_text(json.dumps(history))

    with pytest.raises(UnreadableFileError, match=f"it lacks '{lost}'"):
        converter.publish(model, "me/model")


@pytest.mark.parametrize(
    "changes", [{"image_size": "64"}, {"image_size": [64]}, {"num_queries": "x"}, {"id2label": 1}]
)
def test_a_config_that_no_conversion_wrote_is_refused(model: Path, changes: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))

    with pytest.raises(UnreadableFileError, match=f"config.json: {next(iter(changes))} is"):
        converter.publish(model, "me/model")


def test_a_folder_that_no_conversion_made_is_not_replaced(model: Path) -> None:
    (model / "conversion.json").write_text('{"command": []}')

    with pytest.raises(OutputError, match="did not make"):
        converter.convert("tiny_panoptic_64", model, exist_ok=True)
