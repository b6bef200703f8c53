"""`fleet` against a real hub over TLS: tables, JSON, and how each failure ends (text, advice, exit code)."""

import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.measure import Measurement
from typer.testing import CliRunner

from benchmarks.processes import free_port
from cloud_hub import database, fleet_cli, fleet_client, fleet_rounds, fleet_tables, terminal
from cloud_hub.fleet_output import Hub
from fleet_link import tokens
from tests.cloud_hub.hub_support import HttpsHub, make_hub_files, seed_fleet

pytestmark = pytest.mark.slow


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def value(self) -> object:
        return json.loads(self.out)


class Fleet:
    """Runs the command as a user would, in a folder with fleet.toml."""

    def __init__(self, hub: HttpsHub, folder: Path) -> None:
        self.hub = hub
        self.options = ["--config", str(folder / "fleet.toml")]
        paths = hub.config.paths
        (folder / "fleet.toml").write_text(
            f'hub = "{hub.config.url}"\ntoken_file = "{paths.admin_token}"\nca = "{paths.ca_certificate}"\n'
        )

    def __call__(self, *words: str) -> Ended:
        return run([*self.options, *words])


def run(words: Sequence[str]) -> Ended:
    """As `main`, without ending the test's process."""
    result = CliRunner().invoke(fleet_cli.app, list(words), terminal_width=200)
    error = result.exception
    if isinstance(error, terminal.WardroundError):
        return Ended(terminal.exit_code(error), result.output, f"{error} | {error.advice}")
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return Ended(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    hub = HttpsHub(make_hub_files(tmp_path / "hub"))
    yield Fleet(hub, tmp_path)
    hub.close()


@pytest.fixture
def seeded(fleet: Fleet) -> Fleet:
    seed_fleet(fleet.hub.files, now=time.time())
    return fleet


def test_from_nothing_to_an_enrolment_command(fleet: Fleet) -> None:
    assert "fleet site add" in fleet("site", "list").out
    assert "fleet device add NAME --site north" in fleet("site", "add", "north").out
    added = fleet("device", "add", "box-a", "--site", "north")
    command = added.out.strip().splitlines()[-1]
    assert command.startswith("edge-agent enroll wr1.")
    assert tokens.parse(command.split()[-1]).device == "box-a"
    again = fleet("device", "token", "box-a", "--json")
    assert isinstance(again.value, dict)
    assert again.value["token"] != command.split()[-1]
    assert "box-a" in fleet("devices").out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["devices"], ["box-n1", "the disk is nearly full", "revoked"]),
        (["device", "list"], ["box-n1"]),
        (["device", "show", "box-n2"], ["CPUExecutionProvider", "71 of 80", "v2"]),
        (["site", "list"], ["north", "south"]),
        (["round", "list"], ["round-3", "1 update until the deadline, 2 are needed"]),
        (
            ["round", "show", "round-3"],
            ["uploading", "3 reviewed cases, the plan asks for 8", "390.6 KiB of 976.6 KiB"],
        ),
        (["release", "list"], ["v2", "57% → 88% of 40"]),
        (["release", "show", "2"], ["55% → 85% of 20", "known-answer batch differs by 0.2"]),
        (["refusals"], ["replayed sequence 12", "certificate verify failed"]),
        (["status"], ["answers", "2 online"]),
    ],
)
def test_every_reading_command_shows_a_table_and_json(seeded: Fleet, words: list[str], shown: list[str]) -> None:
    table = seeded(*words)
    assert table.code == 0
    for word in shown:
        assert word in " ".join(table.out.split())
    assert seeded(*words, "--json").value


def test_a_narrow_terminal_costs_no_name_or_figure() -> None:
    row = {
        "release_version": 12,
        "state": "everyone",
        "created_at": 0.0,
        "round_id": "a-round-with-a-long-name",
        "bundle_digest": "b" * 64,
        "size": 4_300_000,
        "outcomes": {},
        "accuracy": {"heldout": 40, "before": 0.5, "after": 0.9},
    }
    narrow = Console(width=40, force_terminal=True, file=io.StringIO())
    table = fleet_tables.releases([row])
    needs = Measurement.get(narrow, narrow.options.update(max_width=10_000), table)
    wide = Console(width=needs.minimum, file=io.StringIO())
    wide.print(table)
    assert isinstance(wide.file, io.StringIO)
    shown = wide.file.getvalue()
    for word in ("a-round-with-a-long-name", "v12", "4.1 MiB", "50% → 90% of 40", "Held-out accuracy"):
        assert word in shown


def test_revoking_says_what_the_broker_did_not_show(seeded: Fleet) -> None:
    seeded.hub.broker_refuses = False
    revoked = seeded("device", "revoke", "box-n1", "--yes")
    assert revoked.code == terminal.EXIT_REFUSED
    assert "not seen to be off" in revoked.out
    assert seeded("device", "revoke", "box-n1", "--yes", "--json").value["cut_off"]["refuses"] is False  # type: ignore[index]


def test_revoking_asks_first(seeded: Fleet) -> None:
    assert seeded("device", "revoke", "box-n1").code == terminal.EXIT_REFUSED
    shown = seeded("device", "show", "box-n1", "--json").value
    assert isinstance(shown, dict)
    assert shown["state"] == "online"
    revoked = seeded("device", "revoke", "box-n1", "--yes")
    assert revoked.code == 0
    for word in ("box-n1 is revoked", "ended by the broker", "off after 3 ms", "not authorised", "session was closed"):
        assert word in revoked.out
    refused = seeded("device", "token", "box-n1")
    assert (refused.code, refused.err) == (1, "device box-n1 is revoked | add the box under a new name")


def test_a_round_is_dropped_with_its_reason(seeded: Fleet) -> None:
    shown = seeded("round", "drop", "round-3", "--reason", "wrong rate")
    assert (shown.code, "dropped by the operator: wrong rate" in " ".join(shown.out.split())) == (0, True)
    again = seeded("round", "drop", "round-3")
    assert (again.code, again.err) == (1, "round round-3 is over | fleet round show round-3")
    assert seeded("round", "drop", "round-9").err == "there is no round round-9 | fleet round list shows all"


def test_what_the_hub_refuses_is_said_with_its_advice(seeded: Fleet) -> None:
    assert seeded("device", "add", "box-n1", "--site", "north").err.endswith("fleet device token box-n1")
    nobody = seeded("device", "show", "nobody")
    assert (nobody.code, nobody.err) == (1, "there is no device nobody | fleet devices shows all")
    assert "cannot be the name of a site" in seeded("site", "add", "North!").err


def test_a_hub_that_is_away_is_told_from_one_that_is_not_ours(fleet: Fleet, tmp_path: Path) -> None:
    paths = fleet.hub.config.paths
    token, ca = ["--token-file", str(paths.admin_token)], ["--ca", str(paths.ca_certificate)]
    away = run(["--hub", f"https://localhost:{free_port()}", *token, *ca, "devices"])
    assert (away.code, "hub status" in away.err) == (terminal.EXIT_AWAY, True)
    other = make_hub_files(tmp_path / "other")
    stranger = run(["--hub", fleet.hub.config.url, *token, "--ca", str(other.config.paths.ca_certificate), "devices"])
    assert (stranger.code, "does not show a certificate of this fleet's CA" in stranger.err) == (4, True)
    (tmp_path / "wrong.token").write_text("wrong\n")
    wrong = run(["--hub", fleet.hub.config.url, "--token-file", str(tmp_path / "wrong.token"), *ca, "devices"])
    assert (wrong.code, "missing or wrong" in wrong.err) == (4, True)


def test_missing_and_broken_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no fleet.toml" in run(["devices"]).err
    (tmp_path / "fleet.toml").write_text("hub = 3\n")
    assert "fleet.toml: " in run(["devices"]).err
    (tmp_path / "fleet.toml").write_text('hub = "https://localhost:1"\ntoken_file = "none"\nca = "none"\n')
    ended = run(["devices"])
    assert (ended.code, "none cannot be read" in ended.err) == (terminal.EXIT_AWAY, True)
    assert run(["nonsense"]).code == 2
    assert run(["round", "start", "--epochs", "many"]).code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["device", "--help"],
        ["round", "start", "--help"],
        ["round", "drop", "--help"],
        ["devices", "--help"],
    ],
)
def test_help_needs_no_hub(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words).code == 0


def test_waiting_follows_a_round_to_its_end(seeded: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_rounds, "POLL_S", 0.01)
    hub = Hub(fleet_client.find(Path(seeded.options[1]), None, None, None))

    def finish() -> None:
        with seeded.hub.files.database.writing() as session:
            session.get_one(database.Round, "round-3").state = "released"

    timer = threading.Timer(0.1, finish)
    timer.start()
    row = fleet_rounds.follow(hub, "round-3", quiet=False)
    timer.join()
    assert row["state"] == "released"
