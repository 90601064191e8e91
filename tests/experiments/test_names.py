"""Nothing is replaced silently: every name and every value of every configuration is checked before anything runs."""

import copy
import functools
import sys

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.utils import get_method
from omegaconf import OmegaConf

from entreg import cli
from entreg.cli import CONFIGS
from entreg.errors import ConfigError, EntregError
from entreg.experiments.geometry import experiment as geometry_experiment
from entreg.experiments.language import experiment as language_experiment
from entreg.experiments.profiles import check_values
from entreg.experiments.studies import run_all, study_configs
from entreg.experiments.vision import experiment as vision_experiment
from entreg.records.store import RecordStore
from entreg.runs.objective import Objective


def files(*folders):
    return [
        f"{folder.partition('/')[0]}={path.relative_to(CONFIGS / folder.partition('/')[0]).with_suffix('')}"
        for folder in folders
        for path in sorted((CONFIGS / folder).glob("*.yaml"))
    ]


ENTRIES = {
    "vision": files("experiment/vit", "experiment/cifar"),
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
VISION_SPEED = "profile.vision.speed"
FREE_OF_LANGUAGE = {"data.name", "model.name"}


@pytest.fixture(autouse=True)
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@functools.cache
def composed(entry, *choices):
    config = OmegaConf.to_container(hydra.compose(entry, list(choices)), resolve=True)
    if "experiment=llm/other" in choices:
        config["model"]["name"] = "microsoft/phi-2"
    return config


def plan(entry, config):
    """All that a script does with a configuration before something runs."""
    check_values(config, [], entry)
    if entry != "benchmark":
        Objective.from_mapping(config["objective"])
    if entry == "vision":
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


def key_of(override):
    return override.lstrip("+~").partition("=")[0]


def typed(entry, *overrides):
    """A configuration as Hydra composes it; only choices of groups are composed, which takes long."""
    groups = [one for one in overrides if (CONFIGS / key_of(one)).is_dir()]
    config = copy.deepcopy(composed(entry, *groups))
    for one in OverridesParser.create().parse_overrides([one for one in overrides if one not in groups]):
        *parts, last = one.key_or_group.split(".")
        if one.is_delete():
            del value_at(config, parts)[last]
        else:
            changed, value = value_at(config, parts), one.value()
            changed[last] = {**changed[last], **value} if isinstance(value, dict) else value
    return config


def checked(entry, *overrides):
    check_values(typed(entry, *overrides), overrides, entry)


@pytest.mark.parametrize(
    ("entry", "overrides", "sentence"),
    [
        (
            "vision",
            ["profile.vision.methods=[plian]"],
            "unknown method 'plian' of .*; did you mean 'plain'",
        ),
        # A method of other experiments than the one that is run.
        ("vision", ["experiment=cifar/digits", "profile.vision.methods=[plain,ours_a]"], "unknown method 'ours_a'"),
        (
            "vision",
            ["profile.vision.methods=plain"],
            "methods must be a list of at least one name or null",
        ),
        ("vision", ["profile.vision.methods=[]"], "methods must be a list of at least one name or null"),
        ("language", ["profile.language.plans=[oars]"], "unknown plan 'oars' of .*; did you mean 'ours'"),
        ("language", ["profile.language.levels=[0.77]"], "unknown level '0.77' of profile.language.levels, known are"),
        ("geometry", ["profile=smoke", "profile.geometry.distributions=[sqare]"], "unknown distribution 'sqare'"),
        ("geometry", ["profile=reproduce", "profile.geometry.experiments=[hul]"], "unknown experiment 'hul' .*'hull'"),
        ("benchmark", ["benchmark=language_speed", "profile.language.plans=[oars]"], "unknown plan 'oars'"),
    ],
)
def test_a_profiles_lists_name_what_there_is(entry, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        checked(entry, *overrides)


def test_a_list_in_a_profiles_file_serves_all_experiments_and_is_checked_against_them():
    # The profile reproduce names methods of the ViT's and of the robustness experiment.
    overrides = ["experiment=cifar/digits", "profile=reproduce"]
    found = study_configs(hydra.compose("vision", overrides), overrides, "vision")
    assert [one["method"] for one in found] == ["plain", "label_smoothing", "ours"]
    config = typed("vision", *overrides)
    config["profile"]["vision"]["methods"] += ["orus"]
    with pytest.raises(ConfigError, match=r"unknown method 'orus' of profile\.vision\.methods, .*'ours'"):
        check_values(config, overrides, "vision")


@pytest.mark.parametrize(
    ("entry", "overrides", "limit"),
    [
        ("language", ["model.dtype=float12"], "profile.language.model.dtype"),
        ("language", ["model.name=microsoft/phi-2"], "profile.language.model.architecture"),
        ("language", ["model=phi_2"], "profile.language.model.architecture"),
        ("language", ["+model.options.hidden_size=96"], "profile.language.model.options"),
        ("language", ["evaluation.tasks.copy.contexts=[512,4096]"], "profile.language.max_context"),
        ("language", ["evaluation.tasks.needle={contexts: [512], count: 9}"], "profile.language.max_count"),
        ("language", ["evaluation.plans.ours.levels=[0.75,0.9]"], "profile.language.levels"),
        ("vision", ["evaluation.limit=100"], "profile.vision.max_images"),
        ("vision", ["evaluation.limit=null"], "profile.vision.max_images"),
        ("geometry", ["distributions=[circle,cities]"], "profile.geometry.distributions"),
        ("geometry", ["experiment=geometry/hull", "sizes=[500,5000]"], "profile.geometry.max_points"),
        ("benchmark", ["benchmark=vision_speed", "benchmark.batches=[1,8]"], f"{VISION_SPEED}.max_batch"),
        (
            "benchmark",
            ["benchmark=vision_speed", "benchmark.models.scenes.options.depth=2"],
            "profile.vision.speed.model_options",
        ),
        ("benchmark", ["benchmark=language_speed", "benchmark.dtypes=[bfloat16]"], "profile.language.speed.dtypes"),
        ("benchmark", ["benchmark.geometry_hull.sizes=[10,5000]"], "profile.geometry.max_points"),
    ],
)
def test_what_a_profile_would_not_serve_is_refused(entry, overrides, limit):
    said = key_of(overrides[-1])
    with pytest.raises(ConfigError, match=rf"^{said}(\.count)? would not be served: {limit}=.* of the profile smoke"):
        checked(entry, "profile=smoke", *overrides)


@pytest.mark.parametrize(
    ("entry", "overrides"),
    [
        ("language", ["model.attention=eager"]),
        ("language", ["model.dtype=float32"]),
        ("language", ["profile.language.model=null", "model.dtype=float16"]),
        ("language", ["evaluation.tasks.copy.contexts=[512]", "evaluation.tasks.copy.count=1"]),
        ("language", ["evaluation.plans.ours.levels=[0.9]"]),
        ("vision", ["evaluation.limit=5"]),
        ("geometry", ["distributions=[cities]"]),
        # Hydra merges mappings: an empty one changes nothing.
        ("geometry", ["experiment=geometry/hull", "sizes_of={}"]),
        ("benchmark", ["benchmark=vision_speed", "benchmark.dtypes=[bfloat16]"]),
    ],
)
def test_what_a_profile_serves_is_kept(entry, overrides):
    checked(entry, "profile=smoke", *overrides)


@pytest.mark.parametrize(
    ("entry", "override", "sentence"),
    [
        ("geometry", "training.entropy_weight=abc", "training.entropy_weight must be a number, got 'abc'"),
        ("geometry", "seeds=3", "seeds must be a list of at least one whole number, each at least 0 or null, got 3"),
        ("geometry", "sizes=[100,many]", "sizes must be a list of at least one whole number, each at least 1"),
        ("geometry", "time_budget=-1", "time_budget must be a number above 0, got -1"),
        ("geometry", "profile.repeats=0", "profile.repeats must be a whole number of at least 1, got 0"),
        ("geometry", "force=maybe", "force must be true or false, got 'maybe'"),
        ("vision", "trainer.steps=abc", "trainer.steps must be a whole number, got 'abc'"),
        ("vision", "base.trainer.learning_rate=null", "base.trainer.learning_rate must be a number, got null"),
        ("vision", "base.curriculum.cells=2.5", "base.curriculum.cells must be a whole number, got 2.5"),
        ("vision", "data.canvas=abc", "data.canvas must be a whole number of at least 1, got 'abc'"),
        ("vision", "model.pretrained=3", "model.pretrained must be true or false, got 3"),
        ("vision", "evaluation.splits=test", "evaluation.splits must be a list of at least one name, got 'test'"),
        ("vision", "evaluation.localisation=3", "evaluation.localisation must be a mapping of keys to values or null"),
        ("vision", "study.seeds=0", "study.seeds must be a list of at least one whole number"),
        ("vision", "resume=atuo", "resume must be auto or null, got 'atuo'"),
        ("language", "evaluation.tasks.copy.count=few", "evaluation.tasks.copy.count must be a whole number"),
        ("language", "training.context=abc", "training.context must be a whole number of at least 1, got 'abc'"),
        ("language", "store=5", "store must be text, got 5"),
        ("benchmark", "benchmark.entropy_law.levels=abc", "benchmark.entropy_law.levels must be a whole number"),
        ("benchmark", "~benchmark.entropy_law.levels", "benchmark.entropy_law.levels is missing; give it as"),
        ("benchmark", "profile.seeds=[]", "profile.seeds must be a list of at least one whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_sentence_with_its_key(entry, override, sentence):
    with pytest.raises(ConfigError) as caught:
        checked(entry, override)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_a_misspelt_choice_of_any_group_lists_what_there_is(entry):
    groups = own_groups(entry)
    with pytest.raises(MissingConfigException) as caught:
        hydra.compose(entry, [f"{groups[0]}=foo"])
    assert caught.value.missing_cfg_file == Missing(f"{groups[0]}/foo").missing_cfg_file
    for group in groups:
        said = cli._missing_config(Missing(f"{group}/foo"), "", entry, CONFIGS)
        assert said.startswith(f"There is no configuration 'foo' in '{group}' (there are ")
        of_this_script = [one.partition("=")[2] for one in ENTRIES[entry]]
        there = of_this_script if group == "experiment" else [path.stem for path in (CONFIGS / group).glob("*.yaml")]
        assert all(name in said for name in there)
        near = cli._missing_config(Missing(f"{group}/{misspelt(there[-1])}"), "", entry, CONFIGS)
        assert near.endswith(f"; did you mean {there[-1]!r}?")


class Missing:
    def __init__(self, file):
        self.missing_cfg_file = file


def own_groups(entry):
    return [group for group in cli._own_groups(entry, CONFIGS) if "@" not in group]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=geometry/hull"], ["is for scripts/geometry.py", "vit/digit_scenes", "cifar/digits"]),
        (["experiment=vit/digit_scenes,llm/sweep"], ["experiment=llm/sweep is for scripts/language.py"]),
    ],
)
def test_an_experiment_of_another_script_is_refused(overrides, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vision.py", *overrides])
    with pytest.raises(ConfigError) as caught:
        cli._refuse_others_experiments("vision", CONFIGS)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("entry", "overrides", "words"),
    [
        ("vision", ["experiment=vit/imagenet"], ["IMAGENET=", "data.root"]),
        ("vision", ["experiment=vit/imagenet", "data.root=''"], ["IMAGENET=", "data.root"]),
        ("vision", ["experiment=vit/imagenet", "data.root=FOLDER"], ["IMAGENET=", "data.root", "it is empty"]),
        ("vision", ["experiment=cifar/cifar100"], ["CIFAR=", "data.root"]),
        ("vision", ["experiment=cifar/cifar100", "data.root=FOLDER"], ["CIFAR=", "data.root"]),
        ("language", ["experiment=llm/other", "model.name=/nope"], ["MODEL=", "model.name", "/nope"]),
        ("language", ["experiment=llm/other", "model.name=FOLDER"], ["MODEL=", "model.name", "it is empty"]),
        ("language", ["experiment=llm/phi_2", "data.text.root=FOLDER"], ["WIKITEXT=", "data.text.root"]),
        ("language", ["experiment=llm/phi_2", "data.text.root=/nope"], ["WIKITEXT=", "data.text.root", "/nope"]),
        (
            "language",
            ["experiment=llm/phi_2", "data.text.name=news_sample", "data.summaries.root=/nope"],
            ["CNN=", "data.summaries.root", "/nope"],
        ),
    ],
)
def test_missing_data_and_models_are_one_sentence_before_any_run(
    entry, overrides, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    given = [one.replace("FOLDER", str(tmp_path / "empty")) for one in overrides]
    module = {"vision": vision_experiment, "language": language_experiment}[entry]
    run = {"vision": "run_vision", "language": "run_language"}[entry]
    monkeypatch.setattr(module, run, lambda *_: pytest.fail("something was run"))
    given += ["profile=paper", "device=cpu", f"checkpoints={tmp_path}"]
    runs = [module.plan_run(typed(entry, *given, f"seed={seed}")) for seed in (0, 1)]
    with pytest.raises(EntregError) as caught:
        run_all(runs, store=tmp_path / "runs", command="x")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert not list((tmp_path / "runs").rglob("*.*"))


def test_a_run_evaluates_the_plans_that_its_method_names():
    overrides = ["experiment=vit/token_rivals", "profile.vision.methods=[merging_a]", "study.seeds=[0]"]
    (config,) = study_configs(hydra.compose("vision", overrides), overrides, "vision")
    run = vision_experiment.plan_run(config)
    plans = run.config["evaluation"]["plans"]
    assert [name for name, plan in plans.items() if plan is not None] == ["merging_most", "merging_less"]
    run = language_experiment.plan_run(typed("language", "experiment=llm/training"))
    assert list(run.config["evaluation"]["plans"]) == ["ours", "window"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["study.plans=[ours,windw]"], "unknown plan 'windw' of study.plans, .*; did you mean 'window'"),
        (
            ["evaluation.plans.oracle.levels=[0.5]"],
            "evaluation.plans.oracle.levels would not be served: .* study.plans",
        ),
        (["profile.language.plans=[oracle]"], "unknown plan 'oracle' of profile.language.plans"),
    ],
)
def test_a_plan_that_is_not_evaluated_is_not_asked_for(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        checked("language", "experiment=llm/training", *overrides)


def test_a_geometry_study_names_experiments():
    with pytest.raises(ConfigError, match=r"unknown experiment 'hul' of study, .*; did you mean 'hull'"):
        geometry_experiment.experiment_configs(OmegaConf.create(typed("geometry", "study=[hul]")), ["study=[hul]"])


def test_a_profile_is_told_nothing_that_only_another_family_reads():
    with pytest.raises(ConfigError, match="for the experiments of vision, these are of language"):
        check_values(composed("language"), ["profile.vision.methods=[plain]"], "language")
