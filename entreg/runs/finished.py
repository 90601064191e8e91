"""What a run has measured before it was killed: an evaluation goes on at the first measure that is not finished.

One file in the run's directory holds every finished measure. It counts only for the same configuration, the same code
and libraries, and the same weights to the bit; otherwise the evaluation begins anew. The file goes when the run is
done.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

import entreg
from entreg import distributed
from entreg.atomic import write_text_atomic
from entreg.progress import Progress
from entreg.records.environment import library_versions
from entreg.records.record import config_hash, to_plain
from entreg.weights import weights_digest

T = TypeVar("T")


class Finished:
    """The finished measures of one run.

    Args:
        path: of the file; None: nothing is kept.
        identity: what must be the same, see :func:`identity_of`; asked for by the first process of a launcher only.

    Raises:
        OutputError: a measure cannot be written.
    """

    def __init__(self, path: Path | None = None, identity: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._path = path
        self._identity: Mapping[str, Any] = {}
        self._measures: dict[str, Any] = {}
        if path is not None:
            self._identity, self._measures = distributed.from_first(lambda: self._begin(identity()))

    def measure(self, name: str, make: Callable[[], T], bar: Progress, units: float = 1.0) -> T:
        """What was measured under that name, or what ``make`` measures now, which is kept.

        Every process of a launcher calls it. What is kept is plain JSON, see
        :func:`entreg.records.record.to_plain`, and so is what is returned.

        Args:
            name: unique in the run; shown while it is measured.
            make: measures; what it returns must not depend on what was measured before it.
            bar: of all measures.
            units: of the bar's, that this one is worth.
        """
        if name in self._measures:
            bar.skip(units)
            return self._measures[name]
        with bar.unit(name, units):
            found = make()
        if self._path is not None:
            found = self._measures[name] = to_plain(found, name)
            if distributed.is_first():
                content = {"identity": self._identity, "measures": self._measures}
                write_text_atomic(self._path, json.dumps(content) + "\n")
        return found

    def _begin(self, identity: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            kept = found["measures"] if found["identity"] == identity else {}
        except (OSError, ValueError, KeyError, TypeError):
            # None, or damaged: it is nothing that could not be measured again.
            kept = {}
        if kept:
            print(f"{len(kept)} measures of the evaluation were finished before; it goes on.", file=sys.stderr)
        return identity, kept


def identity_of(config: Mapping[str, Any], *models: nn.Module | None) -> dict[str, Any]:
    """What decides what an evaluation measures.

    Args:
        config: of the run.
        models: what is evaluated; None among them is nothing.
    """
    # What else a state dictionary holds, such as a network's own settings, follows from the configuration.
    weights = [
        weights_digest({**dict(model.named_parameters()), **dict(model.named_buffers())})
        for model in models
        if model is not None
    ]
    return {
        "config": config_hash(config),
        "code": _code(),
        "versions": library_versions(),
        "weights": weights,
    }


@functools.cache
def _code() -> str:
    """SHA-256 of the package's sources: a commit alone does not tell what was changed since."""
    digest = hashlib.sha256()
    root = Path(entreg.__file__).parent
    for source in sorted(root.rglob("*.py")):
        digest.update(f"{source.relative_to(root).as_posix()}\0".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()
