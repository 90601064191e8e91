"""Records, claims and archives changed at random: what is read is whole and valid, or refused in one sentence."""

import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import resources

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from entreg.data import assets
from entreg.data.assets import Asset, archive_folder, archive_member
from entreg.errors import AssetError, RecordError
from entreg.records import REFERENCE_ROOT
from entreg.records.claims import Claim, load_claims
from entreg.records.record import checksum, parse, schema_problem, serialise
from tests.faults.catalogue import Fault

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
CLAIMS = resources.files("entreg.records").joinpath("claims.yaml").read_text(encoding="utf-8")
RECORDS = [
    path.read_text(encoding="utf-8")
    for path in sorted(REFERENCE_ROOT.glob("*.json"), key=lambda path: path.stat().st_size)[:40:8]
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "\ud800", "../../x", {}, []]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
snippets = st.text(max_size=6) | st.sampled_from(
    [
        "\0",
        "NaN",
        "1e999",
        "-.inf",
        ".nan",
        "&a [*a]",
        "*a",
        "<<: x",
        "!!map x",
        "!!int x",
        "!!bool x",
        "? {a: b} : c",
        "!!timestamp x",
        "2001-99-99",
        "!!python/object/apply:os.system [x]",
        "[" * 3000,
        '{"a":' * 3000,
        "9" * 5000,
    ]
)


@st.composite
def changed_text(draw, texts):
    """One of the texts with up to three pieces cut out, put in or doubled."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        place, length = draw(st.integers(0, len(text))), draw(st.integers(0, 40))
        piece = draw(snippets | st.just(text[place : place + length]))
        text = text[:place] + piece + text[place + draw(st.sampled_from([0, 1, length])) :]
    return text


@st.composite
def changed_value(draw, value):
    """A nested value with one of its parts replaced, removed or renamed."""
    whole = {"": copy.deepcopy(value)}
    place, key = whole, ""
    while isinstance(place[key], dict | list) and place[key] and draw(st.booleans() | st.just(True)):
        place = place[key]
        key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
    change = draw(st.sampled_from(["replace", "replace", "remove"]))
    if change == "remove" and place is not whole:
        del place[key]
    else:
        place[key] = draw(json_values)
    return whole[""]


def one_sentence(error):
    text = str(error)
    assert text
    assert "Traceback" not in text
    assert len(text) < 3000


@FUZZ
@given(changed_text(RECORDS))
@example(RECORDS[0].replace('"schema_version": 1', '"schema_version": 1e999'))
@example(RECORDS[0].replace('"repeats": ', '"repeats": 1e999'))
@example("[" * 100_000)
def test_a_changed_record_is_refused(text):
    try:
        record = parse(text, "x.json")
    except RecordError as error:
        one_sentence(error)
    else:
        assert text in RECORDS
        assert serialise(record) == text


@FUZZ
@given(changed_value(json.loads(RECORDS[0])))
def test_a_record_that_somebody_sealed_anew_still_fits_the_schema_or_is_refused(record):
    # Whoever changes a record by hand and knows how its checksum is made.
    try:
        record["checksum"] = checksum(record)
        text = serialise(record)
    except (ValueError, TypeError, AttributeError, UnicodeError):
        text = json.dumps(record)
    try:
        found = parse(text, "x.json")
    except RecordError as error:
        one_sentence(error)
    else:
        assert schema_problem(found) is None


@FUZZ
@given(changed_text([CLAIMS, *CLAIMS.split("\n- ")[1:4]]))
@example("&a [*a]")
@example("- " * 5000)
@example("[" * 5000)
@example("!!map x")
@example("!!bool maybe")
@example("!!int x")
@example("!!timestamp x")
@example("2001-99-99")
@example("9" * 5000)
@example("- !!python/object/apply:os.system ['exit 1']")
@example(CLAIMS.replace("partly: ", "partly: .nan #"))
def test_a_changed_claims_file_is_valid_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "claims.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        claims = load_claims(path)
    except RecordError as error:
        one_sentence(error)
    else:
        assert all(isinstance(claim, Claim) for claim in claims)
        for rule in (standard.rule for claim in claims for standard in claim.standards.values()):
            better = 1 if rule.direction == "higher" else -1
            assert better * rule.exceeded >= better * rule.reproduced >= better * rule.partly


MEMBER = "pkg/table.csv"
CONTENT = b"lat,lon\n1.0,2.0\n" * 20


def pinned(archive, member=MEMBER, content=CONTENT):
    """An asset whose pin is that of whatever archive: checks of the archive's own sum are passed."""
    return Asset("p==1", hashlib.sha256(archive).hexdigest(), member, hashlib.sha256(content).hexdigest(), "none", "x")


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVES = [
    zipped([(MEMBER, CONTENT), ("pkg/other", b"x")]),
    zipped([(MEMBER, CONTENT)], zipfile.ZIP_LZMA),
    tarred([(MEMBER, CONTENT), ("pkg/other", b"x")]),
    tarred([(MEMBER, CONTENT)], "w:xz"),
    tarred([(MEMBER, CONTENT)], "w"),
]


@FUZZ
@given(st.data())
def test_a_changed_archive_gives_the_pinned_content_or_is_refused(tmp_path_factory, data):
    archive = bytearray(data.draw(st.sampled_from(ARCHIVES)))
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    archive = archive[: data.draw(st.sampled_from([len(archive), len(archive), data.draw(st.integers(0, 2000))]))]
    path = tmp_path_factory.getbasetemp() / "archive"
    path.write_bytes(archive)
    try:
        assert archive_member(path, pinned(archive)) == CONTENT
    except AssetError as error:
        one_sentence(error)


def special(kind, name=MEMBER, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return tarred([(info, b"")])


def zip_link(target):
    info = zipfile.ZipInfo(MEMBER)
    info.external_attr = 0o120777 << 16
    return zipped([(info, target)])


def encrypted():
    archive = bytearray(zipped([(MEMBER, CONTENT)]))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        archive[archive.index(signature) + offset] |= 1
    return bytes(archive)


def names(*members):
    return lambda: zipped([(f"pkg/data/{name}", b"x") for name in members])


UNREADABLE = "… does not hold a readable …"
NOT_PINNED = "… in … is not the pinned … (its SHA-256 differs)"
UNSAFE = "… holds a file with an unsafe name in …: …"
TOO_LARGE = "… holds more than … bytes in …; no packaged data are that large"


def one_file(make):
    def read(path):
        path.write_bytes(make())
        archive_member(path, pinned(path.read_bytes()))

    return read


def folder(make):
    def read(path):
        path.write_bytes(make())
        archive_folder(path, pinned(path.read_bytes(), "pkg/data/"))

    return read


BOMB = bytes(4_000_000)
NOTHING = "nothing is written"
TITLE = "Archives that mean harm (a package's archive that is pinned although it is wrong)"
FAULTS = (
    Fault("a tar's member is a symbolic link", UNREADABLE, NOTHING, one_file(lambda: special(tarfile.SYMTYPE))),
    Fault("a tar's member is a hard link", UNREADABLE, NOTHING, one_file(lambda: special(tarfile.LNKTYPE))),
    Fault("a tar's member is a device", UNREADABLE, NOTHING, one_file(lambda: special(tarfile.CHRTYPE))),
    Fault("a tar's member is a pipe", UNREADABLE, NOTHING, one_file(lambda: special(tarfile.FIFOTYPE))),
    Fault("a zip's member is a symbolic link", NOT_PINNED, NOTHING, one_file(lambda: zip_link("/etc/passwd"))),
    Fault("a zip's member is encrypted", UNREADABLE, NOTHING, one_file(encrypted)),
    Fault("the member's path is absolute", UNREADABLE, NOTHING, one_file(lambda: tarred([(f"/{MEMBER}", CONTENT)]))),
    Fault(
        "the member's path leaves the archive",
        UNREADABLE,
        NOTHING,
        one_file(lambda: zipped([(f"../{MEMBER}", CONTENT)])),
    ),
    Fault("a file of a folder is named `..`", UNSAFE, NOTHING, folder(names("a.png", ".."))),
    Fault("a file of a folder is named with a backslash", UNSAFE, NOTHING, folder(names("..\\a.png"))),
    Fault("a file of a folder is hidden", UNSAFE, NOTHING, folder(names(".bashrc"))),
    Fault("a zip grows a thousandfold when read", TOO_LARGE, NOTHING, one_file(lambda: zipped([(MEMBER, BOMB)]))),
    Fault("a tar grows a thousandfold when read", TOO_LARGE, NOTHING, one_file(lambda: tarred([(MEMBER, BOMB)]))),
    Fault(
        "the files of a folder do so together",
        TOO_LARGE,
        NOTHING,
        folder(lambda: zipped([(f"pkg/data/{number}", BOMB[:400_000]) for number in range(9)])),
    ),
    Fault(
        "a zip says that it grows less than it does",
        UNREADABLE,
        NOTHING,
        one_file(lambda: zipped([(MEMBER, BOMB)]).replace(len(BOMB).to_bytes(4, "little"), bytes([9, 0, 0, 0]))),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_archive_that_means_harm(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_LARGEST", 1_000_000)
    with pytest.raises(AssetError) as caught:
        fault.inject(tmp_path / "archive")
    assert fault.is_said_by(str(caught.value)), str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_an_archive_of_the_index_that_is_not_the_pinned_one_is_not_even_opened(tmp_path):
    # pip runs setup.py of a source archive to learn its name: of the pinned one only.
    marker = tmp_path / "was-run"
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='evil', version='1.0')\n"
    index = tmp_path / "index"
    index.mkdir()
    (index / "evil-1.0.tar.gz").write_bytes(tarred([("evil-1.0/setup.py", setup.encode())]))
    script = (
        "import sys; from pathlib import Path; from entreg.data import assets\n"
        "assets.ASSETS['evil'] = assets.Asset('evil==1.0', '0' * 64, 'evil-1.0/x', '0' * 64, 'none', 'x')\n"
        "assets.asset_path('evil')\n"
    )
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    environment |= {"PIP_NO_BUILD_ISOLATION": "0", "ENTREG_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "AssetError: evil==1.0 from the package index is not the pinned file" in result.stderr, result.stderr
    assert not marker.exists()
