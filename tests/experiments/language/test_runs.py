"""Every language experiment composes, runs in seconds, is resumed, and says at once what is missing."""

import json
import subprocess
import sys

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from entreg.adapters.language_models import ARCHITECTURES, random_language_model
from entreg.cli import CONFIGS
from entreg.errors import AssetError, ConfigError
from entreg.experiments.language import evaluation as language_evaluation
from entreg.experiments.language import experiment as language_experiment
from entreg.experiments.language.evaluation import expand_plans
from entreg.experiments.language.experiment import PAPER_MODELS, plan_run
from entreg.experiments.language.printout import report
from entreg.experiments.studies import run_all, study_configs
from entreg.records.store import RecordStore

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment" / "llm").glob("*.yaml"))
# Seconds instead of minutes.
TINY = [
    "profile=smoke",
    "profile.language.max_count=1",
    "evaluation.tasks.needle.depths=[0.5]",
    "evaluation.effective_support.num_sampled_queries=8",
    "evaluation.tasks.summary.new_tokens=8",
]
TRAINED = ["trainer.steps=2", "trainer.warmup_steps=0", "trainer.batch_size=2", "training.context=64"]


@pytest.fixture(autouse=True)
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def planned(folder, *overrides):
    overrides = [*overrides, f"checkpoints={folder / 'checkpoints'}"]
    return [plan_run(one) for one in study_configs(hydra.compose("language", overrides), overrides, "language")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_says_what_it_serves_and_how_it_is_run(name):
    header = (CONFIGS / "experiment" / "llm" / f"{name}.yaml").read_text()
    for word in ("# Serves:", "# Command:", "# Hardware:", "Run time:", "# Expected:"):
        assert word in header


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_accepted(name, tmp_path):
    papers = name not in ("smollm2", "training", "sweep")
    given = [
        f"profile={'paper' if papers else 'offline'}",
        *(["model.name=microsoft/phi-2"] if name == "other" else []),
    ]
    runs = planned(tmp_path, f"experiment=llm/{name}", "study.seeds=[0]", *given)
    assert {run.experiment for run in runs} == {"llm/phi_2" if name == "other" else f"llm/{name}"}
    for run in runs:
        assert run.config["scale"] == ("paper" if papers else "offline")
        plans = expand_plans(run.config["evaluation"]["plans"])
        assert {level for _, level, _ in plans} >= {0.7, 0.75, 0.8, 0.9}
        assert "ours" in {plan for plan, _, _ in plans} or name == "sweep"
        # The paper's models: the paper's data, on both splits, because one chooses and the other reports.
        assert run.config["data"]["text"]["name"] == ("wikitext_2" if papers else "wikipedia_sample")
        if name != "sweep":
            assert run.config["evaluation"]["tasks"]["perplexity"]["splits"] == ["validation", "test"]


def test_a_sweep_is_one_job_per_kind_of_plan(tmp_path):
    composed = hydra.compose("language", ["+sweep=llm_plans"], return_hydra_config=True)
    assert composed.name == "llm/sweep"
    parts = {key: str(values).count("[") for key, values in composed.hydra.sweeper.params.items()}
    jobs = 1
    for count in parts.values():
        jobs *= count
    (run,) = planned(tmp_path, "experiment=llm/sweep")
    # The plain run holds the plans of all jobs.
    assert len(expand_plans(run.config["evaluation"]["plans"])) == jobs


def test_training_methods_differ_in_nothing_but_the_method(tmp_path):
    runs = planned(tmp_path, "experiment=llm/training", "study.seeds=[0]")
    methods = [run.config["method"] for run in runs]
    assert {"plain", "row_entropy", "key_entropy", "block_entropy", "l1_logits", "none"} <= set(methods)
    deciding = [{key: run.config[key] for key in ("trainer", "regularizer", "sparsity")} for run in runs]
    assert len({repr(one) for one in deciding}) == len(runs)
    for run in runs:
        same = {
            key: value
            for key, value in run.config.items()
            if key not in ("trainer", "regularizer", "sparsity", "method")
        }
        assert same == {key: runs[0].config[key] for key in same}
        assert (run.config["trainer"]["steps"] == 0) == (run.config["method"] == "none")
    seeds = planned(tmp_path, "experiment=llm/training", "profile.language.methods=[plain]")
    assert {run.config["seed"] for run in seeds} == {0, 1, 2}


def test_profiles_leave_out_what_they_say(tmp_path):
    (run,) = planned(tmp_path, "profile=reproduce")
    levels = {(name, level) for name, level, _ in expand_plans(run.config["evaluation"]["plans"])}
    assert {level for _, level in levels} == {0.75}
    assert ("ours", 0.75) in levels
    assert run.config["scale"] == "reproduce"
    (run,) = planned(tmp_path, "profile.language.max_context=1100", "profile.language.max_count=3")
    tasks = run.config["evaluation"]["tasks"]
    # Where all contexts are longer, the limit itself is the context.
    assert {name: one["contexts"] for name, one in tasks.items()} == {
        "perplexity": [1100],
        "copy": [1100],
        "needle": [1100],
        "summary": [1024],
    }
    assert [one["count"] for one in tasks.values()] == [3, 3, 2, 3]
    assert run.config["evaluation"]["effective_support"]["context"] == 1100


def test_smoke_runs_are_found_again_and_forced(tmp_path):
    runs = planned(tmp_path, *TINY)
    (record,) = run_all(runs, store=tmp_path / "runs", command="first")
    assert (record["experiment"], record["scale"], record["command"]) == ("llm/smollm2", "smoke", "first")
    assert record["config"]["method"] == "none"
    assert record["metrics"]["training_steps"] == 0
    rows = record["rows"]
    assert [(row["plan"], row["task"], row["split"]) for row in rows if row["plan"] == "ours"] == [
        ("ours", "perplexity", "validation"),
        ("ours", "perplexity", "test"),
        ("ours", "copy", "test"),
        ("ours", "needle", "test"),
        ("ours", "summary", "test"),
    ]
    for row in rows:
        assert row["level"] == (0.0 if row["plan"] == "dense" else 0.75)
        measured = {"perplexity": "perplexity", "copy": "loss", "needle": "accuracy", "summary": "rouge_l"}
        assert row[measured[row["task"]]] >= 0
        assert row["items"] == 1
        if row["task"] in ("perplexity", "copy"):
            # Noise knows nothing: about as bad as chance among 384 tokens.
            assert row["loss"] == pytest.approx(np.log(384), rel=0.05)
            assert len(row["loss_per_item"]) == 1
    sparse = [row for row in rows if row["plan"] == "pooled_32"]
    assert len(sparse) == 5
    for row in sparse:
        assert row["realised_sparsity"] == pytest.approx(0.75, abs=0.05)
        assert (row["decode_sparsity"] is None) == (row["task"] in ("perplexity", "copy"))
    assert len(record["metrics"]["effective_support"]["row"]) == 2
    assert record["dataset"]["text"] == "wikipedia_sample"
    assert f"1 language records in {tmp_path / 'runs'}" in report([record], tmp_path / "runs")
    assert run_all(runs, store=tmp_path / "runs", command="second")[0]["command"] == "first"
    forced = run_all(runs, store=tmp_path / "runs", command="third", force=True)
    assert forced[0]["command"] == "third"
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in forced[0]["rows"]] == strip


class Killed(BaseException):
    """Ends a run as a kill does: nothing that it has not written is kept."""


def test_a_killed_evaluation_goes_on_behind_what_it_has_finished(tmp_path, monkeypatch):
    overrides = ["profile.language.plans=[window]", "evaluation.tasks.needle=null"]
    (run,) = planned(tmp_path, *TINY, *overrides)
    (whole,) = run_all([run], store=tmp_path / "whole", command="x")
    stock, measured, limit = language_evaluation._row, [], [None]

    def counted(*arguments):
        if len(measured) == limit[0]:
            raise Killed
        measured.append(arguments)
        return stock(*arguments)

    monkeypatch.setattr(language_evaluation, "_row", counted)
    # In the middle of the dense measures, and of those of a plan, whose texts are compared with the dense model's.
    for limit[0] in (2, 5):
        with pytest.raises(Killed):
            run_all([run], store=tmp_path / "runs", command="x")
    limit[0] = None
    (record,) = run_all([run], store=tmp_path / "runs", command="x")
    without_seconds = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in one["rows"]]
        for one in (record, whole)
    ]
    assert without_seconds[0] == without_seconds[1]
    assert any("rouge_l_to_dense" in row for row in record["rows"])
    assert record["metrics"]["effective_support"] == whole["metrics"]["effective_support"]
    assert len(measured) == len(record["rows"])
    assert list((tmp_path / "runs").glob("*/measures.json")) == []


@pytest.mark.parametrize(
    "adaptation",
    [
        ["training.adaptation.kind=full"],
        pytest.param(
            ["training.adaptation.kind=lora", "+training.adaptation.rank=2", "+training.adaptation.alpha=4"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["full", "lora"],
)
def test_methods_train_and_are_evaluated(adaptation, tmp_path):
    runs = planned(
        tmp_path,
        "experiment=llm/training",
        *TINY[:2],
        *TRAINED,
        # Long enough for blocks of 16 to leave something out.
        "training.context=512",
        "study.methods.loop=['sparsity=decoder_75','+sparsity.selection=pooled','+sparsity.block_size=16']",
        "trainer.learning_rate=0.01",
        "evaluation.effective_support=null",
        "evaluation.tasks.copy=null",
        "evaluation.tasks.needle=null",
        "evaluation.tasks.perplexity.splits=[test]",
        "profile.language.methods=[plain,block_entropy,loop,none]",
        "profile.language.step_scale=1.0",
        *adaptation,
    )
    records = {one["config"]["method"]: one for one in run_all(runs, store=tmp_path / "runs", command="x")}
    assert list(records) == ["none", "plain", "block_entropy", "loop"]
    assert [one["metrics"]["training_steps"] for one in records.values()] == [0, 2, 2, 2]
    assert "block_entropy/entropy" in records["block_entropy"]["metrics"]["last_step"]
    assert records["loop"]["metrics"]["last_step"]["realised_sparsity"] == pytest.approx(0.75, abs=0.1)
    losses = {name: one["rows"][0]["loss"] for name, one in records.items()}
    assert len(set(losses.values())) == 4
    # Two steps at a high rate already learn which bytes there are.
    assert losses["plain"] < losses["none"]
    assert len({one["model"]["parameters"] for one in records.values()}) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    overrides = [
        "experiment=llm/training",
        *TINY[:2],
        *TRAINED,
        "trainer.checkpoint_every=1",
        "profile.language.methods=[plain]",
    ]
    overrides += ["profile.language.step_scale=1.0", "evaluation.effective_support=null", "evaluation.plans.ours=null"]
    (run,) = planned(tmp_path, *overrides)
    monkeypatch.setattr(
        language_experiment, "evaluate_everything", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run_all([run], store=tmp_path / "runs", command="x")
    monkeypatch.undo()
    steps = []
    whole = language_experiment.LanguageObjective.__call__
    monkeypatch.setattr(language_experiment.LanguageObjective, "__call__", lambda *a: steps.append(a[-1]) or whole(*a))
    (record,) = run_all([run], store=tmp_path / "runs", command="y")
    assert steps == []
    assert record["metrics"]["training_steps"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=tpu"], "device must be one of auto, cpu, cuda"),
        (["model.dtype=int8"], "model.dtype"),
        (["evaluation.tasks.copy.contexts=[3]"], "at least 16"),
        (["+evaluation.plans.ours.blocksize=3"], "blocksize"),
        (["evaluation.plans.ours.levels=[1.5]"], r"in \[0, 1\)"),
        (["+evaluation.tasks.copying.count=3"], "unknown task 'copying' of evaluation.tasks, .*; did you mean 'copy'"),
        (["trainer.steps=10", "regularizer=label_smoothing"], "label_smoothing must be 0"),
        (["trainer.steps=10", "regularizer=selection_entropy"], "selects no tokens"),
        (["trainer.steps=10", "sparsity=setting_a"], "kind decoder"),
        (["trainer.steps=10", "training.adaptation.kind=half"], "half"),
        (["experiment=llm/other"], "MODEL=..."),
        (["experiment=llm/phi_2", "model.name=/models/other"], "is not the model of llm/phi_2"),
    ],
)
def test_wrong_configurations_are_one_sentence_before_anything_runs(overrides, message):
    config = OmegaConf.to_container(hydra.compose("language", overrides), resolve=True)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_run(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hub", "architecture"), list(zip(PAPER_MODELS, ["llama_2_7b", "mistral_7b", "phi_2"], strict=True))
)
def test_a_folder_is_recorded_as_the_model_that_it_holds(hub, architecture, tmp_path):
    kind, fields = ARCHITECTURES[architecture]
    for name, changed, expected in (
        ("own", {}, PAPER_MODELS[hub][0]),
        ("other", {"num_hidden_layers": 2}, "llm/other"),
    ):
        (tmp_path / name).mkdir()
        text = json.dumps({"model_type": kind, **fields, **changed})
        (tmp_path / name / "config.json").write_text(text)
        (run,) = planned(tmp_path, "experiment=llm/other", "profile=paper", f"model.name={tmp_path / name}")
        assert run.experiment == expected


def script(*arguments):
    # Not forked from a process that has run tokenizers' threads.
    command = [sys.executable, "scripts/language.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, check=False)


def test_the_papers_command_says_what_is_missing(tmp_path):
    folders = [f"store={tmp_path / 'runs'}", f"checkpoints={tmp_path / 'checkpoints'}"]
    done = script("experiment=llm/other", "profile=paper", *folders)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1
    for word in ("MODEL=...", "meta-llama/Llama-2-7b-hf", "microsoft/phi-2", "local folder"):
        assert word in sentences[0]
    done = subprocess.run(
        ["make", "reproduce-llm", "PROFILE=paper"], cwd=CONFIGS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "MODEL=meta-llama/Llama-2-7b-hf" in done.stderr


def test_missing_texts_show_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(language_experiment, "load_language_model", lambda *_, **__: pytest.fail("a model was loaded"))
    runs = planned(tmp_path, "experiment=llm/phi_2", "profile=paper", "data.text.root=/nowhere")
    with pytest.raises(AssetError, match="there is no folder /nowhere with wikitext_2"):
        run_all(runs, store=tmp_path / "runs", command="x")


def test_a_missing_model_is_one_sentence(tmp_path):
    runs = planned(tmp_path, "experiment=llm/other", "data=packaged_text", "model.name=/nowhere")
    with pytest.raises(AssetError, match="there is no folder /nowhere with a language model"):
        run_all(runs, store=tmp_path / "runs", command="x")


def write_texts(folder):
    """WikiText-2 and CNN/DailyMail as the hub has them, a few rows each."""
    import datasets

    words = ["The", "a", "of", "city", "river", "was", "built", "in", "by", "large", "old", "stone", "bridge", "king"]
    rng = np.random.default_rng(0)

    def sentences(count):
        return " ".join(" ".join(rng.choice(words, 12)).capitalize() + "." for _ in range(count))

    wikitext, cnn = folder / "wikitext" / "wikitext-2-raw-v1", folder / "cnn" / "3.0.0"
    for split in ("train", "validation", "test"):
        rows = [row for place in range(4) for row in ("", f" = Title {place} = \n", "", f" {sentences(30)} \n")]
        table = datasets.Dataset.from_dict({"text": rows})
        table.to_parquet(wikitext / f"{split}-00000-of-00001.parquet")
        articles = {"article": [sentences(40) for _ in range(4)], "highlights": [sentences(3) for _ in range(4)]}
        datasets.Dataset.from_dict({**articles, "id": list("abcd")}).to_parquet(cnn / f"{split}-00000-of-00001.parquet")
    return wikitext.parent, cnn.parent


def write_model(folder):
    """A tiny LLaMA with a tokenizer of words, as save_pretrained writes them."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    text = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    text.train_from_iterator(["the old stone bridge over the river"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=text, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    options = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    random_language_model("smollm2_135m", options).model.save_pretrained(folder)


@pytest.mark.slow
def test_the_papers_command_runs_on_a_miniature(tmp_path):
    wikitext, cnn = write_texts(tmp_path)
    write_model(tmp_path / "model")
    done = script(
        "experiment=llm/other",
        "profile=paper",
        f"model.name={tmp_path / 'model'}",
        f"data.text.root={wikitext}",
        f"data.summaries.root={cnn}",
        "evaluation.tasks.perplexity.contexts=[256]",
        "evaluation.tasks.copy={contexts: [257], count: 2, splits: [test]}",
        "evaluation.tasks.needle={contexts: [256], count: 1, depths: [0.5], splits: [test]}",
        "evaluation.tasks.summary={contexts: [256], count: 2, new_tokens: 8, splits: [test]}",
        "evaluation.effective_support.context=256",
        "profile.language.plans=[ours,window]",
        "device=cpu",
        f"tracker.directory={tmp_path}",
        f"store={tmp_path / 'runs'}",
        f"checkpoints={tmp_path / 'checkpoints'}",
    )
    assert done.returncode == 0, done.stderr
    (record,) = RecordStore(tmp_path / "runs").load_all()
    assert (record["experiment"], record["scale"]) == ("llm/other", "paper")
    assert (record["dataset"]["text"], record["dataset"]["summaries"]) == ("wikitext_2", "cnn_dailymail")
    dense = {row["task"]: row for row in record["rows"] if row["plan"] == "dense" and row["split"] == "test"}
    assert set(dense) == {"perplexity", "copy", "needle", "summary"}
    assert dense["perplexity"]["items"] >= 4
    sparse = [row for row in record["rows"] if row["plan"] == "ours" and row["level"] == 0.75]
    assert {row["task"] for row in sparse} == set(dense)
    # A context longer than the model's is one sentence, before anything slow.
    done = script("experiment=llm/other", "profile=paper", f"model.name={tmp_path / 'model'}", "data=packaged_text")
    assert done.returncode == 2
    assert "2048 tokens is longer than the 512" in done.stderr
