"""Requests answered as they come: schedules of what the device does, and the device doing it.

``generate`` stays beside it, for rows that all begin together: one program that no host has to follow, on which
rollouts that are sampled ahead of training and the replay of routing are built.

Of several processes each has all schedules, and before a step all tell who comes and goes: so their plans are the same,
as long as nothing in a plan depends on a clock, a thread or an order of sets.
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.arrivals import exchange
from deepseek_jax.inference.constraints import Constraint
from deepseek_jax.inference.decoding import Decoded
from deepseek_jax.inference.held import Held
from deepseek_jax.inference.plans import Plan, Request
from deepseek_jax.inference.programs import Programs, gathers
from deepseek_jax.inference.rows import STOPS, Rows
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.schedule import Buckets, Schedule, ServingConfig
from deepseek_jax.inference.speculation import check_drafts
from deepseek_jax.inference.weights import Weights


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step has brought to a request. finish_reason: "" while it goes on, ``stop``, ``length``, ``cancelled``, or
    ``error``: it cannot be gone on with, as ``error`` says; ``ours`` where that is no fault of the request's.
    logprobs: of each token by the network alone, before temperature, penalties and cuts. alternatives: of each token,
    as many as were asked for, (token, log-probability) from the most likely on. cached: tokens of its prompt that were
    found in the cache."""

    number: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    cached: int = 0
    error: str = ""
    ours: bool = False


_NAN = "the network's scores are no numbers (NaN), on clean pages too: its weights or a device are damaged"


class Continuous:
    """A cache in pages on a mesh, and the requests that it is for. ``submit`` and ``cancel`` from any thread; ``step``,
    ``forget`` and ``warm_up`` one at a time.

    Each device of the batch has a lane, which is a schedule with slots and pages of its own. Of several processes all
    take each step, and warm up, together; each is told of its own requests. over: one of them has ended it.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        mesh: Mesh,
        serving: ServingConfig,
        stop_ids: Sequence[int],
        *,
        begin: Callable[[SamplingParams], Constraint] | None = None,
        forced: float = 0.0,
    ):
        """config: with the MTP module where ``serving.drafts`` are asked for, and without it else. begin: see
        ``Held``. forced: for measurements alone, see ``speculation.forced``: answers mean nothing; 0: the network has
        its say."""
        check_drafts(config, serving.drafts)
        self.context = serving.tokens(config.max_position_embeddings)
        self._width, self._stop_ids = config.vocab_size, tuple(stop_ids)
        buckets = Buckets.of(serving, self.context, gathers=gathers(config, compute, serving))
        lanes = math.prod(mesh.shape[axis] for axis in compute.rules.batch)
        self.programs = Programs(config, compute, mesh, serving, buckets, lanes, forced)
        self.slots = lanes * serving.slots
        self._lanes = [Schedule(serving, buckets) for _ in range(lanes)]
        self._asked: dict[int, tuple[Request, Schedule]] = {}
        self._new: collections.deque[Request] = collections.deque()
        self._gone: collections.deque[int] = collections.deque()
        self._held = Held(begin)
        self._process = jax.process_index()
        self._numbers = itertools.count(self._process, jax.process_count())
        self.over = False
        self._untold: list[Event] = []  # of steps that failed behind them
        self._counts: dict[str, float] = collections.defaultdict(float)

    def submit(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        *,
        draw: int = 0,
        begun: int = 0,
        key: Sequence[int] | None = None,
        tempered: bool = False,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a prompt -> its number. draw: which sample of this prompt and seed it is. begun: of the ids so many are
        the answer's beginning, see ``Serving.submit``. key, tempered: see ``Rows.described``. constraint: of its own,
        where ``sampling`` asks for one. ValueError for what can never be answered."""
        assert sampling.constrained == (constraint is not None), sampling
        if not ids or not 0 <= min(ids) <= max(ids) < self._width:
            wrong = f"has the ids {min(ids)}…{max(ids)}" if ids else "has no tokens"
            raise ValueError(f"the prompt {wrong}: expected ids from 0 to below vocab_size={self._width}")
        if not 0 <= begun < min(len(ids), sampling.max_tokens):
            expected = f"from 0 to below max_tokens={sampling.max_tokens}, and a token of the prompt before it"
            raise ValueError(f"begun={begun} of {len(ids)} tokens: expected {expected}")
        if (prompt := len(ids) - begun) + sampling.max_tokens > self.context:
            most = f"max_tokens={sampling.max_tokens} pass context={self.context}"
            raise ValueError(f"a prompt of {prompt} tokens and {most}")
        sampling.check_no_text()
        if (stops := len(self._stop_ids) + len(sampling.stop_token_ids)) > STOPS:
            raise ValueError(f"{stops} ids that end an answer, the tokenizer's among them: expected at most {STOPS}")
        named = {"stop_token_ids": sampling.stop_token_ids, "logit_bias": [token for token, _ in sampling.logit_bias]}
        for name, tokens in named.items():
            if (most := max(tokens, default=0)) >= self._width:
                raise ValueError(f"{name} has the id {most}: expected below vocab_size={self._width}")
        if not 0 <= draw < 2**31:
            raise ValueError(f"draw={draw}: expected from 0 to below 2**31")
        row = Rows.described(sampling, self._stop_ids, draw, key, tempered=tempered)
        request = Request(next(self._numbers), list(ids), sampling, row=row, constraint=constraint, begun=begun)
        self._new.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Free what the request has at the next step; nothing where it has ended."""
        self._gone.append(number)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._asked or self._new)

    def step(self, weights: Weights) -> list[Event]:
        """Do what is next -> what it has brought. Without requests nothing.

        Where it fails, or is interrupted, the next one begins anew with what every request had before."""
        began, called = time.perf_counter(), self.programs.seconds
        self._untold += self._arrivals()
        if self.over:
            return []
        plans = [lane.plan() for lane in self._lanes]
        try:
            found, dispatched = self.programs.run(weights, plans), time.perf_counter()
            if found is None:
                self.programs.wait()
            else:
                found = self._fetched(found, plans)
        except BaseException:  # pages may be half written, or given away
            self.free()
            raise
        self._counts["seconds_waited"] += time.perf_counter() - dispatched + self.programs.seconds - called
        events, self._untold = self._untold, []
        if found is not None:
            events += self._told(plans, found)
            events += self._doubted(plans, found)
        self._counts["seconds"] += time.perf_counter() - began
        self._counts["steps"] += 1
        return events

    def end(self) -> None:
        """The step that is the last: it tells the other processes."""
        self.over = exchange((), (), over=True).over

    def warm_up(self, weights: Weights) -> None:
        """See ``Programs.warm_up``: no request waits for a compiler behind it."""
        self.programs.warm_up(weights)

    def forget(self) -> None:
        """The weights are others: running requests go on, prefixes read by the former ones are lent to nobody."""
        for lane in self._lanes:
            lane.forget()

    def free(self) -> None:
        """Let the pages go until a step needs some: running requests begin anew with what they were answered."""
        for lane in self._lanes:
            lane.start_over()
        self.programs.free()

    def metrics(self) -> dict[str, float]:
        """Of now: requests that wait and run, pages that are held. Since the start: tokens of prompts, and of who had
        to give way once more, and those of them that were found in the cache; tokens answered, requests that had to
        give way, programs compiled behind ``warm_up``, steps, and the seconds that they took in all and that were spent
        waiting for the device; with drafts, how many there were in the first place behind a token, the second, …, and
        of these how many were kept, which all before them must be."""
        total = lambda of: float(sum(of(lane) for lane in self._lanes))  # noqa: E731
        places = range(1, 1 + self.programs.serving.drafts)
        names = [f"drafts_{place}{which}" for place in places for which in ("", "_kept")]
        names += ["tokens", "steps", "seconds", "seconds_waited"]
        return {
            "waiting": total(lambda lane: len(lane.waiting)) + len(self._new),
            "running": total(lambda lane: len(lane.running)),
            "pages": total(lambda lane: lane.pages.count),
            "pages_held": total(lambda lane: lane.pages.count - lane.pages.available),
            "prompt_tokens": total(lambda lane: lane.prompt_tokens),
            "found_tokens": total(lambda lane: lane.found_tokens),
            "preemptions": total(lambda lane: lane.preemptions),
            "compiles": float(self.programs.late),
            **{name: self._counts[name] for name in names},
        }

    def check(self) -> None:
        """AssertionError where a page or a slot is lost."""
        for lane in self._lanes:
            lane.check()

    def _arrivals(self) -> list[Event]:
        """Hand new requests to the lane that has most of their prompt, or fewest requests; take back those given up,
        and those whose grammar cannot be gone on with."""
        gone = [self._gone.popleft() for _ in range(len(self._gone))]  # whose requests have come, then, all the same
        new = [self._new.popleft() for _ in range(len(self._new))]
        for request in filter(lambda each: each.constraint is not None, new):
            self._held.find(request)
        told = exchange(new, gone, self._held.found())
        self.over = told.over
        for request in told.new:
            if request.sampling.constrained:
                self._held.wait(request)
            lane = self._lane(request.known)
            self._asked[request.number] = request, lane
            lane.submit(request)
        events = []
        for number in filter(self._asked.__contains__, told.gone):
            events += self._give_up(Event(number, [], [], "cancelled"))
        for number, error in told.settled:
            if number in self._asked:
                self._asked[number][0].unsettled -= 1
                events += self._give_up(Event(number, [], [], "error", error=error)) if error else []
        return events

    def _give_up(self, event: Event) -> list[Event]:
        """A request that all processes know, with its last event, where that is this one's."""
        request, lane = self._asked.pop(event.number)
        lane.cancel(request)
        self._held.forget(event.number)
        return [event] * self._own(event.number)

    def _doubted(self, plans: list[Plan], found: Decoded) -> list[Event]:
        """Requests whose scores were NaN have got nothing of this step. Whatever they have written in pages, nobody
        shall find: kernels may multiply what stands behind a row's end by zero. So all begin anew on clean pages, for
        one may have had another's; whose scores are NaN there, too, is given up."""
        nan_B, rows, events = _nan(found), self.programs.rows(plans), list[Event]()
        if not nan_B.any():
            return []
        for lane, plan in enumerate(plans):
            for request in (r for i, r in enumerate(plan.decoded, lane * rows) if nan_B[i]):
                if request.doubted:
                    events += self._give_up(Event(request.number, [], [], "error", error=_NAN, ours=True))
                request.doubted = True
        self.free()
        return events

    def _own(self, number: int) -> bool:
        return number % jax.process_count() == self._process

    def _lane(self, ids_T: np.ndarray) -> Schedule:
        """With most of the prompt, of those that have no more than one request above the fewest."""
        busy = [len(lane.waiting) + len(lane.running) for lane in self._lanes]
        has = [len(lane.pages.find(ids_T).pages) if len(busy) > 1 else 0 for lane in self._lanes]
        among = [i for i in range(len(busy)) if busy[i] <= min(busy) + 1]
        return self._lanes[min(among, key=lambda i: (-has[i], busy[i]))]

    def _fetched(self, found: Decoded, plans: list[Plan]) -> Decoded:
        """On the host; alternatives only where anybody asks for them."""
        if not any(request.sampling.alternatives for plan in plans for request in plan.decoded):
            found = dataclasses.replace(found, likely_BNA=None, likely_logprobs_BNA=None)
        return jax.device_get(found)

    def _told(self, plans: list[Plan], found: Decoded) -> list[Event]:
        events, rows = [], self.programs.rows(plans)
        tokens, logprobs, stopped = (x.tolist() for x in (found.tokens_BN, found.logprobs_BN, found.stopped_B))
        drafts = found.drafts_BK.tolist()
        for k, (made, right) in enumerate(np.sum(found.counts_BK2, axis=0).tolist(), 1):
            self._counts[f"drafts_{k}"] += made
            self._counts[f"drafts_{k}_kept"] += right
        counts = np.where(_nan(found), 0, np.sum(np.asarray(found.tokens_BN) >= 0, axis=1)).tolist()
        for lane, (schedule, plan) in enumerate(zip(self._lanes, plans, strict=True)):
            for i, request in enumerate(plan.decoded, lane * rows):
                if not (count := counts[i]):
                    continue
                ended = stopped[i] or count >= request.left
                schedule.answered(request, tokens[i][:count], ended=ended)
                request.drafts, request.doubted = drafts[i] if request.constraint is None else [], False
                reason = ("stop" if stopped[i] else "length") if ended else ""
                if self._own(request.number):
                    likely = self._likely(found, i, count, request.sampling.alternatives)
                    told = tokens[i][:count], logprobs[i][:count], reason, likely, request.cached
                    events.append(Event(request.number, *told))
                self._counts["tokens"] += count
                if ended:
                    del self._asked[request.number]
                elif request.constraint is not None:
                    request.constraint.advance(tokens[i][:count])
                    self._held.find(request)
                    self._held.wait(request)
        return events

    def _likely(self, found: Decoded, row: int, count: int, most: int) -> list[list[tuple[int, float]]]:
        if not most:
            return []
        ids, logprobs = (x[row, :count, :most].tolist() for x in (found.likely_BNA, found.likely_logprobs_BNA))
        return [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]


def _nan(found: Decoded) -> np.ndarray:
    """Of which rows a token's log-probability is none: so it is where any score was NaN, or infinite."""
    return np.any(np.isnan(found.logprobs_BN), axis=1)
