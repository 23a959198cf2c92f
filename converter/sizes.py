"""Parses and formats sizes in bytes, such as 500MB; units are powers of 1000."""

import re
from typing import Literal

from converter.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """The number of bytes of a size such as ``500MB``, in huggingface_hub's and transformers' form.

    A number without a unit is in bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    if size == 0:
        raise UsageError(f"{text!r} is not a size.", "Write 5GB, 500MB, or a number of bytes.")
    return size


def size_text(count: int, unit: Literal["MB", "GB"] | None = None) -> str:
    """A number of bytes as text, for a sentence or a table.

    Args:
        count: number of bytes.
        unit: by default GB from 1 GB on, MB from 1 MB on, else kB.
    """
    if unit is None and count < _UNITS["MB"]:
        return f"{count / _UNITS['KB']:.1f} kB"
    unit = unit or ("GB" if count >= _UNITS["GB"] else "MB")
    return f"{count / _UNITS[unit]:.2f} {unit}"
