// Colour maps of numbers, as 256 colours from the lowest value to the highest; anchors are matplotlib's.

const ANCHORS = {
  coolwarm: ["#3b4cc0", "#5977e3", "#7b9ff9", "#9ebeff", "#c0d4f5", "#dddcdc", "#f2cbb7", "#f7ac8e", "#ee8468", "#d65244", "#b40426"],
  "purple-orange": ["#2d004b", "#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f6f6f7", "#fee0b6", "#fdb863", "#e08214", "#b35806", "#7f3b08"],
  cividis: ["#00224e", "#083370", "#35456c", "#4f576c", "#666970", "#7d7c78", "#948e77", "#aea371", "#c8b866", "#e5cf52", "#fee838"],
  viridis: ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"],
  magma: ["#000004", "#140e36", "#3b0f70", "#641a80", "#8c2981", "#b73779", "#de4968", "#f7705c", "#fe9f6d", "#fecf92", "#fcfdbf"],
};

export const SIGNED_MAPS = ["coolwarm", "purple-orange", "viridis"];
export const UNSIGNED_MAPS = ["cividis", "viridis", "magma"];

// Colours of categories: Okabe and Ito's, then lighter ones.
export const CATEGORY_COLOURS = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#777777",
  "#6a3d9a", "#b2df8a", "#fb9a99", "#8c564b", "#17becf", "#ff7f00", "#1b4332", "#ffd6ff",
];

export function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

const tables = new Map();

export function table(name) {
  if (!tables.has(name)) {
    const anchors = ANCHORS[name].map(rgb);
    const made = new Uint8Array(256 * 3);
    for (let step = 0; step < 256; step++) {
      const place = (step / 255) * (anchors.length - 1);
      const low = Math.min(Math.floor(place), anchors.length - 2);
      for (let part = 0; part < 3; part++) {
        made[3 * step + part] = anchors[low][part] + (place - low) * (anchors[low + 1][part] - anchors[low][part]);
      }
    }
    tables.set(name, made);
  }
  return tables.get(name);
}
