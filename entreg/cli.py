"""How every script ends: with its result, or with one sentence and a non-zero status.

Status 2 is an error that the user can act on (:class:`entreg.errors.EntregError`, a wrong configuration name, key or
override, an output folder that cannot be written), 130 an interruption. Any other exception is a defect and keeps its
traceback.

``python scripts/<name>.py -m key=a,b`` (several jobs) works too, see :mod:`entreg.runs`: the function must be at the
module's top level and all its results must go through its configuration's folders. A failing job does not stop the
others; the last lines say how many failed and where to look, the very last what was wrong with the first of them.
"""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from entreg import distributed
from entreg.errors import ConfigError, EntregError, OutputError, first_line
from entreg.names import nearest, suggestion

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The repository's tree of configurations."""

USER_ERROR = 2
INTERRUPTED = 130

_CALLBACK = "+hydra.callbacks.sweep._target_=entreg.runs.multirun.RegisterSweep"
"""An override of every script, by which Hydra tells of a multirun."""

FAMILIES = {"geometry": "geometry", "llm": "language", "vit": "vision", "cifar": "vision"}
"""Folder in ``configs/experiment`` to the entry configuration that its experiments are for."""

_PLUGINS = {
    "hydra/launcher": ("basic", "joblib", "ray", "ray_aws", "rq", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("ax", "basic", "nevergrad", "optuna"),
}
"""What Hydra has plugins for, each in a package of its own."""

_OUTPUT_ERRORS = {
    errno.ENOENT: "the folder cannot be made",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
}


def run_script(main: Callable[[], Any]) -> int:
    """Calls ``main`` and turns what happens into an exit status.

    Args:
        main: returns None or an exit status.

    Returns:
        The status; the one sentence of an :class:`EntregError` has gone to standard error, once for all processes of a
        launcher.
    """
    try:
        with distributed.quiet():
            status = main()
    except EntregError as error:
        if distributed.tells():
            print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if distributed.tells():
            print("Interrupted; what was finished is kept.", file=sys.stderr)
        return INTERRUPTED
    return int(status or 0)


def entry_point(function: Callable[[], Any]) -> Callable[[], None]:
    """Decorator for a script's main function: the process exits with the status of :func:`run_script`."""

    @functools.wraps(function)
    def main() -> None:
        sys.exit(run_script(function))

    return main


def hydra_main(
    config_name: str,
    config_path: str | os.PathLike[str] = CONFIGS,
    *,
    checked: Collection[str] = (),
    shared: bool = False,
) -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """``@hydra.main`` for the repository's configurations, with errors as one sentence.

    ::

        @hydra_main("geometry")
        def main(config: DictConfig) -> None: ...

        if __name__ == "__main__":
            main()

    Calling the result with a configuration runs the function on it and nothing else, for tests and notebooks.

    Args:
        config_name: the primary configuration, without ``.yaml``.
        config_path: folder of the configurations.
        checked: parts, with dots, whose readers refuse keys that they do not know: ``+part.key=value`` may add any.
        shared: whether several processes of a launcher share the work; otherwise the first does it all.
    """

    def decorate(function: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def main(config: Any = None) -> Any:
            if config is not None:
                return function(config)
            if not shared and not distributed.is_first():
                sys.exit(0)
            sys.exit(run_script(lambda: _run_hydra(function, config_name, Path(config_path).resolve(), checked)))

        return main

    return decorate


def _run_hydra(function: Callable[[Any], Any], config_name: str, folder: Path, checked: Collection[str]) -> int:
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from entreg.runs import multirun
    from entreg.runs.status import conclude, wait_for_others

    # Hydra's own handler prints several lines and exits with 1; with this set it lets exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    task = multirun.Task(function, functools.partial(_as_sentence, config_name=config_name, folder=folder))
    multirun.RegisterSweep.begun = None

    def run() -> None:
        try:
            with _further_override(_CALLBACK):
                hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(task)()
        except multirun.Refusal as refusal:
            raise refusal.error from None
        finally:
            multirun.RegisterSweep.release()

    try:
        _refuse_others_experiments(config_name, folder)
        _refuse_unread_keys(config_name, folder, checked)
        run()
        # Jobs that another launcher was at are left to it; should it be killed, they are run after all.
        while multirun.RegisterSweep.begun is not None and wait_for_others(multirun.RegisterSweep.begun):
            run()
    except EntregError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _as_sentence(error, config_name, folder) from error
    except Exception as error:
        if multirun.RegisterSweep.begun is not None:
            return conclude(multirun.RegisterSweep.begun, stopped=error)
        # Before the function began, the only files that are written are Hydra's logs and snapshots.
        if not task.entered and isinstance(error, ValueError) and str(error).startswith("Config group override"):
            raise ConfigError(f"The configuration is wrong: {first_line(error).rstrip('.')}.") from error
        if task.entered or not isinstance(error, OSError) or error.errno not in _OUTPUT_ERRORS:
            raise
        raise OutputError(
            f"Cannot write {error.filename}: {_OUTPUT_ERRORS[error.errno]}; choose another output folder."
        ) from error
    if task.failure is not None:
        raise task.failure
    return 0 if multirun.RegisterSweep.begun is None else conclude(multirun.RegisterSweep.begun)


@contextlib.contextmanager
def _further_override(override: str) -> Iterator[None]:
    """Hydra sees one more override, which nobody typed. It reads overrides only if they stand together."""
    typed = sys.argv
    first = next((place for place, word in enumerate(typed) if place and "=" in word and word[0] != "-"), len(typed))
    sys.argv = [*typed[:first], override, *typed[first:]]
    try:
        yield
    finally:
        sys.argv = typed


def _refuse_others_experiments(config_name: str, folder: Path) -> None:
    """Most of them would compose, and be run as what they are not."""
    for text in sys.argv[1:]:
        key, _, value = text.lstrip("+").partition("=")
        if key != "experiment":
            continue
        for name in value.split(","):
            entry = FAMILIES.get(name.strip().partition("/")[0], config_name)
            if entry != config_name and name.strip() in _options(folder, key):
                raise ConfigError(
                    f"experiment={name.strip()} is for scripts/{entry}.py; the experiments of this script are "
                    f"{', '.join(_options(folder, key, config_name))}."
                )


def _refuse_unread_keys(config_name: str, folder: Path, checked: Collection[str]) -> None:
    """Hydra's ``+key=value`` adds any key, also a misspelt one that nothing reads; only groups may be added so."""
    groups = set(_groups(folder))
    for text in sys.argv[1:]:
        if not text.startswith("+") or "=" not in text:
            continue
        name = text.lstrip("+").partition("=")[0].partition("@")[0]
        if name in groups or name.partition(".")[0] == "hydra" or name.startswith(tuple(f"{one}." for one in checked)):
            continue
        known = _known_keys(config_name, folder)
        if known and name not in known:
            raise ConfigError(f"Nothing reads the configuration key {name!r}{nearest(name, [*known, *groups])}")


def _as_sentence(error: Exception, config_name: str, folder: Path) -> EntregError:
    """The sentence for what Hydra, OmegaConf or YAML complained about; re-raises what is not a user's error."""
    import yaml
    from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, EntregError):
            return cause
    line = first_line(error).rstrip(".")
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"The override {error.override!r} cannot be read ({line}); write it as key=value, a value with other "
            """than plain characters in quotes of its own: "key='value'"."""
        )
    if isinstance(error, MissingConfigException):
        return ConfigError(_missing_config(error, line, config_name, folder))
    inside = re.match(r"In '([^']+)': Could not override '([^']+)'", str(error))
    if inside:
        return ConfigError(
            f"{inside.group(1)}.yaml is not for this script: it chooses a configuration of {inside.group(2)!r}, and "
            f"{config_name}.yaml has none."
        )
    key = re.match(r"Could not override '([^']+)'", str(error))
    if key:
        keys, groups = _known_keys(config_name, folder), _groups(folder)
        own = _own_groups(config_name, folder)
        if key.group(1) in groups and key.group(1) not in own:
            return ConfigError(f"This script has no {key.group(1)} to choose; what can be chosen is {', '.join(own)}.")
        known = [*keys, *groups]
        if key.group(1) in known:
            return ConfigError(f"{key.group(1)!r} has no such key; add one with +{key.group(1)}.<key>=<value>.")
        hint = nearest(key.group(1), known)
        return ConfigError(f"There is no configuration key or group {key.group(1)!r}{hint}")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"The configuration value {error.full_key!r} is missing; give it as {error.full_key}=...")
    if isinstance(error, InstantiationException):
        if not any(isinstance(cause, TypeError | ImportError | AttributeError) for cause in chain):
            raise error
        return ConfigError(f"A part named in the configuration cannot be made: {' '.join(str(error).split())}.")
    if isinstance(error, yaml.YAMLError):
        return ConfigError(f"A configuration file is not valid YAML: {' '.join(str(error).split())}.")
    place = ""
    omega = next((cause for cause in chain if isinstance(cause, OmegaConfBaseException)), None)
    if omega is not None and getattr(omega, "full_key", None) and omega.full_key not in line:
        place = f" at {omega.full_key!r}"
    return ConfigError(f"The configuration is wrong{place}: {line}.")


def _missing_config(error: Any, line: str, config_name: str, folder: Path) -> str:
    missing = error.missing_cfg_file
    if missing is None:
        return f"{line}."
    missing = missing.removesuffix(".yaml")
    group, _, name = missing.rpartition("/")
    if name in _PLUGINS.get(group, ()):
        # Hydra's plugins are named so.
        package = f"hydra-{name.partition('_')[0]}-{group.partition('/')[2]}"
        return f"{group}={name} needs the package {package}, which is not installed: see docs/sweeps.md."
    while group and not (folder / group).is_dir() and group not in _PLUGINS:
        # The name has slashes itself.
        group, _, first = group.rpartition("/")
        name = f"{first}/{name}"
    if group.startswith("experiment/"):
        group, name = "experiment", missing.partition("/")[2]
    options = _PLUGINS.get(group) or _options(folder, group, config_name)
    if options:
        place = f"in {group!r} (there are {', '.join(options)})" if group else f"(there are {', '.join(options)})"
        return f"There is no configuration {name!r} {place}{suggestion(name, options) or '.'}"
    return f"There is no configuration group {group!r}{nearest(group, _groups(folder))}"


def _options(folder: Path, group: str, config_name: str | None = None) -> list[str]:
    """Configurations of a group and, with slashes, of the folders below it; without a group the entry points.

    With an entry configuration, of the experiments those that are for it.
    """
    files = (folder / group).rglob("*.yaml") if group else folder.glob("*.yaml")
    names = [path.relative_to(folder / group).with_suffix("").as_posix() for path in sorted(files)]
    if group != "experiment" or config_name is None:
        return names
    return [name for name in names if FAMILIES.get(name.partition("/")[0], config_name) == config_name]


def _groups(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_dir()]


def _own_groups(config_name: str, folder: Path) -> list[str]:
    """Of which an entry configuration chooses a member."""
    import yaml

    defaults = yaml.safe_load((folder / f"{config_name}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    return [key for entry in defaults if isinstance(entry, dict) for key in entry if key[:8] != "override"]


def _known_keys(config_name: str, folder: Path) -> list[str]:
    """All keys, with dots, of the configuration that the command line asks for, or of the plain one if it fails."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = set(_groups(folder))
    choices = [text for text in sys.argv[1:] if text.lstrip("+~").partition("=")[0].partition("@")[0] in groups]
    for overrides in (choices, []):
        try:
            with hydra.initialize_config_dir(str(folder), version_base="1.3"):
                config = hydra.compose(config_name, overrides=overrides)
            return list(_dotted(OmegaConf.to_container(config, resolve=False)))
        except (HydraException, OmegaConfBaseException):
            continue
    return []


def _dotted(value: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        name = f"{prefix}{key}"
        yield name
        yield from _dotted(item, f"{name}.")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def command_line(arguments: Sequence[str] | None = None) -> str:
    """What to type, as it should stand in a run record: ``python scripts/geometry.py profile=offline``.

    Args:
        arguments: as ``sys.argv``; None: those of this process or, in a job of a multirun, those of the job alone.
    """
    import shlex

    words = [word for word in (sys.argv if arguments is None else arguments) if word != _CALLBACK]
    root = CONFIGS.parent
    # Whatever has not loaded Hydra is no job; the process of a job may have been started with anything.
    multirun = sys.modules.get("entreg.runs.multirun")
    if arguments is None and multirun is not None and multirun.is_multirun():
        job = multirun.current_job()
        name = f"{multirun.script_name()}.py"
        words = [str(root / "scripts" / name) if (root / "scripts" / name).exists() else name, *job.single_run]
    script = Path(words[0]).resolve() if words else Path("python")
    words[:1] = [script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name]
    return " ".join(["python", *(shlex.quote(word) for word in words)])
