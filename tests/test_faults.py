"""A convert-and-push in which one request breaks; benchmarks/faults.py breaks every one."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import FIXTURES
from fault_scenario import BACKBONE, DELTA, MODEL, Release, outcome, undisturbed
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
    "reset": Case("HEAD", f"{DELTA}/resolve/", 0),
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
}


@pytest.fixture(scope="module")
def release() -> Release:
    return undisturbed()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_broken_request_ends_well_or_with_an_error_and_a_rerun_puts_it_right(
    release: Release, fault: Fault
) -> None:
    case = CASES[fault.name]
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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_download_that_arrives_damaged_is_not_taken_for_a_wrong_release(
    hub: Hub, me: str, model: Path, name: str
) -> None:
    converter.publish(model, MODEL)
    commit = hub.commits(MODEL)[0].sha
    # what is read back before is config.json alone, once; the card is read to keep its edits
    nth = 0 if name == "model.safetensors" else 1
    hub.break_request(WrongBytes(), nth, method="GET", path=f"{commit}/{name}")

    with pytest.raises(UnreadableFileError, match=f"^{name} of {MODEL} arrived damaged"):
        converter.publish(model, MODEL, verify_remote=True)
    assert hub.broken


def test_a_release_keeps_its_tag_when_somebody_commits_on_top(
    hub: Hub, me: str, model: Path
) -> None:
    released = converter.publish(model, MODEL, tag="v1").commit
    theirs = hub.commit(MODEL, {"notes.txt": b"mine"})
    converter.publish(model, MODEL, tag="v1")

    assert hub.refs(MODEL) == {"refs/heads/main": theirs, "refs/tags/v1": released}


def test_what_comes_back_is_held_against_recorded_outputs_of_ones_own(
    hub: Hub, derived: Path
) -> None:
    with pytest.raises(OutputsDifferError, match="nothing recorded"):
        converter.publish(derived, MODEL, verify_remote=True)
    published = converter.publish(
        derived, MODEL, verify_remote=True, recorded=FIXTURES / "tiny_panoptic_64"
    )

    assert published.verdict is not None
    assert published.verdict.verdict == "passed"


def test_what_comes_back_may_be_better_known_than_what_was_sent(
    hub: Hub, me: str, tmp_path: Path
) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "model", verify=False)
    published = converter.publish(
        tmp_path / "model", MODEL, allow_unverified=True, verify_remote=True
    )

    assert published.verdict is not None
    assert published.verdict.verdict == "passed"
