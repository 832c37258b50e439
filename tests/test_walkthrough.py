"""docs/walkthrough.ipynb: whole, small, a question before each cell; and (slow) its outputs are those of the shipped weights."""

import ast
import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import run_walkthrough as walkthrough

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def load():
    return json.loads(walkthrough.NOTEBOOK.read_text(encoding="utf-8"))


def stored(cell):
    """(printed text, Pillow image or None) among a cell's outputs."""
    text = "".join(line for output in cell["outputs"] for line in output.get("text", []))
    pictures = [output["data"]["image/png"] for output in cell["outputs"] if "data" in output]
    return text, Image.open(io.BytesIO(base64.b64decode(pictures[0]))) if pictures else None


def test_the_walkthrough_asks_before_each_cell_and_stores_its_outputs():
    notebook = load()
    cells = notebook["cells"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert walkthrough.NOTEBOOK.stat().st_size < 1.5e6
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert 25 <= len(walkthrough.code_cells(notebook)) <= 35
    for before, cell in zip([{}, *cells], cells):
        assert {"cell_type", "id", "metadata", "source"} <= set(cell) and cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "markdown":
            continue
        source = "".join(cell["source"])
        assert before["cell_type"] == "markdown" and "?" in "".join(before["source"]), source
        ast.parse(source)
        assert max(map(len, source.splitlines())) <= 100, source
        assert cell["outputs"] and isinstance(cell["execution_count"], int), source
        assert all(output["output_type"] in ("stream", "execute_result") for output in cell["outputs"]), source  # none is an error
        text, picture = stored(cell)
        assert (text or picture) and (picture is None or picture.format == "PNG"), source
        assert not re.search(r"(?:^|[\s\"'(])/\w|\b[A-Z]:\\|Traceback", text + source, re.M), source  # no absolute path


@pytest.mark.slow
def test_the_walkthrough_runs_from_both_folders_and_its_outputs_are_still_true(monkeypatch):
    """Numbers and pictures may differ a little, as on another CPU. After new weights: python docs/run_walkthrough.py."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook = load()
    monkeypatch.chdir(ROOT)
    walkthrough.run_cell("".join(walkthrough.code_cells(notebook)[0]["source"]), {})
    monkeypatch.chdir(ROOT / "docs")
    for cell, text, picture in walkthrough.run(notebook):
        old_text, old_picture = stored(cell)
        assert NUMBER.sub("", text).split() == NUMBER.sub("", old_text).split()
        numbers, old = (np.array(NUMBER.findall(t), float) for t in (text, old_text))
        assert np.allclose(numbers, old, rtol=0.05, atol=0.1), f"{text}\nwas\n{old_text}"
        assert (picture is None) == (old_picture is None)
        if picture:
            pixels, old = (np.asarray(p.convert("RGB"), float) for p in (picture, old_picture))
            assert pixels.shape == old.shape and abs(pixels - old).mean() < 10, text
