"""The whole job: from the name of a checkpoint to a verified folder that transformers loads."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter import __version__, class_names
from converter.catalog import Checkpoint, Task, find
from converter.class_names import ClassNames
from converter.configs import (
    BackboneConfig,
    model_config,
    preprocessor_config,
    read_backbone_config,
    write_json,
)
from converter.errors import (
    EomtConvertError,
    NotVerifiedError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)
from converter.inspection import decide, signs_of_a_delta
from converter.merge import Merged, merge, output_size
from converter.plan import Plan, Source, make_plan
from converter.recorded import find_recorded
from converter.sources import Access, Fetched, HubSource, LocalSource, fetch, parse_source
from converter.staging import Stage, check_place, staged
from converter.tensorfiles import TensorFile
from converter.verification import WEIGHTS, Verdict, check, unverified

# room for the files beside the weights
_SMALL_FILES = 1 << 20

# called with what is being done, and how many bytes of how many are done
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What to convert and what to hold it against: names resolved, nothing fetched yet.

    Attributes:
        checkpoint: the catalogue's entry, if one was named.
        task: what the model segments.
        image_size: (height, width) in pixels.
        sources: where the weights come from.
        labels: a file of class names, if one was given.
        recorded: the recorded outputs to check against, if there are any.
    """

    checkpoint: Checkpoint | None
    task: Task
    image_size: tuple[int, int]
    sources: Mapping[Source, LocalSource | HubSource]
    labels: Path | None
    recorded: Path | None


@dataclass(frozen=True)
class Conversion:
    """A conversion that was carried out, or planned.

    Attributes:
        job: what was asked for.
        plan: how every tensor comes about.
        sources: the files that were read.
        output: the folder that was written; None if nothing was.
        files: size in bytes and SHA-256 of every file in it.
        verdict: what is known of the result.
    """

    job: Job
    plan: Plan
    sources: Mapping[Source, Fetched]
    output: Path | None
    files: Mapping[str, tuple[int, str]]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The conversion as JSON shows it."""
        return {
            "checkpoint": self.job.checkpoint.name if self.job.checkpoint else None,
            "task": self.job.task,
            "image_size": list(self.job.image_size),
            "sources": {
                role: {
                    "repo": source.repo_id,
                    "revision": source.revision,
                    "path": str(source.weights),
                    "size": source.weights.stat().st_size,
                }
                for role, source in self.sources.items()
            },
            "output": str(self.output) if self.output else None,
            "files": {
                name: {"size": size, "sha256": digest}
                for name, (size, digest) in self.files.items()
            },
            "plan": self.plan.to_dict(),
            **self.verdict.to_dict(),
        }


def convert(
    checkpoint: str | None = None,
    output: str | Path | None = None,
    *,
    delta: str | None = None,
    backbone: str | None = None,
    task: Task | None = None,
    image_size: int | tuple[int, int] | None = None,
    labels: str | Path | None = None,
    recorded: str | Path | None = None,
    verify: bool = True,
    require_verified: bool = False,
    keep_unverified: bool = False,
    allow_nonfinite: bool = False,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda *_: None,
) -> Conversion:
    """Converts a delta and its backbone into a model, and checks what it computes.

    ``converter.convert("coco_panoptic_large_640")`` downloads what is needed and writes the model
    to ``./coco_panoptic_large_640``.

    Args:
        checkpoint: a name of the catalogue's; not needed where delta and backbone are given.
        output: folder to write; by default the checkpoint's name, in the working directory.
        delta: other delta weights than the catalogue's: a file, a folder, or owner/name[@revision].
        backbone: likewise, another backbone in transformers' layout.
        task: panoptic, instance or semantic; needed without a checkpoint.
        image_size: in pixels, one number or (height, width); needed without a checkpoint.
        labels: file of class names; by default the catalogue's, or LABEL_0 and so on.
        recorded: recorded outputs to check against; by default those of the offline checkpoints.
        verify: whether to check.
        require_verified: whether to refuse if there is nothing to check against.
        keep_unverified: whether a model that fails is kept beside the output, as
            ``<output>.unverified``.
        allow_nonfinite: whether weights may be NaN or infinite.
        force: whether an output that exists is replaced.
        dry_run: whether to stop at the plan; no weights are read then.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: whether only that cache is used.
        progress: called with a stage, the bytes done and the bytes in all.

    Raises:
        UsageError: a name is unknown, or what was given is not enough or contradicts itself.
        AccessError: a repository or a file in it is missing, gated, or not in the cache.
        UnreadableFileError: a file is missing, broken, or of another kind than it should be.
        PlanError: the weights do not add up to a model.
        OutputError: the output cannot be written.
        NotVerifiedError: a check was required and there is nothing to check against.
        OutputsDifferError: the model does not compute what was recorded; ``conversion`` has the
            details.
    """
    job = _resolve(checkpoint, delta, backbone, task, image_size, labels, recorded)
    if require_verified and not verify:
        raise UsageError("require_verified and no verification contradict each other.")
    if require_verified and job.recorded is None:
        raise NotVerifiedError(
            "There are no recorded outputs to check this model against, and a check was required.",
            "Give recorded outputs with --recorded, or convert without --require-verified.",
        )
    place = _place(job, output)
    rejected = place.with_name(f"{place.name}.unverified")
    if not dry_run:
        check_place(place, force=force)
        if keep_unverified:
            check_place(rejected, force=force)

    access = Access(token, Path(cache_dir) if cache_dir else None, local_files_only)
    sources = {role: fetch(source, access) for role, source in job.sources.items()}
    with _opened(sources) as files:
        config = _backbone_config(sources["backbone"])
        plan = make_plan(files["backbone"].tensors, files["delta"].tensors, config)
        _check_image_size(job.image_size, config.patch_size)
        classes = _class_names(job, plan.heads.num_classes)
        if dry_run:
            verdict = unverified("Nothing was converted (--dry-run).")
            return Conversion(job, plan, sources, None, {}, verdict)
        _check_delta(files["delta"])
        with staged(place, size=output_size(plan) + _SMALL_FILES) as stage:
            merged = _merge(plan, files, stage, allow_nonfinite, progress)
            _write_configs(job, plan, config, classes, stage.folder)
            if verify:
                verdict = check(stage.folder, job.recorded, merged.tensors)
            else:
                verdict = unverified("Verification was switched off (--no-verify).")
            _write_history(job, plan, sources, merged, verdict, stage.folder)
            written = _files(stage.folder, merged)
            if verdict.verdict != "failed":
                stage.publish(place)
                return Conversion(job, plan, sources, place, written, verdict)
            if keep_unverified:
                stage.publish(rejected)
            kept = rejected if keep_unverified else None
            raise OutputsDifferError(
                f"The converted model is not right: {verdict.reason}",
                f"It was kept as {kept}, to look at."
                if kept
                else f"Nothing was left at {place}; --keep-unverified keeps it beside.",
                conversion=Conversion(job, plan, sources, kept, written, verdict),
            )


def _resolve(
    name: str | None,
    delta: str | None,
    backbone: str | None,
    task: Task | None,
    image_size: int | tuple[int, int] | None,
    labels: str | Path | None,
    recorded: str | Path | None,
) -> Job:
    entry = find(name) if name else None
    roles: dict[Source, LocalSource | HubSource] = {}
    given_sources: dict[Source, str | None] = {"backbone": backbone, "delta": delta}
    for role, given in given_sources.items():
        if given:
            roles[role] = parse_source(given)
        elif entry:
            roles[role] = entry.source(role)
    task = task or (entry.task if entry else None)
    image_size = image_size or (entry.image_size if entry else None)
    if "delta" not in roles or "backbone" not in roles or task is None or image_size is None:
        needed = {
            "--delta": delta is None,
            "--backbone": backbone is None,
            "--task": task is None,
            "--image-size": image_size is None,
        }
        missing = [option for option, absent in needed.items() if absent]
        raise UsageError(
            f"Without --checkpoint, {' and '.join(missing)} must be given.",
            "eomt-convert list shows the checkpoints that have a name.",
        )
    evidence = Path(recorded).expanduser() if recorded else (entry.recorded if entry else None)
    return Job(
        checkpoint=entry,
        task=task,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        sources=roles,
        labels=Path(labels).expanduser() if labels else None,
        recorded=find_recorded(evidence) if evidence else None,
    )


def _place(job: Job, output: str | Path | None) -> Path:
    if output is None and job.checkpoint is None:
        raise UsageError("Without --checkpoint, --output must be given.")
    name = output or (job.checkpoint.name if job.checkpoint else "")
    return Path(name).expanduser().resolve()


@contextmanager
def _opened(sources: Mapping[Source, Fetched]) -> Iterator[dict[Source, TensorFile]]:
    with ExitStack() as stack:
        yield {
            role: stack.enter_context(TensorFile(source.weights))
            for role, source in sources.items()
        }


def _backbone_config(backbone: Fetched) -> BackboneConfig:
    if backbone.config is None:
        raise UnreadableFileError(
            f"There is no config.json beside the backbone's weights in {backbone.title}.",
            "Shapes do not tell the number of heads: put the backbone's config.json beside them.",
        )
    return read_backbone_config(backbone.config)


def _check_image_size(image_size: tuple[int, int], patch_size: int) -> None:
    height, width = image_size
    if min(image_size) < 1 or height % patch_size or width % patch_size:
        raise UsageError(
            f"An image size of {height}x{width} is no multiple of the patch size {patch_size}."
        )


def _class_names(job: Job, count: int) -> ClassNames:
    if job.labels:
        classes, origin = class_names.read(job.labels), str(job.labels)
    elif job.checkpoint:
        classes, origin = job.checkpoint.class_names(count), job.checkpoint.name
    else:
        classes, origin = class_names.unnamed(count), ""
    if len(classes.names) != count:
        raise EomtConvertError(
            f"{origin} has {len(classes.names)} class names, the delta has {count} classes.",
            "--labels takes a file with as many names, in the order of the class ids.",
        )
    return classes


def _check_delta(file: TensorFile) -> None:
    evidence = signs_of_a_delta(file)
    if any(sign.speaks_for == "absolute" for sign in evidence):
        kind = decide(evidence) or "perhaps absolute"
        raise EomtConvertError(
            f"The weights in {file.path} are {kind}, not a delta to a backbone: "
            + "; ".join(f"{sign.finding} ({sign.speaks_for})" for sign in evidence)
            + ". Added to a backbone they would give a model that runs and segments nonsense.",
            "Give the delta that was published, pytorch_model.bin.",
        )


def _merge(
    plan: Plan,
    files: Mapping[Source, TensorFile],
    stage: Stage,
    allow_nonfinite: bool,
    progress: Progress,
) -> Merged:
    done, total = 0, output_size(plan)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("Merging", done, total)

    return merge(
        plan, files, stage.folder / WEIGHTS, allow_nonfinite=allow_nonfinite, advance=advance
    )


def _write_configs(
    job: Job, plan: Plan, config: BackboneConfig, classes: ClassNames, folder: Path
) -> None:
    values = model_config(config, plan.heads, job.image_size, classes)
    write_json(folder / "config.json", values)
    write_json(folder / "preprocessor_config.json", preprocessor_config(job.task, job.image_size))


def _write_history(
    job: Job,
    plan: Plan,
    sources: Mapping[Source, Fetched],
    merged: Merged,
    verdict: Verdict,
    folder: Path,
) -> None:
    """Writes conversion.json, which depends on nothing but what was converted."""
    history = {
        "tool": {"name": "eomt-convert", "version": __version__},
        "checkpoint": job.checkpoint.name if job.checkpoint else None,
        "task": job.task,
        "sources": {
            role: {
                "repo": source.repo_id,
                "revision": source.revision,
                "files": {
                    source.weights.name: {
                        "size": source.weights.stat().st_size,
                        "sha256": merged.inputs[role],
                    },
                    **_described([source.config] if source.config and role == "backbone" else []),
                },
            }
            for role, source in sources.items()
        },
        "files": {
            WEIGHTS: {"size": merged.size, "sha256": merged.sha256},
            **_described([folder / "config.json", folder / "preprocessor_config.json"]),
        },
        "tensors": {
            row.name: {
                "shape": list(row.shape),
                "dtype": row.dtype,
                "recipe": row.recipe,
                "sha256": merged.tensors[row.name],
            }
            for row in plan.rows
        },
        "dropped": [
            {"tensor": str(dropped.operand), "reason": dropped.reason} for dropped in plan.dropped
        ],
        "verdict": verdict.record(),
    }
    write_json(folder / "conversion.json", history)


def _described(paths: list[Path]) -> dict[str, dict[str, Any]]:
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path, merged: Merged) -> dict[str, tuple[int, str]]:
    return {
        path.name: (
            path.stat().st_size,
            merged.sha256 if path == merged.path else _sha256(path),
        )
        for path in sorted(folder.iterdir())
    }
