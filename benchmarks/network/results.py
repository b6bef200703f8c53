"""Rows of a bench that takes hours: each is kept as soon as it is measured, so that a bench goes on where it stopped.

Reads and writes one JSON file per row under the result folder.
Never reuses a row of other settings or other code: both are part of its name.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    def __init__(self, folder: Path, tell: Callable[[str], None], code: str = "") -> None:
        """`code`: a digest of what the figures depend on; else of this bench's."""
        self._folder = folder
        self._tell = tell
        self._code = code or code_digest()

    def row(self, table: str, settings: Mapping[str, Any], measure: Callable[[], Row]) -> Row:
        """The kept row of these settings, or a new one: settings and what `measure` gives."""
        key = hashlib.sha256(json.dumps([table, settings, self._code], sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / f"{table}-{key}.json"
        shown = ", ".join(str(value) for value in settings.values())
        if path.exists():
            self._tell(f"{table}: {shown} (kept from before)")
            kept: Row = json.loads(path.read_text("utf-8"))
            return kept
        self._tell(f"{table}: {shown}")
        row = dict(settings) | measure()
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(row, indent=1), "utf-8")
        os.replace(unfinished, path)
        return row


def code_digest() -> str:
    """Of the code that figures depend on: what is loaded of the models package and of this one."""
    digest = hashlib.sha256()
    for path in _sources("models", __package__):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(*packages: str) -> list[Path]:
    files = (
        module.__file__
        for name, module in sys.modules.items()
        if f"{name}.".startswith(tuple(f"{each}." for each in packages))
    )
    return sorted(Path(file) for file in files if file)
