"""The port devices of the guest contract: console, exit, hypercall, fault report.

=======  =====  ==========================================================================
port     width  meaning
=======  =====  ==========================================================================
0x3f8    1      console: a byte written is a character
0x3fd    1      console status: reads 0x20 (transmitter empty)
0xf4     1,2,4  exit this vCPU with the code written
0xf8     4      hypercall: EAX = 0 yield; 1 wait while the u32 at GPA RDI equals ESI;
                2 wake at most ESI vCPUs that wait on the u32 at GPA RDI; 3 sleep RDI
                microseconds. EAX afterwards: 0, or for wake the number woken. A wait may end
                without a cause (the state of a waiting vCPU is saved as woken)
0xf0     1      fault report, written by the machine's own exception stubs (vmm/machine/boot.py).
                At RSP, eight bytes each: vector, error code (0 where the CPU has none),
                RIP, CS, RFLAGS, RSP, SS; all other registers are as at the fault
=======  =====  ==========================================================================

Every other port ends the vCPU with ExitReason.UNKNOWN_PORT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

__all__ = ["PORT_CONSOLE", "PORT_CONSOLE_STATUS", "PORT_EXIT", "PORT_FAULT", "PORT_HYPERCALL", "PortBus",
           "PortEvent", "PortEventKind", "UnknownPort"]

PORT_CONSOLE = 0x3F8
PORT_CONSOLE_STATUS = 0x3FD
PORT_EXIT = 0xF4
PORT_FAULT = 0xF0
PORT_HYPERCALL = 0xF8

_FLUSH_BYTES = 1024


class UnknownPort(Exception):
    """The guest used a port that there is not: the end of its vCPU."""

    def __init__(self, port: int, size: int, *, write: bool) -> None:
        super().__init__(f"{'write to' if write else 'read from'} unknown port {port:#x} ({size} bytes)")


class PortEventKind(Enum):
    """What a port access asks the run loop for."""

    EXIT = "exit"
    HYPERCALL = "hypercall"   # the accelerator's registers say which (EAX, RDI, ESI)
    FAULT = "fault"


@dataclass(slots=True)
class PortEvent:
    """A port write that the run loop must act on, out of the guest."""

    kind: PortEventKind
    value: int


class PortBus:
    """Port devices of one vCPU. ``console`` is called with whole lines, or what has gathered when
    ``flush`` is called."""

    def __init__(self, console: Callable[[bytes], None]) -> None:
        self._console = console
        self._line = bytearray()

    def write(self, port: int, size: int, value: int) -> PortEvent | None:
        """Raises UnknownPort."""
        if port == PORT_CONSOLE:
            self._line += value.to_bytes(size, "little")
            if value == 0x0A or len(self._line) >= _FLUSH_BYTES:
                self.flush()
            return None
        if port == PORT_EXIT:
            return PortEvent(PortEventKind.EXIT, value)
        if port == PORT_HYPERCALL:
            return PortEvent(PortEventKind.HYPERCALL, value)
        if port == PORT_FAULT:
            return PortEvent(PortEventKind.FAULT, value)
        raise UnknownPort(port, size, write=True)

    def read(self, port: int, size: int) -> int:
        """Raises UnknownPort."""
        if port == PORT_CONSOLE_STATUS:
            return 0x20
        if port == PORT_CONSOLE:
            return 0
        raise UnknownPort(port, size, write=False)

    def say(self, data: bytes) -> None:
        """To the console, as it is."""
        self._console(data)

    def flush(self) -> None:
        if self._line:
            self._console(bytes(self._line))
            self._line.clear()
