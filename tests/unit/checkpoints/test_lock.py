"""The lock where the file system knows none."""

import errno
import fcntl
import os

import pytest

from tunesmith.checkpoints.lock import is_locked, locked
from tunesmith.errors import OutputError


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(OutputError, match=r"cannot be locked \(No locks available\); set output_dir"),
        locked(tmp_path),
    ):
        pytest.fail("the body must not run")
    assert not is_locked(tmp_path)
