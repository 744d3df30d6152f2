// What a tab remembers of this viewer, until it is closed: the list and its order, how layers are drawn.

const viewer = location.pathname.split("/")[1];

export function remember(key, value) {
  try {
    sessionStorage.setItem(viewer + key, JSON.stringify(value));
  } catch {
    // storage that is full or forbidden: pages begin anew
  }
}

export function remembered(key) {
  try {
    return JSON.parse(sessionStorage.getItem(viewer + key)) ?? {};
  } catch {
    return {};
  }
}
