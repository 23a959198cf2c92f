"""Writes a traced model as torch.export saves it."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from converter.runtimes.exported import FILES


def write_torch(program: ExportedProgram, folder: Path) -> Path:
    """Writes model.pt2, which `torch.export.load` reads without this package.

    The same model and versions give the same bytes.

    Args:
        program: what `trace` made of a model.
        folder: where to write.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / FILES["torch"]
    with _Output(io.FileIO(path, "w")) as file:
        torch.export.save(program, file)
        if file.error:
            raise file.error
    return path


class _Output(io.BufferedWriter):
    """A file that keeps an error for later: torch's writer ends the process where it gets one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            return len(data)
