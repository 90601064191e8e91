"""Notebooks are committed without outputs, and run with all records, with some and with none."""

import ast
import math
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.display import Image

import entreg.records
from entreg.records import RecordStore, new_record

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
VISION = FOLDER / "01_sparse_vision.ipynb"
PLAN = {"kind": "tokens", "keep": 14, "before_layer": 1}


def shown_by(path):
    """What each code cell shows, run in this process."""
    names, shown = {}, []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        *statements, last = ast.parse(cell.source).body
        exec(compile(ast.Module(statements, []), str(path), "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), str(path), "eval"), names))
    return shown


def save(root, experiment, method, rows, metrics=()):
    record = new_record(
        experiment=experiment,
        scale="offline",
        config={"method": method, "evaluation": {"plans": {"setting_a": PLAN}}},
        command="python scripts/vision.py",
        dataset={"name": "digit_scenes"},
        model={"name": "vit", "parameters": 1},
        seed=0,
        repeats=1,
        metrics=dict(metrics),
        rows=rows,
        wall_seconds=1.0,
    )
    RecordStore(root).save(record)


def accuracy(plan, value, reduction=None, score=None):
    row = {"plan": plan, "level": None, "reduction": reduction, "score": score, "sparsity": 0.8, "top1": value}
    return [{**row, "split": split} for split in ("validation", "test")]


def overlay():
    """Two patches of four keep 3/4 of an attention that is even: exp(H) = 4."""
    plan = {"kept": [[0, 1, 2]], "assignment": [[0, 1, 2, -1]], "mass": [[0.25] * 4], "answers": [[1]]}
    image = [[[0] * 4] * 4]
    found = {"grid": [2, 2], "image": image, "labels": [[1]], "answers": [[1]], "mask": [[0]], "plans": {"a": plan}}
    return {"overlays": found}


def test_names_are_numbered_from_one():
    numbers = [int(re.fullmatch(r"(\d\d)_[a-z_]+\.ipynb", path.name)[1]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs and not cell.metadata for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_the_reference_records(path):
    client = nbclient.NotebookClient(
        nbformat.read(path, as_version=4), timeout=120, resources={"metadata": {"path": str(FOLDER)}}
    )
    done = client.execute()
    assert all(cell.outputs for cell in done.cells if cell.cell_type == "code")


def test_without_records_every_cell_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(entreg.records, "REFERENCE_ROOT", tmp_path)
    first, *others = shown_by(VISION)
    assert first.data == "0 records of vision experiments among 0."
    assert all("not run" in one.data.lower() for one in others)


def test_with_some_records_the_numbers_are_theirs_and_the_rest_says_so(monkeypatch, tmp_path):
    for method, value in (("plain", 0.5), ("ours_a", 0.9)):
        rows = accuracy("dense", 0.95) + accuracy("setting_a", value, "drop", "mixed")
        save(tmp_path, "vit/digit_scenes", method, rows)
    save(tmp_path, "vit/overlays", "plain", [], overlay())
    monkeypatch.setattr(entreg.records, "REFERENCE_ROOT", tmp_path)
    shown = shown_by(VISION)
    pictures = [one for one in shown if isinstance(one, Image)]
    texts = [one.data for one in shown if not isinstance(one, Image)]
    assert len(pictures) == 2
    assert texts[0] == "3 records of vision experiments among 3."
    assert texts[1].splitlines()[-1] == f"| plain | {math.exp(math.log(4)):.0f} | 3 | 75 % |"
    assert texts[2] == "- setting A: the plain model's best choice is drop, mixed; it loses **45.0 points**"
    assert "| **ours a** | 95.0 | 90.0 |" in texts[3]
    assert "vision-setting-b: not run" in texts[4]
