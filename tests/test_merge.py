"""Carrying a plan out."""

import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digests
import numpy as np
import pytest
import torch
from conftest import FIXTURES, NAMES
from safetensors.torch import load_file, save_file

from converter.configs import read_backbone_config
from converter.errors import UnreadableFileError
from converter.weights import merge as merging
from converter.weights.merge import Merged, merge, round_to, sharding_of
from converter.weights.plan import make_plan
from converter.weights.tensorfiles import TensorFile
from converter.weights.writing import WeightsWriter


@dataclass(frozen=True)
class Result:
    merged: Merged
    path: Path

    @property
    def tensors(self) -> Mapping[str, str]:
        return self.merged.tensors


def merged(
    backbone: Path,
    delta: Path,
    folder: Path,
    *,
    dtype: str = "F32",
    max_shard_size: int | None = None,
    allow_nonfinite: bool = False,
) -> Result:
    folder.mkdir(parents=True)
    with TensorFile(backbone / "model.safetensors") as base, TensorFile(delta) as change:
        config = read_backbone_config(backbone / "config.json")
        plan = make_plan(change.tensors, base.tensors, config, dtype=dtype)
        result = merge(
            plan,
            {"backbone": base, "delta": change},
            folder,
            max_shard_size=max_shard_size,
            allow_nonfinite=allow_nonfinite,
        )
    assert set(result.files) == {path.name for path in folder.iterdir()}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert sharding_of(plan, max_shard_size).size == size
    return Result(result, folder / "model.safetensors")


def of_fixture(name: str, output: Path, **options: Any) -> Result:
    folder = FIXTURES / name
    return merged(folder / "backbone", folder / "delta" / "pytorch_model.bin", output, **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_the_digest_of_the_right_conversion(name: str, tmp_path: Path) -> None:
    result = of_fixture(name, tmp_path / "out")

    right = json.loads((FIXTURES / name / "converted.json").read_text())["tensors"]
    stored = load_file(result.path)
    assert {n: list(t.shape) for n, t in stored.items()} == {
        n: e["shape"] for n, e in right.items()
    }
    assert digests.of_tensors(stored) == {n: entry["sha256"] for n, entry in right.items()}
    assert result.tensors == {n: entry["sha256"] for n, entry in right.items()}


def test_the_file_is_the_one_that_safetensors_would_write(tmp_path: Path) -> None:
    result = of_fixture("tiny_panoptic_64", tmp_path / "ours")
    theirs = tmp_path / "theirs.safetensors"
    save_file(load_file(result.path), theirs, metadata={"format": "pt"})

    assert result.path.read_bytes() == theirs.read_bytes()


def test_digests_of_output_and_inputs_are_those_of_the_files(tmp_path: Path) -> None:
    result = of_fixture("tiny_semantic_48", tmp_path / "out")

    folder = FIXTURES / "tiny_semantic_48"
    recorded = json.loads((folder / "recorded.json").read_text())["sha256"]
    assert result.merged.files == digests.of_files(result.path.parent)
    weights, change = folder / "backbone/model.safetensors", folder / "delta/pytorch_model.bin"
    assert result.merged.inputs == {
        "backbone": {
            weights.name: (weights.stat().st_size, recorded["backbone/model.safetensors"])
        },
        "delta": {change.name: (change.stat().st_size, recorded["delta/pytorch_model.bin"])},
    }


def test_tensors_larger_than_a_chunk_come_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = of_fixture("tiny_panoptic_64", tmp_path / "whole")
    monkeypatch.setattr(merging, "CHUNK", 100)

    parts = of_fixture("tiny_panoptic_64", tmp_path / "parts")

    assert parts.merged.files == whole.merged.files
    assert parts.tensors == whole.tensors


def changed_delta(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state = torch.load(FIXTURES / "tiny_panoptic_64" / "delta" / "pytorch_model.bin")
    change(state)
    torch.save(state, folder / "delta.bin")
    return folder / "delta.bin"


def test_class_weights_that_the_delta_lacks_are_ones_and_a_tenth(tmp_path: Path) -> None:
    delta = changed_delta(tmp_path, lambda state: state.pop("criterion.empty_weight"))
    backbone = FIXTURES / "tiny_panoptic_64" / "backbone"

    result = merged(backbone, delta, tmp_path / "out")

    weights = load_file(result.path)["criterion.empty_weight"]
    assert torch.equal(weights, torch.tensor([1.0] * 7 + [0.1]))
    right = json.loads((FIXTURES / "tiny_panoptic_64" / "converted.json").read_text())["tensors"]
    assert result.tensors["criterion.empty_weight"] == right["criterion.empty_weight"]["sha256"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_weights_are_named(tmp_path: Path, value: float) -> None:
    name = "network.encoder.backbone.blocks.1.mlp.up_proj.weight"
    delta = changed_delta(tmp_path, lambda state: state[name].view(-1)[77].fill_(value))
    backbone = FIXTURES / "tiny_panoptic_64" / "backbone"

    with pytest.raises(UnreadableFileError, match=rf"{name} in the delta .* NaN or infinity"):
        merged(backbone, delta, tmp_path / "out")

    allowed = merged(backbone, delta, tmp_path / "allowed", allow_nonfinite=True)
    assert not load_file(allowed.path)["layers.1.mlp.up_proj.weight"].isfinite().all()


def test_a_write_under_way_ends_before_the_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    class SlowWriter(WeightsWriter):
        def write(self, data: Any) -> None:
            time.sleep(0.02)
            super().write(data)
            events.append("written")

        def __exit__(self, *error: object) -> None:
            events.append("closed")
            super().__exit__(*error)

    monkeypatch.setattr(merging, "WeightsWriter", SlowWriter)
    delta = changed_delta(
        tmp_path, lambda state: state["network.class_head.weight"].fill_(float("nan"))
    )

    with pytest.raises(UnreadableFileError, match="NaN"):
        merged(FIXTURES / "tiny_panoptic_64" / "backbone", delta, tmp_path / "out")
    assert events == ["written", "written", "closed"]  # attn_mask_probs, class_predictor.bias


def test_a_sum_that_overflows_is_named(tmp_path: Path) -> None:
    largest = torch.finfo(torch.float32).max
    name = "network.encoder.backbone.norm.bias"
    delta = changed_delta(tmp_path, lambda state: state[name].fill_(largest))
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    source = FIXTURES / "tiny_panoptic_64" / "backbone"
    (backbone / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    state["norm.bias"].fill_(largest)
    save_file(state, backbone / "model.safetensors")

    with pytest.raises(UnreadableFileError, match=r"layernorm\.bias overflows float32"):
        merged(backbone, delta, tmp_path / "out")


def test_large_finite_weights_whose_sum_overflows_are_no_error(tmp_path: Path) -> None:
    name = "network.class_head.weight"
    delta = changed_delta(tmp_path, lambda state: state[name].fill_(3e38))
    backbone = FIXTURES / "tiny_panoptic_64" / "backbone"

    result = merged(backbone, delta, tmp_path / "out")

    assert load_file(result.path)["class_predictor.weight"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_deltas_of_other_types_are_added_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "network.encoder.backbone.norm.weight"
    change = torch.load(FIXTURES / "tiny_panoptic_64" / "delta" / "pytorch_model.bin")[name].to(
        dtype
    )
    delta = changed_delta(tmp_path, lambda state: state.update({name: change}))
    backbone = FIXTURES / "tiny_panoptic_64" / "backbone"

    result = merged(backbone, delta, tmp_path / "out")

    base = load_file(backbone / "model.safetensors")["norm.weight"]
    assert torch.equal(load_file(result.path)["layernorm.weight"], base + change.float())


def test_a_source_that_ends_early_is_named(tmp_path: Path) -> None:
    folder = FIXTURES / "tiny_panoptic_64"
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_bytes((folder / "backbone" / "config.json").read_bytes())
    weights = backbone / "model.safetensors"
    weights.write_bytes((folder / "backbone" / "model.safetensors").read_bytes())
    with TensorFile(weights) as base, TensorFile(folder / "delta" / "pytorch_model.bin") as delta:
        plan = make_plan(
            delta.tensors, base.tensors, read_backbone_config(backbone / "config.json")
        )
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size - 1000)

        with pytest.raises(UnreadableFileError, match="while it was read"):
            merge(plan, {"backbone": base, "delta": delta}, tmp_path)


def test_the_header_is_padded_so_that_tensors_are_aligned(tmp_path: Path) -> None:
    result = of_fixture("tiny_panoptic_48x80", tmp_path / "out")

    with result.path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    assert length % 8 == 0
    with TensorFile(result.path) as file_:
        assert np.array_equal(file_.read("attn_mask_probs"), np.zeros(1, np.float32))


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    whole = of_fixture("tiny_panoptic_64", tmp_path / "whole")
    parts = of_fixture("tiny_panoptic_64", tmp_path / "parts", max_shard_size=300_000)

    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "parts" / name) for name in index["weight_map"].values()}
    assert len(shards) > 1
    assert parts.tensors == whole.tensors
    stored = load_file(whole.path)
    assert set(index["weight_map"]) == set(stored)
    for name, shard in index["weight_map"].items():
        assert torch.equal(shards[shard][name], stored[name])
    assert parts.merged.files == digests.of_files(tmp_path / "parts")


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.half)])
def test_sums_are_rounded_once(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    exact = load_file(of_fixture("tiny_semantic_48", tmp_path / "exact").path)
    rounded = load_file(of_fixture("tiny_semantic_48", tmp_path / "rounded", dtype=dtype).path)

    assert set(rounded) == set(exact)
    for name, tensor in rounded.items():
        assert tensor.dtype == torch_dtype
        assert torch.equal(tensor, exact[name].to(torch_dtype)), name


def test_bfloat16_is_rounded_as_torch_does_it() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    special = [0, -0.0, np.inf, -np.inf, np.nan, 3.4028235e38, 1e-45, 1 + 2**-8, 1 + 3 * 2**-8]
    values = np.concatenate([bits.view(np.float32), np.array(special, np.float32)])

    ours = torch.from_numpy(round_to(values, "BF16")).view(torch.bfloat16)

    theirs = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0), theirs.nan_to_num(0))


def test_a_weight_too_large_for_float16_is_named(tmp_path: Path) -> None:
    name = "network.class_head.bias"
    delta = changed_delta(tmp_path, lambda state: state[name].fill_(1e6))
    backbone = FIXTURES / "tiny_panoptic_64" / "backbone"

    with pytest.raises(UnreadableFileError, match=r"class_predictor\.bias overflows F16.*1e\+06"):
        merged(backbone, delta, tmp_path / "half", dtype="F16")
    merged(backbone, delta, tmp_path / "brain", dtype="BF16")
    merged(backbone, delta, tmp_path / "allowed", dtype="F16", allow_nonfinite=True)
