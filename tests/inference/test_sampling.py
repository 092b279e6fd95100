"""Top-k, top-p and drawing against numpy, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inference.jaxprs import always_run

from deepseek_jax.inference.sampling import PART, SamplingParams, most_likely, sample, truncate_logits

W = 7
# Small whole numbers: ties are the rule.
LOGITS = hnp.arrays(np.float32, W, elements=st.integers(-3, 3).map(float))


def kept_by_hand(logits, top_k, top_p) -> tuple[set[int], float]:
    """Tokens that stay: the k best, then the best until they hold top_p of what is left; ties stay together.

    And by how much the decision about top_p was clear: on the edge itself rounding decides.
    """
    logits = np.asarray(logits, np.float64)
    kept, margin = set(range(W)), 1.0
    if 0 < top_k < W:
        kept = {i for i in kept if logits[i] >= sorted(logits)[-top_k]}
    if top_p < 1:
        weights = {i: np.exp(logits[i]) for i in kept}
        total, summed, edge = sum(weights.values()), 0.0, np.inf
        for i in sorted(kept, key=lambda i: -logits[i]):
            margin = min(margin, abs(summed / total - top_p))
            if summed / total < top_p:
                edge = logits[i]
            summed += weights[i]
        kept = {i for i in kept if logits[i] >= edge}
    return kept, margin


def truncate(logits, top_k, top_p):
    rows = len(logits)
    return truncate_logits(logits, jnp.full(rows, top_k, jnp.int32), jnp.full(rows, top_p, jnp.float32))


def draw(logits, keys, *params: SamplingParams):
    """All rows in one way, or each in its own."""
    each = params if len(params) > 1 else params * len(logits)
    columns = zip(*((p.temperature, p.top_p, p.top_k) for p in each), strict=True)
    dtypes = (jnp.float32, jnp.float32, jnp.int32)
    return sample(logits, keys, *(jnp.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


@given(LOGITS, st.integers(0, W + 1), st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.999, 1.0]))
def test_truncation_equals_numpy(logits, top_k, top_p):
    expected, margin = kept_by_hand(logits, top_k, top_p)
    assume(margin > 1e-4)
    found = np.asarray(truncate(jnp.asarray(logits)[None], top_k, top_p))[0]
    kept = np.flatnonzero(np.isfinite(found))
    assert set(kept.tolist()) == expected
    np.testing.assert_array_equal(found[kept], logits[kept])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (40, 1.0), (40, 0.5), (0, 1e-9), (5000, 0.999)])
def test_truncation_of_a_whole_vocabulary_equals_a_sort(top_k, top_p):
    """Of logits as networks have them, all signs and sizes, some -inf; float64, and rows whose edge is a hair's breadth
    away from top_p may differ by the token there."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(8, 5000)) * np.geomspace(1e-3, 30, 8)[:, None]).astype(np.float32)
    logits[:, :50] = -np.inf
    found = np.isfinite(np.asarray(truncate(jnp.asarray(logits), top_k, top_p)))
    order = np.argsort(-logits, axis=1, kind="stable")
    p = np.exp(np.take_along_axis(logits.astype(np.float64), order, axis=1))
    p[:, top_k or p.shape[1] :] = 0
    before = np.cumsum(p, axis=1) / p.sum(axis=1, keepdims=True) - p / p.sum(axis=1, keepdims=True)
    expected = (before < (top_p if top_p < 1 else np.inf)) & (p > 0)
    assert np.all(np.abs(np.take_along_axis(found, order, axis=1).sum(axis=1) - expected.sum(axis=1)) <= 1)
    assert np.all(np.diff(np.take_along_axis(found, order, axis=1).astype(int), axis=1) <= 0), "the best ones"


def test_the_most_likely_token_always_stays():
    found = truncate(jnp.asarray([[0.0, 9.0, 1.0]]), 1, 1e-6)
    assert np.isfinite(np.asarray(found)).tolist() == [[False, True, False]]


def test_rows_are_cut_by_themselves_and_each_in_its_own_way():
    logits = jnp.asarray([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]] * 2)
    found = truncate_logits(logits, jnp.array([2, 2, 0, 0]), jnp.array([1.0, 1.0, 1.0, 0.7]))
    assert np.isfinite(np.asarray(found)).tolist() == [
        [True, True, False],
        [False, True, True],
        [True, True, True],
        [False, True, True],
    ]


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.asarray([[1.0, 4.0, 4.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    for top_k in (0, 1):
        tokens, logprobs = draw(logits, keys(2), SamplingParams(temperature=0.0, top_k=top_k))
        assert tokens.tolist() == [1, 0] and tokens.dtype == jnp.int32
        expected = [4 - np.log(np.exp([1.0, 4.0, 4.0, 0.0]).sum()), -np.log(4)]
        np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 2.0, "top_k": 4, "top_p": 0.8}]
)
def test_draws_follow_the_distribution(options):
    """Frequencies over 20,000 draws lie within five standard errors; log-probabilities are those before the cut."""
    params, draws = SamplingParams(**options), 20_000
    logits = np.array([1.0, -0.5, 2.0, 0.3, -2.0, 1.5, 0.1])
    tokens, logprobs = draw(jnp.broadcast_to(jnp.float32(logits), (draws, W)), keys(draws), params)
    scaled = logits / params.temperature
    p = np.exp(scaled) / np.exp(scaled).sum()
    np.testing.assert_allclose(logprobs, np.log(p)[np.asarray(tokens)], rtol=1e-5)
    kept, _ = kept_by_hand(scaled, params.top_k, params.top_p)
    q = np.array([p[i] if i in kept else 0.0 for i in range(W)])
    q /= q.sum()
    frequency = np.bincount(tokens, minlength=W) / draws
    assert np.all(np.abs(frequency - q) <= 5 * np.sqrt(q * (1 - q) / draws))


@pytest.mark.parametrize("shape", [(3, 20 * PART + 1), (2, 3, 41 * PART), (2, 20 * PART), (2, 7)])
def test_the_most_likely_are_those_of_a_sort_and_the_first_of_equals(shape):
    count, rng = min(20, shape[-1]), np.random.default_rng(0)
    several = rng.integers(-3, 4, shape), rng.standard_normal(shape), np.zeros(shape), np.full(shape, -np.inf)
    few = np.where(rng.random(shape) < 9 / shape[-1], 1.0, -np.inf)
    for logits in (*several, few, -few, np.sort(rng.standard_normal(shape), axis=-1)):
        logits = logits.astype(np.float32)
        best, ids = jax.jit(most_likely, static_argnums=1)(logits, count)
        right = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
        np.testing.assert_array_equal(ids, right)
        np.testing.assert_array_equal(best, np.take_along_axis(logits, right, axis=-1))


def test_draws_are_those_of_jax_random_categorical():
    logits = 3 * jax.random.normal(jax.random.key(7), (200, 33)).at[:, 5].set(-jnp.inf)
    tokens, _ = draw(logits, keys(200), SamplingParams())
    assert tokens.tolist() == jax.vmap(jax.random.categorical)(keys(200), logits).tolist()


def test_rows_of_every_kind_in_one_batch_are_as_by_themselves():
    """Greedy, plain, cut by top-k and by top-p: each row's token and log-probability are those of its kind alone."""
    kinds = [
        SamplingParams(temperature=0.0, top_k=2),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=3),
        SamplingParams(temperature=1.5, top_p=0.6),
    ]
    logits = 2 * jax.random.normal(jax.random.key(3), (64, 33))
    tokens, logprobs = draw(logits, keys(64), *kinds * 16)
    for kind, params in enumerate(kinds):
        alone = draw(logits[kind::4], keys(64)[kind::4], params)
        assert tokens[kind::4].tolist() == alone[0].tolist()
        np.testing.assert_array_equal(logprobs[kind::4], alone[1])


def test_nothing_is_sorted_and_no_noise_is_drawn_where_no_row_asks():
    """Both stand in a branch of a conditional that the others do not enter."""
    args = (jnp.zeros((2, 8)), keys(2), jnp.ones(2), jnp.ones(2), jnp.zeros(2, jnp.int32))

    always = set(always_run(jax.make_jaxpr(sample)(*args).jaxpr))
    assert "cond" in always and not always & {"sort", "cumsum", "random_bits", "top_k"}


def test_each_row_draws_with_its_own_key():
    logits = jnp.zeros((8, 1000))
    first, _ = draw(logits, keys(8), SamplingParams())
    again, _ = draw(logits, keys(8), SamplingParams())
    other, _ = draw(logits, keys(8, seed=1), SamplingParams())
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) > 4
    reversed_rows, _ = draw(logits, keys(8)[::-1], SamplingParams())
    assert reversed_rows.tolist() == first.tolist()[::-1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1: must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan: must be finite"),
        ({"temperature": float("inf")}, "temperature=inf: must be finite"),
        ({"stop_token_ids": (3, -1)}, r"stop_token_ids=\(3, -1\): must not be negative"),
        ({"seed": 2**31}, r"seed=2147483648: must be less than 2\*\*31"),
        ({"top_p": 0.0}, r"top_p=0.0: must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1: must not be negative"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"seed": 0.5}, "seed=0.5.*int"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)
