# mypy: ignore-errors
"""A Flower server that writes a line for each round: seconds from making the messages to the aggregated weights."""

import json
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from .shapes import shapes

app = ServerApp()


class Timed(FedAvg):
    log = ""

    def configure_train(self, *arguments):
        self.begin = time.perf_counter()
        return super().configure_train(*arguments)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrived = time.perf_counter()
        aggregated = super().aggregate_train(server_round, replies)
        line = {
            "round": server_round,
            "round_s": time.perf_counter() - self.begin,
            "aggregate_s": time.perf_counter() - arrived,
            "replies": sum(not reply.has_error() for reply in replies),
        }
        with open(self.log, "a") as log:
            log.write(json.dumps(line) + "\n")
        return aggregated


@app.main()
def main(grid: Grid, context: Context) -> None:
    wish = context.run_config
    generator = np.random.default_rng(0)
    arrays = {
        f"layer{number:03}.w": Array(generator.standard_normal(size, dtype=np.float32))
        for number, size in enumerate(shapes(int(wish["params"])))
    }
    clients = int(wish["clients"])
    strategy = Timed(fraction_evaluate=0.0, fraction_train=1.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.log = str(wish["log"])
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=int(wish["num-server-rounds"]))
