"""The card of a delta: what it belongs to, how it becomes a model, and what was checked."""

import re
import reprlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.catalog import CATALOG, fixtures
from converter.delta_record import DELTA
from converter.errors import UnreadableFileError
from converter.files import read_json_object
from converter.outside import Markdown, code
from converter.publishing.card import BEGIN, END, LICENCE_FILE, LICENCE_LINK, is_repo_id, template
from converter.weights.backbones import published_repo

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

# the numbers in a card are smaller
_LARGEST = 1e15

# the longest quotation of a licence in a card, in characters
_MAX_QUOTED = 6000


@dataclass(frozen=True)
class DeltaFolder:
    """What a delta's folder says of it.

    Attributes:
        folder: where it is.
        content: of its delta.json, with the parts that the card shows.
    """

    folder: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "DeltaFolder":
        """Reads a delta's folder.

        Raises:
            UnreadableFileError: delta.json does not have the form that make-delta writes.
        """
        path = folder / DELTA
        content = read_json_object(path)
        for keys, kind in _NEEDED.items():
            value: Any = content
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if type(value) not in kind or (
                isinstance(value, int | float) and not 0 <= value < 1e15
            ):
                raise UnreadableFileError(
                    f"{'.'.join(keys)} in {path} is {reprlib.repr(value)}, which is not valid.",
                    "Make the delta again.",
                )
        for name, entry in content["files"].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
                raise UnreadableFileError(f"{path} has no SHA-256 of {name}.")
        return cls(folder, content)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of the delta's files, by name."""
        return {name: entry["sha256"] for name, entry in self.content["files"].items()}

    @property
    def verdict(self) -> str:
        """The verdict on the way back to the model."""
        verdict: str = self.content["round_trip"]["verdict"]
        return verdict

    @property
    def mismatch(self) -> str:
        """What failed of the checks whether it belongs to the backbone; empty if none did."""
        failed = (each for each in self.content["pair"] if isinstance(each, dict))
        return next((str(c.get("finding")) for c in failed if c.get("status") == "failed"), "")

    @property
    def _backbone(self) -> Mapping[str, Any]:
        backbone: Mapping[str, Any] = self.content["sources"]["backbone"]
        return backbone

    @property
    def _digests(self) -> list[str]:
        """SHA-256 of the backbone's files of weights."""
        files = self._backbone["files"]
        return [str(entry["sha256"]) for entry in files.values() if isinstance(entry, dict)]

    @property
    def derived(self) -> bool:
        """Whether it is derived from Meta's weights: all are, but those of offline checkpoints."""
        known = {
            digest
            for entry in CATALOG
            if entry.offline
            for digest in read_json_object(fixtures() / entry.name / "recorded.json")[
                "sha256"
            ].values()
        }
        return not self._digests or not known.issuperset(self._digests)

    @property
    def backbone(self) -> str | None:
        """The backbone's repository: the one it came from, or Meta's with the same file."""
        repo = self._backbone.get("repo")
        if isinstance(repo, str) and is_repo_id(repo):
            return repo
        return next(filter(None, map(published_repo, self._digests)), None)

    @property
    def backbone_revision(self) -> str | None:
        """The commit of that repository, if the backbone came from it."""
        revision = self._backbone.get("revision")
        return revision if isinstance(revision, str) else None

    def command(self, delta: str) -> str:
        """The command that makes the model.

        Args:
            delta: the delta's repository.
        """
        backbone = self.backbone or "BACKBONE"
        if self.backbone and self.backbone_revision:
            backbone = f"{backbone}@{self.backbone_revision}"
        words = ["eomt-convert", "--delta", delta, "--backbone", backbone, "--output", "model"]
        return shlex.join(words)

    def card(self, repo_id: str, licence: str | None) -> "ModelCard":
        """The card.

        Args:
            repo_id: the repository that it is for, owner/name.
            licence: the text of the backbone's licence, if it goes with the delta.
        """
        from huggingface_hub import ModelCard

        trip = self.content["round_trip"]
        text = template("delta_card.md").render(
            card_data=Markdown(self._card_data().to_yaml()),
            title=repo_id.partition("/")[2],
            begin=Markdown(BEGIN),
            end=Markdown(END),
            backbone=self.backbone,
            revision=self.backbone_revision or "",
            digests=[
                {"file": name, "sha256": str(entry["sha256"])}
                for name, entry in self._backbone["files"].items()
                if isinstance(entry, dict)
            ],
            task=self.content.get("task") or "universal",
            command=self.command(repo_id),
            described=all(self.content.get(key) for key in ("classes", "task", "image_size")),
            elements=f"{trip['elements']:,}",
            inexact=f"{trip['inexact']:,}",
            max_abs=f"{trip['max_abs']:.2g}",
            logits=_logits(trip),
            verdict=self.verdict,
            version=self.content["tool"]["version"],
            derived=self.derived,
            licence_file=Markdown(LICENCE_FILE),
            licence_link=Markdown(LICENCE_LINK),
            quoted=[Markdown(code_lines) for code_lines in _quoted(licence or "")],
        )
        return ModelCard(text)

    def _card_data(self) -> Any:
        from huggingface_hub import ModelCardData

        optional: dict[str, Any] = {}
        if self.derived:
            optional |= {"license_name": "dinov3-license", "license_link": LICENCE_LINK}
        if self.backbone:
            optional |= {"base_model": self.backbone, "base_model_relation": "finetune"}
        return ModelCardData(
            license="other" if self.derived else "apache-2.0",
            pipeline_tag="image-segmentation",
            tags=["eomt", "dinov3", "delta-weights"],
            **optional,
        )


# the parts of delta.json that a card shows, and their types
_NEEDED: Mapping[tuple[str, ...], tuple[type, ...]] = {
    ("files",): (dict,),
    ("tool", "version"): (str,),
    ("sources", "backbone", "files"): (dict,),
    ("pair",): (list,),
    ("round_trip", "verdict"): (str,),
    ("round_trip", "elements"): (int,),
    ("round_trip", "inexact"): (int,),
    ("round_trip", "max_abs"): (int, float),
    ("round_trip", "levels"): (list,),
}


def _logits(trip: Mapping[str, Any]) -> str:
    """The largest difference of logits; empty if the model was not run."""
    for level in trip["levels"]:
        if isinstance(level, dict) and level.get("level") == "numbers":
            figures = level.get("figures")
            found = figures.get("max_abs") if isinstance(figures, dict) else None
            if level.get("status") == "passed" and type(found) is float and 0 <= found < _LARGEST:
                return f"{found:.2g}"
    return ""


def _quoted(licence: str) -> list[str]:
    """The paragraphs of a licence that speak of derivatives, each as a quotation of Markdown."""
    blank_line = r"\r?\n[ \t]*\r?\n"
    paragraphs = (" ".join(part.split()) for part in re.split(blank_line, licence))
    found = [each for each in paragraphs if "derivative" in each.lower()]
    if sum(map(len, found)) > _MAX_QUOTED:
        return []  # the card then says where the text is, and nothing of what is in it
    return [f"> {code(paragraph)}" for paragraph in found]
