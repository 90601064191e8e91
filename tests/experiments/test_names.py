"""Nothing is replaced silently: every name and every value of every configuration is checked before anything runs."""

import copy
import functools

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_method
from omegaconf import OmegaConf

from entreg.cli import CONFIGS
from entreg.errors import EntregError
from entreg.evaluation import geometry_experiment, language_experiment, vision_experiment
from entreg.evaluation.profiles import check_values
from entreg.records.store import RecordStore
from entreg.runs.objective import Objective


def files(*folders):
    return [
        f"{folder.partition('/')[0]}={path.relative_to(CONFIGS / folder.partition('/')[0]).with_suffix('')}"
        for folder in folders
        for path in sorted((CONFIGS / folder).glob("*.yaml"))
    ]


ENTRIES = {
    "train": files("experiment/vit", "experiment/cifar"),
    "language": files("experiment/llm"),
    "geometry": files("experiment/geometry"),
    "benchmark": files("benchmark"),
}
CHOICES = [(entry, choice) for entry, choices in ENTRIES.items() for choice in choices]
# Text that is no name of anything that exists, or of what only the library or the folder that has it can check.
FREE = {
    *("name", "method", "store", "checkpoints", "base.checkpoint", "model.checkpoint", "regularizer.name"),
    *("profile.name", "profile.tracking", "tracker.directory", "tracker.project", "tracker.tags", "model.attention"),
    *("data.preprocessing.model", "data.augmentation.auto_augment", "objective.name", "objective.value"),
    *("profile.language.model.dtype", "benchmark._target_"),
}
FREE_OF_LANGUAGE = {"data.name", "model.name"}


@pytest.fixture(autouse=True)
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@functools.cache
def composed(entry, *overrides):
    named = ["model.name=microsoft/phi-2"] if "experiment=llm/other" in overrides else []
    return OmegaConf.to_container(hydra.compose(entry, [*overrides, *named]), resolve=True)


def plan(entry, config):
    """All that a script does with a configuration before something runs."""
    check_values(config, [], entry)
    if entry != "benchmark":
        Objective.from_mapping(config["objective"])
    if entry == "train":
        vision_experiment.plan_run(config)
    elif entry == "language":
        language_experiment.plan_run(config)
    elif entry == "geometry" and config["study"] is None:
        geometry_experiment.plan_runs(config)
    elif entry == "geometry":
        geometry_experiment.experiment_configs(OmegaConf.create(config), [])
    else:
        chosen = config["benchmark"]
        for one in [chosen] if "_target_" in chosen else chosen.values():
            run = get_method(one["_target_"])
            given = {key: value for key, value in one.items() if key != "_target_"}
            run(**given, profile=config["profile"], store=config["store"], command="x")


def names_of(value, path=()):
    """Paths of keys to all text and lists of text."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from names_of(item, (*path, name))
    elif isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
        yield path


def generic(path):
    """The key of a path with a star for what a file names itself."""
    own = ("plans", "rivals", "models", "methods", "variants", "penalties", "tasks")
    return ".".join("*" if before in own else part for before, part in zip((None, *path), path, strict=False))


def is_free(entry, key):
    return (
        key in FREE
        or key.startswith(("study.methods.", "objective.where."))
        or key.endswith((".root", ".source.name", ".global_pool", "._target_"))
        or (entry == "language" and key in FREE_OF_LANGUAGE)
    )


def misspelt(name):
    return f"{name[:2]}q{name[2:]}"


def value_at(config, path):
    for part in path:
        config = config[part]
    return config


def with_value(config, path, value):
    copied = copy.deepcopy(config)
    value_at(copied, path[:-1])[path[-1]] = value
    return copied


@pytest.fixture(scope="module")
def seen():
    """Keys that were tried: most experiments have most of them."""
    return set()


@pytest.mark.parametrize(("entry", "choice"), CHOICES)
def test_a_misspelt_name_is_one_sentence_with_the_right_one(entry, choice, seen, tmp_path, monkeypatch):
    # Whatever is not refused has a record already, so that nothing is ever measured.
    monkeypatch.setattr(RecordStore, "find", lambda *_: {})
    config = {**composed(entry, choice), "store": str(tmp_path)}
    faults = []
    for path in names_of(config):
        key = generic(path)
        if is_free(entry, key) or (entry, key) in seen:
            continue
        seen.add((entry, key))
        whole = value_at(config, path)
        right = whole[0] if isinstance(whole, list) else whole
        wrong = misspelt(right)
        try:
            plan(entry, with_value(config, path, [wrong, *whole[1:]] if isinstance(whole, list) else wrong))
            said = ""
        except EntregError as error:
            said = str(error)
        if "\n" in said or f"'{wrong}'" not in said or right not in said.replace(wrong, ""):
            faults.append((key, wrong, said))
    assert not faults
