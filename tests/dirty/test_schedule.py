"""When the reaper wakes. The rates and times that must come out are computed here, from the rule as it is
documented: up at once, down by half a reap; due when the fastest ring would be 40 % full; within the bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vmm.dirty.schedule import Schedule
from vmm.machine.spec import ReaperSpec

FILL = Fraction(2, 5)

#: Reaps of one ring: (seconds since the last one in 1/1024, entries harvested). Binary fractions are exact floats.
reaps = st.lists(st.tuples(st.integers(1, 1 << 14), st.integers(0, 65536)), min_size=1, max_size=30)
bounds = st.tuples(st.integers(1, 1000), st.integers(1, 10_000)).map(lambda b: (b[0] / 1024, (b[0] + b[1]) / 1024))


def adaptive(least: float = 0.001, most: float = 1.0) -> ReaperSpec:
    return ReaperSpec(min_interval=least, max_interval=most)


def learnt(found: list[tuple[int, int]], most: float) -> Fraction:
    """Entries per second after these reaps, exactly. The first reap has no predecessor: its entries are taken to be
    those of one longest wait."""
    rate = Fraction(0)
    for number, (ticks, count) in enumerate(found):
        seen = count / (Fraction(ticks, 1024) if number else Fraction(most))
        rate = seen if seen >= rate else (rate + seen) / 2
    return rate


def taught(spec: ReaperSpec, found: list[tuple[int, int]], index: int = 0) -> tuple[Schedule, float]:
    schedule, now = Schedule(spec), 100.0
    for ticks, count in found:
        now += ticks / 1024
        schedule.learn(now, {index: count})
    return schedule, now


@given(found=reaps, limit=st.integers(1, 65536), between=bounds)
def test_it_wakes_when_the_ring_would_be_two_fifths_full_within_its_bounds(
        found: list[tuple[int, int]], limit: int, between: tuple[float, float]) -> None:
    least, most = between
    schedule, now = taught(adaptive(least, most), found)
    wait = schedule.plan(now, {0: limit})
    assert least <= wait <= most
    rate = learnt(found, most)
    wanted = FILL * limit / rate if rate else Fraction(most)
    assert wait == pytest.approx(float(min(max(wanted, Fraction(least)), Fraction(most))), rel=1e-9)
    if wait > least:
        assert rate * Fraction(wait) <= FILL * limit * Fraction(1_000_001, 1_000_000)


@given(slow=st.integers(0, 1000), fast=st.integers(1000, 65536))
def test_it_learns_a_higher_rate_at_once(slow: int, fast: int) -> None:
    once, now = taught(adaptive(1e-9, 1e6), [(1024, slow)] * 5 + [(1024, fast)])
    ever, then = taught(adaptive(1e-9, 1e6), [(1024, fast)] * 6)
    assert once.plan(now, {0: 1000}) == pytest.approx(ever.plan(then, {0: 1000}))


@given(fast=st.integers(1, 65536), quiet=st.integers(1, 12))
def test_it_unlearns_a_rate_by_half_with_each_quiet_reap(fast: int, quiet: int) -> None:
    schedule, now = taught(adaptive(1e-9, 1e9), [(1024, fast)] * 2)
    before = schedule.plan(now, {0: 1000})
    for _ in range(quiet):
        now += 1.0
        schedule.learn(now, {0: 0})
    assert schedule.plan(now, {0: 1000}) == pytest.approx(before * 2**quiet)


@given(rates=st.lists(st.integers(1, 60_000), min_size=2, max_size=8),
       limits=st.lists(st.integers(64, 65536), min_size=8, max_size=8))
def test_the_ring_that_fills_first_decides(rates: list[int], limits: list[int]) -> None:
    spec = adaptive(1e-9, 1e6)
    together, now = Schedule(spec), 50.0
    for _ in range(2):
        now += 1.0
        together.learn(now, dict(enumerate(rates)))
    alone = []
    for rate, limit in zip(rates, limits, strict=False):
        schedule, then = taught(spec, [(1024, rate)] * 2)
        alone.append(schedule.plan(then, {0: limit}))
    assert together.plan(now, dict(zip(range(len(rates)), limits, strict=False))) == pytest.approx(min(alone))


@given(rate=st.integers(1, 60_000), steps=st.integers(1, 40), ring=st.integers(1024, 65536))
def test_a_steady_rate_never_fills_a_ring(rate: int, steps: int, ring: int) -> None:
    """Also at twice the learnt rate there is room."""
    schedule, now = Schedule(adaptive(1e-6, 1.0)), 10.0
    wait = 1.0
    for _ in range(steps):
        now += wait
        schedule.learn(now, {0: round(rate * wait)})
        wait = schedule.plan(now, {0: ring})
    assume(rate * wait > 100)       # or rounding is the larger part
    assert 2 * rate * wait < ring


@given(found=reaps, interval=st.floats(0.001, 60.0))
def test_fixed_learns_nothing(found: list[tuple[int, int]], interval: float) -> None:
    schedule, now = taught(ReaperSpec(mode="fixed", interval=interval), found)
    assert schedule.plan(now, {0: 1}) == interval


@given(wait=st.floats(0.0, 5.0), after=st.floats(0.0, 10.0))
def test_what_is_left_until_it_is_due(wait: float, after: float) -> None:
    schedule = Schedule(ReaperSpec(mode="fixed", interval=wait))
    assert schedule.left(3.0) == 0.0        # nothing was planned: at once
    schedule.plan(3.0, {})
    assert schedule.left(3.0 + after) == pytest.approx(max(0.0, wait - after), abs=1e-9)


def test_a_ring_that_has_gone_is_not_waited_for() -> None:
    schedule, now = taught(adaptive(0.001, 1.0), [(1024, 50_000)] * 2, index=7)
    assert schedule.plan(now, {3: 4096}) == 1.0     # vCPU 7 has ended; of vCPU 3 nothing is known
    assert schedule.plan(now, {7: 4096}) < 1.0


# --- resets -----------------------------------------------------------------------------------------------------------


@given(rate=st.integers(1000, 500_000), ring=st.integers(1024, 65536), late=st.floats(0.0, 0.001),
       resetting=st.floats(0.0, 0.002), least=st.floats(0.0005, 0.002))
def test_at_a_steady_rate_a_ring_is_reset_in_time(rate: int, ring: int, late: float, resetting: float,
                                                  least: float) -> None:
    """Harvests free nothing; each comes ``late``, and entries go on coming while the ring is reset. It gets full only
    where even a reset with each reap would not have been in time."""
    soonest = least + late + resetting
    assume(rate * 2 * soonest < 0.4 * ring)
    schedule, now = Schedule(adaptive(least, 1.0)), 10.0
    for _ in range(2):      # so late, so long: known by now
        schedule.plan(now, {0: ring})
        schedule.woken(now + 1.0 + late)
        schedule.was_reset(resetting)
    schedule.learn(now, {0: rate})
    filled, resets = 0.0, 0
    for _ in range(200):
        wait = schedule.plan(now, {0: ring - round(filled)}) + late
        now += wait
        filled += rate * wait
        assert filled < ring
        schedule.woken(now)
        schedule.learn(now, {0: round(rate * wait)})
        if schedule.is_low({0: ring - round(filled)}):
            filled += rate * resetting
            assert filled < ring
            filled, resets = 0.0, resets + 1
            schedule.was_reset(resetting)
    # And no sooner than it must be: half of the ring is filled by then.
    assert resets * ring / 2 <= rate * (now - 10.0) + ring


@given(rate=st.integers(1, 65536), interval=st.floats(0.01, 10.0))
def test_with_a_fixed_interval_a_ring_is_low_when_the_next_one_may_fill_it(rate: int, interval: float) -> None:
    schedule, _ = taught(ReaperSpec(mode="fixed", interval=interval), [(1024, rate)] * 3)
    enough = rate * interval / 0.4
    assert not schedule.is_low({0: round(enough * 1.01) + 1})
    assert schedule.is_low({0: int(enough * 0.99)})
    assert not schedule.is_low({1: 0})      # nothing is known of that one
