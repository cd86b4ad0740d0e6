// A ZeroMQ ROUTER socket, as far as a Tamiyo needs one: ZMTP 3.1 with the NULL mechanism over ipc:// or tcp://.
// The protocol: https://rfc.zeromq.org/spec/37/. Single frames only, as Tolaria's contract has it; with libzmq for
// node (`npm install zeromq`) this file is not needed.

import { createServer } from "node:net";

const MORE = 1, LONG = 2, COMMAND = 4;

const GREETING = Buffer.alloc(64);
GREETING.set([0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1]);
GREETING.write("NULL", 12);

/** A short or long frame with these flags. */
function frame(flags, body) {
  if (body.length <= 255) return Buffer.concat([Buffer.from([flags, body.length]), body]);
  const head = Buffer.alloc(9);
  head[0] = flags | LONG;
  head.writeBigUInt64BE(BigInt(body.length), 1);
  return Buffer.concat([head, body]);
}

/** A command frame: its name, then its data. */
function command(name, data) {
  return frame(COMMAND, Buffer.concat([Buffer.from([name.length]), Buffer.from(name), data]));
}

function property(name, value) {
  const size = Buffer.alloc(4);
  size.writeUInt32BE(value.length);
  return Buffer.concat([Buffer.from([name.length]), Buffer.from(name), size, Buffer.from(value)]);
}

/** What a connection has received so far, taken apart frame by frame. */
class Incoming {
  #received = Buffer.alloc(0);
  #greeted = false;

  constructor(maxBytes) {
    this.maxBytes = maxBytes;
  }

  /** Add received bytes; yields the greeting as {greeting} and then each frame as {flags, body}. Throws on a breach. */
  *add(bytes) {
    this.#received = Buffer.concat([this.#received, bytes]);
    for (let found; (found = this.#greeted ? this.#frame() : this.#greeting()) !== null; ) yield found;
  }

  #greeting() {
    if (this.#received.length < GREETING.length) return null;
    const greeting = this.#take(GREETING.length);
    if (greeting[0] !== 0xff || greeting[10] < 3) throw new Error("not ZMTP 3");
    if (greeting.toString("latin1", 12, 32).replace(/\0+$/, "") !== "NULL") throw new Error("mechanism is not NULL");
    this.#greeted = true;
    return { greeting };
  }

  #frame() {
    if (this.#received.length < 2) return null;
    const flags = this.#received[0];
    const head = flags & LONG ? 9 : 2;
    if (this.#received.length < head) return null;
    const size = flags & LONG ? Number(this.#received.readBigUInt64BE(1)) : this.#received[1];
    if (size > this.maxBytes) throw new Error(`frame of ${size} bytes`);
    if (this.#received.length < head + size) return null;
    this.#take(head);
    return { flags, body: this.#take(size) };
  }

  #take(size) {
    const taken = this.#received.subarray(0, size);
    this.#received = this.#received.subarray(size);
    return taken;
  }
}

/**
 * Bind to `endpoint` and call `answer(frame)` for each message of one frame; what it returns, if anything, is sent back
 * to where the message came from. Messages of several frames are dropped. Returns the server; `close()` ends it.
 */
export function bindRouter(endpoint, answer, { maxBytes = 1024 * 1024 + 136 } = {}) {
  const server = createServer((socket) => {
    const incoming = new Incoming(maxBytes);
    let parts = 0;
    socket.on("error", () => socket.destroy());
    socket.write(GREETING);
    socket.on("data", (bytes) => {
      try {
        for (const { greeting, flags, body } of incoming.add(bytes)) {
          if (greeting !== undefined) socket.write(command("READY", property("Socket-Type", "ROUTER")));
          else if (flags & COMMAND) control(socket, body);
          else {
            parts += 1;
            if (flags & MORE) continue;
            const reply = parts === 1 ? answer(body) : null;
            parts = 0;
            if (reply) socket.write(frame(0, reply));
          }
        }
      } catch (error) {
        console.error(`connection dropped: ${error.message}`);
        socket.destroy();
      }
    });
  });
  const [scheme, rest] = endpoint.split("://");
  if (scheme === "ipc") server.listen(rest);
  else if (scheme === "tcp") server.listen(Number(rest.split(":").pop()), rest.slice(0, rest.lastIndexOf(":")));
  else throw new Error(`${endpoint}: expected ipc://PATH or tcp://HOST:PORT`);
  return server;
}

/** A heartbeat is answered with its own context, or the trainer takes this side for dead after 0.75 s. */
function control(socket, body) {
  const name = body.toString("latin1", 1, 1 + body[0]);
  if (name === "PING") socket.write(command("PONG", body.subarray(7)));
}
