"""The gate's tests against oracles: statsmodels, brute force, simulation, and figures computed elsewhere."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from secondnature.evidence.alarm import HarmAlarm
from secondnature.evidence.power import (
    critical_score,
    gain_n_needed,
    gain_power,
    noninferiority_n_needed,
    noninferiority_power,
)
from secondnature.evidence.statistics import (
    clopper_pearson,
    cluster_sign_flip,
    d_prime,
    difference_interval,
    fewest_gains,
    mcnemar_mid_p,
    noninferiority_p,
    scenario_counts,
    score_z,
    tail,
    wilson,
    z_moments,
)

flips = st.integers(0, 60)


@given(flips, flips)
def test_mcnemar_mid_p_is_statsmodels_exact_less_half_the_point(gains: int, losses: int) -> None:
    point = comb(gains + losses, gains) / 2 ** (gains + losses)
    one_sided = mcnemar_mid_p(gains, losses)
    assert one_sided + mcnemar_mid_p(losses, gains) == pytest.approx(1)
    if gains > losses:
        exact = vars(mcnemar([[5, losses], [gains, 7]], exact=True))["pvalue"] / 2
        assert one_sided == pytest.approx(exact - point / 2, abs=1e-12)


def test_mcnemar_mid_p_keeps_its_level_from_sixty_probes_on() -> None:
    size = max(
        gain_power(n, f / 2, f / 2, 0.025) for n in range(60, 400, 11) for f in np.linspace(0.02, 0.6, 30)
    )
    assert size <= 0.0275
    assert gain_power(137, 0.5, 0.5, 0.025) == pytest.approx(0.0299, abs=1e-4)  # the worst case: all flip


@pytest.mark.parametrize(("n", "p"), [(59, 0.0485), (58, 0.0510)])
def test_noninferiority_known_values(n: int, p: float) -> None:
    assert noninferiority_p(n, 0, 0, 0.05) == pytest.approx(p, abs=5e-5)


def brute_force_p(n: int, losses: int, gains: int, margin: float) -> float:
    """All outcomes, a dense nuisance grid, and a constrained maximum found by search instead of a formula."""

    def z(b: int, c: int) -> float:
        def minus_log_likelihood(u: float) -> float:
            rates = (u, u + margin, 1 - 2 * u - margin)
            return -sum(k * np.log(max(r, 1e-300)) for k, r in zip((b, c, n - b - c), rates, strict=True))

        found = optimize.minimize_scalar(
            minus_log_likelihood, bounds=(0, (1 - margin) / 2), method="bounded", options={"xatol": 1e-12}
        )
        u = min((found.x, 0.0), key=minus_log_likelihood)
        return (b - c + n * margin) / np.sqrt(n * (2 * u + margin - margin**2))

    outcomes = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    observed = z(gains, losses)
    extreme = [(b, c) for b, c in outcomes if z(b, c) >= observed - 1e-6]
    us = np.linspace(0, (1 - margin) / 2, 2001)
    total = np.zeros_like(us)
    for b, c in extreme:
        total += (
            comb(n, b) * comb(n - b, c) * us**b * (us + margin) ** c * (1 - 2 * us - margin) ** (n - b - c)
        )
    return float(total.max())


@pytest.mark.parametrize(
    ("n", "losses", "gains", "margin"),
    [(8, 0, 0, 0.1), (12, 1, 2, 0.1), (15, 3, 0, 0.2), (15, 0, 4, 0.05), (20, 2, 2, 0.3), (20, 5, 1, 0.1)],
)
def test_noninferiority_is_brute_force(n: int, losses: int, gains: int, margin: float) -> None:
    expected = brute_force_p(n, losses, gains, margin)
    assert noninferiority_p(n, losses, gains, margin) == pytest.approx(expected, rel=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(5, 150), st.data())
def test_noninferiority_p_grows_with_losses_and_falls_with_gains(n: int, data: st.DataObject) -> None:
    losses = data.draw(st.integers(0, n - 1))
    gains = data.draw(st.integers(0, n - 1 - losses))
    p = noninferiority_p(n, losses, gains, 0.05)
    assert noninferiority_p(n, losses + 1, gains, 0.05) >= p - 1e-9
    assert noninferiority_p(n, losses, gains + 1, 0.05) <= p + 1e-9


@pytest.mark.parametrize("margin", [0.05, 0.10])
@pytest.mark.parametrize("n", [10, 31, 59, 75, 120, 177, 260, 300, 342, 400])
def test_noninferiority_keeps_its_level_over_the_whole_null(n: int, margin: float) -> None:
    """The true size of "p <= 0.025", on a grid that the test itself does not use, also beyond the margin."""
    region = fewest_gains(n, critical_score(n, margin, 0.025), margin)
    for drop in (margin, 1.3 * margin, 3 * margin):
        us = np.linspace(0, (1 - drop) / 2, 997)
        assert tail(n, region, us, us + drop).max() <= 0.025 * (1 + 1e-4)


def test_the_score_statistic_alone_is_too_liberal() -> None:
    """Why the exact test: with a normal quantile the size at alpha 5 % is over 6.5 % for some small n."""
    sizes: list[float] = []
    for n in range(20, 80):
        us = np.linspace(0, 0.3, 200)
        sizes.append(float(tail(n, fewest_gains(n, 1.6449, 0.05), us, us + 0.05).max()))
    assert max(sizes) > 0.065


def test_score_grows_with_gains_so_that_a_bound_per_number_of_losses_is_the_whole_region() -> None:
    n = 60
    gains, losses = np.meshgrid(np.arange(n + 1), np.arange(n + 1))
    z = np.where(gains + losses <= n, score_z(n, gains, np.minimum(losses, n - gains), -0.05), np.inf)
    steps = np.diff(np.where(np.isinf(z), 1e9, z), axis=1)
    assert (steps > 0)[(gains + losses <= n)[:, 1:]].all()


clusters = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda gl: (6, gl[0], gl[1])), min_size=1, max_size=10
)


@given(clusters)
def test_cluster_sign_flip_is_enumeration(found: list[tuple[int, int, int]]) -> None:
    net = [g - c for _, g, c in found]
    sums = [
        sum(s * d for s, d in zip(signs, net, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(net))
    ]
    assert cluster_sign_flip(found) == pytest.approx(np.mean([s >= sum(net) for s in sums]), abs=1e-12)


@given(flips, flips)
def test_cluster_sign_flip_of_single_probes_is_exact_mcnemar(gains: int, losses: int) -> None:
    singles = [(1, 1, 0)] * gains + [(1, 0, 1)] * losses + [(1, 0, 0)] * 3
    expected = stats.binom.sf(gains - 1, gains + losses, 0.5)
    assert cluster_sign_flip(singles) == pytest.approx(expected, abs=1e-12)


def test_cluster_sign_flip_keeps_its_level_where_the_naive_test_does_not() -> None:
    """6 scenarios x 10 variations whose answers move together, no effect: alpha 5 %."""
    rng = np.random.default_rng(1)
    naive = exact = 0
    for _ in range(1500):
        drift = rng.normal(0, 0.35, 6)
        u = rng.random((6, 10))
        gains = (u < np.clip(0.15 + drift, 0, 0.5)[:, None]).sum(1)
        losses = (u > 1 - np.clip(0.15 - drift, 0, 0.5)[:, None]).sum(1)
        found = [(10, int(g), int(c)) for g, c in zip(gains, losses, strict=True)]
        naive += mcnemar_mid_p(int(gains.sum()), int(losses.sum())) <= 0.05
        exact += cluster_sign_flip(found) <= 0.05
    assert naive / 1500 > 0.10
    assert exact / 1500 <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
def test_scenario_means_keep_noninferiority_honest_when_probes_share_scenarios(together: float) -> None:
    """100 scenarios x 3, true drop exactly the margin, the answers of a scenario falling together or not."""
    rng = np.random.default_rng(2)
    passed = naive = 0
    for _ in range(600):
        shared = (rng.random(100) < 0.05)[:, None]
        own = rng.random((100, 3)) < 0.05
        lost = np.where(rng.random((100, 1)) < together, shared, own).sum(1)
        n, gains, losses = scenario_counts([(3, 0, int(c)) for c in lost])
        passed += noninferiority_p(n, losses, gains, 0.05) <= 0.025
        naive += noninferiority_p(300, int(lost.sum()), 0, 0.05) <= 0.025
    assert passed / 600 <= 0.025
    if together == 1:
        assert naive / 600 > 0.06  # what counting the probes as independent would do


def test_scenario_counts_of_single_probes_are_the_counts() -> None:
    assert scenario_counts([(1, 0, 1), (1, 1, 0), (1, 0, 0)]) == (3, 1, 1)
    assert scenario_counts([(4, 0, 4), (4, 1, 0), (2, 0, 0)]) == (3, 0.25, 1)


@given(st.integers(1, 400), st.data())
def test_intervals_are_statsmodels(n: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, n))
    assert clopper_pearson(passed, n) == pytest.approx(proportion_confint(passed, n, method="beta"), abs=1e-9)
    assert wilson(passed, n) == pytest.approx(proportion_confint(passed, n, method="wilson"), abs=1e-9)


@given(st.integers(1, 200), st.data())
def test_difference_interval_holds_the_difference_and_mirrors(n: int, data: st.DataObject) -> None:
    gains = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - gains))
    low, high = difference_interval(n, gains, losses)
    assert -1 <= low <= (gains - losses) / n + 1e-9
    assert (gains - losses) / n - 1e-9 <= high <= 1
    assert difference_interval(n, losses, gains) == pytest.approx((-high, -low), abs=1e-9)


def test_difference_interval_covers() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(120, [0.03, 0.08, 0.89], size=600)
    inside = [
        low <= -0.05 <= high for low, high in (difference_interval(120, int(g), int(c)) for g, c, _ in drawn)
    ]
    assert np.mean(inside) >= 0.93


def test_d_prime_is_the_distance_of_the_quantiles_and_nought_for_a_yes_sayer() -> None:
    assert d_prime(60, 60, 60, 60) == pytest.approx(0)
    expected = stats.norm.ppf(54.5 / 61) - stats.norm.ppf(6.5 / 121)
    assert d_prime(54, 60, 6, 120) == pytest.approx(expected)


def test_the_spread_of_d_prime_is_the_simulated_one() -> None:
    rng = np.random.default_rng(4)
    n = 120
    drawn = rng.multinomial(n, [0.10, 0.05, 0.25, 0.60], size=4000)  # gain, loss, both pass, both fail
    gain, loss, both = drawn[:, 0], drawn[:, 1], drawn[:, 2]
    before = stats.norm.ppf((both + loss + 0.5) / (n + 1))
    after = stats.norm.ppf((both + gain + 0.5) / (n + 1))
    var_after, var_change = z_moments(n, 36, 42, 6)
    assert var_after == pytest.approx(after.var(), rel=0.1)
    assert var_change == pytest.approx((after - before).var(), rel=0.1)


@pytest.mark.parametrize(("flip_rate", "power"), [(0.24, 0.94), (0.30, 0.85), (0.40, 0.70)])
def test_gain_power_of_sixty_probes_at_twenty_points(flip_rate: float, power: float) -> None:
    assert gain_power(60, (flip_rate + 0.2) / 2, (flip_rate - 0.2) / 2, 0.025) == pytest.approx(
        power, abs=0.006
    )


def test_gain_n_needed_is_the_n_where_power_is_reached() -> None:
    n = gain_n_needed(0.25, 0.05, 0.025)
    assert n is not None
    assert gain_power(n, 0.25, 0.05, 0.025) >= 0.8 > gain_power(n - 1, 0.25, 0.05, 0.025)
    assert gain_n_needed(0.05, 0.05, 0.025) is None
    assert gain_n_needed(0.051, 0.05, 0.025) is None  # a gain that small takes more than anybody asks


def test_power_is_simulated_power() -> None:
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(200, [0.02, 0.03, 0.95], size=1500)
    passed = np.mean([noninferiority_p(200, int(c), int(g), 0.05) <= 0.025 for g, c, _ in drawn])
    assert noninferiority_power(200, 0.02, 0.03, 0.05, 0.025) == pytest.approx(passed, abs=0.04)


@pytest.mark.parametrize(("flip_rate", "n"), [(0.0, 77), (0.02, 124), (0.04, 177), (0.06, 236), (0.10, 342)])
def test_noninferiority_n_needed(flip_rate: float, n: int) -> None:
    needed = noninferiority_n_needed(flip_rate / 2, flip_rate / 2, 0.05, 0.025)
    assert needed == pytest.approx(n, rel=0.03)  # power is a saw-tooth in n
    assert needed is not None
    assert noninferiority_power(needed, flip_rate / 2, flip_rate / 2, 0.05, 0.025) >= 0.8


def test_no_n_shows_that_a_drop_of_the_margin_is_none() -> None:
    assert noninferiority_n_needed(0.0, 0.05, 0.05, 0.025) is None
    large = noninferiority_n_needed(0.03, 0.05, 0.05, 0.025)
    assert large is not None
    assert 600 < large < 1000


def test_the_alarm_rings_soon_on_harm_and_seldom_without() -> None:
    rng = np.random.default_rng(6)
    waits: list[int] = []
    for _ in range(200):
        alarm, asked = HarmAlarm(), 0
        while not alarm.rings and asked < 2000:
            asked += 1
            u = rng.random()
            alarm.look(u < 0.22 or u > 0.5, 0.22 <= u < 0.24 or u > 0.5)
        waits.append(asked)
    assert np.median(waits) <= 75  # a drop of 20 points
    false_alarms = 0
    for coins in rng.random((1500, 300)) < 0.5:
        alarm = HarmAlarm()
        for coin in coins:
            alarm.look(bool(coin), not coin)
        false_alarms += alarm.rings
    assert false_alarms / 1500 <= 0.01


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_the_alarm_is_silent_without_more_losses_than_gains(seen: list[tuple[bool, bool]]) -> None:
    alarm = HarmAlarm()
    for before, after in seen:
        alarm.look(before and after, after)  # no losses at all
    assert not alarm.rings
    assert alarm.wealth <= 1


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 <= gains"):
        noninferiority_p(10, 6, 5, 0.05)
    with pytest.raises(ValueError, match="between 0 and 1"):
        noninferiority_p(10, 1, 1, 0)
