"""A migration that is told something while it goes on: other settings, post-copy. Real machines; the oracles are the
time that a cap takes, the bytes on the wire, and the memory at the target."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import nothing_left, spec, until
from migrations import TIMEOUT, PlayedTarget, Receiver, ended, goes_on, vmm

from ipc.steps import STEPS
from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import target as target_module
from vmm.consumers.migration import wire
from vmm.consumers.migration.control import change
from vmm.consumers.migration.pages import PAGE
from vmm.consumers.migration.status import load_status
from vmm.consumers.migration.steering import Changes
from vmm.errors import ExitCode, VmmError
from vmm.machine.runtime import LONGEST_SOCKET, machine_dir
from vmm.migrate import Options

#: All of its pages are filled soon, and dirtied slowly afterwards.
WALK = spec("sequential", accel="unicorn", name="source", mib=16, passes=0, spin=3000, timeout=None)
SLOW = "500kB/s"        # at which these 16 MiB take half a minute, and longer than a test waits for a round


@pytest.fixture
def running() -> Iterator[Machine]:
    with Machine.launch(WALK) as machine:
        machine.write(4 << 20, bytes(range(1, 256)) * (10 << 12))      # 10 MiB that are no zero pages
        yield machine


def sending(name: str = "source") -> bool:
    with contextlib.suppress(VmmError):
        found = load_status(name)
        return found["status"] == "active" and found["ram"]["transferred"] > 0
    return False


def same_memory(one: Machine, other: Machine) -> None:
    """Of a machine that arrived paused, and its kept source; so nothing has changed since."""
    assert np.array_equal(one.ram(0), other.ram(0))


@pytest.mark.parametrize("options", [("--bandwidth", "none"), ("--bandwidth", "1GB/s", "--channels", "4"),
                                     ("--bandwidth", "none", "--channels", "1", "--compress", "zstd")],
                         ids=["uncapped", "more channels", "compressed"])
def test_a_migration_that_would_take_long_is_soon_over_when_its_settings_change(
        options: tuple[str, ...], running: Machine, address: str) -> None:
    """In the middle of the first round, of which nothing is lost and little sent twice."""
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", SLOW, "--paused", "--keep-source")
    until(sending, "pages are sent", TIMEOUT)
    said = "".join(ended(vmm("migrate", "set", "source", *options, "--json")))
    wanted = dict(zip(options[::2], options[1::2], strict=True))
    settings = json.loads(said)["settings"]
    assert settings["channels"] == int(wanted.get("--channels", 2))
    assert settings["compression"] == wanted.get("--compress", "none")
    began = time.monotonic()
    ended(source)
    assert time.monotonic() - began < 15.0
    with receiver.result() as moved:
        same_memory(moved, running)
        report = load_status("source")
        assert report["settings"] == settings
        first, second = report["rounds"][:2]
        assert first["pages"] + second["pages"] < 2 * WALK.slots[0].pages
        if "--compress" in wanted:
            assert second["transferred"] < second["pages"] * PAGE / 4
        goes_on_there(moved)


def goes_on_there(moved: Machine) -> None:
    moved.resume()
    goes_on(moved)


def test_a_lower_cap_holds_from_then_on(running: Machine, address: str) -> None:
    """As seen from outside: what is sent in a while."""
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "2MB/s")
    until(sending, "pages are sent", TIMEOUT)
    said, _ = ended(vmm("migrate", "set", "source", "--bandwidth", "100kB/s"))
    assert said == ("source: bandwidth 0.100 MB/s, downtime 300 ms, compress none, channels 2, max-rounds 30, "
                    "converge yes, timeout none, stall none, on-timeout cancel\n")
    until(lambda: len(load_status("source")["rounds"]) == 1, "the round has ended for it")
    before, began = load_status("source")["ram"]["transferred"], time.monotonic()
    until(lambda: load_status("source")["ram"]["transferred"] >= before + 200_000, "two seconds' worth is sent",
          TIMEOUT)
    assert time.monotonic() - began > 1.0
    source.send_signal(signal.SIGTERM)
    ended(source, 128 + signal.SIGINT)
    receiver.failure()
    goes_on(running)


def test_another_downtime_or_number_of_rounds_ends_the_rounds(running: Machine, address: str) -> None:
    """Rounds that would go on for ever: something is always dirty."""
    for changes in (Changes(downtime=10.0), Changes(max_rounds=2)):
        receiver = Receiver(address, accel="unicorn")
        over = []

        def meanwhile(report: migrate.Report, changes: Changes = changes, over: list[int] = over) -> None:
            if len(report.rounds) == 4 and not over:
                over.append(len(report.rounds))
                change("source", changes)

        options = Options(downtime=1e-9, max_rounds=1000, converge=False, keep_source=True)
        report = migrate.migrate(running, address, options, progress=meanwhile)
        assert over
        assert len(report.rounds) <= 7
        receiver.result().close()
        running.resume(force=True)


@pytest.mark.postcopy
def test_over_to_post_copy_in_the_middle_of_a_round(running: Machine, address: str) -> None:
    """Of a migration that was not begun as one."""
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", SLOW, "--paused", "--keep-source")
    until(sending, "pages are sent", TIMEOUT)
    assert "goes over to post-copy" in "".join(ended(vmm("migrate", "postcopy", "source")))
    until(lambda: load_status("source")["status"] == "postcopy-active", "in post-copy", TIMEOUT)
    assert "already been handed over" in "".join(ended(vmm("migrate", "postcopy", "source"), ExitCode.BAD_INPUT))
    with Machine.attach("target") as moved:
        assert moved.status()["state"] == "paused"      # it has started, but for its user
    ended(vmm("migrate", "set", "source", "--bandwidth", "none"))       # and in post-copy settings change too
    ended(source)
    with receiver.result() as moved:
        same_memory(moved, running)
        report = load_status("source")
        assert report["status"] == "completed"
        assert report["ram"]["postcopy_pages"] > 0
        assert len(report["rounds"]) == 1
        goes_on_there(moved)


@pytest.mark.postcopy
@pytest.mark.parametrize("step", [s for s in STEPS["migration, its source"] if s != "migrate-done"])
def test_a_source_killed_after_it_went_over_to_post_copy(step: str, steps: Path, running: Machine, address: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the hand-over the machine runs on here, afterwards there; never both."""
    if not (after := step in ("migrate-handed-over", "migrate-commit", "migrate-stop")):
        monkeypatch.setattr(target_module, "_HEARD", 1.0)      # nobody comes any more
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "4MB/s")
    until(sending, "pages are sent", TIMEOUT)
    (steps / f"kill-{step}").touch()
    ended(vmm("migrate", "postcopy", "source"))
    ended(source, -signal.SIGKILL)
    assert bool(_handed_over(running)) == after
    if after:
        with receiver.result() as moved:
            until(lambda: running.status()["state"] == "ended", "the source has ended", TIMEOUT)
            goes_on(moved)
    else:
        goes_on(running)
        with contextlib.suppress(VmmError), Machine.attach("target") as arriving:
            arriving.stop()
        receiver.failure()
        goes_on(running)


def _handed_over(machine: Machine) -> str:
    status = machine.status()
    return str(status["handed_over"]) or ("ended" if status["state"] == "ended" else "")


def test_a_target_that_cannot_have_post_copy_is_not_given_it(running: Machine, address: str) -> None:
    """Nor pages that it cannot read; the migration goes on."""
    refused: list[str] = []

    def meanwhile(report: migrate.Report) -> None:
        if report.status == "active" and not refused:
            for changes in (Changes(postcopy=True), Changes(compression="lz4")):
                with pytest.raises(VmmError) as failure:
                    change("source", changes)
                refused.append(str(failure.value))

    replies = {wire.Offer: [wire.Received(), wire.Accept("userfaultfd: Operation not permitted", ["none", "zstd"])]}
    with PlayedTarget(address, replies):
        migrate.migrate(running, address, progress=meanwhile)
    assert refused == ["the target cannot have post-copy: userfaultfd: Operation not permitted",
                       "the target cannot read pages compressed with lz4"]


def test_who_is_not_migrated_cannot_be_told(running: Machine, address: str) -> None:
    for verb in (("set", "source", "--bandwidth", "1MB/s"), ("postcopy", "source")):
        assert "is not being migrated" in "".join(ended(vmm("migrate", *verb), ExitCode.BAD_INPUT))
    assert "say what is to change" in "".join(ended(vmm("migrate", "set", "source"), ExitCode.BAD_INPUT))
    receiver = Receiver(address, accel="unicorn")
    migrate.migrate(running, address, Options(keep_source=True))
    receiver.result().close()
    until(lambda: nothing_left("target"), "it is gone")
    said = "".join(ended(vmm("migrate", "set", "source", "--bandwidth", "1MB/s"), ExitCode.BAD_INPUT))
    assert "is in progress" in said


NONSENSE: list[bytes] = [b"\n", b"{}{}\n", b'{"bandwidth": -1}\n', b'{"channels": 1000}\n', b'{"other": 1}\n',
                         b'{"compression": "rot13"}\n', b"\xff\xfe\n", b'{"bandwidth": "\\u001b[2J"}\n',
                         b"[" * 3000 + b"\n"]


def test_nonsense_at_the_control_socket_is_refused_in_one_line(running: Machine, address: str) -> None:
    """And a peer that says nothing keeps the next one waiting for a moment alone. The migration goes on."""
    receiver = Receiver(address, accel="unicorn")
    answers: list[Any] = []

    def meanwhile(report: migrate.Report) -> None:
        if report.status != "active" or answers:
            return
        path = machine_dir("source") / "migrate"
        assert len(path.name) <= len(LONGEST_SOCKET)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(path))
            for text in NONSENSE:
                answers.append(_said(str(path), text))

    assert migrate.migrate(running, address, progress=meanwhile).status == "completed"
    assert len(answers) == len(NONSENSE)
    for answer in answers:
        assert "not a change of a migration's settings" in answer["error"]
        assert answer["error"].isprintable()
    receiver.result().close()
    assert not (machine_dir("source") / "migrate").exists()


def _said(path: str, text: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        sock.sendall(text)
        return dict(json.loads(sock.makefile().readline()))
