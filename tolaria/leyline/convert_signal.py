"""Emergencies to generated messages and back, as `tolaria.leyline.convert` does with everything else."""

from typing import cast

from tolaria.leyline.convert import member, timestamp
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.limits import MESSAGE_VERSION, check_version
from tolaria.leyline.types import EmergencyLevel, EmergencySignal


def signal_to_wire(signal: EmergencySignal, raised_at_ns: int) -> pb.EmergencySignal:
    """The message of a checked emergency. Its mark travels as the frame's sequence number."""
    return pb.EmergencySignal(
        version=MESSAGE_VERSION,
        level=cast(pb.EmergencyLevel, signal.level),
        reason=signal.reason,
        origin=signal.origin,
        triggered_at=timestamp(raised_at_ns),
    )


def signal_from_wire(wire: pb.EmergencySignal, mark: int) -> EmergencySignal:
    """The emergency of a parsed message, values still unchecked."""
    # The frame says, signed, which run is meant and when; what the other fields add to that is not read.
    check_version("EmergencySignal", wire.version)
    level = member("EmergencySignal.level", EmergencyLevel, wire.level)
    return EmergencySignal(level=level, reason=wire.reason, origin=wire.origin, mark=mark)
