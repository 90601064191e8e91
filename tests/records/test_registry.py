import sys

import pytest

from entreg.errors import InputError
from entreg.records import registry
from entreg.records.registry import Registry


def make(module, name="build"):
    def function(records):
        return len(records)

    function.__module__, function.__qualname__ = module, name
    return function


def test_entries_are_ordered_and_select_by_prefix():
    known = Registry("table")
    known.register("b", ("geometry/hull", "vit"))(make("m1"))
    known.register("a")(make("m2"))
    assert [entry.name for entry in known.entries()] == ["a", "b"]
    records = [{"experiment": name} for name in ("geometry/hull", "geometry/law", "vit/x", "llm")]
    assert [record["experiment"] for record in known.get("b").select(records)] == ["geometry/hull", "vit/x"]
    assert len(known.get("a").select(records)) == 4
    assert known.get("c") is None


def test_a_name_belongs_to_one_function():
    known = Registry("figure")
    known.register("a")(make("m1"))
    known.register("a")(make("m1"))  # a reload
    with pytest.raises(InputError, match="figure 'a' is registered twice: by m1 and m2"):
        known.register("a")(make("m2"))
    known.remove("a")
    known.register("a")(make("m2"))


@pytest.mark.parametrize("experiments", ["geometry", ()])
def test_a_bare_string_is_not_a_tuple_of_prefixes(experiments):
    with pytest.raises(InputError, match="non-empty tuple"):
        Registry("table").register("a", experiments)


def test_modules_are_found_by_their_name_at_any_depth(tmp_path, monkeypatch):
    inner = tmp_path / "found_family" / "speed"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
        (folder / "tables_of_logs.py").write_text("raise RuntimeError('must not be imported')\n")
    (inner.parent / "tables.py").touch()
    (inner / "cost_figures.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = ["found_family.speed.cost_figures", "found_family.tables"]
    assert registry.telling_modules("found_family") == expected
    registry.discover("found_family")
    assert set(expected) <= set(sys.modules)
    for name in [name for name in sys.modules if name.split(".")[0] == "found_family"]:
        monkeypatch.delitem(sys.modules, name)
