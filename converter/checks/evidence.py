"""What a model is held against."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converter.catalog import Checkpoint
from converter.checks.provenance import Provenance
from converter.history import History
from reference_model.config import Dinov3Config


@dataclass(frozen=True)
class Evidence:
    """What a model is held against.

    Attributes:
        recorded: its recorded.safetensors, if there is one.
        published: the catalogue's entry whose weights it has, if any.
        task: what it was converted to segment, where that is known.
        history: what its conversion.json says, if there is one.
        sources: the files it was made from; or, in a sentence, why they are not at hand.
        size_is_meant: whether the model is known to be meant for the size in its configuration.
        of_published: whether the sources are the published delta, as its repository's main branch
            has it, and a backbone.
        recipes: SHA-256 of every tensor as its recipe makes it; None without the sources.
        damage: in sentences, what speaks for damage to the sources without proving it.
        backbone_config: the backbone's config.json, if a backbone was given.
        run_backbone: whether the bare backbone is run too.
    """

    recorded: Path | None = None
    published: Checkpoint | None = None
    task: str | None = None
    history: History | None = None
    size_is_meant: bool = False
    sources: Provenance | str = "The sources are not at hand."
    of_published: bool = False
    recipes: Mapping[str, str] | None = None
    damage: tuple[str, ...] = ()
    backbone_config: Dinov3Config | None = None
    run_backbone: bool = False
