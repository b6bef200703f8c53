"""Every target by its name.

Reads and writes nothing.
Never imported before atheris has its hooks in place: what is imported earlier is not followed.
"""

from fleet_link import messages
from fleet_link.errors import LinkError
from tests.fuzz import hub_targets, link_targets, round_targets
from tests.fuzz.target import PLANTED, Target, names, of_name, target

__all__ = ["PLANTED", "Target", "hub_targets", "link_targets", "names", "of_name", "round_targets"]


@target(PLANTED)
def _planted() -> Target:
    def careless(body: bytes) -> None:
        if messages.decode(body).message_id != "0" * 32:
            raise KeyError("message_id")

    return Target(PLANTED, careless, of_name("messages").seeds, (LinkError,))
