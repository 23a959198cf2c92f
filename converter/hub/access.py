"""How the Hub is reached, and the messages for requests that fail."""

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
_STATUS_IN_XET_ERROR = re.compile(r"HTTP status \w+ error \((\d{3}) ([\w ]+)\)")

_MAX_SHOWN = 300  # characters of a server's message that are shown

# statuses of a server, or of a proxy in front of it, that is down for some time
_DOWN_STATUSES = (500, 502, 503, 504)

# copies of the gated backbones: the same weights in repositories that are not gated
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
    """A repository at one commit, as the Hub or the cache describes it.

    Attributes:
        repo_id: the name that was asked for.
        revision: the branch, tag or commit that was asked for.
        commit: the commit that this revision was at.
        digests: of its files, by name: SHA-256 of large files, git's blob ids of small ones, None
            if the Hub gives neither. From the cache, only files that are there.
        private: whether only members see the repository.
        moved_to: the repository's present name, if it is no longer ``repo_id``.
    """

    repo_id: str
    revision: str
    commit: str
    digests: Mapping[str, str | None]
    private: bool = False
    moved_to: str | None = None


@dataclass
class Answers:
    """The Hub's answers to one command, kept so that nothing is asked twice.

    Attributes:
        snapshots: repositories, by name and revision.
        asked_by_branch: names and revisions by which a file was fetched.
        login: who is logged in, as `HfApi.whoami` returns it; None before the first request.
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
        answers: the answers so far.
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
        """An access made from the parameters of a public function."""
        return cls(token, optional_path(cache_dir), local_files_only)

    @property
    def cache(self) -> Path:
        """The folder that downloads are kept in."""
        from huggingface_hub import constants

        return user_path(self.cache_dir or constants.HF_HUB_CACHE)

    @property
    def offline(self) -> bool:
        """Whether requests to the Hub are switched off."""
        from huggingface_hub import is_offline_mode

        return self.local_files_only or is_offline_mode()

    @property
    def online(self) -> "Access":
        """The same access, but with requests to the Hub: a push, for example, needs them."""
        return replace(self, local_files_only=False)

    def login(self, repo_id: str) -> dict[str, Any]:
        """Who is logged in, as `HfApi.whoami` returns it.

        Args:
            repo_id: the repository to name in errors.

        Raises:
            AccessError: nobody is logged in, or the token is no longer valid.
            HubUnavailableError: as in `explained`.
        """
        from huggingface_hub import HfApi

        if self.answers.login is None:
            with explained(repo_id):
                self.answers.login = HfApi(token=self.token).whoami()
        return self.answers.login


@contextmanager
def explained(repo_id: str, revision: str = "main") -> Iterator[None]:
    """Turns errors that huggingface_hub raises in this block into a sentence and a remedy.

    Raises:
        AccessError: the repository, revision or file does not exist, or this login may not see
            it. It is a NotFoundError if the Hub does not show the repository or the revision.
        HubUnavailableError: the Hub is down, cannot be reached, or asks to wait.
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
    """Checks that this is a valid name of a repository.

    Raises:
        UsageError: it breaks the Hub's rules.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but in no __all__
        validate_repo_id,
    )

    with explained(repo_id):
        validate_repo_id(repo_id)


def without_secrets(text: str, token: str | None = None) -> str:
    """Returns a text without tokens and passwords; applied to all that is printed or written.

    It removes the tokens in HF_TOKEN and in the login file, and the user and password in
    HF_ENDPOINT.

    Args:
        text: of any kind; an address keeps its host.
        token: another token to remove.
    """
    for login in _logins():
        text = text.replace(f"{login}@", "")
        password = login.partition(":")[2]
        basic = base64.b64encode(unquote(login).encode()).decode()
        # the client's error messages quote the part of an address that it cannot parse
        for secret in {login, basic, password, unquote(password), *re.split("[/?#]", password)}:
            if secret:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "[password]", text)
    tokens = {token, os.environ.get("HF_TOKEN")}
    if hub := sys.modules.get("huggingface_hub"):  # otherwise the login file was not read
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


def invalid_answer(repo: str, error: Exception | None = None) -> HubUnavailableError:
    """The error for an answer that cannot come from the Hub."""
    kind = f" ({type(error).__name__})" if error else ""
    return HubUnavailableError(
        f"The answer of {endpoint_name()} about {repo} is invalid{kind}.",
        "Run again. If this error stays, a proxy may be answering instead of the Hub.",
    )


def check_endpoint() -> None:
    """Checks that HF_ENDPOINT is an address, before huggingface_hub is imported.

    Raises:
        UsageError: it is not.
    """
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", "")).port  # noqa: B018  # parsed only when read
    except ValueError as error:
        raise UsageError(
            "HF_ENDPOINT is not a valid address.",
            "In a user name or a password, write %2F for /, %3F for ?, %23 for # and %40 for @.",
        ) from error


def endpoint_name() -> str:
    """The server that requests go to: the host in HF_ENDPOINT, without a password in it."""
    from huggingface_hub import constants

    return urlsplit(without_secrets(constants.ENDPOINT)).netloc or "the Hub"


def _explanation(error: Exception, repo: str, revision: str) -> Exception:
    """The error to raise instead; the error itself if the Hub did not cause it."""
    from huggingface_hub import errors

    match error:
        case errors.LocalTokenNotFoundError():
            return AccessError("Nobody is logged in to the Hub.", _sentence(LOG_IN))
        case errors.OfflineModeIsEnabled():
            return AccessError(
                f"{repo} cannot be reached: HF_HUB_OFFLINE is set.",
                "Unset HF_HUB_OFFLINE, and run again.",
            )
        case errors.GatedRepoError():
            return AccessError(
                f"{repo} is gated, and this login has no access to it.", _ask_for_access(repo)
            )
        case errors.DisabledRepoError():
            return AccessError(f"{repo} has been disabled on the Hub.")
        # for an expired token, the client says that the repository was not found
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
            return AccessError(f"{repo} at {revision} lacks a file: {_words(error)}")
        case errors.FileMetadataError():
            return invalid_answer(repo, error)
        case errors.HFValidationError():
            return UsageError(f"{repo!r} is not a valid name of a repository: {error}")
        case errors.HfHubHTTPError(response=response):
            return _by_status(
                response.status_code,
                repo,
                _words(error),
                wait=response.headers.get("Retry-After", ""),
                reading=response.request.method in ("GET", "HEAD")
                and not response.request.url.path.endswith("/auth-check/write"),
            )
        case ConnectionError() if status := _STATUS_IN_XET_ERROR.search(str(error)):
            return _by_status(int(status[1]), repo, status[2])
        # the client raises these if an upload fails, or a download that replaces a file
        case (
            RuntimeError(__cause__=Exception() as cause)
            | ValueError(__cause__=Exception() as cause)
        ) if _is_from_client(error):
            explanation = _explanation(cause, repo, revision)
            return _broken_off(error, repo) if explanation is cause else explanation
        case OSError() if error.errno and not isinstance(error, ConnectionError | TimeoutError):
            return OutputError(f"{error.filename or 'The cache'} cannot be used: {error.strerror}.")
        case OSError():
            return _broken_off(error, repo)
    # huggingface_hub lets errors of its HTTP library through, and has changed libraries before
    if type(error).__module__.startswith("http"):
        return HubUnavailableError(
            f"{endpoint_name()} could not be reached for {repo} ({type(error).__name__}).",
            "Check the connection and HF_ENDPOINT; --offline uses only the cache.",
        )
    if not _is_from_client(error):
        return error
    if isinstance(error, ValueError | KeyError | TypeError | AttributeError):
        return invalid_answer(repo, error)
    return _broken_off(error, repo)  # hf_xet has no classes for most of its errors


def _broken_off(error: Exception, repo: str) -> HubUnavailableError:
    words = _shown(str(error))
    return HubUnavailableError(
        f"The transfer with {repo} broke off ({type(error).__name__}{words and f': {words}'}).",
        "Run again: files that arrived completely are kept. --offline uses only the cache.",
    )


def _is_from_client(error: Exception) -> bool:
    """Whether an error was raised in huggingface_hub or in code that it called, not in ours.

    An error about the arguments of a call counts as ours, although the client raises it.
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
            "A fine-grained token needs the right to read that repository, and a separate one for "
            "gated repositories: https://huggingface.co/settings/tokens.",
        )
    if status == 403:
        return AccessError(
            f"This login has no permission to do this with {repo}.",
            "The token needs the right to write to it, and the account must be a member of "
            f"{repo.partition('/')[0]}.",
        )
    if status == 429:
        return HubUnavailableError(
            f"The Hub got too many requests from this machine, the last one for {repo}.",
            f"Run again in {wait} seconds." if wait.isdecimal() else "Run again in a few minutes.",
        )
    if status in _DOWN_STATUSES:
        return HubUnavailableError(
            f"{endpoint_name()} is down: status {status} for {repo}.",
            "Run again later; https://status.huggingface.co shows the state of the Hub.",
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
    """The error for a repository that the Hub does not show."""
    return NotFoundError(
        f"There is no repository {repo}, or it is private and this login may not see it.",
        f"Check the name; for a private repository, {LOG_IN}.",
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _words(error: "HfHubHTTPError") -> str:
    """The server's message about an error, without the address of the request."""
    return _shown((error.server_message or "").strip() or error.response.reason_phrase)


def _shown(text: str) -> str:
    """The first line of a text from outside, safe for a terminal: visible, and not too long."""
    from huggingface_hub import constants

    line = without_secrets(text.partition("\n")[0])
    line = line.replace(without_secrets(constants.ENDPOINT), endpoint_name())
    return visible(line, _MAX_SHOWN)


def _ask_for_access(repo: str) -> str:
    remedy = f"Ask for access at https://huggingface.co/{repo}, then {LOG_IN}."
    if open_repo := OPEN_BACKBONES.get(repo):
        remedy += (
            f"\nOr use timm's copy, which is not gated: --backbone {open_repo}. DINOv3's licence "
            "still applies to it and to the merged weights."
        )
    return remedy
