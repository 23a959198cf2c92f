"""How the Hub is reached, and what to say when it does not do what it was asked."""

import base64
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from converter.errors import (
    AccessError,
    EomtConvertError,
    HubUnavailableError,
    NotFoundError,
    OutputError,
    UsageError,
)
from converter.files import optional_path, user_path
from converter.outside import visible

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

# such as: Request error: HTTP status client error (401 Unauthorized), domain: https://...
_STATUS_TOLD_BY_XET = re.compile(r"HTTP status \w+ error \((\d{3}) ([\w ]+)\)")

_LONGEST = 300  # characters of a server's words that are shown

# statuses of a server, or of what stands before it, that will answer later
_DOWN = (500, 502, 503, 504)

# the same weights in repositories that are not gated
OPEN_BACKBONES = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": "timm/vit_small_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": "timm/vit_small_plus_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "timm/vit_base_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "timm/vit_large_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitl16-pretrain-sat493m": "timm/vit_large_patch16_dinov3.sat493m",
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": "timm/vit_huge_plus_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": "timm/vit_7b_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vit7b16-pretrain-sat493m": "timm/vit_7b_patch16_dinov3.sat493m",
}


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, as the Hub or the cache tells of it.

    Attributes:
        repo_id: as it was asked for.
        revision: branch, tag or commit, as it was asked for.
        commit: which that was at.
        digests: of its files by name: SHA-256 of large files, git's blob ids of small ones, None
            where the Hub gives neither. In the cache, of the files that are there.
        private: whether only members see the repository.
        moved_to: the repository's name today, where it is not ``repo_id`` any more.
    """

    repo_id: str
    revision: str
    commit: str
    digests: Mapping[str, str | None]
    private: bool = False
    moved_to: str | None = None


@dataclass
class Answers:
    """What the Hub has answered to a command, so that it is asked but once.

    Attributes:
        snapshots: what repositories have, by name and revision.
        asked_by_branch: names and revisions that a file was fetched by.
        login: who is logged in, as `HfApi.whoami` tells; None before that was asked.
    """

    snapshots: dict[tuple[str, str], Snapshot] = field(default_factory=dict)
    asked_by_branch: set[tuple[str, str]] = field(default_factory=set)
    login: dict[str, Any] | None = None


@dataclass(frozen=True)
class Access:
    """How the Hub is reached in one command; parameters as in every function of huggingface_hub.

    Attributes:
        token: overrides HF_TOKEN and the login file.
        cache_dir: overrides HF_HOME and HF_HUB_CACHE.
        local_files_only: whether only the cache is used.
        answers: what was asked already.
    """

    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    local_files_only: bool = False
    answers: Answers = field(default_factory=Answers, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Access":
        """The access of a function's parameters."""
        return cls(token, optional_path(cache_dir), local_files_only)

    @property
    def cache(self) -> Path:
        """The folder that downloads are kept in."""
        from huggingface_hub import constants

        return user_path(self.cache_dir or constants.HF_HUB_CACHE)

    @property
    def offline(self) -> bool:
        """Whether the Hub is not to be asked."""
        from huggingface_hub import is_offline_mode

        return self.local_files_only or is_offline_mode()

    @property
    def online(self) -> "Access":
        """The same, for what the cache cannot do, such as a push."""
        return replace(self, local_files_only=False)

    def login(self, repo_id: str) -> dict[str, Any]:
        """Who is logged in, as `HfApi.whoami` tells.

        Args:
            repo_id: the repository that errors say this is for.

        Raises:
            AccessError: nobody is, or the token is not valid any more.
            HubUnavailableError: as `explained` tells.
        """
        from huggingface_hub import HfApi

        if self.answers.login is None:
            with explained(repo_id):
                self.answers.login = HfApi(token=self.token).whoami()
        return self.answers.login


@contextmanager
def explained(repo_id: str, revision: str = "main") -> Iterator[None]:
    """Turns what huggingface_hub raises in this block into a sentence and a remedy.

    Raises:
        AccessError: the repository, revision or file is not there, or not for this login; a
            NotFoundError where it is repository or revision that the Hub does not show.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UsageError: the name of the repository breaks the Hub's rules.
    """
    try:
        yield
    except EomtConvertError:
        raise
    except Exception as error:
        explanation = _explanation(error, repo_id, revision)
        if explanation is error:
            raise
        raise explanation from error


def check_repo_id(repo_id: str) -> None:
    """Checks that a repository may have this name.

    Raises:
        UsageError: it breaks the Hub's rules.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but in no __all__
        validate_repo_id,
    )

    with explained(repo_id):
        validate_repo_id(repo_id)


def without_secrets(text: str, token: str | None = None) -> str:
    """A text without tokens and passwords: what is printed, logged or written passes here.

    Args:
        text: of any kind; an address keeps its host.
        token: that was given, besides those of HF_TOKEN and the login file, and besides the user
            and password in the address of HF_ENDPOINT.
    """
    for login in _logins():
        text = text.replace(f"{login}@", "")
        password = login.partition(":")[2]
        basic = base64.b64encode(unquote(login).encode()).decode()
        # the client quotes a part of an address that it cannot read
        for secret in {login, basic, password, unquote(password), *re.split("[/?#]", password)}:
            if secret:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "[password]", text)
    tokens = {token, os.environ.get("HF_TOKEN")}
    if hub := sys.modules.get("huggingface_hub"):  # else nobody has read the login file
        tokens.add(hub.get_token())
    for known in tokens:
        if known and (secret := known.strip()):
            for written in (secret, repr(secret)[1:-1]):
                text = text.replace(written, "[token]")
    return text


def _logins() -> set[str]:
    """User and password, as in ``user:password``, in the address of the Hub."""
    addresses = {os.environ.get("HF_ENDPOINT", "")}
    if constants := sys.modules.get("huggingface_hub.constants"):
        addresses.add(constants.ENDPOINT)
    parts = (address.partition("//")[2].rpartition("@")[0] for address in addresses)
    return {login for login in parts if login}


def senseless_answer(repo: str, error: Exception | None = None) -> HubUnavailableError:
    """What to say of an answer that the Hub cannot have given."""
    said = f" ({type(error).__name__})" if error else ""
    return HubUnavailableError(
        f"The answer of {endpoint_name()} about {repo} makes no sense{said}.",
        "Run again; if it stays, a proxy may be answering in the Hub's place.",
    )


def check_endpoint() -> None:
    """Checks that HF_ENDPOINT is an address, before huggingface_hub is imported.

    Raises:
        UsageError: it is none.
    """
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", "")).port  # noqa: B018  # which is read here
    except ValueError as error:
        raise UsageError(
            "HF_ENDPOINT is no address.",
            "In a user's name or a password, write %2F for /, %3F for ?, %23 for # and %40 for @.",
        ) from error


def endpoint_name() -> str:
    """The server that is asked: the host of HF_ENDPOINT, without a password that stands there."""
    from huggingface_hub import constants

    return urlsplit(without_secrets(constants.ENDPOINT)).netloc or "the Hub"


def _explanation(error: Exception, repo: str, revision: str) -> Exception:
    """The sentence for an error; the error itself where it is none of the Hub's."""
    from huggingface_hub import errors

    match error:
        case errors.LocalTokenNotFoundError():
            return AccessError("Nobody is logged in to the Hub.", _sentence(LOG_IN))
        case errors.OfflineModeIsEnabled():
            return AccessError(
                f"{repo} cannot be reached: HF_HUB_OFFLINE is set.", "Unset it for this."
            )
        case errors.GatedRepoError():
            return AccessError(
                f"{repo} is gated, and this login has no access to it.", _ask_for_access(repo)
            )
        case errors.DisabledRepoError():
            return AccessError(f"{repo} has been disabled on the Hub.")
        # of an expired token, the client says that the repository was not found
        case errors.RepositoryNotFoundError() if "is expired" in str(error):
            return _token_refused(repo)
        case errors.RepositoryNotFoundError():
            return not_found(repo)
        case errors.RevisionNotFoundError():
            return NotFoundError(f"{repo} has no revision {revision!r}.")
        case errors.LocalEntryNotFoundError(__cause__=Exception() as cause):
            return _explanation(cause, repo, revision)
        case errors.LocalEntryNotFoundError():
            return HubUnavailableError(
                f"{repo} at {revision} is not in the cache, and the Hub did not answer.",
                "Check the connection and HF_ENDPOINT.",
            )
        case errors.RemoteEntryNotFoundError():
            return AccessError(f"A file of {repo} at {revision} is not there: {_words(error)}")
        case errors.FileMetadataError():
            return senseless_answer(repo, error)
        case errors.HFValidationError():
            return UsageError(f"{repo!r} is no valid name of a repository: {error}")
        case errors.HfHubHTTPError(response=response):
            return _by_status(
                response.status_code,
                repo,
                _words(error),
                wait=response.headers.get("Retry-After", ""),
                reading=response.request.method in ("GET", "HEAD")
                and not response.request.url.path.endswith("/auth-check/write"),
            )
        case ConnectionError() if told := _STATUS_TOLD_BY_XET.search(str(error)):
            return _by_status(int(told[1]), repo, told[2])
        # how the client tells of an upload, or of a download in a file's place, that failed
        case (
            RuntimeError(__cause__=Exception() as cause)
            | ValueError(__cause__=Exception() as cause)
        ) if _is_the_clients(error):
            explanation = _explanation(cause, repo, revision)
            return _broken_off(error, repo) if explanation is cause else explanation
        case OSError() if error.errno and not isinstance(error, ConnectionError | TimeoutError):
            return OutputError(f"{error.filename or 'The cache'} cannot be used: {error.strerror}.")
        case OSError():
            return _broken_off(error, repo)
    # huggingface_hub lets errors of its HTTP library through, and has changed that library
    if type(error).__module__.startswith("http"):
        return HubUnavailableError(
            f"{endpoint_name()} could not be reached for {repo} ({type(error).__name__}).",
            "Check the connection and HF_ENDPOINT; --offline uses the cache alone.",
        )
    if not _is_the_clients(error):
        return error
    if isinstance(error, ValueError | KeyError | TypeError | AttributeError):
        return senseless_answer(repo, error)
    return _broken_off(error, repo)  # hf_xet has no classes for most of its errors


def _broken_off(error: Exception, repo: str) -> HubUnavailableError:
    words = _shown(str(error))
    return HubUnavailableError(
        f"The transfer with {repo} broke off ({type(error).__name__}{words and f': {words}'}).",
        "Run again: files that arrived whole are kept. --offline uses the cache alone.",
    )


def _is_the_clients(error: Exception) -> bool:
    """Whether an error was raised in huggingface_hub or in what it called, not in our own code.

    A call with wrong arguments, which is refused where the client's functions check them, is ours.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    clients = any(module.partition(".")[0] == "huggingface_hub" for module in modules)
    return clients and modules[-1] != "huggingface_hub.utils._validators"


def _by_status(
    status: int, repo: str, words: str, *, wait: str = "", reading: bool = False
) -> EomtConvertError:
    if status == 401:
        return _token_refused(repo)
    if status == 403 and reading:
        return AccessError(
            f"This login may not read {repo}: {words}",
            "A fine-grained token needs the right to read that repository, gated ones apart: "
            "https://huggingface.co/settings/tokens.",
        )
    if status == 403:
        return AccessError(
            f"This login may not do that with {repo}.",
            "The token needs the right to write there, and the account to be a member of "
            f"{repo.partition('/')[0]}.",
        )
    if status == 429:
        return HubUnavailableError(
            f"The Hub has had too many requests from here, the last one for {repo}.",
            f"Run again in {wait} seconds." if wait.isdecimal() else "Run again in a few minutes.",
        )
    if status in _DOWN:
        return HubUnavailableError(
            f"{endpoint_name()} is down: status {status} for {repo}.",
            "Run again later; https://status.huggingface.co tells how the Hub is.",
        )
    refusal = f"{endpoint_name()} answered {status} for {repo}: {words}"
    return HubUnavailableError(refusal) if status >= 500 else AccessError(refusal)


def _token_refused(repo: str) -> AccessError:
    return AccessError(
        f"The Hub does not accept the token for {repo}: it has expired, was revoked, or is "
        "mistyped.",
        f"Make a new one at https://huggingface.co/settings/tokens, then {LOG_IN}.",
    )


def not_found(repo: str) -> NotFoundError:
    """What to say of a repository that the Hub does not show."""
    return NotFoundError(
        f"There is no repository {repo}, or it is private and this login does not see it.",
        f"Check the name; for a private one, {LOG_IN}.",
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _words(error: "HfHubHTTPError") -> str:
    """The server's own words on a refusal, without the address that was asked."""
    return _shown((error.server_message or "").strip() or error.response.reason_phrase)


def _shown(text: str) -> str:
    """The first line of a text from outside, fit for a terminal: visible, and not too long."""
    from huggingface_hub import constants

    line = without_secrets(text.partition("\n")[0])
    line = line.replace(without_secrets(constants.ENDPOINT), endpoint_name())
    return visible(line, _LONGEST)


def _ask_for_access(repo: str) -> str:
    remedy = f"Ask for access at https://huggingface.co/{repo}, then {LOG_IN}."
    if open_repo := OPEN_BACKBONES.get(repo):
        remedy += (
            f"\nOr take timm's copy, which is not gated: --backbone {open_repo}. DINOv3's licence "
            "holds for it and for the merged weights all the same."
        )
    return remedy
