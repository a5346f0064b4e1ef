// Builds what is shown of DATA, by text nodes alone: whatever the model wrote stays text.
const COLOURS = [["kind", "kind of token"], ["advantage", "advantage"], ["gap", "engine against trainer"], ["chance", "likelihood"]];
const KINDS = {reasoning: "thought", tool_call: "tool call", answer: "answer", end: "end of turn", result: "what tools returned (not learned)"};
const state = {index: DATA.rollouts.length - 1, colour: "kind"};
const tip = document.getElementById("tip"), main = document.getElementById("main"), bar = document.getElementById("bar");

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") made.style.cssText = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.flat(3).filter(child => child !== null && child !== undefined));
  return made;
}
const number = (value, digits = 3) => value === null || value === undefined ? "none" : String(Number(Number(value).toPrecision(digits)));
const signed = value => value === null || value === undefined ? "none" : (value > 0 ? "+" : value < 0 ? "−" : "") + number(Math.abs(value));
const percent = value => (100 * value).toFixed(1) + " %";

function picture(name) {
  return node("img", {src: DATA.pictures[name], alt: "", class: name.endsWith(".png") ? "small" : null});
}

function shot(name, boxes) {  // a picture with rectangles on it, given in thousandths of its sides
  const place = ([x1, y1, x2, y2]) => `left:${x1 / 10}%;top:${y1 / 10}%;width:${(x2 - x1) / 10}%;height:${(y2 - y1) / 10}%`;
  return node("span", {class: "shot"}, picture(name),
    boxes.map(([box, colour, label]) => node("span", {class: "box", style: `${place(box)};--c:${colour}`},
      label ? node("span", {}, label) : null)));
}

// ------------------------------------------------------------------------------------------------------------ the bar

function track() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 26");
  svg.setAttribute("preserveAspectRatio", "none");
  const xs = DATA.rewards.map(one => one[0]), ys = DATA.rewards.map(one => one[1]);
  const low = Math.min(...ys), high = Math.max(...ys), first = Math.min(...xs), last = Math.max(...xs);
  const x = value => 100 * (value - first) / Math.max(last - first, 1), y = value => 24 - 22 * (value - low) / Math.max(high - low, 1e-9);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", DATA.rewards.map(([a, b]) => `${x(a)},${y(b)}`).join(" "));
  const mark = document.createElementNS(svg.namespaceURI, "line");
  const at = x(DATA.rollouts[state.index].number);
  for (const [key, value] of [["x1", at], ["x2", at], ["y1", 0], ["y2", 26]]) mark.setAttribute(key, value);
  svg.append(line, mark);
  return svg;
}

function drawBar() {
  const rollout = DATA.rollouts[state.index], reward = DATA.rewards.find(one => one[0] === rollout.number);
  const go = step => () => { state.index = Math.min(DATA.rollouts.length - 1, Math.max(0, state.index + step)); draw(); };
  const slider = node("input", {type: "range", min: 0, max: DATA.rollouts.length - 1, value: state.index, "aria-label": "rollout",
    oninput: event => { state.index = Number(event.target.value); draw(false); }});
  const title = node("b", {}, `rollout ${rollout.number}, after update ${rollout.step}`);
  bar.replaceChildren(
    node("span", {class: "pick"}, node("button", {onclick: go(-1), title: "earlier (←)"}, "‹"),
      node("span", {class: "track"}, DATA.rewards.length > 1 ? track() : null, slider), node("button", {onclick: go(1), title: "later (→)"}, "›"),
      node("span"), node("span", {}, title, reward ? node("span", {class: "sub"}, `  mean reward ${number(reward[1])}`) : null), node("span")),
    node("span", {class: "group"}, "colour by ", COLOURS.map(([name, words]) =>
      node("button", {class: state.colour === name ? "on" : null, onclick: () => { state.colour = name; draw(); }}, words))),
    node("span", {class: "group keys"}, keys()));
}

function keys() {
  if (state.colour === "kind") {
    return Object.entries(KINDS).map(([kind, words]) => node("i", {class: `k-${kind} ${kind === "result" ? "" : "t"}`}, words));
  }
  const swatch = (tint, words, kind = "") => node("i", {class: `s tinted ${kind}`, style: `--tint:${tint}`}, words);
  if (state.colour === "advantage") return [swatch(tints.advantage(-1.5), "worse than its group"), swatch(tints.advantage(1.5), "better")];
  if (state.colour === "gap") {
    return [swatch(tints.gap(-0.5), "likelier for the engine"), swatch(tints.gap(0.5), "likelier for the trainer"),
      node("i", {class: "s out", style: "outline:2px solid var(--red)"}, `ratio outside ${DATA.band[0]} to ${DATA.band[1]}`)];
  }
  return [swatch(tints.chance(Math.log(0.9)), "likely when sampled"), swatch(tints.chance(Math.log(0.05)), "unlikely")];
}

const mix = (colour, share) => `color-mix(in srgb, var(--${colour}) ${Math.round(100 * Math.min(1, share))}%, transparent)`;
const tints = {
  advantage: value => value === null || value === 0 ? null : mix(value > 0 ? "green" : "red", 0.12 + Math.abs(value) / 4),
  gap: value => value === null || value === undefined ? null : mix(value > 0 ? "blue" : "amber", Math.abs(value)),
  chance: value => value === null || value === undefined ? null : mix("violet", 0.75 * (1 - Math.exp(value))),
};

// ---------------------------------------------------------------------------------------------------------- a rollout

function zero(rollout) {
  if (!rollout.zero) return null;
  const tables = [];
  for (const [words, count, share] of rollout.zero.lines) {
    const heading = share === null && count !== null && /^(attempts|tokens)/.test(words), why = count === null && share === null;
    if (heading || !tables.length) tables.push(node("table"));
    tables.at(-1).append(node("tr", {class: heading ? "head" : why ? "why" : /^(learned from|with a gradient|of the nominal)/.test(words) ? "learned" : null},
      node("td", {class: "n"}, count === null ? "" : count.toLocaleString("en")),
      node("td", {class: "n"}, share === null ? "" : percent(share)),
      node("td", {}, share === null ? null : node("span", {class: "meter"}, node("i", {style: `width:${100 * share}%`}))),
      node("td", {}, words.trim())));
  }
  return node("section", {class: "rows"}, node("h2", {}, `Where gradients go, update ${rollout.zero.step}`), node("div", {class: "zero"}, tables));
}

function group(one) {
  const rewards = one.rewards, high = Math.max(1e-9, ...rewards.map(value => Math.abs(value ?? 0)));
  const facts = [["right", one.expected || "not told"], ["group", `${one.group}: ${one.kind}`]];
  if (one.domain) facts.push(["domain", one.domain]);
  const right = one.right.map(box => [box, "#2da44e", ""]);
  const asked = node("div", {class: "asked"}, node("h2", {}, one.id), one.pictures.map((name, index) => shot(name, index === one.pictures.length - 1 ? right : [])),
    node("div", {class: "q"}, one.question), node("dl", {}, facts.map(([key, value]) => [node("dt", {}, key), node("dd", {}, value)])),
    node("div", {class: "bars", title: "reward of every attempt"}, rewards.map(value => node("u", {class: value === null ? "none" : value < 0 ? "low" : null,
      style: `height:${value === null ? 4 : Math.max(6, 100 * Math.abs(value) / high)}%`, title: number(value)}))),
    node("small", {class: "sub"}, `reward of ${rewards.length} attempts`),
    node("details", {}, node("summary", {}, "the whole prompt"), node("pre", {}, one.prompt)));
  const more = one.left ? [node("p", {class: "sub"}, `${one.left} more between these: rollouts.jsonl`)] : [];
  const attempts = one.attempts.map(attempt => attemptOf(attempt, one));
  if (one.left) attempts.splice(one.attempts.length - 2, 0, ...more);
  return node("article", {class: "group"}, asked, node("div", {}, attempts));
}

function attemptOf(one, group) {
  const taught = one.fate === "learned" || one.learned !== null;
  const parts = Object.entries(one.parts).map(([name, value]) => [`${name} `, node("b", {}, number(value)), "  "]);
  const tags = [node("span", {class: `tag ${one.status === "answered" ? "" : "bad"}`}, one.status.replaceAll("_", " ")),
    node("span", {class: `tag ${taught ? "good" : ""}`}, one.learned !== null ? `learned in update ${one.learned}` : DATA.fates[one.fate])];
  const boxes = one.calls.flatMap((call, index) => call.boxes.map(box => [call.on, box, "#0969da", String(index + 1)]));
  const last = group.pictures.length - 1;
  const drawn = [...boxes, ...one.said.map(box => [last, box, "#cf222e", ""]), ...(one.said.length ? group.right.map(box => [last, box, "#2da44e", ""]) : [])];
  const looks = group.pictures.map((name, index) => [name, drawn.filter(box => box[0] === index).map(box => box.slice(1))])
    .filter(([, own]) => own.length).map(([name, own]) => shot(name, own));
  const crops = one.calls.flatMap((call, index) => call.pictures.map(name => node("figure", {class: "crop"}, picture(name), node("span", {}, String(index + 1)))));
  const failing = one.calls.flatMap((call, index) => call.failed ? [node("div", {class: "failing"}, `call ${index + 1} ${call.name || "cannot be read"}: ${call.result}`)] : []);
  const side = looks.length || crops.length || failing.length ? node("div", {class: "looks"}, looks, node("div", {class: "crops"}, crops), failing) : null;
  const why = [one.problem && `no score: ${one.problem}`, one.error].filter(Boolean);
  const sign = !one.advantage ? "" : one.advantage > 0 ? "plus" : "minus";
  return node("section", {class: `attempt ${sign}`},
    node("header", {}, node("b", {}, `reward ${number(one.reward)}`), node("span", {title: "against its group"}, `advantage ${signed(one.advantage)}`), tags,
      node("span", {class: "parts"}, parts.flat(), `${one.tokens} tokens sampled`, one.calls.length ? `, ${one.calls.length} tool call${one.calls.length > 1 ? "s" : ""}` : "")),
    one.same ? node("div", {class: "sub"}, `${one.same + 1} attempts of the group wrote this, token for token`) : null,
    why.map(words => node("div", {class: "failing"}, words)),
    node("div", {class: `body ${side ? "seen" : ""}`}, side, tokens(one, taught)));
}

function tokens(one, taught) {
  const crops = one.calls.flatMap(call => call.pictures), box = node("p");
  let media = 0;
  for (const piece of one.pieces) {
    if (piece.count) {
      const name = crops[media++];
      box.append(node("i", {class: "k-image chip"}, name ? picture(name) : null, `${piece.count} tokens`));
      continue;
    }
    if (piece.left_out) {
      box.append(node("span", {class: "turn soft"}), node("small", {class: "sub"}, `${piece.left_out} tokens are left out here: rollouts.jsonl`),
        node("span", {class: "turn soft"}));
      continue;
    }
    const sampled = Boolean(piece.logprobs), before = box.lastChild?.classList;
    if (before && !sampled && before.contains("s")) box.append(node("span", {class: "turn soft"}));
    if (before && sampled && !before.contains("s")) box.append(node("span", {class: "turn"}));
    piece.texts.forEach((text, index) => {
      const gap = piece.gaps ? piece.gaps[index] : undefined, chance = sampled ? piece.logprobs[index] : undefined;
      const shown = text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
      const token = node("i", {class: `k-${piece.kind} ${sampled ? "s" : ""} ${sampled && taught ? "t" : ""}`}, shown);
      const tint = !sampled || state.colour === "kind" ? null : tints[state.colour]({advantage: taught ? one.advantage : null, gap, chance}[state.colour]);
      if (tint) { token.classList.add("tinted"); token.style.setProperty("--tint", tint); }
      if (state.colour === "gap" && typeof gap === "number" && (Math.exp(gap) < DATA.band[0] || Math.exp(gap) > DATA.band[1])) token.classList.add("out");
      token.about = () => [`${JSON.stringify(text)}  id ${piece.ids[index]}`, sampled ? (taught ? "sampled, learned" : "sampled, not learned") : "not sampled: masked",
        chance === undefined ? null : `engine: p ${number(Math.exp(chance))}, log p ${number(chance)}`,
        typeof gap === "number" ? `trainer: p ${number(Math.exp(chance + gap))}; ratio to the engine's ${number(Math.exp(gap), 5)}` : null,
        KINDS[piece.kind] ?? piece.kind].filter(Boolean);
      box.append(token);
    });
  }
  return node("div", {class: "toks"}, box.childNodes.length ? box : node("p", {class: "sub"}, "nothing was written"));
}

function draw(bar = true) {
  const rollout = DATA.rollouts[state.index];
  document.body.classList.toggle("tint", state.colour !== "kind");
  if (bar) drawBar();
  else {  // the slider is being moved: it must stay
    document.querySelector(".pick b").textContent = `rollout ${rollout.number}, after update ${rollout.step}`;
  }
  main.replaceChildren(...[zero(rollout), ...rollout.groups.map(group)].filter(Boolean));
}

document.addEventListener("mousemove", event => {
  const token = event.target.closest?.(".toks i");
  tip.hidden = !token?.about;
  if (tip.hidden) return;
  tip.replaceChildren(...token.about().flatMap((line, index) => index ? [document.createElement("br"), line] : [line]));
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
  tip.style.top = (event.clientY + height + 24 < innerHeight ? event.clientY + 16 : event.clientY - height - 12) + "px";
});
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  state.index = Math.min(DATA.rollouts.length - 1, Math.max(0, state.index + (event.key === "ArrowRight" ? 1 : -1)));
  draw();
});
document.addEventListener("change", event => event.target.type === "range" && drawBar());
const wanted = new URLSearchParams(location.hash.slice(1));  // #rollout=3&colour=gap
if (wanted.has("rollout")) state.index = Math.max(0, DATA.rollouts.findIndex(one => one.number === Number(wanted.get("rollout"))));
if (COLOURS.some(one => one[0] === wanted.get("colour"))) state.colour = wanted.get("colour");
draw();
