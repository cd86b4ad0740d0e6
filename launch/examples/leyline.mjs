// Tolaria's messages in JavaScript: frames, keys and the parts of protobuf that a policy needs. See docs/protocol.md.

import { createHash, createHmac, hkdfSync, timingSafeEqual } from "node:crypto";
import { readFileSync, statSync } from "node:fs";

const HEADER = 104, MAC = 32;
const REQUEST = 1, REPLY = 2;
const DIRECTION = { [REQUEST]: "to-policy", [REPLY]: "to-trainer" };

const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();

/** The keys of a key file by id, the signing one first. Throws for a file that others may read. */
export function loadKeys(path) {
  if (statSync(path).mode & 0o077) throw new Error(`${path}: only its owner may read a key file; chmod 600 it`);
  const lines = readFileSync(path, "ascii").split("\n").map((line) => line.split("#")[0].trim());
  const keys = lines.filter((line) => /^([0-9a-fA-F]{2}){32,}$/.test(line)).map((line) => Buffer.from(line, "hex"));
  if (keys.length === 0) throw new Error(`${path}: holds no key of 64 or more hex digits`);
  return new Map(keys.map((key) => [sha256("tolaria key id", key).readUInt32BE(0), key]));
}

/** The MAC key of one direction of one run: HKDF-SHA256. */
export function macKey(key, kind, runId) {
  const info = Buffer.concat([Buffer.from(`frame\0${DIRECTION[kind]}\0`), runId]);
  return Buffer.from(hkdfSync("sha256", key, "tolaria leyline v1", info, 32));
}

/** Verify a question and take it apart. Throws for anything else; nothing of a frame is used before its MAC is right. */
export function openRequest(raw, keys) {
  if (raw.length < HEADER + MAC || raw.toString("latin1", 0, 4) !== "TLY1") throw new Error("not a Tolaria frame");
  if (raw[4] !== 1) throw new Error(`protocol version ${raw[4]}`);
  const keyId = raw.readUInt32BE(8), runId = raw.subarray(12, 28);
  const key = keys.get(keyId);
  if (key === undefined) throw new Error(`unknown key ${keyId.toString(16)}`);
  const signed = raw.subarray(0, -MAC);
  const expected = createHmac("sha256", macKey(key, REQUEST, runId)).update(signed).digest();
  if (!timingSafeEqual(expected, raw.subarray(-MAC))) throw new Error("wrong MAC");
  if (raw.readUInt16BE(6) !== REQUEST) throw new Error("not a question");
  const payload = raw.subarray(HEADER, -MAC);
  if (raw.readUInt32BE(100) !== payload.length) throw new Error("wrong length");
  if (!sha256(payload).equals(raw.subarray(60, 92))) throw new Error("wrong digest of the question");
  return { raw, run: raw.toString("hex", 12, 32), boundary: raw.readUInt32BE(32), seq: raw.readBigUInt64BE(36), payload };
}

/** The signed answer to an opened question: its header says what it answers by repeating what identifies it. */
export function sealReply(request, seq, payload, keys) {
  const [keyId, key] = keys.entries().next().value;
  const header = Buffer.from(request.raw.subarray(0, HEADER)); // run, generation, boundary, corr_id, request_sha256
  header.writeUInt16BE(REPLY, 6);
  header.writeUInt32BE(keyId, 8);
  header.writeBigUInt64BE(BigInt(seq), 36);
  header.writeBigUInt64BE(BigInt(Date.now()) * 1000000n, 92);
  header.writeUInt32BE(payload.length, 100);
  const signed = Buffer.concat([header, payload]);
  return Buffer.concat([signed, createHmac("sha256", macKey(key, REPLY, header.subarray(12, 28))).update(signed).digest()]);
}

// Protobuf, reading: {field number: [name, type]}; a type is "uint", "float", "text", "map" (text to float), or [schema].

const SEED = { 1: ["slot", "text"], 2: ["stage", "uint"], 3: ["gradientNorm", "float"], 6: ["metrics", "map"], 7: ["age", "uint"] };
const STATE = {
  2: ["epoch", "uint"], 3: ["validationAccuracy", "float"], 4: ["validationLoss", "float"], 7: ["metrics", "map"],
  8: ["seeds", [SEED]], 10: ["step", "uint"], 11: ["trainingLoss", "float"], 13: ["runId", "text"],
};
const REPORT = { 2: ["reportId", "text"], 3: ["commandId", "text"], 7: ["outcome", "uint"], 13: ["notes", "text"] };
const QUESTION = { 1: ["version", "uint"], 2: ["states", [STATE]], 3: ["reports", [REPORT]] };
const ENTRY = { 1: ["key", "text"], 2: ["value", "float"] };

function varint(raw, at) {
  let value = 0n;
  for (let shift = 0n; ; shift += 7n) {
    const byte = raw[at++];
    if (byte === undefined || shift > 63n) throw new Error("cut off or overlong integer");
    value |= BigInt(byte & 0x7f) << shift;
    if (byte < 0x80) return [Number(value), at];
  }
}

function decode(raw, schema) {
  const message = {};
  for (const [name, type] of Object.values(schema)) {
    message[name] = type === "map" ? {} : Array.isArray(type) ? [] : type === "text" ? "" : 0;
  }
  for (let at = 0, tag, value; at < raw.length; ) {
    [tag, at] = varint(raw, at);
    if ((tag & 7) === 0) [value, at] = varint(raw, at);
    else {
      let size = (tag & 7) === 5 ? 4 : 8;
      if ((tag & 7) === 2) [size, at] = varint(raw, at);
      value = raw.subarray(at, (at += size));
      if (value.length < size) throw new Error("cut off");
    }
    const [name, type] = schema[tag >> 3] ?? [];
    if (type === "uint") message[name] = value;
    else if (type === "float") message[name] = value.readFloatLE(0);
    else if (type === "text") message[name] = value.toString("utf8");
    else if (Array.isArray(type)) message[name].push(decode(value, type[0]));
    else if (type === "map") {
      const entry = decode(value, ENTRY);
      message[name][entry.key] = entry.value;
    }
  }
  return message;
}

/** {state, reports} of a question's payload. */
export function decodeQuestion(payload) {
  const { version, states, reports } = decode(payload, QUESTION);
  if (version !== 1 || states.length !== 1) throw new Error("not a question of version 1");
  return { state: states[0], reports };
}

// Protobuf, writing.

function tag(field, type) {
  return integer((field << 3) | type);
}

function integer(value) {
  const bytes = [];
  for (; value > 0x7f; value = Math.floor(value / 128)) bytes.push((value & 0x7f) | 0x80);
  return Buffer.from([...bytes, value]);
}

const uint = (field, value) => (value ? Buffer.concat([tag(field, 0), integer(value)]) : Buffer.alloc(0));
const bytes = (field, value) => Buffer.concat([tag(field, 2), integer(value.length), value]);
const text = (field, value) => (value ? bytes(field, Buffer.from(value, "utf8")) : Buffer.alloc(0));
const join = (...parts) => Buffer.concat(parts);

export const OPERATIONS = {
  GERMINATE: 1, START_TRAINING: 2, START_GRAFTING: 3, STABILIZE: 4, EVALUATE: 5, FINE_TUNE: 6, FOSSILIZE: 7, CULL: 8, CANCEL: 9,
};

/** A serialized AdaptationCommand about the seed in a slot. `id` has to be the same when the question is asked again. */
export function seedCommand(id, operation, slot, { blueprint = "", reason = "", by = "" } = {}) {
  const payload = join(uint(1, OPERATIONS[operation]), text(2, blueprint));
  const why = reason ? bytes(20, join(text(1, "reason"), text(2, reason.slice(0, 128)))) : Buffer.alloc(0);
  return join(uint(1, 1), text(2, id), uint(3, 1), text(4, slot), text(7, by), bytes(10, payload), why);
}

/** The payload of a reply. */
export function encodeReply(commands, version) {
  return join(uint(1, 1), ...commands.map((command) => bytes(2, command)), text(3, version));
}
