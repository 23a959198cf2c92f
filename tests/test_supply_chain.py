"""What is installed and run is pinned: packages by version or hash, actions by commit."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUN_TIME = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
BUILD = PROJECT["build-system"]["requires"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.y*ml"))

HASHES = (ROOT / "release-requirements.txt").read_text(encoding="utf-8")
TORCH = "https://download.pytorch.org/whl/cpu/torch-{}%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl"


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def pins(text: str) -> dict[str, str]:
    """Versions by package, of the lines NAME==VERSION."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    return {name_of(name): version for name, version in found}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def needed(requirements: list[str]) -> set[str]:
    """Packages with what they bring along here; what is for other machines may be among them."""
    found: set[str] = set()
    left = [name_of(requirement) for requirement in requirements]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            try:
                left += [name_of(each) for each in requires(name) or () if "extra ==" not in each]
            except PackageNotFoundError:  # the linters: they are installed after the tests
                continue
    return found


def jobs(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values())


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path) for step in job["steps"]]


def test_everything_that_is_installed_is_pinned() -> None:
    extras = [each for extra in EXTRAS.values() for each in extra if "eomt-convert[" not in each]
    # on Windows, in a browser, or with a Python that is too old
    elsewhere = {
        "colorama",
        "exceptiongroup",
        "httpx2-jsfetch",
        "importlib-metadata",
        "tomli",
        "tzdata",
    }
    unpinned = needed(RUN_TIME + extras + BUILD) - CONSTRAINTS.keys() - elsewhere

    # torch's packages for CUDA, which its CPU build does not install
    assert {name for name in unpinned if not re.match("nvidia|cuda|triton", name)} == set()


def test_the_build_backend_is_pinned_with_what_it_brings_along() -> None:
    assert "hatchling" in pins("\n".join(BUILD))
    assert pins("\n".join(BUILD)).items() <= CONSTRAINTS.items()
    assert len(pins("\n".join(BUILD))) == len(BUILD)


def test_a_release_is_installed_with_the_versions_of_the_constraints() -> None:
    assert pins(HASHES).items() <= CONSTRAINTS.items()
    assert pins("\n".join(BUILD)).items() <= pins(HASHES).items()
    assert needed(RUN_TIME) & CONSTRAINTS.keys() <= pins(HASHES).keys() | {"torch"}


def test_every_package_of_a_release_has_a_hash() -> None:
    lines = [line for line in HASHES.splitlines() if not line.startswith("#")]
    requirements = "\n".join(lines).replace("\\\n", "").splitlines()

    assert len(requirements) == len(pins(HASHES)) + 1
    for requirement in requirements:
        what, *hashes = requirement.split(" --hash=")
        assert hashes, what
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes), what
        assert "==" in what or what.strip() == f"torch @ {TORCH.format(CONSTRAINTS['torch'])}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_named_by_version(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))

    assert len(uses) == sum("uses" in step for step in steps(path))
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_this_repository_and_nothing_else(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {}
    assert all(job["permissions"] == {"contents": "read"} for job in jobs(path))
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_packages_come_by_hash_without_cache_or_other_index(path: Path) -> None:
    installing = [step["run"] for step in steps(path) if "install" in step.get("run", "")]

    assert installing
    for run in installing:
        assert run.startswith("pip --isolated --no-cache-dir install ")
        assert "--require-hashes" in run or {"--no-index", "--no-deps"} <= set(run.split())
        assert "index-url" not in run
        assert "find-links" not in run
    assert all("cache" not in step.get("with", {}) for step in steps(path))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_token_is_given_to_one_step_that_installs_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    holding = [step for step in steps(path) if "HF_TOKEN" in step.get("env", {})]

    assert text.count("secrets.") == len(holding) == 1
    assert "pip" not in holding[0]["run"]
    assert all("${{" not in step.get("run", "") for step in steps(path))
