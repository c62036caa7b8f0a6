"""How much memory this process can still have: of the host, and of the memory cgroups that it is in.

A cgroup's limit is not a full disk: whoever goes beyond it is killed by the kernel, without a word. So it is asked
before. Linux Documentation/admin-guide/cgroup-v2.rst (Memory) and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory", "cgroup_left"]

_NO_LIMIT = 1 << 62     # version 1 has a number where version 2 has "max"


def available_memory() -> int:
    """MemAvailable and SwapFree of /proc/meminfo, in bytes."""
    return sum(_meminfo().values())


def _meminfo() -> dict[str, int]:
    found = {"MemAvailable": 0, "SwapFree": 0}
    with open("/proc/meminfo") as lines:
        for line in lines:
            key, _, rest = line.partition(":")
            if key in found:
                found[key] = int(rest.split()[0]) << 10
    return found


def cgroup_left(proc: Path = Path("/proc/self")) -> tuple[int, Path] | None:
    """(bytes, directory) of the memory cgroup of this process, or of one above it, that leaves least; None without
    a limit. What of its usage are files that the kernel can drop counts as left, as does swap that it may use."""
    tightest: tuple[int, Path] | None = None
    try:
        swap = _meminfo()["SwapFree"]
        for version, directory, top in _hierarchies(proc):
            for at in (directory, *directory.parents):
                left = _left_v2(at, swap) if version == 2 else _left_v1(at, swap)
                if left is not None and (tightest is None or left < tightest[0]):
                    tightest = (left, at)
                if at == top:
                    break
    except (OSError, ValueError, IndexError):
        return None     # what the kernel says is not what is known here: then there is no limit to go by
    return tightest


def _hierarchies(proc: Path) -> list[tuple[int, Path, Path]]:
    """(version, own directory, the uppermost one that can be seen) of each hierarchy with the memory controller."""
    groups = {}
    for line in (proc / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            groups["cgroup2" if number == "0" else "cgroup"] = path
    found = []
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind not in groups or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top = Path(mount)
        path = groups[kind]
        # A container may see a part of the hierarchy only, mounted as if it were the whole.
        inside = path == root or path.startswith(root.rstrip("/") + "/")
        directory = top / path[len(root.rstrip("/")):].lstrip("/") if inside else top
        found.append((2 if kind == "cgroup2" else 1, directory, top))
    return found


def _number(path: Path) -> int | None:
    """None for ``max``, and where there is no such file (no limit can be set there)."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)


def _droppable(directory: Path, keys: tuple[str, str]) -> int:
    pairs = (line.split() for line in (directory / "memory.stat").read_text().splitlines())
    return sum(int(value) for key, value in pairs if key in keys)


def _left_v2(directory: Path, swap: int) -> int | None:
    limit = _number(directory / "memory.max")
    if limit is None:
        return None
    used = _number(directory / "memory.current") or 0
    used -= _droppable(directory, ("inactive_file", "active_file"))
    swap_limit = _number(directory / "memory.swap.max")
    if swap_limit is not None:
        swap = min(swap, swap_limit - (_number(directory / "memory.swap.current") or 0))
    return max(0, limit - max(0, used) + max(0, swap))


def _left_v1(directory: Path, swap: int) -> int | None:
    """``memsw``: memory and swap together; its files may be missing, swap is not limited then."""
    lefts = []
    for kind, extra in (("memory", swap), ("memory.memsw", 0)):
        limit = _number(directory / f"{kind}.limit_in_bytes")
        if limit is not None:
            used = (_number(directory / f"{kind}.usage_in_bytes") or 0)
            used -= _droppable(directory, ("total_inactive_file", "total_active_file"))
            lefts.append(max(0, limit - max(0, used) + extra))
    return min(lefts) if lefts else None
