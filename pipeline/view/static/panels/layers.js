// Which layer is drawn over the slide, and how: opacity, colour map, range; tissue and grid.

import { CATEGORY_COLOURS, SIGNED_MAPS, UNSIGNED_MAPS, rgb, table } from "../colours.js";
import { byId, element, number, say } from "../dom.js";
import { remember, remembered } from "../memory.js";
import { drawPicture } from "../overlay.js";

const MOST_CATEGORIES = 40; // names in the legend

// What was chosen, for the next slide and after a reload: { shown, opacity, weak, maps, ranges, switches }.
const kept = remembered("layers");
const keep = (changes) => remember("layers", Object.assign(kept, changes));
const nameOf = ({ group, title }) => `${group}: ${title}`; // keys differ between slides

export function layersPanel(page) {
  if (!page.viewer) return null;
  const { info, tiles, overlay } = page;
  const content = element("div", { className: "panel" });
  const switches = element("div", { className: "switches" });
  const toggle = (title, painter) => {
    painter.on = kept.switches?.[title] ?? painter.on;
    const box = element("input", { type: "checkbox", checked: painter.on });
    box.addEventListener("input", () => {
      painter.on = box.checked;
      keep({ switches: { ...kept.switches, [title]: box.checked } });
      overlay.draw();
    });
    switches.append(element("label", { className: "chip" }, box, title));
  };
  if (tiles && info.layers.length) content.append(...layerControls(page));
  if (info.tissue.length) toggle("tissue", page.tissue);
  else if (!info.pixels.error) {
    const find = element("button", { type: "button", textContent: "Find the tissue" });
    find.addEventListener("click", async () => {
      [find.disabled, find.textContent] = [true, "Finding the tissue …"];
      try {
        await page.findTissue();
        find.remove();
        if (info.tissue.length) toggle("tissue", page.tissue);
        else switches.append(element("span", { className: "soft", textContent: "No tissue was found." }));
      } catch (error) {
        say(error.message);
        [find.disabled, find.textContent] = [false, "Find the tissue"];
      }
    });
    switches.append(find);
  }
  if (page.grid) toggle("tile grid", page.grid);
  if (switches.childElementCount) content.append(switches);
  return content.childElementCount ? { title: "Layers", content } : null;
}

function layerControls(page) {
  const { info, tiles, overlay } = page;
  const select = element("select", {}, element("option", { value: "", textContent: "none" }));
  select.setAttribute("aria-label", "Layer");
  for (const group of new Set(info.layers.map((layer) => layer.group))) {
    const box = element("optgroup", { label: group });
    for (const layer of info.layers.filter((one) => one.group === group)) {
      box.append(element("option", { value: layer.key, textContent: layer.title }));
    }
    select.append(box);
  }
  const opacity = slider("Opacity", 0, 100, kept.opacity ?? 55);
  const weak = slider("Hide weaker than", 0, 100, kept.weak ?? 0);
  const map = element("select");
  const low = element("input", { type: "number", step: "any" });
  const high = element("input", { type: "number", step: "any" });
  const reset = element("button", { type: "button", textContent: "Reset" });
  const ramp = element("canvas", { className: "ramp", width: 256, height: 1 });
  const ends = element("div", { className: "ends" });
  const names = element("ul", { className: "categories" });
  const about = element("p", { className: "soft" });
  const mapRow = element("label", { className: "row" }, "Colours ", map);
  const rangeRow = element("div", { className: "row range" }, element("label", {}, "From ", low), element("label", {}, "to ", high), reset);
  let picture = null;

  const painter = overlay.add({
    order: 10,
    draw(context) {
      if (!picture || page.covered) return;
      context.globalAlpha = opacity.input.value / 100;
      drawPicture(context, tiles, picture);
    },
  });

  const paint = () => {
    const layer = page.layer;
    picture = null;
    if (layer?.kind === "categories") {
      const colours = CATEGORY_COLOURS.map(rgb);
      picture = tiles.picture((i, out) => {
        const value = layer.values[i];
        if (value >= 0) out.splice(0, 4, ...colours[value % colours.length], 255);
      });
    } else if (layer?.kind === "colours") {
      picture = tiles.picture((i, out) => out.splice(0, 4, ...layer.values.subarray(3 * i, 3 * i + 3), 255));
    } else if (layer) {
      const colours = table(map.value);
      const [from, to] = [Number(low.value), Number(high.value)];
      const most = Math.max(Math.abs(from), Math.abs(to));
      const hidden = layer.kind === "signed" ? (weak.input.value / 100) * most : from + (weak.input.value / 100) * (to - from);
      picture = tiles.picture((i, out) => {
        const value = layer.values[i];
        if (!Number.isFinite(value)) return;
        if (weak.input.value > 0 && (layer.kind === "signed" ? Math.abs(value) : value) < hidden) return;
        const step = to > from ? Math.round(255 * Math.min(1, Math.max(0, (value - from) / (to - from)))) : 0;
        out.splice(0, 4, colours[3 * step], colours[3 * step + 1], colours[3 * step + 2], 255);
      });
    }
    overlay.draw();
  };

  const legend = () => {
    const layer = page.layer;
    const numbers = layer?.kind === "signed" || layer?.kind === "unsigned";
    for (const part of [mapRow, rangeRow, ramp, weak.row]) part.hidden = !numbers;
    opacity.row.hidden = !layer;
    names.replaceChildren();
    ends.replaceChildren();
    about.textContent = layer?.about ?? "";
    if (numbers) {
      const context = ramp.getContext("2d");
      const image = context.createImageData(256, 1);
      const colours = table(map.value);
      for (let step = 0; step < 256; step++) image.data.set([...colours.subarray(3 * step, 3 * step + 3), 255], 4 * step);
      context.putImageData(image, 0, 0);
      const [first, last] = layer.ends;
      ends.append(
        element("span", { textContent: `${number(Number(low.value))} ${first ?? ""}` }),
        element("span", { textContent: `${last ?? ""} ${number(Number(high.value))}` }),
      );
    } else if (layer?.kind === "categories") {
      layer.ends.slice(0, MOST_CATEGORIES).forEach((name, place) => {
        const colour = element("i");
        colour.style.background = CATEGORY_COLOURS[place % CATEGORY_COLOURS.length];
        names.append(element("li", {}, colour, name));
      });
    }
  };

  // The same over the slide, where it is seen on a phone and in a screenshot.
  const mapLegend = () => {
    const layer = page.layer;
    const place = byId("legend");
    place.hidden = !layer || (layer.kind !== "signed" && layer.kind !== "unsigned");
    if (place.hidden) return;
    const copy = element("canvas", { width: 256, height: 1 });
    copy.getContext("2d").drawImage(ramp, 0, 0);
    const shown = [low, high].map((one) => element("span", { textContent: number(Number(one.value)) }));
    place.replaceChildren(
      element("div", { textContent: [layer.title, layer.unit].filter(Boolean).join(", ") }), copy, element("div", { className: "ends" }, ...shown),
    );
  };

  const resetRange = () => {
    const { limit, kind } = page.layer;
    low.value = kind === "signed" ? -Number(limit.toPrecision(3)) : 0;
    high.value = Number(limit.toPrecision(3));
  };

  const choose = async () => {
    const wanted = select.value;
    const late = setTimeout(() => ends.replaceChildren("being computed …"), 300);
    try {
      const layer = wanted ? await page.layerOf(wanted) : null;
      if (select.value !== wanted) return; // another was chosen meanwhile
      const maps = layer?.kind === "signed" ? SIGNED_MAPS : UNSIGNED_MAPS;
      if (map.dataset.kind !== layer?.kind) {
        map.replaceChildren(...maps.map((name) => element("option", { value: name, textContent: name })));
        map.dataset.kind = layer?.kind;
        if (maps.includes(kept.maps?.[layer?.kind])) map.value = kept.maps[layer.kind];
      }
      page.setLayer(layer);
      if (layer && layer.limit) {
        resetRange();
        [low.value, high.value] = kept.ranges?.[nameOf(layer)] ?? [low.value, high.value];
      }
      redraw();
    } catch (error) {
      say(error.message);
    } finally {
      clearTimeout(late);
    }
  };

  const redraw = () => {
    legend();
    mapLegend();
    paint();
  };
  select.addEventListener("input", () => {
    const chosen = info.layers.find((layer) => layer.key === select.value);
    keep({ shown: chosen ? nameOf(chosen) : "" });
    choose();
  });
  opacity.input.addEventListener("input", () => {
    keep({ opacity: opacity.input.value });
    overlay.draw();
  });
  weak.input.addEventListener("input", () => {
    keep({ weak: weak.input.value });
    paint();
  });
  map.addEventListener("input", () => {
    keep({ maps: { ...kept.maps, [page.layer.kind]: map.value } });
    redraw();
  });
  for (const part of [low, high]) {
    part.addEventListener("input", () => {
      keep({ ranges: { ...kept.ranges, [nameOf(page.layer)]: [low.value, high.value] } });
      redraw();
    });
  }
  reset.addEventListener("click", () => {
    resetRange();
    weak.input.value = 0;
    weak.show();
    keep({ weak: 0, ranges: { ...kept.ranges, [nameOf(page.layer)]: undefined } });
    redraw();
  });
  const first = info.layers.find((layer) => !["quality", "embeddings"].includes(layer.group));
  const before = info.layers.find((layer) => nameOf(layer) === kept.shown) ?? (kept.shown === "" ? null : first);
  if (before) select.value = before.key;
  page.chooseLayer = (key) => {
    select.value = key;
    return choose();
  };
  page.layerPainter = painter;
  choose();
  return [
    element("label", { className: "row" }, "Show ", select),
    about, opacity.row, ramp, ends, names, mapRow, rangeRow, weak.row,
  ];
}

export function slider(title, least, most, value) {
  const input = element("input", { type: "range", min: least, max: most, value });
  const shown = element("output");
  const show = () => (shown.textContent = `${input.value}%`);
  input.addEventListener("input", show);
  show();
  return { input, show, row: element("label", { className: "row" }, `${title} `, input, shown) };
}
