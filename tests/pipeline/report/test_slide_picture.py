"""Pictures of slides: the same drawing as pixels, SVG and PDF, the slide alone as pixels in them."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from longslide.pipeline.predict.overlay import tile_raster
from longslide.pipeline.report.picture_parts import Pen, text_width
from longslide.pipeline.report.slide_picture import SlidePicture, covered_pixels, fitted, tile_lines
from PIL import Image

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def picture() -> SlidePicture:
    tissue = np.random.default_rng(0).integers(150, 255, (200, 300, 3), np.uint8)
    drawn = SlidePicture(340, 300)
    panel = drawn.image((20, 10), tissue)
    panel.draw([np.array([[50, 50], [250, 50], [250, 150], [50, 150], [50, 50]])], Pen((213, 94, 0), 2, hatch=(45,)))
    panel.draw([np.array([[280, 20], [900, 20]])], Pen((0, 0, 255), 4, dashed=True))
    drawn.image((20, 10), np.full((5, 5, 4), (9, 9, 9, 100), np.uint8))
    drawn.text((20, 250), "Köln <a> & 0.5 µm², žluťoučký", 14)
    drawn.scale_bar((20, 280), 200, 0.001, 14)
    return drawn


def test_an_svg_has_text_as_text_lines_as_lines_and_the_slide_as_jpeg(picture: SlidePicture) -> None:
    root = ElementTree.fromstring(picture.svg())
    assert [text.text for text in root.iter(f"{SVG}text")] == ["Köln <a> & 0.5 µm², žluťoučký", "0.2 mm"]
    paths = [path.get("d", "") for path in root.iter(f"{SVG}path")]
    assert "M70 60L270 60L270 160L70 160L70 60" in paths
    kinds = [re.match("data:image/(.*);", image.get("{http://www.w3.org/1999/xlink}href", "")) for image in root.iter(f"{SVG}image")]  # fmt: skip # noqa: E501
    assert [kind and kind[1] for kind in kinds] == ["jpeg", "png"], "what is transparent is PNG"


def test_a_pdf_has_the_slide_as_jpeg_and_text_in_a_font_of_its_own(picture: SlidePicture) -> None:
    content = picture.pdf()
    assert content.count(b"/DCTDecode") == 1
    assert b"/FontFile2" in content
    assert b"/ToUnicode" in content
    assert content == picture.pdf(), "the same picture gives the same bytes"


def test_pixels_show_the_slide_unscaled_and_what_is_drawn_ends_at_its_edge(picture: SlidePicture) -> None:
    pixels = np.asarray(picture.pixels()).astype(int)
    assert pixels.shape == (300, 340, 3)
    orange = (np.abs(pixels - (213, 94, 0)).max(-1) < 50)[10:210, 20:320]
    assert orange[48:52, 60:240].any(0).all(), "the line"
    assert 0.05 < orange[60:140, 60:240].mean() < 0.3, "its hatch"
    assert not orange[:45].any()
    blue = (pixels[..., 2] - pixels[..., 0] > 100) & (pixels[..., 1] < 160)
    assert blue[:, :320].any()
    assert not blue[:, 320:].any(), "past the edge of the slide"
    again = np.asarray(Image.open(io.BytesIO(save(picture))))
    assert (again[215:230, 20:300] == pixels[215:230, 20:300]).all()


def save(picture: SlidePicture) -> bytes:
    content = io.BytesIO()
    picture.pixels().save(content, "PNG")
    return content.getvalue()


def test_lines_that_tiles_share_are_drawn_once_and_go_on_from_tile_to_tile() -> None:
    corners = np.array([[0, 0], [10, 0], [20, 0], [0, 10], [10, 10], [40, 10]], float)
    lines = {tuple(line.ravel()) for line in tile_lines(corners, np.array([10.0, 10.0]))}
    across = {(0, 0, 30, 0), (0, 10, 30, 10), (40, 10, 50, 10), (0, 20, 20, 20), (40, 20, 50, 20)}
    down = {(0, 0, 0, 20), (10, 0, 10, 20), (20, 0, 20, 20), (30, 0, 30, 10), (40, 10, 40, 20), (50, 10, 50, 20)}
    assert lines == across | down
    assert len(tile_lines(corners[:1], np.array([10.0, 10.0]), crossed=True)) == 6


def test_small_tiles_cover_the_pixels_that_their_scores_would() -> None:
    cells = np.argwhere(np.random.default_rng(1).random((40, 30)) < 0.4)[:, ::-1]
    coords = cells * 37
    scale = np.array([100, 120]) / (30 * 37, 40 * 37)
    raster = tile_raster(coords, 37, np.ones(len(coords)), (0, 0, 30 * 37, 40 * 37), (100, 120))
    np.testing.assert_array_equal(covered_pixels(coords * scale, 37 * scale, (120, 100)), ~np.isnan(raster))


def test_a_line_that_does_not_fit_is_smaller_and_then_cut() -> None:
    assert fitted("short", 200, 20) == ("short", 20)
    text, size = fitted("a name of thirty letters or so", 200, 20)
    assert text == "a name of thirty letters or so"
    assert 10 <= size < 20
    text, size = fitted("a long name " * 20, 200, 20)
    assert text.endswith("…")
    assert text_width(text, size) <= 200


def test_a_legend_of_long_names_ends_within_the_picture() -> None:
    drawn = SlidePicture(320, 80)
    drawn.legend(
        (10, 10), 300, [(Pen((0, 0, 0)), "for " + "a class of a very long name " * 4), (Pen((0, 0, 0)), "b")], 14
    )
    pixels = np.asarray(drawn.pixels())
    assert (pixels[:, 311:] == 255).all()
    assert "…" in drawn.svg().decode()


def test_a_name_that_is_no_text_is_shown_in_every_format() -> None:
    drawn = SlidePicture(100, 40)
    drawn.text((5, 20), "a\x01b\udce9 <c>", 14)
    [text] = ElementTree.fromstring(drawn.svg()).iter(f"{SVG}text")
    assert text.text == "a\ufffdb\ufffd <c>"
    assert drawn.pdf().startswith(b"%PDF")
    assert (np.asarray(drawn.pixels()) < 100).any()
