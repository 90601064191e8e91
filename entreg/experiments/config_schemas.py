"""What the values of the entry configurations in ``configs/`` must be, by key; names are checked by their readers."""

from __future__ import annotations

import typing
from typing import Any

from entreg.regularizer import Term
from entreg.schema import COUNT, COUNTS, POSITIVE, SEED, SEEDS, SIZES, Rule
from entreg.tracking import TrackerSettings
from entreg.training.curriculum import CurriculumSettings
from entreg.training.entropy_net import EntropyNetSettings
from entreg.training.penalties import PenaltySettings
from entreg.training.settings import TrainingSettings

_NAMES = Rule(list[str], "a list of at least one name", lambda names: len(names) > 0)
_LEVELS = Rule(list[float], "a list of numbers in [0, 1)", lambda levels: all(0 <= level < 1 for level in levels))
_WEIGHT = Rule(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)
_OPTIONAL_SEEDS = [SEEDS, None]

PROFILE = {
    "name": str,
    "repeats": COUNT,
    "seeds": SEEDS,
    # YAML reads a bare off as false.
    "tracking": str | bool,
    "geometry": {
        "max_points": COUNT,
        "experiments": [_NAMES, None],
        "distributions": [_NAMES, None],
        "step_scale": POSITIVE,
    },
    "vision": {
        "max_images": [COUNT, None],
        "methods": [_NAMES, None],
        "step_scale": POSITIVE,
        "speed": {"max_batch": [COUNT, None], "model_options": dict},
    },
    "language": {
        "max_count": [COUNT, None],
        "max_context": [COUNT, None],
        "methods": [_NAMES, None],
        "plans": [_NAMES, None],
        "levels": [_LEVELS, None],
        "step_scale": POSITIVE,
        "model": [{"name": str | None, "architecture": str | None, "options": dict, "dtype": str}, None],
        "speed": {"max_context": [COUNT, None], "cell_seconds": [POSITIVE, None], "dtypes": [_NAMES, None]},
    },
}

_COMMON = {
    "name": str | None,
    "seed": SEED,
    "store": str,
    "force": bool,
    "profile": PROFILE,
    "tracker": {**typing.get_type_hints(TrackerSettings), "mode": str | bool, "tags": list[str] | None},
    "objective": {"name": str, "value": str, "where": dict | None, "direction": str},
}

_STUDY = {
    **_COMMON,
    "name": str | None,
    "method": str,
    "checkpoints": str,
    "resume": [Rule(str, "auto", lambda value: value == "auto"), None],
    "device": str,
    "trainer": TrainingSettings,
    "sparsity": dict,
    "regularizer": {
        "name": str,
        "penalties": {"*": {**typing.get_type_hints(PenaltySettings), **typing.get_type_hints(Term)}},
        "label_smoothing": _WEIGHT,
        "distillation": _WEIGHT,
        "temperature": POSITIVE,
    },
    "study": {"methods": {"*": list[str]}, "plans": [_NAMES, None], "seeds": _OPTIONAL_SEEDS},
}

_VISION_DATA = {
    "name": str,
    "root": str | None,
    "seed": SEED,
    **dict.fromkeys(("canvas", "channels", "digit_size", "size", "num_classes"), COUNT),
    "max_offset": [SEED, None],
    "num_fragments": [SEED, None],
    **dict.fromkeys(("subset", "streaming", "download"), bool),
    "validation_fraction": float,
    "masks": str | None,
    "preprocessing": {"model": str | None},
    "augmentation": dict | None,
}

VISION = {
    **_STUDY,
    "data": _VISION_DATA,
    "model": {
        "name": str,
        "pretrained": bool,
        "checkpoint": str | None,
        "fused_attention": bool | None,
        "options": dict,
    },
    "base": {
        "curriculum": CurriculumSettings | None,
        "checkpoint": str | None,
        "trainer": TrainingSettings,
    },
    "evaluation": {
        "splits": _NAMES,
        "limit": [COUNT, None],
        "batch_size": COUNT,
        "precision": str,
        "overlays": [COUNT, None],
        "plans": {"*": [{"levels": _LEVELS, "reductions": _NAMES, "scores": _NAMES}, None]},
        "localisation": [{"coverage": _WEIGHT, "scores": _NAMES}, None],
        "robustness": [{"severities": COUNTS, "extra": bool, "sparsity": dict | None}, None],
    },
}

_CORPUS = {"name": str, "root": str | None}
_TASK = {
    "contexts": COUNTS,
    "count": [COUNT, None],
    "splits": _NAMES,
    "levels": [_LEVELS, None],
    "stride": [COUNT, None],
    "depths": list[float],
    "new_tokens": COUNT,
}

LANGUAGE = {
    **_STUDY,
    "data": {"name": str, "text": _CORPUS, "summaries": _CORPUS},
    "model": {
        "name": str | None,
        "dtype": str,
        "attention": str,
        "architecture": str | None,
        "options": dict,
    },
    "training": {
        "context": COUNT,
        "dtype": str,
        "adaptation": {"kind": str, "rank": COUNT, "alpha": POSITIVE, "dropout": float, "seed": SEED},
    },
    "evaluation": {
        "seed": SEED,
        "tasks": {"*": [_TASK, None]},
        "plans": {"*": [{"levels": [_LEVELS, None], "vary": {"*": list}}, None]},
        "harness": [{"tasks": _NAMES, "limit": [COUNT, None], "levels": [_LEVELS, None]}, None],
        "effective_support": [{"context": COUNT, "count": COUNT, "num_sampled_queries": [COUNT, None]}, None],
    },
}

GEOMETRY = {
    **_COMMON,
    "study": [_NAMES, None],
    "problem": str | None,
    "distributions": _NAMES,
    "sizes": SIZES,
    "sizes_of": {"*": SIZES},
    "seeds": _OPTIONAL_SEEDS,
    "time_budget": POSITIVE,
    "training": EntropyNetSettings,
    "variants": {"*": EntropyNetSettings},
    "variant": str | None,
}

BENCHMARK: dict[str, Any] = {"benchmark": dict, "profile": PROFILE, "store": str, "force": bool}

SCHEMAS: dict[str, dict[str, Any]] = {
    "vision": VISION,
    "language": LANGUAGE,
    "geometry": GEOMETRY,
    "benchmark": BENCHMARK,
}
"""Schema of each entry configuration."""
