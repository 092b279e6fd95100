"""Rows of ``generate`` by requests: so many at a time, the next where another has ended. None waits for the longest."""

from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.inference.continuous import Continuous
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.requests import as_ids, round_up
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.sampling_model import SamplingModel
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.inference.together import told
from deepseek_jax.inference.weights import Weights, sampling_config
from deepseek_jax.parallel.processes import gather

_PAGES = {"cuda": 64, "tpu": 128}  # tokens of a page that kernels read; elsewhere what is copied is what is filled
_CHUNKS = {"cuda": 2048, "tpu": 2048}
_TURNS = 16


class InTurn:
    """A cache for ``at_once`` rows over all devices, as long as the longest so far, and its programs: compiled when
    they are first needed. One caller at a time; of several processes all at the same time."""

    def __init__(self, model: SamplingModel, at_once: int):
        self._model, self.at_once = model, at_once
        self._requests: Continuous | None = None

    def forget(self) -> None:
        """The weights will be others. By who holds ``stepping``."""
        if self._requests is not None:
            self._requests.forget()

    def free(self) -> None:
        """Let the cache go until it is next needed; programs stay."""
        with self._model.stepping:
            if self._requests is not None:
                self._requests.free()

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        key: jax.Array | None,
    ) -> Generated:
        """What ``answer_together`` gives to these prompts, on the host. Log-probabilities are by a row's temperature,
        as there. ValueError as there, for more ids that end an answer than a request has room for, and for a grammar;
        ArithmeticError where a row's scores are NaN. Of several processes all raise what one does.
        """
        each, rooms = told(self._model, prompts, sampling)
        counted = isinstance(sampling, SamplingParams) or key is not None  # see ``make_requests``
        first = sum(room.rows for room in rooms[: jax.process_index()])
        draws = [(first + row) * counted for row in range(len(prompts))]
        longest = max(room.prompt + room.answer for room in rooms)
        with self._model.stepping:
            return self._answered(self._model.weights(), prompts, each, draws, key, longest)

    def _answered(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        each: Sequence[SamplingParams],
        draws: Sequence[int],
        key: jax.Array | None,
        longest: int,
    ) -> Generated:
        """Row i draws as the ``draws[i]``-th. longest: prompt and answer of any process."""
        requests, rows, wrong = self._with_room(longest), dict[int, int](), ""
        room = max((params.max_tokens for params in each), default=1)
        tokens_BN = np.full((len(prompts), room), self._model.tokenizer.pad_id, np.int32)
        logprobs_BN, lengths_B = np.zeros((len(prompts), room), np.float32), np.zeros(len(prompts), np.int32)
        stopped_B = np.zeros(len(prompts), bool)
        try:
            _ask(requests, rows, prompts, each, draws, key)
            while True:
                for event in requests.step(weights):
                    if (row := rows.get(event.number)) is None:
                        continue  # an earlier call's, which was cut off
                    wrong = wrong or (event.error and f"prompt {row}: {event.error}")
                    now = slice(lengths_B[row], lengths_B[row] + len(event.token_ids))
                    tokens_BN[row, now], logprobs_BN[row, now] = event.token_ids, event.logprobs
                    lengths_B[row], stopped_B[row] = now.stop, event.finish_reason == "stop"
                if not requests.busy:  # on all processes at once, so what is wrong is told behind it
                    break
            if wrong := next(filter(None, gather(wrong)), ""):
                raise ArithmeticError(wrong)
        except BaseException:
            for number in rows:
                requests.cancel(number)
            raise
        return Generated(tokens_BN, logprobs_BN, lengths_B, stopped_B)  # pyright: ignore  # of numpy

    def _with_room(self, longest: int) -> Continuous:
        most = self._model.config.max_position_embeddings
        longest = min(longest, most)  # the longest prompt may not be that of the longest answer
        if self._requests is None or longest > self._requests.context:
            self._requests = None  # its pages go first
            compute, mesh = self._model.compute, self._model.mesh
            config, platform = sampling_config(self._model.config), compute.kernels.platform
            page = _PAGES.get(platform, 16)
            context = min(round_up(longest, page), most)
            lanes = np.prod([mesh.shape[axis] for axis in compute.rules.batch], dtype=int).item()
            slots = -(-self.at_once // lanes)
            sizes = {"slots": slots, "pages": slots * -(-context // page), "page": page, "context": context}
            serving = ServingConfig(**sizes, chunk=_CHUNKS.get(platform, 512), turns=_TURNS)
            self._requests = Continuous(config, compute, mesh, serving, self._model.tokenizer.stop_ids)
        return self._requests


def _ask(
    requests: Continuous,
    rows: dict[int, int],
    prompts: Sequence[Sequence[int]],
    each: Sequence[SamplingParams],
    draws: Sequence[int],
    key: jax.Array | None,
) -> None:
    """Submit all, and note their rows by their numbers. ValueError, on all processes, where one's cannot be asked."""
    words, wrong = None, ""
    if key is not None:
        words = tuple(np.asarray(jax.random.key_data(key)).tolist())
        if len(words) != 2:
            raise ValueError(f"key is of {jax.random.key_impl(key)}: expected one of threefry2x32")
    try:
        for row, (prompt, params, draw) in enumerate(zip(prompts, each, draws, strict=True)):
            if params.constrained:
                raise ValueError("json_schema, regex: for requests by Engine.answer and submit alone")
            rows[requests.submit(as_ids(prompt), params, draw=draw, key=words, tempered=True)] = row
    except ValueError as error:
        wrong = str(error)
    if wrong := next(filter(None, gather(wrong)), ""):
        raise ValueError(wrong)
