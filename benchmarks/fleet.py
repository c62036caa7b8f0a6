"""What a fleet costs, and how long it takes: on several Ray nodes of this machine, each with a runtime directory of its
own, with machines that dirty little. Needs Ray.

Memory is PSS (shared pages counted by parts). Processor time is that of the process at rest, machines and all, by the
scheduler's clock. Times are the client's. Nothing is compared with anything else: these are the figures of the model in
docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.common import CONSOLE, arguments_parser, host, quiet

NAME = "fleet"
MACHINE = {"memory": [{"size": "64MiB"}], "guest": {"workload": "random", "params": {"writes": 0, "spin": 5000}},
           "nice": 3}
_DEADLINE = 180.0


@contextlib.contextmanager
def cluster(nodes: int, folder: Path) -> Iterator[Any]:
    """Of Ray: a head without CPUs, and so many nodes."""
    os.environ.update(RAY_TMPDIR=str(folder), HOME=str(folder), RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                                                         "object_store_memory": 100 << 20})
    try:
        for number in range(nodes):
            runtime = folder / str(number)
            runtime.mkdir(mode=0o700)
            made.add_node(num_cpus=16, memory=8 << 30, object_store_memory=100 << 20,
                          env_vars={"XDG_RUNTIME_DIR": str(runtime)})
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


def processes(beginning: str, folder: Path) -> list[psutil.Process]:
    """Of this cluster, whose command line begins so."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(beginning) and \
                    process.environ().get("RAY_TMPDIR") == str(folder):
                found.append(process)
    return found


def pss(found: list[psutil.Process]) -> float:
    """MiB of each that has not ended meanwhile, mean."""
    sizes = []
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append(process.memory_full_info().pss / 2**20)
    return statistics.mean(sizes) if sizes else 0.0


def spent(process: psutil.Process) -> float:
    """Seconds of processor time so far, of the threads that it has."""
    return sum(int((task / "schedstat").read_text().split()[0])
               for task in Path(f"/proc/{process.pid}/task").iterdir()) / 1e9


def used(process: psutil.Process, seconds: float) -> float:
    """Of a core, over so many seconds."""
    before, began = spent(process), time.monotonic()
    time.sleep(seconds)
    return (spent(process) - before) / (time.monotonic() - began)


def renewals(manager: psutil.Process) -> float:
    """Of the fleet's actor, microseconds of processor time for each."""
    import ray

    actor = ray.get_actor("fleet", namespace="shardvmm")
    count, before = 5000, spent(manager)
    ray.get([actor.renew.remote("web-0", 1) for _ in range(count)])
    return (spent(manager) - before) * 1e6 / count


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    found = work()
    return time.monotonic() - began, found


def fleet_file(folder: Path, count: int) -> Path:
    (folder / "web.yaml").write_text(yaml.safe_dump(MACHINE))
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({
        "machines": [{"config": "web.yaml", "count": count}],
        "snapshots": {"directory": "chains", "every": "30s", "lease": "15s"}}))
    return path


def measure(nodes: int, count: int, seconds: float, folder: Path) -> dict[str, float]:
    from vmm.fleet.client import fleet_of
    from vmm.fleet.config import load_fleet

    found: dict[str, float] = {"nodes": nodes, "machines": count}
    with cluster(nodes, folder) as made, fleet_of(made.address, made=True) as client:
        client.overview()
        (manager,) = processes("ray::Fleet", folder)
        found["a renewal of a lease, many at once (CPU us)"] = renewals(manager)
        found["fleet's actor without machines (of a core)"] = used(manager, seconds)
        before = spent(manager)
        found["start (s)"], _ = timed(lambda: client.add(load_fleet(fleet_file(folder, count)), restored=False,
                                                         said=lambda text: None))
        residents = processes("ray::Resident", folder)
        found["start: fleet's actor, per machine (CPU ms)"] = (spent(manager) - before) * 1000 / count
        found["start: a machine's actor (CPU s)"] = statistics.mean(spent(each) for each in residents)
        before = spent(manager)
        found["list (ms)"] = statistics.median(timed(client.overview)[0] * 1000 for _ in range(10))
        found["list: fleet's actor, per machine (CPU ms)"] = (spent(manager) - before) * 100 / count
        found["PSS of a machine's actor (MiB)"] = pss(residents)
        found["PSS of the fleet's actor (MiB)"] = pss([manager])
        found["fleet's actor (of a core)"] = used(manager, seconds)
        found["a machine's actor (of a core)"] = statistics.mean(used(each, seconds / count) for each in residents)

        machines = client.overview()["machines"]
        node = machines[0]["node"]
        found["drain (s)"], moved = timed(lambda: client.drain(node, 2, lambda text: None))
        reports = [each["report"] for each in moved]
        found["moved"] = len(reports)
        found["migration (ms)"] = statistics.median(report["total_time"] for report in reports)
        found["stood still (ms)"] = statistics.median(report["downtime"] for report in reports)

        lost = next(each["node"] for each in client.overview()["machines"])
        gone = next(each for each in made.worker_nodes if each.node_id == lost)
        found["lost"] = sum(each["node"] == lost for each in client.overview()["machines"])
        began = time.monotonic()
        made.remove_node(gone, allow_graceful=False)

        def restored() -> bool:
            return all(each["state"] == "running" and each["node"] != lost for each in client.overview()["machines"])

        while not restored():
            if time.monotonic() > began + _DEADLINE:
                raise TimeoutError("the machines of the lost node were not restored")
            time.sleep(0.5)
        found["lost node to all restored (s)"] = time.monotonic() - began
        found["stop (s)"], _ = timed(lambda: client.stop([]))
    return found


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--machines", type=int, default=6)
    options = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        CONSOLE.print("skipped: Ray is not installed (pip install 'shardvmm[cluster]')")
        return
    quiet(options.patience)
    folder = Path(tempfile.mkdtemp(prefix="svb-", dir="/tmp"))      # short: sockets' paths are limited
    try:
        found = measure(3 if options.quick else options.nodes, 3 if options.quick else options.machines,
                        3.0 if options.quick else 20.0, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in found.items():
        CONSOLE.print(f"{name}: {value:,.3g}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "fleet.json").write_text(json.dumps({"host": host(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
