"""Configuration of the sinks of telemetry."""

from dataclasses import dataclass

from tolaria.config_fields import NOT_NEGATIVE, doc, require, require_range

IN_RUN = "run"


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Where numbers and events go beside the run's own files; a sink never slows a step or ends a run."""

    publish: str = doc("", "ZeroMQ endpoint for subscribers, ipc://PATH or tcp://127.0.0.1:PORT; empty: off")
    prometheus: str = doc("", "HOST:PORT that Prometheus scrapes, as 127.0.0.1:9464; empty: off")
    tensorboard: str = doc("", "TensorBoard's event files: run (<run>/tensorboard) | a folder; empty: off")
    wandb: str = doc("", "project at Weights & Biases (pip install wandb); empty: off")
    interval_s: float = doc(0.5, "seconds between the numbers of steps that sinks get, at least; boundaries: all")
    queue_records: int = doc(4096, "records that wait for each sink; further ones are dropped and counted")

    def __post_init__(self) -> None:
        ok = not self.publish or self.publish.startswith(("ipc://", "tcp://"))
        require(ok, "telemetry.publish", self.publish, "ipc://PATH or tcp://127.0.0.1:PORT")
        if self.prometheus:
            host, colon, port = self.prometheus.rpartition(":")
            ok = bool(host and colon) and port.isascii() and port.isdigit() and int(port) <= 65535
            require(ok, "telemetry.prometheus", self.prometheus, "HOST:PORT, as 127.0.0.1:9464")
        require_range(self, "telemetry", NOT_NEGATIVE, "interval_s")
        require(16 <= self.queue_records <= 10**6, "telemetry.queue_records", self.queue_records, "16 to 1000000")

    @property
    def prometheus_address(self) -> tuple[str, int]:
        """Host and port of ``prometheus``, which must be set."""
        host, _, port = self.prometheus.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)

    @property
    def sinks(self) -> dict[str, str]:
        """Those that are asked for, with where they go."""
        named = {
            "publish": self.publish, "prometheus": self.prometheus, "tensorboard": self.tensorboard, "wandb": self.wandb
        }  # fmt: skip
        return {name: where for name, where in named.items() if where}
