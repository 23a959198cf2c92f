"""The destination of a conversion: what may be replaced there, and what must be verified first."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from converter.checks.published import PUBLISHED
from converter.configs import CONFIGS
from converter.errors import NotVerifiedError, UnreadableFileError, UsageError
from converter.files import digests_of, optional_path, prepare_place, real_path, user_path
from converter.history import HISTORY, REPORT, read_export, read_history
from converter.job import Job
from converter.staging import StagedOutput, check_place, put_back, staged
from converter.version import TOOL


@dataclass(frozen=True)
class Destination:
    """The destination of a conversion. `converter.convert` documents the options.

    Attributes:
        place: the folder to write, absolute and without links.
    """

    place: Path
    report: Path | None = None
    force: bool = False
    exist_ok: bool = False
    keep_unverified: bool = False
    require_verified: bool = False

    @classmethod
    def of(
        cls,
        job: Job,
        output: str | Path | None = None,
        *,
        report: str | Path | None = None,
        **switches: bool,
    ) -> Self:
        """The destination that options describe; nothing is written yet.

        Args:
            job: what is converted.
            output: the folder to write; by default the checkpoint's name.
            report: a page to write as well.
            switches: the fields that are true or false.

        Raises:
            UsageError: there is no output for a job without a checkpoint, the report is in the
                output, or options contradict each other.
            NotVerifiedError: a check is required and there is nothing to compare with.
        """
        if switches.get("require_verified"):
            _check_can_be_verified(job)
        if not output and job.checkpoint is None:
            raise UsageError("Without --checkpoint, --output must be given.")
        place = real_path(user_path(output or (job.checkpoint.name if job.checkpoint else "")))
        return cls(place, page_beside(place, report), **switches)

    @property
    def rejected(self) -> Path | None:
        """The folder for a model that fails; None if it is not kept."""
        return rejected_place(self.place) if self.keep_unverified else None

    def prepared(self, job: Job) -> Self:
        """Checks that the output may be written, and decides whether to replace an existing one.

        Raises:
            OutputError: an existing one may not be replaced, or the output cannot be written.
        """
        if self.report:
            prepare_place(self.report)
        put_back(self.place)
        force = self.force or (self.exist_ok and _made_by(job, self.place))
        check_place(self.place, force=force, made=made_files)
        if self.rejected:
            check_place(self.rejected, force=self.force, made=made_files)
        return replace(self, force=force)


def page_beside(place: Path, report: str | Path | None) -> Path | None:
    """Where a page is to be written besides an output; None if none is asked for.

    Raises:
        UsageError: it is in the output.
    """
    page = optional_path(report)
    if page and real_path(page).is_relative_to(place):
        raise UsageError(f"{page} is in the output {place}, which gets its own {REPORT}.")
    return page


def rejected_place(place: Path) -> Path:
    """The folder for an output that fails, beside the one that it was made for."""
    # / has no name that with_name could change
    return place.parent / f"{place.name}.unverified"


def keep_rejected(
    stage: StagedOutput, place: Path, rejected: Path | None, kind: str, *, force: bool
) -> str:
    """Moves an output that fails to the folder for it, if it is to be kept.

    Args:
        stage: where it was made.
        place: the folder that it was made for.
        rejected: the folder to keep it in; None if it is not kept.
        kind: what it is, in a word.
        force: whether to replace an existing one.

    Returns:
        A sentence on where it is, or on how to keep it.

    Raises:
        OutputError: something is there that must not be replaced.
    """
    if rejected is None:
        return f"{place} was not written; --keep-unverified keeps the {kind} beside it."
    with staged(rejected, size=0, force=force, made=made_files) as kept:
        kept.folder.rmdir()
        shutil.move(stage.folder, kept.folder)
        kept.publish()
    return f"It was kept as {rejected}, for inspection."


def made_files(folder: Path) -> Mapping[str, str | None]:
    """Names and SHA-256 of the files that a conversion or an export wrote, by conversion.json."""
    try:
        history, export = read_history(folder), read_export(folder)
    except UnreadableFileError:
        return {}
    if export is None and (history is None or history.tool != TOOL):
        return {}
    files = export.files if export else history.files if history else {}
    listed = {name: file.sha256 for name, file in files.items() if name == Path(name).name}
    return {**listed, HISTORY: None, REPORT: None}


def _made_by(job: Job, place: Path) -> bool:
    """Whether an output was made by the same command and has not been changed since."""
    try:
        history = read_history(place)
    except UnreadableFileError:
        return False
    configs = digests_of(path for path in map(place.joinpath, CONFIGS) if path.is_file())
    return (
        history is not None
        and history.command == job.command()
        and configs.items() <= history.files.items()
    )


def _check_can_be_verified(job: Job) -> None:
    if not job.verify:
        raise UsageError("--require-verified and --no-verify contradict each other.")
    entry = job.published
    if job.recorded is None and not (entry and entry.name in PUBLISHED):
        raise NotVerifiedError(
            "There are no recorded outputs to check this model against, and a check was required.",
            "Give recorded outputs with --recorded, or convert without --require-verified.",
        )
