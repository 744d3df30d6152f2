"""Tiles alike, colours by embedding and what a tile sees, clicked through in a real Chromium."""

from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import pytest
from longslide import TileIndex, read_features
from longslide.data.features.tile_colours import TileColours
from served_viewer import EVIL, Results, Served, tab, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Serve = Callable[..., Served]

pytestmark = pytest.mark.slow


def open_slide_page(page: "Page", viewer: Served, slide_id: str) -> None:
    page.goto(f"{viewer.address}slide.html?slide={quote(slide_id, safe='')}")
    page.wait_for_selector("#panels details:nth-of-type(3)")
    until(page, "window.page?.viewer?.main.world.getItemAt(0)?.getFullyLoaded()")


def place_of(page: "Page", tile: int) -> list[float]:
    """Where the middle of a tile is on the page."""
    found: list[float] = page.evaluate(
        """(tile) => {
            const [a, b, c, d, e, f] = page.viewer.transform();
            const [x, y] = [0, 1].map((part) => page.tiles.coords[2 * tile + part] + page.tiles.size / 2);
            const box = document.getElementById("main").getBoundingClientRect();
            return [a * x + c * y + e + box.left, b * x + d * y + f + box.top];
        }""",
        tile,
    )
    return found


def colour_of(page: "Page", tile: int) -> list[int]:
    """The colour of the layers over the middle of a tile: red, green, blue, alpha."""
    left, top = place_of(page, tile)
    box = page.evaluate("(({left, top}) => [left, top])(document.getElementById('main').getBoundingClientRect())")
    found: list[int] = page.evaluate(
        "([x, y]) => [...page.overlay.context.getImageData(x, y, 1, 1).data]", [left - box[0], top - box[1]]
    )
    return found


def test_a_click_shows_the_tiles_alike_and_a_click_on_one_goes_there(
    browser: "Browser", serve: Serve, made: Results
) -> None:
    viewer = serve(made.features)
    index = TileIndex.open(made.features)
    found = {
        tile: index.similar("plain", tile) for tile in range(len(read_features(made.features / "plain.h5").coords))
    }
    tile, wanted = next(one for one in found.items() if len({hit.slide_id for hit in one[1]}) == 2)
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.get_by_text("Tiles like this one").click()
        page.mouse.click(*place_of(page, tile))
        hits = page.locator("#similar .gallery > *")
        hits.first.wait_for()
        names = page.locator("#similar .of").all_text_contents()
        assert names == [one.slide_id for one in wanted]
        assert EVIL in names, "a name with HTML is text"
        assert page.title() == "plain – Longslide"
        until(page, "[...document.querySelectorAll('#similar img')].slice(0, 4).every((one) => one.naturalWidth > 0)")
        own = next(number for number, one in enumerate(wanted) if one.slide_id == "plain")
        hits.nth(own).click()
        x, y = wanted[own].x + wanted[own].size / 2, wanted[own].y + wanted[own].size / 2
        middle = "page.viewer.viewport.viewportToImageCoordinates(page.viewer.viewport.getCenter())"
        until(page, f"Math.hypot({middle}.x - {x}, {middle}.y - {y}) < 5")
        page.get_by_label("other slides only").check()
        until(page, "document.querySelectorAll('#similar button').length === 0")
        hits.first.wait_for()
        hits.first.click()
        page.wait_for_url("**/slide.html?slide=*#x=*")
        assert page.locator("#title").inner_text() == EVIL


def test_the_clusters_of_the_cohort_are_drawn_where_the_tiles_are(
    browser: "Browser", serve: Serve, made: Results
) -> None:
    viewer = serve(made.features)
    clusters = TileColours.of(TileIndex.open(made.features)).clusters("plain")
    first, other = 0, int(np.flatnonzero(clusters != clusters[0])[0])
    same = int(np.flatnonzero(clusters == clusters[0])[-1])
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.get_by_label("Layer", exact=True).select_option("clusters")
        until(page, "page.layer?.key === 'clusters'")
        assert page.locator(".categories li").first.inner_text() == "cluster 1"
        page.locator("label.chip", has_text="tissue").locator("input").uncheck()
        assert colour_of(page, first)[3] > 0
        assert colour_of(page, first) == colour_of(page, same)
        assert colour_of(page, first) != colour_of(page, other)


def test_a_click_shows_what_the_tile_sees(browser: "Browser", serve: Serve, made: Results) -> None:
    viewer = serve(made.features)
    tiles = len(read_features(made.features / "plain.h5").coords)
    with tab(browser) as page:
        open_slide_page(page, viewer, "plain")
        page.locator("label.chip", has_text="tissue").locator("input").uncheck()
        page.mouse.click(*place_of(page, 1))
        assert colour_of(page, 3)[3] == 0, "the panel is closed"
        page.get_by_text("What a tile sees").click()
        page.mouse.click(*place_of(page, 1))
        legend = page.locator("#attention .categories li")
        legend.first.wait_for()
        whose = page.locator("#attention p.soft").nth(1).inner_text()
        assert whose.startswith("Shown: gigapath, as published (dilated attention, 12 layers, 16 heads)."), whose
        assert "No model of yours is known here" in whose
        assert legend.all_text_contents() == [f"segments of 1,024, every tile: {tiles}"], "a slide of one segment"
        page.locator("#attention").get_by_label("Opacity").fill("100")
        assert colour_of(page, 3) == [0, 114, 178, 255]
        page.locator("#attention select").nth(1).select_option("branch-1")
        until(page, "document.querySelectorAll('#attention .categories li').length === 2")
        assert colour_of(page, 3) == colour_of(page, 1), "two tokens apart"
        assert colour_of(page, 2) != colour_of(page, 1)
        page.locator("#attention select").nth(1).select_option("layers")
        until(page, "document.querySelector('#attention .categories').textContent.startsWith('after 1 layer')")
        page.locator("#attention").get_by_text("clear").click()
        assert colour_of(page, 3)[3] == 0
