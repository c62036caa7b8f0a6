"""What commands take: names as QMP has them, nothing that is not known."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["Arguments", "Count", "Nothing"]

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Arguments(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Of a command."""


class Nothing(Arguments):
    """Of a command that takes none."""
