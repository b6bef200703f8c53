"""Round time: ours, open and masked, beside Flower and NVIDIA FLARE; same machine, same sizes, one after the other.

Runs each case; gives rows.
Never goes without a row: what cannot be measured says why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.link import flare, flower, ours, peers
from benchmarks.link.ours import Kind, Scene
from benchmarks.network.results import Results
from benchmarks.processes import HouseError

Row = dict[str, Any]

KINDS: dict[str, Kind] = {"ours, open": "unsafe_open", "ours, masked": "masked"}
PEERS = {"flower": flower.measured, "flare": flare.measured}
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Extent:
    parameters: tuple[int, ...]
    boxes: tuple[int, ...]
    rounds: int
    install: bool  # peers that are missing


def rows(results: Results, of_peers: Results, extent: Extent, work: Path) -> Iterator[Row]:
    """`of_peers` keeps the peers' rows when our code changes."""
    for parameters, boxes in product(extent.parameters, extent.boxes):
        for shown, kind in KINDS.items():
            scene = Scene(kind, boxes, parameters, extent.rounds)
            yield _row(results, shown, scene, partial(ours.measured, scene, work))
        for peer in PEERS:
            scene = Scene("unsafe_open", boxes, parameters, extent.rounds)
            yield _row(of_peers, peers.SHOWN_AS[peer], scene, partial(_peer, peer, scene, extent.install, work))


def _peer(peer: str, scene: Scene, install: bool, work: Path) -> Row:
    commands = peers.environment(peer, install=install)
    return PEERS[peer](commands, scene.boxes, scene.parameters, scene.rounds, work)


def _row(results: Results, shown: str, scene: Scene, measure: Callable[[], Row]) -> Row:
    settings = {"what": shown, "parameters": scene.parameters, "boxes": scene.boxes, "rounds": scene.rounds}
    try:
        return results.row("round", settings, measure)
    except (peers.MissingError, HouseError) as error:
        return settings | {"left_out": str(error).splitlines()[0][:SHOWN_CHARACTERS]}
