"""What a migration takes beside its bytes on the wire, in seconds: measured where docs/predict.md says. Where pages can
be sent faster than they can be handled, these decide."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PROGRAM", "Costs"]


@dataclass(frozen=True, slots=True)
class Costs:
    """``page``: of a page with bytes, in one channel of the source and at the target; two channels take half of it, if
    there are ``cores``. ``zero``: of one that is found to be zero. ``compressed``: of compressing one. ``round``: of a
    round, beside its pages and a way there and back. ``standstill``: of having the guest stand still and asking all of
    it. ``hand_over``: of the last one, from the standstill to the first instruction there, beside pages, and
    ``answers`` ways there and back."""

    setup: float = 0.045
    page: float = 2.6e-6
    zero: float = 0.35e-6
    compressed: float = 9e-6
    round: float = 0.003
    standstill: float = 0.004
    hand_over: float = 0.012
    answers: int = 3
    cores: int = 2

    def per_page(self, channels: int, *, compresses: bool) -> float:
        """Seconds of a page with bytes, by so many channels."""
        return (self.page + (self.compressed if compresses else 0.0)) / min(channels, self.cores)


#: Of a machine that runs a Linux program: it has a worker for each thread that there may be, and what its system keeps
#: goes over while it stands still. With 16 and with 40 of them it was about the same.
PROGRAM = Costs(setup=0.55, standstill=0.08, hand_over=0.14)
