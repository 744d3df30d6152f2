// Regions to embed instead of the tissue that was found: drawn, added to, cut from, saved as GeoJSON.
// A drag draws freehand; clicks set corners, and a double click or Enter closes the outline; Escape drops it. Two fingers move
// the slide meanwhile.

import { json, post, put, slidePath } from "../api.js";
import { byId, element, isTyped, say } from "../dom.js";
import { tracePath } from "../overlay.js";

const { OpenSeadragon } = window;

const COLOUR = "#6a1b9a";
const NEAR = { mouse: 8, pen: 12, touch: 24 }; // pixels of the page: so near to the first corner, a click closes the outline
const NOTHING = { type: "FeatureCollection", features: [] };

export function regionsPanel(page) {
  if (!page.viewer) return null;
  const state = { regions: NOTHING, saved: NOTHING, before: [], tool: null, ring: [], busy: false, loaded: false };
  const path = slidePath(page.id, "/regions");

  const button = (text, act, title) => {
    const made = element("button", { type: "button", textContent: text, title });
    made.addEventListener("click", act);
    return made;
  };
  const tool = (name, text, title) => {
    const made = button(text, () => choose(state.tool === name ? null : name), title);
    made.setAttribute("aria-pressed", "false");
    return made;
  };
  const tools = { add: tool("add", "Draw", "Draw an area: drag, or click its corners"), remove: tool("remove", "Cut", "Cut an area away") };
  const fromTissue = button("Start from the tissue", () => change({ type: "FeatureCollection", features: tissueFeatures(page.info.tissue) }));
  const close = button("Close outline", () => finish(), "Close the outline (Enter, a double click, or its first corner)");
  const undo = button("Undo", () => {
    state.regions = state.before.pop();
    show();
  });
  const clear = button("Clear", () => change(NOTHING));
  const save = button("Save", () => saveRegions());
  const hint = element("p", { className: "soft", hidden: true, textContent: "Drag for freehand, or click corners. Wheel or two fingers move the slide." });
  const status = element("p", { className: "soft" });
  status.setAttribute("role", "status");
  const content = element("div", { className: "panel" },
    element("p", { className: "soft", textContent: "What to embed instead of the tissue that was found. Draw an area, or correct the tissue." }),
    element("div", { className: "buttons" }, tools.add, tools.remove, close, fromTissue, undo, clear, save), hint, status);

  close.hidden = true;
  let outline = new Path2D();
  page.overlay.add({
    order: 25,
    always: true,
    draw(context, scale) {
      context.lineJoin = "round";
      context.fillStyle = "rgb(106 27 154 / 14%)";
      context.fill(outline, "evenodd");
      context.lineWidth = 2.5 / scale;
      context.strokeStyle = COLOUR;
      context.stroke(outline);
      if (!state.ring.length) return;
      const ring = new Path2D();
      state.ring.forEach(([x, y], place) => (place ? ring.lineTo(x, y) : ring.moveTo(x, y)));
      context.setLineDash([6 / scale, 4 / scale]);
      context.strokeStyle = state.tool === "remove" ? "#b3261e" : COLOUR;
      context.stroke(ring);
      context.setLineDash([]);
      const [x, y] = state.ring[0];
      context.fillStyle = context.strokeStyle;
      context.fillRect(x - 3 / scale, y - 3 / scale, 6 / scale, 6 / scale);
    },
  });

  // The surface takes the pointer while something is drawn; wheel and tools still move the slide.
  const surface = element("div", { className: "surface", hidden: true });
  page.viewer.main.container.append(surface);
  const at = (event) => {
    const box = surface.getBoundingClientRect();
    const place = page.viewer.toSlide(event.clientX - box.left, event.clientY - box.top);
    return [Math.round(place.x * 10) / 10, Math.round(place.y * 10) / 10];
  };
  let drag = null;
  const fingers = new Map(); // pointer -> where it is
  for (const kind of ["pointerdown", "pointermove", "pointerup", "dblclick", "click"]) {
    surface.addEventListener(kind, (event) => event.stopPropagation());
  }
  surface.addEventListener("wheel", (event) => {
    event.preventDefault();
    event.stopPropagation();
    page.viewer.zoom(event.deltaY < 0 ? 1.25 : 0.8);
  }, { passive: false });
  surface.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    surface.setPointerCapture(event.pointerId);
    if (fingers.size > 1) {
      if (drag) state.ring.length = drag.corners; // the first finger did not mean to draw
      drag = null;
      page.overlay.draw();
      return;
    }
    if (event.button !== 0 || state.busy) return;
    drag = { x: event.clientX, y: event.clientY, moved: false, corners: state.ring.length };
    if (closes(event)) return;
    state.ring.push(at(event));
    page.overlay.draw();
  });
  surface.addEventListener("pointermove", (event) => {
    if (fingers.size > 1) {
      if (fingers.has(event.pointerId)) pinch(event);
      return;
    }
    if (fingers.has(event.pointerId)) fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (!drag) return;
    if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < (drag.moved ? 2 : 5)) return;
    [drag.x, drag.y, drag.moved] = [event.clientX, event.clientY, true];
    state.ring.push(at(event));
    page.overlay.draw();
  });
  surface.addEventListener("pointerup", (event) => {
    fingers.delete(event.pointerId);
    if (!drag) return;
    const { moved, corners } = drag;
    drag = null;
    if ((moved && corners === 0) || (!moved && closes(event))) finish();
    else showOutline();
  });
  surface.addEventListener("pointercancel", (event) => {
    fingers.delete(event.pointerId);
    if (drag) state.ring.length = drag.corners;
    drag = null;
    page.overlay.draw();
  });
  surface.addEventListener("dblclick", () => finish());
  document.addEventListener("keydown", (event) => {
    if (!state.tool || isTyped(event)) return;
    if (event.key === "Enter" && !event.target.closest?.("a, button, select, summary")) finish(); // those it presses
    if (event.key === "Escape") state.ring.length ? drop() : choose(null);
  });

  // Two fingers move the slide: it stays under both.
  function pinch(event) {
    const { viewport } = page.viewer;
    const box = surface.getBoundingClientRect();
    const point = ([x, y]) => new OpenSeadragon.Point(x - box.left, y - box.top);
    const [first, second] = [...fingers.values()].map(point);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    const [one, other] = [...fingers.values()].map(point);
    const middle = (a, b) => a.plus(b).divide(2);
    const moved = middle(first, second).minus(middle(one, other));
    viewport.panBy(viewport.deltaPointsFromPixels(moved, true), true);
    const factor = one.distanceTo(other) / Math.max(1, first.distanceTo(second));
    viewport.zoomBy(factor, viewport.pointFromPixel(middle(one, other), true), true);
    viewport.applyConstraints(true);
    viewport.update(); // the other finger's event may come before the next frame
    page.viewer.main.forceRedraw();
  }

  function closes(event) {
    if (state.ring.length < 3) return false;
    const [x, y] = at(event);
    const distance = Math.hypot(x - state.ring[0][0], y - state.ring[0][1]) * page.viewer.scale;
    return distance < (NEAR[event.pointerType] ?? NEAR.mouse);
  }

  function drop() {
    drag = null;
    state.ring = [];
    showOutline();
  }

  function showOutline() {
    close.hidden = state.ring.length < 3;
    page.overlay.draw();
    keepDraft();
  }

  async function finish() {
    const ring = state.ring;
    if (state.busy || ring.length < 3) return;
    state.busy = true;
    try {
      const asked = { regions: state.regions, ring: [...ring, ring[0]], change: state.tool };
      change((await post(path, asked)).regions);
      drop();
    } catch (error) {
      say(error.message); // the outline stays: Enter tries again
    }
    state.busy = false;
  }

  function choose(name) {
    state.tool = name;
    for (const [key, made] of Object.entries(tools)) made.setAttribute("aria-pressed", String(key === name));
    surface.hidden = hint.hidden = name === null;
    fingers.clear();
    byId("tip").hidden = true;
    drop();
  }

  function change(regions) {
    state.before.push(state.regions);
    state.regions = regions;
    show();
  }

  async function saveRegions() {
    save.disabled = true;
    const sent = state.regions; // what is drawn meanwhile is not saved
    try {
      const { path: file, table } = await put(path, sent);
      state.saved = sent;
      show();
      status.replaceChildren();
      if (file) {
        const command = `longslide embed ${table} --output … --tile-encoder …`;
        status.append(`Saved: ${file}. To embed it: `, element("code", { textContent: command }));
      } else status.append("Removed: the tissue that is found is embedded.");
    } catch (error) {
      say(error.message);
      show();
    }
  }

  function show() {
    outline = new Path2D();
    for (const feature of state.regions.features) for (const ring of feature.geometry.coordinates) tracePath(outline, ring);
    const changed = JSON.stringify(state.regions) !== JSON.stringify(state.saved);
    undo.disabled = !state.before.length;
    clear.disabled = !state.regions.features.length;
    save.disabled = !changed || !page.info.saves;
    fromTissue.hidden = !page.info.tissue.length;
    const count = state.regions.features.length;
    status.textContent = !page.info.saves
      ? "Start the viewer with --output FOLDER to save regions."
      : `${count ? `${count} ${count === 1 ? "area" : "areas"}` : "Nothing drawn"}${changed ? ", not saved yet." : count ? ", saved." : "."}`;
    page.overlay.draw();
    keepDraft();
  }

  // What is not saved yet is with the server, for a tab that is closed and a viewer that is ended.
  const draft = { kept: "null", sending: false, lasts: true };

  const unsaved = () => {
    const { regions, saved, ring, tool: change } = state;
    const some = ring.length || JSON.stringify(regions) !== JSON.stringify(saved);
    return JSON.stringify(some ? { regions, ring, change } : null);
  };

  async function keepDraft() {
    if (draft.sending || !state.loaded) return;
    draft.sending = true;
    while (unsaved() !== draft.kept) {
      const sent = unsaved();
      try {
        draft.lasts = (await put(`${path}/draft`, JSON.parse(sent))).lasts;
      } catch {
        draft.lasts = false;
      }
      draft.kept = sent;
    }
    draft.sending = false;
  }

  window.addEventListener("beforeunload", (event) => {
    if (state.loaded && (!page.draftIsKept() || (draft.kept !== "null" && !draft.lasts))) event.preventDefault();
  });

  async function load() {
    let found = null;
    try {
      const known = await json(path);
      state.regions = state.saved = known.regions ?? NOTHING;
      found = known.draft;
    } catch (error) {
      say(error.message);
    }
    if (found) {
      draft.kept = JSON.stringify(found);
      change(found.regions);
      choose(found.change);
      state.ring = found.ring;
      content.parentElement.open = true;
    }
    state.loaded = true;
    show();
    showOutline();
  }
  load();
  page.addEventListener("tissue", show);
  page.regions = () => state.regions;
  page.draftIsKept = () => state.loaded && unsaved() === draft.kept;
  return { title: "Regions", content, open: false };
}

function tissueFeatures(polygons) {
  return polygons.map((coordinates) => ({ type: "Feature", properties: {}, geometry: { type: "Polygon", coordinates } }));
}
