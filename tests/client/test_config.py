"""Sizes, durations, overrides and the rules between keys. What a user sees of errors is in test_cli.py."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.client.config import ConfigError, load_config
from vmm.client.plan import plan
from vmm.client.schema import config_schema
from vmm.client.units import parse_duration, parse_rate, parse_size
from vmm.client.yamlfile import FILE_MAX
from vmm.errors import VmmError

_TIMES = {"": 1, "us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1, "m": 60, "min": 60, "h": 3600}
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "pages": 4096, "kB": 1000, "MB": 10**6}


@given(st.integers(0, 1 << 20), st.sampled_from(sorted(_UNITS)), st.sampled_from(["", " "]))
def test_sizes(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * _UNITS[unit]
    assert parse_size(hex(number)) == number


@given(st.integers(1, 10_000),
       st.sampled_from([("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)]))
def test_durations(number: int, unit: tuple[str, float]) -> None:
    assert parse_duration(f"{number}{unit[0]}") == pytest.approx(number * unit[1])
    assert parse_duration(number) == number


def means(text: str, units: dict[str, int | float], any_case: bool) -> Fraction | None:
    """What a size or duration in the documented form says, exactly; None for a text that is not one. Written anew:
    a number with or without a fraction, blanks, a unit (of a size in any case, but not as bits are written)."""
    match = re.fullmatch(r"([0-9]+)(\.[0-9]+)?\s*([A-Za-z]*)", text.strip())
    if match is None or (any_case and re.fullmatch("[A-Z]b", match[3])):
        return None
    named = {name.lower() if any_case else name: unit for name, unit in units.items()}
    unit = named.get(match[3].lower() if any_case else match[3])
    return None if unit is None else Fraction(match[1] + (match[2] or "")) * Fraction(unit)


#: Close to what is meant, and just beside it.
_NUMBERS = st.sampled_from(["0", "1", "4096", "007", "1.5", ".5", "1e3", "-1", "+1", "", "0x10", "1_000", "inf",
                            "nan"])
_SUFFIXES = st.sampled_from(["", "KiB", "MiB", "GiB", "pages", "kib", "MB", "mb", "KB", "Mb", "M", "us", "ms", "s", "m",
                             "h", "min", "S", "pages s"])


@given(number=_NUMBERS, blank=st.sampled_from(["", " ", "  ", "\t", "-"]), unit=_SUFFIXES)
def test_a_size_or_duration_is_understood_or_refused(number: str, blank: str, unit: str) -> None:
    text = number + blank + unit
    for parse, units, size in ((parse_size, _UNITS, True), (parse_duration, _TIMES, False)):
        wanted = means(text, units, size)
        if size and number == "0x10":
            wanted = Fraction(16) if not unit and not blank.strip() else None
        if size and wanted is not None and wanted.denominator != 1:
            wanted = None       # there are no parts of bytes
        if not size and wanted == 0:
            wanted = None       # a wait of no time is not meant
        if wanted is None:
            with pytest.raises(ValueError):     # noqa: PT011  (the texts are those of test_cli.py)
                parse(text)
        else:
            assert parse(text) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize(("text", "wanted"), [
    ("100MB/s", 100e6), ("100 mb", 100e6), ("64MiB/s", 64 << 20), ("1.5GiB/s", 1.5 * (1 << 30)), ("10Gbit/s", 1.25e9),
    ("1kbit", 125), ("8bit/s", 1), ("500 pages/s", 500 * 4096), ("7", 7), (7, 7), (0.5, 0.5)])
def test_rates(text: object, wanted: float) -> None:
    assert parse_rate(text) == wanted


@pytest.mark.parametrize("text", ["100Mb/s", "1Gb", "100M", "MB/s", "0", "-1MB/s", "1e3", "1/s MB", "100MB/ s", True])
def test_what_is_not_a_rate_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate(text)


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
    ("[{size: 4MiB}, {slot: 0, gpa: 1GiB, size: 4MiB}]", "duplicate slot id 0"),
    ("[{size: 4MiB, gpa: 4095}]", "multiple of 4096"),
    ("[{slot: 500, size: 4MiB}]", "500"),
    ("[]", "memory"),
])
def test_slots_that_cannot_be(tmp_path: Path, slots: str, said: str) -> None:
    path = write(tmp_path / "m.yaml", f"memory: {slots}\nguest: {{workload: hello}}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:1:\d+: memory") as caught:
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


# --- text from anywhere -------------------------------------------------------------------------------------------

GOOD = "memory: [{size: 4MiB}]\nguest: {workload: hello}\n"

#: What the parts of a hostile file may look like.
_words = st.sampled_from([
    "memory", "size", "4MiB", "guest", "workload", "hello", "params", "vcpus", "2", "yes", "~", "<<", "*a", "&a ",
    "*b", "&b [*a, *a]", "!!int ", "!!float", "!!bool x", "!!timestamp 1", "!!binary x", "!!set ",
    "!!python/tuple ", "2001-13-45", "1:2:3:4:5:6:7:8:9:1:1:1:1:1:1:1:1", ".inf", ".nan", "0x" + "f" * 5000,
    "9" * 5000, '"\\uD800"', '"\\Uffffffff"', '"a\\0b"', '"a\\nb"', "\u2028", "%YAML 1.1\n---\n", "---\n", "? ",
    "'", '"', "|\n", "[" * 40, "{" * 40, "²", "\x00"])
_glue = st.sampled_from([": ", "\n", "\n  ", "- ", ", ", " ", "[", "]", "{", "}", ""])
hostile = st.lists(st.one_of(_words, _glue, st.text(max_size=4)), max_size=25).map("".join)


def refused(error: ConfigError, begins: str | tuple[str, ...]) -> None:
    """One line a problem, each saying where; nothing in it that would move a terminal's cursor."""
    lines = str(error).split("\n")
    assert all(line.startswith(begins) and line.isprintable() and len(line) < 1000 for line in lines), lines


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(hostile, hostile.map(lambda t: GOOD + t)))
def test_any_text_is_a_configuration_or_a_line_about_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert load_config(path).vcpus >= 1
    except ConfigError as exc:
        refused(exc, f"{path}")
    assert os.listdir(tmp_path) == ["m.yaml"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.lists(st.one_of(st.sampled_from(["memory", "0", "²", "1_0", "size", "guest", "params", ""]),
                              st.text(max_size=3)), max_size=60).map(".".join),
       value=st.one_of(st.none(), hostile))
def test_any_override_is_taken_or_a_line_about_it(tmp_path: Path, key: str, value: str | None) -> None:
    path = write(tmp_path / "m.yaml", GOOD)
    try:
        load_config(path, [key if value is None else f"{key}={value}"])
    except ConfigError as exc:
        refused(exc, ("--set ", f"{path}:"))    # the latter of a check over several keys


@pytest.mark.parametrize(("text", "said"), [
    ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)),
     "m.yaml:1: more than 65,536 values"),
    ("a: &a {<<: *a}\n", "m.yaml:1: a: nested deeper than 32 levels"),
    ("[" * 200_000, "m.yaml:1: invalid YAML: nested deeper"),
    (GOOD + "#" * FILE_MAX, "m.yaml: is too large"),
    (GOOD + "timeout: !!int abc\n", "m.yaml:3: timeout: not a valid int: 'abc'"),
    (GOOD + "timeout: 2001-13-45\n", "m.yaml:3: timeout: '2001-13-45' is not a duration"),
    (GOOD + "timeout: !!set {a}\n", "m.yaml:3: timeout: unknown tag '!!set'"),
    (GOOD + f"vcpus: {'9' * 5000}\n", "m.yaml:3: vcpus: not a valid int"),
    (GOOD + f"vcpus: 0x{'f' * 5000}\n", "m.yaml:3: vcpus: the number is too large"),
    (GOOD + "vcpus: yes\n", "m.yaml:3: vcpus: input should be a valid integer (got True)"),
    (GOOD + "timeout: no\n", "m.yaml:3: timeout: False is not a duration"),
    (GOOD + "reapers: on\n", "m.yaml:3: reapers: input should be a valid integer (got True)"),
    (GOOD + '"a\\nb": 1\n', "m.yaml:3: a\\nb: unknown key"),
    (GOOD + "vcpus: 2\nx: \xff\n", "m.yaml:4: not UTF-8 text"),
    ('memory: [{size: 4MiB}]\nguest: {image: "a\\0b"}\n', "m.yaml:2: guest.image: not a valid file name"),
    ('memory: [{size: 4MiB}]\nreplay: {trace: ""}\n', "m.yaml:2: replay.trace: not a valid file name"),
    ("memory: [{size: 64M}]\nguest: {workload: hello}\n", "(did you mean 64MiB or 64MB?)"),
    (GOOD + "dirty_limit: 100Mb/s\n", "(did you mean 100MB/s or 100Mbit/s?)"),
    ("memory: [{size: ٤ MiB}]\nguest: {workload: hello}\n", "'٤ MiB' is not a size"),
])
def test_what_a_text_may_not_make_of_itself(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(text.encode("latin-1") if "\xff" in text else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    refused(caught.value, f"{path}")
    assert said in re.sub(r"(yaml:\d+):\d+: ", r"\1: ", str(caught.value))     # but for the column


@pytest.mark.parametrize(("override", "said"), [
    ("memory.²=1", "memory has no item ²"),
    (".".join("a" * 5000) + "=1", "nested deeper than 32 levels"),
    ("vcpus=!!int abc", "not a valid int: 'abc'"),
    ("vcpus=" + "9" * 5000, "not a valid int"),
    ("vcpus=" + "[" * 5000, "invalid YAML: nested deeper"),
    ("vcpus=" + "1" * FILE_MAX + "1", "is too long"),
])
def test_overrides_that_cannot_be(tmp_path: Path, override: str, said: str) -> None:
    path = write(tmp_path / "m.yaml", GOOD)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    refused(caught.value, "--set ")
    assert said in str(caught.value)


def test_a_key_that_is_no_word_stays_within_its_line(tmp_path: Path) -> None:
    """Also when it is found by what makes a machine of the configuration."""
    path = write(tmp_path / "c.yaml", 'memory: [{size: 1MiB}]\nguest: {workload: stamp, params: {"\\x1b[2J": 1}}\n')
    with pytest.raises(VmmError) as raised:
        plan(load_config(path))
    assert str(raised.value).isprintable()
    assert "2:35: guest.params.\\x1b[2J: workload stamp has no parameter" in str(raised.value)


def test_merge_keys_give_what_a_mapping_does_not_say_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "m.yaml", "memory:\n  - &m {size: 4MiB, log: false}\n  - {<<: *m, gpa: 1GiB}\n"
                                      "  - {<<: [{log: true}, *m], gpa: 2GiB, size: 8MiB}\n"
                                      "guest: {workload: hello}\n")
    assert [(m.gpa, m.size, m.log) for m in load_config(path).memory] == [
        (0, 4 << 20, False), (1 << 30, 4 << 20, False), (2 << 30, 8 << 20, True)]


# --- what is no file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/tty", "/proc/self/mem", "fifo", ".", "a\0b", "\udfff",
                                  "x" * 5000])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    refused(caught.value, "")


def test_a_pipe_that_this_process_was_given_is_read(tmp_path: Path) -> None:
    read, written = os.pipe()
    os.write(written, GOOD.encode() + b"vcpsu: 1\n")
    os.close(written)
    with pytest.raises(ConfigError, match=rf"/dev/fd/{read}:3:1: vcpsu: unknown key"):
        load_config(f"/dev/fd/{read}")
    os.close(read)
