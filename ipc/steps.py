"""Named steps, at which a test has a process die or fail.

Whoever changes what a successor must know calls :func:`step` between any two actions that can be torn apart by a
kill. In ordinary life that is one comparison. With ``$VMM_STEPS`` naming a directory, a process that reaches step
``NAME`` looks for the file ``kill-NAME`` there (it removes it and sends itself SIGKILL), then for ``fail-NAME``
(it removes it and raises OSError with the errno written in it, in decimal). A file serves once, so that a
successor lives.

``STEPS`` is the whole list, by what is being done; tests/ipc/test_steps.py holds it against the calls in the source,
and walks it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

__all__ = ["DIRECTORY", "STEPS", "step"]

#: Of a test's; None in ordinary life.
DIRECTORY = os.environ.get("VMM_STEPS")

#: What is being done: the names of its steps, in their order.
STEPS: dict[str, tuple[str, ...]] = {
    "any verb": ("verb-carried-out",),
    "journal": ("journal-write", "journal-written"),
    "segment": ("segment-empty", "segment-sized"),
    "start": ("start-committed", "start-taken", "start-resumed"),
    "register": ("register-bitmap", "register-made", "register-committed"),
    "unregister": ("unregister", "log-unlink", "client-unlink"),
    "sync": ("sync-flushed", "fold-client", "sync-slot", "sync-taken", "sync-again"),
    "host write": ("write-begun", "host-write-begun", "host-write-made", "write-ended"),
    "memory add": ("memory-add-made", "memory-add-client", "memory-add-logged", "memory-add-set",
                   "memory-add-committed"),
    "memory remove": ("memory-remove-drained", "memory-remove-retired", "memory-remove-committed",
                      "memory-remove-set"),
    "log start, log stop": ("log-drained", "log-marked", "log-committed", "log-set"),
    "log on, log off": ("logging-drained", "logging-committed", "logging-set"),
    "tracking": ("tracking-drained", "tracking-made", "tracking-marked", "tracking-committed", "tracking-rewound",
                 "tracking-set"),
    "recording": ("record-start", "record-started", "record-stop", "record-stopped"),
    "verification": ("verify-take", "verify-taken", "verify-copied"),
    "post-copy": ("incoming", "incoming-committed", "incoming-set", "arrived", "arrived-set"),
    "stop": ("stop-saved", "stop-asked"),
    "take-over": ("take-over", "take-over-committed", "take-over-swept"),
    "a machine's life": ("turn", "verb", "report-kept", "done-said"),
    "pause": ("pause-noted", "pause-standing"),
    "resume": ("resume-noted",),
    "lease": ("lease-noted",),
    "freeze": ("freeze-noted",),
    "hand over": ("hand-over-noted",),
    "migration, its source": ("migrate-frozen", "migrate-state", "migrate-prepared", "migrate-hand-over",
                              "migrate-handed-over", "migrate-commit", "migrate-stop", "migrate-done"),
    "migration, its target": ("receive-commit", "receive-started"),
    "a hand-over that is not finished": ("unfinished-noted", "recoverer-begun"),
    "upgrade": ("upgrade-between", "upgrade-named"),
    "an upgrade that is not finished": ("upgrade-guard",),
    "dirty limit": ("limit-noted",),
    "snapshot create": ("snapshot-epoch", "snapshot-written", "snapshot-renamed", "snapshot-epoch-dropped"),
    "lazy restore": ("restore-begun", "restore-read"),
    "snapshot merge": ("snapshot-merge-written", "snapshot-merge-exchanged", "snapshot-merge-synced"),
    "snapshot delete": ("snapshot-out-of-chain",),
    "claiming a machine's name": ("claim-locked", "claim-cleared"),
    "clearing what a machine has left": ("clear-locked", "clear-directory", "clear-all"),
    "a call of another process's thread": (
        "inject-seized", "inject-stopped", "inject-frame", "inject-set", "inject-entered", "inject-made",
        "inject-fetched", "inject-returned", "inject-restored", "inject-detached", "inject-send"),
    "ring rebuild": ("lost-count-seen", "lost-count-marked", "lost-count-rebuilt"),
    "dead ring": ("dead-ring-published",),
}


def step(name: str) -> None:
    """Step ``name`` has been reached."""
    if DIRECTORY is not None:
        _reached(Path(DIRECTORY), name)


def _reached(directory: Path, name: str) -> None:
    if _took(directory / f"kill-{name}") is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    number = _took(directory / f"fail-{name}")
    if number is not None:
        raise OSError(int(number), os.strerror(int(number)))


def _took(path: Path) -> str | None:
    """The file's text, by the one process that gets to remove it."""
    try:
        text = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return None
    return text.strip() or "5"
