"""A correct model passes on every machine, and a wrong one on none."""

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import FIXTURES, HAS_NEW_WAY, NAMES, products_are_full_float32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import converter
from converter.checks.comparison import TOLERANCE
from converter.checks.numbers import masked_predictions, run
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import read_recorded
from converter.checks.recording import record
from converter.checks.verdict import Verdict
from reference_model import EomtDinov3Config, EomtImageProcessor, Prediction
from reference_model import EomtDinov3ForUniversalSegmentation as Model
from reference_model.masked_attention import attention_mask

pytestmark = pytest.mark.numbers

TINY = FIXTURES / "tiny_panoptic_64"

# a difference in logits that rounding can make
ROUNDING = TOLERANCE / 2


def verify_numbers(model: Path, recorded: Path) -> Verdict:
    return converter.verify(model, recorded=recorded, level=3)


# masked attention -------------------------------------------------------------------------------


@pytest.fixture
def undecided(converted: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A converted model with mask logits near 0, where masked attention branches."""

    def make(name: str) -> Path:
        shutil.copytree(converted(name), tmp_path / "model")
        (tmp_path / "model/conversion.json").unlink()
        state = load_file(tmp_path / "model/model.safetensors")
        for part in ("weight", "bias"):
            state[f"mask_head.fc3.{part}"] *= 1e-4
        save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
        return tmp_path / "model"

    return make


def compute_as_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model round differently wherever it predicts."""
    predict = Model.predict

    def rounded(self: Model, x: Tensor, grid: tuple[int, int]) -> Prediction:
        masks, classes = predict(self, x, grid)
        return Prediction(masks + ROUNDING, classes - ROUNDING)

    monkeypatch.setattr(Model, "predict", rounded)


@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_where_rounding_moves_the_edges_of_masks(
    name: str, undecided: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorded = undecided(name), tmp_path / "recorded"
    with monkeypatch.context() as other_machine:
        compute_as_on_another_machine(other_machine)
        record(model, recorded, random=1, layers=True)

    assert edges_moved(model, recorded)
    verdict = verify_numbers(model, recorded)

    assert verdict.verdict == "passed", verdict.reason
    assert verdict.levels[2].figures["max_abs"] == pytest.approx(ROUNDING, rel=0.3)


def edges_moved(folder: Path, recorded: Path) -> bool:
    """Whether a model's own masks give other outputs than the recorded masks."""
    found = read_recorded(recorded)
    inputs = read_normalisation(folder / "preprocessor_config.json", 3)(found.pixels)
    own = masked_predictions(Model.from_pretrained(folder), inputs)
    last = f"masked.class_logits.{len(found.numbered('masked.class_logits')) - 1}"
    return bool((own[last] - found.tensors[last]).abs().max() > 10 * ROUNDING)


def transposed(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    return logits.mT


def as_nearest(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, grid, mode="nearest")


def of_another_query(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    return logits.roll(1, dims=1)


def one_patch_further(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    return logits.roll(logits.shape[-1] // grid[1], dims=-1)


def open_everywhere(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.ones_like(logits)


@pytest.mark.parametrize("name", ["shapes_panoptic_128", "tiny_panoptic_48x80"])
@pytest.mark.parametrize(
    "fault", [transposed, as_nearest, of_another_query, one_patch_further, open_everywhere]
)
def test_masks_that_are_applied_wrongly_fail(
    name: str,
    fault: Callable[[Tensor, tuple[int, int]], Tensor],
    converted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = converted(name)

    def wrong(logits: Tensor, grid: tuple[int, int], prefix: int, probability: float) -> Tensor:
        return attention_mask(fault(logits, grid), grid, prefix, probability)

    monkeypatch.setattr("reference_model.model.attention_mask", wrong)

    verdict = verify_numbers(model, FIXTURES / name)

    assert verdict.verdict == "failed"
    assert verdict.first_difference
    assert verdict.first_difference.tensor.startswith("masked.")


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_every_blocks_own_mask_logits_are_compared(
    name: str, block: int, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, predict, calls = converted(name), Model.predict, 0

    def wrong(self: Model, x: Tensor, grid: tuple[int, int]) -> Prediction:
        nonlocal calls
        calls += 1
        masks, classes = predict(self, x, grid)
        # the first call of all is that of the pass without masks
        return Prediction(masks + 0.01 * (calls - 2 == block), classes)

    monkeypatch.setattr(Model, "predict", wrong)

    verdict = verify_numbers(model, FIXTURES / name)

    assert verdict.verdict == "failed"
    assert verdict.first_difference
    assert verdict.first_difference.tensor == f"masked.mask_logits.{block}"


def with_one_query_less(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    masked = {name for name in tensors if name.startswith("masked.")}
    return tensors | {name: tensors[name][:, 1:].contiguous() for name in masked}


def with_one_block_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("masked.mask_logits", "masked.class_logits")
    return tensors | {f"{name}.3": tensors[f"{name}.2"].clone() for name in names}


def with_other_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"masked.mask_logits.0": -tensors["masked.mask_logits.0"]}


@pytest.mark.parametrize(
    "change",
    [with_one_query_less, with_one_block_more, with_other_masks],
)
def test_recorded_masks_of_another_model_fail(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    converted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tensors = load_file(TINY / "recorded.safetensors")
    save_file(change(tensors), tmp_path / "recorded.safetensors")

    verdict = verify_numbers(converted("tiny_panoptic_64"), tmp_path)

    assert verdict.verdict == "failed"
    assert verdict.reason.startswith("masked.")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_block_of_rounded_weights_is_compared(
    name: str, dtype: Literal["bfloat16", "float16"], tmp_path: Path
) -> None:
    found = converter.convert(name, tmp_path / "out", dtype=dtype).verdict

    assert found.verdict == "passed", found.reason
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    masked = {tensor for tensor in recorded if tensor.startswith("masked.")}
    assert masked <= found.levels[2].figures["compared"].keys()


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
GENERAL: tuple[str, ...] = (
    "pass",
    "backends.fp32_precision = 'tf32'",
    "backends.cudnn.fp32_precision = 'tf32'",
)
LATER = "backends.fp32_precision = backends.cudnn.fp32_precision = 'ieee'"
if not HAS_NEW_WAY:
    NEW_WAY = GENERAL = ()

IN_A_BLOCK = """
import json, os, sys
import torch
from torch import backends
from converter.checks.precision import full_float32

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
    """The settings before, within and after `full_float32`, and after a later change."""

    before: dict[str, Any]
    inside: dict[str, Any]
    after: dict[str, Any]
    later: dict[str, Any]


@pytest.fixture(scope="module")
def around_a_block() -> Mapping[tuple[str, str], Settings]:
    """The settings around `full_float32`, by what was set before it and what is set later."""
    cases = [(setting, "pass") for setting in OLD_WAY + NEW_WAY]
    cases += [(setting, LATER) for setting in GENERAL]
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
def test_float32_is_multiplied_in_full_whatever_a_process_has_set(
    setting: str, around_a_block: Mapping[tuple[str, str], Settings]
) -> None:
    found = around_a_block[setting, "pass"]

    assert multiplies_float32(found.inside)
    assert found.inside["cudnn"] == found.before["cudnn"]
    assert found.after == found.before


@pytest.mark.parametrize("setting", GENERAL)
def test_an_inherited_precision_stays_inherited(
    setting: str, around_a_block: Mapping[tuple[str, str], Settings]
) -> None:
    assert multiplies_float32(around_a_block[setting, LATER].later)


@pytest.fixture
def in_low_precision(converted: Callable[[str], Path]) -> Iterator[Callable[[str], Path]]:
    """Converted models in a process that lets float32 be rounded before it is multiplied."""
    for name in NAMES:
        converted(name)
    torch.set_float32_matmul_precision("medium")
    yield converted
    torch.set_float32_matmul_precision("highest")


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
        package = type(module).__module__.partition(".")[0]
        full.setdefault(package, []).append(products_are_full_float32())

    hook = register_module_forward_hook(note)
    try:
        record(right, tmp_path / "recorded", random=1, layers=True)
        converter.verify(right, against="transformers", **sources)
        assert converter.verify(wrong, level=3).cause is not None
    finally:
        hook.remove()

    assert full.keys() >= {"reference_model", "transformers", "torch"}
    assert all(all(found) for found in full.values())
    assert not products_are_full_float32()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_on_a_gpu_that_may_use_tf32(
    name: str, in_low_precision: Callable[[str], Path]
) -> None:
    found = converter.verify(in_low_precision(name), recorded=FIXTURES / name, device="cuda")

    assert found.verdict == "passed", found.reason


# instruction sets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instructions",
    [
        "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2",
        "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE",
    ],
)
def test_numbers_are_compared_under_smaller_instruction_sets_too(instructions: str) -> None:
    script = (FIXTURES.parent / ".ci/run").read_text()
    loop = script[script.index("for instructions in") :].partition("done")[0]

    assert f'"{instructions}"' in loop
    assert "env $instructions .venv-test/bin/pytest -m numbers" in loop


def test_tolerances_are_measured_on_masked_outputs_of_the_larger_model_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FIXTURES.parent / "benchmarks")
    tolerances = importlib.import_module("tolerances")
    subject = tolerances.random_subject(tmp_path, image_size=64)
    usual = tolerances.usual(subject)

    masked = {f"masked.{kind}_logits.{block}" for kind in ("mask", "class") for block in range(4)}
    assert masked <= usual.keys()
    found = tolerances.Row("again", tolerances.usual).measure(subject, usual)
    assert all(largest <= TOLERANCE for largest in found.values())  # and no NaN: all are there


# load -------------------------------------------------------------------------------------------


def test_hypothesis_examples_have_no_deadline() -> None:
    @settings(max_examples=2)
    @given(st.integers())
    def slow(_: int) -> None:
        time.sleep(0.3)  # hypothesis allows 0.2 seconds otherwise

    slow()


# networks that magnify rounding ------------------------------------------------------------------

# spreads and seeds of weights with which float32 alone moves logits by about the tolerance or more,
# on one set of instructions or another
UNSTEADY = [(1.0, 41), (1.2, 73), (1.2, 234), (1.2, 189)]


def unsteady_model(spread: float, seed: int, place: Path) -> Path:
    """A model with layers of 8 values, some of them very close to each other after the norms."""
    config = EomtDinov3Config(
        hidden_size=8,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_blocks=2,
        num_queries=8,
        patch_size=16,
        image_size=64,
        id2label={index: f"LABEL_{index}" for index in range(4)},
    )
    model, generator = Model(config), np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        values = generator.normal(norm, 0.1 if norm else spread, parameter.shape)
        parameter.data = torch.from_numpy(values.astype(np.float32))
    model.attn_mask_probs.zero_()
    model.save_pretrained(place)
    EomtImageProcessor(size={"height": 64, "width": 64}, do_pad=True).save_pretrained(place)
    return place


def record_elsewhere(model: Path, place: Path, errors: float) -> Path:
    """Records exact outputs, and so many times the errors of float32 on this machine."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    recorded = {"pixels": torch.from_numpy(pixels)}
    inputs = read_normalisation(model / "preprocessor_config.json", 3)(recorded["pixels"])
    found, exact = (
        run(network, inputs)
        for network in (Model.from_pretrained(model), Model.from_pretrained(model).double())
    )
    recorded |= {n: (t + errors * (found[n] - t)).float() for n, t in exact.items()}
    place.mkdir()
    save_file({n: t.contiguous() for n, t in recorded.items()}, place / "recorded.safetensors")
    return place


@pytest.mark.parametrize("errors", [0, -1])
@pytest.mark.parametrize(("spread", "seed"), UNSTEADY)
def test_a_right_model_passes_where_its_network_magnifies_rounding(
    spread: float, seed: int, errors: float, tmp_path: Path
) -> None:
    model = unsteady_model(spread, seed, tmp_path / "model")
    recorded = record_elsewhere(model, tmp_path / "recorded", errors)

    verdict = converter.verify(model, recorded=recorded)

    assert (verdict.verdict, verdict.cause, verdict.tried) == ("passed", None, ())


@pytest.mark.parametrize(("spread", "seed"), UNSTEADY)
def test_a_right_compiled_model_passes_where_its_network_magnifies_rounding(
    spread: float, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be computed in float64: its error and the recording's may add up."""
    model = unsteady_model(spread, seed, tmp_path / "model")
    recorded = record_elsewhere(model, tmp_path / "recorded", -1)
    monkeypatch.setattr(Model, "compile", lambda *_, **__: None)  # rounds as on this machine

    verdict = converter.verify(model, recorded=recorded, compile="default")

    assert verdict.levels[2].figures["compiled"] == "default"
    assert (verdict.verdict, verdict.cause) == ("passed", None)


def test_the_verdict_says_that_outputs_were_computed_in_float64(tmp_path: Path) -> None:
    """On every instruction set, at least one network needs it."""
    reasons = []
    for spread, seed in UNSTEADY:
        model = unsteady_model(spread, seed, tmp_path / f"model-{seed}")
        recorded = record_elsewhere(model, tmp_path / f"recorded-{seed}", -1)
        reasons.append(converter.verify(model, recorded=recorded).levels[2].reason)

    assert any(reason.startswith("Computed in float64: float32 alone") for reason in reasons)


@pytest.mark.parametrize("values", [{"layer_norm_eps": 2e-5}, {"num_attention_heads": 1}])
@pytest.mark.parametrize(("spread", "seed"), UNSTEADY)
def test_a_wrong_model_fails_where_its_network_magnifies_rounding(
    spread: float, seed: int, values: dict[str, float], tmp_path: Path
) -> None:
    model = unsteady_model(spread, seed, tmp_path / "model")
    recorded = record_elsewhere(model, tmp_path / "recorded", -1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))

    verdict = converter.verify(model, recorded=recorded)

    assert verdict.verdict == "failed"
    assert Model.from_pretrained(model).dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48"])
def test_computing_in_float64_does_not_make_it_easier_to_pass(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """A model that is off by a few tolerances in one bias."""
    model = Path(shutil.copytree(converted(name), tmp_path / "model"))
    (model / "conversion.json").unlink()
    state = load_file(model / "model.safetensors")
    state["class_predictor.bias"] += 3 * TOLERANCE
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})

    verdict = verify_numbers(model, FIXTURES / name)

    assert verdict.verdict == "failed"
    assert verdict.levels[2].figures["tolerance"] == TOLERANCE


def test_a_tensor_that_float32_hardly_moves_keeps_its_tolerance(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Masks that rounding moves by several tolerances, and a class head that it does not."""
    model = Path(shutil.copytree(converted("tiny_panoptic_64"), tmp_path / "model"))
    (model / "conversion.json").unlink()
    state = load_file(model / "model.safetensors")
    for name in ("patch_embeddings.bias", "cls_token", "register_tokens"):
        state[f"embeddings.{name}"] += 200
    state["query.weight"] += 200
    state["class_predictor.weight"] *= 0.01
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    record(model, tmp_path / "recorded", random=1, layers=True)
    state["class_predictor.bias"] += 3 * TOLERANCE
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})

    assert verify_numbers(model, tmp_path / "recorded").verdict == "failed"
