// Tiles of all slides that are most like the one that was clicked; a click on one flies to its place, or opens its slide there.

import { json, slidePath } from "../api.js";
import { element } from "../dom.js";
import { marksPainter } from "../overlay.js";

const AGAIN = 700; // milliseconds after which an index that is being made is asked for again

export function similarPanel(page) {
  if (!page.tiles || !page.viewer || !page.info.facts["feature file"]) return null;
  const content = element("div", { className: "panel", id: "similar" });
  const others = element("input", { type: "checkbox" });
  const line = element("p", { className: "soft", textContent: "Click a tile of the slide." });
  line.setAttribute("role", "status");
  const hits = element("div", { className: "gallery three" });
  content.append(element("label", { className: "chip" }, others, "other slides only"), line, hits);
  const marks = page.overlay.add(marksPainter(page.tiles, 31));
  let asked = -1;

  const show = (tile, answer) => {
    const [tiles, slides] = [answer.tiles, answer.slides].map((count) => count.toLocaleString("en"));
    line.textContent = `The nearest of ${tiles} tiles of ${slides} slides, by the cosine of their embeddings.`;
    if (answer.left_out.length) line.title = answer.left_out.join("\n");
    hits.replaceChildren(...answer.hits.map((hit) => picture(page, hit)));
    const here = answer.hits.filter((hit) => hit.slide === page.id);
    marks.marks = [...here.map((hit) => ({ tile: hit.tile, colour: "#0b5c8a", width: 2 })), { tile, colour: "#000", width: 3 }];
    page.overlay.draw();
  };

  const find = async (tile) => {
    asked = tile;
    const query = `/similar/${tile}?other_slides=${others.checked ? 1 : 0}`;
    line.textContent = "Searching …";
    hits.replaceChildren();
    marks.marks = [{ tile, colour: "#000", width: 3 }];
    page.overlay.draw();
    try {
      let answer = await json(slidePath(page.id, query));
      while (answer.making && asked === tile) {
        tellProgress(answer.making);
        await new Promise((resolve) => setTimeout(resolve, AGAIN));
        answer = await json(slidePath(page.id, query));
      }
      if (asked === tile && !answer.making) show(tile, answer);
    } catch (error) {
      if (asked === tile) line.textContent = error.message;
    }
  };

  // Gather the embeddings before the first click.
  const prepare = async () => {
    try {
      let answer = await json("api/index");
      while (answer.making && asked < 0 && open()) {
        tellProgress(answer.making);
        await new Promise((resolve) => setTimeout(resolve, AGAIN));
        answer = await json("api/index");
      }
      if (asked < 0) line.textContent = "Click a tile of the slide.";
    } catch (error) {
      if (asked < 0) line.textContent = error.message;
    }
  };

  const tellProgress = ([done, of]) => (line.textContent = `Gathering the embeddings of all slides, once: ${done} of ${of || "…"}`);
  const open = () => content.parentElement?.open;
  page.addEventListener("pick", (event) => open() && find(event.detail));
  others.addEventListener("input", () => asked >= 0 && find(asked));
  content.addEventListener("opened", () => asked < 0 && prepare());
  content.addEventListener("closed", () => {
    marks.marks = [];
    page.overlay.draw();
  });
  return { title: "Tiles like this one", content, open: false };
}

function picture(page, hit) {
  const place = `x=${hit.x}&y=${hit.y}&size=${hit.size}`;
  const cosine = hit.similarity.toFixed(3);
  const title = `${hit.slide}\ncosine ${cosine}\ntile at ${hit.x}, ${hit.y}`;
  const shown = element("img", { src: slidePath(hit.slide, `/region?${place}&px=192`), alt: "", loading: "lazy", title });
  const parts = [shown, element("span", { textContent: cosine }), element("span", { className: "of", textContent: hit.slide })];
  if (hit.slide === page.id) {
    const button = element("button", { type: "button" }, ...parts);
    button.setAttribute("aria-label", `Go to ${title.replaceAll("\n", ", ")}`);
    button.addEventListener("click", () => page.fly(hit.tile));
    return button;
  }
  const zoom = 200 / hit.size; // pixels of the page per level-0 pixel
  const [x, y] = [hit.x + hit.size / 2, hit.y + hit.size / 2].map(Math.round);
  const href = `slide.html?slide=${encodeURIComponent(hit.slide)}#x=${x}&y=${y}&zoom=${zoom.toPrecision(4)}&turn=0`;
  const link = element("a", { className: "hit", href }, ...parts);
  link.setAttribute("aria-label", `Open ${title.replaceAll("\n", ", ")}`);
  return link;
}
