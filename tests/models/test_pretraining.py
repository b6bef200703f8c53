"""What pretraining fits besides weights."""

import pytest

from models.phantoms import BASE
from models.tasks import INPUTS, TASKS

pytestmark = pytest.mark.slow


def test_a_label_without_examples_is_near_nothing() -> None:
    from models import laboratory, pretraining
    from models.network import FAR
    from models.predicting import predict
    from models.restore import new_network

    network = new_network("hybrid-nano", TASKS, INPUTS, seed=0)
    seen = [e for e in pretraining.phantom_examples("XR", 4, 0, BASE) if e.label < 2]
    laboratory.fit_ood(network, seen)
    assert network.ood_mean_KD.shape[0] == sum(len(task.labels) for task in TASKS)
    assert predict(network, seen)["chest-xray"].ood_N.max() < 10.0
    stranger = list(pretraining.phantom_examples("CT", 1, 0, BASE))
    assert predict(network, stranger)["chest-ct"].ood_N.min() > FAR / 100  # no CT was seen


@pytest.mark.parametrize(("out", "reason"), [("/", "is a folder"), ("/dev/null/one.bundle", "cannot be written")])
def test_where_no_bundle_can_be_written_nothing_is_trained(
    out: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from models import pretraining, training

    monkeypatch.setattr(pretraining, "train", lambda *_, **__: pytest.fail("it was trained"))
    assert training.main(["pretrain", "--out", out, "--scale", "0.001"]) == 1
    assert reason in capsys.readouterr().err
