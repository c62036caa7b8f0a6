"""What ``vmm predict --json`` says: a migration at several bandwidths, before there is one."""

from __future__ import annotations

from typing import Any

from ipc.shm import PAGE_SIZE

from ...consumers.predict.simulate import outcome_text
from ...tables import digits_text
from .document import Figure, Section, Table, bytes_text, count_text, seconds_text
from .style import colour

__all__ = ["section"]

_ROUNDS_SHOWN = 6       # lines of the figure of rounds


def section(study: dict[str, Any]) -> Section:
    """Raises LookupError, TypeError, ValueError for what is no such document."""
    grid = study["grid"]
    found = Section("prediction", f"Migration of {study['from']}, foretold",
                    f"It converges by itself {', '.join(map(_least, study['least_bandwidths']))}.")
    found.facts = [("memory", f"{bytes_text(study['memory'])}, {bytes_text(study['filled'])} of it filled"),
                   ("vCPUs", str(study["vcpus"])), ("recorded for", seconds_text(study["seconds"]))]
    if any(cell["short"] for cell in grid):
        found.warnings.append(f"some rounds take longer than the {study['seconds']:.1f} s that were recorded: more "
                              "pages may get dirty in them")
    table = Table("Predicted migrations", ["bandwidth", "downtime limit", "outcome", "total", "downtime", "sent",
                                           "rounds"],
                  [[_rate(c["bandwidth"]), f"{c['downtime_limit']:g} ms", _outcome(c), seconds_text(c["total"] / 1e3),
                    seconds_text(c["downtime"] / 1e3), bytes_text(c["transferred"]), str(len(c["rounds"]))]
                   for c in grid])
    good = sum(c["outcome"] == "converges" for c in grid)
    held = sum(c["outcome"] == "converges" and bool(c["throttled"]) for c in grid)
    found.figures.append(Figure(
        "prediction-bandwidth", "Time and downtime by bandwidth",
        f"{good} of {len(grid)} combinations of bandwidth and downtime limit converge"
        + (f", {held} of them only since vCPUs are throttled." if held else "."),
        lambda figure: _draw_grid(figure, grid), table))
    lines = [c for c in grid if c["downtime_limit"] == grid[0]["downtime_limit"]][:_ROUNDS_SHOWN]
    found.figures.append(Figure(
        "prediction-rounds", "Memory left after each round",
        f"At a downtime limit of {seconds_text(grid[0]['downtime_limit'] / 1e3)}. A line that stops falling is a "
        "migration that does not converge by itself.",
        lambda figure: _draw_rounds(figure, lines), _rounds(lines)))
    if study["remedies"]:
        found.tables.append(Table("What helps", ["remedy", "outcome", "total", "downtime"],
                                  [[_remedy(r), _outcome(r), seconds_text(r["total"] / 1e3),
                                    seconds_text(r["downtime"] / 1e3)] for r in study["remedies"]]))
    if study["rings"]:
        found.tables.append(Table(
            "Rings", ["asked every", "pages of the busiest vCPU, median", "most", "ring that holds that"],
            [[seconds_text(r["interval"]), f"{r['median']:,}", f"{r['most']:,}",
              "none: track with bitmaps" if r["entries"] is None else f"{r['entries']:,} entries"]
             for r in study["rings"]]))
    return found


def _outcome(one: dict[str, Any]) -> str:
    return outcome_text(one["outcome"], one["throttled"])


def _least(one: dict[str, Any]) -> str:
    where = "no bandwidth" if one["bandwidth"] is None else f"{_rate(one['bandwidth'])} and above"
    return f"at {where} with a downtime limit of {seconds_text(one['downtime_limit'] / 1e3)}"


def _rate(value: float) -> str:
    return f"{digits_text(value * 8 / 1e9)} Gbit/s" if value else "no cap"


def _remedy(one: dict[str, Any]) -> str:
    return {"bandwidth": f"bandwidth of {_rate(one['value'])}", "downtime": f"downtime of {seconds_text(one['value'])}",
            "dirty-limit": f"dirty limit of {digits_text(one['value'] / 1e6, 4)} MB/s for each vCPU",
            "converge": "throttling by the migration", "postcopy": "post-copy"}[one["what"]]


def _rounds(cells: list[dict[str, Any]]) -> Table:
    return Table("Rounds", ["bandwidth and round", "pages sent", "seconds", "left dirty (MB)", "dirtied (MB/s)"],
                 [[f"{_rate(c['bandwidth'])}, {n}", f"{r['pages']:,}", f"{r['seconds']:.3f}",
                   count_text(r["left"] * PAGE_SIZE / 1e6), count_text(r["dirtied"] * PAGE_SIZE / 1e6)]
                  for c in cells for n, r in enumerate(c["rounds"], 1)])


def _draw_grid(figure: Any, grid: list[dict[str, Any]]) -> None:
    for axes, key, label in zip(figure.subplots(1, 2), ("total", "downtime"), ("total time (s)", "downtime (ms)"),
                                strict=True):
        for number, limit in enumerate(sorted({c["downtime_limit"] for c in grid})):
            line = [c for c in grid if c["downtime_limit"] == limit and c["bandwidth"]]
            axes.plot([c["bandwidth"] * 8 / 1e9 for c in line],
                      [c[key] / (1e3 if key == "total" else 1.0) for c in line], **colour(number),
                      label=f"limit {seconds_text(limit / 1e3)}" if key == "total" else None)
        ticks = sorted({c["bandwidth"] * 8 / 1e9 for c in grid if c["bandwidth"]})
        axes.set(xscale="log", xlabel="bandwidth (Gbit/s)", ylabel=label, ylim=(0, None))
        axes.set_xticks(ticks, [digits_text(t) for t in ticks])
        axes.minorticks_off()
    figure.legend(loc="outside upper left", ncols=4)


def _draw_rounds(figure: Any, cells: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    for number, cell in enumerate(cells):
        left, at, ends = [r["left"] * PAGE_SIZE / 1e6 for r in cell["rounds"]], 0.0, []
        for one in cell["rounds"]:
            at += one["seconds"]
            ends.append(at)
        axes.plot(ends, left, **colour(number), label=f"{_rate(cell['bandwidth'])}: {_outcome(cell)}")
    axes.set(xlabel="time since the first round began (s)", ylabel="left dirty (MB)")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 2 * max(r["left"] for c in cells for r in c["rounds"]) * PAGE_SIZE / 1e6 + 1)
    axes.set_xscale("log")
    figure.legend(loc="outside upper left", ncols=3)
