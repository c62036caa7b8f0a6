"""The report of a migration (vmm/consumers/migration/report.py): its rounds, against what the guest dirtied."""

from __future__ import annotations

from typing import Any

from .document import Figure, Section, Table, bytes_text, count_text, seconds_text
from .style import COLOURS, bars, colour

__all__ = ["section"]

_OUTCOMES = {"completed": "It was completed", "failed": "It failed", "cancelled": "It was cancelled",
             "postcopy-paused": "It stopped in post-copy: memory is missing at the target",
             "handed-over-paused": "The source gave up after the hand-over"}


def section(report: dict[str, Any]) -> Section:
    """Raises LookupError, TypeError, ValueError for what is no such report."""
    ram, rounds, status = report["ram"], report["rounds"], report["status"]
    outgoing = report["direction"] == "outgoing"
    outcome = _OUTCOMES.get(status, f"It is {status}")
    if status == "completed":
        outcome += f" in {seconds_text(report['total_time'] / 1e3)}"
        if report["downtime"]:      # else it is not known
            outcome += f"; the guest stood still for {seconds_text(report['downtime'] / 1e3)}"
    title = f"Migration of {report['machine']} {'to' if outgoing else 'as it came to'} {report['target']}"
    found = Section("migration", title, f"{outcome}.")
    limit, parts = report["settings"].get("downtime"), report.get("downtime_parts", {})
    found.facts = [
        ("began", report["began_at"]), ("total time", seconds_text(report["total_time"] / 1e3)),
        ("downtime", seconds_text(report["downtime"] / 1e3) + (f" (limit {limit:,.0f} ms)" if limit else "")),
        *([("of it", ", ".join(f"{name.replace('_', '-')} {seconds_text(ms / 1e3)}" for name, ms in parts.items()))]
          if parts else []),
        ("rounds", str(len(rounds))),
        ("sent", f"{bytes_text(ram['transferred'])} for {bytes_text(ram['total'])} of memory; {ram['normal']:,} pages "
                 f"with their bytes, {ram['duplicate']:,} zero"),
        ("compression", report["compression"] + (f", ratio {report['compression_ratio']:.2f}"
                                                 if report["compression"] != "none" else "")),
    ]
    if ram["postcopy_pages"]:
        found.facts.append(("post-copy", f"{ram['postcopy_pages']:,} pages after the hand-over, "
                                         f"{ram['postcopy_requests']:,} of them waited for by the guest"))
    if report["error"]:
        found.warnings.append(report["error"])
    found.warnings += report["warnings"]
    if limit and report["downtime"] > limit:
        found.warnings.append(f"the downtime was over its limit of {limit:,.0f} ms")
    for vcpu, quota in report["throttled"].items():
        found.warnings.append(f"vCPU {vcpu} was throttled, to {quota:.1f} MB/s at the end")
    if rounds:
        found.figures += _figures(report, outgoing)
    if report["postcopy_latency"]:
        found.figures.append(_latencies(report))
    return found


def _figures(report: dict[str, Any], outgoing: bool) -> list[Figure]:
    rounds, page = report["rounds"], report["ram"]["page_size"]
    table = Table("Rounds", ["round", "pages sent", "zero", "seconds", "sent (MB/s)", "dirtied (MB/s)",
                             "left dirty (pages)"],
                  [[str(n), f"{r['pages']:,}", f"{r['zero']:,}", f"{r['seconds']:.4f}",
                    count_text(_sent(r, page) / 1e6), _or_dash(r["dirtied"], page / 1e6), _or_dash(r["left"])]
                   for n, r in enumerate(rounds, 1)])
    made = []
    pairs = [(r["dirtied"] * page, _sent(r, page)) for r in rounds if r["dirtied"] is not None]
    if outgoing and pairs:
        over = sum(dirtied >= sent for dirtied, sent in pairs)
        made.append(Figure(
            "migration-rates", "What was sent, and what was dirtied meanwhile",
            (f"In {over} of {len(pairs)} rounds the guest dirtied memory at least as fast as it was sent: such a round "
             "brings the migration no nearer to its end." if over else
             "In every round memory was sent faster than the guest dirtied it, so each left less than the one before."),
            lambda figure: _draw_rates(figure, rounds, page), table))
        made.append(Figure(
            "migration-left", "What was left after each round",
            "Memory that was still dirty at the end of each round. Once it fits into the downtime limit, it is sent "
            "while the guest stands still.",
            lambda figure: _draw_left(figure, report), table))
    made.append(Figure(
        "migration-time", "Where the time went",
        ", ".join(f"{name}: {seconds_text(seconds)}" for name, seconds in _times(report)) + f". {_else(report)}",
        lambda figure: _draw_time(figure, report), table, (8.0, 1.6)))
    return made


def _sent(one: dict[str, Any], page: int) -> float:
    """Bytes of the guest's memory per second: what the dirty rate has to be held against."""
    return float(one["pages"] * page / max(one["seconds"], 1e-9))


def _sendable(rounds: list[dict[str, Any]], page: int) -> float:
    """Bytes per second by which the migration itself judges what fits into its downtime
    (vmm/consumers/migration/converge.py): pages with their bytes, in the last round that had some while the guest ran;
    0: none had."""
    rates = [(r["pages"] - r["zero"]) * page / max(r["seconds"], 1e-6) for r in rounds
             if r["dirtied"] is not None and r["pages"] > r["zero"]]
    return float(rates[-1]) if rates else 0.0


def _or_dash(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else count_text(value * factor)


def _ends(rounds: list[dict[str, Any]]) -> list[float]:
    """Seconds from the first round's beginning to the end of each."""
    ends, at = [], 0.0
    for each in rounds:
        at += each["seconds"]
        ends.append(at)
    return ends


def _draw_rates(figure: Any, rounds: list[dict[str, Any]], page: int) -> None:
    axes = figure.subplots()
    edges = [0.0, *_ends(rounds)]
    axes.stairs([_sent(r, page) / 1e6 for r in rounds], edges, color=COLOURS[0], linewidth=2, label="memory sent",
                baseline=None)
    known = [r["dirtied"] * page / 1e6 if r["dirtied"] is not None else float("nan") for r in rounds]
    axes.stairs(known, edges, color=COLOURS[1], linewidth=2, linestyle="--", label="dirtied by the guest",
                baseline=None)
    axes.set(xlabel="time since the first round began (s)", ylabel="MB/s", ylim=(0, None))
    figure.legend(loc="outside upper left", ncols=2)


def _draw_left(figure: Any, report: dict[str, Any]) -> None:
    axes = figure.subplots()
    rounds, page = report["rounds"], report["ram"]["page_size"]
    points = [(end, r["left"] * page / 1e6) for end, r in zip(_ends(rounds), rounds, strict=True)
              if r["left"] is not None]
    axes.plot([0.0, *(at for at, _ in points)], [rounds[0]["pages"] * page / 1e6, *(left for _, left in points)],
              **colour(0), label="left dirty")
    limit, rate = report["settings"].get("downtime"), _sendable(rounds, page) / 1e6
    if limit and rate:
        axes.axhline(limit / 1e3 * rate, color=COLOURS[1], linestyle="--",
                     label=f"sent within {seconds_text(limit / 1e3)} at {count_text(rate)} MB/s")
    axes.set(xlabel="time since the first round began (s)", ylabel="left dirty (MB)")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 2 * rounds[0]["pages"] * page / 1e6)
    figure.legend(loc="outside upper left", ncols=2)


def _times(report: dict[str, Any]) -> list[tuple[str, float]]:
    """Seconds, which add up to the total. What is sent while the guest stands still is a round too, of the downtime."""
    total, setup, down = (report[key] / 1e3 for key in ("total_time", "setup_time", "downtime"))
    rounds = sum(r["seconds"] for r in report["rounds"] if r["dirtied"] is not None)
    found = [("set-up", setup)]
    if rounds:      # else it is the target's, which does not know
        found += [("rounds, guest running", rounds)]
    return [*found, ("downtime", down), ("else", max(0.0, total - setup - rounds - down))]


def _else(report: dict[str, Any]) -> str:
    """What is in the time of that name."""
    if report["direction"] == "incoming":
        return ("Else: the rounds until the guest stood still, and in post-copy the pages that came when it ran here "
                "already.")
    return ("Else: between rounds, asking for the dirty log; after the downtime, the end of the machine at the source, "
            "and in post-copy, before that, the pages that followed the guest.")


def _draw_time(figure: Any, report: dict[str, Any]) -> None:
    axes = figure.subplots()
    bars(axes, [""], [(name, [seconds]) for name, seconds in _times(report)])
    axes.set(xlabel="time (s)", yticks=[])
    figure.legend(loc="outside upper left", ncols=4)


def _latencies(report: dict[str, Any]) -> Figure:
    waits = report["postcopy_latency"]
    counts = [(int(k.split("_")[1]), int(v)) for k, v in waits.items() if k.startswith("upto_")]
    shortest = min((us for us, _ in counts), default=0)
    ranges = [((f"{seconds_text(us / 2e6)} to " if us > shortest else "≤ ") + seconds_text(us / 1e6), n)
              for us, n in counts]
    return Figure(
        "migration-postcopy", "How long the guest waited for a page after the hand-over",
        f"Half of {waits['pages']:,.0f} pages were there within {seconds_text(waits['median_us'] / 1e6)}, 99 % within "
        f"{seconds_text(waits['p99_us'] / 1e6)}; the longest wait took {seconds_text(waits['max_us'] / 1e6)}.",
        lambda figure: _draw_latencies(figure, ranges),
        Table("Pages waited for", ["wait", "pages"], [[label, f"{n:,}"] for label, n in ranges]))


def _draw_latencies(figure: Any, ranges: list[tuple[str, int]]) -> None:
    axes = figure.subplots()
    axes.bar([label for label, _ in ranges], [n for _, n in ranges], color=COLOURS[0])
    axes.set(xlabel="wait for a page", ylabel="pages")
    axes.tick_params(axis="x", labelrotation=30 if len(ranges) > 5 else 0)
    axes.yaxis.get_major_locator().set_params(integer=True)
