"""Small files that must be whole or absent: written beside, synced, renamed.

Writes the named file only.
Never leaves a half-written file under its own name; a `.tmp` left by a crash is overwritten next time.
Source: rename(2), fsync(2).
"""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` atomically and durably; `mode` holds from the first byte."""
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def move_whole(path: Path, target: Path) -> None:
    """Give a file that is whole and synced another name, durably. Both names are on one file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
