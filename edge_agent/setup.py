"""`edge-agent init`: write the site's configuration file from the documented default.

Reads edge_agent/edge-agent.toml; writes the site's file and its data folder.
Never overwrites a file that is there.
"""

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from edge_agent import config
from fleet_link.errors import SiteError


def init(path: Path, settings: Sequence[str]) -> config.Config:
    """Write the default file with `section.key=value` settings in place; check it; make the data folder.

    A value is TOML (`11112`, `true`, `"text"`); a bare word is taken as text.
    Raises SiteError if the file exists or a setting is refused; then nothing is written.
    """
    if path.exists():
        raise SiteError(f"{path} exists", advice="edit it, or move it away first")
    text = config.default_text()
    for setting in settings:
        text = _with_setting(text, setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, "utf-8")
    try:
        loaded = config.load(draft)
    except SiteError:
        draft.unlink()
        raise
    os.replace(draft, path)
    loaded.box.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return loaded


def _with_setting(text: str, setting: str) -> str:
    name, equals, value = setting.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot):
        raise SiteError(f"--set {setting}: not section.key=value", advice="for example --set dicom.port=11112")
    line = re.compile(rf"(?ms)(^\[{re.escape(section)}\].*?^{re.escape(key)} = )([^\n#]*?)(\s*(?:#[^\n]*)?)$")
    found = line.search(text)
    if found is None or "\n[" in text[found.start() + 1 : found.start(2)]:
        raise SiteError(
            f"--set {name}: no such key", advice="`edge-agent init` without --set writes a file with every key"
        )
    return text[: found.start(2)] + _as_toml(value) + text[found.start(3) :]


def _as_toml(value: str) -> str:
    """The value as it stands if it is TOML of one line, else as a quoted string (JSON's quoting is TOML's)."""
    try:
        is_toml = set(tomllib.loads(f"value = {value}")) == {"value"} and "\n" not in value
    except tomllib.TOMLDecodeError:
        is_toml = False
    return value if is_toml else json.dumps(value)
