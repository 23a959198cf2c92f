"""A job: options become a value, and the value becomes the command line that says the same."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import converter
from converter.catalog import find
from converter.cli import main
from converter.errors import UnreadableFileError, UsageError
from converter.job import Job, JobOptions
from converter.places import HubSource, LocalSource

TINY = find("tiny_panoptic_64")


def test_a_checkpoints_name_gives_sources_task_size_and_recording() -> None:
    job = Job.of("tiny_panoptic_64")

    assert (job.checkpoint, job.delta, job.backbone) == (
        TINY,
        TINY.source("delta"),
        TINY.source("backbone"),
    )
    assert (job.task, job.image_size) == (TINY.task, TINY.image_size)
    assert job.recorded is not None
    assert job.recorded.parent == TINY.recorded
    assert job.published == TINY
    assert job.command() == "eomt-convert --checkpoint tiny_panoptic_64"


def test_options_come_before_the_catalogue(tmp_path: Path) -> None:
    job = Job.of(
        "tiny_panoptic_64",
        delta=str(tmp_path),
        task="instance",
        image_size=32,
        max_shard_size="1KB",
    )

    assert (job.delta, job.backbone) == (LocalSource(tmp_path), TINY.source("backbone"))
    assert (job.task, job.image_size, job.max_shard_size) == ("instance", (32, 32), 1000)
    assert job.published is None


def test_none_is_the_same_as_no_option() -> None:
    assert Job.of("tiny_panoptic_64", delta=None, labels=None, image_size=None) == Job.of(
        "tiny_panoptic_64"
    )


@pytest.mark.parametrize("option", ["recorded", "labels", "max_shard_size"])
def test_empty_text_is_refused_as_of_a_shell_variable_that_is_not_set(option: str) -> None:
    options: Any = {option: ""}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is empty"):
        Job.of("tiny_panoptic_64", **options)


def test_the_command_has_each_option_that_changes_the_result(tmp_path: Path) -> None:
    options: JobOptions = {
        "delta": "owner/delta@v1",
        "state_key": "ema",
        "backbone": "owner/backbone@main",
        "weights": "delta",
        "backbone_layout": "meta",
        "backbone_config": tmp_path / "my config.json",
        "task": "semantic",
        "image_size": (32, 64),
        "labels": tmp_path / "names.txt",
        "stuff": ["sky", "trees, bushes"],
        "dtype": "bfloat16",
        "max_shard_size": 5000,
        "recorded": TINY.recorded,
        "verify": False,
        "check_backbone": True,
        "image": tmp_path / "cats.jpg",
        "allow_mismatch": True,
        "allow_nonfinite": True,
    }
    assert options.keys() == JobOptions.__annotations__.keys()

    job = Job.of(**options)

    assert job.delta == HubSource("owner/delta", "v1")
    assert shlex.split(job.command()) == [
        "eomt-convert",
        *("--delta", "owner/delta@v1"),
        *("--state-key", "ema"),
        *("--backbone", "owner/backbone"),
        *("--weights", "delta"),
        *("--backbone-layout", "meta"),
        *("--backbone-config", "my config.json"),
        *("--task", "semantic"),
        *("--image-size", "32x64"),
        *("--labels", "names.txt"),
        *("--stuff", 'sky,"trees, bushes"'),
        *("--dtype", "bfloat16"),
        *("--max-shard-size", "5000"),
        *("--recorded", "tiny_panoptic_64"),
        "--no-verify",
        "--check-backbone",
        "--allow-mismatch",
        "--allow-nonfinite",
    ]


def test_options_that_equal_the_catalogues_are_not_in_the_command() -> None:
    job = Job.of(
        "tiny_panoptic_64",
        task=TINY.task,
        image_size=TINY.image_size,
        recorded=TINY.recorded,
        weights="auto",
        dtype="float32",
    )

    assert job == Job.of("tiny_panoptic_64")
    assert job.command() == "eomt-convert --checkpoint tiny_panoptic_64"


@pytest.mark.parametrize("names", ['sky, "trees, bushes"', ["sky", "trees, bushes"]])
def test_stuff_is_a_list_or_a_text_with_commas(names: str | list[str]) -> None:
    assert Job.of("tiny_panoptic_64", stuff=names).stuff == ("sky", "trees, bushes")


def test_a_switch_may_be_a_number() -> None:
    options: Any = {"verify": 0, "check_backbone": 1, "allow_mismatch": 0}

    command = Job.of("tiny_panoptic_64", **options).command()

    assert command == "eomt-convert --checkpoint tiny_panoptic_64 --no-verify --check-backbone"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "There is nothing to convert"),
        ({"backbone": "owner/name"}, "Without --checkpoint, --delta must be given"),
        ({"checkpoint": "tiny_panoptic"}, "tiny_panoptic"),
        ({"checkpoint": "tiny_panoptic_64", "delta": "nowhere"}, "'nowhere'"),
        ({"checkpoint": "tiny_panoptic_64", "max_shard_size": "much"}, "'much'"),
        ({"checkpoint": "tiny_panoptic_64", "max_shard_size": 0}, "'0' is"),
        ({"checkpoint": "tiny_panoptic_64", "stuff": " , "}, "--stuff names no classes"),
    ],
)
def test_incomplete_or_invalid_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Job.of(**options)


def test_missing_recorded_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="no recorded outputs"):
        Job.of("tiny_panoptic_64", recorded=tmp_path)


@pytest.mark.parametrize("value", ["delta", None, ""])
def test_an_unknown_option_is_refused_as_python_does(tmp_path: Path, value: str | None) -> None:
    options: Any = {"weight": value}
    with pytest.raises(TypeError, match=r"convert\(\) got an unexpected keyword argument 'weight'"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", **options)

    assert list(tmp_path.iterdir()) == []


def test_python_and_the_command_line_have_the_options_of_a_job() -> None:
    names = {field.name for field in fields(Job)} - {"checkpoint"}
    documented = re.findall(r"^        (\w+): ", converter.convert.__doc__ or "", re.MULTILINE)

    assert names == JobOptions.__annotations__.keys()
    assert names <= {parameter.name for parameter in main.params}
    assert names <= set(documented)
