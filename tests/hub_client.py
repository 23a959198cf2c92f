"""Makes the real client use a loopback Hub, in this process or in a child."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import hub_xet
import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import huggingface_hub.utils._xet

if TYPE_CHECKING:
    import pytest
    from hub_repos import Hub

# The ways in which large files move: settings of the client.
TRANSFERS: dict[str, dict[str, str]] = {
    "xet": {},
    "xet-unshared": {"HF_HUB_DISABLE_SHARED_BLOBS": "1"},
    "xet-off": {"HF_HUB_DISABLE_XET": "1"},
    "lfs": {"HF_HUB_DISABLE_XET": "1"},  # from a Hub that has nothing else, as a mirror may be
}

SHORT_WAITS = Path(__file__).parent / "short_waits"


def choose_transfer(hub: Hub, way: str) -> None:
    """Let large files move in one of the ways of TRANSFERS, with clients set up from now on."""
    hub.has_xet = way != "lfs"
    hub.client_settings = TRANSFERS[way]


def client_environment(
    hub: Hub, home: Path, token: str | None = None, *, short_waits: bool = False
) -> dict[str, str]:
    """This process's environment, changed for a child whose client is to use the Hub.

    Downloads are cached under ``home``. No token, address or proxy of the real world remains.
    ``short_waits`` lets a child in Python sleep 1 ms wherever it would sleep longer, between the
    client's attempts and elsewhere; the client's own waits have no setting.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        and not name.lower().endswith("_proxy")
    }
    if short_waits:
        path = [str(SHORT_WAITS), *filter(None, [kept.get("PYTHONPATH")])]
        kept["PYTHONPATH"] = os.pathsep.join(path)
    return kept | _client_settings(hub, home, token)


def point_client_at(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path, token: str | None = None
) -> None:
    """Make this process's client use the Hub, as :func:`client_environment` does for a child.

    The client read its environment when it was imported, so its constants are replaced too. For
    "offline", replace ``constants.HF_HUB_OFFLINE`` afterwards.
    """
    for name in set(os.environ) - set(client_environment(hub, home, token)):
        monkeypatch.delenv(name)
    for name, value in _client_settings(hub, home, token).items():
        monkeypatch.setenv(name, value)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, constant in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": "HF_HUB_DISABLE_XET" in hub.client_settings,
        "HF_HUB_DISABLE_SHARED_BLOBS": "HF_HUB_DISABLE_SHARED_BLOBS" in hub.client_settings,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        "HF_HUB_ETAG_TIMEOUT": 5,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, constant)
    # Behind huggingface_hub.model_info and its like; it keeps the endpoint it was made with.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    # An open session keeps the proxies it was made with, and another Hub's tokens name its storage.
    huggingface_hub.close_session()
    huggingface_hub.utils._xet.XET_CONNECTION_INFO_CACHE.clear()


def shorten_client_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let this process's client wait a thousandth as long between attempts, but not try less often.

    Returns a list that fills with how long it meant to wait, in seconds.
    """
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds / 1000)

    # The two modules that try again; they use nothing else of time.
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    return waits


def _client_settings(hub: Hub, home: Path, token: str | None) -> dict[str, str]:
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",  # seconds
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",  # for proxies from the settings of macOS or Windows
        **hub_xet.SETTINGS,
        **hub.client_settings,
    }
    if token is not None:
        settings["HF_TOKEN"] = token
    return settings
