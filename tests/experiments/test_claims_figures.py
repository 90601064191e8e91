"""The figure of all claims shows the verdicts: every number lies in the band of its grade, hollow where a stand-in."""

import pytest

from entreg.experiments.claims_figures import claims_figure, position
from entreg.records.claims import GRADES, Rule, grade_of, judge_all, load_claims
from entreg.records.registry import discover


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_a_number_lies_in_the_band_of_its_grade(direction):
    sign = 1 if direction == "higher" else -1
    rule = Rule(direction, reproduced=4.0 * sign, exceeded=5.0 * sign, partly=2.5 * sign)
    values = [sign * value for value in (-1e9, 0.0, 2.4, 2.5, 3.9, 4.0, 5.0, 5.1, 1e9)]
    places = [position(rule, value) for value in values]
    assert places == sorted(places)
    assert [place for place, value in zip(places, values, strict=True) if abs(value) in (2.5, 4.0, 5.0)] == [1, 2, 3]
    for place, value in zip(places, values, strict=True):
        low = GRADES.index(grade_of(rule, value))
        assert low <= place <= low + 1


def test_where_the_paper_has_one_number_all_above_it_lies_beyond():
    rule = Rule("higher", reproduced=4.0, exceeded=4.0, partly=2.0)
    assert position(rule, 4.0) == 2.0
    assert 3.0 < position(rule, 4.1) < position(rule, 9.0) < 4.0


def test_every_claim_has_its_dot_and_its_words(reference_records):
    discover()
    claims = load_claims()
    verdicts = [at["offline"] for at in judge_all(claims, reference_records)]
    (axes,) = claims_figure(reference_records).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    compared = [
        (claim, verdict) for claim, verdict in zip(claims, verdicts, strict=True) if verdict.verdict != "not comparable"
    ]
    assert len(dots) == len(compared)
    words = [text.get_text() for text in axes.texts]
    for claim, verdict in zip(claims, verdicts, strict=True):
        assert {claim.claim, claim.paper_value, verdict.words} <= set(words)
    # Rows go down in the order of the claims.
    for dot, (claim, verdict) in zip(sorted(dots, key=lambda one: -one.get_ydata()[0]), compared, strict=True):
        standard = claim.standards["offline"]
        assert dot.get_xdata()[0] == position(standard.rule, verdict.evidence.value)
        hollow = dot.get_markerfacecolor() == "white"
        assert hollow == (standard.stand_in is not None)


def test_without_records_there_is_no_figure():
    discover()
    assert claims_figure([]) is None


def test_the_papers_scale_replaces_the_stand_in(reference_records):
    """A claim that was run at the paper's scale is shown by that verdict, filled."""
    discover()
    wanted = next(claim for claim in load_claims() if claim.id == "vit-speed")
    records = [r for r in reference_records if r["experiment"] == "vit/speed"]
    paper = [{**r, "scale": "paper", "id": f"{r['id']}-paper"} for r in records]
    (axes,) = claims_figure([*records, *paper]).axes
    place = next(text.get_position()[1] for text in axes.texts if text.get_text() == wanted.claim)
    (dot,) = [line for line in axes.lines if line.get_marker() == "o" and line.get_ydata()[0] == place]
    assert dot.get_markerfacecolor() != "white"
