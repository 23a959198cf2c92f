"""Every command once, as a user runs it. `pytest -m smoke` runs these under any versions."""

import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES, HANGS, over_xet
from hub_server import Hub, client_environment

from converter.cli import main

pytestmark = [pytest.mark.smoke, over_xet]

EOMT_CONVERT = Path(sysconfig.get_path("scripts")) / "eomt-convert"
TINY = FIXTURES / "tiny_panoptic_64"
SHAPES = FIXTURES / "shapes_panoptic_128"

Run = Callable[..., str]


@pytest.fixture
def run(hub: Hub, me: str, tmp_path: Path) -> Run:
    """Runs `eomt-convert` in a process whose client uses the Hub; returns what it prints."""
    environment = client_environment(hub, tmp_path / "home", token=me)

    def run(*arguments: str | Path) -> str:
        process = subprocess.run(
            [EOMT_CONVERT, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANGS,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


@pytest.fixture
def tiny(converted: Callable[[str], Path]) -> Path:
    return converted("tiny_panoptic_64")


def test_version(run: Run) -> None:
    assert run("--version").startswith("eomt-convert, version ")


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help(run: Run, name: str) -> None:
    assert run(*name.split(), "--help").startswith(f"Usage: eomt-convert {name}")


def test_convert(run: Run) -> None:
    printed = run("--checkpoint", "tiny_panoptic_64", "--push-to", "me/model")

    assert "verdict   passed\n" in printed
    assert "remote    read back: " in printed


def test_list(run: Run) -> None:
    assert "\nshapes_panoptic_128 " in run("list")


def test_inspect(run: Run) -> None:
    assert "\nweights     delta\n" in run("inspect", TINY / "delta")


def test_verify(run: Run, tiny: Path) -> None:
    printed = run("verify", tiny, "--against", "transformers", "--report", "verdict.html")

    assert "  peers      passed: " in printed


def test_record(run: Run, tiny: Path) -> None:
    printed = run("record", tiny, "--output", "recording", "--random", "1")

    assert "\n  mask_logits   F32  1x16x16x16\n" in printed


def test_push_and_release(run: Run, tiny: Path) -> None:
    repo = "me/eomt-dinov3-tiny-panoptic-64"

    assert "because of --dry-run" in run("push", tiny, repo, "--dry-run")
    assert "\ntag       v1\n" in run("push", tiny, repo, "--tag", "v1")
    printed = run("release", "--checkpoint", "tiny_panoptic_64", "--namespace", "me")
    assert f"{repo}  published  passed" in printed


def test_segment(run: Run, tiny: Path) -> None:
    assert "0.png -> segments/0.overlay.jpg: " in run("segment", tiny, TINY / "images" / "0.png")


def test_evaluate(run: Run, converted: Callable[[str], Path]) -> None:
    model = converted("shapes_panoptic_128")
    printed = run("evaluate", model, "--dataset", "coco-panoptic", "--data", SHAPES / "val")

    assert "\nPQ            90.54  " in printed


def test_export(run: Run, tiny: Path) -> None:
    # as torch's program of one size, which takes few seconds; other tests export to ONNX
    printed = run("export", tiny, "--output", "export", "--format", "torch", "--image-size", "64")

    assert "basis     original: " in printed
    assert "verdict   passed\n" in run("verify", "export")
