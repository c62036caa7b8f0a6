"""Whose a process is: numbers of users and groups (credentials(7)). Who is not user 0 may not become another one; no
file is refused for what they are."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace

__all__ = ["AS_IT_IS", "ROOT", "Ids"]

#: In place of a number.
AS_IT_IS = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Ids:
    """Of users, or of groups. ``files``: of files that it makes. Each method gives what there is afterwards; ``free``:
    any number may be had. They raise OSError (EPERM)."""

    real: int = 0
    effective: int = 0
    saved: int = 0
    files: int = 0

    def one(self, wanted: int, *, free: bool) -> Ids:
        """setuid(2)."""
        if wanted == AS_IT_IS:
            raise OSError(errno.EINVAL, "")
        if free:
            return Ids(wanted, wanted, wanted, wanted)
        _check(wanted in (self.real, self.saved))
        return replace(self, effective=wanted, files=wanted)

    def two(self, real: int, effective: int, *, free: bool) -> Ids:
        """setreuid(2)."""
        _check(free or real in (AS_IT_IS, self.real, self.effective))
        _check(free or effective in (AS_IT_IS, self.real, self.effective, self.saved))
        now_real, now = _chosen(real, self.real), _chosen(effective, self.effective)
        saves = real != AS_IT_IS or effective not in (AS_IT_IS, self.real)
        return Ids(now_real, now, now if saves else self.saved, now)

    def three(self, real: int, effective: int, saved: int, *, free: bool) -> Ids:
        """setresuid(2)."""
        for each in (real, effective, saved):
            _check(free or each in (AS_IT_IS, self.real, self.effective, self.saved))
        now = _chosen(effective, self.effective)
        return Ids(_chosen(real, self.real), now, _chosen(saved, self.saved), now)

    def with_files(self, wanted: int, *, free: bool) -> Ids:
        """setfsuid(2): as it was, where that is refused."""
        if wanted != AS_IT_IS and (free or wanted in (self.real, self.effective, self.saved, self.files)):
            return replace(self, files=wanted)
        return self

    def at_exec(self, owner: int | None) -> Ids:
        """``owner``: of a program that runs as its owner."""
        now = self.effective if owner is None else owner
        return Ids(self.real, now, now, now)


ROOT = Ids()


def _chosen(wanted: int, now: int) -> int:
    return now if wanted == AS_IT_IS else wanted


def _check(allowed: bool) -> None:
    if not allowed:
        raise OSError(errno.EPERM, "")
