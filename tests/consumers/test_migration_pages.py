"""What travels in a migration, without machines: pages, bitmaps, messages; and when the guest is stopped."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from machines import spec

from vmm.consumers.migration import pages, wire
from vmm.consumers.migration.converge import LATE, Convergence, Next, Round, Rules
from vmm.consumers.migration.hot import Hot, Todo, joined
from vmm.consumers.migration.hot import pages as count
from vmm.consumers.migration.pages import PAGE, unpack
from vmm.consumers.migration.wire import Pages, WireError

# --- pages ------------------------------------------------------------------------------------------------------


@given(numbers=st.binary(max_size=64), data=st.binary(max_size=9000), sum_=st.binary(max_size=9),
       encoding=st.sampled_from(["zero", "none", "zstd", "lz4"]), honest=st.booleans())
def test_pages_that_make_no_sense_are_refused(numbers: bytes, data: bytes, sum_: bytes, encoding: Any,
                                              honest: bool) -> None:
    """Whatever comes, either pages within the slot and as many bytes come out, or a WireError."""
    import xxhash

    message = Pages(0, 0, numbers, encoding, xxhash.xxh3_64_digest(data) if honest else sum_)
    try:
        found, content, intact = unpack(message, data, 10)
    except WireError:
        return
    assert len(found) > 0
    assert set(found.tolist()) <= set(range(10))
    assert content is None or content.shape == (len(found), PAGE)
    assert intact or not honest


def memory_of(filled: list[int], seed: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Ten pages; those not filled are zero."""
    memory = np.zeros((10, PAGE), np.uint8)
    memory[filled] = np.random.default_rng(seed).integers(0, 256, (len(filled), PAGE), np.uint8)
    return memory.reshape(-1)


def bytes_of(data: Any, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """What is sent of it."""
    if not isinstance(data, pages.Runs):
        return bytes(data)
    return b"".join(memory[first:first + count].tobytes() for first, count in data.runs)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True), st.sets(st.integers(0, 9)),
       st.sampled_from(["none", "zstd", "lz4"]))
def test_what_is_packed_is_unpacked(sent: list[int], filled: set[int], encoding: Any) -> None:
    memory = memory_of(sorted(filled))
    copy = np.full((10, PAGE), 7, np.uint8)
    for message, data in pages.Packer(encoding, sums=True).pack(0, 0, memory, np.array(sorted(sent))):
        numbers, content, intact = unpack(message, bytes_of(data, memory), 10)
        assert intact
        copy[numbers] = 0 if content is None else content
    for page in range(10):
        assert (copy[page] == (memory.reshape(-1, PAGE)[page] if page in sent else 7)).all()


@pytest.mark.parametrize("encoding", ["none", "zstd", "lz4"])
@pytest.mark.parametrize("bit", [0, 8191])
def test_a_flipped_bit_of_page_data_is_seen(encoding: Any, bit: int) -> None:
    memory = memory_of([3])
    memory[3 * PAGE + 100:4 * PAGE] = 5       # so that it gets smaller
    [(message, data)] = pages.Packer(encoding, sums=True).pack(0, 0, memory, np.array([3]))
    assert message.encoding == encoding
    damaged = bytearray(bytes_of(data, memory))
    damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
    numbers, content, intact = unpack(message, bytes(damaged), 10)
    assert not intact
    assert numbers.tolist() == [3]
    assert (content is None) == (encoding != "none")


def test_only_pages_that_are_not_there_as_they_are_here_are_sent_again() -> None:
    """Of those that did not arrive intact: not what is dirty (it comes again in any case), not what is right."""
    memory = memory_of([0, 1, 2, 3])
    [(message, data)] = pages.Packer("none", sums=True).pack(0, 0, memory, np.arange(4))
    there = np.frombuffer(bytearray(bytes_of(data, memory)), np.uint8).reshape(-1, PAGE).copy()
    there[1, 17] ^= 1       # damaged on its way
    there[2, 9] ^= 1        # written by the guest meanwhile
    dirty = np.zeros(10, bool)
    dirty[2] = True
    said = pages.torn(message, there)
    assert pages.changed(said, memory, dirty).tolist() == [1]
    lost = pages.torn(message, None)        # could not be unpacked
    assert pages.changed(lost, memory, dirty).tolist() == [0, 1, 3]
    for bad in (msgspec.structs.replace(said, sums=said.sums[:-1]),
                msgspec.structs.replace(said, numbers=b"\xff" * 16)):
        with pytest.raises(WireError):
            pages.changed(bad, memory, dirty)


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 300), st.binary(max_size=40))
def test_a_bitmap_of_missing_pages(bits: list[bool], total: int, junk: bytes) -> None:
    message = pages.missing(0, np.array(bits))
    assert pages.missing_pages(message, len(bits)).tolist() == bits
    for other in (message, wire.Missing(0, junk)):
        try:
            assert len(pages.missing_pages(other, total)) == total
        except WireError:
            pass


def test_a_zstd_bomb_is_not_unpacked() -> None:
    import xxhash

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    with pytest.raises(WireError):
        unpack(Pages(0, 0, b"\0\0\0\0", "zstd", xxhash.xxh3_64_digest(bomb)), bomb, 10)


# --- messages ---------------------------------------------------------------------------------------------------


MESSAGES = [
    wire.Offer(wire.VERSION, "1", "00" * 16, spec("idle", accel="unicorn"), b"image", True),
    wire.RoundEnd(1, 2), wire.WhenReady(), wire.Missing(0, b"x"), wire.Gathered("snap_0", 0, b"x"),
    wire.State(b"x", [{}], spec("idle", accel="unicorn"), False), wire.Commit(wire.VERSION, "a"), wire.Done(),
    wire.Abort("why"), wire.Ping(),
    wire.Check(wire.VERSION, "1", spec("idle", accel="unicorn"), wire.Needs("kvm", ["sse"])),
]
ON_STREAMS = [wire.Join("a"), wire.Pages(1, 2, b"\0\0\0\0", "zero"), wire.Want(0, b"\0\0\0\0")]
ANSWERS = [
    wire.Received(), wire.Accept(), wire.Alive(3), wire.RoundAck(1, [wire.Torn(0, b"\0\0\0\0", b"12345678")]),
    wire.Ready(), wire.Prepared(), wire.Running(), wire.Missing(0, b"x"), wire.Want(0, b"\0\0\0\0"),
    wire.Complete([1.5]),
    wire.Refused("why"), wire.Ended("why"), wire.Unknown(), wire.Busy(),
    wire.Checked(["no"], ["note"], "a", "kvm"),
]


@pytest.mark.parametrize("message", MESSAGES + ON_STREAMS, ids=lambda m: type(m).__name__)
def test_a_message_arrives_as_it_was_sent_and_no_flipped_bit_does(message: Any) -> None:
    decode: Any = wire.decode_stream if message in ON_STREAMS else wire.decode_message
    frame, digest = wire.frames(message)
    assert decode(frame, digest) == message
    for at in {0, len(frame) // 2, len(frame) - 1}:
        damaged = bytearray(frame)
        damaged[at] ^= 1
        with pytest.raises(WireError):
            decode(bytes(damaged), digest)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda m: type(m).__name__)
def test_an_answer_arrives_as_it_was_said_and_no_flipped_bit_does(answer: Any) -> None:
    frame, digest = wire.frames(answer)
    assert wire.decode_answer([frame, digest]) == answer
    if not isinstance(answer, wire.Refused):        # one of another version has no checksum, and is to be read
        with pytest.raises(WireError):
            wire.decode_answer([frame, bytes(8)])


def test_every_message_is_among_those_tested() -> None:
    assert {type(m) for m in MESSAGES} == set(wire.Message.__args__)
    assert {type(m) for m in ON_STREAMS} == set(wire.OnStream.__args__)
    assert {type(m) for m in ANSWERS} == set(wire.Answer.__args__)


@given(st.binary(max_size=200))
def test_noise_is_no_message(noise: bytes) -> None:
    import xxhash

    for digest in (b"", noise[:8], xxhash.xxh3_64_digest(noise)):
        try:
            wire.decode_message(noise, digest)
        except WireError:
            pass


@pytest.mark.parametrize("other", [
    {"t": "offer", "version": 2, "program": "0.1", "spec": {}, "image": b""}, {"t": "commit", "version": 9},
    {"t": "offer", "version": 9, "program": "9.0", "whatever": [1, 2]}])
def test_another_version_is_told_apart_from_noise(other: dict[str, Any]) -> None:
    """Whatever else it holds, and whether it has a checksum or not."""
    frame = msgspec.msgpack.encode(other)
    with pytest.raises(wire.OtherVersion, match=rf"protocol {other['version']}, .* speaks {wire.VERSION}"):
        wire.decode_message(frame, b"")


def test_a_deeply_nested_message_is_refused() -> None:
    import xxhash

    frame = b"\x91" * 100_000
    with pytest.raises(WireError):
        wire.decode_message(frame, xxhash.xxh3_64_digest(frame))


# --- convergence ------------------------------------------------------------------------------------------------


RULES = Rules(downtime=0.3, max_rounds=30, converge=True, postcopy=False, postcopy_after=1)


def rounds(rules: Rules, *done: Round, can_limit: bool = True) -> tuple[Convergence, list[Next]]:
    convergence = Convergence(rules)
    return convergence, [convergence.after(each, can_limit=can_limit) for each in done]


def test_the_guest_is_stopped_when_the_rest_fits_into_the_downtime() -> None:
    convergence, what = rounds(RULES, Round(10_000, 1.0, 3001, [0.0]), Round(3001, 0.3001, 2999, [0.0]))
    assert what == [Next.ROUND, Next.STOP]
    assert convergence.expected_downtime(Round(0, 1.0, 2999, [0.0])) == pytest.approx(0.2999)


def test_zero_pages_do_not_count_as_what_can_be_sent() -> None:
    """A restored machine's first round: a million zero pages and a few others, in a second. Sending ten thousand
    others will take long."""
    convergence, what = rounds(RULES, Round(100, 1.0, 10_000, [0.0]))
    assert what == [Next.ROUND]
    assert convergence.expected_downtime(Round(0, 1.0, 10_000, [0.0])) == pytest.approx(100)
    convergence, what = rounds(RULES, Round(0, 1.0, 1, [0.0]))
    assert what == [Next.ROUND]
    assert convergence.expected_downtime(Round(0, 1.0, 1, [0.0])) is None


def test_nothing_left_needs_no_rate() -> None:
    assert rounds(RULES, Round(0, 1.0, 0, [0.0]))[1] == [Next.STOP]


def test_rounds_have_an_end() -> None:
    endless = [Round(1000, 1.0, 1000, [1000.0])] * 5
    _, what = rounds(Rules(0.0, 5, False, False, 1), *endless)
    assert what == [Next.ROUND] * 4 + [Next.STOP]


def test_post_copy_begins_after_as_many_rounds_as_asked_for() -> None:
    endless = [Round(1000, 1.0, 1000, [1000.0])] * 3
    _, what = rounds(Rules(0.0, 30, True, True, 3), *endless)
    assert what == [Next.ROUND, Next.ROUND, Next.POSTCOPY]


@pytest.mark.parametrize(("converge", "can_limit", "left", "limited"), [
    (True, True, 1000, True), (False, True, 1000, False), (True, False, 1000, False), (True, True, 600, False)],
    ids=["limited", "--no-converge", "no rings", "converges by itself"])
def test_vcpus_are_throttled_only_if_that_is_wanted_possible_and_needed(converge: bool, can_limit: bool, left: int,
                                                                        limited: bool) -> None:
    """After three rounds that leave as much as before; the vCPU that dirties most alone. Each round more halves
    it."""
    rules = Rules(0.1, 30, converge, False, 1)
    done = [Round(1000, 1.0, 1000, [900.0, 10.0])] * 2
    last = Round(1000, 1.0, left, [900.0, 10.0])
    convergence, _ = rounds(rules, *done, last, can_limit=can_limit)
    assert convergence.quotas == ({0: 490} if limited else {})      # half of 1,000 less the calm one's 10
    convergence.after(Round(1000, 1.0, 990, [490.0, 10.0]), can_limit=can_limit)
    if limited:
        assert convergence.quotas == {0: 245}


@pytest.mark.parametrize("late", list(LATE.values()))
def test_rounds_that_leave_no_less_for_so_long_are_a_stall(late: Next) -> None:
    """The seconds are those since the round that left the least; one that leaves less starts anew."""
    rules = Rules(0.0, 100, False, False, 1, stall=2.5, late=late)
    ends = [Round(1000, 1.0, left, [1000.0]) for left in (1000, 900, 950, 900, 800, 900, 800, 801)]
    convergence, what = rounds(rules, *ends)
    assert what == [Next.ROUND] * 7 + [late]
    assert convergence.stalled == pytest.approx(3.0)
    assert rounds(Rules(0.0, 100, False, False, 1), *ends)[1] == [Next.ROUND] * 8


@pytest.mark.parametrize(("left", "downtime", "converges", "seconds", "more"), [
    (5000, 0.1, True, 0.5 + 0.25 + 0.125, 3),       # each round takes half as long as the last: 5000, 2500, 1250, 625
    (900, 0.1, True, 0.0, 0),
    (5000, 0.0, False, 0.5 + 0.25 + 0.125 + 0.0625, 4),
    (10_000, 0.1, False, 1.0, 1), (20_000, 0.1, False, 2.0, 1)])
def test_a_forecast_goes_on_as_the_last_round_did(left: int, downtime: float, converges: bool, seconds: float,
                                                  more: int) -> None:
    """10,000 pages per second can be sent; the round took a second. Four more are allowed."""
    convergence, _ = rounds(Rules(downtime, 5, False, False, 1), Round(10_000, 1.0, left, [0.0]))
    found = convergence.forecast(left)
    assert found is not None
    assert found.converges == converges
    assert found.rounds == more
    assert found.seconds == pytest.approx(seconds)
    assert (found.dirtied, found.rate) == (left, 10_000)
    assert found.downtime <= downtime or not converges


def test_without_a_rate_there_is_no_forecast() -> None:
    convergence, _ = rounds(RULES, Round(0, 1.0, 1000, [0.0]))
    assert convergence.forecast(1000) is None


@pytest.mark.parametrize(("cap", "later", "rate"), [
    (8e6, 2e6, 500), (0.0, 2e6, 500), (8e6, 8e6, 2000), (0.0, 0.0, 2000), (0.0, 20e6, 2000), (8e6, 20e6, None),
    (8e6, 0.0, None)], ids=["lowered", "one", "the same", "none", "one that is never reached", "raised", "lifted"])
def test_what_can_be_sent_is_bounded_by_the_cap_there_is_now(cap: float, later: float, rate: int | None) -> None:
    """2,000 pages are sent in a second, of 4,000 bytes each; the 900 that are left fit into half of one, unless the cap
    is a quarter of that."""
    done = Round(2000, 1.0, 900, [0.0], sent=8_000_000, bandwidth=cap)
    rules = Rules(0.5, 30, False, False, 1)
    convergence, _ = rounds(dataclasses.replace(rules, bandwidth=cap), done)
    convergence.rules = dataclasses.replace(rules, bandwidth=later)
    found = convergence.forecast(900)
    assert (found.rate if found else None) == rate
    assert found is None or found.converges == (rate == 2000)
    assert convergence.expected_downtime(done) == pytest.approx(900 / (rate or 2000))
    assert convergence.fits(done) == (rate != 500)


def test_zero_pages_that_are_left_take_an_eighth() -> None:
    """10,000 pages with bytes can be sent per second; 24,000 of the 24,600 that are left are zero."""
    left = Round(10_000, 1.0, 24_600, [0.0], zero=24_000)
    convergence, what = rounds(Rules(0.36, 30, True, False, 1), left)
    assert what == [Next.STOP]
    assert convergence.expected_downtime(left) == pytest.approx(0.36)
    assert rounds(Rules(0.36, 30, True, False, 1), Round(10_000, 1.0, 24_600, [0.0]))[1] == [Next.ROUND]


@pytest.mark.parametrize(("beside", "lag", "dirtied", "downtime", "stops"), [
    (0.0, 0.0, 0.0, 0.1, True),         # the 1,000 pages that are left take just as long
    (0.01, 0.0, 0.0, 0.1, False),       # with 10 ms for the hand-over it is too long
    (0.01, 0.0, 0.0, 0.11, True),
    (0.0, 0.01, 5000.0, 0.1, False),    # and with 50 more pages until the guest stands still
    (0.0, 0.01, 5000.0, 0.105, True),
    (10.0, 0.0, 0.0, 0.4, True)])       # a quarter of the limit is for pages, come what may
def test_the_downtime_is_more_than_the_pages(beside: float, lag: float, dirtied: float, downtime: float,
                                             stops: bool) -> None:
    done = Round(10_000, 1.0, 1000, [dirtied])
    convergence = Convergence(Rules(downtime, 30, False, False, 1), beside, lag)
    assert (convergence.after(done, can_limit=False) is Next.STOP) == stops
    assert convergence.expected_downtime(done) == pytest.approx(beside + 0.1 + lag * dirtied / 10_000)


# --- hot pages ----------------------------------------------------------------------------------------------------


def test_pages_of_two_rounds_running_are_kept_until_the_end() -> None:
    """Against sets: what was dirtied in both of the last two rounds, and is left, is kept; all else is sent, what was
    kept before among it."""
    random = np.random.default_rng(1)
    sizes = {0: 64, 7: 300}
    hot = Hot()
    held: Todo = {}
    before: dict[int, set[int]] = {}
    kept = 0
    for _ in range(50):
        dirty = {slot: np.flatnonzero(random.random(size) < random.random()) for slot, size in sizes.items()}
        hot.look(dirty, sizes)
        left = joined(held, dirty)
        now, held = hot.split(left, 10_000)
        for slot in sizes:
            both = before.get(slot, set()) & {*dirty[slot].tolist()}
            assert {*held[slot].tolist()} == both
            assert {*now[slot].tolist()} == {*left[slot].tolist()} - both
            before[slot] = {*dirty[slot].tolist()}
        kept += count(held)
        assert count(now) + count(held) == count(left)
    assert kept


def test_none_is_kept_where_they_do_not_fit() -> None:
    hot, all_of_it = Hot(), {0: np.arange(100)}
    for _ in range(3):
        hot.look(all_of_it, {0: 100})
    assert hot.split(all_of_it, 99) == (all_of_it, {})
    now, held = hot.split(all_of_it, 100)
    assert (count(now), count(held)) == (0, 100)
