"""Tables of token merging, entropy budgets and distillation: the numbers of hand-made records appear."""

from entreg.records.vision_rival_tables import budgets, distillation, forms, merging
from tests.records.vision_samples import PLANS, accuracies, setting_a, vision_record

EXPERIMENT = "vit/token_rivals"


def by_first(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.text_rows()]


def merged(split, top1, plan="merging_most", sparsity=0.77):
    return accuracies(plan, split, top1, sparsity=sparsity, reduction=None, score=None)


def own_budget(split, top1, reduction="drop", **numbers):
    return accuracies("budget_a", split, top1, level=0.8, reduction=reduction, **numbers)


def records(rows_of):
    return [
        vision_record(method, seed, [*setting_a(base, base), *more], experiment=EXPERIMENT, plans=PLANS)
        for method, base, more in rows_of
        for seed in (0, 1)
    ]


def test_merging_stands_beside_ours_with_its_own_sparsity():
    found = records(
        [
            ("plain", 0.4, [merged("validation", 0.3), merged("test", 0.3)]),
            ("merging_a", 0.5, [merged("validation", 0.6), merged("test", 0.6)]),
            ("ours_a", 0.75, []),
        ]
    )
    rows = by_first(merging(found))
    assert [(row["trained as"], row["tested with"]) for row in rows] == [
        ("plain", "token merging (ToMe)"),
        ("merging a", "token merging (ToMe)"),
        ("plain", "drop by mixed"),
        ("**ours a**", "drop by mixed"),
    ]
    assert [row["sparsity"] for row in rows] == ["77.0 %", "77.0 %", "80.0 %", "80.0 %"]
    assert [row["sparse"].split()[0] for row in rows] == ["30.0", "60.0", "40.0", "75.0"]
    assert {row["dense"].split()[0] for row in rows} == {"95.0"}


def test_budgets_tell_mean_and_tail_of_the_choice_made_on_validation():
    numbers = {"budget_mean": 12.0, "budget_median": 11.0, "budget_p95": 20.0, "budget_max": 31, "sparsity": 0.803}
    good = [own_budget(split, 0.5, **numbers) for split in ("validation", "test")]
    # Better on the test scenes, but not what validation chooses.
    bad = [own_budget("validation", 0.4, "merge", **numbers), own_budget("test", 0.9, "merge", **numbers)]
    (row,) = by_first(budgets(records([("plain", 0.45, [*good, *bad])])))
    assert row["exp(H)"].startswith("50.0")
    assert row["equal"].startswith("45.0")
    assert row["tokens are, by score"] == "drop, mixed"
    assert [row[f"kept: {name}"] for name in ("mean", "median", "95 %", "most")] == ["12.0", "11.0", "20.0", "31.0"]
    assert row["mean sparsity"] == "80.3 %"


def test_distillation_is_compared_with_ours_and_missing_plans_make_no_table():
    found = records([("plain", 0.4, []), ("ours_a", 0.75, []), ("ours_distilled_a", 0.8, [])])
    table = distillation(found)
    assert table.name == "vision-distillation"
    assert table.title.startswith("Distillation from the dense model. Setting A: 14 patch tokens")
    rows = {row["method"]: row for row in by_first(table)}
    assert rows["ours distilled a"]["ours − method"].startswith("-5.00")
    assert forms(found) is merging(found) is budgets(found) is None
