"""The repository's own promises: pins agree, packages stay pure, the README's commands exist."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def constraint_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_conda_environment_carries_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip_lines = environment["dependencies"][-1]["pip"]
    assert {line for line in pip_lines if not line.startswith("-e")} == constraint_pins()


def test_constraints_pin_every_direct_dependency_that_make_setup_installs():
    project = (ROOT / "pyproject.toml").read_text()
    # flash needs a CUDA compiler.
    skipped = {"flash-attn", "entreg", "setuptools"}
    names = set(re.findall(r'"([A-Za-z0-9_-]+)>=', project)) - skipped
    pinned = {re.split("==", pin)[0].lower() for pin in constraint_pins()}
    assert {name.lower() for name in names} <= pinned


@pytest.mark.parametrize("package", ["entreg.entropy", "entreg.geometry", "entreg.regularizer"])
def test_core_packages_import_neither_hydra_nor_model_libraries(package):
    forbidden = "{'hydra', 'omegaconf', 'timm', 'transformers', 'torchvision', 'wandb'}"
    code = f"import sys, {package}; print(sorted({forbidden} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_entropy_does_not_import_geometry():
    code = "import sys, entreg.entropy; print([m for m in sys.modules if m.startswith('entreg.geometry')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def make_targets():
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_bare_make_lists_every_target():
    declared = set(re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    listing = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = {line.split()[0] for line in listing.splitlines()}
    assert listed == declared


def test_commands_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()]
    targets = re.findall(r"\bmake ([a-z-]+)", "\n".join(commands))
    assert {"reproduce", "test"} <= set(targets) <= make_targets()
    scripts = re.findall(r"\b(scripts/\w+\.py)", "\n".join(commands))
    assert all((ROOT / script).is_file() for script in scripts)
    for linked in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / linked).exists(), linked


def _imports():
    """Dotted names of the modules of entreg, and for each what it imports when it is loaded."""
    files = {}
    for path in sorted((ROOT / "entreg").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def found(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in files else node.module for name in named)
        for child in ast.iter_child_nodes(node):
            yield from found(child)

    return {name: set(found(ast.parse(path.read_text()))) & set(files) for name, path in files.items()}


def test_no_module_is_imported_in_a_circle():
    graphlib.TopologicalSorter({name: used - {name} for name, used in _imports().items()}).prepare()


def test_families_do_not_know_each_other_and_the_core_of_records_knows_none():
    families = ("geometry", "vision", "language")

    def family(module):
        return next((one for one in families if module.startswith(f"entreg.experiments.{one}")), None)

    for name, used in _imports().items():
        others = {family(module) for module in used} - {None, family(name)}
        if family(name) is not None:
            assert not others, name
        if name.startswith(("entreg.records", "entreg.sparse", "entreg.entropy", "entreg.geometry", "entreg.adapters")):
            assert not any(module.startswith("entreg.experiments") for module in used), name


def test_tables_figures_and_claims_load_without_model_libraries():
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'timm', 'transformers', 'torchvision'): sys.modules[name] = None\n"
        "from entreg.records.registry import discover, telling_modules\n"
        "discover()\n"
        "print(len(telling_modules()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 10
