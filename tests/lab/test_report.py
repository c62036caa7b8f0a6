"""vmm report: what it makes of each kind of result, read as a file (what a browser shows: test_report_page.py)."""

from __future__ import annotations

import copy
import itertools
import json
import re
import struct
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from command import vmm_here
from documents import EVENTS, MACHINE, MIGRATION, PREDICTION, comparison, events, recording, sweep, write_all
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import ACCELS, spec

from vmm.client.machine import Machine
from vmm.consumers.workingset import heat
from vmm.errors import VmmError
from vmm.lab.report import machine as machine_kind
from vmm.lab.report import migration as migration_kind
from vmm.lab.report.document import bytes_text, count_text, seconds_text, unique_keys
from vmm.lab.report.events import section as events_section
from vmm.lab.report.sources import sections
from vmm.lab.report.style import colour, drawn
from vmm.lab.stress.measure import Figures, Proof
from vmm.lab.stress.sweep import Point, PointResult, Settings, open_results

KINDS = ["machine", "migration", "prediction", "stress", "compare", "working-set", "events"]


class Read(HTMLParser):
    """What there is in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []          # within it
        self.loads: list[str] = []          # from elsewhere
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, "not everything is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        for key, value in found.items():
            if key in ("src", "data") or (key in ("href", "xlink:href") and not str(value).startswith("#")):
                self.loads.append(str(value))
            elif key == "href" and tag == "a":
                self.links.append(str(value).removeprefix("#"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def whole(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of one of each kind."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    done = vmm_here("report", *map(str, kinds.values()), "--output", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return path.read_text()


def test_the_page_needs_nothing_from_elsewhere(whole: str) -> None:
    found = Read(whole)
    assert all(value.startswith("data:image/png;base64,") for value in found.loads)
    assert "script" not in found.tags
    assert not re.search(r"@import|url\((?!#)", whole)


def test_each_kind_is_known_by_what_is_in_it(whole: str) -> None:
    found = Read(whole)
    assert set(KINDS) <= set(found.ids)


def test_ids_are_there_once_and_links_lead_somewhere(whole: str) -> None:
    found = Read(whole)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= set(found.ids)


def test_every_figure_is_said_in_words_and_numbers(whole: str) -> None:
    """A screen reader has what the eye has."""
    figures = re.findall(r"<figure .*?</figure>", whole, re.DOTALL)
    assert len(figures) >= 17
    for figure in figures:
        said = re.search(r'<div role="img" aria-label="([^"]{40,})"', figure)
        assert said, figure[:300]
        elsewhere = re.search(r'<a href="#([^"]*)">The numbers', figure)
        assert "<table>" in figure or (elsewhere and f'id="{elsewhere[1]}"' in whole)
    assert len(re.findall(r"<table>\s*<caption>", whole)) == whole.count("<table>")
    assert whole.count("<svg ") == len(figures)


def test_what_a_report_says_is_text_and_nothing_else(whole: str) -> None:
    assert "<script>" not in whole
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["svg", "png"])
def test_figures_for_papers(kind: str, form: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    """One file each; axes have names with units; no page, unless asked for."""
    done = vmm_here("report", str(kinds[kind]), "--figures", str(tmp_path / "out"), "--format", form, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    files = sorted((tmp_path / "out").iterdir())
    assert sorted(said["written"]) == list(map(str, files))
    assert [f.stem for f in files] == sorted(said["sections"][0]["figures"])
    for path in files:
        data = path.read_bytes()
        if form == "png":
            assert data[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">II", data[16:24])[0] >= 2000     # 8 inches of 300 dots
        else:
            ElementTree.fromstring(data)
            assert "currentColor" not in data.decode()
            labels = re.findall(r"<!-- (.*?) -->", data.decode())   # of letters that are outlines
            assert any(re.search(r"\((s|ms|µs|MiB|MB|MB/s|MiB/s|%|Gbit/s)\)|entries|pages|vCPUs|=|exits", label)
                       for label in labels), labels


def test_names_at_axes_are_names(whole: str) -> None:
    """Numbers are written in digits, and what is no number as it was given."""
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", whole))
    assert texts >= {"64 MiB, 2 vCPUs, spin 0, ring 4,096, 100 ms", "vCPU 0", "50,000", "≤ 400 µs", "4"}


def test_no_two_lines_look_alike() -> None:
    styles = [colour(number) for number in range(10)]
    assert len({(style["color"], style["marker"]) for style in styles}) == len(styles)


def test_of_the_lines_of_a_migration(tmp_path: Path) -> None:
    """vmm migrate --json-lines: the last has all of it."""
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"event": "progress"}) + "\n" + json.dumps({"event": "end", **MIGRATION}) + "\n")
    (found,) = sections(str(path))
    assert found.outcome == migration_kind.section(MIGRATION).outcome


def test_an_interrupted_sweep_has_a_page(tmp_path: Path) -> None:
    """Of which there is results.jsonl only; on which host it ran is not in there."""
    point = Point(accel="replay", workload="random", params=(), ram=64 << 20, dirty_limit=None, ring=1024,
                  reaper="adaptive", vcpus=2, machines=1, repetition=0)
    figures = Figures(**dict.fromkeys(Figures.__dataclass_fields__, 1.0) | {"flushes": [(5.0, 1)]})
    proof = Proof(rounds=3, checked=1, dirty=1, lost=0, surplus=0, ok=True, findings=[])
    with open_results(tmp_path) as add:
        add(PointResult(point, Settings(1.0, 0.1, 5, None, {}), [figures], [proof], "", 0))
    (found,) = sections(str(tmp_path))
    assert found.outcome == "Measured: 1 of 1 points. No page was lost."
    assert found.warnings == ["the sweep is not complete: the same command resumes it"]
    assert [key for key, _ in found.facts] == ["verification", "repetitions", "all points"]
    assert drawn(found.figures[0], "svg")


def test_two_of_a_kind_have_names_of_their_own(kinds: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        done = vmm_here("report", str(kinds["events"]), str(kinds["events"]), "--output", str(tmp_path / name))
        assert done.returncode == 0
    text = (tmp_path / "one.html").read_text()
    ids = Read(text).ids
    assert {"events", "events-2", "events-fill", "events-fill-2"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert text == (tmp_path / "two.html").read_text(), "the same results make the same page"


def test_what_is_no_result_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"some": "thing"}')
    (tmp_path / "b.json").write_text("not JSON")
    (tmp_path / "c.json").write_text(json.dumps({**MIGRATION, "ram": 3}))
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04junk")
    (tmp_path / "e").mkdir()
    for name, status in (("a.json", 2), ("b.json", 2), ("c.json", 2), ("d.npz", 2), ("e", 2), ("absent.json", 2)):
        done = vmm_here("report", str(tmp_path / name), "--output", str(tmp_path / "out.html"))
        assert done.returncode == status, name
        assert done.stderr.startswith(f"vmm: error: {tmp_path / name}")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out.html").exists()
    assert vmm_here("report", "nobody", "--output", str(tmp_path / "out.html")).returncode == 7


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to all that is in it."""
    inner: Any = ()
    if isinstance(document, dict | list):
        inner = document.items() if isinstance(document, dict) else enumerate(document)
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_document_is_a_line_or_a_page(data: st.DataObject) -> None:
    """Any of its values replaced by something else: never a traceback. (Drawn for some only: that takes long.)"""
    document = copy.deepcopy(data.draw(st.sampled_from([
        MACHINE, MIGRATION, PREDICTION, sweep(), comparison(), list(map(json.loads, EVENTS.splitlines()))])))
    way = data.draw(st.sampled_from([place for place in places(document) if place]))
    parent = document
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = data.draw(st.sampled_from([None, "x", -1, 1e300, float("inf"), float("nan"), [], {}, True, 0]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.json"
        path.write_text("".join(json.dumps(line) + "\n" for line in document) if isinstance(document, list) else
                        json.dumps(document))
        try:
            (found,) = sections(str(path))
            for figure in found.figures if data.draw(st.integers(0, 3)) == 0 else ():
                drawn(figure, "svg")
        except VmmError as exc:
            said = str(exc)
        else:
            said = found.outcome
    assert "\n" not in said


@pytest.mark.parametrize("accel", ACCELS)
def test_of_a_machine_by_its_name(accel: str, tmp_path: Path) -> None:
    """While it runs, with its events; and when it has ended."""
    page = tmp_path / "page.html"
    with Machine.launch(spec("random", accel=accel, writes=0, timeout=None, log="always"), name="t") as machine:
        machine.register("me", mine=True)
        machine.sync("me")
        done = vmm_here("report", "t", "--output", str(page))
        assert (done.returncode, done.stderr) == (0, "")
        assert {"machine", "events", "events-reaper"} <= set(Read(page.read_text()).ids)
        machine.stop()
        machine.wait(60.0)
    done = vmm_here("report", "t", "--output", str(page))
    assert (done.returncode, done.stderr) == (0, "")
    found = page.read_text()
    assert "events" not in Read(found).ids
    assert "It ended with status 8" in found


# --- what it says, against what can be worked out by hand -------------------------------------------------------


def test_a_machines_numbers() -> None:
    found = machine_kind.section(MACHINE)
    assert found.outcome == "It ended with status 0, and every write was found in the log."
    facts = dict(found.facts)
    assert facts["memory"] == "64 MiB"
    assert facts["full rings"] == "25 exits, vCPUs stalled for 500 ms in all"
    assert "14.3 % were stalls" in found.figures[0].says      # 0.5 s of 3.5
    assert found.tables[0].rows[0][5] == "20 ms"                                        # 0.5 s of 25 exits


def test_a_migrations_numbers() -> None:
    found = migration_kind.section(MIGRATION)
    assert found.outcome == "It was completed in 3.2 s; the guest stood still for 120 ms."
    rates = found.figures[0]
    assert rates.says.startswith("In 1 of 3 rounds the guest dirtied")      # the second: 33,333 sent, 40,000 dirtied
    time = next(figure for figure in found.figures if figure.key == "migration-time")
    assert time.says.startswith("set-up: 40 ms, rounds, guest running: 3 s, downtime: 120 ms, else: 40 ms.")
    assert rates.data.rows[1][4] == count_text(20_000 / 0.6 * 4096 / 1e6)
    assert found.warnings == ["vCPU 0 was throttled, to 12.5 MB/s at the end"]
    late = migration_kind.section({**MIGRATION, "downtime": 400.0})
    assert "the downtime was over its limit of 300 ms" in late.warnings


def test_events_numbers() -> None:
    found = events_section(events(), "x")
    assert found.outcome == "In 3 s vCPUs stalled 3 times at full rings, for 12.5 % of their time."     # 0.75 of 6 s
    figures = {figure.key: figure for figure in found.figures}
    timeline = figures["events-timeline"].data.rows
    assert ["vCPU 0", "stalled at a full ring", "3", "750 ms", "250 ms", "25 %"] in timeline
    assert ["vCPU 1", "paused", "1", "500 ms", "500 ms", "16.7 %"] in timeline      # it has not ended
    assert figures["events-fill"].data.rows == [["vCPU 0", "3", "448", "448"]]


def test_the_heat_map_is_the_share_of_each_row() -> None:
    """Against a count page by page."""
    kept = recording()
    shares, heights = heat(kept, 100)
    stacked = {0: 0, 1: 4096}
    total, dirty = 5120, np.zeros((5120, kept.intervals), bool)
    for slot, first in stacked.items():
        for i in range(kept.intervals):
            dirty[kept.pages[slot][kept.offsets[slot][i]:kept.offsets[slot][i + 1]].astype(int) + first, i] = True
    edges = np.round(heights * 256).astype(int)
    assert (edges[0], edges[-1]) == (0, total)
    for row, (begin, end) in enumerate(itertools.pairwise(edges)):
        assert np.allclose(shares[row], dirty[begin:end].mean(axis=0))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (3.2e-6, "3.2 µs"), (0.000343, "343 µs"), (0.25, "250 ms"),
                                               (3.2, "3.2 s"), (4321.0, "4,321 s")])
def test_times_are_said_with_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_sizes_and_counts() -> None:
    assert bytes_text(64 << 20) == "64 MiB"
    assert bytes_text(100) == "100 B"
    assert (count_text(1234567), count_text(3), count_text(3.14159)) == ("1,234,567", "3", "3.14")


def test_keys_are_made_unique() -> None:
    found = unique_keys([events_section(events(), "a"), events_section(events(), "b")])
    assert [s.key for s in found] == ["events", "events-2"]
