"""Tiled TIFF files by their native tiles: OpenSlide's pixels where it reads the file, the file's own where it does not."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides import tiled_tiff
from longslide.data.slides.native_tiles import NativeTiles
from longslide.data.slides.slide import open_slide
from longslide.data.slides.tiled_tiff import TiledTiffReader
from longslide.errors import LongslideError

from . import tiff_files as files

JPEG = {
    "420": {"subsampling": "420"},
    "422": {"subsampling": "422"},
    "444": {"subsampling": "444"},
    "own-tables": {"shared_tables": False},
    "rgb": {"rgb": True},
    "aperio-420": {"aperio": True},
    "aperio-rgb": {"aperio": True, "rgb": True, "downsamples": (1, 4, 16)},
    "tiles-of-48": {"tile": 48},
    "tiles-of-256": {"tile": 256, "downsamples": (1, 2, 3.3)},
    "missing": {"missing": (0, 7)},
    "aperio-missing": {"aperio": True, "missing": (7,), "downsamples": (1, 4, 16)},
}
OTHER = {
    "raw": {"compression": "none", "tile": 256},
    "lzw": {"compression": "lzw"},
    "lzw-predicted": {"compression": "lzw", "predictor": True},
    "deflate": {"compression": "deflate"},
    "deflate-predicted": {"compression": "zlib", "predictor": True, "downsamples": (1, 2, 4)},
    "packbits": {"compression": "packbits"},
    "zstd": {"compression": "zstd", "predictor": True},
    "aperio-jpeg2000": {"compression": "aperio_jp2000_rgb", "description": "Aperio Image\r\n|MPP = 0.5"},
}


def write(path: Path, kind: str, image: np.ndarray | None = None) -> Path:
    path = path / (f"{kind}.svs" if "aperio" in kind else f"{kind}.tif")
    image = files.tissue() if image is None else image
    if kind in JPEG:
        files.write_jpeg_tiff(path, image, **JPEG[kind])
    else:
        files.write_tiff(path, image, **OTHER[kind])
    return path


@pytest.mark.parametrize("kind", [*JPEG, *OTHER])
def test_pixels_equal_openslides_on_every_level_inside_across_and_outside_borders(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    with open_slide(path) as slide, open_slide(path, reader="openslide") as reference:
        assert slide.reader == "tiff"
        assert slide.remark.endswith("shown as glass, as another level shows nothing there: 1") == (
            kind == "aperio-missing"
        )
        assert bool(slide.remark) == (kind == "aperio-missing")
        assert slide.level_dimensions == reference.level_dimensions
        assert slide.level_downsamples == reference.level_downsamples
        assert slide.properties == reference.properties
        assert slide.quickhash == reference.quickhash
        assert slide.mpp == reference.mpp
        rng = np.random.default_rng(7)
        for level, (width, height) in enumerate(slide.level_dimensions):
            whole = slide.read_region(0, 0, level, width, height)
            np.testing.assert_array_equal(whole, reference.read_region(0, 0, level, width, height))
            assert whole.std() > 5
            for _ in range(25):
                x, y = (int(rng.integers(-300, edge + 100)) for edge in slide.dimensions)
                region = (x, y, level, *rng.integers(1, 300, 2).tolist())
                np.testing.assert_array_equal(slide.read_region(*region), reference.read_region(*region), str(region))


@pytest.mark.slow
@pytest.mark.parametrize("downsample", [2, 2.5, 4.003, 16])
def test_regions_over_4096_px_are_openslides_too(tmp_path: Path, downsample: float) -> None:
    path = tmp_path / "a.tif"
    y, x = np.mgrid[0:1100, 0:12_500]
    image = np.stack([x % 251, y % 241, (x * 7 + y * 3) % 199], axis=-1).astype(np.uint8)
    files.write_tiff(path, image, tile=512, downsamples=(1, downsample), compression="zlib")
    with open_slide(path) as slide, open_slide(path, reader="openslide") as reference:
        assert slide.reader == "tiff"
        for region in [(0, 0, 0, 9000, 600), (77, 31, 1, 5000, 300), (-900, -44, 1, 4500, 200)]:
            np.testing.assert_array_equal(slide.read_region(*region), reference.read_region(*region))


PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">
<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">"0.00025" "0.00025"</Attribute>
<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>
<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004"
 PMSVR="IString">WSI</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01"
 PMSVR="IDataObjectArray"><Array>{levels}</Array></Attribute></DataObject></Array></Attribute></DataObject>"""
PHILIPS_LEVEL = """<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028"
 Element="0x0030" PMSVR="IDoubleArray">"{mm}" "{mm}"</Attribute></DataObject>"""


def test_philips_levels_padded_to_whole_tiles_are_openslides(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    levels = "".join(PHILIPS_LEVEL.format(mm=0.00025 * one) for one in (1, 2, 4))
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(files.levels_of(files.tissue(), (1, 2, 4))):
            padded = np.pad(level, ((0, -level.shape[0] % 256), (0, -level.shape[1] % 256), (0, 0)), mode="edge")
            file.write(
                iter([files.jpeg(tile) for tile in files.tiles_of(padded, 256)]),
                shape=padded.shape,
                dtype="uint8",
                tile=(256, 256),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                description=PHILIPS.format(levels=levels) if number == 0 else None,
                software="Philips DP v1.0",
                subfiletype=int(number > 0),
                metadata=None,
            )
    files.without_bytes(path, 3)
    with open_slide(path) as slide, open_slide(path, reader="openslide") as reference:
        assert slide.vendor == "philips"
        assert slide.reader == "tiff"
        assert slide.mpp.value == pytest.approx(0.25)
        assert slide.level_dimensions == reference.level_dimensions
        for level, (width, height) in enumerate(slide.level_dimensions):
            for region in [(0, 0, level, width + 50, height + 50), (333, 222, level, 300, 200)]:
                np.testing.assert_array_equal(slide.read_region(*region), reference.read_region(*region))


def test_a_file_with_another_pixel_is_left_to_openslide_with_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "420")
    honest = NativeTiles.decode

    def one_pixel_off(self: NativeTiles, parts: list[bytes], *given: object, **more: object) -> np.ndarray:
        pixels = honest(self, parts)
        pixels[130, 130, 1] ^= 1
        return pixels

    monkeypatch.setattr(NativeTiles, "decode", one_pixel_off)
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
        assert "other pixels than OpenSlide" in slide.remark


@pytest.mark.parametrize("codec", ["webp", "jpeg2000", "jpegxl"])
def test_codecs_that_openslide_lacks_are_read(tmp_path: Path, codec: str) -> None:
    path, image = tmp_path / "a.tif", files.tissue()
    files.write_tiff(
        path, image, compression=codec, compressionargs={"lossless": True} if codec != "jpeg2000" else None
    )
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        assert slide.mpp.value == pytest.approx(0.5)
        assert slide.level_dimensions == ((1003, 777), (251, 194))
        read = slide.read_region(100, 50, 0, 600, 500)
        np.testing.assert_array_equal(read, image[50:550, 100:700])
        assert (slide.read_region(1000, 770, 0, 50, 50)[7:, 3:] == 255).all()


@pytest.mark.parametrize("predictor", [False, True])
def test_colours_in_separate_planes_are_put_together(tmp_path: Path, predictor: bool) -> None:
    path, image = tmp_path / "a.tif", files.tissue()
    files.write_tiff(path, image, compression="zlib", predictor=predictor, planarconfig="separate")
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, 1003, 777), image)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("white", [4095, 65535])
def test_16_bits_are_scaled_by_the_files_own_word(tmp_path: Path, white: int, byteorder: str) -> None:
    path, image = tmp_path / "a.tif", files.tissue()
    deep = np.round(image / 255 * white).astype(np.uint16)
    how = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None, "byteorder": byteorder}
    tifffile.imwrite(path, deep, extratags=[(281, 3, 3, (white,) * 3, True)], **how)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, 1003, 777), image)
    ome = {"axes": "YXS", "SignificantBits": white.bit_length()}
    tifffile.imwrite(tmp_path / "a.ome.tif", deep, **how | {"metadata": ome})
    with open_slide(tmp_path / "a.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, 1003, 777), image)
    tifffile.imwrite(path, deep, **how)
    with pytest.raises(LongslideError, match="3 channels of 16 bits"):
        open_slide(path)


def test_an_ome_tiff_has_the_levels_of_its_sub_directories(tmp_path: Path) -> None:
    path, image = tmp_path / "a.ome.tif", files.tissue()
    stated = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    how = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(image, subifds=2, metadata=stated, **how)
        for level in files.levels_of(image, (1, 2, 4))[1:]:
            file.write(level, subfiletype=1, metadata=None, **how)
    with open_slide(path) as slide:
        assert slide.level_dimensions == ((1003, 777), (502, 388), (251, 194))
        assert slide.mpp.value == pytest.approx(0.25)
        np.testing.assert_array_equal(slide.read_region(40, 30, 0, 500, 400), image[30:430, 40:540])
        smallest = files.levels_of(image, (1, 4))[1]
        np.testing.assert_array_equal(slide.read_region(0, 0, 2, 251, 194), smallest)


def test_a_reader_that_is_sent_to_another_process_reads_the_same(tmp_path: Path) -> None:
    for path in (write(tmp_path, "420"), write(tmp_path, "aperio-missing")):
        with open_slide(path) as slide:
            sent = pickle.loads(pickle.dumps(slide._reader))
            for level in range(len(slide.level_dimensions)):
                region = (333, 111, level, 150, 140)
                np.testing.assert_array_equal(sent.read_region(*region), slide.read_region(*region))
            sent.close()


def test_the_cache_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    reader = TiledTiffReader(write(tmp_path, "420"))
    reader.cache_bytes = 5 * 240 * 240 * 3
    whole = reader.read_region(0, 0, 0, *reader.dimensions)
    assert len(reader._cache) == 5
    np.testing.assert_array_equal(reader.read_region(0, 0, 0, *reader.dimensions), whole)
    reader.close()


def test_rows_of_tiles_read_one_below_the_other_decode_each_native_tile_once_and_keep_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "tiles-of-48")
    monkeypatch.setattr(tiled_tiff, "_LEAST_CACHE", 0)
    decoded: list[NativeTiles] = []
    decode = NativeTiles.decode

    def counted(tiles: NativeTiles, parts: list[bytes], out: np.ndarray | None, *, height: int) -> np.ndarray:
        decoded.append(tiles)
        return decode(tiles, parts, out, height=height)

    with open_slide(path, reader="tiff") as slide:
        reader = slide._reader
        assert isinstance(reader, TiledTiffReader)
        reader._cache.clear()  # of what was compared at opening
        reader._cached = 0
        monkeypatch.setattr(NativeTiles, "decode", counted)
        whole = slide.read_region(0, 0, 0, 1003, 777)
        native = len(decoded)
        assert native == 21 * 17
        assert len(reader._cache) == 8 * 21
        reader._cache.clear()
        reader._cached = 0
        tile = np.empty((64, 64, 3), np.uint8)
        for y in range(0, 704, 64):
            for x in range(0, 960, 64):
                slide.read_into(x, y, 0, tile)
                np.testing.assert_array_equal(tile, whole[y : y + 64, x : x + 64])
                np.testing.assert_array_equal(tile, slide.read_region(x, y, 0, 64, 64))
        assert len(decoded) - native == 20 * 15


@pytest.mark.parametrize("kind", ["tiles-of-256", "raw"])
def test_a_native_tile_read_as_it_lies_goes_straight_to_its_place(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    with open_slide(path, reader="tiff") as slide, open_slide(path, reader="openslide") as reference:
        for x, y in ((0, 0), (512, 256), (256, 512), (768, 256), (-256, 0)):  # the last three stick out
            expected = reference.read_region(x, y, 0, 256, 256)
            wide = np.zeros((256, 300, 3), np.uint8)
            for _ in range(2):
                tile = np.zeros((256, 256, 3), np.uint8)
                slide.read_into(x, y, 0, tile)
                np.testing.assert_array_equal(tile, expected)
                slide.read_into(x, y, 0, wide[:, :256])
                np.testing.assert_array_equal(wide[:, :256], expected)
            assert not wide[:, 256:].any()


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


def zeros_within(content: bytes) -> bytes:
    return content[: len(content) // 3] + bytes(len(content) // 3) + content[len(content) // 3 * 2 :]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2)


@pytest.mark.parametrize("kind", ["420", "aperio-rgb", "lzw", "deflate-predicted", "zstd", "aperio-jpeg2000"])
@pytest.mark.parametrize("damage", [zeros, zeros_within, cut])
def test_a_damaged_native_tile_is_an_error_and_its_neighbours_are_whole(
    tmp_path: Path, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    path = write(tmp_path, kind)
    with open_slide(path) as slide:
        expected = slide.read_region(480, 240, 0, 240, 240)
    offset, count = files.places(path)[6]  # five tiles a row: (1, 1)
    files.overwrite(path, offset, damage(path.read_bytes()[offset : offset + count]))
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        with pytest.raises(
            LongslideError, match=r"cannot read 100 x 90 px at \(300, 300\), level 0: native tile \(1, 1\)"
        ):
            slide.read_region(300, 300, 0, 100, 90)
        np.testing.assert_array_equal(slide.read_region(480, 240, 0, 240, 240), expected)


def test_openslide_agrees_on_which_tiles_are_damaged(tmp_path: Path) -> None:
    path = write(tmp_path, "420")
    rng = np.random.default_rng(0)
    for offset, count in files.places(path):
        files.overwrite(path, int(offset + rng.integers(20, count - 40)), bytes(16))
    with open_slide(path) as slide, open_slide(path, reader="openslide") as reference:
        damaged = 0
        for x in range(0, 1003, 240):
            for y in range(0, 777, 240):
                results: list[np.ndarray | None] = []
                for reader in (slide, reference):
                    try:
                        results.append(reader.read_region(x, y, 0, 240, 240))
                    except LongslideError:
                        results.append(None)
                assert (results[0] is None) == (results[1] is None)
                damaged += results[0] is None
                if results[0] is not None:
                    np.testing.assert_array_equal(*results)
    assert damaged > 10


def test_a_file_that_ends_before_its_pixels_do_is_called_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, "420")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LongslideError, match="truncated"):
        open_slide(path)


def test_zeros_that_openslide_passes_over_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path, "deflate-predicted")
    with tifffile.TiffFile(path) as file:
        counts = file.pages.first.databytecounts
    number = int(np.argmax(counts))  # the tile that is compared with OpenSlide's at opening
    offset, count = files.places(path)[number]
    files.overwrite(path, offset + count // 2, bytes(count // 2))
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        with pytest.raises(LongslideError, match="native tile"):
            slide.read_region(number % 5 * 240, number // 5 * 240, 0, 100, 100)


def test_a_reduced_level_is_never_taken_for_a_broken_level_0(tmp_path: Path) -> None:
    path = write(tmp_path, "deflate-predicted")
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.tags[322].offset  # the tile width becomes a tag that nobody knows
    files.overwrite(path, offset, b"\x01\xff")
    with pytest.raises(LongslideError):
        open_slide(path)


def test_a_brightfield_qptiff_has_its_levels_and_the_mpp_of_its_resolution(tmp_path: Path) -> None:
    path, levels = tmp_path / "a.qptiff", files.levels_of(files.tissue(), (1, 2))
    tag = "PerkinElmer-QPI-ImageDescription"
    kind = f'<?xml version="1.0"?><{tag}><ImageType>{{}}</ImageType></{tag}>'
    how = {"photometric": "rgb", "compression": "jpeg", "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for picture, name, tile in (
            (levels[0], "FullResolution", (256, 256)),
            (levels[0][::8, ::8], "Thumbnail", None),
            (levels[1], "ReducedResolution", (256, 256)),
        ):
            reduced = int(name == "ReducedResolution")
            described = {"description": kind.format(name), "software": "PerkinElmer-QPI", "subfiletype": reduced}
            file.write(picture, tile=tile, metadata=None, **described, **how)
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        assert slide.level_dimensions == ((1003, 777), (502, 388))
        assert slide.mpp.value == pytest.approx(0.5)
        assert np.abs(slide.read_region(0, 0, 0, 1003, 777).astype(int) - files.tissue()).mean() < 5
