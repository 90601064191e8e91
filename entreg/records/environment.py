"""What a run ran on: code version, library versions and hardware. The host's name is not recorded."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

# What decides results. Generated files under results/ and outputs/ do not make the code dirty.
_CODE_PATHS = ("entreg", "scripts", "configs", "pyproject.toml", "constraints.txt")

# Every dependency that can change a number (a test compares this with pyproject.toml) and the compilers below.
RECORDED_DISTRIBUTIONS = (
    "entreg",
    "torch",
    "triton",
    "numpy",
    "scipy",
    "numba",
    "llvmlite",
    "hydra-core",
    "omegaconf",
    "pyyaml",
    "jsonschema",
    "matplotlib",
    "tqdm",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "transformers",
    "datasets",
    "gguf",
    "peft",
    "rouge-score",
    "mwparserfromhell",
    "flash-attn",
    "wandb",
    "hydra-joblib-launcher",
    "hydra-submitit-launcher",
    "hydra-optuna-sweeper",
    "shapely",
    "opencv-python-headless",
    "pillow",
    "shull",
    "triangle",
    "scikit-learn",
)


def library_versions() -> dict[str, str]:
    """Versions of Python and of every installed dependency, read from package metadata without importing any.

    They are read once in a process: what it has imported stays what it was.
    """
    return dict(_library_versions())


@functools.cache
def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in RECORDED_DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_state(repository: Path = REPOSITORY) -> dict[str, Any]:
    """Commit of the code and whether it was changed since.

    Git is asked once in a process: a commit or a change while it runs is not of the code that it has loaded.

    Returns:
        ``{"commit": 40 hex digits, "dirty": bool}``; both None without git or outside a checkout of this project.
    """
    commit, dirty = _git_state(repository)
    return {"commit": commit, "dirty": dirty}


@functools.cache
def _git_state(repository: Path) -> tuple[str | None, bool | None]:
    top_level = _git(repository, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside some other project's checkout, whose commit says nothing about this code.
    if top_level is None or Path(top_level).resolve() != repository.resolve():
        return None, None
    commit = _git(repository, "rev-parse", "HEAD")
    changes = _git(repository, "status", "--porcelain", "--", *_CODE_PATHS)
    if commit is None or changes is None:
        return None, None
    return commit, bool(changes)


def device_description() -> dict[str, Any]:
    """CPU model, cores, threads, memory and GPU of this machine.

    The GPU and torch's thread count are asked only when torch is already loaded: a run that did not load it used
    neither, and loading it takes seconds.
    """
    torch = sys.modules.get("torch")
    available = _available_cores()
    gpu = None
    threads = available
    if torch is not None:
        threads = int(torch.get_num_threads())
        if torch.cuda.is_available():
            gpu = str(torch.cuda.get_device_name())
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "logical_cores": int(os.cpu_count() or available),
        "available_cores": available,
        "threads": threads,
        "memory_gib": _memory_gib(),
        "gpu": gpu,
    }


def _git(repository: Path, *arguments: str) -> str | None:
    # GIT_DIR and its kin are set inside hooks and would redirect the question to another repository. A checkout
    # owned by another user (containers) is only read here, so git's ownership check is waived, and nothing is locked:
    # a git command of the user's at the same moment would fail, and a run killed meanwhile would leave the lock.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(repository), *arguments]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return int(os.cpu_count() or 1)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in {"model name", "hardware"} and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _memory_gib() -> float | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
