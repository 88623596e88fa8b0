// Asks the server that this page came from for responses, and shows them while they are decoded.
const API = location.pathname.replace(/\/refusion\/play\/?$/, "/v1/refusion/play");
const POLL_MS = 2000, READY_POLLS = 3; // a server that was there is asked less often
const LANES = [
  { id: "parallel", name: "Parallel", mode: "parallel",
    what: "Slots anywhere in a block are drafted, tested and committed together." },
  { id: "serial", name: "Serial", mode: "serial",
    what: "The same weights in reading order; masks draft, and each draft must be what is picked." },
  { id: "tokens", name: "Token by token", mode: "serial", parameters: { drafts: 0 }, plain: true,
    what: "The same weights on the same engine with drafts withheld: what serial gives, one token a pass." },
  { id: "stock", name: "Stock, token by token", stock: true, plain: true, what: "" },
];
let about = null, running = null, key = sessionStorage.getItem("key");

function status(state, text) {
  $("status").dataset.state = state;
  $("status").textContent = text;
  const ready = state === "ready";
  $("run").disabled = !ready;
  $("stop").disabled = state !== "running";
}

function ask(options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(API, { headers, ...options });
}

// --- the server ----------------------------------------------------------------------------------

/** Looks for the server, and notes that it is gone, or back. */
async function look() {
  if (running) return;
  try {
    const response = await ask();
    if (response.status === 401) {
      $("key-form").hidden = false;
      status("waiting", "An API key is needed");
      return;
    }
    if (!response.ok) throw new Error((await response.json()).error.message);
    $("key-form").hidden = true;
    const found = await response.json(), first = about === null;
    about = found;
    if (first) introduce();
    if (!running) status("ready", "Ready");
  } catch (error) {
    if (running) return;
    const message = error instanceof TypeError ? "The server is gone; looking for it…" : error.message;
    status(about ? "gone" : "waiting", message);
  }
}

/** Fills the form with what the server can do. */
function introduce() {
  const device = about.device === "cpu" ? "CPU" : about.device;
  $("server").textContent = `${about.model} · ${about.dtype} · ${device}`;
  $("raw").checked = !about.chat;
  $("raw").disabled = !about.chat;
  $("max_tokens").max = Math.max(16, about.max_model_len - (about.max_model_len % 16));
  $("max_tokens").value = 256;
  const names = Object.keys(about.presets);
  const parallel = about.modes.includes("parallel");
  $("preset").replaceChildren(
    new Option("the server's defaults", "defaults"),
    ...(parallel ? names.map((name) => new Option(name, name)) : []),
    new Option("as set below", "own"));
  choosePreset("defaults");
  for (const lane of LANES) makeLane(lane);
  player.open([...used().values()], used().values().next().value);
  refreshLanes();
}

function possible(lane) {
  return lane.stock ? about.stock !== null : about.modes.includes(lane.mode);
}

function makeLane(lane) {
  if (!possible(lane)) return;
  const root = $("lane").content.cloneNode(true).firstElementChild;
  lane.root = root;
  root.querySelector(".name").textContent = lane.name;
  root.querySelector(".what").textContent = lane.stock
    ? `The model behind ${about.stock}, as its tokens arrive from there.` : lane.what;
  const text = root.querySelector(".text");
  text.setAttribute("aria-label", `${lane.name}: response, token by token: arrow keys move`);
  text.classList.toggle("plain", Boolean(lane.plain));
  lane.view = new Lane(lane.name, text, null, lane.plain);
  $("lanes").append(root);
  const label = document.createElement("label"), box = document.createElement("input");
  Object.assign(box, { type: "checkbox", checked: true, id: `use-${lane.id}` });
  box.addEventListener("change", refreshLanes);
  label.append(box, lane.name.toLowerCase());
  $("which-lanes").append(label);
  lane.box = box;
}

/** The lanes asked for, with their views. */
function used() {
  return new Map(LANES.filter((lane) => lane.box?.checked).map((lane) => [lane, lane.view]));
}

function refreshLanes() {
  const lanes = used();
  for (const lane of LANES) if (lane.root) lane.root.hidden = !lanes.has(lane);
  const views = [...lanes.values()];
  if (views.length) player.open(views, views.includes(player.main) ? player.main : views[0]);
  if (!running) $("run").disabled = !views.length || $("status").dataset.state !== "ready";
  const together = document.querySelector("[name=order]:checked").value === "together";
  const local = [...lanes.keys()].filter((lane) => !lane.stock).length;
  $("how").textContent = local < 2 ? "" : together
    ? `The ${local} lanes of this server run in one batch, so each is slower than it would be alone.`
    : "One lane after another has the server to itself; the times are those of each alone.";
}

// --- the form ------------------------------------------------------------------------------------

const SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
let choices = { slot_size: [], block_length: [] };

function choosePreset(name) {
  const values = name === "defaults" ? about.defaults : about.presets[name];
  setSizes(values.slot_size, values.block_length);
  $("slot_threshold").value = values.slot_threshold;
  $("token_threshold").value = values.token_threshold;
  $("preset").value = name;
  showValues();
}

/** Sliders of sizes go through those that fit each other, whatever else is chosen among them. */
function setSizes(slot, block) {
  const canvas = about.canvas_length, ascending = (a, b) => a - b;
  const fitting = (all, extra) => [...new Set([...all, extra])].filter((n) => n <= canvas).sort(ascending);
  choices.slot_size = fitting(SIZES.slice(0, 6), slot);
  choices.block_length = fitting(SIZES.map((count) => count * slot), block);
  for (const [name, value] of [["slot_size", slot], ["block_length", block]]) {
    $(name).max = choices[name].length - 1;
    $(name).value = choices[name].indexOf(value);
  }
}

const chosen = (name) => choices[name][Number($(name).value)];

function showValues() {
  for (const name of ["slot_size", "block_length"]) {
    $(`${name}-value`).textContent = chosen(name);
    $(name).setAttribute("aria-valuetext", `${chosen(name)} tokens`);
  }
  for (const name of ["slot_threshold", "token_threshold", "temperature"])
    $(`${name}-value`).textContent = Number($(name).value).toFixed(name === "temperature" ? 1 : 2);
  $("max_tokens-value").textContent = $("max_tokens").value;
}

$("parameters").addEventListener("input", (event) => {
  if (!about || event.target.id === "preset") return;
  if (event.target.id === "slot_size") {
    const slot = chosen("slot_size"), block = chosen("block_length");
    setSizes(slot, Math.min(Math.max(slot, Math.round(block / slot) * slot),
      about.canvas_length - (about.canvas_length % slot)));
  }
  if (event.target.matches("#slot_size, #block_length, #slot_threshold, #token_threshold"))
    $("preset").value = "own";
  showValues();
});
$("preset").addEventListener("change", () => {
  if ($("preset").value !== "own") choosePreset($("preset").value);
});
for (const radio of document.querySelectorAll("[name=order]")) radio.addEventListener("change", refreshLanes);

/** The body of a lane's request. */
function bodyOf(lane) {
  const parameters = { mode: lane.mode, slot_size: chosen("slot_size"), ...lane.parameters };
  if (lane.mode === "parallel")
    Object.assign(parameters, {
      block_length: chosen("block_length"),
      slot_threshold: Number($("slot_threshold").value),
      token_threshold: Number($("token_threshold").value),
    });
  return {
    prompt: $("prompt").value, raw: $("raw").checked, max_tokens: Number($("max_tokens").value),
    temperature: Number($("temperature").value), seed: running.seed,
    ...(lane.stock ? { stock: true } : { parameters }),
  };
}

// --- running -------------------------------------------------------------------------------------

class Gone extends Error {}

/** Events of a response: [name, data]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (.*)\ndata: ([^]*)$/) ?? [];
      if (name) yield [name, JSON.parse(data)];
    }
  }
}

async function run() {
  const lanes = [...used().keys()];
  if (!about || running || !lanes.length || !$("prompt").value) return;
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  running = { abort: new AbortController(), seed };
  status("running", "Decoding");
  $("controls").disabled = true;
  player.playing = false;
  for (const lane of LANES) if (lane.view) {
    lane.view.begin(lane.plain ? 1 : chosen("slot_size"));
    lane.root.querySelector(".error").textContent = "";
    setState(lane, lanes.includes(lane) ? "waits" : "");
  }
  if (!wide.matches) $("lanes").scrollIntoView();
  const together = document.querySelector("[name=order]:checked").value === "together";
  let gone = false;
  const one = (lane) => decode(lane).catch((error) => { gone ||= error instanceof Gone; });
  if (together) await Promise.all(lanes.map(one));
  else for (const lane of lanes) await one(lane);
  running = null;
  refresh();
  player.pace();
  player.time = player.moments.at(-1);
  player.render();
  $("controls").disabled = false;
  status(gone ? "gone" : "ready", gone ? "The server is gone; looking for it…" : "Ready");
  if (gone) look();
}

/** Decodes one lane. Raises Gone if the server went away. */
async function decode(lane) {
  const { signal } = running.abort;
  const fail = (state, message = "") => {
    lane.root.querySelector(".error").textContent = message;
    setState(lane, state);
  };
  if (signal.aborted) return fail("stopped");
  setState(lane, "decoding");
  try {
    const response = await ask({ method: "POST", body: JSON.stringify(bodyOf(lane)), signal });
    if (!response.ok) {
      const answer = await response.json();
      return fail("refused", answer.error?.message ?? JSON.stringify(answer.detail ?? answer));
    }
    for await (const [name, data] of eventsOf(response)) {
      if (name === "error") return fail("failed", data.message);
      if (name === "change" || name === "end") lane.view.change(data);
      if (name === "start" && data.model) lane.root.querySelector(".what").textContent =
        `${data.model} behind ${about.stock}, as its tokens arrive from there.`;
      schedule();
      if (name === "end") return setState(lane, data.finish_reason === "length" ? "done, cut" : "done");
    }
    throw new Gone();
  } catch (error) {
    if (signal.aborted) return fail("stopped");
    fail("broken off", "The server is gone. What came until then stays here.");
    throw new Gone();
  }
}

function setState(lane, text) {
  lane.root.querySelector(".state").textContent = text;
  lane.root.classList.toggle("running", text === "decoding");
}

let scheduled = false;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; if (running) refresh(); });
}

/** Shows all lanes as they are now. */
function refresh() {
  for (const view of used().values()) view.show(view.passes.length);
  player.tell();
  player.draw();
  player.afterRender();
}

player.afterRender = () => {
  $("moment").textContent = `${player.main.name} · ${player.main.moment}`;
  for (const [lane, view] of used()) {
    const set = (name, text) => { lane.root.querySelector(`.${name}`).textContent = text; };
    const last = view.passes[view.shown - 1], per = view.perForward;
    set("per-forward", per === null ? "–" : per.toFixed(2));
    set("count", view.committed);
    set("passes", view.passes.slice(0, view.shown).filter((pass) => pass.decodes).length);
    set("time", last ? seconds(last.end) : "–");
    set("rate", last && view.committed ? (view.committed / last.end).toFixed(0) : "–");
  }
  for (const name of document.querySelectorAll(".of-lane")) name.textContent = `(${player.main.name})`;
};

function stop() {
  if (running) running.abort.abort();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("stop").addEventListener("click", stop);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  sessionStorage.setItem("key", key);
  look();
});
const wide = matchMedia("(min-width: 56rem)");
$("parameters").open = wide.matches;
startTheme(new URLSearchParams(location.hash.slice(1)).get("theme"));
look();
let polls = 0;
setInterval(() => {
  const due = $("status").dataset.state !== "ready" || ++polls % READY_POLLS === 0;
  if (due && document.visibilityState === "visible") look();
}, POLL_MS);
