"""Linux programs on the software CPU, where there is no KVM: as natively, whatever happens to their machine meanwhile;
what it cannot run is said."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from inside import compiled, inside, natively
from moving import Followed, begun, migrated, name_of
from needs import missing
from packages import unpacked
from places import TOP

from vmm.client.programs import program_machine, program_spec
from vmm.consumers import snapshot
from vmm.consumers.migration.fitness import in_the_way
from vmm.consumers.migration.offers import Limits
from vmm.consumers.migration.wire import Needs
from vmm.errors import ExitCode, VmmError

pytestmark = pytest.mark.root       # what is compared runs in a root of its own

SOFTWARE = ("--accel", "unicorn")
STEPS = "300"     # some seconds: it must not end before what is done to it


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in ("bin", "dev", "proc", "tmp", "root"):
        (folder / name).mkdir()
    (folder / "data").write_text("".join(f"{number * 7919 % 1000} {number}\n" for number in range(300)))
    return folder


def test_a_shell_and_its_children(root: Path, tmp_path: Path) -> None:
    shutil.copy(unpacked("busybox-static") / "bin/busybox", root / "bin/busybox")
    script = ("echo $((6 * 7)); busybox sort -n /data | busybox head -n 5; busybox cat /data /data | busybox wc; "
              "busybox ls /bin | busybox grep busy; for i in 1 2 3; do echo $i; done > /tmp/x; busybox md5sum < /data; "
              "read a < /tmp/x; echo $a; exit 7")
    command = ["/bin/busybox", "sh", "-c", f"PATH=/bin; {script}"]
    native, ran = natively(root, *command), inside(root, tmp_path, *command, options=("--verify", *SOFTWARE))
    assert native.code == 7
    assert (ran.code, ran.output, ran.error) == (native.code, native.output, native.error)
    assert ran.verification["ok"]
    assert not ran.verification["lost_pages"]
    writers = [each for each in ran.report["vcpus"] if each["accelerator"] == "unicorn" and each["dirty_pages"]]
    assert len(writers) > 1     # each process has its own


def test_rings_that_get_full(root: Path, tmp_path: Path) -> None:
    program = compiled(root, "steps")
    native = natively(root, program, "3")
    ran = inside(root, tmp_path, program, "3", options=("--verify", *SOFTWARE, "--ring", "1024"))
    assert (ran.code, ran.output) == (native.code, native.output)
    assert ran.verification["ok"]


def test_an_instruction_that_it_does_not_have(root: Path, tmp_path: Path) -> None:
    program = compiled(root, "wide", "-mavx")
    ran = inside(root, tmp_path, program, options=SOFTWARE)
    assert ran.code == ExitCode.GUEST_CRASHED
    last, = ran.error.decode().splitlines()
    assert "the software CPU does not have the instruction at 0x" in last
    assert " v" in last


def test_it_goes_on_from_a_snapshot_and_elsewhere(root: Path, tmp_path: Path) -> None:
    """Saved while it runs; its coordinator killed; migrated. What a coordinator had not passed on yet of what is said
    goes with it: there the last line says it all."""
    command = [compiled(root, "steps"), STEPS]
    native = natively(root, *command)
    assert native.code == 3
    with begun(root, name_of("soft"), *command, accel="unicorn") as (program, trees):
        program.until("step 5\n")
        with program.machine.paused("test"):
            program.hear(0.2)
            snapshot.create(program.machine, tmp_path / "chain")
            before = program.said
        os.kill(program.machine.status()["coordinator"]["pid"], signal.SIGKILL)
        program.until("step 20\n")
        assert program.machine.status()["coordinator"]["restarts"] == 1
        with migrated(program, trees, tmp_path, name_of("soft"), accel="unicorn") as moved:
            assert moved.end()["program"]["exit_status"] == 3
            assert moved.said.splitlines()[-1] == native.output.decode().splitlines()[-1]
    with snapshot.restore(tmp_path / "chain", machine_name=name_of("soft"), accel="unicorn", trees=trees) as machine:
        again = Followed(machine, before)
        assert again.end()["program"]["exit_status"] == 3
        assert again.said == native.output.decode()


@pytest.mark.kvm
@pytest.mark.long
def test_on_kvm_from_there_on(root: Path, tmp_path: Path) -> None:
    command = [compiled(root, "steps"), STEPS]
    native = natively(root, *command)
    with begun(root, name_of("soft"), *command, accel="unicorn") as (program, trees):
        program.until("step 5\n")
        with migrated(program, trees, tmp_path, name_of("hard"), accel="kvm") as moved:
            report = moved.end()
            assert (report["accelerator"], report["program"]["exit_status"]) == ("kvm", 3)
            assert moved.said == native.output.decode()


@pytest.mark.kvm
def test_not_from_kvm(root: Path, tmp_path: Path) -> None:
    """What it has seen of the processor there it would use."""
    with begun(root, name_of("hard"), compiled(root, "steps"), "1000", accel="kvm") as (program, trees):
        program.until("step 1\n")
        snapshot.create(program.machine, tmp_path)
        program.machine.stop()
    with pytest.raises(VmmError, match="restore it on kvm"):
        snapshot.restore(tmp_path, machine_name=name_of("soft"), accel="unicorn", trees=trees)


def test_a_program_of_another_processor_is_refused(root: Path) -> None:
    """By a target that is asked before anything is sent."""
    program = program_spec(compiled(root, "steps"), ["1"], root=str(root))
    spec = program_machine(name_of("soft"), program, memory=16 << 20, accel="unicorn")
    assert not in_the_way(spec, Needs("unicorn"), Limits())
    found, = in_the_way(spec, Needs("kvm", ["avx2"]), Limits())
    assert "has begun on accel kvm" in found


def test_where_there_is_no_kvm_it_is_chosen(root: Path) -> None:
    """For a program, without being asked for."""
    program = compiled(root, "steps")
    command = [sys.executable, "-m", "vmm", "run", "--report", "--root", str(root), "--", program, "1"]
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh"]
    ran = subprocess.run([*([] if missing("kvm") else hidden), *command], capture_output=True, timeout=120, check=False,
                         cwd=TOP, env={**os.environ, "COLUMNS": "120"})
    assert ran.returncode == 3, ran.stderr
    assert b", unicorn, " in ran.stderr
