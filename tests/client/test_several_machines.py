"""Files of several machines: what holds for which, and what errors call it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.client.config import ConfigError, load_config, load_configs

SEVERAL = """\
vcpus: 2
memory: [{size: 4MiB}]
x-fast: &fast {writes: 5}
machines:
  web: {guest: {workload: random, params: *fast}}
  db:
    vcpus: 4
    guest: {workload: stamp, params: {<<: *fast, spin: 3}}
"""


@pytest.fixture
def several(tmp_path: Path) -> Path:
    path = tmp_path / "m.yaml"
    path.write_text(SEVERAL)
    return path


def test_what_is_said_for_all_holds_unless_a_machine_says_otherwise(several: Path) -> None:
    web, db = load_configs(several)
    assert (web.name, web.vcpus, web.memory[0].size) == ("web", 2, 4 << 20)
    assert (db.name, db.vcpus, db.memory[0].size) == ("db", 4, 4 << 20)
    assert web.guest is not None
    assert web.guest.params == {"writes": 5}
    assert db.guest is not None
    assert db.guest.params == {"writes": 5, "spin": 3}


def test_one_of_them(several: Path) -> None:
    assert load_config(several, machine="db").vcpus == 4
    assert [each.name for each in load_configs(several, machine="web")] == ["web"]
    with pytest.raises(ConfigError, match="has several machines: say which of web, db"):
        load_config(several)
    with pytest.raises(ConfigError, match="no machine called DB: its machines are web, db"):
        load_config(several, machine="DB")
    several.write_text("memory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    with pytest.raises(ConfigError, match="it is of one machine"):
        load_config(several, machine="web")


def test_overrides_are_for_all_or_for_one(several: Path) -> None:
    web, db = load_configs(several, ["vcpus=3", "memory.0.size=8MiB", "machines.db.memory.0.size=16MiB",
                                     "machines.web.vcpus=1"])
    assert (web.vcpus, db.vcpus) == (1, 3)
    assert (web.memory[0].size, db.memory[0].size) == (8 << 20, 16 << 20)
    for wrong in ("machines.no.vcpus=1", "machines.web=1"):
        with pytest.raises(ConfigError, match=r"^--set machines\..*: write machines\.NAME\.key=value, with one of web"):
            load_configs(several, [wrong])


@pytest.mark.parametrize(("text", "said"), [
    ("machines: {}\n", "m.yaml:1:1: machines: must be a mapping of names"),
    ("machines: [1]\n", "m.yaml:1:1: machines: must be a mapping of names"),
    ("machines: {a: 1}\n", "m.yaml:1:12: machines.a: must be a mapping"),
    ("machines: {A_: {vcpus: 2}}\n", "m.yaml:1:12: machines.A_: invalid machine name"),
    ("name: x\nmachines: {a: {vcpus: 2}}\n", "m.yaml:1:1: name: each of the machines"),
    ("machines: {a: {name: x}}\n", "m.yaml:1:16: machines.a.name: the machine has the name"),
    ("machines:\n  a: {vcpus: two}\n", "m.yaml:2:7: machines.a.vcpus: input should be a valid integer"),
    ("machines:\n  a: {vcpus: 2}\n", "m.yaml:2:3: machines.a.memory: missing"),
    ("vcpus: two\nmachines:\n  a: {memory: [{size: 4MiB}]}\n", "m.yaml:1:1: vcpus: input should be a valid integer"),
    ("memory: [{size: 4MiB}]\nmachines:\n  a: {memory: [{size: 4}], guest: {workload: hello}}\n",
     "m.yaml:3:17: machines.a.memory.0.size: must be a positive multiple"),
    ("machines: {a: {machines: {}}}\n", "m.yaml:1:16: machines.a.machines: unknown key"),
])
def test_errors_say_the_whole_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_configs(path)
    assert said in str(caught.value)


def test_an_override_of_one_is_named(several: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set machines\.db\.vcpus=0: vcpus: input should be"):
        load_configs(several, ["machines.db.vcpus=0"])
