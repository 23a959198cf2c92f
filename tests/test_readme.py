"""What README shows is what happens."""

import contextlib
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import FIXTURES, over_lfs
from safetensors.torch import load_file, save_file

from converter.checks.comparison import TOLERANCE
from converter.cli import main

Command = Callable[..., Result]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# a program, and what it prints
SHOWN = re.findall(r"```python\n((?:(?!```).)*)```\n\n```\n(.*?)```", README, re.DOTALL)

# a command, what cuts its output short, and its output
COMMANDS = re.findall(
    r"^\$ eomt-convert ([^|\n]+?)((?: \| [^\n|]+)*)\n(.*?)^```", README, re.M | re.S
)


# a measured difference (it depends on the machine): in README, and as it may be printed
SHOWN_DIFFERENCE = re.compile(r"\d\.\de-\d\d")
DIFFERENCE = r"(0|\d(?:\.\d+)?e-\d\d|0\.\d+)"


def is_as_shown(printed: str, shown: str) -> bool:
    """Whether a text is what README shows, apart from differences within the tolerance."""
    expected = DIFFERENCE.join(map(re.escape, SHOWN_DIFFERENCE.split(shown)))
    found = re.fullmatch(expected, printed)
    return found is not None and all(float(figure) <= TOLERANCE for figure in found.groups())


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: Callable[[str], Path]
) -> Path:
    """A working directory like that of somebody who has followed the quick start."""
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    (tmp_path / "shapes_panoptic_128").symlink_to(converted("shapes_panoptic_128"))
    swap_query_and_key(converted("shapes_panoptic_128"), tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swap_query_and_key(model: Path, broken: Path) -> None:
    """A copy of a model with these tensors exchanged in one layer."""
    broken.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(model / name, broken)
    weights = load_file(model / "model.safetensors")
    query, key = (f"layers.2.attention.{part}_proj.weight" for part in "qk")
    weights[query], weights[key] = weights[key], weights[query]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.numbers
@pytest.mark.parametrize(("program", "output"), SHOWN)
def test_programs_print_what_is_shown(folder: Path, program: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})  # noqa: S102

    assert printed.getvalue() == output


def test_there_are_programs_to_try() -> None:
    assert len(SHOWN) == 3


@over_lfs
@pytest.mark.parametrize(
    ("arguments", "pipes", "output"),
    [
        # an export takes many seconds, and its own tests compare its numbers
        pytest.param(*each, marks=[] if each[0].startswith("export") else [pytest.mark.numbers])
        for each in COMMANDS
    ],
)
def test_commands_print_what_is_shown(
    folder: Path,
    me: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    exported: Callable[..., Path],
    arguments: str,
    pipes: str,
    output: str,
) -> None:
    if arguments.startswith("export shapes_panoptic_128 "):  # whose bytes are always the same
        made = exported("shapes_panoptic_128") / "model.onnx"
        monkeypatch.setattr(
            "converter.exporting.export._write", lambda _, place, *__: shutil.copy(made, place)
        )
    result = command(*arguments.split())
    lines = (result.stdout + result.stderr).splitlines()
    for tool, number in re.findall(r"(head|tail) -(\d+)", pipes):
        lines = lines[: int(number)] if tool == "head" else lines[-int(number) :]

    assert is_as_shown("\n".join(lines), output.rstrip("\n")), "\n".join(lines)


@pytest.mark.parametrize("figure", ["3.1e-05", "0", "2e-04", "0.00012"])
def test_differences_within_the_tolerance_are_as_shown(figure: str) -> None:
    assert is_as_shown(f"difference {figure} in layers.2", "difference 3.1e-05 in layers.2")


@pytest.mark.parametrize(
    "printed",
    [
        "difference 2.1e-04 in layers.2",
        "difference 0.003 in layers.2",
        "difference nan in layers.2",
        "difference 1 in layers.2",
        "difference  in layers.2",
        "difference 3.1e-05 in layers.3",
        "difference 3.1e-05 in layers.2\nand more",
    ],
)
def test_anything_else_is_not_as_shown(printed: str) -> None:
    assert not is_as_shown(printed, "difference 3.1e-05 in layers.2")


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) == 8


def test_every_command_is_named() -> None:
    named = README[README.index("The other commands are") :].partition(";")[0]

    assert set(re.findall("`([a-z-]+)`", named)) == set(main.commands)


def test_every_option_of_a_conversion_is_documented() -> None:
    told = README[README.index("## Options") : README.index("## What is checked")]
    options = {name for parameter in main.params for name in parameter.opts}

    assert {name for name in options if f"`{name}" not in told and f"{name}`" not in told} <= {
        "-h",
        "--help",
        "--checkpoint",
        "--output",
        "--verify",
    }


def test_every_file_in_the_map_exists() -> None:
    tree = README[README.index("converter/     ") :].partition("```")[0]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            assert (folder / name).exists(), name
        else:
            folder = ROOT / name
            assert folder.exists()
