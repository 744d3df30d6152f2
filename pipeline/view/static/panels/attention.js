// Which tiles the one that was clicked sees under dilated attention: of each branch, each head, all heads, and after all layers.

import { bytes, json, slidePath } from "../api.js";
import { CATEGORY_COLOURS, rgb } from "../colours.js";
import { element } from "../dom.js";
import { drawPicture, marksPainter } from "../overlay.js";

const IN_SEGMENT = 64; // as in attention.py
const LAYER_COLOURS = ["#08306b", "#2171b5", "#6baed6", "#c6dbef"]; // after 1, 2, 3 layers, and more
const TINT = 0.75; // how much paler the rest of a segment is

export function attentionPanel(page) {
  if (!page.tiles || !page.viewer || !page.info.facts["feature file"]) return null;
  const content = element("div", { className: "panel", id: "attention" });
  const encoder = element("select");
  const show = element("select");
  const line = element("p", { className: "soft" });
  const legend = element("ul", { className: "categories one" });
  const clear = element("button", { type: "button", textContent: "clear", hidden: true });
  content.append(
    element("p", { className: "soft", textContent: "Click a tile: in colour is what it sees. Tiles are read row by row, so a segment is a band of rows." }),
    element("label", { className: "row" }, "Encoder ", encoder),
    element("label", { className: "row" }, "Show ", show),
    line, legend, clear,
  );
  const painter = page.overlay.add({
    order: 12,
    picture: null,
    draw(context) {
      if (!this.picture) return;
      context.globalAlpha = 0.7;
      drawPicture(context, page.tiles, this.picture);
    },
  });
  const marks = page.overlay.add(marksPainter(page.tiles, 32));
  let specs = null;
  let picked = -1;

  const spec = () => specs.find((one) => one.name === encoder.value);

  const fillShow = () => {
    const { heads, layers, branches } = spec();
    const options = [["heads", "all heads of a layer"], ["layers", `what reaches it within ${layers} layers`]];
    branches.forEach(([length, ratio], number) => options.push([`branch-${number}`, branchName(length, ratio)]));
    for (let head = 0; head < heads; head++) options.push([`head-${head}`, `head ${head}`]);
    const before = show.value;
    show.replaceChildren(...options.map(([value, textContent]) => element("option", { value, textContent })));
    if (options.some(([value]) => value === before)) show.value = before;
  };

  const prepare = async () => {
    if (specs) return;
    specs = (await json("api/encoders")).encoders;
    encoder.replaceChildren(...specs.map((one) => element("option", { value: one.name, textContent: one.name })));
    if (specs.some((one) => one.name === "gigapath")) encoder.value = "gigapath";
    fillShow();
  };

  const draw = async () => {
    if (picked < 0) return;
    const [tile, what, model] = [picked, show.value, encoder.value];
    try {
      const query = `?encoder=${encodeURIComponent(model)}&show=${what}`;
      const seen = new Int8Array(await bytes(slidePath(page.id, `/attention/${tile}${query}`)));
      if (tile !== picked || what !== show.value || model !== encoder.value) return;
      paint(seen, what);
      marks.marks = [{ tile, colour: "#000", width: 3 }];
      clear.hidden = false;
      page.overlay.draw();
    } catch (error) {
      line.textContent = error.message;
    }
  };

  const paint = (seen, what) => {
    const layers = what === "layers";
    const colourOf = (mark) => {
      if (layers) return rgb(LAYER_COLOURS[Math.min(Math.max(mark, 1), LAYER_COLOURS.length) - 1]);
      const colour = rgb(CATEGORY_COLOURS[mark % IN_SEGMENT]);
      return mark < IN_SEGMENT ? colour : colour.map((part) => part + TINT * (255 - part));
    };
    const counts = new Map();
    painter.picture = page.tiles.picture((i, out) => {
      const mark = layers ? Math.max(seen[i], seen[i] < 0 ? -1 : 1) : seen[i];
      if (mark < 0) return;
      counts.set(mark, (counts.get(mark) ?? 0) + 1);
      out.splice(0, 4, ...colourOf(mark), 255);
    });
    const total = seen.length;
    const all = [...counts].filter(([mark]) => mark < IN_SEGMENT).reduce((sum, [, count]) => sum + count, 0);
    const share = `${((100 * all) / total).toPrecision(3)}% of ${total.toLocaleString("en")} tiles`;
    line.textContent = layers ? `${share} reach it` : `It sees ${share}`;
    legend.replaceChildren(
      ...[...counts].sort(([a], [b]) => a - b).map(([mark, count]) => {
        const colour = element("i");
        colour.style.background = `rgb(${colourOf(mark).join(" ")})`;
        return element("li", {}, colour, `${name(mark, layers)}: ${count.toLocaleString("en")}`);
      }),
    );
  };

  const name = (mark, layers) => {
    if (layers) return `after ${mark} layer${mark > 1 ? "s" : ""}`;
    const [length, ratio] = spec().branches[mark % IN_SEGMENT];
    return mark < IN_SEGMENT ? branchName(length, ratio) : "the rest of its segment";
  };

  const stop = () => {
    picked = -1;
    painter.picture = null;
    marks.marks = [];
    line.textContent = "";
    legend.replaceChildren();
    clear.hidden = true;
    page.overlay.draw();
  };

  const open = () => content.parentElement?.open;
  page.addEventListener("pick", async (event) => {
    if (!open()) return;
    picked = event.detail;
    try {
      await prepare();
      await draw();
    } catch (error) {
      line.textContent = error.message;
    }
  });
  content.addEventListener("opened", () => prepare().catch((error) => (line.textContent = error.message)));
  content.addEventListener("closed", stop);
  encoder.addEventListener("input", () => {
    fillShow();
    draw();
  });
  show.addEventListener("input", draw);
  clear.addEventListener("click", stop);
  return { title: "What a tile sees (LongNet)", content, open: false };
}

function branchName(length, ratio) {
  const ending = ratio % 100 > 10 && ratio % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[ratio % 10] ?? "th";
  return `segments of ${length.toLocaleString("en")}, every ${ratio === 1 ? "tile" : `${ratio}${ending} tile`}`;
}
