"""Runs the code cells of a notebook in order, as Jupyter would after "Restart and run all".

    python tests/notebook_cells.py docs/lora-or-full.ipynb    # stores what the cells give

Without nbclient and ipykernel: they bring 25 packages, a message queue among them, where cells of plain Python with
matplotlib need ``exec`` and the open figures.
"""

import base64
import contextlib
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

DPI = 72


@dataclass
class Output:
    """What a code cell gives: its printed text, and its figures as PNG."""

    text: str = ""
    figures: list[bytes] = field(default_factory=list)


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook as nbformat 4 has it."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(cell: dict[str, Any]) -> Output:
    """What a cell gave when it was stored."""
    output = Output()
    for part in cell["outputs"]:
        if part["output_type"] == "stream":
            output.text += "".join(part["text"])
        else:
            output.figures.append(base64.b64decode(part["data"]["image/png"]))
    return output


def execute(path: Path) -> list[Output]:
    """What each code cell of the notebook gives now, in the folder of the notebook, as Jupyter runs it."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    with contextlib.chdir(path.parent):
        for number, cell in enumerate(code_cells(read_notebook(path))):
            text, output = io.StringIO(), Output()
            code = compile("".join(cell["source"]), f"{path.name} cell {number}", "exec")
            with contextlib.redirect_stdout(text):
                exec(code, names)
            output.text = text.getvalue()
            for figure in pyplot.get_fignums():
                output.figures.append(_png(pyplot.figure(figure)))
            pyplot.close("all")
            outputs.append(output)
    return outputs


def store(path: Path) -> None:
    """Execute the notebook and write its outputs into it."""
    notebook = read_notebook(path)
    cells = zip(code_cells(notebook), execute(path), strict=True)
    for number, (cell, output) in enumerate(cells, start=1):
        cell["execution_count"] = number
        cell["outputs"] = []
        if output.text:
            lines = output.text.splitlines(keepends=True)
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": lines})
        for figure in output.figures:
            data = {"image/png": base64.b64encode(figure).decode("ascii")}
            cell["outputs"].append({"data": data, "metadata": {}, "output_type": "display_data"})
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _png(figure: Any) -> bytes:
    """Few colours, so that a figure takes some ten kilobytes."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    Image.open(raw).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    store(Path(sys.argv[1]).resolve())
