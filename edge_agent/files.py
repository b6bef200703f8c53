"""Put bytes on disk so that a power cut leaves the old file or the new one, never half of it.

Writes a temporary file beside the target, fsyncs it, renames it, fsyncs the folder.
Never leaves the temporary file behind when it fails.
Source: rename(2), fsync(2).
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from fleet_link.errors import SiteError
from fleet_link.pki import sync_folder

__all__ = ["sync_folder", "write_durably"]


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Raises SiteError when the disk refuses."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
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
