// The side panel and the hint beside the pointer. All text is set as text, never as HTML.
const ROWS = 60;

function el(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

function showPanel() {
  const unit = state.selected, panel = document.getElementById("details");
  panel.replaceChildren();
  if (unit < 0) {
    panel.append(el("h2", { textContent: "Nothing selected" }), el("p", { className: "muted", textContent: "Click a node, or focus the graph and use the arrow keys and Enter." }));
    return;
  }
  panel.append(el("h2", {}, swatch(unit), labelOf(unit)), facts(unit), ...words(unit));
  if (isGroup(unit)) panel.append(groupButtons(unit), memberList(unit));
  panel.append(...linkTable("Inputs", linksIn.get(unit) || [], "source"), ...linkTable("Outputs", linksOut.get(unit) || [], "target"));
}

function swatch(unit) {
  const kind = isGroup(unit) ? "group" : ["square", "circle", "diamond", "square"][nodes.kind[unit]];
  const found = el("span", { className: `swatch ${kind}` });
  found.style.background = colourOf(unit);
  return found;
}

function factsOf(unit) {
  if (isGroup(unit)) return [["kind", "group"]];
  const activation = nodes.activation[unit], kind = nodes.kind[unit];
  const rows = [["kind", kindOf(unit)], ["where", placeOf(unit)]];
  if (kind === FEATURE) rows.push(["feature", `${nodes.index[unit]} of ${data.sites[nodes.site[unit]].name}`]);
  if (activation !== null) rows.push([kind === TARGET ? "logit" : "activation", number(activation)]);
  if (kind === TARGET) rows.push(["weight", number(nodes.weight[unit])]);
  else rows.push(["influence", `${number(nodes.influence[unit])}; ${percent(nodes.share[unit])} with all before it`]);
  return rows;
}

function facts(unit) {
  const list = el("dl");
  for (const [name, value] of factsOf(unit)) list.append(el("dt", { textContent: name }), el("dd", { textContent: value }));
  return list;
}

// Words that a feature writes towards and away from.
function words(unit) {
  const own = isGroup(unit) ? null : nodes.words[unit];
  if (!own) return [];
  const line = (name, list) => el("p", { className: "words" }, el("span", { className: "muted", textContent: name }), ...list.map((word) => el("code", { textContent: word })));
  return [["raises ", own[0]], ["lowers ", own[1]]].filter(([, list]) => list.length).map(([name, list]) => line(name, list));
}

function linkTable(title, list, end) {
  if (!list.length) return [];
  const body = el("tbody"), sorted = strongest(list);
  for (const link of sorted.slice(0, ROWS)) {
    const other = link[end], sign = link.weight < 0 ? "negative" : "positive";
    const button = el("button", { type: "button", className: "node", onclick: () => select(other, true) }, swatch(other), labelOf(other), el("small", { textContent: ` ${placeOf(other)}` }));
    body.append(el("tr", {}, el("td", {}, button), el("td", { className: `number ${sign}`, textContent: number(link.weight) }), el("td", { className: "number", textContent: percent(link.share) })));
  }
  const head = el("tr", {}, el("th", { textContent: `${title} (${list.length})`, scope: "col" }), el("th", { textContent: "weight", scope: "col" }), el("th", { textContent: "share", title: "of all that the target gets", scope: "col" }));
  const left = sorted.length - ROWS;
  return [el("table", {}, el("thead", {}, head), body), ...(left > 0 ? [el("p", { className: "muted", textContent: `… and ${left} weaker ones` })] : [])];
}

function memberList(unit) {
  const list = el("ul", { className: "members" });
  for (const node of groupOf(unit).members) list.append(el("li", {}, swatch(node), labelOf(node), el("small", { textContent: ` ${placeOf(node)}` })));
  return list;
}

function groupButtons(unit) {
  const group = groupOf(unit);
  return el("p", {}, el("button", { type: "button", textContent: "Expand", onclick: () => toggleGroup(group) }), " ", el("button", { type: "button", textContent: "Dissolve", onclick: () => dissolve(group) }));
}

function showGroups() {
  const list = document.getElementById("groups");
  list.replaceChildren();
  state.groups.forEach((group, i) => {
    const open = group.collapsed ? "Expand" : "Collapse";
    const mark = el("span", { className: "swatch group" });
    mark.style.background = colours.rings[i % colours.rings.length];
    const name = el("input", { value: group.name, ariaLabel: "Name of the group", onchange: (event) => renameGroup(group, event.target.value) });
    list.append(el("li", {}, mark, name, el("small", { textContent: `${group.members.size} nodes` }), el("button", { type: "button", textContent: open, onclick: () => toggleGroup(group) }), el("button", { type: "button", textContent: "Dissolve", onclick: () => dissolve(group) })));
  });
  const named = Object.fromEntries(state.groups.map((group) => [group.name, [...group.members].map((node) => nodes.id[node])]));
  document.getElementById("groups-text").textContent = JSON.stringify(named, null, 1);
  const marked = state.marked.size;
  document.getElementById("marked").textContent = marked ? `${marked} ${marked === 1 ? "node" : "nodes"} marked` : "Shift-click nodes, or press m, to mark them for a group.";
  document.getElementById("make-group").disabled = !marked;
}

function showHint(unit, x, y) {
  const hint = document.getElementById("hint");
  hint.hidden = unit < 0;
  if (unit < 0) return;
  const list = (title, links, end) => {
    const best = strongest(links).slice(0, 3).map((link) => el("div", { className: link.weight < 0 ? "negative" : "positive", textContent: `${number(link.weight)}  ${labelOf(link[end])}` }));
    return best.length ? [el("b", { textContent: title }), ...best] : [];
  };
  hint.replaceChildren(el("strong", { textContent: labelOf(unit) }), facts(unit), ...words(unit), ...list("strongest inputs", linksIn.get(unit) || [], "source"), ...list("strongest outputs", linksOut.get(unit) || [], "target"));
  // beside the pointer, on the side where there is room
  const left = x + 16 + hint.offsetWidth > view.width ? x - 16 - hint.offsetWidth : x + 16;
  hint.style.left = `${Math.max(4, left)}px`;
  hint.style.top = `${Math.max(4, Math.min(y + 14, view.height - hint.offsetHeight - 8))}px`;
}

// What a screen reader says of a unit.
function announce(unit) {
  const said = unit < 0 ? "" : `${labelOf(unit)}, ${factsOf(unit).map((pair) => pair.join(" ")).join(", ")}`;
  document.getElementById("status").textContent = said;
}
