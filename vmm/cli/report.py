"""``vmm report``: a page, or figures for a paper, of what was measured."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import VmmError
from ..outputs import open_output
from .common import json_option, print_json, text_aside
from .completion import complete_runs

if TYPE_CHECKING:
    from ..lab.report.document import Section

__all__ = ["report"]


@click.command()
@click.argument("run", nargs=-1, required=True, shell_complete=complete_runs)
@click.option("--output", type=click.Path(path_type=Path),
              help="The page to write.  [default: NAME-report.html, by the first RUN]")
@click.option("--figures", type=click.Path(path_type=Path, file_okay=False),
              help="Write the figures into this directory, one file each, for papers; then a page only with --output.")
@click.option("--format", "kind", type=click.Choice(["svg", "png"]), show_default="svg",
              help="Of those files; PNG has 300 dots per inch.")
@click.option("--title", help="Heading of the page.")
@json_option
def report(run: tuple[str, ...], output: Path | None, figures: Path | None, kind: Any, title: str | None,
           as_json: bool) -> None:
    """Make one self-contained HTML page of RUN. That is the NAME of a machine (running or ended); a file of vmm status
    --json, vmm migrate --report, vmm predict --json, vmm working-set, vmm events --format jsonl or vmm compare --json;
    or the folder of vmm stress or vmm compare. Several are sections of one page; - is standard input.

    \b
    For example:
        vmm report NAME
        vmm report migration.json working-set.npz --output run.html
        vmm report results/ --figures paper/ --format svg
    """
    from ..lab.report.document import unique_keys
    from ..lab.report.sources import sections

    if kind is not None and figures is None:
        raise VmmError("--format is of the files of --figures DIR: give that, too")
    wanted = output if output is not None or figures is not None else Path(f"{_stem(run[0])}report.html")
    aside = text_aside(wanted, as_json)
    with contextlib.ExitStack() as stack:
        page_file = stack.enter_context(open_output(wanted)) if wanted is not None else None
        found = unique_keys([section for each in run for section in sections(each)])
        made = _write_figures(found, figures, kind or "svg") if figures is not None else []
        if page_file is not None:
            from ..lab.report.page import page

            page_file.write(page(title or _title(found), found).encode())
    written = [*([str(wanted)] if wanted is not None else []), *made]
    if as_json:
        print_json({"written": written, "sections": [{"key": s.key, "title": s.title, "outcome": s.outcome,
                                                      "warnings": s.warnings, "figures": [f.key for f in s.figures]}
                                                     for s in found]})
        return
    for section in found:
        click.echo(f"{section.title}: {section.outcome}", err=aside)
    for name in written:
        click.echo(name, err=aside)


def _stem(run: str) -> str:
    """What the page's name begins with."""
    name = Path(run).stem if run != "-" else ""
    return f"{name}-" if name else ""


def _title(found: list[Section]) -> str:
    return found[0].title if len(found) == 1 else f"{found[0].title}, and more"


def _write_figures(found: list[Section], folder: Path, kind: Any) -> list[str]:
    """Their names. Raises VmmError."""
    from ..lab.report.style import drawn

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise VmmError(f"{folder}: cannot be made: {exc.strerror}") from None
    names = []
    for figure in (figure for section in found for figure in section.figures):
        path = folder / f"{figure.key}.{kind}"
        with open_output(path) as file:
            file.write(drawn(figure, kind))
        names.append(str(path))
    return names
