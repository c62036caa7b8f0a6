"""What a test may need of the host. Each need is a marker; where the host lacks it, the tests that bear the marker
are skipped with the reason, and an environment variable turns that skip into a failure. ``.ci/run`` sets the
variable of each need that the host can meet, so that nothing is skipped there unnoticed."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from browser import chromium

from ipc import sandbox
from ipc.userfault import post_copy_missing
from ipc.writelog import watching_missing, write_log_missing
from vmm.consumers.watch.attach import attach, check_target
from vmm.errors import VmmError
from workers.accel.kvm.host import probe

__all__ = ["NEEDS", "Need", "apply", "missing"]


@dataclass(frozen=True)
class Need:
    """``missing`` says what the host lacks, and why; empty when it lacks nothing."""

    missing: Callable[[], str]
    variable: str


def _kvm() -> str:
    info = probe()
    if info.reason:
        return info.reason
    return "" if info.ring_capability else "this kernel has no dirty rings"


def _root() -> str:
    """To give up its rights, and to mount over what is there where nobody else sees it."""
    if os.geteuid():
        return "not root"
    done = subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.PIPE, text=True, check=False)
    return done.stderr.strip()


def _spin() -> str:
    """To check the models of docs/models: spin makes C of a model."""
    lacking = [tool for tool in ("spin", "cc") if shutil.which(tool) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def _prometheus() -> str:
    """Debian's package of it."""
    lacking = [tool for tool in ("prometheus", "promtool") if shutil.which(tool) is None]
    return (f"not installed: {', '.join(lacking)} (apt-get install --no-install-recommends prometheus)" if lacking
            else "")


def _watch() -> str:
    """To trace processes that this one has started, and what is asked of their memory then."""
    if reason := watching_missing():
        return reason
    child = subprocess.Popen(["sleep", "60"])
    try:
        os.close(attach(check_target(child.pid)).fault.fd)
        return ""
    except VmmError as exc:
        return str(exc)
    finally:
        child.kill()
        child.wait()


def _ray() -> str:
    """The extra ``cluster``, which the development environment does not have of itself."""
    return "" if importlib.util.find_spec("ray") else "not installed: pip install 'shardvmm[cluster]'"


def _browser() -> str:
    """To look at pages that are written."""
    return "" if chromium() else "not installed: chromium"


def _sandbox() -> str:
    return "; ".join(text for text, _ in sandbox.missing())


#: By marker (pyproject.toml lists them).
NEEDS = {
    "kvm": Need(_kvm, "SHARDVMM_REQUIRE_KVM"),
    "uffd": Need(write_log_missing, "SHARDVMM_REQUIRE_UFFD"),
    "watch": Need(_watch, "SHARDVMM_REQUIRE_WATCH"),
    "postcopy": Need(post_copy_missing, "SHARDVMM_REQUIRE_POSTCOPY"),
    "root": Need(_root, "SHARDVMM_REQUIRE_ROOT"),
    "spin": Need(_spin, "SHARDVMM_REQUIRE_SPIN"),
    "ray": Need(_ray, "SHARDVMM_REQUIRE_RAY"),
    "prometheus": Need(_prometheus, "SHARDVMM_REQUIRE_PROMETHEUS"),
    "browser": Need(_browser, "SHARDVMM_REQUIRE_BROWSER"),
    "sandbox": Need(_sandbox, "SHARDVMM_REQUIRE_SANDBOX"),
}


@functools.cache
def missing(marker: str) -> str:
    """What the host lacks for tests with this marker; empty when it lacks nothing."""
    return NEEDS[marker].missing()


def apply(items: list[pytest.Item]) -> None:
    """Skip what this host cannot run. Raises pytest.UsageError where a need must be met and is not."""
    for marker, need in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing(marker) if marked else ""
        if reason and os.environ.get(need.variable) == "1":
            raise pytest.UsageError(f"{need.variable}=1, but {reason}")
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))
