"use strict";
// Plays timelines (timeline.py): what a position shows is its last event up to the present pass.
const requests = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const NEVER = "\u2007\u2007\u2007"; // what a position that never got a token takes up
let request, spans, texts, names, twinSpans, moments, time, playing, cursor, shown, twinShown;

const hue = (round) => (round * 137.5) % 360;
const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;
const percent = (value) => (value === null ? "untested" : `${(100 * value).toFixed(1)}%`);

/** Number of passes that are over. */
function passNow() {
  let low = 0, high = request.passes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (request.passes[middle].end <= time + 1e-9) low = middle + 1; else high = middle;
  }
  return low;
}

function eventAt(position, pass) {
  let found = null;
  for (const event of position.e) {
    if (event[0] > pass) break;
    found = event;
  }
  return found;
}

function makeSpans(target, count, make) {
  const fragment = document.createDocumentFragment();
  const made = Array.from({ length: count }, (_, index) => {
    const span = document.createElement("span");
    make(span, index);
    fragment.append(span);
    return span;
  });
  target.replaceChildren(fragment);
  return made;
}

function open(index) {
  request = requests[index];
  playing = false; time = 0; cursor = null; shown = -1; twinShown = 0;
  const size = request.parameters.slot_size;
  const settled = request.positions.map((p) => p.e.findLast((e) => e[1] === "committed"));
  request.final = settled.map((event) => (event ? event[2] : NEVER));
  request.positions.forEach((p, i) => { p.committed = settled[i] ? settled[i][0] : Infinity; });
  spans = makeSpans($("response"), request.positions.length, (span, i) => {
    span.textContent = request.final[i];
    span.dataset.i = i;
    span.style.setProperty("--h", hue(request.positions[i].r ?? 0));
    span.dataset.base = i % size === 0 ? "token slot" : "token";
    span.className = `${span.dataset.base} masked`;
  });
  texts = [...request.final];
  names = [];
  const twin = request.autoregressive;
  $("twin").hidden = !twin;
  twinSpans = [];
  if (twin) {
    $("twin-name").textContent = `Autoregressive (${twin.model})`;
    twinSpans = makeSpans($("twin-text"), twin.output.pieces.length, (span, i) => {
      span.textContent = twin.output.pieces[i];
      span.className = "ahead";
    });
  }
  const ends = request.passes.map((pass) => pass.end);
  const after = twin ? [...new Set(twin.seconds.filter((s) => s > ends.at(-1)))] : [];
  // the twin's rest must not crowd the passes out of the slider
  const stride = Math.ceil(after.length / Math.max(20, ends.length)) || 1;
  moments = [0, ...ends, ...after.filter((_, i) => (after.length - 1 - i) % stride === 0)];
  $("slider").max = moments.length - 1;
  $("summary").textContent = `${request.model}: ${request.summary}.`;
  $("prompt").textContent = request.prompt;
  $("parameters").textContent = JSON.stringify(request.parameters);
  $("plain").textContent = request.final.slice(0, request.delivered).join("");
  $("inspector").textContent = "Point at a token, or focus the response and use the arrow keys.";
  render();
}

function render() {
  const pass = passNow();
  if (pass !== shown) showPass(pass);
  let count = twinShown;
  const twin = request.autoregressive;
  if (twin) {
    while (count < twinSpans.length && twin.seconds[count] <= time + 1e-9) count++;
    while (count > 0 && twin.seconds[count - 1] > time + 1e-9) count--;
    for (let i = Math.min(count, twinShown); i < Math.max(count, twinShown); i++)
      twinSpans[i].className = i < count ? "" : "ahead";
    twinShown = count;
    $("twin-clock").textContent = `${count} of ${twinSpans.length} tokens`;
  }
  let moment = 0;
  while (moment + 1 < moments.length && moments[moment + 1] <= time + 1e-9) moment++;
  $("slider").value = moment;
  $("slider").setAttribute("aria-valuetext", $("moment").textContent);
  $("play").textContent = playing ? "Pause" : "Play";
  $("refusion-clock").textContent =
    `${request.committedSoFar} of ${request.delivered} tokens, ${seconds(time)}`;
}

function showPass(pass) {
  const previous = shown;
  shown = pass;
  let committed = 0, frontier = null;
  request.positions.forEach((position, i) => {
    const event = eventAt(position, pass);
    const state = event ? event[1] : "masked";
    const text = event && event[2] && state !== "masked" ? event[2] : request.final[i];
    if (texts[i] !== text) spans[i].textContent = texts[i] = text;
    const fresh = state === "committed" && event[0] === pass ? " fresh" : "";
    const cut = state === "committed" && i >= request.delivered ? " cut" : "";
    const name = `${spans[i].dataset.base} ${state}${fresh}${cut}${i === cursor ? " cursor" : ""}`;
    if (names[i] !== name) spans[i].className = names[i] = name;
    if (state === "committed" && i < request.delivered) committed++;
    else if (frontier === null && state !== "dropped" && state !== "cut") frontier = i;
  });
  request.committedSoFar = committed;
  const now = request.passes[pass - 1];
  const number = `Pass ${pass} of ${request.passes.length}`;
  $("moment").textContent = now
    ? `${number} · round ${now.round} · ${now.kinds.join(" + ")} · ` +
      `${now.rows} rows${now.riders ? ` (${now.riders} of them riders)` : ""} · ` +
      `${now.committed.length} committed · ${seconds(now.end)}`
    : `${number} · everything is masked`;
  if (previous >= 0 && frontier !== null) {
    requestAnimationFrame(() => {
      const box = $("response"), top = spans[frontier]?.offsetTop;
      const outside = top > box.scrollTop + box.clientHeight - 60 || top < box.scrollTop;
      if (outside) box.scrollTop = top - 30;
    });
  }
  if (cursor !== null) inspect(cursor);
  draw();
}

// --- one token -----------------------------------------------------------------------------------

function inspect(i) {
  if (cursor !== null) {
    spans[cursor].classList.remove("cursor");
    names[cursor] = "";
  }
  cursor = i;
  spans[i].classList.add("cursor");
  const position = request.positions[i], size = request.parameters.slot_size;
  const event = eventAt(position, shown);
  const past = position.e.filter((e) => e[0] <= shown);
  const last = (state) => past.findLast((e) => e[1] === state);
  names[i] = "";
  const parts = [`position ${i}`, `slot ${Math.floor(i / size)}`];
  const [draft, accepted, done] = ["draft", "accepted", "committed"].map(last);
  parts.push(event ? `${event[1]} “\u2068${event[2]}\u2069”` : "masked");
  if (draft) parts.push(`drafted in pass ${draft[0]} with certainty ${percent(draft[3])}`);
  if (accepted) {
    const test = accepted[3] === null ? "without a test" : `at ${percent(accepted[3])}`;
    parts.push(`accepted in pass ${accepted[0]} ${test}`);
  }
  if (done) parts.push(`committed in pass ${done[0]}, round ${position.r}, KV entry ${position.kv}`);
  $("inspector").textContent = parts.join(" · ");
  draw();
}

function moveCursor(step) {
  let next = cursor === null ? (step > 0 ? 0 : spans.length - 1) : cursor + step;
  while (spans[next] && spans[next].classList.contains("dropped")) next += step;
  if (!spans[next]) return;
  inspect(next);
  spans[next].scrollIntoView({ block: "nearest" });
}

// --- charts --------------------------------------------------------------------------------------

function surface(id) {
  const canvas = $(id), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  context.font = "12px system-ui, sans-serif";
  return { context, width, height, value, fill: (r) => `hsl(${hue(r)} 65% ${value("--bar-light")})` };
}

const EDGE = { left: 44, right: 10, top: 12, bottom: 22 };

function axes({ context, width, height, value }, most, last) {
  context.fillStyle = value("--soft");
  context.textAlign = "right";
  context.fillText(String(most), EDGE.left - 6, EDGE.top + 8);
  context.fillText("0", EDGE.left - 6, height - EDGE.bottom);
  context.fillText(last, width - EDGE.right, height - 6);
}

function draw() {
  drawChart();
  drawOrder();
}

function drawChart() {
  const at = surface("chart"), { context, width, height, value } = at;
  const passes = request.passes, wide = width - EDGE.left - EDGE.right;
  const tall = height - EDGE.top - EDGE.bottom;
  const most = Math.max(1, ...passes.map((p) => (p.decodes ? Math.max(p.committed.length, p.rows) : 0)));
  axes(at, most, `pass ${passes.length}`);
  const step = wide / passes.length;
  passes.forEach((pass, i) => {
    const x = EDGE.left + i * step, base = height - EDGE.bottom;
    context.globalAlpha = i < shown ? 1 : 0.25;
    const h = Math.max(2, (tall * pass.committed.length) / most);
    context.fillStyle = pass.committed.length ? at.fill(pass.round0) : value("--line");
    context.fillRect(x + step * 0.1, base - h, Math.max(1, step * 0.8), h);
    if (!pass.decodes) return;
    context.fillStyle = value("--soft");
    context.fillRect(x, base - (tall * pass.rows) / most, Math.max(1, step), 1);
  });
  context.globalAlpha = 1;
  if (shown) {
    context.strokeStyle = value("--accent");
    context.lineWidth = 2;
    context.strokeRect(EDGE.left + (shown - 1) * step, EDGE.top - 3, Math.max(2, step), tall + 5);
  }
  const done = passes.reduce((sum, p) => sum + p.committed.length, 0);
  $("chart").setAttribute("aria-label", `${done} tokens committed in ${passes.length} passes`);
}

function drawOrder() {
  const at = surface("order"), { context, width, height, value } = at;
  const wide = width - EDGE.left - EDGE.right, strip = 12;
  const tall = height - EDGE.top - EDGE.bottom - strip - 4;
  const positions = request.positions;
  const total = positions.filter((p) => p.kv !== null).length || 1;
  const highest = positions.findLastIndex((p) => p.kv !== null) + 1 || 1;
  axes(at, highest, `${total} KV entries`);
  const x = (kv) => EDGE.left + (kv * wide) / total;
  const y = (i) => EDGE.top + tall - ((i + 1) * tall) / highest;
  context.strokeStyle = value("--line");
  context.beginPath();
  context.moveTo(x(0), y(-1));
  context.lineTo(x(total), y(total - 1));
  context.stroke();
  const dot = Math.max(2, Math.min(8, wide / total, tall / highest));
  const mark = (position, i, colour, size) => {
    context.fillStyle = colour;
    context.fillRect(x(position.kv), y(i) - (size - dot) / 2, Math.max(size, wide / total), size);
    context.fillRect(x(position.kv), height - EDGE.bottom - strip, Math.max(1, wide / total + 0.3), strip);
  };
  const isThere = (position) => position.committed <= shown;
  positions.forEach((position, i) => {
    if (isThere(position)) mark(position, i, at.fill(position.r), dot);
  });
  if (cursor !== null && isThere(positions[cursor]))
    mark(positions[cursor], cursor, value("--ink"), dot + 4);
  const before = positions.filter((p, i) => p.kv !== null && p.kv !== i).length;
  $("order").setAttribute("aria-label", `${before} of ${total} KV entries are out of position order`);
}

// --- controls ------------------------------------------------------------------------------------

function go(moment) {
  const last = moments.length - 1;
  time = moments[Math.max(0, Math.min(last, moment))];
  render();
}

function play(on) {
  playing = on;
  if (on && time >= moments.at(-1) - 1e-9) time = 0;
  let before = null;
  const tick = (now) => {
    if (!playing) return;
    if (before !== null) time += ((now - before) / 1000) * Number($("speed").value);
    before = now;
    if (time >= moments.at(-1)) { time = moments.at(-1); playing = false; }
    render();
    requestAnimationFrame(tick);
  };
  render();
  if (on) requestAnimationFrame(tick);
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = dark ? "Light" : "Dark";
}

$("play").addEventListener("click", () => play(!playing));
$("slider").addEventListener("input", (event) => { playing = false; go(Number(event.target.value)); });
$("request").addEventListener("change", (event) => open(Number(event.target.value)));
const isDark = () => document.documentElement.classList.contains("dark");
$("theme").addEventListener("click", () => { theme(!isDark()); draw(); });
$("response").addEventListener("pointerover", (event) => {
  if (event.target.dataset.i) inspect(Number(event.target.dataset.i));
});
$("response").addEventListener("click", (event) => {
  if (event.target.dataset.i) inspect(Number(event.target.dataset.i));
});
$("chart").addEventListener("click", (event) => {
  const wide = event.target.clientWidth - EDGE.left - EDGE.right;
  playing = false;
  go(1 + Math.floor(((event.offsetX - EDGE.left) / wide) * request.passes.length));
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const inText = event.target.id === "response";
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const moment = Number($("slider").value);
  if (step) {
    const rightToLeft = inText && getComputedStyle(event.target).direction === "rtl";
    if (inText) moveCursor(rightToLeft ? -step : step);
    else { playing = false; go(moment + step); }
  } else if (inText && (event.key === "ArrowDown" || event.key === "ArrowUp"))
    moveCursor((event.key === "ArrowDown" ? 1 : -1) * request.parameters.slot_size);
  else if (event.key === "Home") { playing = false; go(0); }
  else if (event.key === "End") { playing = false; go(moments.length - 1); }
  else if (event.key === " " && event.target.tagName !== "SUMMARY") play(!playing);
  else if (event.key === "t" || event.key === "T") { theme(!isDark()); draw(); }
  else return;
  event.preventDefault();
});
// a focused button would act on Space once more
document.addEventListener("keyup", (event) => {
  if (event.key === " " && event.target.tagName === "BUTTON") event.preventDefault();
});
window.addEventListener("resize", draw);

// The round whose tokens a pass commits: a fused pass may plan the next one already.
for (const one of requests)
  for (const pass of one.passes)
    pass.round0 = pass.committed.length ? one.positions[pass.committed[0]].r : pass.round;

function start() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const wanted = hash.get("theme");
  theme(wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  $("which").hidden = requests.length < 2;
  $("request").replaceChildren(...requests.map((one, i) => new Option(`${i}: ${one.prompt.slice(0, 60)}`, i)));
  const index = Math.min(Number(hash.get("request") ?? 0), requests.length - 1);
  $("request").value = index;
  open(index);
  go(Number(hash.get("pass") ?? request.passes.length));
  if (hash.has("token")) inspect(Number(hash.get("token")));
}
window.addEventListener("hashchange", start);
start();
