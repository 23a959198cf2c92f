"""What is imported is declared in pyproject.toml, and nothing else is."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {"converter", "reference_model"} | {
    path.stem
    for folder in ("tests", "benchmarks", "examples")
    for path in (ROOT / folder).glob("*.py")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", each)[0].replace("_", "-") for each in requirements}


def imported(*folders: str) -> set[str]:
    """The packages whose modules are imported anywhere in the Python files of these folders."""
    modules: set[str] = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    modules.add((node.module or "").partition(".")[0])
    distributions = packages_distributions()
    return {
        distributions.get(module, [module])[0].lower().replace("_", "-")
        for module in modules - OURS - sys.stdlib_module_names
    }


def test_the_packages_import_what_is_declared() -> None:
    extras = [each for extra in ("evaluate", "export", "train") for each in EXTRAS[extra]]
    declared = names(PROJECT["dependencies"] + extras)

    # transformers is compared with where it is installed; huggingface_hub imports hf_xet
    assert imported("converter", "reference_model") == declared - {"hf-xet"} | {"transformers"}


def test_tests_benchmarks_and_examples_import_what_is_declared() -> None:
    declared = names(PROJECT["dependencies"]).union(*map(names, EXTRAS.values()))

    assert imported("tests", "benchmarks", "examples") <= declared
