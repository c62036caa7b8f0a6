"""What the verbs of the command line share."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import VmmError
from ..outputs import is_stdout
from .completion import complete_machines

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from ..client.interrupts import Interrupts

__all__ = ["Duration", "Rate", "Size", "confirm", "json_option", "on_machine", "param_text", "print_json",
           "progress_bar", "recording", "text_aside"]


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def text_aside(path: str | os.PathLike[str] | None, as_json: bool) -> bool:
    """What there is to say goes to standard error: ``path``, which is written to, is standard output. Raises VmmError
    where JSON is to go there, too."""
    aside = path is not None and is_stdout(path)
    if aside and as_json:
        raise VmmError(f"{path}: is where --json goes, too: write to another file")
    return aside


def progress_bar(*columns: ProgressColumn | str) -> Progress:
    """On standard error, gone when it is done; nothing at all where that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def recording() -> Iterator[tuple[Interrupts, Callable[..., None]]]:
    """Around what is recorded for a while: signals, which end it early and keep what there is, and what is to be told
    the part of it that is over, for a bar (behind that, it takes anything)."""
    from ..client.interrupts import Interrupts

    with Interrupts() as interrupts, progress_bar() as bar:
        task = bar.add_task("recording", total=1.0)
        yield interrupts, lambda part, *more: bar.update(task, completed=part)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    return option(function)


def confirm(question: str, *, force: bool) -> None:
    """What cannot be undone: asked on a terminal, and elsewhere done only with ``force``. Raises Abort when the answer
    is no, and VmmError where nobody can be asked."""
    if force:
        return
    streams = (sys.stdin, sys.stderr)
    if not all(each is not None and not each.closed and each.isatty() for each in streams):
        raise VmmError(f"{question} That cannot be undone: --force does it")
    click.confirm(question, abort=True, err=True)


def on_machine(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the verb a Machine in place of its NAME, and close it afterwards."""

    @functools.wraps(function)
    def wrapper(name: str, **options: Any) -> Any:
        from ..client.machine import Machine

        with Machine.attach(name) as machine:
            return function(machine, **options)

    return click.argument("name", shell_complete=complete_machines)(wrapper)


def param_text(param: click.Parameter | None, otherwise: str) -> str:
    """What an error calls an option (``--time``) or an argument (``SIZE``)."""
    if param is None:
        return otherwise
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name


class Duration(click.ParamType):
    """``500ms``, ``1s``, ``5min``; a bare number is seconds. ``least``: the shortest that can be kept to, seconds.
    Raises VmmError."""

    name = "duration"

    def __init__(self, least: float = 0.0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from ..client.units import parse_duration

        where = param_text(param, self.name)
        try:
            seconds = parse_duration(value)
        except ValueError as exc:
            raise VmmError(f"{where}: {exc}") from None
        if seconds < self._least:
            raise VmmError(f"{where}: {value} is too short: must be at least {self._least * 1000:g} ms")
        return seconds


class Rate(click.ParamType):
    """``100MB/s``, ``64MiB/s``; a bare number is bytes per second. Raises VmmError."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from ..client.units import parse_rate

        try:
            return parse_rate(value)
        except ValueError as exc:
            raise VmmError(f"{param_text(param, self.name)}: {exc}") from None


class Size(click.ParamType):
    """``64MiB``, ``64MB``, ``4099 pages``; a bare number is bytes. Raises VmmError."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ..client.units import parse_size

        try:
            return parse_size(value)
        except ValueError as exc:
            raise VmmError(f"{param_text(param, self.name)}: {exc}") from None
