"""Prompts whose answers begin together: one program makes them all, or goes on with one piece by piece."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.inference.answers import Answer, Completion
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.generate import Generated, begin, generate, go_on
from deepseek_jax.inference.requests import Requests, Room, make_requests, shared, spread
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.sampling_model import SamplingModel
from deepseek_jax.inference.weights import Weights
from deepseek_jax.parallel.processes import gather, require_one_process, require_own_rows, together

STREAM_SECONDS = 0.05  # from one piece of a streamed answer to the next, where a token takes less
_generate = together(generate)


def answer_together(
    model: SamplingModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    key: jax.Array | None,
    *,
    experts: bool,
    filled: int,
) -> Generated:
    """``Engine.generate_ids``, of all prompts at once."""
    weights, requests = _prepared(model, prompts, sampling, key, filled)
    with jax.set_mesh(model.mesh):  # the caller's may be another
        return _generate(model.network, model.compute, *weights, requests, experts=experts)


def stream(model: SamplingModel, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[Completion]:
    """``Engine.stream``."""
    require_one_process("a streamed answer")
    weights, requests = _prepared(model, [prompt], sampling.of_ids())
    given = (model.network, model.compute, *weights, requests)
    answer, known, chunk, went_on = Answer(model.tokenizer, sampling.stop, streamed=True), 0, 1, time.monotonic()
    with jax.set_mesh(model.mesh):
        decoding = begin(*given)
    while True:
        answered, done_B = jax.device_get((decoding.answered, decoding.done_B))
        length, stopped, ended = int(answered.lengths_B[0]), bool(answered.stopped_B[0]), bool(done_B[0])
        seconds = (time.monotonic() - went_on) / (length - known)
        chunk = min(max(int(STREAM_SECONDS / seconds), 1), 64)
        ids, logprobs = answered.tokens_BN[0, known:length].tolist(), answered.logprobs_BN[0, known:length].tolist()
        yield answer.add(Event(0, ids, logprobs, ("stop" if stopped else "length") if ended else ""))
        if answer.finish_reason:
            return
        known, went_on = length, time.monotonic()
        with jax.set_mesh(model.mesh):
            decoding = go_on(*given, decoding, known + chunk)


def told(
    model: SamplingModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    check: Callable[[SamplingParams], None] = lambda params: None,
) -> tuple[Sequence[SamplingParams], list[Room]]:
    """How each prompt is answered, and what each process's prompts need. ValueError where one is empty or has ids that
    there are not, where prompt and answer pass what the model takes, where ``check`` raises it, and where there are not
    as many parameters; of several processes on all."""
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    own = Room.of(prompts, each, model.tokenizer.stop_ids)
    found = gather([_wrong(model, prompts, each, check), dataclasses.astuple(own)])
    if wrong := next(filter(None, (wrong for wrong, _ in found)), None):
        raise ValueError(wrong)
    return each, [Room(*sizes) for _, sizes in found]


def _wrong(
    model: SamplingModel,
    prompts: Sequence[Sequence[int]],
    each: Sequence[SamplingParams],
    check: Callable[[SamplingParams], None],
) -> str | None:
    """What is, of the first prompt that cannot be answered."""
    longest, size = model.config.max_position_embeddings, model.config.vocab_size
    if len(each) != len(prompts):
        return f"{len(prompts)} prompts, but {len(each)} sampling parameters: expected one, or one for each"
    for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
        if not len(prompt):
            return f"prompt {row} has 0 tokens: expected at least one"
        if wrong := [i for i in (min(prompt), max(prompt)) if not 0 <= i < size]:
            return f"prompt {row} has the id {wrong[0]}: expected from 0 to below vocab_size={size}"
        if (stop := max(params.stop_token_ids, default=0)) >= size:
            return f"stop_token_ids has the id {stop}: expected below vocab_size={size}"
        if (length := len(prompt)) + params.max_tokens > longest:
            most = f"max_tokens={params.max_tokens} pass max_position_embeddings={longest}"
            return f"a prompt of {length} tokens and {most}"
        try:
            check(params)
        except ValueError as error:
            return str(error)
    return None


def _prepared(
    model: SamplingModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    key: jax.Array | None = None,
    filled: int = 0,
) -> tuple[Weights, Requests]:
    """The weights, and the prompts as arrays. ValueError as ``told``'s."""
    axes, mesh = model.compute.rules.batch, model.mesh
    require_own_rows(mesh, axes, "sampling")
    _, rooms = told(model, prompts, sampling, SamplingParams.check_drawn_in_batches)
    weights = model.weights()
    ids = {"stop_ids": model.tokenizer.stop_ids, "pad_id": model.tokenizer.pad_id}
    make = functools.partial(make_requests, prompts, sampling, key, **ids)
    ways, count = math.prod(mesh.shape[axis] for axis in axes), jax.process_count()
    if count == 1:
        room = dataclasses.replace(rooms[0], rows=max(rooms[0].rows, filled))
        with jax.set_mesh(mesh):
            return weights, shared(make(ways=ways, room=room), ways)
    room = Room(*map(max, *map(dataclasses.astuple, rooms)))
    first = sum(room.rows for room in rooms[: jax.process_index()])
    requests = make(ways=ways // count, room=room, first=first)
    requests = shared(requests, ways // count, lambda rows: max(gather(rows)))
    return weights, spread(requests, NamedSharding(mesh, PartitionSpec(axes)))
