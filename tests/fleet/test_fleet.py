"""A fleet: its file, one of its machines by itself, and all of it on several Ray nodes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import vmm
from machines import ANY, nothing_left, runs, until
from places import TESTS

from ipc.shm import list_segments
from vmm.client.machine import Machine
from vmm.client.yamlfile import ConfigError
from vmm.consumers.snapshot import list_snapshots
from vmm.errors import VmmError
from vmm.fleet.config import load_fleet
from vmm.fleet.lease import Lease
from vmm.fleet.resident import Resident
from vmm.machine.names import scope_prefix
from workers.accel import registry

RAY = [pytest.mark.ray, pytest.mark.timeout(600)]
ACCEL = "unicorn" if registry.available("kvm").reason else "kvm"


def fleet_file(folder: Path, *, accel: str = ACCEL, name: str = "fleet.yaml", snapshots: bool = True,
               **entry: Any) -> Path:
    """Of guests that raise the first word of random pages for ever, slowly."""
    machine = {"accel": accel, "memory": [{"size": "16MiB"}], "nice": 3,
               "guest": {"workload": "random", "params": {"writes": 0, "spin": 5000}}}
    (folder / "web.yaml").write_text(yaml.safe_dump(machine))
    document: dict[str, Any] = {"machines": [{"config": "web.yaml", "count": 4, **entry}]}
    if snapshots:
        document["snapshots"] = {"directory": "chains", "every": "1s", "keep": 3, "lease": "15s"}
    path = folder / name
    path.write_text(yaml.safe_dump(document))
    return path


# --- the file --------------------------------------------------------------------------------------------------


def test_a_file_says_each_machine(tmp_path: Path) -> None:
    path = fleet_file(tmp_path, spread="apart", set=["vcpus=2"])
    found = load_fleet(path)
    assert [each.name for each in found] == ["web-0", "web-1", "web-2", "web-3"]
    assert {each.group for each in found} == {"web"}
    assert {(each.cpus, each.spread, each.config.vcpus) for each in found} == {(2.0, "apart", 2)}
    assert [each.config.name for each in found] == [each.name for each in found]
    assert all(each.memory > 16 << 20 for each in found)
    assert found[1].snapshots is not None
    assert found[1].snapshots.directory == tmp_path / "chains" / "web-1"
    (alone,) = load_fleet(fleet_file(tmp_path, count=None, name="one.yaml", cpus=0.5, snapshots=False))
    assert (alone.name, alone.cpus, alone.snapshots) == ("web", 0.5, None)


@pytest.mark.parametrize(("document", "error"), [
    ({}, "fleet.yaml:1:1: machines: missing"),
    ({"machines": []}, "fleet.yaml:1:1: machines: List should have at least 1 item after"),
    ({"machines": [{"config": "web.yaml", "count": 0}]}, "machines.0.count: input should be greater than or equal"),
    ({"machines": [{"config": "web.yaml", "spred": "even"}]}, "unknown key (did you mean 'spread'?)"),
    ({"machines": [{"config": "web.yaml"}, {"config": "web.yaml"}]},
     "fleet.yaml:3:3: machines.1: there is a machine 'web' already"),
    ({"machines": [{"config": "web.yaml", "set": ["vcpus=0"]}]}, "--set vcpus=0: vcpus: input should be greater"),
    ({"machines": [{"config": "web.yaml", "name": "x" * 31, "count": 2}]}, "fleet.yaml:2:3: machines.0: "),
    ({"machines": [{"config": "web.yaml"}], "snapshots": {"directory": "chains", "lease": "5s"}},
     "snapshots.lease: input should be greater than or equal"),
    ({"machines": [{"config": "none.yaml"}]}, "none.yaml: ")])
def test_what_is_wrong_with_a_file_is_said_with_its_place(document: Any, error: str, tmp_path: Path) -> None:
    fleet_file(tmp_path)
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError) as caught:
        load_fleet(tmp_path / "fleet.yaml")
    assert error in str(caught.value)


def test_a_cluster_that_ends_with_the_command_is_refused(tmp_path: Path) -> None:
    done = vmm("fleet", str(fleet_file(tmp_path)), "--cluster", "local")
    assert done.returncode == 2
    assert done.stderr == ("vmm: error: --cluster local: it would end with this command; ray start --head starts one "
                           "that stays\n")


# --- one machine, without Ray ------------------------------------------------------------------------------------


def granted(name: str, generation: int, timeout: float) -> bool:
    return True


@pytest.mark.parametrize("how", ["refused", "raises", "hangs"])
def test_a_lease_is_over_when_it_is_not_renewed_and_not_before(how: str) -> None:
    cut, over, end = threading.Event(), threading.Event(), threading.Event()
    asked: list[float] = []

    def ask(timeout: float) -> bool:
        if not cut.is_set():
            asked.append(time.monotonic())
            return True
        if how == "hangs":
            end.wait(60.0)
        if how == "raises":
            raise RuntimeError
        return False

    lease = Lease(4.0, ask, over.set)
    try:
        assert lease.wait()
        until(lambda: len(asked) > 2, "it is renewed")
        assert not over.is_set()
        cut.set()
        assert over.wait(60.0)
        assert time.monotonic() > asked[-1] + 3.0
    finally:
        end.set()
        lease.give_up()


def test_a_lease_that_is_given_up_is_not_over() -> None:
    over = threading.Event()
    lease = Lease(0.1, lambda timeout: False, over.set)
    assert not lease.wait()
    lease.give_up()
    assert not over.is_set()


@pytest.mark.parametrize("accel", ANY)
def test_a_machine_goes_on_from_its_last_snapshot(accel: str, tmp_path: Path) -> None:
    """And its chain with it, which is kept short."""
    (wanted, *_) = load_fleet(fleet_file(tmp_path, accel=accel, count=1))
    assert wanted.snapshots is not None
    chain = wanted.snapshots.directory
    first = Resident(wanted, 1, granted)
    assert first.launch()["accelerator"] == accel
    first.keep()
    assert first.ended(0.01) is None
    with Machine.attach("web-0") as machine:
        machine.write((4 << 20) + 2048, b"only this one")
    begun = len(list_snapshots(chain)) if chain.exists() else 0
    until(lambda: chain.exists() and len(list_snapshots(chain)) >= begun + 2, "snapshots", 60.0)
    assert first.status(0.1)["pages_per_s"] > 0
    assert first.status()["snapshot"]["error"] == ""
    first.stop()
    ended = first.ended(0.0)
    assert ended is not None
    assert ended["report"]["state"] == "ended"
    assert not ended["moved"]
    assert nothing_left("web-0")

    again = Resident(wanted, 2, granted)
    with pytest.raises(VmmError, match="has snapshots of an earlier machine: --restore goes on with them"):
        again.launch()
    newest = list_snapshots(chain)[-1].id
    assert again.restore()["id"] == newest
    with Machine.attach("web-0") as machine:
        assert machine.read((4 << 20) + 2048, 13) == b"only this one"
        assert runs(machine)
    again.keep()
    until(lambda: int(list_snapshots(chain)[-1].id) >= int(newest) + 4, "more snapshots", 60.0)
    again.stop()
    assert nothing_left("web-0")
    found = list_snapshots(chain)
    assert len(found) <= wanted.snapshots.keep + 1      # merged
    assert sum(each.parent is None for each in found) == 1


# --- on several nodes ----------------------------------------------------------------------------------------------


@pytest.fixture
def node_folders(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its logs and its token; and afterwards nothing is left of any node's machines."""
    with tempfile.TemporaryDirectory(prefix="svr-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("HOME", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield Path(folder)
    for number in range(3):
        if (node := Path(f"{runtime_dir}-{number}")).exists():
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(node))
            vmm("gc")       # Ray kills the children of a lost node's actors, who may be cleaning up
            left = [str(path) for path in node.rglob("*")] + list_segments(scope_prefix())
            shutil.rmtree(node)
            assert not left


def on_nodes(what: str, directory: Path) -> Any:
    """What the function ``what`` of fleet_nodes.py found."""
    folders = [str(TESTS / "fleet"), str(TESTS / "lab")]
    done = subprocess.run([sys.executable, f"{folders[0]}/fleet_nodes.py", what, str(directory)], check=False,
                          capture_output=True, text=True, timeout=560,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("node_folders")
class TestOnNodes:
    """Of a cluster on this machine; migrations between them are real."""

    pytestmark = RAY

    def test_machines_are_spread_and_moved_and_survive_a_node(self, tmp_path: Path) -> None:
        fleet_file(tmp_path)
        found = on_nodes("life", tmp_path)
        names = [f"web-{number}" for number in range(4)]
        assert sorted(found["started"]) == names
        counts = sorted(list(found["started"].values()).count(node) for node in found["nodes"])
        assert counts == [1, 1, 2]
        assert all(rate > 0 for rate in found["rates"].values())
        assert [sorted(each) for each in found["watched"]] == [names, names]

        going = sorted(name for name, node in found["started"].items() if node == found["drained"])
        assert sorted(each["name"] for each in found["moved"]) == going
        assert all(each["report"]["status"] == "completed" for each in found["moved"])
        for name, node in found["after_drain"].items():
            assert (node == found["started"][name]) == (name not in going)
            assert node != found["drained"]
        assert found["kept"] == dict.fromkeys(names, True)
        assert found["left_there"] == []

        for name, node in found["after_loss"].items():
            assert node not in (found["lost"], found["drained"])
            if found["after_drain"][name] != found["lost"]:
                assert node == found["after_drain"][name]
        assert found["restored"] == dict.fromkeys(names, True)
        (said,) = [text for text in found["events"] if text.startswith("node ") and " is lost, with " in text]
        assert found["lost"][:6] in said
        assert "web-0" in said
        assert sorted(found["stopped"]) == names
        assert found["no_fleet"].endswith("has no fleet: vmm fleet FILE starts one\n")

    def test_a_node_that_is_cut_off_runs_no_machine_beside_the_restored_one(self, tmp_path: Path) -> None:
        """Its raylet stands still, so that Ray takes it for lost; its actors and machines do not."""
        fleet_file(tmp_path, count=1)
        found = on_nodes("cut_off", tmp_path)
        assert found["both"] == 0
        assert found["machine"]["node"] != found["first"]
        assert found["machine"]["detail"].startswith("from snapshot 00")
        assert any(text.startswith("node ") and text.endswith("is lost, with web-0") for text in found["events"])
        assert "has snapshots of an earlier machine: --restore goes on with them" in found["refused"]
        assert found["again"]

    def test_a_machine_survives_the_loss_of_either_end_of_its_move(self, tmp_path: Path) -> None:
        fleet_file(tmp_path, count=1, set=["memory.0.size=256MiB", "guest.params.spin=0"])
        found = on_nodes("mid_move", tmp_path)
        assert found["target: drain"] == 9
        assert found["target: node"] == found["source"]     # it never left
        assert found["target: running"] == [found["source"]]
        assert found["target: kept"]
        assert found["source: node"] not in (found["source"], found["target: target"])
        assert found["source: running"] == [found["source: node"]]
        assert found["source: kept"]

    def test_a_move_survives_who_has_asked_for_it_and_the_fleets_process(self, tmp_path: Path) -> None:
        """And the machine its actor's."""
        path = fleet_file(tmp_path, count=1, set=["memory.0.size=256MiB"])
        path.write_text(path.read_text() + "insecure: true\n")
        found = on_nodes("orphaned", tmp_path)
        assert found["drain"] == 128 + signal.SIGINT
        assert found["moves"]
        assert found["node"] == found["target"]
        assert found["running"] == [found["target"]]
        assert found["kept"]
        assert found["restored"]
        assert set(found["nodes"].values()) == {"alive", "drained"}
        assert found["nodes"][found["target"]] == "alive"

    def test_the_fleet_survives_its_own_process_and_says_what_it_cannot(self, tmp_path: Path) -> None:
        fleet_file(tmp_path, count=2, spread="apart", snapshots=False)
        fleet_file(tmp_path, count=2, name="large.yaml", snapshots=False, cpus=5, **{"set": []})
        text = yaml.safe_load((tmp_path / "large.yaml").read_text())
        text["machines"][0]["name"] = "large"
        (tmp_path / "large.yaml").write_text(yaml.safe_dump(text))
        found = on_nodes("manager", tmp_path)
        assert len(set(found["started"].values())) == 2
        assert found["adopted"] == found["started"]
        assert "machine 'web-0' is one of the fleet's already" in found["refused"]
        assert "no node has room for 'large-0': 5 CPUs" in found["too_large"]
        assert found["ended"]["report"]["state"] == "ended"
        assert found["ended"]["detail"].endswith("(exit code 8)")
        (one,) = found["undrained"]     # the other node has one of its kind
        assert one["error"].startswith("no node that has none of its kind has room for 'web-1'")
        (one,) = found["drained"]       # which has ended
        assert one["report"]["status"] == "completed"
        assert sorted(found["stopped"]) == ["web-0", "web-1"]
