"""Opening slides and reading regions."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
from longslide.data.slides import image
from longslide.data.slides import openslide as openslide_module
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_pyramid, write_synthetic_slide
from longslide.errors import LongslideError
from PIL import Image

from .tiff_files import corrupt_native_tile

WIDTH, HEIGHT = 1500, 1100


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 200, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_pyramid(path, picture(), mpp=0.5)
    return path


def real_slide() -> Path:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES, the folder with CMU-1-Small-Region.svs, is not set")
    return Path(folder) / "CMU-1-Small-Region.svs"


def test_a_read_inside_the_real_slide_is_openslides_pixel_for_pixel() -> None:
    path = real_slide()
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.dimensions == reference.dimensions
        assert slide.vendor == "aperio"
        assert slide.mpp.value == pytest.approx(0.499)
        for x, y, width, height in [
            (0, 0, 256, 256),
            (1001, 777, 300, 211),
            (1964, 2711, 256, 256),
            (0, 0, 2220, 2967),
        ]:
            expected = np.asarray(reference.read_region((x, y), 0, (width, height)).convert("RGB"))
            np.testing.assert_array_equal(slide.read_region(x, y, 0, width, height), expected)


def test_a_read_returns_the_pixels_of_the_file(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        read = slide.read_region(200, 300, 0, 400, 350)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, picture()[300:650, 200:600])


@pytest.mark.parametrize("suffix", [".svs", ".tif", ".png"])
@pytest.mark.parametrize("x", [-90, 400, WIDTH - 40])
@pytest.mark.parametrize("y", [-70, 400, HEIGHT - 30])
def test_a_read_that_crosses_a_border_is_padded_with_background(tmp_path: Path, suffix: str, x: int, y: int) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        Image.fromarray(picture()).save(path, compress_level=1)
    else:
        write_pyramid(path, picture(), mpp=0.5)
    canvas = np.full((HEIGHT + 400, WIDTH + 400, 3), 255, np.uint8)
    canvas[200 : 200 + HEIGHT, 200 : 200 + WIDTH] = picture()
    with open_slide(path) as slide:
        assert slide.background == (255, 255, 255)
        read = slide.read_region(x, y, 0, 120, 110)
    np.testing.assert_array_equal(read, canvas[200 + y : 310 + y, 200 + x : 320 + x])


def test_a_read_wholly_outside_is_background(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        assert (slide.read_region(WIDTH + 10, 0, 0, 50, 50) == 255).all()
        assert (slide.read_region(-500, -500, 1, 50, 50) == 255).all()


def test_half_transparent_pixels_are_laid_over_the_background(tmp_path: Path) -> None:
    rgba = np.zeros((50, 50, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        pixel = slide.read_region(10, 10, 0, 1, 1)[0, 0]
    assert pixel.tolist() == [227, 127, 127]


def test_holes_show_the_slides_own_background(tmp_path: Path) -> None:
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[1] = (200, 100, 40, 255)
    rgba[2] = (200, 100, 40, 51)
    rgba[3] = (200, 100, 40, 0)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        slide._reader.background = (10, 20, 250)
        read = slide.read_region(0, 0, 0, 3, 4)
    expected = [(10, 20, 250), (200, 100, 40), (48, 36, 208), (10, 20, 250)]
    assert read[:, 1].tolist() == [list(colour) for colour in expected]


def test_a_plain_image_has_one_level_and_a_digest(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png", compress_level=1)
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.vendor == "image"
        assert slide.level_dimensions == ((WIDTH, HEIGHT),)
        assert len(slide.quickhash) == 64
        np.testing.assert_array_equal(slide.read_region(5, 6, 0, 70, 80), picture()[6:86, 5:75])


def test_the_id_is_the_stem_unless_given(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        assert slide.slide_id == "a"
    with open_slide(slide_path, slide_id="case-1") as slide:
        assert slide.slide_id == "case-1"


def test_threads_read_the_same_pixels(slide_path: Path) -> None:
    corners = [(x, y) for y in range(0, HEIGHT - 100, 90) for x in range(0, WIDTH - 100, 70)]
    whole = picture()
    with open_slide(slide_path) as slide, ThreadPoolExecutor(4) as pool:
        reads = pool.map(lambda corner: slide.read_region(corner[0], corner[1], 0, 100, 100), corners)
        for (x, y), read in zip(corners, reads, strict=True):
            np.testing.assert_array_equal(read, whole[y : y + 100, x : x + 100])


@pytest.mark.parametrize("max_px", [100, 333, 750, 2048])
def test_a_thumbnail_is_the_whole_slide(tmp_path: Path, max_px: int) -> None:
    y, x = np.mgrid[0:1700, 0:2600].astype(np.float32)
    ramp = np.stack([x / 2600 * 240, y / 1700 * 240, np.zeros_like(x)], axis=-1).astype(np.uint8)
    write_pyramid(tmp_path / "a.tif", ramp, mpp=0.5, downsample=4)
    with open_slide(tmp_path / "a.tif") as slide:
        small = slide.thumbnail(max_px)
    assert small.shape == (round(1700 * max_px / 2600), max_px, 3)
    expected_x = (np.arange(max_px) + 0.5) / max_px * 240
    expected_y = (np.arange(len(small)) + 0.5) / len(small) * 240
    assert np.abs(small[..., 0] - expected_x).max() < 2.5
    assert np.abs(small[..., 1] - expected_y[:, None]).max() < 2.5


def test_a_thumbnail_of_a_small_slide_is_not_enlarged(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        np.testing.assert_array_equal(slide.thumbnail(5000), picture())


def test_a_thumbnail_shows_an_unreadable_region_as_background(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, np.full((1024, 1024, 3), 90, np.uint8), mpp=0.5, downsample=1)
    corrupt_native_tile(path, 5)  # row 1, column 1
    with open_slide(path) as slide:
        small = slide.thumbnail(64)
    assert (small[16:32, 16:32] == 255).all()
    small[16:32, 16:32] = 90
    assert (small == 90).all()


def not_a_slide(path: Path) -> None:
    path.write_text("not a slide")


def zero_bytes(path: Path) -> None:
    path.touch()


def truncated_slide(path: Path) -> None:
    write_pyramid(path, picture(), mpp=0.5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def truncated_image(path: Path) -> None:
    Image.fromarray(picture()).save(path, format="png", compress_level=1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sixteen_bits(path: Path) -> None:
    Image.fromarray(picture()[..., 1].astype(np.uint16) * 256).save(path, format="png")


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((2, 2), int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_a_slide, "not a slide"),
        (hdf5, "not a slide or image"),
        (zero_bytes, "empty"),
        (truncated_slide, "truncated|broken"),
        (truncated_image, "truncated|broken"),
        (sixteen_bits, "8-bit|plain PNG image"),
        (Path.mkdir, "folder"),
        (lambda path: None, "No such file"),
    ],
)
@pytest.mark.parametrize("suffix", [".svs", ".ptif", ".png", ".tif"])
def test_what_cannot_be_opened_is_one_line_that_names_the_file(
    tmp_path: Path, make: Callable[[Path], None], message: str, suffix: str
) -> None:
    path = tmp_path / f"bad{suffix}"
    make(path)
    with pytest.raises(LongslideError, match=message) as caught:
        open_slide(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_slide_one_may_not_read_is_not_called_broken(slide_path: Path) -> None:
    slide_path.chmod(0)
    with pytest.raises(LongslideError, match="Permission denied"):
        open_slide(slide_path)


def test_an_unreadable_region_is_named_and_the_others_still_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, picture(), mpp=0.5)
    corrupt_native_tile(path, 0)
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(LongslideError, match=r"a\.tif: cannot read 100 x 90 px at \(20, 30\), level 0"):
                slide.read_region(20, 30, 0, 100, 90)
            np.testing.assert_array_equal(slide.read_region(300, 300, 0, 50, 50), picture()[300:350, 300:350])


def test_a_slide_that_goes_away_under_a_failed_read_stays_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, picture(), mpp=0.5)
    corrupt_native_tile(path, 0)
    original = openslide_module._read_bgra

    def read_and_lose_the_file(handle: openslide.AbstractSlide, *region: int) -> np.ndarray:
        try:
            return original(handle, *region)
        except openslide.OpenSlideError:
            if handle is not first:
                path.unlink(missing_ok=True)
            raise

    with open_slide(path, reader="openslide") as slide:
        first = slide._reader._handle
        monkeypatch.setattr(openslide_module, "_read_bgra", read_and_lose_the_file)
        for x in (20, 300):
            with pytest.raises(LongslideError, match=r"a\.tif: "):
                slide.read_region(x, 20, 0, 50, 50)


def test_failed_reads_leave_no_open_handles_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, picture(), mpp=0.5)
    corrupt_native_tile(path, 0)
    with open_slide(path, reader="openslide") as slide, ThreadPoolExecutor(4) as pool:

        def fails(number: int) -> bool:
            try:
                slide.read_region(number, 0, 0, 20, 20)
            except LongslideError:
                return True
            return False

        assert all(pool.map(fails, range(40)))
        gc.collect()
        handles = [
            item for item in gc.get_objects() if isinstance(item, openslide.OpenSlide) and str(path) in repr(item)
        ]
        assert len(handles) == 1


@pytest.mark.parametrize(
    ("name", "options", "bytes_a_pixel"),
    [
        ("a.png", {}, 4),
        ("a.jpg", {}, 4),
        ("b.jpg", {"progressive": True}, 10),
        ("a.jp2", {}, 20),
        ("a.webp", {}, 16),
        ("a.bmp", {}, 4),
    ],
)
def test_the_memory_that_a_plain_image_takes_is_known_before_it_is_decoded(
    tmp_path: Path, name: str, options: dict[str, Any], bytes_a_pixel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    Image.fromarray(np.full((300, 400, 3), 200, np.uint8)).save(path, **options)
    assert image.decoding_bytes(path) == bytes_a_pixel * 300 * 400
    monkeypatch.setattr(image, "MOST_BYTES", bytes_a_pixel * 300 * 400 - 1)
    with pytest.raises(LongslideError, match=r"400 x 300 px would take .* convert it by `vips tiffsave"):
        open_slide(path)
    assert image.decoding_bytes(path) == 0


def test_slides_that_are_read_piece_by_piece_take_no_memory_of_images(tmp_path: Path) -> None:
    write_synthetic_slide(tmp_path / "a.svs", size=(512, 512))
    write_synthetic_slide(tmp_path / "a.tif", size=(512, 512))
    (tmp_path / "b.png").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "c.png")
    Image.fromarray(np.full((300, 400, 3), 200, np.uint8)).save(tmp_path / "strips.tif")
    for name in ("a.svs", "a.tif", "strips.tif", "b.png", "c.png", "none.png"):
        assert image.decoding_bytes(tmp_path / name) == 0


HELD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from longslide import open_slide

def held() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3

with ThreadPoolExecutor(1) as opens, ThreadPoolExecutor(1) as closes:  # as in a batch
    before = None
    for path in sys.argv[1:] * 2:
        slide = opens.submit(open_slide, path, slide_mpp=0.5).result()
        start = held() - slide.memory_bytes / 1e6 if before is None else start
        if before is not None:
            closes.submit(before.close).result()
        before = slide
    closes.submit(before.close).result()
print(held() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plain_images_that_are_closed_leave_no_memory_behind(tmp_path: Path) -> None:
    pixels = np.full((5000, 6000, 3), 200, np.uint8)
    pixels[::7] = 90
    names = [("a.png", {"compress_level": 1}), ("b.jpg", {"progressive": True}), ("c.jpg", {}), ("d.bmp", {})]
    for name, options in names:
        Image.fromarray(pixels).save(tmp_path / name, **options)
    words = [sys.executable, "-c", HELD, *(str(tmp_path / name) for name, _ in names)]
    held = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert held < 40  # megabytes; a picture takes 120
