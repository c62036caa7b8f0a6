"""A fleet on several Ray nodes of this machine, in a process of its own: what Ray keeps open ends with it. Each node
has a runtime directory of its own, as a host of its own would: machines of one name can be on two of them. Its first
argument says which of the functions below is run; it prints JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from cluster_nodes import cluster

from vmm import Machine
from vmm.consumers.migration.control import change
from vmm.consumers.migration.status import load_status
from vmm.consumers.migration.steering import Changes
from vmm.errors import VmmError
from vmm.fleet.client import fleet_of
from vmm.machine.runtime import is_running

_DEADLINE = 120.0
_AT = (4 << 20) + 2048      # in RAM, where the guest does not write: it raises the first word of pages


class Nodes:
    """``made``: of Ray's; ``folders``: {id of a node: its runtime directory}."""

    def __init__(self, directory: Path, count: int, **options: Any) -> None:
        folders = [Path(f"{os.environ['XDG_RUNTIME_DIR']}-{number}") for number in range(count)]
        for folder in folders:
            folder.mkdir(mode=0o700)
        self.made = cluster([{"num_cpus": 4, "memory": 4 << 30, "object_store_memory": 100 << 20,
                              "env_vars": {"XDG_RUNTIME_DIR": str(folder)}, **options} for folder in folders])
        self._open, self._client = ExitStack(), None
        self.folders = {node.node_id: folder for node, folder in zip(self.made.nodes, folders, strict=True)}

    def vmm(self, *arguments: str, status: int = 0) -> Any:
        """What ``vmm fleet`` prints as JSON."""
        done = subprocess.run([sys.executable, "-m", "vmm", "fleet", *arguments, "--cluster", self.made.address,
                               "--json"], capture_output=True, text=True, timeout=_DEADLINE, check=False)
        assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout) if done.stdout else done.stderr

    def machines(self, seconds: float = 0.0) -> dict[str, dict[str, Any]]:
        """As ``vmm fleet list --json`` has them, by name, without a process for each look."""
        if self._client is None:
            self._client = self._open.enter_context(fleet_of(self.made.address))
        return {each["name"]: each for each in self._client.overview(seconds)["machines"]}

    @contextmanager
    def machine(self, name: str) -> Iterator[Any]:
        """Attached to on its node."""
        with under(self.folders[self.machines()[name]["node"]]), Machine.attach(name) as machine:
            yield machine

    def mark(self, name: str) -> str:
        """Something in its memory that only this machine has."""
        data = os.urandom(16)
        with self.machine(name) as machine:
            machine.write(_AT, data)
        return data.hex()

    def marked(self, name: str) -> str:
        with self.machine(name) as machine:
            return bytes(machine.read(_AT, 16)).hex()

    def watched(self, count: int) -> list[list[str]]:
        """Names of machines, as often as ``vmm fleet list --watch`` has said them until it was interrupted."""
        with subprocess.Popen([sys.executable, "-m", "vmm", "fleet", "list", "--watch", "--json", "--cluster",
                               self.made.address], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = [json.loads(process.stdout.readline()) for _ in range(count)]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=_DEADLINE)
        assert process.returncode == 128 + signal.SIGINT, process.returncode
        return [[machine["name"] for machine in each["machines"]] for each in found]

    def draining(self, node: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "vmm", "fleet", "drain", node, "--cluster", self.made.address],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def forget(self) -> None:
        """The fleet has ended; there will be another."""
        self._open.close()
        self._client = None

    def close(self) -> None:
        self._open.close()
        self.made.shutdown()

    def kill(self, actor: str) -> None:
        """The process of the only one of this class."""
        (pid,) = [process.pid for process in psutil.process_iter(["cmdline"])
                  if (process.info["cmdline"] or [""])[0].startswith(f"ray::{actor}")
                  and os.environ["RAY_TMPDIR"] in process.environ().get("RAY_TMPDIR", "")]
        os.kill(pid, signal.SIGKILL)

    def lose(self, node: str) -> None:
        found = next(each for each in self.made.nodes if each.node_id == node)
        self.made.remove_node(found, allow_graceful=False)


@contextmanager
def under(folder: Path) -> Iterator[None]:
    """This runtime directory, which is a node's."""
    before, os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"], str(folder)
    try:
        yield
    finally:
        os.environ["XDG_RUNTIME_DIR"] = before


def wait(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


def taken(machine: dict[str, Any]) -> int:
    """The number of its last snapshot."""
    return int((machine["snapshot"] or {}).get("id") or 0)


def _where(machines: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: each["node"] for name, each in machines.items()}


def life(directory: Path) -> Any:
    """Four machines on three nodes: one node is drained, another is lost, and all is stopped."""
    nodes = Nodes(directory, 3)
    found: dict[str, Any] = {"nodes": list(nodes.folders)}
    started = nodes.vmm(str(directory / "fleet.yaml"))
    found["started"] = {each["name"]: each["node"] for each in started["machines"]}
    marks = {name: nodes.mark(name) for name in found["started"]}
    found["rates"] = {each["name"]: each["pages_per_s"] for each in nodes.vmm("list", "--rate", "0.3")["machines"]}
    found["watched"] = nodes.watched(2)
    drained = found["started"]["web-0"]
    found["drained"], found["moved"] = drained, nodes.vmm("drain", drained[:12])
    after = nodes.machines()
    found["after_drain"] = _where(after)
    found["kept"] = {name: nodes.marked(name) == mark for name, mark in marks.items()}
    found["left_there"] = [str(path) for path in (nodes.folders[drained] / "shardvmm").rglob("*")]

    # One snapshot may have been begun before the mark was there; the next was not.
    wanted = {name: taken(each) + 2 for name, each in after.items()}
    wait(lambda: all(taken(each) >= wanted[name] for name, each in nodes.machines().items()),
         "newer snapshots")
    lost = found["after_drain"]["web-0"]
    found["lost"] = lost
    nodes.lose(lost)
    wait(lambda: all(each["state"] == "running" and each["node"] != lost for each in nodes.machines().values()),
         "restored")
    found["after_loss"] = _where(nodes.machines())
    found["restored"] = {name: nodes.marked(name) == mark for name, mark in marks.items()}
    running: set[str] = set()       # a snapshot pauses each now and then

    def all_seen() -> bool:
        running.update(name for name, each in nodes.machines().items()
                       if (each["report"] or {}).get("state") == "running")
        return running == set(marks)

    wait(all_seen, "each runs")
    found["events"] = [event["text"] for event in nodes.vmm("list")["events"]]
    found["stopped"] = nodes.vmm("stop")["stopped"]
    found["no_fleet"] = nodes.vmm("list", status=7)
    nodes.close()
    return found


def cut_off(directory: Path) -> Any:
    """Of two nodes, one is heard no more, but its processes run: is a machine of it ever on both? Then the fleet is
    stopped, and begun again from its snapshots."""
    nodes = Nodes(directory, 2)
    (there,) = nodes.vmm(str(directory / "fleet.yaml"))["machines"]
    wait(lambda: taken(nodes.machines()["web-0"]) > 0, "a snapshot")
    node = next(each for each in nodes.made.nodes if each.node_id == there["node"])
    (other,) = [folder for name, folder in nodes.folders.items() if name != there["node"]]
    raylet = node.all_processes["raylet"][0].process
    raylet.send_signal(signal.SIGSTOP)
    both = 0

    def restored() -> bool:
        nonlocal both
        second = _runs(other, "web-0")      # in this order: the first one never comes back
        both += second and _runs(nodes.folders[there["node"]], "web-0")
        return second and nodes.machines()["web-0"]["state"] == "running"

    wait(restored, "it is restored")
    found = {"first": there["node"], "both": both, "machine": nodes.machines()["web-0"],
             "events": [event["text"] for event in nodes.vmm("list")["events"]]}
    mark = nodes.mark("web-0")
    last = taken(nodes.machines()["web-0"])
    wait(lambda: taken(nodes.machines()["web-0"]) >= last + 2, "newer snapshots")
    nodes.vmm("stop")
    nodes.forget()
    found["refused"] = nodes.vmm(str(directory / "fleet.yaml"), status=2)
    nodes.vmm(str(directory / "fleet.yaml"), "--restore")
    found["again"] = nodes.marked("web-0") == mark
    nodes.vmm("stop")
    nodes.lose(there["node"])
    nodes.close()
    return found


def mid_move(directory: Path) -> Any:
    """A node is drained of a machine that dirties much; the one to which that moves is lost meanwhile. It is drained
    again, and is lost itself."""
    nodes = Nodes(directory, 3)
    (there,) = nodes.vmm(str(directory / "fleet.yaml"))["machines"]
    source, mark = there["node"], nodes.mark("web-0")
    last = taken(nodes.machines()["web-0"])
    wait(lambda: taken(nodes.machines()["web-0"]) >= last + 2, "newer snapshots")
    found: dict[str, Any] = {"source": source}
    for who in ("target", "source"):
        with nodes.draining(source) as drain:
            assert drain.stderr is not None
            said = next(line for line in drain.stderr if " moves to " in line)
            target = next(node for node in nodes.folders if node[:6] in said)
            wait(lambda: _migration(nodes.folders[source]), "the migration")
            nodes.lose(target if who == "target" else source)
            drain.communicate(timeout=_DEADLINE)
            found[f"{who}: drain"] = drain.returncode
        wait(lambda: nodes.machines()["web-0"]["state"] == "running", "it runs")
        found[f"{who}: node"], found[f"{who}: kept"] = nodes.machines()["web-0"]["node"], nodes.marked("web-0") == mark
        found[f"{who}: running"] = [node for node, folder in nodes.folders.items() if _runs(folder, "web-0")]
        found[f"{who}: target"] = target
    nodes.vmm("stop")
    nodes.close()
    return found


def _migration(folder: Path) -> bool:
    """One sends memory from this node."""
    try:
        with under(folder):
            found = load_status("web-0")
    except VmmError:
        return False
    return bool(found["direction"] == "outgoing" and found["status"] == "active")


def _runs(folder: Path, name: str) -> bool:
    """A machine of this name, under this runtime directory."""
    with under(folder):
        return is_running(name)


def orphaned(directory: Path) -> Any:
    """Whoever has asked for a drain is interrupted while the machine moves, and then the fleet's process is killed; in
    the end that of the machine's actor."""
    nodes = Nodes(directory, 2)
    (there,) = nodes.vmm(str(directory / "fleet.yaml"))["machines"]
    source, mark = there["node"], nodes.mark("web-0")
    (target,) = [node for node in nodes.folders if node != source]
    with nodes.draining(source) as drain:
        assert drain.stderr is not None
        next(line for line in drain.stderr if " moves to " in line)
        wait(lambda: _migration(nodes.folders[source]), "the migration")
        with under(nodes.folders[source]):
            change("web-0", Changes(bandwidth=10e6))
        drain.send_signal(signal.SIGINT)
        drain.communicate(timeout=_DEADLINE)
    found: dict[str, Any] = {"target": target, "drain": drain.returncode}
    nodes.kill("Fleet")
    found["moves"] = _migration(nodes.folders[source])
    with under(nodes.folders[source]):
        change("web-0", Changes(bandwidth=1e9))
    wait(lambda: nodes.machines()["web-0"]["state"] == "running", "it runs")
    found |= {"node": nodes.machines()["web-0"]["node"], "kept": nodes.marked("web-0") == mark}
    wait(lambda: not _runs(nodes.folders[source], "web-0"), "it has gone from where it was")
    found["running"] = [node for node, folder in nodes.folders.items() if _runs(folder, "web-0")]
    last = taken(nodes.machines()["web-0"])
    wait(lambda: taken(nodes.machines()["web-0"]) > last, "snapshots go on")
    nodes.kill("Resident")
    wait(lambda: nodes.machines()["web-0"]["detail"].startswith("from snapshot "), "it is restored")
    found["restored"] = nodes.marked("web-0") == mark
    found["nodes"] = {each["node"]: each["state"] for each in nodes.vmm("list")["nodes"]}
    nodes.vmm("stop")
    nodes.close()
    return found


def manager(directory: Path) -> Any:
    """The fleet's own process is killed; others are wanted that have no room; a machine has no other host, until one
    ends by itself."""
    nodes = Nodes(directory, 2)
    started = nodes.vmm(str(directory / "fleet.yaml"))
    found: dict[str, Any] = {"started": _where({each["name"]: each for each in started["machines"]})}
    nodes.kill("Fleet")
    found["adopted"] = _where(nodes.machines())
    found["refused"] = nodes.vmm(str(directory / "fleet.yaml"), status=2)
    found["too_large"] = nodes.vmm(str(directory / "large.yaml"), status=2)
    full = found["started"]["web-1"]
    found["undrained"] = nodes.vmm("drain", full, status=9)
    with nodes.machine("web-0") as machine:
        machine.stop()
    wait(lambda: nodes.machines()["web-0"]["state"] == "ended", "web-0 has ended")
    found["ended"] = nodes.machines()["web-0"]
    found["drained"] = nodes.vmm("drain", full)
    found["stopped"] = nodes.vmm("stop")["stopped"]
    nodes.close()
    return found


if __name__ == "__main__":
    import fleet_nodes  # by its name: what is pickled is looked for there

    json.dump(getattr(fleet_nodes, sys.argv[1])(Path(sys.argv[2])), sys.stdout)
