"""The structure-aware fuzzer: a few of its cases, the same each time, and that it finds faults."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from fuzz_values import MAKERS, Outcome, Valid, fuzzing, run_case

SEED, CASES = 7, 200

Place = tuple[Valid, Path]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with fuzzing() as place:
        yield place


def run(place: Place, cases: int) -> list[Outcome]:
    return [run_case(number, SEED, *place) for number in range(cases)]


def test_senseless_values_end_in_errors_and_nothing_else(place: Place) -> None:
    outcomes = run(place, CASES)

    assert [(o.number, o.case.arguments, o.finding) for o in outcomes if o.finding] == []
    assert CASES / 4 < sum(outcome.refused for outcome in outcomes) < CASES * 3 / 4


def test_every_kind_of_case_has_its_own_file_and_command(place: Place, tmp_path: Path) -> None:
    kinds = set()
    for number, maker in enumerate(MAKERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = maker(place[0], folder, random.Random(SEED))  # noqa: S311
        kinds.add((case.file, case.command))

    assert len(kinds) == len(MAKERS)


def test_a_case_is_reproducible(place: Place) -> None:
    first, again = (run_case(5, SEED, *place) for _ in range(2))

    assert (first.case, first.refused, first.output) == (again.case, again.refused, again.output)


def test_a_fault_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> NoReturn:
        raise AttributeError("no such thing")

    monkeypatch.setattr("converter.checks.verification.read_history", fail)

    findings = {outcome.finding for outcome in run(place, 20)}
    assert "a fault: AttributeError: no such thing" in findings


def test_a_control_character_that_is_printed_is_found(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.cli.session.visible", lambda line: f"\x1b[2J{line}")

    assert r"stderr has '\x1b'" in {outcome.finding for outcome in run(place, 20)}


def test_a_file_that_is_left_behind_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "converter.checks.verification.read_history", lambda _: Path("left").touch()
    )

    assert "it leaves ['left'] behind" in {outcome.finding for outcome in run(place, 20)}
