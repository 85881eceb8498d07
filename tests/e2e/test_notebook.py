"""The notebook runs from its first cell to its last, learns, and shows a picture."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pretrain_lm
from nbclient import NotebookClient

NOTEBOOK = Path(pretrain_lm.__file__).with_name("notebook.ipynb")


def test_the_notebook_trains_and_plots():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without any
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")
    validation, gain = re.search(r"validation ([\d.]+) nats per byte, (-?[\d.]+) below the unigram", text).groups()
    assert float(validation) < 2.7 and float(gain) > 0.2
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert text.rstrip().splitlines()[-1] and "def " in text  # the sample
