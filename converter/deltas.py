"""Makes the delta of a model to its backbone, as TU/e publishes it, and converts it back."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from converter.catalog import Task
from converter.checks.pixels import Normalisation, read_normalisation
from converter.checks.provenance import Provenance
from converter.checks.round_trip import (
    check_round_trip_numbers,
    same_numbers,
    verdict_on_round_trip,
)
from converter.checks.verdict import Level, Verdict
from converter.configs import (
    PREPROCESSOR,
    find_backbone_config,
    read_backbone_config,
    read_config,
    read_model_config,
)
from converter.delta_record import DELTA, made_delta
from converter.errors import (
    MismatchError,
    OutputsDifferError,
    PlanError,
    UnreadableFileError,
    UsageError,
)
from converter.files import (
    Digests,
    digests_to_dict,
    real_path,
    user_path,
    write_json,
)
from converter.history import HISTORY, History, read_history
from converter.hub.access import Access
from converter.hub.sources import Fetched, fetch
from converter.job import Progress, counting
from converter.models import task_of
from converter.places import parse_source
from converter.staging import check_place, put_back, staged
from converter.version import TOOL, __version__
from converter.weights.delta_plan import delta_rows, plan_delta
from converter.weights.headers import TensorInfo
from converter.weights.inspection import decide, signs_of_a_delta
from converter.weights.layouts import (
    EOMT_LIGHTLY,
    EOMT_TRANSFORMERS,
    EOMT_TUE,
    recognise,
    translate,
)
from converter.weights.merge import Merged, WeightsFormat, merge
from converter.weights.pairing import (
    PairCheck,
    check_file_name,
    check_fine_tune,
    check_local_norm,
    check_norms,
)
from converter.weights.plan import Plan, Source, make_plan
from converter.weights.states import rename_to_layout
from converter.weights.sums import TensorChange, compare_sums
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile, open_tensors
from reference_model.config import Dinov3Config, EomtDinov3Config

if TYPE_CHECKING:
    from torch import Tensor

File = TensorFile | ShardedTensorFile

# what Dinov3Config has for training only
_FOR_TRAINING = (
    "attention_dropout",
    "drop_path_rate",
    "initializer_range",
    "layerscale_value",
    "pos_embed_jitter",
    "pos_embed_rescale",
    "pos_embed_shift",
)

# room for delta.json, in bytes
_SMALL_FILES = 1 << 20


@dataclass(frozen=True)
class Delta:
    """A delta that was made.

    Attributes:
        output: its folder.
        model, backbone: the files that it was made of.
        files: size in bytes and SHA-256 of every file of the delta.
        pair: the checks of whether the model was trained from the backbone.
        changes: how each tensor of the model differs from the backbone's and from its own sum, by
            canonical name.
        verdict: on what a conversion of the delta gives, beside the model.
        notes: sentences on how the model's file was read.
        content: of its delta.json.
    """

    output: Path
    model: Fetched
    backbone: Fetched
    files: Digests
    pair: tuple[PairCheck, ...]
    changes: Mapping[str, TensorChange]
    verdict: Verdict
    notes: tuple[str, ...]
    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The delta as JSON shows it."""
        return {"output": str(self.output), **self.content, **self.verdict.to_dict()}


@dataclass(frozen=True)
class _Sources:
    """The open files that a delta is made of, and the plans.

    Attributes:
        model, backbone: the files on this machine.
        model_file, backbone_file: the same, open.
        config: the model's configuration.
        own_config: the content of its config.json, if it has one.
        normalisation: of its preprocessor_config.json, if it has one.
        task: what the model segments, if known.
        history: its conversion.json, if it has one.
        notes: sentences on how its file was read.
        model_plan: how each of its tensors is read.
        plan: how the delta is made.
        sums: how a conversion makes the model of the delta again.
    """

    model: Fetched
    backbone: Fetched
    model_file: File
    backbone_file: File
    config: EomtDinov3Config
    own_config: Mapping[str, Any] | None
    normalisation: Normalisation | None
    task: Task | None
    history: History | None
    notes: tuple[str, ...]
    model_plan: Plan
    plan: Plan
    sums: Plan


def make_delta(
    model: str | Path,
    backbone: str | Path,
    output: str | Path,
    *,
    format: WeightsFormat = "torch",
    state_key: str | None = None,
    backbone_config: str | Path | None = None,
    task: Task | None = None,
    verify: bool = True,
    allow_mismatch: bool = False,
    force: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda *_: None,
) -> Delta:
    """Makes the delta of a model to the backbone that it was trained from.

    ``converter.make_delta("my_model", "facebook/dinov3-vits16-pretrain-lvd1689m", "my_delta")``
    writes my_delta/pytorch_model.bin, with the names and shapes of TU/e's published deltas, and
    delta.json. It is then added to the backbone again, and the sums are compared with the model.

    Args:
        model: a converted or fine-tuned model: its folder, or a Hub repository as owner/name or
            owner/name@revision; or a file of absolute weights in TU/e's layout.
        backbone: a file, a folder or a repository, in any layout that `convert` reads.
        output: the folder to write.
        format: ``torch`` for pytorch_model.bin, which the original's loader reads; ``safetensors``
            for model.safetensors.
        state_key: which copy of the weights in a file to use, as for `convert`.
        backbone_config: the backbone's config.json, if it is not beside it.
        task: panoptic, instance or semantic, if nothing in the model shows it.
        verify: whether to run the model that the delta gives, if it differs from the given one.
        allow_mismatch: whether to make the delta of a model that was not trained from the backbone.
        force: whether to replace an output that exists: the files that its delta.json lists.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: whether to use only that cache.
        progress: called with a stage, and the number of bytes that are done, and of all.

    Raises:
        UsageError: the format is unknown, or the model is a delta already.
        UnreadableFileError: a file is missing, broken, or of the wrong kind.
        PlanError: the weights are not those of a model and its backbone.
        MismatchError: the model was not trained from the backbone.
        OutputError: the output exists, or cannot be written.
        OutputsDifferError: adding the delta to the backbone does not give the model.
        AccessError, HubUnavailableError: a repository cannot be reached.
    """
    if format not in get_args(WeightsFormat):
        raise UsageError(
            f"format is {format!r}, expected one of {', '.join(get_args(WeightsFormat))}."
        )
    place = real_path(user_path(output))
    put_back(place)
    check_place(place, force=force, made=made_delta)
    access = Access.of(token, cache_dir, local_files_only)
    with ExitStack() as stack:
        sources = _open(
            model,
            backbone,
            access,
            stack,
            state_key=state_key,
            backbone_config=backbone_config,
            task=task,
        )
        for kind, source in (("model", sources.model), ("backbone", sources.backbone)):
            if real_path(source.weights.parent) == place:
                raise UsageError(
                    f"{place} has the {kind} itself.", "Give another folder with --output."
                )
        pair = check_fine_tune(sources.backbone_file, sources.model_file, sources.plan)
        pair += _check_backbone(sources)
        _refuse_mismatch(pair, allow_mismatch=allow_mismatch)
        size = sum(row.nbytes for row in sources.plan.rows) + _SMALL_FILES
        stage = stack.enter_context(
            staged(place, size=size, force=force, made=made_delta, last=DELTA)
        )
        merged = _write(sources, stage.folder, format, progress)
        file = open_tensors(stage.folder / next(iter(merged.files)))
        stack.enter_context(file)
        pair += (
            check_norms(sources.backbone_file, file, sources.sums),
            _check_digest(sources, merged.inputs["backbone"]),
        )
        files: Mapping[Any, File] = {
            "weights": sources.model_file,
            "backbone": sources.backbone_file,
            "delta": file,
        }
        changes = compare_sums(sources.sums, files, sources.model_plan)
        numbers = Level("numbers", "not checked", "Verification was switched off (--no-verify).")
        if not any(change.inexact for change in changes.values()):
            numbers = same_numbers()
        elif verify:
            numbers = _check_numbers(sources, files)
        verdict = verdict_on_round_trip(changes, numbers)
        if verdict.verdict == "failed":
            raise OutputsDifferError(
                f"Adding the delta to the backbone gives another model: {verdict.reason}",
                f"{place} was not written. Such a model is shared as a whole.",
                verdict,
            )
        content = _content(sources, format, merged, pair, changes, verdict)
        write_json(stage.folder / DELTA, content)
        stage.publish()
    return Delta(
        place,
        sources.model,
        sources.backbone,
        merged.files,
        pair,
        changes,
        verdict,
        sources.notes,
        content,
    )


def _open(
    model: str | Path,
    backbone: str | Path,
    access: Access,
    stack: ExitStack,
    *,
    state_key: str | None,
    backbone_config: str | Path | None,
    task: Task | None,
) -> _Sources:
    """Fetches and opens the model and the backbone, and plans the delta and its sums.

    Raises:
        EomtConvertError: as `make_delta` does.
    """
    eomt = fetch(parse_source(str(model)), access, beside=(PREPROCESSOR, HISTORY))
    base = fetch(parse_source(str(backbone)), access)
    file = open_tensors(eomt.weights)
    stack.enter_context(file)
    base_file = open_tensors(base.weights)
    stack.enter_context(base_file)
    state = rename_to_layout(file, state_key)
    layout = recognise(file.tensors)
    if layout is EOMT_LIGHTLY:
        raise UsageError(
            f"The weights in {eomt.title} are in LightlyTrain's layout.",
            "Convert them first, and make the delta of the converted model.",
        )
    if doubles := [name for name, info in file.tensors.items() if info.dtype == "F64"]:
        raise UsageError(
            f"{doubles[0]} in {eomt.title} is float64, which a delta in float32 cannot give again.",
            "Save the model in float32.",
        )
    if layout is EOMT_TUE and decide(signs_of_a_delta(file)) == "delta":
        raise UsageError(
            f"The weights in {eomt.title} are a delta already.",
            "Give the converted model, or absolute weights.",
        )
    base_config = (
        read_backbone_config(user_path(backbone_config))
        if backbone_config
        else find_backbone_config(base.config)
    )
    own = read_config(eomt.config) if layout is EOMT_TRANSFORMERS and eomt.config else None
    config: Dinov3Config | None = base_config
    if own and eomt.config:
        config = read_model_config(eomt.config)
    model_plan = make_plan(file.tensors, None, config)
    if isinstance(config, EomtDinov3Config):
        _check_sizes(config, model_plan.config)
    else:
        config = model_plan.config
    rows = delta_rows(translate(file.tensors, layout or EOMT_TUE), config)
    tensors = {row.name: TensorInfo(row.dtype, row.shape, 0) for row in rows}
    sums = make_plan(tensors, base_file.tensors, base_config)  # as a conversion will
    _check_configs(config, sums.config)
    _check_masks(file)
    plan = plan_delta(rows, sums)
    preprocessor = eomt.weights.parent / PREPROCESSOR
    has_it = own is not None and preprocessor.is_file()
    if task is None and has_it:
        task = cast("Task | None", task_of(str(model), eomt.weights.parent))
    return _Sources(
        model=eomt,
        backbone=base,
        model_file=file,
        backbone_file=base_file,
        config=config,
        own_config=own,
        normalisation=read_normalisation(preprocessor, config.num_channels) if has_it else None,
        task=task,
        history=read_history(eomt.weights.parent),
        notes=tuple(state.notes()) if state else (),
        model_plan=model_plan,
        plan=plan,
        sums=sums,
    )


def _check_sizes(own: EomtDinov3Config, found: EomtDinov3Config) -> None:
    """Checks that the model's config.json has the sizes of its tensors.

    Raises:
        PlanError: it has another one.
    """
    for name in ("num_queries", "num_blocks", "num_labels"):
        said, has = (getattr(config, name) for config in (own, found))
        if said != has:
            raise PlanError(f"{name} is {said} in the model's config.json, its tensors have {has}.")


def _check_masks(model: File) -> None:
    """Checks that masked attention is off in a model, as it is after a conversion.

    Raises:
        PlanError: it is on.
    """
    name = next(name for name in model.tensors if name.endswith("attn_mask_probs"))
    probabilities = model.read(name)
    if probabilities.any():
        raise PlanError(
            f"Masked attention is on: {name} is {probabilities.tolist()}. "
            "A conversion of the delta switches it off, and would give another model.",
            "Train until it has faded out, or set it to zeros, check the model, and save it again.",
        )


def _check_configs(model: EomtDinov3Config, sums: EomtDinov3Config) -> None:
    """Checks that a conversion of the delta computes with the model's configuration.

    Raises:
        PlanError: the backbone's is another one, which no delta can hold.
    """
    for field in fields(Dinov3Config):
        if field.name in _FOR_TRAINING:
            continue
        ours, theirs = (getattr(config, field.name) for config in (model, sums))
        if ours != theirs:
            raise PlanError(
                f"{field.name} is {ours} in the model's configuration, and {theirs} in the "
                "backbone's.",
                "A delta has no configuration: the converted model would compute something else.",
            )


def _check_backbone(sources: _Sources) -> tuple[PairCheck, ...]:
    """Checks whether the backbone was trained on the data that the model needs, if it is known."""
    history = sources.history
    published = history and history.checkpoint and not history.checkpoint.offline
    expected = "lvd1689m" if published else None
    return (
        check_file_name(sources.backbone_file, expected),
        check_local_norm(sources.backbone_file, expected),
    )


def _check_digest(sources: _Sources, backbone: Digests) -> PairCheck:
    """Compares the backbone's files with those that the model's conversion.json names."""
    past = sources.history.sources.get("backbone") if sources.history else None
    if past is None:
        return PairCheck("digest", "not checked", "There is no conversion.json that names one.")
    if backbone.items() <= past.files.items():
        return PairCheck("digest", "passed", "It is the file that conversion.json names.")
    same_names = backbone.keys() <= past.files.keys()
    return PairCheck(
        "digest",
        "flagged" if same_names else "not checked",
        "The model's conversion.json names another file as its backbone; it may be the same one in "
        "another layout.",
    )


def _refuse_mismatch(pair: tuple[PairCheck, ...], *, allow_mismatch: bool) -> None:
    failed = [check.finding for check in pair if check.status == "failed"]
    if failed and not allow_mismatch:
        raise MismatchError(
            "Model and backbone do not belong together: " + " ".join(failed),
            "Give the backbone that the model was trained from. --allow-mismatch makes the delta "
            "anyway.",
        )


def _write(sources: _Sources, folder: Path, format: WeightsFormat, progress: Progress) -> Merged:
    total = sum(row.nbytes for row in sources.plan.rows)
    try:
        return merge(
            sources.plan,
            {"weights": sources.model_file, "backbone": sources.backbone_file},
            folder,
            format=format,
            advance=counting(progress, "Subtracting", total),
        )
    except UnreadableFileError as error:
        if "--allow-nonfinite" in error.remedy:  # which is for conversions
            error.remedy = "The file may be damaged; a delta has finite numbers only."
        raise


def _check_numbers(sources: _Sources, files: Mapping[Any, File]) -> Level:
    """Runs the model and the one that the delta gives, and compares their outputs."""
    channels = sources.config.num_channels
    usual = Normalisation(1 / 255, (0.5,) * channels, (0.25,) * channels)  # any would do
    return check_round_trip_numbers(
        sources.config,
        sources.normalisation or usual,
        lambda: _weights(sources.model_plan, files),
        lambda: _weights(sources.sums, files),
        sources.config.input_size if sources.own_config else None,
    )


def _weights(plan: Plan, files: Mapping[Any, File]) -> "dict[str, Tensor]":
    """Every tensor of a plan, in float32."""
    import torch

    sources = Provenance(files, plan)
    return {name: torch.from_numpy(sources.tensor(name, rounded=False)) for name in sources.rows}


def _content(
    sources: _Sources,
    format: WeightsFormat,
    merged: Merged,
    pair: tuple[PairCheck, ...],
    changes: Mapping[str, TensorChange],
    verdict: Verdict,
) -> dict[str, Any]:
    """The content of delta.json."""
    of_file: Mapping[str, tuple[Fetched, Source]] = {
        "model": (sources.model, "weights"),
        "backbone": (sources.backbone, "backbone"),
    }
    normalisation = sources.normalisation
    size = sources.config.input_size if sources.own_config else None
    tensors = {}
    for row in sources.plan.rows:
        (canonical,) = EOMT_TUE.target(row.name)
        change = changes.get(canonical) if isinstance(canonical, str) else None
        tensors[row.name] = {
            "shape": list(row.shape),
            "recipe": row.recipe,
            "sha256": merged.tensors[row.name],
            **(change.to_dict() if change else {}),
        }
    inexact = [change for change in changes.values() if change.inexact]
    return {
        "tool": {"name": TOOL, "version": __version__},
        "format": format,
        "task": sources.task,
        "image_size": list(size) if size else None,
        "image_mean": list(normalisation.mean) if normalisation else None,
        "image_std": list(normalisation.std) if normalisation else None,
        "classes": (
            {key: sources.own_config.get(key) for key in ("id2label", "stuff_classes")}
            if sources.own_config
            else None
        ),
        "dtypes": sorted({info.dtype for info in sources.model_file.tensors.values()}),
        "sources": {
            role: {
                "repo": source.repo_id,
                "revision": source.revision,
                "files": digests_to_dict(merged.inputs[name]),
            }
            for role, (source, name) in of_file.items()
        },
        "files": digests_to_dict(merged.files),
        "tensors": tensors,
        "pair": [check.to_dict() for check in pair],
        "round_trip": {
            "elements": sum(change.elements for change in changes.values()),
            "inexact": sum(change.inexact for change in inexact),
            "inexact_tensors": len(inexact),
            "max_abs": max((change.max_abs for change in inexact), default=0.0),
            "max_ulps": max((change.max_ulps for change in inexact), default=0.0),
            **verdict.to_dict(),
        },
    }
