"""What a terminal is set to: struct termios, as the kernel has it (uapi/asm-generic/termbits.h)."""

from __future__ import annotations

import struct
import termios
from dataclasses import dataclass, replace

__all__ = ["IUTF8", "Settings"]

IUTF8 = 0x4000

#: Of the kernel's structures; that of the C library has more control characters.
_TERMIOS, _TERMIOS2 = struct.Struct("<4IB19s"), struct.Struct("<4IB19sII")
_CHARACTERS = 19        # NCCS

_RATES = (0, 50, 75, 110, 134, 150, 200, 300, 600, 1200, 1800, 2400, 4800, 9600, 19200, 38400)
_MORE_RATES = (57600, 115200, 230400, 460800, 500000, 576000, 921600, 1000000, 1152000, 1500000, 2000000, 2500000,
               3000000, 3500000, 4000000)
#: {bits of c_cflag: bits per second}
_RATE_OF = dict(enumerate(_RATES)) | dict(enumerate(_MORE_RATES, 0x1001))
_RATE_BITS, _OTHER, _INPUT_SHIFT = 0x100F, 0x1000, 16       # CBAUD, BOTHER, IBSHIFT

_USUAL = b"\x03\x1c\x7f\x15\x04\0\x01\0\x11\x13\x1a\0\x12\x0f\x17\x16\0"


@dataclass(frozen=True, slots=True)
class Settings:
    """As a terminal has them that nobody has set."""

    iflag: int = termios.ICRNL | termios.IXON
    oflag: int = termios.OPOST | termios.ONLCR
    cflag: int = termios.B38400 | termios.CS8 | termios.CREAD
    lflag: int = (termios.ISIG | termios.ICANON | termios.ECHO | termios.ECHOE | termios.ECHOK | termios.ECHOCTL
                  | termios.ECHOKE | termios.IEXTEN)
    line: int = 0
    characters: bytes = _USUAL.ljust(_CHARACTERS, b"\0")
    ispeed: int = 38400
    ospeed: int = 38400

    #: Bytes of struct termios, and of struct termios2.
    SIZE, SIZE2 = _TERMIOS.size, _TERMIOS2.size

    def pack(self) -> bytes:
        """struct termios."""
        return _TERMIOS.pack(self.iflag, self.oflag, self.cflag, self.lflag, self.line, self.characters)

    def pack2(self) -> bytes:
        """struct termios2."""
        return self.pack() + struct.pack("<II", self.ispeed, self.ospeed)

    def changed(self, data: bytes) -> Settings:
        """As either structure says. A terminal without a line of its own has 8 bits and no parity."""
        speeds = (self.ispeed, self.ospeed)
        if len(data) == self.SIZE2:
            *fields, ispeed, ospeed = _TERMIOS2.unpack(data)
            speeds = ispeed, ospeed
        else:
            fields = list(_TERMIOS.unpack(data))
        iflag, oflag, cflag, lflag, line, characters = fields
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8 | termios.CREAD
        out = _rate(cflag, speeds[1])
        bits = cflag >> _INPUT_SHIFT & _RATE_BITS
        return replace(self, iflag=iflag, oflag=oflag, cflag=cflag, lflag=lflag, line=line, characters=characters,
                       ispeed=_rate(bits, speeds[0]) if bits else out, ospeed=out)


def _rate(bits: int, other: int) -> int:
    bits &= _RATE_BITS
    return other if bits == _OTHER else _RATE_OF.get(bits, 0)
