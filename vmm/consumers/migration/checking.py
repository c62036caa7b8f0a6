"""``vmm migrate --check``: ask a waiting target whether it could run the machine. Nothing else is sent, and nothing is
made there."""

from __future__ import annotations

import contextlib
import time
from importlib import metadata

import zmq

from ...client.machine import Machine
from .addresses import parse_address
from .fitness import needs, specification
from .keys import load_keys
from .report import MigrationError, Options
from .talk import Talk
from .wire import VERSION, Check, Checked

__all__ = ["Checked", "check"]

_PATIENCE = 10.0            # seconds for a target to be there, and to answer


def check(machine: Machine, address: str, options: Options | None = None) -> Checked:
    """What the target at this address says of the machine (``problems``: none, if it can be migrated there as
    ``options`` say). Raises MigrationError when it is busy or does not answer, VmmError for an invalid address or keys,
    and for a machine that cannot be migrated now."""
    options = options or Options()
    where = parse_address(address)
    keys = load_keys(options.key, options.peer, where, insecure=options.insecure)
    spec = specification(machine)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.term)
        try:
            talk = Talk(context, where, keys, time.monotonic() + _PATIENCE, lambda: None)
            stack.callback(talk.close)
            talk.patience = _PATIENCE
            talk.send(Check(VERSION, metadata.version("shardvmm"), spec, needs(spec, options)))
            return talk.expect(Checked)
        except zmq.ZMQError as exc:
            raise MigrationError(f"{address}: {exc}") from None
