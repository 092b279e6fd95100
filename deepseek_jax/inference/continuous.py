"""Requests answered as they come: schedules of what the device does, and the device doing it.

``generate`` stays beside it, for rows that all begin together: one program that no host has to follow, on which
rollouts that are sampled ahead of training and the replay of routing are built.

Of several processes each has all schedules, and before a step all tell who comes and goes: so their plans are the same,
as long as nothing in a plan depends on a clock, a thread or an order of sets.
"""

import collections
import itertools
import math
import time
import traceback
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.arrivals import exchange
from deepseek_jax.inference.buckets import Buckets
from deepseek_jax.inference.constraints import Constraint
from deepseek_jax.inference.decoding import Decoded
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.held import Held
from deepseek_jax.inference.lanes import Lanes
from deepseek_jax.inference.plans import DecodePlan, Request
from deepseek_jax.inference.programs import Programs, gathers
from deepseek_jax.inference.prompt_scores import pairs
from deepseek_jax.inference.rows import Rows, check_request
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.schedule import Schedule
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.inference.speculation import check_drafts
from deepseek_jax.inference.under_way import Scored, UnderWay
from deepseek_jax.inference.weights import Weights

_NAN = "the network's scores are no numbers (NaN), on clean pages too: its weights or a device are damaged"


class Continuous:
    """A cache in pages on a mesh, and the requests that it is for. ``submit`` and ``cancel`` from any thread; ``step``,
    ``forget`` and ``warm_up`` one at a time.

    Each device of the batch has a lane, which is a schedule with slots and pages of its own. Of several processes all
    take each step, and warm up, together; each is told of its own requests. over: one of them has ended it.

    ahead: ``step`` returns while the device is at what comes next, and has sent it that before it looks at what the
    step before has brought; a CPU's programs take the cores that this would take.
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
        ahead: bool | None = None,
    ):
        """config: with the MTP module where ``serving.drafts`` are asked for, and without it else. begin: see
        ``Held``. forced: for measurements alone, see ``speculation.forced``: answers mean nothing; 0: the network has
        its say. ahead: by default but on CPUs."""
        check_drafts(config, serving.drafts)
        self.context = serving.tokens(config.max_position_embeddings)
        self._width, self._stop_ids = config.vocab_size, tuple(stop_ids)
        least = 16 if compute.kernels.platform == "cpu" else 128  # elsewhere reading the weights takes as long
        buckets = Buckets.of(serving, self.context, gathers=gathers(config, compute, serving), least=least)
        lanes = math.prod(mesh.shape[axis] for axis in compute.rules.batch)
        self.ahead = serving.turns > 1 and (compute.kernels.platform != "cpu" if ahead is None else ahead)
        self.programs = Programs(config, compute, mesh, serving, buckets, lanes, forced, ahead=self.ahead)
        self.slots = lanes * serving.slots
        self._sent: UnderWay | None = None
        self._lanes = Lanes(Schedule(serving, buckets, ahead=self.ahead) for _ in range(lanes))
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
        check_request(ids, sampling, self._stop_ids, draw=draw, begun=begun, width=self._width, context=self.context)
        if sampling.prompt_logprobs and not self.programs.serving.score:
            raise ValueError(
                "prompt_logprobs (echo with logprobs): for an engine with ServingConfig(score=True), --serving.score"
            )
        row = Rows.described(sampling, self._stop_ids, draw, key, tempered=tempered)
        request = Request(next(self._numbers), list(ids), sampling, row=row, constraint=constraint, begun=begun)
        self._new.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Free what the request has at the next step; nothing where it has ended."""
        self._gone.append(number)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do, or to be told. Where there is not, nothing is under way."""
        return bool(self._asked or self._new or self._untold)

    def step(self, weights: Weights) -> list[Event]:
        """Do what is next -> what has come; ``ahead``, that is of the step before. Without requests nothing.

        Where it fails, or is interrupted, the next one begins anew with what every request had before."""
        began = time.perf_counter()
        self._untold += self._arrivals()
        if self.over:
            return []
        try:
            self._advance(weights)
        except BaseException as error:  # pages may be half written, or given away
            traceback.clear_frames(error.__traceback__)  # which has what has the error: in a circle, they keep pages
            self.free()
            raise
        self._counts["seconds"] += time.perf_counter() - began
        self._counts["steps"] += 1
        events, self._untold = self._untold, []
        return events

    def _advance(self, weights: Weights) -> None:
        scored, before = self._read(weights), self._sent
        if before is not None:
            self._sent = self._decode_ahead(weights, before) if scored is None else None
            if not self._settle(before):
                scored = None
            if self._sent is None:
                self._untold += self._arrivals()  # who has come, or knows a grammar's next, waits for no step more
                scored = self._read(weights) if scored is None else scored
        if self._sent is None:
            plans = [lane.plan_decode() for lane in self._lanes]
            anybody = any(plan.decoded for plan in plans)
            self._sent = UnderWay(plans, scored or [], self.programs.decode(weights, plans) if anybody else None)
        if not self.ahead or self._sent.decoded is None or not self._asked:  # those of its rows have ended
            before, self._sent = self._sent, None
            self._settle(before)

    def _read(self, weights: Weights) -> Scored | None:
        """Send what is to be read in next; None where there is nothing."""
        plans = [lane.plan_read() for lane in self._lanes]
        return self.programs.read(weights, plans) if any(plan.copies or plan.pieces for plan in plans) else None

    def _decode_ahead(self, weights: Weights, before: UnderWay) -> UnderWay | None:
        """Send the step behind one that is under way, where nobody has to know what that brings."""
        plans = list[DecodePlan]()
        for lane, last in zip(self._lanes, before.plans, strict=True):
            if (plan := lane.plan_ahead(last)) is None:
                return None
            plans.append(plan)
        return UnderWay(plans, [], self.programs.decode(weights, plans, before.decoded))

    def _settle(self, sent: UnderWay) -> bool:
        """Note what a step has brought. False where some scores were NaN, and all begin anew."""
        began = time.perf_counter()
        if sent.decoded is None:
            self.programs.wait()
        brought, rows = sent.fetch(), self.programs.rows(sent.plans)
        self._counts["seconds_waited"] += time.perf_counter() - began
        doubted = [request for request in brought.nan(rows) if request.number in self._asked]
        brought.keep_scores()
        if brought.decoded is not None:
            self._untold += self._told(sent.plans, brought.decoded, rows, doubted)
        self._untold += self._ended(sent.plans, doubted)
        self._untold += self._doubted(doubted)
        return not doubted

    def end(self) -> None:
        """The step that is the last: it tells the other processes."""
        self.over = exchange((), (), over=True).over

    def warm_up(self, weights: Weights) -> None:
        """See ``Programs.warm_up``: no request waits for a compiler behind it."""
        try:
            self.programs.warm_up(weights)
        except BaseException:  # as in ``step``
            self.free()
            raise

    def forget(self) -> None:
        """The weights will be others, once nobody but the device has the former ones: running requests go on, prefixes
        read by those are lent to nobody."""
        self.programs.sent()
        self._lanes.forget()

    def free(self) -> None:
        """Let the pages go until a step needs some: running requests begin anew with what they were answered."""
        self._sent = None
        self._lanes.start_over()
        self.programs.free()

    def metrics(self) -> dict[str, float]:
        """Of now: requests that wait and run, pages that are held. Since the start: tokens of prompts, and of who had
        to give way once more, and those of them that were found in the cache; tokens answered, requests that had to
        give way, programs compiled behind ``warm_up``, steps, and the seconds that they took in all and that were spent
        waiting for the device; with drafts, how many there were in the first place behind a token, the second, …, and
        of these how many were kept, which all before them must be."""
        places = range(1, 1 + self.programs.serving.drafts)
        names = [f"drafts_{place}{which}" for place in places for which in ("", "_kept")]
        names += ["tokens", "steps", "seconds", "seconds_waited"]
        found = {"compiles": float(self.programs.late), **{name: self._counts[name] for name in names}}
        return self._lanes.metrics(coming=len(self._new)) | found

    def check(self) -> None:
        """AssertionError where a page or a slot is lost."""
        self._lanes.check()

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
            lane = self._lanes.best(request.known)
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

    def _doubted(self, requests: list[Request]) -> list[Event]:
        """Requests whose scores were NaN have got nothing of this step. Whatever they have written in pages, nobody
        shall find: kernels may multiply what stands behind a row's end by zero. So all begin anew on clean pages, for
        one may have had another's; whose scores are NaN there, too, is given up."""
        events = list[Event]()
        for request in requests:
            if request.doubted:
                events += self._give_up(Event(request.number, [], [], "error", error=_NAN, ours=True))
            request.doubted = True
        if requests:
            self.free()
        return events

    def _own(self, number: int) -> bool:
        return number % jax.process_count() == self._process

    def _ended(self, plans: Sequence[DecodePlan], doubted: list[Request]) -> list[Event]:
        """The ends of those that ask for nothing behind their prompts."""
        events = []
        for schedule, plan in zip(self._lanes, plans, strict=True):
            for request in plan.read:
                if request in doubted or request.number not in self._asked:
                    continue
                schedule.answered(request, [], ended=True)
                del self._asked[request.number]
                if self._own(request.number):
                    told = request.number, [], [], "length"
                    events.append(Event(*told, cached=request.cached, prompt=request.scores))
        return events

    def _told(self, plans: Sequence[DecodePlan], found: Decoded, rows: int, doubted: list[Request]) -> list[Event]:
        events = []
        tokens, logprobs, stopped = (x.tolist() for x in (found.tokens_BN, found.logprobs_BN, found.stopped_B))
        drafts = found.drafts_BK.tolist()
        for k, (made, right) in enumerate(np.sum(found.counts_BK2, axis=0).tolist(), 1):
            self._counts[f"drafts_{k}"] += made
            self._counts[f"drafts_{k}_kept"] += right
        counts = np.sum(np.asarray(found.tokens_BN) >= 0, axis=1).tolist()
        for lane, (schedule, plan) in enumerate(zip(self._lanes, plans, strict=True)):
            for i, request in enumerate(plan.decoded, lane * rows):
                if not (count := counts[i]) or request in doubted or request.number not in self._asked:
                    continue
                ended = stopped[i] or count >= request.left
                schedule.answered(request, tokens[i][:count], ended=ended)
                request.drafts, request.doubted = drafts[i] if request.constraint is None else [], False
                reason = ("stop" if stopped[i] else "length") if ended else ""
                if self._own(request.number):
                    given = found.likely_BNA, found.likely_logprobs_BNA
                    likely = pairs(*given, i, count, request.sampling.alternatives)
                    told = tokens[i][:count], logprobs[i][:count], reason, likely, request.cached
                    events.append(Event(request.number, *told, prompt=request.scores))
                request.scores = None
                self._counts["tokens"] += count
                if ended:
                    del self._asked[request.number]
                elif request.constraint is not None:
                    request.constraint.advance(tokens[i][:count])
                    self._held.find(request)
                    self._held.wait(request)
        return events
