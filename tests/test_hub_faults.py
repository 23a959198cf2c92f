"""The real client, when the loopback Hub breaks its requests."""

import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub.constants
import pytest
from conftest import HANGS, over_lfs
from hub_faults import (
    FAULTS,
    ExpiredToken,
    Fault,
    LostAnswer,
    MovedParent,
    RateLimit,
    Reset,
    Slow,
    Status,
    Truncated,
    WrongBytes,
)
from hub_server import Hub, client_environment, shorten_client_waits
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

# The client passes uploads to httpx2 in a way that this calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/shapes"
ME = "hf_me"
WEIGHTS = bytes(range(256)) * 40  # 10 KiB


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return shorten_client_waits(monkeypatch)


@pytest.fixture
def hub(hub: Hub, waits: list[float], transfer: str) -> Hub:
    """Names `transfer` itself: pytest before 9 sees nothing of the fixture that it replaces."""
    hub.add_user("me", ME)
    hub.create_repo(REPO, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    return hub


def push(
    content: bytes = b"new weights", *, revision: str = "main", parent_commit: str | None = None
) -> None:
    HfApi(token=ME).create_commit(
        REPO,
        [CommitOperationAdd("model.safetensors", content)],
        commit_message="Release",
        revision=revision,
        parent_commit=parent_commit,
    )


def broken(hub: Hub) -> list[tuple[Fault, str]]:
    return [(each.fault, str(each.request)) for each in hub.broken]


def test_every_fault_has_a_different_name() -> None:
    names = [fault.name for fault in FAULTS]

    assert len(set(names)) == len(names)
    assert {"reset", "status-502", "lost-answer"} <= set(names)


@over_lfs
def test_the_nth_request_is_broken_whatever_it_asks(hub: Hub) -> None:
    push()
    calm = hub.request_lines
    hub.requests.clear()
    hub.break_request(Status(503), nth=2)

    push(b"newer weights")

    # The third is the upload; the client sends its content again.
    assert broken(hub) == [(Status(503), hub.request_lines[2])]
    assert hub.request_lines[2] == hub.request_lines[3]
    assert len(hub.requests) == len(calm) + 1


def test_only_requests_that_match_are_counted(hub: Hub) -> None:
    hub.break_request(Status(503), nth=1, method="GET", path="/tree/")
    api = HfApi()

    for _ in range(2):
        api.model_info(REPO)
        api.list_repo_files(REPO)

    assert [str(each.request) for each in hub.broken] == [f"GET /api/models/{REPO}/tree/main"]
    trees = [line for line in hub.request_lines if "/tree/" in line]
    assert len(trees) == 3  # the second was tried again


def test_requests_stay_broken_until_the_hub_is_mended(hub: Hub) -> None:
    hub.break_request(Status(500), times=None)

    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            HfApi().model_info(REPO)
    hub.mend()

    assert HfApi().model_info(REPO).id == REPO
    assert len(hub.broken) == 2


@pytest.mark.parametrize("fault", [Truncated(), WrongBytes(), ExpiredToken(), MovedParent()])
def test_a_request_with_nothing_to_break_passes(hub: Hub, fault: Fault) -> None:
    hub.break_request(fault)

    answer = httpx2.head(hub.endpoint, trust_env=False)

    assert (answer.status_code, hub.broken) == (404, [])


def test_a_reset_request_is_not_carried_out(hub: Hub) -> None:
    head = hub.commits(REPO)
    hub.break_request(Reset(), path="/commit/")

    # Which one depends on how much the client had sent by then.
    with pytest.raises((httpx2.NetworkError, httpx2.RemoteProtocolError)):
        push()

    assert hub.commits(REPO) == head
    assert broken(hub) == [(Reset(), f"POST /api/models/{REPO}/commit/main")]


@over_lfs
def test_a_reset_upload_is_sent_again(hub: Hub) -> None:
    content = WEIGHTS * 1000
    hub.break_request(Reset(after=1000), method="PUT")

    push(content)

    first, second = [request for request in hub.requests if request.is_upload]
    assert 1000 <= first.body_size < len(content)
    assert second.body_size == len(content)
    assert hub.received == first.body_size + second.body_size


@over_lfs
def test_a_download_that_is_reset_fails(hub: Hub) -> None:
    hub.break_request(Reset(after=1000), method="GET")

    # The client resumes after a connection that was closed, but not after one that was reset.
    with pytest.raises(httpx2.ReadError):
        hf_hub_download(REPO, "model.safetensors")

    assert len(hub.broken) == 1


def test_a_truncated_answer_has_the_length_of_the_whole(hub: Hub) -> None:
    hub.break_request(Truncated())

    with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
        HfApi().model_info(REPO)

    assert len(hub.broken) == 1


@pytest.mark.parametrize("code", [500, 502, 503])
def test_a_server_error_is_tried_again_five_times(hub: Hub, waits: list[float], code: int) -> None:
    hub.break_request(Status(code), path="/preupload/", times=6)

    with pytest.raises(HfHubHTTPError) as error:
        push()

    assert error.value.response.status_code == code
    assert len(hub.requests) == len(hub.broken) == 6
    assert waits == [1, 2, 4, 8, 8]


def test_a_rate_limit_is_waited_for(hub: Hub, waits: list[float]) -> None:
    hub.break_request(RateLimit(retry_after=30), path="/preupload/")

    push()

    assert waits == [31]  # the client adds a second


def test_a_rate_limit_says_how_long_where_nothing_waits(hub: Hub) -> None:
    hub.break_request(RateLimit(retry_after=30))

    with pytest.raises(HfHubHTTPError, match="Retry after 30 seconds") as error:
        HfApi().model_info(REPO)
    assert error.value.response.headers["Retry-After"] == "30"


def test_slow_bytes_arrive_after_all(hub: Hub) -> None:
    hub.break_request(Slow(pause=0.01, pieces=7), method="GET")

    path = hf_hub_download(REPO, "model.safetensors")

    assert Path(path).read_bytes() == WEIGHTS
    assert len(hub.broken) == 1


@over_lfs
def test_bytes_slower_than_the_client_waits_for_are_asked_for_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.break_request(Slow(pause=0.6, pieces=1), method="GET")

    path = hf_hub_download(REPO, "model.safetensors")

    assert Path(path).read_bytes() == WEIGHTS
    assert [request.method for request in hub.requests] == ["HEAD", "GET", "GET"]


@over_lfs
def test_wrong_bytes_of_a_file_pass_the_client(hub: Hub) -> None:
    hub.break_request(WrongBytes(), method="GET")

    content = Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()

    half = len(WEIGHTS) // 2
    assert len(content) == len(WEIGHTS)
    assert content[:half] == WEIGHTS[:half]
    assert content[half:] != WEIGHTS[half:]
    assert len(hub.broken) == 1


def test_wrong_bytes_of_an_answer_cannot_be_read(hub: Hub) -> None:
    hub.break_request(WrongBytes())

    with pytest.raises(ValueError, match="decode"):
        HfApi().model_info(REPO)

    assert len(hub.broken) == 1


def test_a_commit_lands_although_its_answer_is_lost(hub: Hub) -> None:
    hub.break_request(LostAnswer(), path="/commit/")

    with pytest.raises(httpx2.RemoteProtocolError, match="disconnected"):
        push()

    assert [commit.title for commit in hub.commits(REPO)] == ["Release", "Add files"]
    assert hub.files(REPO)["model.safetensors"] == b"new weights"
    assert len(hub.broken) == 1


def test_a_parent_that_moved_meanwhile_refuses_the_commit(hub: Hub) -> None:
    head = hub.commits(REPO)[0].sha
    hub.break_request(MovedParent(), path="/commit/")

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        push(parent_commit=head)

    assert error.value.response.status_code == 412
    assert [commit.author for commit in hub.commits(REPO)] == ["somebody", "me"]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS
    assert len(hub.broken) == 1


def test_the_branch_that_is_committed_to_is_the_one_that_moves(hub: Hub) -> None:
    HfApi(token=ME).create_branch(REPO, branch="next/one")
    hub.break_request(MovedParent(), path="/commit/")

    push(revision="next/one")

    assert [c.author for c in hub.commits(REPO, "next/one")] == ["me", "somebody", "me"]
    assert len(hub.commits(REPO)) == 1


def test_a_branch_moves_before_any_request_for_the_repository(hub: Hub) -> None:
    hub.break_request(MovedParent(), times=None)

    HfApi(token=ME).whoami()
    assert hub.broken == []
    hf_hub_download(REPO, "model.safetensors")
    push()

    asked = [request for request in hub.requests[1:] if not request.is_upload]
    assert [each.request for each in hub.broken] == asked
    assert len([c for c in hub.commits(REPO) if c.author == "somebody"]) == len(asked)


def test_an_expired_token_is_refused_by_name(hub: Hub) -> None:
    hub.break_request(ExpiredToken(), times=None)

    # As on huggingface.co, the client says that there is no such repository, and then why.
    with pytest.raises(RepositoryNotFoundError, match=r"User Access Token .* is expired") as error:
        push()

    assert error.value.response.status_code == 401
    assert len(hub.commits(REPO)) == 1
    assert HfApi().model_info(REPO, token=False).id == REPO


def test_waits_are_short_in_a_child_process_too(hub: Hub, tmp_path: Path) -> None:
    program = (
        "import time, huggingface_hub as h; time.sleep(3600); "
        f"print(h.HfApi().list_repo_files('{REPO}'))"
    )
    hub.break_request(Status(503), times=5)

    printed = subprocess.check_output(
        [sys.executable, "-c", program],
        env=client_environment(hub, tmp_path / "child", short_waits=True),
        text=True,
        stderr=subprocess.PIPE,
        timeout=HANGS,
    )

    assert "model.safetensors" in printed
    assert len(hub.broken) == 5
