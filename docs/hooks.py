"""What the site has beyond the files of docs/: tables of fields, read from the source, and the examples.

A page says ``<!-- fields: PATH CLASS... -->`` where the fields of these classes are to stand (without a class: those of
every class of that file that has fields), and ``<!-- help -->`` where the help of every verb is. Names, types and
defaults come from the syntax tree, what they mean from their descriptions, or the comments beside them: one place for
a field, and that is the code. In the repository such a page shows what surrounds its tables, and the site all of it.

Links of pages to what lies beside docs/ (configs/, benchmarks/results) lead to copies of it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

TOP = Path(__file__).parent.parent
_FIELDS = re.compile(r"^<!-- fields: (\S+)((?: \w+)*) -->$", re.MULTILINE)
_HELP = "<!-- help -->\n"
_WIDTH = 90             # of help, as on a terminal
#: What is linked from docs/, and becomes part of the site: {folder: what it is}
_BESIDE = {"configs": "Example configurations", "benchmarks/results": "Results of the benchmarks"}
_LINK = re.compile(r"\]\((?:\.\./)+(configs|benchmarks/results)(/[^)#]*)?(#[^)]*)?\)")


@dataclass
class Fields:
    """A class of the source, and its fields: (name, type, default, what it means)."""

    name: str
    text: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)


def on_files(files: Files, config: Any) -> Files:
    """The examples and the benchmarks' results come along."""
    for folder, title in _BESIDE.items():
        found = sorted(path for path in (TOP / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
        for path in found:
            files.append(File.generated(config, str(path.relative_to(TOP)), abs_src_path=str(path)))
        index = _examples(found) if folder == "configs" else _listing(folder, found)
        files.append(File.generated(config, f"{folder}/index.md", content=f"# {title}\n\n{index}"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Tables in the place of their markers, links to the copies."""
    depth = "../" * page.file.src_uri.count("/")
    markdown = _LINK.sub(lambda m: f"]({depth}{m[1]}{m[2] or '/index.md'}{m[3] or ''})", markdown)
    if _HELP in markdown:
        markdown = markdown.replace(_HELP, _help())
    return _FIELDS.sub(lambda m: "\n".join(_table(each) for each in classes(TOP / m[1], m[2].split())), markdown)


def _help() -> str:
    from vmm.cli.commands import cli

    return "\n".join(f"## {name}\n\n```text\n{text}\n```\n" for name, text in _helps(cli, "vmm", None))


def _helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """(name, help) of a verb and those below it."""
    with click.Context(command, info_name=name, parent=parent, terminal_width=_WIDTH) as context:
        yield context.command_path, command.get_help(context)
        if isinstance(command, click.Group):
            for each in command.list_commands(context):
                below = command.get_command(context, each)
                if below is not None and not below.hidden:
                    yield from _helps(below, each, context)


def _examples(found: list[Path]) -> str:
    parts = ["`vmm launch NAME` takes the name of an example that is not in a folder, also where the package was "
             "installed without a checkout.\n"]
    for path in found:
        name = path.relative_to(TOP / "configs").with_suffix("")
        parts.append(f"## {name}\n\n```yaml\n{path.read_text()}```\n")
    return "\n".join(parts)


def _listing(folder: str, found: list[Path]) -> str:
    return "\n".join(f"* [{path.name}]({path.relative_to(TOP / folder)})" for path in found) + "\n"


def _table(found: Fields) -> str:
    lines = [f"### {found.name}\n", f"{_escaped(found.text)}\n"]
    if found.rows:
        lines += ["| field | type | default | |", "| --- | --- | --- | --- |"]
        lines += [f"| `{name}` | `{kind}` | {default and f'`{default}`'} | {_cell(_escaped(text))} |"
                  for name, kind, default, text in found.rows]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    """Prose of the source, in Markdown: double backquotes as there, roles as names."""
    return re.sub(r":\w+:(`[^`]+`)", r"\1", text).replace("<", "&lt;")


def classes(path: Path, wanted: list[str]) -> Iterator[Fields]:
    """Of a file, in its order; of ``wanted`` in that order, if there are any. Raises KeyError for one that is not
    there."""
    source = path.read_text()
    lines = source.split("\n")
    found = {node.name: _fields(node, lines) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    yield from [found[name] for name in wanted] if wanted else [
        each for each in found.values() if each.rows or (each.text and not each.name.endswith("Error"))]


def _fields(node: ast.ClassDef, lines: list[str]) -> Fields:
    found = Fields(node.name, inspect.cleandoc(ast.get_docstring(node) or ""))
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id[0] != "_":
            found.rows.append((each.target.id, _type(each.annotation), _default(each.value),
                               _description(each) or _comment(each, lines)))
    return found


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        value = value.args[0] if value.args else None
    return "" if value is None else ast.unparse(value)


def _description(node: ast.AnnAssign) -> str:
    """Of a key of a configuration: that of its ``Field``."""
    for each in ast.walk(node):
        if isinstance(each, ast.keyword) and each.arg == "description" and isinstance(each.value, ast.Constant):
            return str(each.value.value)
    return ""


def _type(annotation: ast.expr) -> str:
    """Without what only says how it is checked."""
    if isinstance(annotation, ast.BinOp):
        return f"{_type(annotation.left)} | {_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        return _type(annotation.slice.elts[0])
    return ast.unparse(annotation)


def _comment(node: ast.AnnAssign, lines: list[str]) -> str:
    """What stands beside it, and goes on below; or ``#:`` above it."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    beside = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip()
    said = []
    if beside.startswith("#"):
        said.append(beside)
        for line in lines[node.end_lineno:]:
            if not re.match(r" {8,}#", line):
                break
            said.append(line.strip())
    else:
        at = node.lineno - 2
        while re.match(r" +#:", lines[at]):
            said.insert(0, lines[at].strip())
            at -= 1
    return " ".join(line.lstrip("#: ") for line in said)
