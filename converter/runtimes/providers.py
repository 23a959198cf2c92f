"""onnxruntime's execution providers: what runs the nodes of a graph, and where."""

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
        names: short or full names, best first, also as text with commas; empty for none.

    Raises:
        UsageError: the onnxruntime that is installed lacks one of them.
    """
    given = names.split(",") if isinstance(names, str) else names
    chosen = tuple(PROVIDERS.get(name.strip().lower(), name.strip()) for name in given if name)
    check_available(chosen)
    return chosen


def with_gpu(providers: Sequence[str], gpu: int) -> list[tuple[str, dict[str, int]]]:
    """Execution providers with their options, as onnxruntime takes them.

    Args:
        providers: onnxruntime's names.
        gpu: the number of the GPU for those that run on one of NVIDIA's.
    """
    return [(name, {"device_id": gpu} if name in _ON_GPU else {}) for name in providers]


def check_available(providers: Sequence[str]) -> None:
    """Checks that onnxruntime has execution providers.

    Raises:
        UsageError: it lacks one.
    """
    if not providers:
        return
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for name in providers:
        if name not in available:
            raise UsageError(
                f"onnxruntime has no provider {name!r} here; it has {', '.join(available)}.",
                "Install the onnxruntime that has it, such as onnxruntime-gpu, or name another.",
            )
