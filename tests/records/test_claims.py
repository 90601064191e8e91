import copy
import dataclasses
import math
import re

import pytest
import yaml

from entreg.errors import InputError, RecordError
from entreg.records import environment
from entreg.records.claims import (
    JUDGED_SCALES,
    VERDICTS,
    Claim,
    Evidence,
    Rule,
    claims_page,
    claims_table,
    judge,
    judge_all,
    load_claims,
    measure_registry,
    readme_table,
    register_measure,
    tally_sentence,
)
from entreg.records.registry import discover
from tests.records.samples import sample_record

# The paper's claims, typed from its abstracts and reviews.
LEDGER = {
    "geo-hull-speed": ("4–5x", "abstract v2"),
    "geo-tri-speed": ("4–5x", "abstract v2"),
    "geo-error": ("< 0.2 %", "abstract v2"),
    "geo-v1-speed": ("up to 4.1x", "abstract v1"),
    "vit-top1": ("80.1 %", "abstract v2"),
    "vit-speed": ("1.60x", "abstract v2"),
    "vit-flash": ("2.07x", "abstract v2"),
    "vit-flash-only": ("1.63x", "abstract v2"),
    "vit-l1": ("+6 points", "abstract v1"),
    "vit-iou": ("0.73 / 0.41", "abstract v2"),
    "cifar-mce": ("48.7 / 55.4", "abstract v2"),
    "llm-speed": ("1.48–1.60x", "abstract v2"),
    "llm-rouge": ("0.3–0.4 points", "abstract v2"),
    "llm-ppl": ("0.9", "abstract v2"),
    "train-cost": ("2–12 %", "reviews"),
    "amortise": ("≥ 450K", "reviews"),
}

CLAIMS = {claim.id: claim for claim in load_claims()}


def evidence(value, unit="x", **changes):
    fields = {"interval": None, "scale": "offline", "record_ids": ["r"], "reason": "", "unit": unit, **changes}
    return Evidence(value=value, **fields)


def at_the_papers_scale(claim, value, **changes):
    unit = CLAIMS[claim].standards["paper"].unit
    return judge(CLAIMS[claim], evidence(value, unit, scale="paper", has_required=True, **changes))


def test_every_claim_of_the_ledger_is_there_and_no_other():
    assert {key: (claim.paper_value, claim.source) for key, claim in CLAIMS.items()} == LEDGER


def test_every_claim_says_how_to_check_it():
    for claim in CLAIMS.values():
        assert set(claim.commands) == {"reproduce", *JUDGED_SCALES}
        assert all(re.match(r"(make [a-z-]+|python scripts/[a-z_]+\.py)", text) for text in claim.commands.values())
        if claim.status == "built":
            # The experiment is a configuration or, for claims about several, a folder of them.
            path = environment.REPOSITORY / "configs" / "experiment" / claim.experiment
            assert path.is_dir() or path.with_suffix(".yaml").is_file()


def test_the_geometry_claims_are_built():
    assert {claim.id for claim in CLAIMS.values() if claim.status == "built"} >= {
        *("geo-hull-speed", "geo-tri-speed", "geo-error", "geo-v1-speed")
    }


def test_commands_of_built_claims_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (environment.REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for claim in CLAIMS.values():
        for command in claim.commands.values() if claim.status == "built" else ():
            tool, target, *_ = command.split()
            if tool == "make":
                assert target in targets
            else:
                assert (environment.REPOSITORY / target).is_file()


# What the paper itself reports must count as reproduced by its own rule.
@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("geo-hull-speed", 4.0),
        ("geo-hull-speed", 5.0),
        ("geo-tri-speed", 4.5),
        ("geo-error", 0.19),
        ("geo-v1-speed", 4.1),
        ("vit-top1", 80.1),
        ("vit-speed", 1.60),
        ("vit-flash", 2.07),
        ("vit-flash-only", 1.63),
        ("vit-l1", 6.0),
        ("vit-iou", 0.73),
        ("cifar-mce", 6.7),
        ("llm-speed", 1.48),
        ("llm-speed", 1.60),
        ("llm-rouge", 0.3),
        ("llm-rouge", 0.4),
        ("llm-ppl", 0.9),
        ("train-cost", 2.0),
        ("train-cost", 12.0),
        ("amortise", 450_000),
    ],
)
def test_the_papers_own_value_is_reproduced(claim, value):
    assert at_the_papers_scale(claim, value).verdict == "reproduced"


# Values that mean "no effect" must count as not reproduced.
@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("geo-hull-speed", 1.0),
        ("geo-tri-speed", 1.0),
        ("geo-error", 1.0),
        ("geo-v1-speed", 1.0),
        ("vit-top1", 70.0),
        ("vit-speed", 1.0),
        ("vit-flash", 1.0),
        ("vit-flash-only", 1.0),
        ("vit-l1", 0.0),
        ("vit-iou", 0.41),
        ("cifar-mce", 0.0),
        ("llm-speed", 1.0),
        ("llm-rouge", 4.0),
        ("llm-ppl", 9.0),
        ("train-cost", 100.0),
        ("amortise", 1e9),
    ],
)
def test_no_effect_is_not_reproduced(claim, value):
    assert at_the_papers_scale(claim, value).verdict == "not reproduced"


# What the paper loses against ViT-Base trained on the same data, and its gain over its own baseline.
@pytest.mark.parametrize(("claim", "value"), [("vit-top1", 81.8 - 80.1), ("cifar-mce", 100 * (55.4 - 48.7) / 55.4)])
def test_the_rules_for_stand_ins_call_the_papers_own_ratio_reproduced(claim, value):
    standard = CLAIMS[claim].standards["offline"]
    assert judge(CLAIMS[claim], evidence(value, standard.unit)).verdict == "reproduced"
    nothing = 50.0 if standard.rule.direction == "lower" else 0.0
    assert judge(CLAIMS[claim], evidence(nothing, standard.unit)).verdict == "not reproduced"


def test_stand_ins_are_marked_and_the_papers_scale_has_none():
    marked = {key for key, claim in CLAIMS.items() if claim.standards["offline"].stand_in is not None}
    assert marked == {"vit-top1", "vit-l1", "vit-iou", "cifar-mce", "llm-speed", "llm-rouge", "llm-ppl"}
    assert all(claim.standards["paper"].stand_in is None for claim in CLAIMS.values())


@pytest.mark.parametrize(
    ("direction", "value", "verdict"),
    [
        ("higher", 5.01, "exceeded"),
        ("higher", 5.0, "reproduced"),
        ("higher", 4.0, "reproduced"),
        ("higher", 3.99, "partly"),
        ("higher", 2.5, "partly"),
        ("higher", 2.49, "not reproduced"),
        ("lower", -5.01, "exceeded"),
        ("lower", -5.0, "reproduced"),
        ("lower", -4.0, "reproduced"),
        ("lower", -3.99, "partly"),
        ("lower", -2.5, "partly"),
        ("lower", -2.49, "not reproduced"),
    ],
)
def test_thresholds(direction, value, verdict):
    sign = 1 if direction == "higher" else -1
    rule = Rule(direction, reproduced=4.0 * sign, exceeded=5.0 * sign, partly=2.5 * sign)
    assert judge(with_rule(rule), evidence(value)).verdict == verdict


def with_rule(rule):
    standard = dataclasses.replace(CLAIMS["geo-hull-speed"].standards["offline"], rule=rule)
    return dataclasses.replace(CLAIMS["geo-hull-speed"], standards={"offline": standard, "paper": standard})


PLAIN_RULE = Rule("higher", reproduced=4.0, exceeded=5.0, partly=2.5)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((4.1, 4.9), "reproduced"),
        ((5.1, 9.0), "exceeded"),
        ((1.0, 2.0), "not reproduced"),
        ((2.6, 3.9), "partly"),
        ((2.4, 2.6), "undecided"),
        ((3.9, 4.1), "undecided"),
        ((1.0, 9.0), "undecided"),
        # The paper's figure is reached at either end; that it is exceeded holds at one only.
        ((4.1, 5.1), "reproduced"),
    ],
)
def test_an_interval_across_verdicts_is_none(interval, verdict):
    found = judge(with_rule(PLAIN_RULE), evidence(sum(interval) / 2, interval=interval))
    assert found.verdict == verdict
    assert found.words == ("undecided: more data sets" if verdict == "undecided" else verdict)


@pytest.mark.parametrize(
    ("value", "control", "verdict"),
    [
        (4.5, 3.9, "reproduced"),
        (4.5, 4.0, "not credited"),
        (4.5, 50.0, "not credited"),
        (6.0, 4.0, "not credited"),
        (6.0, 3.9, "exceeded"),
        (3.0, 2.5, "not credited"),
        (3.0, 2.4, "partly"),
        (1.0, 50.0, "not reproduced"),
        (4.5, None, "reproduced"),
    ],
)
def test_a_control_that_reaches_the_figure_vetoes(value, control, verdict):
    claim = with_rule(dataclasses.replace(PLAIN_RULE, control="a filter"))
    found = judge(claim, evidence(value, control=control))
    assert found.verdict == verdict
    assert ("a run without the method reaches it as well; a filter" in found.reason) == (verdict == "not credited")
    # Where the rule names no control there is nothing to compare with.
    assert judge(with_rule(PLAIN_RULE), evidence(value, control=control)).verdict != "not credited"


def test_a_control_settles_what_an_interval_leaves_open():
    claim = with_rule(dataclasses.replace(PLAIN_RULE, control="a filter"))
    assert judge(claim, evidence(4.5, interval=(3.0, 6.0), control=9.0)).verdict == "not credited"
    assert judge(claim, evidence(4.5, interval=(3.0, 6.0), control=3.0)).verdict == "undecided"
    assert judge(claim, evidence(4.5, interval=(1.0, 6.0), control=9.0)).verdict == "undecided"


def test_what_lacks_the_required_is_not_comparable():
    claim = with_rule(dataclasses.replace(PLAIN_RULE, requires="the CUDA kernel"))
    found = judge(claim, evidence(4.5, interval=(1.0, 9.0)))
    assert found.verdict == "not comparable"
    assert found.reason == "the claim is one on the CUDA kernel, which did not run here"
    assert judge(claim, evidence(4.5, has_required=True)).verdict == "reproduced"


@pytest.mark.parametrize(
    ("noise", "verdict"), [(None, "reproduced"), (0.0, "reproduced"), (1.0, "reproduced"), (1.1, "undecided")]
)
def test_noise_above_the_resolution_decides_nothing(noise, verdict):
    claim = with_rule(dataclasses.replace(PLAIN_RULE, resolution=1.0))
    assert judge(claim, evidence(4.5, noise=noise)).verdict == verdict
    assert judge(with_rule(PLAIN_RULE), evidence(4.5, noise=noise)).verdict == "reproduced"


@pytest.mark.parametrize(
    ("claim", "value", "alternative", "verdict"),
    [
        ("geo-hull-speed", 0.7, 4.6, "partly"),
        ("geo-hull-speed", 0.7, 3.9, "not reproduced"),
        ("geo-hull-speed", 4.2, 9.0, "reproduced"),
        ("geo-hull-speed", 3.0, 1.0, "partly"),
        ("vit-iou", 0.5, 0.16, "partly"),
    ],
)
def test_alternative_quantity_makes_a_claim_partly_true_at_most(claim, value, alternative, verdict):
    found = at_the_papers_scale(claim, value, alternative=alternative)
    assert found.verdict == verdict
    assert CLAIMS[claim].standards["paper"].rule.alternative.quantity in found.reason


def test_reason_value_and_interval_are_told():
    found = judge(
        CLAIMS["geo-hull-speed"],
        evidence(0.71, interval=(0.65, 0.77), alternative=4.61, reason="classical filter alone: 18.3x"),
    )
    assert found.measured == "0.710x [0.650, 0.770]"
    assert found.reason == "the same without the network's own time: 4.61x; classical filter alone: 18.3x"
    assert found.record_ids == ("r",)


def test_an_interval_across_a_threshold_is_told():
    found = judge(CLAIMS["geo-error"], evidence(0.19, "%", interval=(0.01, 0.45)))
    assert found.verdict == "undecided"
    assert found.measured == "0.190 % [0.0100, 0.450]"
    assert found.reason == "the 95 % interval reaches from not reproduced to exceeded"
    assert "interval" not in judge(CLAIMS["geo-error"], evidence(0.1, "%", interval=(0.09, 0.11))).reason


def test_without_evidence_the_command_is_told():
    found = judge(CLAIMS["geo-hull-speed"], None)
    assert (found.verdict, found.measured, found.reason) == (
        "not run",
        "–",
        "run make study-geometry STUDY=outputs/study",
    )
    planned = judge(dataclasses.replace(CLAIMS["llm-speed"], status="planned"), None, "paper").reason
    assert planned == "not built yet; it will be make reproduce-llm PROFILE=paper MODEL=meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"value": math.nan}, "not finite"),
        ({"interval": (1.0, math.inf)}, "not finite"),
        ({"alternative": math.nan}, "not finite"),
        ({"control": math.inf}, "not finite"),
        ({"noise": math.nan}, "not finite"),
        ({"unit": "%"}, "in '%' but the claim in 'x'"),
        ({"scale": "smoke"}, "not 'smoke'"),
        ({"record_ids": []}, "name the records"),
    ],
)
def test_bad_evidence(bad, words):
    with pytest.raises(InputError, match=words):
        judge(CLAIMS["geo-hull-speed"], dataclasses.replace(evidence(4.0), **bad))


@pytest.fixture
def measure():
    names = []

    def register(name, function, experiments=("",)):
        assert measure_registry.get(name) is None
        register_measure(name, experiments)(function)
        names.append(name)

    yield register
    for name in names:
        measure_registry.remove(name)


def test_measures_see_the_records_of_one_scale(measure):
    seen = []

    def function(records):
        seen.append([(record["experiment"], record["scale"]) for record in records])
        return evidence(4.5, scale=records[0]["scale"], record_ids=[records[0]["id"]])

    measure("test-measure", function, ("geometry",))
    claim = dataclasses.replace(CLAIMS["geo-hull-speed"], measure="test-measure")
    records = [sample_record("geometry/hull"), sample_record("vit/speed"), sample_record(scale="smoke")]
    (at,) = judge_all([claim], records)
    assert seen == [[("geometry/hull", "offline")]]
    assert (at["offline"].verdict, at["paper"].verdict) == ("reproduced", "not run")
    (at,) = judge_all([claim], [sample_record(scale="paper")])
    assert (at["offline"].verdict, at["paper"].verdict) == ("not run", "reproduced")


def test_a_quick_run_is_judged_by_the_offline_rule_where_there_is_no_offline_run(measure):
    def function(records):
        return evidence(records[0]["rows"][0]["ratio"], scale=records[0]["scale"], record_ids=[records[0]["id"]])

    measure("test-measure", function, ("geometry",))
    claim = dataclasses.replace(CLAIMS["geo-hull-speed"], measure="test-measure")
    quick = sample_record(scale="reproduce", rows=[{"ratio": 4.5}])
    (at,) = judge_all([claim], [quick])
    assert (at["offline"].words, at["paper"].verdict) == ("reproduced (quick run)", "not run")
    (at,) = judge_all([claim], [quick, sample_record(scale="offline", rows=[{"ratio": 1.0}])])
    assert at["offline"].words == "not reproduced"
    assert all(claim.standards["reproduce"] == claim.standards["offline"] for claim in CLAIMS.values())


def test_offline_evidence_cannot_pass_for_the_papers_scale(measure):
    measure("test-measure", lambda records: evidence(4.5))
    claim = dataclasses.replace(CLAIMS["geo-hull-speed"], measure="test-measure")
    with pytest.raises(InputError, match="offline evidence from paper records"):
        judge_all([claim], [sample_record(scale="paper")])


def test_the_short_table_is_short_and_marks_stand_ins(reference_records):
    discover()
    claims = list(CLAIMS.values())
    verdicts = judge_all(claims, reference_records)
    table = readme_table(claims, verdicts)
    assert max(len(cell) for row in (table.columns, *table.rows) for cell in row) <= 60
    marked = {claim.id for claim, row in zip(claims, table.rows, strict=True) if row[2].endswith(" †")}
    assert marked == {claim.id for claim in claims if claim.standards["offline"].stand_in is not None}
    page = claims_page(claims, verdicts, reference_records)
    assert re.findall(r"^## ([a-z0-9-]+)$", page, re.MULTILINE) == [*CLAIMS]
    for row in table.rows:
        assert f"## {row[4].partition('#')[2].rstrip(')')}\n" in page


def test_without_records_or_measure_everything_is_not_run():
    claims = list(CLAIMS.values())
    for at in judge_all(claims, []):
        assert [at[scale].verdict for scale in JUDGED_SCALES] == ["not run", "not run"]


def test_tables_have_a_row_per_claim(measure):
    measure("test-measure", lambda records: evidence(0.7, record_ids=["r"], alternative=4.6, reason="filter: 18x"))
    measure("test-none", lambda records: None)
    claims = [
        dataclasses.replace(CLAIMS["geo-hull-speed"], measure="test-measure"),
        dataclasses.replace(CLAIMS["geo-error"], measure="test-none"),
        dataclasses.replace(CLAIMS["llm-speed"], measure="test-absent", status="planned"),
    ]
    verdicts = judge_all(claims, [sample_record()])
    full = claims_table(claims, verdicts)
    assert [row[0] for row in full.rows] == ["`geo-hull-speed`", "`geo-error`", "`llm-speed`"]
    assert full.record_ids == ["r"]
    assert full.rows[0][8] == "the same without the network's own time: 4.60x; filter: 18x"
    assert full.rows[2][8] == "not built yet"
    short = readme_table(claims, verdicts)
    assert list(short.columns) == ["Claim", "Paper", "Ours", "Verdict", "Details"]
    assert [row[3] for row in short.rows] == ["**partly**", "not run", "not run"]
    assert short.rows[0][4] == "[why](results/tables/claims.md#geo-hull-speed)"
    assert tally_sentence(verdicts) == "Offline: 1 partly, 2 not run. At the paper's scale: 3 not run."
    page = claims_page(claims, verdicts, [sample_record() | {"id": "r", "wall_seconds": 90.0}])
    for words in (
        "## geo-hull-speed\n",
        "- Offline: 0.700x, **partly**.\n",
        "- Filter: 18x.\n",
        "- This number: `make study-geometry STUDY=outputs/study`; it rests on 1 record, which took 90.0 s.\n",
        "`make reproduce-geometry`.\n",
        "- At the paper's scale: not run; `python scripts/geometry.py profile=paper`.\n",
        "[why](#geo-hull-speed)",
    ):
        assert words in page
    assert all(verdict[scale].verdict in VERDICTS for verdict in verdicts for scale in JUDGED_SCALES)


VALID = {
    "id": "a-b",
    "family": "vision",
    "claim": "c",
    "paper_value": "1x",
    "source": "reviews",
    "experiment": "e",
    "status": "built",
    "quantity": "q",
    "unit": "x",
    "rule": {"direction": "higher", "exceeded": 3, "reproduced": 2, "partly": 1},
    "repeats": "seeds",
    "commands": {"offline": "make a", "reproduce": "make c", "paper": "make b"},
}


REVERSED = {"quantity": "q", "unit": "%", "rule": {"direction": "higher", "exceeded": 1, "reproduced": 2, "partly": 3}}


def change(**fields):
    entry = copy.deepcopy(VALID)
    for key, value in fields.items():
        if value is None:
            del entry[key]
        else:
            entry[key] = {**entry.get(key, {}), **value} if isinstance(value, dict) else value
    return yaml.safe_dump([entry])


def test_a_valid_file_loads(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(change())
    (claim,) = load_claims(path)
    assert isinstance(claim, Claim)
    assert (claim.measure, claim.standards["paper"].rule.exceeded) == ("a-b", 3)
    assert claim.standards["offline"] == claim.standards["paper"]
    path.write_text(change(measure="other"))
    assert load_claims(path)[0].measure == "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "top level"),
        ("a: 1", "top level"),
        ("[1]", "number 1"),
        ("[}", "not valid YAML"),
        ("- id: a\n  id: b\n", "the key 'id' stands twice"),
        (change(colour="red"), "the claim a-b.*colour"),
        (change(unit=None), "the claim a-b.*unit"),
        (change(source="hearsay"), "the claim a-b/source"),
        (change(id="A B"), "the claim A B/id"),
        (change(rule={"direction": "up"}), "the claim a-b/rule/direction"),
        (change(rule={"reproduced": "much"}), "the claim a-b/rule/reproduced"),
        (change(rule={"reproduced": 9}), "thresholds of 'a-b' out of order"),
        (change(rule={"direction": "lower"}), "thresholds of 'a-b' out of order"),
        (change(commands={"gpu": "x"}), "the claim a-b/commands"),
        (change(claim=60 * "c" + "."), "the claim a-b/claim"),
        (change(family="astronomy"), "the claim a-b/family"),
        (change(rule={"resolution": 0}), "the claim a-b/rule/resolution"),
        (change(**{"offline": {"stand_in": "toys", "unit": "%"}}), "the claim a-b/offline"),
        (change(**{"offline": {"stand_in": "toys", **REVERSED}}), "thresholds of 'a-b' out of order"),
        (change() + change(), "the id 'a-b' twice"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(RecordError, match=words) as caught:
        load_claims(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        load_claims(tmp_path / "claims.yaml")
