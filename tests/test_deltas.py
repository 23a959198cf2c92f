"""The delta of a model to its backbone: what is written, and that it adds up to the model again."""

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES, NAMES
from hub_server import Hub
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.errors import (
    MismatchError,
    NotVerifiedError,
    OutputError,
    OutputsDifferError,
    PlanError,
    UnreadableFileError,
    UsageError,
)
from converter.publishing.delta_card import DeltaFolder
from converter.weights import merge
from converter.weights.delta_plan import delta_rows, stored_rows
from converter.weights.difference import subtract
from converter.weights.headers import TensorInfo
from converter.weights.layouts import (
    BACKBONE_LAYOUTS,
    DINOV3_TRANSFORMERS,
    EOMT_TRANSFORMERS,
    EOMT_TUE,
    translate,
)
from converter.weights.merge import compute
from converter.weights.plan import make_plan
from converter.weights.tensorfiles import open_tensors
from converter.weights.torch_writer import TorchWriter
from reference_model import EomtDinov3ForUniversalSegmentation

NAME = "tiny_panoptic_64"
BACKBONE = FIXTURES / NAME / "backbone"
LAYOUTS = json.loads((FIXTURES / "layouts.json").read_text())

Weights = dict[str, Tensor]


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.numpy().tobytes() == theirs.numpy().tobytes()


def come_back(delta: Path, place: Path, backbone: Path = BACKBONE) -> Weights:
    """The weights of the model that a conversion of a delta gives."""
    converter.convert(delta=str(delta), backbone=str(backbone), output=place)
    return weights_of(place)


@pytest.fixture
def tuned(model: Path) -> Path:
    """A model after some training, with noise in every weight of its backbone."""
    preprocessor = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(
        json.dumps({**preprocessor, "image_mean": [0.5, 0.4, 0.3]})
    )
    weights = weights_of(model)
    generator = torch.Generator().manual_seed(0)
    for name in weights:
        if name.startswith(("embeddings.", "layers.", "layernorm.")):
            weights[name] += 1e-3 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "conversion.json").unlink()
    return model


# there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_delta_of_a_converted_model_gives_its_bits_again(
    converted: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    model, backbone = converted(name), FIXTURES / name / "backbone"
    done = converter.make_delta(model, backbone, tmp_path / "delta")

    assert (done.verdict.verdict, done.verdict.basis) == ("passed", "reference")
    assert done.content["round_trip"]["inexact"] == 0
    ours, theirs = come_back(tmp_path / "delta", tmp_path / "back", backbone), weights_of(model)
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[key], theirs[key]) for key in theirs)
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
            (model / file).read_text()
        )


@pytest.mark.parametrize("name", ["backbone_meta", "backbone_timm"])
@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_the_backbones_layout_and_the_format_make_no_difference(
    tuned: Path, name: str, format: Any, tmp_path: Path
) -> None:
    usual = converter.make_delta(tuned, BACKBONE, tmp_path / "usual")
    done = converter.make_delta(
        tuned,
        FIXTURES / NAME / name,
        tmp_path / "delta",
        backbone_config=BACKBONE / "config.json",  # no published backbone has its size
        format=format,
    )

    digests = [
        {key: tensor["sha256"] for key, tensor in each.content["tensors"].items()}
        for each in (usual, done)
    ]
    assert digests[0] == digests[1]
    assert list(done.files) == ["pytorch_model.bin" if format == "torch" else "model.safetensors"]


@pytest.mark.numbers
def test_what_does_not_come_back_is_counted_exactly(tuned: Path, tmp_path: Path) -> None:
    done = converter.make_delta(tuned, BACKBONE, tmp_path / "delta")
    ours, theirs = come_back(tmp_path / "delta", tmp_path / "back"), weights_of(tuned)

    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
            (tuned / file).read_text()
        )
    differ = {
        name: int((ours[name].view(torch.int32) != theirs[name].view(torch.int32)).sum())
        for name in theirs
    }
    assert 0 < sum(differ.values()) < 0.05 * sum(tensor.numel() for tensor in theirs.values())
    assert {name: change.inexact for name, change in done.changes.items()} == {
        name: count for name, count in differ.items() if name != "attn_mask_probs"
    }
    figures = done.content["round_trip"]
    assert figures["inexact"] == sum(differ.values())
    assert figures["max_abs"] == max(
        float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs
    )
    assert figures["max_ulps"] <= 1
    numbers = done.verdict.levels[-1]
    assert (numbers.level, numbers.status) == ("numbers", "passed")
    assert 0 < numbers.figures["max_abs"] < 2e-4


def test_the_original_loaders_way_of_adding_gives_the_same_network(
    tuned: Path, tmp_path: Path
) -> None:
    done = converter.make_delta(tuned, BACKBONE, tmp_path / "delta")
    delta = torch.load(tmp_path / "delta" / "pytorch_model.bin", weights_only=True)
    base = load_file(BACKBONE / "model.safetensors")
    model = weights_of(tuned)

    # as in github.com/tue-mps/eomt, training/lightning_module.py: what is added to is the network
    # with the backbone's weights, zeros in all other parameters, and its buffers
    own: Weights = {"network.attn_mask_probs": torch.ones(len(delta["network.attn_mask_probs"]))}
    for name in ("pixel_mean", "pixel_std"):
        own[f"network.encoder.{name}"] = torch.rand(1, 3, 1, 1)
    prefix = "network.encoder.backbone."
    for name, tensor in base.items():
        if name.startswith("embeddings."):
            own[f"{prefix}patch_embed.{name.removeprefix('embeddings.')}"] = tensor
        elif name.startswith("layer."):
            own[f"{prefix}blocks.{name.removeprefix('layer.')}"] = tensor
        else:
            own[prefix + name] = tensor
    del own[f"{prefix}patch_embed.mask_token"]  # which the original deletes
    heads = [name for name in delta if not name.startswith("network.encoder.")]
    for name in {*heads} - {"network.attn_mask_probs", "criterion.empty_weight"}:
        own[name] = torch.zeros_like(delta[name])

    assert own.keys() == delta.keys() - {"criterion.empty_weight"}
    added = {name: own[name] + delta[name] for name in own}
    assert not added["network.attn_mask_probs"].any()
    assert torch.equal(added["network.encoder.pixel_std"], own["network.encoder.pixel_std"])
    expected = come_back(tmp_path / "delta", tmp_path / "back")
    for name, tensor in added.items():
        (canonical,) = EOMT_TUE.target(name)
        if isinstance(canonical, str):
            assert torch.equal(tensor, expected[canonical]), name
    assert done.verdict.verdict == "passed"
    assert expected.keys() == model.keys()


def test_it_has_the_names_shapes_and_types_of_a_published_one(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in NAMES:
        source = next((FIXTURES / name / "delta").glob("*.*"))
        folder = tmp_path / name
        converter.make_delta(converted(name), FIXTURES / name / "backbone", folder)
        with open_tensors(source) as theirs, open_tensors(folder / "pytorch_model.bin") as ours:
            assert {key: (info.dtype, info.shape) for key, info in ours.tensors.items()} == {
                key: (info.dtype, info.shape) for key, info in theirs.tensors.items()
            }


@pytest.mark.parametrize("name", LAYOUTS["checkpoints"])
def test_the_published_checkpoints_have_the_names_and_shapes_of_their_deltas(name: str) -> None:
    entry = LAYOUTS["checkpoints"][name]
    tensors = {key: TensorInfo("F32", tuple(shape), 0) for key, shape in entry["converted"].items()}
    config = make_plan(tensors, None, None).config
    rows = delta_rows(translate(tensors, EOMT_TRANSFORMERS), config)

    assert {row.name: list(row.shape) for row in rows} == entry["delta"]


def test_absolute_weights_of_training_make_the_same_delta(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    usual = converter.make_delta(converted(NAME), BACKBONE, tmp_path / "usual")
    done = converter.make_delta(FIXTURES / NAME / "absolute.ckpt", BACKBONE, tmp_path / "delta")

    digests = [
        {key: tensor["sha256"] for key, tensor in each.content["tensors"].items()}
        for each in (usual, done)
    ]
    differ = {key for key in digests[0] if digests[0][key] != digests[1][key]}
    assert not differ
    assert (done.content["task"], done.content["classes"]) == (None, None)


def test_a_model_in_shards_and_in_16_bits_makes_a_delta_of_its_widened_weights(
    tmp_path: Path, command: Callable[..., Result]
) -> None:
    converter.convert(NAME, tmp_path / "model", dtype="bfloat16", max_shard_size="200kB")
    result = command("make-delta", "model", "--backbone", BACKBONE, "--output", "delta")

    assert result.exit_code == 0, result.output
    assert "weights in bfloat16 were widened to float32" in result.stdout
    ours = come_back(tmp_path / "delta", tmp_path / "back")
    shards = [load_file(path) for path in sorted((tmp_path / "model").glob("model-*.safetensors"))]
    assert len(shards) > 1
    content = json.loads((tmp_path / "delta" / "delta.json").read_text())
    differ = sum(
        int((ours[name] != tensor.float()).sum())
        for shard in shards
        for name, tensor in shard.items()
    )
    assert content["round_trip"]["inexact"] == differ


# the file ----------------------------------------------------------------------------------------


def test_the_file_is_the_same_from_run_to_run_and_torch_reads_and_maps_it(
    tuned: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        converter.make_delta(tuned, BACKBONE, tmp_path / name)
    one, two = ((tmp_path / name / "pytorch_model.bin") for name in ("one", "two"))

    assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "one" / "delta.json").read_bytes() == (
        tmp_path / "two" / "delta.json"
    ).read_bytes()
    for mapped in (False, True):
        found = torch.load(one, weights_only=True, mmap=mapped)
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values()) or not mapped


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=5),
    pieces=st.integers(1, 50),
)
@example(shapes=[(0,), (), (3,), (0, 2)], pieces=7)
def test_torch_reads_what_was_written_in_pieces(
    shapes: list[tuple[int, ...]], pieces: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("file")
    values = {
        f"tensor {number}.ö": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for number, shape in enumerate(shapes)
    }
    content = b"".join(array.tobytes() for array in values.values())
    with TorchWriter(
        folder, {name: ("F32", array.shape) for name, array in values.items()}
    ) as file:
        for start in range(0, len(content), pieces):
            file.write(content[start : start + pieces])
        written = file.files["pytorch_model.bin"]
    found = torch.load(folder / "pytorch_model.bin", weights_only=True)

    assert list(found) == list(values)
    for name, array in values.items():
        assert found[name].shape == array.shape
        assert np.array_equal(found[name].numpy(), array)
    with open_tensors(folder / "pytorch_model.bin") as ours:
        assert ours.wrong_checksums() == ()
        assert ours.digests() == {"pytorch_model.bin": written}


def test_too_many_or_too_few_bytes_are_an_error(tmp_path: Path) -> None:
    with TorchWriter(tmp_path, {"a": ("F32", (2,))}) as file:
        file.write(bytes(4))
        with pytest.raises(ValueError, match="4 bytes of a tensor are missing"):
            _ = file.files
        with pytest.raises(ValueError, match="more bytes than the tensors"):
            file.write(bytes(8))


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    chunk = np.zeros(1 << 18, np.float32)
    tracemalloc.start()
    with TorchWriter(tmp_path, {"a": ("F32", (chunk.size, 32))}) as file:
        for _ in range(32):
            file.write(chunk)
        assert file.files["pytorch_model.bin"].size > 32 * chunk.nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * chunk.nbytes


# the difference ----------------------------------------------------------------------------------

floats = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)


@pytest.mark.numbers
@given(total=floats, base=floats)
@example(total=1e-8, base=1.0)
@example(total=-0.0, base=0.0)
@example(total=3.0, base=-1e-7)
@example(total=1.1754944e-38, base=1.5e-38)
def test_a_difference_adds_up_again_if_any_number_does(total: float, base: float) -> None:
    t, b = (np.array([value], np.float32) for value in (total, base))
    (ours,) = subtract(t, b)
    reached = abs(float(b[0] + ours) - float(t[0]))

    # every float32 number near the exact difference
    near = np.float32(float(t[0]) - float(b[0]))
    candidates = [near]
    for end in (-np.inf, np.inf):
        each = near
        for _ in range(3):
            each = np.nextafter(each, np.float32(end))
            candidates.append(each)
    assert reached == min(abs(float(b[0] + each) - float(t[0])) for each in candidates)


def test_a_neighbour_reaches_powers_of_two_that_the_rounded_difference_misses() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(0, 0.02, 10_000).astype(np.float32)
    total = np.float32(2) ** generator.integers(-8, 1, base.shape).astype(np.float32)
    missed = [int((base + d != total).sum()) for d in (total - base, subtract(total, base))]

    assert missed[1] < missed[0]
    # a weight that did not change comes back with its sign, also if it is a zero
    zeros = np.array([-0.0, 0.0], np.float32)
    assert (zeros + subtract(zeros, zeros)).tobytes() == zeros.tobytes()


# layouts there and back --------------------------------------------------------------------------


class Memory:
    """Tensors like an open file of weights."""

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        self.arrays = arrays
        self.tensors = {name: TensorInfo("F32", a.shape, 0) for name, a in arrays.items()}

    def read(self, name: str, start: int, stop: int, out: object = None) -> NDArray[np.float32]:
        return self.arrays[name].reshape(-1)[start:stop]


def computed(rows: Any, files: Any) -> dict[str, NDArray[np.float32]]:
    """The tensors of rows, computed in pieces of an odd size."""
    found = {}
    for row in rows:
        pieces = []
        for start in range(0, row.size, 37):
            stop = min(start + 37, row.size)
            buffer, addend = np.empty((2, 37), np.float32)
            pieces.append(compute(row, files, start, stop, buffer, addend).copy())
        found[row.name] = np.concatenate(pieces).reshape(row.shape)
    return found


@pytest.mark.parametrize("checkpoint", ["tiny_panoptic_64", "tiny_instance_64_gated"])
@pytest.mark.parametrize("layout", BACKBONE_LAYOUTS.values(), ids=lambda layout: layout.name)
def test_a_backbone_comes_back_from_every_layout(checkpoint: str, layout: Any) -> None:
    with open_tensors(FIXTURES / checkpoint / "backbone" / "model.safetensors") as file:
        backbone = Memory({name: file.read(name) for name in file.tensors})
    known = translate(backbone.tensors, DINOV3_TRANSFORMERS)
    stored = Memory(computed(stored_rows(layout, known, "backbone"), {"backbone": backbone}))
    back = translate(stored.tensors, layout)

    assert back.parts.keys() == known.parts.keys()
    assert not back.unknown
    for name, part in back.parts.items():
        original = known.parts[name]
        ours = np.split(stored.arrays[part.name], part.count)[part.index]
        assert np.array_equal(ours, backbone.arrays[original.name]), name


@pytest.mark.parametrize("backbone", LAYOUTS["backbones"])
def test_the_published_backbones_have_their_names_in_every_layout(backbone: str) -> None:
    layouts = LAYOUTS["backbones"][backbone]["layouts"]
    for name, layout in BACKBONE_LAYOUTS.items():
        names = layouts[name]
        canonical = [
            part for each in names for part in layout.target(each) if isinstance(part, str)
        ]
        stored = layout.stored(canonical)
        dropped = {
            each for each in names if all(not isinstance(part, str) for part in layout.target(each))
        }
        assert stored.keys() == names.keys() - dropped


# what is refused ---------------------------------------------------------------------------------


def test_a_model_of_another_backbone_is_refused(
    tuned: Path, tmp_path: Path, command: Callable[..., Result]
) -> None:
    other = load_file(BACKBONE / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in other.items():
        if tensor.ndim > 1:
            other[name] = tensor.flatten()[
                torch.randperm(tensor.numel(), generator=generator)
            ].reshape(tensor.shape)
    shutil.copytree(BACKBONE, tmp_path / "other")
    save_file(other, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    arguments = ("make-delta", tuned, "--backbone", "other", "--output", "delta")
    result = command(*arguments)

    assert result.exit_code == 1
    assert "was not trained from this backbone" in result.stderr
    assert not (tmp_path / "delta").exists()
    assert command(*arguments, "--allow-mismatch").exit_code == 0
    content = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert content["pair"][0]["status"] == "failed"


def test_a_backbone_of_another_size_is_refused(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="made for another backbone"):
        converter.make_delta(
            tuned, FIXTURES / "shapes_panoptic_128" / "backbone", tmp_path / "delta"
        )


def test_a_configuration_that_a_conversion_would_not_give_is_refused(
    tuned: Path, tmp_path: Path
) -> None:
    change_config(tuned, layer_norm_eps=1e-4)
    with pytest.raises(PlanError, match=r"layer_norm_eps is 0\.0001 in the model's"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(model: Path, **changes: Tensor) -> None:
    weights = weights_of(model) | changes
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_settings_for_training_only_make_no_difference(tuned: Path, tmp_path: Path) -> None:
    change_config(tuned, drop_path_rate=0.1, attention_dropout=0.1)
    done = converter.make_delta(tuned, BACKBONE, tmp_path / "delta")

    assert done.verdict.verdict == "passed"


@pytest.mark.parametrize("probability", [1.0, 1e-9])
def test_a_model_whose_masked_attention_is_on_is_refused(
    tuned: Path, tmp_path: Path, probability: float
) -> None:
    change_weights(tuned, attn_mask_probs=torch.tensor([0.0, probability]))
    with pytest.raises(PlanError, match="A conversion of the delta switches it off"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")


@pytest.mark.parametrize(("key", "value"), [("num_blocks", 3), ("num_queries", 3)])
def test_a_configuration_with_other_sizes_than_the_tensors_is_refused(
    tuned: Path, tmp_path: Path, key: str, value: int
) -> None:
    change_config(tuned, **{key: value})
    with pytest.raises(PlanError, match=f"{key} is {value} in the model's config.json"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")


def test_no_tensor_is_read_beyond_its_end() -> None:
    with open_tensors(BACKBONE / "model.safetensors") as file:
        size = file.tensors["norm.weight"].size
        with pytest.raises(ValueError, match=f"norm.weight has {size} elements"):
            file.read("norm.weight", 0, size + 1)


def test_weights_in_float64_are_refused(tuned: Path, tmp_path: Path) -> None:
    change_weights(tuned, **{"query.weight": weights_of(tuned)["query.weight"].double()})
    with pytest.raises(UsageError, match=r"query\.weight .* is float64"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")


def test_a_fine_tune_on_other_classes_needs_no_more_than_save_pretrained_writes(
    converted: Callable[[str], Path], command: Callable[..., Result], tmp_path: Path
) -> None:
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(
        converted(NAME), num_labels=3, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "tuned")
    result = command("make-delta", "tuned", "--backbone", BACKBONE, "--output", "delta")

    assert result.exit_code == 0, result.output
    assert "note      its conversion needs --task" in result.stdout
    options = ("--delta", "delta", "--backbone", BACKBONE, "--output", "back")
    assert "--task must be given" in command(*options).stderr
    assert command(*options, "--task", "panoptic").exit_code == 0
    ours, theirs = weights_of(tmp_path / "back"), weights_of(tmp_path / "tuned")
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)}


def test_another_file_than_delta_json_describes_is_not_converted(
    tuned: Path, tmp_path: Path, command: Callable[..., Result]
) -> None:
    converter.make_delta(tuned, BACKBONE, tmp_path / "delta")
    options = ("--delta", "delta", "--backbone", FIXTURES / NAME / "backbone_timm")
    config = ("--backbone-config", BACKBONE / "config.json")
    result = command(*options, *config, "--output", "back")
    assert result.exit_code == 0
    assert "Warning: The backbone is another file than delta.json names" in result.stderr

    shutil.copy(FIXTURES / NAME / "delta" / "pytorch_model.bin", tmp_path / "delta")
    with pytest.raises(UnreadableFileError, match=r"is not the one that delta\.json beside it"):
        come_back(tmp_path / "delta", tmp_path / "other")


def test_each_matrix_counts_for_the_likeness_and_its_sign_does(tuned: Path, tmp_path: Path) -> None:
    weights = weights_of(tuned)
    layers = [name for name in weights if name.startswith("layers.") and weights[name].ndim > 1]
    change_weights(tuned, **{name: -weights[name] for name in layers})
    with pytest.raises(MismatchError, match="was not trained from this backbone"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")

    outlier = weights[layers[0]].clone()
    outlier[0] *= 1000
    change_weights(tuned, **{name: weights[name] for name in layers} | {layers[0]: outlier})
    done = converter.make_delta(tuned, BACKBONE, tmp_path / "delta", verify=False)
    assert done.pair[0].status in ("passed", "flagged")


def test_of_two_copies_of_the_weights_the_key_says_which(
    converted: Callable[[str], Path], command: Callable[..., Result], tmp_path: Path
) -> None:
    with open_tensors(FIXTURES / NAME / "absolute.ckpt") as file:
        plain = {name: torch.from_numpy(file.read(name)) for name in file.tensors}
    ema = {f"ema.{name}": tensor * 1.001 for name, tensor in plain.items()}
    torch.save({**plain, **ema}, tmp_path / "both.pth")
    options = ("make-delta", "both.pth", "--backbone", BACKBONE)
    result = command(*options, "--output", "plain")

    assert result.exit_code == 0, result.output
    assert "the file also holds weights under ema; --state-key ema converts them" in result.stdout
    assert command(*options, "--output", "ema", "--state-key", "ema").exit_code == 0
    deltas = [torch.load(tmp_path / key / "pytorch_model.bin") for key in ("plain", "ema")]
    name = "network.class_head.weight"
    assert torch.equal(deltas[1][name], deltas[0][name] * 1.001)


def test_a_delta_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are a delta already"):
        converter.make_delta(FIXTURES / NAME / "delta", BACKBONE, tmp_path / "delta")


def test_a_backbone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not EoMT weights"):
        converter.make_delta(BACKBONE, BACKBONE, tmp_path / "delta")


def test_weights_that_are_nan_are_refused(tuned: Path, tmp_path: Path) -> None:
    weights = weights_of(tuned)
    weights["layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnreadableFileError, match="NaN or infinity"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_zero_that_comes_back_with_the_other_sign_is_told(model: Path, tmp_path: Path) -> None:
    weights = weights_of(model)
    weights["layers.0.mlp.up_proj.weight"][3, 5] = -0.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = converter.make_delta(model, BACKBONE, tmp_path / "delta")

    (arithmetic, numbers) = done.verdict.levels
    assert arithmetic.reason.startswith("1 of ")
    assert arithmetic.reason.endswith(" elements come back with the other sign of zero.")
    assert (arithmetic.status, numbers.status) == ("passed", "passed")
    back = come_back(tmp_path / "delta", tmp_path / "back")
    assert not back["layers.0.mlp.up_proj.weight"][3, 5].signbit()


def test_another_backbone_than_the_conversion_had_is_flagged(model: Path, tmp_path: Path) -> None:
    history = json.loads((model / "conversion.json").read_text())
    files = history["sources"]["backbone"]["files"]
    files["model.safetensors"]["sha256"] = 64 * "0"
    (model / "conversion.json").write_text(json.dumps(history))
    done = converter.make_delta(model, BACKBONE, tmp_path / "delta")

    assert {check.check: check.status for check in done.pair}["digest"] == "flagged"


def test_a_format_that_does_not_exist_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format is 'pickle', expected one of"):
        converter.make_delta(model, BACKBONE, tmp_path, format="pickle")  # type: ignore[arg-type]


def test_a_delta_that_does_not_add_up_is_not_written(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "subtract", lambda total, base: 1.001 * (total - base))
    with pytest.raises(OutputsDifferError, match="does not come back"):
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_only_a_delta_is_replaced_and_only_with_force(tuned: Path, tmp_path: Path) -> None:
    place = tmp_path / "delta"
    converter.make_delta(tuned, BACKBONE, place)
    with pytest.raises(OutputError):
        converter.make_delta(tuned, BACKBONE, place)
    converter.make_delta(tuned, BACKBONE, place, format="safetensors", force=True)
    assert sorted(path.name for path in place.iterdir()) == ["delta.json", "model.safetensors"]
    (place / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        converter.make_delta(tuned, BACKBONE, place, force=True)
    with pytest.raises(OutputError):
        converter.make_delta(tuned, BACKBONE, tuned, force=True)
    (tuned / "delta.json").write_text(
        json.dumps({"tool": {"name": "eomt-convert"}, "files": {"config.json": {}, "..": {}}})
    )
    with pytest.raises(OutputError):
        converter.make_delta(tuned, BACKBONE, tuned, force=True)
    assert (tuned / "config.json").is_file()


def test_the_backbone_in_use_is_not_replaced(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(BACKBONE, tmp_path / "delta")
    digest = hashlib.sha256((BACKBONE / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "delta" / "delta.json").write_text(
        json.dumps(
            {
                "tool": {"name": "eomt-convert"},
                "files": {"model.safetensors": {"sha256": digest}},
            }
        )
    )
    (tmp_path / "delta" / "config.json").unlink()
    with pytest.raises(UsageError, match="has the backbone itself"):
        converter.make_delta(
            tuned,
            tmp_path / "delta",
            tmp_path / "delta",
            backbone_config=BACKBONE / "config.json",
            force=True,
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "everything"),
        ("image_size", [64]),
        ("image_size", "64"),
        ("image_size", [64, 1e9]),
        ("image_std", [0, 1, 1]),
        ("image_mean", "0.5"),
        ("classes", [1]),
    ],
)
def test_a_delta_json_of_another_form_is_refused(
    tuned: Path, tmp_path: Path, key: str, value: object
) -> None:
    converter.make_delta(tuned, BACKBONE, tmp_path / "delta")
    path = tmp_path / "delta" / "delta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UnreadableFileError, match=f"was not written by make-delta: {key}"):
        come_back(tmp_path / "delta", tmp_path / "back")


def test_a_model_that_was_not_trained_from_it_is_told_by_its_values(
    tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError):
        noise = {
            name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
            if tensor.ndim > 1
            else tensor
            for name, tensor in weights_of(tuned).items()
        }
        save_file(noise, tuned / "model.safetensors", {"format": "pt"})
        converter.make_delta(tuned, BACKBONE, tmp_path / "delta")


# on the Hub --------------------------------------------------------------------------------------

LICENCE = b"""DINOv3 License\r
\r
1. A paragraph about other things.
  \t
2. You may make derivative works
   under `this` | licence.
"""


@pytest.fixture
def on_hub(hub: Hub, me: str) -> str:
    """The repository of the backbone, with a licence."""
    files = {path.name: path for path in BACKBONE.iterdir()}
    repo = "facebook/dinov3-vits16-pretrain-lvd1689m"
    hub.create_repo(repo, {**files, "LICENSE.md": LICENCE})
    return repo


def test_a_delta_is_published_with_its_card_and_comes_home(
    tuned: Path,
    on_hub: str,
    hub: Hub,
    command: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DeltaFolder, "derived", True)  # unlike the weights of this backbone
    arguments = ("make-delta", tuned, "--backbone", on_hub, "--output", "delta")
    result = command(*arguments, "--push-to", "me/delta")

    assert result.exit_code == 0, result.output
    files = hub.files("me/delta")
    assert {"README.md", "LICENSE.md", "delta.json", "pytorch_model.bin"} <= files.keys()
    card = files["README.md"].decode()
    commit = json.loads(files["delta.json"])["sources"]["backbone"]["revision"]
    made = f"eomt-convert --delta me/delta --backbone {on_hub}@{commit} --output model"
    assert f"\n{made}\n" in card
    assert "> `2. You may make derivative works under \\x60this\\x60 \\x7c licence.`" in card
    assert "other things" not in card
    assert "license_name: dinov3-license" in card
    inexact = json.loads(files["delta.json"])["round_trip"]["inexact"]
    assert f"| that come back with other bits | {inexact:,} |" in card

    tuned.rename(tmp_path / "tuned")  # it is called model
    again = command(*made.split()[1:])
    assert again.exit_code == 0, again.output
    theirs = come_back(tmp_path / "delta", tmp_path / "back")
    ours = weights_of(tmp_path / "model")
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    history = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert history["task"] == "panoptic"


def test_the_delta_of_an_offline_checkpoint_needs_no_licence(
    converted: Callable[[str], Path], hub: Hub, me: str, tmp_path: Path
) -> None:
    converter.make_delta(converted(NAME), BACKBONE, tmp_path / "delta")
    done = converter.publish(tmp_path / "delta", "me/delta")

    assert done.private
    assert "LICENSE.md" not in hub.files("me/delta")
    assert "license: apache-2.0" in hub.files("me/delta")["README.md"].decode()
    assert converter.publish(tmp_path / "delta", "me/delta").commit == done.commit


def test_a_delta_that_was_changed_or_not_run_is_not_published(
    tuned: Path, me: str, tmp_path: Path
) -> None:
    converter.make_delta(tuned, BACKBONE, tmp_path / "delta", verify=False)
    with pytest.raises(NotVerifiedError, match="was not run"):
        converter.publish(tmp_path / "delta", "me/delta")
    with (tmp_path / "delta" / "pytorch_model.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UnreadableFileError, match="was changed since"):
        converter.publish(tmp_path / "delta", "me/delta", allow_unverified=True)
