"""A convert-and-push in which one request breaks; benchmarks/faults.py breaks every one."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import FIXTURES, over_lfs
from fault_scenario import BACKBONE, DELTA, MODEL, outcome, undisturbed
from hub_faults import FAULTS, ExpiredToken, Fault, WrongBytes
from hub_server import Hub

import converter
from converter.errors import AccessError, OutputsDifferError, UnreadableFileError


@dataclass(frozen=True)
class Case:
    """A request, by its method and a part of its path, and how the run ends if it breaks."""

    method: str
    path: str
    exit_code: int


CASES = {
    "lfs": {
        "reset": Case("HEAD", f"{DELTA}/resolve/", 1),
        "reset-after-100": Case("PUT", "/lfs/", 0),
        "truncated": Case("GET", f"/cdn/{DELTA}/", 0),
        "status-500": Case("POST", f"{MODEL}/commit/", 1),
        "status-502": Case("POST", "/api/repos/create", 1),
        "status-503": Case("GET", f"/api/models/{DELTA}/", 1),
        "rate-limit": Case("POST", f"{MODEL}.git/info/lfs/objects/batch", 0),
        "slow": Case("GET", f"/cdn/{MODEL}/", 0),
        "wrong-bytes": Case("GET", f"/cdn/{BACKBONE}/", 0),
        "lost-answer": Case("POST", f"{MODEL}/commit/", 0),
        "moved-parent": Case("POST", f"{MODEL}/commit/", 1),
        "expired-token": Case("POST", f"{MODEL}/preupload/", 4),
    },
    "xet": {
        "reset": Case("GET", f"{DELTA}/xet-read-token/", 0),
        "reset-after-100": Case("POST", f"{MODEL}/commit/", 1),
        "truncated": Case("GET", f"{BACKBONE}/xet-read-token/", 0),
        "status-500": Case("GET", f"{MODEL}/xet-write-token/", 0),
        "status-502": Case("GET", f"{DELTA}/xet-read-token/", 0),
        "status-503": Case("HEAD", f"{DELTA}/resolve/", 0),
        "rate-limit": Case("GET", f"{MODEL}/xet-write-token/", 0),
        "slow": Case("GET", f"{MODEL}/xet-read-token/", 0),
        "wrong-bytes": Case("GET", f"{MODEL}/xet-write-token/", 0),
        "lost-answer": Case("GET", f"{MODEL}/xet-write-token/", 0),
        "moved-parent": Case("GET", f"{MODEL}/xet-write-token/", 1),
        "expired-token": Case("GET", f"{MODEL}/xet-write-token/", 4),
    },
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_broken_request_ends_well_or_with_an_error_and_a_rerun_puts_it_right(
    transfer: str, fault: Fault
) -> None:
    case, release = CASES[transfer][fault.name], undisturbed(transfer)
    found = outcome(fault, release.find(case.method, case.path), release)

    assert found is not None, "The fault changed nothing of the request."
    assert found.problems == ()
    assert found.run.exit_code == case.exit_code, found.run.output


def test_a_token_that_expires_on_the_way_is_not_taken_for_a_missing_repository(
    hub: Hub, me: str, model: Path
) -> None:
    converter.publish(model, MODEL)
    hub.break_request(ExpiredToken(), path=f"/api/models/{MODEL}/revision/main")

    with pytest.raises(AccessError, match="does not accept the token"):
        converter.publish(model, MODEL)


# what is read back before is config.json alone, once; the card is read to keep its edits
READ_BEFORE = {"model.safetensors": 0, "config.json": 1, "README.md": 1}


def publish_damaged(hub: Hub, model: Path, name: str) -> None:
    """Publishes a model again, and damages one of its files on the way back."""
    converter.publish(model, MODEL)
    commit = hub.commits(MODEL)[0].sha
    hub.break_request(WrongBytes(), READ_BEFORE[name], method="GET", path=f"{commit}/{name}")
    try:
        converter.publish(model, MODEL, verify_remote=True)
    finally:
        assert hub.broken


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_a_download_that_arrives_damaged_is_not_taken_for_a_wrong_release(
    hub: Hub, me: str, model: Path, name: str
) -> None:
    with pytest.raises(UnreadableFileError, match=f"^{name} of {MODEL} arrived damaged"):
        publish_damaged(hub, model, name)


@over_lfs  # hf_xet lets no wrong bytes through
def test_weights_that_arrive_damaged_are_not_taken_for_a_wrong_release(
    hub: Hub, me: str, model: Path
) -> None:
    with pytest.raises(UnreadableFileError, match=f"^model.safetensors of {MODEL} arrived"):
        publish_damaged(hub, model, "model.safetensors")


def test_a_release_keeps_its_tag_when_somebody_commits_on_top(
    hub: Hub, me: str, model: Path
) -> None:
    released = converter.publish(model, MODEL, tag="v1").commit
    theirs = hub.commit(MODEL, {"notes.txt": b"mine"})
    converter.publish(model, MODEL, tag="v1")

    assert hub.refs(MODEL) == {"refs/heads/main": theirs, "refs/tags/v1": released}


def test_the_downloaded_model_is_compared_with_the_users_recorded_outputs(
    hub: Hub, derived: Path
) -> None:
    with pytest.raises(OutputsDifferError, match="No recorded outputs"):
        converter.publish(derived, MODEL, verify_remote=True)
    published = converter.publish(
        derived, MODEL, verify_remote=True, recorded=FIXTURES / "tiny_panoptic_64"
    )

    assert published.verdict is not None
    assert published.verdict.verdict == "passed"


def test_the_downloaded_model_may_be_verified_although_the_pushed_one_was_not(
    hub: Hub, me: str, tmp_path: Path
) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "model", verify=False)
    published = converter.publish(
        tmp_path / "model", MODEL, allow_unverified=True, verify_remote=True
    )

    assert published.verdict is not None
    assert published.verdict.verdict == "passed"
