"""The half of an engine that serves: requests answered as they come, from texts to events and to whole answers."""

import contextlib
import threading
from collections.abc import Sequence

from deepseek_jax.inference.answers import Answer, Completion
from deepseek_jax.inference.constraints import Constraint, Grammars
from deepseek_jax.inference.continuous import Continuous
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.sampling_model import SamplingModel
from deepseek_jax.inference.serving_config import ServingConfig


class Serving:
    """Requests over a cache in pages, which is made for the first one, or by ``warm_up``; from any thread.

    Who asks has two ways: ``submit``, and a loop of ``step`` that brings what comes of it; or ``answer``, which takes
    the steps itself. Both at once do, too: each is given its own.
    """

    def __init__(self, model: SamplingModel, config: ServingConfig):
        self._model, self.config = model, config
        self._lock = threading.Lock()
        self._continuous: Continuous | None = None
        self._known: Grammars | None = None
        self.awaited: dict[int, Answer] = {}  # by ``answer``
        self._events: list[Event] = []  # of others, that came while it stepped

    @property
    def continuous(self) -> Continuous:
        """Schedules, pages and programs."""
        with self._lock:
            if self._continuous is None:
                model = self._model
                given = model.network, model.compute, model.mesh, self.config
                self._continuous = Continuous(*given, model.tokenizer.stop_ids, begin=self._begin)
            return self._continuous

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        draw: int = 0,
        begun: int = 0,
    ) -> int:
        """Queue a prompt for ``step`` -> the number that its events have.

        draw: of several samples with one seed, which it is: the i-th gets what ``Engine.generate`` answers to the i-th
        of equal prompts. begun: the last so many tokens of the prompt are the answer's first: it goes on as if it had
        said them, with the noise, the penalties and what is left of ``max_tokens`` behind them, where a grammar begins.
        Raises ValueError for what can never be answered: see ``ServingConfig``.
        """
        ids, sampling = self._model.ids(prompt), sampling or SamplingParams()
        return self.continuous.submit(ids, sampling, draw=draw, begun=begun, constraint=self.held_to(sampling))

    def held_to(self, sampling: SamplingParams) -> Constraint | None:
        """The grammar of an answer, None without one. ValueError for what ``submit`` would refuse."""
        if not sampling.constrained:
            return None
        return self._begin(sampling)

    def _begin(self, sampling: SamplingParams) -> Constraint:
        return self._grammars().begin(sampling)

    def cancel(self, number: int) -> None:
        """Give a request up; the next step frees what it has."""
        if self._continuous is not None:
            self._continuous.cancel(number)

    def step(self) -> list[Event]:
        """Let the device do what is next for the requests, see ``Continuous.step`` -> what has come to each."""
        with self._model.stepping:
            events, self._events = [*self._events, *self._advance()], []
        return events

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._events) or (self._continuous is not None and self._continuous.busy)

    def answer(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
    ) -> list[list[Completion]]:
        """``n`` completions of each prompt, of any number of prompts: the next begins where another has ended, what
        several begin with is read in once, and strings end answers while they are made.

        sampling: for all, or one for each prompt, as in ``Engine.generate``, of which each answer is the one: ``n`` of
        a prompt are those of as many equal prompts. But log-probabilities are the network's own, see ``Event``. May be
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
            with self._model.stepping:
                for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
                    ids, of_ids = self._model.ids(prompt), params.of_ids()
                    for draw in range(row * n * for_all, row * n * for_all + n):
                        number = self.submit(ids, of_ids, draw=draw)
                        asked[number] = self.awaited[number] = Answer(self._model.tokenizer, params.stop)
            while asked.keys() & self.awaited.keys():
                with self._model.stepping:
                    self._events += self._advance()
        finally:
            for number in asked.keys() & self.awaited.keys():  # an error has come between
                self.cancel(number)
        completions = [answer.completion() for answer in asked.values()]
        return [completions[at : at + n] for at in range(0, len(completions), n)]

    def _advance(self) -> list[Event]:
        """One step -> events of nobody that ``answer`` waits for."""
        continuous, others = self.continuous, []
        for event in continuous.step(self._model.weights()):
            answer = self.awaited.get(event.number)
            if answer is None:
                others.append(event)
                continue
            answer.add(event)
            if event.finish_reason:
                del self.awaited[event.number]
            elif answer.finish_reason:
                continuous.cancel(event.number)
        return others

    def follow(self) -> None:
        """Of several processes those that only help: ``step`` with the others until one of them calls ``end``."""
        continuous = self.continuous
        while not continuous.over:
            self.step()

    def end(self) -> None:
        """Let the others' ``follow`` return, which take this for the next step. Requests that still run are lost."""
        with self._model.stepping:
            self.continuous.end()

    def warm_up(self) -> None:
        """Compile all that ``step`` may ever need: no request waits for a compiler behind it."""
        continuous = self.continuous
        with contextlib.suppress(ValueError):  # which who asks for a grammar is told
            self._grammars()
        with self._model.stepping:
            continuous.warm_up(self._model.weights())

    def forget(self) -> None:
        """The weights will be others, see ``Continuous.forget``. By who holds ``stepping``."""
        if self._continuous is not None:
            self._continuous.forget()

    def sent(self) -> None:
        """Return when nothing of a step is on its way to the devices: of what two threads send to several, each might
        take another first."""
        if self._continuous is not None:
            self._continuous.programs.sent()

    def metrics(self) -> dict[str, float]:
        """See ``Continuous.metrics``; nothing before the first request, or ``warm_up``."""
        return {} if self._continuous is None else self._continuous.metrics()

    def _grammars(self) -> Grammars:
        with self._lock:
            if self._known is None:
                self._known = Grammars(self._model.tokenizer, self._model.config.vocab_size)
            return self._known
