"""Files of tensors: what is valid is read exactly, anything else is refused with a reason."""

import hashlib
import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import digests
import pytest
import torch
from conftest import HANGS
from hostile_files import safetensors_file, torch_file, with_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from converter.errors import UnreadableFileError
from converter.weights.tensorfiles import (
    WEIGHTS_INDEX,
    ShardedTensorFile,
    TensorFile,
    choose_weights,
    find_weights,
    is_model_file,
    open_tensors,
    shard_names,
)

DELTAS = sorted((Path(__file__).parent.parent / "fixtures").glob("*/delta/*.bin"))

# each a value that is exact in its type, negative where it can be
SAMPLES = [
    torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=dtype)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
] + [
    *(torch.tensor([-5, 100], dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int16)),
    *(torch.tensor([3, 100], dtype=dtype) for dtype in (torch.int8, torch.uint8)),
    torch.tensor([True, False, True]),
    torch.tensor(7.0),
    torch.zeros(0, 3),
]
STATE = {f"sample{i}": sample for i, sample in enumerate(SAMPLES)}


def read_all(path: Path) -> dict[str, Any]:
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.tensors}


def assert_reads(path: Path, state: dict[str, torch.Tensor]) -> None:
    found = read_all(path)
    assert found.keys() == state.keys()
    for name, expected in state.items():
        wide = expected.float() if expected.dtype == torch.bfloat16 else expected
        assert torch.from_numpy(found[name]).dtype == wide.dtype
        assert torch.equal(torch.from_numpy(found[name]), wide.detach()), name


def refused(path: Path, content: bytes) -> str:
    """Why a file of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError) as caught:
        read_all(path)
    assert str(path) in caught.value.message
    return str(caught.value)


# any file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.bin", "model.safetensors.index.json", "model.safetensors"], "model.safetensors"),
        (["model-1-of-1.safetensors", "model.safetensors.index.json"], WEIGHTS_INDEX),
        (["a.pth", "pytorch_model.bin"], "pytorch_model.bin"),
        (["README.md", "a.pth", "old/a.pth"], "a.pth"),
        (["a.pth", "b.pth"], None),
        (["old/a.pth", "README.md"], None),
    ],
)
def test_weights_have_a_usual_name_or_are_the_only_ones(
    names: list[str], chosen: str | None
) -> None:
    assert choose_weights(names) == chosen


def test_a_models_weights_are_one_file_or_an_index_of_shards(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"has no model\.safetensors"):
        find_weights(tmp_path)
    (tmp_path / WEIGHTS_INDEX).touch()
    assert find_weights(tmp_path).name == WEIGHTS_INDEX
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path).name == "model.safetensors"


def test_a_models_own_files_are_told_from_others_by_name() -> None:
    ours = ["model.safetensors", WEIGHTS_INDEX, "model-00001-of-00002.safetensors"]
    others = ["adapter_model.safetensors", "model.safetensors.bak", "model-ema.safetensors"]

    assert [name for name in ours + others if is_model_file(name)] == ours


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    assert "is empty" in refused(tmp_path / name, b"")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    assert "git lfs pull" in refused(tmp_path / name, pointer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"missing.safetensors cannot be read"):
        TensorFile(tmp_path / "missing.safetensors")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="not a file"):
        TensorFile(tmp_path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UnreadableFileError, match="not a file"):
        TensorFile(tmp_path / "model.safetensors")


def test_text_is_refused(tmp_path: Path) -> None:
    assert "neither a safetensors" in refused(tmp_path / "model.bin", b"hello, world\n")


def test_a_torch_file_from_before_1_6_is_refused_with_a_remedy(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "before version 1.6" in refused(
        tmp_path / "old.pth", (tmp_path / "old.pth").read_bytes()
    )


def test_the_format_is_recognised_by_the_content_not_by_the_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.bin")
    torch.save(STATE, tmp_path / "weights.safetensors")
    with TensorFile(tmp_path / "weights.bin") as file:
        assert file.format == "safetensors"
    with TensorFile(tmp_path / "weights.safetensors") as file:
        assert file.format == "torch"
    assert_reads(tmp_path / "weights.bin", STATE)
    assert_reads(tmp_path / "weights.safetensors", STATE)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_file_cut_off_anywhere_is_refused(save: Callable[..., None], tmp_path: Path) -> None:
    save({"a": torch.arange(6.0), "b": torch.ones(2)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut.safetensors"
    read_all(tmp_path / "whole")
    for length in {*range(0, len(content), 7), *range(20), *range(len(content) - 40, len(content))}:
        refused(path, content[:length])


def test_a_range_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    save_file({"a": whole, "b": whole.to(torch.bfloat16)}, tmp_path / "x.safetensors")
    torch.save({"a": whole, "b": whole.t()}, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        with TensorFile(tmp_path / name) as file:
            assert file.read("a", 5, 9).tolist() == [5.0, 6.0, 7.0, 8.0]
            assert file.read("b", 0, 3).tolist() == (
                [0.0, 1.0, 2.0] if name == "x.safetensors" else [0.0, 6.0, 12.0]
            )
            assert file.read("a", 4, 4).shape == (0,)


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    state = {"a": torch.arange(9.0), "b": torch.arange(3)}
    for save, name in ((save_file, "x.safetensors"), (torch.save, "x.bin")):
        save(state, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        with TensorFile(tmp_path / name) as file:
            assert file.sha256() == hashlib.sha256(content).hexdigest()
            assert file.digests() == {name: (len(content), file.sha256())}
            for key, tensor in state.items():
                assert file.sha256(key) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("change", ["shorter", "longer", "rewritten"])
def test_a_file_that_changes_while_it_is_open_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(9.0)}, path)
    content = path.read_bytes()
    with TensorFile(path) as file:
        path.write_bytes({"shorter": content[:-4], "longer": content + b"\0"}.get(change, content))
        os.utime(path, ns=(0, 0))
        for read in (lambda: file.read("a"), file.sha256, lambda: file.sha256("a")):
            with pytest.raises(UnreadableFileError, match="was changed while it was read"):
                read()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_seen_and_not_read(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4).to(dtype)}, path)
    with TensorFile(path) as file:
        assert file.tensors["a"].shape == (4,)
        assert len(file.sha256("a")) == 64
        with pytest.raises(UnreadableFileError, match=r"a in .* has dtype F8_E"):
            file.read("a")


# safetensors -------------------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_element_type_is_read_from_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert_reads(tmp_path / "x.safetensors", STATE)


def test_unsigned_numbers_are_read_from_safetensors(tmp_path: Path) -> None:
    state = {
        str(dtype): torch.tensor([0, 65535], dtype=dtype)
        for dtype in (torch.uint16, torch.uint32, torch.uint64)
    }
    save_file(state, tmp_path / "x.safetensors")
    for found in read_all(tmp_path / "x.safetensors").values():
        assert found.tolist() == [0, 65535]


def test_tensors_keep_the_order_of_the_header(tmp_path: Path) -> None:
    header = {"b": entry(offsets=[8, 16]), "a": entry(offsets=[0, 8])}
    (tmp_path / "x.safetensors").write_bytes(safetensors_file(header, bytes(16)))
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert list(file.tensors) == ["b", "a"]


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    for claimed in (20, 2**31, 2**63, 2**64 - 1):
        content = struct.pack("<Q", claimed) + b'{"a":1}'
        assert "claims" in refused(tmp_path / "x.safetensors", content)


def test_a_header_larger_than_any_models_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = safetensors_file(b"{}" + b" " * (5 << 20))
    assert "its header has 5,242,882 bytes, the limit is 4,194,304" in refused(path, content)


BROKEN_HEADERS = {
    "no JSON": b"{'a': 1}",
    "cut off": b'{"a": {',
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[]",
    "a number": b"1",
    "empty": b"",
    "two values": b"{}{}",
    "a name twice": b'{"a":1,"a":1}',
    "a key twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "nested deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an endless number": b'{"a":' + b"7" * 5000 + b"}",
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
    "metadata of lists": b'{"__metadata__":[]}',
    "metadata of null": b'{"__metadata__":null}',
}


@pytest.mark.parametrize("kind", BROKEN_HEADERS)
def test_a_header_that_is_not_the_json_it_should_be_is_refused(kind: str, tmp_path: Path) -> None:
    message = refused(tmp_path / "x.safetensors", safetensors_file(BROKEN_HEADERS[kind]))
    assert "not a valid safetensors file" in message


BROKEN_ENTRIES: dict[str, Any] = {
    "null": None,
    "a number": 1,
    "a text": "F32",
    "a list": ["F32", [2], [0, 8]],
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "no offsets": {"dtype": "F32", "shape": [2]},
    "an unknown dtype": entry("F31"),
    "a dtype in small letters": entry("f32"),
    "a dtype that is a list": entry(["F32"]),
    "a dtype that is an object": entry({}),
    "a dtype that is null": entry(None),
    "a shape that is a number": entry(shape=2),
    "a shape that is a text": entry(shape="2"),
    "a shape that is null": entry(shape=None),
    "a shape that is an object": entry(shape={"2": 2}),
    "a negative size": entry(shape=[-2]),
    "two negative sizes": entry(shape=[-1, -2]),
    "a size with a point": entry(shape=[2.0]),
    "a size that is true": entry(shape=[True, 2]),
    "a size that is a text": entry(shape=["2"]),
    "an infinite size": entry(shape=[float("inf")]),
    "a size that is no number": entry(shape=[float("nan")]),
    "a size of 2^63": entry(shape=[2**63, 0], offsets=[0, 0]),
    "sizes that multiply beyond 2^63": entry(shape=[2**31, 2**31, 2**31], offsets=[0, 8]),
    "sizes that wrap around to the right number": entry(shape=[2**62 + 2], offsets=[0, 8]),
    "sizes too large for numpy though empty": entry(shape=[0, 2**40, 2**40], offsets=[0, 0]),
    "too many axes": entry(shape=[1] * 64 + [2]),
    "endlessly many axes": entry(shape=[2**62] * 100_000),
    "one offset": entry(offsets=[0]),
    "three offsets": entry(offsets=[0, 4, 8]),
    "offsets that are an object": entry(offsets={"0": 0, "8": 8}),
    "offsets that are a text": entry(offsets="08"),
    "offsets with a point": entry(offsets=[0, 8.0]),
    "offsets that are true": entry(offsets=[False, 8]),
    "negative offsets": entry(offsets=[-8, 0]),
    "offsets the wrong way round": entry(offsets=[8, 0]),
    "offsets beyond the file": entry(offsets=[8, 16]),
    "offsets for fewer bytes than the shape": entry(offsets=[0, 4]),
    "offsets beyond 2^64": entry(offsets=[2**64, 2**64 + 8]),
}


@pytest.mark.parametrize("kind", BROKEN_ENTRIES)
def test_a_tensor_with_a_wrong_entry_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    started = time.process_time()
    content = safetensors_file({"layer.weight": BROKEN_ENTRIES[kind]}, bytes(8))
    message = refused(tmp_path / "x.safetensors", content)
    assert "'layer.weight'" in message
    assert len(message) < 1000
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ([(0, 8), (0, 8)], 8),
        ([(0, 8), (4, 12)], 12),
        ([(0, 8), (12, 20)], 20),
        ([(4, 12)], 12),
        ([(0, 8)], 7),
        ([(0, 8)], 9),
        ([(0, 8), (8, 16)], 17),
        ([], 1),
    ],
)
def test_tensors_must_fill_the_file_without_gap_or_overlap(
    entries: list[tuple[int, int]], size: int, tmp_path: Path
) -> None:
    header = {str(i): entry(offsets=offsets) for i, offsets in enumerate(entries)}
    message = refused(tmp_path / "x.safetensors", safetensors_file(header, bytes(size)))
    assert "gap" in message or "end at byte" in message


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\ud800", "‮", "a" * 501])
def test_a_name_that_cannot_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    message = refused(tmp_path / "x.safetensors", safetensors_file({name: entry()}, bytes(8)))
    assert "is not a valid name of a tensor" in message
    assert all(line.isprintable() for line in message.splitlines())
    message = refused(tmp_path / "x.bin", torch_file(pickle.dumps({name: 1}, 2), {}))
    assert "is not a valid name of a tensor" in message


# torch -------------------------------------------------------------------------------------------


def test_every_element_type_is_read_from_torch_files(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin")
    assert_reads(tmp_path / "x.bin", STATE)


@pytest.mark.parametrize("path", DELTAS, ids=lambda path: path.parent.parent.name)
def test_offline_checkpoints_are_read_as_torch_reads_them(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    assert_reads(path, state.get("state_dict", state))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_state_dict_is_read_bare_and_under_its_name(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for content in (STATE, {"epoch": 3, "state_dict": STATE, "loops": {}}):
        torch.save(content, path, pickle_protocol=protocol)
        assert_reads(path, STATE)


def test_the_state_dict_of_a_module_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm2d(2))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert_reads(tmp_path / "x.bin", dict(module.state_dict()))


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    state = {
        "weight": torch.nn.Parameter(torch.ones(2, 3)),
        "scale": torch.nn.Parameter(torch.ones(())),
    }
    torch.save(state, tmp_path / "x.bin")
    assert_reads(tmp_path / "x.bin", {**state})


def test_tensors_that_lie_in_another_order_of_axes_are_read(tmp_path: Path) -> None:
    picture = torch.arange(120.0).reshape(2, 3, 4, 5)
    state = {
        "channels last": picture.contiguous(memory_format=torch.channels_last),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "permuted": picture.permute(3, 1, 0, 2).to(torch.bfloat16),
        "one channel": picture[:, :1].contiguous(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3).t(),
    }
    torch.save(state, tmp_path / "x.bin")
    assert_reads(tmp_path / "x.bin", state)


def test_slices_of_a_shared_storage_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    state = {"whole": whole, "rows": whole[1:3], "row": whole[3], "tied": whole, "none": whole[4:]}
    torch.save(state, tmp_path / "x.bin")
    assert_reads(tmp_path / "x.bin", state)


@pytest.mark.parametrize(
    "view", [torch.arange(8.0)[::2], torch.ones(1).expand(4), torch.ones(4, 4)[:, :2]]
)
def test_a_view_with_gaps_or_repeats_is_refused(view: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"layer.weight": view}, tmp_path / "x.bin")
    with pytest.raises(UnreadableFileError, match=r"layer.weight is saved as a view"):
        TensorFile(tmp_path / "x.bin")


class Callback:
    """A class that only the training code has."""

    def __init__(self) -> None:
        self.best = torch.ones(2)


def test_foreign_classes_beside_the_state_dict_are_inert(tmp_path: Path) -> None:
    content = {
        "state_dict": STATE,
        "hyper_parameters": {"network": Callback(), "sets": {1, 2}, "path": Path("/x")},
        "callbacks": {"Callback": [Callback()]},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
    }
    torch.save(content, tmp_path / "x.ckpt")
    assert_reads(tmp_path / "x.ckpt", STATE)


def test_a_tensor_that_needs_a_foreign_class_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save({"layer.weight": Callback()}, tmp_path / "x.bin")
    with pytest.raises(UnreadableFileError, match=r"layer.weight .* needs .*Callback") as caught:
        TensorFile(tmp_path / "x.bin")
    assert "not supported" in str(caught.value)


def test_a_tensor_of_a_subclass_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "x.bin")
    with pytest.raises(UnreadableFileError, match=r"w in .* needs torch"):
        TensorFile(tmp_path / "x.bin")


def test_a_tensor_that_is_not_in_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2).to_sparse()}, tmp_path / "x.bin")
    with pytest.raises(UnreadableFileError, match=r"w in .* needs torch._utils._rebuild_sparse"):
        TensorFile(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "content", [{}, [], None, torch.ones(2), {"state_dict": {}}, {"state_dict": []}, {1: 2}]
)
def test_a_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(UnreadableFileError, match=r"state.dict"):
        TensorFile(tmp_path / "x.bin")


@pytest.mark.parametrize("value", [1, "a", None, [1.0], {"a": 1}])
def test_an_entry_that_is_not_a_tensor_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    torch.save({"epoch": value}, tmp_path / "x.bin")
    with pytest.raises(UnreadableFileError, match=r"the entry 'epoch' .* is not a tensor"):
        TensorFile(tmp_path / "x.bin")


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters"])
def test_a_file_that_runs_code_is_refused_and_nothing_runs(place: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "x.ckpt", tmp_path / "marker"
    torch.save({"state_dict": STATE, place: {"x": Attack(marker)}}, path)
    torch.load(path, weights_only=False)  # to see that it is an attack
    assert marker.exists()
    marker.unlink()

    with pytest.raises(UnreadableFileError, match=r"names \w+\.system. None of it was run"):
        TensorFile(path)

    assert not marker.exists()


# torch's container: a zip file -------------------------------------------------------------------


def saved(state: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the records that torch writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {
            name.partition("/")[2]: archive.read(name)
            for name in archive.namelist()
            if not name.endswith("/data.pkl")
        }
        return archive.read("archive/data.pkl"), records


PICKLE, RECORDS = saved({"a": torch.arange(4.0), "b": torch.ones(8)})
FILE = torch_file(PICKLE, RECORDS)


def central_entry(name: str) -> int:
    """Where the entry of a record begins in the directory of FILE."""
    return FILE.index(f"model/{name}".encode(), FILE.index(b"PK\1\2")) - 46


def patched(position: int, value: bytes) -> bytes:
    return FILE[:position] + value + FILE[position + len(value) :]


def test_a_file_put_together_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(FILE)
    assert_reads(tmp_path / "x.bin", {"a": torch.arange(4.0), "b": torch.ones(8)})


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(method: int, tmp_path: Path) -> None:
    content = torch_file(PICKLE, RECORDS, compression=method)
    assert "compressed" in refused(tmp_path / "x.bin", content)


def test_encrypted_records_are_refused(tmp_path: Path) -> None:
    content = patched(central_entry("data/0") + 8, b"\1\0")
    assert "encrypted" in refused(tmp_path / "x.bin", content)


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    for order in (b"big", b"little-ish", b"l"):
        content = torch_file(PICKLE, RECORDS | {"byteorder": order})
        assert "little-endian" in refused(tmp_path / "x.bin", content)


def test_a_file_from_before_byte_orders_were_recorded_is_read(tmp_path: Path) -> None:
    records = {name: content for name, content in RECORDS.items() if name != "byteorder"}
    (tmp_path / "x.bin").write_bytes(torch_file(PICKLE, records))
    assert read_all(tmp_path / "x.bin")["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    records = {name: content for name, content in RECORDS.items() if name != "data/1"}
    message = refused(tmp_path / "x.bin", torch_file(PICKLE, records))
    assert "it lacks the record '1', the elements of 'b'" in message


def test_a_record_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "x.bin", torch_file(PICKLE, RECORDS | {"data/1": bytes(31)}))
    assert "'b' of shape [8] does not fit in its record of 31 bytes" in message


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    tall = PICKLE.replace(b"K\x08", b"K\x07", 1)
    assert "does not fit" in refused(tmp_path / "x.bin", torch_file(tall, RECORDS))


def test_a_zip_file_without_a_pickle_is_refused(tmp_path: Path) -> None:
    for renamed in (b"model/data.pk_", b"model_data.pkl"):
        content = FILE.replace(b"model/data.pkl", renamed)
        assert "with 0 files data.pkl, expected one" in refused(tmp_path / "x.bin", content)


def test_a_zip_file_with_two_pickles_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(FILE)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", PICKLE)
    assert "with 2 files data.pkl, expected one" in refused(path, path.read_bytes())


def test_a_record_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    content = FILE.replace(b"model/data/1", b"model/data/0")
    assert "occurs twice" in refused(tmp_path / "x.bin", content)


def test_a_pickle_larger_than_any_checkpoints_is_refused_unread(tmp_path: Path) -> None:
    message = refused(tmp_path / "x.bin", torch_file(bytes(5 << 20), RECORDS))
    assert "its pickle has 5,242,880 bytes, the limit is 4,194,304" in message


def test_a_malformed_pickle_is_refused(tmp_path: Path) -> None:
    for content in (b"", b".", PICKLE[:-1], PICKLE[1:]):
        assert "its pickle is malformed" in refused(
            tmp_path / "x.bin", torch_file(content, RECORDS)
        )


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    second = FILE[central_entry("data/1") + 42 :][:4]
    content = patched(central_entry("data/0") + 42, second)
    assert "overlaps" in refused(tmp_path / "x.bin", content)
    larger = struct.pack("<LL", 64, 64)
    content = patched(central_entry("data/0") + 20, larger)
    assert "overlaps" in refused(tmp_path / "x.bin", content)


def test_a_record_that_reaches_into_the_directory_is_refused(tmp_path: Path) -> None:
    last = list(RECORDS)[-1]
    size = len(RECORDS[last]) + 1
    content = patched(central_entry(last) + 20, struct.pack("<LL", size, size))
    assert "does not lie within the file" in refused(tmp_path / "x.bin", content)


def test_a_record_with_two_sizes_is_refused(tmp_path: Path) -> None:
    content = patched(central_entry("data/0") + 20, struct.pack("<L", 12))
    assert "two different sizes" in refused(tmp_path / "x.bin", content)


@pytest.mark.parametrize("lie", [b"\xff\xff", b"\x40\0"])
@pytest.mark.parametrize("field", [26, 28])
def test_a_local_header_that_lies_of_its_length_is_refused(
    field: int, lie: bytes, tmp_path: Path
) -> None:
    local = FILE.index(b"model/data/0") - 30
    message = refused(tmp_path / "x.bin", patched(local + field, lie))
    assert "overlaps" in message or "does not lie within" in message


def test_a_record_without_a_header_of_its_own_is_refused(tmp_path: Path) -> None:
    local = FILE.index(b"model/data/0") - 30
    assert "no header before it" in refused(tmp_path / "x.bin", patched(local, b"PK\3\5"))


@pytest.mark.parametrize("offset", [2**16, 2**32 - 2, 2**32, 2**63, 2**64 - 1])
def test_a_record_said_to_be_far_away_is_refused(offset: int, tmp_path: Path) -> None:
    position = central_entry("data/0")
    name = b"model/data/0"
    extra = struct.pack("<HHQ", 1, 8, offset)
    entry = bytearray(FILE[position : position + 46] + name + extra)
    struct.pack_into("<H", entry, 30, len(extra))
    struct.pack_into("<L", entry, 42, 2**32 - 1)
    content = bytearray(FILE[:position] + bytes(entry) + FILE[position + 46 + len(name) :])
    end = content.index(b"PK\5\6")
    size, start = struct.unpack_from("<LL", content, end + 12)
    struct.pack_into("<LL", content, end + 12, size + len(extra), start)
    message = refused(tmp_path / "x.bin", bytes(content))
    assert "does not lie within the file" in message


LOCAL = FILE.index(b"model/data/0") - 30


@pytest.mark.parametrize(
    ("position", "value", "complaint"),
    [
        (LOCAL + 30, b"model/data/9", "its name is b'model/data/9'"),
        (LOCAL + 8, b"\x08\0", "it is compressed"),
        (LOCAL + 6, b"\x01\0", "it is encrypted"),
        (LOCAL + 6, b"\x40\0", "it is encrypted"),
        (LOCAL + 14, bytes(4), "its CRC-32 is 00000000, not "),
        (LOCAL + 18, struct.pack("<L", 12), "its size is 12, not 16"),
        (LOCAL + 22, struct.pack("<L", 12), "its size is 12, not 16"),
        (LOCAL + 18, struct.pack("<LL", 0, 0), "its size is 0, not 16"),
        (LOCAL + 18, struct.pack("<LL", 2**32 - 1, 2**32 - 1), "its size is -1, not 16"),
    ],
)
def test_a_local_header_that_contradicts_the_directory_is_refused(
    position: int, value: bytes, complaint: str, tmp_path: Path
) -> None:
    message = refused(tmp_path / "x.bin", patched(position, value))
    assert f"the header of record 'model/data/0' contradicts the directory: {complaint}" in message


def test_a_size_that_follows_its_record_may_be_missing_but_not_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    content = bytearray(path.read_bytes())
    local = content.index(b"x/data/0") - 30
    assert content[local + 6] & 8
    assert content[local + 18 : local + 26] == bytes(8)
    content[local + 22] = 12
    assert "its size is 12, not 16" in refused(path, bytes(content))


@pytest.mark.parametrize("position", [4, 8, 12])
def test_what_follows_a_record_may_not_contradict_the_directory(
    tmp_path: Path, position: int
) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    content = bytearray(path.read_bytes())
    data = content.index(torch.arange(4.0).numpy().tobytes())
    assert content[data + 16 : data + 20] == b"PK\7\x08"
    content[data + 16 + position] ^= 1
    assert "the CRC-32 or the sizes that follow the record" in refused(path, bytes(content))


def test_a_zip64_header_that_contradicts_the_directory_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": PICKLE, **RECORDS}.items():
            with archive.open(f"model/{name}", "w", force_zip64=True) as record:
                record.write(content)
    sizes = struct.pack("<HHQQ", 1, 16, 16, 16)
    wrong = buffer.getvalue().replace(sizes, struct.pack("<HHQQ", 1, 16, 12, 12), 1)
    assert "its size is 12, not 16" in refused(tmp_path / "x.bin", wrong)


def test_a_wrong_checksum_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    begin = FILE.index(RECORDS["data/0"])
    for content, wrong in ((FILE, ()), (patched(begin, b"\1"), ("model/data/0",))):
        path.write_bytes(content)
        with TensorFile(path) as file:
            assert file.wrong_checksums() == wrong


def test_files_that_torch_wrote_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(before)

    assert_reads(tmp_path / "x.bin", STATE)
    with TensorFile(tmp_path / "x.bin") as file:
        assert file.wrong_checksums() == ()


@pytest.mark.parametrize("path", DELTAS, ids=lambda path: path.parent.parent.name)
def test_offline_checkpoints_have_right_checksums(path: Path) -> None:
    with TensorFile(path) as file:
        assert file.wrong_checksums() == ()


def test_a_zip64_file_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": PICKLE, **RECORDS}.items():
            with archive.open(f"model/{name}", "w", force_zip64=True) as record:
                record.write(content)
    (tmp_path / "x.bin").write_bytes(buffer.getvalue())
    assert read_all(tmp_path / "x.bin")["b"].tolist() == [1.0] * 8


def test_bytes_before_the_file_do_not_move_its_records(tmp_path: Path) -> None:
    for content in (b"PK\3\4" + bytes(100) + FILE, FILE + FILE):
        (tmp_path / "x.bin").write_bytes(content)
        assert read_all(tmp_path / "x.bin")["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_comment_that_is_a_directory_itself_does_not_add_records(tmp_path: Path) -> None:
    content = FILE[:-2] + struct.pack("<H", 22) + b"PK\5\6" + bytes(18)
    assert "with 0 files data.pkl, expected one" in refused(tmp_path / "x.bin", content)


# shards ------------------------------------------------------------------------------------------

SHARDED = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "c": torch.zeros(0)}
MAP = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}


def sharded(folder: Path, weight_map: Any = None, **more: Any) -> Path:
    """Two shards and their index."""
    folder.mkdir(exist_ok=True)
    save_file({"a": SHARDED["a"]}, folder / "x-1.safetensors")
    save_file({"b": SHARDED["b"], "c": SHARDED["c"]}, folder / "x-2.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": MAP if weight_map is None else weight_map, **more}))
    return path


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    path = sharded(tmp_path, metadata={"total_size": 40})
    assert_reads(path, SHARDED)
    with open_tensors(path) as file:
        assert isinstance(file, ShardedTensorFile)
        assert (file.path, file.format) == (path, "safetensors")
        assert list(file.tensors) == ["a", "b", "c"]
        assert file.tensors["a"].shape == (2, 3)
        assert file.read("a", 2, 4).tolist() == [2.0, 3.0]
        assert file.sha256("b") == hashlib.sha256(SHARDED["b"].numpy().tobytes()).hexdigest()
    assert shard_names(path) == ["x-1.safetensors", "x-2.safetensors"]


def test_the_digests_of_shards_are_those_of_every_file(tmp_path: Path) -> None:
    with open_tensors(sharded(tmp_path)) as file:
        found = file.digests()
    assert found == digests.of_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(UnreadableFileError, match=r"x-2.safetensors is missing"):
        open_tensors(path)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "x-2.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UnreadableFileError, match=r"x-2.safetensors is not a valid"):
        open_tensors(path)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    for wrong in (MAP | {"d": "x-1.safetensors"}, MAP | {"b": "x-1.safetensors"}):
        with pytest.raises(UnreadableFileError, match=r"is in x-1.safetensors, but it is not"):
            open_tensors(sharded(tmp_path, wrong))


def test_a_tensor_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"'c' is in .*x-2.safetensors, but the index"):
        open_tensors(sharded(tmp_path, {"a": MAP["a"], "b": MAP["b"]}))


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"a": SHARDED["a"], "b": SHARDED["b"]}, tmp_path / "x-1.safetensors")
    with pytest.raises(UnreadableFileError, match=r"'b' is in .*x-1.safetensors, but the index"):
        open_tensors(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x-1.safetensors",
        "/x-1.safetensors",
        "./x-1.safetensors",
        "sub/x-1.safetensors",
        "sub\\x-1.safetensors",
        "..\\x-1.safetensors",
        "C:x-1.safetensors",
        "~x-1.safetensors",
        "x-1.safetensors\n",
        "x\0-1.safetensors",
        "x\ud800.safetensors",
        ".safetensors",
        "..safetensors",
        "x-1.bin",
        "x-1.safetensors.index.json",
        "",
        1,
        None,
        ["x-1.safetensors"],
        {},
    ],
)
def test_a_shard_that_is_not_a_plain_file_name_is_refused(name: Any, tmp_path: Path) -> None:
    path = sharded(tmp_path, MAP | {"a": name})
    for function in (open_tensors, shard_names):
        with pytest.raises(
            UnreadableFileError, match=r"the shard of 'a' is .*, expected a \*\.safetensors"
        ):
            function(path)


BROKEN_INDEXES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "an empty map": b'{"weight_map": {}}',
    "a map that is a list": b'{"weight_map": ["a"]}',
    "a map that is null": b'{"weight_map": null}',
    "a name twice": b'{"weight_map": {"a": "x-1.safetensors", "a": "x-1.safetensors"}}',
    "nested deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not UTF-8": b'{"\xff": 1}',
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "no name": b'{"weight_map": {"a\\u001b": "x-1.safetensors"}}',
}


@pytest.mark.parametrize("kind", BROKEN_INDEXES)
def test_a_broken_index_is_refused(kind: str, tmp_path: Path) -> None:
    path = sharded(tmp_path)
    assert "not a valid index" in refused(path, BROKEN_INDEXES[kind])


def test_an_index_larger_than_any_models_is_refused(tmp_path: Path) -> None:
    content = b'{"weight_map": {}}' + b" " * (5 << 20)
    assert "the limit for an index" in refused(sharded(tmp_path), content)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"model.safetensors.index.json cannot be read"):
        open_tensors(tmp_path / "model.safetensors.index.json")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "model")
    outside = tmp_path / "private.safetensors"
    shutil.move(tmp_path / "model" / "x-1.safetensors", outside)
    (tmp_path / "model" / "x-1.safetensors").symlink_to(outside)
    with pytest.raises(
        UnreadableFileError, match=r"is a link to .*private.safetensors, which is outside"
    ):
        open_tensors(path)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "x-1.safetensors").rename(tmp_path / "kept.safetensors")
    (tmp_path / "x-1.safetensors").symlink_to("kept.safetensors")
    assert_reads(path, SHARDED)


def test_a_link_that_leads_to_itself_is_a_missing_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "x-1.safetensors").unlink()
    (tmp_path / "x-1.safetensors").symlink_to("x-1.safetensors")
    with pytest.raises(UnreadableFileError, match=r"x-1.safetensors"):
        open_tensors(path)


def test_a_hub_cache_without_links_is_read(tmp_path: Path) -> None:
    (tmp_path / "models--owner--name" / "snapshots").mkdir(parents=True)
    assert_reads(sharded(tmp_path / "models--owner--name" / "snapshots" / "0123"), SHARDED)


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_the_hubs_cache_are_followed(shared: bool, tmp_path: Path) -> None:
    sharded(tmp_path / "files")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--owner--name" / "blobs"
    store = tmp_path / "blobs" / "ab"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    for file in (tmp_path / "files").iterdir():
        digest = digests.of_file(file)
        if shared and file.suffix == ".safetensors":
            file.rename(store / digest)
            (blobs / digest).symlink_to(f"../../blobs/ab/{digest}")
        else:
            file.rename(blobs / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")

    assert_reads(snapshot / WEIGHTS_INDEX, SHARDED)

    (snapshot / "x-1.safetensors").unlink()
    (snapshot / "x-1.safetensors").symlink_to("../../../outside.safetensors")
    save_file({"a": SHARDED["a"]}, tmp_path / "outside.safetensors")
    with pytest.raises(UnreadableFileError, match="is a link to"):
        open_tensors(snapshot / WEIGHTS_INDEX)


# resources ---------------------------------------------------------------------------------------


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that were allocated at any time while a function ran."""
    function()  # once before, for what is imported and cached
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_opening_a_large_file_takes_no_memory_for_its_tensors(tmp_path: Path) -> None:
    tensors = {f"layer{i}": torch.zeros(1 << 20) for i in range(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    for path in (tmp_path / "x.safetensors", tmp_path / "x.bin"):

        def open_and_close(path: Path = path) -> None:
            with TensorFile(path):
                pass

        assert peak_memory(open_and_close) < 1 << 20


def test_reading_in_ranges_takes_memory_for_one_range(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "x.safetensors")

    def read() -> None:
        with TensorFile(tmp_path / "x.safetensors") as file:
            for start in range(0, 1 << 20, 1 << 16):
                file.read("a", start, start + (1 << 16))

    assert peak_memory(read) < 1 << 20


def test_a_small_file_with_large_claims_takes_little_memory(tmp_path: Path) -> None:
    claims = [
        struct.pack("<Q", 2**40) + b"{",
        safetensors_file({"a": entry(shape=[2**40], offsets=[0, 2**42])}),
        safetensors_file({"a": entry(shape=[2**62] * 64)}),
        torch_file(PICKLE.replace(b"K\x08", b"J\xff\xff\xff\x7f"), RECORDS),
        torch_file(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", RECORDS),
        torch_file(b"\x8b\xff\xff\xff\x7f", RECORDS),
        torch_file(b"Nr\xff\xff\xff\x7f.", RECORDS),
        patched(len(FILE) - 10, b"\xff" * 8),
    ]
    path = tmp_path / "x.safetensors"
    for content in claims:
        path.write_bytes(content)

        def read() -> None:
            with suppress(UnreadableFileError):
                read_all(path)

        assert peak_memory(read) < 1 << 20


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"[" + b"[]," * 300_000 + b"[]]", id="lists"),
        pytest.param(
            b"{%s}" % b",".join(b'"%d":0' % i for i in range(100_000)), id="names without tensors"
        ),
        pytest.param(
            json.dumps({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(10_000)}).encode(),
            id="empty tensors",
        ),
        pytest.param(b'{"a":' + b"7" * 1_000_000 + b"}", id="digits"),
    ],
)
def test_a_header_of_a_megabyte_is_done_with_soon(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_file(header))
    started = time.process_time()
    with suppress(UnreadableFileError):
        read_all(path)
    assert time.process_time() - started < 3


def test_a_zip_file_of_many_records_is_done_with_soon(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(torch_file(PICKLE, RECORDS | {f"data/{i}": b"" for i in range(2, 10_000)}))
    started = time.process_time()
    assert read_all(path)["b"].tolist() == [1.0] * 8
    assert time.process_time() - started < 3


def test_a_directory_larger_than_any_checkpoints_is_refused_unread(tmp_path: Path) -> None:
    content = with_directory(FILE, 100_000)
    started = time.process_time()
    tracemalloc.start()
    message = refused(tmp_path / "x.bin", content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "its directory is larger than 4,194,304 bytes" in message
    assert peak < 10_000_000
    assert time.process_time() - started < 3


# damaged and hostile files -----------------------------------------------------------------------

FUZZING = settings(max_examples=150)


def check_safe(path: Path) -> None:
    """A file is read or refused; anything else is a failure."""
    with suppress(UnreadableFileError), open_tensors(path) as file:
        for name, info in file.tensors.items():
            assert info.nbytes <= sum(other.stat().st_size for other in path.parent.iterdir())
            file.sha256(name)
            assert file.read(name).shape == info.shape


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a few bytes changed, cut out, put in or moved."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from([0, 1, 2, 4, 8, 100])))
        source = draw(st.integers(0, len(data)))
        data[begin:end] = draw(
            st.one_of(
                st.binary(max_size=8),
                st.binary(min_size=end - begin, max_size=end - begin),
                st.just(bytes(data[source : source + end - begin])),
                st.sampled_from([b"\xff" * (end - begin), bytes(end - begin)]),
            )
        )
    return bytes(data)


ODD_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 30),
        st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 10**400, -(2**63)]),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["F32", "BF16", "F8_E4M3", "dtype", "x-1.safetensors", "../x"]),
    ),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=8,
)


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its values replaced, left out, or put under another name."""
    keys = list(value) if isinstance(value, dict) else []
    keys = list(range(len(value))) if isinstance(value, list) else keys
    if not keys or draw(st.integers(0, 5)) == 0:
        return draw(ODD_VALUES)
    key = draw(st.sampled_from(keys))
    copy = value.copy()
    match draw(st.sampled_from(["edit", "edit", "edit", "leave out", "copy"])):
        case "edit":
            copy[key] = draw(edited(value[key]))
        case "leave out":
            del copy[key]
        case _ if isinstance(copy, dict):
            copy[draw(st.text(max_size=5))] = value[key]
        case _:
            copy.append(value[key])
    return copy


SAFETENSORS_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that are written over and over."""
    return tmp_path_factory.mktemp("place")


@FUZZING
@given(content=damaged(safetensors_file(SAFETENSORS_HEADER, bytes(32))))
def test_a_damaged_safetensors_file_is_read_or_refused(place: Path, content: bytes) -> None:
    (place / "x.safetensors").write_bytes(content)
    check_safe(place / "x.safetensors")


@FUZZING
@given(header=edited(SAFETENSORS_HEADER), size=st.sampled_from([32, 32, 32, 31, 33, 0]))
def test_an_edited_header_is_read_or_refused(place: Path, header: Any, size: int) -> None:
    (place / "x.safetensors").write_bytes(safetensors_file(header, bytes(size)))
    check_safe(place / "x.safetensors")


@FUZZING
@given(index=edited({"metadata": {"total_size": 40}, "weight_map": MAP}))
def test_an_edited_index_is_read_or_refused(place: Path, index: Any) -> None:
    folder = place / "shards"
    path = folder / WEIGHTS_INDEX
    if not folder.exists():
        sharded(folder)
    path.write_text(json.dumps(index))
    check_safe(path)


@FUZZING
@given(content=damaged(FILE))
def test_a_damaged_torch_file_is_read_or_refused(place: Path, content: bytes) -> None:
    (place / "x.bin").write_bytes(content)
    check_safe(place / "x.bin")


@FUZZING
@given(program=damaged(PICKLE))
def test_a_damaged_pickle_is_read_or_refused(place: Path, program: bytes) -> None:
    (place / "x.bin").write_bytes(torch_file(program, RECORDS))
    check_safe(place / "x.bin")


ARGUMENTS = st.one_of(st.binary(max_size=9), st.sampled_from([b"\0", b"\1", b"1\n", b"a\nb\n"]))
OPCODES = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])


@FUZZING
@given(
    begin=st.integers(0, len(PICKLE)),
    end=st.integers(0, len(PICKLE)),
    opcodes=st.lists(st.tuples(OPCODES, ARGUMENTS), max_size=12),
)
def test_a_pickle_of_any_opcodes_is_read_or_refused(
    place: Path, begin: int, end: int, opcodes: list[tuple[bytes, bytes]]
) -> None:
    program = PICKLE[:begin] + b"".join(code + value for code, value in opcodes) + PICKLE[end:]
    (place / "x.bin").write_bytes(torch_file(program, RECORDS))
    check_safe(place / "x.bin")


@pytest.mark.parametrize("target", ["safetensors", "index", "torch"])
def test_a_coverage_guided_fuzzer_finds_nothing_in_a_moment(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="a longer run is made by hand with fuzz_readers.py")
    fuzzer = Path(__file__).with_name("fuzz_readers.py")
    run = subprocess.run(
        [sys.executable, fuzzer, "--target", target, "--runs", "300"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Done 300 runs" in run.stderr
