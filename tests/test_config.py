"""Sizes, durations, overrides and the rules between keys. What a user sees of errors is in test_cli.py."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.config import ConfigError, config_schema, load_config, parse_duration, parse_size

_TIMES = {"": 1, "us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1, "m": 60, "h": 3600}
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "pages": 4096}


@given(st.integers(0, 1 << 20), st.sampled_from(sorted(_UNITS)), st.sampled_from(["", " "]))
def test_sizes(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * _UNITS[unit]
    assert parse_size(hex(number)) == number


@given(st.integers(1, 10_000),
       st.sampled_from([("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)]))
def test_durations(number: int, unit: tuple[str, float]) -> None:
    assert parse_duration(f"{number}{unit[0]}") == pytest.approx(number * unit[1])
    assert parse_duration(number) == number


def means(text: str, units: dict[str, int | float], whole: bool) -> Fraction | None:
    """What a size or duration in the documented form says, exactly; None for a text that is not one. Written anew:
    a number (of a duration with a fraction), blanks, a unit (of a size in any case)."""
    match = re.fullmatch(r"([0-9]+)(\.[0-9]+)?\s*([A-Za-z]*)", text.strip())
    if match is None or (whole and match[2]):
        return None
    named = {name.lower() if whole else name: unit for name, unit in units.items()}
    unit = named.get(match[3].lower() if whole else match[3])
    return None if unit is None else Fraction(match[1] + (match[2] or "")) * Fraction(unit)


#: Close to what is meant, and just beside it.
_NUMBERS = st.sampled_from(["0", "1", "4096", "007", "1.5", ".5", "1e3", "-1", "+1", "", "0x10", "1_000", "inf",
                            "nan"])
_SUFFIXES = st.sampled_from(["", "KiB", "MiB", "GiB", "pages", "kib", "MB", "M", "us", "ms", "s", "m", "h", "min",
                             "S", "pages s"])


@given(number=_NUMBERS, blank=st.sampled_from(["", " ", "  ", "\t", "-"]), unit=_SUFFIXES)
def test_a_size_or_duration_is_understood_or_refused(number: str, blank: str, unit: str) -> None:
    text = number + blank + unit
    for parse, units, whole in ((parse_size, _UNITS, True), (parse_duration, _TIMES, False)):
        wanted = means(text, units, whole)
        if whole and number == "0x10":
            wanted = Fraction(16) if not unit and not blank.strip() else None
        if not whole and wanted == 0:
            wanted = None       # a wait of no time is not meant
        if wanted is None:
            with pytest.raises(ValueError):     # noqa: PT011  (the texts are those of test_cli.py)
                parse(text)
        else:
            assert parse(text) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("value", [True, False, None, [], [1], {}, b"4KiB", "", " ", "KiB", "4 KiB 4", "-1",
                                   float("nan"), float("inf"), "nan", "inf", "1e400"])
def test_what_is_not_a_size_or_a_duration_is_refused(value: object) -> None:
    for parse in (parse_size, parse_duration):
        with pytest.raises(ValueError):     # noqa: PT011
            parse(value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_reach_lists_and_what_is_not_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.yaml", "memory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    config = load_config(path, ["vcpus=8", "memory.0.size=8MiB", "guest.params.lines=3", "reaper.mode=fixed"])
    assert (config.vcpus, config.memory[0].size, config.reaper.mode) == (8, 8 << 20, "fixed")
    assert config.guest.params == {"lines": 3}
    assert config.name == "m"


@pytest.mark.parametrize(("slots", "said"), [
    ("[{size: 4MiB}, {size: 4MiB, gpa: 0x3ff000}]", "overlap"),
    ("[{size: 4MiB, gpa: 0xefc01000}]", "0xf0000000"),
    ("[{size: 4MiB}, {slot: 0, gpa: 1GiB, size: 4MiB}]", "slot 0"),
    ("[{size: 4MiB, gpa: 4095}]", "multiple of 4096"),
    ("[{slot: 500, size: 4MiB}]", "500"),
    ("[]", "memory"),
])
def test_slots_that_cannot_be(tmp_path: Path, slots: str, said: str) -> None:
    path = write(tmp_path / "m.yaml", f"memory: {slots}\nguest: {{workload: hello}}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:1: memory") as caught:
        load_config(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1\n", "memory: [\n", "a: &x [*x]\n", "\x00",
                                  "vcpus: !!python/object:os.system 1\n"])
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "m.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "m.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_schema_names_every_key() -> None:
    keys = set(config_schema()["properties"])
    assert {"vcpus", "accel", "memory", "guest", "reaper", "verify", "timeout"} <= keys
