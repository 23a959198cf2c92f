"""What comes of a convert-and-push when any one of its requests breaks.

    python benchmarks/faults.py

Runs the command of tests/fault_scenario.py against a loopback Hub again and again, with each of its
requests broken in each of the ways of tests/hub_faults.py, and once more unbroken. Prints a table
in Markdown, and what went wrong; the exit code is 1 if anything did. All of it takes a quarter of
an hour; ``--every`` and ``--fault`` try a part.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_scenario import Outcome, Release, Target, outcome, undisturbed
from hub_faults import FAULTS, Fault


@dataclass(frozen=True)
class Case:
    """A request that was broken, how, and what came of it."""

    fault: Fault
    target: Target
    outcome: Outcome


def try_all(faults: Sequence[Fault], release: Release, every: int) -> Iterator[Case]:
    for fault in faults:
        for target in release.requests[::every]:
            if found := outcome(fault, target, release):
                yield Case(fault, target, found)


def table(cases: Mapping[str, Sequence[Case]]) -> str:
    """The cases by fault, in Markdown."""
    lines = [
        "| fault | requests broken | succeeded on their own | clear error, then a rerun | else |",
        "|---|---|---|---|---|",
    ]
    total = [case for found in cases.values() for case in found]
    for title, found in (*cases.items(), ("**all**", total)):
        wrong = sum(bool(case.outcome.problems) for case in found)
        alone = sum(case.outcome.run.succeeded and not case.outcome.problems for case in found)
        counts = (len(found), alone, len(found) - alone - wrong, wrong)
        lines.append(f"| {title} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def conditions(release: Release) -> str:
    """What the figures were taken with."""
    packages = ("eomt-convert", "huggingface_hub")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"A run makes {len(release.requests)} requests; each is broken in each way in a run of its "
        f"own, with an empty cache. Python {platform.python_version()}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A convert-and-push with broken requests.")
    parser.add_argument("--every", type=int, default=1, help="break each K-th request only")
    parser.add_argument("--fault", choices=[fault.name for fault in FAULTS], help="one way only")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.fault in (None, fault.name)]
    release = undisturbed()
    cases: dict[str, list[Case]] = {fault.name: [] for fault in faults}
    failed = False
    for case in try_all(faults, release, arguments.every):
        cases[case.fault.name].append(case)
        for problem in case.outcome.problems:
            failed = True
            print(f"{case.fault.name}, {case.target}: {problem}", file=sys.stderr, flush=True)
    print(f"{table(cases)}\n\n{conditions(release)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
