"""What a configuration says about tracking."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from entreg.errors import ConfigError
from entreg.names import require_choice, require_known

KINDS = ("wandb", "tensorboard", "none")
MODES = ("offline", "online", "off")


@dataclass(frozen=True)
class TrackerSettings:
    """The ``tracker`` part of a configuration; it decides nothing about a run's result.

    Attributes:
        kind: one of :data:`KINDS`.
        mode: of wandb, one of :data:`MODES`: into files, to a server, or not at all.
        directory: folder of the trackers' own files: ``<directory>/wandb``, ``<directory>/tensorboard``.
        project, entity: of wandb; without an entity, the account's own.
        group: under which runs are shown together; None: the sweep's name, or the experiment's.
        tags: words by which runs can be found, besides the experiment, the scale and the method.
        attention_every: steps between two looks at the attention of every layer; None: never.
        attention_items: images or texts that are looked at.
        attention_queries: attention rows of each of them, drawn once; None: all.
        overlays: images on which the token plans' choices are drawn after training; 0: none.
        checkpoints: whether the final checkpoint is kept as an artifact.
    """

    kind: str = "none"
    mode: str = "offline"
    directory: str = "outputs"
    project: str = "entreg"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    attention_every: int | None = None
    attention_items: int = 8
    attention_queries: int | None = 64
    overlays: int = 0
    checkpoints: bool = False

    @property
    def active(self) -> bool:
        """Whether anything is tracked."""
        return self.kind != "none" and self.mode != "off"


def tracker_settings_from_mapping(values: Mapping[str, Any]) -> TrackerSettings:
    """The settings in a configuration, and a look whether the library is there.

    Raises:
        ConfigError: an unknown key, kind or mode, a number out of range, or a library that is not installed.
    """
    require_known(values, [field.name for field in fields(TrackerSettings)], "key", "tracker")
    given = dict(values)
    # YAML reads a bare off as false.
    if given.get("mode") is False:
        given["mode"] = "off"
    settings = TrackerSettings(**{**given, "tags": tuple(given.get("tags") or ())})
    require_choice("tracker.kind", settings.kind, KINDS)
    require_choice("tracker.mode", settings.mode, MODES)
    for name, least in (("attention_every", 1), ("attention_items", 1), ("attention_queries", 1), ("overlays", 0)):
        value = getattr(settings, name)
        optional = name in ("attention_every", "attention_queries")
        if not (value is None and optional) and (not isinstance(value, int) or value < least):
            raise ConfigError(f"tracker.{name} must be a whole number of at least {least}, got {value!r}")
    if settings.active and importlib.util.find_spec(settings.kind) is None:
        raise ConfigError(
            f"tracker={settings.kind} needs the package {settings.kind}: pip install 'entreg[tracking]', "
            "or choose tracker=none"
        )
    return settings
