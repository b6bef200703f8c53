"""Topics and messages: only what this fleet would have written is read."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_link import messages, topics
from fleet_link.errors import LinkError
from fleet_link.messages import RoundPlan, TransferProgress
from fleet_link.topics import Channel, Direction, Topic


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("channel", Channel)
def test_topic_and_back(direction: Direction, channel: Channel) -> None:
    topic = Topic(direction, "box-1", channel)
    assert topics.parse(str(topic)) == topic


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "wr1/up/box-1",
        "wr1/up/box-1/msg/",
        "wr2/up/box-1/msg",
        "wr1/sideways/box-1/msg",
        "wr1/up/box-1/other",
        "wr1/up/hub/msg",
        "wr1/up/+/msg",
        "wr1/up/Box/msg",
        "wr1/up/box-1\n/msg",
        "$SYS/broker/up/msg",
    ],
)
def test_foreign_topics_are_refused(topic: str) -> None:
    with pytest.raises(LinkError):
        topics.parse(topic)


@given(st.text(max_size=60))
def test_random_topics_are_refused(topic: str) -> None:
    with pytest.raises(LinkError):
        topics.parse(topic)


def test_message_and_back(plan: RoundPlan) -> None:
    assert messages.decode(messages.encode(plan)) == plan


def test_a_plan_that_says_nothing_of_masks_is_written_as_older_software_does(plan: RoundPlan) -> None:
    written = msgspec.msgpack.decode(messages.encode(plan))
    assert not {"min_cohort", "word_bits", "value_bits", "boxes_max", "share", "examples_cap"} & set(written)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "Unknown"},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"clip_norm": float("inf")},
        {"round_id": "round-1\n"},
        {"learning_rate": float("inf")},
        {"deadline_unix_s": float("nan")},
        {"deadline_unix_s": float("inf")},
        {"epochs": 0},
        {"epochs": True},
        {"round_id": "../../etc"},
        {"base_digest": "A" * 64},
        {"base_digest": "a" * 64 + "\n"},
        {"sealing_key": b""},
        {"message_id": "0" * 31},
        {"word_bits": 24},
        {"value_bits": 1},
        {"value_bits": 17},
        {"boxes_max": 0},
        {"boxes_max": 1001},
        {"share": 0.0},
        {"share": 1.1},
        {"share": float("nan")},
        {"examples_cap": 0},
    ],
)
def test_each_wrong_field_is_refused(plan: RoundPlan, changes: dict[str, object]) -> None:
    fields = msgspec.msgpack.decode(messages.encode(plan)) | changes
    with pytest.raises(LinkError):
        messages.decode(msgspec.msgpack.encode(fields))


def test_too_large_is_refused_on_both_sides() -> None:
    message = TransferProgress(message_id="0" * 32, transfer_id="0" * 32, received_bitmap=b"x" * (64 * 1024))
    assert messages.decode(messages.encode(message)) == message
    huge = msgspec.structs.replace(message, received_bitmap=b"x" * (64 * 1024 + 1))
    with pytest.raises(LinkError):
        messages.decode(messages.encode(huge))
    with pytest.raises(LinkError, match="exceeds"):
        messages.encode(msgspec.structs.replace(message, received_bitmap=b"x" * messages.MAX_MESSAGE_BYTES))
    with pytest.raises(LinkError, match="exceeds"):
        messages.decode(b"x" * (messages.MAX_MESSAGE_BYTES + 1))


@given(st.binary(max_size=500))
def test_random_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(LinkError):
        messages.decode(junk)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(LinkError):
        messages.decode(b"\x81\xa1x" + b"\x91" * 50_000)
