"""The geometry experiment: does a learned, entropy-lowering rewrite make geometry faster, and at what error?

For one problem, distribution and seed a network is trained; then every method answers on point sets of several sizes.
First each answer is computed and compared with the exact one, then all methods are timed in turns within one process.
One run is one record; runs that have a record are skipped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from scipy.spatial import QhullError

from entreg.cli import CONFIGS
from entreg.data.points import POINT_SETS, describe_points, load_points
from entreg.errors import ConfigError, InputError
from entreg.experiments.config_schemas import GEOMETRY
from entreg.experiments.geometry.methods import OURS, PROBLEMS, Method, Problem, build_methods
from entreg.experiments.profiles import checked_config
from entreg.experiments.timing import interleaved_timings
from entreg.experiments.tracked_runs import tracked_run
from entreg.names import require_known, require_some
from entreg.progress import progress_bar
from entreg.records.record import new_record
from entreg.runs.directory import RunDirectory
from entreg.runs.finished import Finished, identity_of
from entreg.schema import require_fit
from entreg.tracking import TrackerSettings, track_record, tracker_settings_from_mapping
from entreg.training.entropy_net import EntropyNetSettings, TrainedEntropyNet, train_entropy_net

TRAINING_POINTS = 20_000
"""Points that training subsets are drawn from; they follow the same distribution (for the cities: are some of them)."""

SAMPLE_POINTS = 400
"""Points kept in the record of the first seed before and after rewriting, for the figures."""


@dataclass(frozen=True)
class GeometryRun:
    """Everything that decides one record.

    Attributes:
        experiment: name of the record's experiment, e.g. ``geometry/hull``.
        problem: a key of :data:`entreg.experiments.geometry.methods.PROBLEMS`.
        distribution: a name of :data:`entreg.data.points.POINT_SETS`.
        sizes: numbers of points, increasing.
        seed: of points and training.
        variant: name of the training settings, ``default`` but in a sensitivity study.
        training: settings of network and training.
        scale: one of :data:`entreg.records.SCALES`.
        repeats: most rounds of a timing, at least 1.
        time_budget: seconds for all timed rounds of one size; slow sizes run fewer rounds, at least one.
        tracker: who is told of the run; decides nothing.
    """

    experiment: str
    problem: str
    distribution: str
    sizes: tuple[int, ...]
    seed: int
    variant: str
    training: EntropyNetSettings
    scale: str
    repeats: int
    time_budget: float
    tracker: TrackerSettings = field(default_factory=TrackerSettings)

    @property
    def config(self) -> dict[str, Any]:
        """The record's configuration."""
        values = {**asdict(self), "sizes": list(self.sizes)}
        del values["tracker"]
        return values

    @property
    def label(self) -> str:
        """Distribution, seed and, where they are not the default, training settings."""
        variant = "" if self.variant == "default" else f" {self.variant}"
        return f"{self.distribution} seed {self.seed}{variant}"

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides which data are needed."""
        return {"distribution": self.distribution}

    def require_inputs(self) -> None:
        """Look at the points.

        Raises:
            AssetError: they are not there and cannot be fetched.
        """
        load_points(self.distribution, self.sizes[0], self.seed)

    def make_record(self, command: str, directory: RunDirectory) -> dict[str, Any]:
        """See :func:`run_geometry`."""
        record = run_geometry(self, command, directory.measures)
        # Only now: nothing must run beside what is timed.
        with tracked_run(self) as tracker:
            track_record(tracker, record)
        return record


def experiment_configs(config: DictConfig, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The resolved configuration of every experiment that a composed one stands for.

    A study names experiments; each is composed anew with the same overrides. Hydra must be initialised.

    Args:
        config: composed from ``configs/geometry.yaml``.
        overrides: those it was composed with.

    Raises:
        ConfigError: an experiment that does not exist, or as :func:`entreg.experiments.profiles.checked_config`.
    """
    plain = checked_config(config, overrides, "geometry")
    if plain["study"] is None:
        return [plain]
    known = sorted(path.stem for path in (CONFIGS / "experiment" / "geometry").glob("*.yaml") if path.stem != "study")
    require_known(plain["study"], known, "experiment", "study")
    names = _chosen(plain["study"], plain["profile"]["geometry"]["experiments"])
    kept = [text for text in overrides if text.partition("=")[0] not in ("experiment", "study")]
    composed = [hydra.compose("geometry", [f"experiment=geometry/{name}", *kept]) for name in names]
    return [checked_config(one, kept, "geometry") for one in composed]


def plan_runs(config: Mapping[str, Any]) -> list[GeometryRun]:
    """All runs that a configuration asks for.

    Args:
        config: resolved content of ``configs/geometry.yaml`` with one ``experiment``: ``name, problem, distributions,
            sizes, sizes_of, seeds, time_budget, training, variants, variant, profile``.

    Returns:
        Runs in the order seed, variant, distribution, so that an interrupted study is complete for some seeds.

    Raises:
        ConfigError: unknown problem, distribution, variant or training key, or a value out of range.
    """
    require_fit(config, GEOMETRY)
    profile = config["profile"]
    require_known([config["problem"]], PROBLEMS, "problem")
    distributions = _chosen(config["distributions"], profile["geometry"]["distributions"])
    require_some("distributions", config["distributions"], sorted(POINT_SETS), "distribution")
    require_known(config["sizes_of"], sorted(POINT_SETS), "distribution", "sizes_of")
    variants = config["variants"]
    names = list(variants) if config["variant"] is None else [config["variant"]]
    require_known(names, variants, "variant")
    seeds = profile["seeds"] if config["seeds"] is None else config["seeds"]
    tracker = tracker_settings_from_mapping(config["tracker"])
    return [
        GeometryRun(
            experiment=config["name"],
            problem=config["problem"],
            distribution=distribution,
            sizes=_sizes(config["sizes_of"].get(distribution, config["sizes"]), profile["geometry"]["max_points"]),
            seed=seed,
            variant=name,
            training=_training({**config["training"], **variants[name]}, profile["geometry"]["step_scale"]),
            scale=profile["name"],
            repeats=profile["repeats"],
            time_budget=config["time_budget"],
            tracker=tracker,
        )
        for seed in seeds
        for name in names
        for distribution in distributions
    ]


def run_geometry(run: GeometryRun, command: str, measures: Path | None = None) -> dict[str, Any]:
    """One run: train, answer, compare, time.

    Args:
        run: what to do.
        command: goes into the record.
        measures: file that keeps what was measured, see :mod:`entreg.runs.finished`; None: nothing is kept.

    Returns:
        A run record with one row per size and method. ``speedup`` of a row is the baseline's median time over the
        method's, ``status`` says why a row has no numbers.

    Raises:
        RuntimeError: our exact algorithm with advice disagrees with the one without.
    """
    threads = torch.get_num_threads()
    # Training subsets are small: a second thread costs more than it brings. And torch's idle threads spin, which would
    # slow down whatever is timed next.
    torch.set_num_threads(1)
    try:
        return _run(run, command, measures)
    finally:
        torch.set_num_threads(threads)


def _run(run: GeometryRun, command: str, measures: Path | None) -> dict[str, Any]:
    start = time.perf_counter()
    problem = PROBLEMS[run.problem]
    _warm_up(run.problem)
    trained = _trained(run.distribution, run.seed, run.training)
    sample = load_points(run.distribution, TRAINING_POINTS, run.seed)
    finished = Finished(measures, lambda: identity_of(run.config, trained.net))

    def rows_of(size: int) -> list[dict[str, Any]]:
        points = load_points(run.distribution, size, run.seed)
        methods = build_methods(problem, trained.net, trained.net.advice(sample), points)
        return _rows(run, problem, methods, points)

    rows = []
    with progress_bar(len(run.sizes), run.label) as bar:
        for size in run.sizes:
            # Methods are compared within one process, so a size is measured as a whole.
            rows += finished.measure(f"{size:,} points", functools.partial(rows_of, size), bar)
    before = sample[: len(sample) // SAMPLE_POINTS * SAMPLE_POINTS : len(sample) // SAMPLE_POINTS]
    metrics = {
        "training_seconds": trained.seconds,
        "training_entropy": trained.entropy,
        "training_chamfer": trained.chamfer,
        **_displacement(trained, sample),
    }
    if run.problem == "hull" and run.variant == "default" and run.seed == 0:
        metrics["sample_before"] = _short(before)
        metrics["sample_after"] = _short(trained.net.rewrite(sample)[:: len(sample) // SAMPLE_POINTS][: len(before)])
    return new_record(
        experiment=run.experiment,
        scale=run.scale,
        config=run.config,
        command=command,
        dataset=describe_points(run.distribution, run.sizes[-1], run.seed),
        model={"name": "EntropyNet", "parameters": sum(p.numel() for p in trained.net.parameters())},
        seed=run.seed,
        repeats=run.repeats,
        metrics=metrics,
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def measure_methods(
    methods: Mapping[str, Method], *, repeats: int, time_budget: float
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, str]]:
    """Answers and interleaved seconds of methods, with as many rounds as fit the budget; see :mod:`.timing`.

    Args:
        methods: by name.
        repeats: most counted rounds.
        time_budget: seconds for all counted rounds together.

    Returns:
        seconds of each counted round by name, answers by name, and the reason by name of methods that failed.
    """
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, method: Method) -> None:
        if name in failures:
            return
        try:
            answer = method.run()
        except QhullError as error:
            # A rewrite may merge points or put them on one line; that is a result, not an accident.
            failures[name] = f"Qhull failed: {str(error).strip().splitlines()[0]}"
        else:
            answers.setdefault(name, answer)

    timings = interleaved_timings(
        {name: functools.partial(attempt, name, method) for name, method in methods.items()},
        repeats=repeats,
        time_budget=time_budget,
    )
    return {name: np.array(timings[name].seconds) for name in answers}, answers, failures


def _rows(
    run: GeometryRun, problem: Problem, methods: Mapping[str, Method], points: np.ndarray
) -> list[dict[str, Any]]:
    seconds, answers, failures = measure_methods(methods, repeats=run.repeats, time_budget=run.time_budget)
    exact = answers[OURS].value
    baseline = float(np.median(seconds[problem.baseline]))
    rows = []
    for name, method in methods.items():
        row: dict[str, Any] = {
            "distribution": run.distribution,
            "n": len(points),
            "method": name,
            "kind": method.kind,
            "variant": run.variant,
            "status": failures.get(name, "measured"),
        }
        if name in seconds:
            median = float(np.median(seconds[name]))
            row |= {
                "seconds": median,
                "seconds_min": float(seconds[name].min()),
                "seconds_max": float(seconds[name].max()),
                "rounds": len(seconds[name]),
                "speedup": baseline / median,
                "answer_size": len(answers[name].value),
                **problem.error(points, exact, answers[name].value, answers[name].moved),
            }
            if method.kind == "advise" and not row["same_answer"] and run.problem != "triangulation":
                raise RuntimeError(f"{name} differs from the exact answer on {run.distribution}, n = {len(points)}")
        rows.append(row)
    return rows


@functools.lru_cache(maxsize=64)
def _trained(distribution: str, seed: int, settings: EntropyNetSettings) -> TrainedEntropyNet:
    """The problems share their networks: training knows nothing of the problem."""
    return train_entropy_net(load_points(distribution, TRAINING_POINTS, seed), settings, seed)


@functools.lru_cache
def _warm_up(problem: str) -> None:
    """Compilation and first-use costs belong neither to a method nor to the seconds of a training."""
    points = load_points("disk", 3000, 0)
    trained = train_entropy_net(points, EntropyNetSettings(steps=1), 0)
    for method in build_methods(PROBLEMS[problem], trained.net, trained.net.advice(points), points).values():
        method.run()


def _displacement(trained: TrainedEntropyNet, sample: np.ndarray) -> dict[str, float]:
    """Surrogate entropy before and after rewriting, and how far points moved in units of half the extent."""
    net = trained.net
    moved = net.rewrite(sample)
    steps = np.hypot(*(moved - sample).T) / net.scale.item()
    with torch.no_grad():
        before, after = net.surrogate(net.normalise(sample)), net.surrogate(net.normalise(moved))
    return {
        "entropy_before": before.item(),
        "entropy_after": after.item(),
        "step_mean": float(steps.mean()),
        "step_max": float(steps.max()),
    }


def _short(points: np.ndarray) -> list[list[float]]:
    return [[float(f"{x:.4g}"), float(f"{y:.4g}")] for x, y in points]


def _chosen(names: Sequence[str], allowed: Sequence[str] | None) -> list[str]:
    """The names that the profile admits, or the first one when it admits none of them."""
    kept = [name for name in names if allowed is None or name in allowed]
    return kept or list(names[:1])


def _sizes(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    kept = tuple(sorted(n for n in sizes if n <= limit)) or (limit,)
    if kept[0] < 10:
        raise ConfigError(f"sizes must be at least 10, got {kept[0]}")
    return kept


def _training(values: Mapping[str, Any], step_scale: float) -> EntropyNetSettings:
    require_known(values, [field.name for field in fields(EntropyNetSettings)], "training setting")
    try:
        settings = EntropyNetSettings(**values)
    except (InputError, TypeError) as error:
        raise ConfigError(f"training settings: {error}") from error
    return replace(settings, steps=max(1, round(settings.steps * step_scale)))
