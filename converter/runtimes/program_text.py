"""Checks the texts of a torch.export program that torch would evaluate as Python code.

Nothing here evaluates them, and running a program here needs none of them. But a file that was read
here may be loaded with torch.export.load afterwards. That of torch 2.13 evaluates symbolic sizes
(sympy.sympify), makes a function with the names of inputs (exec), and imports what the descriptions
of nested inputs and outputs name.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from reprlib import repr as shortened
from typing import Any

from converter.runtimes.pt2_archive import PROGRAM, Archive, is_identifier

# longest size in characters; torch writes some of 500
_LONGEST = 10_000

# the syntax of sizes: calls of functions, numbers and symbols, but no power and no attributes
_SYNTAX = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.BinOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub),
)
# sympy's and torch's functions of sizes (torch/utils/_sympy/functions.py)
_FUNCTIONS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min"),
    *("FloorDiv", "CeilDiv", "CleanDiv", "PythonMod", "ModularIndexing", "IntTrueDiv"),
    *("FloatTrueDiv", "CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "ToFloat"),
}
_SYMBOL = re.compile(r"[a-z]+\d+", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{1,40})?(e[-+]?\d{1,3})?", re.ASCII)

# keys of texts that are names
_NAMES = {"name", "as_name", "fqn", "parameter_name", "buffer_name", "tensor_constant_name"}


def check_texts(archive: Archive, program: Mapping[str, Any]) -> None:
    """Refuses a program with a text that is not what torch itself writes in its place.

    Args:
        archive: the file.
        program: the object in its description.

    Raises:
        UnreadableFileError: it has such a text.
    """
    seen = set()
    for kind, text in _texts(program):
        if (kind, str(text)) in seen:
            continue
        seen.add((kind, str(text)))
        if not _CHECKS[kind](text):
            raise archive.refused(
                PROGRAM, f"has {kind} that torch would evaluate as code: {shortened(text)}"
            )


def _texts(program: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The texts that torch evaluates, each with what it is."""
    waiting: list[Any] = [program]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            for key, inner in value.items():
                if key in _NAMES and inner not in (None, ""):
                    yield "a name", inner
                elif key == "forward_arg_names":
                    yield from (("a name", name) for name in inner or ())
                elif key in ("in_spec", "out_spec"):
                    yield "a structure", inner
                elif key == "expr_str":
                    yield "a size", inner
                elif key.endswith("_values") and isinstance(inner, dict):
                    yield from (("a name", name) for name in inner)
                waiting.append(inner)


def _is_size(text: Any) -> bool:
    if type(text) is not str or len(text) > _LONGEST:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, _SYNTAX) and _is_harmless(node) for node in nodes)


def _is_harmless(node: ast.AST) -> bool:
    match node:
        case ast.Name(name):
            return name in _FUNCTIONS or _SYMBOL.fullmatch(name) is not None
        case ast.Constant(value):
            return type(value) in (int, float, bool) or (
                type(value) is str and bool(is_identifier(value) or _NUMBER.fullmatch(value))
            )
    return True


def _is_structure(text: Any) -> bool:
    """Whether a text describes nested tuples, lists, dicts and dataclasses, as pytree does."""
    try:
        version, root = json.loads(text)
        waiting = [root]
        while waiting:
            spec = waiting.pop()
            kind, context = spec["type"], spec["context"]
            if kind is not None and not (is_identifier(kind) and _is_plain(json.loads(context))):
                return False
            waiting += spec["children_spec"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return bool(version == 1)


def _is_plain(context: Any) -> bool:
    """Whether the context of a structure has only names in lists; objects name what to import."""
    if isinstance(context, list):
        return all(map(_is_plain, context))
    return context is None or is_identifier(context)


_CHECKS = {
    "a name": is_identifier,
    "a structure": _is_structure,
    "a size": _is_size,
}
