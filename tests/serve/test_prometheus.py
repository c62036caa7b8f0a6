"""A real Prometheus, from its Debian package, scrapes a real machine and is asked by its own queries."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exporting import TIMEOUT, exporter, fetch
from machines import spec, until

from vmm.client.machine import Machine
from vmm.serve.metrics import METRICS

pytestmark = pytest.mark.prometheus

DASHBOARD = Path(__file__).parents[2] / "vmm" / "serve" / "dashboard.json"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """It scrapes ``target`` twice a second; the address of its API."""
    config = folder / "prometheus.yml"
    config.write_text(json.dumps({"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
                                  "scrape_configs": [{"job_name": "shardvmm",
                                                      "static_configs": [{"targets": [target]}]}]}))
    checked = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True,
                             timeout=TIMEOUT, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    port = free_port()
    log = (folder / "log").open("w")
    process = subprocess.Popen(["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                                f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(OSError):
            return "Ready" in fetch(f"http://127.0.0.1:{port}/-/ready")
        return False

    try:
        until(ready, "Prometheus is ready", TIMEOUT)
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        log.close()
        process.terminate()
        process.wait(TIMEOUT)


def query(api: str, text: str) -> list[dict[str, Any]]:
    """Its result. An error in the query fails the test."""
    try:
        answer = json.loads(fetch(f"{api}/query?{urllib.parse.urlencode({'query': text})}"))
    except urllib.error.HTTPError as exc:
        raise AssertionError(f"{text}: {exc.read().decode()}") from None
    assert answer["status"] == "success", answer
    assert not answer.get("warnings"), answer
    return list(answer["data"]["result"])


def value(api: str, text: str) -> float:
    """Of one series; NaN where there is none yet."""
    found = query(api, text)
    return float(found[0]["value"][1]) if found else float("nan")


def becomes(api: str, text: str, expected: Callable[[float], bool] | float) -> None:
    """A scrape may come too late on a busy host: then there is nothing until the next."""
    holds = expected if callable(expected) else lambda found: found == expected
    until(lambda: holds(value(api, text)), text, TIMEOUT)


def test_it_scrapes_a_machine_and_answers_questions_about_it(tmp_path: Path) -> None:
    busy = spec("stamp", accel="unicorn", writes=0, spin=50, timeout=None, mib=4)
    with Machine.launch(busy) as machine, exporter("--listen", "0", "--dirty-rate") as (url, _):
        machine.dirty_limit(100_000)
        target = url.removeprefix("http://").removesuffix("/metrics")
        with prometheus(target, tmp_path) as api:
            rate = 'rate(shardvmm_machine_dirtied_bytes_total{machine="t"}[3s])'
            becomes(api, rate, lambda found: found > 0)
            becomes(api, "up", 1)
            becomes(api, "sum(rate(shardvmm_vcpu_guest_entries_total[3s])) > bool 0", 1)
            becomes(api, "count(shardvmm_vcpu_dirty_limit_bytes_per_second)", 2)
            becomes(api, 'shardvmm_slot_size_bytes{slot="0"}', machine.status()["slots"][0]["size"])
            becomes(api, "sum(shardvmm_machine_vcpus)", 2)
            names = json.loads(fetch(f"{api}/label/__name__/values"))["data"]
            known = {name for name in names if name.startswith("shardvmm")}
            assert len(METRICS) // 2 < len(known)
            assert known <= {m.full_name for m in METRICS}
            # Type and help have come through as they were meant. (An info is a gauge in the text format.)
            told = json.loads(fetch(f"{api}/metadata"))["data"]
            for metric in METRICS:
                found = told.get(metric.full_name) or told[metric.name]
                assert (found[0]["type"], found[0]["help"]) in (
                    (metric.kind, metric.help), ("gauge" if metric.kind == "info" else metric.kind, metric.help))
            for panel in json.loads(DASHBOARD.read_text())["panels"]:
                for each in panel["targets"]:
                    query(api, each["expr"].replace("$machine", ".*").replace("$__rate_interval", "3s"))
            # A machine that stands still dirties nothing, and one that has ended is no longer there.
            machine.pause()
            becomes(api, rate, 0)
            machine.close()
            until(lambda: not query(api, 'shardvmm_machine_up{machine="t"}'), "it is gone", TIMEOUT)


def test_promtool_finds_nothing_to_object_to() -> None:
    """Of a machine, and of all metrics that it may ever have: each in the text format, with one series."""
    with Machine.launch(spec("stamp", accel="unicorn", writes=0, timeout=None)), \
            exporter("--listen", "0", "--dirty-rate") as (url, _):
        text = fetch(url)
    lines = []
    for metric in METRICS:
        labels = ",".join(f'{each}="0"' for each in ("machine", *metric.labels))
        lines.append(f"# HELP {metric.full_name} {metric.help}\n"
                     f"# TYPE {metric.full_name} {'gauge' if metric.kind == 'info' else metric.kind}\n"
                     f"{metric.full_name}{{{labels}}} 1\n")
    for each in (text, "".join(lines)):
        done = subprocess.run(["promtool", "check", "metrics"], input=each, capture_output=True, text=True,
                              timeout=TIMEOUT, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stdout + done.stderr
