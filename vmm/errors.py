"""Exit codes and the errors a user sees: one clear line each, never a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from ipc.oneline import one_line

__all__ = ["ExitCode", "StillRunning", "VmmError", "no_memory", "one_line"]


class ExitCode(IntEnum):
    """Exit status of ``vmm``; a command ended by a signal exits with 128 + its number."""

    OK = 0                # every vCPU ended with code 0 (and verification, if asked for, passed)
    GUEST_FAILED = 1      # a vCPU ended with another code
    BAD_INPUT = 2         # wrong configuration, option or environment; nothing was started
    VERIFY_FAILED = 3     # a dirtied page was lost (or, for guests that promise it, a surplus one found)
    GUEST_CRASHED = 4     # triple fault, exception, address outside RAM, unknown port, internal error
    TIMEOUT = 5           # still running at `timeout:`
    WORKER_DIED = 6       # a vCPU worker process ended unasked
    NO_MACHINE = 7        # no running machine of that name, or it went away
    STOPPED = 8           # ended on `vmm stop`, or because its memory could not be restored
    MIGRATION_FAILED = 9  # a migration failed; its message says where the machine runs
    OUTPUT = 74           # standard output could not be written (EX_IOERR); what was asked for may be done
    BUG = 70              # an unexpected exception


class VmmError(Exception):
    """Something a user can understand and act on."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def told(self) -> Iterable[str]:
        """Lines for a person."""
        return [f"error: {line}" for line in str(self).splitlines()]


class StillRunning(VmmError, TimeoutError):
    """A machine has not ended in the time that it was waited for."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.TIMEOUT)


def no_memory(machine: str) -> str:
    """What is said to whoever asks a replayed machine for its memory or vCPU states."""
    return (f"machine '{machine}' runs accel: replay, which has no guest memory and no vCPU state to read, save or "
            "migrate")
