import errno
import os
import shutil
import subprocess
import sys

import pytest

from entreg.errors import InputError, OutputError
from entreg.records import RecordStore, environment, registry
from entreg.records.build import build_all
from entreg.records.claims import Evidence, load_claims, measure_registry, register_measure
from entreg.records.figures import figure_registry, method_style, new_figure, register_figure
from entreg.records.tables import Table, register_table, table_registry
from tests.faults.processes import run_program
from tests.records.samples import dated_record as sample_record

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
TALLY = "<!-- tally:begin -->\n<!-- tally:end -->\n"
README = f"# Title\n\nbefore\n\n{TALLY}\n{BEGIN}\nold\n{END}\n\nafter\n"


@pytest.fixture
def builders(monkeypatch):
    """A table, a figure and a measure of this test alone, in place of the package's own."""
    for known in (table_registry, figure_registry, measure_registry):
        monkeypatch.setattr(known, "_entries", {})
    monkeypatch.setattr(registry, "discover", lambda: None)

    @register_table("example", experiments=("geometry/hull",))
    def example_table(records):
        rows = [[row["distribution"], row["seconds"]] for record in records for row in record["rows"]]
        return Table("example", "Example", ["points", "seconds"], rows)

    @register_table("nothing", experiments=("geometry/law",))
    def nothing(records):
        raise AssertionError("must not be called without records")

    @register_table("unable")
    def unable(records):
        return None

    @register_figure("picture", experiments=("geometry/hull",))
    def picture(records):
        figure, axes = new_figure()
        axes.plot([row["seconds"] for record in records for row in record["rows"]], **method_style("entreg"))
        return figure

    @register_measure("geo-hull-speed")
    def speed(records):
        return Evidence(4.5, (4.2, 4.8), records[0]["scale"], [records[0]["id"]], "because", "x")


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


def names(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_build_writes_everything_and_is_repeatable(builders, readme, tmp_path):
    records = [sample_record(config={"n": n}) for n in (1, 2)]
    report = build_all(records, tmp_path / "one", readme=readme)
    assert names(tmp_path / "one") == [
        "figures/picture.png",
        "figures/picture.svg",
        "report.html",
        *(f"tables/{name}.{kind}" for name in ("claims", "example") for kind in ("csv", "md", "tex")),
    ]
    assert len(report.written) == 10
    build_all(records[::-1], tmp_path / "two")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    again = build_all(records, tmp_path / "one", readme=readme)
    assert again.up_to_date
    assert len(again.unchanged) == 10


def test_another_process_builds_the_same_bytes(builders, tmp_path):
    # Hash randomisation of a fresh process is what most often makes builds differ.
    record = sample_record()
    build_all([record], tmp_path / "here")
    RecordStore(tmp_path / "runs").save(record)
    script = (
        "import sys\n"
        "from entreg.records import RecordStore\n"
        "from entreg.records.claims import load_claims, claims_table, judge_all\n"
        "from entreg.records.figures import new_figure, method_style, render, style\n"
        "records = RecordStore(sys.argv[1]).load_all()\n"
        "with style():\n"
        "    figure, axes = new_figure()\n"
        "    axes.plot([row['seconds'] for r in records for row in r['rows']], **method_style('entreg'))\n"
        "sys.stdout.buffer.write(render(figure, 'picture')['svg'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "runs")],
        cwd=environment.REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        check=True,
    )
    assert result.stdout == (tmp_path / "here" / "figures" / "picture.svg").read_bytes()


def test_footers_and_readme(builders, readme, tmp_path):
    record = sample_record()
    build_all([record], tmp_path / "out", readme=readme)
    for name in ("example", "claims"):
        text = (tmp_path / "out" / "tables" / f"{name}.md").read_text()
        assert f"Records (offline scale): geometry/hull: {record['config_hash']}." in text
        assert "- Device: " in text
        assert "- Code: " in text
    text = readme.read_text()
    tally = f"Offline: 1 reproduced, {len(load_claims()) - 1} not run."
    assert text.startswith(f"# Title\n\nbefore\n\n<!-- tally:begin -->\n\n{tally}")
    assert f"<!-- tally:end -->\n\n{BEGIN}\n\n| Claim |" in text
    assert text.endswith(f"|\n\n{END}\n\nafter\n")
    assert "\nold\n" not in text
    assert text.count("\n| ") == len(load_claims()) + 2
    assert "**reproduced**" in text


def test_smoke_records_never_reach_a_table(builders, readme, tmp_path):
    report = build_all([sample_record(scale="smoke")], tmp_path / "out", readme=readme)
    assert names(tmp_path / "out") == ["report.html", "tables/claims.csv", "tables/claims.md", "tables/claims.tex"]
    assert "**" not in readme.read_text()
    assert len(report.written) == 5


def test_check_writes_nothing_and_finds_differences(builders, readme, tmp_path):
    out = tmp_path / "out"
    report = build_all([sample_record()], out, readme=readme, check=True)
    assert not report.up_to_date
    assert not out.exists()
    assert readme.read_text() == README
    build_all([sample_record()], out, readme=readme)
    assert build_all([sample_record()], out, readme=readme, check=True).up_to_date

    other = sample_record(rows=[{"distribution": "square", "seconds": 0.5}])
    changed = {path.name for path in build_all([other], out, readme=readme, check=True).written}
    assert changed == {"example.csv", "example.md", "example.tex", "picture.png", "picture.svg", "report.html"}

    generated = (
        "tables/example.md",
        "tables/example.csv",
        "tables/claims.tex",
        "figures/picture.svg",
        "figures/picture.png",
        "report.html",
    )
    for name in generated:
        path = out / name
        before = path.read_bytes()
        path.write_bytes(b"by hand")
        assert [item.name for item in build_all([sample_record()], out, check=True).written] == [path.name]
        path.unlink()
        assert [item.name for item in build_all([sample_record()], out, check=True).written] == [path.name]
        path.write_bytes(before)
    readme.write_text(readme.read_text().replace("**reproduced**", "**exceeded**"))
    assert build_all([sample_record()], out, readme=readme, check=True).written == (readme,)


def test_pixels_of_another_matplotlib_are_not_a_difference(builders, tmp_path):
    out = tmp_path / "out"
    build_all([sample_record()], out)
    path = out / "figures" / "picture.svg"
    path.write_bytes(path.read_bytes().replace(b"stroke-width: 1.6", b"stroke-width: 1.7"))
    assert build_all([sample_record()], out, check=True).up_to_date


def test_files_that_no_record_supports_go_but_others_stay(builders, tmp_path):
    out = tmp_path / "out"
    build_all([sample_record()], out)
    (out / "tables" / "notes.md").write_text("written by a person\n")
    (out / "tables" / "numbers.csv").write_text("1,2\n")
    (out / "figures" / "photo.png").write_bytes(b"\x89PNG somebody's")
    report = build_all([], out, check=True)
    gone = ["example.csv", "example.md", "example.tex", "picture.png", "picture.svg"]
    assert [path.name for path in report.removed] == gone
    assert (out / "tables" / "example.md").exists()
    build_all([], out)
    assert names(out) == [
        "figures/photo.png",
        "report.html",
        "tables/claims.csv",
        "tables/claims.md",
        "tables/claims.tex",
        "tables/notes.md",
        "tables/numbers.csv",
    ]


@pytest.mark.parametrize(
    "text",
    ["no markers", BEGIN, f"{TALLY}{END}\n{BEGIN}", f"{README}{README}", README.replace(END, ""), f"{BEGIN}\n{END}"],
)
def test_a_readme_without_its_markers_is_left_alone(builders, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(OutputError, match="must hold one line") as caught:
        build_all([], tmp_path / "out", readme=readme)
    assert "\n" not in str(caught.value)
    assert readme.read_text() == text
    assert not (tmp_path / "out").exists()


def test_a_missing_readme(builders, tmp_path):
    with pytest.raises(OutputError, match="cannot be read"):
        build_all([], tmp_path / "out", readme=tmp_path / "none.md")


def test_a_full_disk_keeps_the_old_tables(builders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build_all([sample_record()], out)
    shutil.copytree(out, tmp_path / "before")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="disk is full"):
        build_all([sample_record(rows=[{"distribution": "disk", "seconds": 9.0}])], out)
    monkeypatch.undo()
    assert names(out) == names(tmp_path / "before")
    for name in names(out):
        assert (out / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_builders_mistakes_are_named(builders, tmp_path):
    register_table("wrong")(lambda records: Table("other", "T", ["a"], []))
    with pytest.raises(InputError, match="calls itself 'other'"):
        build_all([sample_record()], tmp_path)
    table_registry.remove("wrong")
    register_table("claims")(lambda records: Table("claims", "T", ["a"], []))
    with pytest.raises(InputError, match="may not call itself 'claims'"):
        build_all([sample_record()], tmp_path)
    table_registry.remove("claims")
    register_table("foreign")(lambda records: Table("foreign", "T", ["a"], [], record_ids=["unheard-of"]))
    with pytest.raises(InputError, match="unheard-of"):
        build_all([sample_record()], tmp_path)
    assert names(tmp_path) == []


def run_script(*arguments):
    return run_program("scripts/tables.py", *arguments)


def test_the_script_builds_checks_and_reports(tmp_path):
    store = RecordStore(tmp_path / "runs")
    store.save(sample_record("example/toy"))
    result = run_script("--records", store.root)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "1 records, 4 files: 0 were up to date."
    assert names(tmp_path) == [
        "report.html",
        f"runs/{store.path_for('example/toy', {'n': 1000, 'seed': 0}).name}",
        "tables/claims.csv",
        "tables/claims.md",
        "tables/claims.tex",
    ]
    assert run_script("--records", store.root, "--check").returncode == 0
    (tmp_path / "tables" / "claims.md").write_text("by hand")
    result = run_script("--records", store.root, "--check")
    assert result.returncode == 1
    assert "differs: " in result.stdout
    assert (tmp_path / "tables" / "claims.md").read_text() == "by hand"


def test_the_script_names_a_truncated_record_and_a_missing_folder(tmp_path):
    store = RecordStore(tmp_path / "runs")
    path = store.save(sample_record("example/toy"))
    path.write_bytes(path.read_bytes()[:-40])
    for result in (run_script("--records", store.root), run_script("--records", tmp_path / "none")):
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    assert path.name in run_script("--records", store.root).stderr
    assert not (tmp_path / "tables").exists()
