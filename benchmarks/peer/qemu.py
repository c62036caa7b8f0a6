"""QEMU with the peer's boot ROM, driven over QMP; and what a peer must have to be measured here at all.

Every connection is a socket pair whose other end QEMU inherits, and QEMU is told by the kernel to end when the
process that started it does: nothing of it can be left behind, however that process ends.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.linux.process import die_with_parent
from workers.accel.kvm import host

from .build import ROM

__all__ = ["PAGE", "RAM_START", "Qemu", "make_key", "missing", "version"]

PAGE = 4096
PROGRAM = "qemu-system-x86_64"
RAM_START = 2 << 20     # what lies below is the PC's: parameters, ROM, hole
_PARAMS = 0x1000        # benchmarks/peer/rom.S
_PATIENCE = 60.0


def missing() -> str:
    """Why QEMU cannot be measured on this host; empty where it can."""
    if shutil.which(PROGRAM) is None:
        return f"{PROGRAM} is not installed (Debian: apt install qemu-system-x86)"
    info = host.probe()
    if info.ring_capability is None:
        return f"KVM: {info.reason or 'this kernel has no dirty ring'}"
    try:
        import qemu.qmp  # noqa: F401
    except ImportError:
        return "the Python package qemu.qmp is not installed"
    return ""


def make_key(folder: Path) -> None:
    """What both ends of an encrypted migration have (TLS with a pre-shared key)."""
    (folder / "keys.psk").write_text(f"qemu:{os.urandom(32).hex()}\n")


@functools.cache
def version() -> str:
    text = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^QEMU emulator version (\S+).*", r"QEMU \1", text.splitlines()[0])


class Qemu:
    """A virtual machine whose vCPUs walk over their shares of [RAM_START, RAM_START + pages).

    ``spin``: pauses after each write; ``idle``: one pass, then the vCPUs halt. ``incoming``: a migration will come
    (``receive``). ``keys``: a folder with a key that both ends of an encrypted one have (``make_key``). ``ring``: 0 is
    the plain dirty bitmap. ``shared``: guest RAM is shared memory, as it is for a machine of ours, and is looked into
    at once; else it is QEMU's own, asked for over QMP.
    """

    def __init__(self, *, mib: int, vcpus: int, ring: int, spin: int = 0, idle: bool = False,
                 incoming: bool = False, shared: bool = False, keys: str = "") -> None:
        from qemu.qmp.legacy import QEMUMonitorProtocol

        total = ((mib << 20) - RAM_START) // PAGE
        bounds = [index * total // vcpus for index in range(vcpus + 1)]
        #: (address of the first page, pages) of each vCPU's share.
        self.shares = [(RAM_START + low * PAGE, high - low) for low, high in itertools.pairwise(bounds)]
        self._words: NDArray[np.uint64] | None = None
        ours, theirs = socket.socketpair()
        accel = "kvm" + (f",dirty-ring-size={ring}" if ring else "")
        command = [PROGRAM, "-accel", accel, "-machine", "pc", "-cpu", "kvm64", "-smp", str(vcpus), "-m", str(mib),
                   "-nodefaults", "-nographic", "-no-user-config", "-bios", str(ROM),
                   "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        for index, (first, pages) in enumerate(self.shares):
            for at, value in enumerate((first, pages, spin, int(idle))):
                command += ["-device", f"loader,addr={_PARAMS + 32 * index + 8 * at:#x},data={value},data-len=8"]
        fds = [theirs.fileno()]
        if shared:
            memory = os.memfd_create("guest", 0)
            os.ftruncate(memory, mib << 20)
            self._words = np.frombuffer(mmap.mmap(memory, mib << 20), np.uint64)
            command += ["-machine", "memory-backend=ram", "-object",
                        f"memory-backend-file,id=ram,size={mib}M,share=on,mem-path=/proc/self/fd/{memory}"]
            fds.append(memory)
        if incoming:
            command += ["-incoming", "defer"]
        if keys:
            command += ["-object", f"tls-creds-psk,id=tls,dir={keys},endpoint={'server' if incoming else 'client'}"]
        self._encrypted = bool(keys)
        parent = os.getpid()
        self._process = subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent))
        theirs.close()
        if shared:
            os.close(memory)
        self._socket = ours
        self._qmp = QEMUMonitorProtocol(ours)
        self._qmp.settimeout(_PATIENCE)
        try:
            self._qmp.connect()
        except BaseException as exc:
            self._process.kill()
            text = self._process.communicate()[1].decode(errors="replace").strip()
            raise RuntimeError(f"QEMU did not start: {text or exc}") from exc
        self._events: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, **arguments: Any) -> Any:
        """A QMP command; an underscore in an argument's name stands for a dash."""
        return self._qmp.cmd(command, **{name.replace("_", "-"): value for name, value in arguments.items()})

    def word(self, address: int) -> int:
        """64 bits of guest memory, as they are now."""
        if self._words is not None:
            return int(self._words[address // 8])
        text = self.ask("human-monitor-command", command_line=f"xp /1gx {address:#x}")
        return int(text.split(":")[1], 16)

    def walked(self) -> None:
        """Wait until the first vCPU has been at each of its pages."""
        first, pages = self.shares[0]
        deadline = time.monotonic() + _PATIENCE
        while not self.word(first + (pages - 1) * PAGE):
            if time.monotonic() > deadline:
                raise RuntimeError(f"QEMU: the guest has not come round in {_PATIENCE:.0f} s")
            time.sleep(0.02)

    def pause(self) -> None:
        self.ask("stop")

    def resume(self) -> None:
        self.ask("cont")

    def event(self, name: str, timeout: float = _PATIENCE) -> float:
        """Wait for this event; its time, in seconds of the wall clock."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self._events:
                if event["event"] == name:
                    self._events.remove(event)
                    stamp = event["timestamp"]
                    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
            if time.monotonic() > deadline:
                raise TimeoutError(f"QEMU: no {name} within {timeout:.0f} s")
            found = self._qmp.pull_event(wait=max(0.01, deadline - time.monotonic()))
            if found is not None:
                self._events.append(found)

    # --- dirty logging ---------------------------------------------------------------------------------------

    def start_logging(self, seconds: int, mode: str) -> None:
        """Have dirty logging on for so many seconds (``mode``: dirty-ring, dirty-bitmap); on when this returns."""
        self.ask("calc-dirty-rate", calc_time=seconds, mode=mode)
        while self.ask("query-dirty-rate")["status"] != "measuring":
            time.sleep(0.001)

    def finish_logging(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while (found := self.ask("query-dirty-rate"))["status"] == "measuring":
            if time.monotonic() > deadline:
                raise TimeoutError(f"QEMU: still measures its dirty rate after {_PATIENCE:.0f} s")
            time.sleep(0.02)
        return dict(found)

    # --- migration -------------------------------------------------------------------------------------------

    def _set_up(self, channels: int, **parameters: Any) -> None:
        """Both ends alike."""
        self.ask("migrate-set-capabilities", capabilities=[
            {"capability": "events", "state": True}, {"capability": "multifd", "state": channels > 1}])
        if channels > 1:
            parameters["multifd_channels"] = channels
        if self._encrypted:
            parameters["tls_creds"] = "tls"
        if parameters:
            self.ask("migrate-set-parameters", **parameters)

    def receive(self, uri: str, *, channels: int = 1) -> None:
        """Wait for a migration at ``unix:PATH`` or ``tcp:HOST:PORT``."""
        self._set_up(channels)
        self.ask("migrate-incoming", uri=uri)

    def migrate(self, uri: str, *, downtime: float, channels: int = 1, bandwidth: int = 1 << 40) -> dict[str, Any]:
        """Migrate to who waits there; QEMU's report once it is over. ``channels``: more than one is multifd.
        ``bandwidth``: bytes per second at most."""
        self._set_up(channels, max_bandwidth=bandwidth, downtime_limit=round(downtime * 1000))
        self.ask("migrate", uri=uri)
        while (found := self.ask("query-migrate")).get("status") not in ("completed", "failed", "cancelled"):
            time.sleep(0.01)
        if found["status"] != "completed":
            raise RuntimeError(f"QEMU's migration: {found}")
        return dict(found)

    # --- end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        with contextlib.suppress(Exception):
            self._qmp.close()
        self._socket.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
