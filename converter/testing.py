"""What a project that uses a converted model can say in its own tests.

>>> from converter.testing import assert_matches_recorded
>>> assert_matches_recorded("model", "recorded")
"""

from pathlib import Path

from converter.checks.verification import verify
from converter.report import verdict


def assert_matches_recorded(model: str | Path, path: str | Path, *, device: str = "cpu") -> None:
    """Asserts that a model's files are sound and that it computes what was recorded.

    Recorded pictures, and so how the model's image processor prepares them, are not checked:
    `converter.verify` does that.

    Args:
        model: folder of the model, or a Hub repository.
        path: a folder with recorded outputs, or its recorded.safetensors.
        device: where the model runs.

    Raises:
        AssertionError: it does not; the message says where it departs, and why if that was found.
        EomtConvertError: the model or the recording cannot be read.
    """
    found = verify(model, recorded=path, device=device, level=3)
    assert found.verdict == "passed", "\n".join(verdict(found))  # noqa: S101
