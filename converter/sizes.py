"""Sizes in bytes as people write and read them, such as 500MB; units are powers of 1000."""

import re
from typing import Literal

from converter.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """The bytes of a size such as ``500MB``, as huggingface_hub and transformers take it.

    A number without a unit is one of bytes.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    if size == 0:
        raise UsageError(f"{text!r} is no size.", "Write 5GB, 500MB, or a number of bytes.")
    return size


def size_text(count: int, unit: Literal["MB", "GB"] | None = None) -> str:
    """A number of bytes as a sentence or a table has it.

    Args:
        count: of bytes.
        unit: to write it in; by default the largest of kB, MB and GB that it has one of.
    """
    if unit is None and count < _UNITS["MB"]:
        return f"{count / _UNITS['KB']:.1f} kB"
    unit = unit or ("GB" if count >= _UNITS["GB"] else "MB")
    return f"{count / _UNITS[unit]:.2f} {unit}"
