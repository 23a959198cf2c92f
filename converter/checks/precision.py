"""How torch multiplies while a model is held against a recording."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Has float32 multiplied as float32 in this block, whatever the process has set.

    Matrix products and convolutions may round what they multiply, to TF32 on CUDA and to bfloat16
    on some CPUs; cuDNN's convolutions do so unless they are told not to
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#tf32-on-ampere).
    """
    backends: Any = torch.backends  # whose stubs lack half of these
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
    # From the general setting to the special ones, which inherit it unless they have been set: one
    # that inherits is left to do so. The settings of before torch 2.9 can neither be read in every
    # state of these nor be put back to it.
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
