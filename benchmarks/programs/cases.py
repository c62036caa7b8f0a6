"""The programs, and what is done with each."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from vmm.errors import VmmError

from .compare import SCRIPTS, Case, made_root, run_natively

__all__ = ["CASES"]

_SHELLS = ("shells", "busybox-static", "bash-static", "zsh-static")
_TABLE = ("table", "dash", "coreutils", "diffutils", "grep", "sed", "findutils", "gawk", "python3",
          "libpython3.11-testsuite", "perl", "sqlite3", "redis-server", "redis-tools", "memcached", "sysbench",
          "stress-ng", "mbw", "stockfish", "tcc", "libc6-dev", "procps")
_GCC = ("gcc", "gcc", "libc6-dev", "dash", "coreutils")
_JAVA = ("java", "openjdk-17-jdk-headless", "dash", "coreutils")
_JVM = "/usr/lib/jvm/java-17-openjdk-amd64/bin"
_GO = ("go", "golang-go", "dash", "coreutils")
_PYTHON_TESTS = ("json", "re", "threading", "struct", "hashlib", "zlib")
#: Times, and what follows from them.
_SECONDS = (r"[0-9]+(\.[0-9]+)? ?(sec|ms|s\b)", "N s")
_PYTHON_DIFFERS = [_SECONDS, (r"0x[0-9a-f]+", "0xN"),
                   (r"^(== |Using random seed|0:0|Total duration|test_[a-z]+ passed in).*\n", ""),
                   (r"^((task )?<thread .*|[0-9]+ tasks are running)\n", ""),      # in any order
                   (r"(task )?<thread .*", "")]         # behind a test's name
_SYSBENCH_DIFFERS = [(r"[0-9]+\.[0-9]+", "N"), (r" +N", " N")]
_STRESS_DIFFERS = [(r"\[[0-9]+\]", "[N]"), _SECONDS, (r"[0-9]+\.[0-9]+", "N")]
_STOCKFISH_DIFFERS = [(r"(time|nps|hashfull|Nodes/second|Total time \(ms\)) *:? *[0-9]+", r"\1 N")]


def _compiled(*names: str, threads: bool = False) -> Callable[[Path], None]:
    """Static programs, by this host's compiler, of sources in scripts/."""
    def prepare(root: Path) -> None:
        for name in names:
            if shutil.which("gcc") is None:
                raise VmmError("no gcc")
            subprocess.run(["gcc", "-O2", "-static", *(["-fopenmp"] * threads), "-o", root / "bench" / name,
                            SCRIPTS / f"{name}.c", "-lm"], check=True)
    return prepare


def _by_go(root: Path) -> None:
    """By the compiler of its own root."""
    to, go = (root.parent / _TABLE[0] / "bench" / "hello"), root.parent / _GO[0]
    made_root(_GO)
    (go / "tmp" / "main.go").write_bytes((SCRIPTS / "main.go").read_bytes())
    run_natively(go, ["go", "build", "-o", "/tmp/main", "/tmp/main.go"], {"GOCACHE": "/tmp/cache", "CGO_ENABLED": "0"})
    to.write_bytes((go / "tmp" / "main").read_bytes())
    to.chmod(0o755)


def _by_javac(root: Path) -> None:
    run_natively(root, [f"{_JVM}/javac", "-d", "/bench", "/bench/Collect.java"], {})


CASES = [
    Case("busybox", "its applets, a script, pipelines", _SHELLS, ["/bin/busybox", "sh", "/bench/busybox.sh"],
         memory="128MiB", threads=12, package="busybox-static",
         remark="one of ten runs at an earlier state ended early, why is not known; of 58 since, none"),
    Case("bash", "a script", _SHELLS, ["/bin/bash-static", "/bench/shell.sh"], memory="96MiB", threads=10,
         package="bash-static"),
    Case("zsh", "the same script", _SHELLS, ["/bin/zsh-static", "-o", "ksharrays", "-o", "shwordsplit",
                                              "/bench/shell.sh"], memory="96MiB", threads=10, package="zsh-static"),
    Case("coreutils", "dynamic, under dash", _TABLE, ["sh", "/bench/coreutils.sh"],
         memory="160MiB", threads=12),
    Case("sqlite", "100,000 rows, killed and opened again", _TABLE, ["sh", "/bench/sqlite.sh"],
         memory="128MiB", threads=8, package="sqlite3"),
    *(Case(f"python-{name}", f"its own test_{name}", _TABLE,
           ["python3", "-m", "test", "-v", f"test_{name}"], memory="384MiB", threads=64, differs=_PYTHON_DIFFERS,
           package="libpython3.11-testsuite", seconds=1200.0) for name in _PYTHON_TESTS),
    Case("perl", "expressions, processes, sockets", _TABLE, ["perl", "/bench/perl.pl"],
         memory="128MiB", threads=8),
    Case("tcc", "compiles a program, which runs", _TABLE, ["sh", "/bench/compile.sh", "tcc"],
         memory="96MiB", threads=6),
    Case("gcc", "compiles a program, which runs", _GCC, ["sh", "/bench/compile.sh", "gcc", "-O2"],
         memory="256MiB", threads=6),
    Case("redis", "server, benchmark and client", _TABLE, ["sh", "/bench/redis.sh"],
         memory="192MiB", threads=16, package="redis-server"),
    Case("memcached", "four threads, and four clients", _TABLE, ["python3", "/bench/memcached.py"],
         memory="192MiB", threads=24),
    Case("sysbench-cpu", "two threads, 2000 events", _TABLE,
         ["sysbench", "--threads=2", "--events=2000", "--time=0", "cpu", "run"], memory="96MiB", threads=6,
         differs=_SYSBENCH_DIFFERS, package="sysbench"),
    Case("sysbench-memory", "two threads, 2 GiB written", _TABLE,
         ["sysbench", "--threads=2", "--time=0", "memory", "--memory-block-size=64K", "--memory-total-size=2G", "run"],
         memory="96MiB", threads=6, differs=_SYSBENCH_DIFFERS, package="sysbench"),
    Case("stress-ng", "--vm 2 --vm-method all", _TABLE,
         ["sh", "-c", "stress-ng --vm 2 --vm-bytes 32M --vm-method all --vm-ops 5000 --verify --temp-path /tmp 2>&1"],
         memory="192MiB", threads=12, differs=_STRESS_DIFFERS),
    Case("mbw", "all methods, 16 MiB", _TABLE, ["mbw", "-n", "3", "16"], memory="128MiB",
         differs=[(r"[0-9]+\.[0-9]+", "N")]),
    Case("stockfish", "bench, to depth 9", _TABLE, ["stockfish", "bench", "16", "1", "9"],
         memory="224MiB", differs=_STOCKFISH_DIFFERS),
    Case("go", "goroutines, channels, collection", _TABLE, ["/bench/hello"], memory="192MiB", threads=16,
         prepare=_by_go, package="golang-go", root_of_package=_GO),
    Case("java", "17, collection by G1, four threads", _JAVA,
         [f"{_JVM}/java", "-Xmx192m", "-Xms64m", "-cp", "/bench", "Collect"], memory="512MiB", threads=48,
         prepare=_by_javac, package="openjdk-17-jdk-headless"),
    Case("java-serial", "the same, by the serial collector", _JAVA,
         [f"{_JVM}/java", "-Xmx128m", "-XX:+UseSerialGC", "-cp", "/bench", "Collect"],
         memory="384MiB", threads=40,
         prepare=_by_javac, package="openjdk-17-jdk-headless"),
    Case("stream", "STREAM's four kernels, gcc -static", _TABLE, ["/bench/stream"], memory="96MiB",
         prepare=_compiled("stream")),
    Case("gups", "random updates, gcc -static, two threads", _TABLE, ["/bench/gups"], memory="128MiB",
         prepare=_compiled("gups", threads=True)),
]
