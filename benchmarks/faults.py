"""Breaks each request of a convert-and-push, one at a time, and shows what happens.

    python benchmarks/faults.py

Runs the command of tests/fault_scenario.py against a loopback Hub again and again, with each of its
requests broken in each of the ways of tests/hub_faults.py, and once more unbroken; all of it with
large files over Xet and once more over LFS. Prints a table in Markdown, and what went wrong; the
exit code is 1 if anything did. All of it takes half an hour on two cores; ``--every``, ``--fault``
and ``--transfer`` try a part.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_scenario import Outcome, Release, Target, outcome, undisturbed
from hub_faults import FAULTS, Fault

TRANSFERS = ("xet", "lfs")


@dataclass(frozen=True)
class Case:
    """A request that was broken, how, how large files were transferred, and the outcome."""

    fault: Fault
    transfer: str
    target: Target
    outcome: Outcome


def try_all(faults: Sequence[Fault], releases: Sequence[Release], every: int) -> Iterator[Case]:
    """Runs the cases in parallel; gives them in order, without those that changed nothing."""
    planned = [
        (fault, target, release)
        for fault in faults
        for release in releases
        for target in release.requests[::every]
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        outcomes = pool.map(outcome, *zip(*planned, strict=True))
        for (fault, target, release), found in zip(planned, outcomes, strict=True):
            if found:
                yield Case(fault, release.transfer, target, found)


def table(cases: Mapping[tuple[str, str], Sequence[Case]]) -> str:
    """The cases by fault and by how large files were transferred, in Markdown."""
    lines = [
        "| fault | over | requests broken | succeeded on their own | clear error, then a rerun "
        "| else |",
        "|---|---|---|---|---|---|",
    ]
    total = [case for found in cases.values() for case in found]
    for (fault, transfer), found in (*cases.items(), (("**all**", ""), total)):
        wrong = sum(bool(case.outcome.problems) for case in found)
        alone = sum(case.outcome.run.succeeded and not case.outcome.problems for case in found)
        counts = (len(found), alone, len(found) - alone - wrong, wrong)
        lines.append(f"| {fault} | {transfer} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def conditions(releases: Sequence[Release]) -> str:
    """Versions that the figures were measured with."""
    packages = ("eomt-convert", "huggingface_hub", "hf-xet")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    counts = " and ".join(f"{len(each.requests)} over {each.transfer}" for each in releases)
    return (
        f"A run makes {counts} requests; each is broken in each way in a run of its own, with an "
        f"empty cache. Python {platform.python_version()}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A convert-and-push with broken requests.")
    parser.add_argument("--every", type=int, default=1, help="break each K-th request only")
    parser.add_argument("--fault", choices=[fault.name for fault in FAULTS], help="one way only")
    parser.add_argument("--transfer", choices=TRANSFERS, help="how large files move")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.fault in (None, fault.name)]
    chosen = [way for way in TRANSFERS if arguments.transfer in (None, way)]
    releases = [undisturbed(way) for way in chosen]
    cases: dict[tuple[str, str], list[Case]] = {
        (fault.name, way): [] for fault in faults for way in chosen
    }
    failed = False
    for case in try_all(faults, releases, arguments.every):
        cases[case.fault.name, case.transfer].append(case)
        for problem in case.outcome.problems:
            failed = True
            where = f"{case.fault.name}, over {case.transfer}, {case.target}"
            print(f"{where}: {problem}", file=sys.stderr, flush=True)
    print(f"{table(cases)}\n\n{conditions(releases)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
