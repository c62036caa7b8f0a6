"""Samples of running machines. The oracles are guest memory, the report's own counts, and what the guest is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command import vmm, vmm_here
from machines import ANY, changed_pages, replace, spec, until
from migrations import TIMEOUT, Receiver

from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.consumers.stats import Sample, Sampler, Stats
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import MachineSpec, ReaperSpec
from vmm.migrate import Options, migrate


@pytest.fixture(params=ANY)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def busy(accel: str, **more: Any) -> MachineSpec:
    """It writes all the time, to all of its memory."""
    return spec("stamp", accel=accel, writes=0, spin=50, timeout=None, **{"mib": 4, **more})


@contextlib.contextmanager
def sampled(machine: Machine, **options: Any) -> Iterator[Sampler]:
    with contextlib.closing(Sampler(machine, **options)) as sampler:
        yield sampler


def until_sample(sampler: Sampler, condition: Any, what: str) -> Stats:
    found: list[Sample] = []

    def look() -> bool:
        found.append(sampler.sample())
        return bool(condition(found[-1].stats))

    until(look, what)
    return found[-1].stats


def harvested(machine: Machine) -> int:
    return sum(vcpu["dirty_pages"] for vcpu in machine.status()["vcpus"])


def test_looking_changes_nothing(accel: str) -> None:
    """A machine that nobody needs the log of does not begin to log; how fast it dirties memory is not known."""
    with Machine.launch(busy(accel)) as machine, sampled(machine) as sampler:
        first = sampler.sample().stats
        assert (first.seconds, first.exits_per_s, first.distinct_pages_per_s) == (0.0, None, None)
        before = machine.ram(0).copy()
        until(lambda: len(changed_pages(before, machine.ram(0))) > 100, "the guest writes")
        for _ in range(5):
            last = sampler.sample().stats
        report = machine.status()
        assert (report["logging"], report["clients"], harvested(machine)) == (False, [], 0)
        assert (last.logging, last.dirty_pages_per_s, last.distinct_pages_per_s) == (False, None, None)
        assert last.reaper.interval_s is None
        assert last.seconds > 0


def test_rates_are_of_what_was_counted_in_between(accel: str) -> None:
    with Machine.launch(replace(busy(accel), log="always")) as machine, sampled(machine) as sampler:
        machine.register("me")
        one = sampler.sample()
        machine.sync("me")      # the guest leaves and enters; pages are protected again
        two = sampler.sample()
        seconds = two.report["elapsed_s"] - one.report["elapsed_s"]
        assert two.stats.seconds == pytest.approx(seconds)
        for now, before, vcpu in zip(two.report["vcpus"], one.report["vcpus"], two.stats.vcpus, strict=True):
            for key, rate in (("guest_entries", vcpu.exits_per_s), ("dirty_pages", vcpu.dirty_pages_per_s),
                              ("ring_full_exits", vcpu.ring_full_exits_per_s)):
                assert rate == pytest.approx((now[key] - before[key]) / seconds)
        assert sum(v.exits_per_s or 0 for v in two.stats.vcpus) == pytest.approx(two.stats.exits_per_s)


def test_distinct_pages_are_measured_when_asked_for_and_the_log_is_let_go(accel: str) -> None:
    """Against memory: whatever changes between two samples is in the second."""
    with Machine.launch(busy(accel)) as machine, sampled(machine, dirty_rate=True) as sampler:
        assert sampler.sample().distinct_pages == 0
        assert machine.status()["logging"]
        machine.pause()
        sampler.sample()
        before, then = machine.ram(0).copy(), sampler.sample()
        assert (then.stats.distinct_pages_per_s, then.distinct_pages is None) == (0.0, False)
        machine.resume()
        until(lambda: len(changed_pages(before, machine.ram(0))) > 100, "the guest writes")
        machine.pause()
        now = sampler.sample()
        assert now.distinct_pages is not None
        found = now.distinct_pages - (then.distinct_pages or 0)
        assert len(changed_pages(before, machine.ram(0))) <= found <= machine.status()["slots"][0]["pages"]
        assert now.stats.distinct_pages_per_s == pytest.approx(found / now.stats.seconds)
        sampler.dirty_rate = False
        assert sampler.sample().distinct_pages is None
        assert machine.status()["clients"] == []


class Mute(Machine):
    """Gives no report once."""

    mute = False

    def status(self, timeout: float = 30.0) -> dict[str, Any]:
        was, self.mute = self.mute, False
        if was:
            raise VmmError("it did not answer", ExitCode.NO_MACHINE)
        return super().status(timeout)


def test_pages_of_a_sample_that_fails_are_in_the_next(accel: str) -> None:
    """The flush has taken them already."""
    with Machine.launch(busy(accel)) as machine, Mute.attach("t") as mute, sampled(mute, dirty_rate=True) as sampler:
        machine.pause()
        sampler.sample()
        before = sampler.sample().distinct_pages
        machine.write(0x10_0000, bytes(4096 * 5))
        mute.mute = True
        with pytest.raises(VmmError):
            sampler.sample()
        machine.write(0x20_0000, bytes(4096 * 2))
        found = sampler.sample()
        assert (found.distinct_pages, before) == (7, 0)
        assert found.stats.distinct_pages_per_s == pytest.approx(7 / found.stats.seconds)


def test_ring_fill_is_what_the_next_flush_harvests(accel: str) -> None:
    """Nothing else reaps: the reaper's interval is a minute."""
    slow = busy(accel, mib=8, ring=8192, reaper=ReaperSpec(mode="fixed", interval=60.0))
    with Machine.launch(slow) as machine, sampled(machine) as sampler:
        machine.register("me")
        until_sample(sampler, lambda s: all((v.ring_fill or 0) > 0.01 for v in s.vcpus), "the rings fill")
        machine.pause()
        sample = sampler.sample()
        assert sample.stats.reaper.interval_s == 60.0
        used = [v["ring_used"] for v in sample.report["vcpus"]]
        assert [v.ring_fill for v in sample.stats.vcpus] == [each / 8192 for each in used]
        before = [v["dirty_pages"] for v in sample.report["vcpus"]]
        machine.take("me")
        after = machine.status()["vcpus"]
        assert [v["dirty_pages"] - was for v, was in zip(after, before, strict=True)] == used
        assert [v["ring_used"] for v in after] == [0, 0]


def test_full_rings_stalls_and_limits_are_seen(accel: str) -> None:
    # The smallest ring, and more pages than it has entries.
    with Machine.launch(busy(accel, mib=16, ring=1024, log="always")) as machine, sampled(machine) as sampler:
        stats = until_sample(sampler, lambda s: s.ring_full_exits_per_s and s.stalled, "rings fill up")
        assert all(0 <= (v.stalled or 0) <= 1 for v in stats.vcpus)
        assert stats.reaper.reap_s is not None
        assert stats.reaper.reap_s > 0
        assert [v.dirty_limit_pages_per_s for v in stats.vcpus] == [None, None]
        machine.dirty_limit(500, 1)
        stats = until_sample(sampler, lambda s: (s.vcpus[1].throttled or 0) > 0.5, "it is throttled")
        assert [v.dirty_limit_pages_per_s for v in stats.vcpus] == [None, 500]


def test_a_snapshot_under_way_is_seen_with_its_rounds(accel: str, tmp_path: Path) -> None:
    """By another connection, at each step of its progress; afterwards it is over, and its file has gone."""
    seen: list[Stats] = []
    with Machine.launch(busy(accel, mib=8)) as machine, Machine.attach("t") as other, sampled(other) as sampler:
        snapshot.create(machine, tmp_path, live=True, progress=lambda done, total: seen.append(sampler.sample().stats))
        assert seen
        assert all([s.directory for s in each.snapshots] == [str(tmp_path)] for each in seen)
        rounds = [each.snapshots[0].rounds for each in seen]
        assert rounds == sorted(rounds)
        assert rounds[-1] >= 1
        assert seen[-1].snapshots[0].pid == os.getpid()
        assert max(each.snapshots[0].total for each in seen) >= (8 << 20)
        assert sampler.sample().stats.snapshots == []
        assert [p.name for p in Path(os.environ["XDG_RUNTIME_DIR"]).rglob("snapshot-*")] == []


def test_a_migration_under_way_is_seen_with_its_rounds(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    seen: list[tuple[Any, Stats]] = []
    with Machine.attach("source") as other, sampled(other) as sampler:
        def look(report: Any) -> None:
            if report.status == "active":
                seen.append((len(report.rounds), sampler.sample().stats))

        migrate(running, address, Options(insecure=True, downtime=0.001, max_rounds=4), progress=look)
    receiver.result().close()
    told = [(rounds, stats.migration) for rounds, stats in seen if stats.migration is not None]
    assert told
    assert all(m.direction == "outgoing" and m.peer == address and m.rounds <= rounds for rounds, m in told)
    assert told[-1][1].rounds >= 1
    assert max(m.transferred for _, m in told) > 0


@pytest.mark.kvm
def test_a_coordinator_that_dies_is_no_end_and_loses_no_count() -> None:
    with Machine.launch(busy("kvm", log="always")) as machine, sampled(machine, dirty_rate=True) as sampler:
        before = until_sample(sampler, lambda s: (s.distinct_pages_per_s or 0) > 0, "it is measured")
        os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
        after = until_sample(sampler, lambda s: (s.distinct_pages_per_s or 0) > 0, "it is measured again")
        assert all(new.exits >= old.exits for new, old in zip(after.vcpus, before.vcpus, strict=True))


def test_a_machine_that_is_gone_is_said(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine:
        other = Machine.attach("t")
        sampler = Sampler(other)
        sampler.sample()
        machine.close()
        with pytest.raises(VmmError, match="gone"):
            sampler.sample()
        sampler.close()
        other.detach()


# --- the verb ------------------------------------------------------------------------------------------------------


def test_the_verb_prints_samples_as_json_and_for_people(accel: str) -> None:
    with Machine.launch(replace(busy(accel), log="always")):
        done = vmm_here("stats", "t", "--interval", "100ms", "--count", "2", "--json-lines")
        lines = [msgspec.json.decode(line, type=Stats, strict=True) for line in done.stdout.splitlines()]
        assert (done.returncode, len(lines)) == (0, 2)
        assert all(0.05 < line.seconds < TIMEOUT and len(line.vcpus) == 2 for line in lines)
        document = json.loads(vmm_here("stats", "t", "--interval", "50ms", "--json").stdout)
        assert msgspec.to_builtins(msgspec.convert(document, Stats)) == document
        head, row = vmm_here("stats", "t", "--interval", "50ms", "--count", "1", "--dirty-rate").stdout.splitlines()
        assert max(len(head), len(row)) < 80
        shown = dict(zip(head.replace(" MB/s", "").split(), row.split(), strict=True))
        assert (shown["state"], shown["vCPUs"]) == ("running", "2/2")
        assert float(shown["dirty"].replace(",", "")) >= 0
        assert vmm_here("stats", "t", "--json", "--json-lines").returncode == 2
    assert vmm_here("stats", "t").returncode == 7
    assert "exits_per_s" in vmm_here("schema", "stats").stdout


def test_the_verb_ends_with_the_machine(accel: str) -> None:
    done: list[int] = []
    with Machine.launch(busy(accel)) as machine:
        thread = threading.Thread(target=lambda: done.append(
            vmm("stats", "t", "--interval", "50ms", "--json-lines").returncode))
        thread.start()
        machine.stop()
        machine.wait(TIMEOUT)
        thread.join(TIMEOUT)
    assert done == [0]
