"""The errors a user can meet: what happened, what to do about it, and the exit code it ends in."""

from pathlib import Path
from typing import Any


class EomtConvertError(Exception):
    """Something a user can cause and mend.

    Attributes:
        message: what happened: the file, the tensor, what was expected and what was found.
        remedy: what to do about it; empty where the message says it all.
        exit_code: with which the command ends.
        damaged: the file of weights whose content is wrong, where a download that arrived damaged
            would explain it. Names and shapes that fit no model hardly ever come of damage.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", damaged: Path | None = None) -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy
        self.damaged = damaged


class UnreadableFileError(EomtConvertError):
    """A file that is not there, is broken, or breaks the rules of its format."""


class PlanError(EomtConvertError):
    """Weights that do not add up to a model: tensors missing, left over or of a wrong shape."""


class MismatchError(EomtConvertError):
    """A delta and a backbone that do not belong together."""


class OutputError(EomtConvertError):
    """The output cannot be written where it was asked for."""


class NotVerifiedError(EomtConvertError):
    """A model had to be shown to be right, and was not, though it did not fail."""


class UsageError(EomtConvertError):
    """A question that has no answer: an unknown name, an option missing or of the wrong form."""

    exit_code = 2


class OutputsDifferError(EomtConvertError):
    """A model does not compute what was recorded.

    Attributes:
        verdict: what was found, a `Verdict`.
        conversion: the `Conversion` that made the model; None where another one was checked.
    """

    exit_code = 3

    def __init__(self, message: str, remedy: str, verdict: Any, conversion: Any = None) -> None:
        super().__init__(message, remedy)
        self.verdict = verdict
        self.conversion = conversion


class HubUnavailableError(EomtConvertError):
    """The Hub is down, out of reach, or asks to wait: the same command may succeed later."""


class AccessError(EomtConvertError):
    """A repository or file that is gated, missing, or not in the cache when offline."""

    exit_code = 4


class NotFoundError(AccessError):
    """A repository, or a revision of one, that is not there or not for this login to see."""
