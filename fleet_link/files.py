"""Put bytes on disk so that a power cut leaves the old file or the new one, never half of it.

Writes a temporary file beside the target, fsyncs it, renames it, fsyncs the folder.
Never leaves the temporary file behind when it fails; one that a power cut left has a name of its own, ending in .tmp.
Source: rename(2), fsync(2).
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from fleet_link.errors import SiteError


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Raises SiteError when the disk refuses."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")  # 0600 till whole
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise SiteError(f"{path.name} cannot be written: {error}", advice="check free space and rights") from error


def move_durably(path: Path, target: Path) -> None:
    """Give a file that is whole and synced another name on the same file system. Raises SiteError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        sync_folder(target.parent)
    except OSError as error:
        raise SiteError(f"{target.name} cannot be written: {error}", advice="check free space and rights") from error


def remove_unfinished(data_dir: Path) -> None:
    """Delete temporary files that a power cut left in data_dir and its folders. Only at start, before anything writes."""
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in data_dir.glob(pattern):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and links in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def may_be_over(error: BaseException | None) -> bool:
    """Too many open files or a moment's trouble of the disk; a file that is not there is lost."""
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
