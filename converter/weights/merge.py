"""Carries out a plan row by row, so that memory use does not grow with the model."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.configs import NO_OBJECT_WEIGHT
from converter.errors import UnreadableFileError
from converter.files import Digests
from converter.weights.difference import subtract
from converter.weights.plan import Operand, Plan, Row, Source
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile
from converter.weights.torch_writer import TorchWriter
from converter.weights.writing import Sharding, WeightsWriter, shard

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array

# number of elements that are read, added, digested and written at a time: 2 MiB of float32, so that
# the few buffers for them stay in the processor's cache
CHUNK = 1 << 19

# tensors that are not parameters of the model
BUFFERS = ("attn_mask_probs", "criterion.empty_weight")

# the formats of files of weights
WeightsFormat = Literal["safetensors", "torch"]

Files = Mapping[Source, TensorFile | ShardedTensorFile]


@dataclass(frozen=True)
class Merged:
    """The digests of the files that `merge` wrote and read.

    Attributes:
        files: size and digest of every file that was written.
        tensors: digest of every tensor's little-endian bytes, by name.
        inputs: size and digest of every file that was read, by source.
        wrong_checksums: records of torch files whose CRC-32 differs from the zip directory's, by
            source.
    """

    files: Digests
    tensors: Mapping[str, str]
    inputs: Mapping[Source, Digests]
    wrong_checksums: Mapping[Source, tuple[str, ...]]


def sharding_of(plan: Plan, max_shard_size: int | None = None) -> Sharding:
    """The files for a plan's tensors, with at most ``max_shard_size`` bytes of tensors in each."""
    return shard(
        {row.name: (row.dtype, row.shape) for row in plan.rows},
        max_shard_size,
        parameters=sum(row.size for row in plan.rows if row.name not in BUFFERS),
    )


def merge(
    plan: Plan,
    files: Files,
    folder: Path,
    *,
    format: WeightsFormat = "safetensors",
    max_shard_size: int | None = None,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Merged:
    """Writes a plan's tensors to a folder: model.safetensors, its shards, or pytorch_model.bin.

    Sums are computed in float32 and rounded once, to the plan's type. Digests of the inputs, of
    every tensor and of the outputs are computed at the same time.

    Args:
        plan: the rows to write.
        files: the sources that its rows name.
        folder: where to write.
        format: of the file; one of torch has float32 only, and no shards.
        max_shard_size: limit for the bytes of tensors in a file; None for one file.
        allow_nonfinite: whether weights may be NaN or infinite.
        advance: called with the number of bytes that were written since its last call.

    Raises:
        UnreadableFileError: a source was changed during the merge, or a weight is NaN, infinite or
            too large for its type.
        OSError: a file cannot be written.
    """
    digests = {row.name: hashlib.sha256() for row in plan.rows}
    # SHA-256 takes most of the time, and releases the interpreter lock. So two threads for each
    # input read it for its digest and its checksums. This thread computes the chunks, and two more
    # threads digest and write them.
    sharding = sharding_of(plan, max_shard_size)
    with (
        (
            TorchWriter(folder, sharding.tensors)
            if format == "torch"
            else WeightsWriter(folder, sharding)
        ) as writer,
        ThreadPoolExecutor(2 * len(files) + 2) as threads,  # ends before the writer
    ):
        inputs = {source: threads.submit(file.digests) for source, file in files.items()}
        checks = {source: threads.submit(file.wrong_checksums) for source, file in files.items()}
        pending: list[Future[None]] = []
        for row, chunk in _chunks(plan, files, allow_nonfinite):
            _finish(pending)
            pending = [
                threads.submit(writer.write, chunk),
                threads.submit(digests[row.name].update, chunk.data),
            ]
            advance(chunk.nbytes)
        _finish(pending)
        return Merged(
            files=writer.files,
            tensors={name: digest.hexdigest() for name, digest in digests.items()},
            inputs={source: future.result() for source, future in inputs.items()},
            wrong_checksums={source: future.result() for source, future in checks.items()},
        )


def _finish(pending: list[Future[None]]) -> None:
    for future in pending:
        future.result()


def _chunks(plan: Plan, files: Files, allow_nonfinite: bool) -> Iterator[tuple[Row, "Array"]]:
    """The elements of every row in chunks, as flat arrays of the row's type.

    There are two buffers: a chunk stays valid while the next one is computed, and no longer.
    """
    import numpy as np

    buffer, other, addend = np.empty((3, CHUNK), np.float32)
    for row in plan.rows:
        for start in range(0, row.size, CHUNK):
            stop = min(start + CHUNK, row.size)
            # an overflow is an error below, unless allow_nonfinite is set
            with np.errstate(over="ignore", invalid="ignore"):
                chunk = compute(row, files, start, stop, buffer, addend)
                rounded = round_to(chunk, row.dtype)
                if not allow_nonfinite:
                    _check_finite(row, files, chunk, rounded, start, stop)
            yield row, rounded
            buffer, other = other, buffer


def compute(
    row: Row, files: Files, start: int, stop: int, buffer: "Array", addend: "Array"
) -> "Array":
    """Computes elements [start, stop) of a row in float32, in ``buffer`` if possible."""
    import numpy as np

    values = buffer[: stop - start]
    match row.operation:
        case "zeros":
            values.fill(0)
            return values
        case "class weights":
            values.fill(1)
            values[row.size - 1 - start :] = NO_OBJECT_WEIGHT
            return values
        case "copy":
            (operand,) = row.operands
            return read_operand(operand, row, files, start, stop, buffer)
        case "minus one":
            (operand,) = row.operands
            return read_operand(operand, row, files, start, stop, buffer) - np.float32(1)
        case "join":
            return _read_joined(row, files, start, stop, values)
        case "add" | "subtract":
            first, second = (
                read_operand(operand, row, files, start, stop, out)
                for operand, out in zip(row.operands, (buffer, addend), strict=True)
            )
            if row.operation == "add":
                return np.add(first, second, out=values)
            return subtract(first, second)


def _read_joined(row: Row, files: Files, start: int, stop: int, out: "Array") -> "Array":
    """Reads elements [start, stop) of a tensor that is stored in equal parts."""
    size = row.size // len(row.operands)
    for index, operand in enumerate(row.operands):
        begin, end = max(start, index * size), min(stop, (index + 1) * size)
        if begin < end:
            part = replace(row, shape=(size,))
            values = read_operand(operand, part, files, begin - index * size, end - index * size)
            out[begin - start : end - start] = values
    return out


def read_operand(
    operand: Operand, row: Row, files: Files, start: int, stop: int, out: "Array | None" = None
) -> "Array":
    """Reads elements [start, stop) of a row's operand in float32; it has the size of the row.

    They are read into ``out`` if possible, as in `TensorFile.read`.
    """
    import numpy as np

    if operand.part is None:
        return np.zeros(stop - start, np.float32)
    begin = operand.part.index * row.size
    values = files[operand.source].read(operand.part.name, begin + start, begin + stop, out)
    return values.astype(np.float32, copy=False)


def sha256_of(values: "Array") -> str:
    """SHA-256 of a tensor's bytes, in the order of its shape."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def round_to(values: "Array", dtype: str) -> "Array":
    """Rounds float32 to the nearest number of a type, ties to even; bfloat16 is returned as bits.

    Args:
        values: in float32.
        dtype: F32, F16 or BF16.
    """
    import numpy as np

    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # rounding up could turn the bits of a NaN into those of a number
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _check_finite(
    row: Row, files: Files, chunk: "Array", rounded: "Array", start: int, stop: int
) -> None:
    import numpy as np

    # If the sum is finite, so are its terms; it is cheaper to compute than a mask of all elements.
    if np.isfinite(chunk.sum()) or np.isfinite(chunk).all():
        if row.dtype == "F32" or _all_finite(rounded):
            return
        raise UnreadableFileError(
            f"{row.name} overflows {row.dtype}: its largest value is {np.abs(chunk).max():.3g}.",
            "Choose --dtype bfloat16 or float32; --allow-nonfinite converts it anyway.",
        )
    for operand in row.operands:
        if not np.isfinite(read_operand(operand, row, files, start, stop)).all():
            path = files[operand.source].path
            raise UnreadableFileError(
                f"{operand.part} in the {operand.source} ({path.name}) holds NaN or infinity.",
                "The file may be damaged; --allow-nonfinite converts it anyway.",
                damaged=path,
            )
    raise UnreadableFileError(
        f"{row.name} overflows float32: {row.recipe}.",
        "--allow-nonfinite converts it anyway.",
    )


def _all_finite(rounded: "Array") -> bool:
    import numpy as np

    if rounded.dtype == np.uint16:  # bfloat16: NaN and infinity have an exponent of only ones
        return not bool(((rounded & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(rounded).all())
