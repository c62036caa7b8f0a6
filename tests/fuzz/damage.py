"""Strategies: bytes and documents that were right before something happened to them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

__all__ = ["changed", "damaged", "odd"]

#: What a number, a text or a list may be instead.
odd = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, -1, 1, 255, 2**31, 2**32, 2**48, 2**63 - 1, -2**63]), st.integers(),
    st.floats(), st.text(max_size=20), st.sampled_from(["", "/", "../../x", "\0", "a\nb", "é" * 40, "9" * 400]),
    st.binary(max_size=20), st.just([]), st.just({}), st.lists(st.integers(), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3))


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds, mostly after a few changes; now and then no seed at all."""
    data = bytearray(draw(st.sampled_from([*seeds, b""])))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat", "number"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(data):
                data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "cut":
                del data[at:]
            case "drop":
                del data[at:at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=32))
            case "repeat":
                data[at:at] = data[at:at + draw(st.integers(1, 64))]
            case "number":
                size = draw(st.sampled_from([2, 4, 8]))
                value = draw(st.sampled_from([0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1]))
                data[at:at + size] = value.to_bytes(size, "little")
    return bytes(data)


@st.composite
def changed(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """A document (of dicts, lists and scalars), mostly with some of its values replaced, left out, or added."""
    document = _copy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(document))
        if not places:
            return draw(odd)
        where, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "replace", "leave out", "add", "nest"])):
            case "replace":
                where[key] = draw(odd)
            case "leave out":
                del where[key]
            case "add" if isinstance(where, dict):
                where[draw(st.text(max_size=8))] = draw(odd)
            case "nest":
                for _ in range(draw(st.sampled_from([1, 5, 300]))):
                    where[key] = [where[key]]
    return document


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list | tuple) else value


def _places(value: Any) -> Any:
    """(container, key) of all that is in it."""
    if isinstance(value, dict | list):
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(each)
