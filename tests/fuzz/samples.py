"""Valid inputs to start from: one message of each kind, and the plan of a small round.

Reads and writes values in memory.
Never a secret of anything but these tests.
Source: fleet_link.messages.
"""

from typing import Any

from fleet_link import messages
from fleet_link.messages import AnyMessage, RoundPlan, SignedKeys

ID, DIGEST = "0" * 32, "a" * 64


def plan(sealing_key: bytes, **changes: Any) -> RoundPlan:
    values: dict[str, Any] = {
        "message_id": ID,
        "round_id": "round-1",
        "kind": "masked",
        "base_digest": DIGEST,
        "rule": "fedavg",
        "trainable": "all",
        "clip_norm": 1.0,
        "epochs": 2,
        "learning_rate": 0.001,
        "min_examples": 4,
        "seed": 7,
        "sealing_key": sealing_key,
        "deadline_unix_s": 2_000_000_000.0,
    }
    return RoundPlan(**(values | changes))


def every_message() -> list[AnyMessage]:
    keys = SignedKeys(
        share_key=b"s" * 32, mask_key=b"m" * 32, self_commitment=b"c" * 32, signature=b"g" * 70, certificate=b"d" * 400
    )
    of_round: dict[str, Any] = {"message_id": ID, "round_id": "round-1"}
    of_cohort = of_round | {"cohort_digest": b"d" * 32}
    packets = {"box-02": b"p" * 60, "box-03": b"q" * 60}
    return [
        heartbeat(),
        plan(b"k" * 1216),
        messages.RoundAnswer(**of_round, joins=True, examples=5),
        messages.RoundClosed(**of_round, outcome="released"),
        messages.RoundKeys(**of_round, plan_digest=b"p" * 32, keys=keys),
        messages.Cohort(**of_round, names=("box-01", "box-02"), keys_digests=b"k" * 64, neighbours={"box-02": keys}),
        messages.Shares(**of_cohort, sealed=packets),
        messages.SharesForwarded(**of_cohort, sealed=packets),
        messages.Survivors(**of_cohort, active=("box-01", "box-02"), dropped=("box-03",)),
        messages.SurvivorsSigned(**of_round, signature=b"s" * 70),
        messages.Agreement(**of_round, signatures={"box-02": b"s" * 70}),
        messages.Unmask(**of_round, self_shares={"box-02": b"s" * 16}, mask_shares={"box-03": b"m" * 16}),
        *releases(),
        *transfers(),
    ]


def heartbeat() -> messages.Heartbeat:
    return messages.Heartbeat(
        message_id=ID,
        software_version="0.1.0",
        bundle_digest=DIGEST,
        release_version=3,
        provider="CPUExecutionProvider",
        uptime_s=10,
        series_read=5,
        series_abstained=1,
        series_failed=0,
        quarantined=0,
        reviews=4,
        reviews_agreed=3,
        outbox_pending=0,
        disk_free_bytes=2**40,
        rounds=(messages.RoundStatus(round_id="round-1", state="training"),),
        alarms=("disk nearly full",),
    )


def releases() -> list[AnyMessage]:
    of_bundle: dict[str, Any] = {"message_id": ID, "bundle_digest": DIGEST}
    return [
        messages.ReleaseOffer(
            **of_bundle,
            release_version=4,
            bundle_size=1000,
            roots=(b"{}",),
            timestamp=b"{}",
            snapshot=b"{}",
            targets=b"{}",
        ),
        messages.BundleRequest(**of_bundle),
        messages.ReleaseReport(**of_bundle, release_version=4, outcome="refused", reason="worse on held-out cases"),
    ]


def transfers() -> list[AnyMessage]:
    return [
        messages.TransferOffer(
            message_id=ID,
            transfer_id="1" * 32,
            kind="update",
            subject="round-1",
            sha256=DIGEST,
            size=3000,
            chunk_bytes=1024,
        ),
        messages.TransferProgress(message_id=ID, transfer_id="1" * 32, received_bitmap=b"\x05"),
        messages.TransferReceipt(message_id=ID, transfer_id="1" * 32, accepted=False, reason="wrong digest"),
        messages.Receipt(message_id=ID, of="2" * 32),
    ]
