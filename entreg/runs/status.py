"""A sweep as a table: what is done, running, failed and queued, the best so far, and the time that is left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from entreg.errors import RecordError, first_line
from entreg.progress import duration
from entreg.records.formatting import number
from entreg.runs.directory import DEFECT
from entreg.runs.objective import Objective
from entreg.runs.sweep import STATES, RunStatus, Sweep

_POLL = 1.0


def newest_sweep(store: Path) -> Sweep:
    """The sweep of a folder of records that was begun last.

    Raises:
        RecordError: there is none.
    """
    found = sorted((store / "sweeps").glob("*/sweep.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RecordError(f"There is no sweep in {store / 'sweeps'}; begin one, for example make sweep-vit.")
    return Sweep(found[-1].parent)


def is_over(runs: Sequence[RunStatus]) -> bool:
    """Whether nothing is running or going to be run."""
    return all(run.state in ("done", "failed") for run in runs)


def status_table(sweep: Sweep, runs: Sequence[RunStatus]) -> str:
    """The sweep as text: a summary, one line for each run, and why runs failed.

    Args:
        sweep: it.
        runs: from :meth:`entreg.runs.sweep.Sweep.runs`.

    Raises:
        RecordError: the sweep's file is damaged.
    """
    content = sweep.content()
    objective = Objective.from_mapping(content["objective"]) if content.get("objective") else None
    names = run_names(runs)
    values = [objective.of([run.record]) if objective and run.record else None for run in runs]
    lines = [f"Sweep {sweep.directory}: {content['command']}", f"begun {content['begun']}; {counted(runs)}"]
    known = [value for value in values if value is not None]
    if known:
        best = objective.best(known)
        lines.append(f"best so far: {objective.name} {number(best)}: {names[values.index(best)]}")
    left = time_left(runs)
    if left is not None:
        lines.append(f"time left: about {duration(left)}, as long as the runs that are done took")
    elif not is_over(runs) and not any(run.state == "running" for run in runs):
        lines.append("nothing is running now; the same command again goes on")
    header = ["run", "state", "attempts", "time", *([objective.name] if known else [])]
    rows = []
    for run, name, value in zip(runs, names, values, strict=True):
        took = "" if run.seconds is None else duration(run.seconds)
        best_value = [] if not known else ["" if value is None else number(value)]
        rows.append([name, run.state, str(run.attempts or ""), took, *best_value])
    return "\n".join([*lines, "", *_columns([header, *rows]), *failures(runs)])


def counted(runs: Sequence[RunStatus]) -> str:
    """``12 runs: 7 done, 1 running, 4 queued``."""
    counts = Counter(run.state for run in runs)
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}: " + ", ".join(
        f"{counts[state]} {state}" for state in STATES if counts[state]
    )


def failures(runs: Sequence[RunStatus]) -> list[str]:
    """Of each run that failed: which, why, and where its log is; two lines."""
    lines = []
    for run, name in zip(runs, run_names(runs), strict=True):
        if run.state == "failed":
            lines += [f"failed: {name}: {run.failure}", f"  see {run.log}" if run.log else "  it was not begun"]
    return lines


def run_names(runs: Sequence[RunStatus]) -> list[str]:
    """What tells each run from the others: the overrides that not all jobs have, and its label within its job."""
    jobs = {run.job for run in runs if run.job}
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    names = []
    for run in runs:
        overrides = [word for word in run.job if word not in common] if len(jobs) > 1 or not run.label else []
        names.append(" ".join([*overrides, run.label]).strip() or "(to be chosen)" * (not run.job) or "the run")
    return names


def time_left(runs: Sequence[RunStatus]) -> float | None:
    """Seconds until all is done, if it goes on with as many runs at a time as now; None if that cannot be told."""
    took = [run.seconds for run in runs if run.state == "done" and run.seconds is not None]
    running = sum(run.state == "running" for run in runs)
    waiting = sum(run.state in ("queued", "interrupted") for run in runs)
    # A run that goes on is, on average, half done.
    return (waiting + running / 2) * fmean(took) / running if took and running else None


def wait_for_others(sweep: Sweep) -> bool:
    """Wait until no run of a sweep is running any more, in whatever process.

    Returns:
        Whether there is something left to do: a process was killed that was at a run.
    """
    told = False
    while True:
        runs = sweep.runs()
        running = [run for run in runs if run.state == "running"]
        if not running:
            # One that was left to a launcher may have ended with it before this one looked.
            undone = [run for run in runs if run.state in ("interrupted", "queued")]
            return any(told or sweep.job(run.job).left for run in undone)
        if not told:
            print(f"Waiting for another launcher: {counted(runs)}.", file=sys.stderr)
        told = True
        time.sleep(_POLL)


def conclude(sweep: Sweep, stopped: Exception | None = None) -> int:
    """The last lines of a sweep: how many runs are done, how many failed, why, and how to go on.

    Args:
        sweep: it.
        stopped: what ended the launcher or sweeper itself, if it did not end by itself.

    Returns:
        The exit status: 0, 2 if all that went wrong can be acted on by the user, or 1.
    """
    sweep.end()
    runs = sweep.runs()
    if stopped is None and all(run.state == "done" for run in runs):
        print(f"Sweep: {counted(runs)}. Their table: python scripts/status.py {sweep.directory}")
        return 0
    for line in failures(runs):
        print(line, file=sys.stderr)
    print(
        f"Sweep: {counted(runs)}. The same command again runs only what is missing or failed; "
        f"table: python scripts/status.py {sweep.directory}",
        file=sys.stderr,
    )
    failed = [run.failure for run in runs if run.state == "failed"]
    if failed:
        last = failed[0]
    elif stopped is not None:
        last = f"the launcher stopped: {type(stopped).__name__}: {first_line(stopped)}"
    else:
        last = f"{sum(run.state != 'done' for run in runs)} runs were not finished."
    print(f"Error: {last}", file=sys.stderr)
    return 1 if any(failure.startswith(DEFECT) for failure in failed) else 2


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
