"""Where an error in a configuration is said to be: line, column and key, of a file or of an option; and the line that
is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command import vmm_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.client.config import ConfigError, load_config, load_configs
from vmm.client.plan import plan

GOOD = "memory: [{size: 4MiB}]\nguest: {workload: hello}\n"


def problems(path: Path, text: str, *overrides: str) -> list[tuple[str, str]]:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        [plan(each) for each in load_configs(path, overrides)]
    return [tuple(each) for each in caught.value.problems]      # type: ignore[misc]


def marked(excerpt: str) -> str:
    """The word of the line that the mark is below."""
    line, mark = excerpt.split("\n")
    word = re.match(r"[\w<>*-]+", line[mark.index("^"):])
    assert word is not None, excerpt
    return word[0]


@pytest.mark.parametrize(("text", "where", "word"), [
    (GOOD + "vcpsu: 2\n", "3:1: vcpsu: unknown key", "vcpsu"),
    (GOOD + "reaper: {mode: fixed, interval: soon}\n", "3:23: reaper.interval: 'soon'", "interval"),
    ("guest: {workload: hello}\nmemory:\n  - size: 4MiB\n  - {gpa: 1, size: 4KiB}\n", "4:6: memory.1.gpa:", "gpa"),
    ("guest: {workload: hello}\nmemory:\n- size: 4MiB\n- gpa: 0\n  size: 4KiB\n", "4:3: memory.1: [0x0", "gpa"),
    (GOOD + "\tvcpus: 2\n", "3:1: invalid YAML", ""),
    (GOOD + "timeout: 1s\ntimeout: 2s\n", "4:1: timeout: given twice", "timeout"),
    (GOOD + "verify: {inject: !!set {a}}\n", "3:18: verify.inject: unknown tag", ""),
    ("memory: [{size: 4MiB}]\nguest: {workload: helo}\n", "2:9: guest.workload: unknown workload", "workload"),
    ("guest: {workload: hello}\nmemory: &m [&s {size: 4MiB}, *s]\n", "2:30: memory.1: [0x0", "*s"),
    ("guest: {workload: hello}\nmemory:\n- &s {size: 4MiB}\n- {<<: *s, log: yes}\n", "4:3: memory.1: [0x0", ""),
])
def test_line_column_key_and_the_line_itself(tmp_path: Path, text: str, where: str, word: str) -> None:
    (said, excerpt), = problems(path := tmp_path / "m.yaml", text)
    assert said.startswith(f"{path}:{where}"), said
    number = int(where.partition(":")[0])
    assert excerpt.split("\n")[0].strip() == f"{number} | {text.splitlines()[number - 1].replace(chr(9), ' ').rstrip()}"
    if word:
        assert marked(excerpt) == word.lstrip("*") or word.startswith("*")


def test_an_option_is_named_instead_of_the_file(tmp_path: Path) -> None:
    assert problems(tmp_path / "m.yaml", GOOD, "vcpus=two") == [
        ("--set vcpus=two: vcpus: input should be a valid integer (got 'two')", "")]
    # Also where the value is a part of what was given, and where a later check finds it.
    (said, _), = problems(tmp_path / "m.yaml", GOOD, "reaper={interval: 1s, mode: fxed}")
    assert said.startswith("--set reaper={interval: 1s, mode: fxed}: reaper.mode: ")
    (said, _), = problems(tmp_path / "m.yaml", GOOD, "memory.0.size=1TiB")
    assert re.search(r":1:10: memory.0: .* overlaps the system area .* \(with --set memory.0.size=1TiB\)$", said), said
    (said, _), = problems(tmp_path / "m.yaml", GOOD, "guest.params.line=3")
    assert said.startswith("--set guest.params.line=3: guest.params.line: ")


def test_a_number_that_yaml_takes_for_a_text_is_one_problem(tmp_path: Path) -> None:
    found = problems(tmp_path / "m.yaml", GOOD, "guest.params.lines=1e3")
    assert all("valid list" not in said for said, _ in found), found
    assert any("'1e3'" in said for said, _ in found)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.text(st.characters(codec="utf-8", exclude_characters="'\n\r\x85\u2028\u2029"), max_size=150))
def test_the_mark_is_below_the_key_whatever_is_before_it(tmp_path: Path, before: str) -> None:
    """Wide characters take two columns, those that cannot be shown one; a long line is shown in part."""
    text = f"x-a: '{before}'\n{GOOD}x-b: {{'{before}': 1, <<: 2}}\n"
    (tmp_path / "m.yaml").write_bytes(text.encode())
    try:
        load_config(tmp_path / "m.yaml")
    except ConfigError as exc:
        (said, excerpt), = exc.problems
        lines = excerpt.split("\n")
        assert len(lines) in (0, 1, 2)
        assert all(line.isprintable() for line in lines)
        assert len(lines[0]) <= 8 + 101
        if "must be a mapping" in said:
            assert lines[0][:lines[0].index("|")].strip() == "4"


def test_the_command_line_shows_the_line(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(GOOD + "vcpsu: 2\nreaper: {mde: fixed}\n")
    done = vmm_here("launch", str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"vmm: error: {path}:3:1: vcpsu: unknown key (did you mean 'vcpus'?)", "    3 | vcpsu: 2", "      | ^",
        f"vmm: error: {path}:4:10: reaper.mde: unknown key (did you mean 'mode'?)", "    4 | reaper: {mde: fixed}",
        "      |          ^"]
