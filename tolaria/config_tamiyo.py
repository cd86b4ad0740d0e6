"""The configuration of the policy: the one that acts, and the one beside it that is only asked."""

from collections.abc import Mapping
from dataclasses import dataclass

from tolaria.config_fields import ONE_OR_MORE, POSITIVE, Scalar, doc, require, require_range

POLICY_NONE = "none"
"""``tamiyo.policy`` of a run that nothing steers."""


@dataclass(frozen=True, kw_only=True)
class TamiyoConfig:
    """The policy: which, where, and how long it may take."""

    policy: str = doc("heuristic", "embedded policy: heuristic | noop | none | script:FILE | package.module:Class")
    args: Mapping[str, Scalar] = doc({}, "keyword arguments of the embedded policy")
    endpoint: str = doc("", "ZeroMQ endpoint of a policy service (ipc://, tcp://); empty: embedded")
    key_file: str = doc("", "file with the shared key (0600, 32 bytes or more); needed with an endpoint")
    curve_server_key_file: str = doc("", "file with the server's CURVE public key; needed for other hosts")
    curve_secret_file: str = doc("", "file with this client's CURVE secret key; needed for other hosts")
    deadline_ms: int = doc(2000, "milliseconds from the question to the accepted answer")
    resend_ms: int = doc(800, "milliseconds until the question is sent again")
    breaker_failures: int = doc(3, "failures in a row after which the policy is no longer asked")
    breaker_rest: int = doc(5, "boundaries without a question before one probe")
    probe_deadline_ms: int = doc(500, "milliseconds of a probe")
    breaker_successes: int = doc(2, "answered probes in a row that close the breaker")
    healthy_boundaries: int = doc(2, "good boundaries in a row that end conservative mode")
    may_pause: bool = doc(True, "a policy's PAUSE is obeyed; the run then waits for an operator's resume")
    observation_boundaries: int = doc(2, "boundaries after which a command's effect is judged")
    record: bool = doc(True, "keep every question and answer, signed as it was, in <run>/policy_frames.bin")
    record_mb: float = doc(64.0, "MiB of them that are kept, the newest")
    shadow: str = doc("", "second policy, asked the same and never obeyed: as tamiyo.policy; empty: none")
    shadow_args: Mapping[str, Scalar] = doc({}, "keyword arguments of the shadow")

    def __post_init__(self) -> None:
        for key in ("deadline_ms", "resend_ms", "probe_deadline_ms"):
            require(1 <= getattr(self, key) <= 600_000, f"tamiyo.{key}", getattr(self, key), "1 to 600000")
        require_range(
            self, "tamiyo", ONE_OR_MORE,
            "breaker_failures", "breaker_rest", "breaker_successes", "healthy_boundaries", "observation_boundaries",
        )  # fmt: skip
        require(
            not self.endpoint or self.endpoint.startswith(("ipc://", "tcp://")),
            "tamiyo.endpoint", self.endpoint, "ipc://PATH or tcp://HOST:PORT",
        )  # fmt: skip
        require(not self.endpoint or bool(self.key_file), "tamiyo.key_file", self.key_file, "a file, with an endpoint")
        require_range(self, "tamiyo", POSITIVE, "record_mb")
        ok = self.shadow != POLICY_NONE
        require(ok, "tamiyo.shadow", self.shadow, "heuristic, noop, script:FILE or package.module:Class; or empty")
