"""An assertion for the tests of projects that use a converted model.

>>> from converter.testing import assert_matches_recorded
>>> assert_matches_recorded("model", "recorded")
"""

from pathlib import Path

from converter.checks.verification import verify
from converter.report import verdict


def assert_matches_recorded(model: str | Path, path: str | Path, *, device: str = "cpu") -> None:
    """Asserts that a model's files are valid and that it computes the recorded outputs.

    Recorded pictures are not checked, and so neither is the model's image processor:
    `converter.verify` does that.

    Args:
        model: folder of the model, or a Hub repository.
        path: a folder with recorded outputs, or its recorded.safetensors.
        device: where the model runs.

    Raises:
        AssertionError: the check fails; the message says where the outputs begin to differ, and the
            cause if it was found.
        EomtConvertError: the model or the recording cannot be read.
    """
    found = verify(model, recorded=path, device=device, level=3)
    assert found.verdict == "passed", "\n".join(verdict(found))  # noqa: S101
