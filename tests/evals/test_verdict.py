"""What a comparison says, for each of the rules of `verdict`, and where its intervals come from."""

import numpy as np
import pytest
from scipy import stats

from ftjax.evals import intervals, verdict
from ftjax.evals.verdict import Result


def shares(ones, n=100, seed=0):
    """`ones` of n scores are 1, in an order of their own."""
    return np.random.default_rng(seed).permutation(np.arange(n) < ones).astype(float)


def base(ones, **others):
    return Result("base", "base", shares(ones), prompt_tokens=100, **others)


def shots(ones, **others):
    return Result("base, 8 examples", "shots", shares(ones, seed=1), prompt_tokens=900, **others)


def tuned(ones, **others):
    return Result("tuned", "tuned", shares(ones, seed=2), prompt_tokens=100, **others)


def alike(kind, score, n):
    return Result(kind, kind, np.full(n, float(score)))


CASES = {
    "better": ([base(0), shots(40), tuned(90)], "Tuning beats the best prompt (base, 8 examples) by 50 points ["),
    "and shorter": ([shots(40, seconds=2.0), tuned(90, seconds=0.5)], "89% fewer prompt tokens and 75% less time"),
    "worse than a prompt": ([base(0), shots(90), tuned(40)], "Do not tune: base, 8 examples beats the tuned model by"),
    "and longer": ([base(0), shots(90), tuned(40)], "with prompts 9.0 times as long."),
    "worse than the base": ([base(80), shots(20), tuned(40)], "Do not tune: base beats the tuned model by 40 points ["),
    "worse than retrieval": (
        [base(0), shots(30), shots(90)._replace(name="base, 8 retrieved examples", kind="retrieved"), tuned(40)],
        "Retrieve instead, or tune on retrieved prompts: base, 8 retrieved examples beats the tuned model by 50",
    ),
    "good already": ([base(96), shots(90), tuned(97)], "Do not tune: the base already scores 96% as it is; tuning"),
    "better than a good base": ([base(90), tuned(100)], "Tuning beats the best prompt (base) by 10 points ["),
    "form only": (
        [base(30, valid=shares(20)), tuned(32, valid=shares(99))],
        "Tuning fixes the form, not the score: 99% of the tuned model's answers are valid, 20% of those of the best",
    ),
    "as good and shorter": (
        [shots(0)._replace(scores=shares(320, 400, 1)), tuned(0)._replace(scores=shares(320, 400, 2))],
        "Tune for cost and latency, not for quality: it differs from the best prompt (base, 8 examples) by +0 points [",
    ),
    "too wide to call it as good": ([base(0), shots(52), tuned(48)], "Cannot tell: tuned and the best prompt (base, 8"),
    "not to be told": ([base(42), tuned(48)], "Cannot tell: tuned and the best prompt (base) differ by +6 points ["),
    "nobody can": ([base(0), tuned(0)], "No difference: tuned and the best prompt (base) both score 0% on 100"),
    "one example": ([alike("base", 0, 1), alike("tuned", 1, 1)], "Too few examples to tell: 1, of which"),
    "few examples, all equal": (
        [alike("base", 0, 9), alike("tuned", 1, 9)],
        "Too few examples to tell: 9, of which tuned scores 100%, the best prompt (base) 0%; evaluate on 10 or more.",
    ),
    "ten, all equal": ([alike("base", 0, 10), alike("tuned", 1, 10)], "by 100 points [100, 100]"),
    "another model": (
        [base(0), tuned(40), Result("big", "other", shares(95, seed=3))],
        "big beats the tuned model by 55 points [",
    ),
    "not shares": (
        [Result("base", "base", 7 * shares(10)), Result("tuned", "tuned", 7 * shares(90, seed=2))],
        "Tuning beats the best prompt (base) by 5.6 [",
    ),
    "no tuned model": ([base(3), shots(4)], ""),
    "no prompt": ([tuned(4)], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_words_follow_the_rules(case):
    results, expected = CASES[case]
    said = verdict.of_scores(results)
    assert expected in said
    assert bool(said) == bool(expected)


def test_how_many_examples_could_tell_is_what_a_t_test_needs():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.1, 0.5, 40)
    n = intervals.examples_needed(differences)
    effect = differences.mean() / differences.std(ddof=1)
    power = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, abs(effect) * np.sqrt(n))
    assert power == pytest.approx(0.8, abs=0.02)
    assert intervals.examples_needed([0.0, 0.0]) is None
    assert intervals.examples_needed([1.0]) is None


def test_losses_in_words():
    tokens = np.full(50, 10.0)
    noise = np.random.default_rng(0).normal(0, 1, 50)
    low, high = 12 + noise, 20 + noise
    assert verdict.of_losses(low, high, tokens).startswith(
        f"Tuning lowers the held-out loss by 0.800 nats per token [0.800, 0.800], to {low.sum() / 500:.3f}"
    )
    assert verdict.of_losses(high, low, tokens).startswith("Do not tune: it raises the held-out loss by 0.800 nats")
    assert verdict.of_losses(20 + noise[::-1], high, tokens).startswith("Cannot tell: the held-out loss changes by")
    assert verdict.of_losses(low[:9], high[:9], tokens[:9]).startswith("Too few rows to tell: 9;")
    assert verdict.overall({"a": "Yes.", "b": "", "c": "No."}) == "a: Yes. c: No."
    assert verdict.overall({"a": "Yes."}) == "Yes."


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    """The mean of n scores drawn again is binomial: its percentiles are known."""
    for ones, n in ((30, 100), (2, 40)):
        expected = stats.binom.ppf([0.025, 0.975], n, ones / n) / n
        np.testing.assert_allclose(intervals.interval(shares(ones, n)), expected, atol=1 / n)
    assert intervals.interval(np.zeros(20)) == [0, 0]  # nothing can be drawn but zeros
    assert intervals.interval([1.0]) is None


def test_examples_are_drawn_for_both_contestants_at_once_and_with_their_weights():
    rng = np.random.default_rng(5)
    skill = rng.normal(size=80)  # what makes an example easy or hard for both
    a, b, weights = skill + 0.1 * rng.normal(size=80), skill, rng.integers(1, 30, 80).astype(float)
    drawn = rng.integers(0, 80, (20_000, 80))
    for values, of in ((a - b, None), (a - b, weights)):
        down = (np.ones(80) if of is None else of)[drawn].sum(1)
        expected = np.percentile((a[drawn] - b[drawn]).sum(1) / down, [2.5, 97.5])
        found = np.array(intervals.interval(values, of))
        assert np.abs(found - expected).max() < 0.03 * (expected[1] - expected[0])
