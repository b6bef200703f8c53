"""Pictures: windows, colours, what is refused, what is kept in memory."""

from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.images import ImageError, Images, Maps, grey_png, heatmap_png, read_maps, to_stack
from edge_agent.recent import Recent
from models import phantoms
from models.preprocess import Volume
from tests.edge_agent.review_support import T0, make_box


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED), np.uint8)


def volume(values: NDArray[np.floating], modality: str = "CT", **others: object) -> Volume:
    return Volume(values.astype(np.float32), (1.0, 1.0, 1.0), modality, **others)  # type: ignore[arg-type]


def maps_of(map_SHW: NDArray[np.floating], *source_index: int) -> Maps:
    weights_S = np.full(len(source_index), 1 / len(source_index), np.float32)
    return Maps(map_SHW.astype(np.float16), weights_S, np.array(source_index))


RAMP = np.tile(np.linspace(-1000.0, 1000.0, 201), (2, 20, 1))  # 10 units a column


def test_a_window_spreads_its_units_over_all_greys() -> None:
    grey_YX = decoded(grey_png(to_stack(volume(RAMP)), 0, (0.0, 400.0)))
    assert grey_YX.shape == (20, 201)
    assert (grey_YX[:, :81] == 0).all()  # up to -200
    assert (grey_YX[:, 121:] == 255).all()
    assert abs(int(grey_YX[0, 100]) - 127) <= 1  # 0 units
    assert abs(int(grey_YX[0, 110]) - 191) <= 1  # 100 units


def test_the_images_own_window_is_shown_first() -> None:
    own = to_stack(volume(RAMP, window=(500.0, 100.0)))
    assert (own.windows[0].name, own.windows[0].center, own.windows[0].width) == ("Image", 500.0, 100.0)
    assert grey_png(own, 1) == grey_png(own, 1, (500.0, 100.0))


@pytest.mark.parametrize("window", [None, (0.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_without_a_usable_window_presets_are_there(window: tuple[float, float] | None) -> None:
    assert to_stack(volume(RAMP, window=window)).windows[0].name == "Soft tissue"
    assert to_stack(volume(RAMP, "MR", window=window)).windows[0].name == "Balanced"


def test_a_flat_or_broken_image_still_gives_a_picture() -> None:
    flat = to_stack(volume(np.full((1, 20, 20), 7.0), "XR"))
    assert decoded(grey_png(flat, 0)).shape == (20, 20)
    holes = np.where(RAMP > 990, np.nan, RAMP)
    assert decoded(grey_png(to_stack(volume(holes, "MR")), 0)).shape == (20, 201)


def test_pixels_are_square_on_the_screen_and_large_images_are_scaled_down() -> None:
    tall = Volume(np.zeros((1, 100, 100), np.float32), (1.0, 2.0, 1.0), "MR")
    assert to_stack(tall).display_YX == (200, 100)
    assert to_stack(volume(np.zeros((1, 3000, 2000)), "XR")).display_YX == (1600, 1067)


def test_the_heatmap_covers_the_image_and_is_clear_where_weak() -> None:
    map_SHW = np.zeros((1, 4, 4))
    map_SHW[0, 0, 0] = 1.0
    rgba_YXC = decoded(heatmap_png(maps_of(map_SHW, 1), to_stack(volume(np.zeros((2, 40, 80)))), 1))
    assert rgba_YXC.shape == (40, 80, 4)
    assert rgba_YXC[0, 0, 3] == 255  # opaque where the evidence is full
    assert (rgba_YXC[20:, :, 3] == 0).all()


def test_the_heatmap_of_a_large_image_is_small_and_of_its_shape() -> None:
    rgba_YXC = decoded(heatmap_png(maps_of(np.ones((1, 4, 4)), 0), to_stack(volume(np.zeros((1, 3000, 2250)))), 0))
    assert rgba_YXC.shape == (512, 384, 4)


def test_a_slice_that_was_not_read_has_a_clear_heatmap() -> None:
    rgba_YXC = decoded(heatmap_png(maps_of(np.ones((1, 4, 4)), 1), to_stack(volume(np.zeros((2, 40, 40)))), 0))
    assert (rgba_YXC[..., 3] == 0).all()


@pytest.mark.parametrize("z", [-1, 2, 10**9])
def test_there_is_no_slice_beyond_the_series(z: int) -> None:
    stack = to_stack(volume(RAMP))
    with pytest.raises(ImageError, match="has 2"):
        grey_png(stack, z)
    with pytest.raises(ImageError, match="has 2"):
        heatmap_png(maps_of(np.ones((1, 4, 4)), 0), stack, z)


def test_missing_and_damaged_heatmaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        read_maps(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 not really")
    with pytest.raises(ImageError):
        read_maps(tmp_path / "bad.npz")
    np.savez(tmp_path / "odd.npz", map_SHW=np.ones((2, 3)), slice_weights_S=np.ones(2), source_index_S=np.arange(2))
    with pytest.raises(ImageError, match="shape"):
        read_maps(tmp_path / "odd.npz")


def test_a_series_is_decoded_once_and_shows_the_phantom(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    phantom = phantoms.phantom("CT", "nodule", 3)
    series_no = box.receive(phantom, 7, T0)
    images = Images(tmp_path)
    stack = images.stack(box.db, series_no)
    assert images.stack(box.db, series_no) is stack
    voxels_ZYX = stack.low + stack.levels_ZYX * stack.step
    np.testing.assert_allclose(voxels_ZYX, phantom.volume.voxels_ZYX, atol=0.6)  # the files hold whole numbers
    with pytest.raises(ImageError, match="no images"):
        images.stack(box.db, 99)


def test_recent_forgets_what_was_used_longest_ago() -> None:
    recent: Recent[str, int] = Recent(10, lambda value: value)
    recent.get("a", lambda: 4)
    recent.get("b", lambda: 4)
    recent.get("a", lambda: 0)  # used again
    recent.get("c", lambda: 4)
    assert [recent.get(key, lambda: 1) for key in ("a", "c", "b")] == [4, 4, 1]
    assert recent.get("large", lambda: 1000) == recent.get("large", lambda: 0) == 1000


def test_recent_keeps_nothing_of_a_failure() -> None:
    recent: Recent[str, int] = Recent(10)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 5) == 5


def test_recent_computes_once_for_all_who_wait() -> None:
    recent: Recent[str, int] = Recent(10)
    computed: list[int] = []
    threads = [Thread(target=lambda: recent.get("a", lambda: computed.append(1) or 1)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [1]
