"""One decision to all ranks: rank 0's bytes, what each rank plans by them, whether all plan alike, and then done.

rank 0   frame --broadcast--> every rank: arrived whole? -> plan -> vote --gather--> all the same? -> carry out
                     ^------------------- damaged on some rank ------------'

The vote also says whether the bytes arrived, so that a boundary waits for the other ranks twice and not three times.
"""

import hashlib
from collections.abc import Callable

from tolaria.coordinator.apply import Applied, carry_out
from tolaria.coordinator.plan import Plan, make_plan
from tolaria.dist import Peers
from tolaria.frames import FRAME_ATTEMPTS, damaged_frames
from tolaria.leyline.codec import decode_decision
from tolaria.objective import Batch
from tolaria.replica import Replica
from tolaria.state import TrainState
from tolaria.telemetry.split import Split

NO_DECISION = b"no decision"
"""What rank 0 sends when its log cannot be written."""
_DAMAGED = bytes(32)


def obey(
    frame: bytes | None,
    state: TrainState,
    replica: Replica,
    peers: Peers,
    *,
    healthy_boundaries: int,
    sample: Callable[[int], Batch],
    split: Split,
) -> Applied | None:
    """Carry out the encoded decision that rank 0 passes; the other ranks pass None. Collective.

    None on all ranks when rank 0 passed NO_DECISION. What the ranks do not plan alike is refused with code "vote"; for
    the rest see `carry_out`. Raises PeerLost, also when the bytes keep arriving damaged on some rank.
    """
    plan = _agreed(frame, lambda raw: make_plan(decode_decision(raw), state, healthy_boundaries), peers, split)
    if plan is None:
        return None
    return carry_out(
        plan, state, replica, peers, healthy_boundaries=healthy_boundaries, sample=sample, split=split
    )  # fmt: skip


def _agreed(frame: bytes | None, make: Callable[[bytes], Plan], peers: Peers, split: Split) -> Plan | None:
    """The plan that all ranks share, the one that does nothing where they differ; None for NO_DECISION."""
    for _ in range(FRAME_ATTEMPTS):
        with split.timed("broadcast"):
            arrived = peers.send_frame(frame)
        with split.timed("check"):
            plan = make(arrived) if arrived is not None and arrived != NO_DECISION else None
            votes = peers.gather_digests(_vote(arrived, plan))
        if _DAMAGED in votes:
            continue
        if plan is None or len(set(votes)) == 1:
            return plan
        return plan.dropped("vote", "the ranks did not plan the same change")
    raise damaged_frames()


def _vote(arrived: bytes | None, plan: Plan | None) -> bytes:
    if arrived is None:
        return _DAMAGED
    # Not the verdicts alone are compared but what led to them: two ranks may accept different commands.
    return plan.digest() if plan is not None else hashlib.sha256(arrived).digest()
