"""What the hooks have of C: pointers to their structures (context.py), and libunicorn's functions. Imported to
compile only."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.extending import intrinsic

from ipc.compiled.atomics import cast_to, load_u64, store_u64

from .context import CONTEXT, LOCKED, SEEN, SLOT, TRANSLATION

__all__ = ["CONTEXT_POINTER", "LOCKED_POINTER", "NEW_AT", "WANTED_AT", "address_of", "call_stop", "context_at",
           "get_register", "locked_at", "seen_at", "set_register", "slots_at",
           "translation_at"]

_i64, _u64 = types.int64, types.uint64
CONTEXT_POINTER = types.CPointer(from_dtype(CONTEXT))
LOCKED_POINTER = types.CPointer(from_dtype(LOCKED))
_ZERO = np.uint64(0)
_FIELDS: Any = CONTEXT.fields
_EXCHANGE_AT, WANTED_AT, NEW_AT = (int(_FIELDS[n][1]) for n in ("exchange", "wanted", "new"))

context_at = cast_to(CONTEXT_POINTER)
locked_at = cast_to(LOCKED_POINTER)
slots_at = cast_to(types.CPointer(from_dtype(SLOT)))
seen_at = cast_to(types.CPointer(from_dtype(SEEN)))
translation_at = cast_to(types.CPointer(from_dtype(TRANSLATION)))


@intrinsic
def address_of(typingctx: Any, pointer: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(pointer), codegen


def _call(builder: Any, function: Any, *args: Any) -> Any:
    kind = ir.FunctionType(ir.IntType(32), [a.type for a in args])
    return builder.call(builder.inttoptr(function, kind.as_pointer()), args)


@intrinsic
def call_stop(typingctx: Any, function: Any, engine: Any) -> Any:
    """``uc_emu_stop(engine)``"""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, *args)

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def call_register(typingctx: Any, function: Any, engine: Any, register: Any, address: Any) -> Any:
    """``uc_reg_read`` or ``uc_reg_write(engine, register, address)``"""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function, engine, register, address = args
        return _call(builder, function, engine, builder.trunc(register, ir.IntType(32)), address)

    return types.int32(types.int64, types.int64, types.int64, types.int64), codegen


@njit(_u64(CONTEXT_POINTER, _i64, _i64))
def get_register(context, engine, register):  # type: ignore[no-untyped-def]
    """A register's value, zero-extended."""
    c = carray(context, 1)[0]
    c.exchange = _ZERO
    call_register(c.reg_read, engine, register, address_of(context) + _EXCHANGE_AT)
    return load_u64(address_of(context) + _EXCHANGE_AT)


@njit(types.void(CONTEXT_POINTER, _i64, _i64, _u64))
def set_register(context, engine, register, value):  # type: ignore[no-untyped-def]
    """Writes as many of the low bytes as the register has."""
    c = carray(context, 1)[0]
    store_u64(address_of(context) + _EXCHANGE_AT, value)
    call_register(c.reg_write, engine, register, address_of(context) + _EXCHANGE_AT)
