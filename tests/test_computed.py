"""Models that are compiled, or computed in 16 bits: judged as they are, and blamed rightly."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES, NAMES, same_but_for_edges
from PIL import Image
from recorded_models import pixel_values, recorded_model
from safetensors.torch import load_file, save_file
from small_models import small_model
from torch import Tensor, nn

import converter
from converter.checks.comparison import COMPUTED, FLOAT32, ROUNDED
from converter.checks.diagnosis.overflow import find_overflow
from converter.checks.numbers import judge_outputs, run
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import read_recorded
from converter.checks.verdict import Level, Verdict
from converter.errors import EomtConvertError, UsageError
from converter.pictures.evaluation import evaluate
from converter.pictures.segmenting import segment
from converter.report import verdict as told
from reference_model import EomtDinov3ForUniversalSegmentation as Model
from reference_model import EomtImageProcessor

DTYPES: tuple[Any, ...] = ("bfloat16", "float16")
NAME = "tiny_panoptic_64"

# torch's own, when it imports its compiler
quiet = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def level_of(found: Verdict, name: str) -> Level:
    return next(level for level in found.levels if level.level == name)


def verify(model: Path, name: str = NAME, **options: Any) -> Verdict:
    return converter.verify(model, recorded=FIXTURES / name, **options)


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    (model / "conversion.json").unlink()
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def make_overflow(state: dict[str, Tensor]) -> None:
    """Makes the values of a layer 2**16 times as large, and takes it back after them: exactly."""
    for name in ("weight", "bias"):
        state[f"layers.1.attention.v_proj.{name}"] *= 2**16
    state["layers.1.attention.o_proj.weight"] /= 2**16


# 16 bits ----------------------------------------------------------------------------------------


@pytest.mark.numbers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_in_16_bits(
    name: str, dtype: Any, converted: Callable[[str], Path]
) -> None:
    found = verify(converted(name), name, dtype=dtype)

    numbers, pictures = level_of(found, "numbers"), level_of(found, "pictures")
    assert (found.verdict, found.basis) == ("passed", "original")
    assert pictures.status == "passed"
    for level in (numbers, pictures):
        assert level.figures["computed_in"] == dtype
        assert level.figures["relative_tolerance"] == COMPUTED[dtype].relative
        assert level.figures["max_abs"] > FLOAT32.absolute  # it was computed in 16 bits
        assert {name.rpartition(".")[2] for name in level.figures["compared"]} == {
            "mask_logits",
            "class_logits",
        }
    assert numbers.figures["in_float32"]["tolerance"] == FLOAT32.absolute
    assert numbers.figures["in_float32"]["max_abs"] <= FLOAT32.absolute


def test_the_verdict_says_what_16_bits_cost_and_what_they_cannot_show(
    converted: Callable[[str], Path], command: Callable[..., Result], tmp_path: Path
) -> None:
    arguments = ("verify", converted(NAME), "--dtype", "bfloat16", "--report", "page.html")
    said = " ".join(command(*arguments).output.split())

    assert "then computed in bfloat16, as closely as 16 bits allow: faults of the comp" in said
    assert "figures are for the model computed in bfloat16, compared with the recording" in said
    assert "of their range. Before, it passed in float32" in said
    assert "These were compared in float32 only: layers, masked attention." in said
    assert "same best class 100.0%, mask IoU 0.9" in said
    page = (tmp_path / "page.html").read_text()
    assert "Difference from the recording, computed in bfloat16, by layer" in page
    assert "The figures are for the model computed in bfloat16" in page


def test_peers_and_published_numbers_are_left_out_of_a_verdict_on_16_bits(
    converted: Callable[[str], Path],
) -> None:
    found = verify(converted(NAME), dtype="float16", against="transformers")

    peers = level_of(found, "peers")
    assert (peers.status, found.verdict) == ("not checked", "passed")
    assert "not for the model computed in float16" in peers.reason


@pytest.mark.parametrize("stored", DTYPES)
def test_rounded_weights_are_computed_beside_the_same_weights_in_float32(
    stored: Any, tmp_path: Path
) -> None:
    converter.convert(NAME, tmp_path / "model", dtype=stored, verify=False)

    for history in (True, False):
        if not history:
            (tmp_path / "model" / "conversion.json").unlink()
        for dtype in DTYPES:
            found = verify(tmp_path / "model", dtype=dtype)
            figures = level_of(found, "numbers").figures
            assert found.verdict == "passed"
            assert (figures["rounded_to"], figures["computed_in"]) == (stored, dtype)
            assert figures["beside"] == "float32"
            assert figures["relative_tolerance"] == COMPUTED[dtype].relative
            pictures = level_of(found, "pictures").figures
            least = min(COMPUTED[dtype].equal_pixels, ROUNDED[stored].equal_pixels)
            assert pictures["least_equal_pixels"] == least
            assert "the same weights in float32: logits move" in " ".join(
                " ".join(told(found)).split()
            )


def test_a_compiled_model_with_rounded_weights_may_not_be_off_by_the_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter.convert(NAME, tmp_path / "model", dtype="bfloat16", verify=False)
    monkeypatch.setattr(Model, "compile", lambda *_, **__: None)

    found = verify(tmp_path / "model", compile="default")

    for name in ("numbers", "pictures"):
        figures = level_of(found, name).figures
        assert figures["compiled"] == "default"
        assert figures["relative_tolerance"] == FLOAT32.relative
        assert figures["max_abs"] == 0


def test_a_fault_that_16_bits_hide_is_found_in_float32(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    (model / "conversion.json").unlink()

    found = verify(model, dtype="bfloat16")

    assert found.verdict == "failed"
    assert found.cause is not None
    assert found.cause.name == "layer-norm-epsilon"
    assert "computed_in" not in level_of(found, "numbers").figures


def test_only_known_ways_to_compute_are_taken(converted: Callable[[str], Path]) -> None:
    for options in ({"dtype": "int8"}, {"compile": "fast"}):
        with pytest.raises(UsageError, match="expected one of"):
            verify(converted(NAME), **options)


# the tolerances ---------------------------------------------------------------------------------


@pytest.mark.numbers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_exchanged_tensors_are_refused_from_logits_in_16_bits(name: str, dtype: Any) -> None:
    recorded = read_recorded(FIXTURES / name)
    model, inputs = recorded_model(name).to(getattr(torch, dtype)), pixel_values(name)

    def status() -> str:
        outputs = {n: t.float() for n, t in run(model, inputs, layers=False).items()}
        logits = {n: outputs[n] for n in ("mask_logits", "class_logits")}
        return judge_outputs(logits, recorded, COMPUTED[dtype]).level.status

    assert status() == "passed"
    attention: Any = model.get_submodule("layers.1.attention")
    attention.q_proj.weight, attention.k_proj.weight = (
        attention.k_proj.weight,
        attention.q_proj.weight,
    )
    assert status() == "failed"


def test_outputs_are_judged_by_what_they_have_of_a_recording() -> None:
    recorded = read_recorded(FIXTURES / NAME)
    names = ("hidden_states.1", "mask_logits", "class_logits")
    outputs = {name: recorded.tensors[name].clone() for name in names}

    assert tuple(judge_outputs(outputs, recorded, FLOAT32).compared) == names
    assert judge_outputs(outputs, recorded, FLOAT32).level.status == "passed"

    outputs["hidden_states.1"] += 1
    found = judge_outputs(outputs, recorded, FLOAT32)
    assert found.level.reason.startswith("hidden_states.1 differs by up to 1")
    assert judge_outputs(outputs, recorded, FLOAT32, {"hidden_states.1": 1e5}).level.reason == ""


# what is to blame -------------------------------------------------------------------------------


def test_the_layer_that_overflows_float16_is_named(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    change_weights(model, make_overflow)

    found = verify(model, dtype="float16")

    assert found.verdict == "failed"
    assert found.cause is not None
    assert found.cause.name == "activation-overflow"
    assert found.cause.explanation.startswith("layers.1.attention.v_proj overflows float16")
    assert found.first_difference is not None
    assert found.first_difference.layer == "layers.1"
    assert {trial.status for trial in found.tried} == {"not tried"}
    assert found.reason.startswith("The model is right in float32, but not computed in float16")
    assert level_of(found, "pictures").status == "failed"
    assert verify(model, dtype="bfloat16").verdict == "passed"


def test_an_overflow_is_found_with_its_largest_value_in_float32() -> None:
    model, inputs = recorded_model(NAME), pixel_values(NAME)
    assert find_overflow(model, inputs) is None

    state = model.state_dict()
    make_overflow(state)
    model.load_state_dict(state)
    values: list[float] = []
    projection = model.get_submodule("layers.1.attention.v_proj")
    projection.register_forward_hook(lambda *found: values.append(float(found[2].abs().max())))
    with torch.inference_mode():
        model(inputs)

    found = find_overflow(model, inputs)
    assert found is not None
    assert (found.place, found.largest) == ("layers.1.attention.v_proj", values[0])
    assert found.largest > torch.finfo(torch.float16).max


def test_a_sum_that_overflows_is_named_by_its_layer() -> None:
    model, inputs = recorded_model(NAME), pixel_values(NAME)
    layer: Any = model.layers[2]
    with torch.no_grad():
        for part in (layer.attention.o_proj, layer.mlp.down_proj):
            part.bias += 4e4
        for scale in (layer.layer_scale1, layer.layer_scale2):
            scale.lambda1.fill_(1)

    found = find_overflow(model, inputs)

    assert found is not None
    assert found.place == "layers.2"


@pytest.fixture
def faulty_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that makes something else of a layer."""

    def compile_wrongly(self: Model, **_: Any) -> None:
        mlp = self.get_submodule("layers.1.mlp")
        mlp.register_forward_hook(lambda _module, _inputs, output: output + 0.1)

    monkeypatch.setattr(Model, "compile", compile_wrongly)


@pytest.mark.usefixtures("faulty_compiler")
def test_a_fault_of_the_compiler_is_told_from_one_of_the_weights(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    found = verify(converted(NAME), compile="max-autotune")

    assert found.verdict == "failed"
    assert found.cause is not None
    assert (found.cause.name, found.cause.tensors) == ("computation", ())
    assert "the model is right in float32" in found.cause.explanation
    assert found.first_difference is not None
    assert found.first_difference.layer == "layers.1"
    assert {trial.status for trial in found.tried} == {"not tried"}
    assert level_of(found, "numbers").figures["compiled"] == "max-autotune"

    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    change_weights(model, lambda state: state["layers.0.norm1.bias"].zero_())
    found = verify(model, compile="max-autotune")
    assert "compiled" not in level_of(found, "numbers").figures
    assert {trial.status for trial in found.tried} != {"not tried"}


@pytest.mark.usefixtures("faulty_compiler")
def test_the_pictures_go_through_the_compiled_model_too(
    converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.checks import computed

    def right(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        outputs = run(*arguments, **options)
        recorded = read_recorded(FIXTURES / NAME).tensors
        return outputs | {n: recorded[n] for n in ("mask_logits", "class_logits")}

    monkeypatch.setattr(computed, "run", right)
    found = verify(converted(NAME), compile="default")

    assert level_of(found, "numbers").status == "passed"
    pictures = level_of(found, "pictures")
    assert (pictures.status, found.verdict) == ("failed", "failed")
    assert "when compiled (default)." in pictures.reason


# compiled ---------------------------------------------------------------------------------------


@pytest.fixture
def inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler of torch, keeping its files where the test does."""
    import torch._inductor.codecache as codecache
    import torch._inductor.config as settings

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(codecache, "_HEADER_DIR", str(tmp_path / "headers"))
    monkeypatch.setattr(codecache, "_HEADER_LOCK_DIR", str(tmp_path / "headers" / "locks"))
    torch.compiler.reset()
    changes = {
        "compile_threads": 1,  # no processes that outlive the test
        # for less time: headers are read once, and code is not vectorised
        "cpp_cache_precompile_headers": True,
        "cpp.simdlen": 0,
    }
    with settings.patch(changes):
        yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Traces graphs as `compile` does, without making code of them; the graphs in order."""
    graphs: list[Any] = []

    def keep(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile_quickly(self: Model, *, fullgraph: bool, **_: Any) -> None:
        nn.Module.compile(self, fullgraph=fullgraph, backend=keep)

    monkeypatch.setattr(Model, "compile", compile_quickly, raising=False)
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


def save_recorded(place: Path) -> tuple[Path, Path]:
    """A tiny model, and its outputs as a recording."""
    model = small_model(num_hidden_layers=1, num_blocks=1, image_size=32, patch_size=8)
    model.attn_mask_probs.zero_()
    model.save_pretrained(place / "model")
    EomtImageProcessor(size={"height": 32, "width": 32}, do_pad=True).save_pretrained(
        place / "model"
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    inputs = read_normalisation(place / "model" / "preprocessor_config.json", 3)(pixels)
    (place / "recorded").mkdir()
    recorded = {"pixels": pixels, **run(model, inputs)}
    save_file(recorded, place / "recorded" / "recorded.safetensors")
    return place / "model", place / "recorded"


@quiet
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.usefixtures("inductor")
def test_the_verdict_is_on_the_compiled_model(tmp_path: Path) -> None:
    model, recorded = save_recorded(tmp_path)

    found = converter.verify(model, recorded=recorded, compile="default", level=3)

    figures = level_of(found, "numbers").figures
    assert (found.verdict, found.basis) == ("passed", "reference")
    assert figures["compiled"] == "default"
    assert set(figures["compared"]) == {"mask_logits", "class_logits"}
    assert figures["relative_tolerance"] == FLOAT32.relative
    assert any((tmp_path / "inductor").rglob("*.so"))  # what was compared was compiled


@quiet
@pytest.mark.usefixtures("inductor")
def test_a_missing_compiler_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Result]
) -> None:
    import torch._inductor.config as settings

    model, recorded = save_recorded(tmp_path)
    monkeypatch.setattr(settings.cpp, "cxx", (None, str(tmp_path / "no-compiler")))

    found = command("verify", "--compile", model, "--recorded", recorded, "--level", "3")

    assert found.exit_code == EomtConvertError.exit_code
    assert found.stderr.startswith("Error: torch.compile cannot compile the model: ")
    assert "no-compiler" in found.stderr
    assert "g++" in found.stderr
    assert "Traceback" not in found.stderr


def test_pictures_of_many_sizes_need_three_graphs(
    converted: Callable[[str], Path], tmp_path: Path, traced: list[Any]
) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number, width in enumerate((48, 60, 131, 48, 200, 90, 300, 77, 410, 520)):
        pixels = generator.integers(256, size=(60, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    model, pictures = converted("tiny_semantic_48"), [tmp_path / "in"]

    segment(model, pictures, tmp_path / "compiled", compile="default", batch_size=1)
    segment(model, pictures, tmp_path / "plain", batch_size=1)

    assert 1 < len(traced) <= 3  # of one window, of some number, and of any number
    files = sorted((tmp_path / "plain").glob("*.segments.png"))
    assert len(files) == 10
    for file in files:
        ours = np.asarray(Image.open(tmp_path / "compiled" / file.name))
        assert same_but_for_edges(ours, np.asarray(Image.open(file)))


def test_a_compiled_model_is_measured_like_any_other(
    converted: Callable[[str], Path], traced: list[Any]
) -> None:
    model, data = converted("shapes_panoptic_128"), FIXTURES / "shapes_panoptic_128" / "val"

    compiled = evaluate(model, "coco-panoptic", data, limit=2, compile="default")

    assert len(traced) == 1
    assert compiled.metrics == pytest.approx(
        evaluate(model, "coco-panoptic", data, limit=2).metrics
    )


# the option -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (["MODEL", "--compile"], "default"),
        (["--compile", "MODEL"], "default"),
        (["--compile", "--level", "3", "MODEL"], "default"),
        (["--compile", "max-autotune", "MODEL"], "max-autotune"),
        (["--compile=max-autotune", "MODEL"], "max-autotune"),
        (["--compile", "--", "MODEL"], "default"),
        (["MODEL"], None),
    ],
)
def test_only_a_mode_is_taken_for_the_value_of_compile(
    arguments: list[str],
    mode: str | None,
    command: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def note(model: Any, **options: Any) -> Any:
        seen.extend((model, options["compile"]))
        raise EomtConvertError("enough")

    monkeypatch.setattr("converter.checks.verification.verify", note)
    command("verify", *arguments)

    assert seen == ["MODEL", mode]
