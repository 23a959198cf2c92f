"""SHA-256 of files and tensors, computed apart from the code under test."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of the files in a folder, by name."""
    return {path.name: (path.stat().st_size, of_file(path)) for path in folder.iterdir()}


def of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of tensors' bytes, by name."""
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
