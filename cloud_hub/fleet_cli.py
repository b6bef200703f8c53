"""`fleet`: the operator's command for sites, devices, rounds and releases.

Talks to the hub's API; prints tables, or JSON with --json.
Never works on the hub's files or database, so it runs from any machine that has fleet.toml, token and CA.
Source: Typer; exit codes 0 done, 1 refused, 2 wrong usage, 3 hub away or setting wrong, 4 not trusted.
"""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Group
from rich.text import Text

from cloud_hub import fleet_rounds, fleet_tables, terminal
from cloud_hub.fleet_output import AsJson, Options, hub_of, or_hint, show, titled
from cloud_hub.terminal import EXIT_REFUSED

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Look after the boxes of a Wardround hub.",
    epilog="Exit codes: 0 done · 1 the hub refused · 2 wrong usage · 3 hub away or a setting is wrong · 4 not trusted",
    rich_markup_mode="rich",
)
site_app = typer.Typer(no_args_is_help=True, help="Hospitals.")
device_app = typer.Typer(no_args_is_help=True, help="Boxes: add, enrol anew, revoke, look at.")
release_app = typer.Typer(no_args_is_help=True, help="Signed bundles and where they run.")
for name, group in (("site", site_app), ("device", device_app), ("round", fleet_rounds.app), ("release", release_app)):
    app.add_typer(group, name=name)

DeviceName = Annotated[str, typer.Argument(help="The box's name: a-z, 0-9 and -.")]


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="fleet.toml; else ./, ~/.config/wardround/, /etc/wardround/.")
    ] = None,
    hub: Annotated[str | None, typer.Option(help="The hub's address, https://HOST:PORT.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the admin token.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The hub's ca.pem.")] = None,
) -> None:
    context.obj = Options(config, hub, token_file, ca)  # looked up only by a command that needs the hub


# --- sites ----------------------------------------------------------------------------------------


@site_app.command("add")
def site_add(
    context: typer.Context, site: Annotated[str, typer.Argument(help="a-z, 0-9 and -.")], as_json: AsJson = False
) -> None:
    """Make a hospital known."""
    added = hub_of(context).post("/sites", {"site": site})
    show(added, as_json, lambda: f"Site [bold]{site}[/] added. Next: fleet device add NAME --site {site}")


@site_app.command("list")
def site_list(context: typer.Context, as_json: AsJson = False) -> None:
    """All hospitals."""
    rows = hub_of(context).get("/sites")["sites"]
    show(rows, as_json, lambda: or_hint(rows, fleet_tables.sites, "No sites yet: fleet site add NAME"))


# --- devices --------------------------------------------------------------------------------------


@device_app.command("add")
def device_add(
    context: typer.Context,
    device: DeviceName,
    site: Annotated[str, typer.Option(help="The hospital it stands in.")],
    as_json: AsJson = False,
) -> None:
    """Make a box known and print the command that enrols it. The token in it works once."""
    added = hub_of(context).post("/devices", {"device": device, "site": site})
    show(added, as_json, lambda: _enrolment(added))


@device_app.command("token")
def device_token(context: typer.Context, device: DeviceName, as_json: AsJson = False) -> None:
    """A new enrolment token for a known box (reinstalled, or the first one expired). Voids the one before."""
    made = hub_of(context).post(f"/devices/{quote(device, safe='')}/token")
    show(made, as_json, lambda: _enrolment(made))


@device_app.command("revoke")
def device_revoke(
    context: typer.Context,
    device: DeviceName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cut a box off at once and for good: hub and broker refuse it, its certificates are void.

    Shows what the broker showed: that it ended the box's connection, and that it refuses what is said under its name.
    Exit code 1 where it did not show it; the same command may be given again.
    """
    if not yes and not typer.confirm(f"Cut {device} off for good?", err=True):
        raise typer.Exit(EXIT_REFUSED)
    revoked = hub_of(context).post(f"/devices/{quote(device, safe='')}/revoke")
    said = Text.assemble("Device ", (device, "bold"), " is revoked. It goes on reading images by itself.\n")
    show(revoked, as_json, lambda: Group(said, fleet_tables.cut_off(revoked)))
    if not revoked["cut_off"]["refuses"]:
        raise typer.Exit(EXIT_REFUSED)


@device_app.command("show")
def device_show(context: typer.Context, device: DeviceName, as_json: AsJson = False) -> None:
    """Everything the hub knows of one box."""
    row = hub_of(context).get(f"/devices/{quote(device, safe='')}")
    show(
        row,
        as_json,
        lambda: Group(
            fleet_tables.device(row), *titled("Releases", fleet_tables.reports(row["releases"], by_release=True))
        ),
    )


@device_app.command("list")
@app.command("devices")
def devices(context: typer.Context, as_json: AsJson = False) -> None:
    """All boxes: when last heard, what they run, what they complain about."""
    rows = hub_of(context).get("/devices")["devices"]
    hint = "No devices yet: fleet device add NAME --site SITE"
    show(rows, as_json, lambda: or_hint(rows, fleet_tables.devices, hint))


# --- releases, refusals, status -------------------------------------------------------------------


@release_app.command("list")
def release_list(context: typer.Context, as_json: AsJson = False) -> None:
    """All releases, newest first."""
    rows = hub_of(context).get("/releases")["releases"]
    show(rows, as_json, lambda: or_hint(rows, fleet_tables.releases, "No releases"))


@release_app.command("show")
def release_show(
    context: typer.Context,
    release_version: Annotated[int, typer.Argument(help="As fleet release list shows it, without the v.", min=1)],
    as_json: AsJson = False,
) -> None:
    """One release: accuracy by site, and what became of it on each box."""
    row = hub_of(context).get(f"/releases/{release_version}")
    show(
        row,
        as_json,
        lambda: Group(fleet_tables.release(row), *titled("Devices", fleet_tables.reports(row["devices"]))),
    )


@app.command()
def refusals(context: typer.Context, as_json: AsJson = False) -> None:
    """What the hub did not accept, and why."""
    rows = hub_of(context).get("/refusals")["refusals"]
    show(rows, as_json, lambda: or_hint(rows, fleet_tables.refusals, "Nothing was refused"))


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Is the hub there, does its broker run, how many boxes are online."""
    row = hub_of(context).get("/status")
    show(row, as_json, lambda: fleet_tables.status(row))


def main() -> None:
    terminal.run(app, "fleet")


def _enrolment(made: dict[str, Any]) -> Text:
    """One line for the command, however long: it is copied."""
    left = fleet_tables.when(made["expires_at"]).removeprefix("in ")
    return Text.assemble("On the box ", (made["device"], "bold"), f", before {left}:\n\n", made["command"])
