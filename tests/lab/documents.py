"""Results of each kind, as the verbs write them, for what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vmm.consumers.events.event import Event
from vmm.consumers.events.lines import json_line
from vmm.consumers.workingset import Recording

__all__ = ["EVENTS", "MACHINE", "MIGRATION", "PREDICTION", "comparison", "events", "recording", "sweep", "write_all"]


def _vcpu(index: int, **more: Any) -> dict[str, Any]:
    return {"index": index, "pid": 100 + index, "accelerator": "kvm", "state": "exited", "exit_reason": "code",
            "exit_code": 0, "detail": "", "registers": None, "dirty_pages": 50_000, "ring_full_exits": 25, "resets": 30,
            "reset_s": 0.01, "ring_rebuilds": 0, "bad_entries": 0, "guest_entries": 90, "guest_s": 1.5,
            "stalled_s": 0.5, "dirty_limit_pages_per_s": 0, "throttled_s": 0.0, **more}


MACHINE: dict[str, Any] = {
    "version": 1, "name": "alpha", "state": "ended", "elapsed_s": 2.5, "exit_code": 0, "cause": "every vCPU ended",
    "ended_at": "2026-03-01T09:15:02+00:00", "accelerator": "kvm", "tracking": "ring", "tracking_asked": "ring",
    "tracking_switches": 0, "logging": True, "ring_entries": 1024, "can_limit": True,
    "coordinator": {"pid": 99, "restarts": 0, "turns": 5, "bad_messages": 0, "program": "0"},
    "vcpus": [_vcpu(0), _vcpu(1, dirty_pages=9_999, stalled_s=0.0, ring_full_exits=0,
                              detail="<script>alert(1)</script>")],
    "reaper": {"mode": "fixed", "state": "WAIT", "iterations": 40, "pages": 59_999, "microseconds": 9000,
               "flushes": 3},
    "slots": [{"id": 0, "gpa": 0, "size": 64 << 20, "pages": 16384, "dirty": 7, "logged": True, "born": 1}],
    "clients": [], "holders": [], "handed_over": "", "incoming": False, "verification": {
        "rounds": 4, "checked_pages": 1, "dirty_pages": 2, "lost_pages": 0, "surplus_pages": 0, "excused_pages": 0,
        "injected": "none", "first_findings": [], "surplus_is_failure": True, "ok": True}, "program": None}

MIGRATION: dict[str, Any] = {
    "id": "x", "machine": "alpha", "target": "tcp://b:1", "status": "completed", "total_time": 3200.0,
    "setup_time": 40.0, "downtime": 120.0, "downtime_parts": {"pause": 5.0, "hand_over": 115.0},
    "expected_downtime": 100.0, "forecast": None, "settings": {"downtime": 300.0}, "compression": "none",
    "compression_ratio": 1.0,
    "ram": {"transferred": 400 << 20, "remaining": 0, "total": 256 << 20, "duplicate": 5, "normal": 100_000,
            "normal_bytes": 400 << 20, "dirty_sync_count": 3, "dirty_pages_rate": 9, "mbps": 900.0,
            "pages_per_second": 1, "page_size": 4096, "held": 0, "resent": 0, "postcopy_requests": 0,
            "postcopy_pages": 0},
    "rounds": [{"pages": 65536, "zero": 5, "seconds": 2.0, "transferred": 1, "left": 20_000, "dirtied": 10_000},
               {"pages": 20_000, "zero": 0, "seconds": 0.6, "transferred": 1, "left": 24_000, "dirtied": 40_000},
               {"pages": 24_000, "zero": 0, "seconds": 0.4, "transferred": 1, "left": 500, "dirtied": 1_250}],
    "throttled": {"0": 12.5}, "postcopy_blocktime": [], "postcopy_latency": {
        "pages": 30.0, "median_us": 210.0, "p99_us": 900.0, "max_us": 950.0, "upto_400_us": 20.0, "upto_1600_us": 10.0},
    "error": "", "warnings": [], "pid": 1, "pid_started": 1, "direction": "outgoing", "source": "",
    "began_at": "2026-03-01T09:15:02+00:00", "ended_at": "2026-03-01T09:15:06+00:00"}


def _cell(bandwidth: float, outcome: str, left: list[int]) -> dict[str, Any]:
    return {"bandwidth": bandwidth, "downtime_limit": 300.0, "outcome": outcome, "total": 4000.0, "downtime": 250.0,
            "transferred": 9 << 20, "pending": 0, "short": False, "throttled": {},
            "rounds": [{"pages": 9, "seconds": 1.0, "left": n, "dirtied": 5.0} for n in left]}


PREDICTION: dict[str, Any] = {
    "from": "alpha", "vcpus": 2, "seconds": 5.0, "memory": 64 << 20, "filled": 32 << 20,
    "grid": [_cell(125e6, "forced", [8000, 8100]), _cell(1.25e9, "converges", [800, 80, 8])], "least_bandwidth": 3e8,
    "least_bandwidths": [{"downtime_limit": 300.0, "bandwidth": 3e8}],
    "remedies": [{"what": "postcopy", "value": 0.0, **_cell(125e6, "postcopy", [9])}],
    "rings": [{"interval": 0.1, "median": 900, "most": 2000, "entries": 4096, "tracking": "ring"}]}


def sweep() -> dict[str, Any]:
    """results.json of vmm stress: two rings, three numbers of vCPUs."""
    names = ("pages_per_s", "stalled_percent", "ring_full_per_s", "flush_ms", "worst_flush_ms")
    rows = [{"point": {"accel": "replay", "workload": "zipf", "params": [], "ram": 64 << 20, "dirty_limit": None,
                       "ring": ring, "reaper": "adaptive", "vcpus": vcpus, "machines": 1, "repetition": 0},
             "repetitions": 2, "lost": 0, "surplus": 0, "rounds": 5, "error": "",
             **{which: dict.fromkeys(names, scale * vcpus) for which, scale in
                (("median", 10.0), ("least", 9.0), ("most", 12.0))}}
            for ring in (1024, 4096) for vcpus in (1, 2, 4)]
    return {"version": 1, "complete": True, "host": {"cpu": "a CPU", "cores": 2, "memory_mib": 4096, "kernel": "6",
                                                     "python": "3", "shardvmm": "0"},
            "sweep": {}, "lost_pages": 0, "surplus_pages": 0, "summary": rows, "results": [],
            "model": [{"accel": "replay", "quantity": "flush", "unit": "us", "r2": 0.9, "points": 6,
                       "terms": [{"name": "constant", "value": 3.0, "error": 0.1}]}]}


def comparison() -> dict[str, Any]:
    """results.json of vmm compare: two modes at two points."""
    def window(mode: str, speed: float, collect: list[float]) -> dict[str, Any]:
        return {"mode": mode, "round": 0, "speed": speed, "seconds": 0.5, "pages": 1000, "syncs": len(collect),
                "host_ns": 2_000_000, "steal_ns": 0, "collect_ms": collect, "switch_ms": 4.0, "tracking": mode}

    return {"version": 2, "settings": {"accel": "kvm", "workload": "random", "rounds": 1, "seconds": 0.5},
            "points": {f"64 MiB, {n} vCPU{'s' if n > 1 else ''}, spin 0, ring 4096, every 100 ms: none, ring, bitmap": [
                window("none", 1000, []), window("ring", 500, [1.0, 2.0]), window("bitmap", 800, [3.0])]
                for n in (1, 2)}}


def recording() -> Recording:
    """Twenty intervals of a walk through two slots."""
    n = 20
    return Recording(np.arange(n + 1) * 0.1, np.full((n, 2), 50, np.int64), [(0, 0, 4096), (1, 1 << 30, 1024)],
                     {0: np.concatenate([np.arange(i * 100, i * 100 + 80) for i in range(n)]).astype(np.uint32),
                      1: np.arange(n, dtype=np.uint32)},
                     {0: np.arange(n + 1) * 80, 1: np.arange(n + 1)})


def events() -> list[Event]:
    """Three rounds: vCPU 0 fills its ring and stalls, the reaper comes; vCPU 1 is paused at the end."""
    found = []
    for at in (1.0, 2.0, 3.0):
        found += [Event(at=at, source="vcpu0", name="kvm_dirty_ring_full", fields={"id": 0}),
                  Event(at=at + 0.1, source="coordinator", name="kvm_dirty_ring_reap_vcpu",
                        fields={"id": 0, "count": 448, "outstanding": 448}),
                  Event(at=at + 0.2, source="coordinator", name="reset", took=0.05, fields={"entries": 448}),
                  Event(at=at + 0.21, source="coordinator", name="kvm_dirty_ring_reap", took=0.2,
                        fields={"count": 448, "t": 200_000, "next_us": 1000}),
                  Event(at=at + 0.25, source="vcpu0", name="stall", took=0.25)]
    return [*found, Event(at=3.5, source="vcpu1", name="pause-begin"),
            Event(at=4.0, source="client77", name="verb", took=0.01, fields={"verb": "sync", "pid": 77})]


EVENTS = "".join(json_line(event, 0.0) + "\n" for event in events())


def write_all(folder: Path) -> dict[str, Path]:
    """A file or folder of each kind, by the key of its section."""
    for name, document in (("machine", MACHINE), ("migration", MIGRATION), ("prediction", PREDICTION)):
        (folder / f"{name}.json").write_text(json.dumps(document))
    for name, document in (("stress", sweep()), ("compare", comparison())):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(document))
    recording().save(folder / "ws.npz")
    (folder / "events.jsonl").write_text(EVENTS)
    return {"machine": folder / "machine.json", "migration": folder / "migration.json",
            "prediction": folder / "prediction.json", "stress": folder / "stress", "compare": folder / "compare",
            "working-set": folder / "ws.npz", "events": folder / "events.jsonl"}
