"""Pauses and leases of several processes in any order, against a model: who holds, and does the guest run?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from machines import runs, spec, stands_still, until

from vmm.client.machine import Machine
from vmm.errors import VmmError

_AGENT = """
import json, sys
from vmm import Machine, VmmError
machine = Machine.attach('t')
had = {}
def begin(key, thing):
    thing.__enter__()
    had[key] = thing
print(json.dumps({}), flush=True)
for line in sys.stdin:
    what, *rest = json.loads(line)
    try:
        if what == 'pause':
            begin(rest[0], machine.paused(rest[0]))
        elif what == 'lease':
            begin('lease', machine.lease(*rest))
        elif what == 'end':
            had.pop(rest[0]).__exit__(None, None, None)
        else:
            getattr(had['lease'], what)(*rest)
        print(json.dumps({}), flush=True)
    except VmmError as exc:
        print(json.dumps({'error': str(exc)}), flush=True)
"""


class Agent:
    """A process with its own connection that holds what it is told to hold."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen([sys.executable, "-c", _AGENT], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True)
        self._answer()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def _answer(self) -> str:
        assert self._popen.stdout is not None
        return str(json.loads(self._popen.stdout.readline()).get("error", ""))

    def ask(self, *what: str) -> str:
        """What was said against it; empty: it was done."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(what) + "\n")
        self._popen.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


AGENTS = st.integers(0, 1)


class Holders(RuleBasedStateMachine):
    """Two processes and a user. The model: ``pauses`` {(agent, why)}, ``leases`` {agent: kind}, ``frozen`` agents,
    ``user``, ``handed_over``."""

    @initialize()
    def launch(self) -> None:
        self.stack = contextlib.ExitStack()
        guest = spec("random", accel="unicorn", vcpus=1, mib=4, writes=0, spin=200, timeout=None)
        self.machine = self.stack.enter_context(Machine.launch(guest))
        self.agents = [Agent(), Agent()]
        self.stack.callback(lambda: [agent.kill() for agent in self.agents])
        self.pauses: set[tuple[int, str]] = set()
        self.leases: dict[int, str] = {}
        self.frozen: set[int] = set()
        self.user = False
        self.handed_over = False
        self.deaths = 0

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()

    # --- pauses ------------------------------------------------------------------------------------

    @rule(agent=AGENTS, why=st.sampled_from(["one", "two"]))
    def pause(self, agent: int, why: str) -> None:
        if (agent, why) in self.pauses:
            assert self.agents[agent].ask("end", why) == ""
            self.pauses.remove((agent, why))
        else:
            assert self.agents[agent].ask("pause", why) == ""
            self.pauses.add((agent, why))

    @rule()
    def user_pauses(self) -> None:
        self.machine.pause()
        self.user = True

    @rule(force=st.booleans())
    def user_resumes(self, force: bool) -> None:
        try:
            held_by = self.machine.resume(force=force)
        except VmmError:
            assert self.handed_over
            assert "migration" in self.leases.values() or not force
            return
        assert not self.handed_over or force
        self.user = self.handed_over = False
        assert len(held_by) == len(self.pauses) + len(self.frozen)

    # --- leases ------------------------------------------------------------------------------------

    @rule(agent=AGENTS, kind=st.sampled_from(["migration", "snapshot"]))
    def lease(self, agent: int, kind: str) -> None:
        if agent in self.leases:
            assert self.agents[agent].ask("end", "lease") == ""
            del self.leases[agent]
            self.frozen.discard(agent)
            return
        others = set(self.leases.values())
        refused = self.agents[agent].ask("lease", kind, "to x")
        if self.handed_over or "migration" in others or (kind == "migration" and others):
            assert refused
        else:
            assert not refused
            self.leases[agent] = kind

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        agent = data.draw(st.sampled_from(sorted(self.leases)))
        verb = "thaw" if agent in self.frozen else "freeze"
        assert self.agents[agent].ask(verb) == ""
        self.frozen ^= {agent}

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        agent = data.draw(st.sampled_from(sorted(self.leases)))
        refused = self.agents[agent].ask(*(["take_back"] if self.handed_over else ["hand_over", "x"]))
        if self.leases[agent] == "migration" and (self.handed_over or agent in self.frozen):
            assert not refused
            self.handed_over = not self.handed_over
        else:
            assert refused

    # --- deaths ------------------------------------------------------------------------------------

    @rule(agent=AGENTS)
    def agent_dies(self, agent: int) -> None:
        self.agents[agent].kill()
        self.agents[agent] = Agent()
        self.pauses = {(a, why) for a, why in self.pauses if a != agent}
        self.leases.pop(agent, None)
        self.frozen.discard(agent)

    @precondition(lambda self: self.deaths < 4)     # the keeper takes more of them for a fault
    @rule()
    def coordinator_dies(self) -> None:
        self.deaths += 1
        before = self.machine.status()["coordinator"]
        os.kill(before["pid"], signal.SIGKILL)
        until(lambda: self.machine.status()["coordinator"]["restarts"] == before["restarts"] + 1, "a replacement")

    # --- what must hold -----------------------------------------------------------------------------

    @invariant()
    def as_the_model_says(self) -> None:
        if not hasattr(self, "machine"):
            return
        status = self.machine.status()
        held = [(h["what"], h["why"], h["pid"]) for h in status["holders"] if h["what"] != "client"]
        pids = [agent.pid for agent in self.agents]
        expected: list[tuple[str, str, int]] = [("pause", "user", 0)] if self.user else []
        expected += [("pause", why, pids[a]) for a, why in self.pauses]
        expected += [("pause", f"{self.leases[a]} to x", pids[a]) for a in self.frozen]
        expected += [("lease", f"{kind} to x", pids[a]) for a, kind in self.leases.items()]
        assert sorted(held) == sorted(expected)
        assert bool(status["handed_over"]) == self.handed_over
        stands = self.user or self.handed_over or bool(self.pauses) or bool(self.frozen)
        assert status["state"] == ("paused" if stands else "running")
        assert runs(self.machine) if not stands else stands_still(self.machine)
        refused = self.write()
        assert refused == (self.handed_over or bool(self.frozen))

    def write(self) -> bool:
        """Was it refused?"""
        try:
            self.machine.write(0x30_0000, b"x")
        except VmmError:
            return True
        return False


@pytest.mark.timeout(600)
def test_pauses_and_leases_in_any_order() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Holders, settings=settings(
        max_examples=4, stateful_step_count=20, deadline=None, phases=(Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]))
