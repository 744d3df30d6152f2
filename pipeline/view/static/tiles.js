// The tiles of a slide: which one is at a place, and their values as one small picture, a pixel a tile.

export class Tiles {
  // coords: Int32Array of x, y of each tile; size and step in level-0 pixels.
  constructor(coords, size, step) {
    this.coords = coords;
    this.size = size;
    this.step = step;
    this.count = coords.length / 2;
    this.left = Infinity;
    this.top = Infinity;
    let right = -Infinity;
    let bottom = -Infinity;
    for (let i = 0; i < this.count; i++) {
      this.left = Math.min(this.left, coords[2 * i]);
      this.top = Math.min(this.top, coords[2 * i + 1]);
      right = Math.max(right, coords[2 * i]);
      bottom = Math.max(bottom, coords[2 * i + 1]);
    }
    this.columns = this.count ? Math.floor((right - this.left) / step) + 1 : 0;
    this.rows = this.count ? Math.floor((bottom - this.top) / step) + 1 : 0;
    this.cells = new Map(); // cell -> the tiles in it: several where another tool laid the grid
    for (let i = 0; i < this.count; i++) {
      const cell = this.cell(i);
      if (this.cells.has(cell)) this.cells.get(cell).push(i);
      else this.cells.set(cell, [i]);
    }
  }

  cell(i) {
    const column = Math.floor((this.coords[2 * i] - this.left) / this.step);
    const row = Math.floor((this.coords[2 * i + 1] - this.top) / this.step);
    return row * this.columns + column;
  }

  // The tile whose centre is nearest to a place that is inside it; -1 if there is none.
  at(x, y) {
    const reach = Math.ceil(this.size / this.step);
    const column = Math.floor((x - this.left) / this.step);
    const row = Math.floor((y - this.top) / this.step);
    let best = -1;
    let nearest = Infinity;
    for (let r = Math.max(0, row - reach); r <= Math.min(this.rows - 1, row); r++) {
      for (let c = Math.max(0, column - reach); c <= Math.min(this.columns - 1, column); c++) {
        for (const i of this.cells.get(r * this.columns + c) ?? []) {
          const dx = x - this.coords[2 * i];
          const dy = y - this.coords[2 * i + 1];
          if (dx < 0 || dy < 0 || dx >= this.size || dy >= this.size) continue;
          const distance = Math.abs(dx - this.size / 2) + Math.abs(dy - this.size / 2);
          if (distance < nearest) [best, nearest] = [i, distance];
        }
      }
    }
    return best;
  }

  // A canvas with a pixel a tile. colour(i, out) puts red, green, blue, alpha (0 to 255) of tile i into out.
  picture(colour) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, this.columns);
    canvas.height = Math.max(1, this.rows);
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const out = [0, 0, 0, 0];
    for (let i = 0; i < this.count; i++) {
      out[3] = 0;
      colour(i, out);
      image.data.set(out, 4 * this.cell(i));
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // Where a picture of the tiles lies on the slide: each pixel a step wide, about the centre of its tile.
  get place() {
    const inset = (this.size - this.step) / 2;
    return { x: this.left + inset, y: this.top + inset, width: this.columns * this.step, height: this.rows * this.step };
  }

  // The strongest tiles, none overlapping another; sign -1 for the lowest values.
  strongest(values, count, sign = 1) {
    const order = Array.from({ length: this.count }, (_, i) => i).filter((i) => sign * values[i] > 0);
    order.sort((a, b) => sign * (values[b] - values[a]));
    const chosen = [];
    for (const i of order) {
      if (chosen.length === count) break;
      const apart = (j) =>
        Math.abs(this.coords[2 * i] - this.coords[2 * j]) >= this.size ||
        Math.abs(this.coords[2 * i + 1] - this.coords[2 * j + 1]) >= this.size;
      if (chosen.every(apart)) chosen.push(i);
    }
    return chosen;
  }
}
