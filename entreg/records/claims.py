"""The paper's claims, and verdicts on them from records by the rules in ``claims.yaml``."""

import functools
import json
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from entreg.errors import InputError, RecordError
from entreg.records.formatting import MISSING, NOT_RUN, number, seconds
from entreg.records.registry import Registry
from entreg.records.tables import GENERATED, Table, TracedRow, provenance

JUDGED_SCALES = ("offline", "paper")
QUICK = "reproduce"
"""A smaller offline run, judged by the offline rules; it stands in for an offline one that was not run."""
GRADES = ("not reproduced", "partly", "reproduced", "exceeded")
"""What a number alone comes to, worst first."""
NOT_CREDITED, UNDECIDED, NOT_COMPARABLE = "not credited", "undecided", "not comparable"
VERDICTS = (*reversed(GRADES), NOT_CREDITED, UNDECIDED, NOT_COMPARABLE, NOT_RUN)
"""In the order in which they are told."""
DAGGER = "†"
"""Marks what an offline stand-in gave."""

MeasureFunction = Callable[[list[dict[str, Any]]], "Evidence | None"]

measure_registry: Registry[MeasureFunction] = Registry("measure")


def register_measure(name: str, experiments: Sequence[str] = ("",)) -> Callable[[MeasureFunction], MeasureFunction]:
    """Decorator: the function computes the quantity of the claims that name it; see :mod:`entreg.records`.

    Args:
        name: the claim's ``measure``, by default its id.
        experiments: prefixes of the experiments whose records the function is given; by default all records. It is
            called once per scale, with that scale's records only, and not at all when there is none.
    """
    return measure_registry.register(name, experiments)


@dataclass(frozen=True)
class Alternative:
    """A second quantity that makes a claim at least partly true."""

    quantity: str
    direction: str
    partly: float


@dataclass(frozen=True)
class Rule:
    """Thresholds in the unit of the quantity, and what must hold before they decide; see the head of ``claims.yaml``.

    Attributes:
        direction: which side of the thresholds is better, ``higher`` or ``lower``.
        reproduced: threshold of that grade, like ``exceeded`` and ``partly``.
        alternative: a second quantity, or None.
        control: what was run without the method, or None.
        requires: what the measurement must have had, or None.
        resolution: noise above this decides nothing; None where noise is not measured.
    """

    direction: str
    reproduced: float
    exceeded: float
    partly: float
    alternative: Alternative | None = None
    control: str | None = None
    requires: str | None = None
    resolution: float | None = None


@dataclass(frozen=True)
class Standard:
    """What a claim is judged by at one scale.

    Attributes:
        quantity: what the measure returns.
        unit: its unit.
        rule: the thresholds.
        stand_in: the data or model in place of the paper's, or None where the quantity is the paper's own.
    """

    quantity: str
    unit: str
    rule: Rule
    stand_in: str | None = None


@dataclass(frozen=True)
class Claim:
    """One row of ``claims.yaml``; the file's head explains the fields.

    ``standards`` and ``commands`` hold one per scale.
    """

    id: str
    family: str
    claim: str
    paper_value: str
    source: str
    experiment: str
    status: str
    repeats: str
    commands: Mapping[str, str]
    measure: str
    standards: Mapping[str, Standard]


@dataclass(frozen=True)
class Evidence:
    """What a measure found.

    Attributes:
        value: the claim's quantity, in the unit of its standard at this scale.
        interval: the range that the value may lie in, or None.
        scale: ``reproduce``, ``offline`` or ``paper``.
        record_ids: the records that it rests on.
        reason: a computed half-sentence that explains the value, for example ``classical filter alone: 18.3x``.
        unit: must be the standard's unit: guards against fractions where per cent are meant.
        alternative: the rule's alternative quantity, or None.
        control: the same quantity of the rule's control, or None where it was not run.
        has_required: whether the measurement had what the rule requires.
        noise: by how much, in the unit, the measurement is known to err, or None.
        interval_is: what the interval is, for example ``range of the rounds``.
    """

    value: float
    interval: tuple[float, float] | None
    scale: str
    record_ids: Sequence[str]
    reason: str
    unit: str
    alternative: float | None = None
    control: float | None = None
    has_required: bool = False
    noise: float | None = None
    interval_is: str = "95 % interval"


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict at one scale.

    Attributes:
        claim_id: the claim.
        scale: ``reproduce``, ``offline`` or ``paper``.
        verdict: one of :data:`VERDICTS`.
        measured: the value as text, a dash when not run.
        reason: why, or the command to run when not run.
        record_ids: the records that it rests on.
        more: what there must be more of before there is a verdict, or None.
        evidence: what it was judged from, or None when not run.
    """

    claim_id: str
    scale: str
    verdict: str
    measured: str
    reason: str
    record_ids: Sequence[str] = field(default_factory=tuple)
    more: str | None = None
    evidence: Evidence | None = None

    @property
    def words(self) -> str:
        """The verdict, what is missing for one (``undecided: more seeds``), and whether a quick run gave it."""
        return f"{self.short_words} (quick run)" if self.scale == QUICK else self.short_words

    @property
    def short_words(self) -> str:
        """The verdict and what is missing for one."""
        return self.verdict if self.more is None else f"{self.verdict}: more {self.more}"


def load_claims(path: str | os.PathLike[str] | None = None) -> list[Claim]:
    """Reads and checks a claims file.

    Args:
        path: by default the package's own ``claims.yaml``.

    Raises:
        RecordError: the file is missing, not YAML, has an unknown or repeated key, lacks one, repeats an id, or its
            thresholds are out of order.
    """
    name = "claims.yaml" if path is None else str(path)
    try:
        if path is None:
            text = resources.files("entreg.records").joinpath("claims.yaml").read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"The claims file {name} cannot be read: {error}.") from error
    try:
        entries = yaml.load(text, Loader=_StrictLoader)
    # PyYAML lets what it makes numbers, dates and mappings with raise what it likes; its own errors are long.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:500]
        raise RecordError(f"The claims file {name} is not valid YAML: {why}.") from error
    problem = jsonschema.exceptions.best_match(_validator().iter_errors(entries))
    if problem is not None:
        raise RecordError(f"The claims file {name} is wrong at {_place(entries, problem)}: {problem.message[:500]}.")
    claims = [_claim(entry) for entry in entries]
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise RecordError(f"The claims file {name} has the id {claim.id!r} twice; every claim needs its own.")
        seen.add(claim.id)
        for rule in (standard.rule for standard in claim.standards.values()):
            thresholds = [rule.partly, rule.reproduced, rule.exceeded]
            if any(map(math.isnan, thresholds)) or thresholds != sorted(thresholds, reverse=rule.direction == "lower"):
                raise RecordError(
                    f"The claims file {name} has the thresholds of {claim.id!r} out of order: with {rule.direction} "
                    "being better, exceeded must lie beyond reproduced and reproduced beyond partly."
                )
    return claims


def judge(claim: Claim, evidence: Evidence | None, scale: str = "offline") -> Verdict:
    """Applies a claim's rule to what was measured.

    Args:
        claim: the claim with its rule.
        evidence: from the claim's measure, or None when nothing was measured.
        scale: the scale of the verdict when there is no evidence.

    Raises:
        InputError: the evidence is not finite, of another unit, of an unknown scale, or names no record.
    """
    if evidence is None:
        return Verdict(claim.id, scale, NOT_RUN, MISSING, _how_to_run(claim, scale))
    _check(claim, evidence)
    standard = claim.standards[evidence.scale]
    verdict, reasons = _decide(standard, evidence)
    measured = with_unit(evidence.value, standard.unit)
    if evidence.interval is not None:
        low, high = evidence.interval
        measured += f" [{number(float(low))}, {number(float(high))}]"
    elif evidence.noise:
        measured += f" ± {number(float(evidence.noise))}"
    alternative = standard.rule.alternative
    if alternative is not None and evidence.alternative is not None:
        reasons.append(f"{alternative.quantity}: {with_unit(evidence.alternative, standard.unit)}")
    if evidence.reason:
        reasons.append(evidence.reason)
    return Verdict(
        claim.id,
        evidence.scale,
        verdict,
        measured,
        "; ".join(reasons),
        tuple(evidence.record_ids),
        claim.repeats if verdict == UNDECIDED else None,
        evidence,
    )


def _decide(standard: Standard, evidence: Evidence) -> tuple[str, list[str]]:
    """The verdict, and why it is not simply the grade of the value."""
    rule, unit = standard.rule, standard.unit
    if rule.requires is not None and not evidence.has_required:
        return NOT_COMPARABLE, [f"the claim is one on {rule.requires}, which did not run here"]
    if rule.resolution is not None and evidence.noise is not None and evidence.noise > rule.resolution:
        limit = with_unit(rule.resolution, unit)
        return UNDECIDED, [f"the measurement errs by up to {with_unit(evidence.noise, unit)}, more than {limit}"]
    grades = {grade_of(rule, value, evidence.alternative) for value in (evidence.value, *(evidence.interval or ()))}
    reached = sorted(grades, key=GRADES.index)
    reasons = []
    if len(reached) > 1:
        reasons.append(f"the {evidence.interval_is} reaches from {reached[0]} to {reached[-1]}")
        if reached[0] == "reproduced":
            reached = reached[:1]
    verdicts = reached
    if rule.control is not None and evidence.control is not None:
        control = grade_of(rule, evidence.control, None)
        verdicts = [NOT_CREDITED if _vetoes(control, grade) else grade for grade in reached]
        said = f"{rule.control}: {with_unit(evidence.control, unit)}"
        reasons.append(f"a run without the method reaches it as well; {said}" if NOT_CREDITED in verdicts else said)
    verdict = verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED
    return verdict, reasons


def _vetoes(control: str, grade: str) -> bool:
    """Whether a control of one grade leaves nothing of ours to credit the method with."""
    least = min(GRADES.index(grade), GRADES.index("reproduced"))
    return grade != GRADES[0] and GRADES.index(control) >= least


def judge_all(claims: Sequence[Claim], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Verdict]]:
    """Every claim's verdict at every scale, in the order of the claims.

    Returns:
        One dictionary per claim: ``{"offline": Verdict, "paper": Verdict}``. Where there is no offline evidence, the
        first is that of the quick runs, if there are any.
    """
    return [
        {"offline": _judge_offline(claim, records), "paper": _judge_at(claim, records, "paper")} for claim in claims
    ]


def with_unit(value: float, unit: str) -> str:
    """A value and its unit as one text: ``4.61x``, ``0.18 %``, ``3.2 points``."""
    text = number(float(value))
    if unit == "x":
        return text + unit
    return f"{text} {unit}".rstrip()


def claims_table(claims: Sequence[Claim], verdicts: Sequence[Mapping[str, Verdict]]) -> Table:
    """The complete table: every claim with both scales, reasons and commands."""
    rows = [
        TracedRow(
            [
                f"`{claim.id}`",
                claim.claim,
                claim.paper_value,
                claim.source,
                _marked(claim, at["offline"]),
                at["offline"].words,
                at["paper"].measured,
                at["paper"].words,
                why(claim, at),
                *(f"`{claim.commands[name]}`" for name in ("offline", QUICK, "paper")),
            ],
            [key for verdict in at.values() for key in verdict.record_ids],
        )
        for claim, at in zip(claims, verdicts, strict=True)
    ]
    columns = [
        "id",
        "claim",
        "paper",
        "source",
        "here, offline",
        "verdict, offline",
        "here, paper's scale",
        "verdict, paper's scale",
        "why",
        "check offline",
        "check a smaller run",
        "check at the paper's scale",
    ]
    used = sorted({key for at in verdicts for verdict in at.values() for key in verdict.record_ids})
    return Table(
        "claims", "The paper's claims and our verdicts", columns, rows, NOTES, "l" * len(columns), record_ids=used
    )


NOTES = (
    "Offline means generated or packaged data and a CPU; it never stands for the paper's scale.",
    f"{DAGGER} Another model or other data stands in for the paper's and is compared with its own dense model.",
    "The rules behind the verdicts are in `entreg/records/claims.yaml`.",
)


def paper_table(claims: Sequence[Claim], verdicts: Sequence[Mapping[str, Verdict]]) -> Table:
    """The claims as LaTeX for papers: what fits on a page, without reasons and commands."""
    whole = claims_table(claims, verdicts)
    shown = ("claim", "paper", "here, offline", "verdict, offline", "here, paper's scale", "verdict, paper's scale")
    places = [whole.columns.index(name) for name in shown]
    rows = [[row[place] for place in places] for row in whole.rows]
    return replace(whole, columns=shown, rows=rows, align="l" * len(shown))


def claims_page(
    claims: Sequence[Claim], verdicts: Sequence[Mapping[str, Verdict]], records: Sequence[Mapping[str, Any]]
) -> str:
    """``results/tables/claims.md``: the short table, and below it per claim the evidence, the rule and the commands.

    Args:
        claims: in the order of the page.
        verdicts: per claim, by scale.
        records: all that the verdicts rest on; they say how long the measurements took.
    """
    seconds_of = {record["id"]: record["wall_seconds"] for record in records}
    parts = [
        f"<!-- {GENERATED} -->\n\n# The paper's claims and our verdicts\n",
        tally_sentence(verdicts) + "\n",
        readme_table(claims, verdicts, page="").body_markdown(),
        "\n".join(f"- {note}" for note in NOTES) + "\n",
    ]
    for claim, at in zip(claims, verdicts, strict=True):
        parts.append(f"## {claim.id}\n")
        lines = [f"Claim: {claim.claim}. Paper: {claim.paper_value} ({claim.source})."]
        for scale, verdict in at.items():
            if verdict.verdict == NOT_RUN:
                lines.append(f"{_SCALES[scale]}: {NOT_RUN}; `{claim.commands[scale]}`.")
                continue
            standard = claim.standards[verdict.scale]
            marked = _marked(claim, verdict)
            lines.append(f"{_SCALES[scale]}: {marked}, **{verdict.words}**.")
            if standard.stand_in is not None:
                lines.append(f"{DAGGER} In place of the paper's data and model: {standard.stand_in}.")
            lines.append(f"Quantity: {standard.quantity}.")
            lines.append(f"Rule: {_rule_text(standard)}.")
            lines += [f"{_capital(reason)}." for reason in verdict.reason.split("; ") if reason]
            count = len(verdict.record_ids)
            taken = seconds(sum(seconds_of.get(key, 0.0) for key in verdict.record_ids))
            records_took = "record, which took" if count == 1 else "records, which took"
            lines.append(f"This number: `{claim.commands[verdict.scale]}`; it rests on {count} {records_took} {taken}.")
        lines.append(f"A smaller run in minutes, with a number of its own: `{claim.commands[QUICK]}`.")
        parts.append("\n".join(f"- {line}" for line in lines) + "\n")
    used = sorted({key for at in verdicts for verdict in at.values() for key in verdict.record_ids})
    footer = provenance(records, used) if used else []
    parts.append("## Provenance\n\n" + "\n".join(f"- {line}" for line in footer) + "\n" if footer else "")
    return "\n".join(part for part in parts if part)


def readme_table(
    claims: Sequence[Claim], verdicts: Sequence[Mapping[str, Verdict]], page: str = "results/tables/claims.md"
) -> Table:
    """The short table: each row links to its section of the page with the evidence.

    Args:
        claims: in the order of the table.
        verdicts: per claim, by scale; the paper's scale is shown where it was run, the offline one elsewhere.
        page: :func:`claims_page`, as seen from where the table stands.
    """
    rows = []
    for claim, at in zip(claims, verdicts, strict=True):
        verdict = shown_verdict(at)
        words = verdict.words if verdict.verdict == NOT_RUN else f"**{verdict.words}**"
        rows.append([claim.claim, claim.paper_value, _marked(claim, verdict), words, f"[why]({page}#{claim.id})"])
    return Table("readme", "Claims", ["Claim", "Paper", "Ours", "Verdict", "Details"], rows, align="lllll")


def shown_verdict(at: Mapping[str, Verdict]) -> Verdict:
    """The verdict at the paper's scale where that was run, else the offline one."""
    return at["offline"] if at["paper"].verdict == NOT_RUN else at["paper"]


def tally(verdicts: Sequence[Mapping[str, Verdict]], scale: str) -> dict[str, int]:
    """How many claims have each verdict at a scale, in the order of :data:`VERDICTS`; without those that none has."""
    counts = {name: sum(at[scale].verdict == name for at in verdicts) for name in VERDICTS}
    return {name: count for name, count in counts.items() if count}


def tally_sentence(verdicts: Sequence[Mapping[str, Verdict]]) -> str:
    """The tallies of both scales in one line."""
    told = (
        f"{_SCALES[scale]}: {', '.join(f'{count} {name}' for name, count in tally(verdicts, scale).items())}."
        for scale in JUDGED_SCALES
    )
    return " ".join(told)


def why(claim: Claim, at: Mapping[str, Verdict]) -> str:
    """The reasons of a claim's verdicts as half-sentences with semicolons; empty where nothing was measured."""
    reasons = [f"{at[scale].reason}" for scale in JUDGED_SCALES if at[scale].verdict != NOT_RUN and at[scale].reason]
    if reasons:
        return "; at the paper's scale: ".join(reasons)
    return "not built yet" if claim.status == "planned" else ""


_SCALES = {"offline": "Offline", "paper": "At the paper's scale"}


def _marked(claim: Claim, verdict: Verdict) -> str:
    """What was measured, with a dagger where a stand-in gave it."""
    stands_in = verdict.verdict != NOT_RUN and claim.standards[verdict.scale].stand_in is not None
    return f"{verdict.measured} {DAGGER}" if stands_in else verdict.measured


def _capital(text: str) -> str:
    """The text with a capital letter, unless it begins with a symbol such as ``n`` or ``4x``."""
    return text[0].upper() + text[1:] if text[:2].isalpha() else text


def _rule_text(standard: Standard) -> str:
    rule, unit = standard.rule, standard.unit
    sides = (">", "≥") if rule.direction == "higher" else ("<", "≤")
    parts = [
        f"exceeded {sides[0]} {with_unit(rule.exceeded, unit)}",
        f"reproduced {sides[1]} {with_unit(rule.reproduced, unit)}",
        f"partly {sides[1]} {with_unit(rule.partly, unit)}",
    ]
    if rule.alternative is not None:
        side = "≥" if rule.alternative.direction == "higher" else "≤"
        parts.append(f"partly as well if {rule.alternative.quantity} {side} {with_unit(rule.alternative.partly, unit)}")
    if rule.control is not None:
        parts.append(f"control: {rule.control}")
    if rule.requires is not None:
        parts.append(f"requires {rule.requires}")
    if rule.resolution is not None:
        parts.append(f"undecided where the measurement errs by more than {with_unit(rule.resolution, unit)}")
    return "; ".join(parts)


def _how_to_run(claim: Claim, scale: str) -> str:
    built = "run" if claim.status == "built" else "not built yet; it will be"
    return f"{built} {claim.commands[scale]}"


def _judge_offline(claim: Claim, records: Sequence[Mapping[str, Any]]) -> Verdict:
    whole = _judge_at(claim, records, "offline")
    quick = _judge_at(claim, records, QUICK) if whole.verdict == NOT_RUN else whole
    return whole if quick.verdict == NOT_RUN else quick


def _judge_at(claim: Claim, records: Sequence[Mapping[str, Any]], scale: str) -> Verdict:
    entry = measure_registry.get(claim.measure)
    if entry is None:
        return judge(claim, None, scale)
    chosen = entry.select([record for record in records if record["scale"] == scale])
    evidence = entry.function(chosen) if chosen else None
    if evidence is not None and evidence.scale != scale:
        raise InputError(f"The measure {claim.measure!r} returned {evidence.scale} evidence from {scale} records.")
    return judge(claim, evidence, scale)


def grade_of(rule: Rule, value: float, alternative: float | None = None) -> str:
    """One of :data:`GRADES`: what a number comes to by a rule's thresholds alone."""
    sign = 1.0 if rule.direction == "higher" else -1.0
    if sign * value > sign * rule.exceeded:
        return "exceeded"
    if sign * value >= sign * rule.reproduced:
        return "reproduced"
    if sign * value >= sign * rule.partly:
        return "partly"
    if rule.alternative is not None and alternative is not None:
        sign = 1.0 if rule.alternative.direction == "higher" else -1.0
        if sign * alternative >= sign * rule.alternative.partly:
            return "partly"
    return "not reproduced"


def _check(claim: Claim, evidence: Evidence) -> None:
    numbers = [evidence.value, *(evidence.interval or ())]
    numbers += [one for one in (evidence.alternative, evidence.control, evidence.noise) if one is not None]
    if not all(math.isfinite(value) for value in numbers):
        raise InputError(f"The evidence for {claim.id!r} is not finite; return None when nothing was measured.")
    if evidence.scale not in claim.standards:
        raise InputError(f"Verdicts exist at the scales {', '.join(claim.standards)}, not {evidence.scale!r}.")
    unit = claim.standards[evidence.scale].unit
    if evidence.unit != unit:
        raise InputError(f"The evidence for {claim.id!r} is in {evidence.unit!r} but the claim in {unit!r}.")
    if not evidence.record_ids:
        raise InputError(f"The evidence for {claim.id!r} must name the records that it rests on.")


def _claim(entry: Mapping[str, Any]) -> Claim:
    values = dict(entry)
    own = Standard(values.pop("quantity"), values.pop("unit"), _rule(values.pop("rule")))
    offline = dict(values.pop("offline", {}))
    if "rule" in offline:
        offline["rule"] = _rule(offline["rule"])
    stand_in = replace(own, **offline)
    standards = {QUICK: stand_in, "offline": stand_in, "paper": own}
    return Claim(**{"measure": values["id"], **values}, standards=standards)


def _rule(values: Mapping[str, Any]) -> Rule:
    alternative = values.get("alternative")
    return Rule(**{**values, "alternative": None if alternative is None else Alternative(**alternative)})


def _place(entries: Any, problem: jsonschema.ValidationError) -> str:
    path = list(problem.absolute_path)
    if path and isinstance(path[0], int):
        entry = entries[path[0]]
        name = entry.get("id", f"number {path[0] + 1}") if isinstance(entry, dict) else f"number {path[0] + 1}"
        return "/".join([f"the claim {name}", *(str(part) for part in path[1:])])
    return "its top level"


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    text = resources.files("entreg.records").joinpath("claims.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader lets a repeated key silently replace the first; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
