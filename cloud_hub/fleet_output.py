"""What every `fleet` command needs: the hub it speaks to, and how an answer is shown.

Talks to the hub's API; prints tables, or JSON with --json.
Never works on the hub's files or database.
Source: Typer, Rich.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cloud_hub import fleet_client

AsJson = Annotated[bool, typer.Option("--json", help="Print the hub's answer as JSON.")]
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
class Options:
    config: Path | None
    hub: str | None
    token_file: Path | None
    ca: Path | None


def hub_of(context: typer.Context) -> Hub:
    """Raises SiteError where no fleet.toml, token or CA is found."""
    given = context.obj
    assert isinstance(given, Options)
    return Hub(fleet_client.find(given.config, given.hub, given.token_file, given.ca))


def show(value: Any, as_json: bool, renderable: Callable[[], RenderableType]) -> None:
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


def or_hint(rows: list[Any], table: Callable[[list[Any]], Table], hint: str) -> RenderableType:
    return table(rows) if rows else Text(hint, style="dim")


def titled(title: str, table: Table) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), table] if table.row_count else []
