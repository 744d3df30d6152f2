// Which tiles the one that was clicked sees under dilated attention: of each branch, each head, all heads, and after all layers.

import { bytes, json, slidePath } from "../api.js";
import { CATEGORY_COLOURS, rgb } from "../colours.js";
import { element } from "../dom.js";
import { drawPicture, marksPainter } from "../overlay.js";
import { slider } from "./layers.js";

const IN_SEGMENT = 64; // as in attention.py
const LAYER_COLOURS = ["#08306b", "#2171b5", "#6baed6", "#c6dbef"]; // after 1, 2, 3 layers, and more
const TINT = 0.75; // how much paler the rest of a segment is

export function attentionPanel(page) {
  if (!page.tiles || !page.viewer || !page.info.facts["feature file"]) return null;
  const content = element("div", { className: "panel", id: "attention" });
  const model = element("select");
  const show = element("select");
  const whose = element("p", { className: "soft" });
  const line = element("p");
  line.setAttribute("role", "status");
  const legend = element("ul", { className: "categories one" });
  const opacity = slider("Opacity", 0, 100, 55);
  const clear = element("button", { type: "button", textContent: "Clear", hidden: true });
  content.append(
    element("p", { className: "soft", textContent: "Click a tile: in colour are the tiles that it can take information from. Tiles are read row by row, so a segment is a band of rows." }),
    element("label", { className: "row" }, "Model ", model),
    whose,
    element("label", { className: "row" }, "Show ", show),
    line, legend, opacity.row, clear,
  );
  const painter = page.overlay.add({
    order: 12,
    picture: null,
    draw(context) {
      if (!this.picture) return;
      context.globalAlpha = opacity.input.value / 100;
      drawPicture(context, page.tiles, this.picture);
    },
  });
  const marks = page.overlay.add(marksPainter(page.tiles, 32));
  const path = slidePath(page.id, "/attention");
  const known = new Map(); // key of a model -> what it is like
  let prepared = null;
  let picked = -1;

  const group = (title, models) =>
    element("optgroup", { label: title }, ...models.map(({ key, name }) => element("option", { value: key, textContent: name })));

  const describe = async (key) => {
    if (!known.has(key)) known.set(key, await json(`${path}/${encodeURIComponent(key)}`));
    return known.get(key);
  };

  // The models; the first of the user's own that has attention between tiles is shown, else a published one.
  const prepare = () => {
    prepared ??= (async () => {
      whose.textContent = "Reading the models …";
      const { trained, published } = await json(path);
      model.replaceChildren(...(trained.length ? [group("trained here", trained)] : []), group("published", published));
      const refusals = [];
      for (const { key } of trained) {
        model.value = key;
        try {
          await choose();
          break;
        } catch (error) {
          refusals.push(error.message);
        }
      }
      if (refusals.length === trained.length) {
        model.value = "gigapath";
        await choose();
        const why = trained.length ? refusals.join("\n") : "No model of yours is known here: give its run folder or results to the viewer too.";
        const other = page.info.prediction === null ? "" : " It is not the model of this prediction.";
        whose.replaceChildren(`${whose.textContent}${other} ${why}`);
      }
    })().catch((error) => {
      prepared = null; // the next click asks again
      throw error;
    });
    return prepared;
  };

  // Offer what the chosen model has.
  const choose = async () => {
    const key = model.value;
    const { name, heads, layers, branches, labels } = await describe(key);
    if (key !== model.value) return;
    const options = [["heads", "all heads of a layer"], ["layers", `what reaches it within ${layers} layers`]];
    branches.forEach((_, number) => options.push([`branch-${number}`, branchName(known.get(key), number)]));
    for (let head = 0; head < heads; head++) options.push([`head-${head}`, `head ${head}`]);
    const before = show.value;
    show.replaceChildren(...options.map(([value, textContent]) => element("option", { value, textContent })));
    if (options.some(([value]) => value === before)) show.value = before;
    const own = key.startsWith("model-");
    const pattern = branches.length ? "dilated attention" : `attention pattern ${labels[0]}`;
    const title = own ? `your model ${model.selectedOptions[0].textContent}` : `${name}, as published`;
    whose.textContent = `Shown: ${title} (${pattern}, ${count(layers, "layer")}, ${count(heads, "head")}).`;
  };

  const draw = async () => {
    if (picked < 0) return;
    const [tile, what, key] = [picked, show.value, model.value];
    try {
      const seen = new Int8Array(await bytes(`${path}/${encodeURIComponent(key)}/${tile}?show=${what}`));
      if (tile !== picked || what !== show.value || key !== model.value) return;
      paint(seen, what, known.get(key));
      marks.marks = [{ tile, colour: "#000", width: 3 }];
      clear.hidden = false;
      page.overlay.draw();
    } catch (error) {
      line.textContent = error.message;
    }
  };

  const paint = (seen, what, sight) => {
    const layers = what === "layers";
    const colourOf = (mark) => {
      if (layers) return rgb(LAYER_COLOURS[Math.min(Math.max(mark, 1), LAYER_COLOURS.length) - 1]);
      const colour = rgb(CATEGORY_COLOURS[(mark % IN_SEGMENT) % CATEGORY_COLOURS.length]);
      return mark < IN_SEGMENT ? colour : colour.map((part) => part + TINT * (255 - part));
    };
    const counts = new Map();
    page.cover(true);
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
      ...[...counts].sort(([a], [b]) => a - b).map(([mark, tiles]) => {
        const colour = element("i");
        colour.style.background = `rgb(${colourOf(mark).join(" ")})`;
        return element("li", {}, colour, `${name(mark, layers, sight)}: ${tiles.toLocaleString("en")}`);
      }),
    );
  };

  const name = (mark, layers, sight) => {
    if (layers) return `after ${count(mark, "layer")}`;
    return mark < IN_SEGMENT ? branchName(sight, mark) : "the rest of its segment";
  };

  const stop = () => {
    picked = -1;
    page.cover(false);
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
  content.addEventListener("opened", () => prepare().catch((error) => (whose.textContent = error.message)));
  content.addEventListener("closed", stop);
  model.addEventListener("input", async () => {
    whose.textContent = "Reading the model …";
    try {
      await choose();
      await draw();
    } catch (error) {
      stop();
      whose.textContent = error.message;
    }
  });
  show.addEventListener("input", draw);
  opacity.input.addEventListener("input", () => page.overlay.draw());
  clear.addEventListener("click", stop);
  return { title: "What a tile sees (LongNet)", content, open: false };
}

function branchName({ branches, labels }, number) {
  if (!branches.length) return labels[number];
  const [length, ratio] = branches[number];
  const ending = ratio % 100 > 10 && ratio % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[ratio % 10] ?? "th";
  return `segments of ${length.toLocaleString("en")}, every ${ratio === 1 ? "tile" : `${ratio}${ending} tile`}`;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}
