"""Requests answered as they come: schedules of what the device does, and the device doing it.

``generate`` stays beside it, for rows that all begin together: one program that no host has to follow, on which
rollouts that are sampled ahead of training, the replay of routing and several processes are built.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.paged import STOPS, Decoded, Rows, copy_pages, decode, empty_pages, read
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.schedule import Buckets, Piece, Plan, Request, Schedule, ServingConfig, fitting
from deepseek_jax.parallel.processes import require_one_process
from deepseek_kernels import choose

Weights = tuple[Any, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step has brought to a request. finish_reason: "" while it goes on, ``stop``, ``length``, ``cancelled``.
    logprobs: of each token by the network alone, before temperature, penalties and cuts. alternatives: of each token,
    as many as were asked for, (token, log-probability) from the most likely on."""

    number: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Asked:
    request: Request
    lane: int
    numbers: np.ndarray
    shares: np.ndarray


class _Job(NamedTuple):
    """A program of ``paged`` and what it is given behind weights and cache."""

    function: Any
    arrays: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return self.function, self.options, *(array.shape for array in jax.tree.leaves(self.arrays))


class Continuous:
    """A cache in pages on a mesh, and the requests that it is for. ``submit`` and ``cancel`` from any thread; ``step``,
    ``forget`` and ``warm_up`` one at a time.

    Each device of the batch has a lane, which is a schedule with slots and pages of its own.
    """

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, mesh: Mesh, serving: ServingConfig, stop_ids: Sequence[int]
    ):
        require_one_process("serving")
        self.config, self.compute, self.mesh, self.serving = config, compute, mesh, serving
        self.context = serving.tokens(config.max_position_embeddings)
        self.buckets = Buckets.of(serving, self.context, gathers=_gathers(config, compute, serving))
        self._stop_ids = tuple(stop_ids)
        lanes = math.prod(mesh.shape[axis] for axis in compute.rules.batch)
        self._lanes = [Schedule(serving, self.buckets) for _ in range(lanes)]
        self._asked: dict[int, _Asked] = {}
        self._new: collections.deque[_Asked] = collections.deque()
        self._gone: collections.deque[int] = collections.deque()
        self._numbers = itertools.count()
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._warm = False
        self._counts: dict[str, float] = collections.defaultdict(float)
        with jax.set_mesh(mesh):
            fp8 = serving.cache == "float8_e4m3"
            self._pages = empty_pages(config, compute, lanes * serving.pages, serving.page, fp8)

    def submit(self, ids: Sequence[int], sampling: SamplingParams, *, draw: int = 0) -> int:
        """Queue a prompt -> its number. draw: which sample of this prompt and seed it is. ValueError for what can never
        be answered."""
        if not ids or not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            wrong = f"has the ids {min(ids)}…{max(ids)}" if ids else "has no tokens"
            raise ValueError(f"the prompt {wrong}: expected ids from 0 to below vocab_size={self.config.vocab_size}")
        if len(ids) + sampling.max_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_tokens={sampling.max_tokens} pass context={self.context}"
            )
        if (stops := len(self._stop_ids) + len(sampling.stop_token_ids)) > STOPS:
            raise ValueError(f"{stops} ids that end an answer, the tokenizer's among them: expected at most {STOPS}")
        if (biased := max((token for token, _ in sampling.logit_bias), default=0)) >= self.config.vocab_size:
            raise ValueError(f"logit_bias has the id {biased}: expected below vocab_size={self.config.vocab_size}")
        request = Request(next(self._numbers), list(ids), sampling, draw)
        self._new.append(_Asked(request, 0, *Rows.described(sampling, self._stop_ids, draw)))
        return request.number

    def cancel(self, number: int) -> None:
        """Free what the request has at the next step; nothing where it has ended."""
        self._gone.append(number)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._asked or self._new)

    def step(self, weights: Weights) -> list[Event]:
        """Do what is next -> what it has brought. Without requests nothing."""
        began = time.perf_counter()
        events = self._arrivals()
        plans = [lane.plan() for lane in self._lanes]
        with jax.set_mesh(self.mesh):
            if any(plan.copies for plan in plans):
                self._run(weights, self._copies([plan.copies for plan in plans]))
            if any(plan.pieces for plan in plans):
                self._run(weights, self._reading([plan.pieces for plan in plans]))
            if any(plan.decoded for plan in plans):
                found, dispatched = self._run(weights, self._decoding(plans)), time.perf_counter()
                found = self._fetched(found, plans)
                self._counts["seconds_waited"] += time.perf_counter() - dispatched
                events += self._told(plans, found)
        self._counts["seconds"] += time.perf_counter() - began
        self._counts["steps"] += 1
        return events

    def forget(self) -> None:
        """The weights are others: running requests go on, prefixes read by the former ones are lent to nobody."""
        for lane in self._lanes:
            lane.forget()

    def metrics(self) -> dict[str, float]:
        """Of now: requests that wait and run, pages that are held. Since the start: tokens of prompts, those that were
        found in the cache, tokens answered, requests that had to give way, programs compiled behind ``warm_up``, steps,
        and the seconds that they took in all and that were spent waiting for the device."""
        total = lambda of: float(sum(of(lane) for lane in self._lanes))  # noqa: E731
        names = ("tokens", "compiles", "steps", "seconds", "seconds_waited")
        return {
            "waiting": total(lambda lane: len(lane.waiting)) + len(self._new),
            "running": total(lambda lane: len(lane.running)),
            "pages": total(lambda lane: lane.pages.count),
            "pages_held": total(lambda lane: lane.pages.count - lane.pages.available),
            "prompt_tokens": total(lambda lane: lane.prompt_tokens),
            "found_tokens": total(lambda lane: lane.found_tokens),
            "preemptions": total(lambda lane: lane.preemptions),
            **{name: self._counts[name] for name in names},
        }

    def check(self) -> None:
        """AssertionError where a page or a slot is lost."""
        for lane in self._lanes:
            lane.check()

    def warm_up(self, weights: Weights) -> None:
        """Compile, side by side, every program that a request may need, and run each on nothing."""
        lanes, buckets = len(self._lanes), self.buckets
        jobs = [self._copies([[] for _ in range(lanes)])]
        for (rows, size), table, fresh in itertools.product(buckets.chunks, buckets.tables, (True, False)):
            if not fresh or table == buckets.tables[-1]:
                jobs.append(self._reads([[] for _ in range(lanes)], rows, size, table, fresh))
        for rows, table in itertools.product(buckets.slots, buckets.tables):
            jobs.append(self._decodes([[] for _ in range(lanes)], rows, table, 0, until_end=False))
        with jax.set_mesh(self.mesh):
            missing = {job.key: self._lowered(weights, job) for job in jobs if job.key not in self._programs}
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda lowered: lowered.compile(), missing.values())
                self._programs |= dict(zip(missing, compiled, strict=True))
            for job in jobs:
                self._run(weights, job)
            jax.block_until_ready(self._pages)
        self._warm = True

    def _arrivals(self) -> list[Event]:
        """Hand new requests to the lane that has most of their prompt, or fewest requests; take back those given up."""
        while self._new:
            asked = self._new.popleft()
            ids_T = np.array(asked.request.ids, np.int32)
            busy = [len(lane.waiting) + len(lane.running) for lane in self._lanes]
            has = [len(lane.pages.find(ids_T).pages) if len(busy) > 1 else 0 for lane in self._lanes]
            lane = min(range(len(busy)), key=lambda i: (-has[i] if busy[i] <= min(busy) + 1 else 1, busy[i]))
            asked.lane = lane
            self._asked[asked.request.number] = asked
            self._lanes[lane].submit(asked.request)
        events = []
        while self._gone:
            asked = self._asked.pop(number := self._gone.popleft(), None)
            if asked is not None:
                self._lanes[asked.lane].cancel(asked.request)
                events.append(Event(number, [], [], "cancelled"))
        return events

    def _copies(self, copies: list[list[tuple[int, int]]]) -> _Job:
        slots = self.serving.slots
        source = np.zeros(len(copies) * slots, np.int32)
        target = np.full(len(copies) * slots, self.serving.pages, np.int32)
        for lane, pairs in enumerate(copies):
            for i, (page, to) in enumerate(pairs, lane * slots):
                source[i], target[i] = page, to
        return _Job(copy_pages, (source, target))

    def _reading(self, pieces: list[list[Piece]]) -> _Job:
        together = [piece for some in pieces for piece in some]
        most, size = max(map(len, pieces)), max(piece.count for piece in together)
        rows, size = next(shape for shape in self.buckets.chunks if shape[0] >= most and shape[1] >= size)
        fresh = not any(piece.start for piece in together)
        pages = max(len(piece.request.pages) for piece in together)
        table = self.buckets.tables[-1] if fresh else fitting(self.buckets.tables, pages)
        return self._reads(pieces, rows, size, table, fresh)

    def _reads(self, pieces: list[list[Piece]], rows: int, size: int, table: int, fresh: bool) -> _Job:
        tokens_BS = np.zeros((len(pieces) * rows, size), np.int32)
        start_B = np.zeros(len(pieces) * rows, np.int32)
        table_BJ = np.full((len(pieces) * rows, table), -1, np.int32)
        for lane, some in enumerate(pieces):
            for i, piece in enumerate(some, lane * rows):
                tokens_BS[i, : piece.count] = piece.request.ids[piece.start : piece.start + piece.count]
                start_B[i] = piece.start
                table_BJ[i, : len(piece.request.pages)] = piece.request.pages
        return _Job(read, (tokens_BS, start_B, table_BJ), (("fresh", fresh),))

    def _decoding(self, plans: list[Plan]) -> _Job:
        decoded = [plan.decoded for plan in plans]
        table = fitting(self.buckets.tables, max(len(request.pages) for some in decoded for request in some))
        turns = min(plan.turns for plan in plans if plan.decoded)
        until_end = any(plan.until_end for plan in plans)
        return self._decodes(decoded, self._rows(plans), table, turns, until_end=until_end)

    def _rows(self, plans: list[Plan]) -> int:
        return fitting(self.buckets.slots, max(len(plan.decoded) for plan in plans))

    def _decodes(self, decoded: list[list[Request]], rows: int, table: int, turns: int, *, until_end: bool) -> _Job:
        filled = Rows.filling(len(decoded) * rows, table)
        for lane, some in enumerate(decoded):
            for i, request in enumerate(some, lane * rows):
                asked, ids = self._asked[request.number], request.ids
                filled.numbers_BK[i], filled.shares_BF[i] = asked.numbers, asked.shares
                filled.numbers_BK[i, :3] = ids[-1], request.length, len(ids) - request.prompt
                filled.table_BJ[i, : len(request.pages)] = request.pages
        given = filled, np.int32(turns), np.bool_(until_end)
        return _Job(decode, given, (("most", self.serving.turns),))

    def _run(self, weights: Weights, job: _Job) -> Any:
        """Hand it to the device -> what it will have decoded, if that is what it does."""
        program = self._programs.get(job.key)
        if program is None:
            self._counts["compiles"] += self._warm
            program = self._programs[job.key] = self._lowered(weights, job).compile()
        given = () if job.function is copy_pages else weights
        done = program(*given, self._pages, *job.arrays)
        self._pages, found = done if job.function is decode else (done, None)
        return found

    def _lowered(self, weights: Weights, job: _Job) -> Any:
        compute = self.compute
        if job.function is read:  # rows of a prompt keep the device busy: nothing is gained by many copies of a layer
            compute = dataclasses.replace(compute, scan_unroll=1)
        given = (compute,) if job.function is copy_pages else (self.config, compute, *weights)
        return job.function.lower(*given, self._pages, *job.arrays, **dict(job.options))

    def _fetched(self, found: Decoded, plans: list[Plan]) -> Decoded:
        """On the host; alternatives only where anybody asks for them."""
        if not any(request.sampling.alternatives for plan in plans for request in plan.decoded):
            found = dataclasses.replace(found, likely_BNA=None, likely_logprobs_BNA=None)
        return jax.device_get(found)

    def _told(self, plans: list[Plan], found: Decoded) -> list[Event]:
        events, rows = [], self._rows(plans)
        tokens, logprobs, stopped = (x.tolist() for x in (found.tokens_BN, found.logprobs_BN, found.stopped_B))
        counts = np.sum(np.asarray(found.tokens_BN) >= 0, axis=1).tolist()
        for lane, plan in enumerate(plans):
            for i, request in enumerate(plan.decoded, lane * rows):
                if not (count := counts[i]):
                    continue
                ended = stopped[i] or count >= request.left
                self._lanes[lane].answered(request, tokens[i][:count], ended=ended)
                reason = ("stop" if stopped[i] else "length") if ended else ""
                likely = self._likely(found, i, count, request.sampling.alternatives)
                events.append(Event(request.number, tokens[i][:count], logprobs[i][:count], reason, likely))
                self._counts["tokens"] += count
                if ended:
                    del self._asked[request.number]
        return events

    def _likely(self, found: Decoded, row: int, count: int, most: int) -> list[list[tuple[int, float]]]:
        if not most:
            return []
        ids, logprobs = (x[row, :count, :most].tolist() for x in (found.likely_BNA, found.likely_logprobs_BNA))
        return [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]


def _gathers(config: ModelConfig, compute: ComputeConfig, serving: ServingConfig) -> bool:
    """Whether attention over pages is over a copy of them."""
    if config.attention != "mla":
        return True
    width, fp8 = config.cache_numbers_per_token_layer, serving.cache == "float8_e4m3"
    facts = {"by_column": True, "queries": 1, "keys": serving.page, "page": serving.page, "fp8": fp8}
    facts |= {"key_width": width, "value_width": config.kv_lora_rank}
    chosen = choose("mla_decode", compute.kernels, compute.dtype, implementation=compute.decode_attention, **facts)
    return chosen.name not in ("hopper", "tpu")
