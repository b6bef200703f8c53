"""Several processes train as one: the same gradients, one report, and no result when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors import numpy as safetensors_numpy

from tests.models.learning import write_fresh_bundle
from tests.models.test_training import write_examples

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
GRADIENTS = """
    import sys
    from dataclasses import replace
    import numpy as np, torch
    from models import fitting
    from models.augment import SITE
    from models.parallel import joined
    from models.pretraining import example_of
    from models.phantoms import LABELS, phantom
    from models.restore import weights_of
    from models.tasks import TASKS
    from tests.models.learning import fresh, quiet

    torch.set_num_threads(1)
    examples = [
        example_of(phantom(task.modality, label, 82_000_000 + n), task, k)
        for task in TASKS[::2] for k, label in enumerate(LABELS[task.modality]) for n in range({per_label})
    ]
    plan = fitting.TrainingPlan({epochs}, 1e-3, {batch}, 0, augmentation=SITE, attention_weight=0.3, most_slices=2,
                                proximal=0.1, trainable={trainable!r}, averaging={averaging}, budget_s={budget_s})
    fitting._GRADIENT_NORM = 1e9  # a clip would hide a wrong size
    gradients = []
    change = fitting._Run._change_weights
    def keep(run):
        gradients.append(np.concatenate([p.grad.numpy().ravel() for p in run._parameters]))
        change(run)
    fitting._Run._change_weights = keep
    with joined("cpu") as parallel:
        network = fresh()
        fitted = fitting.train(network, examples, plan, quiet, parallel=parallel)
        np.savez(sys.argv[1] + f"/{{parallel.processes}}-{{parallel.rank}}.npz", first=gradients[0],
                 loss=fitted.loss_by_epoch, steps=fitted.steps, head=weights_of(network)["head.weight"])
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int, *program: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [*launcher, "--nproc-per-node", str(processes), *program]


def trained(folder: Path, processes: int, **settings: Any) -> list[dict[str, np.ndarray]]:
    defaults = {"per_label": 2, "epochs": 1, "batch": 5, "trainable": "all", "averaging": 0.0, "budget_s": 0.0}
    script = folder / "script.py"
    script.write_text(textwrap.dedent(GRADIENTS.format(**defaults | settings)))
    alone = [sys.executable, str(script), str(folder)]
    command = alone if processes == 1 else torchrun(processes, str(script), str(folder))
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [dict(np.load(folder / f"{processes}-{rank}.npz")) for rank in range(processes)]


@pytest.mark.parametrize(
    "settings",
    [{"batch": 5}, {"batch": 1}, {"batch": 4, "trainable": "adapters", "averaging": 0.9}],
    ids=["odd batches", "fewer series than processes", "adapters"],
)
def test_gradients_are_those_of_one_process(tmp_path: Path, settings: dict[str, Any]) -> None:
    (alone,) = trained(tmp_path, 1, **settings)
    both = trained(tmp_path, 2, **settings)
    largest = np.abs(alone["first"]).max()
    for process in both:
        np.testing.assert_allclose(process["first"], alone["first"], rtol=1e-5, atol=1e-5 * largest)
        np.testing.assert_allclose(process["loss"], alone["loss"], rtol=1e-3)
        assert process["steps"] == alone["steps"]
    np.testing.assert_array_equal(both[0]["head"], both[1]["head"])


def test_a_budget_of_time_ends_all_processes_at_the_same_step(tmp_path: Path) -> None:
    first, second = trained(tmp_path, 2, epochs=100_000, budget_s=2.0)
    assert 1 <= first["steps"] == second["steps"]
    np.testing.assert_array_equal(first["head"], second["head"])


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("site")
    bundle, examples = write_fresh_bundle(folder / "fresh.bundle"), write_examples(folder / "examples", per_label=3)
    return ["-m", "models.training", "finetune", "--bundle", str(bundle), "--examples", str(examples)]


def test_the_program_ends_with_one_report_and_goes_on_where_it_stopped(tmp_path: Path, command: list[str]) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    more = ["--out", str(out), "--epochs", "2", "--patience", "2", "--resume", str(checkpoint)]
    for expected in ([1, 2], []):
        done = subprocess.run(
            torchrun(2, *command, *more), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["epoch"] for line in done.stdout.splitlines()] == expected
        assert sorted(path.name for path in out.iterdir()) == ["report.json", "weights.safetensors"]
        assert json.loads((out / "report.json").read_text())["epochs"] == 2
    one = [sys.executable, *command, "--out", str(tmp_path / "one"), "--epochs", "2", "--patience", "2"]
    assert subprocess.run(one, env=environment(), cwd=ROOT, timeout=240).returncode == 0
    both, alone = (safetensors_numpy.load_file(path / "weights.safetensors") for path in (out, tmp_path / "one"))
    assert both.keys() == alone.keys()
    np.testing.assert_allclose(both["head.weight"], alone["head.weight"], atol=2e-3)


def test_when_one_dies_all_end_with_an_error_and_nothing_is_written(tmp_path: Path, command: list[str]) -> None:
    out = tmp_path / "out"
    program = torchrun(2, *command, "--out", str(out), "--epochs", "1000")
    with subprocess.Popen(
        program, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline()  # an epoch is done
        workers = psutil.Process(run.pid).children()
        os.kill(workers[-1].pid, signal.SIGKILL)
        run.stdout.read()
        assert run.wait(120) != 0
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        time.sleep(0.1)
    assert not out.exists()


def test_processes_with_different_examples_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from models.errors import ModelError
            from models.fitting import TrainingPlan, train
            from models.parallel import joined
            from tests.models.learning import cases, fresh, quiet
            with joined("cpu") as parallel:
                try:
                    train(fresh(), cases("XR", 1 + parallel.rank), TrainingPlan(1, 1e-3, 2, 0), quiet, parallel=parallel)
                except ModelError as error:
                    print(error)
        """)
    )
    done = subprocess.run(
        torchrun(2, str(script)), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.count("different options, examples or weights") == 2, done.stderr
