"""Weights written as a stream, in one file or several."""

import json
from pathlib import Path

import digests
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.weights.tensorfiles import WEIGHTS_INDEX, open_tensors
from converter.weights.writing import (
    SafetensorsWriter,
    TensorSpecs,
    WeightsWriter,
    shard,
)


def specs_of(state: dict[str, torch.Tensor]) -> TensorSpecs:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return {name: (names[value.dtype], tuple(value.shape)) for name, value in state.items()}


def bytes_of(state: dict[str, torch.Tensor]) -> bytes:
    return b"".join(
        value.contiguous().view(torch.uint8).numpy().tobytes() for value in state.values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_written_file_is_the_one_that_the_safetensors_library_writes(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {name: torch.randn(3, 5).to(dtype) for name in ("a", "b.ä", 'c"\\')}
    save_file(state, tmp_path / "theirs", metadata={"format": "pt"})
    with SafetensorsWriter(tmp_path / "ours", specs_of(state)) as writer:
        for tensor in state.values():
            writer.write(bytes_of({"": tensor}))
        digest = writer.sha256()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == digests.of_file(tmp_path / "theirs")
    assert writer.size == (tmp_path / "theirs").stat().st_size


def test_chunks_may_be_arrays_of_any_shape(tmp_path: Path) -> None:
    chunks = [np.arange(4, dtype=np.float32).reshape(2, 2), np.zeros(0, np.float32)]
    with SafetensorsWriter(tmp_path / "x.safetensors", {"a": ("F32", (4,))}) as writer:
        for chunk in chunks:
            writer.write(chunk)
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_too_few_or_too_many_bytes_are_an_error(tmp_path: Path) -> None:
    specs = {"a": ("F32", (4,)), "b": ("F32", (4,))}
    with SafetensorsWriter(tmp_path / "x.safetensors", specs) as writer:
        writer.write(bytes(31))
        with pytest.raises(ValueError, match=r"bytes of .* are written"):
            writer.sha256()
        with pytest.raises(ValueError, match="more bytes"):
            writer.write(bytes(2))
    with WeightsWriter(tmp_path, shard(specs, 16)) as shards:
        shards.write(bytes(31))
        with pytest.raises(ValueError, match=r"bytes of .* are written"):
            _ = shards.files
        shards.write(bytes(1))
        with pytest.raises(ValueError, match="more bytes"):
            shards.write(bytes(1))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"kept")
    with (
        pytest.raises(FileExistsError),
        WeightsWriter(tmp_path, shard({"a": ("F32", (1,))})) as writer,
    ):
        writer.write(bytes(4))
    assert (tmp_path / "model.safetensors").read_bytes() == b"kept"


STATE_TO_SHARD = {
    "a": torch.randn(4),
    "b": torch.randn(100),
    "c": torch.zeros(0),
    "d": torch.randn(3).to(torch.bfloat16),
    "e": torch.randn(2, 2).to(torch.float16),
    "f": torch.randn(20),
}


@pytest.mark.parametrize("limit", [1, 16, 30, 100, 400, 10_000, None])
def test_shards_are_those_of_huggingface_hub(limit: int | None, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    sharding = shard(specs_of(STATE_TO_SHARD), limit, parameters=12)
    data = bytes_of(STATE_TO_SHARD)
    with WeightsWriter(ours, sharding) as writer:
        for start in range(0, len(data), 37):
            writer.write(data[start : start + 37])
        files = writer.files

    huggingface_hub.save_torch_state_dict(
        STATE_TO_SHARD, theirs, max_shard_size=limit or "5GB", metadata={"format": "pt"}
    )
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.glob("*.safetensors"):
        found, expected = load_file(ours / path.name), load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    if (theirs / WEIGHTS_INDEX).exists():
        index = json.loads((theirs / WEIGHTS_INDEX).read_text())
        index["metadata"] = {
            "total_size": index["metadata"]["total_size"],
            "total_parameters": 12,  # which transformers adds
        }
        assert json.loads((ours / WEIGHTS_INDEX).read_text()) == index
        with open_tensors(ours / WEIGHTS_INDEX) as file:
            assert set(file.tensors) == set(STATE_TO_SHARD)
            for name, tensor in STATE_TO_SHARD.items():
                assert np.array_equal(file.read(name), tensor.float().numpy()), name
    assert files == digests.of_files(ours)
    assert sharding.size == sum(size for size, _ in files.values())


def test_at_most_two_shards_are_open_at_a_time(tmp_path: Path) -> None:
    specs = {str(i): ("F32", (1 + 9 * (i % 2),)) for i in range(100)}
    before = len(list(Path("/proc/self/fd").iterdir()))
    with WeightsWriter(tmp_path, shard(specs, 8)) as writer:
        for _ in range(50 * 11):
            writer.write(bytes(4))
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
        assert len(writer.files) == 76


def test_the_index_is_written_as_transformers_writes_it() -> None:
    specs = {"b": ("F32", (2,)), "a": ("F32", (2,))}
    assert shard(specs, 8, parameters=3).index.decode() == (
        "{\n"
        '  "metadata": {\n'
        '    "total_parameters": 3,\n'
        '    "total_size": 16\n'
        "  },\n"
        '  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n'
        '    "b": "model-00001-of-00002.safetensors"\n'
        "  }\n"
        "}\n"
    )
