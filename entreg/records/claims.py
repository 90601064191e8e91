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
from entreg.records.formatting import MISSING, NOT_RUN, number
from entreg.records.registry import Registry
from entreg.records.tables import Table, TracedRow

JUDGED_SCALES = ("offline", "paper")
VERDICTS = ("reproduced", "exceeded", "partly", "not reproduced", NOT_RUN)

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
    """Thresholds in the claim's unit; which side of them is better says ``direction`` (``higher`` or ``lower``)."""

    direction: str
    reproduced: float
    exceeded: float
    partly: float
    alternative: Alternative | None = None


@dataclass(frozen=True)
class Claim:
    """One row of ``claims.yaml``; the file's head explains the fields."""

    id: str
    claim: str
    paper_value: str
    source: str
    experiment: str
    status: str
    quantity: str
    unit: str
    rule: Rule
    commands: Mapping[str, str]
    measure: str


@dataclass(frozen=True)
class Evidence:
    """What a measure found.

    Attributes:
        value: the claim's quantity, in the claim's unit.
        interval: its 95 % interval, or None.
        scale: ``offline`` or ``paper``.
        record_ids: the records that it rests on.
        reason: a computed half-sentence that explains the value, for example ``classical filter alone: 18.3x``.
        unit: must be the claim's unit: guards against fractions where per cent are meant.
        alternative: the rule's alternative quantity, or None.
    """

    value: float
    interval: tuple[float, float] | None
    scale: str
    record_ids: Sequence[str]
    reason: str
    unit: str
    alternative: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict at one scale.

    Attributes:
        claim_id: the claim.
        scale: ``offline`` or ``paper``.
        verdict: one of :data:`VERDICTS`.
        measured: the value as text, a dash when not run.
        reason: why, or the command to run when not run.
        record_ids: the records that it rests on.
    """

    claim_id: str
    scale: str
    verdict: str
    measured: str
    reason: str
    record_ids: Sequence[str] = field(default_factory=tuple)


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
        rule = claim.rule
        thresholds = [rule.partly, rule.reproduced, rule.exceeded]
        if any(map(math.isnan, thresholds)) or thresholds != sorted(thresholds, reverse=rule.direction == "lower"):
            raise RecordError(
                f"The claims file {name} has the thresholds of {claim.id!r} out of order: with {rule.direction} being "
                "better, exceeded must lie beyond reproduced and reproduced beyond partly."
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
    verdict = _by_rule(claim.rule, evidence.value, evidence.alternative)
    reasons = [evidence.reason] if evidence.reason else []
    alternative = claim.rule.alternative
    if alternative is not None and evidence.alternative is not None:
        reasons.insert(0, f"{alternative.quantity}: {with_unit(evidence.alternative, claim.unit)}")
    measured = with_unit(evidence.value, claim.unit)
    if evidence.interval is not None:
        low, high = evidence.interval
        measured += f" [{number(float(low))}, {number(float(high))}]"
        ends = {_by_rule(claim.rule, end, evidence.alternative) for end in (low, high)} | {verdict}
        if len(ends) > 1:
            spanned = [name for name in ("not reproduced", "partly", "reproduced", "exceeded") if name in ends]
            reasons.append(f"the 95 % interval reaches from {spanned[0]} to {spanned[-1]}")
    return Verdict(claim.id, evidence.scale, verdict, measured, "; ".join(reasons), tuple(evidence.record_ids))


def judge_all(claims: Sequence[Claim], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Verdict]]:
    """Every claim's verdict at every scale, in the order of the claims.

    Returns:
        One dictionary per claim: ``{"offline": Verdict, "paper": Verdict}``.
    """
    return [{scale: _judge_at(claim, records, scale) for scale in JUDGED_SCALES} for claim in claims]


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
                at["offline"].measured,
                at["offline"].verdict,
                at["paper"].measured,
                at["paper"].verdict,
                why(claim, at),
                f"`{claim.commands['offline']}`",
                f"`{claim.commands['paper']}`",
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
        "check at the paper's scale",
    ]
    notes = [
        "Offline means embedded or pip-borne data and a CPU; it never stands for the paper's scale.",
        "The rules behind the verdicts are in `entreg/records/claims.yaml`.",
    ]
    used = sorted({key for at in verdicts for verdict in at.values() for key in verdict.record_ids})
    return Table(
        "claims", "The paper's claims and our verdicts", columns, rows, notes, "l" * len(columns), record_ids=used
    )


def paper_table(claims: Sequence[Claim], verdicts: Sequence[Mapping[str, Verdict]]) -> Table:
    """The claims as LaTeX for papers: what fits on a page, without reasons and commands."""
    whole = claims_table(claims, verdicts)
    shown = ("claim", "paper", "here, offline", "verdict, offline", "here, paper's scale", "verdict, paper's scale")
    places = [whole.columns.index(name) for name in shown]
    rows = [[row[place] for place in places] for row in whole.rows]
    return replace(whole, columns=shown, rows=rows, align="l" * len(shown))


def readme_table(claims: Sequence[Claim], verdicts: Sequence[Mapping[str, Verdict]]) -> Table:
    """The short table for the README."""
    rows = [
        [
            claim.claim,
            f"{claim.paper_value} ({claim.source})",
            at["offline"].measured,
            _bold_unless_not_run(at["offline"].verdict),
            at["paper"].verdict,
            why(claim, at),
            f"`{claim.commands['offline']}`" + (" (planned)" if claim.status == "planned" else ""),
        ]
        for claim, at in zip(claims, verdicts, strict=True)
    ]
    columns = ["Claim", "Paper", "Here, offline", "Verdict", "At the paper's scale", "Why", "Check it"]
    return Table("readme", "Claims", columns, rows, align="l" * len(columns))


def _bold_unless_not_run(verdict: str) -> str:
    return verdict if verdict == NOT_RUN else f"**{verdict}**"


def why(claim: Claim, at: Mapping[str, Verdict]) -> str:
    """The reasons of a claim's verdicts as half-sentences with semicolons; empty where nothing was measured."""
    reasons = [f"{at[scale].reason}" for scale in JUDGED_SCALES if at[scale].verdict != NOT_RUN and at[scale].reason]
    if reasons:
        return "; at the paper's scale: ".join(reasons)
    return "not built yet" if claim.status == "planned" else ""


def _how_to_run(claim: Claim, scale: str) -> str:
    built = "run" if claim.status == "built" else "not built yet; it will be"
    return f"{built} {claim.commands[scale]}"


def _judge_at(claim: Claim, records: Sequence[Mapping[str, Any]], scale: str) -> Verdict:
    entry = measure_registry.get(claim.measure)
    if entry is None:
        return judge(claim, None, scale)
    chosen = entry.select([record for record in records if record["scale"] == scale])
    evidence = entry.function(chosen) if chosen else None
    if evidence is not None and evidence.scale != scale:
        raise InputError(f"The measure {claim.measure!r} returned {evidence.scale} evidence from {scale} records.")
    return judge(claim, evidence, scale)


def _by_rule(rule: Rule, value: float, alternative: float | None) -> str:
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
    numbers += [] if evidence.alternative is None else [evidence.alternative]
    if not all(math.isfinite(value) for value in numbers):
        raise InputError(f"The evidence for {claim.id!r} is not finite; return None when nothing was measured.")
    if evidence.unit != claim.unit:
        raise InputError(f"The evidence for {claim.id!r} is in {evidence.unit!r} but the claim in {claim.unit!r}.")
    if evidence.scale not in JUDGED_SCALES:
        raise InputError(f"Verdicts exist at the scales {' and '.join(JUDGED_SCALES)}, not {evidence.scale!r}.")
    if not evidence.record_ids:
        raise InputError(f"The evidence for {claim.id!r} must name the records that it rests on.")


def _claim(entry: Mapping[str, Any]) -> Claim:
    values = dict(entry)
    rule = dict(values.pop("rule"))
    alternative = rule.pop("alternative", None)
    rule = Rule(**rule, alternative=None if alternative is None else Alternative(**alternative))
    return Claim(**{"measure": values["id"], **values}, rule=rule)


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
