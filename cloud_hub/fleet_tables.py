"""How `fleet` shows the hub's answers: tables and cards on a terminal.

Reads values as cloud_hub.views makes them; gives rich renderables.
Never cuts a name or a reason: long cells wrap.
Source: rich.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]

JOINED = ("joined", "keyed", "shared", "delivered", "agreed", "unmasked")
OUT = ("declined", "left", "refused")

_GOOD = {"online", "released", "delivered", "agreed", "unmasked", "activated", "everyone"}
_BAD = {"away", "expired", "revoked", "dropped", *OUT, "rolled-back", "halted"}


def sites(rows: Sequence[Row]) -> Table:
    table = _table("Site", "Devices>", "Added>")
    for row in rows:
        table.add_row(row["site"], str(row["devices"]), when(row["created_at"]))
    return table


def devices(rows: Sequence[Row]) -> Table:
    table = _table("Device", "Site", "State", "Last seen>", "Release>", "Bundle", "Read>", "Abstained>", "Alarms")
    for row in rows:
        heartbeat = row["heartbeat"] or {}
        table.add_row(
            row["device"],
            row["site"],
            state(row["state"]),
            when(row["last_seen_at"]),
            _release(row["release_version"]),
            (row["bundle_digest"] or "–")[:12],
            str(heartbeat.get("series_read", "–")),
            str(heartbeat.get("series_abstained", "–")),
            Text("\n".join(row["alarms"]) or "none", style="red" if row["alarms"] else "dim"),
        )
    return table


def device(row: Row) -> Table:
    heartbeat = row["heartbeat"] or {}
    facts = {
        "site": row["site"],
        "state": state(row["state"]),
        "last seen": when(row["last_seen_at"]),
        "added": when(row["created_at"]),
        "revoked": when(row["revoked_at"]) if row["revoked_at"] else None,
        "certificate ends": when(row["certificate_ends_at"]) if row["certificate_ends_at"] else "it has none",
        "release": _release(row["release_version"]),
        "bundle": row["bundle_digest"],
        "alarms": Text("; ".join(row["alarms"]) or "none", style="red" if row["alarms"] else "dim"),
    }
    for key in ("software_version", "provider", "series_read", "series_abstained", "series_failed", "quarantined"):
        facts[key.replace("_", " ")] = heartbeat.get(key)
    if heartbeat:
        facts["reviews agreed"] = f"{heartbeat['reviews_agreed']} of {heartbeat['reviews']}"
        facts["disk free"] = size(heartbeat["disk_free_bytes"])
    return _card(row["device"], facts)


def cut_off(row: Row) -> Table:
    """A device just revoked: what the broker showed of it."""
    shown = row["cut_off"]
    if shown["refuses"]:
        off = Text(f"off after {shown['after_ms']:.0f} ms", style="green")
        proof = 'the broker answers "not authorised" to a message under its name'
    else:
        off = Text(f"not seen to be off after {shown['after_ms']:.0f} ms", style="red")
        proof = "none: does the broker run? fleet status; then give the same command again"
    facts = {
        "last message": when(row["last_seen_at"]),
        "connection": "ended by the broker" if shown["was_connected"] else "it had none",
        "now": off,
        "proof": proof,
        "the broker's log": "; ".join(shown["broker_said"]) or None,
    }
    return _card(row["device"], facts)


def rounds(rows: Sequence[Row]) -> Table:
    table = _table(
        "Round", "State", "Started>", "Kind", "Invited>", "Joined>", "Declined>", "Updates>", "Release>", "Reason"
    )
    for row in rows:
        states = row["device_states"]
        table.add_row(
            row["round_id"],
            state(row["state"]),
            when(row["created_at"]),
            f"{row['kind']} {row['rule']}" + (f", buffer {row['buffer']}" if row["buffer"] else ""),
            str(sum(states.values())),
            str(sum(states.get(name, 0) for name in JOINED)),
            str(sum(states.get(name, 0) for name in OUT)),
            str(row["came"]["updates"]),
            _release(row["release_version"]),
            escape(row["reason"]),
        )
    return table


def round_(row: Row) -> Table:
    names = ("kind", "rule", "trainable", "epochs", "learning_rate", "clip_norm", "min_examples", "min_devices")
    facts: dict[str, Any] = {"state": state(row["state"]), "reason": row["reason"] or None}
    facts |= {name.replace("_", " "): row[name] for name in names}
    if row["kind"] == "masked":
        facts |= {"min cohort": row["min_cohort"], "noise": row["noise"], "share": row["share"], "came": came(row)}
        facts |= {"groups": row["groups"] if row["groups"] > 1 else None}
    else:
        facts |= {"share": row["share"], "bits": row["bits"]}
    if row["buffer"]:
        facts |= {"buffer": f"{row['buffer']} updates, {row['stale_max']} releases old at most"}
    facts |= {"base": row["base_digest"], "candidate": row["candidate_digest"]}
    facts |= {"started": when(row["created_at"]), "deadline": when(row["deadline"])}
    return _card(row["round_id"], facts | {"release": _release(row["release_version"])})


def came(row: Row) -> str:
    """How far a masked round is: what has come, in the order of its stages."""
    return " · ".join(f"{count} {name}" for name, count in row["came"].items())


def cohorts(row: Row) -> Table:
    """The groups of a masked round that are summed apart; none for a round of one sum."""
    table = _table("Group>", "Boxes>", "Left out", "Devices")
    for cohort in row["cohorts"] if row["groups"] > 1 else ():
        devices = " ".join(cohort["devices"])
        table.add_row(str(cohort["group"]), str(len(cohort["devices"])), escape(cohort["reason"]) or "–", devices)
    return table


def members(rows: Sequence[Row]) -> Table:
    table = _table("Device", "Site", "State", "Box says", "Examples>", "Received>", "Reason")
    for row in rows:
        of = f" of {size(row['bytes_expected'])}" if row["bytes_expected"] else ""
        table.add_row(
            row["device"],
            row["site"],
            state(row["state"]),
            says(row),
            str(row["examples"]),
            size(row["bytes_received"]) + of,
            escape(row["reason"]),
        )
    return table


def says(row: Row) -> str:
    """The box's own word of itself, and in a buffered round of its update."""
    stale = row["staleness"]
    return (row["device_says"] or "–") + (f", {stale} release{'s' * (stale > 1)} old" if stale else "")


def releases(rows: Sequence[Row]) -> Table:
    table = _table(
        "Release>", "Stage", "Made>", "From", "Bundle", "Size>", "Active>", "Offered>", "Refused>", "Held-out accuracy"
    )
    for row in rows:
        outcomes = row["outcomes"]
        table.add_row(
            _release(row["release_version"]),
            state(row["state"]),
            when(row["created_at"]),
            row["round_id"] or "the software",
            row["bundle_digest"][:12],
            size(row["size"]),
            str(outcomes.get("activated", 0)),
            str(outcomes.get("offered", 0)),
            str(outcomes.get("refused", 0) + outcomes.get("rolled-back", 0)),
            accuracy(row["accuracy"]),
        )
    return table


def release(row: Row) -> Table:
    facts = {
        "stage": state(row["state"]),
        "reason": row["reason"] or None,
        "made": when(row["created_at"]),
        "from": row["round_id"] or "the software",
        "bundle": row["bundle_digest"],
        "size": size(row["size"]),
        "held-out accuracy": accuracy(row["accuracy"]),
    }
    facts |= {f"  at {site}": accuracy(of_site) for site, of_site in row["sites"].items() if of_site["heldout"]}
    return _card(f"release v{row['release_version']}", facts)


def reports(rows: Sequence[Row], *, by_release: bool = False) -> Table:
    """Reports of many boxes on one release, or of one box on its releases."""
    columns = ("Release>",) if by_release else ("Device", "Site")
    table = _table(*columns, "Outcome", "Reported>", "Held-out right", "Reason")
    for row in rows:
        right = f"{row['heldout_correct_before']} → {row['heldout_correct_after']} of {row['heldout']}"
        of = (_release(row["release_version"]),) if by_release else (row["device"], row["site"])
        table.add_row(
            *of,
            state(row["outcome"]),
            when(row["reported_at"]),
            right if row["heldout"] else "–",
            escape(row["reason"]),
        )
    return table


def refusals(rows: Sequence[Row]) -> Table:
    table = _table("Last>", "Device", "What", "Reason", "Times>")
    for row in rows:
        table.add_row(
            when(row["at"]), escape(row["device"]) or "unknown", row["what"], escape(row["reason"]), str(row["count"])
        )
    return table


def status(row: Row) -> Text:
    counts = ", ".join(f"{count} {name}" for name, count in row["devices"].items()) or "none yet"
    broker = ("runs", "green") if row["broker_running"] else ("is down", "red")
    return Text.assemble(f"Hub {row['url']} answers; broker {row['mqtt']} ", broker, f"; devices: {counts}")


def state(name: str) -> Text:
    return Text(name, style="green" if name in _GOOD else "red" if name in _BAD else "yellow")


def accuracy(value: Row) -> str:
    if not value["heldout"]:
        return "–"
    return f"{value['before']:.0%} → {value['after']:.0%} of {value['heldout']}"


def when(unix_s: float | None) -> str:
    if unix_s is None:
        return "never"
    away_s = time.time() - unix_s
    if abs(away_s) >= 86400:
        return datetime.fromtimestamp(unix_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
    size_s, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (0, "s")) if abs(away_s) >= s)
    text = f"{abs(away_s) // (size_s or 1):.0f} {unit}"
    return f"{text} ago" if away_s >= 0 else f"in {text}"


def size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "–"
    value = float(size_bytes)
    unit = 0
    while value >= 1024 and unit < 3:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {('KiB', 'MiB', 'GiB')[unit - 1]}"


def _release(version: int | None) -> str:
    return "–" if version is None else "shipped" if version == 0 else f"v{version}"


class _Table(Table):
    """Names and figures stay whole on the narrowest terminal; only prose folds."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        for column, cell in zip(self.columns, cells, strict=True):
            if column.no_wrap:
                column.min_width = max(column.min_width or 0, cell_len(str(cell)))
        super().add_row(*cells, **options)


def _table(*columns: str) -> Table:
    """A trailing `>` sets a column to the right."""
    table = _Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        title = column.rstrip(">")
        prose = title in ("Reason", "Alarms", "Left out", "Devices") and not column.endswith(">")
        table.add_column(
            title,
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
            no_wrap=not prose,
            min_width=24 if prose else cell_len(title),
        )
    return table


def _card(title: str, facts: dict[str, Any]) -> Table:
    card = Table(box=None, show_header=False, title=f"[bold]{escape(title)}", title_justify="left", pad_edge=False)
    card.add_column(style="dim")
    card.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            card.add_row(name, value if isinstance(value, Text) else escape(str(value)))
    return card
