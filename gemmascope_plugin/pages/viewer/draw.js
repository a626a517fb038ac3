// Draws on one canvas: bands of layers, edges, nodes, and labels where there is room for them.
const canvas = document.getElementById("canvas"), ctx = canvas.getContext("2d");
const RINGS = ["--ring0", "--ring1", "--ring2", "--ring3", "--ring4"];
let colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "muted", "line", "band", "card", "accent", "positive", "negative", "token", "error", "target"];
  for (const name of [...names, "mlp", "att", "res"]) colours[name] = style.getPropertyValue(`--${name}`).trim();
  colours.rings = RINGS.map((name) => style.getPropertyValue(name).trim());
  sprites.clear();
  colours.font = getComputedStyle(document.body).fontFamily;
}

function resize() {
  const box = canvas.parentElement.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  [view.width, view.height] = [box.width, box.height];
  [canvas.width, canvas.height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.fillStyle = colours.card;
  ctx.fillRect(0, 0, view.width, view.height);
  drawBands();
  const shown = shownLinks(), units = visibleUnits();
  const near = state.selected < 0 ? null : new Set([state.selected, ...shown.flatMap((l) => [l.source, l.target])]);
  drawLinks(shown);
  drawUnits(units, near);
  drawTokens();
  drawLabels(units, near);
  drawRowNames();
  document.documentElement.dataset.drawn = `${units.length} nodes, ${shown.length} edges`;
}

function drawBands() {
  layout.rows.forEach((row, i) => {
    const [, top] = toScreen([0, layout.height - row.end - layout.gapY / 2]);
    const height = (row.end - row.start + layout.gapY) * view.scale;
    if (i % 2) {
      ctx.fillStyle = colours.band;
      ctx.fillRect(0, top, view.width, height);
    }
  });
}

// Names of the rows, on a strip that keeps them readable wherever the graph is moved.
function drawRowNames() {
  ctx.globalAlpha = 0.85;
  ctx.fillStyle = colours.card;
  ctx.fillRect(0, 0, MARGIN.left - 6, view.height);
  ctx.globalAlpha = 1;
  ctx.font = `12px ${colours.font}`;
  ctx.fillStyle = colours.muted;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  layout.rows.forEach((row, i) => {
    const name = i === 0 ? "tokens" : i === data.n_layers + 1 ? "targets" : `layer ${i - 1}`;
    const [, y] = toScreen([0, layout.height - row.middle]);
    if ((row.end - row.start + layout.gapY) * view.scale > 12) ctx.fillText(name, 8, y);
  });
}

// Edges of one sign and about one size are one path: a few strokes instead of thousands.
function drawLinks(shown) {
  const largest = shown.reduce((most, link) => Math.max(most, Math.abs(link.weight)), 1e-12);
  const few = shown.length <= 1000, levels = few ? 20 : 6, paths = new Map();
  for (const link of shown) {
    const size = Math.ceil(levels * Math.sqrt(Math.abs(link.weight) / largest));
    const key = 2 * size + (link.weight < 0), path = paths.get(key) || new Path2D();
    const [x0, y0] = toScreen(positionOf(link.source)), [x1, y1] = toScreen(positionOf(link.target));
    const lift = 0.45 * (y1 - y0);
    path.moveTo(x0, y0);
    path.bezierCurveTo(x0, y0 + lift, x1, y1 - lift, x1, y1);
    paths.set(key, path);
  }
  ctx.lineCap = "round";
  // small ones first, so that large ones lie on top
  for (const key of [...paths.keys()].sort((a, b) => a - b)) {
    const size = Math.floor(key / 2) / levels;
    ctx.globalAlpha = 0.15 + 0.6 * size;
    ctx.strokeStyle = key % 2 ? colours.negative : colours.positive;
    ctx.lineWidth = 0.6 + 4.5 * size;
    // signs differ not in colour alone, where single edges can be told
    ctx.setLineDash(key % 2 && few ? [6, 5] : []);
    ctx.stroke(paths.get(key));
  }
  ctx.setLineDash([]);
  ctx.globalAlpha = 1;
}

const radiusOf = (unit) => {
  const base = isGroup(unit) ? 11 : nodes.kind[unit] === FEATURE || nodes.kind[unit] === ERROR ? 4.5 + 4.5 * Math.sqrt(weightOf(unit)) : 6.5;
  return base * Math.min(1.5, Math.max(0.5, view.scale));
};

function colourOf(unit) {
  if (isGroup(unit)) return colours.rings[(unit - N) % colours.rings.length];
  const kind = nodes.kind[unit];
  if (kind === FEATURE) return colours[data.sites[nodes.site[unit]].kind];
  return [colours.token, "", colours.error, colours.target][kind];
}

function outline(path, unit, x, y, r) {
  const kind = isGroup(unit) ? "group" : nodes.kind[unit];
  if (kind === FEATURE) {
    path.moveTo(x + r, y);
    path.arc(x, y, r, 0, 2 * Math.PI);
  } else if (kind === ERROR) {
    path.moveTo(x, y - 1.25 * r);
    path.lineTo(x + 1.25 * r, y);
    path.lineTo(x, y + 1.25 * r);
    path.lineTo(x - 1.25 * r, y);
    path.closePath();
  } else if (kind === "group") path.roundRect(x - 1.3 * r, y - r, 2.6 * r, 2 * r, 0.5 * r);
  else path.rect(x - r, y - r, 2 * r, 2 * r);
}

// Each shape is drawn once for a size and colour and then copied: that is many times faster.
const sprites = new Map();
function spriteOf(unit, r) {
  const shape = isGroup(unit) ? "group" : nodes.kind[unit], key = `${shape} ${colourOf(unit)} ${r}`;
  if (sprites.has(key)) return sprites.get(key);
  const ratio = window.devicePixelRatio || 1, half = Math.ceil(1.3 * r + 2);
  const found = Object.assign(document.createElement("canvas"), { width: 2 * half * ratio, height: 2 * half * ratio });
  const pen = found.getContext("2d");
  pen.scale(ratio, ratio);
  const path = new Path2D();
  outline(path, unit, half, half, r);
  pen.fillStyle = colourOf(unit);
  pen.fill(path);
  pen.lineWidth = 1.5;
  pen.strokeStyle = colours.card;
  pen.stroke(path);
  sprites.set(key, found);
  return found;
}

function drawUnits(units, near) {
  for (const unit of units) {
    const [x, y] = toScreen(positionOf(unit)), r = Math.round(2 * radiusOf(unit)) / 2, half = Math.ceil(1.3 * r + 2);
    if (x < -half || y < -half || x > view.width + half || y > view.height + half) continue;
    ctx.globalAlpha = near && !near.has(unit) ? 0.22 : 1;
    ctx.drawImage(spriteOf(unit, r), Math.round(x - half), Math.round(y - half), 2 * half, 2 * half);
  }
  ctx.globalAlpha = 1;
  units.forEach(drawRings);
}

function drawRings(unit) {
  const [x, y] = toScreen(positionOf(unit)), r = radiusOf(unit);
  const group = isGroup(unit) ? -1 : membership(unit);
  if (group >= 0) ring(unit, x, y, r + 2.5, colours.rings[group % colours.rings.length], []);
  if (state.found.has(unit)) ring(unit, x, y, r + 4, colours.accent, [2, 3]);
  if (state.marked.has(unit)) ring(unit, x, y, r + 4, colours.ink, [4, 3]);
  if (unit === state.selected) ring(unit, x, y, r + 3, colours.ink, []);
  else if (unit === state.hovered) ring(unit, x, y, r + 3, colours.muted, []);
}

function ring(unit, x, y, r, colour, dash) {
  const path = new Path2D();
  outline(path, unit, x, y, r);
  ctx.setLineDash(dash);
  ctx.lineWidth = 2;
  ctx.strokeStyle = colour;
  ctx.stroke(path);
  ctx.setLineDash([]);
}

// Words below their squares; aslant where columns are too narrow for them.
function drawTokens() {
  ctx.font = `13px ${colours.font}`;
  ctx.fillStyle = colours.ink;
  const narrow = isSlanted();
  const [, y] = toScreen([0, layout.height - layout.rows[0].middle]);
  tokens.forEach((token, pos) => {
    const [x] = toScreen([layout.columns[pos].middle, 0]);
    ctx.save();
    ctx.translate(x, y + 10 * Math.min(1.5, Math.max(0.5, view.scale)));
    ctx.textBaseline = "top";
    ctx.textAlign = narrow ? "right" : "center";
    if (narrow) ctx.rotate(-0.7);
    ctx.fillText(cut(token, 16), 0, 2);
    ctx.restore();
  });
}

// The most important units first; each label at the first of four places where it covers nothing.
function drawLabels(units, near) {
  ctx.font = `12px ${colours.font}`;
  ctx.textBaseline = "middle";
  ctx.textAlign = "left";
  const taken = new Grid();
  for (const unit of units) {
    const [x, y] = toScreen(positionOf(unit)), r = radiusOf(unit);
    taken.add(x - r, y - r, 2 * r, 2 * r);
  }
  const first = (unit) => (unit === state.selected || unit === state.hovered ? 4 : isGroup(unit) ? 3 : nodes.kind[unit] === TARGET ? 2 : weightOf(unit));
  const wanted = units.filter((unit) => isGroup(unit) || nodes.kind[unit] !== TOKEN);
  const listed = near ? wanted.filter((unit) => near.has(unit)) : wanted;
  listed.sort((a, b) => first(b) - first(a));
  for (const unit of listed.slice(0, 150)) {
    const text = cut(labelOf(unit), 26), width = widthOf(text);
    const [x, y] = toScreen(positionOf(unit)), r = radiusOf(unit) + (unit === state.selected ? 8 : 4);
    if (x < 0 || y < 0 || x > view.width || y > view.height) continue;
    const places = [[x + r, y - 7], [x - r - width, y - 7], [x - width / 2, y - r - 13], [x - width / 2, y + r]];
    const open = places.find(([left, top]) => left > 60 && left + width < view.width && taken.free(left - 4, top, width + 8, 14));
    // what is selected is always named
    const free = open || (unit === state.selected ? places[2] : null);
    if (!free) continue;
    taken.add(free[0], free[1], width, 14);
    ctx.lineWidth = 3;
    ctx.lineJoin = "round";
    ctx.strokeStyle = colours.card;
    ctx.strokeText(text, free[0], free[1] + 7);
    ctx.fillStyle = colours.ink;
    ctx.fillText(text, free[0], free[1] + 7);
  }
}

// Measuring text is slow, and labels stay the same.
const widths = new Map();
function widthOf(text) {
  if (!widths.has(text)) widths.set(text, ctx.measureText(text).width);
  return widths.get(text);
}

// Boxes by squares of 64 pixels, so that asking whether one is free looks at few others.
class Grid {
  constructor() {
    this.cells = new Map();
  }
  *keys(x, y, w, h) {
    for (let i = Math.floor(x / 64); i <= Math.floor((x + w) / 64); i++)
      for (let j = Math.floor(y / 64); j <= Math.floor((y + h) / 64); j++) yield 4096 * i + j;
  }
  add(x, y, w, h) {
    for (const key of this.keys(x, y, w, h)) append(this.cells, key, [x, y, w, h]);
  }
  free(x, y, w, h) {
    for (const key of this.keys(x, y, w, h))
      for (const [a, b, c, d] of this.cells.get(key) || []) if (x < a + c && a < x + w && y < b + d && b < y + h) return false;
    return true;
  }
}
