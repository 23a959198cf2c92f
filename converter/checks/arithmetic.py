"""Checks that every tensor of a model has the value that its recipe gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checks.evidence import Evidence
from converter.checks.provenance import Provenance
from converter.checks.structure import StoredModel
from converter.checks.verdict import Level
from converter.configs import CONFIGS
from converter.files import sha256
from converter.history import History

if TYPE_CHECKING:
    from torch import Tensor


def check_arithmetic(found: StoredModel, evidence: Evidence) -> Level:
    """Compares the digests of a model's tensors with its sources and its conversion.json."""
    history, recipes = evidence.history, evidence.recipes
    if recipes is None and history is None:
        return Level("arithmetic", "not checked", str(evidence.sources))
    references = [digests for digests in (recipes, history and history.tensors) if digests]
    names = sorted({*found.digests, *(name for digests in references for name in digests)})
    different = [
        name
        for name in names
        if any(found.digests.get(name) != digests.get(name) for digests in references)
    ]
    files = changed_files(found.folder, history) if history else []
    figures = {
        "tensors": len(names),
        "against": "sources" if recipes is not None else "conversion.json",
        "of_published": recipes is not None and evidence.of_published,
        "different": different,
        "different_files": files,
        "sources": {
            role: {"repo": source.repo_id, "revision": source.revision}
            for role, source in (history.sources if history else {}).items()
        },
    }
    if different:
        expected = "what conversion.json says"
        if recipes is not None and found.digests.get(different[0]) != recipes.get(different[0]):
            expected = f"what its sources give: {_recipe(different[0], evidence)}"
        more = f" {len(different) - 1} more tensors are wrong." if len(different) > 1 else ""
        reason = f"{different[0]} is not {expected}.{more}"
        return Level("arithmetic", "failed", reason, figures)
    if files:
        reason = f"{files[0]} was changed: its SHA-256 is not the one in conversion.json."
        return Level("arithmetic", "failed", reason, figures)
    return Level("arithmetic", "passed", " ".join(evidence.damage), figures)


def _recipe(name: str, evidence: Evidence) -> str:
    rows = evidence.sources.rows if isinstance(evidence.sources, Provenance) else {}
    return rows[name].recipe if name in rows else "nothing"


def changed_files(folder: Path, history: History) -> list[str]:
    """Names of the configuration files that were changed since the conversion."""
    return [
        name
        for name in CONFIGS
        if name in history.files and sha256(folder / name) != history.files[name].sha256
    ]


def sums_before_rounding(
    found: StoredModel, evidence: Evidence, arithmetic: Level
) -> "Mapping[str, Tensor] | None":
    """The weights before rounding, if the model's weights are proven to be these, rounded."""
    import torch

    figures, sources = arithmetic.figures, evidence.sources
    if not isinstance(sources, Provenance) or figures.get("against") != "sources":
        return None
    if figures["different"]:
        return None
    return {name: torch.from_numpy(sources.tensor(name, rounded=False)) for name in found.tensors}
