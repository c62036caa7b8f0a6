"""Numbers against the host's headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workers.linux import abi

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def test_numbers_of_system_calls() -> None:
    if not HEADER.exists():
        pytest.skip("no kernel headers (linux-libc-dev)")
    there = {int(number): name for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}
    common = there.keys() & abi.CALLS.keys()
    assert len(common) > 350
    assert {number: abi.CALLS[number] for number in common} == {number: there[number] for number in common}
    assert abi.number_of("futex") == 202
