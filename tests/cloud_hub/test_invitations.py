"""A round starts only on a base that can be trained."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select

from cloud_hub import releases
from cloud_hub.database import Certificate, Device, Release
from cloud_hub.rollout import Stage
from fleet_link.errors import SiteError
from models.bundle import SHIPPED, BundleParts, read_bundle, write_bundle
from models.spec import IMPORTED
from tests.cloud_hub.round_support import RoundHub, make_round_hub, needs_bundle

pytestmark = needs_bundle


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RoundHub]:
    hub = make_round_hub(tmp_path, "a", "b")
    yield hub
    hub.coordinator.stop()
    hub.files.database.close()


def test_no_round_starts_on_an_imported_network(hub: RoundHub, tmp_path: Path) -> None:
    base = read_bundle(SHIPPED)
    manifest = msgspec.structs.replace(base.manifest, name="elsewhere", network=IMPORTED)
    parts = BundleParts(manifest, base.onnx, {}, base.known_inputs, base.known_outputs, base.card)
    write_bundle(tmp_path / "imported.bundle", parts)
    released = hub.repository.publish(tmp_path / "imported.bundle", round_id="", now=hub.now)
    with hub.files.database.writing() as session:
        releases.add_row(session, released, now=hub.now)
        session.get_one(Release, released.release_version).state = Stage.EVERYONE
    with pytest.raises(SiteError, match="elsewhere 1, is an imported network: there is nothing to train") as refused:
        hub.start()
    assert "release a bundle that was trained" in refused.value.advice


def test_no_round_starts_on_a_base_that_is_lost(hub: RoundHub) -> None:
    (release,) = hub.repository.listed()
    hub.repository.bundle_path(release.bundle_digest).unlink()
    with pytest.raises(SiteError, match="the round's base cannot be read"):
        hub.start()


@pytest.mark.parametrize(("length", "fits"), [(8, True), (63, False)])
def test_no_masked_round_starts_whose_cohort_no_message_can_carry(hub: RoundHub, length: int, fits: bool) -> None:
    names = [f"box-{number:04}".ljust(length, "x") for number in range(1000)]
    with hub.files.database.writing() as session:
        known = session.scalars(select(Certificate).filter_by(device="a")).one()
        session.add_all([Device(device=name, site="north", created_at=hub.now) for name in names])
        session.flush()
        session.add_all(
            Certificate(
                serial=f"{number:x}", device=name, public_key_sha256="", not_after=known.not_after, pem=known.pem
            )
            for number, name in enumerate(names)
        )
    if fits:
        assert hub.start(kind="masked", devices=names).boxes_max == 1000
        return
    with pytest.raises(SiteError, match="1000 devices are invited: a cohort of 1000 is too large for one message"):
        hub.start(kind="masked", devices=names)
    assert hub.start(kind="masked", devices=names[:700]).boxes_max == 700
