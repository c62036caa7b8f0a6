"""``vmm stress --faults``: the campaign of faults on the command line."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import VmmError
from .common import print_json

if TYPE_CHECKING:
    from ..lab.faults.campaign import Campaign
    from ..lab.faults.plan import Episode
    from ..lab.faults.run import Outcome

__all__ = ["run_faults"]

_RESULT = "faults.json"
_RESULT_MAX = 1 << 20     # bytes


def run_faults(faults: int, seed: int | None, accels: list[str], output: Path | None, replay: Path | None, *,
               stop: Callable[[], bool], as_json: bool) -> int:
    """``replay``: what such a campaign has found (its faults.json), again. The exit status: 1 when something was
    lost, or did not do what it should. Raises VmmError."""
    import msgspec

    from ..lab.faults.campaign import run_campaign
    from ..outputs import open_output

    again = None if replay is None else _load(replay)
    seed = again.seed if again is not None else secrets.randbelow(1 << 31) if seed is None else seed
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise VmmError(f"{output}: cannot be created: {exc.strerror}") from None

    def done(campaign: Campaign, episode: Episode, outcome: Outcome) -> None:
        if not as_json:
            click.echo(f"{campaign.faults:,} of {faults:,} faults; {episode}: {outcome.faults} faults, "
                       f"{outcome.takeovers} take-overs, {outcome.seconds:.1f} s"
                       f"{'; FAILED' if outcome.problem else ''}", err=True)

    with contextlib.ExitStack() as stack:
        kept = None if output is None else stack.enter_context(open_output(output / _RESULT))
        campaign = run_campaign(faults, seed, accels, stop=stop, done=done, replay=again)
        document = msgspec.to_builtins(campaign)
        if kept is not None:
            kept.write(json.dumps(document, indent=1).encode() + b"\n")
    if as_json:
        print_json(document)
    else:
        _show(campaign)
    return 1 if campaign.failure is not None else 0


def _load(path: Path) -> Episode:
    """The shortest list of events that failed. Raises VmmError."""
    from ..inputs import decode_json, read_input
    from ..lab.faults.campaign import Campaign

    try:
        failure = decode_json(read_input(path, _RESULT_MAX), Campaign).failure
    except ValueError as exc:
        raise VmmError(f"{path}: is not the result of vmm stress --faults: {exc}") from None
    if failure is None:
        raise VmmError(f"{path}: nothing failed in that campaign")
    return failure.shortest


def _show(campaign: Campaign) -> None:
    click.echo(f"seed {campaign.seed}: {campaign.faults:,} faults in {campaign.episodes:,} machines: "
               f"{campaign.takeovers:,} take-overs, {campaign.lost_workers:,} workers killed; "
               f"{campaign.seconds:,.0f} s")
    for title, counts in (("faults", campaign.hits), ("events", campaign.done), ("machines", campaign.machines)):
        click.echo(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
    click.echo(f"at the clients' end: {campaign.compared_pages:,} pages compared, {campaign.dirty_pages:,} dirty")
    failure = campaign.failure
    if failure is None:
        click.echo("no page and no machine was lost")
        return
    click.echo(f"FAILED: {failure.problem}\n  {failure.shortest}")
    for event in failure.shortest.events:
        click.echo(f"    {event}")
    click.echo(f"  (shortened from {len(failure.episode.events)} events; the whole campaign again: vmm stress --faults "
               f"{max(1, campaign.faults):d} --seed {campaign.seed})")
