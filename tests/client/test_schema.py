"""The published schemas, and what is read out of them: keys explained, templates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from command import vmm_here
from places import CONFIGS, TOP

from vmm.client.config import ConfigError, load_configs
from vmm.client.models import MachineConfig
from vmm.client.schema import config_schema, find_key, key_docs
from vmm.client.templates import TEMPLATES, template
from vmm.errors import VmmError
from vmm.fleet.config import fleet_schema
from vmm.lab.stress.schema import sweep_schema

DOCS = TOP / "docs"
EXAMPLES = sorted(CONFIGS.rglob("*.yaml"))
GOOD = {"memory": [{"size": "4MiB"}], "guest": {"workload": "hello"}}


def valid(document: Any) -> bool:
    return jsonschema.Draft7Validator(config_schema()).is_valid(document)


# --- published ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "made"), [("config", config_schema), ("sweep", sweep_schema),
                                          ("fleet", fleet_schema)])
def test_the_published_schemas_are_the_models(name: str, made: Any) -> None:
    """vmm schema NAME > docs/NAME.schema.json"""
    jsonschema.Draft7Validator.check_schema(made())
    assert json.loads((DOCS / f"{name}.schema.json").read_text()) == made()
    assert json.loads(vmm_here("schema", name).stdout) == made()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_names_its_schema_and_is_of_it(path: Path) -> None:
    first = path.read_text().split("\n", 1)[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named is not None, first
    schema = (path.parent / named[1]).resolve()
    kind = "sweep" if path.stem.startswith("stress") else "fleet" if path.stem == "fleet" else "config"
    assert schema == DOCS / f"{kind}.schema.json"
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema.read_text()),
                        cls=jsonschema.Draft7Validator)


@pytest.mark.parametrize("change", [
    {}, {"vcpus": 256}, {"verify": True}, {"verify": {"interval": "200ms"}}, {"timeout": "5min"}, {"timeout": 0.5},
    {"dirty_limit": "100MB/s"}, {"dirty_limit": "10Gbit/s"}, {"stack_size": "32KiB"}, {"dirty_ring_size": "auto"},
    {"dirty_ring_size": 4096}, {"memory": [{"size": "1.5GiB"}, {"slot": 7, "gpa": "0x100000000", "size": 8192}]},
    {"memory": [{"size": "4099 pages"}]}, {"name": "web-1"}, {"x-note": 5}, {"reaper": {"mode": "fixed"}},
])
def test_what_can_be_loaded_is_of_the_schema(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    load_configs(path)
    assert valid(GOOD | change)


@pytest.mark.parametrize("change", [
    {"vcpus": 0}, {"vcpus": "2"}, {"vcpus": True}, {"vcpsu": 2}, {"timeout": "soon"}, {"timeout": "5 minutes"},
    {"dirty_limit": "100Mb/s"}, {"stack_size": "32K"}, {"memory": []}, {"memory": [{"gpa": 0}]},
    {"memory": [{"size": "64 M"}]}, {"name": "Web"}, {"reaper": {"mode": "fxed"}}, {"tracking": "rings"},
    {"memory": None}, {"guest": {"wrkload": "x"}}, {"machines": {}},
])
def test_what_cannot_be_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ConfigError):
        load_configs(path)
    assert not valid(GOOD | change)


def test_a_file_of_several_machines_is_of_the_schema() -> None:
    several = {"memory": [{"size": "4MiB"}], "machines": {"a": {"guest": {"workload": "hello"}},
                                                          "b": {"vcpus": 2, "guest": {"workload": "stamp"}}}}
    assert valid(several)
    assert not valid({**several, "machines": {"a": {"vcpsu": 2}}})
    assert not valid({**several, "machines": {"A_": {}}})


# --- explained ----------------------------------------------------------------------------------------------------


def test_every_key_is_described() -> None:
    docs = key_docs()
    assert {doc.name for doc in docs.values() if "." not in doc.name} == {*MachineConfig.model_fields, "machines"}
    for doc in docs.values():
        assert re.fullmatch(r"[A-Za-z].*[.]", doc.description), doc.name
        assert doc.kind != "anything", doc.name
    assert docs["memory.N.size"].required
    assert not docs["memory.N.slot"].required
    assert docs["vcpus"].kind == "a whole number from 1 to 256"


@pytest.mark.parametrize("asked", ["memory.N.size", "memory.0.size", "memory.size"])
def test_a_key_is_found_with_or_without_the_number_of_an_item(asked: str) -> None:
    assert find_key(asked).name == "memory.N.size"


@pytest.mark.parametrize(("asked", "said"), [("vcpsu", "'vcpus'"), ("reaper.intervall", "'reaper.interval'"),
                                             ("ring_size", "'dirty_ring_size'"), ("stride", "'replay.stride'"),
                                             ("xyzzy", "vmm config explain lists them")])
def test_a_key_that_is_not_there(asked: str, said: str) -> None:
    with pytest.raises(VmmError, match=re.escape(said)):
        find_key(asked)


def test_explain_says_what_there_is_to_say() -> None:
    text = vmm_here("config", "explain", "stack_size").stdout
    assert text.startswith("stack_size: a size\n")
    assert "Default: 16KiB" in text
    assert "For example: 64MiB, 64MB" in text
    reaper = vmm_here("config", "explain", "reaper").stdout
    assert "reaper.min_interval" in reaper
    keys = [doc["key"] for doc in json.loads(vmm_here("config", "explain", "--json").stdout)]
    assert keys == list(key_docs())
    everything = vmm_here("config", "explain").stdout
    assert all(key in everything for key in keys)


# --- templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_a_configuration_with_and_without_its_commented_keys(tmp_path: Path, name: str) -> None:
    text = template(name)
    path = tmp_path / "m.yaml"
    path.write_text(text)
    assert load_configs(path)
    assert max(map(len, text.splitlines())) <= 120
    everything = re.sub(r"(?m)^( *)#(?! )", r"\1", text)
    everything = re.sub(r"(?m)^( *)#(?=  [a-z_]+: )", r"\1", everything)      # below a key that was commented
    assert everything != text
    path.write_text(everything)
    assert load_configs(path), everything
    assert set(yaml.safe_load(everything)) > set(yaml.safe_load(text))


def test_new_writes_no_file_over_another(tmp_path: Path) -> None:
    path = tmp_path / "vm.yaml"
    assert "vmm config check" in vmm_here("config", "new", "guest", "--output", str(path)).stdout
    assert path.read_text() == template("guest") == vmm_here("config", "new", "guest").stdout
    done = vmm_here("config", "new", "replay", "--output", str(path))
    assert (done.returncode, path.read_text()) == (2, template("guest"))
    assert vmm_here("config", "new", "nothing").returncode == 2
    assert [line.split()[0] for line in vmm_here("config", "new").stdout.splitlines()] == list(TEMPLATES)


# --- checked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "said"), [
    ("accel: unicorn\nmemory: [{size: 4MiB}]\nguest: {workload: hello}\nname: m\n", "m: can be launched: "),
    ("accel: unicorn\nvcpus: [1, 2]\nrepeat: 3\n", ": a sweep of 6 points\n")])
@pytest.mark.parametrize("standard", [True, False])
def test_check_reads_a_pipe_once(text: str, said: str, standard: bool) -> None:
    """vmm config check -, and <(...) of bash; be it a machine or a sweep without memory, workload or ring."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    try:
        file = "-" if standard else f"/dev/fd/{reader}"
        done = subprocess.run([sys.executable, "-m", "vmm", "config", "check", file],
                              stdin=reader if standard else subprocess.DEVNULL, pass_fds=[reader], capture_output=True,
                              text=True, timeout=60, check=False)
    finally:
        os.close(reader)
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout


def test_new_leaves_no_part_of_a_file_behind(tmp_path: Path) -> None:
    path = tmp_path / "vm.yaml"
    done = subprocess.run(["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, "-m", "vmm", "config", "new",
                           "guest", "--output", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"vmm: error: {path}: cannot be written: File too large\n")
    assert not path.exists()


def test_check_says_what_would_be_launched_and_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("accel: unicorn\nmemory: [{size: 4MiB}]\nguest: {workload: random}\ndirty_ring_size: 1024\n"
                    "dirty_limit: 100MB/s\nreaper: {mode: fixed}\n")
    done = vmm_here("config", "check", str(path))
    assert done.returncode == 0
    assert done.stdout == "m: can be launched: random on 1 vCPU (unicorn), 4 MiB, rings of 1024 entries\n"
    assert done.stderr.startswith(f"vmm: warning: {path}:4:1: dirty_ring_size: a ring of 1024 entries is full ")
    found = json.loads(vmm_here("config", "check", str(path), "--set", "vcpus=2", "--json").stdout)
    machine, = found["machines"]
    assert (machine["vcpus"], machine["memory"], len(machine["warnings"])) == (2, 4 << 20, 1)
    assert vmm_here("list").stdout == "no machine is running\n"
    refused = vmm_here("config", "check", str(path), "--set", "guest.workload=helo")
    assert refused.returncode == 2
    assert refused.stderr.startswith("vmm: error: --set guest.workload=helo: guest.workload: unknown workload")


def test_check_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("accel: unicorn\nvcpus: [1, 2]\nring: [1024, 4096]\n")
    assert vmm_here("config", "check", str(path)).stdout == f"{path}: a sweep of 4 points\n"
    path.write_text("accel: unicorn\nring: [1000]\n")
    assert f"{path}:2:8: ring.0: must be a power of two" in vmm_here("config", "check", str(path)).stderr
