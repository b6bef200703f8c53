"""`python -m tests.fuzz --seconds N [--target NAME]`: coverage-guided fuzzing of every parser that reads the wire.

Reads nothing; writes what was found into --findings, and the corpus into a temporary folder.
Never goes on in a process after a finding: each target runs in a child of its own.
Source: atheris (libFuzzer for Python), github.com/google/atheris.
"""

import argparse
import logging
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import mutators

MAX_INPUT_BYTES = 32 * 1024
HANG_S = 25  # one input, on a busy machine


def main() -> int:
    options = _parser().parse_args()
    if options.child:
        _fuzz(options)  # never returns
    from tests.fuzz import all_targets

    chosen = options.target or all_targets.names()
    options.findings.mkdir(parents=True, exist_ok=True)
    found = [name for name in chosen if not _run_child(name, options)]
    print(f"{len(chosen)} targets, findings in: {', '.join(found) or 'none'}")
    return 1 if found else 0


def _run_child(name: str, options: argparse.Namespace) -> bool:
    """Show executions and coverage; True where nothing was found."""
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-m", "tests.fuzz", "--child", corpus, "--target", name]
        command += ["--seconds", str(options.seconds), "--runs", str(options.runs), "--seed", str(options.seed)]
        command += ["--findings", str(options.findings)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    executions = re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    coverage = re.findall(r"cov: (\d+)", done.stderr)
    is_clean = done.returncode == 0 and bool(executions)
    print(
        f"{name:20} {int(executions[-1]) if executions else 0:>10,} executions  "
        f"coverage {coverage[-1] if coverage else '-':>5}  {'clean' if is_clean else f'FOUND ({done.returncode})'}",
        flush=True,
    )
    if not is_clean:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)  # the traceback; the input
    return is_clean


def _fuzz(options: argparse.Namespace) -> None:
    import atheris

    logging.disable()  # refusals are logged; here they are the rule
    with atheris.instrument_imports(
        include=["fleet_link", "models", "cloud_hub", "edge_agent", "zipfile", "safetensors", "base64"],
        enable_loader_override=False,
    ):
        from tests.fuzz import all_targets

    [name] = options.target
    target = all_targets.of_name(name)
    for number, seed in enumerate((*target.seeds, *target.refused)):
        (Path(options.child) / f"seed-{number}").write_bytes(seed)

    def run(content: bytes) -> None:
        target.accepts(content)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)
        changed = mutators.in_tree(content, generator) if generator.random() < 0.3 else None
        return changed if changed is not None and len(changed) <= most else atheris.Mutate(content, most)

    arguments = [
        sys.argv[0],
        options.child,
        f"-max_total_time={options.seconds}",
        f"-runs={options.runs or -1}",
        f"-seed={options.seed}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={HANG_S}",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        f"-artifact_prefix={options.findings}/{name}-",
    ]
    atheris.Setup(arguments, run, custom_mutator=mutate)
    atheris.Fuzz()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers that read the wire.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60); 0: until --runs are done")
    parser.add_argument("--runs", type=int, default=0, help="executions of each target; 0: until --seconds are over")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (1)")
    parser.add_argument("--target", action="append", metavar="NAME", help="this one alone; may be given several times")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "wardround-fuzz")
    parser.add_argument("--child", metavar="CORPUS", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
