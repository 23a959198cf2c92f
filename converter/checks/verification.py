"""Checks a model against the evidence, one level after another."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from converter.catalog import find_named
from converter.checks.arithmetic import changed_files, check_arithmetic, sums_before_rounding
from converter.checks.computation import Computation
from converter.checks.evidence import Evidence
from converter.checks.findings import Findings, write_page
from converter.checks.outputs import inputs_place, write_inputs
from converter.checks.pixels import read_normalisation
from converter.checks.provenance import (
    Given,
    Provenance,
    is_published,
    open_sources,
)
from converter.checks.published import PUBLISHED, Slices, check_published
from converter.checks.recorded import Recorded, read_recorded, recording_of
from converter.checks.structure import (
    StoredModel,
    check_structure,
    dtype_of,
    read_model,
    read_weights,
)
from converter.checks.verdict import (
    LEVELS,
    NOTHING_RECORDED,
    NUMBERED,
    Cause,
    Level,
    Verdict,
    is_asked,
    not_asked,
)
from converter.configs import CONFIGS, PREPROCESSOR, Dtype, find_backbone_config, read_model_config
from converter.errors import UsageError
from converter.files import optional_path, prepare_place, read_json_object, sha256, user_path
from converter.history import has_weights_of, read_history
from converter.hub.access import Access
from converter.hub.sources import fetch_config
from converter.models import Compile, build_model, fetch_model, repository_of, torch_device
from converter.places import parse_source
from converter.runtimes.exported import FILES
from converter.runtimes.network import find_exported
from converter.weights.tensorfiles import find_weights, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from converter.checks.comparison import Tolerance
    from converter.checks.computed import Computed
    from converter.checks.diagnosis.stages import Stage
    from converter.checks.numbers import Numbers
    from reference_model import EomtDinov3ForUniversalSegmentation


@dataclass(frozen=True)
class Options:
    """How a model is checked.

    Attributes:
        level: the last of the five numbered levels to check.
        against: a peer to compare with, if any.
        image: the picture that published outputs were recorded on; None to download it.
        device: where the model runs, as torch names it.
        threads: number of torch's CPU threads; None for torch's choice.
        allow_nonfinite: whether weights may be NaN or infinite.
        computation: how outputs are computed, besides in float32.
        access: how the Hub is reached.
    """

    level: int = len(NUMBERED)
    against: Literal["transformers"] | None = None
    image: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    allow_nonfinite: bool = False
    computation: Computation = field(default_factory=Computation)
    access: Access = field(default_factory=Access)


def verify(
    model: str | Path,
    *,
    recorded: str | Path | None = None,
    delta: str | None = None,
    backbone: str | None = None,
    against: Literal["transformers"] | None = None,
    level: int = len(NUMBERED),
    image: str | Path | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
    compile: Compile | None = None,
    threads: int | None = None,
    report: str | Path | None = None,
    made_from: str | Path | None = None,
    providers: str | Sequence[str] = (),
    input_name: str | None = None,
    output_names: tuple[str, str] | None = None,
    save_inputs: str | Path | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Verdict:
    """Checks a converted or an exported model, and looks for the cause if it fails.

    ``converter.verify("model", recorded="recorded").verdict`` is ``passed``, ``failed`` or
    ``unverified``.

    Args:
        model: its folder, or a Hub repository as owner/name or owner/name@revision. An exported
            model's folder, or an .onnx or .pt2 file, whoever made it.
        recorded: a folder with recorded outputs, or its recorded.safetensors. By default those in
            the model's folder, or those of the catalogue's entry that conversion.json names, if
            they come with the package.
        delta: the delta it was made from: a file, a folder, or owner/name[@revision]. By default
            the one that conversion.json names, if it is in the cache.
        backbone: the backbone it was made from, given in the same way.
        against: ``transformers`` to compare with its model, layer by layer.
        level: the last level to check: 1 structure, 2 arithmetic, 3 numbers, 4 peers, 5 published.
            Pictures, which have no number, are checked from 4 on.
        image: the picture that published outputs were recorded on; by default it is downloaded.
        device: where the model runs, such as ``cuda``.
        dtype: to compute in, after the model has passed in float32: ``bfloat16`` or ``float16``
            show what that costs.
        compile: the mode of torch.compile, ``default`` or ``max-autotune``, to run the model with
            after it has passed without; None for none.
        threads: number of torch's CPU threads; by default torch's choice.
        report: an HTML file to write with the results.
        made_from: for an exported model, the one that was exported: a folder or a repository. By
            default its tensors are known from conversion.json.
        providers: for an ONNX file, onnxruntime's execution providers, best first, such as
            ``tensorrt`` or ``CUDAExecutionProvider``, also as text with commas; ``cuda:1`` for the
            GPU with this number. By default the CPU's.
        input_name: for an ONNX file, the name of its input, if it is not recognised.
        output_names: for an ONNX file, the names of its outputs for masks and classes, likewise.
        save_inputs: a .npz file to write with the model's normalised inputs, ``pixel_values``, for
            the recorded pixels: another program's outputs for them are judged by `verify_outputs`.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: whether only that cache is used.

    Raises:
        UnreadableFileError: the model, the recording or a source cannot be read.
        PlanError: the given sources do not add up to a model.
        AccessError: a named repository is missing, gated, or not in the cache.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UsageError: there is no such level, device, dtype, mode or peer; inputs are asked for, but
            nothing was recorded, or the file does not end in .npz; an option is not for this kind
            of model.
        OutputError: the report or the inputs cannot be written.
        EomtConvertError: the model cannot be compiled.
    """
    if level not in range(1, len(NUMBERED) + 1):
        raise UsageError(f"There is no level {level}: {NUMBERED[0]} is 1, {NUMBERED[-1]} is 5.")
    page = optional_path(report)
    if page:
        prepare_place(page)
    inputs = inputs_place(save_inputs)
    access = Access.of(token, cache_dir, local_files_only)
    if exported := _exported(model):
        others = {
            "--delta": delta,
            "--backbone": backbone,
            "--against": against,
            "--image": image,
            "--device": device != "cpu",
            "--dtype": dtype != "float32",
            "--compile": compile,
        }
        _refuse(others, "is for models that are not exported")
        from converter.checks.exported import verify_exported

        findings = verify_exported(
            exported,
            recorded=recorded,
            made_from=made_from,
            providers=providers,
            input_name=input_name,
            output_names=output_names,
            level=level,
            threads=threads,
            save_inputs=inputs,
            access=access,
        )
        if exported != user_path(model):  # a folder was named
            findings = _with_unchecked(findings, exported.parent, exported)
        if page:
            folder = exported.absolute().parent
            has_config = (folder / "config.json").is_file()
            write_page([page], folder.name, folder if has_config else None, findings)
        return findings.verdict
    for_exports = {
        "--model": made_from,
        "--provider": providers,
        "--input-name": input_name,
        "--output-names": output_names,
    }
    if repository_of(model) or user_path(model).exists():  # else there is nothing to verify
        _refuse(for_exports, "is for exported models")
    options = Options(
        level,
        against,
        optional_path(image),
        device,
        threads,
        computation=Computation(dtype, compile),
        access=access,
    )
    folder = fetch_model(model, access)
    with open_tensors(find_weights(folder)) as file:
        tensors = dict(file.tensors)
    history = read_history(folder)
    checkpoint = history.checkpoint if history else find_named(repository_of(model))
    place = recording_of(folder, checkpoint, recorded)
    if inputs:
        channels = read_model_config(folder / "config.json").num_channels
        write_inputs(inputs, read_normalisation(folder / PREPROCESSOR, channels), place)
    with ExitStack() as stack:
        sources: Provenance | str = not_asked(options.level)
        if is_asked("arithmetic", level):
            sources = open_sources(
                Given(delta, backbone),
                history,
                read_model_config(folder / "config.json"),
                dtype_of(read_json_object(folder / "config.json"), tensors),
                access,
                stack,
            )
        evidence = Evidence(
            recorded=place,
            published=checkpoint if has_weights_of(checkpoint, history) else None,
            task=history.task if history else (checkpoint.task if checkpoint else None),
            history=history,
            size_is_meant=history is not None and not changed_files(folder, history),
            sources=sources,
            of_published=isinstance(sources, Provenance)
            and "delta" in sources.files
            and delta is None
            and is_published(checkpoint, history, access),
            recipes=sources.digests() if isinstance(sources, Provenance) else None,
            damage=sources.damage() if isinstance(sources, Provenance) else (),
            backbone_config=find_backbone_config(fetch_config(parse_source(backbone), access))
            if backbone
            else None,
            run_backbone=backbone is not None,
        )
        findings = _with_unchecked(check(folder, evidence, options), folder)
    if page:
        title = str(model) if repository_of(model) else folder.absolute().name
        write_page([page], title, folder, findings)
    return findings.verdict


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """Refuses options that were given.

    Raises:
        UsageError: one was.
    """
    for name, value in options.items():
        if value:
            raise UsageError(f"{name} {reason}.", "Leave it out.")


def _exported(model: str | Path) -> Path | None:
    """The exported file that is meant; None for a converted model, or a repository."""
    place = user_path(model)
    return find_exported(place) if place.exists() or place.suffix else None


def _with_unchecked(findings: Findings, folder: Path, checked: Path | None = None) -> Findings:
    """Adds a remark on exported files in a folder that were not checked.

    Args:
        findings: on what was checked.
        folder: the folder that was named.
        checked: the exported file that was checked, if one was.
    """
    others = (path for path in map(folder.joinpath, FILES.values()) if path != checked)
    remarks = [
        f"{path.name} in this folder was not checked: eomt-convert verify {quote(str(path))} does."
        for path in others
        if path.exists()
    ]
    structure, *levels = findings.verdict.levels
    structure = replace(structure, reason=" ".join(filter(None, [structure.reason, *remarks])))
    return replace(findings, verdict=replace(findings.verdict, levels=(structure, *levels)))


def check(folder: Path, evidence: Evidence, options: Options | None = None) -> Findings:
    """Checks the model in a folder against the available evidence.

    Raises:
        UnreadableFileError: the model or the recording cannot be read.
        UsageError: there is no such device or peer.
        EomtConvertError: the model cannot be compiled.
    """
    from converter.checks.precision import full_float32

    options = options or Options()
    with torch_device(options.device, options.threads), full_float32():
        found = read_model(folder, keep=_is_run(evidence, options))
        return _check(found, evidence, options)


def _check(found: "StoredModel", evidence: Evidence, options: Options) -> Findings:
    structure = check_structure(found, evidence, allow_nonfinite=options.allow_nonfinite)
    levels = {"structure": structure}
    if is_asked("arithmetic", options.level):
        levels["arithmetic"] = check_arithmetic(found, evidence)
    judged, recorded = None, None
    if evidence.recorded and is_asked("numbers", options.level):
        recorded = read_recorded(evidence.recorded)
    if found.misfits:
        for name in LEVELS[LEVELS.index("numbers") :]:
            if is_asked(name, options.level):
                levels[name] = Level(name, "not checked", "The model cannot be built.")
    elif _is_run(evidence, options):
        model = build_model(found.config, found.weights).to(options.device)
        if recorded:
            judged = _check_numbers(model, found, evidence, recorded, levels["arithmetic"])
            levels["numbers"] = judged.numbers.level
            if options.computation and judged.numbers.level.status == "passed":
                judged = _compute(judged, found, recorded, options.computation)
                levels["numbers"] = judged.last.level
            if is_asked("pictures", options.level):
                levels["pictures"] = _check_pictures(judged, found, evidence, recorded)
        if options.against and _is_compared("peers", options):
            levels["peers"] = _check_peers(model, found, recorded, judged)
        if (slices := _slices(evidence)) and _is_compared("published", options):
            levels["published"] = _check_published(model, slices, found, evidence, options, levels)
    all_levels = tuple(
        levels.get(name) or Level(name, "not checked", _why_not_checked(name, evidence, options))
        for name in LEVELS
    )
    verdict = _with_diagnosis(all_levels, found, evidence, options, recorded, judged)
    return Findings(verdict, recorded, judged.last.outputs if judged else {})


def _is_run(evidence: Evidence, options: Options) -> bool:
    """Whether to run the network: only if there is something to compare its outputs with."""
    compared_with = {
        "numbers": evidence.recorded,
        "peers": options.against,
        "published": _slices(evidence),
    }
    return any(of and _is_compared(level, options) for level, of in compared_with.items())


def _is_compared(level: str, options: Options) -> bool:
    """Whether to compare outputs on a level; peers and published numbers are for float32 only."""
    return is_asked(level, options.level) and (level == "numbers" or not options.computation)


def _slices(evidence: Evidence) -> Slices | None:
    return PUBLISHED.get(evidence.published.name) if evidence.published else None


def _why_not_checked(level: str, evidence: Evidence, options: Options) -> str:
    if not is_asked(level, options.level):
        return not_asked(options.level)
    compared_with = {"peers": options.against, "published": _slices(evidence)}
    if options.computation and compared_with.get(level):
        return f"This would be in float32, not for the model {options.computation}."
    return "No peer was named with --against." if level == "peers" else NOTHING_RECORDED


@dataclass(frozen=True)
class _Judged:
    """The numbers of a model, and the weights that they were computed with.

    Attributes:
        numbers: the result of running the model; the outputs are always those of its own weights.
        model: the model with its own weights or, if these are proven to be rounded sums, with the
            sums before rounding.
        weights: the weights of ``model``.
        tolerance: how far its outputs may be off.
        stages: the network's stages with tolerances for rounding, if there are any.
        rounded: the model with its own weights, if ``model`` has the sums before rounding.
        computed: the model computed as asked for, if ``numbers`` passed and are not all.
    """

    numbers: "Numbers"
    model: "EomtDinov3ForUniversalSegmentation"
    weights: "Mapping[str, Tensor]"
    tolerance: "Tolerance"
    stages: "tuple[Stage, ...] | None" = None
    rounded: "EomtDinov3ForUniversalSegmentation | None" = None
    computed: "Computed | None" = None

    @property
    def last(self) -> "Numbers":
        """The numbers that were asked for, or those that failed before."""
        return self.computed.numbers if self.computed else self.numbers


def _check_numbers(
    model: "EomtDinov3ForUniversalSegmentation",
    found: StoredModel,
    evidence: Evidence,
    recorded: Recorded,
    arithmetic: Level,
) -> _Judged:
    from converter.checks.comparison import FLOAT32, ROUNDED, computed_tolerance
    from converter.checks.diagnosis.stages import Network, Skeleton, cut
    from converter.checks.numbers import bare_backbone, check_numbers
    from converter.checks.rounding import (
        allowing_for_rounding,
        check_rounded,
        with_cost_of_rounding,
    )

    backbone = None
    if evidence.run_backbone and isinstance(evidence.sources, Provenance):
        backbone = bare_backbone(evidence.sources).to(model.device)
    normalisation = found.normalisation
    tolerance = computed_tolerance(recorded.origin.computed_in)
    numbers = check_numbers(model, normalisation, recorded, tolerance, backbone)
    judged = _Judged(numbers, model, found.weights, tolerance)
    rounded = found.rounded_to
    if rounded and not numbers.comparable:
        judged = replace(judged, tolerance=ROUNDED[rounded])
    elif rounded and numbers.level.status == "failed" and not recorded.origin.rounded_to:
        if sums := sums_before_rounding(found, evidence, arithmetic):
            exact = build_model(found.config, sums).to(model.device)
            of_sums = check_numbers(exact, normalisation, recorded, FLOAT32, backbone)
            checked = with_cost_of_rounding(of_sums, numbers, recorded, rounded)
            judged = _Judged(checked, exact, sums, FLOAT32, rounded=model)
        else:
            network = Network(Skeleton(found.config), found.weights, normalisation)
            stages = allowing_for_rounding(cut(recorded, found.config), network, found.rounded)
            checked = check_rounded(
                model, numbers, network, stages, recorded, found.rounded, rounded
            )
            if checked.level.status == "passed" and not isinstance(evidence.sources, Provenance):
                reason = f"{checked.level.reason} Give --delta and --backbone to find it."
                checked = replace(checked, level=replace(checked.level, reason=reason))
            judged = _Judged(checked, model, found.weights, ROUNDED[rounded], stages)
    configs = {name: sha256(found.folder / name) for name in CONFIGS}
    rests_on = recorded.origin.figures({**found.digests, **configs})
    level = judged.numbers.level
    level = replace(level, figures={**level.figures, **rests_on})
    if found.drawn and level.status == "passed":  # by chance
        level = replace(level, status="failed", reason=found.drawn)
    return replace(judged, numbers=replace(judged.numbers, level=level))


def _compute(
    judged: _Judged, found: StoredModel, recorded: Recorded, computation: Computation
) -> _Judged:
    from converter.checks.computed import check_computed

    computed = check_computed(
        computation,
        judged.rounded or judged.model,
        judged.numbers,
        found.normalisation,
        recorded,
        rounded=bool(found.rounded) and not recorded.origin.rounded_to,
    )
    return replace(judged, computed=computed)


def _check_pictures(
    judged: _Judged,
    found: StoredModel,
    evidence: Evidence,
    recorded: Recorded,
) -> Level:
    from converter.checks.pictures import check_pictures

    return check_pictures(
        judged.model,
        found.folder,
        evidence.task,
        recorded,
        judged.tolerance,
        rounded=judged.rounded,
        rounded_to=found.rounded_to,
        computed=judged.computed,
        size_is_meant=evidence.size_is_meant,
    )


def _check_peers(
    model: "EomtDinov3ForUniversalSegmentation",
    found: StoredModel,
    recorded: Recorded | None,
    judged: _Judged | None,
) -> Level:
    from converter.checks.peers import check_transformers

    numbers = judged.numbers if judged and judged.numbers.outputs else None
    pixels = recorded.pixels if recorded and numbers else None
    return check_transformers(found.folder, model, found.normalisation, pixels, numbers)


def _check_published(
    model: "EomtDinov3ForUniversalSegmentation",
    slices: Slices,
    found: StoredModel,
    evidence: Evidence,
    options: Options,
    levels: Mapping[str, Level],
) -> Level:
    if found.rounded_to:
        sums = sums_before_rounding(found, evidence, levels["arithmetic"])
        if sums is None:
            reason = (
                "The published outputs were computed with float32 weights; these weights are "
                "rounded, and not proven from their sources."
            )
            return Level("published", "not checked", reason)
        model = build_model(found.config, sums).to(model.device)
    return check_published(model, found.normalisation, slices, options.image, options.access)


def _with_diagnosis(
    levels: tuple[Level, ...],
    found: StoredModel,
    evidence: Evidence,
    options: Options,
    recorded: Recorded | None,
    judged: _Judged | None,
) -> Verdict:
    failed = {level.level for level in levels if level.status == "failed"}
    if found.drawn and (found.misfits or not is_asked("arithmetic", options.level)):
        known = Cause("masked-attention-on", ("attn_mask_probs",), None, found.drawn)
        return Verdict(levels, cause=known)
    if found.misfits or not (found.drawn or failed & {"arithmetic", "numbers"}):
        return Verdict(levels)
    from converter.checks.comparison import FLOAT32
    from converter.checks.diagnosis.by_value import Reference
    from converter.checks.diagnosis.search import diagnose, not_tried
    from converter.checks.diagnosis.stages import Network, Skeleton
    from converter.checks.numbers import first_difference

    computed = judged and judged.computed
    if computed and computed.cause and "arithmetic" not in failed:
        tried = not_tried("The same weights are right in float32, not compiled.")
        return Verdict(levels, computed.difference, computed.cause, tried)
    difference = None
    wrong = judged and judged.numbers.level.status == "failed"
    if judged and wrong:
        difference = first_difference(judged.numbers.compared, found.config)
        if not judged.numbers.comparable:
            tried = not_tried("The recorded outputs are from a model with other sizes.")
            return Verdict(levels, difference, None, tried)
    provenance = evidence.sources if isinstance(evidence.sources, Provenance) else None
    digests = evidence.recipes or (evidence.history and evidence.history.tensors)
    weights = judged.weights if judged else found.weights or read_weights(found.folder)
    cause, tried = diagnose(
        Network(Skeleton(found.config), weights, found.normalisation),
        recorded if wrong else None,
        judged.tolerance if judged else FLOAT32,
        judged.stages if judged else None,
        found.digests,
        Reference(digests, provenance) if digests else None,
    )
    return Verdict(levels, difference, cause, tried)
