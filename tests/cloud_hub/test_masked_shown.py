"""A masked round as the operator sees it: started by default over the API, its stage and counts in `fleet` and the hub page."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from cloud_hub import database, fleet_cli, views
from fleet_link.messages import GROUPS
from models.bundle import SHIPPED, SUFFIX
from tests.cloud_hub.hub_support import ADMIN_TOKEN, HttpsHub, make_hub_files, seed_fleet
from tests.cloud_hub.round_support import needs_bundle

pytestmark = [needs_bundle, pytest.mark.slow]
BOXES = ("box-n1", "box-n2", "box-s1")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HttpsHub]:
    hub = HttpsHub(make_hub_files(tmp_path / "hub"))
    seed_fleet(hub.files, now=hub.now)
    for device in BOXES:
        hub.files.device_files(tmp_path, device)
    with hub.files.database.writing() as session:
        session.get_one(database.Round, "round-3").state = "dropped"
        bases = session.scalars(select(database.Release.bundle_digest)).all()
    hub.config.paths.releases.mkdir(exist_ok=True)
    for digest in bases:
        shutil.copy(SHIPPED, hub.config.paths.releases / f"{digest}{SUFFIX}")
    yield hub
    hub.close()


def start(hub: HttpsHub, **wish: object) -> dict[str, Any]:
    with hub.admin() as admin:
        answer = admin.post("/api/v1/rounds", json=wish)
    assert answer.status_code == 201, answer.text
    row: dict[str, Any] = answer.json()
    return row


def with_two_shares(hub: HttpsHub, round_id: str) -> None:
    with hub.files.database.writing() as session:
        session.get_one(database.Round, round_id).state = "sharing"
        for device in BOXES:
            shares = b"said" if device != "box-s1" else None
            session.add(database.MaskedPart(round_id=round_id, device=device, keys=b"said", shares=shares))
        left = session.get_one(database.RoundDevice, (round_id, "box-s1"))
        left.state, left.reason = "left", "left out: shares did not come in time"


def test_a_round_is_masked_unless_the_danger_is_spelled_out(hub: HttpsHub) -> None:
    row = start(hub)
    assert (row["kind"], row["state"], row["min_cohort"], row["min_devices"]) == ("masked", "invited", 3, 3)
    assert row["came"] == dict.fromkeys(views.STAGES_OF_MASKED, 0)


def test_share_and_raised_rate_are_shown(hub: HttpsHub) -> None:
    row = start(hub, share=0.036, learning_rate=0.001)
    assert (row["share"], row["learning_rate"]) == (0.036, pytest.approx(0.004))
    assert (start_again(hub, row["round_id"])["share"], row["kind"]) == (1.0, "masked")


def start_again(hub: HttpsHub, round_id: str) -> dict[str, Any]:
    with hub.admin() as admin:
        assert admin.post(f"/api/v1/rounds/{round_id}/drop", json={}).status_code == 201
    return start(hub)


def test_fleet_orders_a_share(hub: HttpsHub, tmp_path: Path) -> None:
    paths = hub.config.paths
    (tmp_path / "fleet.toml").write_text(
        f'hub = "{hub.config.url}"\ntoken_file = "{paths.admin_token}"\nca = "{paths.ca_certificate}"\n'
    )
    words = ["--config", str(tmp_path / "fleet.toml"), "round"]
    row = json.loads(CliRunner().invoke(fleet_cli.app, [*words, "start", "--share", "0.036", "--json"]).output)
    assert (row["share"], row["learning_rate"]) == (0.036, pytest.approx(4 * hub.config.rounds.learning_rate))
    shown = CliRunner().invoke(fleet_cli.app, [*words, "show", row["round_id"]], terminal_width=200).output
    assert "share 0.036" in " ".join(shown.split())


def with_groups(hub: HttpsHub, tmp_path: Path) -> str:
    """A round of three groups, one of which was left out; started by `fleet`, from nine boxes."""
    names = [f"box-w{number}" for number in range(1, 10)]
    for name in names:
        hub.files.add_device(name, "north")
        hub.files.device_files(tmp_path, name)
    words = [*fleet_words(hub, tmp_path), "start", "--groups", "3", "--rule", "median", "--json"]
    for name in names:
        words += ["--device", name]
    answer = CliRunner().invoke(fleet_cli.app, words)
    assert answer.exit_code == 0, answer.output
    round_id = str(json.loads(answer.output)["round_id"])
    with hub.files.database.writing() as session:
        for number in range(3):
            devices = " ".join(names[3 * number : 3 * number + 3])
            reason = "the masked sum is refused: a sum <beyond>" if number == 1 else ""
            row = database.MaskedGroup(round_id=round_id, group_no=number + 1, devices=devices, reason=reason)
            session.add(row)
    return round_id


def fleet_words(hub: HttpsHub, tmp_path: Path) -> list[str]:
    paths = hub.config.paths
    (tmp_path / "fleet.toml").write_text(
        f'hub = "{hub.config.url}"\ntoken_file = "{paths.admin_token}"\nca = "{paths.ca_certificate}"\n'
    )
    return ["--config", str(tmp_path / "fleet.toml"), "round"]


def test_fleet_and_hub_page_show_the_groups_and_why_one_was_left_out(hub: HttpsHub, tmp_path: Path) -> None:
    round_id = with_groups(hub, tmp_path)
    words = [*fleet_words(hub, tmp_path), "show", round_id]
    shown = " ".join(CliRunner().invoke(fleet_cli.app, words, terminal_width=250).output.split())
    assert "groups 3" in shown
    assert "2 3 the masked sum is refused: a sum <beyond> box-w4 box-w5 box-w6" in shown
    with hub.client() as client:
        client.post("/login", data={"token": ADMIN_TOKEN, "next": "/"})
        page = client.get(f"/rounds/{round_id}").text
    assert "<dt>Groups</dt><dd>3</dd>" in page
    assert '<a href="/devices/box-w5">box-w5</a>' in page
    assert "a sum &lt;beyond&gt;" in page


def test_a_round_of_one_sum_shows_no_groups(hub: HttpsHub, tmp_path: Path) -> None:
    words = [*fleet_words(hub, tmp_path), "show", start(hub)["round_id"]]
    assert "group" not in CliRunner().invoke(fleet_cli.app, words, terminal_width=250).output.lower()


def test_an_order_of_too_many_groups_is_not_understood(hub: HttpsHub) -> None:
    with hub.admin() as admin:
        answer = admin.post("/api/v1/rounds", json={"groups": GROUPS + 1, "rule": "median"})
    assert answer.status_code == 400


def test_an_open_round_has_no_stages(hub: HttpsHub) -> None:
    row = start(hub, kind="unsafe_open")
    assert (row["kind"], row["min_cohort"], row["came"]) == ("unsafe_open", None, {"updates": 0})


def test_too_few_boxes_for_a_cohort_are_told_why(hub: HttpsHub) -> None:
    with hub.admin() as admin:
        answer = admin.post("/api/v1/rounds", json={"devices": ["box-n1", "box-n2"], "min_devices": 1})
    assert (answer.status_code, answer.json()["error"]) == (409, "2 devices are invited, 3 are needed")
    assert "rounds.min_cohort" in answer.json()["advice"]


def test_fleet_shows_stage_counts_and_reasons(hub: HttpsHub, tmp_path: Path) -> None:
    round_id = start(hub)["round_id"]
    with_two_shares(hub, round_id)
    paths = hub.config.paths
    (tmp_path / "fleet.toml").write_text(
        f'hub = "{hub.config.url}"\ntoken_file = "{paths.admin_token}"\nca = "{paths.ca_certificate}"\n'
    )
    words = ["--config", str(tmp_path / "fleet.toml"), "round", "show", round_id]
    shown = " ".join(CliRunner().invoke(fleet_cli.app, words, terminal_width=200).output.split())
    assert "sharing" in shown
    assert "3 keys · 2 shares · 0 updates · 0 signed · 0 unmasked" in shown
    assert "left out: shares did not come in time" in shown
    listed = CliRunner().invoke(fleet_cli.app, [*words[:3], "list", "--json"], terminal_width=200).output
    assert '"shares": 2' in listed


def test_hub_page_shows_the_stage_among_all_stages(hub: HttpsHub) -> None:
    round_id = start(hub)["round_id"]
    with_two_shares(hub, round_id)
    with hub.client() as client:
        client.post("/login", data={"token": ADMIN_TOKEN, "next": "/"})
        page = client.get(f"/rounds/{round_id}").text
        assert client.get("/rounds").status_code == 200
    assert 'aria-current="step">sharing' in page
    for stage in ("keys", "training", "agreeing", "unmasking"):
        assert f">{stage}</li>" in page
    assert "3 keys · 2 shares · 0 updates" in " ".join(page.split())


def test_database_of_the_former_schema_gains_the_tables(hub: HttpsHub) -> None:
    path = hub.config.paths.database
    with hub.files.database.writing() as session:
        for table in ("masked_parts", "masked_groups", "masked_rounds"):
            session.connection().exec_driver_sql(f"DROP TABLE {table}")
        session.connection().exec_driver_sql("PRAGMA user_version=1")
    again = database.connect(path)
    with again.reading() as session:
        assert session.scalars(select(database.MaskedPart)).all() == []
        assert session.scalars(select(database.MaskedRound)).all() == []
        assert session.connection().exec_driver_sql("PRAGMA user_version").scalar_one() == database.SCHEMA_VERSION
        assert session.get_one(database.Round, "round-1").state == "released"
    again.close()
