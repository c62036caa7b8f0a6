"""What a process of a machine has given up: each forbidden thing is tried, in a process that has given it up and in
one that has not, where it works."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machines import ANY, spec, until

from ipc.linux import process
from ipc.run import python_module
from ipc.shm import PAGE_SIZE
from vmm.client.machine import Machine
from vmm.machine.names import belongings

REFUSED = 77

# What is tried: with `secret`, a file outside, `inside`, the machine's directory, and `parent`, another process.
FILES = {
    "read a file": "open(secret).read()",
    "list a directory": "os.listdir(os.path.dirname(secret))",
    "write a file": "open(secret, 'w').close()",
    "make a file": "open(secret + '.new', 'w').close()",
    "remove a file": "os.unlink(secret)",
}
CALLS = {
    "trace": "check(LIBC.ptrace(0, 0, 0, 0))",
    "read another's memory": "check(LIBC.process_vm_readv(os.getpid(), None, 0, None, 0, 0))",
    "leave a namespace": "check(LIBC.unshare(0x200))",
    "another user": "os.setuid(os.getuid())",
}
ONLY_VCPU = {
    "run a program": "os.execv('/bin/true', ['true'])",
    "make a process": "os.fork() or os._exit(0)",
    "open a TCP socket": "socket.socket(socket.AF_INET)",
    "signal another": "os.kill(parent, 0)",
    "signal another by its descriptor": "signal.pidfd_send_signal(os.pidfd_open(parent), 0)",
    "let a file grow": "os.write(os.open(inside + '/new', os.O_CREAT | os.O_WRONLY), b'x')",
    "have memory under no name": "os.memfd_create('m')",
    "more files": "resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[0],) * 2)",
}

PROGRAM = """
import os, resource, signal, socket, sys
from pathlib import Path
from ipc import sandbox
from ipc.linux import process
from ipc.linux.libc import LIBC, check
secret, inside, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
sandbox.missing()
{confine}
try:
    {attempt}
except OSError as error:
    print(error)
    os._exit({refused})
os._exit(0)
"""
CONFINE = {
    "nothing": "",
    "vcpu": "process.no_new_privileges(); sandbox.VcpuConfinement(Path(inside)).apply()",
    # As workers are made: by a process that has made it ready for all of them.
    "forked vcpu": """
process.no_new_privileges()
confinement = sandbox.VcpuConfinement(Path(inside))
for last in False, True:
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if last:
            os._exit(status)
    else:
        confinement.apply()
        if last:
            break
        os._exit(0)
""",
    "machine": "process.no_new_privileges(); sandbox.confine_machine([], [Path(inside)], Path(inside))",
}


def attempt(code: str, confined: str, folder: Path) -> int:
    """The exit status of a process that tries it."""
    inside, secret = folder / "inside", folder / "outside" / "secret"
    for path in (inside, secret.parent):
        path.mkdir(exist_ok=True)
    secret.write_text("s")
    text = PROGRAM.format(confine=CONFINE[confined], attempt=code, refused=REFUSED)
    done = subprocess.run([sys.executable, "-c", text, str(secret), str(inside), str(os.getpid())],
                          timeout=60, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.sandbox
@pytest.mark.parametrize("what", [*FILES, *CALLS, *ONLY_VCPU])
def test_a_worker_can_do_no_more(what: str, tmp_path: Path) -> None:
    code = {**FILES, **CALLS, **ONLY_VCPU}[what]
    assert attempt(code, "nothing", tmp_path) == 0
    assert attempt(code, "vcpu", tmp_path) == REFUSED
    assert attempt(code, "forked vcpu", tmp_path) == REFUSED


@pytest.mark.sandbox
@pytest.mark.parametrize("what", [*FILES, *CALLS])
def test_keeper_and_coordinator_can_do_no_more(what: str, tmp_path: Path) -> None:
    assert attempt({**FILES, **CALLS}[what], "machine", tmp_path) == REFUSED


@pytest.mark.sandbox
@pytest.mark.parametrize(("confined", "code"), [
    ("vcpu", "import threading; thread = threading.Thread(target=int); thread.start(); thread.join()"),
    ("vcpu", "socket.socket(socket.AF_UNIX).close()"),
    ("vcpu", "os.kill(os.getpid(), 0)"),
    ("forked vcpu", "os.kill(os.getpid(), 0)"),
    ("forked vcpu", "import threading; thread = threading.Thread(target=int); thread.start(); thread.join()"),
    ("vcpu", "os.listdir(inside)"),
    ("vcpu", "import wave"),        # Python's own modules
    ("machine", "os.execv('/bin/true', ['true'])"),
    ("machine", "os.fork() or os._exit(0)"),
    ("machine", "open(inside + '/new', 'w').write('x')"),
    ("machine", "os.kill(parent, 0)")])
def test_what_is_needed_works(confined: str, code: str, tmp_path: Path) -> None:
    assert attempt(code, confined, tmp_path) == 0


#: Which system calls are refused to a process before it gives anything up.
WITHOUT = """
import sys
from pathlib import Path
import pyseccomp
from ipc import sandbox
from ipc.linux import process

process.no_new_privileges()
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for name in sys.argv[2:]:
    rules.add_rule(pyseccomp.ERRNO(1), name)
rules.load()
try:
    {confine}
except sandbox.SandboxError as error:
    print(error)
"""


@pytest.mark.sandbox
@pytest.mark.parametrize(("calls", "said"), [
    (["landlock_restrict_self"], "cannot give up access to files (Landlock): "),
    (["landlock_add_rule"], "cannot give up access to files (Landlock): "),
    (["seccomp", "prctl"], "cannot give up ")])
@pytest.mark.parametrize("confined", ["vcpu", "machine"])
def test_what_cannot_be_given_up_is_said(calls: list[str], said: str, confined: str, tmp_path: Path) -> None:
    """It is an error where the host can do it: nobody goes on with more than he should have."""
    text = f"inside = {str(tmp_path)!r}\n" + WITHOUT.format(confine=CONFINE[confined].partition("; ")[2])
    done = subprocess.run([sys.executable, "-c", text, "-", *calls], timeout=60, capture_output=True, text=True,
                          check=False)
    assert done.stderr == ""
    assert done.stdout.startswith(said), done.stdout
    assert len(done.stdout.splitlines()) == 1


# --- of a real machine -------------------------------------------------------------------------------------------


def status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def processes(machine: Machine) -> dict[str, int]:
    shown = machine.status()
    keeper = belongings(machine.name).owner_pid()
    assert keeper
    return {"keeper": keeper, "coordinator": shown["coordinator"]["pid"],
            **{f"vcpu{each['index']}": each["pid"] for each in shown["vcpus"]}}


@pytest.mark.sandbox
@pytest.mark.parametrize("accel", ANY)
def test_every_process_of_a_machine_has_given_it_up(accel: str, tmp_path: Path) -> None:
    """And none of them has a file of the process that launched it."""
    path = tmp_path / "launcher's"
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with Machine.launch(spec("idle", accel=accel, vcpus=2, milliseconds=0, timeout=None)) as machine:
            for name, pid in processes(machine).items():
                shown = status(pid)
                assert (name, shown["NoNewPrivs"], shown["Seccomp"]) == (name, "1", "2")
                files = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
                assert str(path) not in files
                if name.startswith("vcpu"):
                    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
                    assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[1] <= 1024


@pytest.mark.sandbox
def test_a_coordinator_that_takes_over_has_given_it_up_too() -> None:
    """It begins so: its keeper has."""
    with Machine.launch(spec("idle", accel="unicorn", vcpus=1, milliseconds=0, timeout=None)) as machine:
        first = processes(machine)["coordinator"]
        os.kill(first, signal.SIGKILL)
        until(lambda: machine.status()["coordinator"]["restarts"] == 1, "another coordinator takes over")
        pid = processes(machine)["coordinator"]
        assert pid != first
        assert (status(pid)["NoNewPrivs"], status(pid)["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("accel", ANY)
def test_no_process_of_a_machine_dumps_its_memory(accel: str) -> None:
    """proc_pid_smaps(5): "dd" is do not include area into core dump."""
    with Machine.launch(spec("idle", accel=accel, vcpus=2, milliseconds=0, timeout=None)) as machine:
        for name, pid in processes(machine).items():
            text = Path(f"/proc/{pid}/smaps").read_text()
            found = re.findall(r"^[0-9a-f]+-[0-9a-f]+ [^\n]*/dev/shm/shardvmm[^\n]*\.ram0.*?VmFlags:([^\n]*)", text,
                               re.MULTILINE | re.DOTALL)
            assert found or name == "keeper"
            assert all("dd" in flags.split() for flags in found), (name, found)


def test_a_core_dump_has_no_segment_in_it(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if "/" in pattern or "|" in pattern or hard == 0:
        pytest.skip(f"core dumps do not go to the current directory (core_pattern is {pattern}, hard limit {hard})")
    program = tmp_path / "crash.py"
    program.write_text(f"""
import os, resource
from ipc.shm import Segment
resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))
open("/proc/self/coredump_filter", "w").write("0xff")      # everything that may be dumped
with Segment.create("/shardvmm.test.core.{os.getpid()}", {PAGE_SIZE}) as segment:
    segment.buf[:32] = b"".join(bytes([i ^ 85]) for i in range(32))
    segment.unlink()
    kept = bytes(i ^ 86 for i in range(32))
    os.abort()
""")
    done = subprocess.run(python_module("crash"), cwd=tmp_path, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode < 0, done.stderr
    (core,) = tmp_path.glob("core*")
    data = core.read_bytes()
    assert bytes(i ^ 86 for i in range(32)) in data
    assert bytes(i ^ 85 for i in range(32)) not in data



@pytest.mark.sandbox
def test_a_machine_may_read_these_packages_wherever_they_are(tmp_path: Path) -> None:
    """An editable installation has a finder for them, and nothing in sys.path."""
    (tmp_path / "read.py").write_text(f"""
import sys
from pathlib import Path
from ipc import sandbox
sys.path = [each for each in sys.path if Path(each).resolve() not in Path({process.__file__!r}).parents]
sandbox.confine_machine([], [], Path({str(tmp_path)!r}))
print(len(Path({process.__file__!r}).read_text()))
""")
    done = subprocess.run(python_module("read"), cwd=tmp_path, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == len(Path(process.__file__).read_text())
