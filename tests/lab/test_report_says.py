"""vmm report: what it says and draws of results at the edges, against what can be worked out by hand."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import vmm, vmm_here
from documents import MACHINE, MIGRATION, comparison, sweep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from vmm.consumers.events.event import Event
from vmm.consumers.migration.converge import Convergence, Round, Rules
from vmm.consumers.migration.report import latency
from vmm.errors import VmmError
from vmm.lab.report import machine as machine_kind
from vmm.lab.report import migration as migration_kind
from vmm.lab.report import sweep as sweep_kind
from vmm.lab.report.document import Figure, Section, bytes_text, count_text, percent_text, seconds_text
from vmm.lab.report.events import section as events_section
from vmm.lab.report.prediction import section as prediction_section
from vmm.lab.report.sources import sections
from vmm.lab.report.style import COLOURS


def figure_of(section: Section, key: str) -> Figure:
    return next(figure for figure in section.figures if figure.key == key)


def drawing(figure: Figure) -> Any:
    made = Drawing(figsize=figure.size, layout="constrained")
    FigureCanvasAgg(made)
    figure.draw(made)
    made.canvas.draw()      # type: ignore[no-untyped-call]
    return made


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "text"), [
    (seconds_text(0.9996), "1 s"), (seconds_text(0.9994), "999 ms"), (seconds_text(0.0009998), "1 ms"),
    (seconds_text(999.6), "1,000 s"), (seconds_text(-0.25), "-250 ms"), (percent_text(1, 1), "100 %"),
    (percent_text(0, 0), "0 %"), (percent_text(1, 8), "12.5 %"), (percent_text(2e-7), "0.00002 %"),
    (bytes_text((1 << 20) - 1), "1 MiB"), (bytes_text(12_345 << 40), "12,340 TiB"), (count_text(99.99), "100"),
    (count_text(0.00002), "0.00002")])
def test_numbers_are_rounded_before_their_unit_is_chosen_and_have_no_exponent(said: str, text: str) -> None:
    assert said == text


def test_a_prediction_says_from_which_bandwidth_on_for_each_limit_and_what_is_throttled() -> None:
    """A terabit, too, is in digits."""
    study = {"from": "a", "vcpus": 1, "seconds": 1.0, "memory": 1, "filled": 1, "least_bandwidth": None,
             "least_bandwidths": [{"downtime_limit": 20.0, "bandwidth": None},
                                  {"downtime_limit": 300.0, "bandwidth": 1.25e11}],
             "remedies": [], "rings": [], "grid": [{
                 "bandwidth": 1.25e11, "downtime_limit": limit, "outcome": "converges", "total": 1.0, "downtime": 1.0,
                 "transferred": 1, "short": False, "throttled": throttled,
                 "rounds": [{"pages": 1, "seconds": 1.0, "left": 0, "dirtied": 0}]}
                 for limit, throttled in ((20.0, {"0": 100}), (300.0, {}))]}
    found = prediction_section(study)
    assert found.outcome == ("It converges by itself at no bandwidth with a downtime limit of 20 ms, "
                             "at 1,000 Gbit/s and above with a downtime limit of 300 ms.")
    figure = figure_of(found, "prediction-bandwidth")
    assert [row[2] for row in figure.data.rows] == ["converges, throttled", "converges"]
    assert figure.says == ("2 of 2 combinations of bandwidth and downtime limit converge, 1 of them only since vCPUs "
                           "are throttled.")


# --- events ----------------------------------------------------------------------------------------------------


def harvest(at: float, vcpu: int, count: int) -> Event:
    return Event(at=at, source="coordinator", name="kvm_dirty_ring_reap_vcpu",
                 fields={"id": vcpu, "count": count, "outstanding": count})


def stall(at: float, vcpu: int, took: float) -> Event:
    return Event(at=at, source=f"vcpu{vcpu}", name="stall", took=took)


def test_the_time_is_that_which_was_looked_at() -> None:
    """Of a machine: a wait that began long before counts for what is in there, and no event does not make it short."""
    pause = Event(at=3602.0, source="vcpu0", name="pause", took=3600.0)
    found = events_section([pause, Event(at=3603.0, source="vcpu0", name="verb")], "x", (3600.0, 3610.0))
    assert found.outcome == "In 10 s no vCPU stalled at a full ring."
    assert figure_of(found, "events-timeline").data.rows == [["vCPU 0", "paused", "1", "2 s", "2 s", "20 %"]]
    stalled = events_section([stall(3601.0, 0, 5.0), stall(3605.0, 1, 2.0)], "x", (3600.0, 3610.0))
    assert stalled.outcome == "In 10 s vCPUs stalled 2 times at full rings, for 15 % of their time."    # 3 s of 20
    assert dict(stalled.facts)["stalls"].endswith("5 s at most")


def test_of_a_file_the_time_begins_with_its_first_event() -> None:
    pause = Event(at=3602.0, source="vcpu0", name="pause", took=3600.0)
    found = events_section([pause, stall(3606.0, 0, 1.0)], "x")
    assert found.outcome == "In 4 s vCPUs stalled once at full rings, for 25 % of their time."


def test_one_moment_has_no_rates() -> None:
    found = events_section([harvest(5.0, 0, 448), stall(5.0, 0, 1e-4), harvest(5.0, 0, 3)], "x")
    assert found.outcome == "In one moment vCPUs stalled once at full rings."
    assert found.figures == []


def heights(events: list[Event], vcpu: int, until: float, bins: int) -> list[int]:
    """Of the ring in each bin: walked through in steps of a thousandth of one."""
    found = []
    for number in range(bins):
        most = 0
        for step in range(1000):
            at = (number + step / 1000) * until / bins
            now = 0
            for event in events:
                if event.at > at:
                    break
                if event.name == "reset":
                    now = 0
                elif event.fields["id"] == vcpu:
                    now = event.fields["outstanding"]
            most = max(most, now)
        found.append(most)
    return found


def test_a_ring_is_drawn_as_full_as_it_was_until_it_was_reset() -> None:
    given = [harvest(0.0, 0, 100), harvest(0.1, 1, 7), harvest(1.0, 0, 300),
             Event(at=2.0, source="coordinator", name="reset"), harvest(3.0, 0, 50), harvest(3.0, 1, 9),
             Event(at=4.0, source="coordinator", name="reset"), harvest(4.0, 1, 0)]
    found = drawing(figure_of(events_section(given, "x"), "events-fill"))
    for vcpu, axes in enumerate(found.axes):
        (patch,) = axes.patches
        values = patch.get_data().values
        assert list(values) == heights(given, vcpu, 4.0, len(values))
    first = found.axes[0].patches[0].get_data().values
    assert set(first) == {0, 50, 100, 300}
    assert first[250] == 0, "none once it was reset"
    assert first[50] == 100, "as it was, also where nothing was harvested"


def test_those_that_are_drawn_are_those_in_the_table_and_the_others_are_said_to_be_left_out() -> None:
    """Of sixteen vCPUs, of which the last dirty and stall most."""
    given = [event for vcpu in range(16) for event in (
        harvest(1.0 + vcpu / 100, vcpu, 10 + vcpu), stall(2.0, vcpu, 0.01 * (vcpu + 1)))]
    found = events_section(given, "x")
    for key, first in (("events-timeline", 8), ("events-fill", 10), ("events-rate", 10)):
        figure = figure_of(found, key)
        names = [f"vCPU {vcpu}" for vcpu in range(first, 16)]
        assert f"Those {len(names)} of 16 vCPUs that " in figure.says
        texts = drawing(figure)
        shown = ([axes.get_title() for axes in texts.axes] if len(texts.axes) > 1 else
                 [text.get_text() for text in texts.legends[0].get_texts()])
        assert shown == names
        inside = {cell.split(" (")[0] for cell in (*figure.data.columns, *(row[0] for row in figure.data.rows))}
        assert {cell for cell in inside if cell.startswith("vCPU ")} == set(names)


def test_why_a_vcpu_waits_is_told_without_colours() -> None:
    given = [Event(at=at, source="vcpu0", name=name, took=0.5)
             for at, name in ((1.0, "stall"), (2.0, "pause"), (3.0, "throttle"))]
    made = drawing(figure_of(events_section(given, "x"), "events-timeline"))
    hatches = {patch.get_label(): patch.get_hatch() or "" for patch in made.axes[0].patches}
    assert len(hatches) == 3
    assert len(set(hatches.values())) == 3
    legend = {text.get_text(): patch.get_hatch() or "" for text, patch in
              zip(made.legends[0].get_texts(), made.legends[0].get_patches(), strict=True)}
    assert legend == hatches


def test_a_file_without_events_is_a_section_without_events(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").touch()
    (found,) = sections(str(tmp_path / "e.jsonl"))
    assert (found.key, found.outcome) == ("events", "There is none.")


# --- machines --------------------------------------------------------------------------------------------------


def verified(**more: Any) -> dict[str, Any]:
    return {**MACHINE, "verification": {**MACHINE["verification"], **more}}


@pytest.mark.parametrize(("given", "outcome"), [
    ({}, "and every write was found in the log"), ({"rounds": 0}, "but nothing was verified"),
    ({"ok": False, "surplus_pages": 3}, "but verification failed: 0 pages lost, 3 surplus"),
    ({"ok": False, "lost_pages": 1234, "surplus_is_failure": False}, "but verification failed: 1,234 pages lost")])
def test_what_the_verifier_found(given: dict[str, Any], outcome: str) -> None:
    assert machine_kind.section(verified(**given)).outcome == f"It ended with status 0, {outcome}."


def test_of_a_lost_machine_there_is_said_why_and_when() -> None:
    found = machine_kind.section({"name": "a", "state": "lost", "exit_code": 6, "ended_at": "2026-03-01T09:15:02+00:00",
                                  "cause": "its processes were killed"})
    assert dict(found.facts)["ended"] == "2026-03-01T09:15:02+00:00: its processes were killed"


def test_of_many_vcpus_each_figure_has_those_it_is_about() -> None:
    """Those with the high numbers dirty most, those with the low ones stall longest."""
    vcpus = [{**MACHINE["vcpus"][0], "index": i, "dirty_pages": 100 + i, "stalled_s": 1.0 / (i + 1)} for i in range(40)]
    found = machine_kind.section({**MACHINE, "vcpus": vcpus})
    for key, shown in (("machine-dirtied", range(8, 40)), ("machine-vcpu-time", range(32))):
        figure = figure_of(found, key)
        assert " Those 32 of 40 vCPUs that " in figure.says
        labels = [label.get_text() for label in drawing(figure).axes[0].get_yticklabels()]
        assert labels == [f"vCPU {i}" for i in shown]
    assert len(found.tables[0].rows) == 40


# --- migrations ------------------------------------------------------------------------------------------------


def test_the_line_of_the_downtime_is_where_the_migration_stops_the_guest() -> None:
    """Rounds whose first is zero pages for the most part: at the height of the line they fit, a page above they do
    not, as the migration itself decides."""
    rounds = [{"pages": 65536, "zero": 60_000, "seconds": 1.0, "transferred": 1, "left": 9_000, "dirtied": 9_000},
              {"pages": 9_000, "zero": 1_000, "seconds": 2.0, "transferred": 1, "left": 1_500, "dirtied": 750},
              {"pages": 1_500, "zero": 0, "seconds": 0.01, "transferred": 1, "left": 0, "dirtied": None}]
    axes = drawing(figure_of(migration_kind.section({**MIGRATION, "rounds": rounds}), "migration-left")).axes[0]
    height = next(line for line in axes.lines if line.get_label().startswith("sent within 300 ms")).get_ydata()[0]
    convergence = Convergence(Rules(downtime=0.3, max_rounds=30, converge=False, postcopy=False, postcopy_after=9))
    for one in rounds[:2]:
        convergence.after(Round(one["pages"] - one["zero"], one["seconds"], one["left"], [0.0]), can_limit=False)
    fits = [convergence.fits(Round(0, 1.0, int(height * 1e6 / 4096) + more, [0.0])) for more in (0, 1)]
    assert fits == [True, False]


def test_without_pages_that_had_bytes_there_is_no_line_of_the_downtime() -> None:
    rounds = [{"pages": 100, "zero": 100, "seconds": 1.0, "transferred": 1, "left": 0, "dirtied": 0}]
    axes = drawing(figure_of(migration_kind.section({**MIGRATION, "rounds": rounds}), "migration-left")).axes[0]
    assert [line.get_label() for line in axes.lines] == ["left dirty"]


def test_the_parts_of_the_downtime_are_said_and_what_else_there_was() -> None:
    found = migration_kind.section(MIGRATION)
    assert dict(found.facts)["of it"] == "pause 5 ms, hand-over 115 ms"
    assert figure_of(found, "migration-time").says.endswith(
        "else: 40 ms. Else: between rounds, asking for the dirty log; after the downtime, the end of the machine at "
        "the source, and in post-copy, before that, the pages that followed the guest.")
    older = {key: value for key, value in MIGRATION.items() if key != "downtime_parts"}
    assert "of it" not in dict(migration_kind.section(older).facts)


def test_waits_for_pages_are_counted_in_ranges() -> None:
    waits = [50e-6, 90e-6, 150e-6, 700e-6, 750e-6, 799e-6]
    found = migration_kind.section({**MIGRATION, "postcopy_latency": latency(waits)})
    figure = figure_of(found, "migration-postcopy")
    assert figure.data.rows == [["≤ 100 µs", "2"], ["100 µs to 200 µs", "1"], ["400 µs to 800 µs", "3"]]
    assert [label.get_text() for label in drawing(figure).axes[0].get_xticklabels()] == [r[0] for r in figure.data.rows]


# --- sweeps ----------------------------------------------------------------------------------------------------


def test_a_sweep_has_a_panel_for_each_accelerator_and_load() -> None:
    """What all points share is said once; a figure of more panels and lines is taller."""
    document = sweep()
    rows = document["summary"]
    few = sweep_kind.section(document)
    assert dict(few.facts)["all points"] == "replay, zipf, 64 MiB, adaptive, 1 machine"
    made = drawing(few.figures[0])
    assert [text.get_text() for text in made.legends[0].get_texts()] == ["ring 1,024", "ring 4,096"]
    assert few.figures[0].data.rows[0][:2] == ["ring 1,024", "1"]

    def other(**more: Any) -> list[dict[str, Any]]:
        return [{**row, "point": {**row["point"], **more}} for row in copy.deepcopy(rows)]

    document["summary"] = [*rows, *other(workload="random"), *other(accel="kvm"), *other(ram=1 << 30)]
    many = sweep_kind.section(document)
    made = drawing(many.figures[0])
    assert [axes.get_title() for axes in made.axes] == ["replay, zipf", "replay, random", "kvm, zipf"]
    assert [text.get_text() for text in made.legends[0].get_texts()] == [
        "64 MiB, ring 1,024", "64 MiB, ring 4,096", "1 GiB, ring 1,024", "1 GiB, ring 4,096"]
    assert many.figures[0].size[1] > few.figures[0].size[1] + 2
    assert {line.get_color() for line in made.axes[1].lines if line.get_linestyle() != ":"} <= set(COLOURS)


def test_what_is_below_nothing_is_drawn_too() -> None:
    """A flush from which more is deducted than it took."""
    document = sweep()
    document["summary"][0]["least"]["flush_ms"] = document["summary"][0]["median"]["flush_ms"] = -3.0
    figures = {figure.key: drawing(figure) for figure in sweep_kind.section(document).figures}
    assert figures["stress-flush"].axes[0].get_ylim()[0] < -3
    assert figures["stress-throughput"].axes[0].get_ylim()[0] == 0


# --- where they come from ----------------------------------------------------------------------------------------


def test_a_pipe_is_a_file_too() -> None:
    """As bash makes one of <(vmm predict NAME --json)."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(json.dumps(comparison()).encode())
    try:
        (found,) = sections(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
    assert found.key == "compare"


def test_names_that_cannot_be_looked_up_are_errors_in_a_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name in ("x" * 300, str(tmp_path / ("y" * 300)), str(loop), "a\0b"):
        with pytest.raises(VmmError, match=r"cannot be read: ") as caught:
            sections(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [
    lambda report: report.pop("reaper"), lambda report: report.update(vcpus=3),
    lambda report: report["vcpus"][0].pop("resets")])
def test_a_record_of_another_version_is_an_error_in_a_line(spoil: Callable[[dict[str, Any]], Any],
                                                           monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vmm.machine.names import scope

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    report = copy.deepcopy({**MACHINE, "name": "old"})
    spoil(report)
    folder = tmp_path / "shardvmm" / f"{scope()}-old"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    done = vmm_here("report", "old", "--output", str(tmp_path / "out.html"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("vmm: error: machine 'old': its report is of another version (")


# --- where they go -----------------------------------------------------------------------------------------------


def test_a_page_on_standard_output_is_a_page_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MACHINE))
    done = vmm("report", str(tmp_path / "m.json"), "--output", "/dev/stdout")
    assert done.returncode == 0
    assert done.stdout.startswith("<!doctype html>")
    assert done.stdout.rstrip().endswith("</html>")
    assert done.stderr == ("Machine alpha: It ended with status 0, and every write was found in the log.\n"
                           "/dev/stdout\n")
    both = vmm_here("report", str(tmp_path / "m.json"), "--output", "/dev/stdout", "--json")
    assert (both.returncode, both.stdout) == (2, "")


def test_a_column_is_right_aligned_where_all_of_it_is_numbers(tmp_path: Path) -> None:
    """And not cell by cell: a model may be a number alone."""
    document = sweep()
    document["model"] *= 2
    document["model"][1] = {**document["model"][1], "terms": [{"name": "vCPU", "value": 12345.0, "error": 0.1}]}
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert vmm_here("report", str(tmp_path), "--output", str(tmp_path / "out.html")).returncode == 0
    text = (tmp_path / "out.html").read_text()
    assert "<td>3</td>" in text
    assert "<td>12,340 x vCPU</td>" in text
    assert '<td class="number">0.90</td>' in text


def test_a_format_without_files_to_have_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MACHINE))
    done = vmm_here("report", str(tmp_path / "m.json"), "--format", "png", "--output", str(tmp_path / "out.html"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vmm: error: --format is of the files of --figures DIR: give that, too\n"
