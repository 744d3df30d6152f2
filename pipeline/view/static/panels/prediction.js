// What was predicted, how surely, and what makes it doubtful.

import { element, notesOn, number } from "../dom.js";

export function predictionPanel(page) {
  const { info } = page;
  const content = element("div", { className: "panel" });
  if (info.prediction !== null) {
    const line = element("p", { className: "decision" }, element("b", { textContent: info.prediction }));
    if (info.target) {
      const wrong = info.wrong === true;
      line.append(" ", element("span", {
        className: wrong ? "bad" : "good",
        textContent: `${wrong ? "wrong; " : ""}truth: ${info.target}`,
      }));
    }
    content.append(line);
    const shares = info.certainty !== null;
    const rows = Object.entries(info.scores).map(([name, value]) => {
      const bar = element("span", { className: "bar" }, element("i"));
      if (shares) bar.firstChild.style.width = `${100 * value}%`;
      const shown = info.numbers[name] ?? number(value);
      return element("tr", {}, element("th", { textContent: name }), shares ? element("td", {}, bar) : null,
        element("td", { className: "number", textContent: shown }));
    });
    content.append(element("table", { className: "scores" }, element("tbody", {}, ...rows)));
    const spread = Object.keys(info.spread ?? {}).length > 0;
    const what = shares ? "Probabilities" : "Predicted numbers";
    if (spread) content.append(element("p", { className: "soft", textContent: `${what}: mean ± standard deviation of ${info.classifiers} models` }));
  } else if (info.status && info.status !== "done") {
    content.append(element("p", { className: "bad", textContent: `${info.status}: ${info.reason}` }));
  }
  const notes = [...notesOn(info), ...info.remarks];
  if (info.seen) notes.unshift("This slide was in the training or validation part of the model: this is no test.");
  for (const note of notes) content.append(element("p", { className: "warning", textContent: note }));
  return content.childElementCount ? { title: info.prediction !== null ? "Prediction" : "Remarks", content } : null;
}
