"""onnxruntime's execution providers: what runs the nodes of a graph, and where."""

import re
from collections.abc import Sequence

from converter.errors import UsageError

CPU = "CPUExecutionProvider"

# onnxruntime's names by short ones
PROVIDERS = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}

# those that run on a GPU with a number, in their option device_id
_ON_GPU = (PROVIDERS["cuda"], PROVIDERS["tensorrt"])


def parse_providers(names: str | Sequence[str]) -> tuple[str, ...]:
    """Onnxruntime's names of execution providers.

    Args:
        names: short or full names, best first, also as text with commas; empty for none. Those
            that run on one of NVIDIA's GPUs may have its number: ``cuda:1``.

    Returns:
        Full names, with the numbers that were given.

    Raises:
        UsageError: the onnxruntime that is installed lacks one of them, or a number is malformed.
    """
    given = names.split(",") if isinstance(names, str) else names
    parts = (name.strip().partition(":") for name in given if name)
    chosen = tuple(
        f"{PROVIDERS.get(name.lower(), name)}{colon}{number}" for name, colon, number in parts
    )
    check_available(chosen)
    return chosen


def providers_of(device: str) -> tuple[str, ...]:
    """The execution providers for a device; empty for the CPU.

    Args:
        device: ``cpu``, ``cuda``, or ``cuda:1`` for the GPU with a number, as torch names them.
    """
    kind, colon, number = device.partition(":")
    return (f"{PROVIDERS['cuda']}{colon}{number}", CPU) if kind == "cuda" else ()


def without_gpu(provider: str) -> str:
    """Onnxruntime's name of an execution provider, without the number of the GPU."""
    return provider.partition(":")[0]


def with_gpu(providers: Sequence[str]) -> list[tuple[str, dict[str, int]]]:
    """Execution providers with their options, as onnxruntime takes them.

    Args:
        providers: onnxruntime's names; those that run on one of NVIDIA's GPUs may have its number.
    """
    return [
        (name, {"device_id": int(number or "0")} if name in _ON_GPU else {})
        for name, _, number in (provider.partition(":") for provider in providers)
    ]


def check_available(providers: Sequence[str]) -> None:
    """Checks that onnxruntime has execution providers.

    Raises:
        UsageError: it lacks one, or one has a malformed number.
    """
    if not providers:
        return
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for name, colon, number in (provider.partition(":") for provider in providers):
        if colon and not (name in _ON_GPU and re.fullmatch("[0-9]{1,3}", number)):
            raise UsageError(
                f"{name + colon + number!r} is no provider: a number after a colon is that of the "
                "GPU, for CUDA and TensorRT."
            )
        if name not in available:
            raise UsageError(
                f"onnxruntime has no provider {name!r} here; it has {', '.join(available)}.",
                "Install the onnxruntime that has it, such as onnxruntime-gpu, or name another.",
            )
