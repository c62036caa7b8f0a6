"""``vmm top`` on real machines: by Textual's own pilot at several sizes, and on a real terminal. The oracle is the
machine itself."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import ANY, machine_processes, spec
from terminal import Terminal
from textual.pilot import Pilot
from textual.widgets import Footer, Input

from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.machine.spec import MachineSpec
from vmm.top.app import TopApp, next_due
from vmm.top.text import SLOT_COLUMNS, VCPU_COLUMNS, Column, megabytes, percent, short
from vmm.top.widgets import Rows

SIZES = [(80, 24), (40, 12), pytest.param((132, 43), marks=pytest.mark.long), (220, 60)]
INTERVAL = 0.1


@pytest.fixture(params=ANY)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def busy(accel: str, **more: Any) -> MachineSpec:
    return spec("stamp", accel=accel, writes=0, spin=50, timeout=None, **{"mib": 4, **more})


Act = Callable[[TopApp, "Pilot[None]"], Awaitable[None]]


def on_screen(act: Act, size: tuple[int, int] = (80, 24), **options: Any) -> TopApp:
    """Within the running application, after its second sample."""
    app = TopApp("t", interval=INTERVAL, **options)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await shown(pilot, lambda: app.samples >= 2, "samples are shown")
            await act(app, pilot)

    asyncio.run(run())
    return app


async def shown(pilot: Pilot[None], condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}; said: {said(pilot.app)}"
        await pilot.pause(0.02)


def said(app: Any) -> str:
    return str(app.said.shown)


def screen_text(app: Any) -> str:
    """What is on the screen, line by line."""
    return "\n".join("".join(segment.text for segment in line) for line in app.screen._compositor.render_strips())


def cells(rows: Rows, columns: tuple[Column, ...]) -> list[list[str]]:
    """By the columns' widths."""
    found = []
    for line in rows.lines:
        ends = list(itertools.accumulate(column.width for column in columns))
        found.append([line[end - column.width:end].strip() for column, end in zip(columns, ends, strict=True)])
    return found


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_all_parts_fit_at_each_size(accel: str, size: tuple[int, int]) -> None:
    """Nothing is cut at 80 columns or more; below, the tables can be scrolled."""
    async def act(app: TopApp, pilot: Pilot[None]) -> None:
        assert app.size == size
        await shown(pilot, lambda: "Pause" in screen_text(app), "the keys are shown")
        text = screen_text(app)
        assert text.count("\n") + 1 == size[1]
        for part in ("t  running", "reaper adaptive", "vCPU"):
            assert part in text
        for rows, columns in ((app.vcpus, VCPU_COLUMNS), (app.slots, SLOT_COLUMNS)):
            if size[0] >= 80:
                assert rows.max_scroll_x == 0
                assert all(column.label in text for column in columns)
            assert rows.size.height >= 2
            assert rows.lines[0][:size[0] - 1].rstrip() in text
        assert app.query_one(Footer).region.bottom == size[1]
        if size[0] >= 80:
            for key in ("Pause", "Resume", "Sync", "Dirty rate", "Limit", "Snapshot", "Quit"):
                assert key in text

    with Machine.launch(busy(accel, log="always")):
        on_screen(act, size)


def test_tables_say_what_the_machine_says(accel: str) -> None:
    async def act(app: TopApp, pilot: Pilot[None]) -> None:
        samples = app.samples
        await shown(pilot, lambda: app.samples >= samples + 2, "more samples")
        assert app.sample is not None
        report = app.sample.report
        rows = cells(app.vcpus, VCPU_COLUMNS)
        assert [(row[0], row[1]) for row in rows] == [(str(v["index"]), v["state"]) for v in report["vcpus"]]
        assert [row[-1] for row in rows] == ["-", "2.0"]      # MB/s
        assert cells(app.slots, SLOT_COLUMNS)[0][:3] == ["0", "4 MiB + 3 pages", "yes"]
        assert app.exits.bars.data
        assert len(app.exits.bars.data) == app.exits.bars.size.width
        # A guest that is limited may not have left any sample yet with an exit in it.
        await shown(pilot, lambda: "█" in screen_text(app).splitlines()[3], "the graphs are drawn")

    with Machine.launch(busy(accel, log="always")) as machine:
        machine.dirty_limit(500, 1)     # 2.048 MB/s
        on_screen(act)


def test_keys_do_what_they_say(accel: str, tmp_path: Path) -> None:
    """Pause, resume, sync, limit, dirty rate, snapshot; a question can be left, and a wrong answer is said."""
    with Machine.launch(busy(accel)) as machine:
        async def act(app: TopApp, pilot: Pilot[None]) -> None:
            assert machine.status()["logging"] is False       # watching alone does not make it log
            await pilot.press("p")
            await shown(pilot, lambda: "paused" in said(app), "it is paused")
            assert machine.status()["state"] == "paused"
            await pilot.press("r")
            await shown(pilot, lambda: said(app) == "resumed", "it is resumed")
            assert machine.status()["state"] == "running"
            await pilot.press("s")
            await shown(pilot, lambda: "just now" in said(app), "the first sync registers")
            assert machine.status()["clients"] == [f"top_{os.getpid()}"]
            await pilot.press("s")
            await shown(pilot, lambda: "since the last sync" in said(app), "and the second has pages")
            await ask(app, pilot, "l", "12MB/x")
            await shown(pilot, lambda: "is not a rate" in said(app), "what is no rate is said")
            await ask(app, pilot, "l", "100MB/s")
            await shown(pilot, lambda: "limited to 100.0 MB/s" in said(app), "it is limited")
            assert {v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]} == {24414}
            await ask(app, pilot, "l", "")
            assert {v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]} == {24414}
            await ask(app, pilot, "l", "inf")
            await shown(pilot, lambda: "is not a rate" in said(app), "what is no rate is said")
            await ask(app, pilot, "n", "~nosuchuser/x")
            await shown(pilot, lambda: said(app).startswith("snapshot failed"), "there is no such user")
            await ask(app, pilot, "l", "0")
            await shown(pilot, lambda: said(app) == "no dirty limit", "it is not limited")
            await pilot.press("d")
            await shown(pilot, lambda: "MB/s" in app.dirtied.now.shown, "the dirty rate is measured")
            await pilot.press("l", "escape")
            await pilot.press("p")      # a key again, no answer
            await shown(pilot, lambda: "paused" in said(app), "it is paused")
            await ask(app, pilot, "n", str(tmp_path / "chain"))
            await shown(pilot, lambda: said(app).startswith("snapshot"), "a snapshot is taken", 60.0)
            assert "failed" not in said(app)
            await pilot.press("q")

        on_screen(act)
        assert machine.status()["state"] == "paused"
        assert len(snapshot.verify(tmp_path / "chain")) == 1
        # What it had of the machine has gone, but for the client of its syncs, which goes with its process.
        assert set(machine.status()["clients"]) - {snapshot.list_snapshots(tmp_path / "chain")[0].epoch} == {
            f"top_{os.getpid()}"}


async def ask(app: TopApp, pilot: Pilot[None], key: str, answer: str) -> None:
    await pilot.press(key)
    await shown(pilot, lambda: bool(app.screen.query(Input)), "there is a question")
    app.screen.query_one(Input).value = answer
    await pilot.press("enter")
    await shown(pilot, lambda: not app.screen.query(Input), "it is answered")


def test_the_end_of_the_machine_is_said(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine:
        async def act(app: TopApp, pilot: Pilot[None]) -> None:
            machine.stop()
            await shown(pilot, lambda: said(app).startswith("ended: stopped on request"), "its end")

        on_screen(act)


def test_a_coordinator_that_does_not_answer_stops_nothing(accel: str) -> None:
    """The screen and its keys go on; and so do the samples, when another has taken over."""
    with Machine.launch(busy(accel)) as machine:
        async def act(app: TopApp, pilot: Pilot[None]) -> None:
            pid = machine.status()["coordinator"]["pid"]
            os.kill(pid, signal.SIGSTOP)
            await pilot.press("l")
            await shown(pilot, lambda: bool(app.screen.query(Input)), "there is a question")
            await pilot.press("escape")
            os.kill(pid, signal.SIGKILL)
            samples = app.samples
            await shown(pilot, lambda: app.samples > samples + 1, "samples go on", 60.0)

        on_screen(act)


@pytest.mark.parametrize("mode", ["bitmap", "ring"])
def test_why_nothing_is_reaped_is_said(mode: str) -> None:
    with Machine.launch(busy("unicorn", log="always" if mode == "bitmap" else "auto")) as machine:
        machine.set_tracking(mode)

        async def act(app: TopApp, pilot: Pilot[None]) -> None:
            why = "without rings" if mode == "bitmap" else "it does not log"
            await shown(pilot, lambda: app.reaper.shown.endswith(f"none due: {why}"), "why")

        on_screen(act)


def test_samples_are_regular_however_many_keys_ask_for_one() -> None:
    assert next_due(10.0, 10.5, 1.0) == 11.0        # it took so long to take it
    assert next_due(10.0, 12.5, 1.0) == 12.5        # one that took too long is not made up for
    due = 11.0
    for now in (10.25, 10.5, 10.75):                # keys: one sample each, before the next is due
        due = next_due(due, now, 1.0)
        assert due == now + 1.0


# --- on a terminal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_color", [pytest.param(False, marks=pytest.mark.long), True], ids=["colours", "no colours"])
def test_on_a_terminal_little_is_sent_and_it_is_left_as_it_was(no_color: bool) -> None:
    """A sample is fewer bytes than the screen has characters. With NO_COLOR, none of them says a colour."""
    with Machine.launch(busy("unicorn", log="always")), \
            Terminal("top", "t", "--interval", "200ms", columns=80,
                     **({"NO_COLOR": "1"} if no_color else {})) as terminal:
        terminal.wait_for("reaper adaptive")
        terminal.wait_for("MB/s", times=4)
        assert min(bytes_a_sample(terminal) for _ in range(5)) < 1600       # (now and then all of it is drawn anew)
        terminal.type("q")
        assert terminal.wait() == 0
        assert b"\x1b[?1049l" in terminal.raw       # the screen as it was before
        assert b"\x1b[?1000h" not in terminal.raw   # no mouse
        assert not (no_color and colours(terminal.raw))
    assert not machine_processes("t")


def bytes_a_sample(terminal: Terminal) -> float:
    before, began = len(terminal.raw), time.monotonic()
    terminal.read_for(1.0)
    return (len(terminal.raw) - before) / ((time.monotonic() - began) / 0.2)


def colours(raw: bytes) -> set[bytes]:
    """Of characters or their ground, as ECMA-48 has them (and ISO 8613-6)."""
    given = {number for found in re.findall(rb"\x1b\[([0-9;]*)m", raw) for number in found.split(b";")}
    return given & {str(n).encode() for n in (*range(30, 39), *range(40, 49), *range(90, 98), *range(100, 108))}


def test_without_a_terminal_it_says_what_to_use() -> None:
    from command import vmm

    done = vmm("top", "t")
    assert (done.returncode, done.stderr) == (
        2, "vmm: error: vmm top needs a terminal; for a file or a pipe: vmm stats t\n")


# --- text -----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e14))
def test_counts_are_short_and_right(value: float) -> None:
    text = short(value)
    assert len(text) <= 6
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    assert float(text.rstrip("kMGT").replace(",", "")) * scale == pytest.approx(value, rel=0.006, abs=0.5)


@given(st.floats(0, 1))
def test_shares_are_short_and_right(share: float) -> None:
    text = percent(share)
    assert len(text) <= 4
    assert (text == "0%") == (share == 0)
    if text[0] != "<":
        assert float(text.rstrip("%")) == pytest.approx(share * 100, abs=0.51)


def test_what_is_unknown_is_a_dash() -> None:
    assert [short(None), percent(None), megabytes(None)] == ["-"] * 3
    assert sum(column.width for column in VCPU_COLUMNS) <= 78
