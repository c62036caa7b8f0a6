"""Machines as they are when somebody asks for metrics: a collector of prometheus_client."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .. import optional
from ..client.machine import Machine
from ..consumers.stats import Sample, Sampler
from ..errors import VmmError
from ..machine.names import belongings
from ..machine.runtime import is_running, machine_names
from .metrics import METRICS, UP, Metric

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

__all__ = ["MachineCollector"]

_PATIENCE = 2.0     # seconds for a machine's answer: Prometheus waits 10 by default
_AT_ONCE = 8        # machines


class MachineCollector:
    """Of the machines ``names``, or (None) of all that run when it is asked. A machine is connected to once, and let go
    when it has ended; one that was upgraded, or has another's name, is another. ``dirty_rate``: as ``Sampler`` has it.
    Nothing happens between two collections. Close it."""

    def __init__(self, names: Sequence[str] | None = None, *, dirty_rate: bool = False) -> None:
        """Raises MissingPackage."""
        self._core = optional.prometheus("core")
        self._names = names
        self._dirty_rate = dirty_rate
        self._samplers: dict[str, tuple[int, Sampler]] = {}     # with the keeper of its machine
        self._lock = threading.Lock()       # a server may be asked twice at once
        self._closed = False

    def describe(self) -> Iterator[Family]:
        """The same without values: no machine is asked."""
        return map(self._empty, METRICS)

    def collect(self) -> Iterator[Family]:
        """All metrics of all machines, each family once."""
        with self._lock:
            samples = {} if self._closed else self._sample_all()
        for metric in METRICS:
            yield self._family(metric, samples)

    def _sample_all(self) -> dict[str, Sample | None]:
        """{machine: None where it does not answer}."""
        asked = machine_names() if self._names is None else self._names
        keepers = {name: keeper for name in asked if (keeper := belongings(name).owner_pid()) is not None}
        for gone in [name for name, (keeper, _) in self._samplers.items() if keepers.get(name) != keeper]:
            _let_go(self._samplers.pop(gone)[1])
        for name in keepers.keys() - self._samplers.keys():
            sampler = Sampler(Machine(name), dirty_rate=self._dirty_rate, timeout=_PATIENCE)
            self._samplers[name] = keepers[name], sampler
        names = list(keepers)
        if len(names) < 2:
            return {name: sample for name in names if (sample := self._sample(name)) or is_running(name)}
        with ThreadPoolExecutor(min(_AT_ONCE, len(names)), "collect") as pool:
            samples = dict(zip(names, pool.map(self._sample, names), strict=True))
        return {name: sample for name, sample in samples.items() if sample or is_running(name)}

    def _sample(self, name: str) -> Sample | None:
        try:
            return self._samplers[name][1].sample()
        except VmmError:
            return None

    def _family(self, metric: Metric, samples: dict[str, Sample | None]) -> Family:
        family = self._empty(metric)
        for name, sample in samples.items():
            values: Iterable[Any] = metric.values(sample) if sample else [((), 0.0)] if metric is UP else []
            for labels, value in values:
                if metric.kind == "info":
                    family.add_metric([name], dict(zip(metric.labels, labels, strict=True)))
                else:
                    family.add_metric([name, *labels], value)
        return family

    def _empty(self, metric: Metric) -> Any:
        if metric.kind == "info":
            return self._core.InfoMetricFamily(metric.name, metric.help, labels=["machine"])
        made = self._core.CounterMetricFamily if metric.kind == "counter" else self._core.GaugeMetricFamily
        return made(metric.name, metric.help, labels=["machine", *metric.labels])

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            for _, sampler in self._samplers.values():
                _let_go(sampler)
            self._samplers.clear()


def _let_go(sampler: Sampler) -> None:
    sampler.close()
    sampler.machine.detach()
