// What happens under the mouse. Without it the page shows everything but the ids and positions of single tokens.
const tip = document.getElementById("tip");
const escape = text => text.replace(/[&<>]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"}[c]));

for (const box of document.querySelectorAll(".toks")) {  // number the tokens; a chip stands for several
  let index = 0;
  for (const token of box.querySelectorAll("i")) {
    token.index = index;
    index += Number(token.dataset.tokens || 1);
  }
}

function about(sample, index, count = 1) {
  const data = DATA[sample], last = index + count - 1;
  const place = i => `(${data.positions.slice(3 * i, 3 * i + 3).join(", ")})`;
  const text = i => escape(JSON.stringify(data.texts[i]).slice(1, -1));
  const weight = data.weights[index];
  const next = !data.stops.includes(last + 1)
    ? `<code>${text(last + 1)}</code> ${data.ids[last + 1]}${data.weights[last + 1] ? ", weight " + data.weights[last + 1] : ", not trained"}`
    : "none: nothing follows";
  const lines = count === 1
    ? [`<b><code>${text(index)}</code></b> id ${data.ids[index]} · token ${index} of ${data.ids.length}`,
       `position (t, h, w) = ${place(index)}`,
       weight ? `<span class=yes>trained to be written, weight ${weight}</span>` : "<span class=no>not trained</span>"]
    : [`<b>${count} tokens</b>, ${index} to ${last} of ${data.ids.length}`,
       `placeholders from (t, h, w) = ${place(index + 1)} to ${place(last - 1)}`,
       "<span class=no>not trained</span>"];
  return [...lines, `target there: ${next}`, `experts: ${data.vision[index] ? "vision" : "text"} pool`].join("<br>");
}

function show(event, content) {
  tip.innerHTML = content;
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
  tip.style.top = (event.clientY + height + 24 < innerHeight ? event.clientY + 16 : event.clientY - height - 12) + "px";
}

document.addEventListener("mousemove", event => {
  const token = event.target.closest(".toks i"), picture = event.target.closest(".pic"), bar = event.target.closest("[data-tip]");
  if (token) {
    show(event, about(token.closest(".toks").dataset.sample, token.index, Number(token.dataset.tokens || 1)));
  } else if (picture) {
    const {start, time, rows, columns} = Object.fromEntries(Object.entries(picture.dataset).map(([key, value]) => [key, Number(value)]));
    const box = picture.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
    const cell = picture.querySelector(".cell");
    cell.setAttribute("x", 2 * column);
    cell.setAttribute("y", 2 * row);
    const sample = picture.closest("article").id.slice(1);
    show(event, `row ${row}, column ${column}<br>` + about(sample, start + (time * rows + row) * columns + column));
  } else if (bar) {
    show(event, escape(bar.dataset.tip));
  } else {
    tip.hidden = true;
  }
});

for (const [id, name] of [["grid28", "g28"], ["grid14", "g14"]]) {
  const box = document.getElementById(id);
  if (!box) continue;
  const apply = () => document.body.classList.toggle(name, box.checked);
  box.addEventListener("change", apply);
  apply();
}

for (const button of document.querySelectorAll(".legend button")) {  // show one kind of token, dim the others
  button.addEventListener("click", () => {
    const on = !button.classList.contains("on");
    document.querySelectorAll(".legend button").forEach(other => other.classList.remove("on"));
    button.classList.toggle("on", on);
    document.body.classList.toggle("dim", on);
    const kind = button.dataset.kind;
    const wanted = {t: token => token.classList.contains("t"),
                    w: token => ![0, 1].includes(DATA[token.closest(".toks").dataset.sample].weights[token.index])}[kind]
      || (token => token.classList.contains("k-" + kind));
    for (const token of document.querySelectorAll(".toks i")) token.classList.toggle("hit", on && wanted(token));
  });
}

function open(segment) {
  const article = document.getElementById("s" + segment.dataset.sample);
  article.scrollIntoView({behavior: "smooth"});
  article.classList.add("flash");
  setTimeout(() => article.classList.remove("flash"), 1500);
}
for (const segment of document.querySelectorAll(".seg[data-sample]")) {
  segment.addEventListener("click", () => open(segment));
  segment.addEventListener("keydown", event => event.key === "Enter" && open(segment));
}
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const figures = chip.closest("article").querySelectorAll("figure");
    figures[Number(chip.dataset.medium)].scrollIntoView({behavior: "smooth", block: "nearest"});
  });
}
