// What happens on clicks, keys and sliders.
function select(unit, moved = false) {
  state.selected = unit;
  if (unit >= 0 && moved) reveal(unit);
  showPanel();
  announce(unit);
  redraw();
}

function mark(unit) {
  if (unit < 0) return;
  for (const node of isGroup(unit) ? groupOf(unit).members : [unit]) {
    if (state.marked.has(node)) state.marked.delete(node);
    else state.marked.add(node);
  }
  showGroups();
  redraw();
}

// After units have changed: what was selected may be another one, or none.
function regroup() {
  state.selected = state.hovered = -1;
  relink();
  showPanel();
  showGroups();
  redraw();
}

function toggleGroup(group) {
  group.collapsed = !group.collapsed;
  regroup();
}

function dissolve(group) {
  state.groups = state.groups.filter((other) => other !== group);
  regroup();
}

function renameGroup(group, name) {
  group.name = name.trim() || group.name;
  regroup();
}

function makeGroup() {
  if (!state.marked.size) return;
  const field = document.getElementById("group-name");
  addGroup(field.value.trim() || `group ${state.groups.length + 1}`, [...state.marked]);
  state.marked.clear();
  field.value = "";
  regroup();
}

function unitAt(x, y) {
  let best = -1, nearest = Infinity;
  for (const unit of visibleUnits()) {
    const [a, b] = toScreen(positionOf(unit)), distance = Math.hypot(a - x, b - y);
    if (distance < radiusOf(unit) + 5 && distance < nearest) [best, nearest] = [unit, distance];
  }
  return best;
}

// The nearest unit in the direction of an arrow, those straight ahead preferred.
function neighbour(unit, dx, dy) {
  const [x, y] = positionOf(unit);
  let best = unit, least = Infinity;
  for (const other of visibleUnits()) {
    const [a, b] = positionOf(other), ahead = (a - x) * dx + (b - y) * dy, aside = Math.abs((a - x) * dy - (b - y) * dx);
    if (ahead > 1 && ahead + 3 * aside < least) [best, least] = [other, ahead + 3 * aside];
  }
  return best;
}

function listenToPointer() {
  const held = new Map();
  let start = null, moved = false, gap = 0;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, at(event));
    [start, moved, gap] = [at(event), false, 0];
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (!held.size) return hover(unitAt(x, y), x, y);
    const [a, b] = held.get(event.pointerId);
    held.set(event.pointerId, [x, y]);
    if (held.size === 2) {
      const [p, q] = [...held.values()], now = Math.hypot(p[0] - q[0], p[1] - q[1]);
      if (gap) zoom(now / gap, (p[0] + q[0]) / 2, (p[1] + q[1]) / 2);
      [gap, moved] = [now, true];
    } else if (moved || Math.hypot(x - start[0], y - start[1]) > 4) {
      moved = true;
      [view.x, view.y] = [view.x + x - a, view.y + y - b];
    }
    redraw();
  });
  canvas.addEventListener("pointerup", (event) => {
    held.delete(event.pointerId);
    if (moved) return;
    const unit = unitAt(...at(event));
    if (event.shiftKey || event.ctrlKey || event.metaKey) mark(unit);
    else select(unit === state.selected ? -1 : unit);
  });
  canvas.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => hover(-1));
  canvas.addEventListener("dblclick", (event) => {
    const unit = unitAt(...at(event));
    if (unit >= 0 && isGroup(unit)) toggleGroup(groupOf(unit));
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-0.0015 * event.deltaY), ...at(event));
    redraw();
  }, { passive: false });
}

function hover(unit, x = 0, y = 0) {
  showHint(unit, x, y);
  if (unit === state.hovered) return;
  state.hovered = unit;
  redraw();
}

function listenToKeys() {
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const middle = () => [view.width / 2, view.height / 2];
  const actions = {
    Enter: () => select(state.hovered),
    Escape: () => (state.selected >= 0 ? select(-1) : (state.marked.clear(), showGroups())),
    m: () => mark(state.hovered >= 0 ? state.hovered : state.selected),
    "+": () => zoom(1.25, ...middle()),
    "-": () => zoom(0.8, ...middle()),
    0: fit,
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.key in arrows) {
      const from = state.hovered >= 0 ? state.hovered : state.selected >= 0 ? state.selected : unitOf(data.start);
      const unit = state.hovered < 0 && state.selected < 0 ? from : neighbour(from, ...arrows[event.key]);
      reveal(unit);
      announce(unit);
      hover(unit, ...toScreen(positionOf(unit)));
    } else if (event.key in actions && !event.ctrlKey && !event.metaKey) actions[event.key]();
    else return;
    event.preventDefault();
    redraw();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input")) return;
    event.preventDefault();
    document.getElementById("search").focus();
  });
}

function search(text) {
  const wanted = text.trim().toLowerCase(), list = document.getElementById("results");
  const texts = (node) => [labelOf(node), nodes.id[node], tokens[nodes.pos[node]] || ""].join("\n").toLowerCase();
  const found = wanted ? nodes.id.map((_, node) => node).filter((node) => texts(node).includes(wanted)) : [];
  state.found = new Set(found);
  // what is called so before what only stands at a token that is
  const rank = (node) => 2 * (labelOf(node).toLowerCase() === wanted) + labelOf(node).toLowerCase().includes(wanted);
  found.sort((a, b) => rank(b) - rank(a) || nodes.influence[b] - nodes.influence[a]);
  list.replaceChildren(...found.slice(0, 12).map((node) => el("button", { type: "button", className: "node", onclick: () => goTo(node) }, swatch(node), labelOf(node), el("small", { textContent: ` ${placeOf(node)}` }))));
  if (wanted) list.append(el("p", { className: "muted", textContent: `${found.length} of ${N} nodes` }));
  redraw();
  return found;
}

function goTo(node) {
  document.getElementById("search").value = "";
  search("");
  select(unitOf(node), true);
}

function listenToControls() {
  const byId = (id) => document.getElementById(id);
  const field = byId("search");
  field.addEventListener("input", () => search(field.value));
  field.addEventListener("keydown", (event) => {
    const first = event.key === "Enter" ? search(field.value)[0] : undefined;
    if (first !== undefined) goTo(first);
    if (event.key === "Escape") search((field.value = ""));
  });
  const influence = byId("influence"), drawn = byId("drawn");
  influence.addEventListener("input", () => {
    state.influence = Number(influence.value);
    showSliders();
    regroup();
  });
  drawn.addEventListener("input", () => {
    state.drawn = Math.round(MOST ** Number(drawn.value));
    showSliders();
    redraw();
  });
  drawn.value = MOST > 1 ? Math.log(state.drawn) / Math.log(MOST) : 1;
  byId("fit").addEventListener("click", () => (fit(), redraw()));
  byId("make-group").addEventListener("click", makeGroup);
  byId("group-name").addEventListener("keydown", (event) => event.key === "Enter" && makeGroup());
  byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
}

function showSliders() {
  const shown = nodes.id.filter((_, node) => isVisible(node)).length;
  document.getElementById("influence-text").textContent = `${shown} of ${N}, with ${Math.round(100 * state.influence)} % of the influence`;
  document.getElementById("drawn-text").textContent = `the strongest ${state.drawn} of ${E}`;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "Light" : "Dark";
  readColours();
  showPanel();
  showGroups();
  redraw();
}

resize();
relink();
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
fit();
listenToPointer();
listenToKeys();
listenToControls();
showSliders();
if (data.selected >= 0) select(unitOf(data.selected));
new ResizeObserver(() => (resize(), fit(), draw())).observe(canvas.parentElement);
draw();
