"""`fleet`: the operator's command for sites, devices, rounds and releases.

Talks to the hub's API; prints tables, or JSON with --json.
Never works on the hub's files or database, so it runs from any machine that has fleet.toml, token and CA.
Source: Typer; exit codes 0 done, 1 refused, 2 wrong usage, 3 hub away or setting wrong, 4 not trusted.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cloud_hub import fleet_client, fleet_tables, terminal
from cloud_hub.terminal import EXIT_REFUSED
from fleet_link.errors import LinkError

POLL_S = 1.0
FINISHED = ("released", "dropped")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Look after the boxes of a Wardround hub.",
    epilog="Exit codes: 0 done · 1 the hub refused · 2 wrong usage · 3 hub away or a setting is wrong · 4 not trusted",
    rich_markup_mode="rich",
)
site_app = typer.Typer(no_args_is_help=True, help="Hospitals.")
device_app = typer.Typer(no_args_is_help=True, help="Boxes: add, enrol anew, revoke, look at.")
round_app = typer.Typer(no_args_is_help=True, help="Rounds of learning.")
release_app = typer.Typer(no_args_is_help=True, help="Signed bundles and where they run.")
for name, group in (("site", site_app), ("device", device_app), ("round", round_app), ("release", release_app)):
    app.add_typer(group, name=name)

AsJson = Annotated[bool, typer.Option("--json", help="Print the hub's answer as JSON.")]
DeviceName = Annotated[str, typer.Argument(help="The box's name: a-z, 0-9 and -.")]
out = Console(soft_wrap=False)
err = Console(stderr=True)


@dataclass(frozen=True)
class Hub:
    """The hub of this command."""

    address: fleet_client.Address

    def get(self, path: str) -> Any:
        return fleet_client.call(self.address, "GET", path)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return fleet_client.call(self.address, "POST", path, body)


@dataclass(frozen=True)
class _Options:
    config: Path | None
    hub: str | None
    token_file: Path | None
    ca: Path | None


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
    context.obj = _Options(config, hub, token_file, ca)  # looked up only by a command that needs the hub


# --- sites ----------------------------------------------------------------------------------------


@site_app.command("add")
def site_add(
    context: typer.Context, site: Annotated[str, typer.Argument(help="a-z, 0-9 and -.")], as_json: AsJson = False
) -> None:
    """Make a hospital known."""
    added = _hub(context).post("/sites", {"site": site})
    _show(added, as_json, lambda: f"Site [bold]{site}[/] added. Next: fleet device add NAME --site {site}")


@site_app.command("list")
def site_list(context: typer.Context, as_json: AsJson = False) -> None:
    """All hospitals."""
    rows = _hub(context).get("/sites")["sites"]
    _show(rows, as_json, lambda: _or_hint(rows, fleet_tables.sites, "No sites yet: fleet site add NAME"))


# --- devices --------------------------------------------------------------------------------------


@device_app.command("add")
def device_add(
    context: typer.Context,
    device: DeviceName,
    site: Annotated[str, typer.Option(help="The hospital it stands in.")],
    as_json: AsJson = False,
) -> None:
    """Make a box known and print the command that enrols it. The token in it works once."""
    added = _hub(context).post("/devices", {"device": device, "site": site})
    _show(added, as_json, lambda: _enrolment(added))


@device_app.command("token")
def device_token(context: typer.Context, device: DeviceName, as_json: AsJson = False) -> None:
    """A new enrolment token for a known box (reinstalled, or the first one expired). Voids the one before."""
    made = _hub(context).post(f"/devices/{quote(device, safe='')}/token")
    _show(made, as_json, lambda: _enrolment(made))


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
    revoked = _hub(context).post(f"/devices/{quote(device, safe='')}/revoke")
    said = Text.assemble("Device ", (device, "bold"), " is revoked. It goes on reading images by itself.\n")
    _show(revoked, as_json, lambda: Group(said, fleet_tables.cut_off(revoked)))
    if not revoked["cut_off"]["refuses"]:
        raise typer.Exit(EXIT_REFUSED)


@device_app.command("show")
def device_show(context: typer.Context, device: DeviceName, as_json: AsJson = False) -> None:
    """Everything the hub knows of one box."""
    row = _hub(context).get(f"/devices/{quote(device, safe='')}")
    _show(
        row,
        as_json,
        lambda: Group(
            fleet_tables.device(row), *_titled("Releases", fleet_tables.reports(row["releases"], by_release=True))
        ),
    )


@device_app.command("list")
@app.command("devices")
def devices(context: typer.Context, as_json: AsJson = False) -> None:
    """All boxes: when last heard, what they run, what they complain about."""
    rows = _hub(context).get("/devices")["devices"]
    hint = "No devices yet: fleet device add NAME --site SITE"
    _show(rows, as_json, lambda: _or_hint(rows, fleet_tables.devices, hint))


# --- rounds ---------------------------------------------------------------------------------------


@round_app.command("start")
def round_start(
    context: typer.Context,
    unsafe_open: Annotated[
        bool,
        typer.Option("--unsafe-open", help="The hub can read each update; boxes join only if their policy allows it."),
    ] = False,
    device: Annotated[list[str] | None, typer.Option(help="Invite this box only; may be repeated.")] = None,
    trainable: Annotated[
        str, typer.Option(help="all, heads, norms or adapters (low rank, in the transformer).")
    ] = "all",
    rule: Annotated[
        str,
        typer.Option(
            help="How an open round's updates, or the means of --groups, become one: fedavg, median, trimmed_mean, krum, "
            "multi_krum, centred_clip."
        ),
    ] = "fedavg",
    groups: Annotated[
        int,
        typer.Option(
            help="Against hostile boxes in a masked round, with --rule: the boxes are dealt into so many groups, each is "
            "masked and summed apart, and the rule is over their means. A box spoils its own group only; with the median, 3 "
            "groups withstand one spoiled group and 5 two. Each site's minimum cohort then holds for its group; a group of three "
            "or four boxes ends when it loses one; and a sum of fewer boxes hides each of them less."
        ),
    ] = 1,
    buffer: Annotated[
        int,
        typer.Option(
            help="Wait for the first so many updates only, not for the slowest box. Boxes train first, then say that they "
            "are ready; whoever is later keeps its update, and the next round with --buffer has it at once. An update over "
            "an older release moves the model less: by 1/√(1 + releases between). 0 waits for everybody. Not with --rule, "
            "--groups or --share."
        ),
    ] = 0,
    stale_max: Annotated[
        int | None,
        typer.Option(
            help="With --buffer: an update over a release older by more than this is thrown away and its box trains anew; "
            "4 where nothing is said, 15 at most."
        ),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(
            help="Differential privacy of a masked round: standard deviation of the noise in the sum over the clip "
            "norm, added by the boxes in shares. Each site's budget pays for it."
        ),
    ] = 0.0,
    share: Annotated[
        float | None,
        typer.Option(
            help="Few bytes: the boxes train and send heads and norms, and this share of all other weights, another in "
            "each round. 0.036 is about a fiftieth of the bytes, in an open round a two-hundredth. Below 1 the plan's "
            "learning rate is the one given here or in hub.toml times 1/√share, at most times 4."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Of each value in an open round, 2 to 8, before they are compressed; 3 where --share is below 1."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over a box's examples.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the training on each box; with --share below 1 the plan's is higher.")
    ] = None,
    clip_norm: Annotated[float | None, typer.Option(help="L2 limit of one box's weight delta.")] = None,
    min_examples: Annotated[int | None, typer.Option(help="A box with fewer declines.")] = None,
    min_devices: Annotated[
        int | None,
        typer.Option(help="Fewer updates than this and the round is dropped; masked: at least rounds.min_cohort."),
    ] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Seconds until the round must have its updates.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show each box's progress until released or dropped.")] = False,
    as_json: AsJson = False,
) -> None:
    """Invite boxes to a round of learning: masked, so that the hub reads their sum alone, unless --unsafe-open.

    What is not given here comes from the hub's hub.toml.
    """
    hub = _hub(context)
    wish = {
        "kind": "unsafe_open" if unsafe_open else "masked",
        "devices": device or None,
        "rule": rule,
        "groups": groups,
        "buffer": buffer,
        "stale_max": stale_max,
        "noise": noise,
        "share": share,
        "bits": bits,
        "trainable": trainable,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "clip_norm": clip_norm,
        "min_examples": min_examples,
        "min_devices": min_devices,
        "deadline_s": deadline_s,
    }
    row = hub.post("/rounds", {key: value for key, value in wish.items() if value is not None})
    if wait:
        row = _follow(hub, row["round_id"], quiet=as_json)
    _show(row, as_json, lambda: _round(row))
    if row["state"] == "dropped":
        raise typer.Exit(EXIT_REFUSED)


@round_app.command("list")
def round_list(context: typer.Context, as_json: AsJson = False) -> None:
    """All rounds, newest first."""
    rows = _hub(context).get("/rounds")["rounds"]
    _show(rows, as_json, lambda: _or_hint(rows, fleet_tables.rounds, "No rounds yet: fleet round start"))


@round_app.command("show")
def round_show(
    context: typer.Context,
    round_id: Annotated[str, typer.Argument(help="As fleet round list shows it.")],
    as_json: AsJson = False,
) -> None:
    """One round: its plan, and each box's state, examples, bytes and reasons."""
    row = _hub(context).get(f"/rounds/{quote(round_id, safe='')}")
    _show(row, as_json, lambda: _round(row))


@round_app.command("drop")
def round_drop(
    context: typer.Context,
    round_id: Annotated[str, typer.Argument(help="As fleet round list shows it.")],
    reason: Annotated[str, typer.Option(help="Shown to the operators and to the boxes, at most 400 characters.")] = "",
    as_json: AsJson = False,
) -> None:
    """End a round that is on: nothing is released of it, its boxes are told, another may start."""
    row = _hub(context).post(f"/rounds/{quote(round_id, safe='')}/drop", {"reason": reason})
    _show(row, as_json, lambda: _round(row))


# --- releases, refusals, status -------------------------------------------------------------------


@release_app.command("list")
def release_list(context: typer.Context, as_json: AsJson = False) -> None:
    """All releases, newest first."""
    rows = _hub(context).get("/releases")["releases"]
    _show(rows, as_json, lambda: _or_hint(rows, fleet_tables.releases, "No releases"))


@release_app.command("show")
def release_show(
    context: typer.Context,
    release_version: Annotated[int, typer.Argument(help="As fleet release list shows it, without the v.", min=1)],
    as_json: AsJson = False,
) -> None:
    """One release: accuracy by site, and what became of it on each box."""
    row = _hub(context).get(f"/releases/{release_version}")
    _show(
        row,
        as_json,
        lambda: Group(fleet_tables.release(row), *_titled("Devices", fleet_tables.reports(row["devices"]))),
    )


@app.command()
def refusals(context: typer.Context, as_json: AsJson = False) -> None:
    """What the hub did not accept, and why."""
    rows = _hub(context).get("/refusals")["refusals"]
    _show(rows, as_json, lambda: _or_hint(rows, fleet_tables.refusals, "Nothing was refused"))


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Is the hub there, does its broker run, how many boxes are online."""
    row = _hub(context).get("/status")
    _show(row, as_json, lambda: fleet_tables.status(row))


def main() -> None:
    terminal.run(app, "fleet")


# --- how answers are shown ------------------------------------------------------------------------


def _hub(context: typer.Context) -> Hub:
    given = context.obj
    assert isinstance(given, _Options)
    return Hub(fleet_client.find(given.config, given.hub, given.token_file, given.ca))


def _show(value: Any, as_json: bool, renderable: Callable[[], RenderableType]) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        shown = renderable()
        if isinstance(shown, (str, Text)):
            out.print(shown, soft_wrap=True)
            return
        needs = Measurement.get(out, out.options.update(max_width=10_000), shown)
        width = max(out.width, needs.minimum if out.is_terminal else needs.maximum)
        Console(width=width).print(shown, crop=False)  # a narrow terminal wraps lines; it never costs a name


def _or_hint(rows: list[Any], table: Callable[[list[Any]], Table], hint: str) -> RenderableType:
    return table(rows) if rows else Text(hint, style="dim")


def _titled(title: str, table: Table) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), table] if table.row_count else []


def _enrolment(made: dict[str, Any]) -> Text:
    """One line for the command, however long: it is copied."""
    left = fleet_tables.when(made["expires_at"]).removeprefix("in ")
    return Text.assemble("On the box ", (made["device"], "bold"), f", before {left}:\n\n", made["command"])


def _round(row: dict[str, Any]) -> RenderableType:
    return Group(
        fleet_tables.round_(row),
        *_titled("Groups", fleet_tables.cohorts(row)),
        *_titled("Devices", fleet_tables.members(row["members"])),
    )


def _follow(hub: Hub, round_id: str, *, quiet: bool) -> dict[str, Any]:
    """Look again until the round is finished; a hub that is away for a while is waited for."""
    row: dict[str, Any] = hub.get(f"/rounds/{round_id}")
    with Live(_progress(row), console=err, transient=True, auto_refresh=not quiet) as live:
        while row["state"] not in FINISHED:
            time.sleep(POLL_S)
            try:
                row = hub.get(f"/rounds/{round_id}")
            except LinkError:
                continue
            if not quiet:
                live.update(_progress(row))
    return row


def _progress(row: dict[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for member in row["members"]:
        total = member["bytes_expected"]
        bar = ProgressBar(total=total, completed=member["bytes_received"], width=24) if total else Text("")
        table.add_row(
            member["device"],
            fleet_tables.state(member["state"]),
            Text(member["device_says"], style="dim"),
            bar,
            Text(member["reason"], style="dim"),
        )
    far = f" ({fleet_tables.came(row)})" if row["kind"] == "masked" else ""
    return Group(Spinner("dots", text=Text(f"{row['round_id']}: {row['state']}{far}")), table)
