"""Atomic loads and stores on raw addresses, for Numba kernels.

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

__all__ = ["fetch_or_u64", "load_acquire_u32", "load_u32", "load_u64", "store_release_u32",
           "store_release_u64", "store_u64", "swap_u64"]

_U32 = ir.IntType(32)
_U64 = ir.IntType(64)


def _pointer(builder: Any, address: Any, width: ir.IntType) -> Any:
    return builder.inttoptr(address, width.as_pointer())


@intrinsic
def load_acquire_u32(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _U32), "acquire", 4)

    return types.uint32(types.int64), codegen


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
def fetch_or_u64(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("or", _pointer(builder, args[0], _U64), args[1], "seq_cst")

    return types.uint64(types.int64, types.uint64), codegen


@intrinsic
def swap_u64(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], _U64), args[1], "seq_cst")

    return types.uint64(types.int64, types.uint64), codegen
