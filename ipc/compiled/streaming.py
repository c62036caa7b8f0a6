"""Memory that no cache can hold, for Numba: fetched early, and written past the caches.

A line (64 bytes) that is written as a whole need not be read first; where it is not used again soon, that saves a
quarter of what a copy moves. Such stores become visible later than others that follow them: a fence
(``atomics.fence``) comes before anybody is told.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["prefetch", "stream_line"]

_I32 = ir.IntType(32)
_BYTE = ir.IntType(8).as_pointer()
_LINE = ir.VectorType(ir.IntType(64), 8).as_pointer()


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """This will be read soon. Any address will do."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        call = builder.module.declare_intrinsic("llvm.prefetch", (_BYTE,), kind)
        builder.call(call, [builder.inttoptr(args[0], _BYTE), _I32(0), _I32(3), _I32(1)])   # read, keep, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def stream_line(typingctx: Any, source: Any, target: Any) -> Any:
    """Copy a line, both aligned to 64 bytes, past the caches."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        line = builder.load(builder.inttoptr(args[0], _LINE), align=64)
        store = builder.store(line, builder.inttoptr(args[1], _LINE), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
