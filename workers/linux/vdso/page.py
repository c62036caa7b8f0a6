"""The vDSO as programs have it mapped: its parameters, which follow the clocks, and its image."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..frames import Frames
from ..space import PAGE, PROT_EXEC, PROT_READ, Memory, Space
from .tsc import INTERVAL, SHIFT, Rate, Sample

__all__ = ["Line", "Vdso"]

_IMAGE = Path(__file__).with_name("vdso.so")

#: Of struct parameters in vdso.c; its sequence comes first.
_SEQUENCE = struct.Struct("<I")
_PARAMETERS = struct.Struct("<I4Q")

_RIGHT = 1000           # nanoseconds that the clocks' distance may seem to change without that it has


@dataclass(frozen=True, slots=True)
class Line:
    """From ``tsc`` on, time goes by at ``rate``: nanoseconds a step, in units of 2^-32."""

    tsc: int
    monotonic: int
    rate: int

    def at(self, tsc: int) -> int:
        return self.monotonic + (max(0, tsc - self.tsc) * self.rate >> SHIFT)

    def followed_by(self, tsc: int, monotonic: int, rate: int) -> Line:
        """By one that leads to what the clock says, and never back: what is ahead of it gets slower, and has lost its
        lead after an interval."""
        lead = self.at(tsc) - monotonic
        if lead <= 0:
            return Line(tsc, monotonic, rate)
        return Line(tsc, monotonic + lead, rate - rate * min(lead, INTERVAL // 2) // INTERVAL)


class Vdso:
    """Its frames are the same in all processes. ``tsc`` reads the counter that programs see (tsc.py); None where they
    see another one: then they ask the system. ``saved``: what ``save`` gave; nothing of its memory is touched before
    the first ``update``, and no program may run before that."""

    def __init__(self, memory: Memory, frames: Frames, *, monotonic: Callable[[], int], realtime: Callable[[], int],
                 tsc: Callable[[], int] | None = None, saved: Sequence[int] = ()) -> None:
        """Raises NoFrames, and OSError where the image is not there."""
        image = _IMAGE.read_bytes()
        self._memory = memory
        self._sequence, *self.frames = saved or [0]
        self._is_stale = bool(saved)    # what it says is of another time
        if not saved:
            runs = frames.take(1 - -len(image) // PAGE)
            self.frames = [frame for first, count in runs for frame in range(first, first + count)]
            for at in range(0, len(image), PAGE):
                memory.write(self.frames[1 + at // PAGE], 0, image[at:at + PAGE])
        self._clocks = monotonic, realtime
        self._line: Line | None = None
        self._ahead = 0                 # of the monotonic clock, the other one
        self._rate = None if tsc is None else Rate(tsc, monotonic, realtime)

    # --- as a Backing (space.py) -----------------------------------------------------------------------------------

    def frame(self, page: int) -> int:
        return self.frames[page]

    def keep_mapped(self) -> None:
        """It is always there."""

    def let_go_mapped(self) -> None:
        """The same."""

    def map(self, space: Space) -> int:
        """Where there is room; the address of the image. Raises OSError."""
        if self._rate is not None and self._line is None:
            time.sleep(max(0, self._rate.due) / 1e9)
            self.update()
        count = len(self.frames)
        place = space.map(0, count * PAGE, PROT_READ, backing=self, name="vvar")
        return space.map(place + PAGE, (count - 1) * PAGE, PROT_READ | PROT_EXEC, fixed=True, backing=self, offset=1,
                         name="vdso")

    def save(self) -> list[int]:
        """What its frames hold is memory."""
        return [self._sequence, *self.frames]

    # --- time ------------------------------------------------------------------------------------------------------

    def monotonic(self) -> int:
        """As programs read it, in nanoseconds."""
        if self._line is None or self._rate is None:
            return self._clocks[0]()
        return self._line.at(self._rate.tsc())

    def realtime(self) -> int:
        """The same."""
        return self._clocks[1]() if self._line is None else self.monotonic() + self._ahead

    def update(self) -> None:
        """Follow the clocks, where that is due: between two of its calls, or at any time."""
        if self._is_stale:
            self._is_stale = False
            self._write(bytes(_PARAMETERS.size))
        if self._rate is not None and self._rate.due <= 0:
            self._follow(*self._rate.measure(), self._rate.tsc)

    def _follow(self, sample: Sample, rate: int, counter: Callable[[], int]) -> None:
        """Where the new line begins is read while nobody uses the old one: so all that was read from that is older."""
        ahead = sample.realtime - sample.monotonic
        if abs(ahead - self._ahead) > _RIGHT:
            self._ahead = ahead
        self._open()
        tsc = counter()
        monotonic = Line(sample.tsc, sample.monotonic, rate).at(tsc)
        old = self._line
        self._line = line = Line(tsc, monotonic, rate) if old is None else old.followed_by(tsc, monotonic, rate)
        self._close(_PARAMETERS.pack(1, line.tsc, line.monotonic, line.monotonic + self._ahead, line.rate))

    def _write(self, parameters: bytes) -> None:
        self._open()
        self._close(parameters)

    def _open(self) -> None:
        self._put_sequence(self._sequence | 1)

    def _close(self, parameters: bytes) -> None:
        self._memory.write(self.frames[0], _SEQUENCE.size, parameters)
        self._put_sequence((self._sequence | 1) + 1)

    def _put_sequence(self, sequence: int) -> None:
        self._sequence = sequence & 0xFFFF_FFFF
        self._memory.write(self.frames[0], 0, _SEQUENCE.pack(self._sequence))
