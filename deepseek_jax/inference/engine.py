"""Prompts in, completions out: a model, and the ways to answer with it."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.answers import Answer, Completion
from deepseek_jax.inference.constraints import Constraint
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.in_turn import InTurn
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.sampling_model import SamplingModel
from deepseek_jax.inference.serving import Serving
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.inference.together import answer_together, stream
from deepseek_jax.model import transformer
from deepseek_jax.parallel.sharding import ShardingRules


class Engine:
    """Answers prompts with a model, from any thread.

    ``generate``, ``generate_ids``: rows that begin together, in one program (``together``), or with ``at_once`` so many
    at a time (``in_turn``). ``stream``: one prompt, piece by piece. ``answer``, or ``submit`` and ``step``: requests as
    they come (``serving``).

    >>> engine = Engine(model, tokenizer)  # doctest: +SKIP
    >>> engine.generate(["def add(a, b):"], SamplingParams(max_tokens=16))[0].text  # doctest: +SKIP

    Weights are brought to the form that decoding reads at first use, and then by ``update`` alone. Prompts, answers,
    cache and batch are rounded up to powers of two: within those, nothing that a call can ask for compiles anew.

    model: what all of them read. requests: the half that serves.
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
        self.model = SamplingModel(model, tokenizer, rules=rules, placement=placement, drafts=serving.drafts)
        self.config, self.mesh, self.compute = self.model.config, self.model.mesh, self.model.compute
        self.tokenizer, self.serving = self.model.tokenizer, serving
        self.requests = Serving(self.model, serving)
        self._in_turn = InTurn(self.model, at_once) if at_once else None

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
        made.model.draw()
        return made

    def update(self, params: dict[str, Any], router_bias: jax.Array | None) -> None:
        """Answer with these arrays from now on; a copy is made, so a train step may give them away.

        The former weights are let go before the new ones are made. Running requests go on with the new ones behind what
        the former have read in, of which others are lent nothing.
        """
        with self.model.stepping:
            self.requests.forget()
            if self._in_turn is not None:
                self._in_turn.forget()
            self.model.update(params, router_bias)

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
        ids = [self.model.ids(prompt) for prompt in prompts]
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
        self.requests.sent()
        if self._in_turn is None:
            return answer_together(self.model, prompts, sampling, key, experts=experts, filled=filled)
        if experts:
            raise ValueError(f"experts=True: at_once={self._in_turn.at_once} answers by requests, which keep none")
        return self._in_turn.answer(prompts, sampling, key)

    def free(self) -> None:
        """Give the devices back the cache of rows that are answered in turn, see ``at_once``, until the next are: for
        a learner that trains meanwhile. What it holds of prompts is forgotten."""
        if self._in_turn is not None:
            self._in_turn.free()

    def stream(self, prompt: str | Sequence[int], sampling: SamplingParams | None = None) -> Iterator[Completion]:
        """One prompt's completion in pieces, while it is made: joined they are what ``generate`` answers.

        Between two pieces the device makes as many tokens as it can in ``STREAM_SECONDS``. ``finish_reason`` is "" but
        for the last; a character of several tokens is given with its last one. Errors as in ``generate``.
        """
        self.requests.sent()
        yield from stream(self.model, self.model.ids(prompt), sampling or SamplingParams())

    def answer(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
    ) -> list[list[Completion]]:
        """``n`` completions of each of any number of prompts, by requests: see ``Serving.answer``."""
        return self.requests.answer(prompts, sampling, n=n)

    def submit(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None, *, draw: int = 0, begun: int = 0
    ) -> int:
        """Queue a prompt for ``step`` -> the number that its events have: see ``Serving.submit``."""
        return self.requests.submit(prompt, sampling, draw=draw, begun=begun)

    def held_to(self, sampling: SamplingParams) -> Constraint | None:
        """The grammar of an answer: see ``Serving.held_to``."""
        return self.requests.held_to(sampling)

    def cancel(self, number: int) -> None:
        """Give a request up; the next step frees what it has."""
        self.requests.cancel(number)

    def step(self) -> list[Event]:
        """Let the device do what is next for the requests -> what it has brought to each: see ``Serving.step``."""
        return self.requests.step()

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.requests.busy

    def follow(self) -> None:
        """Of several processes those that only help ``step`` with the others, until one of them calls ``end``."""
        self.requests.follow()

    def end(self) -> None:
        """Let the others' ``follow`` return; requests that still run are lost."""
        self.requests.end()

    def warm_up(self) -> None:
        """Compile all that ``step`` may ever need: no request waits for a compiler behind it."""
        self.requests.warm_up()

    @property
    def context(self) -> int:
        """Tokens of a request's prompt and answer at most."""
        return self.requests.continuous.context

    @property
    def slots(self) -> int:
        """Requests that ``step`` answers at once."""
        return self.requests.continuous.slots

    def metrics(self) -> dict[str, float]:
        """Of requests, see ``Continuous.metrics``; nothing before the first, or ``warm_up``."""
        return self.requests.metrics()

    def decode(self, ids: Sequence[int]) -> str:
        """Text with ``<think>`` and other special tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _completion(self, out: Generated, row: int, stop: tuple[str, ...]) -> Completion:
        length, stopped, answer = int(out.lengths_B[row]), bool(out.stopped_B[row]), Answer(self.tokenizer, stop)
        ids, logprobs = (np.asarray(x[row, :length]).tolist() for x in (out.tokens_BN, out.logprobs_BN))
        answer.add(Event(0, ids, logprobs, "stop" if stopped else "length"))
        return answer.completion()
