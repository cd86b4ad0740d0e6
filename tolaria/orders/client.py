"""Orders to a live run from outside it: the side of the `tolaria` command, and of scripts. No torch.

from tolaria.orders.client import RunClient
outcome = RunClient.of("runs/20261124T010203Z-digits").send(Order(action="pause"))
"""

import getpass
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from tolaria.errors import ConfigError, MessageRejected, PolicyUnavailable, RunUnreachable
from tolaria.leyline.framing import (
    FrameKind,
    KeyRing,
    check_reply,
    load_key_file,
    open_frame,
    request_header,
    seal,
)
from tolaria.leyline.limits import clip_text
from tolaria.orders.desk import ADDRESS_NAME, KEY_NAME
from tolaria.orders.words import Order, Outcome, decode_outcome, encode_order
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.socketdir import is_abandoned
from tolaria.tamiyo.transport import DealerTransport

TRY_S, RESEND_S = 15.0, 1.0


class RunClient:
    """Sends orders to the run that `of` found. One thread uses it."""

    def __init__(self, endpoint: str, *, run_id: str, generation: str, keys: KeyRing) -> None:
        self._endpoint = endpoint
        self._run_id = run_id
        self._generation = generation
        self._keys = keys

    @classmethod
    def of(cls, run: str | os.PathLike[str], *, key_file: str | os.PathLike[str] | None = None) -> Self:
        """The client of the run that lives in this directory, with the run's own key unless another is named.

        Raises RunUnreachable when no run there takes orders, ConfigError when the key cannot be read.
        """
        folder = Path(run)
        try:
            address = json.loads((folder / ADDRESS_NAME).read_bytes())
            endpoint, run_id, generation = (str(address[key]) for key in ("endpoint", "run_id", "generation"))
            host = str(address["host"])
        except FileNotFoundError as error:
            raise RunUnreachable(f"{folder}: no run there takes orders; is it running, and on this machine?") from error
        except PermissionError as error:
            raise ConfigError(f"{folder / ADDRESS_NAME}: may not be read; orders are for the run's owner") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunUnreachable(f"{folder / ADDRESS_NAME}: cannot be understood ({error!r})") from error
        if is_abandoned(Path(endpoint.removeprefix("ipc://")).parent):
            here = host == os.uname().nodename
            raise RunUnreachable(
                f"{folder}: the run was killed and is not started again yet" if here else
                f"{folder}: orders to this run are taken on {host}, or it was killed there"
            )  # fmt: skip
        keys = load_key_file(Path(key_file) if key_file is not None else folder / KEY_NAME)
        return cls(endpoint, run_id=run_id, generation=generation, keys=keys)

    def send(self, order: Order, *, wait_s: float = 30.0) -> Outcome:
        """Send an order and wait for what became of it on all ranks.

        Raises RunUnreachable when nothing came within ``wait_s``: the order may still be carried out, and sending the
        same one again is safe. Raises MessageRejected for an order that the run would not read.
        """
        payload = encode_order(order)
        header = request_header(
            run_id=self._run_id, generation=self._generation, boundary=0, seq=0, payload=payload,
            wall_ns=time.time_ns(), kind=FrameKind.ORDER,
        )  # fmt: skip

        def accept(raw: bytes | None) -> Outcome | None:
            try:
                frame = open_frame(raw or b"", self._keys, FrameKind.OUTCOME)
                check_reply(header, frame.header)
                return decode_outcome(frame.payload)
            except MessageRejected:
                return None

        transport = DealerTransport(parse_endpoint(self._endpoint, ADDRESS_NAME), patient=True)
        frame, end = seal(header, payload, self._keys), time.monotonic() + wait_s
        try:
            while (left := end - time.monotonic()) > TRY_S:
                # A connection may be lost while the run is busy: the same order over another one is not a second order.
                with suppress(PolicyUnavailable):
                    return transport.exchange(frame, accept, deadline_s=TRY_S, resend_s=RESEND_S)
            return transport.exchange(frame, accept, deadline_s=left, resend_s=min(RESEND_S, left))
        except PolicyUnavailable as error:
            raise RunUnreachable(
                f"no answer within {wait_s:g} s: the run is busy in a long step or validation, or dead, or the key is "
                f"not its own. The order may still be carried out ({order.order_id})"
            ) from error
        finally:
            transport.close()


def operator_name() -> str:
    """Who gives orders from here, for the log: user and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return clip_text(f"{user}@{os.uname().nodename}")
