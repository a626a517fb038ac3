// Where units stand: tokens from left to right, layers from the bottom up, the nodes of one cell in lines.
const STEP = 26, GAP_X = 30, GAP_Y = 34;
const MARGIN = { left: 64, right: 12, top: 16, bottom: 30 };
const SLANT = 80; // room for words that stand aslant
const layout = { x: new Float32Array(N), y: new Float32Array(N), columns: [], rows: [], gapX: 0, gapY: 0, width: 0, height: 0 };

// Gaps grow until the graph has the shape of its stage.
function arrange() {
  const cells = new Map();
  for (let node = 0; node < N; node++) append(cells, `${rowOf(node)},${nodes.pos[node]}`, node);
  for (const cell of cells.values()) cell.sort((a, b) => nodes.influence[b] - nodes.influence[a]);
  const aspect = Math.max(0.5, (view.width - MARGIN.left - MARGIN.right) / (view.height - MARGIN.top - MARGIN.bottom));
  // as many nodes side by side as fit in full size, or as make the graph smallest
  const extent = ({ width, height }) => Math.max(width, height * aspect);
  const tried = Array.from({ length: 13 }, (_, i) => sizes(cells, i + 3));
  const fitting = tried.filter((each) => extent(each) < view.width - MARGIN.left - MARGIN.right).pop();
  const { across, rows, columns, width, height } = fitting || tried.reduce((a, b) => (extent(b) < extent(a) ? b : a));
  layout.gapX = GAP_X + Math.max(0, height * aspect - width) / columns.length;
  layout.gapY = GAP_Y + Math.max(0, width / aspect - height) / rows.length;
  layout.columns = spread(columns, layout.gapX);
  layout.rows = spread(rows, layout.gapY);
  layout.width = Math.max(width, height * aspect);
  layout.height = Math.max(height, width / aspect);
  for (const [key, cell] of cells) placeCell(cell, key.split(",").map(Number), across);
}

function sizes(cells, across) {
  const rows = Array.from({ length: data.n_layers + 2 }, () => STEP);
  const columns = tokens.map((token) => Math.min(120, 8 * token.length + 8));
  for (const [key, cell] of cells) {
    const [row, pos] = key.split(",").map(Number);
    rows[row] = Math.max(rows[row], STEP * Math.ceil(cell.length / across));
    columns[pos] = Math.max(columns[pos], STEP * Math.min(across, cell.length));
  }
  const width = sum(columns) + GAP_X * columns.length, height = sum(rows) + GAP_Y * rows.length;
  return { across, rows, columns, width, height };
}

const rowOf = (node) => (nodes.kind[node] === TOKEN ? 0 : nodes.layer[node] + 1);

function spread(sizes, gap) {
  let at = gap / 2;
  return sizes.map((size) => {
    const place = { start: at, middle: at + size / 2, end: at + size };
    at += size + gap;
    return place;
  });
}

function placeCell(cell, [row, pos], across) {
  const lines = Math.ceil(cell.length / across);
  const each = Math.ceil(cell.length / lines);
  cell.forEach((node, i) => {
    const line = Math.floor(i / each), size = Math.min(each, cell.length - line * each);
    layout.x[node] = layout.columns[pos].middle + STEP * ((i % each) - (size - 1) / 2);
    // the canvas counts from the top
    layout.y[node] = layout.height - (layout.rows[row].middle + STEP * (line - (lines - 1) / 2));
  });
}

// A collapsed group stands where its most influential member does: that place is free.
function positionOf(unit) {
  const node = isGroup(unit) ? groupOf(unit).first : unit;
  return [layout.x[node], layout.y[node]];
}

const view = { scale: 1, x: 0, y: 0, width: 0, height: 0 };
const toScreen = ([x, y]) => [x * view.scale + view.x, y * view.scale + view.y];

// Whether columns are too narrow for their words.
function isSlanted() {
  ctx.font = `13px ${colours.font}`;
  return tokens.some((token, pos) => {
    const column = layout.columns[pos];
    return ctx.measureText(cut(token, 16)).width > (column.end - column.start + layout.gapX) * view.scale - 4;
  });
}

const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// The whole graph, or, where that would be too small to see, the end of it.
function fit() {
  MARGIN.bottom = 30;
  arrange();
  place();
  if (!isSlanted()) return;
  MARGIN.bottom = SLANT;
  arrange();
  place();
}

function place() {
  const width = view.width - MARGIN.left - MARGIN.right, height = view.height - MARGIN.top - MARGIN.bottom;
  view.scale = Math.min(1.6, Math.max(0.15, Math.min(width / layout.width, height / layout.height)));
  const spare = width - layout.width * view.scale;
  view.x = MARGIN.left + (spare > 0 ? spare / 2 : spare);
  view.y = MARGIN.top + Math.max(0, (height - layout.height * view.scale) / 2);
}

function zoom(factor, x, y) {
  const scale = Math.min(6, Math.max(0.1, view.scale * factor));
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
}

// Moves the view only if the unit cannot be seen.
function reveal(unit) {
  const [x, y] = toScreen(positionOf(unit));
  if (x < 70 || x > view.width - 30) view.x += view.width / 2 - x;
  if (y < 30 || y > view.height - 40) view.y += view.height / 2 - y;
}
