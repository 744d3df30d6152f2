// The strongest tiles of the layer that is shown; a click flies to a tile's place.

import { element, number } from "../dom.js";
import { marksPainter } from "../overlay.js";

const TILES = 8;

export function galleryPanel(page) {
  if (!page.tiles || !page.viewer || !page.info.layers.length) return null;
  const content = element("div", { className: "panel" });
  const marks = page.overlay.add(marksPainter(page.tiles, 30, false));
  const fill = () => {
    content.replaceChildren();
    marks.marks = [];
    const layer = page.layer;
    const numbers = layer?.kind === "signed" || layer?.kind === "unsigned";
    if (!numbers) {
      content.append(element("p", { className: "soft", textContent: "Choose a layer with numbers to see its strongest tiles." }));
      page.overlay.draw();
      return;
    }
    const sides = layer.kind === "signed" ? [[1, layer.ends[1]], [-1, layer.ends[0]]] : [[1, `highest ${layer.title}`]];
    for (const [sign, title] of sides) {
      const chosen = page.tiles.strongest(layer.values, TILES, sign);
      if (!chosen.length) continue;
      content.append(element("h3", { textContent: title }), tileRow(page, chosen, (tile) => number(layer.values[tile])));
      marks.marks.push(...chosen.map((tile) => ({ tile, colour: sign > 0 ? "#b40426" : "#3b4cc0", width: 1.5 })));
    }
    page.overlay.draw();
  };
  page.addEventListener("layer", fill);
  fill();
  return { title: "Strongest tiles", content };
}

// Pictures of tiles of this slide that fly to their place.
export function tileRow(page, tiles, caption) {
  const row = element("div", { className: "gallery" });
  for (const tile of tiles) {
    const title = page.describe(tile).join("\n");
    const picture = element("img", { src: page.tilePicture(tile), alt: "", loading: "lazy", title });
    const button = element("button", { type: "button" }, picture, element("span", { textContent: caption(tile) }));
    button.setAttribute("aria-label", `Go to ${page.describe(tile).join(", ")}`);
    button.addEventListener("click", () => page.fly(tile));
    row.append(button);
  }
  return row;
}
