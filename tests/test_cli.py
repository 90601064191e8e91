import os
import subprocess
import sys
import textwrap

import pytest

from entreg import cli
from entreg.errors import AssetError, InputError
from entreg.records import environment
from tests.faults.processes import run_program

SCRIPT = """
    from pathlib import Path
    from entreg.cli import hydra_main
    from entreg.errors import InputError

    @hydra_main("main", config_path=Path(__file__).parent / "configs", checked=["options"])
    def main(config):
        if config.mode == "input":
            raise InputError("n must be\\n positive.")
        if config.mode == "missing":
            config.needed
        if config.mode == "unknown":
            config.nothing
        if config.mode == "defect":
            1 / 0
        if config.mode == "interrupt":
            raise KeyboardInterrupt
        if config.mode == "part":
            import hydra
            hydra.utils.instantiate(config.part)
        print("ran", config.data.name, config.count, *config.options)

    if __name__ == "__main__":
        main()
"""

MAIN = """
    defaults:
      - _self_
      - data: square
    count: 3
    mode: plain
    needed: ???
    net: {width: 4}
    options: {}
    part: {_target_: collections.Counter, _args_: [abc]}
    hydra:
      output_subdir: null
      run: {dir: FOLDER/out}
      sweep: {dir: FOLDER/sweep}
      job_logging: {root: {handlers: [console]}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "configs" / "data").mkdir(parents=True)
    (folder / "configs" / "main.yaml").write_text(textwrap.dedent(MAIN).replace("FOLDER", str(folder)))
    for name in ("square", "disk"):
        (folder / "configs" / "data" / f"{name}.yaml").write_text(f"name: {name}\n")
    (folder / "configs" / "data" / "broken.yaml").write_text("a: [1,\n")
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    (folder / "a_file").write_text("in the way")
    return folder


def run(project, *arguments):
    return run_program(
        project / "script.py", *arguments, folder=project, environment={"PYTHONPATH": str(environment.REPOSITORY)}
    )


def test_a_good_run_says_nothing_on_standard_error(project):
    result = run(project, "data=disk", "count=5")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran disk 5\n", "")


def test_a_part_that_its_reader_checks_takes_new_keys(project):
    result = run(project, "+options.depth=2")
    assert (result.returncode, result.stdout) == (0, "ran square 3 depth\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mode=input"], "n must be positive."),
        (
            ["data=dist"],
            "There is no configuration 'dist' in 'data' (there are broken, disk, square); did you mean 'disk'?",
        ),
        (["data=qqqq"], "There is no configuration 'qqqq' in 'data' (there are broken, disk, square)."),
        (["data=3"], "The configuration is wrong: Config group override must be a string or a list"),
        (["hydra/launcher=foo"], "There is no configuration 'foo' in 'hydra/launcher' (there are basic, joblib, "),
        (["dta=disk"], "There is no configuration key or group 'dta'; did you mean 'data'?"),
        (["cuont=5"], "There is no configuration key or group 'cuont'; did you mean 'count'?"),
        (["net.widht=5"], "There is no configuration key or group 'net.widht'; did you mean 'net.width'?"),
        (["options={depth: 2}"], "'options' has no such key; add one with +options.<key>=<value>."),
        (["+net.widht=5"], "Nothing reads the configuration key 'net.widht'; did you mean 'net.width'?"),
        (["--config-name", "mian"], "There is no configuration 'mian' (there are main); did you mean 'main'?"),
        (["count"], "The override 'count' cannot be read"),
        (["count=[1,"], "The override 'count=[1,' cannot be read"),
        (["~nothing"], "'nothing' does not exist"),
        (["mode=missing"], "The configuration value 'needed' is missing; give it as needed=..."),
        (["mode=unknown"], "Key 'nothing' is not in struct"),
        (["data=broken"], "A configuration file is not valid YAML"),
        (["mode=part", "part._target_=collections.Cuonter"], "A part named in the configuration cannot be made"),
        (["hydra.run.dir=a_file/out"], "a file stands where a folder is needed; choose another output folder."),
    ],
)
def test_a_users_error_is_one_sentence(project, arguments, sentence):
    result = run(project, *arguments)
    assert result.returncode == cli.USER_ERROR
    assert result.stdout == ""
    assert sentence in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert (project / "a_file").read_text() == "in the way"


def test_a_defect_keeps_its_traceback(project):
    result = run(project, "mode=defect")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "1 / 0" in result.stderr
    assert "ZeroDivisionError" in result.stderr


def test_an_interruption_has_its_own_status(project):
    result = run(project, "mode=interrupt")
    assert result.returncode == cli.INTERRUPTED
    assert result.stderr == "Interrupted; what was finished is kept.\n"


def test_several_jobs(project):
    result = run(project, "-m", "data=disk,square", "count=1")
    assert result.returncode == 0
    assert "ran disk 1" in result.stdout
    assert "ran square 1" in result.stdout


def test_a_failing_job_does_not_stop_the_others(project):
    result = run(project, "-m", "mode=input,plain")
    assert result.returncode == cli.USER_ERROR
    assert "ran square 3" in result.stdout
    assert result.stderr.splitlines()[-1] == "Error: n must be positive."
    assert "Traceback" not in result.stderr


def test_a_failing_job_in_a_worker_process_is_told_too(project):
    arguments = ["-m", "mode=input,plain", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    # Joblib's workers look for the program of their parent, which a forked process has not.
    result = subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(environment.REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == cli.USER_ERROR
    assert result.stderr.splitlines()[-1] == "Error: n must be positive."
    assert "Traceback" not in result.stderr


def test_calling_with_a_configuration_runs_the_function_alone():
    @cli.hydra_main("whatever")
    def main(config):
        return config + 1

    assert main(41) == 42
    with pytest.raises(InputError, match="bad"):
        cli.hydra_main("whatever")(fail_on_input)(1)


def fail_on_input(config):
    raise InputError("bad")


@pytest.mark.parametrize(
    ("function", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: raising(AssetError("The asset x\n is damaged.")), 2, "Error: The asset x is damaged.\n"),
        (lambda: raising(KeyboardInterrupt()), 130, "Interrupted; what was finished is kept.\n"),
    ],
)
def test_entry_point_exits_with_the_status(function, status, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.entry_point(function)()
    assert caught.value.code == status
    assert capsys.readouterr().err == said


def raising(error):
    raise error


def test_entry_point_lets_defects_through():
    with pytest.raises(ZeroDivisionError):
        cli.entry_point(lambda: 1 / 0)()


def test_command_line_names_the_script_from_the_checkout():
    script = str(environment.REPOSITORY / "scripts" / "geometry.py")
    assert cli.command_line([script, "profile=smoke", "a=[1, 2]"]) == (
        "python scripts/geometry.py profile=smoke 'a=[1, 2]'"
    )
    assert cli.command_line(["/somewhere/else/pytest", "-q"]) == "python pytest -q"
