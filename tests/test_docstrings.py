"""What a public function raises is in its docstring: checked from the source, for everything that a module exports.
(That there is a docstring at all is ruff's to check.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from places import TOP

#: Of methods whose class says where their contract stands, with what each raises.
BY_CONTRACT = "for the contract"


def modules() -> list[Path]:
    return sorted(p for top in ("ipc", "vmm", "workers") for p in (TOP / top).rglob("*.py"))


def exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(name, function, docstring of its class) of what the module exports, methods included; none of click's
    commands, whose docstrings are their help."""
    names = exported(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            if not any("command" in ast.unparse(d) for d in node.decorator_list):
                yield node.name, node, ""
        elif isinstance(node, ast.ClassDef) and node.name in names:
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and (each.name == "__init__" or not each.name.startswith("_")):
                    yield f"{node.name}.{each.name}", each, ast.get_docstring(node) or ""


def raises(function: ast.FunctionDef) -> bool:
    """It raises by itself, and does not catch all that it raises; or asks the coordinator, which may refuse."""
    caught = {id(inner) for each in ast.walk(function) if isinstance(each, ast.Try)
              for part in each.body for inner in ast.walk(part)}
    own = any(isinstance(each, ast.Raise) and each.exc is not None and id(each) not in caught
              and "NotImplementedError" not in ast.unparse(each) for each in ast.walk(function))
    asks = any(isinstance(each, ast.Call) and ast.unparse(each.func).endswith("_client.ask") and id(each) not in caught
               for each in ast.walk(function))
    return own or asks


def test_what_is_raised_is_said() -> None:
    silent = [f"{path.relative_to(TOP)}: {name}" for path in modules()
              for name, function, of_class in functions(ast.parse(path.read_text())) if raises(function)
              and "aise" not in (said := (ast.get_docstring(function) or "") + of_class) and BY_CONTRACT not in said]
    assert not silent


def test_the_check_finds_what_is_not_said() -> None:
    source = """__all__ = ["f", "g"]
def f():
    "Does."
    raise OSError
def g():
    "Raises OSError."
    raise OSError
"""
    found = [(name, raises(function), "aise" in (ast.get_docstring(function) or ""))
             for name, function, _ in functions(ast.parse(source))]
    assert found == [("f", True, False), ("g", True, True)]
