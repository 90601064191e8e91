import errno
import os
import shutil

import pytest

from entreg.errors import InputError, OutputError, RecordError
from entreg.records import RecordStore
from tests.records.samples import sample_record


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "runs")


def test_save_find_and_load(store):
    first = sample_record(config={"n": 10})
    second = sample_record("geometry/law", config={"n": 20})
    path = store.save(first)
    store.save(second)
    assert path == store.path_for("geometry/hull", {"n": 10.0})
    assert path.name == f"geometry__hull__{first['config_hash']}.json"
    found = store.find("geometry/hull", {"n": 10})
    assert {key: value for key, value in found.items() if key != "checksum"} == first
    assert store.find("geometry/hull", {"n": 11}) is None
    assert store.find("geometry/law", {"n": 10}) is None
    assert [record["id"] for record in store.load_all()] == sorted([first["id"], second["id"]])
    assert [record["id"] for record in store.load_all("geometry/l")] == [second["id"]]


def test_saving_again_replaces(store):
    store.save(sample_record(rows=[{"t": 1}]))
    store.save(sample_record(rows=[{"t": 2}]))
    assert [record["rows"] for record in store.load_all()] == [[{"t": 2}]]


def test_a_loaded_record_can_be_saved_elsewhere(store, tmp_path):
    path = store.save(sample_record())
    other = RecordStore(tmp_path / "other")
    assert other.save(store.load_all()[0]).read_bytes() == path.read_bytes()


def test_a_missing_or_empty_folder_holds_no_records(store):
    assert store.load_all() == []
    assert store.find("geometry/hull", {}) is None
    store.root.mkdir()
    (store.root / "README.md").write_text("not a record")
    assert store.load_all() == []


def test_save_refuses_what_load_would_refuse(store):
    for change in ({"repeats": 0}, {"extra": 1}, {"config_hash": "0" * 11}):
        with pytest.raises(InputError, match="was not saved"):
            store.save({**sample_record(), **change})
    with pytest.raises(RecordError, match="identifier"):
        store.save({**sample_record(), "config": {"n": 999}})
    assert not store.root.exists()


def test_flipped_bits_are_detected_everywhere(store):
    path = store.save(sample_record())
    original = path.read_bytes()
    for offset in range(0, len(original), 3):
        flipped = bytearray(original)
        flipped[offset] ^= 1 << (offset * 5 % 8)
        path.write_bytes(flipped)
        with pytest.raises(RecordError, match=path.name):
            store.load_all()
    path.write_bytes(original)
    assert len(store.load_all()) == 1


@pytest.mark.parametrize("length", [0, 1, 100, 1000, -1])
def test_truncation_is_reported_with_the_file(store, length):
    path = store.save(sample_record())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RecordError, match=path.name):
        store.find("geometry/hull", sample_record()["config"])
    with pytest.raises(RecordError, match=path.name):
        store.load_all("some other family")


def test_line_ends_changed_by_a_checkout_do_not_matter(store):
    path = store.save(sample_record())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(store.load_all()) == 1


def test_copies_and_renamed_files_are_refused(store):
    path = store.save(sample_record())
    copy = path.with_name(path.stem + " (1).json")
    shutil.copy(path, copy)
    with pytest.raises(RecordError, match="a copy or a renamed file"):
        store.load_all()
    copy.unlink()
    path.rename(path.with_name("geometry__hull__000000000000.json"))
    with pytest.raises(RecordError, match="geometry__hull__000000000000"):
        store.load_all()


def test_a_full_disk_leaves_the_old_record(store, monkeypatch):
    path = store.save(sample_record(rows=[{"t": 1}]))
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="disk is full"):
        store.save(sample_record(rows=[{"t": 2}]))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [item.name for item in store.root.iterdir()] == [path.name]


def test_a_file_in_place_of_the_folder(store):
    store.root.write_text("a file")
    with pytest.raises(OutputError, match="a file stands where the folder"):
        store.save(sample_record())


def test_an_unreadable_record_is_not_skipped(store):
    store.save(sample_record())
    (store.root / "geometry__x__000000000000.json").mkdir()
    with pytest.raises(RecordError, match="cannot be read"):
        store.load_all()
