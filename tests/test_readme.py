"""The README says what is there: keys of the configuration, linked files, commands."""

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from edge_agent.config import default_text

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_every_configuration_key_is_in_the_readme_and_no_other() -> None:
    block = re.search(r"<!-- keys:begin -->\n(.*?)<!-- keys:end -->", README, re.DOTALL)
    assert block
    rows = re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", block[1], re.MULTILINE)
    shown = {section: re.findall(r"`(\w+)`", keys) for section, keys in rows}
    assert shown == {section: list(keys) for section, keys in tomllib.loads(default_text()).items()}


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_is_there() -> None:
    installed = {entry.name for entry in entry_points(group="console_scripts")}
    named = set(re.findall(r"^    (\w[\w-]*) (?:init|run|enroll|user|status|doctor|--config)", README, re.MULTILINE))
    assert {"hub", "fleet", "edge-agent"} <= named
    assert named <= installed
    script = (ROOT / "dev").read_text("utf-8")
    assert all(f"\n  {word})" in script for word in re.findall(r"\./dev (\w+)", README))


def test_every_test_that_the_threat_model_names_is_there() -> None:
    model = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", model)
    assert len(named) > 30
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text("utf-8"), f"{path}::{test}"
