"""Numbers against the host's headers, and functions of calls."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from workers.linux import abi
from workers.linux.calls import SERVED

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def test_numbers_of_system_calls() -> None:
    if not HEADER.exists():
        pytest.skip("no kernel headers (linux-libc-dev)")
    there = {int(number): name for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}
    common = there.keys() & abi.CALLS.keys()
    assert len(common) > 350
    assert {number: abi.CALLS[number] for number in common} == {number: there[number] for number in common}
    assert abi.number_of("futex") == 202


def test_every_call_takes_what_the_registers_have() -> None:
    for function in SERVED.values():
        inspect.signature(function).bind("system", "thread", *range(6))
