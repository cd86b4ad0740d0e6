"""The gates as tables: what was measured on the left, whether the seed may pass on the right."""

import math
from dataclasses import replace

import pytest

from tolaria.config import KasminaConfig
from tolaria.kasmina import gates
from tolaria.kasmina.gates import Evidence
from tolaria.leyline.types import SeedGate

NAN, INF = math.nan, math.inf
CONFIG = KasminaConfig(
    max_seed_parameters=100, max_grown_parameters=150, max_loss_ratio=1.5, output_ratio=2.0, min_contribution=0.01
)
PROBED = Evidence(loss_before_graft=2.0, loss_now=2.0, loss_with=1.9, loss_without=2.0, output_ratio=1.0)


@pytest.mark.parametrize(
    ("parameters", "grown", "ok", "word"),
    [
        (100, 50, True, "fit"),
        (100, 51, False, "max_grown_parameters=150"),
        (101, 0, False, "max_seed_parameters=100"),
        (0, 0, False, "no parameters"),
    ],
)
def test_g0_is_there_room(parameters: int, grown: int, ok: bool, word: str) -> None:
    result = gates.g0_sanity(parameters, grown, CONFIG, bytes_each=16)
    assert (result.gate, result.ok) == (SeedGate.G0_SANITY, ok)
    assert word in result.reason


@pytest.mark.parametrize(
    ("parameters", "grown", "ok", "words"),
    [
        (2**16, 0, True, ["fit"]),
        (2**16 + 1, 0, False, ["kasmina.max_seed_mb=0.5", "0.5000076 MiB", "8 bytes a parameter"]),
        (2**16, 2**17, True, ["fit"]),
        (2**16, 2**17 + 1, False, ["kasmina.max_grown_mb=1.5", "1.000008 + 0.5 MiB", "8 bytes a parameter"]),
    ],
)
def test_g0_is_there_memory(parameters: int, grown: int, ok: bool, words: list[str]) -> None:
    result = gates.g0_sanity(parameters, grown, KasminaConfig(max_seed_mb=0.5, max_grown_mb=1.5), bytes_each=8)
    assert (result.gate, result.ok) == (SeedGate.G0_SANITY, ok)
    assert all(word in result.reason for word in words), result.reason


@pytest.mark.parametrize(
    ("norms", "ok"),
    [
        ([1.0, 2.0, 3.0], True),
        ([0.0, NAN, 1.0, 2.0, 3.0], True),  # what lies before the window counts no more
        ([1.0, 2.0], False),
        ([], False),
        ([1.0, 0.0, 3.0], False),
        ([1.0, 2.0, NAN], False),
        ([INF, 2.0, 3.0], False),
        ([-1.0, 2.0, 3.0], False),
    ],
)
def test_g1_gradients_are_finite_and_not_zero(norms: list[float], ok: bool) -> None:
    result = gates.g1_gradient_health(norms, 3, "the seed")
    assert (result.gate, result.ok) == (SeedGate.G1_GRADIENT_HEALTH, ok)
    assert "the seed" in result.reason


@pytest.mark.parametrize(
    ("alpha", "before", "now", "ok"),
    [
        (1.0, 2.0, 3.0, True),
        (1.0, 2.0, 3.0001, False),
        (math.nextafter(1.0, 0.0), 2.0, 1.0, False),
        (1.0, NAN, 5.0, True),  # nothing to compare with
        (1.0, 2.0, NAN, False),
        (1.0, NAN, INF, False),
    ],
)
def test_g2_alpha_is_one_and_the_loss_is_not_worse(alpha: float, before: float, now: float, ok: bool) -> None:
    result = gates.g2_stability(alpha, Evidence(loss_before_graft=before, loss_now=now), CONFIG)
    assert (result.gate, result.ok) == (SeedGate.G2_STABILITY, ok)


@pytest.mark.parametrize(
    ("evidence", "ok", "word"),
    [
        (PROBED, True, "shape kept"),
        (replace(PROBED, output_ratio=2.0), True, "shape kept"),
        (replace(PROBED, output_ratio=2.0001), False, "exceeds 2.0"),
        (replace(PROBED, output_ratio=NAN), False, "not probed"),
        (replace(PROBED, non_finite_outputs=1), False, "not finite"),
        (replace(PROBED, shape_mismatch="(3,) instead of (4,)"), False, "(3,) instead of (4,)"),
    ],
)
def test_g3_shape_finiteness_and_scale(evidence: Evidence, ok: bool, word: str) -> None:
    result = gates.g3_interface(evidence, CONFIG)
    assert (result.gate, result.ok) == (SeedGate.G3_INTERFACE, ok)
    assert word in result.reason


@pytest.mark.parametrize(
    ("without", "with_seed", "ok"),
    [(0.51, 0.5, True), (0.505, 0.5, False), (0.5, 0.6, False), (NAN, 0.5, False), (0.5, NAN, False)],
)
def test_g4_the_contribution_is_large_enough(without: float, with_seed: float, ok: bool) -> None:
    result = gates.g4_system_impact(Evidence(loss_without=without, loss_with=with_seed), CONFIG)
    assert (result.gate, result.ok) == (SeedGate.G4_SYSTEM_IMPACT, ok)


@pytest.mark.parametrize(
    ("gain", "noise", "certainty", "ok"),
    [
        (0.06, 0.02, 2.0, True),
        (0.05, 0.0201, 2.0, False),
        (0.05, 0.5, 0.0, True),  # not asked for
        (0.05, NAN, 2.0, False),  # nobody knows how certain it is
        (0.05, NAN, 0.0, True),
        (0.01, 0.0, 2.0, True),
        (0.0, 0.0, 2.0, False),
    ],
)
def test_g4_the_contribution_is_certain_enough(gain: float, noise: float, certainty: float, ok: bool) -> None:
    evidence = Evidence(loss_without=gain, loss_with=0.0, contribution_noise=noise)
    result = gates.g4_system_impact(evidence, replace(CONFIG, min_certainty=certainty))
    assert result.ok == ok
    assert ("+-" in result.reason) == math.isfinite(noise)
    assert ok or gain < CONFIG.min_contribution or "2 standard errors" in result.reason


def test_g5_names_what_is_left() -> None:
    assert gates.g5_reset([]).ok
    result = gates.g5_reset(["module", "optimizer group"])
    assert (result.gate, result.ok) == (SeedGate.G5_RESET, False)
    assert "module, optimizer group" in result.reason
