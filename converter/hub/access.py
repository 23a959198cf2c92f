"""How the Hub is reached, and what to say when it does not do what it was asked."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import (
    AccessError,
    EomtConvertError,
    HubUnavailableError,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

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
class Access:
    """How the Hub is reached; parameters as in every function of huggingface_hub.

    Attributes:
        token: overrides HF_TOKEN and the login file.
        cache_dir: overrides HF_HOME and HF_HUB_CACHE.
        local_files_only: whether only the cache is used.
    """

    token: str | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False

    @property
    def cache(self) -> Path:
        """The folder that downloads are kept in."""
        from huggingface_hub import constants

        return (self.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser()

    @property
    def offline(self) -> bool:
        """Whether the Hub is not to be asked."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


@contextmanager
def explained(repo_id: str, revision: str = "main") -> Iterator[None]:
    """Turns what huggingface_hub raises in this block into a sentence and a remedy.

    Raises:
        AccessError: the repository, revision or file is not there, or not for this login.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UsageError: the name of the repository breaks the Hub's rules.
    """
    try:
        yield
    except EomtConvertError:
        raise
    except Exception as error:
        raise _explanation(error, repo_id, revision) from error


def is_expired(error: Exception) -> bool:
    """Whether the Hub refused an expired token; huggingface_hub says that nothing was found."""
    return "is expired" in str(error)


def without_token(text: str, token: str | None = None) -> str:
    """A text without the token given, and without those of HF_TOKEN and the login file."""
    tokens = {token, os.environ.get("HF_TOKEN")}
    if "huggingface_hub" in sys.modules:  # else nobody has read the login file
        tokens.add(sys.modules["huggingface_hub"].get_token())
    for known in tokens:
        if known and (secret := known.strip()):
            for written in (secret, repr(secret)[1:-1]):
                text = text.replace(written, "[token]")
    return text


def _explanation(error: Exception, repo: str, revision: str) -> EomtConvertError:
    from huggingface_hub import constants, errors

    match error:
        case errors.LocalTokenNotFoundError():
            return AccessError("Nobody is logged in to the Hub.", f"{LOG_IN.capitalize()}.")
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
        case errors.RepositoryNotFoundError() if is_expired(error):
            return _token_refused(repo)
        case errors.RepositoryNotFoundError():
            return AccessError(
                f"There is no repository {repo}, or it is private and this login does not see it.",
                f"Check the name; for a private one, {LOG_IN}.",
            )
        case errors.RevisionNotFoundError():
            return AccessError(f"{repo} has no revision {revision!r}.")
        case errors.LocalEntryNotFoundError():
            return HubUnavailableError(
                f"{repo} at {revision} is not in the cache, and the Hub did not answer.",
                "Check the connection and HF_ENDPOINT.",
            )
        case errors.EntryNotFoundError():
            return AccessError(f"A file of {repo} at {revision} is not there: {_first_line(error)}")
        case errors.HFValidationError():
            return UsageError(f"{repo!r} is no valid name of a repository: {error}")
        case errors.HfHubHTTPError():
            return _by_status(error, repo)
        case RuntimeError(__cause__=Exception() as cause):  # how a failed upload is told
            return _explanation(cause, repo, revision)
        case OSError() if error.errno and not isinstance(error, ConnectionError | TimeoutError):
            return OutputError(f"{error.filename or 'The cache'} cannot be used: {error.strerror}.")
        case OSError():
            return HubUnavailableError(
                f"The transfer with {repo} broke off ({type(error).__name__}).",
                "Run again: what arrived is kept. --offline uses the cache alone.",
            )
    # huggingface_hub lets errors of its HTTP library through, and has changed that library
    if type(error).__module__.startswith("http"):
        return HubUnavailableError(
            f"The Hub at {constants.ENDPOINT} could not be reached for {repo} "
            f"({type(error).__name__}).",
            "Check the connection and HF_ENDPOINT; --offline uses the cache alone.",
        )
    if isinstance(error, ValueError | KeyError | TypeError):
        return HubUnavailableError(
            f"The Hub's answer about {repo} makes no sense ({type(error).__name__}).",
            "Run again; if it stays, a proxy may be answering in the Hub's place.",
        )
    raise error


def _by_status(error: "HfHubHTTPError", repo: str) -> EomtConvertError:
    status, headers = error.response.status_code, error.response.headers
    if status == 401:
        return _token_refused(repo)
    if status == 403:
        return AccessError(
            f"This login may not do that with {repo}.",
            "The token needs the right to write there, and the account to be a member of "
            f"{repo.partition('/')[0]}.",
        )
    if status == 429:
        wait = headers.get("Retry-After", "")
        return HubUnavailableError(
            f"The Hub has had too many requests from here, the last one for {repo}.",
            f"Run again in {wait} seconds." if wait.isdecimal() else "Run again in a few minutes.",
        )
    if status >= 500:
        return HubUnavailableError(
            f"The Hub is down: status {status} for {repo}.",
            "Run again later; https://status.huggingface.co tells how it is.",
        )
    return AccessError(f"The Hub refused {repo} with status {status}: {_first_line(error)}")


def _token_refused(repo: str) -> AccessError:
    return AccessError(
        f"The Hub does not accept the token for {repo}: it has expired, was revoked, or is "
        "mistyped.",
        f"Make a new one at https://huggingface.co/settings/tokens, then {LOG_IN}.",
    )


def _first_line(error: Exception) -> str:
    """The Hub's own words, where it has any, without the request that they answer."""
    said = getattr(error, "server_message", None) or str(error)
    return str(said).strip().partition("\n")[0]


def _ask_for_access(repo: str) -> str:
    remedy = f"Ask for access at https://huggingface.co/{repo}, then {LOG_IN}."
    if open_repo := OPEN_BACKBONES.get(repo):
        remedy += (
            f"\nOr take timm's copy, which is not gated: --backbone {open_repo}. DINOv3's licence "
            "holds for it and for the merged weights all the same."
        )
    return remedy
