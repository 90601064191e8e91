import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy
import pytest

from entreg.records import environment
from tests.records.samples import sample_record

# Tools of development that take no part in any result.
NOT_RECORDED = {
    "submitit",
    "pytest",
    "pytest-xdist",
    "alembic",
    "sqlalchemy",
    "latex2mathml",
    "mkdocs-material",
    "hypothesis",
    "ruff",
    "nbclient",
    "ipykernel",
    "pexpect",
    "pyte",
    "tensorboard",
    "entreg",
    "html5lib",
    "playwright",
    "jinja2",
    "markupsafe",
}


@pytest.fixture(autouse=True)
def new_process():
    """Nothing is known from records of other tests, and they learn nothing from these."""
    environment._git_state.cache_clear()
    yield
    environment._git_state.cache_clear()


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "entreg").mkdir()
    (tmp_path / "entreg" / "code.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path


def test_git_commit_and_clean_tree(repository):
    state = environment.git_state(repository)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"])
    assert state["dirty"] is False


def test_changed_and_new_code_is_dirty_but_results_are_not(repository):
    def dirty():
        environment._git_state.cache_clear()
        return environment.git_state(repository)["dirty"]

    (repository / "results").mkdir()
    (repository / "results" / "table.md").write_text("generated")
    assert dirty() is False
    (repository / "entreg" / "new.py").write_text("y = 1\n")
    assert dirty() is True
    (repository / "entreg" / "new.py").unlink()
    (repository / "entreg" / "code.py").write_text("x = 2\n")
    assert dirty() is True


def test_git_is_asked_once_in_a_process(repository, monkeypatch):
    state = environment.git_state(repository)
    # The code that this process has loaded is that of its start; and a record may change what it was given.
    environment.git_state(repository)["commit"] = None
    monkeypatch.setattr(environment, "_git", lambda *_: pytest.fail("git was asked again"))
    assert environment.git_state(repository) == state


def test_git_variables_of_a_hook_do_not_mislead(repository, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GIT_DIR", str(tmp_path_factory.mktemp("elsewhere")))
    assert environment.git_state(repository)["commit"] is not None


def test_an_installed_copy_inside_a_foreign_checkout_has_no_commit(repository):
    inside = repository / "venv" / "site-packages"
    inside.mkdir(parents=True)
    assert environment.git_state(inside) == {"commit": None, "dirty": None}


def test_without_git_the_commit_is_unknown_and_the_record_valid(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.git_state() == {"commit": None, "dirty": None}
    assert sample_record()["code"] == {"commit": None, "dirty": None}


def test_versions_come_from_metadata():
    versions = environment.library_versions()
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == numpy.__version__
    assert {"torch", "scipy", "numba"} <= set(versions)


def test_every_dependency_is_recorded():
    project = tomllib.loads((environment.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower() for requirement in wanted}
    assert names - NOT_RECORDED <= set(environment.RECORDED_DISTRIBUTIONS)


def test_device_description():
    device = environment.device_description()
    assert device["cpu"]
    assert 1 <= device["available_cores"] <= device["logical_cores"] == os.cpu_count()
    assert device["threads"] >= 1
    assert device["memory_gib"] is None or device["memory_gib"] > 0.1


def test_the_host_name_is_nowhere():
    assert platform.node()
    assert platform.node() not in str(environment.device_description())


def test_recording_and_launching_do_not_load_torch():
    script = (
        "import sys\n"
        "import entreg.experiments.studies, entreg.runs.status\n"
        "from entreg.records import environment\n"
        "environment.device_description(), environment.library_versions()\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    root = Path(environment.REPOSITORY)
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_a_gpu_is_named(monkeypatch):
    class Cuda:
        @staticmethod
        def is_available():
            return True

        @staticmethod
        def get_device_name():
            return "Example GPU"

    class Torch:
        cuda = Cuda

        @staticmethod
        def get_num_threads():
            return 3

    monkeypatch.setitem(sys.modules, "torch", Torch)
    device = environment.device_description()
    assert device["gpu"] == "Example GPU"
    assert device["threads"] == 3
