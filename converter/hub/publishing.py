"""From a converted folder to a model repository: one commit, and a look at what arrived."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converter.checks.verdict import Verdict
from converter.checks.verification import verify
from converter.configs import read_json_object, read_model_config
from converter.conversion import REPORT
from converter.errors import (
    AccessError,
    EomtConvertError,
    NotVerifiedError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)
from converter.hub.access import Access, explained
from converter.hub.card import LICENCE_FILE, ModelRecord, model_card, updated
from converter.hub.downloads import download
from converter.hub.remote import (
    MAIN,
    Change,
    Committed,
    Content,
    Remote,
    check_tag,
    commit,
    compare,
    find_pull_request,
    is_there,
    read_remote,
)
from converter.hub.sources import HubSource, fetch_first

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# under these names a repository may have the text of its licence
_LICENCE_NAMES = ("LICENSE.md", "LICENSE", "LICENSE.txt")


@dataclass(frozen=True)
class Publication:
    """A push that was carried out, or planned.

    Attributes:
        repo_id: owner/name.
        revision: the branch, or the reference of a pull request.
        commit: which it is at now; None if nothing was sent.
        url: where people see it.
        changes: what was, or would be, done about every file.
        private: whether only members see the repository.
        tag: which the commit was given, if any.
        verdict: on the model as it was downloaded again; None where that was not asked for.
    """

    repo_id: str
    revision: str
    commit: str | None
    url: str
    changes: tuple[Change, ...]
    private: bool
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
) -> Publication:
    """Brings a model repository on the Hub to the state of a converted folder, in one commit.

    ``converter.publish("coco_panoptic_large_640", "me/eomt-large")`` sends the weights, the
    configuration, conversion.json, a model card and the licence, then reads back what arrived.
    Where all of it is there already, no commit is made.

    Args:
        folder: which `convert` has written.
        repo_id: owner/name; a repository that does not exist is created.
        revision: branch to commit to, by default main; one that does not exist is created.
        create_pr: whether to open a pull request to main instead.
        tag: name for the commit.
        commit_message: by default it names the checkpoint and this tool.
        private: whether only members shall see the repository; by default, a new one is private
            and an old one stays as it is. It is made public last, when all is there.
        license_file: text of DINOv3's licence; by default from the backbone's repository.
        allow_unverified: whether a model is pushed that was not held against recorded outputs.
        verify_remote: whether to download the model into a fresh folder and verify that.
        recorded: recorded outputs for that; by default those of the offline checkpoints.
        dry_run: whether to stop at the list of changes.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where the licence's download is kept; by default the Hub's cache.

    Raises:
        UnreadableFileError: the folder is no converted model, or was changed since.
        NotVerifiedError: the model was not verified.
        UsageError: a licence is needed and was not given, or options contradict each other.
        AccessError: this login may not write there.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        OutputsDifferError: what was downloaded again does not compute what was recorded.
        EomtConvertError: somebody else has committed meanwhile, another commit has the tag, or
            what arrived is not what was sent.
    """
    from huggingface_hub import HfApi

    if create_pr and (revision or tag):
        raise UsageError(
            "--create-pr goes with neither --revision nor --tag.",
            "A pull request goes to main; tag the commit when it is merged.",
        )
    made, files = _read(Path(folder).expanduser(), allow_unverified=allow_unverified)
    access = Access(token, Path(cache_dir).expanduser() if cache_dir else None)
    if licence := _licence(made, license_file, access):
        files[LICENCE_FILE] = licence

    api, branch = HfApi(token=token), revision or MAIN
    if not dry_run:
        check_login([repo_id], token)
    remote = _read_branch(api, repo_id, branch)
    files["README.md"] = _card(repo_id, made, remote, token)
    report = Path(folder).expanduser() / REPORT
    if report.is_file() and not is_there(files, remote):
        # its figures were measured: that they are others elsewhere is no reason for a commit
        files[REPORT] = Content.of(report)
    changes = compare(files, remote)
    if tag and remote:
        check_tag(api, repo_id, tag, remote.commit if is_there(files, remote) else None, files)
    if dry_run:
        hidden = private if private is not None else remote is None or remote.private
        url = f"{api.endpoint}/{repo_id}"
        return Publication(repo_id, branch, None, url, changes, hidden, tag)

    parent = _prepare(api, repo_id, branch, remote, private=private)
    done = _commit(
        api, repo_id, branch, parent, files, commit_message or _message(made), create_pr=create_pr
    )
    _read_back(api, repo_id, done, files, token)
    verdict = None
    if verify_remote:
        verdict = _verify_again(api, repo_id, done, files, made, recorded, access)
    with explained(repo_id):
        if tag and not check_tag(api, repo_id, tag, done.commit, files):
            api.create_tag(repo_id, tag=tag, revision=done.commit)
        if private is False and parent.private:
            api.update_repo_settings(repo_id, private=False)
    return Publication(
        repo_id,
        done.revision,
        done.commit,
        done.url or f"{api.endpoint}/{repo_id}/tree/{done.revision}",
        changes,
        parent.private and private is not False,
        tag,
        verdict,
    )


def check_login(repo_ids: Sequence[str], token: str | None = None) -> None:
    """Checks that somebody is logged in, before work is done that is to be published.

    Raises:
        AccessError: nobody is, or the token is not valid any more.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UsageError: there can be no repository of one of these names.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but in no __all__
        validate_repo_id,
    )

    for repo_id in repo_ids:
        with explained(repo_id):
            validate_repo_id(repo_id)
    with explained(repo_ids[0]):
        HfApi(token=token).whoami()


# what is published -----------------------------------------------------------------------------


def _read(folder: Path, *, allow_unverified: bool) -> tuple[ModelRecord, dict[str, Content]]:
    """Reads a folder, which must be as it was when it was verified."""
    history_file = folder / "conversion.json"
    if not history_file.is_file():
        raise UnreadableFileError(
            f"{folder} has no conversion.json: it is no folder that eomt-convert wrote.",
            "Give the output of a conversion.",
        )
    history = read_json_object(history_file)
    try:
        expected = {name: str(entry["sha256"]) for name, entry in history["files"].items()}
        made = ModelRecord(history, read_json_object(folder / "config.json"))
        _check_verdict(made, folder, allow_unverified=allow_unverified)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableFileError(f"{history_file} lacks what it should hold: {error}.") from error
    files = {"conversion.json": Content.of(history_file)}
    for name, digest in expected.items():
        # conversion.json may come from anywhere: no file outside the folder is ever sent
        if name != Path(name).name or not (folder / name).is_file():
            raise UnreadableFileError(
                f"{folder} has no file {name}, of which conversion.json tells."
            )
        files[name] = Content.of(folder / name)
        if files[name].sha256 != digest:
            raise UnreadableFileError(
                f"{folder / name} is not what conversion.json tells: it was changed since it was "
                "verified.",
                "Convert again.",
            )
    return made, files


def _check_verdict(made: ModelRecord, folder: Path, *, allow_unverified: bool) -> None:
    if made.verdict == "unverified" and not allow_unverified:
        raise NotVerifiedError(
            f"{folder} was not verified: no recorded outputs were held against it.",
            "Convert with --recorded, or push with --allow-unverified; the model card will say so.",
        )
    if made.verdict not in ("passed", "unverified"):
        raise NotVerifiedError(f"{folder} is not right: its verdict is {made.verdict!r}.")


def _licence(made: ModelRecord, given: str | Path | None, access: Access) -> Content | None:
    """The text of the licence that the weights stand under; None where they need no copy of it."""
    if given:
        return _licence_text(Path(given).expanduser())
    if not made.derived:
        return None
    needed = "The weights are derived from DINOv3, whose licence must go with them"
    remedy = "Give its text with --license-file."
    if made.backbone is None:
        raise UsageError(f"{needed}; conversion.json names no repository to take it from.", remedy)
    revision = made.history["sources"]["backbone"]["revision"] or MAIN
    try:
        found = fetch_first(HubSource(made.backbone, revision), _LICENCE_NAMES, access)
    except AccessError as error:
        raise AccessError(f"{needed}. {error.message}", f"{error.remedy}\n{remedy}") from error
    if found is None:
        raise UsageError(f"{needed}; {made.backbone} has no copy of it.", remedy)
    return _licence_text(found)


def _licence_text(path: Path) -> Content:
    try:
        content = path.read_bytes()
        if not content.decode().strip():
            raise UnreadableFileError(f"{path} is empty.")
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is no text in UTF-8.") from error
    return Content.of(content)


def _card(repo_id: str, made: ModelRecord, remote: Remote | None, token: str | None) -> Content:
    card = model_card(repo_id, made)
    if remote is None or "README.md" not in remote.digests:
        return Content.of(str(card).encode())
    with TemporaryDirectory() as cache:
        path = download(repo_id, "README.md", remote.commit, Access(token, Path(cache)))
        theirs = path.read_bytes().decode()
    return Content.of(updated(theirs, card).encode())


def _message(made: ModelRecord) -> str:
    subject = made.checkpoint.name if made.checkpoint else "a model"
    return f"Convert {subject} with eomt-convert {made.history['tool']['version']}"


# the Hub ---------------------------------------------------------------------------------------


def _read_branch(api: "HfApi", repo_id: str, branch: str) -> Remote | None:
    """A branch; one that does not exist starts where main is."""
    main = read_remote(api, repo_id, MAIN)
    if main and main.repo_id != repo_id:
        raise UsageError(f"{repo_id} is called {main.repo_id} now.", "Push to that name.")
    if main is None or branch == MAIN:
        return main
    return read_remote(api, repo_id, branch) or main


def _prepare(
    api: "HfApi", repo_id: str, branch: str, remote: Remote | None, *, private: bool | None
) -> Remote:
    """Makes repository and branch where they are missing; returns what the commit goes on top of.

    That is the state which the card was brought up to date from, so that no edit is lost.
    """
    if remote is None:
        with explained(repo_id):
            api.create_repo(repo_id, private=True, exist_ok=True)
        remote = read_remote(api, repo_id, MAIN)
        if remote is None:
            raise EomtConvertError(f"{repo_id} was made, and is not there.", "Run again.")
    with explained(repo_id):
        if private and not remote.private:
            api.update_repo_settings(repo_id, private=True)
        if branch != MAIN:
            api.create_branch(repo_id, branch=branch, revision=remote.commit, exist_ok=True)
    return remote


def _commit(
    api: "HfApi",
    repo_id: str,
    branch: str,
    parent: Remote,
    files: Mapping[str, Content],
    message: str,
    *,
    create_pr: bool,
) -> Committed:
    if is_there(files, parent):
        return Committed(branch, parent.commit)
    if create_pr and (found := find_pull_request(api, repo_id, files)):
        return found
    return commit(api, repo_id, branch, parent, files, message=message, create_pr=create_pr)


def _read_back(
    api: "HfApi", repo_id: str, done: Committed, files: Mapping[str, Content], token: str | None
) -> None:
    """Checks that the commit has the files as they were sent, and that its config can be read."""
    remote = read_remote(api, repo_id, done.commit)
    wrong = [change.name for change in compare(files, remote) if change.action != "keep"]
    if wrong:
        raise EomtConvertError(
            f"{repo_id} at {done.commit} is not what was sent: {', '.join(wrong)}.", "Run again."
        )
    with TemporaryDirectory() as cache:
        access = Access(token, Path(cache))
        read_model_config(download(repo_id, "config.json", done.commit, access))


def _verify_again(
    api: "HfApi",
    repo_id: str,
    done: Committed,
    files: Mapping[str, Content],
    made: ModelRecord,
    recorded: str | Path | None,
    access: Access,
) -> Verdict:
    """Downloads the model into a fresh folder, and verifies what came."""
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
                "again: the Hub has other digests.",
                "Run again, over another connection or without a proxy.",
            )
        verdict = verify(folder, recorded=recorded, token=access.token, cache_dir=access.cache_dir)
    if verdict.verdict not in (made.verdict, "passed"):
        raise OutputsDifferError(
            f"{repo_id}, downloaded again, is {verdict.verdict}: {verdict.reason}",
            f"Do not announce commit {done.commit}.",
            verdict,
        )
    return verdict
