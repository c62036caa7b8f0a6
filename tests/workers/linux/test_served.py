"""docs/linux.md lists what is served: all of it, and no more."""

from __future__ import annotations

import re

from places import TOP

from workers.linux.abi import CALLS
from workers.linux.calls import SERVED


def test_the_list_is_what_there_is() -> None:
    text = (TOP / "docs" / "linux.md").read_text()
    table = text.partition("| about | calls |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(CALLS[number] for number in SERVED)
