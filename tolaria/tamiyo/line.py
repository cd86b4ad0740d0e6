"""How a run reaches its policies: the acting one, embedded or at an endpoint; the shadow; and what is kept of the talk.

    RUN/policy_frames.bin   every frame, as it was signed      tolaria/tamiyo/recording.py
    RUN/policy.keys         the keys of embedded policies, one for each start of the run, the newest last (0600)
    RUN/tamiyo.log, shadow.log

The keys let anybody who may read the run directory verify that its frames were not altered by somebody who may not; who
can read the keys can also make such frames. The key of a service of its own is kept by whoever made it, not here.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tolaria.config_tamiyo import POLICY_NONE, TamiyoConfig
from tolaria.errors import PolicyUnavailable
from tolaria.leyline.framing import load_key_file
from tolaria.tamiyo.client import PolicyClient, open_client
from tolaria.tamiyo.embedded import EmbeddedPolicy
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.recording import FrameFile, Keep, keep_nothing
from tolaria.tamiyo.shadow import Shadow
from tolaria.tamiyo.transport import DealerTransport
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.lines import warn

KEYS_NAME = "policy.keys"
MAX_KEYS = 200
"""Starts whose keys are kept: as many as a key file has room for."""
SHADOW_START_S = 30.0


@dataclass(frozen=True)
class PolicyLine:
    """What rank 0 talks through. ``revive`` starts an embedded policy again that has died."""

    client: PolicyClient | None = None
    revive: Callable[[], bool] | None = None
    shadow: Shadow | None = None


def open_line(
    config: TamiyoConfig,
    folder: Path,
    events: EventLog,
    cleanup: ExitStack,
    *,
    run_id: str,
    generation: str,
    signal_mark: int,
) -> PolicyLine:
    """Start and connect what the configuration names; ``cleanup`` ends it. For rank 0's main thread.

    ``folder``: the run directory. ``signal_mark``: of the newest emergency that an earlier start accepted.
    Blocks until embedded policies are up. Raises ConfigError for a policy, endpoint or key that cannot be used,
    PolicyUnavailable("start") when the acting policy does not come up; a shadow that does not is told, and left out.
    """
    acts = bool(config.endpoint) or config.policy != POLICY_NONE
    shadow_process = None
    if config.shadow:
        shadow_process = EmbeddedPolicy(config.shadow, config.shadow_args, log_path=folder / "shadow.log")
        cleanup.callback(shadow_process.close)
    client = revive = None
    if acts:
        where: dict[str, Any] = {}
        if not config.endpoint:
            embedded = cleanup.enter_context(EmbeddedPolicy(config.policy, config.args, log_path=folder / "tamiyo.log"))
            embedded.wait_ready()
            revive = embedded.revive
            where = {"endpoint": embedded.endpoint, "key_file": embedded.key_file}
        keep = _recording(config, folder, cleanup)
        client = open_client(config, run_id=run_id, generation=generation, keep=keep, **where)
        if where and config.record:
            keep_key(folder, embedded.key_file)
        client.signal_mark = signal_mark
        cleanup.callback(client.close)
    shadow = None
    if shadow_process is not None:
        shadow = _shadow(shadow_process, events, cleanup, run_id=run_id, generation=generation)
    return PolicyLine(client, revive, shadow)


def _recording(config: TamiyoConfig, folder: Path, cleanup: ExitStack) -> Keep:
    if not config.record:
        return keep_nothing
    file = FrameFile(folder, int(config.record_mb * 2**20))
    cleanup.callback(file.close)
    return file.keep


def _shadow(
    process: EmbeddedPolicy, events: EventLog, cleanup: ExitStack, *, run_id: str, generation: str
) -> Shadow | None:
    try:
        process.wait_ready(SHADOW_START_S)
    except PolicyUnavailable as error:
        events.emit("shadow_silent", "warning", reason=str(error))
        return None
    transport = DealerTransport(parse_endpoint(process.endpoint, "tamiyo.shadow"))
    shadow = Shadow(
        process, transport, load_key_file(process.key_file), events, run_id=run_id, generation=generation
    )  # fmt: skip
    cleanup.callback(shadow.close)
    return shadow


def keep_key(folder: Path, key_file: Path) -> None:
    """Add an embedded policy's key to those of the run, so that its frames can be verified later. Never raises OSError:
    a run whose keys cannot be kept trains on, and says so."""
    path = folder / KEYS_NAME
    temporary = path.with_name(f".{KEYS_NAME}.{os.getpid()}")
    try:
        former = path.read_text(encoding="ascii").split() if path.exists() else []
        lines = [*former, key_file.read_text(encoding="ascii").strip()][-MAX_KEYS:]
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write("".join(f"{line}\n" for line in lines))
        os.replace(temporary, path)
    except (OSError, UnicodeDecodeError) as error:
        warn(f"tolaria: {path}: the policy's key is not kept ({error}); training goes on")
