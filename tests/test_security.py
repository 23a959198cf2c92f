"""What SECURITY.md promises."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROMISED = re.findall(r"`(tests/\w+\.py)::(\w+)`", SECURITY)

# modules and functions that run what they are given
RUNNERS = {"subprocess", "pickle", "marshal", "shelve", "runpy", "pty", "ctypes"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
CALLS |= {"yaml.load", "yaml.unsafe_load", "importlib.import_module"}


@pytest.mark.parametrize(("file", "name"), PROMISED)
def test_every_promise_has_its_test(file: str, name: str) -> None:
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_promise_names_a_test() -> None:
    promises = SECURITY[: SECURITY.index("## What is not promised")]

    assert len(re.findall(r"^- ", promises, re.MULTILINE)) == len(PROMISED)


@pytest.mark.parametrize("package", ["converter", "reference_model"])
def test_nothing_that_runs_code_is_called(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = {alias.name.partition(".")[0] for alias in node.names}
                assert not imported & RUNNERS, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in RUNNERS, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, path
                arguments = {each.arg for each in node.keywords}
                assert "trust_remote_code" not in arguments, path
                if ast.unparse(node.func) == "Image.open":  # for some formats Pillow runs a program
                    assert "formats" in arguments, path


def test_vulnerabilities_are_reported_in_private() -> None:
    assert "private vulnerability reporting" in SECURITY
    assert "@" not in SECURITY  # nobody's address
