"""hub.toml: what is taken, and that a wrong key or value is refused with section, key, value and reason."""

from pathlib import Path

import pytest

from cloud_hub import config
from fleet_link.errors import SiteError


def _refusal(text: str, tmp_path: Path) -> SiteError:
    with pytest.raises(SiteError) as caught:
        config.parse(text, where=tmp_path / "hub.toml")
    assert caught.value.advice
    return caught.value


def test_an_empty_file_gives_the_packaged_defaults(tmp_path: Path) -> None:
    settings = config.parse("", where=tmp_path / "hub.toml")
    assert settings.broker.port == 8883
    assert settings.paths.database == tmp_path / "hub.db"
    assert settings.url == "https://localhost:8443"


def test_a_value_given_replaces_that_default_only(tmp_path: Path) -> None:
    settings = config.parse('[https]\nhost = "2001:db8::1"\n', where=tmp_path / "hub.toml")
    assert settings.url == "https://[2001:db8::1]:8443"
    assert settings.https.session_hours == 12


def test_data_dir_is_relative_to_the_file(tmp_path: Path) -> None:
    settings = config.parse('[hub]\ndata_dir = "../elsewhere"\n', where=tmp_path / "etc" / "hub.toml")
    assert settings.paths.data_dir == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[broker]\nport = 'x'", ["broker.port = 'x'", "Expected `int`"]),
        ("[broker]\nport = 0", ["broker.port = 0", ">= 1"]),
        ("[broker]\nprot = 3", ["broker.prot = 3", "unknown key"]),
        ("[brokr]\nport = 1", ["brokr", "unknown section"]),
        ("port = 1", ["port = 1", "outside a section"]),
        ("[rounds]\nclip_norm = nan", ["rounds.clip_norm = nan"]),
        ("[rounds]\nclip_norm = inf", ["rounds.clip_norm = inf"]),
        ("[rounds]\ndeadline_s = inf", ["rounds.deadline_s = inf"]),
        ("[hub]\nlog_level = 'LOUD'", ["hub.log_level = 'LOUD'"]),
        ("[https]\nhost = 'a b'", ["https.host = 'a b'"]),
        ("[https]\nhost = 'a\\nb'", ["https.host"]),
        ('[https]\nhost = "hub.example\\n"', ["https.host"]),
        ('[broker]\nbind = "127.0.0.1\\n"', ["broker.bind"]),
        ("[broker]\nmemory_bytes_max = 1000", ["broker.memory_bytes_max = 1000", ">= 67108864"]),
        ("[rounds]\nupdate_per_base_max = 0.0", ["rounds.update_per_base_max = 0.0"]),
        ("[broker", ["not TOML"]),
    ],
)
def test_a_wrong_key_or_value_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    message = str(_refusal(text, tmp_path))
    assert str(tmp_path / "hub.toml") in message
    for word in words:
        assert word in message


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="No such file"):
        config.load(tmp_path / "hub.toml")
    (tmp_path / "hub.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SiteError, match="not UTF-8"):
        config.load(tmp_path / "hub.toml")


def test_with_value_keeps_comments_and_touches_one_section() -> None:
    text = config.with_value(config.default_text(), "https", "port", 1234)
    assert "port = 1234" in text
    assert "port = 8883" in text
    assert "# enrolment, API, hub page" in text
    with pytest.raises(KeyError):
        config.with_value(text, "https", "prot", 1)
