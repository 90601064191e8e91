"""Tables and figures of the geometry benchmarks say what the records say."""

import pytest

from entreg.experiments.geometry.speed.figures import delaunay_figure, hull_figure, law_figure, pareto_figure
from entreg.experiments.geometry.speed.tables import (
    AIMS,
    aims_table,
    delaunay_reordered_table,
    delaunay_table,
    exactness_table,
    hull_reordered_table,
    hull_table,
    law_table,
    method_label,
    pareto_table,
)
from entreg.records.record import current_records, new_record
from entreg.records.tables import table_registry


def bench_record(problem, distribution, medians, *, n=1_000_000, exact=None, scale="offline", baseline="qhull"):
    """A record with one size: ``medians`` maps methods to seconds, None for not run."""
    libraries = {"hull": ("qhull", "geos", "opencv"), "delaunay": ("shull", "triangle")}.get(problem, (baseline,))
    present = [name for name in libraries if medians.get(name)]
    fastest = min(present, key=medians.get) if present else None
    rows = [
        {
            "distribution": distribution,
            "n": n,
            "method": method,
            "kind": "ours" if method == "entreg" else "library",
            "dtype": "float64",
            "threads": 1,
            "status": "measured" if median else "over the time budget, not run",
            "seconds_median": median,
            "seconds_min": median,
            "seconds_max": median,
            "repeats": 7 if median else 0,
            "exact": (exact or {}).get(method, (0, 0)) == (0, 0) if median else None,
            "missing": (exact or {}).get(method, (0, 0))[0] if median else None,
            "extra": (exact or {}).get(method, (0, 0))[1] if median else None,
            "fastest_rival": fastest,
            f"ratio_to_{baseline}": medians[baseline] / median if median and medians.get(baseline) else None,
            "ratio_to_fastest_rival": medians[fastest] / median if median and fastest else None,
        }
        for method, median in medians.items()
    ]
    return new_record(
        experiment=f"benchmark/geometry_{problem}/{distribution}",
        scale=scale,
        config={"n": n, "scale": scale},
        command="test",
        dataset={"name": distribution},
        seed=0,
        repeats=7,
        metrics={},
        rows=rows,
        wall_seconds=1.0,
    )


HULL = {"entreg": 0.003, "qhull": 0.12, "geos": 0.06, "opencv": 0.15, "plain_filter": 0.01}


def law_record(family, method):
    rows = [
        {
            "family": family,
            "n": n,
            "method": name,
            "entropy": entropy,
            "work": n * (1 + entropy),
            "seconds_median": 2e-9 * n * (1 + entropy),
        }
        for n in (1_000, 10_000)
        for entropy in (0.0, 1.0, 4.0)
        for name in ("entreg", method)
    ]
    return new_record(
        experiment=f"benchmark/entropy_law/{family}",
        scale="offline",
        config={"family": family},
        command="test",
        dataset={"name": family},
        seed=0,
        repeats=3,
        metrics={},
        rows=rows,
        wall_seconds=1.0,
    )


def test_aims_are_judged_from_the_ratios():
    table = aims_table([bench_record("hull", "square", HULL), bench_record("hull", "disk", {**HULL, "entreg": 0.01})])
    rows = {(row[1], row[2]): row for row in table.text_rows() if row[0] == "hull"}
    assert rows["square", "x Qhull"][3:] == [">= 30.0x", "40.0x", "n = 1,000,000, Qhull", "met"]
    assert rows["disk", "x Qhull"][4:] == ["12.0x", "n = 1,000,000, Qhull", "missed"]
    assert rows["square", "x fastest library, worst size"][4:] == ["20.0x", "n = 1,000,000, GEOS", "met"]
    assert rows["circle", "x Qhull"][4] == "not run"
    assert "3 of 4 aims met" in table.notes[0]
    assert len(table.rows) == sum(len(aim.distributions) for aim in AIMS)


def test_aims_at_a_million_are_not_judged_at_other_sizes():
    table = aims_table([bench_record("hull", "square", HULL, n=1_000)])
    square = next(row for row in table.text_rows() if row[1:3] == ["square", "x Qhull"])
    assert square[-1] == "not run"


def test_times_and_what_was_not_run():
    table = hull_table([bench_record("hull", "circle", {**HULL, "geos": None})])
    cells = dict(zip(table.columns, table.text_rows()[0], strict=True))
    assert cells["Qhull"] == "120 ms"
    assert cells["GEOS"] == "over the time budget, not run"
    assert cells["Qhull / entreg"] == "40.0x"
    assert cells["fastest library / entreg"] == "40.0x"
    assert "n = 1,000,000" in table.title


def test_sizes_mark_where_we_are_slower():
    entry = table_registry.get("benchmark-hull-sizes")
    slow = bench_record("hull", "square", {**HULL, "entreg": 0.12})
    table = entry.function([slow])
    assert table.text_rows()[0][1] == "**0.500x GEOS**"
    assert "Not slower in 0 of 1 cells" in table.notes[0]


def test_exactness_names_the_worst_case():
    records = [
        bench_record("hull", "square", HULL),
        bench_record("hull", "circle", HULL, exact={"qhull": (1_151, 1)}),
    ]
    rows = {row[1]: row for row in exactness_table(records).text_rows()}
    assert rows["entreg"][3:] == ["2 of 2", "–"]
    assert rows["Qhull"][3] == "1 of 2"
    assert rows["Qhull"][4] == "1,151 vertices missing, 1 too many (circle, n = 1,000,000)"


def test_the_largest_scale_counts():
    offline = bench_record("hull", "square", HULL)
    paper = bench_record("hull", "square", HULL, scale="paper")
    assert current_records([paper, offline]) == [paper]


def test_law_table_recovers_slope_and_fit():
    table = law_table([law_record("hull_fraction", "quickhull"), law_record("sorted_runs", "timsort_chain")])
    rows = table.text_rows()
    assert {row[0] for row in rows} == {"entreg", "quickhull", "Timsort and chain"}
    assert [row[1] for row in rows[:6:2]] == ["sorted runs", "share of points on the hull", "**all of these**"]
    for row in rows:
        assert row[5] == "2.00 ns"
        assert row[7] == "1.000"
        assert row[8] == "2.00 to 2.00 ns"


def test_figures_show_every_distribution_and_method():
    records = [bench_record("hull", name, HULL) for name in ("square", "circle")]
    figure = hull_figure(records)
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == ["square", "circle"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["entreg", "plain exact filter", "GEOS", "OpenCV (float32)"]
    assert all(axes.get_xlabel() for axes in figure.axes if axes.get_visible())
    ratio = figure.axes[0].lines[0].get_ydata()[0]
    assert ratio == pytest.approx(40.0)


def test_law_figure_has_one_panel_for_each_kind_of_algorithm():
    figure = law_figure([law_record("hull_fraction", "quickhull")])
    left, right = figure.axes
    assert "quickhull, R² = 1.000" in left.get_legend().get_texts()[0].get_text()
    assert right.get_title() == "entreg"


def test_other_problems_have_tables_and_figures():
    delaunay = [bench_record("delaunay", "square", {"entreg": 0.5, "qhull": 10.0, "shull": 0.8, "triangle": 1.0})]
    assert delaunay_table(delaunay).text_rows()[0][-2:] == ["20.0x", "1.60x"]
    assert delaunay_reordered_table(delaunay) is not None
    assert delaunay_figure(delaunay) is not None
    pareto = [bench_record("pareto", "square", {"entreg": 0.01, "numpy_lexsort": 0.2}, baseline="numpy_lexsort")]
    assert pareto_table(pareto).text_rows()[0][-1] == "20.0x"
    assert pareto_figure(pareto) is not None
    for build in (hull_table, hull_reordered_table, delaunay_table, pareto_table, hull_figure, law_table, law_figure):
        assert build([]) is None


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("memory_scan_1_thread", "scan limit, 1 thread"),
        ("memory_scan_2_thread", "scan limit, 2 threads"),
        ("shull_hilbert", "shull, Hilbert order"),
        ("something new", "something new"),
    ],
)
def test_labels(method, label):
    assert method_label(method) == label
