"""`./dev bench NAME`: measurements beside peers, in one run on one machine. Prints a table; --json FILE writes it too."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import bytes as sent_bytes
from benchmarks import codec, masked, poisoning, preprocess, privacy, receive
from benchmarks.fleet import bench as scale
from benchmarks.link import bench as link
from benchmarks.network import bench as network

FILE_COLUMNS = 180  # of a table that goes to a file
BENCHES = {
    "receive": receive,
    "preprocess": preprocess,
    "models": network,
    "link": link,
    "masked": masked,
    "codec": codec,
    "bytes": sent_bytes,
    "scale": scale,
    "poisoning": poisoning,
    "privacy": privacy,
}


def main() -> int:
    shown = "\n".join(
        f"  {name:<12}{bench.__doc__.splitlines()[0]}" for name, bench in BENCHES.items() if bench.__doc__
    )
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description=f"{__doc__}\n\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, the same rows")
    options = parser.parse_args()
    result = BENCHES[options.name].measure(quick=options.quick)
    Console(width=None if sys.stdout.isatty() else FILE_COLUMNS).print(BENCHES[options.name].table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
