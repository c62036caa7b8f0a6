"""A signal that ends a command is heard wherever it comes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from vmm.cli.run import Interrupted
from vmm.cli.signals import raise_on


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_it_raises_where_the_main_thread_is() -> None:
    raise_on(signal.SIGTERM, Interrupted)
    with pytest.raises(Interrupted) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.signum == signal.SIGTERM


def test_in_a_destructor_whose_exceptions_nobody_hears_it_comes_once_more() -> None:
    class Gone:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    raise_on(signal.SIGTERM, Interrupted)
    with pytest.raises(Interrupted):
        gone_and_waited([Gone()])


def gone_and_waited(some: list[object]) -> None:
    some.clear()
    threading.Event().wait(20)
