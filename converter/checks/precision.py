"""How torch multiplies while a model is compared with a recording."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiplies float32 in full precision in this block, whatever the process has set.

    Matrix products and convolutions may round their inputs, to TF32 on CUDA and to bfloat16 on some
    CPUs; cuDNN's convolutions do so by default
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#tf32-on-ampere).
    """
    backends: Any = torch.backends  # its stubs lack half of these settings
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        precision, tf32 = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            backends.cudnn.allow_tf32 = tf32
        return
    # The general setting comes first: the special ones inherit it unless they were set, and one
    # that inherits is left alone. The older settings (before torch 2.9) are not used: they cannot
    # be read, or restored, in every state of the new ones.
    settings = (
        backends,
        backends.cudnn,
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = []
    try:
        for setting in settings:
            if setting.fp32_precision != "ieee":
                before.append((setting, setting.fp32_precision))
                setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in reversed(before):
            setting.fp32_precision = precision
