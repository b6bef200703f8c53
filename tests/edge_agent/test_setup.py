"""`edge-agent init --set`: values as people type them."""

from pathlib import Path

import pytest

from edge_agent import setup
from fleet_link.errors import SiteError


def test_values_are_toml_where_they_can_be_and_text_otherwise(tmp_path: Path) -> None:
    settings = [
        "pacs.host=10.0.0.5",
        "pacs.port=11113",
        "pacs.enabled=true",
        "dicom.ae_title=CT ROOM",
        'box.site="North"',
    ]
    config = setup.init(tmp_path / "edge-agent.toml", [*settings, 'dicom.accept_calling_ae=["A", "B"]'])
    assert (config.pacs.host, config.pacs.port, config.pacs.enabled) == ("10.0.0.5", 11113, True)
    assert (config.dicom.ae_title, config.box.site) == ("CT ROOM", "North")
    assert config.dicom.accept_calling_ae == ("A", "B")
    assert config.box.data_dir.is_dir()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("pacs.port=none", "pacs.port"),
        ("pacs.harbour=1", "no such key"),
        ("pacs", "not section.key=value"),
        ("pacs.port=1\nhost = 2", "pacs.port"),
    ],
)
def test_a_wrong_setting_is_refused_and_nothing_is_written(tmp_path: Path, setting: str, reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        setup.init(tmp_path / "edge-agent.toml", [setting])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "edge-agent.toml"
    path.write_text("mine")
    with pytest.raises(SiteError, match="exists"):
        setup.init(path, [])
    assert path.read_text() == "mine"
