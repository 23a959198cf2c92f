"""The whole job: from the name of a checkpoint to a checked folder that transformers loads."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from converter.checks.bare_backbone import check_outputs
from converter.checks.evidence import Evidence
from converter.checks.findings import Findings, write_page
from converter.checks.provenance import Provenance
from converter.checks.verdict import Verdict, unverified
from converter.checks.verification import Options, check
from converter.class_names import ClassNames
from converter.configs import (
    CONFIGS,
    DTYPES,
    PREPROCESSOR,
    check_image_size,
    model_config,
    preprocessor_config,
)
from converter.delta_record import DELTA
from converter.destination import Destination, keep_rejected, made_files
from converter.errors import (
    EomtConvertError,
    MismatchError,
    NotVerifiedError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)
from converter.files import Digests, digests_of, digests_to_dict, write_json
from converter.history import HISTORY, REPORT, History, PastSource, PastTensor, write_history
from converter.hub.access import Access
from converter.hub.downloads import arrived_damaged, is_damaged, is_sha256
from converter.hub.sources import Fetched, fetch_again, fetched_already
from converter.inputs import Inputs, choose_class_names, open_inputs, role_of
from converter.job import Job, JobOptions, Progress, counting
from converter.staging import StagedOutput, staged
from converter.version import TOOL, __version__
from converter.weights.inspection import signs_of_a_delta
from converter.weights.layouts import BACKBONE_LAYOUTS
from converter.weights.merge import Merged, merge, sharding_of
from converter.weights.pairing import PairCheck, check_absolute, check_pair
from converter.weights.plan import Plan, Source, make_plan
from converter.weights.tensorfiles import damage

# room for the files beside the weights, in bytes
_SMALL_FILES = 1 << 20


@dataclass(frozen=True)
class Conversion:
    """A conversion that was carried out, or planned.

    Attributes:
        job: what was asked for.
        inputs: the files that were read, closed again.
        plan: how every tensor is made.
        classes: the names of the classes, and which of them are stuff.
        pair: the checks of whether delta and backbone belong together.
        output: the folder that was written; None if none was.
        files: size in bytes and SHA-256 of every file in it.
        verdict: whether the model is right, and what that is based on.
    """

    job: Job
    inputs: Inputs
    plan: Plan
    classes: ClassNames
    pair: tuple[PairCheck, ...]
    output: Path | None
    files: Digests
    verdict: Verdict

    @property
    def sources(self) -> Mapping[Source, Fetched]:
        """The files that were read."""
        return self.inputs.fetched

    def notes(self) -> list[str]:
        """Sentences on how the files were read that a user could not expect."""
        return self.inputs.state.notes() if self.inputs.state else []

    def warnings(self) -> list[str]:
        """Sentences on how the model may differ from what was trained."""
        return _warnings(self.inputs, self.classes)

    def to_dict(self) -> dict[str, Any]:
        """The conversion as JSON shows it."""
        return {
            "checkpoint": self.job.checkpoint.name if self.job.checkpoint else None,
            "task": self.inputs.task,
            "image_size": list(self.inputs.image_size) if self.inputs.image_size else None,
            "dtype": self.job.dtype,
            "weights": self.inputs.weights,
            "state_key": self.job.state_key,
            "notes": self.notes(),
            "warnings": self.warnings(),
            "evidence": [sign.to_dict() for sign in self.inputs.evidence],
            "pair": [check.to_dict() for check in self.pair],
            "sources": {
                role: {
                    "repo": source.repo_id,
                    "revision": source.revision,
                    "path": str(source.weights),
                    "size": source.size,
                }
                for role, source in self.sources.items()
            },
            "output": str(self.output) if self.output else None,
            "files": digests_to_dict(self.files),
            "plan": self.plan.to_dict(),
            **self.verdict.to_dict(),
        }


def convert(
    checkpoint: str | None = None,
    output: str | Path | None = None,
    *,
    report: str | Path | None = None,
    force: bool = False,
    exist_ok: bool = False,
    keep_unverified: bool = False,
    require_verified: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda *_: None,
    **options: Unpack[JobOptions],
) -> Conversion:
    """Converts EoMT's weights and their backbone into a model, and checks what it computes.

    ``converter.convert("coco_panoptic_large_640")`` downloads what is needed and writes the model
    to ``./coco_panoptic_large_640``.

    Args:
        checkpoint: a name in the catalogue; not needed if the files are given.
        output: folder to write; by default the checkpoint's name, in the working directory.
        report: an HTML file to write that shows what was found, like the output's verdict.html.
        force: whether to replace an output that exists: the files that its conversion.json lists,
            and nothing else.
        exist_ok: whether to replace an output that the same command made before.
        keep_unverified: whether to keep a model that fails, as ``<output>.unverified``.
        require_verified: whether to refuse a model that is not shown to be right, because it was
            compared with nothing, or only with the reference model.
        dry_run: whether to stop after the plan, before any weights are read.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: whether to use only that cache.
        progress: called with a stage, and the number of bytes that are done, and of all.
        delta: weights in place of the catalogue's: a file, a folder, or owner/name[@revision].
        state_key: which copy of the weights in that file to convert, such as ``ema``: a key of the
            file, or what the names begin with; by default the copy without a key.
        backbone: likewise for the backbone; absolute weights need none.
        weights: whether ``delta`` is a ``delta`` or ``absolute``; ``auto``, the default, decides
            from its statistics.
        backbone_layout: transformers, meta or timm; by default recognised from the names.
        backbone_config: the backbone's config.json, in transformers' format.
        task: panoptic, instance or semantic; needed without a checkpoint.
        image_size: in pixels, one number or (height, width); needed without a checkpoint.
        labels: file of class names; by default the catalogue's, or LABEL_0 and so on.
        stuff: names of the classes that have no instances, as a list, or as a text with commas;
            by default as the labels or the catalogue say.
        dtype: of the model's weights; sums are computed in float32 and rounded once.
        max_shard_size: bytes of tensors in one file, or a size such as ``2GB``; by default there is
            one file.
        recorded: recorded outputs to check against; by default those of the offline checkpoints.
        verify: whether to check the model.
        check_backbone: whether to run the backbone and compare with Meta's recorded outputs.
        image: the picture they were recorded on; by default it is downloaded.
        allow_mismatch: whether to merge a pair that does not belong together.
        allow_nonfinite: whether weights may be NaN or infinite.

    Raises:
        UsageError: a name is unknown, or options are missing or contradict each other.
        AccessError: a repository or a file in it is missing, gated, or not in the cache.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UnreadableFileError: a file is missing, broken, or of the wrong kind.
        PlanError: the weights do not add up to a model.
        MismatchError: delta and backbone do not belong together.
        OutputError: the output cannot be written.
        NotVerifiedError: a check was required and there is nothing to compare with.
        OutputsDifferError: the model does not compute what was recorded; ``conversion`` has the
            details.
    """
    job = Job.of(checkpoint, **options)
    destination = Destination.of(
        job,
        output,
        report=report,
        force=force,
        exist_ok=exist_ok,
        keep_unverified=keep_unverified,
        require_verified=require_verified,
    )
    access = Access.of(token, cache_dir, local_files_only)
    return plan_job(job, access) if dry_run else run_job(job, destination, access, progress)


def plan_job(job: Job, access: Access) -> Conversion:
    """Plans a conversion; reads names and shapes, and no weights.

    Raises:
        EomtConvertError: as `convert` does.
    """
    with ExitStack() as stack:
        inputs = open_inputs(job, access, stack, dry_run=True)
        plan, classes = _make_plan(job, inputs)
    verdict = unverified("Nothing was converted (--dry-run).")
    return Conversion(job, inputs, plan, classes, (), None, {}, verdict)


def run_job(
    job: Job, destination: Destination, access: Access, progress: Progress = lambda *_: None
) -> Conversion:
    """Carries a job out. A download that turns out to be damaged is fetched once more.

    Raises:
        EomtConvertError: as `convert` does.
    """
    destination = destination.prepared(job)
    fetched_again: set[Path] = set()
    while True:
        try:
            return _convert_once(job, destination, access, progress)
        except EomtConvertError as error:
            fetched_again |= _fetch_damaged(error, job, access, fetched_again)


def _convert_once(
    job: Job, destination: Destination, access: Access, progress: Progress
) -> Conversion:
    with ExitStack() as stack:
        inputs = open_inputs(job, access, stack, dry_run=False)
        plan, classes = _make_plan(job, inputs)
        pair = _check_pair(job, inputs, plan, access)
        stage = stack.enter_context(_open_stage(job, plan, destination))
        merged = _merge(job, plan, inputs, stage.folder, progress)
        pair += _check_digests(inputs, merged)
        _write_configs(job, inputs, plan, classes, stage.folder)
        findings = _check_model(job, inputs, plan, merged, stage.folder, access)
        if destination.require_verified:
            _refuse_unproven(findings.verdict)
        history = _history(job, inputs, plan, classes, pair, merged, findings.verdict, stage.folder)
        write_history(stage.folder, history)
        _write_pages(job, findings, stage.folder, destination)
        files = _made(history, stage.folder)
        verdict, place = findings.verdict, destination.place
        done = Conversion(job, inputs, plan, classes, pair, place, files, verdict)
        return _move_into_place(done, stage, destination)


def _check_model(
    job: Job, inputs: Inputs, plan: Plan, merged: Merged, folder: Path, access: Access
) -> Findings:
    """Checks the model against all available evidence, unless checking was switched off."""
    if not job.verify:
        return Findings(unverified("Verification was switched off (--no-verify)."))
    evidence = Evidence(
        recorded=job.recorded,
        published=job.published,
        task=inputs.task,
        size_is_meant=True,
        sources=Provenance(inputs.files, plan),
        of_published=job.published is not None and "delta" in inputs.files,
        recipes=merged.tensors,
    )
    options = Options(image=job.image, allow_nonfinite=job.allow_nonfinite, access=access)
    return check(folder, evidence, options)


def _refuse_unproven(verdict: Verdict) -> None:
    if verdict.verdict != "failed" and not verdict.proven:
        raise NotVerifiedError(
            f"A check was required: {verdict.shortfall}",
            "Give outputs recorded from the original with --recorded, or convert without "
            "--require-verified.",
        )


def _write_pages(job: Job, findings: Findings, folder: Path, destination: Destination) -> None:
    """Writes the findings as a page: beside the model, and to the job's report if there is one."""
    pages = [folder / REPORT] if job.verify else []
    if destination.report:
        pages.append(destination.report)
    if pages:
        title = job.checkpoint.name if job.checkpoint else destination.place.name
        write_page(pages, title, folder, findings)


def _move_into_place(done: Conversion, stage: StagedOutput, destination: Destination) -> Conversion:
    """Moves a finished model into its place. A model that fails is kept elsewhere, or not at all.

    Raises:
        OutputsDifferError: the model fails.
    """
    if done.verdict.verdict != "failed":
        stage.publish()
        return done
    place, rejected = destination.place, destination.rejected
    kept = keep_rejected(stage, place, rejected, "model", force=destination.force)
    raise OutputsDifferError(
        f"The converted model is wrong: {done.verdict.reason}",
        kept,
        done.verdict,
        replace(done, output=rejected),
    )


def _make_plan(job: Job, inputs: Inputs) -> tuple[Plan, ClassNames]:
    plan = make_plan(
        inputs.files[role_of(inputs.weights)].tensors,
        inputs.files["backbone"].tensors if "backbone" in inputs.files else None,
        inputs.backbone_config,
        backbone_layout=BACKBONE_LAYOUTS[job.backbone_layout] if job.backbone_layout else None,
        dtype=DTYPES[job.dtype],
        num_blocks=inputs.settings.num_blocks if inputs.settings else None,
    )
    if inputs.state:
        plan = plan.without(role_of(inputs.weights), inputs.state.unused)
    check_image_size(inputs.image_size, plan.config.patch_size)
    return plan, choose_class_names(job, inputs, plan.config.num_labels)


def _warnings(inputs: Inputs, classes: ClassNames) -> list[str]:
    warnings = []
    if inputs.settings:
        warnings.append(
            "LightlyTrain's upscaling blocks have the layer norm epsilon 1e-5, this model's "
            "have 1e-6, as the original's: its masks differ a little from LightlyTrain's."
        )
    if inputs.task == "panoptic" and classes.stuff is None:
        warnings.append(
            "Nothing says which classes are stuff, so stuff_classes is empty, and segments of "
            "a class such as sky are not merged. --stuff NAME,NAME, or isthing in the labels, "
            "says it."
        )
    return warnings


def _fetch_damaged(
    error: EomtConvertError, job: Job, access: Access, fetched_again: set[Path]
) -> set[Path]:
    """Downloads a damaged file again, if the error is about one and it differs from the Hub's.

    Args:
        error: how the conversion failed.
        job: the conversion.
        access: how the Hub is reached.
        fetched_again: files that were already downloaded a second time.

    Returns:
        The files that were downloaded.

    Raises:
        EomtConvertError: the error itself, if another download cannot help.
        UnreadableFileError: a file arrived damaged twice, or only the cache may be used.
    """
    if error.damaged is None:
        raise error
    fetched = [fetched_already(source, access) for source in (job.delta, job.backbone)]
    damaged = {
        source.weights.with_name(name): (source, name)
        for source in fetched
        if source
        for name in source.damaged(error.damaged)
    }
    if not damaged:
        raise error
    for path, (source, name) in damaged.items():
        if path in fetched_again:
            raise arrived_damaged(source.title, name, path) from error
    fetch_again(list(damaged.values()), access)
    return set(damaged)


def _check_pair(job: Job, inputs: Inputs, plan: Plan, access: Access) -> tuple[PairCheck, ...]:
    """Checks whether delta and backbone belong together.

    Raises:
        MismatchError: they do not, and the job does not allow that.
    """
    if "backbone" in inputs.files:
        published = job.checkpoint is not None and not job.checkpoint.offline
        pair = check_pair(
            inputs.files["backbone"],
            inputs.files["delta"],
            plan,
            expected_data="lvd1689m" if published else None,
        )
    else:
        evidence = inputs.evidence or signs_of_a_delta(inputs.files["weights"])
        pair = (check_absolute(evidence),) if evidence else ()
    _refuse_mismatch(pair, inputs, allow_mismatch=job.allow_mismatch)
    if job.check_backbone:
        pair += (check_outputs(inputs.files, plan, job.image, access),)
        _refuse_mismatch(pair, inputs, allow_mismatch=job.allow_mismatch)
    return pair


def _check_digests(inputs: Inputs, merged: Merged) -> tuple[PairCheck, ...]:
    """Compares what was read with the Hub's digests and with the checksums in torch files.

    Raises:
        UnreadableFileError: a file does not have the digest that the Hub lists.
    """
    checks = _check_record(inputs, merged)
    for role, names in merged.wrong_checksums.items():
        if names:
            finding = damage(inputs.files[role].path, names)
            checks.append(PairCheck("crc-32", "flagged", finding))
    for role, source in inputs.fetched.items():
        for name, (_, digest) in merged.inputs[role].items():
            expected, file = source.digests.get(name), f"{name} of {source.title}"
            if expected is None:
                if source.repo_id:
                    finding = f"The Hub lists no digest for {file}."
                    checks.append(PairCheck("hub-digest", "not checked", finding))
                continue
            if is_sha256(expected):
                right, kind = digest == expected, "SHA-256"
            else:  # git's id, for small files and for weights that are not in LFS
                right = not is_damaged(source.weights.with_name(name), expected)
                kind = "id of the content"
            if not right:
                raise UnreadableFileError(
                    f"{file} is damaged: its {kind} differs from the Hub's, {expected[:12]}....",
                    damaged=source.weights.with_name(name),
                )
            checks.append(PairCheck("hub-digest", "passed", f"{file} has the Hub's {kind}."))
    return tuple(checks)


def _check_record(inputs: Inputs, merged: Merged) -> list[PairCheck]:
    """Compares the delta and the backbone with those that delta.json names.

    Raises:
        UnreadableFileError: the delta is another one.
    """
    record = inputs.record
    if record is None:
        return []
    for name, (_, digest) in merged.inputs["delta"].items():
        if record.files.get(name) != digest:
            raise UnreadableFileError(
                f"{name} of {inputs.fetched['delta'].title} is not the one that {DELTA} beside it "
                "describes: its SHA-256 is another.",
                f"Get both again, or remove {DELTA} and give --task, --image-size and --labels.",
            )
    digests = {name: file.sha256 for name, file in merged.inputs["backbone"].items()}
    if digests.items() <= record.backbone.items():
        return [PairCheck("delta-json", "passed", f"The backbone is the file that {DELTA} names.")]
    finding = (
        f"The backbone is another file than {DELTA} names: it may be the same one in another "
        "layout."
    )
    return [PairCheck("delta-json", "flagged", finding)]


def _refuse_mismatch(pair: tuple[PairCheck, ...], inputs: Inputs, *, allow_mismatch: bool) -> None:
    failed = {check.check: check.finding for check in pair if check.status == "failed"}
    if failed and not allow_mismatch:
        by_content = {"file-name", "backbone-outputs"} & set(failed)
        raise MismatchError(
            "The weights do not belong together: " + " ".join(failed.values()),
            "Give the delta as it was published, and the backbone that it was made from. "
            "--allow-mismatch converts them anyway.",
            damaged=inputs.fetched["backbone"].weights if by_content else None,
        )


# writing ---------------------------------------------------------------------------------------


def _open_stage(
    job: Job, plan: Plan, destination: Destination
) -> AbstractContextManager[StagedOutput]:
    size = sharding_of(plan, job.max_shard_size).size + _SMALL_FILES
    return staged(destination.place, size=size, force=destination.force, made=made_files)


def _merge(job: Job, plan: Plan, inputs: Inputs, folder: Path, progress: Progress) -> Merged:
    total = sum(row.nbytes for row in plan.rows)
    return merge(
        plan,
        inputs.files,
        folder,
        max_shard_size=job.max_shard_size,
        allow_nonfinite=job.allow_nonfinite,
        advance=counting(progress, "Merging", total),
    )


def _write_configs(job: Job, inputs: Inputs, plan: Plan, classes: ClassNames, folder: Path) -> None:
    values = model_config(
        plan.config, inputs.image_size, classes, dtype=job.dtype, own=inputs.own_config
    )
    write_json(folder / "config.json", values)
    own = inputs.own_preprocessor
    if inputs.task is None or inputs.image_size is None:
        if own is None:
            raise UsageError(
                "The weights have no preprocessor_config.json beside them: --task and --image-size "
                "must be given."
            )
        write_json(folder / PREPROCESSOR, own)
    else:
        settings = inputs.settings
        statistics = {"mean": settings.mean, "std": settings.std} if settings else {}
        if inputs.record:
            statistics = inputs.record.statistics
        content = preprocessor_config(inputs.task, inputs.image_size, **statistics)
        write_json(folder / PREPROCESSOR, content)


def _history(
    job: Job,
    inputs: Inputs,
    plan: Plan,
    classes: ClassNames,
    pair: tuple[PairCheck, ...],
    merged: Merged,
    verdict: Verdict,
    folder: Path,
) -> History:
    """The content of conversion.json; it depends only on the job and its inputs."""
    sources = {}
    for role, source in inputs.fetched.items():
        read = merged.inputs[role]
        if role == "backbone" and source.config:
            read = {**read, **digests_of([source.config])}
        sources[role] = PastSource(source.repo_id, source.revision, read)
    files = {**merged.files, **digests_of(folder / name for name in CONFIGS)}
    return History(
        tool=TOOL,
        version=__version__,
        command=job.command(),
        checkpoint=job.checkpoint,
        task=inputs.task,
        dtype=job.dtype,
        weights=inputs.weights,
        state_key=job.state_key,
        category_ids=classes.category_ids,
        warnings=_warnings(inputs, classes),
        sources=sources,
        files=dict(sorted(files.items())),
        rows={
            row.name: PastTensor(row.shape, row.dtype, row.recipe, merged.tensors[row.name])
            for row in plan.rows
        },
        dropped=[dropped.to_dict() for dropped in plan.dropped],
        pair=[check.to_dict() for check in pair],
        verdict=verdict.record(),
    )


def _made(history: History, folder: Path) -> Digests:
    """The size and digest of every file of a finished model."""
    others = [path for path in map(folder.joinpath, (HISTORY, REPORT)) if path.exists()]
    return dict(sorted({**history.files, **digests_of(others)}.items()))
