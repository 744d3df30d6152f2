"""The viewer's pages, clicked through in a real Chromium."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from classifier_files import ENCODER
from longslide import embed
from served_viewer import EVIL, Results, Served, tab, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

Serve = Callable[..., Served]

pytestmark = pytest.mark.slow


def open_slide_page(page: "Page", viewer: Served, slide_id: str, at: str = "") -> None:
    page.goto(f"{viewer.address}slide.html?slide={quote(slide_id, safe='')}{at}")
    page.wait_for_selector("#panels details:nth-of-type(3)")
    until(page, "window.page?.viewer?.main.world.getItemAt(0)?.getFullyLoaded()")


def place_of(page: "Page", x: float, y: float) -> tuple[float, float]:
    """Where a place of level 0 is on the page."""
    return tuple(  # type: ignore[return-value]
        page.evaluate(
            """([x, y]) => {
                const [a, b, c, d, e, f] = page.viewer.transform();
                const box = document.getElementById("main").getBoundingClientRect();
                return [a * x + c * y + e + box.left, b * x + d * y + f + box.top];
            }""",
            [x, y],
        )
    )


def centre(page: "Page") -> list[float]:
    """What place of level 0 is in the middle, once it has come to rest."""
    found: list[float] = page.evaluate(
        "(({x, y}) => [x, y])(page.viewer.viewport.viewportToImageCoordinates(page.viewer.viewport.getCenter()))"
    )
    return found


def colour_over(page: "Page", x: float, y: float) -> list[int]:
    """The colour of the layers over a place of level 0: red, green, blue, alpha."""
    left, top = place_of(page, x, y)
    box = page.evaluate("(({left, top}) => [left, top])(document.getElementById('main').getBoundingClientRect())")
    found: list[int] = page.evaluate(
        "([x, y]) => [...page.overlay.context.getImageData(x, y, 1, 1).data]", [left - box[0], top - box[1]]
    )
    return found


DRAWN = (
    "page.overlay.context.getImageData(0, 0, page.overlay.canvas.width, page.overlay.canvas.height).data.some(Boolean)"
)


def scores(made: Results, slide_id: str, column: str) -> list[tuple[int, int, float]]:
    with (made.results / "slides" / slide_id / "tiles.csv").open(newline="") as file:
        return [(int(row["x"]), int(row["y"]), float(row[column])) for row in csv.DictReader(file)]


def test_the_list_is_searched_filtered_and_leads_to_a_slide(browser: "Browser", serve: Serve, made: Results) -> None:
    viewer = serve(made.results, made.attention, made.labels)
    with tab(browser) as page:
        page.goto(viewer.address)
        names = page.locator(".slides .name")
        names.first.wait_for()
        assert set(names.all_text_contents()) == {"plain", "broken", EVIL}
        until(page, "[...document.images].filter((one) => one.complete && one.naturalWidth > 0).length === 2")
        page.get_by_label("failed QC").check()
        assert names.all_text_contents() == ["broken"]
        assert page.locator(".slides").inner_text().count("failed: ") == 1
        page.reload()
        page.get_by_label("failed QC").wait_for()
        assert names.all_text_contents() == ["broken"], "a reload finds the list as it was"
        page.get_by_label("failed QC").uncheck()
        page.get_by_label("wrong").check()
        assert "plain" in names.all_text_contents()
        page.get_by_label("wrong").uncheck()
        page.get_by_placeholder("Search slides, patients").fill("<IMG")
        assert names.all_text_contents() == [EVIL]
        page.locator(".slides a").click()
        page.wait_for_selector("#panels")
        until(page, "window.page?.viewer?.main.isOpen()")
        assert page.locator("h1").text_content() == EVIL
        assert page.title() == f"{EVIL} – Longslide", "a name is text, and nothing in it was executed"


def test_layers_scores_and_the_gallery_of_a_slide(browser: "Browser", serve: Serve, made: Results) -> None:
    viewer = serve(made.results, made.attention)
    shown = json.loads((made.results / "plain.json").read_text())["explanation"]["shows"]
    tiles = scores(made, "plain", f"score_{shown}")
    strongest = max(tiles, key=lambda tile: tile[2])
    x, y = strongest[0] + 32, strongest[1] + 32
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.locator(".gallery img").first.wait_for()
        red, _, blue, alpha = colour_over(page, x, y)
        assert alpha == pytest.approx(0.55 * 255, abs=3)
        assert red > blue, "what speaks for it is red"
        page.get_by_label("Opacity").first.fill("100")
        assert colour_over(page, x, y)[3] == 255

        page.mouse.move(*place_of(page, x, y))
        tip = page.locator("#tip")
        tip.wait_for()
        [said] = re.findall(rf"{shown}: (\S+)", tip.inner_text())
        assert float(said) == pytest.approx(strongest[2], rel=1e-2)
        assert f"at {strongest[0]}, {strongest[1]}" in tip.inner_text()

        page.locator(".gallery button").first.click()
        until(page, f"Math.abs(page.viewer.scale * {1024} - page.viewer.main.container.clientWidth) > 50")
        page.wait_for_timeout(900)
        assert centre(page) == pytest.approx([x, y], abs=3)
        until(page, "location.hash.includes('zoom=')")
        page.reload()
        until(page, "window.page?.viewer?.main.world.getItemAt(0)?.getFullyLoaded()")
        assert centre(page) == pytest.approx([x, y], abs=3), "a reload comes back to the place"

        page.get_by_label("Layer", exact=True).select_option(label="attention")
        until(page, "page.layer?.title === 'attention'")
        assert "little attention" in page.locator("#panels .ends").inner_text()
        page.keyboard.press("l")  # the select that was used does not keep the key
        assert colour_over(page, x, y)[3] == 0
        assert not page.evaluate(DRAWN), "the plain slide, without outlines"
        page.get_by_label("Layers on and off (L)").click()
        assert colour_over(page, x, y)[3] > 0
        page.get_by_label("tile grid").check()
        page.goto(f"{viewer.address}slide.html?slide={quote(EVIL, safe='')}")
        until(page, "window.page?.layer?.title === 'attention'")
        assert page.get_by_label("Opacity").first.input_value() == "100", "the next slide is drawn as this one was"
        assert page.get_by_label("tile grid").is_checked()


def test_keys_work_from_the_beginning(browser: "Browser", serve: Serve, made: Results) -> None:
    viewer = serve(made.features)
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        turned, scale = "page.viewer.viewport.getRotation()", "page.viewer.viewport.getZoom()"
        whole = page.evaluate(scale)
        for key, degrees in (("r", 30), ("Shift+R", 0), ("Shift+R", -30)):
            page.keyboard.press(key)
            assert page.evaluate(turned) % 360 == degrees % 360
        page.get_by_label("tile grid").check()  # the focus is on it now
        page.keyboard.press("+")
        assert page.evaluate(scale) == pytest.approx(1.6 * whole)
        page.mouse.click(*place_of(page, 500, 400))  # and now on the slide
        page.keyboard.press("-")
        assert page.evaluate(scale) == pytest.approx(whole), "once, not once more by OpenSeadragon"
        page.keyboard.press("r")
        page.keyboard.press("0")
        assert page.evaluate(turned) == 0
        page.keyboard.press("b")
        until(page, "page.viewer.plain?.isOpen()")


def test_a_tap_shows_the_score_of_a_tile_and_nothing_lies_on_the_slide(
    browser: "Browser", serve: Serve, made: Results
) -> None:
    viewer = serve(made.results)
    with tab(browser, 400, 400, touch=True) as page:
        open_slide_page(page, viewer, "plain")
        seen, slide = (page.evaluate(f"page.viewer.main.{part}.height") for part in (
            "viewport.getBounds()", "world.getItemAt(0).getBounds()"
        ))  # fmt: skip
        assert seen == pytest.approx(slide, rel=0.01), "the whole slide, in what the tools leave"
        x, y = (page.evaluate(f"page.tiles.coords[{part}] + page.tiles.size / 2") for part in (0, 1))
        page.touchscreen.tap(*place_of(page, x, y))
        page.wait_for_timeout(300)
        assert re.search(r": -?\d", page.locator("#tip").inner_text())
        main, tools = page.locator("#main").bounding_box(), page.locator("#toolbar").bounding_box()
        assert main is not None
        assert tools is not None
        assert main["y"] + main["height"] <= tools["y"]


def test_side_by_side_turned_and_at_scale(browser: "Browser", serve: Serve, made: Results) -> None:
    viewer = serve(made.results)
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        bounds = "(({ x, width }) => [x, x + width])(page.viewer.viewport.getBounds())"
        alone = page.evaluate(bounds)
        page.get_by_label("Plain slide beside it (B)").click()
        until(page, "page.viewer.plain?.world.getItemAt(0)?.getFullyLoaded()")
        assert page.evaluate(bounds) == pytest.approx(alone, abs=0.01), "nothing is cut off"
        legend, main = page.locator("#legend").bounding_box(), page.locator("#main").bounding_box()
        assert legend is not None
        assert main is not None
        assert legend["x"] + legend["width"] <= main["x"] + main["width"], "not over the plain slide"
        page.get_by_label("Plain slide beside it (B)").click()
        until(page, f"Math.abs({bounds}[0] - {alone[0]}) < 0.01")
        page.get_by_label("Plain slide beside it (B)").click()
        until(page, "page.viewer.plain?.world.getItemAt(0)?.getFullyLoaded()")
        page.get_by_label("Turn right (R)").click()
        page.get_by_label("Zoom in (+)").click()
        page.wait_for_timeout(900)
        state = """(viewer) => { const { x, y } = viewer.viewport.getCenter(true);
            return [x, y, viewer.viewport.getZoom(true), viewer.viewport.getRotation(true)]; }"""
        main, plain = (page.evaluate(f"({state})(page.viewer.{name})") for name in ("main", "plain"))
        assert plain == pytest.approx(main, abs=1e-4)
        assert main[3] == pytest.approx(30)
        there, box = page.locator("#plain").bounding_box(), page.locator("#main").bounding_box()
        assert there is not None
        assert box is not None
        page.mouse.move(box["x"] + 100, box["y"] + 120)
        cross = page.locator("#cross").bounding_box()
        assert cross is not None
        middle = cross["x"] + cross["width"] / 2, cross["y"] + cross["height"] / 2
        assert middle == pytest.approx((there["x"] + 100, there["y"] + 120), abs=2), "the pointer's place in the other"
        bar = page.locator("#scale div").bounding_box()
        length = page.locator("#scale span").inner_text()
        assert bar is not None
        microns = float(length.split()[0]) * (1000 if "mm" in length else 1)
        scale = page.evaluate("page.viewer.scale")
        assert bar["width"] / scale * 0.5 == pytest.approx(microns, rel=0.01)
        assert float(page.locator("#scale small").inner_text().strip("×")) == pytest.approx(20 * scale, rel=0.06)


def test_a_region_is_drawn_cut_saved_and_found_again(
    browser: "Browser", serve: Serve, made: Results, tmp_path: Path
) -> None:
    viewer = serve(made.results, output=tmp_path)
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.locator("summary", has_text="Regions").click()
        page.get_by_role("button", name="Draw").click()
        for corner in ((200, 200), (600, 200), (600, 600), (200, 600), (200, 200)):
            page.mouse.click(*place_of(page, *corner))
        page.locator("text=1 area, not saved yet.").wait_for()
        page.get_by_role("button", name="Cut").click()
        page.mouse.move(*place_of(page, 300, 300))
        page.mouse.down()
        for corner in ((400, 300), (400, 400), (300, 400)):
            page.mouse.move(*place_of(page, *corner), steps=4)
        page.mouse.up()
        until(page, "page.regions().features[0]?.geometry.coordinates.length === 2")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Draw").click()
        for corner in ((650, 650), (700, 650), (700, 700)):
            page.mouse.click(*place_of(page, *corner))
        until(page, "page.draftIsKept()")
    viewer = serve(made.results, output=tmp_path)  # the tab is closed and the viewer ended
    assert [one["id"] for one in viewer.json("api/collection")["slides"] if one["draft"]] == ["plain"]
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.locator("text=1 area, not saved yet.").wait_for()
        page.keyboard.press("Enter")
        page.locator("text=2 areas, not saved yet.").wait_for()
        page.get_by_role("button", name="Undo").click()
        page.get_by_role("button", name="Save").click()
        page.locator("text=To embed it").wait_for()
        saved: dict[str, Any] = json.loads((tmp_path / "regions" / "plain.geojson").read_text())
        [outline, hole] = saved["features"][0]["geometry"]["coordinates"]
        assert sorted({round(x, -1) for x, _ in outline}) == [200, 600]
        assert {round(x, -1) for x, _ in hole} >= {300, 400}
        page.reload()
        until(page, "window.page?.regions")
        page.locator("summary", has_text="Regions").click()
        page.locator("text=1 area, saved.").wait_for()
        until(page, "page.draftIsKept()")
    assert not list((tmp_path / "regions" / ".drafts").iterdir())


def test_a_region_is_drawn_by_touch_and_two_fingers_move_the_slide(
    browser: "Browser", serve: Serve, made: Results, tmp_path: Path
) -> None:
    viewer = serve(made.results, output=tmp_path)
    with tab(browser, 400, touch=True) as page:
        open_slide_page(page, viewer, "plain")
        page.locator("summary", has_text="Regions").tap()
        page.get_by_role("button", name="Draw").tap()
        fingers = page.context.new_cdp_session(page)

        def touch(kind: str, *places: tuple[float, float]) -> None:
            points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        def drawn() -> list[list[float]]:
            found: list[list[float]] = page.evaluate("page.regions().features[0].geometry.coordinates[0]")
            return found

        touch("touchStart", place_of(page, 300, 300))  # freehand
        for corner in ((600, 300), (600, 500), (300, 500)):
            touch("touchMove", place_of(page, *corner))
        touch("touchEnd")
        page.locator("text=1 area, not saved yet.").wait_for()
        assert sorted({round(x, -1) for x, _ in drawn()}) == [300, 600]
        left, top = place_of(page, 500, 400)
        before = page.evaluate("page.viewer.scale")
        touch("touchStart", (left - 40, top))
        touch("touchMove", (left - 30, top))
        touch("touchStart", (left - 30, top), (left + 30, top))
        touch("touchMove", (left - 60, top), (left + 60, top))
        touch("touchEnd")
        assert page.evaluate("page.viewer.scale") == pytest.approx(2 * before, rel=0.05)
        assert place_of(page, 500, 400) == pytest.approx((left, top), abs=2), "it stays under the fingers"
        page.get_by_role("button", name="Cut").tap()
        for corner in ((420, 380), (480, 380), (480, 420)):
            page.touchscreen.tap(*place_of(page, *corner))
        page.get_by_role("button", name="Close outline").tap()
        until(page, "page.regions().features[0].geometry.coordinates.length === 2")
        page.get_by_role("button", name="Save").tap()
        page.locator("text=To embed it").wait_for()
        assert (tmp_path / "regions" / "plain.geojson").is_file()


def test_what_is_drawn_is_not_lost_by_an_error_nor_called_saved_before_it_is(
    browser: "Browser", serve: Serve, made: Results, tmp_path: Path
) -> None:
    viewer = serve(made.results, output=tmp_path)
    held: list[Route] = []
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.locator("summary", has_text="Regions").click()
        page.get_by_role("button", name="Draw").click()
        page.route("**/regions", lambda route: route.fulfill(status=422, json={"error": "no such luck"}))
        for corner in ((200, 200), (600, 200), (600, 600), (200, 600), (200, 200)):
            page.mouse.click(*place_of(page, *corner))
        page.locator("#message", has_text="no such luck").wait_for()
        page.unroute("**/regions")
        asks = """(() => { const leaving = new Event("beforeunload", { cancelable: true });
            window.dispatchEvent(leaving); return leaving.defaultPrevented; })()"""
        until(page, f"!{asks}")  # the open outline is kept
        page.route("**/draft", lambda route: route.fulfill(status=422, json={"error": "disk full"}))
        page.keyboard.press("Enter")
        page.locator("text=1 area, not saved yet.").wait_for()
        assert page.evaluate(asks), "what is kept nowhere is not left without a question"
        page.unroute("**/draft")
        page.route("**/regions", lambda route: held.append(route))
        save = page.get_by_role("button", name="Save")
        save.click()
        page.get_by_role("button", name="Clear").click()
        while not held:
            page.wait_for_timeout(20)
        held[0].continue_()
        page.locator("text=To embed it").wait_for()
        assert save.is_enabled(), "that nothing is left is not saved yet"
        page.unroute("**/regions")
        save.click()
        page.locator("text=Removed: the tissue that is found is embedded.").wait_for()
    assert not (tmp_path / "regions" / "plain.geojson").exists()


def test_a_slide_that_vanishes_while_it_is_looked_at_is_said(
    browser: "Browser", serve: Serve, made: Results, tmp_path: Path
) -> None:
    shutil.copytree(made.slides, tmp_path / "slides")
    viewer = serve(tmp_path / "slides")
    with tab(browser, 400, told="failed to load") as page:  # too narrow for the finest level
        page.goto(f"{viewer.address}slide.html?slide=plain")
        until(page, "window.page?.viewer?.main.world.getItemAt(0)?.getFullyLoaded()")
        (tmp_path / "slides" / "plain.svs").unlink()
        for _ in range(4):
            page.get_by_label("Zoom in (+)").click()
        page.locator("#message", has_text="No such file").wait_for()
        page.goto(f"{viewer.address}slide.html?slide=broken")
        page.locator("#message", has_text="cannot be shown").wait_for()


@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_is_wider_than_its_window(browser: "Browser", serve: Serve, made: Results, width: int) -> None:
    viewer = serve(made.results, made.attention, made.labels, made.features)
    with tab(browser, width, 800) as page:
        page.goto(viewer.address)
        page.locator(".slides .name").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        open_slide_page(page, viewer, EVIL)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#main canvas").first.bounding_box()
        assert box is not None
        assert box["width"] >= 0.7 * width
        assert box["height"] >= 300


def test_a_real_slide_is_looked_at_from_the_list_to_a_saved_region(
    browser: "Browser", serve: Serve, tmp_path: Path
) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES, the folder with CMU-1-Small-Region.svs, is not set")
    slide = Path(folder) / "CMU-1-Small-Region.svs"
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    embed([slide], tmp_path / "features", str(tmp_path / "tiny.yaml"), tile_checkpoint="random", device="cpu")
    (tmp_path / "bare.svs").symlink_to(slide)
    viewer = serve(tmp_path / "features", tmp_path / "bare.svs")
    with tab(browser) as page:
        page.goto(viewer.address)
        page.locator(".slides a", has_text="bare").click()
        until(page, "window.page?.viewer?.main.world.getItemAt(0)?.getFullyLoaded()")
        assert page.locator("#message").is_hidden()
        colours = page.evaluate(
            """() => { const canvas = document.querySelector("#main canvas");
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                let pink = 0; for (let i = 0; i < data.length; i += 4) pink += data[i] > data[i + 1] + 20;
                return pink / (data.length / 4); }"""
        )
        assert colours > 0.1, "stained tissue"
        page.get_by_role("button", name="Find the tissue").click()
        page.get_by_label("tissue").wait_for()
        assert page.evaluate("page.info.tissue.length") >= 1

        open_slide_page(page, viewer, "CMU-1-Small-Region")
        page.get_by_label("tissue").uncheck()
        page.get_by_label("Layer", exact=True).select_option(label="blur")
        until(page, "page.layer?.title === 'blur'")
        page.get_by_label("Opacity").first.fill("100")
        values = page.evaluate("[...page.layer.values]")
        tile = min(range(len(values)), key=lambda one: values[one])
        x, y = page.evaluate(f"[0, 1].map((part) => page.tiles.coords[2 * {tile} + part] + page.tiles.size / 2)")
        end_of_map = """[...document.querySelector("#panels .ramp").getContext("2d").getImageData(255, 0, 1, 1).data]"""
        found = []
        for name in page.get_by_label("Colours").locator("option").all_text_contents():
            page.get_by_label("Colours").select_option(label=name)
            page.get_by_label("From").fill("0")
            page.get_by_label("to", exact=True).fill(str(values[tile] / 2))
            found.append(colour_over(page, x, y))
            assert found[-1] == page.evaluate(end_of_map)
        assert len({tuple(colour) for colour in found}) == len(found) > 1, "each map has its colours"
        page.get_by_label("to", exact=True).fill(str(10 * max(values)))
        assert colour_over(page, x, y) != found[-1]
        page.get_by_label("Hide weaker than").fill("50")
        assert colour_over(page, x, y)[3] == 0
        page.get_by_label("Layer", exact=True).select_option(label="principal components")
        until(page, "page.layer?.kind === 'colours'")
        assert colour_over(page, x, y)[:3] == page.evaluate(f"[...page.layer.values.slice(3 * {tile}, 3 * {tile} + 3)]")

        page.get_by_label("Layer", exact=True).select_option(label="none")
        until(page, "page.layer === null")
        assert not page.evaluate(DRAWN)
        page.get_by_label("tile grid").check()
        assert page.evaluate(DRAWN)
        before, scale = place_of(page, x, y), page.evaluate("page.viewer.scale")
        page.mouse.move(*before)
        page.mouse.wheel(0, -300)
        until(page, f"page.viewer.scale > 1.2 * {scale}")
        page.wait_for_timeout(900)
        assert place_of(page, x, y) == pytest.approx(before, abs=2), "what is under the wheel stays there"
        page.locator("summary", has_text="Regions").click()
        page.get_by_role("button", name="Start from the tissue").click()
        page.get_by_role("button", name="Save").click()
        page.locator("text=To embed it").wait_for()
    saved = json.loads((tmp_path / "features" / "regions" / "CMU-1-Small-Region.geojson").read_text())
    assert saved["features"]
