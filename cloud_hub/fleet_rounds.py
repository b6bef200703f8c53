"""`fleet round`: start rounds of learning, follow them, show and drop them.

Talks to the hub's API; prints tables, or JSON with --json.
Never judges an order itself: the hub does, and says what is wrong with it.
Source: ARCHITECTURE.md, "Rounds".
"""

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cloud_hub import fleet_tables
from cloud_hub.fleet_output import AsJson, Hub, err, hub_of, or_hint, show, titled
from cloud_hub.terminal import EXIT_REFUSED
from fleet_link.errors import LinkError

POLL_S = 1.0
FINISHED = ("released", "dropped")

app = typer.Typer(no_args_is_help=True, help="Rounds of learning.")


@app.command("start")
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
            "each round. 0.034 is about a fiftieth of the bytes, in an open round a two-hundredth. Below 1 the plan's "
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
    hub = hub_of(context)
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
        row = follow(hub, row["round_id"], quiet=as_json)
    show(row, as_json, lambda: _round(row))
    if row["state"] == "dropped":
        raise typer.Exit(EXIT_REFUSED)


@app.command("list")
def round_list(context: typer.Context, as_json: AsJson = False) -> None:
    """All rounds, newest first."""
    rows = hub_of(context).get("/rounds")["rounds"]
    show(rows, as_json, lambda: or_hint(rows, fleet_tables.rounds, "No rounds yet: fleet round start"))


@app.command("show")
def round_show(
    context: typer.Context,
    round_id: Annotated[str, typer.Argument(help="As fleet round list shows it.")],
    as_json: AsJson = False,
) -> None:
    """One round: its plan, and each box's state, examples, bytes and reasons."""
    row = hub_of(context).get(f"/rounds/{quote(round_id, safe='')}")
    show(row, as_json, lambda: _round(row))


@app.command("drop")
def round_drop(
    context: typer.Context,
    round_id: Annotated[str, typer.Argument(help="As fleet round list shows it.")],
    reason: Annotated[str, typer.Option(help="Shown to the operators and to the boxes, at most 400 characters.")] = "",
    as_json: AsJson = False,
) -> None:
    """End a round that is on: nothing is released of it, its boxes are told, another may start."""
    row = hub_of(context).post(f"/rounds/{quote(round_id, safe='')}/drop", {"reason": reason})
    show(row, as_json, lambda: _round(row))


def _round(row: dict[str, Any]) -> RenderableType:
    return Group(
        fleet_tables.round_(row),
        *titled("Groups", fleet_tables.cohorts(row)),
        *titled("Devices", fleet_tables.members(row["members"])),
    )


def follow(hub: Hub, round_id: str, *, quiet: bool) -> dict[str, Any]:
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
