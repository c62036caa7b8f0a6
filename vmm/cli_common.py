"""What the verbs of the command line share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import click

from .errors import VmmError

__all__ = ["Duration", "Rate", "json_option", "on_machine", "print_json"]


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
    return option(function)


def on_machine(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the verb a Machine in place of its NAME, and close it afterwards."""

    @functools.wraps(function)
    def wrapper(name: str, **options: Any) -> Any:
        from .machine import Machine

        with Machine.attach(name) as machine:
            return function(machine, **options)

    return click.argument("name")(wrapper)


class Duration(click.ParamType):
    """``500ms``, ``1s``, ``2m``; a bare number is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from .config import parse_duration

        try:
            return parse_duration(value)
        except ValueError as exc:
            raise VmmError(f"{param.opts[0] if param else 'duration'}: {exc}") from None


class Rate(click.ParamType):
    """``100MB/s``, ``64MiB/s``; a bare number is bytes a second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from .config import parse_rate

        try:
            return parse_rate(value)
        except ValueError as exc:
            raise VmmError(f"{param.human_readable_name if param else 'rate'}: {exc}") from None
