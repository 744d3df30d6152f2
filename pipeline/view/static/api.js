// What the pages ask the server for. All paths are relative: the key in the page's address goes along.

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The viewer does not answer. Was it ended? Start longslide view again.");
  }
  if (answer.ok) return answer;
  let text = `${answer.status} ${answer.statusText}`;
  try {
    text = (await answer.json()).error ?? text;
  } catch {
    // not JSON: the status says it
  }
  throw new Error(text);
}

export function slidePath(id, rest = "") {
  return `api/slides/${encodeURIComponent(id)}${rest}`;
}

export async function json(path) {
  return (await ask(path)).json();
}

export async function bytes(path) {
  return (await ask(path)).arrayBuffer();
}

export async function put(path, content) {
  return send("PUT", path, content);
}

export async function post(path, content) {
  return send("POST", path, content);
}

async function send(method, path, content) {
  const options = { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  return (await ask(path, options)).json();
}
