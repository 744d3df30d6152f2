// What is drawn over the slide, in level-0 pixels. A painter is { order, draw(context, scale, view) }: context draws in
// level-0 pixels, scale is pixels of the page per level-0 pixel, view the rectangle of level-0 pixels that is in sight.

import { element } from "./dom.js";

export class Overlay {
  constructor(viewer) {
    this.viewer = viewer;
    this.painters = [];
    this.shown = true;
    this.canvas = element("canvas", { className: "overlay" });
    viewer.main.container.append(this.canvas);
    this.context = this.canvas.getContext("2d");
    for (const event of ["update-viewport", "resize", "open"]) viewer.main.addHandler(event, () => this.draw());
  }

  // Painters of a lower order are drawn first. Returns the painter.
  add(painter) {
    this.painters.push(painter);
    this.painters.sort((a, b) => a.order - b.order);
    return painter;
  }

  draw() {
    const { canvas, context, viewer } = this;
    const density = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = viewer.main.container;
    if (canvas.width !== Math.round(width * density) || canvas.height !== Math.round(height * density)) {
      canvas.width = Math.round(width * density);
      canvas.height = Math.round(height * density);
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!viewer.main.isOpen() || !viewer.main.world.getItemCount()) return;
    const transform = viewer.transform().map((part) => part * density);
    const scale = viewer.scale;
    const corners = [[0, 0], [width, 0], [0, height], [width, height]].map(([x, y]) => viewer.toSlide(x, y));
    const [xs, ys] = [corners.map((one) => one.x), corners.map((one) => one.y)];
    const view = { left: Math.min(...xs), top: Math.min(...ys), right: Math.max(...xs), bottom: Math.max(...ys) };
    for (const painter of this.painters) {
      if (!this.shown && !painter.always) continue;
      context.save();
      context.setTransform(...transform);
      painter.draw(context, scale, view);
      context.restore();
    }
  }
}

export function tissuePainter() {
  let path = new Path2D();
  return {
    order: 20,
    on: true,
    show(polygons) {
      path = new Path2D();
      for (const polygon of polygons) for (const ring of polygon) tracePath(path, ring);
      return this;
    },
    draw(context, scale) {
      if (!this.on) return;
      context.lineJoin = "round";
      context.lineWidth = 4 / scale;
      context.strokeStyle = "rgb(255 255 255 / 70%)";
      context.stroke(path);
      context.lineWidth = 2 / scale;
      context.strokeStyle = "#d55e00";
      context.stroke(path);
    },
  };
}

export function tracePath(path, ring) {
  ring.forEach(([x, y], place) => (place ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
}

const SMALLEST_OUTLINE = 5; // pixels of the page; below that the grid is an area

export function gridPainter(tiles) {
  const area = tiles.picture((i, out) => out.splice(0, 4, 0, 114, 178, 90));
  return {
    order: 15,
    on: false,
    draw(context, scale, view) {
      if (!this.on) return;
      if (tiles.step * scale < SMALLEST_OUTLINE) {
        drawPicture(context, tiles, area);
        return;
      }
      context.lineWidth = 1 / scale;
      context.strokeStyle = "rgb(0 114 178 / 85%)";
      context.beginPath();
      for (let i = 0; i < tiles.count; i++) {
        const [x, y] = [tiles.coords[2 * i], tiles.coords[2 * i + 1]];
        if (x > view.right || y > view.bottom || x + tiles.size < view.left || y + tiles.size < view.top) continue;
        context.rect(x, y, tiles.size, tiles.size);
      }
      context.stroke();
    },
  };
}

export function drawPicture(context, tiles, picture) {
  const { x, y, width, height } = tiles.place;
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, x, y, width, height);
}

// Outlines of single tiles: the one under the pointer, those of a gallery.
export function marksPainter(tiles, order = 30, always = true) {
  return {
    order,
    always, // also where layers are off
    marks: [], // { tile, colour, width }
    draw(context, scale) {
      for (const { tile, colour = "#000", width = 2 } of this.marks) {
        const [x, y] = [tiles.coords[2 * tile], tiles.coords[2 * tile + 1]];
        context.lineWidth = (width + 2) / scale;
        context.strokeStyle = "rgb(255 255 255 / 80%)";
        context.strokeRect(x, y, tiles.size, tiles.size);
        context.lineWidth = width / scale;
        context.strokeStyle = colour;
        context.strokeRect(x, y, tiles.size, tiles.size);
      }
    },
  };
}
