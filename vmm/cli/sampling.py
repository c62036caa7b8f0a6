"""``vmm watch --sample``: how many pages a process dirties, estimated."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE

from ..errors import VmmError
from .common import print_json

if TYPE_CHECKING:
    from ..consumers.watch.sampling import Estimate

__all__ = ["watch_samples"]

_LINE_S = 1.0
_MIB = 1 << 20


def watch_samples(text: str, what: str | None, pages: int | None, interval: float, seconds: float | None, *,
                  json_lines: bool, as_json: bool) -> int:
    """The exit status. Raises VmmError."""
    from ..client.interrupts import Interrupts
    from ..consumers.watch.attach import check_target
    from ..consumers.watch.blocks import chooser
    from ..consumers.watch.sampling import PAGES, Sampler
    from ..consumers.watch.targets import find_target
    from ..consumers.watch.watcher import Ended

    target = find_target(text)
    found: list[Estimate] = []
    ended, shown = "", 0.0
    with Interrupts() as interrupts:
        try:
            sampler = Sampler(check_target(target.pid), chooser(what, target.vmm, target.sizes), pages or PAGES)
            due = began = time.monotonic()
            while seconds is None or due + interval <= began + seconds + interval / 2:
                due = max(due + interval, time.monotonic())
                stopped = interrupts.wait(due - time.monotonic())
                found.append(estimate := sampler.collect())
                if json_lines:
                    click.echo(json.dumps(estimate.as_dict()))
                elif not as_json and time.monotonic() >= shown:
                    shown = time.monotonic() + _LINE_S
                    click.echo(_line(estimate))
                if stopped:
                    break
        except Ended as exc:
            ended = str(exc)
    if not found:
        raise VmmError(ended or "interrupted before the first interval was complete")
    total = _total(found) | {"pid": target.pid, "name": target.name, "ended": ended}
    if json_lines:
        click.echo(json.dumps(total))
    elif as_json:
        print_json(total)
    else:
        click.echo(f"{target.name} ({target.pid}): {total['intervals']} intervals in {total['seconds']:.2f} s, about "
                   f"{total['pages_per_s']:,.0f} ± {total['error_per_s']:,.0f} pages/s ({total['mib_per_s']:.1f} "
                   f"MiB/s), by {total['sampled']:,} of {total['population']:,} pages"
                   + (f"; {ended}" if ended else ""))
    return 128 + interrupts.came if interrupts.came and seconds is not None else 0


def _line(estimate: Estimate) -> str:
    error = estimate.error / estimate.seconds
    return (f"{estimate.mib_per_s:10.1f} MiB/s {estimate.pages_per_s:12,.0f} ± {error:,.0f} pages/s "
            f"({estimate.changed:,} of {estimate.sampled:,} pages in {estimate.seconds:.2f} s)")


def _total(found: list[Estimate]) -> dict[str, Any]:
    """Of all intervals. The same pages are drawn in several, so their errors do not even out: they add up."""
    seconds = sum(e.seconds for e in found)
    pages = sum(e.pages for e in found)
    error = math.fsum(e.error for e in found)
    return {"intervals": len(found), "seconds": seconds, "pages_per_s": pages / seconds,
            "mib_per_s": pages * PAGE_SIZE / _MIB / seconds, "error_per_s": error / seconds,
            "sampled": found[-1].sampled, "population": found[-1].population}
