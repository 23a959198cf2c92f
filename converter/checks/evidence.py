"""The evidence that a model is checked against."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converter.catalog import Checkpoint
from converter.checks.provenance import Provenance
from converter.history import History
from reference_model.config import Dinov3Config


@dataclass(frozen=True)
class Evidence:
    """The evidence that a model is checked against.

    Attributes:
        recorded: the recorded.safetensors of the model, if there is one.
        published: the catalogue's entry that has the same weights, if any.
        task: the task that the model was converted for, if known.
        history: the content of the model's conversion.json, if there is one.
        sources: the files that the model was made from; or a sentence that says why they are
            missing.
        size_is_meant: whether the image size in the model's configuration is known to be intended.
        of_published: whether the sources are a backbone and the published delta, as it is on the
            main branch of its repository.
        recipes: SHA-256 of every tensor, computed from the sources; None without the sources.
        damage: sentences about signs of damage to the sources that do not prove it.
        backbone_config: the backbone's config.json, if a backbone was given.
        run_backbone: whether the bare backbone is run too.
    """

    recorded: Path | None = None
    published: Checkpoint | None = None
    task: str | None = None
    history: History | None = None
    size_is_meant: bool = False
    sources: Provenance | str = "The sources are missing."
    of_published: bool = False
    recipes: Mapping[str, str] | None = None
    damage: tuple[str, ...] = ()
    backbone_config: Dinov3Config | None = None
    run_backbone: bool = False
