"""What scripts set for their process: before PyTorch is loaded, and never against the user's own environment."""

import ast
import json
import os
import subprocess
import sys

import pytest

from entreg.cli import CONFIGS

SCRIPTS = sorted((CONFIGS.parent / "scripts").glob("*.py"))
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

# Ends the process where PyTorch would be loaded, with what its OpenMP would find; or at the end of a script's imports.
UNTIL_TORCH = """
import json, os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps(dict(os.environ)))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[1], run_name="imported")
print("null")
"""


def environment(**changed):
    return {name: value for name, value in os.environ.items() if name not in OWN} | changed


def found_by_torch(script, **changed):
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, str(script)],
        env=environment(**changed),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_script_that_computes_prepares_its_process_first():
    for path in SCRIPTS:
        imported = [
            name.name if isinstance(node, ast.Import) else node.module
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        ]
        # The experiments and benchmarks are what Hydra configures.
        if any(name.startswith(("hydra.", "omegaconf")) for name in imported) and "entreg.runs.slurm" not in imported:
            assert next(name for name in imported if name.startswith("entreg")) == "entreg.script", path.name


@pytest.mark.parametrize("name", ["vision", "language"])
def test_settings_are_there_before_torch_is(name):
    found = found_by_torch(CONFIGS.parent / "scripts" / f"{name}.py")
    assert found["OMP_WAIT_POLICY"] == "passive"
    assert ("MALLOC_MMAP_THRESHOLD_" in found) == (sys.platform == "linux")


def test_a_users_environment_wins():
    script = CONFIGS.parent / "scripts" / "vision.py"
    found = found_by_torch(script, GOMP_SPINCOUNT="9", MALLOC_TRIM_THRESHOLD_="131072")
    assert "OMP_WAIT_POLICY" not in found
    assert "MALLOC_MMAP_THRESHOLD_" not in found
    assert (found["GOMP_SPINCOUNT"], found["MALLOC_TRIM_THRESHOLD_"]) == ("9", "131072")


COUNT_FAULTS = """
import resource, sys
if sys.argv[1] == "script":
    import entreg.script
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = bytearray(b"x") * 2**26
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_large_blocks_are_used_again():
    counts = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", COUNT_FAULTS, kind],
                env=environment(),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for kind in ("stock", "script")
    }
    # Pages are touched for the first time once instead of twenty times.
    assert counts["script"] < 0.2 * counts["stock"]
