"""Two records, folders of records or commits side by side: what differs, by how much, and whether that can be chance.

Values are paired where pairs exist: by seed, or by item (window, article) where a row holds the values of single
items. Otherwise Welch's test compares the seeds of both sides. Holm's correction covers everything that was tested.
"""

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entreg.errors import InputError, RecordError
from entreg.names import nearest
from entreg.records.environment import REPOSITORY
from entreg.records.formatting import MISSING, estimate, number, p_value
from entreg.records.record import parse
from entreg.records.statistics import DifferenceTest, Estimate, holm, paired_test, welch_test
from entreg.records.store import REFERENCE_ROOT, RecordStore, load_record
from entreg.records.tables import Table, device_text

LEVEL = 0.05
"""Chance that any difference is called significant although there is none."""

QUALITY = {
    **dict.fromkeys(("top1", "rouge_l", "accuracy", "iou_matched", "edges_kept"), "higher"),
    **dict.fromkeys(("error", "loss", "mce_dense", "mce_sparse", "area_error"), "lower"),
}
SPEED = {"speedup": "higher", "seconds_median": "lower", "seconds": "lower"}
"""What rows and runs are first of all about, in this order, and which direction of it is better."""

_SUBJECTS = ("method", "variant", "distribution", "family", "model")
# Numbers that say what was measured, and not what came out.
_IDENTIFYING = {"n", "level", "context", "batch", "layer", "dim", "tokens", "cells", "severity", "value"}
# Words that come out of a measurement.
_OUTCOMES = {"status", "kernel", "fastest_rival"}
# Rows with one of these hold the median of interleaved rounds; other seconds only say how long something took.
_TIMED = {"rounds", "repeats"}
_TIMING = ("seconds", "speedup", "per_second", "per_token", "ratio_to", "overhead", "share", "bound", "nanoseconds")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """One side: a name for the headings, and its records."""

    name: str
    records: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Difference:
    """One quantity on both sides.

    Attributes:
        experiment: the records' experiment, with the method or data set that they are of.
        what: plan, size, split and so on, in words.
        field: the quantity's name.
        first, second: means on the two sides.
        test: second minus first, or None where a single run on each side gives no test.
        how: ``paired by seed``, ``paired by item``, ``Welch``, or why there is no test.
        adjusted: Holm's p-value over the whole comparison, or None without a test.
    """

    experiment: str
    what: str
    field: str
    first: float
    second: float
    test: DifferenceTest | None
    how: str
    adjusted: float | None = None

    @property
    def significant(self) -> bool:
        return self.adjusted is not None and self.adjusted < LEVEL

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``higher`` or ``lower`` (the second side) where significant, else why not."""
        if self.first == self.second:
            return "equal"
        if self.test is None:
            return "not tested"
        if not self.significant:
            return "not significant"
        direction = "higher" if self.second > self.first else "lower"
        wanted = {**QUALITY, **SPEED}.get(self.field)
        return f"**{direction}**" if wanted is None else "**better**" if direction == wanted else "**worse**"


@dataclass(frozen=True)
class Comparison:
    """All quantities that both sides have, and sentences about what cannot be compared or is on one side only."""

    first: str
    second: str
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]
    same_records: int = 0

    @property
    def possible(self) -> bool:
        """Whether there was anything to compare."""
        return bool(self.differences) or self.same_records > 0

    def table(self, *, everything: bool = False) -> Table:
        """The differences as a table; only the significant ones where there are many, unless ``everything``."""
        shown = self.differences
        notes = [self.summary(), *self.sentences]
        if not everything and len(shown) > 60 and any(one.test for one in shown):
            shown = tuple(one for one in shown if one.significant)
            notes.insert(1, f"Shown are the {len(shown)} significant ones of {len(self.differences)}.")
        rows = [
            [
                one.experiment,
                one.what,
                one.field,
                number(one.first, 4),
                number(one.second, 4),
                MISSING if one.test is None else estimate(one.test.difference),
                p_value(one.adjusted),
                one.how,
                one.verdict,
            ]
            for one in shown
        ]
        columns = ["experiment", "what", "field", "A", "B", "B − A", "p (Holm)", "test", "B is"]
        title = f"A = {self.first}, B = {self.second}"
        return Table("compare", title, columns, rows, notes, align="lllrrrrll")

    def text(self, *, everything: bool = False) -> str:
        """The table and its sentences for a terminal; the sentences alone where there are no rows."""
        table = self.table(everything=everything)
        return table.to_text() if table.rows else "\n".join([table.title, *table.notes]) + "\n"

    def summary(self) -> str:
        """How many quantities differ significantly, and in which direction."""
        if not self.differences:
            return "Nothing differs." if self.possible else "The two cannot be compared."
        tested = sum(one.test is not None for one in self.differences)
        if not tested:
            return f"{len(self.differences)} quantities, none tested: that takes several seeds or items on each side."
        found = [one.verdict.strip("*") for one in self.differences if one.significant]
        counts = ", ".join(f"{found.count(word)} {word}" for word in dict.fromkeys(found))
        return (
            f"{len(found)} of {tested} tested quantities ({len(self.differences)} compared) differ significantly at "
            f"{100 * LEVEL:.0f} % after Holm's correction{f': in B {counts}' if counts else ''}."
        )


def read_source(text: str, repository: Path = REPOSITORY) -> Source:
    """The records that a word of the command line means.

    Args:
        text: a record's file, a folder of records, the identifier or hash of a reference record, or a git revision
            (``HEAD~3``, ``v1``; ``REVISION:FOLDER`` for another folder than ``results/runs``).
        repository: the checkout that revisions belong to.

    Raises:
        RecordError: it means nothing, holds no records, or a record is damaged.
    """
    path = Path(text)
    if path.is_file():
        record = load_record(path)
        return Source(record["id"], (record,))
    if path.is_dir():
        return _not_empty(Source(text, tuple(RecordStore(path).load_all())))
    if re.fullmatch(r"(?:[a-z0-9_./-]+-)?[0-9a-f]{12}", text):
        found = [load_record(one) for one in sorted(REFERENCE_ROOT.glob(f"*__{text[-12:]}.json"))]
        named = [record for record in found if text in (record["id"], record["config_hash"])]
        if len(named) == 1:
            return Source(named[0]["id"], (named[0],))
    revision, _, folder = text.partition(":")
    return _not_empty(Source(text, tuple(_at_revision(revision, folder or "results/runs", repository))))


def compare(first: Source, second: Source, fields: Sequence[str] | None = None) -> Comparison:
    """Compares two sides quantity by quantity.

    Two single records are compared whatever their configurations, which are then said; several are matched by
    experiment, scale and what they are of (method, data set). Of several for one seed the newest counts.

    Args:
        first: side A.
        second: side B.
        fields: names of row fields and metrics; by default, of every row, the first of :data:`QUALITY` and, where it
            was timed in rounds, the first of :data:`SPEED` that it has.

    Raises:
        InputError: one of ``fields`` is in no record.
    """
    everything = (*first.records, *second.records)
    known = {name for r in everything for place in (r["metrics"], *r["rows"]) for name in place}
    for name in fields or ():
        if name not in known:
            raise InputError(f"No record has a number called {name!r}{nearest(name, known)}")
    single = len(first.records) == len(second.records) == 1
    sides = [_groups(side.records, single) for side in (first, second)]
    equal = 0
    found: list[Difference] = []
    concerned: dict[str, list[str]] = {}
    for key in [key for key in sides[0] if key in sides[1]]:
        # Runs of which all seeds are the same need no look; single equal seeds stay, for they weigh in the mean.
        if sides[0][key] == sides[1][key]:
            equal += len(sides[0][key])
            continue
        differences, remarks = _compare_group(sides[0][key], sides[1][key], fields)
        found += differences
        for name, remark in remarks:
            concerned.setdefault(remark, []).append(name)
    sentences = [f"{_listed(names)}: {remark}" for remark, names in concerned.items()]
    if equal:
        sentences.append(f"{equal} records are the same on both sides.")
    for name, side, other in (("A", sides[0], sides[1]), ("B", sides[1], sides[0])):
        lonely = [key for key in side if key not in other]
        if lonely:
            kinds = "one kind" if len(lonely) == 1 else f"{len(lonely)} kinds"
            sentences.append(f"Only {name} has records of {kinds} of run: {_listed([key[0] for key in lonely])}.")
    p_values = [one.test.p_value for one in found if one.test is not None]
    adjusted = iter(holm(p_values))
    judged = [one if one.test is None else replace(one, adjusted=next(adjusted)) for one in found]
    return Comparison(first.name, second.name, tuple(judged), tuple(sentences), equal)


def _not_empty(source: Source) -> Source:
    if not source.records:
        raise RecordError(f"There are no records in {source.name!r}; give a folder or commit that has some.")
    return source


def _at_revision(revision: str, folder: str, repository: Path) -> list[dict[str, Any]]:
    unknown = RecordError(
        f"{revision!r} is neither a record, a folder of records nor a git revision; give one of these."
    )
    if not revision or revision.startswith("-"):
        raise unknown
    commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise unknown
    listing = _git(repository, "ls-tree", "-z", commit.decode().strip(), f"{folder.rstrip('/')}/") or b""
    entries = [entry.split(b"\t", 1) for entry in listing.split(b"\0") if entry.endswith(b".json")]
    names = {head.split()[2].decode(): path.decode("utf-8", "replace") for head, path in entries}
    content = _git(repository, "cat-file", "--batch", given="".join(f"{blob}\n" for blob in names).encode()) or b""
    records = []
    for path in names.values():
        # Each object: "<name> blob <size>", a newline, the bytes, a newline.
        head, _, rest = content.partition(b"\n")
        size = int(head.split()[2])
        text = rest[:size].decode("utf-8", "replace")
        content = rest[size + 1 :]
        records.append(parse(text, f"{revision}:{path}"))
    return sorted(records, key=lambda record: record["id"])


def _git(repository: Path, *arguments: str, given: bytes = b"") -> bytes | None:
    command = ["git", "-C", str(repository), *arguments]
    try:
        result = subprocess.run(command, input=given, capture_output=True, check=False)
    except OSError as error:
        raise RecordError("git is not installed; without it only files and folders can be compared.") from error
    return result.stdout if result.returncode == 0 else None


def _groups(records: Iterable[dict[str, Any]], single: bool) -> dict[Key, dict[Any, dict[str, Any]]]:
    """What a record is of to seed to record, the newest of each."""
    groups: dict[Key, dict[Any, dict[str, Any]]] = {}
    for record in sorted(records, key=lambda one: (one["utc"], one["id"])):
        key = ("the two records",) if single else (record["experiment"], *_subject(record))
        groups.setdefault(key, {})[record["seed"]] = record
    return groups


def _subject(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(record["config"][name]) for name in _SUBJECTS if isinstance(record["config"].get(name), str))


def _name(record: Mapping[str, Any]) -> str:
    return " ".join((record["experiment"], *dict.fromkeys(_subject(record))))


def _compare_group(
    first: Mapping[Any, dict[str, Any]], second: Mapping[Any, dict[str, Any]], fields: Sequence[str] | None
) -> tuple[list[Difference], list[tuple[str, str]]]:
    a, b = next(iter(first.values())), next(iter(second.values()))
    name = _name(a) if _name(a) == _name(b) else f"{_name(a)} / {_name(b)}"
    reasons = [
        f"{words} {text(x)} against {text(y)}"
        for words, text in (
            ("experiment", lambda r: r["experiment"]),
            ("scale", lambda r: r["scale"]),
            ("data", lambda r: r["dataset"]["name"]),
        )
        for x, y in [(a, b)]
        if text(x) != text(y)
    ]
    if not reasons and a["dataset"] != b["dataset"]:
        reasons = [f"{a['dataset']['name']} in another version or size ({_changed(a['dataset'], b['dataset'])})"]
    if reasons:
        return [], [(name, f"not comparable: {'; '.join(reasons)}.")]
    remarks = []
    changed = _changed(a["config"], b["config"], without=("seed",))
    if changed:
        remarks.append((name, f"the configurations differ in {changed}."))
    same_device = _device_key(a) == _device_key(b)
    values = [{seed: _quantities(record, fields) for seed, record in side.items()} for side in (first, second)]
    keys = dict.fromkeys(key for found in values[0].values() for key in found)
    differences, timings = [], False
    for key in keys:
        sides = [{seed: found[key] for seed, found in side.items() if key in found} for side in values]
        if not sides[1]:
            continue
        if not same_device and any(word in key[-1] for word in _TIMING):
            timings = True
            continue
        differences.append(_difference(name, key, *sides))
    if timings:
        devices = [device_text(record["device"]) + f", {record['device']['threads']} threads" for record in (a, b)]
        remarks.append((name, f"times are not comparable: measured on {devices[0]} and on {devices[1]}."))
    if not differences and not timings:
        remarks.append((name, "not comparable: the two have no quantity in common."))
    return differences, remarks


def _difference(
    name: str, key: Key, first: Mapping[Any, tuple[float, Any]], second: Mapping[Any, tuple[float, Any]]
) -> Difference:
    """Pairs or Welch's test for one quantity; values come as ``(value, values of single items or None)``."""
    shared = [seed for seed in first if seed in second]
    means = [sum(value for value, _ in side.values()) / len(side) for side in (first, second)]
    test, how = None, "one run on a side"
    if len(shared) > 1:
        means = [sum(side[seed][0] for seed in shared) / len(shared) for side in (first, second)]
        test = paired_test([second[seed][0] for seed in shared], [first[seed][0] for seed in shared])
        how = "paired by seed"
    elif len(shared) == len(first) == len(second) == 1:
        # The items are the same texts only where the seed is.
        (a, items_a), (b, items_b) = first[shared[0]], second[shared[0]]
        if items_a and items_b and len(items_a) == len(items_b) > 1:
            tested = paired_test(items_b, items_a)
            # The rows' own means weigh items by their size; the interval moves with them.
            shift = (b - a) - tested.difference.mean
            moved = Estimate(b - a, tested.difference.low + shift, tested.difference.high + shift, len(items_a))
            test, how = DifferenceTest(moved, tested.p_value), "paired by item"
    elif min(len(first), len(second)) > 1:
        test = welch_test([value for value, _ in second.values()], [value for value, _ in first.values()])
        how = "Welch"
    what = ", ".join(f"{word} {value}" if word in _IDENTIFYING else str(value) for word, value in key[:-1])
    return Difference(name, what, key[-1], means[0], means[1], test, how)


def _quantities(record: Mapping[str, Any], fields: Sequence[str] | None) -> dict[Key, tuple[float, Any]]:
    """Numbers of a record by what they are of: identifying words of the row, then the field's name."""
    found: dict[Key, tuple[float, Any]] = {}
    tested = any(row.get("split") == "test" for row in record["rows"])
    for row in record["rows"]:
        # What was chosen on validation data is judged on test data.
        if tested and row.get("split") == "validation":
            continue
        numbers = {name: value for name, value in row.items() if _is_outcome(name, value)}
        wanted = [name for name in fields or () if name in numbers]
        if fields is None:
            wanted = [name for name in QUALITY if name in numbers][:1]
            wanted += [name for name in SPEED if name in numbers and not _TIMED.isdisjoint(row)][:1]
        place = tuple(
            (name, value)
            for name, value in row.items()
            if value is not None and name not in _OUTCOMES and (isinstance(value, str) or name in _IDENTIFYING)
        )
        for name in wanted:
            key = (*place, name)
            if key not in found:
                found[key] = (float(numbers[name]), row.get(f"{name}_per_item"))
    for name, value in record["metrics"].items():
        if _is_outcome(name, value) and name in (QUALITY if fields is None else fields):
            found[(name,)] = (float(value), None)
    return found


def _is_outcome(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and name not in _IDENTIFYING


def _device_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record["device"][name] for name in ("cpu", "available_cores", "threads", "gpu"))


def _changed(first: Mapping[str, Any], second: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Where two nested dictionaries differ: ``training.steps (200, 300)``; at most six places."""
    flat = [_flat(one) for one in (first, second)]
    names = [name for name in dict.fromkeys((*flat[0], *flat[1])) if name not in without]
    places = [name for name in names if flat[0].get(name, MISSING) != flat[1].get(name, MISSING)]
    shown = [f"{name} ({flat[0].get(name, MISSING)}, {flat[1].get(name, MISSING)})" for name in places[:6]]
    return ", ".join(shown) + (f" and {len(places) - 6} more" if len(places) > 6 else "")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found.update(_flat(item, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = item
    return found


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")
