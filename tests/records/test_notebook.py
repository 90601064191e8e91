"""What a notebook shows is what `make tables` writes, or the sentence that it was not run."""

import matplotlib.image
import pytest

from entreg.errors import InputError
from entreg.records.figures import figure_registry, new_figure, register_figure
from entreg.records.notebook import show_drawing, show_figure, show_rows, show_table, show_verdicts
from entreg.records.tables import Table, register_table, table_registry
from tests.records.samples import sample_record


@pytest.fixture(autouse=True)
def builders():
    @register_table("shown-table", experiments=("geometry/shown",))
    def table(records):
        return Table("shown-table", "Shown", ["scale"], [[record["scale"]] for record in records], notes=["A note."])

    @register_figure("shown-figure", experiments=("geometry/shown",))
    def figure(records):
        drawn, axes = new_figure(width=3.0, height=2.0)
        axes.plot([0, len(records)])
        return drawn

    yield
    table_registry.remove("shown-table")
    figure_registry.remove("shown-figure")


def test_a_table_comes_with_its_notes_and_where_it_is_from():
    record = sample_record("geometry/shown")
    shown = show_table(
        [record, sample_record("geometry/hull"), sample_record("geometry/shown", "smoke")], "shown-table"
    )
    assert "**Shown**" in shown.data
    assert "| offline |" in shown.data
    assert "smoke" not in shown.data
    assert "- A note." in shown.data
    assert record["config_hash"] in shown.data


def test_a_figure_is_a_picture_of_half_its_pixels(tmp_path):
    shown = show_figure([sample_record("geometry/shown")], "shown-figure")
    (tmp_path / "figure.png").write_bytes(shown.data)
    assert matplotlib.image.imread(tmp_path / "figure.png").shape[1] == 2 * shown.width == 480


def test_what_the_notebook_computed_looks_like_what_comes_from_records():
    figure, _ = new_figure(width=3.0, height=2.0)
    assert show_drawing(figure, "drawn").width == 240
    assert show_rows(["a", "b"], [["x", 0.12345]]).data.splitlines()[-1] == "| x | 0.123 |"


@pytest.mark.parametrize("show", [show_table, show_figure])
def test_what_was_not_run_says_so_and_what_it_needs(show):
    name = "shown-table" if show is show_table else "shown-figure"
    for records in ([], [sample_record("geometry/hull")], [sample_record("geometry/shown", "smoke")]):
        text = show(records, name).data
        assert f"{name}: not run" in text
        assert "`geometry/shown`" in text
    with pytest.raises(InputError, match=r"no (table|figure) 'nothing'"):
        show([], "nothing")


def test_verdicts_are_those_of_the_claims_asked_for():
    text = show_verdicts([], ("cifar-",)).data
    assert "CIFAR-100-C mCE" in text
    assert "not run" in text
    assert "hull" not in text
