// The graph and what of it is shown. Nodes are numbers; a unit is a node or, from N on, a collapsed group.
const data = JSON.parse(document.getElementById("graph-data").textContent);
const nodes = data.nodes, edges = data.edges, tokens = data.tokens;
const N = nodes.id.length, E = edges.source.length;
const MOST = Math.min(E, 3000); // edges drawn at once
const TOKEN = 0, FEATURE = 1, ERROR = 2, TARGET = 3;

const state = {
  influence: 1, // nodes up to this cumulative share
  drawn: Math.min(data.drawn, MOST), // edges drawn where nothing is selected
  selected: -1, // a unit
  hovered: -1,
  marked: new Set(), // nodes to be grouped
  found: new Set(), // nodes that the search names
  groups: data.groups.map(([name, members]) => newGroup(name, members)),
};
let links = []; // between visible units, the strongest first: {source, target, weight, share, score}
let linksIn = new Map(), linksOut = new Map();

function newGroup(name, members) {
  const first = members.reduce((a, b) => (nodes.influence[b] > nodes.influence[a] ? b : a));
  return { name, members: new Set(members), first, collapsed: true };
}

const isGroup = (unit) => unit >= N;
const groupOf = (unit) => state.groups[unit - N];
const membership = (node) => state.groups.findIndex((group) => group.members.has(node));
const isVisible = (node) =>
  nodes.kind[node] === TOKEN || nodes.kind[node] === TARGET || nodes.share[node] <= state.influence + 1e-9;

function unitOf(node) {
  const group = membership(node);
  return group >= 0 && state.groups[group].collapsed ? N + group : node;
}

function visibleUnits() {
  const found = new Set();
  for (let node = 0; node < N; node++) if (isVisible(node)) found.add(unitOf(node));
  return [...found];
}

// Edges between units; those of a collapsed group are summed, and what stays inside it is left out.
function relink() {
  const own = Array.from({ length: N }, (_, node) => (isVisible(node) ? unitOf(node) : -1));
  const sums = new Map();
  links = [];
  for (let e = 0; e < E; e++) {
    const source = own[edges.source[e]], target = own[edges.target[e]];
    if (source < 0 || target < 0 || source === target) continue;
    const link = { source, target, weight: edges.weight[e], share: edges.share[e], score: edges.score[e] };
    if (!isGroup(source) && !isGroup(target)) {
      links.push(link);
      continue;
    }
    const key = source * (N + state.groups.length) + target;
    const known = sums.get(key);
    if (!known) {
      sums.set(key, link);
      links.push(link);
    } else {
      known.weight += link.weight;
      // shares of several targets cannot be added
      known.share = isGroup(target) ? NaN : known.share + link.share;
      known.score += link.score;
    }
  }
  if (sums.size) links.sort((a, b) => b.score - a.score);
  for (const link of links) if (isGroup(link.target)) link.share = NaN;
  linksIn = new Map();
  linksOut = new Map();
  for (const link of links) {
    append(linksIn, link.target, link);
    append(linksOut, link.source, link);
  }
}

function append(map, key, value) {
  if (map.has(key)) map.get(key).push(value);
  else map.set(key, [value]);
}

// Edges that are drawn: those of the selected unit, else the strongest of all.
function shownLinks() {
  if (state.selected >= 0) {
    const own = [...(linksIn.get(state.selected) || []), ...(linksOut.get(state.selected) || [])];
    return strongest(own).slice(0, 400);
  }
  return links.slice(0, state.drawn);
}

const strongest = (list) => [...list].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));

function labelOf(unit) {
  if (isGroup(unit)) return `${groupOf(unit).name} (${groupOf(unit).members.size})`;
  return nodes.kind[unit] === TOKEN ? tokens[nodes.pos[unit]] : nodes.label[unit];
}

function kindOf(unit) {
  if (isGroup(unit)) return "group";
  const kind = nodes.kind[unit];
  if (kind === FEATURE) return `${data.sites[nodes.site[unit]].word} feature`;
  return ["token", "", "error", "target"][kind];
}

// Where a unit is, in words.
function placeOf(unit) {
  if (isGroup(unit)) return "";
  const token = `“${tokens[nodes.pos[unit]]}” (${nodes.pos[unit]})`;
  const kind = nodes.kind[unit];
  return kind === TOKEN || kind === TARGET ? token : `layer ${nodes.layer[unit]}, ${token}`;
}

function sum(list) {
  return list.reduce((a, b) => a + b, 0);
}

// Importance of a unit, from 0 to 1.
function weightOf(unit) {
  const members = isGroup(unit) ? [...groupOf(unit).members] : [unit];
  return Math.min(1, sum(members.map((node) => nodes.influence[node])) / data.largest);
}

function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const text = Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : value.toPrecision(3);
  return text.replace("-", "−");
}

const percent = (value) => (Number.isNaN(value) ? "–" : `${(100 * value).toFixed(1).replace("-", "−")} %`);

// Groups take nodes from one another; empty ones vanish.
function addGroup(name, members) {
  const left = (group) => [...group.members].filter((node) => !members.includes(node));
  state.groups = state.groups.flatMap((group) => (left(group).length ? [{ ...newGroup(group.name, left(group)), collapsed: group.collapsed }] : []));
  if (members.length) state.groups.push(newGroup(name, members));
}
