"""Models whose weights were rounded to 16 bits: no other fault passes for rounding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, NAMES
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.checks import numbers
from converter.checks.comparison import FLOAT32, ROUNDED, TOLERANCE, disagreement
from converter.checks.diagnosis.stages import Network, Skeleton, cut
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import read_recorded
from converter.checks.recording import record
from converter.checks.rounding import (
    EXCESS,
    RIGHT_EXCESS,
    allowing_for_rounding,
    with_rounding_error,
)
from converter.checks.verdict import Level, Verdict, read_record
from converter.publishing.card import ModelRecord, model_card
from converter.report import verdict as told
from reference_model import EomtDinov3Config
from reference_model import EomtDinov3ForUniversalSegmentation as Model

pytestmark = pytest.mark.numbers

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
DTYPES = ("bfloat16", "float16")

# Copies a rounded model, without its conversion.json, to plant faults in.
Plant = Callable[..., Path]


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Path]:
    """An offline checkpoint in another type, converted once; not to be written to."""
    folder = tmp_path_factory.mktemp("rounded")

    def convert(name: str, dtype: Any) -> Path:
        place = folder / f"{name}-{dtype}"
        if not place.exists():
            converter.convert(name, place, dtype=dtype)
        return place

    return convert


@pytest.fixture
def plant(rounded: Callable[[str, Any], Path], tmp_path: Path) -> Plant:
    def copy(name: str, dtype: str = "bfloat16", *, history: bool = False) -> Path:
        model = Path(shutil.copytree(rounded(name, dtype), tmp_path / "model"))
        if not history:
            (model / "conversion.json").unlink()
        return model

    return copy


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def verify(model: Path, name: str, *, sources: bool = False, **options: Any) -> Verdict:
    fixture = FIXTURES / name
    if sources:
        options |= {"delta": str(fixture / "delta"), "backbone": str(fixture / "backbone")}
    return converter.verify(model, recorded=fixture, **options)


def numbers_of(found: Verdict) -> Level:
    return next(level for level in found.levels if level.level == "numbers")


def without_layers(name: str, place: Path) -> Path:
    """A recording that has logits only."""
    tensors = load_file(FIXTURES / name / "recorded.safetensors")
    place.mkdir()
    kept = {key: tensors[key] for key in ("pixels", "mask_logits", "class_logits")}
    save_file(kept, place / "recorded.safetensors")
    return place


def rope_theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


# wrong values in configuration files; each moves outputs by less than rounding may
SMALL_FAULTS: list[tuple[str, dict[str, Any], str]] = [
    (PREPROCESSOR, {"image_mean": [0.48, 0.456, 0.406]}, "image-normalisation"),
    (PREPROCESSOR, {"rescale_factor": 1 / 256}, "image-normalisation"),
    (CONFIG, rope_theta(90.0), "rope-base"),
]

# a bias in the embeddings, in a layer and behind the last one; gated models have no other names
BIASES = (
    "embeddings.patch_embeddings.bias",
    "layers.0.mlp.up_proj.bias",
    "layers.1.norm1.bias",
    "class_predictor.bias",
)


# with the sources -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_sums_are_compared_with_the_recording_within_the_tolerance_of_float32(
    name: str, dtype: str, rounded: Callable[[str, Any], Path]
) -> None:
    found = verify(rounded(name, dtype), name)

    numbers = numbers_of(found)
    assert (found.verdict, found.basis) == ("passed", "original")
    assert numbers.figures["tolerance"] == TOLERANCE
    assert numbers.figures["relative_tolerance"] == FLOAT32.relative
    assert numbers.figures["max_abs"] <= TOLERANCE
    assert (numbers.figures["rounded_to"], numbers.figures["unrounded"]) == (dtype, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_says_what_rounding_costs(
    name: str, dtype: str, rounded: Callable[[str, Any], Path]
) -> None:
    model = rounded(name, dtype)

    found = verify(model, name)

    recorded = read_recorded(FIXTURES / name)
    inputs = read_normalisation(model / PREPROCESSOR, 3)(recorded.pixels)
    with torch.inference_mode():
        masks = Model.from_pretrained(model).float()(inputs).masks_queries_logits
    cost = numbers_of(found).figures["rounding"]
    off = (masks - recorded.tensors["mask_logits"]).abs().max()
    spread = recorded.tensors["mask_logits"].max() - recorded.tensors["mask_logits"].min()
    assert cost["share_of_range"] >= float(off / spread) * 0.99
    assert 0.0002 < cost["share_of_range"] < 0.04
    assert set(cost) == {"share_of_range", "best_class", "mask_iou", "same_segment"}
    said = " ".join("\n".join(told(found)).split())
    assert f"Rounding to {dtype} moves logits by up to {cost['share_of_range']:.2%}" in said
    assert f"same segment {cost['same_segment']:.1%}" in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("file", "values", "cause"),
    [*SMALL_FAULTS, (CONFIG, {"layer_norm_eps": 1e-6}, "layer-norm-epsilon")],
)
def test_a_small_fault_fails_with_the_sources_and_is_named(
    name: str, file: str, values: dict[str, Any], cause: str, plant: Plant
) -> None:
    model = plant(name)
    change_json(model / file, **values)

    found = verify(model, name, sources=True)

    assert numbers_of(found).status == "failed"
    assert "before rounding" in numbers_of(found).reason
    assert found.cause is not None
    assert (found.cause.name, found.cause.explained) == (cause, 1.0)
    assert found.cause.residual is not None
    assert found.cause.residual < TOLERANCE


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_instance_64_gated"])
@pytest.mark.parametrize("bias", BIASES)
def test_a_zeroed_bias_is_named_with_the_sources(name: str, bias: str, plant: Plant) -> None:
    model = plant(name)
    change_weights(model, lambda state: state[bias].zero_())

    found = verify(model, name, sources=True)

    assert found.verdict == "failed"
    assert found.cause is not None
    assert (found.cause.name, found.cause.tensors) == ("tensor-replaced", (bias,))


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48"])
def test_pictures_are_those_of_the_sums_too(name: str, rounded: Callable[[str, Any], Path]) -> None:
    found = verify(rounded(name, "bfloat16"), name)

    pictures = next(level for level in found.levels if level.level == "pictures")
    assert pictures.status == "passed"
    assert pictures.figures["relative_tolerance"] == FLOAT32.relative
    assert pictures.figures["least_equal_pixels"] == FLOAT32.equal_pixels


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_need_not_be_declared(dtype: str, plant: Plant) -> None:
    model = plant("tiny_semantic_48", dtype)
    content = json.loads((model / CONFIG).read_text())
    del content["dtype"]
    (model / CONFIG).write_text(json.dumps(content))

    found = verify(model, "tiny_semantic_48", sources=True)

    assert found.levels[1].status == "passed"
    assert numbers_of(found).figures["unrounded"] is True


# without them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_without_sources_a_right_model_passes_and_says_what_it_cannot_show(
    name: str, dtype: str, plant: Plant
) -> None:
    found = verify(plant(name, dtype), name)

    numbers = numbers_of(found)
    assert found.verdict == "passed"
    assert numbers.reason.startswith(
        f"Weights in {dtype} cannot show a fault that moves each layer"
    )
    assert numbers.figures["rounding_excess"] <= RIGHT_EXCESS
    assert numbers.figures["rounded_to"] == dtype
    assert "unrounded" not in numbers.figures
    said = " ".join("\n".join(told(found)).split())
    assert f"as closely as weights in {dtype} allow: faults smaller than rounding" in said


@pytest.mark.parametrize(
    ("name", "dtype", "file", "values", "cause"),
    [
        # every pair of a model, a type and a fault
        (name, DTYPES[(model + number) % 2], *fault)
        for model, name in enumerate(NAMES)
        for number, fault in enumerate(SMALL_FAULTS)
    ],
)
def test_a_small_fault_fails_without_the_sources(
    name: str, dtype: str, file: str, values: dict[str, Any], cause: str, plant: Plant
) -> None:
    model = plant(name, dtype)
    change_json(model / file, **values)

    found = verify(model, name)

    assert numbers_of(found).status == "failed"
    assert found.verdict == "failed"
    assert found.cause is not None
    assert found.cause.name == cause
    assert "as far as rounded weights show it" in found.cause.explanation


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", BIASES)
def test_a_zeroed_bias_fails_without_the_sources(name: str, bias: str, plant: Plant) -> None:
    model = plant(name)
    change_weights(model, lambda state: state[bias].zero_())

    found = verify(model, name)

    layer = bias.rpartition(".")[0]
    assert numbers_of(found).status == "failed"
    assert found.first_difference is not None
    assert layer.startswith(found.first_difference.layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_the_weights_were_before_rounding_no_part_is_beyond_it(
    name: str, dtype: str, rounded: Callable[[str, Any], Path]
) -> None:
    """The model is right compared with the outputs of any weights that round to its own."""
    folder = rounded(name, dtype)
    weights = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    recorded = read_recorded(FIXTURES / name)
    normalisation = read_normalisation(folder / PREPROCESSOR, 3)
    config = EomtDinov3Config.from_pretrained(folder)
    network = Network(Skeleton(config), weights, normalisation)
    types = dict.fromkeys(weights, dtype)
    stages = [s for s in cut(recorded, config) if s.modules != ("rope",)]
    generator = torch.Generator().manual_seed(7)
    for stage in allowing_for_rounding(stages, network, types):
        assert stage.mean_square
        assert stage.right / stage.tolerance == pytest.approx(RIGHT_EXCESS / EXCESS)
        for _ in range(5):
            before = {
                n: with_rounding_error(weights[n], dtype, generator) for n in stage.tensors(network)
            }
            moved = stage.run(network.with_weights(before)) - stage.run(network)
            assert float(moved.square().mean().sqrt()) <= stage.tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_weights_round_to_the_same_and_zeros_stay(dtype: str) -> None:
    kind = getattr(torch, dtype)
    tiny = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    values = torch.cat((torch.randn(1000), 1e-3 * torch.randn(1000), torch.tensor([0.0, 3 * tiny])))
    values = values.to(kind).float()

    drawn = with_rounding_error(values, dtype, torch.Generator().manual_seed(0))

    assert torch.equal(drawn.to(kind).float(), values)
    assert float((drawn != values).double().mean()) > 0.99
    assert drawn[-2] == 0


def test_classes_that_change_fail_where_logits_hardly_do(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two classes with nearly equal scores, so that another one is the best."""
    model = Path(shutil.copytree(converted("tiny_panoptic_64"), tmp_path / "model"))
    (model / "conversion.json").unlink()

    def tie(state: dict[str, Tensor]) -> None:
        for kind in ("weight", "bias"):
            state[f"class_predictor.{kind}"][1:] = state[f"class_predictor.{kind}"][:1]

    change_weights(model, tie)
    record(model, tmp_path / "recorded", random=2)

    def change(state: dict[str, Tensor]) -> None:
        state |= {name: tensor.bfloat16() for name, tensor in state.items()}
        state["class_predictor.bias"][1] += 0.004

    def round_only(state: dict[str, Tensor]) -> None:
        state |= {name: tensor.bfloat16() for name, tensor in state.items()}

    change_json(model / CONFIG, dtype="bfloat16")
    right = Path(shutil.copytree(model, tmp_path / "right"))
    change_weights(right, round_only)
    change_weights(model, change)

    assert numbers_of(converter.verify(right, recorded=tmp_path / "recorded")).status == "passed"
    numbers = numbers_of(converter.verify(model, recorded=tmp_path / "recorded"))
    assert numbers.status == "failed"
    assert "of the queries have the recorded best class" in numbers.reason


@pytest.mark.parametrize(
    ("best_class", "mask_iou", "queries", "failing"),
    [
        (1.0, 1.0, 200, []),
        (0.9, 0.97, 200, []),
        (0.89, 1.0, 200, ["best class"]),
        (7 / 8, 1.0, 8, []),
        (6 / 8, 1.0, 8, ["best class"]),
        (1.0, 0.969, 200, ["mean IoU"]),
        (0.5, 0.5, 200, ["best class", "mean IoU"]),
        (None, None, 200, []),
    ],
)
def test_agreement_is_compared_with_what_rounding_leaves(
    best_class: float | None, mask_iou: float | None, queries: int, failing: list[str]
) -> None:
    found: dict[str, float | None] = {"best_class": best_class, "mask_iou": mask_iou}

    sentences = list(disagreement(found, queries, ROUNDED["bfloat16"]))

    assert len(sentences) == len(failing)
    assert all(part in sentence for part, sentence in zip(failing, sentences, strict=True))
    assert list(disagreement(found, queries, FLOAT32)) == []


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_panoptic_48x80"])
def test_logits_alone_show_less_and_the_verdict_says_so(
    name: str, plant: Plant, tmp_path: Path
) -> None:
    recorded = without_layers(name, tmp_path / "logits")

    found = converter.verify(plant(name), recorded=recorded)

    assert found.verdict == "passed"
    assert "cannot show a fault that moves the parts that were recorded" in numbers_of(found).reason


# other evidence --------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [True, False])
@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_instance_64_gated"])
def test_rounded_weights_reproduce_their_own_recording(
    name: str, sources: bool, plant: Plant, tmp_path: Path
) -> None:
    model = plant(name)
    record(model, tmp_path / "recorded", random=1, layers=True)
    options: Any = {"recorded": tmp_path / "recorded"}
    if sources:
        options |= {part: str(FIXTURES / name / part) for part in ("delta", "backbone")}

    right = converter.verify(model, **options)
    change_json(model / PREPROCESSOR, image_mean=[0.4845, 0.456, 0.406])
    wrong = converter.verify(model, **options)

    assert right.verdict == "passed"
    assert numbers_of(right).figures["max_abs"] <= TOLERANCE
    assert numbers_of(right).reason == ""
    assert numbers_of(wrong).status == "failed"
    assert numbers_of(wrong).figures["relative_tolerance"] == FLOAT32.relative


# what rounding must not do ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48"])
def test_a_model_that_rounding_breaks_fails_although_its_sums_are_right(
    name: str, rounded: Callable[[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any fault that changes only the outputs of the rounded model."""
    model = rounded(name, "float16")
    run = numbers.run

    def broken(network: Model, inputs: Tensor) -> dict[str, Tensor]:
        outputs = run(network, inputs)
        if torch.equal(network.query.weight, network.query.weight.half().float()):
            outputs["class_logits"] = outputs["class_logits"].roll(1, dims=-1)
        return outputs

    monkeypatch.setattr(numbers, "run", broken)

    found = verify(model, name, level=3)

    assert found.verdict == "failed"
    assert found.reason.startswith("The model is right before rounding to float16, but not")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48", "shapes_panoptic_128"])
def test_results_of_the_rounded_model_are_compared_too(
    name: str, dtype: Any, rounded: Callable[[str, Any], Path]
) -> None:
    found = verify(rounded(name, dtype), name)

    pictures = next(level for level in found.levels if level.level == "pictures")
    share = pictures.figures["rounded_equal_pixels"]
    assert ROUNDED[dtype].equal_pixels <= share < pictures.figures["equal_pixels"]
    assert f"With weights in {dtype} results are equal in {share:.1%}" in pictures.reason


# networks that magnify rounding -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seed", "dtype"),
    [("tiny_instance_64_gated", 2, "float16"), ("tiny_panoptic_64", 0, "float16")],
)
def test_a_right_model_may_be_off_by_as_much_as_its_network_makes_of_rounding(
    name: str, seed: int, dtype: Any, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    exact = Path(shutil.copytree(converted(name), tmp_path / "exact"))
    (exact / "conversion.json").unlink()
    generator = torch.Generator().manual_seed(seed)

    def shake(state: dict[str, Tensor]) -> None:
        for key in sorted(state.keys() - {"attn_mask_probs"}):
            noise = torch.randn(state[key].shape, generator=generator)
            state[key] = state[key] + 1.5 * state[key].std(correction=0) * noise

    change_weights(exact, shake)
    record(exact, tmp_path / "recorded", random=2, layers=True)
    model = Path(shutil.copytree(exact, tmp_path / "model"))
    change_json(model / CONFIG, dtype=dtype)
    kind = getattr(torch, dtype)
    change_weights(model, lambda state: state.update({k: v.to(kind) for k, v in state.items()}))

    numbers_found = numbers_of(converter.verify(model, recorded=tmp_path / "recorded"))

    assert numbers_found.figures["rounding_excess"] <= EXCESS
    off = max(
        compared["max_abs"] / ROUNDED[dtype].of(tensor)
        for key, compared in numbers_found.figures["compared"].items()
        if (tensor := load_file(tmp_path / "recorded/recorded.safetensors").get(key)) is not None
    )
    assert off > 1
    assert numbers_found.status == "passed"


# what is reported ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_panoptic_48x80", "tiny_semantic_48"])
def test_layers_that_were_not_recorded_are_not_mentioned(
    name: str, plant: Plant, tmp_path: Path
) -> None:
    tensors = load_file(FIXTURES / name / "recorded.safetensors")
    (tmp_path / "recorded").mkdir()
    kept = ("pixels", "mask_logits", "class_logits", "hidden_states.0")
    save_file({key: tensors[key] for key in kept}, tmp_path / "recorded/recorded.safetensors")

    found = converter.verify(plant(name), recorded=tmp_path / "recorded")

    assert "moves the parts that were recorded by" in numbers_of(found).reason


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_instance_64_gated"])
def test_sources_that_were_given_are_not_asked_for(name: str, plant: Plant) -> None:
    model = plant(name)
    change_weights(model, lambda state: state["criterion.empty_weight"].mul_(2))

    without = numbers_of(verify(model, name))
    given = numbers_of(verify(model, name, sources=True))

    assert without.reason.endswith("Give --delta and --backbone to find it.")
    assert "--delta" not in given.reason


@pytest.mark.parametrize("name", NAMES)
def test_the_first_difference_may_be_the_rotary_positions(name: str, plant: Plant) -> None:
    model = plant(name)
    change_json(model / CONFIG, **rope_theta(99.9))

    found = verify(model, name)

    assert found.first_difference is not None
    assert (found.first_difference.layer, found.first_difference.tensor) == (
        "rope_embeddings",
        "rope",
    )


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_panoptic_48x80"])
def test_a_tensor_of_nan_is_the_only_cause(name: str, plant: Plant) -> None:
    model = plant(name)
    change_weights(model, lambda state: state["layers.0.mlp.up_proj.bias"].fill_(float("nan")))

    found = verify(model, name, sources=True)

    assert found.cause is not None
    assert (found.cause.name, found.cause.explained) == ("tensor-replaced", 1.0)
    assert {trial.status for trial in found.tried} == {"explains all", "not tried"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_truncated_weights_are_not_taken_for_a_wrong_normalisation(
    name: str, stored: str, plant: Plant, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    exact = load_file(converted(name) / "model.safetensors")
    cut = {k: (v.view(torch.int32) & -0x10000).view(torch.float32) for k, v in exact.items()}
    model = plant(name)
    change_json(model / CONFIG, dtype=stored)
    change_weights(
        model, lambda state: state.update({k: v.to(getattr(torch, stored)) for k, v in cut.items()})
    )

    found = verify(model, name)

    assert found.cause is None or found.cause.name == "rounded-to-16-bits"


# what is stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48"])
def test_conversion_json_and_the_card_say_that_the_sums_were_compared(
    name: str, rounded: Callable[[str, Any], Path]
) -> None:
    model = rounded(name, "bfloat16")
    history = json.loads((model / "conversion.json").read_text())

    figures = history["verdict"]["levels"][2]["figures"]
    card = " ".join(str(model_card("me/model", ModelRecord.read(model))).split())

    assert (figures["rounded_to"], figures["unrounded"]) == ("bfloat16", True)
    assert "rounding" not in figures
    assert "using the float32 sums before they were rounded to bfloat16" in card


def test_a_record_cannot_claim_sums_that_nothing_proves(
    rounded: Callable[[str, Any], Path],
) -> None:
    content = json.loads((rounded("tiny_semantic_48", "float16") / "conversion.json").read_text())
    content["verdict"]["levels"][1]["figures"]["against"] = "conversion.json"

    with pytest.raises(ValueError, match="weights are not proven from their sources"):
        read_record(content["verdict"], {})


@pytest.mark.parametrize(
    "figures",
    [
        {"rounded_to": "**bold** [x](http://x)"},
        {"rounded_to": 5},
        {"unrounded": "no"},
        {"rounded_to": None},
        {"relative_tolerance": "x", "rounded_to": "anything"},
    ],
)
def test_a_record_with_invalid_figures_is_refused(
    figures: dict[str, Any], rounded: Callable[[str, Any], Path]
) -> None:
    content = json.loads((rounded("tiny_semantic_48", "float16") / "conversion.json").read_text())
    found = content["verdict"]["levels"][2]["figures"]
    found |= figures
    if found["rounded_to"] is None:  # but "unrounded" is kept
        del found["rounded_to"]

    with pytest.raises(ValueError, match=r"rounded_to is unknown|needs rounded_to|figures"):
        read_record(content["verdict"], {})


def test_a_record_of_0_1_claims_no_more_than_rounded_weights_show(
    rounded: Callable[[str, Any], Path],
) -> None:
    content = json.loads((rounded("tiny_semantic_48", "float16") / "conversion.json").read_text())
    figures = content["verdict"]["levels"][2]["figures"]
    del figures["rounded_to"], figures["unrounded"]
    figures["relative_tolerance"] = 0.005

    found = read_record(content["verdict"], {})

    assert found.compared_with.endswith(
        ", as closely as weights in 16 bits allow: faults smaller than rounding do not show"
    )
