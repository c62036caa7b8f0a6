"""A Linux program in a machine against the same natively. ``python -m benchmarks linux [--rounds N]``

One static program (linux_program.c) measures itself: code without system calls, calls that a worker serves alone
(futex_wake), calls through the system's process (getppid, 4 KiB of a file), a hand-over between two threads, new
threads and processes, and memory that is touched first. Natively and in a machine in turns, with dirty logging off and
with rings; and, where they are installed, under others that run a program of Linux: qemu-user (translates its code, and
passes its calls on), gVisor's runsc (serves its calls, here by ptrace). Ratios are of the times; targets of calls are
in microseconds, of our own runs.

* **start**: from the command line of ``vmm run`` to its end, for a program that does nothing.
* **redis**: SETs per second of redis-benchmark -P 16, server and client in one machine, where ``--root`` has Redis.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmm.client.accelerators import choose_accelerator
from vmm.client.machine import Machine
from vmm.client.programs import program_machine, program_spec
from vmm.errors import VmmError

from .common import CONSOLE, Case, Results, arguments_parser, in_turns, quiet

NAME = "linux"
SOURCE = Path(__file__).with_name("linux_program.c")
QUANTITIES = {
    "triad": ("triad over 96 MiB (ms)", 1e-6, ".1f"), "updates": ("random updates (ms)", 1e-6, ".1f"),
    "arithmetic": ("arithmetic (ms)", 1e-6, ".1f"), "clock": ("clock_gettime (ns)", 1.0, ".0f"),
    "futex_wake": ("futex wake, by the worker (us)", 1e-3, ".1f"),
    "getppid": ("getppid, by the system (us)", 1e-3, ".1f"), "read_4k": ("read of 4 KiB (us)", 1e-3, ".1f"),
    "write_4k": ("write of 4 KiB (us)", 1e-3, ".1f"), "hand_over": ("hand-over between threads (us)", 1e-3, ".1f"),
    "thread": ("new thread, and its end (ms)", 1e-6, ".2f"), "fork": ("fork, and its end (ms)", 1e-6, ".2f"),
    "first_touch_page": ("16 MiB mapped, touched, unmapped (ms)", 1e-6, ".1f")}
#: Code without system calls: at least 0.95 of the native speed.
CODE = dict.fromkeys(("triad", "updates", "arithmetic"), 1 / 0.95)
#: What a call may take of ours, in the unit that the table has.
OWN = {"futex_wake": 35, "getppid": 80, "read_4k": 80, "hand_over": 150, "thread": 3}


def measured(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}


#: How others run it: their program, and the words before the benchmark's, which is at {root}/bin/benchmark.
PEERS = {"qemu-user": ("qemu-x86_64-static", ["{root}/bin/benchmark"]),
         "runsc": ("runsc", ["--platform=ptrace", "--network=none", "--ignore-cgroups", "do", "-quiet",
                             "-force-overlay=false", "-root", "{root}", "/bin/benchmark"])}


def run(*words: str) -> dict[str, float]:
    return measured(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def natively(root: Path, scale: int) -> dict[str, float]:
    return run("unshare", "-R", str(root), "/bin/benchmark", str(scale))


def by_peer(name: str, root: Path, scale: int) -> dict[str, float]:
    program, words = PEERS[name]
    return run(program, *(word.format(root=root) for word in words), str(scale))


def inside(root: Path, scale: int, tracking: str) -> dict[str, float]:
    asked = program_spec("/bin/benchmark", [str(scale)], root=str(root))
    spec = program_machine("bench-linux", asked, memory=256 << 20, threads=4)
    spec = msgspec.structs.replace(spec, tracking=tracking, log="always")
    with Machine.launch(spec) as machine:
        lines = []
        while True:
            for event in machine.events(10.0):
                if event["event"] == "console":
                    lines.append(event["data"])
                elif event["event"] == "ended":
                    return measured("".join(lines))


def start(root: Path) -> float:
    """Seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "vmm", "run", "--root", root, "--threads", "1", "--", "/bin/nothing"],
                   check=True)
    return time.monotonic() - began


def redis(root: str) -> float:
    """SETs per second."""
    script = ("redis-server --port 6379 --save '' --daemonize yes > /dev/null; "
              "until redis-cli ping > /dev/null 2>&1; do sleep 0.1; done; "
              "redis-benchmark -n 50000 -P 16 -t set --csv; redis-cli shutdown nosave")
    done = subprocess.run([sys.executable, "-m", "vmm", "run", "--root", root, "--memory", "512MiB", "--threads", "12",
                           "--", "sh", "-c", script], capture_output=True, text=True, check=True)
    return float(re.search(r'"SET","([\d.]+)"', done.stdout)[1])        # type: ignore[index]


def compiled(root: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (root / name).mkdir()
    subprocess.run(["gcc", "-O2", "-static", "-pthread", "-w", "-o", root / "bin/benchmark", SOURCE], check=True)
    nothing = root / "nothing.c"
    nothing.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-O2", "-static", "-o", root / "bin/nothing", nothing], check=True)


def why_not() -> str:
    if not shutil.which("gcc"):
        return "no gcc"
    try:
        choose_accelerator("auto", programs=True)
    except VmmError as exc:
        return str(exc)
    return ""


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--root", default="", help="of Redis: vmm root DIR redis-server redis-tools dash")
    options = parser.parse_args()
    results = Results(NAME, "A Linux program in a machine, natively, and elsewhere", "other", QUANTITIES)
    results.skipped = why_not()
    if results.skipped:
        results.show()
        return
    rounds, scale = options.rounds or (1 if options.quick else 5), 1 if options.quick else 10
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        compiled(root)
        measures: dict[str, Callable[[], dict[str, float]]] = {"native": lambda: natively(root, scale)}
        for tracking in ("none", "ring"):
            measures[tracking] = lambda t=tracking: inside(root, scale, t)       # type: ignore[misc]
        peers = [name for name, (program, _) in PEERS.items() if shutil.which(program)]
        for name in peers:
            measures[name] = lambda n=name: by_peer(n, root, scale)              # type: ignore[misc]
        found = in_turns(measures, rounds, patience=options.patience)
        results.cases = [Case("not tracked, natively", found["none"], found["native"], at_most=CODE),
                         Case("rings, natively", found["ring"], found["native"]),
                         *(Case(f"not tracked, {name}", found["none"], found[name]) for name in peers)]
        results.show()
        for name, most in OWN.items():
            label, factor, style = QUANTITIES[name]
            ours = results.cases[1].median("ours", name) * factor
            CONSOLE.print(f"{label}: {ours:{style}}, at most {most}: {'met' if ours <= most else 'not met'}")
        quiet(options.patience)
        times = sorted(start(root) for _ in range(rounds))
        CONSOLE.print(f"start of a program that does nothing: {times[len(times) // 2]:.2f} s, at most 0.4")
        if options.root:
            quiet(options.patience)
            CONSOLE.print(f"redis-benchmark -P 16 SET: {redis(options.root):,.0f} a second, at least 40,000")
    results.save(options.output)


if __name__ == "__main__":
    main()
