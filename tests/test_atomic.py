import errno
import os
import stat
import subprocess
import sys
import tempfile

import pytest

from entreg.atomic import folder_atomic, require_writable, write_bytes_atomic, write_text_atomic
from entreg.errors import OutputError


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces_making_the_folder(tmp_path):
    target = tmp_path / "a" / "b" / "x.txt"
    assert write_text_atomic(target, "old é\n") == target
    write_text_atomic(target, "new\r\n")
    assert target.read_bytes() == b"new\r\n"
    assert listing(target.parent) == ["x.txt"]


def test_a_folder_is_tried_before_slow_work_and_left_clean(tmp_path):
    require_writable(tmp_path / "new" / "folder")
    assert listing(tmp_path / "new" / "folder") == []
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="a file stands where the folder"):
        require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(OutputError, match="Cannot write"):
        require_writable("/proc/nowhere")


def test_others_may_read_what_the_umask_allows(tmp_path):
    previous = os.umask(0o022)
    try:
        write_text_atomic(tmp_path / "x", "text")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EROFS, "no permission"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_failure_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch, function, number, words):
    target = tmp_path / "x.json"
    target.write_text("old")

    def fail(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match=words) as caught:
        write_text_atomic(target, "new" * 1000)
    monkeypatch.undo()
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["x.json"]


def test_interruption_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    target.write_text("old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["x.json"]


def test_the_kernel_stopping_a_write_midway_leaves_nothing(tmp_path):
    # A file-size limit makes the kernel itself refuse the rest of a write, as a full disk does.
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    script = (
        "import resource, sys\n"
        "from entreg.atomic import write_bytes_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_bytes_atomic(sys.argv[1], bytes(100_000))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(target)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "OutputError" in result.stderr
    assert "disk is full" in result.stderr
    assert target.read_bytes() == b"old"
    assert listing(tmp_path) == ["x.bin"]


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "runs").write_text("I am a file")
    for target in (tmp_path / "runs" / "x.json", tmp_path / "runs" / "deeper" / "x.json"):
        with pytest.raises(OutputError, match="a file stands where the folder"):
            write_bytes_atomic(target, b"new")
    assert (tmp_path / "runs").read_text() == "I am a file"


def test_a_folder_where_the_file_should_go(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OutputError, match="a folder stands where the file should go"):
        write_bytes_atomic(tmp_path / "x.json", b"new")
    assert listing(tmp_path) == ["x.json"]


def test_a_read_only_folder(tmp_path, monkeypatch):
    # Simulated, because root may write into any folder.
    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(OutputError, match="no permission to write in"):
        write_text_atomic(tmp_path / "x", "text")
    assert listing(tmp_path) == []


def test_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "folder"
    with folder_atomic(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with folder_atomic(target) as folder:
        (folder / "b").write_text("2")
        assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_failure_leaves_the_folder_as_it_was(tmp_path):
    target = tmp_path / "folder"
    with folder_atomic(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), folder_atomic(target):
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="the disk is full"), folder_atomic(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands"), folder_atomic(tmp_path / "file" / "folder"):
        pass
