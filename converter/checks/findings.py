"""The result of checking a model, and the page that shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checks.recorded import Recorded
from converter.checks.verdict import Verdict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Findings:
    """The result of checking a model, with its outputs.

    Attributes:
        verdict: the verdict.
        recorded: the recording that its numbers were compared with, if any.
        outputs: its outputs for the recorded input, by the names of recorded tensors; empty if it
            was not run on one.
    """

    verdict: Verdict
    recorded: Recorded | None = None
    outputs: "Mapping[str, Tensor]" = field(default_factory=dict)


def write_page(paths: Sequence[Path], title: str, folder: Path | None, findings: Findings) -> None:
    """Writes the results as an HTML page, the same one to every path.

    Args:
        paths: where to write it.
        title: the model's name.
        folder: the folder with its config.json; None if there is none.
        findings: the results.

    Raises:
        OutputError: a file cannot be written.
    """
    from converter.checks.html_report import write_report

    write_report(paths, title, folder, findings.verdict, findings.recorded, findings.outputs)
