"""What the pages under docs/ say exists, and their commands and recipes work as written."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_method

from entreg.cli import CONFIGS
from entreg.experiments.geometry import experiment as geometry_experiment
from entreg.experiments.language import experiment as language_experiment
from entreg.experiments.profiles import checked_config
from entreg.experiments.studies import study_configs
from entreg.experiments.vision import experiment as vision_experiment
from entreg.training.penalties import QUANTITIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
METHOD, PAPER_SCALE, EXTENDING = (DOCS / name for name in ("method.md", "paper_scale.md", "extending.md"))
README = ROOT / "README.md"
PAGE_FILES = sorted(DOCS.rglob("*.md"))
OTHER_PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "results" / "README.md")
FENCE = r"```{language}\n(.*?)```"
TINY = [
    "model.options.depth=2",
    "model.options.embed_dim=16",
    "base.trainer.steps=1",
    "base.trainer.warmup_steps=0",
    "base.trainer.batch_size=4",
    "trainer.steps=1",
    "trainer.warmup_steps=0",
    "trainer.batch_size=4",
    "evaluation.limit=6",
    "evaluation.batch_size=6",
    "tracker=none",
]
PLANS = ["evaluation.localisation=null", "evaluation.plans.columns=null", "evaluation.plans.tokens=null"]


def blocks(text, language):
    return re.findall(FENCE.format(language=language), text, flags=re.DOTALL)


def commands(text):
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def section(path, title):
    """Text below a heading, to the next one of its level."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return found


# ---- what is named exists


def prose(path):
    """A page without its code."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def anchors(path):
    headings = re.findall(r"^#+ (.*)", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in headings}


@pytest.mark.parametrize("path", [*OTHER_PAGES, *PAGE_FILES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(path)):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.split()) <= 1100
    for line in text.splitlines():
        if line.startswith("|"):
            # What a reader sees of a cell: a link is its words.
            shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)
            assert all(len(cell.strip()) <= 60 for cell in re.split(r"(?<!\\)\|", shown)), line


# Of the README what was found, of the other pages everything.
TOLD = {README: section(README, "What we found"), **{path: prose(path) for path in sorted(DOCS.glob("results/*.md"))}}


@pytest.mark.parametrize("path", TOLD, ids=lambda path: path.stem)
def test_numbers_that_are_told_stand_in_a_table_that_is_linked(path):
    """Of three digits or more; rounder ones are the author's words."""
    linked = {path.parent / link for link in re.findall(r"\]\(([^)#]+\.md)(?:#[^)]*)?\)", path.read_text())}
    tables = " ".join(one.read_text() for one in linked if one.parent.name == "tables")
    known = [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*(?:\.\d+)?", tables)]
    for number in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", re.sub(r"\]\([^)]*\)", "", TOLD[path])):
        digits = number.replace(".", "").lstrip("0")
        if len(digits) >= 3:
            places = len(number.partition(".")[2])
            assert any(f"{one:.{places}f}" == number for one in known), number


def named(path):
    return sorted(set(re.findall(r"`(entreg(?:\.\w+)+)`", path.read_text())))


@pytest.mark.parametrize("name", sorted({name for path in (METHOD, PAPER_SCALE, EXTENDING) for name in named(path)}))
def test_names_are_public_and_exist(name):
    parts = name.split(".")
    assert not any(part.startswith("_") for part in parts)
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert part in getattr(found, "__all__", vars(found))
            found = getattr(found, part)
        return
    pytest.fail(f"there is no {name}")


@pytest.mark.parametrize("package", ["entreg.entropy", "entreg.geometry", "entreg.regularizer"])
def test_the_method_names_what_the_core_computes(package):
    module = importlib.import_module(package)
    public = getattr(module, "__all__", ["EntropyRegularizer", "Term"])
    # Results and helpers need no formula.
    helpers = {"PartKind", "Triangulation", "DISTRIBUTIONS", "generate"}
    assert {f"{package}.{name}" for name in public if name not in helpers} <= set(named(METHOD))


def test_the_method_lists_every_quantity_that_can_be_penalised():
    table = section(METHOD, "5. The regulariser")
    assert set(QUANTITIES) <= set(re.findall(r"`(\w+)`", table))


def test_formulas_are_closed():
    for path in PAGE_FILES:
        text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
        assert text.count("$$") % 2 == 0
        assert text.replace("$$", "").count("$") % 2 == 0, path


# ---- what is typed works


def scripts_of(command):
    """Script and arguments of every script that a line runs, by itself or through make."""
    if command.startswith("make "):
        words = shlex.split(command, comments=True)[1:]
        make = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", *words]
        lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    else:
        lines = [command]
    found = []
    for words in (shlex.split(line, comments=True) for line in lines if "scripts/" in line):
        starts = [place for place, word in enumerate(words) if word.startswith("scripts/")]
        found += [(words[start], words[start + 1 :]) for start in starts[:1]]
    return found


def single_jobs(arguments):
    """Overrides of the jobs of a multirun, each with the first value of what is varied; otherwise the arguments."""
    if "-m" not in arguments:
        return arguments
    chosen = []
    for override in OverridesParser.create().parse_overrides([one for one in arguments if one != "-m"]):
        key = override.get_key_element()
        varied = override.is_sweep_override()
        value = next(override.sweep_string_iterator()) if varied else override.get_value_element_as_str()
        chosen.append(f"{key}={value}")
    return chosen


def plan(script, arguments):
    """Everything that the script would refuse before it starts, and the runs that it would do."""
    entry = {"train": "vision"}.get(Path(script).stem, Path(script).stem)
    if not (CONFIGS / f"{entry}.yaml").exists():
        return [None]
    if entry != "benchmark" and script != "scripts/train.py" and "geometry" not in script:
        # Seeds differ in nothing but the seed, and tests/experiments looks at all methods: the first one is enough.
        arguments = [*arguments, "study.seeds=[0]"]
        if not any(one.startswith(f"profile.{entry}.methods=") for one in arguments):
            first = next(iter(hydra.compose(entry, arguments).study.methods))
            arguments = [*arguments, f"profile.{entry}.methods=[{first}]"]
    config = hydra.compose(entry, arguments)
    if entry == "benchmark":
        chosen = checked_config(config, arguments, entry)["benchmark"]
        return [get_method(one["_target_"]) for one in ([chosen] if "_target_" in chosen else chosen.values())]
    if script == "scripts/train.py":
        return [vision_experiment.plan_run(checked_config(config, arguments, entry))]
    if entry == "geometry":
        found = geometry_experiment.experiment_configs(config, arguments)
        return [run for one in found for run in geometry_experiment.plan_runs(one)]
    planned = {"vision": vision_experiment, "language": language_experiment}[entry].plan_run
    return [planned(one) for one in study_configs(config, arguments, entry)]


@pytest.fixture
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


OUTSIDE = section(EXTENDING, "An experiment").partition("### In the package")[0]
PAGES = [path.read_text() for path in (*OTHER_PAGES, *PAGE_FILES) if path != EXTENDING] + [OUTSIDE]
COMMANDS = list(dict.fromkeys(command for text in PAGES for command in commands(text)))


@pytest.fixture(scope="module")
def accepted():
    """What was looked at already: make targets run each other's commands."""
    return set()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command, accepted, initialised_hydra):
    for script, arguments in scripts_of(command):
        if (script, *arguments) in accepted:
            continue
        assert (ROOT / script).is_file()
        runs = plan(script, single_jobs(arguments))
        assert runs
        if "profile=paper" in arguments:
            assert all(run.config.get("scale", "paper") == "paper" for run in runs if hasattr(run, "config"))
        accepted.add((script, *arguments))


def test_every_experiment_of_the_papers_scale_has_its_command():
    found = [arguments for command in commands(PAPER_SCALE.read_text()) for _, arguments in scripts_of(command)]
    text = " ".join(argument for arguments in found for argument in arguments)
    for name in ("vit/imagenet", "cifar/cifar100", "llm/llama_2_7b", "llm/mistral_7b", "llm/phi_2", "llm/other"):
        assert f"experiment={name}" in text
    claims = (ROOT / "entreg" / "records" / "claims.yaml").read_text()
    headings = " ".join(re.findall(r"^## .*", PAPER_SCALE.read_text(), re.MULTILINE))
    for claim in re.findall(r"`([a-z]+-[a-z0-9]+)`", headings):
        assert f"id: {claim}" in claims


def test_make_targets_of_the_docs_exist():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in (*OTHER_PAGES, *PAGE_FILES):
        for line in re.findall(r"`(make [^`]*)`", path.read_text()) + commands(path.read_text()):
            if line.startswith("make "):
                asked = [word for word in shlex.split(line, comments=True)[1:] if re.fullmatch(r"[a-z-]+", word)]
                assert asked
                assert set(asked) <= targets, line


# ---- what is shown of Python runs as it stands

CODE = re.compile(
    r"^(?P<heading>#+ )|^\*\*`(?P<file>[^`]+)`\*\*$|^```python(?: (?P<needs>[^\n]+))?\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# A word after ```python says that a block needs more than `make setup` gives; its first line says so to the reader.
NEEDS = {"cuda": ("# On a CUDA device:\n", torch.cuda.is_available)}
SHOWN = [path for path in (README, *PAGE_FILES) if "```python" in path.read_text()]
# Nothing may be fetched, and nobody's account be used.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def program(path):
    """The page's Python in the order of the page, every line with its number there.

    The content of a file that is named above it is no part of it: that is for the recipes below, which need a copy of
    the repository.
    """
    text, file = path.read_text(), None
    lines = [""] * text.count("\n")
    for match in CODE.finditer(text):
        if match["body"] is None:
            file = match["file"]
            continue
        if file is not None:
            assert path == EXTENDING, file
            continue
        usable = True
        if match["needs"] is not None:
            first, is_there = NEEDS[match["needs"]]
            assert match["body"].startswith(first)
            usable = is_there()
        compile(match["body"], str(path), "exec")
        start = text.count("\n", 0, match.start("body"))
        body = match["body"].splitlines()
        if usable:
            lines[start : start + len(body)] = body
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "path", [path for path in SHOWN if "```python" in path.read_text()], ids=lambda path: path.stem
)
def test_python_of_a_page_runs_from_top_to_bottom(path, tmp_path):
    code = program(path)
    if not code.strip():
        pytest.skip("every block needs what this machine has not")
    script = tmp_path / f"{path.stem}.py"
    script.write_text(code)
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_recipe_of_files_is_followed():
    titles = re.findall(r"^## (.*)", EXTENDING.read_text(), re.MULTILINE)
    assert [title for title in titles if "### In the package" in section(EXTENDING, title)] == RECIPES


# ---- the recipes are followed

RECIPES = ["A regulariser", "A plan", "An experiment"]


def changes(text):
    """(file, language, content) of every block that a file's name stands above, in order."""
    file = None
    pattern = r"^\*\*`(?P<file>[^`]+)`\*\*$|^```(?P<language>\w+)\n(?P<body>.*?)^```$"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        if match["file"]:
            file = match["file"]
        elif match["language"] in ("diff", "python", "yaml") and file is not None:
            yield file, match["language"], match["body"]


def follow(title, root):
    """Apply a recipe to the copy of the repository; returns the Python files that it touches and its commands."""
    _, _, text = section(EXTENDING, title).partition("### In the package")
    touched = []
    for file, language, body in changes(text):
        path = root / file
        if language == "diff":
            lines = body.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            old = path.read_text()
            assert old.count(before) == 1, f"{file} has changed: {before}"
            path.write_text(old.replace(before, after))
        else:
            assert not path.exists(), f"{file} is there already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
        if file.endswith(".py") and file not in touched:
            touched.append(file)
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    return touched, lines


def run_in(root, *words):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def copy_of_the_repository(tmp_path):
    for name in ("entreg", "configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_works_as_written(title, copy_of_the_repository):
    root = copy_of_the_repository
    touched, lines = follow(title, root)
    run_in(root, "-m", "ruff", "check", "--quiet", *touched)
    run_in(root, "-m", "ruff", "format", "--check", "--quiet", *touched)
    tests = [file for file in touched if file.startswith("tests/")]
    if tests:
        run_in(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    for line in lines:
        _, script, *arguments = shlex.split(line)
        if script == "scripts/tables.py":
            run_in(root, script, *arguments)
            continue
        small = [*TINY, *(PLANS if "experiment=" not in line else [])]
        output = run_in(root, script, *arguments, *small)
        assert "vision records in outputs/runs" in output
    records = list((root / "outputs" / "runs").glob("*.json"))
    if title == "An experiment":
        assert len(records) == 4
        table = (root / "outputs" / "tables" / "vision-penalty-ramps.md").read_text()
        assert "| plain |" in table
        assert "| ours long ramp |" in table
    else:
        (record,) = records
        assert ("collision_entropy" if title == "A regulariser" else "key_norm") in record.read_text()
