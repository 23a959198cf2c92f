"""Corners of published outputs, and models compared with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from hub_server import Hub
from PIL import Image
from recorded_models import recorded_model

import converter
from converter import report
from converter.catalog import CATALOG
from converter.checks.pixels import fit, read_picture
from converter.checks.published import PUBLISHED, Corner, Slices
from converter.checks.verdict import Level, Verdict
from converter.errors import NotVerifiedError

pytestmark = pytest.mark.numbers

NAME = "tiny_panoptic_64"


def published(found: Verdict) -> Level:
    return next(level for level in found.levels if level.level == "published")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that has to be resized and padded."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def slices(picture: Path, monkeypatch: pytest.MonkeyPatch) -> Slices:
    """Corners of the outputs of a tiny model, recorded as if it had been published."""
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, size=(43, 64), mode="bilinear", antialias=True)
    padded = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    padded[:, :, :43] = pixels
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        output = recorded_model(NAME)((padded / 255 - mean) / std)

    def corner(values: torch.Tensor) -> Corner:
        a, b, c = (tuple(round(value, 4) for value in row) for row in values[:3, :3].tolist())
        return a, b, c

    recorded = Slices(
        side=64,
        class_logits=corner(output.class_queries_logits[0]),
        mask_logits=corner(output.masks_queries_logits[0, 0]),
    )
    monkeypatch.setitem(PUBLISHED, NAME, recorded)
    return recorded


def without_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves only the published corners to check models against."""
    monkeypatch.setattr("converter.catalog.Checkpoint.recorded", None)


def test_a_right_model_passes_by_the_published_corners_alone(
    model: Path, picture: Path, slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_recording(monkeypatch)

    found = converter.verify(model, image=picture)

    assert found.verdict == "passed"
    level = published(found)
    assert level.status == "passed"
    assert level.figures["compared"]["mask_logits"]["max_abs"] < 1e-3
    assert "  published  passed: tolerance 0.001, largest" in "\n".join(report.verdict(found))
    statuses = {level.level: level.status for level in found.levels}
    assert statuses["numbers"] == "not checked"


@pytest.mark.parametrize("name", ["class_logits", "mask_logits"])
def test_one_number_that_is_off_fails(
    name: str, model: Path, picture: Path, slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = getattr(slices, name)
    changes: Any = {name: ((first[0], first[1] + 0.05, first[2]), *rest)}
    changed = replace(slices, **changes)
    monkeypatch.setitem(PUBLISHED, NAME, changed)

    found = converter.verify(model, image=picture)

    assert found.verdict == "failed"
    assert published(found).reason == (
        f"The first {name} differ from the published ones by up to 0.05."
    )


def test_another_picture_fails(model: Path, tmp_path: Path, slices: Slices) -> None:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")

    assert published(converter.verify(model, image=tmp_path / "red.png")).status == "failed"


def test_without_the_picture_nothing_is_claimed(
    model: Path, slices: Slices, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    without_recording(monkeypatch)

    found = converter.verify(model, local_files_only=True)

    assert found.verdict == "unverified"
    assert "000000039769.jpg is not in the cache" in published(found).reason


def test_a_checkpoint_without_recorded_outputs_never_passes(
    model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_recording(monkeypatch)

    found = converter.verify(model, image=picture)

    assert found.verdict == "unverified"
    assert found.reason == "No recorded outputs to compare the model with."
    assert published(found) == Level(
        "published", "not checked", "No recorded outputs to compare the model with."
    )


def test_sums_before_rounding_are_compared_with_the_published_corners(
    tmp_path: Path, picture: Path, slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_recording(monkeypatch)
    converter.convert(NAME, tmp_path / "out", dtype="bfloat16", verify=False)

    found = converter.verify(tmp_path / "out", image=picture)

    assert (found.verdict, found.basis) == ("passed", "published")
    assert published(found).figures["compared"]["mask_logits"]["max_abs"] < 1e-3


def test_rounded_weights_without_sources_are_not_compared_with_the_published_corners(
    tmp_path: Path, picture: Path, slices: Slices
) -> None:
    converter.convert(NAME, tmp_path / "out", dtype="bfloat16", verify=False)
    history = json.loads((tmp_path / "out/conversion.json").read_text())
    for file in history["sources"]["delta"]["files"].values():
        file["sha256"] = "0" * 64  # so that the sources are not found
    (tmp_path / "out/conversion.json").write_text(json.dumps(history))

    level = published(converter.verify(tmp_path / "out", image=picture))

    assert (level.status, "rounded" in level.reason) == ("not checked", True)


def test_other_weights_under_a_checkpoints_name_are_not_taken_for_it(
    model: Path, picture: Path, slices: Slices
) -> None:
    history = json.loads((model / "conversion.json").read_text())
    history["sources"]["delta"] |= {"repo": "somebody/fine-tuned", "revision": "a" * 40}
    (model / "conversion.json").write_text(json.dumps(history))

    assert published(converter.verify(model, image=picture)).status == "not checked"


def test_a_conversion_is_compared_with_the_published_corners_too(
    tmp_path: Path, picture: Path, slices: Slices
) -> None:
    conversion = converter.convert(NAME, tmp_path / "out", image=picture)

    assert published(conversion.verdict).status == "passed"


def test_the_published_corners_satisfy_a_required_verification(
    tmp_path: Path, picture: Path, slices: Slices, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    without_recording(monkeypatch)

    converter.convert(NAME, tmp_path / "out", image=picture, require_verified=True)
    with pytest.raises(NotVerifiedError, match=r"unverified\. .*39769\.jpg is not in the cache"):
        converter.convert(NAME, tmp_path / "other", require_verified=True, local_files_only=True)

    assert not (tmp_path / "other").exists()


def test_the_corners_are_of_checkpoints_of_that_size() -> None:
    sizes = {entry.name: entry.image_size for entry in CATALOG}
    assert {name: (found.side, found.side) for name, found in PUBLISHED.items()} == {
        name: sizes[name] for name in PUBLISHED
    }
    for found in PUBLISHED.values():
        for corner in (found.class_logits, found.mask_logits):
            assert [len(row) for row in corner] == [3, 3, 3]


def test_a_picture_that_fits_is_only_padded() -> None:
    pixels = torch.randint(256, (1, 3, 48, 64), dtype=torch.uint8)

    padded = fit(pixels, 64)

    assert torch.equal(padded[:, :, :48], pixels)
    assert padded.shape == (1, 3, 64, 64)
    assert not padded[:, :, 48:].any()


def test_a_picture_is_read_unchanged(converted: Callable[[str], Path]) -> None:
    path = FIXTURES / NAME / "images" / "0.png"

    pixels = read_picture(path)

    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[0], torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
