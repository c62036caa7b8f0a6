"""Names: what may be one. Whatever takes a name (verb, file, directory, another host) has it checked here.

A name is a word that people type and that becomes part of a path or of a segment's name; so it has no slash, no
dot in front and no blank. Whoever makes a path of a name checks it first, whoever it came from: a command line,
a file, another host, another process.
"""

from __future__ import annotations

import re

from .errors import VmmError

__all__ = ["MACHINE_NAME", "check_client_name", "check_key_name", "check_machine_name", "check_snapshot_id",
           "is_machine_name"]

#: Of a machine, as a regular expression (for schemas; it has to match whole).
MACHINE_NAME = "[a-z0-9][a-z0-9-]{0,31}"

_MACHINE = re.compile(MACHINE_NAME)
_CLIENT = re.compile(r"[a-z0-9_]{1,32}")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SNAPSHOT = re.compile(r"[0-9]{1,18}")


def is_machine_name(name: str) -> bool:
    """Whether a machine may be called so."""
    return _MACHINE.fullmatch(name) is not None


def check_machine_name(name: str) -> str:
    """The name. Raises VmmError where no machine may be called so."""
    return _checked(_MACHINE, name, "machine name", "use a-z, 0-9 and dashes, at most 32 characters, no dash first")


def check_client_name(name: str) -> str:
    """The name. Raises VmmError where no client of the dirty log may be called so."""
    return _checked(_CLIENT, name, "client name", "use 1 to 32 of a-z, 0-9 and _")


def check_key_name(name: str) -> str:
    """The name. Raises VmmError where no pair of keys may be called so."""
    return _checked(_KEY, name, "key name", "use A-Z, a-z, 0-9, dots, dashes and _, at most 64 characters, and a "
                                            "letter or digit first")


def check_snapshot_id(name: str) -> str:
    """The id. Raises VmmError where no snapshot has such a one."""
    return _checked(_SNAPSHOT, name, "snapshot id", "it is a number, as vmm snapshot list shows it")


def _checked(pattern: re.Pattern[str], name: str, what: str, rule: str) -> str:
    if pattern.fullmatch(name) is None:
        raise VmmError(f"{what} {_shown(name)}: {rule}")
    return name


def _shown(name: str) -> str:
    """In quotes, on one line, and not longer than that is of use."""
    text = ascii(name)
    return text if len(text) <= 100 else f"{text[:97]}..."
