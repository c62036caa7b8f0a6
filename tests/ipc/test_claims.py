"""Claims: what a lock is held for is removed by who holds it and by nobody else, whoever wants it at the same time.

Real processes, real locks; a machine is only a name here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import until

from ipc.claims import Belongings, Claim, ClaimError, Held
from ipc.shm import SHM_DIRECTORY, Segment, list_segments
from ipc.steps import STEPS

#: Claims a name, makes a segment and a file, and stays until it is killed or its standard input ends.
OWNER = """
import sys; from pathlib import Path
from ipc.claims import Belongings
from ipc.shm import Segment
owned = Belongings(sys.argv[1], Path(sys.argv[2]))
taken = owned.claim()
owned.directory.mkdir()
(owned.directory / "socket").touch()
made = Segment.create(f"/{owned.prefix}ram0", 4096)
print("up", flush=True)
sys.stdin.read()
print(len(taken.release()), flush=True)
"""


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[Belongings]:
    yield Belongings(f"shardvmm-test.{os.getpid()}.web", tmp_path / "web")
    for name in list_segments(f"shardvmm-test.{os.getpid()}."):
        (SHM_DIRECTORY / name[1:]).unlink()


def segment(name: str) -> Path:
    """A segment that a dead process has left."""
    made = Segment.create(f"/{name}", 4096)
    made._owner = False
    made.close()
    return SHM_DIRECTORY / name


def start(owned: Belongings, steps: Path | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, **({} if steps is None else {"VMM_STEPS": str(steps)})}
    return subprocess.Popen([sys.executable, "-c", OWNER, owned.name, str(owned.directory)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)


def up(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "up\n"


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_an_owner_keeps_everyone_out_and_takes_all_along(owned: Belongings) -> None:
    assert not owned.held()
    process = start(owned)
    assert up(process)
    assert owned.held()
    assert owned.owner_pid() == process.pid
    with pytest.raises(Held):
        owned.claim()
    assert owned.clear() is None
    assert len(owned.left()) == 3
    assert process.communicate("")[0] == "2\n"
    assert owned.left() == []
    assert not owned.held()


def test_a_killed_owner_leaves_what_the_next_one_clears(owned: Belongings) -> None:
    for take in (False, True):
        process = start(owned)
        assert up(process)
        end(process)
        assert not owned.held()
        assert owned.owner_pid() is None
        assert len(owned.left()) == 3
        if take:
            taken = owned.claim()
            assert owned.left() == [f"/{owned.name}"]
            assert taken.release() == []
        else:
            assert len(owned.clear() or []) == 3
        assert owned.left() == []


def test_names_that_begin_alike_are_strangers(owned: Belongings, tmp_path: Path) -> None:
    """``web`` and ``web-2``, and ``we``: what is of one is of no other."""
    others = [segment(f"{owned.name}-2.ram0"), segment(f"{owned.name}-ram0"), segment(f"{owned.name[:-1]}.ram0")]
    (tmp_path / "web-2").mkdir()
    taken = owned.claim()
    segment(f"{owned.prefix}ram0")
    assert taken.release() == [f"/{owned.prefix}ram0"]
    segment(f"{owned.prefix}client.a.0")
    assert owned.clear() == [f"/{owned.prefix}client.a.0"]
    assert all(path.exists() for path in others)
    assert (tmp_path / "web-2").is_dir()


def test_looking_never_stands_in_the_way_of_a_claim(owned: Belongings) -> None:
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            owned.held()
            owned.owner_pid()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(300):
            owned.claim().release()
    finally:
        over.set()
        for looker in lookers:
            looker.join()


def test_of_many_that_claim_and_clear_at_once_one_owns_it(owned: Belongings) -> None:
    """Each that owns it makes a file and finds it untouched afterwards, whatever the others try meanwhile."""
    owners = 0
    wrong: list[str] = []
    counted = threading.Lock()

    def compete(number: int) -> None:
        nonlocal owners
        for attempt in range(60):
            try:
                taken = owned.claim()
            except Held:
                owned.clear()
                continue
            except ClaimError as exc:
                wrong.append(str(exc))
                return
            mine = owned.directory / f"{number}-{attempt}"
            owned.directory.mkdir()
            mine.touch()
            made = segment(f"{owned.prefix}{number}")
            for _ in range(3):
                owned.clear()
            if [p.name for p in owned.directory.iterdir()] != [mine.name] or not made.exists():
                wrong.append(f"{mine.name} was not left alone")
            with counted:
                owners += 1
            taken.release()

    competitors = [threading.Thread(target=compete, args=(n,)) for n in range(4)]
    for competitor in competitors:
        competitor.start()
    for competitor in competitors:
        competitor.join()
    assert not wrong
    assert owners > 10
    assert owned.left() == []


def test_a_claim_is_shared_by_who_inherits_it(owned: Belongings) -> None:
    """The coordinator's part: the name stays taken until both have gone, and either may end it."""
    taken = owned.claim()
    owned.directory.mkdir()
    code = ("import sys; from pathlib import Path; from ipc.claims import Belongings, Claim\n"
            "taken = Claim(Belongings(sys.argv[1], Path(sys.argv[2])), int(sys.argv[3]))\n"
            "print('up', flush=True); sys.stdin.read(); taken.release()")
    process = subprocess.Popen([sys.executable, "-c", code, owned.name, str(owned.directory), str(taken.fd)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[taken.fd])
    assert up(process)
    os.close(taken.fd)      # as if killed: nothing is released
    assert owned.held()
    assert owned.clear() is None
    process.communicate("")
    assert not owned.held()
    assert owned.left() == []


def test_a_lock_that_was_removed_is_another_ones_by_then(owned: Belongings) -> None:
    """An owner whose lock somebody has unlinked does not take the next owner's things along."""
    first = owned.claim()
    owned.lock_path.unlink()
    assert not owned.held()
    second = owned.claim()
    owned.directory.mkdir()
    ram = segment(f"{owned.prefix}ram0")
    assert first.release() == []
    assert ram.exists()
    assert owned.directory.is_dir()
    assert owned.held()
    assert len(second.release()) == 2
    third = owned.claim()       # and with no next owner, what is there was its own
    owned.directory.mkdir()
    owned.lock_path.unlink()
    assert third.release() == [str(owned.directory)]
    assert owned.left() == []


def test_what_is_somebody_elses_is_neither_lock_nor_directory(owned: Belongings, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    owned.directory.symlink_to(precious)
    assert owned.clear() == []
    assert (precious / "below").is_dir()
    owned.directory.unlink()
    owned.lock_path.symlink_to(tmp_path / "made")
    for call in (owned.claim, owned.clear):
        with pytest.raises(ClaimError, match="cannot be locked"):
            call()
    assert not owned.held()
    assert not (tmp_path / "made").exists()
    owned.lock_path.unlink()
    os.mkfifo(owned.lock_path)
    with pytest.raises(ClaimError, match="another user"):
        owned.claim()
    owned.lock_path.unlink()


@pytest.mark.root
def test_another_users_lock_is_refused(owned: Belongings) -> None:
    owned.lock_path.touch()
    os.chown(owned.lock_path, 12345, 12345)
    with pytest.raises(ClaimError):
        owned.claim()
    assert not owned.held()


@pytest.mark.parametrize("step", [s for what in ("claiming a machine's name", "clearing what a machine has left")
                                  for s in STEPS[what]])
def test_a_kill_at_any_step_leaves_a_name_that_can_be_had(owned: Belongings, step: str, tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    (steps / f"kill-{step}").touch()
    owned.directory.mkdir()
    segment(f"{owned.prefix}ram0")
    process = start(owned, steps)
    process.communicate("", timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (steps / f"kill-{step}").exists()
    assert not owned.held()
    until(lambda: owned.clear() is not None, "cleared")
    assert owned.left() == []
    taken = owned.claim()
    taken.release()
    assert owned.left() == []


def test_a_stopped_process_costs_seconds_and_an_error(owned: Belongings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stands still while it clears is named, and not waited for without end."""
    monkeypatch.setattr("ipc.claims._PATIENCE", 0.2)
    code = ("import sys; from pathlib import Path; import ipc.claims as c\n"
            "with c._changing(c.Belongings(sys.argv[1], Path(sys.argv[2]))):\n"
            "    print('up', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, owned.name, str(owned.directory)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert up(process)
    for call in (owned.claim, owned.clear):
        with pytest.raises(ClaimError, match="locked by another process"):
            call()
    end(process)
    owned.claim().release()


def test_release_is_idempotent(owned: Belongings) -> None:
    taken: Claim = owned.claim()
    taken.release()
    assert taken.release() == []
