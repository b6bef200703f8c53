"""Configuration: every key documented once, every wrong key or value refused with its name, itself and the reason."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from edge_agent import config
from fleet_link.errors import SiteError


def _parse(**sections: Any) -> config.Config:
    return config.parse(sections, folder=Path("/srv/box"))


def test_the_default_file_has_every_key_and_no_other() -> None:
    import tomllib

    tables = tomllib.loads(config.default_text())
    hints = get_type_hints(config.Config)
    assert list(tables) == list(hints)
    for section, kind in hints.items():
        assert is_dataclass(kind)
        assert set(tables[section]) == {field.name for field in fields(kind)}


def test_every_key_of_the_default_file_has_a_comment_or_speaks_for_itself() -> None:
    bare = [line for line in config.default_text().splitlines() if " = " in line and "#" not in line]
    assert [line.split(" = ")[0] for line in bare] == [
        "port",
        "host",
        "port",
        "port",
        "heartbeat_s",
        "threads",
        "timeout_s",
    ]


def test_defaults_load_and_paths_belong_to_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "edge-agent.toml"
    path.write_text('[box]\ndata_dir = "images"\n[dicom]\nport = 4242\n')
    loaded = config.load(path)
    assert loaded.box.data_dir == tmp_path / "images"
    assert loaded.dicom.port == 4242
    assert loaded.dicom.ae_title == "WARDROUND"  # a key left out keeps its default
    assert loaded.inference.bundle is None


def test_the_whole_default_file_is_a_sound_file_of_a_site(tmp_path: Path) -> None:
    path = tmp_path / "edge-agent.toml"
    path.write_text(config.default_text())
    assert config.load(path) == config.parse({}, folder=tmp_path)


REFUSALS = [
    ({"dicom": {"portt": 1}}, "dicom.portt = 1 refused: unknown key"),
    ({"dcom": {}}, "[dcom] refused: unknown section"),
    ({"dicom": 3}, "dicom = 3 refused: a section"),
    ({"dicom": {"port": "11112"}}, "dicom.port = '11112' refused: a port is a whole number"),
    ({"dicom": {"port": 65536}}, "dicom.port = 65536 refused"),
    ({"dicom": {"port": True}}, "dicom.port = True refused"),
    ({"pacs": {"port": 0}}, "pacs.port = 0 refused"),
    ({"dicom": {"ae_title": "SEVENTEEN_LETTERS"}}, "refused: an AE title has 1 to 16"),
    ({"dicom": {"ae_title": "BACK\\SLASH"}}, "refused: an AE title"),
    ({"dicom": {"ae_title": " "}}, "refused: an AE title"),
    ({"dicom": {"ae_title": "END "}}, "refused: an AE title"),
    ({"dicom": {"ae_title": "AE\n"}}, "refused: an AE title"),
    ({"dicom": {"accept_called_ae": ["AE\n"]}}, "refused: an AE title"),
    ({"pacs": {"host": "10.0.0.5\n"}}, "pacs.host = '10.0.0.5\\n' refused: a host"),
    ({"policy": {"hours": "00:00-24:00\n"}}, "refused: hours are"),
    ({"hub": {"url": "\n"}}, "refused: an address as https://host:port"),
    ({"hub": {"url": "https://hub:8443\n"}}, "refused: an address as https://host:port"),
    ({"storage": {"keep_days": -1}}, "storage.keep_days = -1 refused: days are a whole number"),
    ({"storage": {"keep_days": 0.5}}, "storage.keep_days = 0.5 refused: days are a whole number"),
    ({"dicom": {"accept_calling_ae": "CT1"}}, "dicom.accept_calling_ae = 'CT1' refused"),
    ({"dicom": {"accept_calling_ae": ["CT1", ""]}}, "refused: an AE title"),
    ({"dicom": {"quiet_time_s": float("nan")}}, "dicom.quiet_time_s = nan refused"),
    ({"dicom": {"idle_timeout_s": 0}}, "refused: seconds are a number above 0"),
    ({"dicom": {"min_free_bytes": 1.5}}, "dicom.min_free_bytes = 1.5 refused"),
    ({"pacs": {"enabled": 1}}, "pacs.enabled = 1 refused"),
    ({"box": {"log_level": "LOUD"}}, "refused: one of DEBUG, INFO, WARNING, ERROR"),
    ({"box": {"data_dir": ""}}, "box.data_dir refused: a path"),
    ({"policy": {"tasks": ["XR", "US"]}}, "refused: one of XR, CT, MR"),
    ({"policy": {"hours": "25:00-06:00"}}, "refused: hours are"),
    ({"policy": {"min_cohort": 2}}, "policy.min_cohort = 2 refused: a number of boxes from 3 to 1000"),
    ({"hub": {"url": "http://hub"}}, "refused: an address as https://host:port"),
    ({"inference": {"providers": []}}, "at least one ONNX Runtime provider"),
    ({"learning": {"heldout_fraction": 1.0}}, "learning.heldout_fraction = 1.0 refused"),
    ({"learning": {"nice": 20}}, "learning.nice = 20 refused"),
    ({"learning": {"replay_max": -1}}, "learning.replay_max = -1 refused: a number of examples"),
    ({"learning": {"replay_max": 0.5}}, "learning.replay_max = 0.5 refused: a number of examples"),
    ({"review": {"bind": "0.0.0.0"}}, "review.bind = '0.0.0.0' refused: without tls_certificate"),
    ({"review": {"tls_key": "key.pem"}}, "review.tls_certificate refused: certificate and key come together"),
]


@pytest.mark.parametrize(("own", "message"), REFUSALS, ids=[text[:60] for _, text in REFUSALS])
def test_a_wrong_key_or_value_is_refused_with_its_reason(own: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError) as refusal:
        config.parse(own, folder=Path("/srv/box"))
    assert message in str(refusal.value)
    assert refusal.value.advice


def test_what_a_site_may_say() -> None:
    assert _parse(dicom={"accept_called_ae": ["*"]}).dicom.accept_called_ae == ("*",)
    assert _parse(dicom={"quiet_time_s": 5}).dicom.quiet_time_s == 5.0
    assert _parse(storage={"keep_days": 0}).storage.keep_days == 0
    assert _parse(policy={"hours": "20:00-06:00", "tasks": []}).policy.tasks == ()
    with_tls = _parse(review={"bind": "0.0.0.0", "tls_certificate": "c.pem", "tls_key": "/etc/k.pem"}).review
    assert with_tls.tls_certificate == Path("/srv/box/c.pem")
    assert with_tls.tls_key == Path("/etc/k.pem")


@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "localhost", "127.8.0.1"])
def test_loopback_needs_no_tls(bind: str) -> None:
    assert _parse(review={"bind": bind}).review.bind == bind


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="cannot be read"):
        config.load(tmp_path / "none.toml")
    path = tmp_path / "edge-agent.toml"
    path.write_text("[box\n")
    with pytest.raises(SiteError, match="is not TOML"):
        config.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SiteError, match="cannot be read"):
        config.load(path)
