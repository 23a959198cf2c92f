"""The model card: what a converted model is, how it was made, and how it was verified.

Everything in it comes from the model's config.json and conversion.json, and from the catalogue.
A push only rewrites the part between two marks, and the metadata that we set; people may edit the
rest of the card on the Hub.
"""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from converter.catalog import Checkpoint, Metric, Task, find_named, fixtures
from converter.checks.recorded import known_recordings
from converter.checks.verdict import BASES, Verdict, read_record
from converter.configs import read_config
from converter.errors import EomtConvertError, UnreadableFileError, UsageError
from converter.files import read_json_object
from converter.history import History, PastSource, read_history
from converter.hub.access import check_repo_id
from converter.hub.downloads import is_sha256
from converter.outside import Markdown, code, fenced, prose
from converter.weights.backbones import published_repo
from converter.weights.plan import Source

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from jinja2 import Template

BEGIN = (
    "<!-- eomt-convert begin: a push rewrites what stands between this line and the end mark -->"
)
END = "<!-- eomt-convert end -->"

# the words that figures in the card may hold; any other text is left out
_WORDS = (*BASES, "sources", "conversion.json", *get_args(Task), "bfloat16", "float16")

LICENCE_FILE = "LICENSE.md"  # as in Meta's own repositories
LICENCE_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
MODEL_ZOO = "https://github.com/tue-mps/eomt/blob/master/model_zoo/dinov3.md"

_TEMPLATES = Path(__file__).parent / "templates"

# the datasets' names on the Hub, as cards of other segmentation models give them
_HUB_DATASETS = {
    "COCO panoptic val2017": "coco",
    "COCO instances val2017": "coco",
    "ADE20K val": "scene_parse_150",
}

_TRANSFORMERS_IMPORTS = Markdown(
    "from transformers import AutoImageProcessor, EomtDinov3ForUniversalSegmentation"
)
_REFERENCE_IMPORTS = Markdown(
    "from reference_model import EomtDinov3ForUniversalSegmentation\n"
    "from reference_model import EomtImageProcessor as AutoImageProcessor"
)


@dataclass(frozen=True)
class ModelRecord:
    """The files of a model that its card is made from.

    Attributes:
        history: its conversion.json.
        config: its config.json.
    """

    history: History
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "ModelRecord":
        """Reads the files in a folder.

        Raises:
            UnreadableFileError: one of them is missing or malformed.
        """
        history = read_history(folder)
        if history is None:
            raise UnreadableFileError(
                f"{folder} has no conversion.json: it was not written by eomt-convert.",
                "Give the output folder of a conversion.",
            )
        path = folder / "config.json"
        config = read_config(path)
        size = config.get("image_size")
        sides = size if isinstance(size, list) and len(size) == 2 else [size]
        for name, right in {
            "image_size": all(type(side) is int for side in sides),
            "num_queries": type(config.get("num_queries")) is int,
            "id2label": isinstance(config.get("id2label"), dict),
        }.items():
            if not right:
                found = reprlib.repr(config.get(name))
                raise UnreadableFileError(
                    f"{name} in {path} is {found}, which is not a valid value.", "Convert again."
                )
        return cls(history, config)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The catalogue's entry that it was converted from, if any."""
        return self.history.checkpoint

    @property
    def verdict(self) -> Verdict:
        """The verdict on the model when it was converted.

        Raises:
            ValueError: the verdict in conversion.json claims more than its levels show.
        """
        return read_record(self.history.verdict, known_recordings())

    @property
    def derived(self) -> bool:
        """Whether the weights are derived from Meta's, and so are under the DINOv3 License.

        All are, except the offline checkpoints, which are known by the digests of their files.
        """
        digests = [
            file.sha256
            for source in self.history.sources.values()
            for name, file in source.files.items()
            if not name.endswith(".json")
        ]
        return is_derived(self.checkpoint, digests)

    @property
    def metric(self) -> Metric | None:
        """The published figure, if the model has the published weights."""
        entry = self.checkpoint
        delta = self.history.sources.get("delta")
        return entry.metric if entry and delta and find_named(delta.repo_id) == entry else None

    @property
    def backbone(self) -> str | None:
        """The backbone's repository: the one it came from, or Meta's with the same file."""
        source = self.history.sources.get("backbone")
        if source is None:
            return None
        if source.repo_id and is_repo_id(source.repo_id):
            return source.repo_id
        published = (published_repo(file.sha256) for file in source.files.values())
        return next(filter(None, published), None)

    @property
    def backbone_revision(self) -> str | None:
        """The commit of that repository, if the backbone came from it."""
        source = self.history.sources.get("backbone")
        return source.revision if source else None

    def card(self, repo_id: str, licence: str | None) -> "ModelCard":
        """The model's card; see `model_card`. The licence's text is not in it."""
        return model_card(repo_id, self)


def is_repo_id(text: str) -> bool:
    """Whether a text, which may come from any conversion.json, is a valid repository name."""
    try:
        check_repo_id(text)
    except UsageError:
        return False
    return True


def is_derived(checkpoint: Checkpoint | None, digests: Collection[str]) -> bool:
    """Whether weights are Meta's or made from them, decided by the SHA-256 of their files."""
    if checkpoint is None or not checkpoint.offline:
        return True
    known = read_json_object(fixtures() / checkpoint.name / "recorded.json")["sha256"].values()
    return not digests or not set(digests) <= set(known)


def model_card(repo_id: str, made: ModelRecord) -> "ModelCard":
    """Writes the card of a converted model.

    Args:
        repo_id: the repository that the card is for, owner/name.
        made: the model's files.
    """
    from huggingface_hub import ModelCard

    history, config = made.history, made.config
    height, width = _height_and_width(config["image_size"])
    text = template("model_card.md").render(
        card_data=Markdown(_card_data(repo_id, made).to_yaml()),
        title=repo_id.partition("/")[2],
        begin=Markdown(BEGIN),
        end=Markdown(END),
        repo_id=Markdown(repo_id),
        task=history.task or "universal",
        post_process=history.task or "panoptic",
        height=height,
        width=width,
        queries=config["num_queries"],
        classes=len(config["id2label"]),
        weights=history.weights,
        verdict=made.verdict,
        levels=[
            {"level": level.level, "status": level.status, "figures": _figures(level.figures)}
            for level in made.verdict.levels
        ],
        metric=made.metric,
        metric_source=Markdown(MODEL_ZOO),
        command=history.command,
        version=history.version,
        dtype=history.dtype,
        sources=_sources(history.sources),
        derived=made.derived,
        licence_file=Markdown(LICENCE_FILE),
        licence_link=Markdown(LICENCE_LINK),
        **_use(config, square=height == width),
    )
    return ModelCard(text)


@cache
def template(name: str) -> "Template":
    """A card's template, which escapes every text as prose, unless it is marked as Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701  # for Markdown, not for HTML
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, finalize=_finalised
    )
    environment.filters |= {"code": code, "fenced": fenced}
    return environment.get_template(name)


def _finalised(value: object) -> object:
    return prose(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def _card_data(repo_id: str, made: ModelRecord) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    metric, task = made.metric, made.history.task
    dataset = _HUB_DATASETS[metric.dataset] if metric else None
    optional: dict[str, Any] = {}
    if made.derived:
        optional |= {"license_name": "dinov3-license", "license_link": LICENCE_LINK}
    if made.backbone:
        optional |= {"base_model": made.backbone, "base_model_relation": "finetune"}
    if metric and dataset:
        result = EvalResult(
            task_type="image-segmentation",
            task_name=f"{task} segmentation",
            dataset_type=dataset,
            dataset_name=metric.dataset,
            metric_type=metric.name.lower().replace(" ", "_"),
            metric_name=metric.name,
            metric_value=metric.value,
            source_name="EoMT model zoo",
            source_url=MODEL_ZOO,
        )
        optional |= {
            "datasets": [dataset],
            "model_name": repo_id.partition("/")[2],
            "eval_results": [result],
        }
    return ModelCardData(
        library_name="transformers",
        license="other" if made.derived else "apache-2.0",
        pipeline_tag="image-segmentation",
        tags=["eomt", "dinov3", *([f"{task}-segmentation"] if task else [])],
        **optional,
    )


def _use(config: Mapping[str, Any], *, square: bool) -> dict[str, str]:
    """Which library runs the model correctly, and the reason if that is not transformers."""
    if not square:
        note = "transformers builds square models only, so this one runs in the reference model."
    elif config.get("use_gated_mlp"):
        note = (
            "transformers 5.23 applies the backbone's activation to the mask head as well, which "
            "makes the masks of models with a gated MLP wrong: use the reference model."
        )
    else:
        return {
            "library": "transformers",
            "transformers_note": "",
            "imports": _TRANSFORMERS_IMPORTS,
            "reference_imports": _REFERENCE_IMPORTS,
        }
    return {
        "library": "eomt-convert's reference model",
        "imports": _REFERENCE_IMPORTS,
        "reference_imports": "",
        "transformers_note": note,
    }


def _sources(sources: Mapping[Source, PastSource]) -> list[dict[str, str]]:
    return [
        {
            "role": role,
            "repo": code(source.repo_id) if source.repo_id else "a local file",
            "revision": source.revision or "",
            "file": name,
            "sha256": file.sha256,
        }
        for role, source in sources.items()
        for name, file in source.files.items()
    ]


def _figures(figures: Mapping[str, Any]) -> str:
    """Figures for the card's table: numbers, known words, and the first digits of digests."""
    shown = []
    for name, value in figures.items():
        if name == "not_checked" and value:
            shown.append("not everything (see not_checked in conversion.json)")
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            text = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        elif is_sha256(value):
            text = value[:12]
        elif value in _WORDS:
            text = value
        else:  # any other text, which a conversion.json from elsewhere may hold
            continue
        shown.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(shown)


def _height_and_width(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def updated(theirs: str, ours: "ModelCard") -> str:
    """A card from the Hub, with our marked part and our metadata updated.

    Args:
        theirs: the text of the card; if it has no marks, our part is added at its end.
        ours: the card as it would be in a new repository.

    Raises:
        EomtConvertError: one of the marks is missing, or the metadata is not YAML.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(theirs, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise EomtConvertError(
            f"The metadata of README.md on the Hub cannot be read: {error}.", "Correct it there."
        ) from error
    before = str(card.data)
    text = _with_part(card.text, _part(ours.text))
    _update(cast("ModelCardData", card.data), cast("ModelCardData", ours.data))
    if str(card.data) == before and text == card.text:
        return theirs
    card.text = text
    return str(card)


def _update(theirs: "ModelCardData", ours: "ModelCardData") -> None:
    """Sets our values, and keeps what people have added: list items, results, other keys."""
    for key in ("tags", "datasets"):
        mine = ours.get(key) or []
        added = theirs.get(key) or []
        both = list(dict.fromkeys([*mine, *([added] if isinstance(added, str) else added)]))
        if both:
            setattr(theirs, key, both)
    results: list[EvalResult] = list(ours.eval_results or [])
    results += [
        result
        for result in theirs.eval_results or []
        if not any(result.is_equal_except_value(mine) for mine in results)
    ]
    for key, value in ours.__dict__.items():
        if key not in ("tags", "datasets", "eval_results", "model_name") and value is not None:
            setattr(theirs, key, value)
    theirs.eval_results = results or None
    theirs.model_name = theirs.model_name or ours.model_name


def _part(text: str) -> str:
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def _with_part(text: str, part: str) -> str:
    begins, ends = text.count(BEGIN), text.count(END)
    if (begins, ends) == (0, 0):
        return f"{text.rstrip()}\n\n{part}\n" if text.strip() else f"{part}\n"
    if (begins, ends) != (1, 1) or text.index(END) < text.index(BEGIN):
        raise EomtConvertError(
            "README.md on the Hub must have both marks around eomt-convert's part, once and in "
            f"order; it has {begins} begin and {ends} end marks.",
            f"Correct it there: {BEGIN} before the part and {END} after it.",
        )
    return text[: text.index(BEGIN)] + part + text[text.index(END) + len(END) :]
