"""The sinks of a run as configured, and what they are fed from. Rank 0.

events.jsonl, metrics.jsonl    written by themselves, and handed on          tolaria/telemetry/events.py
-> fan                         one queue and one thread for each sink        tolaria/telemetry/sinks/
   -> publish, prometheus, tensorboard, wandb
warnings of other ranks        read from events.jsonl, which all ranks share
"""

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tolaria.config import Config
from tolaria.config_telemetry import IN_RUN
from tolaria.dist import World
from tolaria.errors import ConfigError
from tolaria.publish.packets import PacketMaker
from tolaria.publish.publisher import Publisher
from tolaria.rundir import RunDir
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.metrics import MetricsLog
from tolaria.telemetry.sinks.fan import Fan
from tolaria.telemetry.sinks.follow import Follower
from tolaria.telemetry.sinks.prometheus import PrometheusSink, Totals
from tolaria.telemetry.sinks.record import Sink
from tolaria.telemetry.sinks.tensorboard import TensorBoardSink
from tolaria.telemetry.sinks.weights_biases import WeightsBiasesSink


def open_outlets(
    config: Config, world: World, run: RunDir, events: EventLog, cleanup: ExitStack, totals: Totals | None = None
) -> MetricsLog | None:
    """metrics.jsonl, with every sink that is asked for behind it and behind ``events``; None on other ranks than 0.

    ``totals``: what others count, see `PrometheusSink`. Raises ConfigError for a sink that can not be made; a start
    after a restart goes on without it, and an event says so.
    """
    if not world.is_coordinator:
        return None
    totals = dict(totals or {})
    sinks = _sinks(config, run, events, totals)
    listener = None
    if sinks:
        asked = config.telemetry
        fan = Fan(sinks, queue_records=asked.queue_records, interval_s=asked.interval_s, tell=events.emit)
        cleanup.callback(fan.close)
        totals["sink_lost_records"] = lambda: fan.lost
        events.listener = listener = fan.put
        events.emit("sinks_opened", where={sink.name: sink.where for sink in sinks})
        if world.world_size > 1:
            cleanup.callback(Follower(run.path / "events.jsonl", run.run_id, fan.put).close)
    metrics = MetricsLog(run.path / "metrics.jsonl", listener=listener)
    cleanup.callback(metrics.close)
    return metrics


def _sinks(config: Config, run: RunDir, events: EventLog, totals: Totals) -> list[Sink]:
    asked, made = config.telemetry, list[Sink]()

    def publisher() -> Sink:
        maker = PacketMaker(run.run_id, secrets.token_hex(4))
        return Publisher(asked.publish, maker, queue_packets=asked.queue_records)

    def weights_biases() -> Sink:
        return WeightsBiasesSink(
            asked.wandb, run_id=run.run_id, name=run.path.name, folder=run.path, config=config.to_dict()
        )  # fmt: skip

    def prometheus() -> Sink:
        return PrometheusSink(asked.prometheus_address, {"run_id": run.run_id, "name": config.run.name}, totals)

    def tensorboard() -> Sink:
        in_run = asked.tensorboard == IN_RUN
        return TensorBoardSink(run.path / "tensorboard" if in_run else Path(asked.tensorboard) / run.path.name)

    makers: dict[str, Callable[[], Sink]] = {
        "publish": publisher, "prometheus": prometheus, "tensorboard": tensorboard, "wandb": weights_biases
    }  # fmt: skip
    for name in asked.sinks:
        try:
            made.append(makers[name]())
        except ConfigError as error:
            if not run.restarted:
                for sink in made:
                    sink.close()
                raise
            events.emit("sink_given_up", "error", sink=name, reason=str(error), lost=0)
    return made
