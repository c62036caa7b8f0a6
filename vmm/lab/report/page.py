"""The page: one file, with all that it needs in it, and no script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

from ... import optional
from ...version import VERSION
from .document import Section, Table
from .style import inline_svg

__all__ = ["page"]

_ROWS = 200         # of a table; a figure may stand for more numbers than anybody reads
_NUMBER = re.compile(r"-?[0-9][0-9.,]*(?: ?(?:%|µs|ms|s|B|[KMGT]iB))?|-")


def page(title: str, sections: Sequence[Section]) -> str:
    """HTML. Every section's and figure's key is its own. Raises MissingPackage, and VmmError for numbers that cannot be
    drawn."""
    jinja2 = optional.jinja2()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    return str(template.render(title=title, sections=[_shown(section) for section in sections], rows=_ROWS,
                               version=VERSION, numeric=_numeric))


def _numeric(table: Table) -> list[bool]:
    """Of each column: there are only numbers in it, or nothing."""
    return [bool(table.rows) and all(_NUMBER.fullmatch(row[at]) for row in table.rows)
            for at in range(len(table.columns))]


def _shown(section: Section) -> dict[str, object]:
    """Figures with their drawings. A table is there once: behind the first figure that it is of, or below."""
    names: list[tuple[Table, str]] = [(table, f"{section.key}-table-{n}") for n, table in enumerate(section.tables)]
    figures = []
    for figure in section.figures:
        known = next((name for table, name in names if table is figure.data), None)
        if known is None:
            names.append((figure.data, f"{figure.key}-data"))
        figures.append({"figure": figure, "svg": inline_svg(figure), "elsewhere": known})
    return {"section": section, "figures": figures, "tables": names[:len(section.tables)]}
