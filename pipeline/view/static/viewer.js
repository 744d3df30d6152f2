// The deep zoom of a slide: OpenSeadragon, two of them side by side, the scale bar, the tools.

import { slidePath } from "./api.js";
import { byId, element, isTyped, number } from "./dom.js";

const { OpenSeadragon } = window;
const TURN = 30; // degrees
const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  in: "M8 3v10M3 8h10",
  out: "M3 8h10",
  home: "M2 8l6-5.5L14 8M4 7v6.5h8V7",
  left: "M3 3v4h4M3.4 7A5.2 5.2 0 1 1 3.6 10.5",
  right: "M13 3v4H9M12.6 7A5.2 5.2 0 1 0 12.4 10.5",
  layers: "M8 2L1.5 5.5 8 9l6.5-3.5zM2 9l6 3.3L14 9",
  side: "M2 3h12v10H2zM8 3v10",
};

export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 16 16");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  picture.append(path);
  return picture;
}

function source(id, pixels) {
  const [width, height] = pixels.size;
  const longest = Math.max(width, height);
  return {
    width,
    height,
    tileSize: pixels.tile_px ?? 256,
    minLevel: 0,
    maxLevel: pixels.finest_level ?? Math.ceil(Math.log2(Math.max(2, longest))),
    tileExists: pixels.error ? () => false : undefined,
    getTileUrl: (level, column, row) => slidePath(id, `/tiles/${level}/${column}_${row}?v=${pixels.version}`),
  };
}

function openSeadragon(place, id, pixels, more = {}) {
  return OpenSeadragon({
    element: place,
    tileSources: source(id, pixels),
    drawer: "canvas",
    showNavigationControl: false,
    maxZoomPixelRatio: 8,
    minZoomImageRatio: 0.6,
    visibilityRatio: 0.2,
    animationTime: 0.5,
    springStiffness: 9,
    zoomPerScroll: 1.3,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true, pinchRotate: true },
    gestureSettingsPen: { clickToZoom: false, dblClickToZoom: true },
    crossOriginPolicy: false,
    imageLoaderLimit: 4, // of the six connections that a browser has: a slow slide leaves some to the rest of the page
    ...more,
  });
}

export class Viewer {
  constructor(id, pixels) {
    this.id = id;
    this.pixels = pixels;
    this.main = openSeadragon(byId("main"), id, pixels, {
      showNavigator: true, navigatorPosition: "TOP_RIGHT", navigatorWidth: "9rem", navigatorHeight: "7rem", navigatorAutoFade: false,
      navigatorRotate: true,
    });
    this.main.canvas.setAttribute("aria-label", "The slide: arrow keys move it, + and - zoom, Enter picks the tile in the middle");
    this.plain = null;
    this.leader = this.main;
    this.main.addHandler("update-viewport", () => this.#follow(this.main));
    this.#mirror("main", "plain");
    this.#mirror("plain", "main");
    byId("main").addEventListener("pointerdown", () => (this.leader = this.main));
    byId("main").addEventListener("wheel", () => (this.leader = this.main), { passive: true });
  }

  // The place under the pointer, shown in the other view.
  #mirror(from, to) {
    const cross = byId("cross");
    byId(from).addEventListener("pointermove", (event) => {
      cross.hidden = !this.sideBySide;
      if (cross.hidden) return;
      const [stage, here, there] = ["stage", from, to].map((id) => byId(id).getBoundingClientRect());
      cross.style.left = `${event.clientX - here.left + there.left - stage.left}px`;
      cross.style.top = `${event.clientY - here.top + there.top - stage.top}px`;
    });
    byId(from).addEventListener("pointerleave", () => (cross.hidden = true));
  }

  get viewport() {
    return this.main.viewport;
  }

  // Resolves when the slide can be moved.
  opened() {
    return new Promise((resolve) => {
      if (this.main.isOpen()) resolve();
      else this.main.addOnceHandler("open", resolve);
    });
  }

  // The part that was scanned, not the glass around it.
  home(immediately = false) {
    this.viewport.setRotation(0, immediately);
    const [x, y, width, height] = this.pixels.bounds ?? [0, 0, ...this.pixels.size];
    this.fit(x, y, width, height, immediately);
  }

  fit(x, y, width, height, immediately = false) {
    this.leader = this.main;
    this.viewport.fitBounds(this.viewport.imageToViewportRectangle(x, y, width, height), immediately);
  }

  rotate(degrees) {
    this.leader = this.main;
    this.viewport.setRotation(this.viewport.getRotation() + degrees);
  }

  zoom(factor) {
    this.leader = this.main;
    this.viewport.zoomBy(factor);
    this.viewport.applyConstraints();
  }

  // Level-0 pixels <-> pixels of the page within the view.
  toSlide(x, y) {
    return this.viewport.viewerElementToImageCoordinates(new OpenSeadragon.Point(x, y));
  }

  // [a, b, c, d, e, f] of a canvas transform from level-0 pixels to pixels of the page.
  transform() {
    const far = Math.max(...this.pixels.size);
    const at = (x, y) => this.viewport.imageToViewerElementCoordinates(new OpenSeadragon.Point(x, y));
    const [origin, right, down] = [at(0, 0), at(far, 0), at(0, far)];
    return [
      (right.x - origin.x) / far, (right.y - origin.y) / far,
      (down.x - origin.x) / far, (down.y - origin.y) / far, origin.x, origin.y,
    ];
  }

  // Pixels of the page per level-0 pixel.
  get scale() {
    const [a, b] = this.transform();
    return Math.hypot(a, b);
  }

  get sideBySide() {
    return this.plain !== null;
  }

  // The plain slide beside the one with layers.
  setSideBySide(on) {
    if (on === this.sideBySide) return;
    const [size, centre] = [this.viewport.getContainerSize(), this.viewport.getCenter()];
    const scale = this.viewport.viewportToImageZoom(this.viewport.getZoom());
    byId("cross").hidden = true;
    byId("plain").hidden = !on;
    byId("stage").classList.toggle("double", on);
    if (on) {
      this.plain = openSeadragon(byId("plain"), this.id, this.pixels);
      this.plain.addOnceHandler("open", () => {
        this.leader = this.main;
        this.#follow(this.main, true);
      });
      const plain = this.plain;
      plain.addHandler("update-viewport", () => this.#follow(plain));
      byId("plain").onpointerdown = () => (this.leader = plain);
      byId("plain").onwheel = () => (this.leader = plain);
    } else {
      this.leader = this.main;
      this.plain.destroy();
      this.plain = null;
    }
    // All that was seen is still seen beside the other; alone again, the view is as large as before.
    this.main.addOnceHandler("resize", ({ newContainerSize }) => requestAnimationFrame(() => {
      const ratio = (on ? Math.min : Math.max)(newContainerSize.x / size.x, newContainerSize.y / size.y);
      this.viewport.zoomTo(this.viewport.imageToViewportZoom(scale * ratio), null, true);
      this.viewport.panTo(centre, true);
    }));
  }

  #follow(from, always = false) {
    if (!this.plain || (from !== this.leader && !always)) return;
    const to = from === this.main ? this.plain : this.main;
    if (!to.isOpen() || !from.isOpen()) return;
    const [there, here] = [to.viewport, from.viewport];
    if (here.getRotation(true) !== there.getRotation()) there.setRotation(here.getRotation(true), true);
    if (here.getZoom(true) !== there.getZoom()) there.zoomTo(here.getZoom(true), null, true);
    const [wanted, is] = [here.getCenter(true), there.getCenter()];
    if (wanted.x !== is.x || wanted.y !== is.y) there.panTo(wanted, true);
  }
}

export function toolbar(viewer, toggleLayers) {
  const place = byId("toolbar");
  const button = (name, title, act, pressed) => {
    const made = element("button", { type: "button", title }, icon(name));
    made.setAttribute("aria-label", title);
    if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
    made.addEventListener("click", () => act(made));
    place.append(made);
    return made;
  };
  button("in", "Zoom in (+)", () => viewer.zoom(1.6));
  button("out", "Zoom out (-)", () => viewer.zoom(1 / 1.6));
  button("home", "Whole slide (0)", () => viewer.home());
  button("left", "Turn left (Shift+R)", () => viewer.rotate(-TURN));
  button("right", "Turn right (R)", () => viewer.rotate(TURN));
  const layers = button("layers", "Layers on and off (L)", () => press(layers, toggleLayers()), true);
  const side = button("side", "Plain slide beside it (B)", () => {
    viewer.setSideBySide(!viewer.sideBySide);
    press(side, viewer.sideBySide);
  }, false);
  const press = (made, on) => made.setAttribute("aria-pressed", on);
  document.addEventListener("keydown", (event) => {
    if (isTyped(event) || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      "+": () => viewer.zoom(1.6), "=": () => viewer.zoom(1.6), "-": () => viewer.zoom(1 / 1.6), 0: () => viewer.home(),
      r: () => viewer.rotate(TURN), R: () => viewer.rotate(-TURN),
      l: () => layers.click(), b: () => side.click(),
    }[event.shiftKey ? event.key : event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault(); // a select would look for a name with this letter
    act();
  });
  // Of OpenSeadragon's own keys, which work where the slide was clicked, the arrows alone.
  viewer.main.addHandler("canvas-key", (event) => {
    event.preventDefaultAction ||= !event.originalEvent.key.startsWith("Arrow");
  });
}

// A bar of 1, 2 or 5 times a power of ten, at most a quarter of the view's width.
export function scaleBar(viewer, micronsPerPixel) {
  const place = byId("scale");
  if (!micronsPerPixel) return;
  place.hidden = false;
  const bar = element("div");
  const label = element("span");
  const magnification = element("small", { title: "Magnification, where 0.25 µm a pixel is 40×" });
  place.append(bar, label, magnification);
  const draw = () => {
    const microns = micronsPerPixel / viewer.scale; // per pixel of the page
    const most = Math.min(160, byId("main").clientWidth / 4) * microns;
    const power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].map((step) => step * power).find((one) => one <= most * (1 + 1e-9));
    magnification.textContent = `${number(10 / microns, 2)}×`;
    bar.style.width = `${length / microns}px`;
    label.textContent = length >= 1000 ? `${+(length / 1000).toPrecision(3)} mm` : `${+length.toPrecision(3)} µm`;
  };
  viewer.main.addHandler("update-viewport", draw);
  draw();
}
