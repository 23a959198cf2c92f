"""Errors when the Hub refuses or fails."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import over_xet
from hub_faults import ExpiredToken, Fault, Status, WrongBytes
from hub_server import Hub, shorten_client_waits
from huggingface_hub import HfApi

from converter.errors import AccessError, EomtConvertError, HubUnavailableError, UsageError
from converter.hub.access import Access, endpoint_name, explained
from converter.hub.downloads import download, resolve

REPO = "owner/name"


@pytest.fixture
def commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    shorten_client_waits(monkeypatch)
    return hub.create_repo(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})


def error_of(fault: Fault, hub: Hub) -> EomtConvertError:
    """The error for a repository that is requested during a fault."""
    hub.break_request(fault, times=None)
    with pytest.raises(EomtConvertError) as caught:
        resolve(REPO, "main", Access())
    return caught.value


@pytest.mark.parametrize("code", [500, 502, 503, 504])
def test_a_server_that_is_down_is_named(hub: Hub, commit: str, code: int) -> None:
    error = error_of(Status(code), hub)

    assert isinstance(error, HubUnavailableError)
    assert error.message == f"{hub.address} is down: status {code} for {REPO}."


@pytest.mark.parametrize(("code", "words"), [(501, "Not here"), (520, "Web server error")])
def test_a_server_with_another_answer_is_not_called_down(
    hub: Hub, commit: str, code: int, words: str
) -> None:
    error = error_of(Status(code, words), hub)

    assert isinstance(error, HubUnavailableError)
    assert error.message == f"{hub.address} answered {code} for {REPO}: {words}"


@pytest.mark.parametrize(("code", "words"), [(400, "Bad things"), (418, "I'm a teapot")])
def test_a_refusal_has_the_servers_words(hub: Hub, commit: str, code: int, words: str) -> None:
    error = error_of(Status(code, words), hub)

    assert isinstance(error, AccessError)
    assert error.message == f"{hub.address} answered {code} for {REPO}: {words}"


def test_an_answer_without_words_is_named_by_its_status(hub: Hub, commit: str) -> None:
    assert error_of(Status(501), hub).message.endswith(f"answered 501 for {REPO}: Not Implemented")


def test_words_from_outside_are_visible_and_not_too_long(hub: Hub, commit: str) -> None:
    message = error_of(Status(400, "\x1b[2J\r\u202ebad" + "x" * 10_000), hub).message

    assert "\\x1b[2J\\r\\u202ebadxxx" in message
    assert "xxx ... xxx" in message
    assert len(message) < 500


def test_a_password_in_the_servers_address_is_not_in_its_words(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = hub.endpoint.replace("http://", "http://ann:sesame@")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)

    assert "sesame" not in str(error_of(Status(400, f"See {address}/docs"), hub))


def test_missing_read_access_is_reported_with_the_servers_words(hub: Hub, commit: str) -> None:
    error = error_of(Status(403, "Please enable access to public gated repositories"), hub)

    assert error.message == (
        f"This login may not read {REPO}: Please enable access to public gated repositories"
    )
    assert "fine-grained token" in error.remedy


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("https://huggingface.co", "huggingface.co"),
        ("http://ann:pass@mirror:8080/hf", "mirror:8080"),
    ],
)
def test_the_server_is_named_without_a_password(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, name: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)

    assert endpoint_name() == name


def test_malformed_answers_are_refused(hub: Hub, commit: str) -> None:
    assert "is invalid (UnicodeDecodeError)" in error_of(WrongBytes(), hub).message


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {"siblings": 3},
        {"id": REPO, "siblings": [{}]},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": 3}]},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": "a", "blobId": 5}]},
        {
            "id": REPO,
            "sha": "0" * 40,
            "siblings": [{"rfilename": "a", "lfs": {"sha256": 5, "size": 1, "pointerSize": 1}}],
        },
    ],
)
def test_an_answer_of_unexpected_form_is_reported(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr("httpx2.Response.json", lambda _: json.loads(json.dumps(answer)))

    with pytest.raises(HubUnavailableError, match=r"answer .* is invalid"):
        resolve(REPO, "main", Access())


@pytest.mark.parametrize("fault", [ValueError("ours"), KeyError("ours"), TypeError("ours")])
def test_a_bug_of_ours_is_not_blamed_on_the_hub(fault: Exception) -> None:
    with pytest.raises(type(fault)) as caught, explained(REPO):
        raise fault

    assert caught.value is fault
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("cause", [KeyError("k"), OSError("disk"), ValueError("v")])
def test_a_bug_of_ours_with_a_cause_is_raised_unchanged(cause: Exception) -> None:
    fault = ValueError("ours")

    with pytest.raises(ValueError, match="ours") as caught, explained(REPO):
        raise fault from cause
    assert caught.value is fault


def test_a_call_that_the_client_rejects_is_a_bug_of_ours() -> None:
    options: dict[str, Any] = {"no_such_option": True}

    with pytest.raises(TypeError, match="no_such_option"), explained(REPO):
        HfApi().model_info(REPO, **options)


def test_the_remedy_has_the_variables_name_unchanged(hub: Hub) -> None:
    with pytest.raises(AccessError) as caught:
        Access().login("me/model")

    assert caught.value.remedy == "Log in with `hf auth login`, or set HF_TOKEN."


def test_the_user_is_looked_up_once(hub: Hub, me: str) -> None:
    access = Access()

    assert [access.login("me/model")["name"] for _ in range(2)] == ["me", "me"]
    assert hub.request_lines == ["GET /api/whoami-v2"]


def test_a_name_with_two_slashes_is_wrong_usage(hub: Hub) -> None:
    with pytest.raises(UsageError, match="'a/b/c' is not a valid name"):
        resolve("a/b/c", "main", Access())


# over Xet --------------------------------------------------------------------------------------


@over_xet
def test_a_missing_storage_is_reported(
    hub: Hub, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access()
    found = resolve(REPO, "main", access)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(hub.xet, "offer", lambda _: f"local://{tmp_path / 'file'}")

    with pytest.raises(HubUnavailableError, match=f"The transfer with {REPO} broke off"):
        download(found, "model.safetensors", access)


@over_xet
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ExpiredToken(), "The Hub does not accept the token for me/new"),
        (Status(403), "This login has no permission to do this with me/new"),
        (Status(500), "is down: status 500 for me/new"),
    ],
)
def test_a_refused_upload_is_reported_like_other_requests(
    hub: Hub, me: str, model: Path, fault: Fault, said: str
) -> None:
    import converter

    hub.break_request(fault, path="/xet-write-token/", times=None)

    with pytest.raises(EomtConvertError, match=said):
        converter.publish(model, "me/new")
    assert hub.broken
