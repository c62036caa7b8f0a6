"""Metrics of real machines, as whoever asks for them gets them. The oracles are the machine's report, and the parsers
and conventions of Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import vmm, vmm_here
from exporting import TIMEOUT, Series, exporter, fetch, fetch_unix, parsed
from machines import ANY, spec, until
from places import TOP
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from vmm.client.machine import Machine
from vmm.errors import VmmError
from vmm.machine.runtime import is_running
from vmm.machine.spec import MachineSpec
from vmm.serve import endpoint
from vmm.serve.collector import MachineCollector
from vmm.serve.endpoint import Endpoint, Listening, parse_address
from vmm.serve.metrics import METRICS, table


@pytest.fixture(params=ANY)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def busy(accel: str, name: str = "t", **more: Any) -> MachineSpec:
    return spec("stamp", accel=accel, name=name, writes=0, spin=50, timeout=None, **{"mib": 4, **more})


def of(series: Series, machine: str, name: str, **labels: str) -> float | None:
    return series.get((name, frozenset({"machine": machine, **labels}.items())))


def gone(path: Path) -> bool:
    return not path.exists()


# --- what is said ---------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_report(accel: str) -> None:
    """Of a machine that stands still, so that both are of one moment."""
    with Machine.launch(busy(accel, log="always")) as machine, exporter("--listen", "0") as (url, _):
        machine.register("me")
        until(lambda: machine.take("me") > 100, "the guest writes")
        machine.dirty_limit(1000, 1)
        machine.pause()
        report, found = machine.status(), parsed(fetch(url))
        assert of(found, "t", "shardvmm_machine_up") == 1
        assert of(found, "t", "shardvmm_machine_paused") == 1
        assert of(found, "t", "shardvmm_machine_logging") == 1
        assert of(found, "t", "shardvmm_machine_vcpus", state="paused") == 2
        assert of(found, "t", "shardvmm_machine_vcpus", state="running") == 0
        assert of(found, "t", "shardvmm_machine_info", accelerator=accel, tracking="ring",
                  version=report["coordinator"]["program"]) == 1
        assert of(found, "t", "shardvmm_machine_dirtied_bytes_total") is None
        assert of(found, "t", "shardvmm_slot_size_bytes", slot="0") == report["slots"][0]["size"]
        assert of(found, "t", "shardvmm_reaper_interval_seconds") == report["reaper"]["interval_s"]
        assert of(found, "t", "shardvmm_reaper_reap_seconds_total") == report["reaper"]["microseconds"] / 1e6
        for vcpu in report["vcpus"]:
            index = str(vcpu["index"])
            assert of(found, "t", "shardvmm_vcpu_dirtied_bytes_total", vcpu=index) == vcpu["dirty_pages"] * 4096
            assert of(found, "t", "shardvmm_vcpu_guest_entries_total", vcpu=index) == vcpu["guest_entries"]
            assert of(found, "t", "shardvmm_vcpu_stalled_seconds_total", vcpu=index) == vcpu["stalled_s"]
            assert of(found, "t", "shardvmm_vcpu_ring_fill_ratio", vcpu=index) == vcpu["ring_used"] / 4096
        assert of(found, "t", "shardvmm_vcpu_dirty_limit_bytes_per_second", vcpu="0") is None
        assert of(found, "t", "shardvmm_vcpu_dirty_limit_bytes_per_second", vcpu="1") == 1000 * 4096


def test_a_scrape_changes_nothing_and_with_dirty_rate_it_measures(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine:
        before = machine.ram(0).copy()
        with exporter("--listen", "0") as (url, _):
            until(lambda: bool((machine.ram(0) != before).any()), "the guest writes")
            for _ in range(3):
                found = parsed(fetch(url))
            assert (machine.status()["logging"], machine.status()["clients"]) == (False, [])
            assert of(found, "t", "shardvmm_vcpu_dirtied_bytes_total", vcpu="0") == 0
        with exporter("--listen", "0", "--dirty-rate") as (url, _):
            def measured() -> float:
                return of(parsed(fetch(url)), "t", "shardvmm_machine_dirtied_bytes_total") or 0.0

            until(lambda: measured() > 0, "it is measured")
            first = measured()
            until(lambda: measured() > first, "it grows")
        until(lambda: machine.status()["clients"] == [], "the client goes with the exporter")


def test_names_types_and_labels_are_those_of_the_table(accel: str) -> None:
    """In both formats; and all that the documentation lists."""
    with Machine.launch(busy(accel)), exporter("--listen", "0") as (url, _):
        text, open_text = fetch(url), fetch(url, "application/openmetrics-text")
    assert open_text.endswith("# EOF\n")
    families = {f.name: f for f in openmetrics_families(open_text)}
    assert families.keys() == {m.name for m in METRICS}
    for metric in METRICS:
        assert (families[metric.name].type, families[metric.name].documentation) == (metric.kind, metric.help)
        for sample in families[metric.name].samples:
            assert sample.name == metric.full_name
            assert sample.labels.keys() == {"machine", *metric.labels}
    assert {name for name, _ in parsed(text)} <= {m.full_name for m in METRICS}


def test_the_documentation_has_the_table_of_the_code() -> None:
    """Made by: python -c "from vmm.serve.metrics import table; print(table(), end='')\""""
    assert (TOP / "docs" / "metrics.md").read_text().endswith("\n\n" + table())


def test_names_follow_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming/ (promtool checks more of it)."""
    for metric in METRICS:
        assert re.fullmatch(r"shardvmm(_[a-z]+)+", metric.name)
        assert not metric.name.endswith(("_total", "_info", "_count", "_sum", "_bucket", "_created"))
        assert not re.search(r"(milli|micro|nano|kilo|mega|pages|_ms|_us|percent)", metric.name)
        assert metric.help.endswith(".")
    assert len({m.name for m in METRICS}) == len(METRICS)


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    done = vmm_here("exporter", "--dashboard")
    dashboard = json.loads(done.stdout)
    shown = set(re.findall(r"shardvmm_\w+", json.dumps([p["targets"] for p in dashboard["panels"]])))
    assert shown
    assert shown <= {m.full_name for m in METRICS}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({p["id"] for p in dashboard["panels"]}) == len(places)


# --- which machines -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_all_machines_are_served_and_those_that_have_ended_no_longer() -> None:
    machines = [busy("unicorn", "one", vcpus=1), busy("unicorn", "two", vcpus=1)]
    with exporter("--listen", "0") as (url, _):
        assert not parsed(fetch(url))
        with Machine.launch(machines[0]) as one, Machine.launch(machines[1]):
            assert {dict(labels)["machine"] for _, labels in parsed(fetch(url))} == {"one", "two"}
            one.close()
            assert {dict(labels)["machine"] for _, labels in parsed(fetch(url))} == {"two"}
        assert not parsed(fetch(url))


def test_a_machine_that_does_not_answer_is_down_and_the_others_are_not() -> None:
    with Machine.launch(busy("unicorn", "one", vcpus=1)) as one, Machine.launch(busy("unicorn", "two", vcpus=1)), \
            exporter("--listen", "0") as (url, _):
        pid = one.status()["coordinator"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            found = parsed(fetch(url))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert of(found, "one", "shardvmm_machine_up") == 0
        assert of(found, "two", "shardvmm_machine_up") == 1
        assert {name for name, labels in found if ("machine", "one") in labels} == {"shardvmm_machine_up"}
        until(lambda: of(parsed(fetch(url)), "one", "shardvmm_machine_up") == 1, "it answers again")


@pytest.mark.parametrize("scrapes", [0, 2], ids=["when it would be registered", "when it would be flushed"])
def test_one_that_stands_still_does_not_hold_up_the_others(scrapes: int) -> None:
    """Prometheus waits for 10 s. And once it answers, one client is there for the exporter, which goes with it."""
    with Machine.launch(busy("unicorn", "one", vcpus=1)) as one, \
            Machine.launch(busy("unicorn", "two", vcpus=1)) as two, \
            exporter("--listen", "0", "--dirty-rate") as (url, process):
        pid = one.status()["coordinator"]["pid"]
        for _ in range(scrapes):
            fetch(url)
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(2):
                found = parsed(fetch(url, seconds=10.0))
                assert [of(found, name, "shardvmm_machine_up") for name in ("one", "two")] == [0, 1]
            assert two.status()["clients"]
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: of(parsed(fetch(url)), "one", "shardvmm_machine_up") == 1, "it answers again")
        assert len(one.status()["clients"]) == 1
        process.terminate()
        process.wait(TIMEOUT)
        until(lambda: one.status()["clients"] == [], "the client goes with the exporter")


def test_a_machine_that_has_anothers_name_is_another() -> None:
    with contextlib.closing(MachineCollector(dirty_rate=True)) as collector:
        def dirtied() -> float | None:
            values = {s.name: s.value for family in collector.collect() for s in family.samples}
            return values.get("shardvmm_machine_dirtied_bytes_total")

        for pages in (7, 3):
            with Machine.launch(busy("unicorn", vcpus=1)) as machine:
                machine.pause()
                until(lambda: dirtied() == 0, "it is measured from here on")
                machine.write(0x10_0000, bytes(4096 * pages))
                assert dirtied() == pages * 4096


def test_the_exporter_of_a_machine_ends_with_it(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine, exporter("t", "--listen", "0", status=0) as (url, process):
        assert of(parsed(fetch(url)), "t", "shardvmm_machine_up") == 1
        machine.close()
        process.wait(TIMEOUT)


def test_a_closed_collector_has_let_go_of_its_machines(accel: str) -> None:
    """And two that ask at once get whole answers."""
    with Machine.launch(busy(accel)) as machine:
        collector = MachineCollector(dirty_rate=True)
        assert [f for f in collector.collect() if f.samples]
        assert len(machine.status()["clients"]) == 1
        collector.close()
        collector.close()
        assert machine.status()["clients"] == []
        assert not [f for f in collector.collect() if f.samples]


# --- where ----------------------------------------------------------------------------------------------------------


def test_a_unix_socket_is_the_users_alone_and_goes(runtime_dir: Path, accel: str) -> None:
    """Also where one that was killed has left it."""
    path = runtime_dir / "metrics"
    with Machine.launch(busy(accel)):
        with exporter("--listen", f"unix:{path}", status=-signal.SIGKILL) as (where, process):
            assert where == f"unix:{path}"
            found = path.stat()
            assert stat.S_ISSOCK(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == 0o600
            assert of(parsed(fetch_unix(str(path))), "t", "shardvmm_machine_up") == 1
            assert "another program is already listening" in vmm("exporter", "--listen", f"unix:{path}").stderr
            process.kill()
        assert path.exists()
        with exporter("--listen", f"unix:{path}"):
            assert of(parsed(fetch_unix(str(path))), "t", "shardvmm_machine_up") == 1
        assert gone(path)
        path.write_text("not a socket")
        assert vmm("exporter", "--listen", f"unix:{path}").returncode == 2
        assert path.read_text() == "not a socket"
        path.unlink()


@pytest.mark.parametrize(("text", "shown"), [
    ("9853", "http://127.0.0.1:9853/metrics"), ("localhost:1", "http://localhost:1/metrics"),
    ("[::1]:80", "http://[::1]:80/metrics"), (":80", "http://:80/metrics"), ("unix:/a/b", "unix:/a/b")])
def test_addresses(text: str, shown: str) -> None:
    address = parse_address(text)
    assert address.shown == shown
    assert parse_address(address.text) == address


@pytest.mark.parametrize("text", ["", "x", "unix:", "unix:/" + "a" * 200, "1:2:3", "99999", "a b:1", "-1", "http://a:1"])
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(VmmError) as caught:
        parse_address(text)
    assert "\n" not in str(caught.value)


def test_a_host_that_can_be_no_name_is_said() -> None:
    done = vmm_here("exporter", "--listen", "a..b:1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "http://a..b:1/metrics: cannot listen there: not a valid host name" in done.stderr


class Served(MachineCollector):
    """Of no machine: it gives what the test says."""

    families: list[Any]

    def collect(self) -> Iterator[Any]:
        if not self.families:
            raise ValueError("a\nb")
        return iter(self.families)


@contextlib.contextmanager
def served(path: Path, families: list[Any]) -> Iterator[Callable[[], socket.socket]]:
    """Gives connections to it. No thread of it is left."""
    collector = Served([])
    collector.families = families
    before = set(threading.enumerate())
    with Endpoint(Listening(parse_address(f"unix:{path}")), collector), contextlib.ExitStack() as stack:
        def connected() -> socket.socket:
            found = stack.enter_context(socket.socket(socket.AF_UNIX))
            found.settimeout(TIMEOUT)
            found.connect(str(path))
            return found

        yield connected
        until(lambda: len(set(threading.enumerate()) - before) == 1, "all requests are over")     # its own is left


def test_what_goes_wrong_is_one_line(runtime_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with served(runtime_dir / "metrics", []) as connected:
        client = connected()
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with client.makefile("rb") as file:
            answer = file.read()
    assert b" 500 " in answer.splitlines()[0]
    assert capfd.readouterr().err == "vmm: error: metrics: ValueError: a\\nb (this is a bug)\n"


def test_a_client_that_does_not_take_its_answer_is_nobodys_affair(
        runtime_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.2)
    long = GaugeMetricFamily("long", "x" * (4 << 20))
    with served(runtime_dir / "metrics", [long]) as connected:
        connected().sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert capfd.readouterr().err == ""


def test_a_client_has_so_long_for_all_of_its_request(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it says something."""
    monkeypatch.setattr(endpoint._Handler, "timeout", 2 * TIMEOUT)
    monkeypatch.setattr(endpoint, "_REQUEST", 0.2)
    with served(runtime_dir / "metrics", []) as connected:
        client = connected()
        client.sendall(b"GET /met")
        assert client.recv(1) == b""


def test_so_many_clients_are_served_at_once_and_the_next_is_hung_up_on(
        runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_CLIENTS", 2)
    with served(runtime_dir / "metrics", [GaugeMetricFamily("one", "x")]) as connected:
        first, second = connected(), connected()        # they say nothing
        assert connected().recv(1) == b""
        first.close()

        def answered() -> bool:
            client = connected()
            with contextlib.suppress(ConnectionError):      # it was too early
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                return b" 200 " in client.recv(100)
            return False

        until(answered, "there is room for another")
        second.close()


def test_every_address_of_the_host_is_both_kinds() -> None:
    with exporter("--listen", ":0") as (url, _):
        port = int(url.rpartition(":")[2].partition("/")[0])
        for host in ["127.0.0.1", *(["[::1]"] if has_ipv6() else [])]:
            fetch(f"http://{host}:{port}/metrics")


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


# --- with a launch ----------------------------------------------------------------------------------------------------


CONFIG = "vcpus: 1\naccel: unicorn\nmemory: [{size: 4MiB}]\nguest: {workload: random, params: {writes: 0}}\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "m.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_a_machine_in_the_foreground_serves_until_it_ends(config: str, runtime_dir: Path) -> None:
    path = runtime_dir / "metrics"
    process = subprocess.Popen([sys.executable, "-m", "vmm", "launch", config, "--metrics", f"unix:{path}",
                                "--dirty-rate"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def measured() -> bool:
        with contextlib.suppress(OSError):
            return bool(of(parsed(fetch_unix(str(path))), "m", "shardvmm_machine_dirtied_bytes_total"))
        return False

    until(measured, "it is measured")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (128 + signal.SIGINT, "")
    assert gone(path)


def test_a_detached_machine_serves_until_it_ends(config: str, runtime_dir: Path) -> None:
    """By a process that goes with it (tests/conftest.py looks for it)."""
    path = runtime_dir / "metrics"
    done = vmm("launch", config, "--detach", "--metrics", f"unix:{path}")
    assert done.returncode == 0, done.stderr
    assert of(parsed(fetch_unix(str(path))), "m", "shardvmm_machine_up") == 1
    assert vmm("stop", "m").returncode == 0
    until(lambda: gone(path), "its socket goes")


def test_a_detached_machine_that_ends_at_once_leaves_no_socket(tmp_path: Path, runtime_dir: Path) -> None:
    """Before the process that is to serve has begun to look for it."""
    config, path = tmp_path / "m.yaml", runtime_dir / "metrics"
    config.write_text("vcpus: 1\naccel: unicorn\nmemory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    assert vmm("launch", str(config), "--detach", "--metrics", f"unix:{path}").returncode == 0
    until(lambda: gone(path), "its socket goes")


def test_a_port_in_use_is_said_before_anything_is_started(config: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = vmm("launch", config, "--metrics", str(port))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"127.0.0.1:{port}" in done.stderr
        assert "in use" in done.stderr
        assert not is_running("m")
    assert vmm("launch", config, "--dirty-rate").returncode == 2


@pytest.mark.long
def test_who_does_not_speak_http_disturbs_nobody(accel: str) -> None:
    with Machine.launch(busy(accel)), exporter("--listen", "0") as (url, _):
        port = int(url.rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as silent, \
                socket.create_connection(("127.0.0.1", port)) as rude:
            silent.sendall(b"GET /met")
            rude.sendall(bytes(range(256)) * 16 + b"\n\n")
            rude.close()
            assert of(parsed(fetch(url)), "t", "shardvmm_machine_up") == 1
