"""Files are whole or absent, whatever happens in between."""

import os
from pathlib import Path

import pytest

from fleet_link.errors import SiteError
from fleet_link.files import move_durably, remove_unfinished, write_durably


def test_writes_and_replaces_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_durably(path, b"one")
    write_durably(path, b"two", mode=0o644)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SiteError, match="No space left"):
        write_durably(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_moves_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    move_durably(tmp_path / "file", tmp_path / "folder" / "file")
    assert (tmp_path / "folder" / "file").read_bytes() == b"x"
    with pytest.raises(SiteError, match="cannot be written"):
        move_durably(tmp_path / "file", tmp_path / "elsewhere")


def test_what_a_power_cut_left_goes_at_start_and_nothing_else(tmp_path: Path) -> None:
    for name in (".file.abc.tmp", "maps/.1.npz.abc.tmp", "maps/1.npz", "instances/ab/.x.tmp", "notes.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    remove_unfinished(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["instances/ab/.x.tmp", "maps/1.npz", "notes.tmp"]
