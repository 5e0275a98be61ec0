"""Every loss of a pair against float64 NumPy, values and gradients, and what of their settings is refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import spec

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.pair_losses import LOSSES, Pairs
from ftjax.objectives.preference import make_preference

BETA, SMOOTHING, ALPHA, TAU, GAMMA = 0.4, 0.15, 0.7, 0.3, 0.6


def settings(**changes):
    config = configs.defaults().objective
    config.update(
        {"name": "dpo", "beta": BETA, "gamma": GAMMA, "discopop_tau": TAU, "divergence_alpha": ALPHA} | changes
    )
    return config


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    """-log sigmoid(-x)"""
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def divergence(ratio, name):
    t = np.exp(ratio)  # p / p_reference
    return {
        "reverse_kl": lambda: np.log(t),
        "forward_kl": lambda: 1 - 1 / t,
        "js_divergence": lambda: np.log(2 * t / (1 + t)),
        "alpha_divergence": lambda: (t ** (ALPHA - 1) - 1) / (ALPHA - 1),
    }[name]()


@dataclasses.dataclass
class Formula:
    """What the papers say, for one pair (or, of aot, for all): c, r and their references are log p of whole answers."""

    smoothing: float = 0.0
    divergence: str = "reverse_kl"

    def margin(self, c, r, rc, rr):
        return BETA * (divergence(c - rc, self.divergence) - divergence(r - rr, self.divergence))

    def smoothed(self, m):
        return (1 - self.smoothing) * softplus(-m) + self.smoothing * softplus(m)

    def sigmoid(self, c, r, rc, rr, n, m):
        return self.smoothed(self.margin(c, r, rc, rr))

    def hinge(self, c, r, rc, rr, n, m):
        return np.maximum(0, 1 - self.margin(c, r, rc, rr))

    def by_token(self, c, r, rc, rr, n, m):
        return divergence(c - rc, self.divergence) / n - divergence(r - rr, self.divergence) / m

    def ipo(self, *pair):
        return (self.by_token(*pair) - 1 / (2 * BETA)) ** 2

    def sigmoid_norm(self, *pair):
        return softplus(-BETA * self.by_token(*pair))

    def exo_pair(self, c, r, rc, rr, n, m):
        chosen, rejected = (np.exp(BETA * divergence(x, self.divergence)) for x in (c - rc, r - rr))
        policy = np.array([chosen, rejected]) / (chosen + rejected)
        label = np.array([1 - self.smoothing, self.smoothing])
        return (policy * (np.log(policy).T - np.log(label)).T).sum(0)

    def robust(self, c, r, rc, rr, n, m):
        right, wrong = softplus(-self.margin(c, r, rc, rr)), softplus(self.margin(c, r, rc, rr))
        return ((1 - self.smoothing) * right - self.smoothing * wrong) / (1 - 2 * self.smoothing)

    def nca_pair(self, c, r, rc, rr, n, m):
        a, b = BETA * (c - rc), BETA * (r - rr)
        return softplus(-a) + 0.5 * softplus(a) + 0.5 * softplus(b)

    def bco_pair(self, c, r, rc, rr, n, m):
        return softplus(-BETA * (c - rc)) + softplus(BETA * (r - rr))

    def sppo_hard(self, c, r, rc, rr, n, m):
        return (c - rc - 0.5 / BETA) ** 2 + (r - rr + 0.5 / BETA) ** 2

    def apo_zero(self, c, r, rc, rr, n, m):
        return 1 - sigmoid(BETA * (c - rc)) + sigmoid(BETA * (r - rr))

    def apo_down(self, c, r, rc, rr, n, m):
        return sigmoid(BETA * (c - rc)) + 1 - sigmoid(BETA * (c - rc - r + rr))

    def discopop(self, c, r, rc, rr, n, m):
        margin = self.margin(c, r, rc, rr)
        share = sigmoid(margin / TAU)
        return (1 - share) * softplus(-margin) + share * np.exp(-margin)

    def aot(self, c, r, rc, rr, n, m):
        return np.full(len(c), self.smoothed(BETA * (np.sort(c - r) - np.sort(rc - rr))).mean())

    def aot_unpaired(self, c, r, rc, rr, n, m):
        return np.full(len(c), self.smoothed(BETA * (np.sort(c - rc) - np.sort(r - rr))).mean())

    def simpo(self, c, r, rc, rr, n, m):
        return self.smoothed(BETA * (c / n - r / m) - GAMMA)

    def odds_ratio(self, c, r, rc, rr, n, m):
        p, q = np.exp(c / n), np.exp(r / m)
        return -BETA * np.log(sigmoid(np.log((p / (1 - p)) / (q / (1 - q)))))


def drawn(count=7, seed=0):
    """(c, r, rc, rr, n, m), float64 [count] each"""
    rng = np.random.default_rng(seed)
    n, m = rng.integers(2, 9, (2, count)).astype(float)
    c, r = -rng.uniform(0.3, 2.0, (2, count)) * [n, m]
    return c, r, c + rng.normal(size=count), r + rng.normal(size=count), n, m


CASES = [(name, 0.0, "reverse_kl") for name in LOSSES if name != "exo_pair"]
CASES += [(name, SMOOTHING, "reverse_kl") for name, loss in LOSSES.items() if "label_smoothing" in loss.settings]
CASES += [
    (name, SMOOTHING if name == "exo_pair" else 0.0, other)
    for name in ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
    for other in ("forward_kl", "js_divergence", "alpha_divergence")
]


@pytest.mark.parametrize(("name", "smoothing", "divergence"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_a_loss_and_its_gradients_are_the_formulas(name, smoothing, divergence, record_figure):
    values, config = drawn(), settings(label_smoothing=smoothing, divergence=divergence)
    formula = getattr(Formula(smoothing, divergence), name)
    # Places 2 and 5 of 3 x 3 hold no pair: what stands there must not count.
    places = np.array([0, 1, 3, 4, 6, 7, 8])

    def laid_out(values):
        return jnp.zeros(9).at[places].set(jnp.asarray(values, jnp.float32)).reshape(3, 3)

    def total(c, r):
        pairs = Pairs(*map(laid_out, (c, r, *values[2:])), there=laid_out(np.ones(7)))
        return jnp.sum(LOSSES[name].function(pairs, config) * pairs.there)

    expected = formula(*values).sum()
    ours, gradients = jax.value_and_grad(total, (0, 1))(*(jnp.asarray(x, jnp.float32) for x in values[:2]))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    worst = 0.0
    for which in (0, 1):
        for i in range(7):
            moved = []
            for by in (1e-6, -1e-6):
                changed = [np.array(x) for x in values]
                changed[which][i] += by
                moved.append(formula(*changed).sum())
            worst = max(worst, abs((moved[0] - moved[1]) / 2e-6 - float(gradients[which][i])))
    assert worst < 2e-5 * max(1.0, float(jnp.abs(jnp.stack(gradients)).max()))
    record_figure("value, relative", abs(float(ours) / expected - 1))
    record_figure("gradient", worst)


@pytest.mark.parametrize("name", LOSSES)
def test_far_from_the_reference_nothing_overflows(name):
    far = jnp.array([[300.0, -300.0]])
    pairs = Pairs(far - 400, -far - 400, -400 + 0 * far, -400 + 0 * far, 5 + 0 * far, 9 + 0 * far, 1 + 0 * far)
    config = settings(label_smoothing=0.1)

    def total(chosen, rejected):
        return LOSSES[name].function(pairs._replace(chosen=chosen, rejected=rejected), config).sum()

    loss, gradients = jax.value_and_grad(total, (0, 1))(pairs.chosen, pairs.rejected)
    assert math.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


REFUSED = [
    ({"loss": ("sigmod",)}, True, "'sigmod' is no loss; did you mean 'sigmoid'"),
    ({"loss": ("sft",)}, True, "'sft' alone does not compare answers"),
    ({"loss": ("sigmoid", ("sigmoid", 2.0))}, True, "a loss stands there twice"),
    ({"loss": ("nca_pair",)}, False, "'nca_pair' compares with a reference, which objective.name='cpo' has not"),
    ({"loss": ("hinge",), "label_smoothing": 0.1}, True, "label_smoothing=0.1 does nothing with the loss hinge"),
    ({"loss": ("robust",), "label_smoothing": 0.5}, True, "of the loss 'robust' it must be below 0.5"),
    ({"loss": ("exo_pair",)}, True, "the loss 'exo_pair' needs one above 0"),
    ({"loss": ("sigmoid", "aot"), "divergence": "forward_kl"}, True, "the loss 'aot' has none; leave it at reverse_kl"),
    ({"divergence": "forward_kl"}, False, "'cpo' has no reference; leave it at reverse_kl"),
    ({"divergence_alpha": 0.9}, True, "is of objective.divergence='alpha_divergence'; set both"),
    (
        {"weighting": "wpo", "loss": ("sigmoid", "sft")},
        True,
        "weighs each pair by itself, and the loss 'sft' is one of",
    ),
    ({"weighting": "wpo", "loss": ("aot",)}, True, "weighs each pair by itself, and the loss 'aot' is one of a whole"),
    (
        {"cache_reference": True, "ld_alpha": 0.5},
        True,
        "cache_reference keeps one number of each answer, and objective",
    ),
    ({"cache_reference": True, "reference_every": 8}, True, "is of a reference that stays, and with objective.refere"),
    ({"discopop_tau": 0.1}, True, "discopop_tau=0.1 does nothing with the loss sigmoid"),
    ({"gamma": 1.0}, False, "gamma=1.0 does nothing with the loss sigmoid"),
]


@pytest.mark.parametrize(("changes", "reference", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_settings_that_do_nothing_or_cannot_be_are_refused(changes, reference, message):
    config = configs.defaults().objective
    config.update({"name": "dpo" if reference else "cpo"} | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        make_preference(Decoder(spec()), config, (("sigmoid", 1.0),), reference)
