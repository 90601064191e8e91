"""Folders of models and data sets from the Hugging Face hub, with one sentence for whatever stands in the way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from entreg.errors import AssetError, ConfigError


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of the hub, ``owner/name``, rather than a path."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def hub_folder(name: str, files: Sequence[str], *, keys: str, data_set: bool = False) -> Path:
    """A folder with files of the hub, in the hub's own cache; what the cache lacks is fetched.

    Args:
        name: ``owner/name``.
        files: patterns of the files that are needed, e.g. ``*.json``.
        keys: how a folder is named instead, for the sentence of the error.
        data_set: of a data set rather than of a model.

    Returns:
        The folder; its own name is the commit.

    Raises:
        AssetError: the name is gated or unknown, or there are neither a network nor a copy in the cache.
        ConfigError: ``huggingface_hub`` is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise ConfigError(f"{name} comes from the hub: pip install huggingface_hub, or name a folder") from error
    kind, address = ("dataset", f"datasets/{name}") if data_set else ("model", name)
    options = f" --repo-type dataset --include '{files[0]}'" if data_set else ""
    command = f"hf download {name}{options} --local-dir FOLDER"
    get = f"run `{command}` where there is a network, and name that folder as {keys}"
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type=kind, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise AssetError(
            f"{name} is gated: accept its terms on https://huggingface.co/{address} and run `hf auth login`, or {get}"
        ) from error
    except RepositoryNotFoundError as error:
        raise AssetError(f"there is neither a folder {name} nor a public {kind} of this name on the hub") from error
    # Without a network this ends in one of many errors of several libraries.
    except Exception as error:
        raise AssetError(
            f"{name} is no folder here, and the hub cannot be reached and has left no copy in its cache; {get}"
        ) from error
