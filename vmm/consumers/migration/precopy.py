"""Pre-copy: rounds that send what was dirtied during the last, until the guest is to be stopped.

When that is, vmm/consumers/migration/rounds.py says; from there on the rounds continue with the guest stopped
(vmm/consumers/migration/source.py), until nothing is left.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...client.machine import Flushed, Machine
from ...errors import VmmError
from ..pages import is_filled, touched
from .channels import Channels, Job, chunk_pages
from .converge import LATE, Next, Round, Rules
from .hot import Todo, joined, pages
from .memory import SentMemory
from .pages import PAGE, changed
from .progress import Progress
from .report import Options, RoundReport
from .rounds import Rounds
from .steering import Steering
from .talk import Lost, Talk
from .wire import Ready, RoundAck, RoundEnd, Torn, WhenReady

__all__ = ["PreCopy", "Todo", "joined", "rules"]

_LOOKED_AT = 256            # pages of what is left, to tell how many are zero


def rules(options: Options) -> Rules:
    """By which the rounds of a migration with these options go."""
    return Rules(options.downtime, options.max_rounds, options.converge, options.postcopy, options.postcopy_after,
                 options.stall, LATE[options.on_timeout], options.bandwidth)


class PreCopy:
    """The machine's dirty pages as this migration's client has them, and how they are sent: by ``channels``, asked for
    at the beginning of each round. ``obey`` raises what is to end a round."""

    def __init__(self, machine: Machine, memory: SentMemory, steering: Steering, progress: Progress, why: str,
                 channels: Callable[[], Channels], obey: Callable[[], None]) -> None:
        self._machine = machine
        self._memory = memory
        self._steering = steering
        self._channels = channels
        self._progress = progress
        self._report = progress.report
        self._obey = obey
        self._client = f"migrate_{uuid.uuid4().hex[:8]}"
        self._limits = machine.limits(why)
        self._rounds: Rounds
        self._number = 0                # of the round
        self._bandwidth = 0.0           # its cap
        self._torn: list[Torn] = []
        self._flushed: Flushed          # when ``dirty`` last looked

    def run(self, talk: Talk, standstill: float) -> tuple[Todo, bool]:
        """``standstill``: seconds that it took to have the guest stand still for a moment, and to ask all of it.
        Until the guest is to be stopped: the pages that are dirty then, and whether they go after the hand-over
        (post-copy). Raises MigrationError, VmmError, WireError."""
        machine, report = self._machine, self._report
        machine.register(self._client, mine=True)
        before = machine.flush(self._client)    # from here on counts
        slots = machine.status()["slots"]
        self._rounds = rounds = Rounds(rules(self._steering.options), {s["id"]: s["pages"] for s in slots},
                                       {s["id"]: self.touched(s) for s in slots if s["logged"]}, standstill)
        convergence = rounds.convergence
        while True:
            began, normal = time.monotonic(), report.ram.normal
            rest = self.send(talk, rounds.todo)
            took = max(time.monotonic() - began, 1e-6)
            if len(report.rounds) == 1:     # the guest stands still for no machine that is still being made
                talk.send(WhenReady())
                talk.expect(Ready)
            left = rounds.over(rest, self.dirty())
            flushed, since = self._flushed, max(self._flushed.at - before.at, 1e-6)
            dirtied = [(new - old) / since
                       for old, new in zip(before.vcpu_pages, flushed.vcpu_pages, strict=True)]
            before = flushed
            done = Round(report.ram.normal - normal, took, left, dirtied, self._zero(rounds.todo, left),
                         report.rounds[-1].transferred, self._bandwidth, since)
            convergence.rules = rules(self._steering.options)
            what = self._steering.now or (Next.ROUND if rest else rounds.decide(
                done, can_limit=machine.status()["can_limit"]))
            report.ram.dirty_pages_rate = round(sum(dirtied))
            report.ram.remaining = left * PAGE
            report.rounds[-1].left, report.rounds[-1].dirtied = left, report.ram.dirty_pages_rate
            expected = convergence.expected_downtime(done)
            report.expected_downtime = None if expected is None else expected * 1000
            self._foresee(left)
            self._progress.tell(force=True)
            if what is Next.CANCEL:
                raise talk.error(f"no round has left less than another for {convergence.stalled:.0f} s")
            if what is not Next.ROUND:
                return rounds.todo, what is Next.POSTCOPY
            self._limit()
            rounds.begin()
            report.ram.held = pages(rounds.held)

    def _zero(self, todo: Todo, left: int) -> int:
        """About how many of these pages are zero: a few are looked at."""
        found = looked = 0
        for slot, numbers in todo.items():
            some = numbers[::max(1, left // _LOOKED_AT)]
            looked += len(some)
            found += int((~is_filled(self._machine.ram(slot).reshape(-1, PAGE)[some])).sum())
        return left * found // looked if looked else 0

    def touched(self, slot: dict[str, Any]) -> NDArray[np.int64]:
        """The slot's pages but for those that were never touched: they are zero, at the target too. ``slot``:
        as the machine's report has it."""
        found = touched(self._memory[slot["id"]].fd, slot["size"])
        self._report.ram.duplicate += slot["pages"] - len(found)
        return found

    def dirty(self) -> Todo:
        """The pages dirtied since the last call, by slot, and those that did not arrive as they were sent."""
        machine = self._machine
        self._flushed = machine.flush(self._client)
        bits = {slot: machine.bitmap(slot, self._client).bools() for slot in self._flushed.slots}
        for message in self._torn:
            if message.slot not in bits:
                continue
            again = changed(message, machine.ram(message.slot), bits[message.slot])
            bits[message.slot][again] = True
            self._report.ram.resent += len(again)
        self._torn.clear()
        return {slot: found for slot, b in bits.items() if len(found := np.flatnonzero(b))}

    def send(self, talk: Talk, todo: Todo, *, stopped: bool = False) -> Todo:
        """A round: send these pages, and wait until they are there; what was not sent, since something else is wanted
        by now. ``stopped``: the guest stands still."""
        report, progress, channels = self._report, self._progress, self._channels()
        began, sent_before, zero_before = time.monotonic(), report.ram.transferred, report.ram.duplicate
        number, self._number, progress.messages = self._number, self._number + 1, 0
        left = count = pages(todo)
        self._bandwidth = self._steering.options.bandwidth
        chunk = chunk_pages(self._bandwidth)
        rest: Todo = {}
        talk.begin()
        for slot, numbers in todo.items():
            memory = self._memory[slot]
            for at in range(0, len(numbers), chunk):
                if self._steering.interrupts(stopped=stopped):
                    rest[slot] = numbers[at:]
                    break
                job = Job(number, slot, memory, numbers[at:at + chunk])
                while not channels.put(job, 0.1):
                    self._check(talk, channels)
                left -= len(job.pages)
                report.ram.remaining = left * PAGE
                self._check(talk, channels)
        while not channels.idle:
            self._check(talk, channels)
            time.sleep(0.001)
        self._check(talk, channels)
        count -= left
        sent, zero = report.ram.transferred - sent_before, report.ram.duplicate - zero_before
        talk.send(RoundEnd(number, progress.messages, count, zero, sent))
        self._torn += talk.expect(RoundAck).torn
        took = max(time.monotonic() - began, 1e-6)
        report.ram.dirty_sync_count += 1
        report.ram.pages_per_second = round(count / took)
        report.rounds.append(RoundReport(count, zero, round(took, 4), sent))
        return rest

    def _check(self, talk: Talk, channels: Channels) -> None:
        """A channel's failure, or the target's refusal, ends the round."""
        self._obey()
        talk.check()
        if channels.failure:
            raise talk.error(channels.failure, Lost)

    def _foresee(self, left: int) -> None:
        found = self._rounds.convergence.forecast(left)
        self._report.forecast = None if found is None else {
            **asdict(found), "downtime": found.downtime * 1000, "dirtied": found.dirtied * PAGE / 1e6,
            "rate": found.rate * PAGE / 1e6, "at": self._progress.elapsed_ms}

    def _limit(self) -> None:
        for vcpu, quota in self._rounds.convergence.quotas.items():
            if self._report.throttled.get(str(vcpu)) != (shown := quota * PAGE / 1e6):
                self._limits.set(quota, vcpu)
                self._report.throttled[str(vcpu)] = shown

    def release_limits(self) -> None:
        """Stop throttling vCPUs on this migration's account."""
        with contextlib.suppress(VmmError):
            self._limits.close()

    def unregister(self) -> None:
        """Idempotent."""
        with contextlib.suppress(VmmError):
            self._machine.unregister(self._client)
