"""`python -m models import`: the package's own command, and where the others are.

Reads the command line; writes what the command writes.
Never imports what another command needs.
Source: none.
"""

import argparse
import json
import sys

_OTHERS = """Other commands of this package:
  python -m models.training    pretrain a network on phantoms, finetune one on reviewed examples
  python -m models.export      make a bundle from trained weights
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models", epilog=_OTHERS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("import",), help="make a bundle of an ONNX classifier or a MONAI Bundle")
    parser.parse_args(arguments[:1])
    try:
        from models import importing  # after the command line: `--help` needs no onnx
    except ModuleNotFoundError as error:
        advice = "install the extra `train`, and one of `cpu` and `gpu`: pip install wardround[train,cpu]"
        print(json.dumps({"error": f"{error.name} is not installed", "advice": advice}), file=sys.stderr)
        return 1
    return importing.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
