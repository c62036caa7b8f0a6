"""What is no name is refused by every verb before it becomes a path, and what is removed is only what was named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.client.machine import Machine
from vmm.errors import ExitCode, VmmError
from vmm.machine import names, runtime

#: What people and programs give where a name is asked for.
NOT_NAMES = ["", ".", "..", "/", "../precious", "a/b", "/etc", "-a", "A", "a.b", "a b", "a\n", "a\0", "ä", "a" * 33,
             "~", "*", "a/", "./a", "a-\u0301"]

#: Every verb that takes a machine's name, with what else it needs.
VERBS = [["status"], ["pause"], ["resume"], ["stop"], ["sync"], ["log", "start", "NAME", "0"],
         ["memory", "remove", "NAME", "0"], ["tracking", "NAME", "none"], ["dirty-rate"],
         ["working-set", "NAME", "--output", "/dev/null"], ["trace", "record", "NAME", "/nonexistent/x"],
         ["snapshot", "create", "NAME", "d"],
         ["migrate", "start", "NAME", "ipc:///tmp/x"], ["migrate", "status"], ["migrate", "cancel"], ["gc"],
         ["qmp", "NAME", "/nonexistent/x"]]


def vmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: " ".join(v))
def test_every_verb_refuses_a_path_for_a_name(verb: list[str], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    arguments = verb if "NAME" in verb else [*verb, "NAME"]
    done = vmm(*(str(precious) if a == "NAME" else a for a in arguments))
    assert done.returncode == ExitCode.BAD_INPUT
    assert done.stderr.startswith("vmm: error: invalid machine name ")
    assert len(done.stderr.splitlines()) == 1
    assert (precious / "below").is_dir()


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_no_name_reaches_no_file(name: str, runtime_dir: Path) -> None:
    (runtime_dir / "precious").mkdir()
    (runtime_dir / "shardvmm").mkdir(mode=0o700)
    (runtime_dir / "shardvmm" / "a").mkdir()
    before = sorted(runtime_dir.rglob("*"))
    for call in (runtime.machine_dir, runtime.is_running, runtime.claim, runtime.collect_garbage, Machine.attach,
                 Machine):
        with pytest.raises(VmmError, match="machine name"):
            call(name)
    assert sorted(runtime_dir.rglob("*")) == before
    for path in reversed(before):
        path.rmdir()


@given(st.text(max_size=40))
def test_a_name_is_one_component_of_a_path(text: str) -> None:
    """Whatever passes is one plain component; whatever does not is told in one line."""
    for check in (names.check_machine_name, names.check_client_name, names.check_key_name):
        try:
            name = check(text)
        except VmmError as exc:
            said = str(exc)
        else:
            said = ""
        if said:
            assert said.isprintable()
            continue
        assert name == text
        assert text.isascii()
        assert text.isprintable()
        assert Path(text).name == text
        assert text not in (".", "..")
        assert "/" not in text


def test_directories_that_are_not_machines_are_left_alone(runtime_dir: Path) -> None:
    """What lies in the root under a name that is none is not ours."""
    strange = runtime_dir / "shardvmm" / "Not-A-Machine"
    strange.parent.mkdir(mode=0o700)
    strange.mkdir()
    assert runtime.machine_names() == []
    assert runtime.leftovers() == {}
    assert runtime.collect_garbage() == []
    strange.rmdir()


@pytest.mark.parametrize("what", ["ram0", "ram499", "ram0.1f", "ram0.1f (deleted)", "ram7 (deleted)"])
def test_a_mapping_of_ram_is_known_by_its_name(what: str) -> None:
    line = f"7f0000000000-7f0000400000 rw-s 00000000 00:19 7 /dev/shm{names.segment_name('a-1', what)}"
    assert names.RAM_MAPPING.search(line)
    for other in ("log0", "client.ram0", "xram0"):
        assert not names.RAM_MAPPING.search(line.replace(what, other))
    assert names.machine_of(names.segment_name("a-1", what)[1:]) == "a-1"
