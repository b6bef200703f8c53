"""The running sum of masked words: taken only when it is exactly what is asked for; else the files are opened again."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from cloud_hub.collection import Counted, LostError, MaskedCollection, Reader
from cloud_hub.update import MaskedOpener, MaskedUpdate
from fleet_link.messages import RoundPlan

MISSING = Path("/nowhere")


def made() -> MaskedCollection:
    """Its updates are nowhere on disk: a sum that needs the files is a LostError."""
    opener = SimpleNamespace(layout=SimpleNamespace(word_count=2))
    return MaskedCollection(cast(RoundPlan, SimpleNamespace(word_bits=16)), cast(MaskedOpener, opener))


def row(device: str, at: float = 1.0) -> Counted:
    return Counted(device, MISSING, at)


def update(*words: int) -> MaskedUpdate:
    return MaskedUpdate(np.array(words, "<u2").tobytes(), 1, "")


def test_what_was_added_is_the_sum_without_a_file_modulo_the_word() -> None:
    collection = made()
    collection.add(row("a"), update(65535, 1))
    collection.add(row("b"), update(2, 3))
    assert collection.sum([row("b"), row("a")]).words.tolist() == [1, 4]


def test_a_sum_is_given_once() -> None:
    """The masks come off in place: what is left in that memory is no sum of words any more."""
    collection = made()
    collection.add(row("a"), update(1, 1))
    collection.sum([row("a")])
    with pytest.raises(LostError, match="the counted update of a"):
        collection.sum([row("a")])


@pytest.mark.parametrize("wanted", [[row("a")], [row("a"), row("b"), row("c")], [row("a"), row("b", 2.0)]])
def test_a_revoked_late_or_other_update_is_not_in_the_sum_by_mistake(wanted: list[Counted]) -> None:
    collection = made()
    collection.add(row("a"), update(1, 1))
    collection.add(row("b"), update(1, 1))
    with pytest.raises(LostError):
        collection.sum(wanted)


def test_a_box_that_comes_twice_is_not_counted_twice() -> None:
    collection = made()
    collection.add(row("a"), update(1, 1))
    collection.add(row("a", 2.0), update(7, 7))
    with pytest.raises(LostError):
        collection.sum([row("a", 2.0)])


def test_what_fails_while_it_is_added_is_no_sum() -> None:
    collection = made()
    collection.add(row("a"), update(1, 1))
    with pytest.raises(Exception, match="bytes are not 2 words"):
        collection.add(row("b"), update(1, 1, 1))
    with pytest.raises(LostError):
        collection.sum([row("a")])


def test_each_group_has_its_own_sum() -> None:
    collection = made()
    for number, device in enumerate("abc"):
        collection.add(row(device), update(number, 1), group_no=number)
    assert collection.sum([row("c")], group_no=2).words.tolist() == [2, 1]
    assert collection.sum([row("b")], group_no=1).words.tolist() == [1, 1]


def test_the_reader_gives_each_file_as_it_is(tmp_path: Path) -> None:
    reader = Reader()
    for content in (b"long enough", b"short", b"", b"longer than any before"):
        (tmp_path / "update").write_bytes(content)
        assert bytes(reader.read(tmp_path / "update")) == content
