import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.config import DistConfig
from tolaria.dist import Peers
from tolaria.errors import PeerLost
from tolaria.fence import MAX_STEPS, CollectiveFence, SharedFence, Verdict, steps_apart
from tolaria.recovery.no_page import NoPage
from tolaria.recovery.page import Page

ALONE = Peers(None, 0, 1)


def new_fence(**config: float) -> CollectiveFence:
    return CollectiveFence(ALONE, DistConfig(**config))  # type: ignore[arg-type]


def tell(fence: CollectiveFence | SharedFence, **told: Any) -> None:
    fence.open(**{"stop_signal": 0, "level": 0, "losses": [], "lr_changed": False, "asked": False, **told})


def closed(fence: CollectiveFence | SharedFence) -> Verdict:
    verdict = fence.close()
    assert verdict is not None and fence.close() is None
    return verdict


@pytest.mark.parametrize(
    ("cost_s", "step_s", "steps"),
    [
        (200e-6, 600e-6, MAX_STEPS),  # 0.5 % would take 67 steps, more than travel at once
        (200e-6, 2e-3, 20),
        (200e-6, 40e-3, 1),  # every step costs 0.5 %
        (200e-6, 20e-3, 2),  # exactly 0.5 %; the delay would allow it
        (5e-3, 30e-3, 1),  # 33 steps for the share, but 50 ms are one step: the delay counts
        (5e-3, 200e-3, 1),
        (0.0, 1e-3, 1),
        (1e-3, 0.0, 1),
    ],
)
def test_fences_are_as_far_apart_as_share_and_delay_allow(cost_s: float, step_s: float, steps: int) -> None:
    assert steps_apart(cost_s, step_s, share=0.005, delay_s=0.05) == steps


@given(st.floats(1e-7, 1.0), st.floats(1e-7, 10.0), st.floats(1e-4, 1.0), st.floats(1e-3, 0.1))
def test_the_delay_is_never_passed_and_the_share_only_for_it(
    cost: float, step: float, share: float, delay: float
) -> None:
    steps = steps_apart(cost, step, share=share, delay_s=delay)
    assert 1 <= steps <= MAX_STEPS
    assert steps == 1 or steps * step <= delay * (1 + 1e-9)
    dear = cost / (steps * step) > share * (1 + 1e-9)
    assert not dear or (steps + 1) * step > delay * (1 - 1e-9) or steps == MAX_STEPS


def test_the_losses_of_all_steps_since_the_fence_before_come_back_in_order() -> None:
    fence = new_fence(fence_steps=8)
    tell(fence, losses=[0.5, 0.25, math.inf, 2.0])
    told = closed(fence).losses
    assert told[:2] == (0.5, 0.25) and math.isnan(told[2]) and told[3] == 2.0
    tell(fence)
    assert closed(fence).losses == ()


def test_a_fixed_distance_is_kept() -> None:
    fence = new_fence(fence_steps=3)
    had = []
    for _ in range(10):
        had.append(fence.due(last=False))
        if had[-1]:
            tell(fence)
            fence.close()
        fence.stepped(1e-3)
    assert had == [True, False, False] * 3 + [True]


def test_the_distance_follows_the_time_of_steps() -> None:
    fence = new_fence()
    fence.cost_s = 100e-6
    for seconds, expected in ((1e-3, 20), (10e-3, 2), (1.0, 1), (0.1e-3, MAX_STEPS)):
        fence.restart()
        assert fence.due(last=False)
        fence.stepped(seconds)
        tell(fence)
        fence.close()
        assert fence.interval == expected


def test_something_that_follows_has_a_fence_before_it_in_any_case() -> None:
    fence = new_fence(fence_steps=64)
    tell(fence)
    fence.close()
    fence.stepped(1e-3)
    assert not fence.due(last=False) and fence.due(last=True)


@pytest.mark.parametrize(
    ("key", "value"), [("fence_share", 0.0), ("fence_share", 2.0), ("fence_delay_ms", 200.0), ("fence_steps", 65)]
)
def test_a_distance_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"dist.{key}"):
        DistConfig(**{key: value})  # type: ignore[arg-type]


# Through memory


def shared(path: Path, ranks: int, *, timeout_s: float = 10.0) -> list[SharedFence]:
    pages = [Page.create(path, local_ranks=ranks), *(Page.attach(path, line=2 + rank) for rank in range(1, ranks))]
    return [SharedFence(page, ranks, timeout_s=timeout_s) for page in pages]


def test_all_ranks_read_what_any_of_them_told(tmp_path: Path) -> None:
    fences = shared(tmp_path / "page", 3)
    for turn in range(9):
        tell(fences[0], losses=[1.0 + turn], level=2)
        tell(fences[1], losses=[3.0 + turn], level=1, lr_changed=True)
        tell(fences[2], losses=[5.0 + turn], stop_signal=signal.SIGTERM)
        assert [closed(fence) for fence in fences] == [Verdict(signal.SIGTERM, 2, (3.0 + turn,), True)] * 3
    for fence in fences:
        tell(fence)
    assert [closed(fence) for fence in fences] == [Verdict()] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_on_one_rank_is_so_on_all(tmp_path: Path, bad: float) -> None:
    first, second = shared(tmp_path / "page", 2)
    tell(first, losses=[1.0])
    tell(second, losses=[bad])
    assert all(math.isnan(closed(fence).losses[0]) for fence in (first, second))


def test_nobody_goes_on_before_all_have_told(tmp_path: Path) -> None:
    first, second = shared(tmp_path / "page", 2)
    tell(first, losses=[1.0])
    late = threading.Timer(0.2, tell, (second,), {"losses": [2.0]})
    late.start()
    assert closed(first).losses == (1.5,) and late.finished.is_set()
    late.join()


def test_a_rank_that_never_tells_is_lost(tmp_path: Path) -> None:
    first, _ = shared(tmp_path / "page", 2, timeout_s=0.1)
    tell(first)
    with pytest.raises(PeerLost, match=r"within 0\.1 s"):
        first.close()


def test_one_rank_alone_needs_no_page_and_tells_one_loss_at_a_turn() -> None:
    fence = SharedFence(NoPage(), 1, timeout_s=1.0)
    tell(fence, losses=[0.5, 0.25])
    assert closed(fence).losses == (0.5,)


# An operator's order that waits


def test_all_ranks_know_of_an_order_that_waits_on_one_of_them(tmp_path: Path) -> None:
    fences = shared(tmp_path / "page", 3)
    for asked in (True, False, True):
        for rank, fence in enumerate(fences):
            tell(fence, losses=[1.0], asked=asked and rank == 0, level=rank, stop_signal=signal.SIGINT * (rank == 2))
        assert [closed(fence) for fence in fences] == [Verdict(signal.SIGINT, 2, (1.0,), False, asked)] * 3


def test_an_order_travels_with_the_sum_over_machines_and_with_nothing_else() -> None:
    fence = new_fence(fence_steps=8)
    tell(fence, asked=True)
    assert closed(fence) == Verdict(asked=True)
    tell(fence, level=4, losses=[0.5] * MAX_STEPS, lr_changed=True)
    verdict = closed(fence)
    assert not verdict.asked and len(verdict.losses) == MAX_STEPS
    tell(fence, asked=True, losses=[0.25] * MAX_STEPS)
    assert closed(fence) == Verdict(losses=(0.25,) * MAX_STEPS, asked=True)
