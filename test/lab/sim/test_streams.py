"""Command streams through the simulated controller: which settings hold the limits.

Pins: steps where a controller bridges to a first point in the future, from its desired state one
period early or from a measured state that lags; steps after messages that are late, lost or
re-ordered. docs/controllers.md has the same settings with larger numbers.
"""

from __future__ import annotations

import controllers
import pytest
from controllers import DT_S, Network, Setup
from hypothesis import given, settings
from hypothesis import strategies as st

SPACING_S = 1.1 * DT_S
"""Two ticks may be so far apart."""
seeds = st.integers(0, 2**32 - 1)


@st.composite
def supported(draw: st.DrawFn) -> Setup:
    return Setup(
        from_desired=draw(st.booleans()),
        rate_hz=draw(st.sampled_from([100.0, 500.0])),
        lag_s=draw(st.sampled_from([0.0, 0.01, 0.03, 0.06])),
        velocity_interface=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(supported(), st.sampled_from([0.03, 0.05]), st.floats(0.0, 1.0), seeds)
def test_delays_below_the_lead_are_not_seen(
    setup: Setup, lead_s: float, share: float, seed: int
) -> None:
    """A message may take lead_s less one period of the controller."""
    most_s = share * (lead_s - 1 / setup.rate_hz)
    result = controllers.run(setup, Network((0.0, most_s), lead_s=lead_s), seed)
    assert result.held, result
    assert result.rejected == 0


@settings(max_examples=40, deadline=None)
@given(supported(), st.integers(1, 3), st.floats(0.002, 0.01), seeds)
def test_losses_that_the_lead_covers_are_not_seen(
    setup: Setup, losses: int, delay_s: float, seed: int
) -> None:
    """n in a row, the braking message among them: n · dt_s + delay + one period."""
    lead_s = losses * SPACING_S + delay_s + 1 / setup.rate_hz
    network = Network((0.0, delay_s), loss=0.4, losses_in_a_row=losses, lead_s=lead_s)
    result = controllers.run(setup, network, seed)
    assert result.held, result


@settings(max_examples=40, deadline=None)
@given(supported(), st.floats(0.0, 0.04), seeds)
def test_re_ordering_that_the_lead_covers_is_not_seen(
    setup: Setup, delay_s: float, seed: int
) -> None:
    """A message that overtakes another is lost: dt_s + twice the delay + one period."""
    lead_s = SPACING_S + 2 * delay_s + 1 / setup.rate_hz
    result = controllers.run(setup, Network((0.0, delay_s), ordered=False, lead_s=lead_s), seed)
    assert result.held, result


@settings(max_examples=40, deadline=None)
@given(supported(), seeds)
def test_what_a_sender_delays_is_retracted(setup: Setup, seed: int) -> None:
    """Pins: messages sent 57 and 210 ms after their stamp by an overloaded sender."""
    result = controllers.run(setup, Network((0.0, 0.002), overload=0.2), seed)
    assert result.held, result


def test_a_late_sender_retracts_something() -> None:
    assert sum(controllers.run(Setup(), Network(overload=0.2), k).retracted for k in range(5)) > 20


@pytest.mark.parametrize("rate_hz", [100.0, 500.0])
@pytest.mark.parametrize("desired", [False, True])
def test_measured_joints_that_sag_make_no_step_at_a_restart(desired: bool, rate_hz: float) -> None:
    """The first start of all bridges the difference; later ones begin where the command rests."""
    for seed in range(6):
        sagging = Setup(desired, rate_hz=rate_hz, lag_s=0.03, offset=0.5)
        result = controllers.run(sagging, Network(), seed, known=True)
        assert result.held, result


# Settings that cannot hold the limits; docs/controllers.md names them.
@pytest.mark.parametrize("rate_hz", [100.0, 500.0])
@pytest.mark.parametrize("desired", [False, True])
def test_allow_trajectory_replacement_breaks_the_limits(desired: bool, rate_hz: float) -> None:
    """It delays every point by the age of the stamp."""
    setup = Setup(desired, replacement=True, rate_hz=rate_hz)
    results = [controllers.run(setup, Network(), seed) for seed in range(4)]
    assert max(result.acceleration for result in results) > 5


@pytest.mark.parametrize(
    "network",
    [Network((0.0002, 0.08)), Network(loss=0.4), Network((0.0, 0.04), ordered=False)],
    ids=["late", "lost", "re-ordered"],
)
def test_more_than_the_lead_covers_breaks_the_limits(network: Network) -> None:
    results = [controllers.run(Setup(), network, seed) for seed in range(8)]
    assert max(result.acceleration for result in results) > 5


def test_a_first_start_away_from_what_the_controller_holds_is_bridged() -> None:
    """From the desired state over lead_s, from the measured state at once."""
    by_desired = controllers.run(Setup(True, offset=0.05), Network(), 0)
    by_measured = controllers.run(Setup(False, offset=0.05), Network(), 0)
    assert 1 < by_desired.acceleration < 10 < by_measured.acceleration
