"""``python -m tolaria.tamiyo.server``: a policy as a service of its own, for one run or many.

    python -m tolaria.tamiyo.server --policy heuristic --bind ipc:///run/user/1000/tamiyo.sock --key-file shared.key

Exit codes: 0 after SIGTERM or SIGINT, 2 when something in the command line cannot work. Imports no torch, so that
it is up in a fraction of a second.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from tolaria.errors import ConfigError
from tolaria.leyline.framing import load_key_file
from tolaria.process import StopFlag
from tolaria.tamiyo.curve import load_server_curve
from tolaria.tamiyo.desk import Desk
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.policies import FORMS, load_policy, read_args
from tolaria.tamiyo.policy import Policy
from tolaria.tamiyo.transport import RouterTransport

log = logging.getLogger("tolaria.tamiyo")

# How often policies are asked for an emergency: one of level 4 is to be known within 0.1 s.
WAKE_S = 0.05


def serve(router: RouterTransport, desk: Desk, stop: Callable[[], bool]) -> None:
    """Answer questions, and send emergencies, until ``stop()``; each is looked at every `WAKE_S` seconds or more often.

    An emergency that a policy raises while it decides is sent before its answer: the trainer has it when the question
    is over. While a policy computes, nothing else happens.
    """
    look_at = 0.0
    while not stop():
        received = router.receive(WAKE_S)
        reply = desk.answer(received.frame, received.sender) if received is not None else None
        # Not after each frame: junk must not become calls of the policies.
        if reply is not None or time.monotonic() >= look_at:
            desk.send_emergencies(router.send)
            look_at = time.monotonic() + WAKE_S
        if received is None:
            continue
        if reply is not None and not router.send(received.sender, reply):
            log.warning("the trainer is gone; its answer was dropped")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; returns the exit code."""
    options = _parser().parse_args(argv)
    # The socket file, and whatever else is made, is for this user only.
    os.umask(0o077)
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format="%(asctime)s tamiyo %(levelname)s %(message)s"
    )
    try:
        return _run(options)
    except ConfigError as error:
        print(f"tolaria.tamiyo.server: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    args = read_args(options.arg)
    spare = [load_policy(options.policy, args)]

    def make_policy() -> Policy:
        return spare.pop() if spare else load_policy(options.policy, args)

    desk = Desk(load_key_file(options.key_file), make_policy)
    curve = load_server_curve(options.curve_secret_file, options.curve_clients_file)
    with StopFlag() as stopped:
        router = RouterTransport(parse_endpoint(options.bind, "--bind"), curve)
        try:
            log.info("policy %s answers at %s", options.policy, router.url)
            if options.ready_fd is not None:
                _tell_ready(options.ready_fd, router.url)
            serve(router, desk, lambda: stopped.is_set or _orphaned(options.parent_pid))
        finally:
            router.close()
    return 0


def _orphaned(parent_pid: int | None) -> bool:
    # Where there is no parent-death signal, this is what ends the service.
    return parent_pid is not None and os.getppid() != parent_pid


def _tell_ready(descriptor: int, url: str) -> None:
    with os.fdopen(descriptor, "w") as pipe:
        pipe.write(f"{url}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tolaria.tamiyo.server",
        description="Answers the trainer's question at each boundary with a policy's commands.",
    )
    parser.add_argument("--policy", required=True, help=FORMS)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="keyword argument of the policy (repeatable)"
    )
    parser.add_argument(
        "--bind", required=True, metavar="ENDPOINT", help="ipc://PATH or tcp://HOST:PORT (port * picks a free one)"
    )
    parser.add_argument("--key-file", required=True, help="shared key: 0600, 32 random bytes or more, raw or hex lines")
    parser.add_argument("--curve-secret-file", default="", help="this server's CURVE secret key; needed off loopback")
    parser.add_argument("--curve-clients-file", default="", help="CURVE public keys of the clients that may connect")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
