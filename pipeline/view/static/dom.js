// Elements made in code: text is always text, never HTML.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

// Whether a key is for a field that is typed into, and no shortcut.
export function isTyped(event) {
  return Boolean(event.target.closest?.("textarea, input:not([type=checkbox], [type=range])"));
}

// One message at the top of the page; nothing hides it.
export function say(text) {
  const place = byId("message");
  place.textContent = text;
  place.hidden = !text;
}

// What to look at of a slide, each once: a job's remark repeats the warnings, and why a slide failed is said already.
export function notesOn(slide) {
  const said = new Set([`${slide.status}: ${slide.reason}`, slide.warnings.join("; ")]);
  return [...slide.warnings, ...slide.odd.filter((text) => !said.has(text) && !slide.warnings.includes(text))];
}

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
}
