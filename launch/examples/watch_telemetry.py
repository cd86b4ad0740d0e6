"""Watch a run's telemetry: one line for each packet, until the run ends or Ctrl-C.

torchrun -m tolaria.launch --telemetry.publish tcp://127.0.0.1:5701 &
python launch/examples/watch_telemetry.py tcp://127.0.0.1:5701
python launch/examples/watch_telemetry.py tcp://127.0.0.1:5701 --level WARNING
"""

import argparse
import sys
from datetime import datetime

from tolaria.errors import ConfigError
from tolaria.leyline.types import TelemetryLevel
from tolaria.leyline.types_telemetry import TelemetryPacket
from tolaria.publish.subscriber import Subscriber

SHOWN = 4


def line_of(packet: TelemetryPacket) -> str:
    """When, how grave, where in the run, and what."""
    where = packet.health.indicators if packet.health is not None else {}
    branch = f" branch {where['branch']}" if where.get("branch", "0") != "0" else ""
    numbers = [f"{m.name}{'/' + '/'.join(m.attributes.values()) if m.attributes else ''} {m.value:.4g}"
               for m in packet.metrics[:SHOWN]]  # fmt: skip
    more = [f"and {len(packet.metrics) - SHOWN} more"] if len(packet.metrics) > SHOWN else []
    what = ", ".join([event.description for event in packet.events] + numbers + more)
    time = f"{datetime.fromtimestamp(packet.timestamp_ns / 1e9):%H:%M:%S}"
    return f"{time} {packet.level.name:<8} step {where.get('step', '?')}{branch}  {what}"


def main() -> int:
    """Print until the run has ended; 0, or 2 for an endpoint that is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", help="what the run has as telemetry.publish")
    parser.add_argument("--level", default="INFO", choices=[level.name for level in TelemetryLevel],
                        help="the least grave packets to show (%(default)s)")  # fmt: skip
    options = parser.parse_args()
    wanted = [level for level in TelemetryLevel if level >= TelemetryLevel[options.level]]
    try:
        with Subscriber(options.endpoint, levels=wanted) as subscriber:
            _watch(subscriber, all_levels=len(wanted) == len(TelemetryLevel))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


def _watch(subscriber: Subscriber, *, all_levels: bool) -> None:
    missed = 0
    while True:
        packet = subscriber.receive(1.0)
        if packet is None:
            continue
        if all_levels and subscriber.missed > missed:
            print(f"... {subscriber.missed - missed} packets did not come", flush=True)
        missed = subscriber.missed
        print(line_of(packet), flush=True)
        if any(event.attributes["kind"] in ("run_ended", "run_failed") for event in packet.events):
            return


if __name__ == "__main__":
    sys.exit(main())
