"""Notebooks are committed without outputs, type no measured number, and run with all records, some and none."""

import ast
import importlib
import io
import math
import re
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
import torch
from IPython.display import Image

import entreg.records
from entreg.records import REFERENCE_ROOT, RecordStore, new_record

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
VISION = FOLDER / "03_attention_and_budgets.ipynb"
WITH_RECORDS = [path for path in NOTEBOOKS if "RecordStore" in path.read_text()]
PLAN = {"kind": "tokens", "keep": 14, "before_layer": 1}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def shown_by(path):
    """Source of each code cell and what it shows, run in this process."""
    names, shown, threads = {}, [], torch.get_num_threads()
    try:
        for cell in cells(path, "code"):
            *statements, last = ast.parse(cell.source).body
            exec(compile(ast.Module(statements, []), str(path), "exec"), names)
            shown.append((cell.source, eval(compile(ast.Expression(last.value), str(path), "eval"), names)))
    finally:
        torch.set_num_threads(threads)
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


@pytest.fixture(scope="module")
def reference_records():
    return RecordStore(REFERENCE_ROOT).load_all()


def test_names_are_numbered_from_one():
    numbers = [int(re.fullmatch(r"(\d\d)_[a-z_]+\.ipynb", path.name)[1]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


@every_notebook
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.execution_count is None and not cell.outputs and not cell.metadata for cell in cells(path, "code"))


def measured_in(text):
    """What looks like a typed measurement: decimals, and whole numbers with a unit of something measured.

    Sparsities are settings; formulas, code and names of papers are no prose.
    """
    prose = re.sub(r"\$\$.*?\$\$|\$.*?\$|`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+", " ", text, flags=re.DOTALL)
    return re.findall(r"\d+\.\d+|\d+ ?%(?! sparsity)|\d+ ?(?:x|×|times|points|nats|bits|ms|s|seconds)\b", prose)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ours gains 4 points", ["4 points"]),
        ("it is 2.5x faster, or 3x", ["2.5", "3x"]),
        ("keeps 80 % of them", ["80 %"]),
        ("at 80 % sparsity, with $H \\le 1.5$ and `0.75`, 14 of 144 patches, section 3", []),
    ],
)
def test_typed_measurements_are_found(text, found):
    assert measured_in(text) == found


@every_notebook
def test_no_measured_number_is_typed(path):
    for cell in cells(path, "markdown"):
        assert measured_in(cell.source) == []
    for cell in cells(path, "code"):
        texts = [node.value for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Constant)]
        typed = [text for text in texts if isinstance(text, str) and re.search(r"\d ?(%|x\b|points|nats)", text)]
        # The target of a controller is a setting.
        assert [text for text in typed if "target" not in text] == []


@every_notebook
def test_only_public_names_are_used(path):
    for cell in cells(path, "code"):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"_[^_]", node.attr)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("entreg"):
                assert "._" not in node.module
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert alias.name in getattr(module, "__all__", vars(module))
                    assert not alias.name.startswith("_")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # matplotlib given a tensor
@every_notebook
def test_every_cell_shows_something_with_the_reference_records(path, reference_records, monkeypatch):
    # `make notebooks` runs them in kernels of their own; here the records are read once for all.
    monkeypatch.setattr(RecordStore, "load_all", lambda self: reference_records)
    for source, shown in shown_by(path):
        if isinstance(shown, Image):
            height, width, _ = matplotlib.image.imread(io.BytesIO(shown.data)).shape
            assert abs(width - 2 * shown.width) <= 2
            assert max(width, height) <= 2400, source
        else:
            assert shown.data.strip(), source


@pytest.mark.parametrize("path", WITH_RECORDS, ids=lambda path: path.stem)
def test_without_records_every_cell_that_reads_them_says_so(path, monkeypatch, tmp_path):
    monkeypatch.setattr(entreg.records, "REFERENCE_ROOT", tmp_path)
    first, *others = ((source, one) for source, one in shown_by(path) if reads_records(source))
    assert first[1].data.startswith("0 records of")
    assert first[1].data.endswith("among 0.")
    assert others
    assert all("not run" in one.data.lower() for _, one in others)


def reads_records(source):
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    return bool(names & {"records", "vision"})


def test_with_some_records_the_numbers_are_theirs_and_the_rest_says_so(monkeypatch, tmp_path):
    for method, value in (("plain", 0.5), ("ours_a", 0.9)):
        rows = accuracy("dense", 0.95) + accuracy("setting_a", value, "drop", "mixed")
        save(tmp_path, "vit/digit_scenes", method, rows)
    save(tmp_path, "vit/overlays", "plain", [], overlay())
    monkeypatch.setattr(entreg.records, "REFERENCE_ROOT", tmp_path)
    shown = [one for source, one in shown_by(VISION) if reads_records(source)]
    pictures = [one for one in shown if isinstance(one, Image)]
    texts = [one.data for one in shown if not isinstance(one, Image)]
    assert len(pictures) == 2
    assert texts[0] == "3 records of vision experiments among 3."
    assert texts[1].splitlines()[-1] == f"| plain | {math.exp(math.log(4)):.0f} | 3 | 75 % |"
    assert texts[2] == "- setting A: the plain model's best choice is drop, mixed; it loses **45.0 points**"
    assert "| **ours a** | 95.0 | 90.0 |" in texts[3]
    assert "vision-setting-b: not run" in texts[4]
