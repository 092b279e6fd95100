"""Prompts in, completions out: the generator with weights and a tokenizer around it."""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.answers import Answer, Completion
from deepseek_jax.inference.constraints import Constraint, Grammars
from deepseek_jax.inference.continuous import Continuous, Event
from deepseek_jax.inference.generate import Generated, begin, generate, go_on
from deepseek_jax.inference.in_turn import InTurn
from deepseek_jax.inference.requests import Requests, Room, as_ids, make_requests, shared, spread
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.schedule import ServingConfig
from deepseek_jax.inference.speculation import check_drafts
from deepseek_jax.inference.weights import (
    random_weights,
    sampling_compute,
    sampling_config,
    sampling_weights,
    with_copies,
)
from deepseek_jax.model import transformer
from deepseek_jax.parallel.copies import as_places, check_places
from deepseek_jax.parallel.processes import gather, require_one_process, require_own_rows, together
from deepseek_jax.parallel.sharding import ShardingRules

_generate = together(generate)
STREAM_SECONDS = 0.05  # from one piece of a streamed answer to the next, where a token takes less


class Engine:
    """Answers batches of prompts with a model, from any thread: ``generate`` such as begin together, in one program,
    ``answer`` any number, as slots come free; or requests as they come, by ``submit`` and ``step``.

    >>> engine = Engine(model, tokenizer)  # doctest: +SKIP
    >>> engine.generate(["def add(a, b):"], SamplingParams(max_tokens=16))[0].text  # doctest: +SKIP

    Weights are brought to the form that decoding reads at first use, and then by ``update`` alone. Prompts, answers,
    cache and batch are rounded up to powers of two: within those, nothing that a call can ask for compiles anew.
    """

    def __init__(
        self,
        model: Model | transformer.Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        rules: ShardingRules | None = None,
        serving: ServingConfig = ServingConfig(),
        placement: Sequence[Sequence[int]] | None = None,
        at_once: int = 0,
    ):
        """tokenizer: by default the model's own. rules: how the weights are split, by default ``sampling_rules``.
        serving: how requests are answered as they come. placement: of each MoE layer the expert in each place, of which
        there may be more than experts (``eplb.place``): copies share the work of a busy one, and answers are the same.
        at_once: rows that ``generate`` and ``generate_ids`` answer at a time, the next where another has ended, so that
        none waits for the longest; 0: all together, in one program. Answers are the same but for the last digits.

        ValueError for a placement that is not the model's, or that the mesh cannot split, and for drafts by a model
        without an MTP module.
        """
        if isinstance(model, transformer.Transformer):
            model = Model.of(model, tokenizer)
        model.config.check_speaks()
        check_drafts(model.config, serving.drafts)
        self._network = model.config if serving.drafts else sampling_config(model.config)
        self.config, self.mesh = model.config, model.mesh
        self.tokenizer = model.text if tokenizer is None else tokenizer.over(model.config.vocab_size)
        self.compute = sampling_compute(model.compute)
        if rules is not None:
            self.compute = dataclasses.replace(self.compute, rules=rules)
        self._places = None if placement is None else as_places(placement)
        if self._places is not None:
            if self.compute.scan_decode:
                raise ValueError("placement: with compute.scan_decode layers stay in their stacks")
            ways = math.prod(self.mesh.shape[axis] for axis in self.compute.rules.experts)
            check_places(self._places, self.config.num_moe_layers, self.config.n_routed_experts, ways)
        self._given: tuple[Any, jax.Array | None] | None = (model.params, model.router_bias)
        self._weights: tuple[Any, jax.Array | None] | None = None
        self._lock = threading.Lock()
        self.serving = serving
        self._requests: Continuous | None = None
        self._grammar: Grammars | None = None
        self._answers: dict[int, Answer] = {}  # that ``answer`` waits for
        self._events: list[Event] = []  # of others, that came while it did
        self._stepping = threading.Lock()
        self._in_turn: InTurn | None = None
        if at_once:
            given = sampling_config(self.config), self.compute, self.mesh, self.tokenizer.stop_ids
            self._in_turn = InTurn(*given, self.tokenizer.pad_id, at_once)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        compute: ComputeConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        *,
        serving: ServingConfig = ServingConfig(),
    ) -> "Engine":
        """With ``random_weights``, drawn as decoding reads them: for measurements of networks without weights."""
        made = cls(Model(config, compute.on(mesh), None, None, tokenizer, mesh), serving=serving)
        with jax.set_mesh(mesh):
            made._given, made._weights = None, random_weights(config, made.compute, mesh, mtp=bool(serving.drafts))
        return made

    def update(self, params: dict[str, Any], router_bias: jax.Array | None) -> None:
        """Answer with these arrays from now on; a copy is made, so a train step may give them away.

        The former weights are let go before the new ones are made. Running requests go on with the new ones behind what
        the former have read in, of which others are lent nothing.
        """
        with self._stepping, self._lock:
            self._given, self._weights = (params, router_bias), None
            self._make()
            for requests in filter(None, (self._requests, self._in_turn)):
                requests.forget()

    def _make(self) -> tuple[Any, jax.Array | None]:
        weights = self._weights
        if weights is None:
            assert self._given is not None
            options: dict[str, Any] = {"config": self.config, "compute": self.compute, "mesh": self.mesh}
            options["mtp"] = bool(self.serving.drafts)
            with jax.set_mesh(self.mesh):
                params, bias = sampling_weights(*self._given, **options)
                if self._places is not None:
                    params = with_copies(params, self._places, config=self.config, rules=self.compute.rules)
                weights = self._weights = params, bias
            self._given = None
        return weights

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete each prompt: text, with the begin-of-sentence token put in front where the tokenizer has one, or
        token ids as they are.

        sampling: for all, or one for each prompt. With one for all, equal prompts get answers of their own; with one
        for each, the answer is the one that prompt and seed get alone. An answer ends with one of the tokenizer's
        ``stop_ids`` or of ``stop_token_ids``.

        Raises ValueError for an empty prompt, for a text in the place of a list, and where prompt and answer would pass
        max_position_embeddings.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r:.60} is one text: give a list of them")
        ids = [self._ids(prompt) for prompt in prompts]
        if not ids and jax.process_count() == 1:
            return []
        sampling = sampling or SamplingParams()
        if isinstance(sampling, SamplingParams):
            stops, of_ids = [sampling.stop] * len(ids), sampling.of_ids()
        else:
            stops, of_ids = [params.stop for params in sampling], [params.of_ids() for params in sampling]
        out = self.generate_ids(ids, of_ids).here()
        return [self._completion(out, row, stop) for row, stop in enumerate(stops)]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        key: jax.Array | None = None,
        *,
        experts: bool = False,
        filled: int = 0,
    ) -> Generated:
        """The arrays behind ``generate``; rows past ``len(prompts)`` are filling.

        key: prompt i draws with ``fold_in(key, i)`` instead of the seeds. experts: return those chosen, too. filled:
        rows at least, so that a last part of many prompts compiles nothing; of one process.

        Equal prompts on one device are read in once, where that halves the prompts.

        Of several processes each gives prompts of its own, or none, at the same time; they count from those of the
        first process on, so that answers are those that one process would give to all. ``Generated.here`` has its own.

        ValueError for ``experts`` of rows that are answered in turn, see ``at_once``: requests do not keep them.
        """
        if self._in_turn is not None:
            if experts:
                raise ValueError(f"experts=True: at_once={self._in_turn.at_once} answers by requests, which keep none")
            return self._answered_in_turn(self._in_turn, prompts, sampling, key)
        weights, requests = self._prepared(prompts, sampling, key, filled)
        with jax.set_mesh(self.mesh):  # the caller's may be another
            return _generate(self._network, self.compute, *weights, requests, experts=experts)

    def _answered_in_turn(
        self,
        in_turn: InTurn,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        key: jax.Array | None,
    ) -> Generated:
        each, rooms = self._told(prompts, sampling)
        counted = isinstance(sampling, SamplingParams) or key is not None  # see ``make_requests``
        first = sum(room.rows for room in rooms[: jax.process_index()])
        draws = [(first + row) * counted for row in range(len(prompts))]
        longest = max(room.prompt + room.answer for room in rooms)
        with self._stepping:
            with self._lock:
                weights = self._make()
            return in_turn.answer(weights, prompts, each, draws, key, longest=longest)

    def stream(self, prompt: str | Sequence[int], sampling: SamplingParams | None = None) -> Iterator[Completion]:
        """One prompt's completion in pieces, while it is made: joined they are what ``generate`` answers.

        Between two pieces the device makes as many tokens as it can in ``STREAM_SECONDS``. ``finish_reason`` is "" but
        for the last; a character of several tokens is given with its last one. Errors as in ``generate``.
        """
        require_one_process("a streamed answer")
        sampling = sampling or SamplingParams()
        weights, requests = self._prepared([self._ids(prompt)], sampling.of_ids())
        given = (self._network, self.compute, *weights, requests)
        answer, known, chunk, went_on = Answer(self.tokenizer, sampling.stop, streamed=True), 0, 1, time.monotonic()
        with jax.set_mesh(self.mesh):
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
            with jax.set_mesh(self.mesh):
                decoding = go_on(*given, decoding, known + chunk)

    def answer(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
    ) -> list[list[Completion]]:
        """``n`` completions of each prompt, of any number of prompts: the next begins where another has ended, what
        several begin with is read in once, and strings end answers while they are made.

        sampling: for all, or one for each prompt, as in ``generate``, of which each answer is the one: ``n`` of a
        prompt are those of as many equal prompts. But log-probabilities are the network's own, see ``Event``. May be
        called while others call it or submit; what comes for those is kept. ValueError as in ``submit``.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r:.60} is one text: give a list of them")
        if type(n) is not int or n < 1:
            raise ValueError(f"n={n!r}: expected an int of at least 1")
        sampling, for_all = sampling or SamplingParams(), not isinstance(sampling, Sequence)
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts, but {len(each)} sampling parameters: expected one, or one for each"
            )
        asked = dict[int, Answer]()
        try:
            with self._stepping:
                for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
                    ids, of_ids = self._ids(prompt), params.of_ids()
                    for draw in range(row * n * for_all, row * n * for_all + n):
                        number = self.submit(ids, of_ids, draw=draw)
                        asked[number] = self._answers[number] = Answer(self.tokenizer, params.stop)
            while asked.keys() & self._answers.keys():
                with self._stepping:
                    self._events += self._advance()
        finally:
            for number in asked.keys() & self._answers.keys():  # an error has come between
                self.cancel(number)
        completions = [answer.completion() for answer in asked.values()]
        return [completions[at : at + n] for at in range(0, len(completions), n)]

    def submit(self, prompt: str | Sequence[int], sampling: SamplingParams | None = None, *, draw: int = 0) -> int:
        """Queue a prompt for ``step``, from any thread -> the number that its events have.

        draw: of several samples with one seed, which it is: the i-th gets what ``generate`` answers to the i-th of
        equal prompts. Raises ValueError for what can never be answered: see ``ServingConfig``.
        """
        ids, sampling = self._ids(prompt), sampling or SamplingParams()
        return self._serve().submit(ids, sampling, draw=draw, constraint=self.held_to(sampling))

    def held_to(self, sampling: SamplingParams) -> Constraint | None:
        """The grammar of an answer, None without one. ValueError for what ``submit`` would refuse."""
        if not sampling.constrained:
            return None
        return self._begin(sampling)

    def _begin(self, sampling: SamplingParams) -> Constraint:
        return self._grammars().begin(sampling)

    def cancel(self, number: int) -> None:
        """Give a request up, from any thread; the next step frees what it has."""
        if self._requests is not None:
            self._requests.cancel(number)

    def step(self) -> list[Event]:
        """Let the device do what is next for the requests, see ``schedule`` -> what it has brought to each."""
        with self._stepping:
            events, self._events = [*self._events, *self._advance()], []
        return events

    def _advance(self) -> list[Event]:
        """One step -> events of nobody that ``answer`` waits for."""
        requests, others = self._serve(), []
        with self._lock:
            weights = self._make()
        for event in requests.step(weights):
            answer = self._answers.get(event.number)
            if answer is None:
                others.append(event)
                continue
            answer.add(event)
            if event.finish_reason:
                del self._answers[event.number]
            elif answer.finish_reason:
                requests.cancel(event.number)
        return others

    def follow(self) -> None:
        """Of several processes those that only help: ``step`` with the others until one of them calls ``end``."""
        requests = self._serve()
        while not requests.over:
            self.step()

    def end(self) -> None:
        """Let the others' ``follow`` return, which take this for the next step. Requests that still run are lost."""
        with self._stepping:
            self._serve().end()

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._events) or (self._requests is not None and self._requests.busy)

    def warm_up(self) -> None:
        """Compile all that ``step`` may ever need: no request waits for a compiler behind it."""
        requests = self._serve()
        with contextlib.suppress(ValueError):  # which who asks for a grammar is told
            self._grammars()
        with self._stepping:
            with self._lock:
                weights = self._make()
            requests.warm_up(weights)

    @property
    def context(self) -> int:
        """Tokens of a request's prompt and answer at most."""
        return self._serve().context

    @property
    def slots(self) -> int:
        """Requests that ``step`` answers at once."""
        return self._serve().slots

    def metrics(self) -> dict[str, float]:
        """Of requests, see ``Continuous.metrics``; nothing before the first, or ``warm_up``."""
        return {} if self._requests is None else self._requests.metrics()

    def _grammars(self) -> Grammars:
        with self._lock:
            if self._grammar is None:
                self._grammar = Grammars(self.tokenizer, self.config.vocab_size)
            return self._grammar

    def _serve(self) -> Continuous:
        with self._lock:
            if self._requests is None:
                stop_ids = self.tokenizer.stop_ids
                given = self._network, self.compute, self.mesh, self.serving, stop_ids
                self._requests = Continuous(*given, begin=self._begin)
            return self._requests

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return [*self.tokenizer.bos_ids, *self.tokenizer.encode(prompt)]
        return as_ids(prompt)

    def _prepared(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        key: jax.Array | None = None,
        filled: int = 0,
    ) -> tuple[tuple[Any, jax.Array | None], Requests]:
        """The weights, and the prompts as arrays. ValueError where prompt and answer pass what the model takes, of
        several processes on all."""
        axes, stop_ids = self.compute.rules.batch, self.tokenizer.stop_ids
        require_own_rows(self.mesh, axes, "sampling")
        _, rooms = self._told(prompts, sampling)
        with self._lock:
            weights = self._make()
        ways = math.prod(self.mesh.shape[axis] for axis in axes)
        options: dict[str, Any] = {"stop_ids": stop_ids, "pad_id": self.tokenizer.pad_id}
        if (count := jax.process_count()) == 1:
            room = dataclasses.replace(rooms[0], rows=max(rooms[0].rows, filled))
            with jax.set_mesh(self.mesh):
                return weights, shared(make_requests(prompts, sampling, key, ways=ways, room=room, **options), ways)
        room = Room(*map(max, *map(dataclasses.astuple, rooms)))
        first = sum(room.rows for room in rooms[: jax.process_index()])
        requests = make_requests(prompts, sampling, key, ways=ways // count, room=room, first=first, **options)
        requests = shared(requests, ways // count, lambda rows: max(gather(rows)))
        return weights, spread(requests, NamedSharding(self.mesh, PartitionSpec(axes)))

    def _told(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> tuple[Sequence[SamplingParams], list[Room]]:
        """How each prompt is answered, and what each process's prompts need. ValueError as ``_prepared``'s."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        own = Room.of(prompts, each, self.tokenizer.stop_ids)
        told = gather([self._wrong(prompts, each), dataclasses.astuple(own)])
        if wrong := next(filter(None, (wrong for wrong, _ in told)), None):
            raise ValueError(wrong)
        return each, [Room(*sizes) for _, sizes in told]

    def _wrong(self, prompts: Sequence[Sequence[int]], each: Sequence[SamplingParams]) -> str | None:
        """What is, of the first prompt that cannot be answered."""
        longest, size = self.config.max_position_embeddings, self.config.vocab_size
        for row, (prompt, params) in enumerate(zip(prompts, each, strict=False)):
            if not len(prompt):
                return f"prompt {row} has 0 tokens: expected at least one"
            if wrong := [i for i in (min(prompt), max(prompt)) if not 0 <= i < size]:
                return f"prompt {row} has the id {wrong[0]}: expected from 0 to below vocab_size={size}"
            if (stop := max(params.stop_token_ids, default=0)) >= size:
                return f"stop_token_ids has the id {stop}: expected below vocab_size={size}"
            if (length := len(prompt)) + params.max_tokens > longest:
                most = f"max_tokens={params.max_tokens} pass max_position_embeddings={longest}"
                return f"a prompt of {length} tokens and {most}"
        return None

    def _completion(self, out: Generated, row: int, stop: tuple[str, ...]) -> Completion:
        length, stopped, answer = int(out.lengths_B[row]), bool(out.stopped_B[row]), Answer(self.tokenizer, stop)
        ids, logprobs = (np.asarray(x[row, :length]).tolist() for x in (out.tokens_BN, out.logprobs_BN))
        answer.add(Event(0, ids, logprobs, "stop" if stopped else "length"))
        return answer.completion()

    def decode(self, ids: Sequence[int]) -> str:
        """Text with ``<think>`` and other special tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)
