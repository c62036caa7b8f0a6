"""A recording of ``vmm working-set`` or ``vmm watch``: which pages are dirtied when."""

from __future__ import annotations

from typing import Any

import numpy as np

from ipc.shm import PAGE_SIZE

from ...consumers.workingset import WINDOWS, Recording, heat
from .document import Figure, Section, Table, bytes_text, count_text, percent_text, seconds_text
from .style import COLOURS, colour, heat_colours

__all__ = ["section"]

_MIB = 1 << 20
_LINES = 5          # vCPUs with a line of their own
_ROWS = 256         # of the heat map


def section(recording: Recording, name: str) -> Section:
    """``name``: of its file."""
    if not recording.intervals:
        return Section("working-set", f"Working set ({name})", "It has no interval.")
    lengths, pages = np.diff(recording.times), recording.dirty_pages()
    rates = pages * PAGE_SIZE / _MIB / np.maximum(lengths, 1e-9)
    whole = recording.working_set(recording.intervals)
    total = sum(count for _, _, count in recording.slots)
    found = Section("working-set", f"Working set ({name})",
                    f"In {seconds_text(float(recording.times[-1]))} the guest dirtied {bytes_text(whole * PAGE_SIZE)}, "
                    f"{percent_text(whole, total)} of its {bytes_text(total * PAGE_SIZE)}.")
    found.facts = [("intervals", f"{recording.intervals:,} of {seconds_text(float(lengths.mean()))}"),
                   ("distinct pages per interval", f"{count_text(float(pages.mean()))} in the mean, "
                                                   f"{int(pages.max()):,} at most"),
                   ("rate of distinct pages", f"{rates.mean():,.1f} MiB/s in the mean, {rates.max():,.1f} at most")]
    if recording.reason:
        found.warnings.append(f"the recording ended early: {recording.reason}")
    middles = (recording.times[1:] + recording.times[:-1]) / 2
    found.figures.append(Figure(
        "working-set-rate", "Dirty rate",
        f"Memory dirtied per second: {rates.mean():,.1f} MiB/s of distinct pages in the mean, {rates.max():,.1f} at "
        "most. vCPUs' lines count a page again for each entry in their rings.",
        lambda figure: _draw_rates(figure, recording, middles, lengths, rates),
        Table("Dirty rate", ["at (s)", "distinct pages", "MiB/s"],
              [[f"{at:.3f}", f"{n:,}", f"{rate:,.1f}"] for at, n, rate in zip(middles, pages, rates, strict=True)])))
    shares, heights = heat(recording, _ROWS)
    busy = shares.max(axis=1)
    found.figures.append(Figure(
        "working-set-heat", "Which memory is dirtied when",
        f"Address by time; {percent_text(float((busy > 0).mean()))} of the rows have a dirty page at some time. The "
        "further a cell's colour is from the ground's, the more of its pages were dirtied; for none, nothing is drawn.",
        lambda figure: _draw_heat(figure, recording, shares, heights),
        Table("Rows of the map, by the share of their pages that was dirtied",
              ["memory from (MiB)", "largest share in an interval (%)", "mean (%)"],
              [[f"{heights[i]:,.2f}", count_text(100 * float(busy[i])), count_text(100 * float(shares[i].mean()))]
               for i in range(len(busy)) if busy[i] > 0]), (8.0, 4.2)))
    windows = [w for w in WINDOWS if w <= recording.intervals]
    sizes = [recording.working_set(w) * PAGE_SIZE / _MIB for w in windows]
    step = float(lengths.mean())
    found.figures.append(Figure(
        "working-set-window", "Working set by window",
        f"Distinct memory dirtied within a window of so long, in the mean: {sizes[0]:,.1f} MiB in "
        f"{seconds_text(step * windows[0])}, {sizes[-1]:,.1f} MiB in {seconds_text(step * windows[-1])}. Where the "
        "line is flat, the guest writes to the same pages again, and a longer round of a migration leaves no more.",
        lambda figure: _draw_windows(figure, [w * step for w in windows], sizes),
        Table("Working set", ["window", "MiB"],
              [[seconds_text(w * step), f"{size:,.2f}"] for w, size in zip(windows, sizes, strict=True)]), (8.0, 3.0)))
    return found


def _draw_rates(figure: Any, recording: Recording, middles: Any, lengths: Any, rates: Any) -> None:
    axes = figure.subplots()
    entries = recording.vcpu_entries
    order = np.argsort(-entries.sum(axis=0))[:_LINES]
    for number, vcpu in enumerate(sorted(int(v) for v in order if entries[:, v].any())):
        style = colour(number + 1) | {"marker": ""}
        axes.plot(middles, entries[:, vcpu] * PAGE_SIZE / _MIB / lengths, label=f"vCPU {vcpu}", **style)
    axes.plot(middles, rates, color=COLOURS[0], linewidth=2, label="distinct pages, all vCPUs")
    axes.set(xlabel="time (s)", ylabel="dirtied (MiB/s)", ylim=(0, None))
    figure.legend(loc="outside upper left", ncols=4)


def _draw_heat(figure: Any, recording: Recording, shares: Any, heights: Any) -> None:
    axes = figure.subplots()
    axes.grid(visible=False)
    image = axes.pcolormesh(recording.times, heights, np.ma.masked_equal(100 * shares, 0), cmap=heat_colours(),
                            vmin=0, shading="flat", rasterized=True)
    one = len(recording.slots) == 1
    top = 0.0
    for slot, _, pages in recording.slots:
        if not one:
            axes.axhline(top, linewidth=0.6, color="grey")
            axes.annotate(f"slot {slot}", (recording.times[-1], top), fontsize=7, ha="right", va="bottom")
        top += pages * PAGE_SIZE / _MIB
    axes.set(xlabel="time (s)", ylim=(0, top),
             ylabel="offset in slot (MiB)" if one else "guest memory, slots stacked (MiB)")
    figure.colorbar(image, ax=axes, label="pages of the cell dirtied (%)")


def _draw_windows(figure: Any, windows: list[float], sizes: list[float]) -> None:
    axes = figure.subplots()
    axes.plot(windows, sizes, **colour(0))
    axes.set(xlabel="window (s)", ylabel="dirtied within it (MiB)", xscale="log", ylim=(0, None))
