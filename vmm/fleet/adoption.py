"""A fleet's machines found again by their actors, after the fleet's own process was lost."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import VmmError
from .cluster import Cluster
from .members import Member

__all__ = ["adopted"]


async def adopted(cluster: Cluster) -> dict[str, Member]:
    """By name. Of several actors of one machine the newest that has it is the right one, and the others end: a
    migration that was under way is waited for first."""
    found: dict[str, Member] = {}
    newest: dict[str, int] = {}     # generation, by name
    for actor, described in await asyncio.gather(*(_described(cluster, actor) for actor in cluster.residents())):
        if described is None:
            continue
        wanted, generation, node, has_it = described
        newest[wanted.name] = max(generation, newest.get(wanted.name, 0))
        known = found.get(wanted.name)
        if not has_it or (known is not None and known.generation > generation):
            cluster.kill(actor)
            continue
        if known is not None:
            cluster.kill(known.actor)
        found[wanted.name] = Member(wanted, node, actor=actor, generation=generation, state="running")
    for name, member in found.items():
        member.over = set(range(newest[name] + 1)) - {member.generation}
        member.generation = newest[name]
    return found


async def _described(cluster: Cluster, actor: Any) -> tuple[Any, Any]:
    """The actor, and what Resident.describe says; None: it is gone."""
    try:
        return actor, await cluster.ask(actor.describe.remote())
    except VmmError:
        return actor, None
