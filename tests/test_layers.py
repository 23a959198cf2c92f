"""The layers of modules: which may import which, as in README's map."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import converter
import reference_model

CONVERTER = Path(converter.__file__).parent
REFERENCE_MODEL = Path(reference_model.__file__).parent
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

# from the top down: modules on a floor only import from lower floors
FLOORS = (
    ("cli", "testing"),
    ("report",),
    ("publishing",),
    ("conversion", "exporting", "deltas"),
    ("destination",),
    ("checks", "pictures"),
    ("models", "inputs"),
    ("runtimes",),
    ("job", "history", "delta_record"),
    ("hub",),
    ("weights",),
    ("configs",),
    ("catalog",),
    ("class_names", "colours", "staging"),
    ("locks", "places", "zips"),
    ("files", "outside", "sizes"),
    ("errors", "version"),
)


def modules_of(package: Path) -> list[Path]:
    return [path for path in sorted(package.rglob("*.py")) if path != package / "__init__.py"]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", modules_of(CONVERTER), ids=lambda path: str(path.relative_to(CONVERTER))
)
def test_no_import_leads_up_or_across(path: Path) -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    own = path.relative_to(CONVERTER).parts[0].removesuffix(".py")
    others = {name.split(".")[1] for name in imported(path) if name.startswith("converter.")}

    assert [other for other in others - {own} if floor_of[other] <= floor_of[own]] == []


@pytest.mark.parametrize(
    "path", modules_of(CONVERTER), ids=lambda path: str(path.relative_to(CONVERTER))
)
def test_only_floors_where_models_are_run_use_the_reference_models_network(path: Path) -> None:
    """Its files and its configuration need no torch."""
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    floor = floor_of[path.relative_to(CONVERTER).parts[0].removesuffix(".py")]
    used = {name for name in imported(path) if name.startswith("reference_model.")}
    configs = {name for name in used if name.startswith("reference_model.config.")}
    files = {name for name in used if name.startswith("reference_model.files")}

    assert not files or path.name == "files.py"
    assert not configs or floor <= floor_of["configs"]
    assert not used - configs - files or floor <= floor_of["runtimes"]


@pytest.mark.parametrize("module", ["reference_model.config", "converter.weights.plan"])
def test_a_configuration_needs_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_names_of_the_reference_model_are_imported_when_used() -> None:
    code = (
        "import sys, reference_model as package\n"
        "assert set(package.__all__) <= set(dir(package)) and 'torch' not in sys.modules\n"
        "assert all(getattr(package, name).__name__ == name for name in package.__all__)\n"
        "assert not hasattr(package, 'Dinov3')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_two_classes_have_one_name() -> None:
    paths = [*modules_of(CONVERTER), *modules_of(REFERENCE_MODEL)]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    names = [
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]

    assert [name for name in names if names.count(name) > 1] == []


def test_the_reference_model_does_not_import_the_converter() -> None:
    names = [name for path in modules_of(REFERENCE_MODEL) for name in imported(path)]

    assert any(name.startswith("torch") for name in names)
    assert not any(name.startswith("converter") for name in names)


def test_the_readme_shows_the_floors() -> None:
    assert "\n-> ".join(", ".join(names) for names in FLOORS) in README


def test_the_readmes_map_matches_the_tree() -> None:
    block = README.partition("## Contributing")[2].split("```\n")[1]
    found, folder = set(), ""
    for line in block.splitlines():
        if line.startswith("  "):
            found.add(f"{folder}{line.split()[0]}")
        else:
            folder = line.split()[0]
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}"
        for package in (CONVERTER, REFERENCE_MODEL)
        for path in modules_of(package)
        if path.name != "__init__.py" and "cli" not in path.parts
    }

    listed = {name for name in found if name.endswith(".py")}
    assert listed == files
