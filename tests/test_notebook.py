"""The notebook of docs/ runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from machines import nothing_left
from places import TOP

NOTEBOOK = TOP / "docs" / "first-look.ipynb"


def texts(cell: dict[str, Any]) -> str:
    return "".join(each.get("text", "") for each in cell["outputs"])


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR"):
        (tmp_path / variable.lower()).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    asyncio.run(client.async_execute())
    launched, rate, working_set, migration, _ = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "first-look is running: 2 vCPUs" in texts(launched)
    assert "MiB/s" in texts(rate)
    picture = base64.b64decode(working_set["outputs"][0]["data"]["image/png"])
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert "moved is running" in texts(migration)
    assert nothing_left("first-look")
    assert nothing_left("moved")
