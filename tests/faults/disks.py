"""Disks that are full or read-only: a small tmpfs where this process may mount one, else what a user may do."""

import contextlib
import os
import resource
import subprocess

import pytest


@contextlib.contextmanager
def _mounted(folder, options):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder, kilobytes, *, needs_mount=False, mount=True):
    """``folder`` on a disk of this size, or, without the right to mount one, a limit on the size of every file.

    Args:
        folder: made when missing.
        kilobytes: of the disk, or of every file.
        needs_mount: skip the test without that right.
        mount: False for the limit in any case.

    Yields:
        ``fill()``, which leaves no room at all for what comes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
            return
        with contextlib.suppress(OSError), open(folder / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    with contextlib.ExitStack() as stack:
        mounted = mount and stack.enter_context(_mounted(folder, f"size={kilobytes}k"))
        if not mounted and needs_mount:
            pytest.skip("a disk that fills up little by little needs the right to mount one")
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        yield fill


@contextlib.contextmanager
def read_only(folder):
    """Nothing can be written to ``folder`` while this lasts; root, whom permissions do not stop, mounts it so."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try:
            yield True
        finally:
            folder.chmod(0o755)
        return
    with _mounted(folder, "ro") as mounted:
        yield mounted
