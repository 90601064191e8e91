"""Tables of token merging, entropy budgets and distillation: the numbers of hand-made records appear."""

from entreg.experiments.vision.rival_tables import budgets, distillation, equal_sparsity, forms, merging
from tests.experiments.vision.samples import PLANS, accuracies, setting_a, vision_record

EXPERIMENT = "vit/token_rivals"


def by_first(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.text_rows()]


def merged(split, top1, plan="merging_most", sparsity=0.77):
    return accuracies(plan, split, top1, sparsity=sparsity, reduction=None, score=None)


def own_budget(split, top1, **numbers):
    return accuracies("budget_a", split, top1, level=0.8, **numbers)


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


def test_budgets_are_compared_with_equal_ones_by_the_same_score():
    numbers = {"budget_mean": 12.0, "budget_median": 11.0, "budget_p95": 20.0, "budget_max": 31, "sparsity": 0.803}
    own = [own_budget(split, 0.5, **numbers) for split in ("validation", "test")]
    # Cheaper scores leave more tokens: better, but no comparison of budgets.
    other = [{**own_budget(split, 0.9, **numbers), "score": "prefix"} for split in ("validation", "test")]
    (row,) = by_first(budgets(records([("plain", 0.45, [*own, *other])])))
    assert row["exp(H)"].startswith("50.0")
    assert row["equal"].startswith("45.0")
    assert [row[f"kept: {name}"] for name in ("mean", "median", "95 %", "most")] == ["12.0", "11.0", "20.0", "31.0"]
    assert row["mean sparsity"] == "80.3 %"


def test_every_reduction_and_score_has_a_row_at_equal_sparsity():
    def rows_of(**top1):
        return [
            accuracies("equal_a", split, value, level=0.8, score=score, sparsity=0.8)
            for split in ("validation", "test")
            for score, value in top1.items()
        ]

    tests = {"loop_a": rows_of(mixed=0.6, prefix=0.8), "ours_a": rows_of(mixed=0.7, prefix=0.75)}
    found = [
        vision_record(method, 0, [*setting_a(0.1, 0.1), *rows], experiment="vit/equal_sparsity")
        for method, rows in tests.items()
    ]
    cells = [tuple(row.values()) for row in by_first(equal_sparsity(found))]
    assert cells == [
        ("loop a", "drop by mixed", "80.0 %", "95.0", "60.0", "1"),
        ("loop a", "drop by prefix", "80.0 %", "95.0", "80.0", "1"),
        ("**ours a**", "drop by mixed", "80.0 %", "95.0", "70.0", "1"),
        ("**ours a**", "drop by prefix", "80.0 %", "95.0", "75.0", "1"),
    ]


def test_distillation_is_compared_with_ours_and_missing_plans_make_no_table():
    found = records([("plain", 0.4, []), ("ours_a", 0.75, []), ("ours_distilled_a", 0.8, [])])
    table = distillation(found)
    assert table.name == "vision-distillation"
    assert table.title.startswith("Distillation from the dense model. Setting A: 14 patch tokens")
    rows = {row["method"]: row for row in by_first(table)}
    assert rows["ours distilled a"]["ours − method"].startswith("-5.00")
    assert forms(found) is merging(found) is budgets(found) is None
