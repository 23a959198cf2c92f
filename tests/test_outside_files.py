"""Files from outside, through the commands: not regular files, too large, or malformed."""

import json
import os
import shutil
import signal
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import FIXTURES
from PIL import EpsImagePlugin
from safetensors.torch import load_file, save_file

import reference_model
from converter.checks import pixels
from converter.configs import read_backbone_config
from converter.errors import UnreadableFileError
from converter.files import JSON_LIMIT, read_json_object
from converter.pictures import segmenting
from converter.pictures.datasets import Files

Command = Callable[..., Result]

TINY = FIXTURES / "tiny_panoptic_64"
CONVERT = (
    *("--delta", TINY / "delta", "--backbone", TINY / "backbone"),
    *("--task", "panoptic", "--image-size", "64", "--output", "out"),
)
LONG = "x" * 300
NOBODY = "~no-such-user/model"
DATA = FIXTURES / "shapes_panoptic_128" / "val"
EVALUATE = ("evaluate", "model", "--dataset", "coco-panoptic", "--data", DATA)
SEGMENT = ("segment", "model", TINY / "images" / "0.png", "--output", "out")


@contextmanager
def no_waiting(seconds: int = 30) -> Iterator[None]:
    """Fails a block that waits for a pipe."""

    def give_up(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def error_of(command: Command, *arguments: str | Path) -> str:
    """The one message of a command that fails as it should."""
    with no_waiting():
        result = command(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def edit(file: Path, **changes: Any) -> None:
    """Changes values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# pipes and devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ((*CONVERT, "--labels", "special"), "special"),
        ((*CONVERT, "--backbone-config", "special"), "special"),
        (("verify", "model", "--level", "1"), "model/config.json"),
        (("verify", "model"), "model/config.json"),
        (("verify", "model", "--level", "1"), "model/preprocessor_config.json"),
        (SEGMENT, "model/config.json"),
        (("segment", "model", "special", "--output", "out"), "special"),
        (("record", "model", "--output", "out", "--image", "special"), "special"),
        (("inspect", "special"), "special"),
    ],
)
def test_a_pipe_or_a_device_ends_in_one_error_at_once(
    command: Command, model: Path, arguments: tuple[str, ...], file: str, kind: str, tmp_path: Path
) -> None:
    place = tmp_path / file
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")

    message = error_of(command, *arguments)

    assert Path(file).name in message
    reasons = ("not a regular file", "no file", "a device", "has no")
    assert any(reason in message for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ((*CONVERT, "--labels", "large"), "large"),
        ((*CONVERT, "--backbone-config", "large"), "large"),
        (("verify", "model", "--level", "1"), "model/config.json"),
        (SEGMENT, "model/config.json"),
        (("segment", "model", "large", "--output", "out"), "large"),
        (("verify", "model", "--recorded", "large"), "large"),
    ],
)
def test_a_file_larger_than_its_kind_is_not_read(
    command: Command, model: Path, arguments: tuple[str, ...], file: str, tmp_path: Path
) -> None:
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(2**35)

    message = error_of(command, *arguments)

    assert f"{Path(file).name}" in message
    assert "larger than" in message
    assert "bytes" in message


def test_the_densest_json_takes_little_memory(tmp_path: Path) -> None:
    part = 8  # of the limit: memory is in proportion to the file, and tracing it takes long
    content = b'{"a":[' + b"[]," * (JSON_LIMIT // part // 3 - 4) + b"1]}"
    (tmp_path / "config.json").write_bytes(content)
    assert len(content) <= JSON_LIMIT

    tracemalloc.start()
    try:
        read_json_object(tmp_path / "config.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2**28 // part


# pictures ----------------------------------------------------------------------------------------


def read_from_dataset(picture: Path) -> None:
    with Files(picture.parent) as files:
        files.read_image(picture.name, "RGB")


@pytest.mark.parametrize(
    "read", [segmenting._read, pixels.open_picture, pixels.read_picture, read_from_dataset]
)
def test_no_program_is_run_to_read_a_picture(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "0.png"
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # to be looked for again

    with pytest.raises(UnreadableFileError, match=r"not a readable picture|known format"):
        read(picture)

    assert not (tmp_path / "was-run").exists()


# places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", LONG),
        ("verify", LONG),
        ("verify", "model", "--recorded", LONG),
        ("segment", LONG, TINY / "images" / "0.png"),
        ("segment", "model", LONG),
        ("segment", "model", TINY / "images" / "0.png", "--output", LONG),
        ("record", "model", "--random", "1", "--output", LONG),
        ("push", LONG, "me/model"),
        ("--delta", LONG, "--backbone", LONG, "--output", "out"),
        (*CONVERT, "--labels", LONG),
        (*CONVERT[:-1], LONG),
        (*CONVERT, "--report", LONG),
        (*CONVERT, "--recorded", LONG),
    ],
    ids=lambda arguments: " ".join(map(shortened, arguments)),
)
def test_an_impossible_path_ends_in_one_error(
    command: Command, model: Path, arguments: tuple[str | Path, ...]
) -> None:
    assert "name too long" in error_of(command, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", NOBODY),
        ("verify", NOBODY),
        ("verify", "model", "--recorded", NOBODY),
        ("segment", NOBODY, TINY / "images" / "0.png"),
        ("push", NOBODY, "me/model"),
        ("--delta", NOBODY, "--backbone", NOBODY, *CONVERT[4:]),
        (*CONVERT, "--labels", NOBODY),
    ],
    ids=lambda arguments: " ".join(map(shortened, arguments)),
)
def test_the_home_of_an_unknown_user_ends_in_one_error(
    command: Command, model: Path, arguments: tuple[str | Path, ...]
) -> None:
    assert NOBODY in error_of(command, *arguments)


def test_pictures_that_cannot_be_opened_are_skipped(
    command: Command, model: Path, tmp_path: Path
) -> None:
    result = command("segment", "model", LONG, TINY / "images" / "0.png", "--output", "out")

    assert result.exit_code == 1
    assert f"Skipped {LONG}: File name too long" in result.stderr
    assert (tmp_path / "out" / "0.overlay.jpg").exists()


@pytest.mark.parametrize(
    "arguments", [CONVERT, ("record", "model", "--random", "1", "--output", "out"), SEGMENT]
)
def test_an_output_that_is_a_link_to_itself_is_refused(
    command: Command, model: Path, arguments: tuple[str | Path, ...], tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to("out")

    message = error_of(command, *arguments)
    assert any(reason in message for reason in ("out is a file", "out cannot be written"))


def test_the_root_of_the_file_system_is_refused_as_an_output(command: Command) -> None:
    assert "--force does not replace them" in error_of(command, *CONVERT[:-1], "/")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: bytes(2**60)])
def test_too_little_memory_ends_in_one_error(
    command: Command, model: Path, allocate: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        reference_model.EomtDinov3ForUniversalSegmentation, "forward", lambda *_, **__: allocate()
    )

    assert "This machine or its GPU does not have enough memory" in error_of(
        command, "verify", "model"
    )


# numbers of config.json --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10_000_000),
        ("num_upscale_blocks", 10_000_000),
        ("hidden_size", 2**40),
        ("num_register_tokens", 10**30),
        ("layerscale_value", 10**330),
        ("layerscale_value", float("inf")),
        ("layer_norm_eps", float("nan")),
        ("image_size", [64, 2**40]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10**330}),
        ("num_labels", 10**12),
    ],
    ids=shortened,
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "model", "--level", "1"),
        ("verify", "model"),
        SEGMENT,
        ("evaluate", "model", "--dataset", "coco-panoptic", "--data", "."),
        ("record", "model", "--output", "out", "--random", "1"),
        ("push", "model", "me/model"),
        ("--delta", "model", "--output", "out"),
        (*CONVERT, "--backbone-config", "backbone.json"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_a_number_out_of_bounds_is_refused_by_every_command(
    command: Command, model: Path, arguments: tuple[str, ...], key: str, value: Any, tmp_path: Path
) -> None:
    file = model / "config.json"
    if "backbone.json" in arguments:
        shutil.copy(TINY / "backbone" / "config.json", tmp_path / "backbone.json")
        file = tmp_path / "backbone.json"
    edit(file, **{key: value})

    message = error_of(command, *arguments)

    key, value = (
        ("rope_parameters.rope_theta", 10**330) if isinstance(value, dict) else (key, value)
    )
    complaint = f"{file.relative_to(tmp_path)}: {key} is {shortened(value)}; expected a"
    assert complaint in message


def test_limits_leave_ample_room_for_the_largest_dinov3(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 40}
    file = Path(shutil.copy(TINY / "backbone" / "config.json", tmp_path / "config.json"))
    sizes = {key: 16 * size for key, size in sizes.items()}
    edit(file, **sizes)

    found = read_backbone_config(file)
    assert all(getattr(found, key) == size for key, size in sizes.items())


# weights -----------------------------------------------------------------------------------------


def test_a_wrong_checksum_of_the_weights_is_a_warning(command: Command, tmp_path: Path) -> None:
    content = bytearray((TINY / "delta" / "pytorch_model.bin").read_bytes())
    with zipfile.ZipFile(TINY / "delta" / "pytorch_model.bin") as archive:
        entry = archive.getinfo("pytorch_model/data/79")
        with archive.open(entry) as record:
            content[content.index(record.read(), entry.header_offset)] ^= 1
    (tmp_path / "delta.bin").write_bytes(content)
    warning = "Warning: The CRC-32 of 'pytorch_model/data/79' in delta.bin differs"

    result = command("--delta", "delta.bin", *CONVERT[2:], "--no-verify")
    assert result.exit_code == 0
    assert warning in result.stderr

    result = command("inspect", "delta.bin")
    assert result.exit_code == 0
    assert warning in result.stderr
    shown = json.loads(command("inspect", "delta.bin", "--json").stdout)
    assert shown["wrong_checksums"] == ["pytorch_model/data/79"]

    given = ("--delta", "delta.bin", "--backbone", TINY / "backbone")
    result = command("verify", "out", *given, "--level", "2", "--json")
    (_, arithmetic, *_) = json.loads(result.stdout)["levels"]
    assert arithmetic["status"] == "passed"
    assert "The CRC-32 of 'pytorch_model/data/79' in delta.bin differs" in arithmetic["reason"]


# invalid values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("verify", "model", "--level", "1"), SEGMENT])
@pytest.mark.parametrize("name", [[1], {"a": 1}, None, "\ud800"])
def test_a_class_name_that_is_not_text_is_named(
    command: Command, model: Path, arguments: tuple[str, ...], name: object
) -> None:
    labels = json.loads((model / "config.json").read_text())["id2label"]
    edit(model / "config.json", id2label={**labels, "6": name})

    message = error_of(command, *arguments)

    assert "model/config.json" in message
    assert "id2label.6" in message


@pytest.mark.parametrize(
    "labels", ['["a", "\\ud800"]', '{"categories": [{"id": 0, "name": "\\ud800"}]}']
)
def test_a_lone_surrogate_in_labels_is_named(command: Command, labels: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(labels)

    message = error_of(command, *CONVERT, "--labels", "names.json")

    assert "A class name in names.json holds half of a character" in message
    assert "'\\ud800'" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", ["x"]),
        ("image_mean", ["x", 0, 0]),
        ("image_mean", 0.5),
        ("image_std", [0, 1, 1]),
        ("image_std", [10**330, 1, 1]),
        ("resample", 99),
        ("resample", "bilinear"),
        ("rescale_factor", "much"),
        ("do_rescale", "no"),
        ("size", 64),
        ("size", {"height": 10**9, "width": 64}),
    ],
)
def test_an_invalid_value_of_the_processor_is_named(
    command: Command, model: Path, key: str, value: object
) -> None:
    edit(model / "preprocessor_config.json", **{key: value})

    message = error_of(command, *SEGMENT)

    assert f"model/preprocessor_config.json: {key} is {shortened(value)}; expected" in message


@pytest.mark.parametrize("pixels", [63, 128, 2**14])
@pytest.mark.parametrize("arguments", [SEGMENT, EVALUATE])
def test_pictures_of_another_size_than_the_models_are_refused(
    command: Command, model: Path, arguments: tuple[str, ...], pixels: int
) -> None:
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    edit(model / "preprocessor_config.json", size=size)

    message = error_of(command, *arguments)

    assert "image_size in model/config.json is [64, 64]" in message
    assert f"preprocessor_config.json makes pictures of [{pixels}, {pixels}]" in message


def test_a_model_of_other_channels_than_pictures_have_is_refused(
    command: Command, model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    patches = "embeddings.patch_embeddings.weight"
    weights[patches] = weights[patches][:, :1].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edit(model / "config.json", num_channels=1)

    assert "num_channels in model/config.json is 1, expected 3 for pictures." in error_of(
        command, *SEGMENT
    )


def test_an_integer_layer_scale_is_accepted(command: Command, model: Path) -> None:
    edit(model / "config.json", layerscale_value=1)

    assert command("verify", "model", "--level", "1").exit_code == 0


@pytest.mark.parametrize(
    ("name", "edit_tensor", "complaint"),
    [
        ("rope.cos", lambda t: t[None], "has the shape [1, 16, 16], expected 2 dimensions"),
        ("rope.cos", lambda t: t[:1], "rope.cos and rope.sin in"),
        ("hidden_states.1", torch.flatten, "expected 3 dimensions"),
        ("masked.class_logits.0", torch.flatten, "expected 3 dimensions"),
        (
            "patch_embeddings",
            torch.Tensor.bool,
            "has dtype torch.bool, expected floating point numbers",
        ),
        ("last_hidden_state", lambda _: torch.tensor(1.0), "is empty, or a single number"),
        ("pixels", torch.Tensor.bool, "has dtype torch.bool, expected torch.uint8"),
        (
            "pipeline.0.panoptic@0.8",
            torch.Tensor.bool,
            "has dtype torch.bool, expected whole numbers",
        ),
        ("pipeline.0.panoptic@0.8", torch.flatten, "expected 3 dimensions"),
        ("pipeline.0.panoptic@0.8", lambda _: torch.tensor(1), "expected 3 dimensions"),
    ],
)
def test_a_malformed_recording_is_refused_whatever_the_model(
    command: Command,
    model: Path,
    name: str,
    edit_tensor: Callable[[torch.Tensor], torch.Tensor],
    complaint: str,
    tmp_path: Path,
) -> None:
    # a wrong model, so that what is wrong with it is looked for in the recording
    weights = load_file(model / "model.safetensors")
    weights["layers.1.attention.q_proj.weight"] *= -1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(TINY / "images", tmp_path / "recorded" / "images")
    tensors = load_file(TINY / "recorded.safetensors")
    tensors[name] = edit_tensor(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "recorded" / "recorded.safetensors")

    message = error_of(command, "verify", "model", "--recorded", "recorded")

    assert name.partition(".")[0] in message
    assert "recorded/recorded.safetensors" in message
    assert complaint in message
