"""Searches that are kept in a database: killed, gone on with, refused; the database is read by sqlite3 alone."""

import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

from entreg.errors import ConfigError
from entreg.runs.study import hold_study, silence_sqlalchemy
from tests.runs.small_project import Project, wait_until

silence_sqlalchemy()
import optuna  # noqa: E402

SEARCH = (
    *("-m", "hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_jobs=1"),
    *("hydra.sweeper.storage=sqlite:///studies/numbers.db", "hydra.sweeper.max_failure_rate=1.0"),
)


def trials(folder, path="studies/numbers.db"):
    """State, number and value of each trial, in order."""
    database = sqlite3.connect(f"file:{folder / path}?mode=ro", uri=True)
    try:
        return database.execute(
            "SELECT state, param_value, value FROM trials LEFT JOIN trial_params USING (trial_id) "
            "LEFT JOIN trial_values USING (trial_id) ORDER BY trial_id"
        ).fetchall()
    finally:
        database.close()


def complete(folder):
    return [number for state, number, _ in trials(folder) if state == "COMPLETE"]


@pytest.mark.slow
def test_a_search_in_a_database_goes_on_with_the_trials_that_it_has(tmp_path):
    project = Project(tmp_path)
    command = [*SEARCH, "seconds=0.3", "number=range(-2000,2000)"]
    search = project.start(*command, "hydra.sweeper.n_trials=5")
    wait_until(lambda: len(project.traces("begin")) == 3)
    os.killpg(search.pid, signal.SIGKILL)
    search.communicate()
    assert [state for state, *_ in trials(tmp_path)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    killed = project.traces("begin")[2]
    status, out, err = project.run(*command, "hydra.sweeper.n_trials=5")
    assert status == 0, err
    # Five in all: the killed one was done again, first; what was complete was neither proposed nor run again.
    begun = project.traces("begin")
    assert begun[3] == killed
    assert len(begun) == 6
    assert sorted(project.traces("end")) == sorted(complete(tmp_path)) == sorted(set(begun))
    assert all(value == number**2 for state, number, value in trials(tmp_path) if state == "COMPLETE")
    assert [state for state, *_ in trials(tmp_path)].count("FAIL") == 1
    assert f"Best value: {float(min(number**2 for number in begun))}" in out
    assert not [line for line in err.splitlines() if "Warning" in line]
    # One more is asked for.
    assert project.run(*command, "hydra.sweeper.n_trials=6")[0] == 0
    assert project.traces("begin")[:6] == begun
    assert len(complete(tmp_path)) == len(set(complete(tmp_path))) == 6


def test_a_storage_that_is_not_served_is_refused_before_anything_starts(tmp_path):
    project = Project(tmp_path)
    status, out, err = project.run(*SEARCH[:-2], "hydra.sweeper.storage=postgresql://here/x", "number=range(5)")
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("Error: hydra.sweeper.storage is sqlite:///FILE, no other database is served, got 'postgres")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "script.py"]


def sweeper(folder, **values):
    return OmegaConf.create(
        {
            "storage": f"sqlite:///{folder}/a.db",
            "study_name": "one",
            "n_trials": 4,
            "direction": "minimize",
            "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 3},
            **values,
        }
    )


def test_a_search_without_a_storage_is_left_as_it_is(tmp_path):
    config = sweeper(tmp_path, storage=None, study_name=None)
    before = OmegaConf.to_container(config)
    assert hold_study(config, "numbers") is None
    assert OmegaConf.to_container(config) == before


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_sweeper_is_told_what_is_left(tmp_path):
    config = sweeper(tmp_path, study_name=None)
    hold_study(config, "numbers").end("done")
    assert (config.study_name, config.n_trials, config.sampler.seed) == ("numbers", 4, 3)
    study = optuna.load_study(study_name="numbers", storage=config.storage)
    # Two are complete, one failed, one was killed; that which failed before it was complete needs nothing more.
    for number, ending in ((1, "COMPLETE"), (2, "FAIL"), (3, "FAIL"), (3, "COMPLETE"), (4, None)):
        study.enqueue_trial({"x": number})
        trial = study.ask()
        trial.suggest_int("x", 0, 9)
        if ending is not None:
            study.tell(trial, *([number] if ending == "COMPLETE" else []), state=optuna.trial.TrialState[ending])
    for earlier in (5, 7):
        # The second time nobody has done anything since.
        config = sweeper(tmp_path, study_name="numbers")
        hold_study(config, "another").end("done")
        assert (config.study_name, config.n_trials, config.sampler.seed) == ("numbers", 2, 3 + earlier)
    kept = optuna.load_study(study_name="numbers", storage=config.storage).trials
    assert [trial.state.name for trial in kept] == [
        "COMPLETE",
        "FAIL",
        "FAIL",
        "COMPLETE",
        "FAIL",
        "WAITING",
        "WAITING",
    ]
    assert [trial.system_attrs["fixed_params"] for trial in kept[5:]] == [{"x": 2}, {"x": 4}]


def test_one_launcher_at_a_time_goes_on_with_a_study(tmp_path, capsys):
    first = hold_study(sweeper(tmp_path), "numbers")
    # Another study in the same file need not wait.
    hold_study(sweeper(tmp_path, study_name="a/b"), "numbers").end("done")
    with ThreadPoolExecutor() as pool:
        second = pool.submit(hold_study, sweeper(tmp_path), "numbers")
        wait_until(lambda: "The study one in " in capsys.readouterr().err)
        assert not second.done()
        first.end("done")
        second.result().end("done")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"storage": "sqlite://"}, "no other database is served, got 'sqlite://'"),
        ({"storage": "sqlite:///:memory:"}, "no other database is served"),
        ({"storage": "redis://localhost"}, "no other database is served"),
        ({"storage": {"_target_": "optuna.storages.RDBStorage"}}, "no other database is served"),
        ({"sampler": {"_target_": "optuna.samplers.GridSampler"}}, "a grid search needs no hydra.sweeper.storage"),
        ({"direction": "maximize"}, r"the study one in .*a\.db is one to minimize, not to maximize"),
        ({"storage": "sqlite:///{folder}/text.db"}, r"the studies in .*text\.db cannot be read \(.*\); name another"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, values, sentence):
    hold_study(sweeper(tmp_path), "numbers").end("done")
    (tmp_path / "text.db").write_text("no database " * 100)
    if isinstance(values.get("storage"), str):
        values = {"storage": values["storage"].format(folder=tmp_path)}
    with pytest.raises(ConfigError, match=sentence) as caught:
        hold_study(sweeper(tmp_path, **values), "numbers")
    assert "\n" not in str(caught.value)
    # The right to write was given back.
    hold_study(sweeper(tmp_path), "numbers").end("done")


def test_packages_that_cannot_keep_a_study_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sqlalchemy.__version__", "2.1.9")
    with pytest.raises(ConfigError, match=r"needs SQLAlchemy 1\.4, .* but 2\.1\.9 is installed: pip install 'sqlalch"):
        hold_study(sweeper(tmp_path), "numbers")
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_searches(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without a launcher"):
        hold_study(sweeper(tmp_path), "numbers")
