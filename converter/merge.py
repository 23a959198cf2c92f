"""Carries a plan out: one row at a time, in a memory that does not grow with the model."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.configs import NO_OBJECT_WEIGHT
from converter.errors import UnreadableFileError
from converter.plan import Plan, Row, Source
from converter.tensorfiles import SafetensorsWriter, TensorFile, safetensors_header

if TYPE_CHECKING:
    from converter.tensorfiles import Array

# elements that are read, added, hashed and written at a time: 8 MiB of float32
CHUNK = 1 << 21


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        path: the safetensors file.
        size: its size in bytes.
        sha256: its digest.
        tensors: digest of every tensor's little-endian bytes, by name.
        inputs: digest of every input file, by source.
    """

    path: Path
    size: int
    sha256: str
    tensors: Mapping[str, str]
    inputs: Mapping[Source, str]


def output_size(plan: Plan) -> int:
    """Size in bytes of the file that a plan makes."""
    tensors = {row.name: (row.dtype, row.shape) for row in plan.rows}
    return len(safetensors_header(tensors)) + sum(4 * row.size for row in plan.rows)


def merge(
    plan: Plan,
    files: Mapping[Source, TensorFile],
    path: Path,
    *,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Merged:
    """Writes a plan's tensors to a safetensors file.

    Sums are taken in float32. Digests of the inputs, of every tensor and of the output are computed
    on the way.

    Args:
        plan: what to write.
        files: the sources that its rows name.
        path: the file to create.
        allow_nonfinite: whether weights may be NaN or infinite.
        advance: called with the number of bytes written since it was called last.

    Raises:
        UnreadableFileError: a source ends early, or a weight is NaN or infinite.
        FileExistsError: there is such a file already.
        OSError: the file cannot be written.
    """
    header = {row.name: (row.dtype, row.shape) for row in plan.rows}
    digests: dict[str, str] = {}
    # SHA-256 takes most of the time and leaves the interpreter free: two threads read and digest
    # the inputs, while the one that computes hands each chunk to two that digest and write it.
    with (
        ThreadPoolExecutor(len(files) + 2) as threads,
        SafetensorsWriter(path, header) as writer,
    ):
        inputs = {source: threads.submit(file.sha256) for source, file in files.items()}
        pending: list[Future[None]] = []
        for row in plan.rows:
            digest = hashlib.sha256()
            for chunk in _chunks(row, files, allow_nonfinite):
                _finish(pending)
                pending = [
                    threads.submit(writer.write, chunk),
                    threads.submit(digest.update, chunk.data),
                ]
                advance(chunk.nbytes)
            _finish(pending)
            digests[row.name] = digest.hexdigest()
        return Merged(
            path=path,
            size=writer.size,
            sha256=writer.sha256(),
            tensors=digests,
            inputs={source: future.result() for source, future in inputs.items()},
        )


def _finish(pending: list[Future[None]]) -> None:
    for future in pending:
        future.result()


def _chunks(
    row: Row, files: Mapping[Source, TensorFile], allow_nonfinite: bool
) -> Iterator["Array"]:
    """The elements of a row, a chunk at a time, as flat float32 arrays."""
    import numpy as np

    for start in range(0, row.size, CHUNK):
        stop = min(start + CHUNK, row.size)
        # what overflows is an error below, or was asked for
        with np.errstate(over="ignore", invalid="ignore"):
            chunk = _compute(row, files, start, stop)
            if not allow_nonfinite:
                _check_finite(row, files, chunk, start, stop)
        yield chunk


def _compute(row: Row, files: Mapping[Source, TensorFile], start: int, stop: int) -> "Array":
    import numpy as np

    match row.operation:
        case "zeros":
            return np.zeros(stop - start, np.float32)
        case "class weights":
            chunk = np.ones(stop - start, np.float32)
            chunk[row.size - 1 - start :] = NO_OBJECT_WEIGHT
            return chunk
        case "copy":
            (operand,) = row.operands
            return files[operand.source].read(operand.name, start, stop).astype(np.float32)
        case "add":
            first, second = (
                files[operand.source].read(operand.name, start, stop).astype(np.float32, copy=False)
                for operand in row.operands
            )
            return np.add(first, second, out=first)


def _check_finite(
    row: Row, files: Mapping[Source, TensorFile], chunk: "Array", start: int, stop: int
) -> None:
    import numpy as np

    # A finite sum has only finite terms, and is cheaper to take than a mask of every element.
    if np.isfinite(chunk.sum()) or np.isfinite(chunk).all():
        return
    for operand in row.operands:
        file = files[operand.source]
        if not np.isfinite(file.read(operand.name, start, stop)).all():
            raise UnreadableFileError(
                f"{operand.name} in the {operand.source} ({file.path.name}) holds NaN or infinity.",
                "The file may be damaged; --allow-nonfinite converts it all the same.",
            )
    raise UnreadableFileError(
        f"{row.name} overflows float32: {row.recipe}.",
        "--allow-nonfinite converts it all the same.",
    )
