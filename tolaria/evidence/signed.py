"""The signed frames that a run keeps: an operator's orders in its log, what it said with its policy beside it.

A right MAC shows that nobody altered a frame who did not have the key. Whoever has the key could have made one: a run
keeps the keys of its operators and of embedded policies in its own directory, readable by its owner only.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tolaria.errors import MessageRejected, RunDirError
from tolaria.evidence.keys import Keys, Proof
from tolaria.evidence.trail import Trail
from tolaria.leyline.codec import decode_reply
from tolaria.leyline.framing import Frame, FrameKind, generation_number, run_id_bytes
from tolaria.orders.words import COMMAND, decode_order
from tolaria.recovery.wal import WalRecord
from tolaria.tamiyo.recording import FILE_NAME, MARK, MAX_FRAME_BYTES, OLDER_NAME, What

_ENTRY = struct.Struct("!4sB3xQII")
_KINDS = {
    What.REQUEST: FrameKind.REQUEST, What.REPLY: FrameKind.REPLY, What.MALFORMED: FrameKind.REPLY,
    What.SIGNAL: FrameKind.SIGNAL,
}  # fmt: skip


@dataclass
class Tally:
    """How many frames of a kind were verified, could not be (no key), are wrong; and what is wrong with those."""

    verified: int = 0
    no_key: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, proof: Proof) -> None:
        """Count one."""
        self.verified += proof == "verified"
        self.no_key += proof == "no key"


def check_orders(trail: Trail, keys: Keys) -> Tally:
    """Every act of the log against the order that an operator signed. Marks the acts' entries."""
    tally = Tally()
    seen: dict[str, int] = {}
    for record, entry in trail.acts:
        number, body = entry.act, record.document
        frame = str(body.get("frame", ""))
        if not frame:
            entry.faults.append("its order was not signed")
        else:
            entry.proof, opened, why = keys.judge(bytes.fromhex(frame), FrameKind.ORDER)
            if entry.proof == "WRONG":
                entry.faults.append(f"the signature of its order is wrong: {why}")
            if opened is not None:
                entry.faults += _against_order(trail, record, opened)
        order_id = str(body.get("order_id"))
        if order_id in seen:
            entry.faults.append(f"its order was carried out before, as act {seen[order_id]}")
        seen[order_id] = number
        if entry.faults:
            entry.proof = "WRONG"
        tally.add(entry.proof)
        tally.faults += [f"act {number} (record {record.lsn}): {fault}" for fault in entry.faults]
    return tally


def _against_order(trail: Trail, record: WalRecord, frame: Frame) -> Iterator[str]:
    """What the log says otherwise than the signed order."""
    body, opening = record.document, trail.openings.get(record.start, {})
    if frame.header.run_id != run_id_bytes(str(opening.get("run_id"))):
        yield "its order was for another run"
    elif frame.header.generation != generation_number(str(opening.get("generation"))):
        yield "its order was for another start of the run"
    try:
        order = decode_order(frame.payload)
    except MessageRejected as error:
        yield f"its order cannot be read: {error}"
        return
    pairs = {
        "order_id": order.order_id, "operator": order.operator, "reason": order.reason,
        "arguments": dict(order.arguments),
    }  # fmt: skip
    for name, ordered in pairs.items():
        if body.get(name) != ordered:
            yield f"the log has another {name} than the order: {str(body.get(name))[:60]!r}, not {str(ordered)[:60]!r}"
    if order.action == COMMAND and body.get("action") == COMMAND and body.get("command") != order.command.hex():
        yield "the log has another command than the order"


def check_policy(run: Path, trail: Trail, keys: Keys) -> Tally:
    """Every recorded frame between run and policy, and the policy's decisions against what it signed.

    Raises RunDirError for a file that cannot be read.
    """
    tally = Tally()
    replies: dict[tuple[int, int], set[bytes]] = {}
    newest: dict[tuple[int, FrameKind], int] = {}
    for name in (OLDER_NAME, FILE_NAME):
        for position, what, frame, fault in _frames(run / name, tally):
            where = f"{name}: frame {position}"
            proof, opened, why = keys.judge(frame, _KINDS[what]) if not fault else ("WRONG", None, fault)
            tally.add(proof)
            if proof == "WRONG":
                tally.faults.append(f"{where} ({what.name.lower()}): {why}")
            if opened is None:
                continue
            head = opened.header
            if what is not What.SIGNAL:
                track = (head.generation, head.kind)
                if head.seq < newest.get(track, 0):
                    tally.faults.append(
                        f"{where} ({what.name.lower()}): its number {head.seq} is less than that before"
                    )
                newest[track] = max(head.seq, newest.get(track, 0))
            if what is What.REPLY:
                replies.setdefault((head.generation, head.boundary), set()).update(_commands(opened.payload))
    tally.faults += _against_replies(trail, replies)
    return tally


def _commands(payload: bytes) -> tuple[bytes, ...]:
    try:
        return decode_reply(payload).commands
    except MessageRejected:
        return ()


def _against_replies(trail: Trail, replies: dict[tuple[int, int], set[bytes]]) -> Iterator[str]:
    for record, decision in trail.decisions:
        opening = trail.openings.get(record.start, {})
        signed = replies.get((generation_number(str(opening.get("generation"))), decision.boundary))
        # Without a verified reply there is nothing to hold it against: the newest frames are kept, not all.
        if signed is not None and not set(decision.commands) <= signed:
            yield f"record {record.lsn}: the decision of boundary {decision.boundary} has commands that no reply had"


def _frames(path: Path, tally: Tally) -> Iterator[tuple[int, What, bytes, str]]:
    """(position, what, frame, fault) of every entry; what lies between entries and is none goes to the faults."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror})") from error
    at = position = 0
    while at + _ENTRY.size <= len(raw):
        mark, number, _, size, checksum = _ENTRY.unpack_from(raw, at)
        end = at + _ENTRY.size + size
        # Where the next entry begins right behind it, it is one, whatever its bytes are.
        whole = mark == MARK and number in tuple(What) and size <= MAX_FRAME_BYTES and end <= len(raw)
        if whole and (end == len(raw) or raw[end : end + 4] == MARK):
            frame = raw[at + _ENTRY.size : end]
            position += 1
            yield position, What(number), frame, "" if zlib.crc32(frame) == checksum else "altered on the disk"
            at = end
            continue
        later = raw.find(MARK, at + 1)
        if later >= 0:
            tally.faults.append(f"{path.name}: bytes {at} to {later} are no frame: damaged, or cut short by a crash")
        at = later if later >= 0 else len(raw)
