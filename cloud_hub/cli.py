"""`hub`: make a hub, run it, ask how it is, make its next intermediate, encrypt the key of its CA.

Writes the data directory (`init`, `new-intermediate`, `encrypt-ca`); starts cloud_hub.service (`run`); asks the running hub's API (`status`).
Never prints the admin token.
Source: Typer; exit codes 0 done, 2 wrong usage, 3 a setting or the machine is wrong or the hub is away, 4 not trusted.
"""

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cloud_hub import config, fleet_client, fleet_tables, service, setup, terminal
from fleet_link.notify import set_up_logging

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The hub of a Wardround fleet: certificates, rounds, releases.",
    epilog="First: hub init --data-dir DIR --host NAME, then hub run --config DIR/hub.toml, then fleet --help. "
    "Backup, also while it runs: sqlite3 DIR/hub.db \".backup 'TO/hub.db'\" first, then copy hub.toml, fleet.toml, "
    "admin.token, ca/, keys/ and releases/; ca/ and keys/ are secrets. Keep ca.passphrase apart from that, once; ca/root.key and "
    "root.passphrase belong offline.",
)
ConfigPath = Annotated[Path, typer.Option("--config", help="The hub's hub.toml.")]
DEFAULT_CONFIG = Path("hub.toml")
out = Console()


@app.command()
def init(
    data_dir: Annotated[Path, typer.Option(help="A new folder for everything the hub keeps.")],
    host: Annotated[str, typer.Option(help="The name or address by which boxes reach this machine.")] = "localhost",
    mqtt_port: Annotated[int, typer.Option(min=1, max=65535)] = 8883,
    https_port: Annotated[int, typer.Option(min=1, max=65535)] = 8443,
    bind: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",  # noqa: S104 - boxes are elsewhere
    bundle: Annotated[Path | None, typer.Option(help="The first release; else the bundle that comes with it.")] = None,
) -> None:
    """Make a hub: authority, certificates, keys, first release, admin token, fleet.toml.

    Interrupted, it is completed by the same command. A finished hub is never overwritten.
    """
    wish = setup.Wish(data_dir, host, mqtt_port, https_port, bind, bundle or shipped_bundle())
    settings = setup.initialise(wish, now=time.time())
    folder = settings.paths.data_dir
    out.print(f"Hub made in [bold]{folder}[/]", soft_wrap=True)
    out.print(f"  start it    hub run --config {folder / 'hub.toml'}", soft_wrap=True)
    out.print(f"  look at it  {settings.url}  (log in with {settings.paths.admin_token})", soft_wrap=True)
    out.print(f"  work on it  fleet --config {folder / 'fleet.toml'} site add NAME", soft_wrap=True)
    out.print(f"Keep {folder / 'ca'} and {folder / 'keys'} in a safe backup.", soft_wrap=True)
    out.print(_kept_apart(settings), soft_wrap=True)
    out.print(_offline(settings), soft_wrap=True)


@app.command()
def run(config_path: ConfigPath = DEFAULT_CONFIG) -> None:
    """Run the hub until it is told to stop (SIGTERM, Ctrl-C)."""
    settings = config.load(config_path)
    set_up_logging(settings.hub.log_level)
    service.run(settings)


@app.command("new-intermediate")
def new_intermediate(
    config_path: ConfigPath = DEFAULT_CONFIG,
    root_key: Annotated[
        Path | None, typer.Option(help="The root's key, wherever it is kept; else ca/root.key.")
    ] = None,
    root_passphrase: Annotated[
        Path | None, typer.Option(help="File with its passphrase; else root.passphrase in the data directory.")
    ] = None,
) -> None:
    """Make the intermediate that signs certificates from next week on. May be done while the hub runs.

    The one before stays valid until its end, with all that it has signed.
    """
    settings = config.load(config_path)
    paths = settings.paths
    made = setup.new_intermediate(
        settings, root_key or paths.root_key, root_passphrase or paths.root_passphrase, now=time.time()
    )
    out.print(f"There is a new intermediate. It signs from {made.signs_from:%Y-%m-%d} on.", soft_wrap=True)
    out.print(f"Take the root's key away again, and back {paths.ca_key.parent} up now.", soft_wrap=True)


@app.command("encrypt-ca")
def encrypt_ca(config_path: ConfigPath = DEFAULT_CONFIG) -> None:
    """Encrypt the key of a hub that was made before this was done by `init`. May be done while it runs."""
    settings = config.load(config_path)
    setup.encrypt_ca(settings)
    out.print(f"{settings.paths.ca_key} is encrypted. Older backups hold it as it was: end them.", soft_wrap=True)
    out.print(_kept_apart(settings), soft_wrap=True)


@app.command()
def status(
    config_path: ConfigPath = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Does the hub on this machine answer, and does its broker run?"""
    settings = config.load(config_path)
    paths = settings.paths
    row = fleet_client.call(
        fleet_client.Address(settings.url, paths.admin_token, paths.ca_certificate), "GET", "/status"
    )
    if as_json:
        typer.echo(json.dumps(row, indent=2))
    else:
        out.print(fleet_tables.status(row), soft_wrap=True)


def _kept_apart(settings: config.Config) -> str:
    return (
        f"Keep {settings.ca_passphrase} apart from it, offline: it opens the CA's key, and without it no restored hub"
        " issues a certificate. systemd can hold it instead: certificates.ca_passphrase in hub.toml."
    )


def _offline(settings: config.Config) -> str:
    return (
        f"Move {settings.paths.root_key} and {settings.paths.root_passphrase} offline, to two places: the hub runs"
        " without them, and needs them once in some years (hub new-intermediate)."
    )


def shipped_bundle() -> Path:
    """The bundle that comes with the software."""
    return Path(str(files("models").joinpath("bundles", "phantom-tiny.bundle")))


def main() -> None:
    terminal.run(app, "hub")
