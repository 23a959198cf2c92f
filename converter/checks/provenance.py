"""Finds the files that a model was made from, and computes what its tensors should be."""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from converter.catalog import Checkpoint
from converter.configs import find_backbone_config
from converter.errors import AccessError, UnreadableFileError
from converter.history import History
from converter.hub.access import Access
from converter.hub.downloads import resolve
from converter.hub.sources import Fetched, fetch
from converter.places import HubSource, parse_source
from converter.weights.inspection import WeightsKind, decide, signs_of_a_delta
from converter.weights.layouts import EOMT_LIGHTLY, EOMT_TRANSFORMERS, recognise
from converter.weights.merge import CHUNK, Files, compute, read_operand, round_to
from converter.weights.plan import Plan, Row, Source, make_plan
from converter.weights.states import rename_to_layout
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile, damage, open_tensors
from reference_model.config import EomtDinov3Config

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array


@dataclass(frozen=True)
class Provenance:
    """The source files of a model.

    Attributes:
        files: the sources, open.
        plan: how each tensor is made from them.
    """

    files: Files
    plan: Plan

    @property
    def rows(self) -> dict[str, Row]:
        """The row of the plan for each tensor, by its name."""
        return {row.name: row for row in self.plan.rows}

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's little-endian bytes, computed from the sources."""
        import numpy as np

        buffer, addend = np.empty((2, CHUNK), np.float32)
        digests = {}
        for row in self.plan.rows:
            digest = hashlib.sha256()
            for start in range(0, row.size, CHUNK):
                stop = min(start + CHUNK, row.size)
                with np.errstate(over="ignore", invalid="ignore"):
                    values = compute(row, self.files, start, stop, buffer, addend)
                    digest.update(np.ascontiguousarray(round_to(values, row.dtype)).data)
            digests[row.name] = digest.hexdigest()
        return digests

    def damage(self) -> tuple[str, ...]:
        """A sentence for each file that has records with a wrong CRC-32."""
        wrong = {file.path: file.wrong_checksums() for file in self.files.values()}
        return tuple(damage(path, names) for path, names in wrong.items() if names)

    def tensor(self, name: str, *, rounded: bool = True) -> "Array":
        """A tensor computed from the sources, as float32.

        Args:
            name: the tensor's name.
            rounded: whether to round it to the model's dtype.
        """
        import numpy as np

        row = self.rows[name]
        buffer, addend = np.empty((2, row.size), np.float32)
        values = compute(row, self.files, 0, row.size, buffer, addend)
        if rounded:
            values = round_to(values, row.dtype)
            if row.dtype == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(row.shape)

    def operand(self, name: str, source: Source) -> "Array | None":
        """The values that one source gives for a tensor, float32; None if it gives none."""
        row = self.rows[name]
        for operand in row.operands:
            if operand.source == source:
                return read_operand(operand, row, self.files, 0, row.size).reshape(row.shape)
        return None


def is_published(checkpoint: Checkpoint | None, history: History | None, access: Access) -> bool:
    """Whether conversion.json names a checkpoint's published delta, at the commit of ``main``.

    Anybody can propose other weights in the same repository, so the commit matters. The commit of
    ``main`` is read from the cache, where the Hub's last answer is kept.
    """
    past = history.sources.get("delta") if history else None
    if checkpoint is None or past is None:
        return False
    if checkpoint.offline:  # its files come with the package, and are known by their digests
        return past.repo_id is None
    try:
        main = resolve(checkpoint.delta, "main", replace(access, local_files_only=True))
    except AccessError:
        return False
    return (past.repo_id, past.revision) == (checkpoint.delta, main.commit)


@dataclass(frozen=True)
class Given:
    """The sources that the user named: files, folders or repositories; None if not given."""

    delta: str | None = None
    backbone: str | None = None


def open_sources(
    given: Given,
    history: History | None,
    config: EomtDinov3Config,
    dtype: str,
    access: Access,
    stack: ExitStack,
) -> Provenance | str:
    """Finds the sources of a model, and plans how it is made from them.

    Sources that were not given are taken from the cache, at the revisions in conversion.json; those
    of an offline checkpoint come with the package.

    Args:
        given: the sources that the user named.
        history: the model's conversion.json, if there is one.
        config: the model's config.json; of the backbone, it is used only if the backbone has no
            config.json of its own.
        dtype: dtype of the model, as safetensors names it.
        access: how the Hub is reached for the given sources.
        stack: closes the files.

    Returns:
        The sources; or a sentence that says why they are missing.

    Raises:
        EomtConvertError: a given source cannot be fetched or read, or does not add up to a model.
    """
    try:
        eomt = _fetch(given.delta, "delta", history, access)
        file = open_tensors(eomt.weights)
        stack.enter_context(file)
        rename_to_layout(file, history.state_key if history else None)
        if _kind(file, given, history) == "absolute":
            blocks = config.num_blocks
            plan = make_plan(file.tensors, None, config, dtype=dtype, num_blocks=blocks)
            return Provenance({"weights": file}, plan)
        backbone = _fetch(given.backbone, "backbone", history, access)
        base = open_tensors(backbone.weights)
        stack.enter_context(base)
        beside = find_backbone_config(backbone.config)
        plan = make_plan(file.tensors, base.tensors, beside or config, dtype=dtype)
        return Provenance({"backbone": base, "delta": file}, plan)
    except _SourceMissingError as reason:
        return str(reason)


class _SourceMissingError(Exception):
    """Says why a source that was not given cannot be found."""


def _fetch(
    given: str | None,
    role: Literal["delta", "backbone"],
    history: History | None,
    access: Access,
) -> Fetched:
    if given:
        return fetch(parse_source(given), access)
    if history is None:
        raise _SourceMissingError(f"There is no conversion.json, and no --{role} was given.")
    past = history.sources.get("weights" if history.weights == "absolute" else role)
    if past and past.repo_id and past.revision:
        try:
            source = HubSource(past.repo_id, past.revision)
            return fetch(source, replace(access, local_files_only=True))
        except (AccessError, UnreadableFileError) as error:
            raise _SourceMissingError(f"{error.message} Fetch it again with --{role}.") from error
    if past and history.checkpoint and history.checkpoint.offline:
        found = fetch(history.checkpoint.source(role), access)
        with open_tensors(found.weights) as file:
            if file.digests().items() <= past.files.items():
                return found
    raise _SourceMissingError(
        f"conversion.json does not say where the {role} is: it was a local file. Give --{role}."
    )


def _kind(
    file: TensorFile | ShardedTensorFile, given: Given, history: History | None
) -> WeightsKind:
    if history and not given.delta:
        return history.weights
    if recognise(file.tensors) in (EOMT_TRANSFORMERS, EOMT_LIGHTLY):
        return "absolute"
    return decide(signs_of_a_delta(file)) or "delta"
