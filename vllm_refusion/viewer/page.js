// Recorded requests, each with its autoregressive twin beside it.
const requests = JSON.parse($("data").textContent);
const refusion = new Lane("ReFusion", $("response"), $("refusion-clock"));
const twin = new Lane("Autoregressive", $("twin-text"), $("twin-clock"), true);

/** A token-by-token recording in the form of a timeline. */
function oneByOne({ output, seconds: ends }) {
  return {
    parameters: { slot_size: 1 },
    delivered: output.pieces.length,
    positions: output.pieces.map((piece, i) => ({ r: i + 1, kv: i, e: [[i + 1, "committed", piece, null]] })),
    passes: ends.map((end, i) => (
      { kinds: ["token"], rows: 1, riders: 0, end, round: i + 1, committed: [i], decodes: true })),
  };
}

player.afterRender = () => {
  refusion.clock.textContent =
    `${refusion.committed} of ${refusion.delivered} tokens, ${seconds(player.time)}`;
  twin.clock.textContent = `${twin.committed} of ${twin.delivered} tokens`;
};

function open(index) {
  const request = requests[index], other = request.autoregressive;
  refusion.load(request);
  $("twin").hidden = !other;
  if (other) {
    twin.load(oneByOne(other));
    $("twin-name").textContent = `Autoregressive (${other.model})`;
  }
  $("summary").textContent = `${request.model}: ${request.summary}.`;
  $("prompt").textContent = request.prompt;
  $("parameters").textContent = JSON.stringify(request.parameters);
  $("plain").textContent = refusion.final.slice(0, request.delivered).join("");
  player.open(other ? [refusion, twin] : [refusion], refusion);
}

$("request").addEventListener("change", (event) => { open(Number(event.target.value)); player.go(0); });

function start() {
  const hash = new URLSearchParams(location.hash.slice(1));
  startTheme(hash.get("theme"));
  $("which").hidden = requests.length < 2;
  $("request").replaceChildren(...requests.map((one, i) => new Option(`${i}: ${one.prompt.slice(0, 60)}`, i)));
  const index = Math.min(Number(hash.get("request") ?? 0), requests.length - 1);
  $("request").value = index;
  open(index);
  player.go(Number(hash.get("pass") ?? refusion.passes.length));
  if (hash.has("token")) player.inspect(refusion, Number(hash.get("token")));
}
window.addEventListener("hashchange", start);
start();
