"""`edge-agent`: init, enroll, run, status, doctor, user.

Reads the configuration file; prints for people, or JSON with --json.
Never shows patient data.
"""

import getpass
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_agent import config as configuration
from edge_agent import database, device_key, identity, setup, users
from fleet_link.errors import WardroundError
from models.errors import ModelError

if TYPE_CHECKING:
    from edge_agent.status import Status
    from edge_agent.task_status import TaskStatus

DEFAULT_CONFIG = Path("edge-agent.toml")
app = typer.Typer(
    help="The Wardround edge box: receives DICOM, reads it, sends results to the PACS, learns from corrections.",
    epilog="First steps:  edge-agent init  ·  edge-agent doctor  ·  edge-agent user add NAME  ·  edge-agent enroll TOKEN  ·  edge-agent run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
user_app = typer.Typer(help="Who may sign in at the review page.", no_args_is_help=True)
app.add_typer(user_app, name="user")

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The configuration file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
out = Console(highlight=False)

# Daemon, doctor and status load ONNX Runtime and pydicom, a second each: imported by the commands that need them.


@app.command()
def init(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A value other than the default; may be repeated."),
    ] = None,
) -> None:
    """Write a configuration file with every key documented, and make the data folder."""
    loaded = setup.init(config, set_ or [])
    database.connect(loaded.box.data_dir).close()
    out.print(f"{config} written; data goes to {loaded.box.data_dir}. Next: `edge-agent doctor`", soft_wrap=True)


@app.command()
def enroll(
    token: Annotated[
        str, typer.Argument(help="The one-time token that `fleet device add` printed; - reads it from standard input.")
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Another identity: after a revoked or lost one, or of another hub; the agent must be stopped.",
        ),
    ] = False,
) -> None:
    """Make this box's key and get its certificate from the hub."""
    text = sys.stdin.readline().strip() if token == "-" else token  # noqa: S105
    data_dir = configuration.load(config).box.data_dir
    if replace:
        from edge_agent import status

        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with status.run_lock(data_dir):
            enrolled = identity.enroll(text, data_dir, replace=True, passphrase=device_key.passphrase())
    else:
        enrolled = identity.enroll(text, data_dir, passphrase=device_key.passphrase())
    out.print(
        f"Enrolled as {enrolled.address.device} at {enrolled.address.hub_url}. Restart a running edge-agent.",
        soft_wrap=True,
    )


@app.command()
def run(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Receive, read, report and learn until stopped (SIGTERM or Ctrl-C)."""
    from edge_agent import daemon

    daemon.run(configuration.load(config))


@app.command("status")
def show_status(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """What the box is doing, and what waits for somebody."""
    from edge_agent import status

    gathered = status.gather(configuration.load(config))
    if as_json:
        out.print_json(json.dumps(gathered.to_dict()))
    else:
        _print_status(gathered)


@app.command("doctor")
def run_doctor(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Check ports, disk, clock, certificates, GPU and providers, PACS and hub; say what to do. Exit code 1 on an error."""
    from edge_agent import doctor

    checks = []
    for check in doctor.examine(configuration.load(config)):
        checks.append(check)
        if not as_json:
            mark = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "error": "[red]✗[/red]"}[check.level]
            out.print(f"{mark} [bold]{check.name}[/bold]: {escape(check.finding)}", soft_wrap=True)
            if check.advice and check.level is not doctor.Level.OK:
                out.print(f"    → {escape(check.advice)}", soft_wrap=True)
    if as_json:
        out.print_json(json.dumps([check.__dict__ for check in checks]))
    if any(check.level is doctor.Level.ERROR for check in checks):
        raise typer.Exit(1)


@app.command("resend")
def resend(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Try results again that the PACS had refused, after it was put right."""
    from edge_agent import delivery

    count = delivery.retry_refused(database.connect(configuration.load(config).box.data_dir), time.time())
    out.print(f"{count} results wait for the PACS again.")


@user_app.command("add")
def add_user(
    name: Annotated[str, typer.Argument(help="The name to sign in with; kept with each verdict.")],
    config: ConfigOption = DEFAULT_CONFIG,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from standard input.")
    ] = False,
) -> None:
    """Add a radiologist, or give one a new password."""
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = getpass.getpass("Password: ")
        if getpass.getpass("Once more: ") != password:
            raise typer.BadParameter("the two passwords differ")
    db = database.connect(configuration.load(config).box.data_dir)
    users.add_user(db, name, password, time.time())
    out.print(f"{name} may sign in.")


@user_app.command("remove")
def remove_user(
    name: Annotated[str, typer.Argument(help="Who may no longer sign in; open sessions end, verdicts stay.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Take a radiologist's access away."""
    users.remove_user(database.connect(configuration.load(config).box.data_dir), name)
    out.print(f"{name} may no longer sign in.")


@user_app.command("list")
def list_users(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Who may sign in."""
    for name in users.names(database.connect(configuration.load(config).box.data_dir)):
        out.print(name)


def main() -> None:
    """Errors end with what happened and what to do next, on standard error, exit code 1."""
    try:
        app()
    except (WardroundError, ModelError) as error:
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        errors.print("[red]error:[/red]", escape(str(error)))
        if error.advice:
            errors.print("  →", escape(error.advice))
        sys.exit(1)


def _print_status(gathered: "Status") -> None:
    state = "[green]running[/green]" if gathered.running else "[yellow]not running[/yellow]"
    device = gathered.device or "not enrolled"
    link = "connected to the hub" if gathered.hub_connected else "no connection to the hub"
    out.print(f"[bold]{device}[/bold]  {state}, {link}; {gathered.disk_free_bytes / 1e9:.1f} GB free")
    for alarm in gathered.alarms:
        out.print(f"[red]alarm:[/red] {escape(alarm)}", soft_wrap=True)
    for notice in gathered.notices:
        out.print(f"[yellow]notice:[/yellow] {escape(notice)}", soft_wrap=True)
    if gathered.certificate_days_left is not None:
        out.print(f"certificate: {gathered.certificate_days_left} days left")
    if gathered.bundle:
        out.print(
            f"model: release {gathered.bundle['release_version']}, bundle {gathered.bundle['bundle_digest'][:12]}"
        )
    out.print("series: " + (", ".join(f"{n} {name}" for name, n in gathered.series.items()) or "none yet"))
    out.print("counts: " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in gathered.counts.items()))
    if gathered.privacy["rounds"]:
        spent = gathered.privacy
        out.print(
            f"privacy: epsilon {spent['epsilon']:.3g} of {spent['epsilon_max']:g} spent at delta {spent['delta']:g}, "
            f"in {spent['rounds']} rounds"
        )
    if gathered.spool:
        waits = gathered.spool
        out.print(
            f"spool: an update of {waits['examples']} examples, trained for round {waits['round_id']} from bundle "
            f"{waits['base_digest'][:12]}, waits for the next buffered round"
        )
    _print_rows(
        "Tasks: reviewed cases whose label was in the set, 90 % is promised",
        [_task_row(task) for task in gathered.tasks],
    )
    _print_rows("Rounds", gathered.rounds)
    _print_rows("Waiting for the PACS", gathered.pacs)
    _print_rows("Series not read", gathered.failed)
    _print_rows("Quarantine", gathered.quarantine)
    _print_rows("Refused bundles", gathered.refused_bundles)


def _task_row(task: "TaskStatus") -> dict[str, str]:
    """Bundle → this site."""
    return {
        "task": task.task,
        "cases": str(task.reviewed),
        "in_set": _share(task.covered, task.reviewed),
        "by_bundle": _share(task.covered_by_bundle, task.reviewed),
        "threshold": f"{task.threshold_of_bundle:.2f}→{task.threshold:.2f}",
        "temperature": f"{task.temperature_of_bundle:.2f}→{task.temperature:.2f}",
        "drift": task.drift_said,
    }


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    out.print(table)


def _cell(name: str, value: object) -> str:
    if name.endswith("_at") and isinstance(value, float):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if value is None:
        return "–"
    return str(value)[:12] if name == "bundle_digest" else escape(str(value))


if __name__ == "__main__":
    main()
