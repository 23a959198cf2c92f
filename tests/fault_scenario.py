"""A conversion and its push with one of their requests broken, and the same command once more.

Everything that such a run does with the Hub is in it: delta and gated backbone are downloaded, the
licence is fetched, the release is uploaded, committed, read back, downloaded again and tagged.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner
from hub_faults import Fault, LoggedRequest, MovedParent
from hub_server import (
    Hub,
    choose_transfer,
    point_client_at,
    running_hub,
    shorten_client_waits,
)
from safetensors.numpy import load_file, save

from converter.cli import main

SOURCE = Path(__file__).parent.parent / "fixtures" / "tiny_panoptic_64"
DELTA = "tue-mps/coco_panoptic_eomt_small_640_dinov3"
BACKBONE = "facebook/dinov3-vits16-pretrain-lvd1689m"
MODEL = "me/model"
TOKEN = "hf_secret_of_me"  # noqa: S105

INITIAL = "initial commit"  # the Hub's own, with nothing but .gitattributes
NOT_OURS = {".gitattributes", MovedParent().path}


@dataclass(frozen=True)
class Target:
    """A request of an undisturbed run: the ``nth`` of this method and path, counted from 0.

    Its position among all requests would not identify it: several threads send some of them.
    """

    method: str
    path: str
    nth: int

    def __str__(self) -> str:
        return f"{self.method} {self.path} ({self.nth})"


@dataclass(frozen=True)
class Release:
    """An undisturbed run: what it asks of the Hub, and the files it leaves there.

    Attributes:
        transfer: how large files move, a name of hub_client.TRANSFERS.
        requests: in the order in which they came.
        files: of the release, by name.
    """

    transfer: str
    requests: tuple[Target, ...]
    files: Mapping[str, bytes]

    def find(self, method: str, path: str, nth: int = 0) -> Target:
        """The ``nth`` request whose path has this in it."""
        found = [each for each in self.requests if each.method == method and path in each.path]
        return found[nth]


@dataclass(frozen=True)
class Run:
    """How a run of the command ended, and what it printed, the client's log included."""

    exit_code: int
    output: str

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run with a broken request.

    Attributes:
        run: the one with the broken request.
        problems: what is not as it must be, then and after the same command again.
    """

    run: Run
    problems: tuple[str, ...]


@cache
def undisturbed(transfer: str) -> Release:
    with stage(transfer) as (hub, folder):
        run = push(folder)
        assert run.succeeded, run.output
        files = release_files(hub, "refs/tags/v1")
        return Release(transfer, tuple(targets(hub.requests)), files)


def outcome(fault: Fault, target: Target, release: Release) -> Outcome | None:
    """Breaks a request of a run, and runs once more unbroken; None if the fault did nothing."""
    with stage(release.transfer) as (hub, folder):
        path = f"^{re.escape(target.path)}$"
        hub.break_request(fault, target.nth, method=target.method, path=path)
        first = push(folder)
        if not hub.broken:
            return None
        problems = [*wrong_ending(first), *wrong_state(hub, release)]
        if first.succeeded:
            problems += wrong_release(hub, release)
        hub.mend()
        again = push(folder)
        if not again.succeeded:
            problems.append(f"The rerun ended with {again.exit_code}: {again.output}")
        problems += [*wrong_state(hub, release), *wrong_release(hub, release)]
        if TOKEN in first.output + again.output:
            problems.append("The token was printed.")
        written = [path for path in (folder / "model").rglob("*") if path.is_file()]
        if any(TOKEN.encode() in path.read_bytes() for path in written):
            problems.append("The token was written into the model.")
        return Outcome(first, tuple(problems))


# the run ---------------------------------------------------------------------------------------


@contextmanager
def stage(transfer: str) -> Iterator[tuple[Hub, Path]]:
    """A Hub with the files to convert, a client that uses it with an empty cache, and a folder."""
    with (
        pytest.MonkeyPatch.context() as patch,
        TemporaryDirectory() as temporary,
        running_hub() as hub,
    ):
        folder = Path(temporary)
        choose_transfer(hub, transfer)
        point_client_at(patch, hub, folder / "home", TOKEN)
        shorten_client_waits(patch)
        hub.add_user("me", TOKEN)
        hub.create_repo(DELTA, {"pytorch_model.bin": SOURCE / "delta" / "pytorch_model.bin"})
        backbone: dict[str, bytes | Path] = {
            "config.json": SOURCE / "backbone" / "config.json",
            "model.safetensors": backbone_weights(),
            "LICENSE.md": b"DINOv3 License\n",
        }
        hub.create_repo(BACKBONE, backbone, gated=True)
        hub.grant_access(BACKBONE, "me")
        for repo_id in (DELTA, BACKBONE):
            hub.tag(repo_id, "v1")
        yield hub, folder


@cache
def backbone_weights() -> bytes:
    """The offline checkpoint's backbone in another file, so that it counts as Meta's.

    A model of the offline files themselves would need no licence.
    """
    return save(load_file(SOURCE / "backbone" / "model.safetensors"), {"format": "np"})


def push(folder: Path) -> Run:
    """What a user runs, and all that the user sees of it.

    The sources are named by tags: on a branch, somebody else's commit would be another input.
    """
    arguments = [
        *("--checkpoint", "tiny_panoptic_64", "--output", str(folder / "model")),
        *("--delta", f"{DELTA}@v1", "--backbone", f"{BACKBONE}@v1"),
        *("--push-to", MODEL, "--tag", "v1", "--verify-remote"),
    ]
    client = logging.getLogger("huggingface_hub")
    with pytest.MonkeyPatch.context() as patch:
        log = StringIO()
        patch.setattr(client, "handlers", [logging.StreamHandler(log)])
        result = CliRunner().invoke(main, arguments)
    return Run(result.exit_code, log.getvalue() + result.output)


def targets(requests: list[LoggedRequest]) -> Iterator[Target]:
    seen: list[tuple[str, str]] = []
    for request in requests:
        key = request.method, request.path
        yield Target(*key, nth=seen.count(key))
        seen.append(key)


# what must hold --------------------------------------------------------------------------------


def wrong_ending(run: Run) -> Iterator[str]:
    """A run succeeds, or ends with an error of ours."""
    clear = run.succeeded or re.search("^Error: .", run.output, re.MULTILINE)
    ours = "Traceback" in run.output or "bug in eomt-convert" in run.output
    if run.exit_code not in (0, 1, 3, 4) or not clear or ours:
        yield f"The run ended with {run.exit_code}: {run.output}"


def wrong_state(hub: Hub, release: Release) -> Iterator[str]:
    """Every commit, on whatever branch or tag, has the whole release or nothing of it."""
    for ref in hub.refs(MODEL) if MODEL in hub.repo_ids else ():
        for commit in hub.commits(MODEL, ref):
            files = release_files(hub, commit.sha)
            if files and files != release.files:
                yield f"{commit.title!r} in {ref} is half a release: {', '.join(sorted(files))}."
        if ref.startswith("refs/tags/") and not release_files(hub, ref):
            yield f"{ref} is on a commit without a release."


def wrong_release(hub: Hub, release: Release) -> Iterator[str]:
    """The branch has the release, from one commit of ours, which has the tag."""
    if MODEL not in hub.repo_ids:
        yield f"There is no {MODEL}."
        return
    if release_files(hub, "main") != release.files:
        yield "main has not the release."
    ours = [commit.sha for commit in hub.commits(MODEL) if is_ours(commit.author, commit.title)]
    if len(ours) != 1:
        yield f"There are {len(ours)} commits of ours."
    if hub.refs(MODEL).keys() != {"refs/heads/main", "refs/tags/v1"}:
        yield f"There are {', '.join(hub.refs(MODEL))}."
    elif hub.refs(MODEL)["refs/tags/v1"] not in ours:
        yield "The tag is not on the commit of ours."
    if not hub.private(MODEL):
        yield "The repository is public."


def release_files(hub: Hub, revision: str) -> dict[str, bytes]:
    """The files of a revision, without the Hub's own file and somebody else's."""
    files = hub.files(MODEL, revision)
    return {name: content for name, content in files.items() if name not in NOT_OURS}


def is_ours(author: str, title: str) -> bool:
    return author == "me" and title != INITIAL
