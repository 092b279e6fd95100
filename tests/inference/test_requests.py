"""Requests: rows, buckets, and keys that do not depend on the neighbours."""

import jax
import numpy as np
import pytest

from deepseek_jax.inference.requests import Room, as_ids, make_requests, pad_prompts, shared
from deepseek_jax.inference.sampling import SamplingParams

PROMPTS = [[7], [4, 5, 6], [9, 9]]


def row_keys(requests):
    keys = jax.vmap(jax.random.fold_in)(requests.keys_B, requests.rows_B)
    return np.asarray(jax.random.key_data(keys)).tolist()


def test_each_row_has_its_settings_and_what_fills_the_batch_is_never_run():
    each = [
        SamplingParams(temperature=0.5, top_p=0.9, top_k=3, max_tokens=20, stop_token_ids=(3, 8)),
        SamplingParams(temperature=0.0, max_tokens=5),
        SamplingParams(stop_token_ids=(1, 2, 3, 4)),
    ]
    requests = make_requests(PROMPTS, each, stop_ids=(2,), pad_id=11)
    assert requests.tokens_BP[:, :4].tolist() == [[7, 11, 11, 11], [4, 5, 6, 11], [9, 9, 11, 11], [11] * 4]
    assert requests.lengths_B.tolist() == [1, 3, 2, 1]
    assert requests.limit_B.tolist() == [20, 5, 64, 0]
    np.testing.assert_array_equal(requests.temperature_B, np.array([0.5, 0, 1, 0], np.float32))
    np.testing.assert_array_equal(requests.top_p_B, np.array([0.9, 1, 1, 1], np.float32))
    assert requests.top_k_B.tolist() == [3, 0, 0, 0]
    assert requests.stops_BX[:, :5].tolist() == [[2, 3, 8, -1, -1], [2] + [-1] * 4, [2, 1, 2, 3, 4], [-1] * 5]


@pytest.mark.parametrize(
    "prompts, longest, limit, options, shape",
    [
        (3, 5, 8, {}, (4, 16, 16, 16)),
        (4, 16, 16, {}, (4, 16, 16, 32)),
        (5, 17, 100, {}, (8, 32, 128, 128)),
        (5, 9, 20, {"width": 12, "ways": 6}, (12, 12, 32, 32)),
    ],
)
def test_shapes_are_powers_of_two_or_as_told(prompts, longest, limit, options, shape):
    requests = make_requests([[1] * longest] * prompts, SamplingParams(max_tokens=limit), **options)
    assert (*requests.tokens_BP.shape, requests.answers, requests.columns) == shape


def test_a_row_with_its_own_seed_has_the_same_key_everywhere():
    seeds = lambda *seeds: [SamplingParams(seed=seed) for seed in seeds]  # noqa: E731
    keys = row_keys(make_requests(PROMPTS, seeds(5, 6, 5)))
    assert keys[0] == keys[2] == row_keys(make_requests(PROMPTS[:1], SamplingParams(seed=5)))[0] != keys[1]
    shared = row_keys(make_requests(PROMPTS, SamplingParams(seed=5)))
    assert len({tuple(key) for key in shared}) == 4 and shared[0] == keys[0]
    assert shared == row_keys(make_requests(PROMPTS, SamplingParams(), jax.random.key(5)))


def test_a_prompt_of_many_rows_is_there_once_for_each_device():
    one, two, three = [7] * 3, [4, 5, 6], [7, 7]
    requests = make_requests([one] * 3 + [two] * 3 + [three] * 2 + [one] * 2, SamplingParams(), pad_id=11, ways=2)
    found = shared(requests, 2)  # of 16 rows, 8 and 2 on two devices: three and one prompts
    assert found.tokens_BP[:, :4].tolist() == [
        [*one, 11],
        [*two, 11],
        [*three, 11, 11],
        [11] * 4,
        [*one, 11],
        *[[11] * 4] * 3,
    ]
    assert found.prompt_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2] + [0] * 8
    assert shared(requests, 2, lambda rows: 2 * rows) is requests  # another process has more
    assert shared(requests, 8) is requests  # of two rows, both
    few = make_requests([one] * 3 + [two] * 3, SamplingParams(), room=Room(16), pad_id=11)
    assert len(shared(few, 1).tokens_BP) == 8  # as if sixteen rows asked six prompts


@pytest.mark.parametrize("prompt, size", [([], 0), ([1] * 5, 5)])
def test_prompts_that_do_not_fit_are_refused(prompt, size):
    with pytest.raises(ValueError, match=rf"prompt 1 has {size} tokens: expected 1…4"):
        pad_prompts([[1], prompt], 2, 4)


def test_ids_are_ints():
    ids = [3, np.int64(4), np.uint8(5)]
    assert as_ids(ids) == as_ids(np.array([3, 4, 5])) == as_ids(jax.numpy.array([3, 4, 5])) == ids
    for wrong, kind in (([1, 2.0], "float"), ([True, "a"], "bool, str"), (np.ones(2), "float"), ([None], "NoneType")):
        with pytest.raises(ValueError, match=f"a prompt has ids of type {kind}: expected ints"):
            as_ids(wrong)


def test_settings_must_be_one_or_as_many_as_prompts():
    with pytest.raises(ValueError, match="3 prompts, but 2 sampling parameters"):
        make_requests(PROMPTS, [SamplingParams()] * 2)
