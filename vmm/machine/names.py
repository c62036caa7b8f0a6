"""Names: what may be one, and where it leads. Whatever takes a name (verb, file, directory, another host) has it
checked here, before it becomes part of a path or of a segment's name.

A machine's runtime directory is ``$XDG_RUNTIME_DIR/shardvmm/<machine>/``, else ``/tmp/shardvmm-<uid>/<machine>/``.
Its shared-memory segments are ``/shardvmm.<uid>.<scope>.<machine>.<what>``, and its lock is what that begins with
(ipc/claims.py). No machine's name has a dot, so no machine's segments can be taken for another's. The scope is of
the root of the runtime directories: two machines of one name may run under two roots, and /dev/shm is one for all.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.claims import Belongings

from ..errors import VmmError

if TYPE_CHECKING:
    from .spec import RamSlot

__all__ = ["MACHINE_NAME", "RAM_MAPPING", "VERIFIER", "belongings", "between_name", "check_client_name",
           "check_key_name", "check_machine_name", "check_snapshot_id", "is_epoch", "is_machine_name", "is_snapshot_id",
           "machine_dir", "machine_of", "machine_prefix", "record_queue", "runtime_root", "scope", "scope_prefix",
           "segment_name", "slot_segment"]

#: Of a machine, as a regular expression (for schemas; it has to match whole).
MACHINE_NAME = "[a-z0-9][a-z0-9-]{0,31}"

#: The verifier's own client of the dirty log.
VERIFIER = "verify"

#: The path of a mapping (proc_pid_maps(5)) that is a machine's RAM, at the end of a text.
RAM_MAPPING = re.compile(r"/dev/shm/shardvmm\.\d+\.[0-9a-f]{8}\." + MACHINE_NAME
                         + r"\.ram\d+(?:\.[0-9a-f]+)?(?: \(deleted\))?$")

_FALLBACK = "/tmp/shardvmm-{}"      # where there is no $XDG_RUNTIME_DIR
_MACHINE = re.compile(MACHINE_NAME)
_CLIENT = re.compile(r"[a-z0-9_]{1,32}")
_EPOCH = re.compile("snap_[0-9a-f_]{1,27}")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SNAPSHOT = re.compile(r"[0-9]{4}|[1-9][0-9]{4,17}")


def is_machine_name(name: str) -> bool:
    """Whether a machine may be called so."""
    return _MACHINE.fullmatch(name) is not None


def check_machine_name(name: str) -> str:
    """The name. Raises VmmError where no machine may be called so."""
    return _checked(_MACHINE, name, "machine name", "use a-z, 0-9 and dashes, at most 32 characters, not beginning "
                                                    "with a dash")


def check_client_name(name: str) -> str:
    """The name. Raises VmmError where no client of the dirty log may be called so."""
    return _checked(_CLIENT, name, "client name", "use a-z, 0-9 and _, 1 to 32 characters")


def is_epoch(name: str) -> bool:
    """Whether a client of the dirty log is called so that gathers what is dirtied after a snapshot."""
    return _EPOCH.fullmatch(name) is not None


def check_key_name(name: str) -> str:
    """The name. Raises VmmError where no pair of keys may be called so."""
    return _checked(_KEY, name, "key name", "use A-Z, a-z, 0-9, dots, dashes and _, at most 64 characters, "
                                            "beginning with a letter or digit")


def is_snapshot_id(name: str) -> bool:
    """Whether a snapshot may be called so: a number of four digits, or more where it needs them."""
    return _SNAPSHOT.fullmatch(name) is not None


def check_snapshot_id(name: str) -> str:
    """The id. Raises VmmError where no snapshot has such a one."""
    return _checked(_SNAPSHOT, name, "snapshot id", "must be a number as shown by vmm snapshot list")


def _checked(pattern: re.Pattern[str], name: str, what: str, rule: str) -> str:
    if pattern.fullmatch(name) is None:
        raise VmmError(f"invalid {what} {_shown(name)}: {rule}")
    return name


def _shown(name: str) -> str:
    """In quotes, on one line, and not longer than that is of use."""
    text = ascii(name)
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- where they lead ------------------------------------------------------------------------------------


def between_name(machine: str) -> str:
    """What a machine is called while it is being upgraded: from when its new processes run it until they can have its
    name."""
    return f"upgrade-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"


def runtime_root() -> Path:
    """Where the machines' runtime directories are, whether it is there yet or not; one path, however the
    environment spells it. Raises VmmError when it is not this user's own: whoever else could write there could
    stand in for any machine."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if _usable(base):
        root = Path(os.path.realpath(base)) / "shardvmm"
        remedy = f"remove {root}"
    else:
        root = Path(_FALLBACK.format(os.getuid()))
        remedy = "set XDG_RUNTIME_DIR to a directory of your own"
    try:
        status = os.lstat(root)
    except OSError:
        return root
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise VmmError(f"the runtime directory {root} is not a directory owned by this user: {remedy}")
    if status.st_mode & 0o077:
        raise VmmError(f"the runtime directory {root} is accessible to other users: run chmod 700 {root}")
    return root


def _usable(base: str) -> bool:
    """$XDG_RUNTIME_DIR as its specification has it: absolute, and the user's own."""
    try:
        return os.path.isabs(base) and os.stat(base).st_uid == os.getuid() and os.access(base, os.W_OK | os.X_OK)
    except (OSError, ValueError):
        return False


def scope() -> str:
    """Eight hexadecimal digits for the root of the runtime directories."""
    return hashlib.sha256(os.fsencode(runtime_root())).hexdigest()[:8]


def scope_prefix() -> str:
    """What the names (without the leading slash) of all segments and locks under this root begin with."""
    return f"shardvmm.{os.getuid()}.{scope()}."


def machine_dir(name: str) -> Path:
    """Raises VmmError."""
    check_machine_name(name)
    return runtime_root() / name


def belongings(machine: str) -> Belongings:
    """All that is a machine's on this host: lock, segments, runtime directory. Raises VmmError."""
    check_machine_name(machine)
    return Belongings(f"{scope_prefix()}{machine}", machine_dir(machine))


def machine_prefix(machine: str) -> str:
    """What the names (without the leading slash) of all segments of ``machine`` begin with, and of nobody else's.
    Raises VmmError."""
    return belongings(machine).prefix


def segment_name(machine: str, what: str) -> str:
    """Of one segment, with the leading slash. Raises VmmError."""
    return f"/{machine_prefix(machine)}{what}"


def slot_segment(machine: str, kind: str, slot: RamSlot) -> str:
    """Of a segment of this very slot, and of no other of its id: ``kind`` is ram, log, copy or vlog<vcpu>. Raises
    VmmError."""
    return segment_name(machine, f"{kind}{slot.id}.{slot.born:x}")


def record_queue(machine: str) -> str:
    """Of the queue between a machine that is recorded and who records it."""
    return segment_name(machine, "record")


def machine_of(name: str) -> str | None:
    """Whose a segment (or lock) of this scope is, by its name without the leading slash; None: no machine's."""
    prefix = scope_prefix()
    machine = name.removeprefix(prefix).partition(".")[0]
    return machine if name.startswith(prefix) and is_machine_name(machine) else None
