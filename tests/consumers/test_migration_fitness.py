"""Whether a target can run a machine is asked before anything is sent: by ``vmm migrate --check``, which sends nothing
else, and by every migration. What a host's processor has, /proc/cpuinfo says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from machines import ANY, nothing_left, replace, spec
from migrations import TIMEOUT, WALK, PlayedSource, PlayedTarget, Receiver, ended, goes_on, spec_of, touched, vmm

from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.consumers.migration.wire import Needs
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import RamSlot
from vmm.migrate import MigrationError, Options
from vmm.receive import Limits
from workers.accel import registry
from workers.state import STATE_VERSION

#: Of a processor that is not made yet.
UNHEARD = "time-travel"


@pytest.mark.kvm
def test_features_are_those_of_the_processor() -> None:
    """The kernel's own names differ in spelling, and it has some that KVM makes up or hides."""
    found = re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text())
    assert found is not None
    flags = {name.replace("_", "-") for name in found[1].split()}
    shown = registry.features("kvm")
    made_up = {"hypervisor", "x2apic", "tsc-deadline", "tsc-adjust", "umip", "rdpid", "arch-capabilities", "invtsc",
               "core-capabilities",
               # Those that Linux does not list, and that it may not use itself (la57).
               "fdp-excptn", "fcs-fds", "la57"}
    spelt_otherwise = {"sse3", "sse4.1", "sse4.2", "htt", "eist", "sha", "avx512-bf16", "avx512-fp16", "rdt-m",
                       "intel-pt", "cnxt-id"}
    assert {name for name in shown if not name.startswith("xstate-")} - made_up - spelt_otherwise <= flags
    assert {"fpu", "sse2", "cx8", "lm", "nx", "xstate-x87", "xstate-sse"} <= {*shown}
    for name in ("avx", "avx2", "popcnt", "aes", "fma", "bmi2", "movbe"):
        if name in shown:
            assert name in flags


# --- asked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accel", ANY)
def test_a_check_sends_nothing_else_and_the_receiver_still_waits(accel: str, address: str) -> None:
    with Machine.launch(replace(WALK, accel=accel)) as machine, touched("source"):
        receiver = Receiver(address, accel=accel)
        for _ in range(2):
            found = migrate.check(machine, address)
            assert (found.problems, found.notes if accel == "kvm" else []) == ([], [])
            assert (found.name, found.accel) == ("target", accel)
        assert nothing_left("target")
        assert machine.status()["handed_over"] == ""
        goes_on(machine)
        migrate.migrate(machine, address)       # which finds what was promised
        with receiver.result() as moved:
            goes_on(moved)


def test_a_check_is_one_message(running: Machine, address: str) -> None:
    replies = {wire.Check: [wire.Checked(["no room"], ["a note"], "there", "unicorn")]}
    with PlayedTarget(address, replies) as target:
        out, err = ended(vmm("migrate", "source", address, "--check"), ExitCode.MIGRATION_FAILED)
        assert out == f"no room\nsource cannot be migrated to {address}\n"
        assert "a note" in err
        found = json.loads(ended(vmm("migrate", "source", address, "--check", "--json"), ExitCode.MIGRATION_FAILED)[0])
        assert found["problems"] == ["no room"]
    assert [type(message) for message in target.seen] == [wire.Check] * 2
    goes_on(running)


def test_from_the_command_line(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn", limits=Limits(memory=4 << 20))
    out, _ = ended(vmm("migrate", "source", address, "--check"), ExitCode.MIGRATION_FAILED)
    assert "at most 4.00 MiB are taken at the target" in out
    with PlayedSource(address) as other:
        other.offered(spec("idle", accel="unicorn", mib=3, milliseconds=0))
        _, err = ended(vmm("migrate", "source", address, "--check"), ExitCode.MIGRATION_FAILED)
        assert "is busy" in err
        other.say(wire.Abort("that is all"))
    receiver.failure()
    good = Receiver(address, accel="unicorn")
    out, _ = ended(vmm("migrate", "source", address, "--check"))
    assert out == f"source can be migrated to {address}, as target with accel unicorn\n"
    migrate.migrate(running, address)
    good.result().close()


# --- what is in the way -------------------------------------------------------------------------------------------


def needs(**changes: Any) -> Needs:
    return Needs(**{"accel": "kvm", "features": [], **changes})


@pytest.mark.kvm
def test_everything_that_is_in_the_way_is_said_at_once_and_before_anything_is_made(
        address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipc.userfault import Userfault, UserfaultError

    def denied(*args: Any) -> Userfault:
        raise UserfaultError("userfaultfd: Operation not permitted")

    monkeypatch.setattr(Userfault, "make", denied)
    receiver = Receiver(address, accel="kvm", timeout=TIMEOUT, limits=Limits(vcpus=1))
    huge = replace(WALK, accel="kvm", slots=[WALK.slots[0], RamSlot(1, 1 << 38, 1 << 38)])
    wanted = needs(features=["fpu", UNHEARD, "warp-drive"], postcopy=True, state_version=STATE_VERSION + 1)
    with Machine.launch(WALK, name="target"), PlayedSource(address) as one:
        one.say(wire.Check(wire.VERSION, "0", huge, wanted))
        problems = one.hear(wire.Checked).problems
        one.offer(huge, needs=wanted)
        said = one.hear(wire.Refused).error
    for why in ("2 vCPUs, and at most 1", "'target' is already running", "memory: ",
                "post-copy is not possible at the target", "does not have: time-travel, warp-drive",
                f"are of version {STATE_VERSION + 1}"):
        assert len([each for each in problems if why in each]) == 1, why
        assert why in said
    assert len(problems) == 6
    assert "fpu" not in said
    with PlayedSource(address) as good:
        good.offered(replace(WALK, vcpus=1), needs=needs(features=registry.features("kvm")))
        good.say(wire.Abort("that is all"))
    receiver.failure()


def test_a_machine_that_no_configuration_could_make_is_in_its_own_way(address: str) -> None:
    receiver = Receiver(address, accel="unicorn", timeout=TIMEOUT)
    with PlayedSource(address) as one:
        for bad in (replace(WALK, vcpus=0), replace(WALK, shown=["\x1b[2J"]), replace(WALK, shown=["x"] * 5000)):
            one.say(wire.Check(wire.VERSION, "0", bad, needs()))
            answer = one.hear(wire.Checked)
            assert "not a valid machine at the target" in answer.problems[0]
            assert answer.problems[0].isprintable()
        one.offer(WALK, needs=needs(features=["\x1b[2J"]))
        assert "CPU features" in one.hear(wire.Refused).error
        one.say(wire.Check(wire.VERSION + 1, "0", WALK, needs()))
        assert f"protocol {wire.VERSION + 1}" in one.hear(wire.Refused).error
        one.offered(WALK)
        one.say(wire.Abort("that is all"))
    receiver.failure()


def test_a_software_cpu_takes_any_guest_and_a_check_says_what_that_means(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn", timeout=TIMEOUT)
    with PlayedSource(address) as one:
        one.say(wire.Check(wire.VERSION, "0", WALK, needs(features=[UNHEARD])))
        answer = one.hear(wire.Checked)
        assert answer.problems == []
        assert "a guest that uses one of kvm's may crash there" in answer.notes[0]
        one.offered(WALK, needs=needs(features=[UNHEARD]))
        one.say(wire.Abort("that is all"))
    receiver.failure()


# --- what a guest has seen ------------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_what_a_guest_was_shown_elsewhere_goes_with_it(address: str) -> None:
    """It comes from a host with a feature that this one does not have, over a software CPU; from there on it is in the
    way of every processor without it."""
    with Machine.launch(WALK) as model:
        model.pause()
        receiver = Receiver(address, accel="unicorn")
        with PlayedSource(address) as one:
            one.offered(spec_of(model), needs=needs(features=[UNHEARD]))
            one.say(one.state(model))
            one.hear(wire.Prepared)
            one.say(one.commit())
            one.hear(wire.Running)
            one.say(wire.Done())
        with receiver.result() as moved:
            there = f"{address}-2"
            other = Receiver(there, name="third", accel="kvm", timeout=3.0)
            with pytest.raises(MigrationError, match=f"does not have: {UNHEARD}$"):
                migrate.migrate(moved, there)
            assert migrate.check(moved, there).problems == [
                f"its guest has seen CPU features that the target does not have: {UNHEARD}"]
            goes_on(moved)
            other.join(TIMEOUT)
            assert isinstance(other.error, VmmError)
            software = Receiver(there, name="third", accel="unicorn")
            migrate.migrate(moved, there)
            with software.result() as third:
                third.pause()
                assert spec_of(third).shown == [UNHEARD]


@pytest.mark.kvm
def test_what_a_guest_is_shown_here_goes_with_the_offer(address: str) -> None:
    with Machine.launch(replace(WALK, accel="kvm", shown=[UNHEARD])) as machine, PlayedTarget(address) as target:
        migrate.migrate(machine, address, Options(compression="zstd"))
    offer = next(message for message in target.seen if isinstance(message, wire.Offer))
    assert {*offer.needs.features} == {UNHEARD, *registry.features("kvm")}
    assert (offer.needs.accel, offer.needs.compression) == ("kvm", "zstd")
