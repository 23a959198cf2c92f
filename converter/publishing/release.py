"""A release: converts, verifies and publishes checkpoints of the catalogue, one after another."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from converter.catalog import CATALOG, Checkpoint, find
from converter.configs import Dtype
from converter.conversion import run_job
from converter.destination import Destination
from converter.errors import EomtConvertError, OutputError, UnreadableFileError, UsageError
from converter.files import prepare_place, read_json_object, replacing, user_path, write_json
from converter.hub.access import Access, without_secrets
from converter.job import Job, Progress
from converter.outside import code, link, prose
from converter.publishing.push import check_licence, check_login, publish
from converter.version import TOOL, __version__

JOURNAL = "release.json"
NOTES = "release.md"

# the names under which TU/e publishes converted models
DEFAULT_TEMPLATE = "eomt-dinov3-{slug}"


@dataclass(frozen=True)
class Step:
    """The state of one checkpoint in a release.

    Attributes:
        checkpoint: its name in the catalogue.
        repo_id: the repository it is published to.
        status: the last step that was done; the next run tries a failed one again.
        verdict: of the conversion; None until there is a model that can be published.
        basis: what a passed verdict is based on; None for other verdicts.
        commit: the published commit; None before that.
        url: the page of the model; None before it is published.
        error: why it failed; None if it did not.
    """

    checkpoint: str
    repo_id: str
    status: Literal["waiting", "converted", "published", "failed"] = "waiting"
    verdict: str | None = None
    basis: str | None = None
    commit: str | None = None
    url: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Release:
    """A release and the state of its checkpoints.

    Attributes:
        folder: with the converted models, release.json and release.md.
        steps: the checkpoints, in the order they were asked for.
    """

    folder: Path
    steps: tuple[Step, ...]

    @property
    def failed(self) -> bool:
        """Whether any checkpoint failed."""
        return any(step.status == "failed" for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The release as JSON shows it."""
        return {"folder": str(self.folder), "checkpoints": [asdict(step) for step in self.steps]}

    def markdown(self) -> str:
        """The table for release notes."""
        lines = [
            "| checkpoint | published figure | model | verdict | basis | commit |",
            "|---|---|---|---|---|---|",
        ]
        for step in self.steps:
            metric = find(step.checkpoint).metric
            cells = (
                prose(step.checkpoint),
                prose(f"{metric.name} {metric.value}" if metric else ""),
                link(step.repo_id, step.url or ""),
                prose(step.verdict or ""),
                prose(step.basis or ""),
                code(step.commit[:12]) if step.commit else prose(step.status),
            )
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def release(
    checkpoints: Sequence[str] = (),
    *,
    namespace: str,
    name_template: str = DEFAULT_TEMPLATE,
    output: str | Path = "release",
    dtype: Dtype = "float32",
    max_shard_size: int | str | None = None,
    license_file: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress = lambda *_: None,
    announce: Callable[[str], None] = lambda _: None,
    **push: Any,
) -> Release:
    """Converts, verifies and publishes checkpoints, one after another.

    ``converter.release(namespace="tue-mps")`` releases all checkpoints that have published deltas.
    A checkpoint that fails does not stop the others. If a run was stopped, or some checkpoints
    failed, the next run continues from there: release.json in the output folder is written after
    every step.

    Args:
        checkpoints: names in the catalogue; by default all published ones.
        namespace: user or organisation on the Hub.
        name_template: name of a repository, with {slug} for a name such as coco-panoptic-large-640
            or {name} for the name in the catalogue.
        output: folder for the converted models, release.json and release.md.
        dtype: of the models' weights.
        max_shard_size: of one file of weights, as in `convert`.
        license_file: as in `publish`.
        force: whether to ignore what an earlier run did.
        dry_run: whether to stop after listing what is left to do.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        progress: as in `convert`.
        announce: called with a line of text before every step.
        push: other options of `publish`, the same for every checkpoint.

    Raises:
        UsageError: a name is unknown, the template gives two repositories the same name, or an
            earlier run in this folder had different options.
        UnreadableFileError: release.json cannot be read.
        OutputError: the folder has a release.json or release.md that no release wrote.
        AccessError: nobody is logged in to the Hub.
    """
    entries = [find(name) for name in checkpoints] or [e for e in CATALOG if not e.offline]
    folder = user_path(output)
    settings = {
        "namespace": namespace,
        "name_template": name_template,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        **push,
    }
    asked = {
        entry.name: Step(entry.name, _repo_id(entry, namespace, name_template)) for entry in entries
    }
    if len({step.repo_id for step in asked.values()}) < len(asked):
        raise UsageError(
            f"{name_template!r} gives several checkpoints one name.",
            "Put {slug} or {name} into it.",
        )
    steps = asked if force else asked | _read_journal(folder, settings)

    def done() -> Release:
        return Release(folder, tuple(steps[name] for name in asked))

    def to_folder(step: Step) -> Step:
        if step.verdict and (folder / step.checkpoint).is_dir():
            return step  # an earlier run has converted it
        job = Job.of(step.checkpoint, dtype=dtype, max_shard_size=max_shard_size)
        check_licence(job, license_file, access)
        place = Destination.of(job, folder / step.checkpoint, force=force, exist_ok=True)
        found = run_job(job, place, access, progress).verdict
        return replace(step, status="converted", verdict=found.verdict, basis=found.basis)

    def to_hub(step: Step) -> Step:
        published = publish(
            folder / step.checkpoint,
            step.repo_id,
            license_file=license_file,
            access=access,
            **push,
        )
        return replace(
            step, status="published", commit=published.commit, url=published.url, error=None
        )

    if dry_run:
        return done()
    access = Access.of(token, cache_dir)
    check_login([step.repo_id for step in asked.values()], access)
    _check_output(folder)
    prepare_place(folder / JOURNAL)
    for number, name in enumerate(asked, 1):
        if steps[name].status == "published":
            continue
        for doing, stage in (("converting", to_folder), ("publishing", to_hub)):
            announce(f"{number} of {len(asked)}: {doing} {name}")
            try:
                steps[name] = stage(steps[name])
            except EomtConvertError as error:
                steps[name] = _failed(steps[name], error, token)
            _write_journal(folder, settings, steps)
            with replacing(folder / NOTES) as file:
                file.write(done().markdown().encode())
            if steps[name].error:
                announce(f"Error: {steps[name].error}")
                break
    return done()


def _repo_id(entry: Checkpoint, namespace: str, template: str) -> str:
    try:
        return f"{namespace}/{template.format(slug=entry.slug, name=entry.name)}"
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{template!r} is not a template for names.", "It may contain {slug} and {name}."
        ) from error


def _failed(step: Step, error: EomtConvertError, token: str | None) -> Step:
    # a folder that cannot be read is converted again by the next run
    verdict = None if isinstance(error, UnreadableFileError) else step.verdict
    return replace(step, status="failed", verdict=verdict, error=without_secrets(str(error), token))


def _check_output(folder: Path) -> None:
    """Checks that an existing release.json and release.md were written by an earlier release.

    Raises:
        OutputError: they were not, and a release would replace them.
    """
    there = [folder / name for name in (JOURNAL, NOTES) if os.path.lexists(folder / name)]
    try:
        tool = read_json_object(folder / JOURNAL).get("tool")
    except UnreadableFileError:
        tool = None
    if there and not (isinstance(tool, dict) and tool.get("name") == TOOL):
        raise OutputError(
            f"{there[0]} exists, and was not written by a release.",
            "Move it away, or give another folder with --output.",
        )


def _read_journal(folder: Path, settings: Mapping[str, Any]) -> dict[str, Step]:
    """What earlier runs did; failed steps will be tried again."""
    path = folder / JOURNAL
    if not path.is_file():
        return {}
    content = read_json_object(path)
    try:
        earlier = content["settings"]
        steps = [_step(entry) for entry in content["checkpoints"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableFileError(
            f"{path} is not the record of a release.", "--force starts over."
        ) from error
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        raise UsageError(
            f"{path} belongs to a release with a different {changed[0].replace('_', '-')}.",
            "Give another folder with --output; --force starts this one over.",
        )
    return {step.checkpoint: replace(step, error=None) for step in steps}


def _step(entry: Mapping[str, Any]) -> Step:
    """A step as release.json has it.

    Raises:
        TypeError: it does not have that form.
    """
    if not all(value is None or isinstance(value, str) for value in entry.values()):
        raise TypeError
    return Step(**entry)


def _write_journal(folder: Path, settings: Mapping[str, Any], steps: Mapping[str, Step]) -> None:
    """Replaces release.json as a whole, so that it is complete whenever a run is stopped."""
    content = {
        "tool": {"name": TOOL, "version": __version__},
        "settings": dict(settings),
        "checkpoints": [asdict(step) for step in steps.values()],
    }
    write_json(folder / JOURNAL, content)
