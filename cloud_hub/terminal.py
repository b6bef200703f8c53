"""What the commands `hub` and `fleet` share: how an expected failure ends on a terminal.

Writes to standard error.
Never catches what is our own defect: that ends with its traceback.
Source: STYLE.md, "Errors are sorted by who must act".
"""

import sys

import typer
from rich.console import Console
from rich.text import Text

from fleet_link.errors import TrustError, WardroundError

EXIT_REFUSED, EXIT_AWAY, EXIT_UNTRUSTED = 1, 3, 4


class RefusedError(WardroundError):
    """The hub understood and said no; its own words."""


def run(app: typer.Typer, name: str) -> None:
    """Run the command; an expected failure becomes one line, one advice and an exit code."""
    try:
        app()
    except WardroundError as error:
        err = Console(stderr=True)
        err.print(Text(f"{name}: {error}", style="red"), soft_wrap=True)
        if error.advice:
            err.print(Text(f"{' ' * len(name)}  {error.advice}"), soft_wrap=True)
        sys.exit(exit_code(error))


def exit_code(error: WardroundError) -> int:
    if isinstance(error, RefusedError):
        return EXIT_REFUSED
    return EXIT_UNTRUSTED if isinstance(error, TrustError) else EXIT_AWAY
