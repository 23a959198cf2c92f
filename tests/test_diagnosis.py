"""Diagnosis: faults planted in correct models, and the causes that the verdict gives."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from recorded_models import backbone_state_dict, converted_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.checks.comparison import FLOAT32, TOLERANCE
from converter.checks.diagnosis.stages import Network, Skeleton
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import read_recorded
from converter.checks.recording import record
from converter.checks.verdict import Verdict
from reference_model import EomtDinov3Config

pytestmark = pytest.mark.numbers

PANOPTIC, WIDE = "tiny_panoptic_64", "tiny_panoptic_48x80"
SEMANTIC, GATED, SHAPES = "tiny_semantic_48", "tiny_instance_64_gated", "shapes_panoptic_128"

State = dict[str, Tensor]

# Changes the tensors of a model, and returns the names of those that it changed.
Change = Callable[[State, str], Iterable[str]]


class Planted:
    """A separate copy of a correct model, to plant faults in."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name

    def weights(self, change: Change) -> list[str]:
        state = load_file(self.folder / "model.safetensors")
        names = sorted(change(state, self.name))
        save_file(state, self.folder / "model.safetensors", metadata={"format": "pt"})
        return names

    def file(self, file: str, **values: Any) -> None:
        content = json.loads((self.folder / file).read_text())
        (self.folder / file).write_text(json.dumps(content | values))

    def without_history(self) -> None:
        (self.folder / "conversion.json").unlink()

    def verify(self, *, sources: bool = False, **options: Any) -> Verdict:
        fixture = FIXTURES / self.name
        if sources:
            options |= {"delta": str(fixture / "delta"), "backbone": str(fixture / "backbone")}
        return converter.verify(self.folder, recorded=fixture, **options)


@pytest.fixture
def plant(converted: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Planted]:
    def copy(name: str) -> Planted:
        shutil.copytree(converted(name), tmp_path / name)
        return Planted(tmp_path / name, name)

    return copy


def assert_cause(
    found: Verdict, name: str, tensors: list[str], status: str = "explains all"
) -> None:
    assert found.verdict == "failed"
    assert found.cause is not None
    assert (found.cause.name, sorted(found.cause.tensors)) == (name, tensors)
    trials = {trial.name: trial for trial in found.tried}
    assert (trials[name].status, trials[name].explained) == (status, found.cause.explained)
    assert found.cause.explained == 1


def assert_reproduces(found: Verdict) -> None:
    assert found.cause is not None
    assert found.cause.residual is not None
    assert found.cause.residual <= TOLERANCE


# faults in the weights --------------------------------------------------------------------------


def times_delta(times: int, part: str = "") -> Change:
    def change(state: State, name: str) -> Iterable[str]:
        base, right = backbone_state_dict(name), converted_state_dict(name)
        for key, values in base.items():
            delta = right[key] - values
            if part in key and delta.any():
                state[key] = values + times * delta
                yield key

    return change


def of_other_backbone(state: State, name: str) -> Iterable[str]:
    """The delta added to another training's weights: the same ones in another order."""
    base, right = backbone_state_dict(name), converted_state_dict(name)
    generator = torch.Generator().manual_seed(0)
    for key, values in base.items():
        order = torch.randperm(values.numel(), generator=generator)
        other = values.flatten()[order].view_as(values)
        if not torch.equal(other, values):
            state[key] = other + right[key] - values
            yield key


def replaced(*names: str) -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        for key in names:
            state[key] = state[key].roll(1, dims=0) + 0.1
        return names

    return change


def swapped(*pairs: tuple[str, str]) -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        for a, b in pairs:
            state[a], state[b] = state[b], state[a]
        return [name for pair in pairs for name in pair]

    return change


def swapped_everywhere(part: str, other: str) -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        pairs = [(key, key.replace(part, other)) for key in state if part in key]
        return swapped(*pairs)(state, _)

    return change


def permuted(*order: int) -> Change:
    """Puts the layers into this order."""

    def change(state: State, _: str) -> Iterable[str]:
        old = dict(state)
        for layer, other in enumerate(order):
            for key in old:
                if key.startswith(f"layers.{layer}."):
                    state[key] = old[key.replace(f"layers.{layer}.", f"layers.{other}.")]
                    if not torch.equal(state[key], old[key]):
                        yield key

    return change


def channels_reversed(state: State, _: str) -> Iterable[str]:
    key = "embeddings.patch_embeddings.weight"
    state[key] = state[key].flip(1).contiguous()
    return [key]


def masked(probability: float) -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        state["attn_mask_probs"].fill_(probability)
        return ["attn_mask_probs"]

    return change


def rounded(dtype: torch.dtype, part: str = "") -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        for key in state:
            coarse = state[key].to(dtype).float()
            if part in key and not torch.equal(coarse, state[key]):
                state[key] = coarse
                yield key

    return change


def without_layer_scale(part: str = "lambda1") -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        for key in state:
            if key.endswith("lambda1") and part in key:
                state[key].fill_(1)
                yield key

    return change


QUERY_AND_KEY = ("layers.1.attention.q_proj.weight", "layers.1.attention.k_proj.weight")
MASK_LAYERS = tuple(
    (f"mask_head.fc1.{kind}", f"mask_head.fc2.{kind}") for kind in ("weight", "bias")
)


@pytest.mark.parametrize(
    ("cause", "name", "change"),
    [
        ("delta-added-twice", PANOPTIC, times_delta(2)),
        ("delta-added-twice", GATED, times_delta(2, "layers.1")),
        ("delta-not-added", SEMANTIC, times_delta(0)),
        ("delta-not-added", SHAPES, times_delta(0, "attention")),
        ("delta-subtracted", WIDE, times_delta(-1)),
        ("delta-subtracted", PANOPTIC, times_delta(-1, "layers.2.mlp")),
        ("other-backbone", PANOPTIC, of_other_backbone),
        ("other-backbone", SHAPES, of_other_backbone),
        ("tensor-replaced", GATED, replaced("layers.1.mlp.gate_proj.weight")),
        ("tensor-replaced", WIDE, replaced("query.weight", "layers.0.norm2.bias")),
        ("tensors-swapped", SEMANTIC, swapped(QUERY_AND_KEY)),
        ("layers-permuted", SHAPES, permuted(1, 2, 0)),
        ("rounded-to-16-bits", WIDE, rounded(torch.bfloat16)),
        ("rounded-to-16-bits", GATED, rounded(torch.float16)),
        ("missing-layer-scale", PANOPTIC, without_layer_scale()),
    ],
)
def test_a_fault_in_the_weights_is_named_with_the_sources(
    cause: str, name: str, change: Change, plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.without_history()
    tensors = planted.weights(change)

    found = planted.verify(sources=True)

    assert_cause(found, cause, tensors)
    assert_reproduces(found)


@pytest.mark.parametrize(
    ("cause", "name", "change"),
    [
        ("tensors-swapped", WIDE, swapped(QUERY_AND_KEY)),
        ("tensors-swapped", PANOPTIC, swapped(*MASK_LAYERS)),
        ("tensors-swapped", GATED, swapped_everywhere("gate_proj", "up_proj")),
        (
            "tensors-swapped",
            SEMANTIC,
            swapped(("layers.0.mlp.down_proj.weight", "layers.2.mlp.down_proj.weight")),
        ),
        ("layers-permuted", PANOPTIC, permuted(1, 0)),
        ("layers-permuted", SEMANTIC, permuted(2, 0, 1)),
        ("channel-order", PANOPTIC, channels_reversed),
        ("channel-order", SHAPES, channels_reversed),
        ("masked-attention-on", SEMANTIC, masked(1)),
        ("masked-attention-on", PANOPTIC, masked(0.5)),
        ("missing-layer-scale", WIDE, without_layer_scale()),
        ("missing-layer-scale", GATED, without_layer_scale("layers.1")),
    ],
)
def test_a_fault_in_the_weights_is_named_by_the_numbers_alone(
    cause: str, name: str, change: Change, plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.without_history()
    tensors = planted.weights(change)

    found = planted.verify()

    assert_cause(found, cause, tensors)
    assert_reproduces(found)


@pytest.mark.parametrize("probability", [1e-6, 0.03, 0.5, 0.999])
@pytest.mark.parametrize("name", [PANOPTIC, SEMANTIC, GATED])
def test_masks_that_are_drawn_at_random_never_pass(
    name: str, probability: float, plant: Callable[[str], Planted]
) -> None:
    """Whatever was drawn in this run: some draws give the right outputs by chance."""
    planted = plant(name)
    planted.without_history()
    planted.weights(masked(probability))

    for found in (
        planted.verify(),
        converter.verify(planted.folder),
        converter.verify(planted.folder, level=1),
    ):
        assert found.verdict == "failed"
        assert "attn_mask_probs holds" in found.levels[0].reason
        assert found.levels[2].status != "passed"
        assert found.cause is not None
        assert found.cause.name == "masked-attention-on"


@pytest.mark.parametrize(
    ("name", "dtype", "part"),
    [(WIDE, torch.bfloat16, ""), (SEMANTIC, torch.float16, "layers.1.mlp.up_proj.weight")],
)
def test_rounded_weights_are_off_by_as_much_as_rounding_makes_them(
    name: str, dtype: torch.dtype, part: str, plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.without_history()
    tensors = planted.weights(rounded(dtype, part))

    found = planted.verify()

    assert_cause(found, "rounded-to-16-bits", tensors, "explains part")
    assert found.cause is not None
    assert "parts as far as they are off" in found.cause.explanation
    assert "only the sources can show" in found.cause.explanation


# faults in the configuration files ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (PANOPTIC, {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),
        (SHAPES, {"rescale_factor": 1.0}),
        (GATED, {"image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229]}),
        (WIDE, {"rescale_factor": 1 / 256}),
        (SEMANTIC, {"do_normalize": False}),
    ],
)
def test_a_wrong_normalisation_is_named_with_the_right_one(
    name: str, values: dict[str, Any], plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.without_history()
    planted.file("preprocessor_config.json", **values)

    found = planted.verify()

    assert_cause(found, "image-normalisation", [])
    assert_reproduces(found)
    assert found.cause is not None
    assert "mean 0.485, 0.456, 0.406 and standard deviation 0.229, 0.224, 0.225" in (
        found.cause.explanation
    )


def rope_theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


@pytest.mark.parametrize(
    ("cause", "name", "values", "right"),
    [
        ("rope-base", PANOPTIC, rope_theta(10_000.0), "a rotary base of 100 "),
        ("rope-base", SHAPES, rope_theta(90.0), "a rotary base of 100 "),
        ("attention-heads", PANOPTIC, {"num_attention_heads": 8}, "with 4 heads"),
        ("attention-heads", GATED, {"num_attention_heads": 1}, "with 2 heads"),
        ("layer-norm-epsilon", SEMANTIC, {"layer_norm_eps": 1e-6}, "epsilon of 1e-05"),
        ("layer-norm-epsilon", SHAPES, {"layer_norm_eps": 1e-3}, "epsilon of 1e-05"),
        ("activation", WIDE, {"hidden_act": "gelu_pytorch_tanh"}, "gelu as the activation"),
        ("activation", GATED, {"hidden_act": "gelu"}, "silu as the activation"),
    ],
)
def test_a_wrong_value_of_config_json_is_named_with_the_right_one(
    cause: str, name: str, values: dict[str, Any], right: str, plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.without_history()
    planted.file("config.json", **values)

    found = planted.verify()

    assert_cause(found, cause, [])
    assert_reproduces(found)
    assert found.cause is not None
    assert right in found.cause.explanation


@pytest.mark.parametrize(
    ("cause", "values"),
    [("rope-base", rope_theta(20.0)), ("attention-heads", {"num_attention_heads": 1})],
)
def test_rotary_positions_need_not_be_recorded(
    cause: str, values: dict[str, Any], plant: Callable[[str], Planted], tmp_path: Path
) -> None:
    planted = plant(WIDE)
    planted.without_history()
    planted.file("config.json", **values)
    recorded = load_file(FIXTURES / WIDE / "recorded.safetensors")
    del recorded["rope.cos"], recorded["rope.sin"]
    save_file(recorded, tmp_path / "recorded.safetensors")

    found = converter.verify(planted.folder, recorded=tmp_path)

    assert_cause(found, cause, [])


# first differences and causes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "layer", "tensor"),
    [
        (replaced("embeddings.cls_token"), "embeddings", "patch_embeddings"),
        (replaced("layers.2.norm1.bias"), "layers.2", "hidden_states.2"),
        (replaced("layernorm.bias"), "layernorm", "last_hidden_state"),
        (replaced("class_predictor.bias"), "class_predictor", "class_logits"),
        (replaced("mask_head.fc2.weight"), "mask_head", "mask_logits"),
    ],
)
def test_the_first_difference_is_where_the_fault_is(
    change: Change, layer: str, tensor: str, plant: Callable[[str], Planted]
) -> None:
    planted = plant(PANOPTIC)
    planted.weights(change)

    first = planted.verify().first_difference

    assert first is not None
    assert (first.layer, first.tensor) == (layer, tensor)
    assert first.max_abs is not None
    assert first.max_abs > 1e-3


def test_without_the_sources_no_cause_is_made_up(plant: Callable[[str], Planted]) -> None:
    planted = plant(WIDE)
    planted.without_history()
    planted.weights(times_delta(2))

    found = planted.verify()

    assert found.verdict == "failed"
    assert found.cause is None
    tried = {trial.name: (trial.status, trial.reason) for trial in found.tried}
    no_sources = "The sources are missing: give --delta and --backbone."
    for name in ("delta-added-twice", "delta-not-added", "delta-subtracted", "other-backbone"):
        assert tried[name] == ("not tried", no_sources)


def test_conversion_json_names_a_replaced_tensor_without_the_sources(
    plant: Callable[[str], Planted],
) -> None:
    planted = plant(WIDE)
    planted.file("conversion.json", checkpoint=None)
    tensors = planted.weights(replaced("layers.1.mlp.up_proj.weight"))

    found = planted.verify()

    assert_cause(found, "tensor-replaced", tensors, "explains part")
    assert found.cause is not None
    assert found.cause.residual is None


def test_a_tensor_that_no_number_shows_is_named_by_its_digest(
    plant: Callable[[str], Planted],
) -> None:
    planted = plant(WIDE)
    tensors = planted.weights(replaced("criterion.empty_weight"))

    found = planted.verify()

    assert_cause(found, "tensor-replaced", tensors)
    assert found.first_difference is None


def test_a_fault_of_the_weights_is_named_without_a_recording(
    plant: Callable[[str], Planted],
) -> None:
    planted = plant(SEMANTIC)
    planted.without_history()
    tensors = planted.weights(times_delta(2))
    fixture = FIXTURES / SEMANTIC

    found = converter.verify(
        planted.folder, delta=str(fixture / "delta"), backbone=str(fixture / "backbone")
    )

    assert_cause(found, "delta-added-twice", tensors)


def of_another_training(base: State) -> State:
    """The same values in another order."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: values.flatten()[torch.randperm(values.numel(), generator=generator)].view_as(values)
        for key, values in base.items()
    }


def trained_further(base: State) -> State:
    generator = torch.Generator().manual_seed(1)
    return {
        key: values
        + 0.1 * values.std(correction=0) * torch.randn(values.shape, generator=generator)
        for key, values in base.items()
    }


def verify_with_consistent_sources(
    name: str, change: Callable[[State], State], folder: Path
) -> Verdict:
    """The verdict on a conversion with a backbone from another training."""
    shutil.copytree(FIXTURES / name / "backbone", folder / "backbone")
    path = folder / "backbone" / "model.safetensors"
    save_file(change(load_file(path)), path)
    sources: Any = {"delta": str(FIXTURES / name / "delta"), "backbone": str(folder / "backbone")}
    task: Any = "semantic" if name == SEMANTIC else "panoptic"
    height, width = json.loads((FIXTURES / name / "recorded.json").read_text())["image_size"]
    converter.convert(
        output=folder / "other", task=task, image_size=(height, width), verify=False, **sources
    )
    return converter.verify(folder / "other", recorded=FIXTURES / name, **sources)


@pytest.mark.parametrize("name", [WIDE, PANOPTIC, SEMANTIC, GATED])
def test_another_backbone_is_detected_by_running_it(name: str, tmp_path: Path) -> None:
    found = verify_with_consistent_sources(name, of_another_training, tmp_path)

    assert found.cause is not None
    assert found.cause.name == "other-backbone"
    assert found.cause.residual is None
    assert "has a correlation of" in found.cause.explanation
    assert all(trial.status != "explains all" for trial in found.tried)


@pytest.mark.parametrize("name", [WIDE, PANOPTIC, SEMANTIC, GATED])
def test_a_backbone_that_was_trained_further_is_not_called_another_one(
    name: str, tmp_path: Path
) -> None:
    found = verify_with_consistent_sources(name, trained_further, tmp_path)

    assert found.verdict == "failed"
    assert found.cause is None
    tried = {trial.name: trial.reason for trial in found.tried}
    assert "another training would have none" in tried["other-backbone"]


def test_a_right_model_is_not_diagnosed(
    plant: Callable[[str], Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.checks.diagnosis.search.diagnose", None)

    found = plant(PANOPTIC).verify()

    assert (found.verdict, found.first_difference, found.cause, found.tried) == (
        "passed",
        None,
        None,
        (),
    )


# never certain and wrong -------------------------------------------------------------------------


def delta_by(factor: float) -> Change:
    """Trained further, or less, by this factor."""

    def change(state: State, name: str) -> Iterable[str]:
        base, right = backbone_state_dict(name), converted_state_dict(name)
        for key, values in base.items():
            state[key] = state[key] + (factor - 1) * (right[key] - values)
            yield key

    return change


def noisy(size: float) -> Change:
    def change(state: State, _: str) -> Iterable[str]:
        generator = torch.Generator().manual_seed(0)
        for key in state.keys() - {"attn_mask_probs"}:
            spread = state[key].abs().mean()
            error = torch.randn(state[key].shape, generator=generator)
            state[key] = state[key] + size * spread * error
            yield key

    return change


def in_8_bits(state: State, _: str) -> Iterable[str]:
    for key in state.keys() - {"attn_mask_probs"}:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn).float() * scale
        yield key


def further_and_rounded(state: State, name: str) -> Iterable[str]:
    list(delta_by(1.05)(state, name))
    return rounded(torch.bfloat16)(state, name)


NAMELESS = {
    "0.1% further": delta_by(1.001),
    "10% less": delta_by(0.9),
    "noise of 1e-4": noisy(1e-4),
    "noise of 1e-2": noisy(1e-2),
    "8 bits": in_8_bits,
}
MODELS = [PANOPTIC, WIDE, SEMANTIC, GATED, SHAPES]


@pytest.mark.parametrize(
    ("change", "name", "sources"),
    [
        # every pair of a fault, a model, and sources or none
        pytest.param(change, name, (fault + model) % 2 == 0, id=f"{name}-{text}")
        for fault, (text, change) in enumerate(NAMELESS.items())
        for model, name in enumerate(MODELS)
    ],
)
def test_faults_without_a_name_get_no_cause(
    name: str, sources: bool, change: Change, plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.without_history()
    planted.weights(change)

    found = planted.verify(sources=sources)

    assert found.verdict == "failed"
    assert found.cause is None
    assert {trial.status for trial in found.tried} == {"explains nothing", "not tried"}
    if sources:
        tried = {trial.name: trial.reason for trial in found.tried}
        assert "but not as a backbone from another training would" in tried["other-backbone"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (PANOPTIC, torch.float32),
        (PANOPTIC, torch.bfloat16),
        (WIDE, torch.float32),
        (WIDE, torch.float16),
        (GATED, torch.float32),
        (GATED, torch.bfloat16),
        (SHAPES, torch.float32),
        (SHAPES, torch.float16),
    ],
)
def test_a_scaled_patch_embedding_is_not_blamed_on_the_preprocessor(
    name: str, dtype: torch.dtype, plant: Callable[[str], Planted]
) -> None:
    """Another factor would have the same effect, but no published model uses it."""
    planted = plant(name)
    planted.without_history()

    def scale(state: State, _: str) -> Iterable[str]:
        key = "embeddings.patch_embeddings.weight"
        state[key] = state[key] * 0.97
        state |= {each: tensor.to(dtype) for each, tensor in state.items()}
        return [key]

    planted.weights(scale)
    planted.file("config.json", dtype=str(dtype).removeprefix("torch."))

    found = planted.verify()

    assert (found.verdict, found.cause) == ("failed", None)


@pytest.mark.parametrize("name", [PANOPTIC, WIDE, SEMANTIC])
def test_rounding_is_not_blamed_for_further_training(
    name: str, plant: Callable[[str], Planted]
) -> None:
    """With the sources, tensor values show the difference, which is far below that of rounding."""
    planted = plant(name)
    planted.without_history()
    planted.weights(further_and_rounded)

    found = planted.verify(sources=True)

    statuses = {trial.name: trial.status for trial in found.tried}
    assert "explains all" not in statuses.values()
    if found.cause:  # the weights that were not trained further were only rounded
        assert found.cause.name == "rounded-to-16-bits"
        assert found.cause.explained is not None
        assert found.cause.explained < 1


@pytest.mark.parametrize("name", [WIDE, SEMANTIC, GATED])
def test_rounding_is_not_blamed_for_less_than_it_does(
    name: str, plant: Callable[[str], Planted], tmp_path: Path
) -> None:
    """Weights that always had 16 bits, and another fault."""
    planted = plant(name)
    planted.without_history()
    planted.weights(rounded(torch.bfloat16))
    record(planted.folder, tmp_path / "recorded", random=1, layers=True)
    planted.file("config.json", layer_norm_eps=1e-6)

    found = converter.verify(planted.folder, recorded=tmp_path / "recorded")

    assert_cause(found, "layer-norm-epsilon", [])
    tried = {trial.name: trial.status for trial in found.tried}
    assert tried["rounded-to-16-bits"] in ("not tried", "explains nothing")


@pytest.mark.parametrize("name", [PANOPTIC, WIDE, SEMANTIC])
def test_undoing_a_fault_must_leave_as_little_as_right_models_differ(
    name: str, plant: Callable[[str], Planted]
) -> None:
    """Within the tolerance, but beyond what right models differ by, something else is wrong."""
    planted = plant(name)
    planted.without_history()
    planted.weights(nearly_beyond_the_tolerance(planted.folder))
    planted.file("config.json", **rope_theta(1000.0))

    found = planted.verify()

    tried = {trial.name: trial for trial in found.tried}
    assert found.verdict == "failed"
    assert tried["rope-base"].status == "explains part"
    assert found.cause is not None
    assert "explains a part: largest difference" in found.cause.explanation


def nearly_beyond_the_tolerance(model: Path) -> Change:
    """Adds noise, so much that numbers are off by 0.7 to 0.9 of their tolerance."""

    def change(state: State, name: str) -> Iterable[str]:
        recorded = read_recorded(FIXTURES / name)
        normalisation = read_normalisation(model / "preprocessor_config.json", 3)
        skeleton = Skeleton(EomtDinov3Config.from_pretrained(model))
        low, high, right = 0.0, 1e-4, dict(state)
        for _ in range(30):
            size = (low + high) / 2
            state |= right
            list(noisy(size)(state, name))
            outputs = Network(skeleton, state, normalisation).run(recorded.pixels)
            off = max(
                float((output[: len(theirs)] - theirs).abs().max()) / FLOAT32.of(theirs)
                for key, output in outputs.items()
                if (theirs := recorded.tensors.get(key)) is not None
            )
            if 0.7 < off < 0.9:
                return state.keys()
            low, high = (low, size) if off > 0.8 else (size, high)
        raise AssertionError("no noise is of that size")

    return change


@pytest.mark.parametrize("name", [PANOPTIC, SEMANTIC, SHAPES])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_files_that_changed_without_effect_are_not_blamed_on_tensors(
    name: str, file: str, plant: Callable[[str], Planted]
) -> None:
    planted = plant(name)
    planted.file(file, extra=1)

    for found in (planted.verify(), planted.verify(level=2)):
        assert found.verdict == "failed"
        assert found.cause is None
        assert {trial.status for trial in found.tried} == {"not tried"}


@pytest.mark.parametrize("name", [PANOPTIC, SEMANTIC, SHAPES])
def test_a_cause_needs_a_tensor_that_is_wrong(name: str, plant: Callable[[str], Planted]) -> None:
    """If no number is compared, undoing a fault that is not there changes nothing."""
    planted = plant(name)
    planted.weights(delta_by(1.001))

    found = planted.verify(level=2)

    assert (found.verdict, found.cause) == ("failed", None)


# two faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "values", "first", "causes"),
    [
        (
            [swapped(QUERY_AND_KEY)],
            rope_theta(1000.0),
            "hidden_states.0",
            {"rope-base", "tensors-swapped"},
        ),
        (
            [swapped(QUERY_AND_KEY), channels_reversed],
            {},
            "patch_embeddings",
            {"tensors-swapped", "channel-order"},
        ),
        (
            [permuted(1, 0), swapped(*MASK_LAYERS)],
            {},
            "hidden_states.0",
            {"layers-permuted", "tensors-swapped"},
        ),
        (
            [rounded(torch.bfloat16), swapped(QUERY_AND_KEY)],
            {},
            "patch_embeddings",
            {"rounded-to-16-bits", "tensors-swapped"},
        ),
        ([replaced("layers.1.norm2.weight"), swapped(QUERY_AND_KEY)], {}, "hidden_states.1", set()),
    ],
)
def test_two_faults_are_named_as_far_as_possible(
    changes: list[Change],
    values: dict[str, Any],
    first: str,
    causes: set[str],
    plant: Callable[[str], Planted],
) -> None:
    """The fault that is named has the right tensors, and does not claim to explain everything."""
    planted = plant(WIDE)
    planted.without_history()
    for change in changes:
        planted.weights(change)
    if values:
        planted.file("config.json", **values)

    found = planted.verify()

    assert found.first_difference is not None
    assert found.first_difference.tensor == first
    assert all(trial.status != "explains all" for trial in found.tried)
    named = {trial.name for trial in found.tried if trial.status == "explains part"}
    assert named == causes
    assert (found.cause.name in causes) if found.cause else not causes


def test_two_faults_of_the_weights_are_both_named_with_the_sources(
    plant: Callable[[str], Planted],
) -> None:
    planted = plant(SEMANTIC)
    twice = planted.weights(times_delta(2, "layers.0"))
    other = planted.weights(replaced("layers.0.attention.o_proj.weight"))

    found = planted.verify()

    assert found.cause is not None
    assert found.cause.name == "delta-added-twice"
    assert sorted(found.cause.tensors) == sorted(set(twice) - set(other))
    assert "tensor-replaced explains the rest" in found.cause.explanation
