"""A cluster of several Ray nodes on this machine, in a process of its own: what Ray keeps open ends with it. Its first
argument says which of the functions below is run; it prints JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_DEADLINE = 60.0


def here() -> str:
    """The id of the Ray node that this process is of."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def leave_traces(directory: Path, point: int, stop: Callable[[], bool], progress: Callable[[str], None]) -> str:
    """Work: says where it has begun, and goes on once it may there. The result: where."""
    (directory / f"begun-{point}-{here()}").touch()
    wait(lambda: (directory / f"go-{here()}").exists())
    return here()


def meet(directory: Path, patience: float, point: int, stop: Callable[[], bool],
         progress: Callable[[str], None]) -> bool:
    """Work: does anyone else come to this node meanwhile? It is left once one has, or so many seconds are over."""
    mine = directory / f"{here()}-{point}"
    mine.touch()
    deadline = time.monotonic() + patience
    while not (met := any(path != mine for path in directory.glob(f"{here()}-*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not met:
        mine.unlink()       # else the other looks for it
    return met


def fail(directory: Path, point: int, stop: Callable[[], bool], progress: Callable[[str], None]) -> None:
    """Work: an error of its own."""
    from vmm.errors import ExitCode, VmmError

    (directory / f"begun-{point}-{os.getpid()}-{time.monotonic_ns()}").touch()
    raise VmmError(f"point {point} cannot be", ExitCode.TIMEOUT)


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def cluster(nodes: list[dict[str, Any]]) -> Any:
    """With a head that has no CPUs, and these nodes."""
    from ray.cluster_utils import Cluster

    # A node that is lost is to be missed sooner than in half a minute.
    os.environ.update(RAY_health_check_period_ms="500", RAY_health_check_failure_threshold="4")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(**node) for node in nodes]
    made.wait_for_nodes()
    return made


def lost_node(directory: Path) -> Any:
    """Each of three nodes has a point when one of them is killed; the others' may go on from then on."""
    from vmm.lab.cluster.points import run_points

    made = cluster([{"num_cpus": 1, "resources": {"host": 1}}] * 3)
    killed = []

    def kill() -> None:
        wait(lambda: len(list(directory.glob("begun-*"))) == 3)
        killed.append(made.nodes[1].node_id)
        made.remove_node(made.nodes[1], allow_graceful=False)
        for node in (made.nodes[0], made.nodes[2]):
            (directory / f"go-{node.node_id}").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    results = list(run_points(range(6), partial(leave_traces, directory), address=made.address))
    killer.join()
    return {"results": results, "killed": killed[0]}


def lost_machines(directory: Path) -> Any:
    """A sweep on two nodes, of which one is killed when both have a machine."""
    from vmm.lab.stress.run import run
    from vmm.lab.stress.sweep import load_sweep

    made = cluster([{"num_cpus": 1, "resources": {"host": 1, "kvm": 1}}] * 2)
    machines = Path(os.environ["XDG_RUNTIME_DIR"], "shardvmm")

    def kill() -> None:
        wait(lambda: len(list(machines.glob("stress-*"))) >= 2)
        made.remove_node(made.nodes[1], allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    results, complete = run(load_sweep(directory / "s.yaml"), directory / "out", cluster=made.address)
    killer.join()
    return {"complete": complete, "errors": [r.error for r in results], "figures": [len(r.figures) for r in results]}


def whole(directory: Path) -> Any:
    """Nodes with two CPUs each, and points that ask for them whole: with ``host``, and without."""
    from vmm.lab.cluster.points import Needs, run_points

    found = {}
    for name, resources in (("host", {"host": 1}), ("cpus", {})):
        made = cluster([{"num_cpus": 2, "resources": resources}])
        for kind, needs, count, patience in (("whole", Needs(whole=True), 8, 0.1),
                                             ("shared", Needs(whole=False), 2, _DEADLINE)):
            found[f"{name} {kind}"] = [met for _, met in run_points(
                range(count), partial(meet, directory, patience), address=made.address,
                needs=lambda point, needs=needs: needs)]
        made.shutdown()
    return found


def errors(directory: Path) -> Any:
    """What is said when a point fails by itself, and when no node has KVM."""
    from vmm.errors import VmmError
    from vmm.lab.cluster.points import Needs, run_points

    made = cluster([{"num_cpus": 1, "resources": {"host": 1}}])
    said = []
    for needs in (Needs(), Needs(kvm=True), Needs(whole=False, cores=3)):
        try:
            list(run_points([1], partial(fail, directory), address=made.address,
                            needs=lambda point, needs=needs: needs))
        except VmmError as exc:
            said.append([str(exc), int(exc.exit_code)])
    return said


if __name__ == "__main__":
    import cluster_nodes  # by its name: the nodes import what they run

    json.dump(getattr(cluster_nodes, sys.argv[1])(Path(sys.argv[2])), sys.stdout)
