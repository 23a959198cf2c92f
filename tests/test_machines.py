"""A right model passes on every machine, and a wrong one on none."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, NAMES
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook

import converter
from converter.checks.recording import record

pytestmark = pytest.mark.numbers

TINY = FIXTURES / "tiny_panoptic_64"

# torch 2.9 and newer have one setting for every kind of operation
HAS_NEW_WAY = hasattr(torch.backends, "fp32_precision")


# float32 ----------------------------------------------------------------------------------------

# What a process may have set. The two ways of torch cannot be mixed, nor can all of it be undone,
# so that each is set in a process of its own.
OLD_WAY = (
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cuda.matmul.allow_tf32 = True",
    "backends.cudnn.allow_tf32 = False",
    "backends.cudnn.benchmark = True",
    "backends.cudnn.enabled = False",
)
NEW_WAY: tuple[str, ...] = (
    "backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'ieee'",
    "backends.cudnn.fp32_precision = 'tf32'",
    "backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
)
GENERAL: tuple[str, ...] = ("pass", "backends.fp32_precision = 'tf32'")
if not HAS_NEW_WAY:
    NEW_WAY = GENERAL = ()

IN_A_BLOCK = """
import json, os, sys
import torch
from torch import backends
from converter.models import full_float32

SETTINGS = {
    "matmul": lambda: torch.get_float32_matmul_precision(),
    "cuda matmul allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
    "cudnn allow_tf32": lambda: backends.cudnn.allow_tf32,
    "cudnn": lambda: (backends.cudnn.enabled, backends.cudnn.benchmark),
    "general": lambda: backends.fp32_precision,
    "cudnn conv": lambda: backends.cudnn.conv.fp32_precision,
    "cudnn rnn": lambda: backends.cudnn.rnn.fp32_precision,
    "cuda matmul": lambda: backends.cuda.matmul.fp32_precision,
    "mkldnn matmul": lambda: backends.mkldnn.matmul.fp32_precision,
    "mkldnn conv": lambda: backends.mkldnn.conv.fp32_precision,
}

def read():
    found = {}
    for name, setting in SETTINGS.items():
        try:
            found[name] = setting()
        except (AttributeError, RuntimeError) as error:  # is not there; cannot be told
            found[name] = type(error).__name__
    return found

for setting, later in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    exec(setting)
    found = [read()]
    with full_float32():
        found.append(read())
    found.append(read())
    exec(later)
    found.append(read())
    print(json.dumps(found), flush=True)
    os._exit(0)
"""


@dataclass(frozen=True)
class Settings:
    """Those of a process before, within and after `full_float32`, and after a later change."""

    before: dict[str, Any]
    inside: dict[str, Any]
    after: dict[str, Any]
    later: dict[str, Any]


@pytest.fixture(scope="module")
def settings() -> Mapping[tuple[str, str], Settings]:
    """What becomes of settings, by what was set and what is set later."""
    cases = [(setting, "pass") for setting in OLD_WAY + NEW_WAY]
    cases += [(setting, "backends.fp32_precision = 'ieee'") for setting in GENERAL]
    command = [sys.executable, "-W", "error", "-c", IN_A_BLOCK, json.dumps(cases)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = (Settings(*json.loads(line)) for line in output.splitlines())
    return dict(zip(cases, found, strict=True))


def multiplies_float32(settings: dict[str, Any]) -> bool:
    if HAS_NEW_WAY:
        names = ("cuda matmul", "cudnn conv", "mkldnn matmul", "mkldnn conv")
        return all(settings[name] == "ieee" for name in names)
    return (settings["matmul"], settings["cudnn allow_tf32"]) == ("highest", False)


@pytest.mark.parametrize("setting", OLD_WAY + NEW_WAY)
def test_float32_is_multiplied_as_such_whatever_a_process_has_set(
    setting: str, settings: Mapping[tuple[str, str], Settings]
) -> None:
    found = settings[setting, "pass"]

    assert multiplies_float32(found.inside)
    assert found.inside["cudnn"] == found.before["cudnn"]
    assert found.after == found.before


@pytest.mark.parametrize("setting", GENERAL)
def test_what_inherits_a_precision_goes_on_inheriting_it(
    setting: str, settings: Mapping[tuple[str, str], Settings]
) -> None:
    assert multiplies_float32(settings[setting, "backends.fp32_precision = 'ieee'"].later)


@pytest.fixture
def in_low_precision(converted: Callable[[str], Path]) -> Iterator[Callable[[str], Path]]:
    """Converted models in a process that lets float32 be rounded before it is multiplied."""
    for name in NAMES:
        converted(name)
    torch.set_float32_matmul_precision("medium")
    yield converted
    torch.set_float32_matmul_precision("highest")


def matmul_is_full() -> bool:
    if HAS_NEW_WAY:
        backends: Any = torch.backends
        found = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
        return found == {"ieee"}
    return torch.get_float32_matmul_precision() == "highest"


def test_models_are_verified_recorded_and_diagnosed_in_full_float32(
    in_low_precision: Callable[[str], Path], tmp_path: Path
) -> None:
    right, wrong = in_low_precision("tiny_panoptic_64"), tmp_path / "wrong"
    shutil.copytree(right, wrong)
    state = load_file(wrong / "model.safetensors")
    state["layers.1.norm1.bias"] += 1
    save_file(state, wrong / "model.safetensors", metadata={"format": "pt"})
    sources: Any = {"delta": str(TINY / "delta"), "backbone": str(TINY / "backbone")}
    full: dict[str, list[bool]] = {}

    def note(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        full.setdefault(type(module).__module__.partition(".")[0], []).append(matmul_is_full())

    hook = register_module_forward_hook(note)
    try:
        record(right, tmp_path / "recorded", random=1, layers=True)
        converter.verify(right, against="transformers", **sources)
        assert converter.verify(wrong, level=3).cause is not None
    finally:
        hook.remove()

    assert full.keys() >= {"reference_model", "transformers", "torch"}
    assert all(all(found) for found in full.values())
    assert not matmul_is_full()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_on_a_gpu_that_may_use_tf32(
    name: str, in_low_precision: Callable[[str], Path]
) -> None:
    found = converter.verify(in_low_precision(name), recorded=FIXTURES / name, device="cuda")

    assert found.verdict == "passed", found.reason
