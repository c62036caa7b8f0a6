"""What shells offer: asked by real shells where they are installed, and as their scripts ask."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class
from command import verbs, vmm
from machines import spec

from vmm.cli.commands import cli
from vmm.client.machine import Machine
from vmm.machine.spec import RamSlot

NAME = "completed"


@pytest.fixture
def machine() -> Iterator[Machine]:
    slots = [RamSlot(0, 0, 8 << 20), RamSlot(5, 1 << 30, 1 << 20)]
    with Machine.launch(spec("idle", accel="unicorn", name=NAME, slots=slots, milliseconds=0, timeout=None),
                        name=NAME) as made:
        made.register("backup")
        yield made


def offered(line: str) -> list[str]:
    """At the end of the line, without a process."""
    kind = get_completion_class("fish")
    assert kind is not None
    *words, last = shlex.split(line) if not line.endswith(" ") else [*shlex.split(line), ""]
    return [item.value for item in kind(cli, {}, "vmm", "_VMM_COMPLETE").get_completions(words[1:], last)]


def in_shell(shell: str, script: str) -> list[str]:
    """Lines that a real shell prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "PATH": path})
    return done.stdout.split("\n")


def needs_shell(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


def test_verbs_and_options() -> None:
    assert {"snapshot", "status", "stop"} <= set(offered("vmm s"))
    assert offered("vmm snapshot re") == ["restore"]
    assert "--detach" in offered("vmm launch x.yaml --de")
    assert offered("vmm tracking web b") == ["bitmap"]
    assert offered("vmm config explain reaper.mo") == ["reaper.mode"]
    assert offered("vmm config new p") == ["program"]
    assert offered("vmm launch quick") == ["quickstart", "quick"]       # the second: files of such names
    assert offered("vmm launch quickstart --set reaper.mo") == ["reaper.mode=", "reaper.mode=adaptive"]
    assert offered("vmm config check x.yaml --set memory.0.si") == ["memory.0.size=", "memory.0.size=64MiB"]
    assert offered("vmm launch quickstart --set guest.nothing") == []


def test_names_of_machines_slots_and_clients(machine: Machine) -> None:
    for verb in ("status", "pause", "sync", "attach", "console", "memory remove", "snapshot create", "migrate",
                 "migrate cancel", "dirty-limit set", "predict", "forward", "wait"):
        assert NAME in offered(f"vmm {verb} com"), verb
    assert offered("vmm status other") == []
    assert offered(f"vmm memory remove {NAME} ") == ["0", "5"]
    assert offered(f"vmm log stop {NAME} 5") == ["5"]
    assert offered(f"vmm client drop {NAME} ") == ["backup"]
    assert offered("vmm memory remove nobody ") == []       # and no error


def test_machines_that_have_ended_where_that_makes_sense() -> None:
    with Machine.launch(spec("hello", accel="unicorn", name="over", lines=1), name="over") as ended:
        ended.wait(60.0)
    assert "over" in offered("vmm logs ov")
    assert "over" not in offered("vmm pause ov")


def test_snapshots_the_newest_first(machine: Machine, tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    for arguments in ([], ["--incremental"]):
        assert vmm("snapshot", "create", NAME, str(chain), *arguments).returncode == 0
    assert offered(f"vmm snapshot restore {chain} ") == ["0002", "0001"]
    assert offered(f"vmm snapshot verify {chain} 0001") == ["0001"]
    assert offered(f"vmm snapshot delete {tmp_path} ") == []


def test_machines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("memory: [{size: 4MiB}]\nguest: {workload: hello}\nmachines: {web: {}, db: {}}\n")
    assert offered(f"vmm launch {path} --machine ") == ["web", "db"]


def test_standard_input_is_left_to_the_command() -> None:
    """Of vmm launch -: nobody types there while names are completed."""
    reader, writer = os.pipe()
    try:
        done = subprocess.run([sys.executable, "-m", "vmm"], stdin=reader, capture_output=True, text=True, timeout=30,
                              check=False, env={**os.environ, "_VMM_COMPLETE": "bash_complete", "COMP_CWORD": "4",
                                                "COMP_WORDS": "vmm launch - --machine "})
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_every_verb_of_a_machine_completes_its_name(machine: Machine) -> None:
    """By what the help calls its argument. Machines of a fleet are asked for only when a verb is carried out, and a
    pair of keys has a name of its own."""
    others = {"keys", "fleet stop"}
    asked = {words for words, command in verbs() for param in command.params[:1]
             if isinstance(param, click.Argument) and words not in others
             and re.search(r"\b(NAME|RUN)\b", param.make_metavar(click.Context(command)))}
    assert {"status", "events", "top", "qmp", "exporter", "report", "trace record", "predict"} <= asked
    assert [words for words in sorted(asked) if NAME not in offered(f"vmm {words} compl")] == []


@needs_shell("bash")
def test_bash(machine: Machine) -> None:
    script = ('eval "$(vmm completion bash)"; complete -p vmm; COMP_WORDS=(vmm memory remove com); COMP_CWORD=3; '
              '_vmm_completion vmm; printf "%s\\n" "${COMPREPLY[@]}"')
    assert in_shell("bash", script) == ["complete -o nosort -F _vmm_completion vmm", NAME, ""]


@needs_shell("fish")
def test_fish(machine: Machine) -> None:
    script = 'vmm completion fish | source; complete -C "vmm memory remove com"; complete -C "vmm statu"'
    assert in_shell("fish", script)[:2] == [f"{NAME}\trunning", "status\tShow the status of a machine."]


@needs_shell("zsh")
def test_zsh(machine: Machine) -> None:
    script = ('autoload -U compinit; compinit -D; eval "$(vmm completion zsh)"; print -r -- $_comps[vmm]; '
              'COMP_WORDS="vmm memory remove com" COMP_CWORD=3 _VMM_COMPLETE=zsh_complete vmm')
    assert in_shell("zsh", script)[:4] == ["_vmm_completion", "plain", NAME, "running"]
