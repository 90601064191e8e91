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


def test_modules_are_found_by_their_ending(tmp_path, monkeypatch):
    import entreg.records

    (tmp_path / "found_tables.py").write_text("import sys\nsys.modules['found_by_test'] = sys\n")
    (tmp_path / "other.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.setattr(entreg.records, "__path__", [*entreg.records.__path__, str(tmp_path)])
    import sys

    monkeypatch.delitem(sys.modules, "found_by_test", raising=False)
    registry.discover()
    assert "found_by_test" in sys.modules
    for name in ("found_by_test", "entreg.records.found_tables"):
        monkeypatch.delitem(sys.modules, name)
