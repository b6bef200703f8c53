"""MQTT topics, built and parsed in one place.

Reads and writes nothing.
Never trusts a topic for identity: the broker's ACL binds the device segment to the certificate, and the envelope is signed.
Source: MQTT 5.0 chapter 4.7.
"""

import re
from enum import StrEnum
from typing import NamedTuple

from fleet_link.errors import LinkError

ROOT = "wr1"
HUB = "hub"
_DEVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Direction(StrEnum):
    UP = "up"
    DOWN = "down"


class Channel(StrEnum):
    MESSAGE = "msg"
    CHUNK = "chunk"


class Topic(NamedTuple):
    direction: Direction
    device: str
    channel: Channel

    def __str__(self) -> str:
        return f"{ROOT}/{self.direction}/{self.device}/{self.channel}"


def is_device_id(name: str) -> bool:
    """True for what may stand as a topic segment, certificate CN and MQTT client id at once."""
    return _DEVICE.fullmatch(name) is not None and name != HUB


def parse(topic: str) -> Topic:
    """Raises LinkError on anything `Topic.__str__` would not have written."""
    parts = topic.split("/")
    if len(parts) != 4 or parts[0] != ROOT or not is_device_id(parts[2]):
        raise LinkError(f"not a topic of this fleet: {topic[:80]!r}")
    try:
        return Topic(Direction(parts[1]), parts[2], Channel(parts[3]))
    except ValueError as error:
        raise LinkError(f"not a topic of this fleet: {topic[:80]!r}") from error


def device_subscription(device: str) -> str:
    return f"{ROOT}/{Direction.DOWN}/{device}/+"


def hub_subscription() -> str:
    return f"{ROOT}/{Direction.UP}/+/+"
