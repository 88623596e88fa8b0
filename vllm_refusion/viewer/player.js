"use strict";
// Shows responses being decoded, in lanes. What a position shows is its last event (timeline.py) up
// to the pass of the moment. The recorded page loads whole timelines, the live one adds changes.
const $ = (id) => document.getElementById(id);
const NEVER = "\u2007\u2007\u2007"; // what a position without a token takes up
const HINT = "Point at a token, or focus a response and use the arrow keys.";

const hue = (round) => (round * 137.5) % 360;
const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;
const percent = (value) => (value === null ? "untested" : `${(100 * value).toFixed(1)}%`);

/** A response: its passes, its positions, and the text that shows one moment of them. */
class Lane {
  /** `plain`: tokens come one after another, without rounds to tell apart. */
  constructor(name, text, clock, plain = false) {
    Object.assign(this, { name, text, clock, plain });
    this.begin(1);
  }

  begin(slotSize) {
    Object.assign(this, {
      size: slotSize, passes: [], positions: [], spans: [], texts: [], names: [], final: [],
      pieces: [], alone: [], delivered: null, shown: -1, cursor: null, committed: 0,
      changed: true,
    });
    this.text.replaceChildren();
  }

  load(data) {
    this.begin(data.parameters.slot_size);
    this.delivered = data.delivered;
    this.grow(data.positions.length);
    data.positions.forEach((position, i) => this.add(i, position));
    data.passes.forEach((pass) => this.addPass(pass));
  }

  /** Takes a change that a pass or an output made. */
  change(change) {
    for (const [number, news] of Object.entries(change.positions)) {
      const i = Number(number);
      this.grow(i + 1);
      this.add(i, news);
    }
    if (change.pass) this.addPass(change.pass);
    if (change.delivered !== undefined) this.delivered = change.delivered;
    this.changed = true;
  }

  grow(count) {
    const fragment = document.createDocumentFragment();
    while (this.positions.length < count) {
      const i = this.positions.length, span = document.createElement("span");
      span.dataset.i = i;
      span.dataset.base = i % this.size === 0 && !this.plain ? "token slot" : "token";
      span.textContent = this.texts[i] = this.final[i] = NEVER;
      span.className = this.names[i] = `${span.dataset.base} masked`;
      this.positions.push({ r: null, kv: null, e: [], committed: Infinity });
      this.spans.push(span);
      fragment.append(span);
    }
    this.text.append(fragment);
  }

  add(i, news) {
    const position = this.positions[i];
    position.e.push(...(news.e ?? []));
    if (news.r !== undefined) position.r = news.r;
    if (news.kv !== undefined) position.kv = news.kv;
    if (news.text !== undefined) this.pieces[i] = news.text;
    const settled = position.e.findLast((event) => event[1] === "committed");
    if (!settled) return;
    position.committed = settled[0];
    this.alone[i] = settled[2];
    this.final[i] = this.pieces[i] ?? settled[2];
    this.spans[i].style.setProperty("--h", hue(position.r ?? 0));
  }

  addPass(pass) {
    // the round whose tokens it commits: a fused pass may plan the next one already
    pass.round0 = pass.committed.length ? this.positions[pass.committed[0]].r : pass.round;
    this.passes.push(pass);
  }

  get end() { return this.passes.at(-1)?.end ?? 0; }

  /** Number of passes that are over then. */
  passAt(time) {
    let low = 0, high = this.passes.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.passes[middle].end <= time + 1e-9) low = middle + 1; else high = middle;
    }
    return low;
  }

  eventAt(i, pass) {
    let found = null;
    for (const event of this.positions[i].e) {
      if (event[0] > pass) break;
      found = event;
    }
    return found;
  }

  /** A token's text, in its place among the others once it is final. */
  textOf(i, event) {
    return event[2] === this.alone[i] ? this.final[i] : event[2];
  }

  show(pass) {
    if (pass === this.shown && !this.changed) return;
    const first = this.shown < 0, limit = this.delivered ?? Infinity;
    this.shown = pass;
    this.changed = false;
    let committed = 0, frontier = null;
    for (let i = 0; i < this.positions.length; i++) {
      const event = this.eventAt(i, pass), state = event ? event[1] : "masked";
      const text = event && event[2] && state !== "masked" ? this.textOf(i, event) : this.final[i];
      if (this.texts[i] !== text) this.spans[i].textContent = this.texts[i] = text;
      let name = `${this.spans[i].dataset.base} ${state}`;
      if (state === "committed") {
        if (event[0] === pass) name += " fresh";
        if (i >= limit) name += " cut";
        if (this.positions[i].e.some((e) => e[1] === "refused" && e[0] === event[0]))
          name += " replaced";
      }
      if (i === this.cursor) name += " cursor";
      if (this.names[i] !== name) this.spans[i].className = this.names[i] = name;
      if (state === "committed" && i < limit) committed++;
      else if (frontier === null && state !== "dropped" && state !== "cut") frontier = i;
    }
    this.committed = committed;
    if (!first) this.follow(frontier ?? this.positions.length - 1);
  }

  /** Scrolls where tokens come. */
  follow(i) {
    requestAnimationFrame(() => {
      const box = this.text, top = this.spans[i]?.offsetTop;
      const outside = top > box.scrollTop + box.clientHeight - 60 || top < box.scrollTop;
      if (outside) box.scrollTop = top - box.clientHeight / 2;
    });
  }

  /** What the pass shown did. */
  get moment() {
    const now = this.passes[this.shown - 1];
    const number = `Pass ${this.shown} of ${this.passes.length}`;
    if (!now) return `${number} · everything is masked`;
    return `${number} · round ${now.round} · ${now.kinds.join(" + ")} · ` +
      `${now.rows} rows${now.riders ? ` (${now.riders} of them riders)` : ""} · ` +
      `${now.committed.length} committed · ${seconds(now.end)}`;
  }

  /** Tokens per forward pass until the pass shown. */
  get perForward() {
    const passes = this.passes.slice(0, this.shown).filter((pass) => pass.decodes).length;
    return passes ? this.committed / passes : null;
  }

  // --- one token ---------------------------------------------------------------------------------

  point(i) {
    this.unpoint();
    this.cursor = i;
    this.spans[i].classList.add("cursor");
    this.names[i] = "";
  }

  unpoint() {
    if (this.cursor === null) return;
    this.spans[this.cursor].classList.remove("cursor");
    this.names[this.cursor] = "";
    this.cursor = null;
  }

  /** All about the token at the cursor. */
  get story() {
    const i = this.cursor, position = this.positions[i], event = this.eventAt(i, this.shown);
    const past = position.e.filter((e) => e[0] <= this.shown);
    const last = (state) => past.findLast((e) => e[1] === state);
    const parts = [`position ${i}`];
    if (!this.plain) parts.push(`slot ${Math.floor(i / this.size)}`);
    const [draft, accepted, refused, done] =
      ["draft", "accepted", "refused", "committed"].map(last);
    parts.push(event ? `${event[1]} “\u2068${this.textOf(i, event)}\u2069”` : "masked");
    if (draft) parts.push(`drafted in pass ${draft[0]} with certainty ${percent(draft[3])}`);
    if (refused) {
      const chance = refused[3] === null ? "" : ` at ${percent(refused[3])}`;
      parts.push(`draft “\u2068${refused[2]}\u2069” refused in pass ${refused[0]}${chance}`);
    }
    if (accepted) {
      const test = accepted[3] === null ? "without a test" : `at ${percent(accepted[3])}`;
      parts.push(`accepted in pass ${accepted[0]} ${test}`);
    }
    if (done) {
      const chance = done[3] === null ? "" : ` with probability ${percent(done[3])}`;
      const round = this.plain ? "" : `, round ${position.r}`;
      parts.push(`committed in pass ${done[0]}${chance}${round}, KV entry ${position.kv}`);
    }
    return parts.join(" · ");
  }

  move(step) {
    const from = this.cursor;
    let next = from === null ? (step > 0 ? 0 : this.spans.length - 1) : from + step;
    while (this.spans[next]?.classList.contains("dropped")) next += step;
    if (!this.spans[next]) return false;
    this.point(next);
    this.spans[next].scrollIntoView({ block: "nearest" });
    return true;
  }
}

// --- charts --------------------------------------------------------------------------------------

const EDGE = { left: 44, right: 10, top: 12, bottom: 22 };

function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  context.font = "12px system-ui, sans-serif";
  return { context, width, height, value, fill: (r) => `hsl(${hue(r)} 65% ${value("--bar-light")})` };
}

function axes({ context, width, height, value }, most, last) {
  context.fillStyle = value("--soft");
  context.textAlign = "right";
  context.fillText(String(most), EDGE.left - 6, EDGE.top + 8);
  context.fillText("0", EDGE.left - 6, height - EDGE.bottom);
  context.fillText(last, width - EDGE.right, height - 6);
}

/** Tokens committed and rows fed, by pass. */
function drawPasses(canvas, lane) {
  const at = surface(canvas), { context, width, height, value } = at;
  const passes = lane.passes, wide = width - EDGE.left - EDGE.right;
  const tall = height - EDGE.top - EDGE.bottom;
  const fed = (pass) => (pass.decodes ? Math.max(pass.committed.length, pass.rows) : 0);
  const most = passes.reduce((sum, pass) => Math.max(sum, fed(pass)), 1);
  axes(at, most, `pass ${passes.length}`);
  const step = wide / Math.max(1, passes.length);
  passes.forEach((pass, i) => {
    const x = EDGE.left + i * step, base = height - EDGE.bottom;
    context.globalAlpha = i < lane.shown ? 1 : 0.25;
    const h = Math.max(2, (tall * pass.committed.length) / most);
    context.fillStyle = pass.committed.length ? at.fill(pass.round0) : value("--line");
    context.fillRect(x + step * 0.1, base - h, Math.max(1, step * 0.8), h);
    if (!pass.decodes) return;
    context.fillStyle = value("--soft");
    context.fillRect(x, base - (tall * pass.rows) / most, Math.max(1, step), 1);
  });
  context.globalAlpha = 1;
  if (lane.shown > 0) {
    context.strokeStyle = value("--accent");
    context.lineWidth = 2;
    context.strokeRect(EDGE.left + (lane.shown - 1) * step, EDGE.top - 3, Math.max(2, step), tall + 5);
  }
  const done = passes.reduce((sum, pass) => sum + pass.committed.length, 0);
  canvas.setAttribute("aria-label", `${done} tokens committed in ${passes.length} passes`);
}

/** The order in the KV cache against the position. */
function drawOrder(canvas, lane) {
  const at = surface(canvas), { context, width, height, value } = at;
  const wide = width - EDGE.left - EDGE.right, strip = 12;
  const tall = height - EDGE.top - EDGE.bottom - strip - 4;
  const positions = lane.positions;
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
  const isThere = (position) => position.committed <= lane.shown;
  positions.forEach((position, i) => {
    if (isThere(position)) mark(position, i, at.fill(position.r), dot);
  });
  if (lane.cursor !== null && isThere(positions[lane.cursor]))
    mark(positions[lane.cursor], lane.cursor, value("--ink"), dot + 4);
  const before = positions.filter((p, i) => p.kv !== null && p.kv !== i).length;
  canvas.setAttribute("aria-label", `${before} of ${total} KV entries are out of position order`);
}

// --- playing -------------------------------------------------------------------------------------

/** Plays lanes by a common clock; charts and the line about the moment are of the main one. */
const player = {
  lanes: [], main: null, time: 0, moments: [0], playing: false, afterRender() {},

  open(lanes, main) {
    Object.assign(this, { lanes, main, playing: false });
    this.pace();
    $("inspector").textContent = HINT;
  },

  /** The moments that the slider knows: of the main lane's passes, then of what goes on longer. */
  pace() {
    const ends = this.main.passes.map((pass) => pass.end), last = ends.at(-1) ?? 0;
    const others = this.lanes.filter((lane) => lane !== this.main);
    const later = others.flatMap((lane) => lane.passes.map((pass) => pass.end));
    const after = [...new Set(later.filter((end) => end > last))].sort((a, b) => a - b);
    // these must not crowd the passes out of the slider
    const stride = Math.ceil(after.length / Math.max(20, ends.length)) || 1;
    this.moments = [0, ...ends, ...after.filter((_, i) => (after.length - 1 - i) % stride === 0)];
    $("slider").max = this.moments.length - 1;
  },

  choose(lane) {
    if (lane === this.main) return;
    this.main = lane;
    this.pace();
    this.render();
  },

  render() {
    for (const lane of this.lanes) lane.show(lane.passAt(this.time));
    let moment = 0;
    while (moment + 1 < this.moments.length && this.moments[moment + 1] <= this.time + 1e-9) moment++;
    $("moment").textContent = this.main.moment;
    $("slider").value = moment;
    $("slider").setAttribute("aria-valuetext", $("moment").textContent);
    $("play").textContent = this.playing ? "Pause" : "Play";
    this.tell();
    this.draw();
    this.afterRender();
  },

  tell() {
    const lane = this.lanes.find((one) => one.cursor !== null);
    if (lane) $("inspector").textContent = lane.story;
  },

  draw() {
    drawPasses($("chart"), this.main);
    drawOrder($("order"), this.main);
  },

  inspect(lane, i) {
    for (const other of this.lanes) if (other !== lane) other.unpoint();
    if (i !== undefined) lane.point(i);
    if (lane !== this.main && !lane.plain) this.choose(lane);
    this.tell();
    this.draw();
  },

  go(moment) {
    this.playing = false;
    this.time = this.moments[Math.max(0, Math.min(this.moments.length - 1, moment))];
    this.render();
  },

  play(on) {
    this.playing = on;
    const end = this.moments.at(-1);
    if (on && this.time >= end - 1e-9) this.time = 0;
    let before = null;
    const tick = (now) => {
      if (!this.playing) return;
      if (before !== null) this.time += ((now - before) / 1000) * Number($("speed").value);
      before = now;
      if (this.time >= end) { this.time = end; this.playing = false; }
      this.render();
      requestAnimationFrame(tick);
    };
    this.render();
    if (on) requestAnimationFrame(tick);
  },
};

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = dark ? "Light" : "Dark";
}

const isDark = () => document.documentElement.classList.contains("dark");

function switchTheme() {
  theme(!isDark());
  player.draw();
}

function startTheme(wanted) {
  theme(wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
}

$("play").addEventListener("click", () => player.play(!player.playing));
$("slider").addEventListener("input", (event) => player.go(Number(event.target.value)));
$("theme").addEventListener("click", switchTheme);
for (const kind of ["pointerover", "click"])
  document.addEventListener(kind, (event) => {
    const lane = player.lanes.find((one) => one.text.contains(event.target));
    if (lane && event.target.dataset.i) player.inspect(lane, Number(event.target.dataset.i));
  });
$("chart").addEventListener("click", (event) => {
  const wide = event.target.clientWidth - EDGE.left - EDGE.right;
  const share = (event.offsetX - EDGE.left) / wide;
  player.go(1 + Math.floor(share * player.main.passes.length));
});
const ENTRY = "textarea, select, input:not(#slider)"; // where keys have a meaning of their own
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches(ENTRY)) return;
  if (!player.main) return;
  const lane = player.lanes.find((one) => one.text === event.target);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) {
    const rightToLeft = lane && getComputedStyle(event.target).direction === "rtl";
    if (!lane) player.go(Number($("slider").value) + step);
    else if (lane.move(rightToLeft ? -step : step)) player.inspect(lane);
  } else if (lane && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    if (lane.move((event.key === "ArrowDown" ? 1 : -1) * lane.size)) player.inspect(lane);
  } else if (event.key === "Home") player.go(0);
  else if (event.key === "End") player.go(player.moments.length - 1);
  else if (event.key === " " && event.target.tagName !== "SUMMARY") {
    if (event.target.tagName === "BUTTON" && event.target.id !== "play") return;
    player.play(!player.playing);
  } else if (event.key === "t" || event.key === "T") switchTheme();
  else return;
  event.preventDefault();
});
// a focused play button would act on Space once more
$("play").addEventListener("keyup", (event) => { if (event.key === " ") event.preventDefault(); });
window.addEventListener("resize", () => { if (player.main) player.draw(); });
