// A Tamiyo in JavaScript, without a package:  node policy.mjs ENDPOINT KEY_FILE
//
// Grows one seed in the first free slot and takes it on whenever its gate would open. Change `decide`.

import { bindRouter } from "./zmtp.mjs";
import { decodeQuestion, encodeReply, loadKeys, openRequest, seedCommand, sealReply } from "./leyline.mjs";

const VERSION = "javascript-1";
const DORMANT = 1;
const NEXT = { 2: "START_TRAINING", 3: "START_GRAFTING", 4: "STABILIZE", 5: "EVALUATE", 6: "FOSSILIZE" };

/** What to do at this boundary: [operation, slot, further settings] of each command. */
function decide(state) {
  if (state.metrics.conservative > 0) return [];
  const growing = state.seeds.filter((seed) => seed.stage in NEXT);
  if (growing.length > 0) {
    const ready = growing.filter((seed) => seed.metrics.gate_ok > 0).slice(0, 64);
    return ready.map((seed) => [NEXT[seed.stage], seed.slot, { reason: "its gate is open" }]);
  }
  const free = state.seeds.find((seed) => seed.stage === DORMANT);
  const signals = Object.entries(free?.metrics ?? {}).filter(([name]) => name.startsWith("signal/"));
  if (signals.length === 0) return [];
  const [name, signal] = signals.reduce((best, next) => (next[1] > best[1] ? next : best));
  const settings = { blueprint: name.slice("signal/".length), reason: `gradient ${signal.toPrecision(3)}` };
  return [["GERMINATE", free.slot, settings]];
}

const [endpoint, keyFile] = process.argv.slice(2);
if (keyFile === undefined) {
  console.error("usage: node policy.mjs ENDPOINT KEY_FILE");
  process.exit(2);
}
process.umask(0o077);
const keys = loadKeys(keyFile);
const starts = new Map(); // one start of one run -> its newest question, and the newest answers by boundary
let sent = 0;

/** The reply to a frame; null for what is no question, or an old one. The same question gets the same bytes. */
function answer(raw) {
  let request;
  try {
    request = openRequest(raw, keys);
  } catch (error) {
    console.error(`refused: ${error.message}`);
    return null;
  }
  if (!starts.has(request.run)) starts.set(request.run, { seq: 0n, answers: new Map() });
  if (starts.size > 64) starts.delete(starts.keys().next().value);
  const start = starts.get(request.run);
  const known = start.answers.get(request.boundary);
  if (known?.raw.equals(raw)) return known.reply;
  if (request.seq <= start.seq) return null;
  start.seq = request.seq;
  const { state } = decodeQuestion(request.payload);
  const commands = decide(state).map(([operation, slot, settings], number) =>
    seedCommand(`b${request.boundary}-${number}`, operation, slot, { by: VERSION, ...settings }),
  );
  const reply = sealReply(request, ++sent, encodeReply(commands, VERSION), keys);
  start.answers.set(request.boundary, { raw: Buffer.from(raw), reply });
  if (start.answers.size > 16) start.answers.delete(start.answers.keys().next().value);
  return reply;
}

const server = bindRouter(endpoint, answer);
server.on("listening", () => console.log(`${VERSION} answers at ${endpoint}`));
server.on("error", (error) => {
  console.error(error.message);
  process.exit(2);
});
for (const signal of ["SIGTERM", "SIGINT"]) {
  process.on(signal, () => {
    server.close(); // removes the socket's file
    process.exit(0);
  });
}
