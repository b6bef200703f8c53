# mypy: ignore-errors
"""`aggregate.py {flower|flare} PARAMETERS UPDATES`: a peer's own aggregation of arrays in memory; prints JSON.

Flower takes all replies at once, so all are in memory; FLARE adds each as it comes, so four are, in turn.
Milliseconds of this process's own processor time; no network, no signature, and in FLARE nothing to deserialise.
"""

import json
import logging
import os
import sys
import time

import numpy as np

PARAMETERS, UPDATES = int(sys.argv[2]), int(sys.argv[3])


def update(seed):
    raw = np.geomspace(64, 64 * 4000, 160)
    sizes = np.maximum(1, raw / raw.sum() * PARAMETERS).astype(int)
    sizes[-1] += PARAMETERS - sizes.sum()
    generator = np.random.default_rng(seed)
    return {f"layer{i:03}.w": generator.standard_normal(size, dtype=np.float32) for i, size in enumerate(sizes)}


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def flower():
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    base = memory("VmRSS")
    forget_peak()
    replies = []
    for number in range(UPDATES):
        arrays = ArrayRecord({name: Array(value) for name, value in update(number).items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 100 + number})})
        asked = Message(content=RecordDict(), dst_node_id=number + 1, message_type="train")
        replies.append(Message(content=content, reply_to=asked))
    begin = time.process_time()
    aggregated, _ = FedAvg().aggregate_train(1, replies)
    each = (time.process_time() - begin) * 1e3 / UPDATES
    assert aggregated is not None
    return {"add_ms": each, "base_bytes": base, "peak_bytes": memory("VmHWM")}


def flare():
    from nvflare.apis.dxo import DXO, DataKind, MetaKey
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import ReservedKey
    from nvflare.apis.fl_context import FLContextManager
    from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
    from nvflare.app_common.app_constant import AppConstants

    base = memory("VmRSS")
    forget_peak()
    context = FLContextManager(engine=None, identity_name="server").new_context()
    context.set_prop(AppConstants.CURRENT_ROUND, 0)
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS)
    aggregator.handle_event(EventType.START_RUN, context)
    made = [update(seed) for seed in range(min(UPDATES, 4))]
    seconds = 0.0
    for number in range(UPDATES):
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 100 + number}
        shareable = DXO(DataKind.WEIGHTS, data=made[number % len(made)], meta=meta).to_shareable()
        shareable.set_peer_props({ReservedKey.IDENTITY_NAME: f"site-{number}"})
        shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
        begin = time.process_time()
        assert aggregator.accept(shareable, context)
        seconds += time.process_time() - begin
    begin = time.process_time()
    aggregator.aggregate(context)
    end = (time.process_time() - begin) * 1e3
    return {"add_ms": seconds * 1e3 / UPDATES, "end_ms": end, "base_bytes": base, "peak_bytes": memory("VmHWM")}


os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.disable(logging.WARNING)
print(json.dumps({"flower": flower, "flare": flare}[sys.argv[1]]()))
