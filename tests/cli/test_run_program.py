"""``vmm run``: a program's streams, signals, terminal and exit status are those of the command."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import vmm, vmm_here
from machines import until
from packages import unpacked

from vmm.client.machine import list_machines
from vmm.client.terminal import Escape
from vmm.errors import ExitCode

pytestmark = pytest.mark.kvm

BUSYBOX = "/bin/busybox"
WAIT = 60.0     # seconds


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shell."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("bin", "etc"):
        (folder / name).mkdir()
    shutil.copy(unpacked("busybox-static") / "bin/busybox", folder / "bin/busybox")
    (folder / "etc/motd").write_text("hello\n")
    return folder


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmm", "run", "--root", str(root), "--", BUSYBOX, *arguments]


def ran(root: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(root, *arguments), capture_output=True, timeout=WAIT, check=False, **options)


@contextmanager
def running(root: Path, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A shell that has said ``ready``."""
    with subprocess.Popen(command(root, *arguments), stdout=subprocess.PIPE, **options) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
            process.wait(WAIT)
        finally:
            if process.poll() is None:
                process.terminate()


# --- statuses and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "status"), [
    ("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("kill -SEGV $$", 139)])
def test_exit_status(root: Path, script: str, status: int) -> None:
    assert ran(root, "sh", "-c", script).returncode == status


def test_streams_are_apart(root: Path) -> None:
    done = ran(root, "sh", "-c", "read x; echo out $x; echo err >&2", input=b"in\n")
    assert (done.returncode, done.stdout) == (0, b"out in\n")
    assert done.stderr.splitlines()[0] == b"err"


@pytest.mark.parametrize("stdin", ["file", "fifo", "/dev/null", "closed"])
def test_standard_input(root: Path, stdin: str, tmp_path: Path) -> None:
    path = tmp_path / "in"
    if stdin == "fifo":
        os.mkfifo(path)
        writer = subprocess.Popen(["sh", "-c", 'printf "some\\nwords" > "$0"', str(path)])
    elif stdin == "file":
        path.write_text("some\nwords")
    how = {"/dev/null": "</dev/null", "closed": "<&-"}.get(stdin, f"<{path}")
    done = subprocess.run(["sh", "-c", f'"$@" {how}', "sh", *command(root, "cat")], stdout=subprocess.PIPE,
                          timeout=WAIT, check=False)
    if stdin == "fifo":
        writer.wait(WAIT)
    assert (done.returncode, done.stdout) == (0, b"some\nwords" if path.exists() else b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(root: Path, closed: str) -> None:
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command(root, "sh", "-c", "echo x; exit 3")],
                          timeout=WAIT, check=False, stdout=subprocess.DEVNULL)
    assert done.returncode == 3


def test_much_goes_in_and_comes_out(root: Path) -> None:
    data = random.Random(1).randbytes(20 << 20)
    done = ran(root, "sh", "-c", "busybox cat; echo end >&2", input=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_reader_that_leaves_ends_the_machine(root: Path, stream: str) -> None:
    read, written = os.pipe()
    streams = {"stdout": written} if stream == "1" else {"stdout": subprocess.DEVNULL, "stderr": written}
    process = subprocess.Popen(command(root, "sh", "-c", f"while :; do echo x >&{stream}; done"), **streams)
    os.close(written)
    assert os.read(read, 2) == b"x\n"
    os.close(read)
    assert process.wait(WAIT) == 128 + signal.SIGPIPE
    assert list_machines() == []


def test_what_is_not_read_is_left_for_others(root: Path) -> None:
    """As in a loop of a shell over lines that it reads."""
    done = subprocess.run(["sh", "-c", 'while read x; do "$@" < /dev/stdin; done', "sh", *command(root, "echo", "hi")],
                          input=b"a\nb\n", stdout=subprocess.PIPE, timeout=WAIT, check=False)
    assert done.stdout == b"hi\nhi\n"


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_is_the_programs(root: Path) -> None:
    script = 'trap "echo caught; exit 3" TERM; echo ready; while :; do busybox sleep 0.05; done'
    with running(root, "sh", "-c", script) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=WAIT)[0] == b"caught\n"
    assert process.returncode == 3


def test_an_interrupt_ends_a_program_that_does_not_read(root: Path) -> None:
    """Whatever comes in waits in front of it. (The child says that it is ready: while a shell starts one, it puts an
    interrupt off until that one has ended.)"""
    script = 'read x; busybox sh -c "echo ready; exec busybox sleep 100"; echo no'
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as much, \
            running(root, "sh", "-c", script, stdin=much.stdout) as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT)[0] == b""
        much.terminate()
    assert process.returncode == 128 + signal.SIGINT


def test_a_second_interrupt_ends_the_machine(root: Path) -> None:
    with running(root, "sh", "-c", 'trap "echo ready" INT; echo ready; while :; do busybox usleep 1; done') as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT)
    assert process.returncode == 128 + signal.SIGINT
    assert list_machines() == []


# --- terminals ------------------------------------------------------------------------------------------------------


class Session:
    """``vmm run`` as the only thing that is done at a terminal, which shows ``shown``."""

    def __init__(self, arguments: list[str]) -> None:
        self.shown = b""
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
                os.execvp(arguments[0], arguments)
            finally:
                os._exit(1)
        self.settings = termios.tcgetattr(self._terminal)

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, what: bytes) -> None:
        """It is shown; what came before is forgotten."""
        deadline = time.monotonic() + WAIT
        while what not in self.shown:
            assert select.select([self._terminal], [], [], deadline - time.monotonic())[0], self.shown
            try:
                self.shown += os.read(self._terminal, 65536)
            except OSError as exc:      # nobody has the other end
                raise AssertionError(f"ended: {self.shown!r}") from exc
        self.shown = self.shown.partition(what)[2]

    def wait(self) -> int:
        """Exit status. The terminal is as it was."""
        while True:
            try:
                self.shown += os.read(self._terminal, 65536)
            except OSError:     # EIO: nobody has the other end
                break
        return self._reap()

    def _reap(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def hang_up(self) -> None:
        os.close(self._terminal)
        self._terminal = os.open(os.devnull, os.O_RDWR)
        self._reap()

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self._terminal)[3] & termios.ICANON

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@contextmanager
def session(*arguments: str) -> Iterator[Session]:
    made = Session(list(arguments))
    try:
        yield made
    finally:
        made.close()


@contextmanager
def shell(root: Path) -> Iterator[Session]:
    """With a prompt. Around it is another, to say what state the terminal is left in."""
    inner = " ".join(f"'{each}'" for each in command(root, "sh"))
    with session("sh", "-c", f"{inner}; echo status $?; stty -a") as made:
        made.expect(b"/ # ")
        yield made


def test_a_shell_at_a_terminal(root: Path) -> None:
    with shell(root) as terminal:
        assert terminal.is_raw()
        terminal.type(b"echo a$((1+1))b\r")
        terminal.expect(b"a2b\r\n")
        terminal.type(b"busybox stty size\r")
        terminal.expect(b"24 80\r\n")
        terminal.resize(30, 100)
        terminal.type(b"busybox sleep 0.2; busybox stty size\r")
        terminal.expect(b"30 100\r\n")
        terminal.type(b"busybox echo u$((1))p; busybox cat\r")
        terminal.expect(b"u1p\r\n")       # the shell reads what is typed until then
        terminal.type(b"line\x7f\x7fon\r")
        terminal.expect(b"line\b \b\b \bon\r\n")
        terminal.expect(b"lion\r\n")
        terminal.type(b"\x04")
        terminal.expect(b"/ # ")
        terminal.type(b"busybox sh -c 'echo u$((1))p; exec busybox sleep 100'\r")
        terminal.expect(b"u1p\r\n")       # it is in the foreground
        terminal.type(b"\x03")
        terminal.expect(b"^C")
        terminal.expect(b"/ # ")
        terminal.type(b"echo st$?\r")
        terminal.expect(b"st130\r\n")
        terminal.type(b"exit 5\r")
        terminal.expect(b"status 5\r\n")
        terminal.wait()
        assert b" icanon" in terminal.shown
        assert b" echo " in terminal.shown


def test_what_a_program_writes_without_end_can_be_interrupted(root: Path) -> None:
    with shell(root) as terminal:
        terminal.type(b"busybox yes\r")
        terminal.expect(b"y\r\ny\r\n")
        terminal.type(b"\x03")
        terminal.expect(b"^C")
        terminal.expect(b"/ # ")
        terminal.type(b"exit\r")
        terminal.expect(b"status 130\r\n")
        terminal.wait()


def test_the_way_out(root: Path) -> None:
    with shell(root) as terminal:
        terminal.type(b'trap "" INT TERM HUP; while :; do :; done\r')
        terminal.expect(b"done\r\n")
        terminal.type(b"\x1dq")
        terminal.expect(b"status %d\r\n" % ExitCode.STOPPED)
        terminal.wait()
        assert b" icanon" in terminal.shown
    assert list_machines() == []


def test_a_terminal_that_hangs_up_ends_the_program(root: Path) -> None:
    with session(*command(root, "sh")) as terminal:
        terminal.expect(b"/ # ")
        terminal.hang_up()
    until(lambda: list_machines() == [], "the machine has gone")


def test_streams_at_a_terminal(root: Path) -> None:
    arguments = command(root, "tty")
    arguments.insert(arguments.index("--root"), "--no-terminal")
    with session(*arguments) as terminal:
        assert terminal.wait() == 1
        assert b"not a tty" in terminal.shown


def test_what_is_typed_around_the_way_out() -> None:
    assert Escape().passed(b"a\x1dbc\x1d\x1dq") == (b"a\x1dbc\x1d\x1dq", False)
    assert Escape().passed(b"a\x1dqb") == (b"a", True)
    escape = Escape()
    assert escape.passed(b"a\x1d") == (b"a", False)
    assert escape.passed(b"q") == (b"", True)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "said"), [
    (["--root", "ROOT", "nosuch"], "nosuch: No such file or directory"),
    (["--root", "ROOT", "/etc/motd"], "/etc/motd: Permission denied"),
    (["--root", "ROOT/etc/motd", "/bin/x"], "--root ROOT/etc/motd: is neither a directory nor a tar file"),
    (["--root", "ROOT/nosuch", "/bin/x"], "'ROOT/nosuch' does not exist"),
    (["nosuch-on-any-host"], "nosuch-on-any-host: not found on this host"),
    (["--root", "ROOT", "--memory", "much", BUSYBOX], "--memory: 'much' is not a size"),
    (["--root", "ROOT", "--memory", "1PiB", BUSYBOX], "--memory: "),
    (["--root", "ROOT", "--threads", "0", BUSYBOX], "'--threads': 0 is not in the range"),
    (["--root", "ROOT", "--threads", "many", BUSYBOX], "'--threads': 'many' is not a valid integer"),
    (["--root", "ROOT", "--ring", "5", BUSYBOX], "--ring: must be a power of two"),
    (["--root", "ROOT", "--seed", "-1", BUSYBOX], "--seed: must be from 0"),
    (["--root", "ROOT", "--env", "A", BUSYBOX], "--env A: write NAME=VALUE"),
    (["--root", "ROOT", "--directory", "/nosuch", BUSYBOX], "--directory: /nosuch: No such file or directory"),
    (["--root", "ROOT", "--name", "A b", BUSYBOX], "invalid machine name 'A b'"),
    (["--terminal", "--root", "ROOT", BUSYBOX], "--terminal: standard input and output are not a terminal"),
    (["--file", "/x=/nosuch", "/x"], "--file: /nosuch: No such file or directory")], ids=lambda each: str(each)[-40:])
def test_errors_name_what_was_given(root: Path, arguments: list[str], said: str) -> None:
    done = vmm_here("run", *(each.replace("ROOT", str(root)) for each in arguments))
    assert done.returncode == ExitCode.BAD_INPUT
    assert said.replace("ROOT", str(root)) in done.stderr
    assert "guest." not in done.stderr


def test_a_name_that_is_taken(root: Path) -> None:
    with running(root, "sh", "-c", "echo ready; read x", stdin=subprocess.PIPE) as process:
        name = list_machines()[0]["name"]
        done = vmm("run", "--root", str(root), "--name", name, BUSYBOX, "true")
        assert done.returncode == ExitCode.BAD_INPUT
        assert f"a machine named '{name}' is already running" in done.stderr
        process.communicate(b"x\n", timeout=WAIT)


def test_an_end_that_is_not_the_programs_is_said(root: Path) -> None:
    done = vmm("run", "--root", str(root), "--timeout", "300ms", BUSYBOX, "sleep", "100")
    assert (done.returncode, "before the program: timeout" in done.stderr) == (ExitCode.TIMEOUT, True)
