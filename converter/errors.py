"""The errors that a user can meet: what happened, what to do about it, and the exit code."""

from pathlib import Path
from typing import Any


class EomtConvertError(Exception):
    """An error that a user can cause and fix.

    Attributes:
        message: what happened: the file, the tensor, what was expected and what was found.
        remedy: what to do about it; empty if the message makes that clear.
        exit_code: exit code of the command.
        damaged: the file of weights with wrong content, if a damaged download could be the cause.
            It hardly ever is if names and shapes do not fit the model.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", damaged: Path | None = None) -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy
        self.damaged = damaged


class UnreadableFileError(EomtConvertError):
    """A file is missing, broken, or breaks the rules of its format."""


class PlanError(EomtConvertError):
    """Weights do not add up to a model: tensors are missing, unexpected or of a wrong shape."""


class MismatchError(EomtConvertError):
    """A delta and a backbone do not belong together."""


class MissingKernelError(EomtConvertError):
    """The runtime lacks a kernel for an operator in the type of an exported file."""


class RunError(EomtConvertError):
    """An exported file fails while it runs, and not for want of memory."""


class OutputError(EomtConvertError):
    """The output cannot be written to the given path."""


class NotVerifiedError(EomtConvertError):
    """A model is not verified, although that is required."""


class UsageError(EomtConvertError):
    """Wrong usage: an unknown name, or an option that is missing or invalid."""

    exit_code = 2


class OutputsDifferError(EomtConvertError):
    """A model does not compute what was recorded.

    Attributes:
        verdict: the `Verdict` on the model.
        conversion: the `Conversion` that made the model; None if an existing one was checked.
    """

    exit_code = 3

    def __init__(self, message: str, remedy: str, verdict: Any, conversion: Any = None) -> None:
        super().__init__(message, remedy)
        self.verdict = verdict
        self.conversion = conversion


class HubUnavailableError(EomtConvertError):
    """The Hub is down, out of reach, or asks to wait: the same command may succeed later."""


class AccessError(EomtConvertError):
    """A repository or file is gated, missing, or not in the cache when offline."""

    exit_code = 4


class NotFoundError(AccessError):
    """A repository or revision does not exist, or this login may not see it."""
