"""The files of a job, fetched and opened, and what kind of weights they hold."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from converter import class_names
from converter.catalog import Task
from converter.class_names import ClassNames
from converter.configs import (
    PREPROCESSOR,
    find_backbone_config,
    read_backbone_config,
    read_config,
    read_model_config,
)
from converter.delta_record import DELTA, DeltaRecord, read_delta_record
from converter.errors import EomtConvertError, UsageError
from converter.files import read_json_object
from converter.hub.access import Access
from converter.hub.sources import Fetched, fetch, fetch_config, fetch_first
from converter.job import Job
from converter.places import HubSource
from converter.weights.inspection import Sign, WeightsKind, decide, signs_of_a_delta
from converter.weights.layouts import EOMT_TRANSFORMERS
from converter.weights.lightly import LightlySettings, read_settings
from converter.weights.merge import Files
from converter.weights.plan import Source
from converter.weights.states import Choice, rename_to_layout
from converter.weights.tensorfiles import open_tensors
from reference_model.config import Dinov3Config


@dataclass(frozen=True)
class Inputs:
    """The open files of a job, and what kind of weights they hold.

    Attributes:
        fetched: the files on this machine, by source.
        files: the same files, open.
        state: which tensors of EoMT's weights are converted; None if their layout is unknown.
        settings: what EoMT's weights say about themselves, if they are LightlyTrain's.
        task, image_size: as the job, the settings or delta.json say; None if none does.
        weights: whether EoMT's weights are a delta or absolute.
        evidence: the signs that decided this; empty if it was given or known.
        own_config: the config.json of EoMT's weights, if they are in transformers' layout.
        own_preprocessor: the preprocessor_config.json beside it, if there is one.
        backbone_config: the backbone's configuration; None to derive it from the shapes.
        record: what the delta.json beside a delta says; None if there is none.
    """

    fetched: Mapping[Source, Fetched]
    files: Files
    state: Choice | None
    settings: LightlySettings | None
    task: Task | None
    image_size: tuple[int, int] | None
    weights: WeightsKind
    evidence: tuple[Sign, ...]
    own_config: Mapping[str, Any] | None
    own_preprocessor: Mapping[str, Any] | None
    backbone_config: Dinov3Config | None
    record: DeltaRecord | None = None


def role_of(weights: WeightsKind) -> Source:
    """The source in a plan that holds EoMT's weights."""
    return "delta" if weights == "delta" else "weights"


def _delta_record(job: Job, access: Access) -> DeltaRecord | None:
    """What the delta.json beside a delta says, if there is one."""
    if job.checkpoint:
        return None
    if isinstance(job.delta, HubSource):
        path = fetch_first(job.delta, (DELTA,), access)
    else:
        place = job.delta.path
        path = (place if place.is_dir() else place.parent) / DELTA
    return read_delta_record(path) if path and os.path.lexists(path) else None


def open_inputs(job: Job, access: Access, stack: ExitStack, *, dry_run: bool) -> Inputs:
    """Fetches and opens EoMT's weights, and the backbone if they are a delta.

    Raises:
        UsageError: an option is missing that weights outside the catalogue need.
        AccessError, UnreadableFileError: as `fetch` and `open_tensors` raise them.
        EomtConvertError: it cannot be decided whether the weights are a delta or absolute, or
            which weights to convert.
    """
    if job.checkpoint and job.backbone and job.delta == job.checkpoint.source("delta"):
        # fails before gigabytes are fetched if there is no access to the backbone
        fetch_config(job.backbone, access)
    eomt = fetch(job.delta, access, check_weights=False)  # merging computes their digests
    eomt_file = open_tensors(eomt.weights)
    stack.enter_context(eomt_file)
    state = rename_to_layout(eomt_file, job.state_key)
    layout = state.state.layout if state else None
    settings = read_settings(eomt_file, layout)
    task, image_size = _task_and_size(job, settings)
    converted = layout is EOMT_TRANSFORMERS
    evidence: tuple[Sign, ...] = ()
    weights: WeightsKind
    if job.weights != "auto":
        weights = job.weights
    elif converted or settings:
        weights = "absolute"
    elif dry_run:  # no weights are read
        weights = "delta"
    else:
        evidence = signs_of_a_delta(eomt_file)
        weights = _decided(evidence, eomt.title)

    own: Mapping[str, Any] | None = None
    own_preprocessor: Mapping[str, Any] | None = None
    if converted and eomt.config:
        own = read_config(eomt.config)
        if (eomt.config.parent / PREPROCESSOR).is_file():
            own_preprocessor = read_json_object(eomt.config.parent / PREPROCESSOR)
    record = _delta_record(job, access) if weights == "delta" else None
    if record:
        task, image_size = task or record.task, image_size or record.image_size
    known = {"--task": task is not None, "--image-size": image_size is not None}
    _check_enough(job, weights, known, converted=converted)
    fetched: dict[Source, Fetched] = {role_of(weights): eomt}
    files: dict[Source, Any] = {role_of(weights): eomt_file}
    if weights == "delta" and job.backbone:
        fetched = {"backbone": fetch(job.backbone, access, check_weights=False), **fetched}
        backbone_file = open_tensors(fetched["backbone"].weights)
        stack.enter_context(backbone_file)
        files = {"backbone": backbone_file, **files}
    config = _backbone_config(job, fetched, access, converted=converted)
    return Inputs(
        fetched=fetched,
        files=files,
        state=state,
        settings=settings,
        task=task,
        image_size=image_size,
        weights=weights,
        evidence=evidence,
        own_config=own,
        own_preprocessor=own_preprocessor,
        backbone_config=config,
        record=record,
    )


def _task_and_size(
    job: Job, settings: LightlySettings | None
) -> tuple[Task | None, tuple[int, int] | None]:
    """Options come before what the file says, which comes before the catalogue."""
    if settings is None:
        return job.task, job.image_size
    entry = job.checkpoint
    task = settings.task if entry and job.task == entry.task else job.task
    size = settings.image_size if entry and job.image_size == entry.image_size else job.image_size
    return task or settings.task, size or settings.image_size


def _decided(evidence: tuple[Sign, ...], title: str) -> WeightsKind:
    kind = decide(evidence)
    if kind is None:
        signs = "; ".join(f"{sign.finding} ({sign.speaks_for})" for sign in evidence)
        raise EomtConvertError(
            f"It cannot be decided whether the weights in {title} are a delta or absolute: "
            f"{signs or 'there is no sign of either'}.",
            "Give --weights delta or --weights absolute.",
        )
    return kind


def _check_enough(
    job: Job, weights: WeightsKind, known: Mapping[str, bool], *, converted: bool
) -> None:
    needed = {
        "--backbone": weights == "delta" and job.backbone is None,
        **{option: not (known[option] or converted) for option in known},
    }
    missing = [option for option, needs in needed.items() if needs]
    if missing:
        raise UsageError(
            f"Without --checkpoint, {' and '.join(missing)} must be given.",
            "The weights are a delta, which has to be added to a backbone."
            if missing[0] == "--backbone"
            else "eomt-convert list shows the checkpoints that have a name.",
        )


def _backbone_config(
    job: Job, fetched: Mapping[Source, Fetched], access: Access, *, converted: bool
) -> Dinov3Config | None:
    """The backbone's configuration from the first place that has one; None to use the shapes."""
    if job.backbone_config:
        return read_backbone_config(job.backbone_config)
    if converted:
        own = fetched["weights"].config if "weights" in fetched else None
        return read_model_config(own) if own else None
    catalogued = job.checkpoint and job.backbone == job.checkpoint.source("backbone")
    if "backbone" in fetched:
        beside = fetched["backbone"].config
    elif job.backbone and not (catalogued and isinstance(job.backbone, HubSource)):
        beside = fetch_config(job.backbone, access)
    else:  # its repository may be gated, and the shapes of a published backbone are enough
        beside = None
    if config := find_backbone_config(beside):
        return config
    if job.checkpoint and job.checkpoint.offline:
        beside = fetch_config(job.checkpoint.source("backbone"), access)
        return read_backbone_config(beside) if beside else None
    return None


def choose_class_names(job: Job, inputs: Inputs, count: int) -> ClassNames:
    """The class names of a model: the given ones, its file's, the catalogue's, or placeholders.

    Raises:
        EomtConvertError: the number of names is not the number of classes.
        UsageError: --stuff names a class that the model does not have.
    """
    if job.labels:
        classes, origin = class_names.read(job.labels), str(job.labels)
    elif inputs.settings:
        classes, origin = inputs.settings.classes, inputs.fetched["weights"].title
    elif inputs.record and inputs.record.classes:
        classes, origin = inputs.record.classes, DELTA
    elif job.checkpoint:
        classes, origin = job.checkpoint.class_names(count), job.checkpoint.name
    elif inputs.own_config:
        classes, origin = class_names.of_config(inputs.own_config, count), "config.json"
    else:
        classes, origin = class_names.unnamed(count), ""
    if len(classes.names) != count:
        raise EomtConvertError(
            f"{origin} has {len(classes.names)} class names; expected {count}, one for each class "
            "of the weights.",
            "--labels takes a file with that many names, in the order of the class ids.",
        )
    if inputs.task in ("semantic", "instance"):  # which do not distinguish stuff
        if job.stuff:
            raise UsageError(f"--stuff is for panoptic models; the task is {inputs.task}.")
        return replace(classes, stuff=())
    if job.stuff is not None:
        return classes.with_stuff(job.stuff)
    if job.labels and classes.stuff is None:
        # names do not say which classes are stuff; the file or the catalogue may
        known = inputs.settings.classes if inputs.settings else None
        if known is None and job.checkpoint:
            known = job.checkpoint.class_names(count)
        if known and len(known.names) == count:
            classes = replace(classes, stuff=known.stuff)
    return classes
