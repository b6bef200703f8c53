# mypy: ignore-errors
"""A Flower client whose training is noise on every tensor."""

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    generator = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
    trained = {
        name: Array(array.numpy() + generator.standard_normal(array.shape, dtype=np.float32))
        for name, array in message.content["arrays"].items()
    }
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": 100})})
    return Message(content=content, reply_to=message)
