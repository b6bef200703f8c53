# mypy: ignore-errors
"""An NVIDIA FLARE client whose training is noise on every tensor."""

import os

import numpy as np
import nvflare.client as flare


def main() -> None:
    flare.init()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        generator = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
        trained = {
            name: value + generator.standard_normal(value.shape, dtype=np.float32)
            for name, value in received.params.items()
        }
        flare.send(flare.FLModel(params=trained, metrics={"accuracy": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": 10}))


if __name__ == "__main__":
    main()
