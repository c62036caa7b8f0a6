"""``vmm`` as a user has it, with exit status and both streams: as a process, or without the half second that one
takes to start, in this one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import click

from vmm.cli.commands import cli, run

__all__ = ["verbs", "vmm", "vmm_here"]


def vmm(*arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True,
                          timeout=timeout, check=False)


def vmm_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same by a call. For verbs that neither change how signals are taken nor keep what is imported small."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["vmm", *arguments]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        code = run()
    return subprocess.CompletedProcess(["vmm", *arguments], code, out.getvalue(), err.getvalue())


def verbs(command: click.Command = cli, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every verb, and every group of verbs, by its words."""
    if words:
        yield " ".join(words), command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            assert found is not None
            yield from verbs(found, (*words, name))
