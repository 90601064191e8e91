"""`make demo` in small: three comparisons with the paper, the records' verdicts, one picture."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_demo_tells_the_paper_here_and_the_verdict(tmp_path):
    picture = tmp_path / "shown" / "demo.png"
    small = ["--points", "20000", "--scenes", "20", "--context", "256", "--out", str(picture)]
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", *small],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with (ROOT / "results" / "tables" / "claims.csv").open(encoding="utf-8", newline="") as file:
        recorded = {row["id"]: row for row in csv.DictReader(file)}
    lines = done.stdout.splitlines()
    assert [line[:4] for line in lines[::2]] == ["hull", "ViT:", "LLM:", "Pict"]
    for first, second, claim in zip(lines[::2], lines[1::2], ("geo-hull-speed", "vit-top1", "llm-speed"), strict=False):
        assert f"paper {recorded[claim]['paper']}" in first
        assert re.search(r"here \d", first)
        assert recorded[claim]["verdict, offline"].upper() in second
    assert matplotlib.image.imread(picture).ndim == 3
