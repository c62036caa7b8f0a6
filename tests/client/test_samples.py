"""The example configurations, by name: what ``vmm launch quickstart`` means, in a checkout and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import vmm
from places import CONFIGS

from vmm.client.config import ConfigError, load_config
from vmm.client.samples import find_config, sample_names


def test_a_name_is_the_file_of_that_name() -> None:
    assert sample_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    for name in sample_names():
        assert find_config(Path(name)).samefile(CONFIGS / f"{name}.yaml")


def test_a_file_of_the_users_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hello").write_text("vcpus: 3\nmemory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    assert load_config("hello").vcpus == 3
    assert load_config("./hello").vcpus == 3


@pytest.mark.parametrize("path", ["./quickstart", "configs/quickstart", "quickstart.yml", "Quickstart", "-", "a" * 300])
def test_what_is_no_bare_name_is_a_file(path: str) -> None:
    assert find_config(path) == Path(path)


def test_a_name_that_is_wrong_is_answered_with_one_that_is_near() -> None:
    with pytest.raises(ConfigError, match=r"^quickstrat: no such file, .* \(did you mean 'quickstart'\?\)$"):
        load_config("quickstrat")
    with pytest.raises(ConfigError, match="there are bitmap-mode, counter"):
        load_config("zzz")


def test_it_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = vmm("launch", "hello")
    assert done.returncode == 0, done.stderr
    assert "hello from vCPU 0" in done.stdout


def test_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert vmm("config", "check", "hello").stdout.startswith("hello: can be launched: hello on 2 vCPUs ")
