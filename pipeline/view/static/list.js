// The list of slides: search, filters, order; rows are made as they come into sight.

import { json, slidePath } from "./api.js";
import { byId, element, notesOn, number, say } from "./dom.js";
import { remember, remembered } from "./memory.js";

const PAGE = 60;

const FILTERS = [
  { key: "wrong", title: "wrong", test: (slide) => slide.wrong === true },
  { key: "uncertain", title: "uncertain", test: (slide) => slide.uncertain },
  { key: "odd", title: "failed QC", test: (slide) => slide.odd.length > 0 },
  { key: "warned", title: "warnings", test: (slide) => slide.warnings.length > 0 || slide.seen },
];

const state = { slides: [], shown: [], made: 0 };

function orders(task) {
  const byId_ = (a, b) => a.id.localeCompare(b.id, "en", { numeric: true });
  const found = [
    { key: "given", title: "as given", compare: null },
    { key: "id", title: "by name", compare: byId_ },
    { key: "certainty", title: "least certain first", compare: (a, b) => (a.certainty ?? 2) - (b.certainty ?? 2) },
    { key: "odd", title: "oddest first", compare: (a, b) => b.odd.length - a.odd.length },
  ];
  const names = new Set(state.slides.flatMap((slide) => Object.keys(slide.scores)));
  for (const name of names) {
    const compare = (a, b) => (b.scores[name] ?? -Infinity) - (a.scores[name] ?? -Infinity);
    found.push({ key: `score ${name}`, title: `${name}, highest first`, compare });
  }
  if (state.slides.some((slide) => slide.error !== null)) {
    found.push({ key: "error", title: "largest error first", compare: (a, b) => (b.error ?? -1) - (a.error ?? -1) });
  }
  if (state.slides.some((slide) => slide.event)) {
    const compare = (a, b) => (b.event === true) - (a.event === true) || a.scores.risk - b.scores.risk;
    found.push({ key: "missed", title: "events of the lowest risk first", compare });
  }
  return task ? found : found.filter((order) => order.key !== "certainty");
}

function row(slide) {
  const picture = element("img", { src: slidePath(slide.id, "/thumbnail"), alt: "", loading: "lazy", decoding: "async" });
  picture.addEventListener("error", () => picture.classList.add("absent"));
  const name = element("span", { className: "name", textContent: slide.id });
  const line = element("span", { className: "line" });
  if (slide.prediction !== null) {
    const mark = slide.wrong === true ? "bad" : slide.uncertain ? "doubtful" : "";
    line.append(element("b", { className: mark, textContent: slide.prediction }));
  } else if (slide.status && slide.status !== "done") {
    line.append(element("b", { className: "bad", textContent: `${slide.status}: ${slide.reason}` }));
  }
  if (slide.target) {
    const off = slide.error === null ? "" : `, off by ${number(slide.error)}`;
    const truth = `${slide.wrong === true ? "wrong; " : ""}truth: ${slide.target}${off}`;
    const mark = { true: "bad", false: "good" }[slide.wrong] ?? "soft";
    line.append(element("span", { className: mark, textContent: truth }));
  }
  const facts = [
    slide.patient,
    slide.tiles !== null ? `${slide.tiles.toLocaleString("en")}\u00a0tiles` : "",
    slide.tissue_mm2 !== null ? `${number(slide.tissue_mm2)}\u00a0mm²` : "",
  ].filter(Boolean);
  const notes = notesOn(slide);
  if (slide.draft) notes.unshift("regions drawn, not saved yet");
  if (slide.seen) notes.unshift("seen in training: this is no test");
  const link = element(
    "a",
    { href: `slide.html?slide=${encodeURIComponent(slide.id)}` },
    element("span", { className: "picture" }, picture),
    name,
    line,
    element("span", { className: "soft", textContent: facts.join(" · ") }),
    notes.length ? element("span", { className: "notes", textContent: notes.join("; "), title: notes.join("\n") }) : null,
  );
  return element("li", {}, link);
}

function showMore() {
  const next = state.shown.slice(state.made, state.made + PAGE);
  byId("slides").append(...next.map(row));
  state.made += next.length;
  byId("more").hidden = state.made >= state.shown.length;
}

function show() {
  const words = byId("search").value.trim().toLowerCase();
  const chosen = FILTERS.filter((filter) => byId(`filter-${filter.key}`)?.checked);
  const order = state.orders.find((one) => one.key === byId("sort").value) ?? state.orders[0];
  state.shown = state.slides.filter(
    (slide) =>
      (!words || `${slide.id}\n${slide.patient}`.toLowerCase().includes(words)) &&
      (!chosen.length || chosen.some((filter) => filter.test(slide))),
  );
  if (order.compare) state.shown = state.shown.slice().sort(order.compare);
  byId("slides").replaceChildren();
  state.made = 0;
  const all = state.slides.length.toLocaleString("en");
  const count = state.shown.length.toLocaleString("en");
  const slides = state.slides.length === 1 ? "slide" : "slides";
  byId("count").textContent = count === all ? `${all} ${slides}` : `${count} of ${all} ${slides}`;
  showMore();
  // A reload, and a return from a slide, find the list as it was; the slide's page goes on in its order.
  const kept = { words: byId("search").value, sort: order.key, filters: chosen.map((filter) => filter.key) };
  remember("list", kept);
  remember("order", { ids: state.shown.map((slide) => slide.id) });
}

async function start() {
  const collection = await json("api/collection");
  document.title = `${collection.title} – Longslide`;
  byId("title").textContent = collection.title;
  byId("task").textContent = collection.task ? collection.task.text : "";
  state.slides = collection.slides;
  state.orders = orders(collection.task);
  const kept = remembered("list");
  byId("sort").append(...state.orders.map((one) => element("option", { value: one.key, textContent: one.title })));
  if (state.orders.some((one) => one.key === kept.sort)) byId("sort").value = kept.sort;
  byId("search").value = kept.words ?? "";
  for (const filter of FILTERS) {
    const count = state.slides.filter(filter.test).length;
    if (!count) continue;
    const box = element("input", { type: "checkbox", id: `filter-${filter.key}` });
    box.checked = (kept.filters ?? []).includes(filter.key);
    const label = element("label", { className: "chip" }, box, `${filter.title} ${count.toLocaleString("en")}`);
    byId("choices").append(label);
  }
  byId("filters").addEventListener("input", show);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && showMore(), {
    rootMargin: "800px",
  }).observe(byId("more"));
  show();
}

start().catch((error) => say(error.message));
