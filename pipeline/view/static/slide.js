// The page of one slide. `page` is what panels work with; see README.md in the folder above.

import { bytes, json, slidePath } from "./api.js";
import { byId, element, number, say } from "./dom.js";
import { remembered } from "./memory.js";
import { Overlay, gridPainter, marksPainter, tissuePainter } from "./overlay.js";
import { attentionPanel } from "./panels/attention.js";
import { factsPanel } from "./panels/facts.js";
import { galleryPanel } from "./panels/gallery.js";
import { layersPanel } from "./panels/layers.js";
import { predictionPanel } from "./panels/prediction.js";
import { regionsPanel } from "./panels/regions.js";
import { similarPanel } from "./panels/similar.js";
import { Tiles } from "./tiles.js";
import { Viewer, scaleBar, toolbar } from "./viewer.js";

// In the order of the page. A panel is a function of `page` that returns { title, content, open }, or null for none.
const PANELS = [
  predictionPanel, layersPanel, galleryPanel, similarPanel, attentionPanel, regionsPanel, factsPanel,
];

class Page extends EventTarget {
  constructor(id, info, tiles) {
    super();
    this.id = id;
    this.info = info;
    this.tiles = tiles;
    this.layer = null; // { key, title, kind, limit, ends, unit, values } of the layer that is shown
    this.describers = []; // functions of a tile's number: further lines of the tooltip
    this.loaded = new Map();
    this.covered = false; // whether something else is drawn in the layer's place
  }

  // Two washes of colour over each other say nothing: while a panel draws its own, the layer and its legend are hidden.
  cover(on) {
    this.covered = on;
    byId("stage").classList.toggle("covered", on);
  }

  // The values of a layer, which are fetched once.
  async layerOf(key) {
    const description = this.info.layers.find((one) => one.key === key);
    if (!this.loaded.has(key)) {
      const buffer = await bytes(slidePath(this.id, `/layers/${encodeURIComponent(key)}`));
      const kinds = { categories: Int32Array, colours: Uint8Array };
      this.loaded.set(key, new (kinds[description.kind] ?? Float32Array)(buffer));
    }
    return { ...description, values: this.loaded.get(key) };
  }

  setLayer(layer) {
    this.layer = layer;
    this.dispatchEvent(new CustomEvent("layer", { detail: layer }));
  }

  // Find the tissue of a slide that has no features.
  async findTissue() {
    this.info.tissue = (await json(slidePath(this.id, "/tissue"))).tissue;
    this.tissue.show(this.info.tissue);
    this.overlay.draw();
    this.dispatchEvent(new CustomEvent("tissue"));
  }

  // Show a tile in the middle, with its neighbours.
  fly(tile) {
    const { coords, size } = this.tiles;
    this.viewer.fit(coords[2 * tile] - 1.5 * size, coords[2 * tile + 1] - 1.5 * size, 4 * size, 4 * size);
  }

  tilePicture(tile, px = 192) {
    const { coords, size } = this.tiles;
    return slidePath(this.id, `/region?x=${coords[2 * tile]}&y=${coords[2 * tile + 1]}&size=${size}&px=${px}&v=${this.info.pixels.version}`);
  }

  describe(tile) {
    const lines = [];
    const layer = this.layer;
    if (layer && (layer.kind === "signed" || layer.kind === "unsigned")) {
      lines.push(`${layer.title}: ${number(layer.values[tile])} ${layer.unit}`);
    } else if (layer && layer.kind === "categories") {
      lines.push(`${layer.title}: ${layer.ends[layer.values[tile]] ?? layer.values[tile]}`);
    }
    for (const describer of this.describers) lines.push(...describer(tile));
    lines.push(`tile ${tile.toLocaleString("en")} at ${this.tiles.coords[2 * tile]}, ${this.tiles.coords[2 * tile + 1]}`);
    return lines;
  }
}

function header(id) {
  document.title = `${id} – Longslide`;
  byId("title").textContent = id;
  const order = remembered("order").ids ?? [];
  const place = order.indexOf(id);
  if (place < 0) return;
  for (const [step, sign, title] of [[-1, "‹", "Previous slide"], [1, "›", "Next slide"]]) {
    const other = order[place + step];
    if (other === undefined) continue;
    const link = element("a", { href: `slide.html?slide=${encodeURIComponent(other)}`, textContent: sign, title });
    link.setAttribute("aria-label", title);
    byId("neighbours").append(link);
  }
}

// The place that is looked at is kept in the address: a reload comes back to it, and it can be sent.
function keepPlace(viewer) {
  const said = new URLSearchParams(location.hash.slice(1));
  const [x, y, zoom, turn] = ["x", "y", "zoom", "turn"].map((name) => Number(said.get(name)));
  if (said.has("zoom") && [x, y, zoom, turn].every(Number.isFinite) && zoom > 0) {
    const centre = viewer.viewport.imageToViewportCoordinates(x, y);
    viewer.viewport.setRotation(turn, true);
    viewer.viewport.zoomTo(viewer.viewport.imageToViewportZoom(zoom), null, true);
    viewer.viewport.panTo(centre, true);
    viewer.viewport.applyConstraints(true);
  } else {
    viewer.home(true);
  }
  let waiting = null;
  viewer.main.addHandler("update-viewport", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (!viewer.main.isOpen()) return;
      const centre = viewer.viewport.viewportToImageCoordinates(viewer.viewport.getCenter());
      const turned = Math.round(viewer.viewport.getRotation()) % 360;
      const scale = viewer.viewport.viewportToImageZoom(viewer.viewport.getZoom());
      const place = `x=${Math.round(centre.x)}&y=${Math.round(centre.y)}&zoom=${scale.toPrecision(4)}&turn=${turned}`;
      history.replaceState(null, "", `#${place}`);
    }, 300);
  });
}

function pointer(page) {
  const tip = byId("tip");
  const place = byId("main");
  const hovered = marksPainter(page.tiles, 40);
  page.overlay.add(hovered);
  const under = (event) => {
    const box = place.getBoundingClientRect();
    const at = page.viewer.toSlide(event.clientX - box.left, event.clientY - box.top);
    return page.tiles.at(at.x, at.y);
  };
  const pick = (tile) => page.dispatchEvent(new CustomEvent("pick", { detail: tile }));
  const hide = () => {
    tip.hidden = true;
    if (hovered.marks.length) {
      hovered.marks = [];
      page.overlay.draw();
    }
  };
  place.addEventListener("pointermove", (event) => {
    const tile = page.viewer.main.isOpen() ? under(event) : -1;
    if (tile < 0 || event.buttons) {
      hide();
      return;
    }
    show(event, tile);
  });
  place.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hide()); // a finger leaves what it tapped
  const show = (event, tile) => {
    if (hovered.marks[0]?.tile !== tile) {
      hovered.marks = [{ tile, width: 1.5 }];
      page.overlay.draw();
      page.dispatchEvent(new CustomEvent("hover", { detail: tile }));
    }
    const lines = page.describe(tile);
    const stage = byId("stage").getBoundingClientRect();
    tip.replaceChildren(...lines.map((line) => element("div", { textContent: line })));
    tip.hidden = false;
    const left = Math.min(event.clientX - stage.left + 14, stage.width - tip.offsetWidth - 6);
    const above = event.clientY - stage.top - tip.offsetHeight - 10;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${above > 4 ? above : event.clientY - stage.top + 18}px`;
  };
  page.viewer.main.addHandler("canvas-click", (event) => {
    if (!event.quick) return;
    const at = page.viewer.toSlide(event.position.x, event.position.y);
    const tile = page.tiles.at(at.x, at.y);
    const touched = event.originalEvent.pointerType === "touch"; // nothing hovers there
    if (tile >= 0) pick(tile);
    if (touched && tile >= 0) show(event.originalEvent, tile);
    else if (touched) hide();
  });
  for (const event of ["zoom", "resize"]) page.viewer.main.addHandler(event, hide); // another tile is there now
  // The keyboard's click.
  page.viewer.main.addHandler("canvas-key", ({ originalEvent }) => {
    if (originalEvent.key !== "Enter") return;
    const box = place.getBoundingClientRect();
    const at = page.viewer.toSlide(box.width / 2, box.height / 2);
    const tile = page.tiles.at(at.x, at.y);
    if (tile < 0) return;
    pick(tile);
    show({ clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }, tile);
  });
}

async function start() {
  const id = new URLSearchParams(location.search).get("slide") ?? "";
  header(id);
  const info = await whileOpening(json(slidePath(id)));
  const { pixels } = info;
  let tiles = null;
  if (info.grid) tiles = new Tiles(new Int32Array(await bytes(slidePath(id, "/grid"))), info.grid.size, info.grid.step);
  if (pixels.error) say(`The slide's pixels cannot be shown: ${pixels.error}`);
  if (!pixels.size && tiles?.count) {
    pixels.size = [tiles.left + (tiles.columns + 1) * tiles.step, tiles.top + (tiles.rows + 1) * tiles.step];
  }
  const page = new Page(id, info, tiles);
  if (pixels.size) {
    page.viewer = new Viewer(id, pixels);
    await page.viewer.opened();
    page.overlay = new Overlay(page.viewer);
    page.tissue = page.overlay.add(tissuePainter().show(info.tissue));
    page.grid = tiles ? page.overlay.add(gridPainter(tiles)) : null;
    toolbar(page.viewer, () => {
      page.overlay.shown = !page.overlay.shown;
      byId("stage").classList.toggle("bare", !page.overlay.shown);
      page.overlay.draw();
      return page.overlay.shown;
    });
    scaleBar(page.viewer, pixels.mpp);
    keepPlace(page.viewer);
    watchFailures(page);
    if (tiles) pointer(page);
  } else {
    byId("stage").hidden = true;
  }
  for (const panel of PANELS) {
    const made = panel(page);
    if (!made) continue;
    const box = element("details", { open: made.open ?? true }, element("summary", { textContent: made.title }));
    box.append(made.content);
    let asked = false; // not by the page itself as it begins
    box.firstChild.addEventListener("click", () => (asked = true));
    box.addEventListener("toggle", () => {
      made.content.dispatchEvent(new Event(box.open ? "opened" : "closed"));
      if (box.open && asked) box.scrollIntoView({ block: "nearest" });
    });
    byId("panels").append(box);
  }
  window.page = page; // for the console
}

// A slide on a slow disk, or one that hangs: the page says what it waits for.
async function whileOpening(answer) {
  const began = Date.now();
  const telling = setInterval(() => {
    const seconds = Math.round((Date.now() - began) / 1000);
    say(`Opening the slide … ${seconds} s${seconds < 10 ? "" : ". A slow disk, or a damaged file: the other slides can be looked at meanwhile."}`);
  }, 1000);
  try {
    return await answer;
  } finally {
    clearInterval(telling);
    say("");
  }
}

// A slide that vanishes or crashes its library while it is looked at: the server says why.
function watchFailures(page) {
  let asked = false;
  page.viewer.main.addHandler("tile-load-failed", async ({ tile }) => {
    if (asked) return;
    asked = true;
    try {
      await bytes(tile.getUrl());
    } catch (error) {
      say(`Part of the slide cannot be shown: ${error.message}`);
    }
    setTimeout(() => (asked = false), 2000);
  });
}

start().catch((error) => say(error.message));
