"""Coverage-guided fuzzing of the readers with hostile files, run by hand.

``python tests/fuzz_readers.py --target torch --seconds 600``, after ``pip install atheris``.

Whatever is in a file, it is either read or refused with an UnreadableFileError, and what is read of
a safetensors file is what the safetensors library reads. Anything else ends the run, and the input
is left in the working directory as crash-*; given as an argument it is run again.
"""

import argparse
import importlib
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors
from hostile_files import safetensors_file, torch_file

# not imported by name: the type checker need not have it
atheris = importlib.import_module("atheris")

with atheris.instrument_imports(
    include=[
        "converter.weights.headers",
        "converter.weights.tensorfiles",
        "converter.weights.unpickling",
    ]
):
    from converter.errors import UnreadableFileError
    from converter.weights.tensorfiles import ShardedTensorFile, TensorFile, open_tensors
    from converter.weights.writing import safetensors_header

RECORDS = {"byteorder": b"little", "data/0": bytes(64), "data/1": bytes(range(32))}
SHARDS = {"s0.safetensors": "ab", "s1.safetensors": "c"}

# words that changes of single bytes hardly ever produce
WORDS = [
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"BF16"', "[0,0]"),
    *("true", "null", "-0", "1.0", "1e999", "NaN", "9223372036854775808", "[]", "{}"),
    *('"weight_map"', '"s0.safetensors"', '"s1.safetensors"', '"../s0.safetensors"', '"."'),
    *("ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nFloatStorage\n", "cos\nsystem\n"),
    *("ccollections\nOrderedDict\n", "ctorch._utils\n_rebuild_parameter\n", "state_dict"),
    *("PK\1\2", "PK\3\4", "PK\5\6", "PK\6\6", "PK\6\7", "model/data.pkl", "model/data/0"),
]


def read_everything(path: Path) -> "ShardedTensorFile | TensorFile | None":
    """Opens a file and reads all of it, if it can be opened."""
    with suppress(UnreadableFileError), open_tensors(path) as file:
        for name, info in file.tensors.items():
            assert file.path == path
            if info.nbytes > 1 << 20:
                raise AssertionError(f"{name} is larger than any input")
            file.sha256(name)
            with suppress(UnreadableFileError):
                assert file.read(name).shape == info.shape
        file.digests()
        return file
    return None


def try_safetensors(data: bytes, folder: Path) -> None:
    """Uses the input as a file, or as the header of one if it starts like JSON."""
    if data.startswith(b"{"):
        data = safetensors_file(data, bytes(64 + data.count(b'"d"')))
    path = folder / "model.safetensors"
    path.write_bytes(data)
    file = read_everything(path)
    if file is None or file.format == "torch":
        return
    theirs = {
        name: (entry["dtype"], tuple(entry["shape"]))
        for name, entry in safetensors.deserialize(data)
    }
    ours = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    assert ours == theirs


def try_index(data: bytes, folder: Path) -> None:
    """Takes the input as an index of two shards."""
    for file, names in SHARDS.items():
        if not (folder / file).exists():
            header = safetensors_header(dict.fromkeys(names, ("F32", (4,))))
            (folder / file).write_bytes(header + bytes(16 * len(names)))
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    read_everything(path)


def try_torch(data: bytes, folder: Path) -> None:
    """Uses the input as a file if it starts like one, else as the pickle in one."""
    path = folder / "pytorch_model.bin"
    path.write_bytes(data if data.startswith(b"PK") else torch_file(data, RECORDS))
    read_everything(path)


def seeds(target: str) -> list[bytes]:
    """Valid inputs."""
    specs = {"a": ("F32", (2, 4)), "b": ("BF16", (16,)), "c": ("F32", (0, 3))}
    if target == "safetensors":
        header = safetensors_header(specs)[8:]
        return [
            header,
            header.replace(b"}}", b'},"d":{"dtype":"I8","shape":[],"data_offsets":[64,65]}}'),
        ]
    if target == "index":
        weight_map = {name: file for file, names in SHARDS.items() for name in names}
        index = {"metadata": {"total_size": 48}, "weight_map": weight_map}
        return [json.dumps(index).encode()]
    import torch

    state = {
        "a": torch.zeros(2, 8),
        "b": torch.ones(4, 4, dtype=torch.float16).t(),
        "c": torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)),
    }
    files = []
    for protocol in (0, 2, 4):
        buffer = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3}, buffer, pickle_protocol=protocol)
        files.append(buffer.getvalue())
    return files + [zipfile.ZipFile(io.BytesIO(file)).read("archive/data.pkl") for file in files]


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "safetensors": try_safetensors,
    "index": try_index,
    "torch": try_torch,
}


def main() -> None:
    """Runs one target for some seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS), required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1, help="stop after so many inputs")
    parser.add_argument("--corpus", type=Path, help="folder of inputs, kept from run to run")
    parser.add_argument("crash", nargs="*", help="inputs to run again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = options.corpus or Path(temporary, "corpus")
        corpus.mkdir(exist_ok=True, parents=True)
        for i, seed in enumerate(seeds(options.target)):
            (corpus / f"seed{i}").write_bytes(seed)
        words = Path(temporary, "words")
        escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS)
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        try_one = TARGETS[options.target]
        arguments = [f"-max_total_time={options.seconds}", f"-dict={words}"]
        arguments += [f"-runs={options.runs}", "-max_len=8192", "-timeout=10"]
        arguments += options.crash or [str(corpus)]
        atheris.Setup(
            [sys.argv[0], *arguments],
            lambda data: try_one(data, Path(temporary)),
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
