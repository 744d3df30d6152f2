"""Tissue is found where it is, on the slides that make it hard; masks and contours are in level-0 pixels."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from longslide import LongslideError, Slide, open_slide, write_synthetic_slide
from longslide.data.synthetic import write_pyramid
from longslide.data.tissue.base import Tissue
from longslide.data.tissue.mask import read_tissue_mask
from longslide.data.tissue.optical_density import OpticalDensity, find_tissue, segment_tissue
from PIL import Image

WIDTH, HEIGHT, MPP = 512, 384, 8.0
GLASS = (243, 241, 244)
INKS = {"blue": (40, 60, 170), "green": (30, 130, 80), "red": (205, 40, 50), "black": (25, 25, 30)}
Case = tuple[np.ndarray, np.ndarray]


def blank() -> np.ndarray:
    return np.tile(np.uint8(GLASS), (HEIGHT, WIDTH, 1))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A thumbnail of a synthetic slide, and where its tissue is: what differs from a glass of the same seed."""
    path = tmp_path_factory.mktemp("slide") / "slide.svs"
    write_synthetic_slide(path, size=(2048, 1536), mpp=2.0, seed=3)
    with open_slide(path) as slide:
        picture = slide.thumbnail(WIDTH)
    truth = cv2.morphologyEx((picture[..., 1] < 215).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8)) > 0
    return picture, truth


def with_borders(case: Case, colour: tuple[int, int, int]) -> Case:
    picture, truth = case[0].copy(), case[1].copy()
    picture[:30], picture[:, -40:] = colour, colour
    truth[:30], truth[:, -40:] = False, False
    return picture, truth


def with_gaps(case: Case) -> Case:
    picture, truth = case[0].copy(), case[1].copy()
    picture[:, 150:165], picture[100:108] = 255, 255
    truth[:, 150:165], truth[100:108] = False, False
    return picture, truth


def with_pen(case: Case, colour: tuple[int, int, int]) -> Case:
    picture, truth = case[0].copy(), case[1].astype(np.uint8)
    for canvas, ink in ((picture, colour), (truth, 0)):
        cv2.line(canvas, (50, 30), (450, 60), ink, 9, cv2.LINE_AA if canvas is picture else cv2.LINE_8)
        cv2.circle(canvas, (256, 192), 165, ink, 7, cv2.LINE_AA if canvas is picture else cv2.LINE_8)
    return cv2.GaussianBlur(picture, (0, 0), 0.6), truth > 0


def with_coverslip(case: Case) -> Case:
    picture = case[0].copy()
    cv2.rectangle(picture, (15, 15), (495, 370), (165, 165, 160), 3)
    picture[:, 495:] = (228, 228, 225)
    return picture, case[1]


def faint(case: Case) -> Case:
    picture = np.float32(GLASS) + (case[0].astype(np.float32) - np.float32(GLASS)) * 0.22
    return picture.clip(0, 255).astype(np.uint8), case[1]


def as_jpeg(case: Case) -> Case:
    noise = np.random.default_rng(0).normal(0, 4, case[0].shape)
    noisy = (case[0] + noise).clip(0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", noisy[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 30])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1].copy(), case[1]


def with_light_pen(case: Case, colour: tuple[int, int, int]) -> Case:
    """Ink that tissue shows through, and remains tissue."""
    inked, _ = with_pen(case, colour)
    return cv2.addWeighted(inked, 0.6, case[0], 0.4, 0), case[1]


# Absorbance of red, green and blue.
HAEMATOXYLIN, BLUE_HAEMATOXYLIN, DAB = (0.40, 0.43, 0.18), (0.46, 0.38, 0.16), (0.21, 0.35, 0.44)


def stained(case: Case, stain: tuple[float, float, float], strength: float = 1.0) -> Case:
    density = np.maximum(-np.log10(np.maximum(case[0], 1) / np.float64(GLASS)), 0).sum(-1, keepdims=True) * strength
    return (np.float64(GLASS) * 10 ** (-density * np.float64(stain))).clip(0, 255).astype(np.uint8), case[1]


def immunostain(case: Case) -> Case:
    brown = cv2.GaussianBlur(np.random.default_rng(0).normal(size=case[1].shape), (0, 0), 8)[..., None] > 0
    return np.where(brown, stained(case, DAB, 1.2)[0], stained(case, BLUE_HAEMATOXYLIN, 0.6)[0]), case[1]


def on_glass(case: Case, colour: tuple[int, int, int]) -> Case:
    picture = case[0].astype(np.float32) * np.float32(colour) / np.float32(GLASS)
    return (picture + np.random.default_rng(0).normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8), case[1]


def fatty() -> Case:
    picture, truth, mesh = blank(), np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(truth, (250, 200), (125, 90), 0, 0, 360, 1, -1)
    for number, y in enumerate(range(0, HEIGHT, 9)):
        for x in range(0, WIDTH, 9):
            cv2.circle(mesh, (x + number % 2 * 4, y), 5, 1, 1)
    picture[(mesh > 0) & (truth > 0)] = (226, 190, 210)
    return picture, truth > 0


def biopsy(case: Case) -> Case:
    picture, truth = blank(), np.zeros((HEIGHT, WIDTH), np.uint8)
    for centre, angle in (((100, 100), 30), ((250, 250), 80), ((400, 150), -40)):
        cv2.ellipse(truth, centre, (55, 5), angle, 0, 360, 1, -1)
    texture = case[0][case[1]]
    picture[truth > 0] = texture[np.arange(np.count_nonzero(truth)) % len(texture)]
    return picture, truth > 0


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda case: case, 0.97),
        (with_gaps, 0.95),
        (lambda case: with_borders(case, (5, 5, 5)), 0.97),
        (lambda case: with_borders(case, (72, 72, 75)), 0.97),
        (faint, 0.93),
        (lambda case: fatty(), 0.93),
        (lambda case: with_pen(case, INKS["blue"]), 0.88),
        (lambda case: with_pen(case, INKS["green"]), 0.88),
        (lambda case: with_pen(case, INKS["red"]), 0.88),
        (lambda case: with_pen(case, INKS["black"]), 0.9),
        (with_coverslip, 0.97),
        (biopsy, 0.7),
        (as_jpeg, 0.93),
        (lambda case: with_light_pen(case, INKS["blue"]), 0.9),
        (lambda case: with_light_pen(case, INKS["green"]), 0.93),
        (lambda case: with_light_pen(case, INKS["red"]), 0.9),
        (lambda case: with_light_pen(case, INKS["black"]), 0.9),
        (lambda case: stained(case, HAEMATOXYLIN), 0.95),
        (lambda case: stained(case, BLUE_HAEMATOXYLIN), 0.94),
        (lambda case: stained(case, BLUE_HAEMATOXYLIN, 0.3), 0.9),
        (lambda case: stained(case, DAB), 0.95),
        (lambda case: stained(case, DAB, 0.4), 0.8),
        (immunostain, 0.95),
        (lambda case: on_glass(case, (225, 224, 205)), 0.94),
        (lambda case: on_glass(case, (245, 226, 235)), 0.94),
        (lambda case: on_glass(case, (228, 232, 244)), 0.94),
        (lambda case: on_glass(case, (222, 228, 246)), 0.94),
        (lambda case: on_glass(case, (210, 212, 240)), 0.94),
        (lambda case: on_glass(case, (205, 205, 205)), 0.94),
    ],
    ids=[
        "clean", "white gaps", "black borders", "grey borders", "faint", "fatty", "blue pen", "green pen", "red pen",
        "black pen", "coverslip", "biopsy", "jpeg", "light blue pen", "light green pen", "light red pen",
        "light black pen", "haematoxylin", "blue haematoxylin", "pale haematoxylin", "DAB", "pale DAB", "immunostain",
        "yellow glass", "pink glass", "blue glass", "bluer glass", "bluest glass", "grey glass",
    ],
)  # fmt: skip
def test_tissue_is_found_where_it_is(make: Any, least: float, clean: Case) -> None:
    picture, truth = make(clean)
    found = segment_tissue(picture, MPP)
    overlap = (found & truth).sum() / (found | truth).sum()
    assert overlap >= least, f"intersection over union {overlap:.3f}"


EMPTY = (blank(), np.zeros((HEIGHT, WIDTH), bool))


def shaded(case: Case) -> Case:
    picture = on_glass(case, (225, 224, 205))[0] + np.linspace(-12, 12, WIDTH)[None, :, None]
    return picture.clip(0, 255).astype(np.uint8), case[1]


@pytest.mark.parametrize(
    "picture",
    [
        on_glass(EMPTY, GLASS)[0],
        on_glass(EMPTY, (245, 226, 235))[0],
        on_glass(EMPTY, (228, 232, 244))[0],
        on_glass(EMPTY, (210, 212, 240))[0],
        shaded(EMPTY)[0],
        as_jpeg(EMPTY)[0],
        np.full((HEIGHT, WIDTH, 3), 255, np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        with_coverslip(EMPTY)[0],
        *(pen(EMPTY, ink)[0] for pen in (with_pen, with_light_pen) for ink in INKS.values()),
    ],
    ids=[
        "noise", "pink glass", "blue glass", "bluest glass", "shaded", "jpeg", "white", "black", "coverslip",
        *(f"{kind}{ink} pen" for kind in ("", "light ") for ink in INKS),
    ],
)  # fmt: skip
def test_an_empty_slide_has_no_tissue(picture: np.ndarray) -> None:
    assert segment_tissue(picture, MPP).mean() < 0.002


@pytest.fixture
def slide(tmp_path: Path) -> Iterator[Slide]:
    write_pyramid(tmp_path / "slide.tif", np.full((600, 800, 3), 240, np.uint8), mpp=0.5)
    with open_slide(tmp_path / "slide.tif") as opened:
        yield opened


def frame() -> Tissue:
    """A square of 40 mask pixels with a square hole of 20, 10 level-0 pixels each."""
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:60] = True
    mask[20:40, 30:50] = False
    return Tissue(mask, (10.0, 10.0), "by hand")


def test_contours_are_outlines_with_holes_in_level_0_pixels() -> None:
    [[outline, hole]] = frame().contours
    assert np.abs(outline.min(0) - [200, 100]).max() <= 5
    assert np.abs(outline.max(0) - [600, 500]).max() <= 5
    assert np.abs(hole.min(0) - [300, 200]).max() <= 10
    assert np.abs(hole.max(0) - [500, 400]).max() <= 10


def test_the_area_is_in_square_millimetres() -> None:
    assert frame().area_mm2(0.5) == pytest.approx((40**2 - 20**2) * (10 * 0.5 / 1000) ** 2)


def test_geojson_has_closed_rings_wound_as_rfc_7946_asks() -> None:
    content = json.loads(frame().to_geojson())
    assert content["type"] == "FeatureCollection"
    [feature] = content["features"]
    assert feature["type"] == "Feature"
    assert feature["geometry"]["type"] == "Polygon"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    outline, hole = (np.array(ring) for ring in feature["geometry"]["coordinates"])
    for ring, sign in ((outline, 1), (hole, -1)):
        assert (ring[0] == ring[-1]).all()
        assert len(ring) >= 4
        x, y = ring.T
        assert np.sign(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) == sign


def test_geojson_read_as_a_mask_gives_the_tissue_back(slide: Slide, tmp_path: Path) -> None:
    (tmp_path / "tissue.geojson").write_text(frame().to_geojson())
    again = read_tissue_mask(tmp_path / "tissue.geojson", slide)
    assert again.area_mm2(0.5) == pytest.approx(frame().area_mm2(0.5), rel=0.08)
    assert again.method.startswith("mask:tissue.geojson:")


def square(x: int, y: int, edge: int) -> list[list[int]]:
    return [[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]


POLYGON = {"type": "Polygon", "coordinates": [square(100, 100, 200), square(150, 150, 100)]}
FEATURE = {"type": "Feature", "properties": {}, "geometry": POLYGON}
TWO = {"type": "MultiPolygon", "coordinates": [POLYGON["coordinates"], [square(500, 300, 100)]]}


@pytest.mark.parametrize(
    ("content", "area"),
    [
        ({"type": "FeatureCollection", "features": [FEATURE]}, 200**2 - 100**2),
        (FEATURE, 200**2 - 100**2),
        ([FEATURE], 200**2 - 100**2),
        (POLYGON, 200**2 - 100**2),
        ({"type": "Feature", "properties": {}, "geometry": TWO}, 200**2 - 100**2 + 100**2),
    ],
    ids=["collection", "feature", "list", "geometry", "multipolygon"],
)
def test_annotations_of_qupath_are_masks(content: Any, area: int, slide: Slide, tmp_path: Path) -> None:
    (tmp_path / "mask.geojson").write_text(json.dumps(content))
    tissue = read_tissue_mask(tmp_path / "mask.geojson", slide)
    assert tissue.mask.sum() * tissue.downsample[0] * tissue.downsample[1] == pytest.approx(area, rel=0.06)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_a_png_of_any_kind_and_size_is_a_mask(mode: str, slide: Slide, tmp_path: Path) -> None:
    gray = np.zeros((60, 80), np.uint8)
    gray[15:30, 20:60] = 255
    picture = Image.fromarray(gray).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(gray))
    picture.save(tmp_path / "mask.png")
    tissue = read_tissue_mask(tmp_path / "mask.png", slide)
    assert tissue.downsample == (10.0, 10.0)
    np.testing.assert_array_equal(tissue.mask, gray > 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mask.geojson", "{", "not GeoJSON"),
        ("mask.geojson", '{"no": "type"}', "not GeoJSON"),
        ("mask.geojson", '{"type": "FeatureCollection", "features": []}', "no Polygon"),
        ("mask.geojson", '{"type": "Polygon", "coordinates": []}', "no Polygon"),
        ("mask.geojson", '{"type": "Point", "coordinates": [1, 2]}', "no Polygon"),
        ("mask.geojson", '{"type": "Polygon", "coordinates": [[[NaN, 0], [9, 0], [9, 9]]]}', "not finite"),
        ("mask.geojson", json.dumps({"type": "Polygon", "coordinates": [square(5000, 0, 100)]}), "outside the slide"),
        ("mask.png", "not a picture", "not a picture"),
        ("mask.png", "", "not a picture"),
        ("missing.png", None, "cannot read the tissue mask"),
    ],
)
def test_a_mask_that_cannot_be_right_is_refused(
    name: str, content: str | None, message: str, slide: Slide, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LongslideError, match=message) as caught:
        read_tissue_mask(tmp_path / name, slide)
    assert name in str(caught.value)


def test_a_mask_of_another_shape_than_the_slide_is_refused(slide: Slide, tmp_path: Path) -> None:
    Image.new("L", (100, 100), 255).save(tmp_path / "mask.png")
    with pytest.raises(LongslideError, match="not of the shape of the slide"):
        read_tissue_mask(tmp_path / "mask.png", slide)


def test_a_slide_without_mpp_has_tissue_too(tmp_path: Path) -> None:
    write_synthetic_slide(tmp_path / "slide.tif", size=(2048, 1536), mpp=None, seed=3)
    with open_slide(tmp_path / "slide.tif") as opened:
        assert 0.05 < find_tissue(opened).mask.mean() < 0.6


def test_on_the_real_slide_tissue_runs_down_the_middle_and_lower_right() -> None:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES is not set")
    with open_slide(Path(folder) / "CMU-1-Small-Region.svs") as opened:
        mask = find_tissue(opened).mask
    height, width = mask.shape
    middle = mask[:, int(0.45 * width) : int(0.55 * width)]
    assert middle[int(0.1 * height) :].mean() > 0.85
    assert mask[int(0.75 * height) :, int(0.35 * width) : int(0.75 * width)].mean() > 0.9
    assert mask[int(0.45 * height) :, : int(0.2 * width)].mean() < 0.05
    assert mask[:, int(0.9 * width) :].mean() < 0.05
    assert mask[: int(0.3 * height), : int(0.3 * width)].mean() < 0.05


def test_ink_is_left_out_or_kept_as_the_option_says(clean: Case, tmp_path: Path) -> None:
    picture, truth = with_pen(clean, INKS["green"])
    Image.fromarray(picture).save(tmp_path / "inked.png")
    with open_slide(tmp_path / "inked.png", slide_mpp=MPP) as slide:
        without, kept = OpticalDensity()(slide), OpticalDensity(keep_ink=True)(slide)
    pen = (picture[..., 0] < 90) & (picture[..., 1] > 100) & ~truth
    assert without.mask[pen].mean() < 0.05
    assert without.left_out["ink"][pen].mean() > 0.95
    assert kept.mask[pen].mean() > 0.9
    assert kept.left_out_mm2(MPP) == {}
    stroke = pen.sum() * (MPP / 1000) ** 2
    assert stroke < without.left_out_mm2(MPP)["ink"] < 2 * stroke, "with its soft rim"


def test_smaller_pieces_than_min_area_are_left_out() -> None:
    picture, truth = blank(), np.zeros((HEIGHT, WIDTH), np.uint8)
    for number, edge in enumerate((10, 20, 40)):  # 6,400, 25,600 and 102,400 square microns
        truth[100 : 100 + edge, 60 + 120 * number :][:, :edge] = 1
    rng = np.random.default_rng(0)
    picture[truth > 0] = np.clip(rng.normal((190, 110, 170), 15, (truth.sum(), 3)), 0, 255).astype(np.uint8)
    for least, pieces in ((2_500, 3), (15_000, 2), (50_000, 1), (1e9, 0)):
        found = segment_tissue(picture, MPP, min_area=least)
        assert cv2.connectedComponents(found.astype(np.uint8))[0] - 1 == pieces, least


def test_a_lower_threshold_finds_paler_tissue() -> None:
    picture, truth = blank().astype(np.float32), np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(truth, (250, 200), (125, 90), 0, 0, 360, 1, -1)
    rng = np.random.default_rng(0)
    paleness = 0.022 + 0.004 * rng.normal(size=truth.shape)
    light = 10 ** -(truth * paleness).astype(np.float32)
    picture *= light[..., None]
    picture[..., 1] *= light
    picture = cv2.GaussianBlur(picture + rng.normal(0, 0.5, picture.shape), (0, 0), 0.6).clip(0, 255).astype(np.uint8)
    shares = [segment_tissue(picture, MPP, threshold=threshold)[truth > 0].mean() for threshold in (0.01, 0.02, 0.06)]
    assert shares[0] > 0.95
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1
