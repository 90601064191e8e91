"""Mean corruption error: on cases worked out by hand, and measured where the answer is known."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from entreg.data.corrupted_images import CorruptedSet, GeneratedCorruptions, preparation_of
from entreg.data.corruptions import ALL_CORRUPTIONS, CATEGORIES, CORRUPTIONS, EXTRA_CORRUPTIONS
from entreg.data.scenes import DigitScenes
from entreg.errors import InputError
from entreg.experiments.vision.corruption_errors import CorruptionErrors, corruption_errors, error_rate, predictor


def table(value, corruptions=CORRUPTIONS):
    """``value(place of the corruption, severity)`` as errors."""
    return {
        name: {severity: value(place, severity) for severity in (1, 2, 3, 4, 5)}
        for place, name in enumerate(corruptions)
    }


def test_mean_corruption_error_is_the_plain_mean_of_75_errors():
    # 0.01 place + 0.1 severity: the mean place is 7, the mean severity 3.
    errors = CorruptionErrors(table(lambda place, severity: 0.01 * place + 0.1 * severity), 10, clean_error=0.07)
    assert errors.mean_corruption_error == pytest.approx(0.37)
    assert errors.excess_error == pytest.approx(0.30)
    assert errors.by_corruption()["gaussian_noise"] == pytest.approx(0.3)
    assert errors.by_corruption()["jpeg_compression"] == pytest.approx(0.44)
    assert errors.by_severity() == pytest.approx({s: 0.07 + 0.1 * s for s in (1, 2, 3, 4, 5)})
    # Places of the categories: 0-2, 3-6, 7-10, 11-14.
    expected = {"noise": 0.31, "blur": 0.345, "weather": 0.385, "digital": 0.425}
    assert errors.by_category() == pytest.approx(expected)


def test_means_of_parts_make_up_the_whole():
    draws = np.random.default_rng(0).uniform(size=(15, 6))
    errors = CorruptionErrors(table(lambda place, severity: draws[place, severity]), 10)
    whole = errors.mean_corruption_error
    assert whole == pytest.approx(draws[:, 1:].mean())
    assert np.mean(list(errors.by_corruption().values())) == pytest.approx(whole)
    assert np.mean(list(errors.by_severity().values())) == pytest.approx(whole)
    weighted = sum(len(CATEGORIES[name]) * value for name, value in errors.by_category().items()) / 15
    assert weighted == pytest.approx(whole)
    assert errors.excess_error is None


def test_extra_corruptions_are_reported_beside_the_mean():
    base = table(lambda place, severity: 0.2)
    extra = table(lambda place, severity: 0.1 * severity, EXTRA_CORRUPTIONS)
    errors = CorruptionErrors({**base, **extra}, 10)
    assert errors.mean_corruption_error == pytest.approx(0.2)
    assert errors.mean_extra_error == pytest.approx(0.3)
    assert errors.by_severity() == pytest.approx(dict.fromkeys((1, 2, 3, 4, 5), 0.2))
    assert CorruptionErrors(base, 10).mean_extra_error is None


def test_incomplete_errors_have_no_mean_corruption_error():
    errors = table(lambda place, severity: 0.5)
    del errors["snow"][4]
    incomplete = CorruptionErrors(errors, 10)
    assert not incomplete.is_complete
    with pytest.raises(InputError, match="1 of 75 were not measured, the first is snow at severity 4"):
        _ = incomplete.mean_corruption_error
    assert incomplete.mean() == pytest.approx(0.5)
    assert incomplete.as_dict()["mean_corruption_error"] is None
    assert CorruptionErrors({"fog": {3: 0.25}}, 10).by_category() == {"weather": 0.25}
    with pytest.raises(InputError, match="none of these"):
        CorruptionErrors({"fog": {3: 0.25}}, 10).mean(["snow"])


def test_errors_survive_json():
    errors = CorruptionErrors(table(lambda place, severity: place / 100, ALL_CORRUPTIONS), 10, clean_error=0.125)
    assert CorruptionErrors.from_dict(json.loads(json.dumps(errors.as_dict()))) == errors


@pytest.mark.parametrize(
    ("errors", "match"),
    [
        ({"fog": {1: 1.5}}, "lies in"),
        ({"fog": {1: float("nan")}}, "lies in"),
        ({"fog": {6: 0.5}}, "1 to 5"),
        ({"mist": {1: 0.5}}, "unknown corruption"),
    ],
)
def test_impossible_errors_are_refused(errors, match):
    with pytest.raises(InputError, match=match):
        CorruptionErrors(errors, 10)


class Coded(CorruptedSet):
    """Images that say in their first pixels which cell and which image they are."""

    def __init__(self, labels, corruptions=ALL_CORRUPTIONS):
        self.labels = np.asarray(labels)
        self.corruptions = corruptions

    def images(self, corruption, severity):
        images = np.zeros((len(self.labels), 16, 16, 1), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = ALL_CORRUPTIONS.index(corruption), severity
        images[:, 0, 2, 0] = np.arange(len(self.labels))
        return images

    def describe(self):
        return {}


def first_wrong(labels):
    """Answers wrongly on the first (place + severity) images of every cell."""
    labels = np.asarray(labels)

    def predict(images):
        place, severity, index = (images[:, 0, column, 0].astype(int) for column in range(3))
        wrong = index < place + severity
        answers = labels[index].copy()
        answers[wrong] += 1
        return torch.from_numpy(answers)

    return predict


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_every_cell_is_measured_on_its_own_images(batch_size):
    labels = np.arange(40) % 10
    errors = corruption_errors(first_wrong(labels), Coded(labels), batch_size=batch_size)
    assert list(errors.errors) == list(ALL_CORRUPTIONS)
    for place, name in enumerate(ALL_CORRUPTIONS):
        assert errors.errors[name] == {severity: (place + severity) / 40 for severity in (1, 2, 3, 4, 5)}
    assert errors.mean_corruption_error == pytest.approx((7 + 3) / 40)
    assert errors.num_images == 40


def test_every_answer_of_an_image_counts():
    labels = np.arange(40).reshape(10, 4)

    def predict(images):
        answers = labels[images[:, 0, 2, 0]].copy()
        answers[:, 1] += 1
        return answers

    errors = corruption_errors(predict, Coded(labels), corruptions=["fog"], severities=[2, 5])
    assert errors.errors == {"fog": {2: 0.25, 5: 0.25}}


def test_limit_and_clean_images_are_honoured():
    labels = np.arange(40) % 10
    clean = np.zeros((40, 16, 16, 1), np.uint8)
    clean[:, 0, 2, 0] = np.arange(40)
    clean[:, 0, 0, 0] = 10  # Wrong on the first ten.
    errors = corruption_errors(
        first_wrong(labels),
        Coded(labels),
        corruptions=["gaussian_noise"],
        severities=[5],
        clean=clean,
        limit=20,
    )
    assert errors.errors == {"gaussian_noise": {5: 5 / 20}}
    assert (errors.clean_error, errors.num_images) == (0.5, 20)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"corruptions": ["mist"]}, "unknown corruption"),
        ({"corruptions": ["spatter"]}, "has no spatter"),
        ({"corruptions": []}, "must not be empty"),
        ({"severities": [0]}, "1 to 5"),
        ({"severities": []}, "must not be empty"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": 0}, "limit"),
        ({"clean": np.zeros((3, 16, 16, 1), np.uint8)}, "3 clean and 4 corrupted"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_measured(keywords, match):
    corrupted = Coded(np.arange(4), CORRUPTIONS)

    def predict(images):
        pytest.fail("measured")

    with pytest.raises(InputError, match=match):
        corruption_errors(predict, corrupted, **keywords)


def test_predictions_must_have_the_shape_of_the_labels():
    with pytest.raises(InputError, match=r"\(4, 10\) do not fit labels of shape \(4,\)"):
        error_rate(lambda images: np.zeros((4, 10)), np.zeros((4, 16, 16, 1), np.uint8), np.arange(4))
    with pytest.raises(InputError, match="no images"):
        error_rate(lambda images: [], np.zeros((0, 16, 16, 1), np.uint8), np.zeros(0, int))


class Tokens(nn.Module):
    """Answers (batch, tokens, classes); token t's class is the number of its quadrant's bright pixels, modulo 10."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        halves = [
            images[:, 0, rows, columns] > 0
            for rows in (slice(0, 24), slice(24, 48))
            for columns in (slice(0, 24), slice(24, 48))
        ]
        classes = torch.stack([half.sum((1, 2)) % 10 for half in halves] + [torch.zeros(len(images))], dim=1)
        return nn.functional.one_hot(classes.long(), 10) * self.weight


def test_predictor_prepares_images_and_answers_with_the_first_tokens(tmp_path):
    scenes = DigitScenes("test", length=12)
    corrupted = GeneratedCorruptions(
        np.stack([scenes.raw(i) for i in range(12)]), np.zeros((12, 4), int), folder=tmp_path
    )
    prepare = preparation_of(scenes)
    measured = corruption_errors(
        predictor(Tokens(), prepare, num_answers=4), corrupted, corruptions=["fog"], severities=[1]
    )
    images = corrupted.images("fog", 1)[..., 0] / 255.0 > scenes.mean
    counts = images.reshape(12, 2, 24, 2, 24).sum(axis=(2, 4)).reshape(12, 4)
    assert measured.errors["fog"][1] == pytest.approx((counts % 10 != 0).mean())
    classify = nn.Sequential(nn.Flatten(), nn.Linear(48 * 48, 10))
    answers = predictor(classify, prepare)(corrupted.images("fog", 1))
    assert answers.tolist() == classify(prepare(corrupted.images("fog", 1))).argmax(-1).tolist()
