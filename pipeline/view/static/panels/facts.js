// What is known of the slide's file and features.

import { element, number } from "../dom.js";

export function factsPanel(page) {
  const { info } = page;
  const facts = { patient: info.patient };
  if (info.pixels.size) facts["level 0"] = info.pixels.size.map((edge) => edge.toLocaleString("en")).join(" × ") + " px";
  if (info.pixels.mpp) {
    const source = info.pixels.mpp_source ? ` (${info.pixels.mpp_source})` : "";
    facts.resolution = `${number(info.pixels.mpp, 4)} µm/px${source}`;
  } else if (info.pixels.mpp_source) facts.resolution = info.pixels.mpp_source;
  facts.format = info.pixels.vendor;
  if (info.tissue_mm2 !== null) facts.tissue = `${number(info.tissue_mm2)} mm²`;
  Object.assign(facts, info.facts);
  const list = element("dl", { className: "facts" });
  for (const [name, value] of Object.entries(facts)) {
    if (value === undefined || value === null || value === "") continue;
    list.append(element("dt", { textContent: name }), element("dd", { textContent: String(value) }));
  }
  return { title: "Slide", content: element("div", { className: "panel" }, list), open: false };
}
