"""Run `edge-agent` with a copy of every payload that it hands to MQTT, before TLS hides it.

python -m tests.wiretap FILE -- edge-agent ARGUMENTS…
"""

import sys
import threading
from pathlib import Path
from typing import Any

from edge_agent import cli
from fleet_link.bus import Bus


def main() -> None:
    file, _, *sys.argv = sys.argv[1:]
    listen(Path(file))
    cli.main()


def listen(path: Path) -> None:
    lock = threading.Lock()

    def tapped(name: str) -> None:
        original = getattr(Bus, name)

        def publish(self: Bus, topic: Any, payload: bytes) -> Any:
            with lock, path.open("ab") as tap:
                tap.write(str(topic).encode() + b"\n" + payload + b"\n")
            return original(self, topic, payload)

        setattr(Bus, name, publish)

    for name in ("publish_message", "publish_chunk"):
        tapped(name)


if __name__ == "__main__":
    main()
