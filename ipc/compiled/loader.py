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
import hashlib
import importlib
import importlib.util
import io
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import msgspec

from ..linux.libc import LIBC
from ..messages import UNREADABLE

__all__ = ["Native", "cache_directories", "trusted"]

_C_TYPES: dict[str, Any] = {"int64": ctypes.c_int64, "uint64": ctypes.c_uint64, "int32": ctypes.c_int32,
                            "uint32": ctypes.c_uint32, "none": None}


class _Function(msgspec.Struct):
    name: str
    symbol: str
    result: str             # names of Numba's types
    arguments: list[str]
    needs: list[str]        # symbols that it does not have itself
    code: bytes             # an object file


class _Kept(msgspec.Struct):
    key: str
    functions: list[_Function]


class Native:
    """The functions of ``source``; ``sources`` are the modules whose text went into them. Attributes are ctypes
    functions. Keep the object as long as they are called."""

    def __init__(self, source: str, *sources: str) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        key = _key((source, *sources))
        self._engines: list[Any] = []
        kept = _find(source, key)
        if kept is None:
            compiled = _compile(source)
            functions = _object_code(compiled)
            if functions is None:       # another Numba than is known here: its own code runs, and is not kept
                self._engines.append(compiled)
                for name, each in compiled.items():
                    setattr(self, name, each.ctypes)
                return
            kept = _Kept(key, functions)
            _keep(source, kept)
        for function in kept.functions:
            setattr(self, function.name, self._link(function))

    def _link(self, function: _Function) -> Callable[..., Any]:
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


def _key(modules: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for module in (*modules, __name__):
        found.update(_path(module).read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    found.update(f"{llvmlite.__version__} {llvm.get_host_cpu_name()} {features}".encode())
    return found.hexdigest()


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def cache_directories(source: str) -> list[Path]:
    """Where code may be kept, the best first: beside the source, as Python keeps its own, or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return [_path(source).parent / "__pycache__", Path(home) / "shardvmm"]


def trusted(directory: Path) -> bool:
    """Whether code that lies there may be run: nobody but this user and root can have put it there. Raises OSError
    where there is no such directory."""
    return _is_ours(os.stat(directory))


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _find(source: str, key: str) -> _Kept | None:
    for directory in cache_directories(source):
        try:
            kept = msgspec.msgpack.decode(_read(directory, f"{source}.native"), type=_Kept)
        except (OSError, *UNREADABLE):
            continue
        if kept.key == key:
            return kept
    return None


def _read(directory: Path, name: str) -> bytes:
    """Raises OSError, also where somebody else could have written it."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    where = os.open(directory, flags | os.O_DIRECTORY)
    try:
        with open(os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=where), "rb") as file:
            if not (_is_ours(os.fstat(where)) and _is_ours(os.fstat(file.fileno()))):
                raise PermissionError(f"{directory / name}: other users may write there")
            return file.read()
    finally:
        os.close(where)


def _keep(source: str, kept: _Kept) -> None:
    """Written aside and renamed: several processes may do so at once. Where nothing can be written each start
    compiles (``vmm doctor`` says so)."""
    data = msgspec.msgpack.encode(kept)
    for directory in cache_directories(source):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if trusted(directory):
                _write(directory, f"{source}.native", data)
                return
        except OSError:
            continue


def _write(directory: Path, name: str, data: bytes) -> None:
    """Raises OSError, with nothing left of it."""
    fd, aside = tempfile.mkstemp(dir=directory)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(aside, directory / name)
    except BaseException:
        os.unlink(aside)
        raise


def _compile(source: str) -> dict[str, Any]:
    from numba import cfunc

    return {name: cfunc(signature)(function)
            for name, (function, signature) in importlib.import_module(source).EXPORTS.items()}


def _object_code(compiled: dict[str, Any]) -> list[_Function] | None:
    """None where this Numba does not have what is asked for: it is not its documented interface (though its own
    cache on disk rests on the same call)."""
    found = []
    for name, each in compiled.items():
        try:
            _, _, (code, _) = each._library.serialize_using_object_code()
            symbol, signature = each._wrapper_name, each._sig
        except (AttributeError, TypeError, ValueError):
            return None
        found.append(_Function(name, symbol, str(signature.return_type), [str(a) for a in signature.args],
                               _undefined(code), code))
    return found


def _undefined(code: bytes) -> list[str]:
    from elftools.elf.elffile import ELFFile

    table: Any = ELFFile(io.BytesIO(code)).get_section_by_name(".symtab")
    return [s.name for s in table.iter_symbols() if s.name and s["st_shndx"] == "SHN_UNDEF"]
