"""A cache in pages on a mesh, and what plans have the device do with it: compiled once for each shape, beforehand."""

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference import decoding, generate
from deepseek_jax.inference.buckets import Buckets, fitting
from deepseek_jax.inference.decoding import Decoded, decode
from deepseek_jax.inference.kept import Kept
from deepseek_jax.inference.lowered import Program, check_dtypes, holding
from deepseek_jax.inference.paged import copy_pages, empty_pages, read, reads_pages
from deepseek_jax.inference.plans import DecodePlan, Piece, ReadPlan, Request
from deepseek_jax.inference.rows import Numbers, Rows, State
from deepseek_jax.inference.scores import Scores
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.inference.under_way import Scored
from deepseek_jax.inference.weights import Weights
from deepseek_jax.parallel.processes import meet

logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    """A program of ``paged`` or ``decoding`` and what it is given behind weights and cache."""

    function: Any
    arrays: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    found: Any = None  # the class of what it returns beside the cache

    @property
    def key(self) -> tuple[Any, ...]:
        return self.function, self.options, *(array.shape for array in jax.tree.leaves(self.arrays))


class _Here:
    """In the place of an executor: what is submitted is done at once."""

    def submit(self, function: Callable[..., Any], *given: Any) -> Future[Any]:
        done = Future[Any]()
        try:
            done.set_result(function(*given))
        except BaseException as error:
            done.set_exception(error)
        return done


class Programs:
    """The device's side of ``lanes`` schedules. ahead: a thread of its own sends it what it is to do, one after the
    other, since on GPUs some calls last as long as what they start, as where the host is asked how a loop goes on.

    late: programs that were compiled behind ``warm_up``, while a request waited for it. forced: see ``Continuous``.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        mesh: Mesh,
        serving: ServingConfig,
        buckets: Buckets,
        lanes: int,
        forced: float = 0.0,
        *,
        ahead: bool = False,
    ):
        self.forced = forced
        self.config, self.compute, self.mesh, self.serving = config, compute, mesh, serving
        self.buckets, self.lanes, self.late = buckets, lanes, 0
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._anything: dict[int, jax.Array] = {}
        self._warm = False
        self._pages: Any = None
        self._calls = ThreadPoolExecutor(1, "device") if ahead else _Here()
        self._last = self._calls.submit(lambda: None)
        self._fill()

    def _fill(self) -> None:
        """Make pages of zeros, unless some are there."""
        if self._pages is not None:
            return
        serving = self.serving
        with jax.set_mesh(self.mesh):
            sizes = self.lanes * serving.pages, serving.page
            self._pages = empty_pages(self.config, self.compute, *sizes, serving.cache)
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._pages)

    def free(self) -> None:
        """Give the devices the pages back, behind what is under way, until there is something to be done again."""
        self._last = self._calls.submit(self._let_go)
        self._last.result()

    def _let_go(self) -> None:
        self._pages = None

    def read(self, weights: Weights, plans: Sequence[ReadPlan]) -> Scored:
        """Have copied and read in what the lanes plan -> scores of the pieces that ask for some."""
        scored = []
        if any(plan.copies for plan in plans):
            self._send(weights, self._copies([plan.copies for plan in plans]))
        if any(plan.pieces for plan in plans):
            for (rows, size), pieces in self.buckets.reads([plan.pieces for plan in plans]):
                job = self._reading(pieces, rows, size)
                found = self._send(weights, job)
                if job.found is not None:
                    lanes = [enumerate(some, lane * rows) for lane, some in enumerate(pieces)]
                    scored.append(([(piece, row) for lane in lanes for row, piece in lane], found))
        return scored

    def decode(
        self, weights: Weights, plans: Sequence[DecodePlan], before: Future[Decoded] | None = None
    ) -> Future[Decoded]:
        """Have decoded what the lanes plan, row by row as ``rows`` has them. before: a step of the same rows that is
        under way, behind which this one begins."""
        return self._send(weights, self._decoding(plans), before)

    def wait(self) -> None:
        """Return when the device has done it all: whoever comes next shall not stand behind a queue of chunks."""
        self._last.result()
        self._calls.submit(lambda: jax.block_until_ready(self._pages)).result()

    def sent(self) -> None:
        """Return when nothing is on its way to the device, and nobody but it has what was given to it."""
        self._calls.submit(lambda: None).result()

    def rows(self, plans: Sequence[DecodePlan]) -> int:
        """Of each lane in decoding: request i of lane l is row ``l · rows + i``."""
        return fitting(self.buckets.slots, max(len(plan.decoded) for plan in plans))

    def warm_up(self, weights: Weights) -> None:
        """Compile, side by side, every program that a plan may need, and run each on nothing."""
        self._fill()
        buckets, nobody = self.buckets, [[] for _ in range(self.lanes)]
        jobs = [self._copies(nobody)]
        scoring = (None, 0) if self.serving.score else (None,)
        for rows, table in itertools.product(buckets.slots, buckets.tables):  # what compiles longest comes first
            jobs.append(self._decodes(nobody, rows, table, 0, until_end=False))
        for (rows, size), alternatives in itertools.product(buckets.chunks, scoring):
            jobs.append(self._reads(nobody, rows, size, buckets.tables[-1], alternatives, fresh=True))
            jobs += [self._reads(nobody, rows, size, table, alternatives, fresh=False) for table in buckets.long]
        with jax.set_mesh(self.mesh):
            kept = Kept.of(self.mesh)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                missing = {job.key: job for job in jobs if job.key not in self._programs}
                compiled = {key: pool.submit(self._lowered(weights, job, kept).compile) for key, job in missing.items()}
            self._programs |= {key: each.result() for key, each in compiled.items()}
            if kept is not None:
                kept.close()
            meet()  # a process that is still compiling would have the others wait in collectives
            for job in jobs:
                self._send(weights, job).result()
        self.wait()
        self._warm = True

    def _copies(self, copies: Sequence[Sequence[tuple[int, int]]]) -> _Job:
        slots = self.serving.slots
        source = np.zeros(len(copies) * slots, np.int32)
        target = np.full(len(copies) * slots, self.serving.pages, np.int32)
        for lane, pairs in enumerate(copies):
            for i, (page, to) in enumerate(pairs, lane * slots):
                source[i], target[i] = page, to
        return _Job(copy_pages, (source, target))

    def _reading(self, pieces: Sequence[Sequence[Piece]], rows: int, size: int) -> _Job:
        together = [piece for some in pieces for piece in some]
        fresh = not any(piece.start for piece in together)
        pages = max(len(piece.request.pages) for piece in together)
        table = self.buckets.tables[-1] if fresh else fitting(self.buckets.long, pages)
        asked = [piece.request.sampling.alternatives for piece in together if piece.scores is not None]
        return self._reads(pieces, rows, size, table, max(asked, default=None), fresh=fresh)

    def _reads(
        self,
        pieces: Sequence[Sequence[Piece]],
        rows: int,
        size: int,
        table: int,
        alternatives: int | None,
        *,
        fresh: bool,
    ) -> _Job:
        """alternatives: of a job that scores the tokens, else None."""
        scored = alternatives is not None
        more = bool(self.serving.drafts) or scored  # each token with the next
        tokens_BS = np.zeros((len(pieces) * rows, size + more), np.int32)
        start_B = np.zeros(len(pieces) * rows, np.int32)
        table_BJ = np.full((len(pieces) * rows, table), -1, np.int32)
        for lane, some in enumerate(pieces):
            for i, piece in enumerate(some, lane * rows):
                ids = piece.request.ids[piece.start : piece.start + piece.count + more]
                tokens_BS[i, : len(ids)] = ids
                start_B[i] = piece.start
                table_BJ[i, : len(piece.request.pages)] = piece.request.pages
        how = (np.int32(alternatives),) if scored else ()
        return _Job(read, (tokens_BS, start_B, table_BJ, *how), (("fresh", fresh),), Scores if scored else None)

    def _decoding(self, plans: Sequence[DecodePlan]) -> _Job:
        decoded = [plan.decoded for plan in plans]
        table = fitting(self.buckets.tables, max(len(request.pages) for some in decoded for request in some))
        turns = min(plan.turns for plan in plans if plan.decoded)
        until_end = any(plan.until_end for plan in plans)
        return self._decodes(decoded, self.rows(plans), table, turns, until_end=until_end)

    def _decodes(
        self, decoded: Sequence[Sequence[Request]], rows: int, table: int, turns: int, *, until_end: bool
    ) -> _Job:
        filled, allowed = Rows.filling(len(decoded) * rows, table), dict[int, np.ndarray]()
        for lane, some in enumerate(decoded):
            if not some:
                continue
            here = slice(lane * rows, lane * rows + len(some))
            filled.numbers_BK[here], filled.shares_BF[here] = zip(*(request.row for request in some), strict=True)
            said = [(request.ids[-1], request.length, len(request.ids) - request.prompt) for request in some]
            filled.state_BK[here, : len(State._fields)] = said
            held_BJ = np.arange(table) < np.array([len(request.pages) for request in some])[:, None]
            filled.table_BJ[here][held_BJ] = [page for request in some for page in request.pages]
            for i, request in enumerate(some, lane * rows):
                if request.drafts:
                    filled.drafts[i, : len(request.drafts)] = request.drafts
                if request.constraint is not None:
                    allowed[i] = request.constraint.allowed_V
                    filled.numbers_BK[i, Numbers._fields.index("most")] = len(request.ids) - request.prompt + 1
        filled = dataclasses.replace(filled, allowed_BV=self._allowed(len(decoded) * rows, allowed))
        given = filled, np.int32(turns), np.bool_(until_end)
        options = ("most", self.serving.turns), ("drafts", self.serving.drafts), ("forced", self.forced)
        return _Job(decode, given, options, Decoded)

    def _allowed(self, batch: int, allowed: dict[int, np.ndarray]) -> jax.Array:
        """Of each row the tokens that it may draw next, see ``Rows``; where nobody is held to a grammar the array that
        is there, of all tokens."""
        if allowed or batch not in self._anything:
            bits_BV = np.full((batch, -(-self.config.vocab_size // 32)), -1, np.int32)
            for row, allowed_V in allowed.items():
                bits_BV[row] = allowed_V
            split = NamedSharding(self.mesh, PartitionSpec(self.compute.rules.batch))
            placed = jax.make_array_from_callback(bits_BV.shape, split, bits_BV.__getitem__)
            if allowed:
                return placed
            self._anything[batch] = placed
        return self._anything[batch]

    def _send(self, weights: Weights, job: _Job, before: Future[Decoded] | None = None) -> Future[Any]:
        self._fill()
        program = self._programs.get(job.key)
        if program is None:
            self.late += self._warm
            with jax.set_mesh(self.mesh):
                program = self._programs[job.key] = self._lowered(weights, job).compile()
            meet()
        idle, begun = self._last.done(), threading.Event()
        self._last = self._calls.submit(self._call, begun, self._last, program, weights, job, before)
        if idle:  # it has the interpreter until the device has its work
            begun.wait()
        return self._last

    def _call(
        self,
        begun: threading.Event,
        last: Future[Any],
        program: Any,
        weights: Weights,
        job: _Job,
        before: Future[Decoded] | None,
    ) -> Any:
        begun.set()
        last.result()  # behind a call that has failed pages hold something else, until ``free``
        arrays, given = job.arrays, () if job.function is copy_pages else weights
        if before is not None:
            rows, *how = arrays
            arrays = dataclasses.replace(rows, state_BK=before.result().state_BK), *how
        with jax.set_mesh(self.mesh):
            done = program(*given, self._pages, *arrays)
        self._pages, found = (done, None) if job.function is copy_pages else done
        return found

    def _lowered(self, weights: Weights, job: _Job, kept: Kept | None = None) -> Any:
        check_dtypes(leaf.dtype for leaf in jax.tree.leaves(weights))
        function, compute, pages, options = job.function, self.compute, self._like, dict(job.options)
        if function is copy_pages:
            program = Program(function, (compute,), (pages, *job.arrays), options, 0, jax.tree.structure(pages), None)
        else:
            if function is read:  # rows of a prompt keep the device busy: nothing is gained by many copies of a layer
                compute = dataclasses.replace(compute, scan_unroll=1)
            gives = jax.tree.structure((pages, None if job.found is None else holding(job.found)))
            arrays = *weights, pages, *job.arrays
            compiler = generate.OPTIONS if function is read else decoding.OPTIONS
            program = Program(function, (self.config, compute), arrays, options, 2, gives, compiler)
        return program.lower() if kept is None else kept.lowered(program)


def gathers(config: ModelConfig, compute: ComputeConfig, serving: ServingConfig) -> bool:
    """Whether attention over pages is over a copy of them."""
    fp8 = serving.cache == "float8_e4m3"
    if reads_pages(config, compute, serving.page, queries=1 + serving.drafts, fp8=fp8):
        return False
    if config.attention != "mla":
        level = logging.INFO if compute.kernels.platform == "cpu" else logging.WARNING
        logger.log(level, "attention=%r: each token's attention reads a copy of its row's pages", config.attention)
    return True
