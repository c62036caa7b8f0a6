"""What others install: the source distribution, the wheel made of it, and the program in a clean environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from places import CONFIGS, TOP

SOURCES = ["pyproject.toml", "MANIFEST.in", "README.md", "ipc", "workers", "vmm", "configs", "tests", "docs"]


def build(hook: str, source: Path, output: Path) -> Path:
    """By the project's build system (PEP 517)."""
    output.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(output)], cwd=source, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (TOP / name).is_dir():
            shutil.copytree(TOP / name, folder / name, symlinks=True,
                            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(TOP / name, folder)
    return build("build_sdist", folder, folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("build_wheel", next(folder.iterdir()), folder / "dist")


@pytest.fixture(scope="module")
def vmm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program that the wheel has, in an environment of its own; what it depends on is that of this one."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    # A path file in a folder that a path file names is not read: so the checkout of an editable installation is not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
                    "--no-index", "--disable-pip-version-check", str(wheel)], check=True, timeout=120)

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "PYTHONPATH")}
        return subprocess.run([python.parent / "vmm", *arguments], cwd=cwd, env=environment, capture_output=True,
                              text=True, timeout=120, check=False)

    return run


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"ipc", "workers", "vmm"}
    assert not [name for name in names if re.search(r"(^|/)(tests?|docs|benchmarks)/|(^|/)(test_|conftest)", name)]
    examples = {f"vmm/configs/{path.name}" for path in CONFIGS.glob("*.yaml")}
    images = {f"vmm/guests/{path.name}" for path in (TOP / "vmm" / "guests").glob("*.elf")}
    assert len(examples) > 10
    assert len(images) > 5
    assert {*examples, *images, "vmm/py.typed"} <= set(names)
    code = {str(p.relative_to(TOP)) for folder in ("ipc", "workers", "vmm") for p in (TOP / folder).rglob("*.py")}
    assert code <= set(names)


def test_what_is_in_the_source_distribution(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks"))]
    assert {"pyproject.toml", "README.md", "configs/quickstart.yaml", "vmm/guests/stamp.elf", "vmm/py.typed"} <= names


def test_its_extras_are_those_of_the_documentation() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    table = set(re.findall(r"^\| `(\w+)` \|", (TOP / "docs" / "install.md").read_text(), re.MULTILINE))
    assert table == set(project["optional-dependencies"]) - {"dev", "docs", "bench"}


def test_the_service_is_one(tmp_path: Path) -> None:
    """With a program that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd-analyze")
    unit = tmp_path / "shardvmm@.service"
    text = (TOP / "docs" / "deploy" / unit.name).read_text()
    unit.write_text(text.replace("/usr/local/bin/vmm", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_example_runs_from_any_directory(vmm: Callable[..., subprocess.CompletedProcess[str]],
                                            tmp_path: Path) -> None:
    for name in ("numpy.py", "ipc.py"):
        (tmp_path / name).write_text("raise SystemExit('the module of another program')\n")
    done = vmm("launch", "quickstart", "--set", "guest.params.writes=2000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verification passed" in done.stdout
    assert vmm("guests", cwd=tmp_path).stdout.startswith("sequential:")
    assert sorted(os.listdir(tmp_path)) == ["ipc.py", "numpy.py"]
