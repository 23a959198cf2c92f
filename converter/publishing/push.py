"""Pushes a converted folder to a model repository in one commit, and checks what arrived."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from converter.checks.verdict import Verdict
from converter.checks.verification import verify
from converter.configs import read_model_config
from converter.delta_record import DELTA
from converter.errors import (
    AccessError,
    EomtConvertError,
    NotVerifiedError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)
from converter.files import read_text, readable, user_path
from converter.history import HISTORY, REPORT
from converter.hub.access import (
    Access,
    Snapshot,
    check_repo_id,
    explained,
    not_found,
    without_secrets,
)
from converter.hub.downloads import download
from converter.hub.sources import fetch_first, listed_digests
from converter.job import Job
from converter.outside import visible
from converter.places import HubSource, LocalSource
from converter.publishing.card import LICENCE_FILE, ModelRecord, is_derived, updated
from converter.publishing.delta_card import DeltaFolder
from converter.publishing.remote import (
    MAIN,
    Change,
    Committed,
    Content,
    check_tag,
    commit,
    compare,
    is_there,
    read_remote,
    unchecked,
    wrong_files,
)
from converter.weights.backbones import published_repo

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_Value = TypeVar("_Value")

# the file names under which a repository may have the text of its licence
_LICENCE_NAMES = ("LICENSE.md", "LICENSE", "LICENSE.txt")


_LICENCE_NEEDED = "The weights are derived from DINOv3, whose licence must go with them"
_GIVE_IT = "Give its text with --license-file."

_MAX_TEXT = 1 << 24  # bytes of a licence or a card, which may have pictures in it


@dataclass(frozen=True)
class Publication:
    """A push that was carried out, or planned.

    Attributes:
        repo_id: owner/name.
        revision: the branch, or the reference of a pull request.
        commit: the commit that it is at now; None if nothing was sent.
        url: its page on the Hub.
        changes: what was, or would be, done with every file.
        private: whether only members see the repository.
        unchecked: names of files for which the Hub gives no digest.
        tag: the tag of the commit, if any.
        verdict: the verdict on the model after downloading it again; None if that was not asked
            for.
    """

    repo_id: str
    revision: str
    commit: str | None
    url: str
    changes: tuple[Change, ...]
    private: bool
    unchecked: tuple[str, ...] = ()
    tag: str | None = None
    verdict: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """The push as JSON shows it."""
        return {
            "repo": self.repo_id,
            "revision": self.revision,
            "commit": self.commit,
            "url": self.url,
            "changes": [asdict(change) for change in self.changes],
            "private": self.private,
            "unchecked": list(self.unchecked),
            "tag": self.tag,
            "remote": self.verdict.to_dict() if self.verdict else None,
        }


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    license_file: str | Path | None = None,
    allow_unverified: bool = False,
    verify_remote: bool = False,
    recorded: str | Path | None = None,
    dry_run: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    access: Access | None = None,
) -> Publication:
    """Brings a repository on the Hub to the state of a converted folder or a delta, in one commit.

    ``converter.publish("coco_panoptic_large_640", "me/eomt-large")`` sends the weights, the
    configuration, conversion.json, a model card and the licence, then checks what arrived. If the
    repository already has all of these, no commit is made.

    Args:
        folder: a folder that `convert` or `make_delta` has written.
        repo_id: owner/name; a repository that does not exist is created.
        revision: branch to commit to, by default main; one that does not exist is created.
        create_pr: whether to open a pull request to main instead.
        tag: name for the commit.
        commit_message: by default it names the checkpoint and this tool.
        private: whether only members may see the repository; by default a new one is private, and
            an existing one is not changed. It is made public last, when it is complete.
        license_file: text of DINOv3's licence; by default from the backbone's repository.
        allow_unverified: whether to push a model that is not proven right, because it is unverified
            or was only compared with the reference model.
        verify_remote: whether to download the model into a new folder and verify it.
        recorded: recorded outputs for that; by default those of the offline checkpoints.
        dry_run: whether to stop at the list of changes.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where the licence's download is kept; by default the Hub's cache.
        access: used instead of ``token`` and ``cache_dir`` by commands that have an `Access`.

    Raises:
        UnreadableFileError: the folder is not a converted model, or was changed since.
        NotVerifiedError: the model was not verified.
        UsageError: a licence is needed and was not given, or options contradict each other.
        AccessError: this login may not write to the repository.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        OutputsDifferError: what was downloaded again does not compute what was recorded.
        EomtConvertError: somebody else has committed in the meantime, another commit has the tag,
            or what arrived differs from what was sent.
    """
    from huggingface_hub import HfApi

    if create_pr and (revision or tag or private is False):
        raise UsageError(
            "--create-pr cannot be used with --revision, --tag or --public.",
            "A pull request goes to main; tag it, and make it public, when it is merged.",
        )
    folder = user_path(folder)
    made: ModelRecord | DeltaFolder
    if (folder / DELTA).is_file():
        made, files = _read_delta(folder, allow_unverified=allow_unverified)
        if verify_remote:
            raise UsageError(
                "--verify-remote is for models.", "Convert the published delta, and verify that."
            )
    else:
        made, files = _read(folder, allow_unverified=allow_unverified)
    access = (access or Access.of(token, cache_dir)).online
    check_login([repo_id], access)
    if licence := _licence(made, license_file, access):
        files[LICENCE_FILE] = licence

    api, branch = HfApi(token=access.token), revision or MAIN
    remote = _read_branch(api, repo_id, branch)
    files["README.md"] = _card(repo_id, made, licence, remote, access)
    report = folder / REPORT
    if report.is_file() and not is_there(files, remote):
        # its measured figures differ between machines: that alone is not a reason for a commit
        files[REPORT] = Content.of(report)
    changes = compare(files, remote)
    if tag and remote:
        check_tag(api, repo_id, tag, remote.commit if is_there(files, remote) else None, files)
    if dry_run:
        _check_may_write(api, repo_id, remote, access, create_pr=create_pr)
        hidden = private if private is not None else remote is None or remote.private
        url = without_secrets(f"{api.endpoint}/{repo_id}", access.token)
        return Publication(repo_id, branch, None, url, changes, hidden, tag=tag)

    parent = _prepare(api, repo_id, branch, remote, private=private)
    done = commit(
        api,
        repo_id,
        branch,
        parent,
        files,
        message=commit_message or _message(made),
        author=access.login(repo_id)["name"],
        create_pr=create_pr,
    )
    arrived = _read_back(api, repo_id, done, files, access)
    verdict = None
    if verify_remote and isinstance(made, ModelRecord):
        verdict = _verify_again(api, repo_id, done, files, made, recorded, access)
    with explained(repo_id):
        if tag and not check_tag(api, repo_id, tag, done.commit, files):
            api.create_tag(repo_id, tag=tag, revision=done.commit)
        if private is False and arrived.private:
            api.update_repo_settings(repo_id, private=False)
            arrived = read_remote(api, repo_id, done.commit) or arrived
    return Publication(
        repo_id,
        done.revision,
        done.commit,
        without_secrets(done.url or f"{api.endpoint}/{repo_id}/tree/{done.revision}", access.token),
        changes,
        arrived.private,
        unchecked(files, arrived),
        tag,
        verdict,
    )


def check_login(repo_ids: Sequence[str], access: Access) -> None:
    """Checks the login and the names of repositories, before work starts that is to be published.

    Raises:
        AccessError: nobody is logged in, or the token is invalid or may only read.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UsageError: one of the names is not valid for a repository.
    """
    for repo_id in repo_ids:
        if "/" not in repo_id:
            raise UsageError(
                f"{repo_id!r} has no owner.",
                f"Give owner/name, such as me/{repo_id}.",
            )
        check_repo_id(repo_id)
    token = (access.login(repo_ids[0]).get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise AccessError(
            f"The token in use may only read, but {repo_ids[0]} needs one that may write.",
            "Create one that may write at https://huggingface.co/settings/tokens.",
        )


def check_licence(job: Job, given: str | Path | None, access: Access) -> Path | None:
    """Finds the licence that must go with a model of Meta's weights, before the conversion.

    Args:
        job: what is to be converted.
        given: a file with the licence's text, which is preferred.
        access: how the Hub is reached.

    Returns:
        The file with its text; None if the weights need no copy of it.

    Raises:
        UsageError: it is needed, and its place is unknown.
        UnreadableFileError: a local source, or the given file, cannot be read.
        AccessError, HubUnavailableError: the backbone's repository cannot be reached.
    """
    if given:
        path = user_path(given)
        _licence_text(path)
        return path
    access, backbone = access.online, job.backbone
    if job.checkpoint and job.checkpoint.offline:
        sources = (job.delta, backbone)
        digests = [listed_digests(source, access) for source in sources if source]
        every = [one for each in digests for one in each]
        if all(digests) and not is_derived(job.checkpoint, every):
            return None
    if isinstance(backbone, LocalSource):
        published = map(published_repo, listed_digests(backbone, access))
        repo_id = next(filter(None, published), None)
        backbone = HubSource(repo_id) if repo_id else None
    if backbone is None:
        raise UsageError(f"{_LICENCE_NEEDED}; the backbone's repository is unknown.", _GIVE_IT)
    return _fetch_licence(backbone, access)


# what is published -----------------------------------------------------------------------------


def _read(folder: Path, *, allow_unverified: bool) -> tuple[ModelRecord, dict[str, Content]]:
    """Reads a folder, which must be unchanged since it was verified."""
    made = ModelRecord.read(folder)
    try:
        _check_verdict(made, folder, allow_unverified=allow_unverified)
    except ValueError as error:
        raise UnreadableFileError(
            f"The verdict in {folder / HISTORY} is not valid: {error}.", "Convert again."
        ) from error
    digests = {name: file.sha256 for name, file in made.history.files.items()}
    return made, _contents(folder, HISTORY, digests, "Convert again.")


def _read_delta(folder: Path, *, allow_unverified: bool) -> tuple[DeltaFolder, dict[str, Content]]:
    """Reads a delta, which must be unchanged since it was made."""
    made = DeltaFolder.read(folder)
    if made.verdict != "passed" and (made.verdict != "unverified" or not allow_unverified):
        raise NotVerifiedError(
            f"The model that {folder} gives was not run: the verdict is {made.verdict}.",
            "Make the delta without --no-verify, or push with --allow-unverified; the card will "
            "say so.",
        )
    if made.mismatch:
        raise NotVerifiedError(
            f"The delta in {folder} was made with --allow-mismatch: {made.mismatch}",
            "Make it with the backbone that the model was trained from.",
        )
    return made, _contents(folder, DELTA, made.files, "Make the delta again.")


def _contents(
    folder: Path, listing: str, digests: Mapping[str, str], remedy: str
) -> dict[str, Content]:
    """The file that lists others, and these, which must have the digests that it says."""
    files = {listing: Content.of(folder / listing)}
    for name, digest in digests.items():
        # the list may come from anywhere: no file outside the folder is ever sent
        if name != Path(name).name or not (folder / name).is_file():
            raise UnreadableFileError(
                f"{folder} has no file {name}, which {listing} lists.", remedy
            )
        files[name] = Content.of(folder / name)
        if files[name].sha256 != digest:
            raise UnreadableFileError(
                f"{folder / name} was changed since it was verified: its SHA-256 is not the one in "
                f"{listing}.",
                remedy,
            )
    return files


def _check_verdict(made: ModelRecord, folder: Path, *, allow_unverified: bool) -> None:
    verdict = made.verdict
    if verdict.verdict == "failed":
        raise NotVerifiedError(
            f"The verdict on {folder} is failed, so it is not published.", "Convert again."
        )
    if not verdict.proven and not allow_unverified:
        reason = f" {verdict.shortfall}" if verdict.basis or verdict.reason else ""
        raise NotVerifiedError(
            f"{folder} was not verified against the original.{reason}",
            "Convert with outputs recorded from the original (--recorded), or push with "
            "--allow-unverified; the model card will say so.",
        )


def _licence(
    made: "ModelRecord | DeltaFolder", given: str | Path | None, access: Access
) -> Content | None:
    """The text of the licence of the weights; None if they need no copy of it."""
    if given:
        return _licence_text(user_path(given))
    if not made.derived:
        return None
    if made.backbone is None:
        listing = HISTORY if isinstance(made, ModelRecord) else DELTA
        raise UsageError(
            f"{_LICENCE_NEEDED}; {listing} names no repository with a copy of it.", _GIVE_IT
        )
    revision = made.backbone_revision or MAIN
    return _licence_text(_fetch_licence(HubSource(made.backbone, revision), access))


def _fetch_licence(source: HubSource, access: Access) -> Path:
    """The text of DINOv3's licence in a backbone's repository.

    Raises:
        UsageError: it has none.
        AccessError, HubUnavailableError: it cannot be reached.
    """
    try:
        found = fetch_first(source, _LICENCE_NAMES, access)
    except AccessError as error:
        raise AccessError(
            f"{_LICENCE_NEEDED}. {error.message}", f"{error.remedy}\n{_GIVE_IT}"
        ) from error
    if found is None:
        raise UsageError(f"{_LICENCE_NEEDED}; {source.repo_id} has no copy of it.", _GIVE_IT)
    return found


def _licence_text(path: Path) -> Content:
    text = _read_text(path)
    if not text.strip():
        raise UnreadableFileError(f"{path} is empty.")
    return Content.of(text.encode())


def _read_text(path: Path, title: str | None = None) -> str:
    """A licence or a card; errors call it by its title, or else by its path.

    Raises:
        UnreadableFileError: it cannot be read, is larger than 16 MiB, or is not in UTF-8.
    """
    try:
        with readable(title or path):
            return read_text(path, _MAX_TEXT)
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{title or path} is not a text in UTF-8.") from error


def _card(
    repo_id: str,
    made: "ModelRecord | DeltaFolder",
    licence: Content | None,
    remote: Snapshot | None,
    access: Access,
) -> Content:
    text = licence.source.decode() if licence and isinstance(licence.source, bytes) else None
    card = made.card(repo_id, text)
    if remote is None or "README.md" not in remote.digests:
        return Content.of(str(card).encode())
    theirs = _read_fresh(
        remote, "README.md", access, partial(_read_text, title=f"README.md of {repo_id}")
    )
    return Content.of(updated(theirs, card).encode())


def _message(made: "ModelRecord | DeltaFolder") -> str:
    if isinstance(made, DeltaFolder):
        return f"Add a delta made with eomt-convert {visible(made.content['tool']['version'])}"
    subject = made.checkpoint.name if made.checkpoint else "a model"
    return f"Convert {subject} with eomt-convert {visible(made.history.version)}"


# the Hub ---------------------------------------------------------------------------------------


def _read_branch(api: "HfApi", repo_id: str, branch: str) -> Snapshot | None:
    """Reads a branch; one that does not exist will start from main."""
    main = read_remote(api, repo_id, MAIN)
    if main and main.moved_to:
        raise UsageError(f"{repo_id} was renamed to {main.moved_to}.", "Push to the new name.")
    if main is None or branch == MAIN:
        return main
    return read_remote(api, repo_id, branch) or main


def _prepare(
    api: "HfApi", repo_id: str, branch: str, remote: Snapshot | None, *, private: bool | None
) -> Snapshot:
    """Creates the repository and the branch if missing; returns the parent of the commit.

    The parent is the state from which the card was updated, so that no edit is lost.
    """
    if remote is None:
        with explained(repo_id):
            api.create_repo(repo_id, private=True, exist_ok=True)
        remote = read_remote(api, repo_id, MAIN)
        if remote is None:
            raise EomtConvertError(f"{repo_id} was created, but is not found.", "Run again.")
    with explained(repo_id):
        if private and not remote.private:
            api.update_repo_settings(repo_id, private=True)
        if branch != MAIN:
            api.create_branch(repo_id, branch=branch, revision=remote.commit, exist_ok=True)
    return remote


def _check_may_write(
    api: "HfApi", repo_id: str, remote: Snapshot | None, access: Access, *, create_pr: bool
) -> None:
    """Checks that this login may push to a repository, or create it where the Hub shows none.

    Raises:
        AccessError: it may not.
        HubUnavailableError: as `explained` tells.
    """
    if remote is None:
        login = access.login(repo_id)
        orgs = [org for org in login.get("orgs") or () if org.get("roleInOrg") != "read"]
        owners = [login["name"], *(org["name"] for org in orgs)]
        if repo_id.partition("/")[0].lower() not in map(str.lower, owners):
            raise not_found(repo_id)
    elif not create_pr:  # anybody may open a pull request
        with explained(repo_id):
            api.auth_check(repo_id, write=True)


def _read_back(
    api: "HfApi", repo_id: str, done: Committed, files: Mapping[str, Content], access: Access
) -> Snapshot:
    """Checks that the commit has the files that were sent, and that its config can be read."""
    remote = read_remote(api, repo_id, done.commit)
    if remote is None:
        raise EomtConvertError(
            f"The commit {done.commit} of {repo_id} was made, but is not found.", "Run again."
        )
    if wrong := wrong_files(files, remote):
        raise EomtConvertError(
            f"{repo_id} at {done.commit} differs from what was sent: {', '.join(wrong)}.",
            "Run again.",
        )
    if "config.json" in files:
        _read_fresh(remote, "config.json", access, read_model_config)
    return remote


def _read_fresh(
    remote: Snapshot, name: str, access: Access, read: Callable[[Path], _Value]
) -> _Value:
    """Downloads a file of a commit, without using the cache, and reads it."""
    with TemporaryDirectory() as cache:
        at_commit = replace(remote, revision=remote.commit)
        return read(download(at_commit, name, replace(access, cache_dir=Path(cache))))


def _verify_again(
    api: "HfApi",
    repo_id: str,
    done: Committed,
    files: Mapping[str, Content],
    made: ModelRecord,
    recorded: str | Path | None,
    access: Access,
) -> Verdict:
    """Downloads the model into a new folder, and verifies it."""
    with TemporaryDirectory() as folder:
        with explained(repo_id):
            api.snapshot_download(repo_id, revision=done.commit, local_dir=folder)
        damaged = [
            name
            for name, sent in files.items()
            if Content.of(Path(folder) / name).sha256 != sent.sha256
        ]
        if damaged:
            raise UnreadableFileError(
                f"{', '.join(damaged)} of {repo_id} arrived damaged when the model was downloaded "
                "again: the SHA-256 is not that of what was sent.",
                "Run again, over another connection or without a proxy.",
            )
        verdict = verify(folder, recorded=recorded, token=access.token, cache_dir=access.cache_dir)
    # The files are unchanged. A basis "published" needs the sources, which may not be in the cache,
    # so it may be lost here.
    as_before = verdict.proven or not made.verdict.proven or made.verdict.basis == "published"
    if verdict.verdict == "failed" or not as_before:
        raise OutputsDifferError(
            f"{repo_id}, downloaded again, is {verdict.verdict}: {verdict.reason}",
            f"Do not announce commit {done.commit}.",
            verdict,
        )
    return verdict
