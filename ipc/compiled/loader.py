"""Machine code of compiled loops, kept on disk and loaded without the compiler.

Numba compiles; importing it takes 0.4 s of processor time and 100 MiB, which a coordinator would pay at each
start to run four small functions. So the object code that it makes is kept in a file, and later starts load that
through llvmlite's linker alone (30 ms). The file is made anew when a source it was made from, the LLVM binding or
the processor is another one, and is only read where nobody but this user and root can write.

A source module (``ipc/compiled/loops.py``) is imported only to compile. It has ``EXPORTS``: {name: (function of
Numba's kind, signature)}, with integers for arguments and results: addresses, not arrays. The functions run
without the GIL.
"""

from __future__ import annotations

import ctypes
import importlib
import io
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm

from ..linux.libc import LIBC
from .kept import Function, Kept, find, keep, key_of

__all__ = ["Native"]

_C_TYPES: dict[str, Any] = {"int64": ctypes.c_int64, "uint64": ctypes.c_uint64, "int32": ctypes.c_int32,
                            "uint32": ctypes.c_uint32, "none": None}


class Native:
    """The functions of ``source``; ``sources`` are the modules whose text went into them. Attributes are ctypes
    functions. Keep the object as long as they are called."""

    def __init__(self, source: str, *sources: str) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        key = key_of(source, *sources)
        self._engines: list[Any] = []
        kept = find(source, key)
        if kept is None:
            compiled = _compile(source)
            functions = _object_code(compiled)
            if functions is None:       # another Numba than is known here: its own code runs, and is not kept
                self._engines.append(compiled)
                for name, each in compiled.items():
                    setattr(self, name, each.ctypes)
                return
            kept = Kept(key, functions)
            keep(source, kept)
        for function in kept.functions:
            setattr(self, function.name, self._link(function))

    def _link(self, function: Function) -> Callable[..., Any]:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""),
                                            llvm.Target.from_default_triple().create_target_machine())
        for name in function.needs:     # were one of them missing, the linker would leave all of them 0
            if llvm.address_of_symbol(name) is None:
                # LLVM may make a memset of a loop; Python's and Numba's names are on Numba's own error path, and
                # that of arrays to be freed: neither is ever taken.
                outside = getattr(LIBC, "abort" if name.startswith(("numba_", "NRT_")) else name)
                llvm.add_symbol(name, ctypes.cast(outside, ctypes.c_void_p).value)
        engine.add_object_file(llvm.ObjectFileRef.from_data(function.code))
        engine.finalize_object()
        self._engines.append(engine)
        kind = ctypes.CFUNCTYPE(_C_TYPES[function.result], *(_C_TYPES[a] for a in function.arguments))
        return kind(engine.get_function_address(function.symbol))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)      # declared for the type checker: the functions are set above


def _compile(source: str) -> dict[str, Any]:
    from numba import cfunc

    return {name: cfunc(signature)(function)
            for name, (function, signature) in importlib.import_module(source).EXPORTS.items()}


def _object_code(compiled: dict[str, Any]) -> list[Function] | None:
    """None where this Numba does not have what is asked for: it is not its documented interface (though its own
    cache on disk rests on the same call)."""
    found = []
    for name, each in compiled.items():
        try:
            _, _, (code, _) = each._library.serialize_using_object_code()
            symbol, signature = each._wrapper_name, each._sig
        except (AttributeError, TypeError, ValueError):
            return None
        found.append(Function(name, symbol, str(signature.return_type), [str(a) for a in signature.args],
                               _undefined(code), code))
    return found


def _undefined(code: bytes) -> list[str]:
    from elftools.elf.elffile import ELFFile

    table: Any = ELFFile(io.BytesIO(code)).get_section_by_name(".symtab")
    return [s.name for s in table.iter_symbols() if s.name and s["st_shndx"] == "SHN_UNDEF"]
