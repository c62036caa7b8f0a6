"""The screen of ``vmm top``.

Little is sent to the terminal: once in each interval, and only the lines that have changed; there are no animations and
no mouse. The colours are the terminal's own, and nothing is said by a colour alone.

Two threads have a connection to the machine each: one samples, and each key that does something to the machine has one
for as long as that takes. The screen's own thread never waits for the machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Footer

from ipc.run import python_module
from ipc.shm import PAGE_SIZE

from ..client.machine import Machine
from ..client.units import parse_rate
from ..consumers.stats import Sample, Sampler
from ..errors import ExitCode, VmmError, one_line
from ..machine.records import outcome
from ..machine.runtime import is_running
from . import text
from .ask import Ask
from .widgets import Graph, Line, Rows

__all__ = ["TopApp", "next_due"]

_LIFT = ("0", "none")
_PATIENCE = 2.0         # seconds for the machine's answer


class TopApp(App[None]):
    """Shows machine ``machine`` until it is quit. ``sample``: the last one; ``samples``: how many were shown."""

    ENABLE_COMMAND_PALETTE = False
    VERTICAL_BREAKPOINTS = [(0, "-low"), (16, "-high")]  # noqa: RUF012 (Textual has it so)
    CSS = """
    Screen { overflow: hidden; }
    Line { height: 1; width: 100%; }
    #title { text-style: bold; }
    #graphs { height: 4; }
    Graph { width: 1fr; height: 4; padding-right: 1; }
    Sparkline { height: 2; width: 100%; }
    Rows { scrollbar-size: 1 1; }
    #vcpus { height: 1fr; min-height: 2; }
    #slots { height: auto; max-height: 5; margin-top: 1; }
    #activity { height: auto; max-height: 4; display: none; }
    .-low #graphs { display: none; }
    .-low #slots { max-height: 3; margin-top: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pause", "Pause"), Binding("r", "resume", "Resume"), Binding("s", "sync", "Sync"),
        Binding("d", "dirty_rate", "Dirty rate"), Binding("l", "limit", "Limit"), Binding("n", "snapshot", "Snapshot"),
        Binding("q", "quit", "Quit"), Binding("ctrl+c", "quit", "Quit", show=False)]

    def __init__(self, machine: str, *, interval: float = 1.0, dirty_rate: bool = False) -> None:
        super().__init__(ansi_color=True)       # the terminal's own colours, or (NO_COLOR) none
        self.animation_level = "none"
        self.machine = machine
        self.sample: Sample | None = None
        self.samples = 0
        self._interval = interval
        self._dirty_rate = dirty_rate
        self._leaving = threading.Event()
        self._look = threading.Event()      # sample now
        self._client = f"top_{os.getpid()}"
        self._snapshot: subprocess.Popen[str] | None = None
        # Parts of the screen: a question may lie over it when they are written to.
        self.head = Line("title", machine)
        self.dirtied = Graph("dirtied", "dirtied", lambda pages_per_s: f"{text.megabytes(pages_per_s)} MB/s")
        self.exits = Graph("exits", "exits/s", text.short)
        self.stalled = Graph("stalled", "stalled", text.percent)
        self.reaper = Line("reaper")
        self.vcpus = Rows("vcpus", text.VCPU_COLUMNS)
        self.slots = Rows("slots", text.SLOT_COLUMNS)
        self.activity = Line("activity")
        self.said = Line("said")

    def compose(self) -> ComposeResult:
        """The parts of the screen."""
        yield self.head
        yield Horizontal(self.dirtied, self.exits, self.stalled, id="graphs")
        yield self.reaper
        yield self.vcpus
        yield self.slots
        yield self.activity
        yield self.said
        yield Footer()

    def on_mount(self) -> None:
        """Samples are taken from here on."""
        self.vcpus.focus()
        self._begin(self._sample_until_left)

    def on_unmount(self) -> None:
        """The thread that samples ends, and with it what it has of the machine."""
        self._leaving.set()
        self._look.set()
        if self._is_taking_snapshot():
            assert self._snapshot is not None
            self._snapshot.send_signal(signal.SIGINT)       # it takes back what it has begun

    def _begin(self, work: Callable[[], None]) -> None:
        """In a thread of its own. Whoever leaves does not wait for it: the machine may not answer."""
        threading.Thread(target=work, name="top", daemon=True).start()

    # --- samples -------------------------------------------------------------------------------------

    def _sample_until_left(self) -> None:
        """In a thread of its own."""
        try:
            with Machine.attach(self.machine) as machine, \
                    contextlib.closing(Sampler(machine, timeout=_PATIENCE)) as sampler:
                due = time.monotonic()
                while not self._leaving.is_set():
                    sampler.dirty_rate = self._dirty_rate
                    if not self._take(sampler):
                        return
                    now = time.monotonic()
                    due = next_due(due, now, self._interval)
                    self._look.wait(due - now)
                    self._look.clear()
        except VmmError as exc:
            self._tell(str(exc))

    def _take(self, sampler: Sampler) -> bool:
        """One sample; False: there will be no more."""
        try:
            sample = sampler.sample()
        except VmmError as exc:
            if exc.exit_code is ExitCode.NO_MACHINE and not is_running(self.machine):
                self._tell(_end_of(self.machine))
                return False
            self._tell(str(exc))        # another coordinator is taking over, or it does not answer
            return True
        self._later(self._show, sample)
        if sample.stats.state == "ended":
            self._tell(f"ended: {sample.report['cause'] or 'see vmm status'} (q quits)")
            return False
        return True

    def _later(self, act: Callable[..., None], *arguments: object) -> None:
        """From another thread: on the screen's, unless that is being left."""
        if not self._leaving.is_set():
            with contextlib.suppress(RuntimeError):     # it has been left meanwhile
                self.call_later(act, *arguments)

    def _tell(self, said: str) -> None:
        self._later(self._say, said)

    def _say(self, said: str) -> None:
        self.said.show(one_line(said, 400))

    def _show(self, sample: Sample) -> None:
        stats = sample.stats
        self.sample = sample
        self.head.show(text.title(stats, sample.report["accelerator"]))
        self.reaper.show(text.reaper_line(stats))
        self.activity.show("\n".join(text.activity(stats)))
        self.activity.display = bool(self.activity.shown)
        if stats.seconds:
            if stats.distinct_pages_per_s is not None or not stats.logging:
                self.dirtied.add(stats.distinct_pages_per_s,
                                 "not tracked" if stats.tracking == "none" else "- (d: measure)")
            else:
                self.dirtied.add(stats.dirty_pages_per_s, title="logged")
            self.exits.add(stats.exits_per_s)
            self.stalled.add(stats.stalled)
        self.vcpus.show([text.vcpu_row(each) for each in stats.vcpus])
        self.slots.show([text.slot_row(each) for each in stats.slots])
        self.samples += 1

    # --- keys ----------------------------------------------------------------------------------------

    def _act(self, what: Callable[[Machine], str]) -> None:
        """In a thread of its own, with a connection of its own; what it returns is said."""
        def run() -> None:
            try:
                with Machine.attach(self.machine) as machine:
                    said = what(machine)
            except VmmError as exc:
                said = str(exc)
            self._tell(said)
            self._look.set()

        self._begin(run)

    def action_pause(self) -> None:
        """``vmm pause``."""
        def pause(machine: Machine) -> str:
            machine.pause()
            return "paused (r resumes)"

        self._act(pause)

    def action_resume(self) -> None:
        """``vmm resume``."""
        def resume(machine: Machine) -> str:
            held_by = machine.resume()
            return f"stays paused: {', '.join(held_by)}" if held_by else "resumed"

        self._act(resume)

    def action_sync(self) -> None:
        """``vmm sync``, by a client that goes when this is quit."""
        def sync(machine: Machine) -> str:
            known = self._client in machine.status()["clients"]
            machine.register(self._client, mine=True)
            pages = machine.take(self._client)
            since = "the last sync" if known else "this client was registered, just now"
            return f"{pages:,} pages ({pages * PAGE_SIZE / 1e6:,.1f} MB) dirtied since {since}"

        self._act(sync)

    def action_dirty_rate(self) -> None:
        """Measure the dirty rate from now on, or no longer."""
        self._dirty_rate = not self._dirty_rate
        self._look.set()
        self._say("measuring the dirty rate: the machine logs, and each sample flushes (d ends it)"
                  if self._dirty_rate else "no longer measuring the dirty rate")

    def action_limit(self) -> None:
        """``vmm dirty-limit set``, or ``cancel``."""
        def limit(answer: str | None) -> None:
            if not answer:
                return
            try:
                pages = 0 if answer.lower() in _LIFT else round(parse_rate(_number(answer)) / PAGE_SIZE)
            except ValueError as exc:
                self._say(str(exc))
                return
            if answer.lower() not in _LIFT and pages < 1:
                self._say("that is less than one page per second")
                return
            self._act(lambda machine: _set_limit(machine, pages))

        self.push_screen(Ask("Dirty limit of each vCPU, 0 for none", "100MB/s"), limit)

    def action_snapshot(self) -> None:
        """``vmm snapshot create --live``, in a process of its own."""
        if self._is_taking_snapshot():
            self._say("a snapshot is being taken already")
            return
        self.push_screen(Ask("Take a live snapshot into directory", "snapshots"), self._take_snapshot)

    def _is_taking_snapshot(self) -> bool:
        return self._snapshot is not None and self._snapshot.poll() is None

    def _take_snapshot(self, directory: str | None) -> None:
        if not directory:
            return
        try:
            path = Path(directory).expanduser()
            self._snapshot = process = subprocess.Popen(
                python_module("vmm", "snapshot", "create", "--live", "--", self.machine, str(path)),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True)
        except (OSError, RuntimeError, ValueError) as exc:      # no room for a process, no such user, no path
            self._say(f"snapshot failed: {exc}")
            return

        def wait() -> None:
            said, _ = process.communicate()
            self._tell(f"snapshot {said.strip() or 'ended'}".replace("snapshot vmm: error:", "snapshot failed:"))

        self._begin(wait)


def next_due(due: float, now: float, interval: float) -> float:
    """When the next sample is to be taken, where the last one was due at ``due`` and it is ``now``: as regularly as can
    be, at once where that is over; an interval from now at most, as after one that a key has asked for."""
    return max(min(due, now) + interval, now)


def _set_limit(machine: Machine, pages: int) -> str:
    machine.dirty_limit(pages)
    return f"each vCPU limited to {text.megabytes(pages)} MB/s" if pages else "no dirty limit"


def _number(answer: str) -> float | str:
    """A bare number is bytes per second."""
    try:
        return float(answer)
    except ValueError:
        return answer


def _end_of(name: str) -> str:
    report = outcome(name)
    if report is None:
        return f"machine '{name}' has ended (q quits)"
    return f"ended: {report['cause']}, exit status {report['exit_code']} (q quits)"
