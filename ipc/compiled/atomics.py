"""Atomic loads and stores on raw addresses, for Numba.

Numba has no atomics for the CPU; these intrinsics emit LLVM's. A ring is read by one process while
another one, or the kernel, writes it, so plain loads would be wrong in two ways: the compiler may
hoist them out of a loop, and a weakly-ordered CPU may see the flag before the entry. On x86-64 an
acquire load and a release store are plain ``mov``; the cost is only the compiler's lost freedom.

Addresses are int64 values (``Segment.address`` plus an offset); the caller answers for bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "cast_to",
    "cmpxchg_u8",
    "cmpxchg_u16",
    "cmpxchg_u32",
    "cmpxchg_u64",
    "cmpxchg_u128",
    "fence",
    "fence_release",
    "fetch_or_u64",
    "load_acquire_u32",
    "load_acquire_u64",
    "load_u8",
    "load_u32",
    "load_u64",
    "load_word",
    "popcount",
    "store_release_u32",
    "store_release_u64",
    "store_u8",
    "store_u64",
    "store_word",
    "swap_u64",
]

_U8 = ir.IntType(8)
_U16 = ir.IntType(16)
_U32 = ir.IntType(32)
_U64 = ir.IntType(64)


def _pointer(builder: Any, address: Any, width: ir.IntType) -> Any:
    return builder.inttoptr(address, width.as_pointer())


def cast_to(pointer_type: Any) -> Any:
    """A function that makes such a pointer of an address (which ``carray`` then reads)."""

    def cast(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return pointer_type(types.int64), codegen

    return intrinsic(cast)


@intrinsic
def load_acquire_u32(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _U32), "acquire", 4)

    return types.uint32(types.int64), codegen


@intrinsic
def load_acquire_u64(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _U64), "acquire", 8)

    return types.uint64(types.int64), codegen


@intrinsic
def store_release_u32(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], _U32), "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), codegen


@intrinsic
def store_release_u64(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], _U64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), codegen


@intrinsic
def load_u32(typingctx: Any, address: Any) -> Any:
    """Plain load."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _U32))

    return types.uint32(types.int64), codegen


@intrinsic
def load_u64(typingctx: Any, address: Any) -> Any:
    """Plain load."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _U64))

    return types.uint64(types.int64), codegen


@intrinsic
def store_u64(typingctx: Any, address: Any, value: Any) -> Any:
    """Plain store."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _U64))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), codegen


@intrinsic
def load_word(typingctx: Any, base: Any, index: Any) -> Any:
    """Plain load of the u64 number ``index`` from ``base``. (Unlike an address that was added up, LLVM knows what
    a loop over these does, and makes vector instructions of it.)"""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.gep(_pointer(builder, args[0], _U64), [args[1]]))

    return types.uint64(types.int64, types.int64), codegen


@intrinsic
def store_word(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
    """Plain store of the u64 number ``index`` from ``base``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(_pointer(builder, args[0], _U64), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), codegen


@intrinsic
def fetch_or_u64(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("or", _pointer(builder, args[0], _U64), args[1], "seq_cst")

    return types.uint64(types.int64, types.uint64), codegen


@intrinsic
def swap_u64(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], _U64), args[1], "seq_cst")

    return types.uint64(types.int64, types.uint64), codegen


@intrinsic
def load_u8(typingctx: Any, address: Any) -> Any:
    """Plain load."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _U8))

    return types.uint8(types.int64), codegen


@intrinsic
def store_u8(typingctx: Any, address: Any, value: Any) -> Any:
    """Plain store."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _U8))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint8), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """A full barrier (x86 ``mfence``)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _make_cmpxchg(width: ir.IntType, value_type: Any) -> Any:
    def cmpxchg(typingctx: Any, address: Any, expected: Any, new: Any) -> Any:
        """Compare and exchange, sequentially consistent; what was there before."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pair = builder.cmpxchg(_pointer(builder, args[0], width), args[1], args[2], "seq_cst", "seq_cst")
            return builder.extract_value(pair, 0)

        return value_type(types.int64, value_type, value_type), codegen

    return intrinsic(cmpxchg)


cmpxchg_u8 = _make_cmpxchg(_U8, types.uint8)
cmpxchg_u16 = _make_cmpxchg(_U16, types.uint16)
cmpxchg_u32 = _make_cmpxchg(_U32, types.uint32)
cmpxchg_u64 = _make_cmpxchg(_U64, types.uint64)


@intrinsic
def cmpxchg_u128(typingctx: Any, address: Any, expected: Any, new: Any) -> Any:
    """The 16-byte one. ``expected`` and ``new`` are addresses of 16 bytes; what was there before is
    written to ``expected``. Returns 1 when the exchange was made, else 0."""
    width = ir.IntType(128)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wanted = _pointer(builder, args[1], width)
        pair = builder.cmpxchg(_pointer(builder, args[0], width), builder.load(wanted, align=1),
                               builder.load(_pointer(builder, args[2], width), align=1), "seq_cst", "seq_cst")
        builder.store(builder.extract_value(pair, 0), wanted, align=1)
        return builder.zext(builder.extract_value(pair, 1), ir.IntType(8))

    return types.uint8(types.int64, types.int64, types.int64), codegen


@intrinsic
def popcount(typingctx: Any, value: Any) -> Any:
    """Number of set bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def fence_release(typingctx: Any) -> Any:
    """Stores before it are seen before those after it (x86: for the compiler alone)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), codegen
