"""Comparison with the published files: on files made here, whose distance to ours is known."""

import numpy as np
import pytest

from entreg.data.corruptions import ALL_CORRUPTIONS, corrupt
from entreg.errors import AssetError, InputError
from entreg.experiments.vision.corruption_fidelity import COMPARISON_COLUMNS, DETERMINISTIC, compare_with_official
from entreg.records.tables import Table
from tests.data.official_layouts import random_pixels, write_corruptions

CLEAN = random_pixels(6)


@pytest.fixture
def official(tmp_path):
    """A folder in the published layout; fog's and contrast's files hold our own images, contrast's one level off."""
    folder = write_corruptions(tmp_path / "CIFAR-100-C", np.arange(6))
    for corruption, offset in (("fog", 0), ("contrast", 1)):
        rows = [corrupt(CLEAN, corruption, severity, seed=3) + np.uint8(offset) for severity in (1, 2, 3, 4, 5)]
        np.save(folder / f"{corruption}.npy", np.concatenate(rows))
    return folder


def as_dicts(rows):
    return [dict(zip(COMPARISON_COLUMNS, row, strict=True)) for row in rows]


def test_same_images_agree_and_one_level_is_48_decibels(official):
    rows = as_dicts(compare_with_official(official, CLEAN, corruptions=["fog", "contrast"], seed=3))
    assert [(row["corruption"], row["severity"]) for row in rows] == [
        (name, severity) for name in ("fog", "contrast") for severity in (1, 2, 3, 4, 5)
    ]
    for row in rows[:5]:
        assert (row["PSNR to official (dB)"], row["mean |ours - official|"]) == (float("inf"), 0.0)
        assert row["mean |ours - clean|"] == row["mean |official - clean|"] > 0
        assert row["random"] == "yes"
    for row in rows[5:]:
        assert row["PSNR to official (dB)"] == pytest.approx(20 * np.log10(255), abs=1e-9)
        assert row["mean |ours - official|"] == 1.0
        assert row["mean official"] == pytest.approx(row["mean ours"] + 1)
        assert row["deviation official"] == pytest.approx(row["deviation ours"])
        assert row["random"] == "no"


def test_limit_and_seed_are_honoured_and_distances_are_to_the_clean_images(official):
    (row,) = as_dicts(compare_with_official(official, CLEAN, corruptions=["fog"], severities=[2], limit=4, seed=4))
    theirs = np.load(official / "fog.npy")[6:10].astype(float)
    ours = corrupt(CLEAN[:4], "fog", 2, seed=4).astype(float)
    assert row["mean |ours - official|"] == pytest.approx(np.abs(ours - theirs).mean())
    assert row["mean |official - clean|"] == pytest.approx(np.abs(theirs - CLEAN[:4]).mean())
    assert row["mean |ours - clean|"] == pytest.approx(np.abs(ours - CLEAN[:4]).mean())


def test_all_cells_make_a_table(official):
    rows = compare_with_official(official, CLEAN)
    assert len(rows) == 19 * 5
    text = Table("corruption-fidelity", "Corruptions against the published ones", COMPARISON_COLUMNS, rows).text_rows()
    assert text[0][:3] == ["gaussian_noise", "1", "yes"]


def test_deterministic_corruptions_are_those_that_no_seed_changes():
    unchanged = {
        name for name in ALL_CORRUPTIONS if np.array_equal(corrupt(CLEAN, name, 4), corrupt(CLEAN, name, 4, seed=1))
    }
    assert unchanged == DETERMINISTIC


def test_files_and_images_that_do_not_fit_are_refused(official, tmp_path):
    with pytest.raises(InputError, match="5 clean and 6 corrupted"):
        compare_with_official(official, CLEAN[:5])
    with pytest.raises(InputError, match="uint8"):
        compare_with_official(official, CLEAN / 255)
    with pytest.raises(InputError, match="limit"):
        compare_with_official(official, CLEAN, limit=0)
    with pytest.raises(AssetError, match="no folder"):
        compare_with_official(tmp_path / "nowhere", CLEAN)
