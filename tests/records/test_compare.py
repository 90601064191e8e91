import copy
import json
import subprocess

import pytest
from scipy import stats

from entreg.errors import InputError, RecordError
from entreg.records import REFERENCE_ROOT, RecordStore, environment, new_record
from entreg.records.compare import Source, compare, read_source
from tests.faults.processes import run_program

ACCURACIES = {"old": [0.90, 0.91, 0.89, 0.92], "new": [0.95, 0.955, 0.945, 0.965]}


@pytest.fixture(autouse=True)
def quick_records(monkeypatch):
    """Asking git for the commit is what takes long in making a record."""
    monkeypatch.setattr(environment, "git_state", lambda: {"commit": "0" * 40, "dirty": False})


def made(
    seed,
    top1,
    *,
    method="ours",
    experiment="vit/toy",
    scale="offline",
    dataset="toys",
    device=None,
    rows=(),
    metrics=None,
    settings=None,
):
    record = new_record(
        experiment=experiment,
        scale=scale,
        config={"method": method, "seed": seed, **(settings or {})},
        command="python scripts/vision.py",
        dataset={"name": dataset},
        model=None,
        seed=seed,
        repeats=1,
        metrics=metrics or {},
        rows=[
            {"plan": "dense", "split": "test", "top1": top1, "images": 500},
            {"plan": "dense", "split": "validation", "top1": 0.1},
            *rows,
        ],
        wall_seconds=1.0,
    )
    record["device"].update(device or {})
    return record


def side(name, records):
    return Source(name, tuple(records))


def four(values, **changes):
    return [made(seed, value, **changes) for seed, value in enumerate(values)]


def test_seeds_are_paired_and_the_p_value_is_scipys():
    old, new = ACCURACIES["old"], ACCURACIES["new"]
    (found,) = compare(side("a", four(old)), side("b", four(new))).differences
    assert (found.experiment, found.what, found.field) == ("vit/toy ours", "dense, test", "top1")
    assert found.how == "paired by seed"
    assert (found.first, found.second) == pytest.approx((sum(old) / 4, sum(new) / 4))
    assert found.adjusted == found.test.p_value == pytest.approx(stats.ttest_rel(new, old).pvalue)
    assert found.verdict == "**better**"


def test_what_is_better_depends_on_the_quantity_and_the_side():
    old, new = four(ACCURACIES["old"]), four(ACCURACIES["new"])
    (backwards,) = compare(side("a", new), side("b", old)).differences
    assert backwards.verdict == "**worse**"
    errors = [four([0.5] * 4, metrics={"mce_dense": value}) for value in (0.2, 0.1)]
    for group in errors:
        for record, wobble in zip(group, (0.0, 0.001, -0.001, 0.002), strict=True):
            record["metrics"]["mce_dense"] += wobble * record["metrics"]["mce_dense"]
    found = {one.field: one.verdict for one in compare(side("a", errors[0]), side("b", errors[1])).differences}
    assert found == {"top1": "equal", "mce_dense": "**better**"}


def test_other_seeds_go_through_welchs_test():
    old = four(ACCURACIES["old"])
    new = [made(seed, value) for seed, value in zip((10, 11, 12), (0.93, 0.95, 0.97), strict=True)]
    (found,) = compare(side("a", old), side("b", new)).differences
    assert found.how == "Welch"
    expected = stats.ttest_ind([0.93, 0.95, 0.97], ACCURACIES["old"], equal_var=False)
    assert found.test.p_value == pytest.approx(expected.pvalue)


def test_items_are_paired_where_one_run_holds_them():
    items = ([2.0, 2.1, 2.2, 1.9, 2.0], [2.3, 2.35, 2.5, 2.15, 2.35])
    rows = [{"task": "text", "split": "test", "loss": sum(one) / 5, "loss_per_item": one} for one in items]
    records = [made(0, 0.5, rows=[row]) for row in rows]
    found = {one.field: one for one in compare(side("a", records[:1]), side("b", records[1:])).differences}
    assert found["loss"].how == "paired by item"
    assert found["loss"].test.p_value == pytest.approx(stats.ttest_rel(items[1], items[0]).pvalue)
    assert found["loss"].verdict == "**worse**"
    assert found["top1"].verdict == "equal"
    other_seed = made(1, 0.5, rows=[rows[1]])
    (loss,) = [d for d in compare(side("a", records[:1]), side("b", [other_seed])).differences if d.field == "loss"]
    assert loss.verdict == "not tested"


def test_holm_over_everything_that_was_tested():
    # One real difference among many that are noise: alone significant, among many not.
    noisy = [0.90, 0.92, 0.91, 0.93]
    shifted = [0.93, 0.94, 0.96, 0.95]
    alone = compare(side("a", four(noisy)), side("b", four(shifted)))
    raw = alone.differences[0].test.p_value
    assert raw < 0.05
    assert alone.differences[0].significant
    many = [[*four(values)] for values in (noisy, shifted)]
    for number in range(9):
        for group in many:
            group += four([0.5 + 0.01 * ((7 * seed + number) % 5) for seed in range(4)], method=f"other_{number}")
    # The others differ by a swap of two seeds: no difference in the mean.
    for record in many[1]:
        if record["config"]["method"] != "ours" and record["seed"] < 2:
            record["rows"][0]["top1"] += 0.02 if record["seed"] else -0.02
    found = compare(side("a", many[0]), side("b", many[1]))
    (ours,) = [one for one in found.differences if one.experiment == "vit/toy ours"]
    assert ours.test.p_value == raw
    assert ours.adjusted == pytest.approx(min(1.0, 10 * raw))
    assert ours.significant == (10 * raw < 0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": "smoke"}, "scale offline against smoke"),
        ({"dataset": "others"}, "data toys against others"),
        ({"experiment": "cifar/toy"}, "experiment vit/toy against cifar/toy"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(changes, said):
    found = compare(side("a", [made(0, 0.5)]), side("b", [made(0, 0.6, **changes)]))
    assert not found.differences
    assert not found.possible
    assert found.summary() == "The two cannot be compared."
    (sentence,) = found.sentences
    assert "not comparable: " in sentence
    assert said in sentence
    assert said in found.text()


def test_times_of_other_devices_are_not_compared_but_accuracies_are():
    timed = [{"plan": "dense", "n": 1000, "seconds_median": 0.1, "repeats": 7}]
    first, second = [made(0, 0.5, rows=timed)], [made(0, 0.6, rows=timed, device={"cpu": "Other"})]
    found = compare(side("a", first), side("b", second))
    assert [one.field for one in found.differences] == ["top1"]
    assert any("times are not comparable" in one and "Other" in one for one in found.sentences)
    same = compare(side("a", first), side("b", [made(0, 0.6, rows=timed)]))
    assert [one.field for one in same.differences] == ["top1", "seconds_median"]
    assert same.differences[1].what == "dense, n 1000"


def test_differing_settings_are_named_but_seeds_are_not():
    first = four(ACCURACIES["old"], settings={"training": {"steps": 200, "rate": 1.0}})
    second = four(ACCURACIES["new"], settings={"training": {"steps": 300, "rate": 1.0}})
    (sentence,) = compare(side("a", first), side("b", second)).sentences
    assert sentence == "vit/toy ours: the configurations differ in training.steps (200, 300)."


def test_one_sided_and_equal_records_are_counted():
    shared, lonely = four(ACCURACIES["old"]), made(0, 0.5, method="lonely")
    found = compare(side("a", shared), side("b", [*copy.deepcopy(shared), lonely]))
    assert found.summary() == "Nothing differs."
    assert "4 records are the same on both sides." in found.sentences
    assert "Only B has records of one kind of run: vit/toy." in found.sentences


def test_seeds_that_did_not_change_count_beside_those_that_did():
    old = four(ACCURACIES["old"])
    new = copy.deepcopy(old)
    for record in new[1:]:
        record["rows"][0]["top1"] += 0.05
    (found,) = compare(side("a", old), side("b", new)).differences
    assert found.second - found.first == pytest.approx(0.75 * 0.05)
    more = [*copy.deepcopy(old), made(4, 0.99)]
    found = compare(side("a", old), side("b", more))
    assert [one.verdict for one in found.differences] == ["equal"]
    assert not any("Only" in sentence for sentence in found.sentences)


def test_the_newest_of_a_seed_counts():
    old, new = made(0, 0.5), made(0, 0.7, settings={"more": 1})
    old["utc"], new["utc"] = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    (found,) = compare(side("a", [new, old]), side("b", [made(0, 0.6), made(1, 0.6)])).differences
    assert found.first == pytest.approx(0.7)


def test_fields_on_demand():
    rows = [{"plan": "sparse", "split": "test", "top1": 0.4, "calibration_error": 0.1}]
    pair = [side("a", [made(0, 0.5, rows=rows)]), side("b", [made(0, 0.6, rows=rows)])]
    found = compare(*pair, fields=["calibration_error"])
    assert [(one.what, one.field) for one in found.differences] == [("sparse, test", "calibration_error")]
    with pytest.raises(InputError, match="colour"):
        compare(*pair, fields=["colour"])


def test_many_rows_show_the_significant_ones_only():
    rows = [{"plan": f"plan_{place}", "split": "test", "top1": 0.5} for place in range(80)]
    sides = [[made(seed, value, rows=rows) for seed, value in enumerate(ACCURACIES[name])] for name in ("old", "new")]
    found = compare(side("a", sides[0]), side("b", sides[1]))
    assert len(found.table().rows) == 1
    assert len(found.table(everything=True).rows) == 81
    assert found.summary().startswith("1 of 81 tested quantities (81 compared) differ significantly at 5 %")
    assert found.summary().endswith("in B 1 better.")


@pytest.fixture
def history(tmp_path):
    """A repository whose two commits hold other accuracies."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-q")
    store = RecordStore(tmp_path / "results" / "runs")
    for name in ("old", "new"):
        for record in four(ACCURACIES[name]):
            store.save(record)
        git("add", ".")
        git("commit", "-q", "-m", name)
        git("tag", name)
    return tmp_path


def test_two_commits(history):
    sides = [read_source(name, history) for name in ("old", "new")]
    values = [[record["rows"][0]["top1"] for record in sorted(s.records, key=lambda r: r["seed"])] for s in sides]
    assert values == [ACCURACIES["old"], ACCURACIES["new"]]
    (found,) = compare(*sides).differences
    assert found.verdict == "**better**"
    assert read_source("HEAD:results/runs", history).records == read_source(str(history / "results/runs")).records


@pytest.mark.parametrize("text", ["nonsense", "--help", "", "HEAD:elsewhere", "0123456789ab"])
def test_what_is_no_source_is_one_sentence(history, text):
    with pytest.raises(RecordError) as caught:
        read_source(text, history)
    assert "\n" not in str(caught.value)


def test_a_damaged_record_in_a_commit_is_named(history):
    path = next((history / "results" / "runs").glob("*.json"))
    path.write_bytes(path.read_bytes()[:-30])
    subprocess.run(
        ["git", "-C", history, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qam", "x"], check=True
    )
    with pytest.raises(RecordError, match=path.name):
        read_source("HEAD", history)


def test_a_reference_record_by_hash_identifier_and_file():
    path = next(iter(sorted(REFERENCE_ROOT.glob("llm__smollm2__*.json"))))
    record = json.loads(path.read_text())
    for text in (record["config_hash"], record["id"], str(path)):
        assert [one["id"] for one in read_source(text).records] == [record["id"]]


def test_the_script(history):
    def run(*arguments):
        return run_program("scripts/compare.py", *arguments)

    runs = history / "results" / "runs"
    old = history / "old"
    for record in four(ACCURACIES["old"]):
        RecordStore(old).save(record)
    result = run(old, runs)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 of 1 tested quantities" in result.stdout
    assert "**better**" in result.stdout
    assert "B: 4 records. Device: " in result.stdout
    result = run(next(old.glob("*.json")), next(iter(REFERENCE_ROOT.glob("llm__smollm2__*.json"))))
    assert result.returncode == 1
    assert "not comparable: experiment vit/toy" in result.stdout
    result = run(old, "nonsense")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
