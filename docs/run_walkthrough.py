"""Run docs/walkthrough.ipynb and store its outputs: the text that a cell prints, and its picture.

The code cells are plain Python and share one namespace. If a cell ends with a Pillow image, this is
the picture that Jupyter shows. Here it is stored with 256 colours, so that the notebook stays small.

    python docs/run_walkthrough.py
"""

import ast
import base64
import contextlib
import io
import json
import os
from pathlib import Path

from PIL import Image
from tqdm import tqdm

NOTEBOOK = Path(__file__).resolve().with_name("walkthrough.ipynb")
COLOURS = 256


def code_cells(notebook):
    """The code cells of a notebook, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(source, namespace, name="cell"):
    """(printed text, Pillow image or None) of a cell's source, run in a namespace."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), namespace)
        value = last and eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    return printed.getvalue(), value if isinstance(value, Image.Image) else None


def run(notebook):
    """(cell, printed text, Pillow image or None) of each code cell, one after the other."""
    namespace = {"__name__": "walkthrough"}
    for n, cell in enumerate(tqdm(code_cells(notebook), "cells"), 1):
        yield cell, *run_cell("".join(cell["source"]), namespace, f"cell {n}")


def to_outputs(text, picture, n):
    """The outputs of code cell n as Jupyter stores them (nbformat 4)."""
    outputs = []
    if text:
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if picture:
        file = io.BytesIO()
        reduced = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2)
        reduced.save(file, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(),
                "text/plain": [f"<a picture of {picture.width}x{picture.height} pixels>"]}
        outputs.append({"data": data, "execution_count": n, "metadata": {},
                        "output_type": "execute_result"})
    return outputs


def main():
    os.chdir(NOTEBOOK.parent)  # as Jupyter does
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for n, (cell, text, picture) in enumerate(run(notebook), 1):
        cell["execution_count"], cell["outputs"] = n, to_outputs(text, picture, n)
    beside = NOTEBOOK.with_suffix(".part")
    beside.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
