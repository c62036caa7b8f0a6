"""What a migration's two ends say to each other: MessagePack over ZeroMQ DEALER -> ROUTER.

One control connection and several for pages; the target answers on the control connection alone. A round of
pages ends with a barrier: the target acknowledges when it has every message of the round, so that a page of
the next round cannot be overtaken by an older copy.

The bytes of pages are a second frame of their message, so that they need not be copied into it: ZeroMQ sends them
from guest memory itself where they lie there one after the other. A page that the guest writes meanwhile arrives
half old, half new; it is dirty then, and comes again.

The target trusts nothing: a message is decoded into one of these types or refused, and what it names is
checked against the machine that was offered before a byte is written.
"""

from __future__ import annotations

from typing import Any, Literal

import lz4.block
import msgspec
import numpy as np
import zmq
import zmq.auth
import zstandard
from numpy.typing import NDArray

from .errors import VmmError
from .spec import MachineSpec

__all__ = ["CHUNK_PAGES", "POSTCOPY", "Abort", "Accept", "Buffer", "Commit", "Complete", "Encoding", "Missing",
           "Offer", "Packer", "Pages", "Ping", "Prepared", "Received", "Recover", "Refused", "RoundAck", "RoundEnd",
           "Running", "State", "Want", "WireError", "check_address", "decode_answer", "decode_message", "encode",
           "missing", "missing_pages", "page_numbers", "secure", "unpack", "want"]

VERSION = 2
POSTCOPY = 1 << 30          # round number of pages that are sent after Commit
PAGE = 4096
CHUNK_PAGES = 256           # pages of a message at most: 1 MiB
IMAGE_MAX = 1 << 30         # bytes

Encoding = Literal["none", "zstd", "lz4"]
Buffer = bytes | memoryview


class WireError(VmmError):
    """The other end sent something that it must not, or is not there."""


class Wire(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    pass


# --- source to target ------------------------------------------------------------------------------------


class Offer(Wire, frozen=True, tag="offer"):
    """The machine that is to come. Its memory slots are as they are, its image is for snapshots later on."""

    version: int
    program: str
    spec: MachineSpec
    image: bytes


class Pages(Wire, frozen=True, tag="pages"):
    """Pages of a slot: their numbers (uint32, little endian, ascending). In a second frame their bytes one after
    the other, encoded; none for pages that are zero. All pages are zero at first."""

    round: int
    slot: int
    numbers: bytes
    encoding: Literal["zero", "none", "zstd", "lz4"]


class RoundEnd(Wire, frozen=True, tag="round-end"):
    """``messages`` of Pages were sent in this round."""

    round: int
    messages: int


class Missing(Wire, frozen=True, tag="missing"):
    """Post-copy, before State: pages of this slot that were not sent, or have changed since (``bits``, one a page
    from the lowest, zstd). They follow after Commit, as Pages of round POSTCOPY. And the target's answer to
    Recover: what is missing still."""

    slot: int
    bits: bytes


class Recover(Wire, frozen=True, tag="recover"):
    """Post-copy: the source that was here before has gone; this one has the memory too."""

    version: int
    machine: str


class State(Wire, frozen=True, tag="state"):
    """The system slot's memory (zstd), and the vCPUs' states (workers/accel.py)."""

    system: bytes
    vcpus: list[dict[str, Any]]


class Commit(Wire, frozen=True, tag="commit"):
    """The source will never run this machine again: the target starts it. May be repeated."""


class Abort(Wire, frozen=True, tag="abort"):
    reason: str


class Ping(Wire, frozen=True, tag="ping"):
    """The source is alive."""


# --- target to source ---------------------------------------------------------------------------------------


class Received(Wire, frozen=True, tag="received"):
    """The offer has come; making the machine may take a while."""


class Accept(Wire, frozen=True, tag="accept"):
    """The machine's memory is there, its vCPUs stand before their first instruction."""


class RoundAck(Wire, frozen=True, tag="round-ack"):
    round: int


class Prepared(Wire, frozen=True, tag="prepared"):
    """Everything is in its place; waits for Commit as long as it takes."""


class Running(Wire, frozen=True, tag="running"):
    pass


class Want(Wire, frozen=True, tag="want"):
    """Post-copy: somebody waits for these pages (as in Pages.numbers)."""

    slot: int
    numbers: bytes


class Complete(Wire, frozen=True, tag="complete"):
    """Post-copy: every page is here; ``blocked``: milliseconds that each vCPU has waited for some."""

    blocked: list[float]


class Refused(Wire, frozen=True, tag="refused"):
    """The target has cleaned up and is gone."""

    error: str


Message = Offer | Pages | RoundEnd | Missing | Recover | State | Commit | Abort | Ping
Answer = Received | Accept | RoundAck | Prepared | Running | Missing | Want | Complete | Refused

_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(Message)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


def decode_message(frame: Buffer) -> Message:
    """Raises WireError."""
    try:
        return _messages.decode(frame)
    except msgspec.MsgspecError as exc:
        raise WireError(f"the source sent what is no message of protocol {VERSION}: {exc}") from None


def decode_answer(frame: bytes) -> Answer:
    """Raises WireError."""
    try:
        return _answers.decode(frame)
    except msgspec.MsgspecError as exc:
        raise WireError(f"the target sent what is no answer of protocol {VERSION}: {exc}") from None


# --- pages ------------------------------------------------------------------------------------------------------


class Packer:
    """Encodes pages. One for each thread."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._zstd = zstandard.ZstdCompressor(level=1)

    def pack(self, round_: int, slot: int, memory: NDArray[np.uint8],
             pages: NDArray[np.int64]) -> list[tuple[Pages, Buffer]]:
        """The messages for these pages (ascending, at most CHUNK_PAGES) of the slot's memory, as it is now; bytes
        may be a view of that memory."""
        memory = memory.reshape(-1, PAGE)
        first, end = int(pages[0]), int(pages[-1]) + 1
        data = memory[first:end] if end - first == len(pages) else memory[pages]
        words = data.view(np.uint64)
        filled = words[:, 0] != 0       # most pages are told by their first word, without reading the rest
        if not filled.all():
            suspects = np.flatnonzero(~filled)
            filled[suspects] = (words if len(suspects) == len(words) else words[suspects]).any(axis=1)
        found: list[tuple[Pages, Buffer]] = []
        if not filled.all():
            found.append((Pages(round_, slot, _numbers(pages[~filled]), "zero"), b""))
        if filled.any():
            raw = (data if filled.all() else data[filled]).reshape(-1)
            packed, encoding = self._encode(raw.data)
            found.append((Pages(round_, slot, _numbers(pages[filled]), encoding), packed))
        return found

    def _encode(self, raw: memoryview) -> tuple[Buffer, Encoding]:
        """What does not get smaller is sent as it is."""
        packed: Buffer = raw
        if self._encoding == "zstd":
            packed = self._zstd.compress(raw)
        elif self._encoding == "lz4":
            packed = lz4.block.compress(raw, store_size=False)
        return (packed, self._encoding) if len(packed) < len(raw) else (raw, "none")


def _numbers(pages: NDArray[np.int64]) -> bytes:
    return pages.astype("<u4").tobytes()


def want(slot: int, pages: list[int]) -> Want:
    return Want(slot, _numbers(np.array(sorted(pages))))


def page_numbers(message: Pages | Want, total: int) -> NDArray[np.int64]:
    """Ascending, of a slot of ``total`` pages. Raises WireError."""
    if len(message.numbers) % 4 or not 0 < len(message.numbers) <= 4 * CHUNK_PAGES:
        raise WireError(f"the other end sent {len(message.numbers)} bytes of page numbers")
    numbers = np.frombuffer(message.numbers, "<u4").astype(np.int64)
    if numbers[-1] >= total or (np.diff(numbers) <= 0).any():
        raise WireError(f"the other end named pages that slot {message.slot} does not have, or not in order")
    return numbers


def missing(slot: int, bits: NDArray[np.bool_]) -> Missing:
    return Missing(slot, zstandard.ZstdCompressor(level=1).compress(np.packbits(bits, bitorder="little").tobytes()))


def missing_pages(message: Missing, total: int) -> NDArray[np.bool_]:
    """bool[total]. Raises WireError."""
    size = -(-total // 8)
    try:
        raw = zstandard.ZstdDecompressor().decompress(message.bits) if _claims(message.bits, size) else b""
    except zstandard.ZstdError as exc:
        raise WireError(f"the other end sent a bitmap that cannot be unpacked: {exc}") from None
    if len(raw) != size:
        raise WireError(f"the other end sent a bitmap that is not slot {message.slot}'s")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=total, bitorder="little").astype(bool)


def unpack(message: Pages, data: Buffer, total: int) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
    """(page numbers, their bytes [n, 4096] or None for zero pages), for a slot of ``total`` pages; the bytes may be
    a view of ``data``. Raises WireError for anything that does not fit."""
    numbers = page_numbers(message, total)
    size = len(numbers) * PAGE
    if message.encoding == "zero":
        if len(data):
            raise WireError("the source sent bytes of zero pages")
        return numbers, None
    raw = data
    try:
        if message.encoding == "zstd":
            # Not the size that the frame claims, which is the sender's word: never more than was announced.
            raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw) if _claims(raw, size) else b""
        elif message.encoding == "lz4":
            raw = lz4.block.decompress(raw, uncompressed_size=size)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError) as exc:
        raise WireError(f"the source sent pages that cannot be unpacked: {exc}") from None
    if len(raw) != size:
        raise WireError(f"the source sent {len(raw)} bytes for {len(numbers)} pages")
    return numbers, np.frombuffer(raw, np.uint8).reshape(-1, PAGE)


def _claims(frame: Buffer, size: int) -> bool:
    """The zstd frame says that it holds exactly ``size`` bytes (the decoder then holds it to that)."""
    return bool(zstandard.frame_content_size(frame) == size)


# --- addresses and keys ------------------------------------------------------------------------------------------


def check_address(address: str, *, keys: bool, insecure: bool) -> None:
    """Raises VmmError for an address that cannot be, or a tcp one without keys that nobody allowed."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not rest or (scheme == "tcp" and ":" not in rest):
        raise VmmError(f"address '{address}': write tcp://HOST:PORT or ipc://PATH")
    if scheme == "tcp" and not keys and not insecure:
        raise VmmError(f"address '{address}': guest memory would travel readable by everybody: give --key and "
                       "--peer (vmm keys makes them), or --insecure")


def secure(sock: zmq.Socket[bytes], key: str, peer: str, *, server: bool) -> None:
    """CURVE with the own secret key file and the other end's public one. Raises VmmError."""
    public, secret = _load_key(key)
    other, _ = _load_key(peer)
    if secret is None:
        raise VmmError(f"{key}: holds no secret key (it is the file that ends in .key_secret)")
    sock.curve_publickey, sock.curve_secretkey = public, secret
    if server:
        sock.curve_server = True    # who may connect is checked by the authenticator (vmm/receive.py)
    else:
        sock.curve_serverkey = other


def _load_key(path: str) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as exc:
        raise VmmError(f"{path}: is no key file: {exc}") from None
