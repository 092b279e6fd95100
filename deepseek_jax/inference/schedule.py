"""Who is answered when: requests, their pages, and what the device does next, as shapes from a small set. No jax here.

As vLLM's scheduler does it, a step decodes for all who can and reads so many tokens of the oldest prompts in, so that a
long prompt delays nobody, and whoever came last gives way where pages run out; shapes come from ``Buckets``, as in
sglang-jax, since XLA compiles. Other than there, a prompt's last token is not read in but decoded: nothing but decoding
draws tokens, and a prompt that another has brought costs nothing.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from deepseek_jax.inference.pages import Found, Pages
from deepseek_jax.inference.plans import Piece, Plan, Request
from deepseek_jax.inference.prompt_scores import PromptScores
from deepseek_jax.typed import check_least, check_types

RATIO = 4  # from one size of a bucket to the next
_BUSY = 2048  # tokens that keep a device busy: of fewer, those that only fill a shape up cost little
MOST_DRAFTS = 3  # the kernels of decoding take four tokens of a row


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How requests are answered as they come (``Engine.submit``); sizes are those of one device of the batch's."""

    slots: int = 64
    """Requests that are answered at once."""
    pages: int = 1024
    """Pages of the cache."""
    page: int = 64
    """Tokens of a page; kernels take multiples of 64 on Hopper, of 128 on TPUs."""
    context: int = 0
    """Tokens of prompt and answer at most; 0: max_position_embeddings, or what all pages hold where that is less."""
    chunk: int = 512
    """Tokens of prompts that are read in between two tokens of the others' answers."""
    turns: int = 8
    """Tokens of each answer, or times a token and drafts, that are made without a look at who has come; one, while
    prompts are read in, an answer has none yet, or one is held to a grammar."""
    cache: Literal["compute", "bfloat16", "float8_e4m3"] = "compute"
    """What the cache keeps numbers in: the dtype that is computed in, or bfloat16, half of float32 (on a CPU from jax
    0.11 on); float8_e4m3: MLA's latents in groups of 128 with a scale."""
    drafts: int = 0
    """Tokens that the network's MTP module guesses of each answer, 0…3; those that it would have said itself are taken
    over, so that a turn brings up to so many more. For networks with such a module."""
    score: bool = False
    """Whether requests may ask for the log-probabilities of their prompts' tokens: twice the programs that read."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "slots", "pages", "page", "chunk", "turns")
        if not 0 <= self.drafts <= MOST_DRAFTS:
            raise ValueError(f"drafts={self.drafts}: expected 0…{MOST_DRAFTS}, of an MTP module that guesses so far")

    def tokens(self, most: int) -> int:
        """``context`` for a network of ``most`` positions."""
        room = min(most, self.pages * self.page)
        if self.context > room:
            raise ValueError(
                f"context={self.context}: expected at most {room}, of max_position_embeddings={most} and of "
                f"pages={self.pages} of {self.page} tokens"
            )
        return self.context or room


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that are compiled. slots: rows of a decoding step. chunks: (rows, tokens of each) that are read in.
    tables: pages of a row. cut: tokens from which on two pieces cost less than a shape that they would fill by half."""

    slots: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    tables: tuple[int, ...]
    cut: int

    @property
    def long(self) -> tuple[int, ...]:
        """The tables for which more of a prompt is read in: it is seldom short, and each is a program a chunk."""
        return self.tables[-2:]

    @classmethod
    def of(cls, config: ServingConfig, context: int, *, gathers: bool, least: int = 16) -> "Buckets":
        """gathers: a row costs what its table has room for, since no kernel reads pages. least: tokens of a chunk,
        fewer of which would not be read in sooner."""
        most = -(-context // config.page)
        busy = min(config.chunk, _BUSY)
        chunks = {(rows, size) for size in _sizes(config.chunk, least) for rows in _sizes(config.chunk // size, 1)}
        by_need = sorted(
            (shape for shape in chunks if shape[0] in (1, config.chunk // shape[1]) or math.prod(shape) >= busy),
            key=lambda shape: (shape[1], shape[0]),
        )
        return cls(_sizes(config.slots, 1), tuple(by_need), _sizes(most, 4) if gathers else (most,), cut=4 * least)

    def piece(self, unread: int) -> int:
        """How many of so many tokens to read in: as many as a chunk takes; but of those that would fill their shape by
        half or less as many as the next smaller one has room for."""
        sizes = [size for _, size in self.chunks]
        whole = min(unread, sizes[-1])
        below = sizes[max(sizes.index(fitting(sizes, whole)) - 1, 0)]
        return below if self.cut <= below < whole <= 2 * below else whole

    def reads(self, pieces: Sequence[Sequence[Piece]]) -> list[tuple[tuple[int, int], list[Sequence[Piece]]]]:
        """Lanes' pieces of prompts, and the shape that each lane has to hold them: one for all, or where one has many
        that are short and another a long one, the short ones by themselves first."""
        rows, sizes = max(map(len, pieces)), [max((piece.count for piece in some), default=0) for some in pieces]
        if shape := next((shape for shape in self.chunks if shape[0] >= rows and shape[1] >= max(sizes)), None):
            return [(shape, [*pieces])]
        size = fitting([size for _, size in self.chunks], min(filter(None, sizes)))
        short = [some if most <= size else [] for some, most in zip(pieces, sizes, strict=True)]
        long = [[] if most <= size else some for some, most in zip(pieces, sizes, strict=True)]
        return [*self.reads(short), *self.reads(long)]


def fitting(sizes: Sequence[int], need: int) -> int:
    """The smallest of these ascending sizes that holds so many."""
    return sizes[bisect.bisect_left(sizes, need)]


def _sizes(most: int, least: int) -> tuple[int, ...]:
    sizes = [most]
    while sizes[-1] // RATIO >= least:
        sizes.append(sizes[-1] // RATIO)
    return tuple(sizes[::-1])


class Schedule:
    """The requests of one pool of pages.

    Each ``plan`` is carried out before the next is made, and what it decodes is told to ``answered``.
    """

    def __init__(self, config: ServingConfig, buckets: Buckets):
        self.config, self.buckets = config, buckets
        self.pages = Pages(config.pages, config.page)
        self.waiting: list[Request] = []  # in order of arrival, those who had to give way among them
        self.running: list[Request] = []  # likewise
        self._slots = list(range(config.slots))[::-1]
        self.preemptions = self.prompt_tokens = self.found_tokens = 0

    def submit(self, request: Request) -> None:
        """Queue it: a prompt that has room for its answer within ``context``."""
        request.prompt = len(request.ids) - request.begun
        request.scores = PromptScores() if request.sampling.prompt_logprobs else None
        bisect.insort(self.waiting, request, key=lambda each: each.number)

    def cancel(self, request: Request) -> None:
        """Forget it, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._leave(request)

    def plan(self) -> Plan:
        """The next step. Nothing to do where it has neither pieces nor rows."""
        copies = self._admit()
        pieces = self._pieces()
        silent = any(len(request.ids) == request.prompt for request in self.running)
        short = silent or any(request.unread or request.constraint is not None for request in self.running)
        decoded, turns = self._with_room(1 if short else self.config.turns)
        pieces = [piece for piece in pieces if piece.request.slot >= 0]  # but of who has just given way
        for piece in pieces:
            self._ready(piece)
        read = [request for request in self.running if not request.unread and not request.left]
        return Plan(copies, pieces, decoded, turns, bool(self.waiting), read)

    def answered(self, request: Request, ids: Sequence[int], *, ended: bool) -> None:
        """A request of the plan's has these tokens more."""
        request.ids += ids
        request.length += len(ids)
        self._name(request)
        if ended:
            self._leave(request)

    def forget(self) -> None:
        """The weights are others: what was read in by the former ones is lent to nobody."""
        self.pages.forget()

    def start_over(self) -> None:
        """A plan was not carried out, and what pages hold is lost: all wait again, with what they were answered."""
        for request in [*self.running]:
            self._wait_again(request)
        self.pages.forget()

    def _with_room(self, turns: int) -> tuple[list[Request], int]:
        """Those who can be decoded, with pages for ``turns`` turns, or for a token; the last who came gives way."""
        while True:
            ready = [request for request in self.running if request.ready]
            turns = min(turns, max((request.left for request in ready), default=1))
            for count, tokens in dict.fromkeys(((turns, turns * (1 + self.config.drafts)), (1, 1))):
                needs = [self._missing(request, tokens) for request in ready]
                if sum(needs) <= self.pages.available:
                    for request, need in zip(ready, needs, strict=True):
                        if need:
                            request.pages += self.pages.take(need)
                    return ready, count
            self._give_way(self.running[-1])

    def _missing(self, request: Request, tokens: int) -> int:
        length = request.length + min(tokens, request.left)
        return max(-(-length // self.pages.size) - len(request.pages), 0)

    def _give_way(self, request: Request) -> None:
        """Wait again, with what was answered as part of the prompt."""
        assert len(self.running) > 1, "one request alone has room for its context"
        self._wait_again(request)
        self.preemptions += 1

    def _wait_again(self, request: Request) -> None:
        self._leave(request)
        bisect.insort(self.waiting, request, key=lambda each: each.number)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._slots.append(request.slot)
        self.pages.release(request.pages)
        request.slot, request.length, request.pages = -1, 0, []

    def _admit(self) -> list[tuple[int, int]]:
        """Let in, in their order, as many as there are slots, pages and tokens of the budget for. Who asks what another
        is about to read in waits for that, and lets those behind pass. Who asks for its prompt's log-probabilities
        reads all of it: pages hold none."""
        copies, unread = [], sum(request.unread for request in self.running)
        for request in self.waiting[: self.config.slots]:
            if not self._slots or unread >= self.config.chunk:
                break
            found = Found([], self.pages.root, None, soon=False)
            if request.scores is None:
                found = self.pages.find(request.known)
            if found.soon:
                continue
            self.pages.hold(found.pages)
            need = -(-len(request.ids) // self.pages.size) - len(found.pages)
            if self.pages.available < need + len(self.running):  # with fewer somebody would soon give way
                self.pages.release(found.pages)
                break
            own = self.pages.take(need)
            if found.rest is not None:  # it may be among its own now: copies are made before anything is written
                copies.append((found.rest, own[0]))
            self._enter(request, found.pages, found.prefix, own, rest=found.rest is not None)
            unread += request.unread
        return copies

    def _enter(self, request: Request, shared: list[int], prefix: int, own: list[int], *, rest: bool) -> None:
        size, ids_T, known = self.pages.size, request.known, len(request.ids) - 1
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=lambda each: each.number)
        request.slot, request.pages = self._slots.pop(), [*shared, *own]
        if request.scores is not None:
            request.scores = PromptScores()
        request.length = known if rest else len(shared) * size
        request.prefix, request.named, request.root = prefix, len(shared), self.pages.root
        self.prompt_tokens += known
        self.found_tokens += request.length
        request.cached = request.length if request.cached < 0 else request.cached
        for j in range(len(shared), known // size):
            ids_N = ids_T[j * size : (j + 1) * size]
            request.prefix = self.pages.name(request.pages[j], request.prefix, ids_N, promised=True)
            request.named += 1
        if known % size and not rest:
            ids_N = ids_T[request.named * size : known]
            self.pages.name(request.pages[request.named], request.prefix, ids_N, promised=True)

    def _pieces(self) -> list[Piece]:
        """Of the oldest prompts that are not read in, in one shape: the first's; of those that begin, or of all."""
        unread = [request for request in self.running if request.unread]
        if not unread:
            return []
        counts = [self.buckets.piece(request.unread) for request in unread]
        size = fitting([size for _, size in self.buckets.chunks], counts[0])
        alike = [
            Piece(request, request.length, count)
            for request, count in zip(unread, counts, strict=True)
            if count <= size and (request.length == 0 or unread[0].length > 0)
        ]
        pieces = alike[: self.config.chunk // size]
        for piece in pieces:
            piece.request.length += piece.count
        return pieces

    def _ready(self, piece: Piece) -> None:
        """Let others find the pages that it fills, and the last one of a prompt."""
        request, size = piece.request, self.pages.size
        last = request.length // size if request.unread else len(request.pages)
        for page in request.pages[piece.start // size : last]:
            self.pages.ready(page)

    def _name(self, request: Request) -> None:
        """Let others find the pages that it has filled."""
        size = self.pages.size
        while request.root == self.pages.root and (request.named + 1) * size <= request.length:
            ids_N = np.array(request.ids[request.named * size : (request.named + 1) * size], np.int32)
            request.prefix = self.pages.name(request.pages[request.named], request.prefix, ids_N)
            request.named += 1

    def check(self) -> None:
        """AssertionError where pages or slots are lost, or two write to one page."""
        size = self.pages.size
        written = [page for request in self.running for page in request.pages[request.length // size :]]
        self.pages.check([request.pages for request in self.running], written)
        slots = sorted([*self._slots, *(request.slot for request in self.running)])
        assert slots == list(range(self.config.slots)), "a slot is lost"
        numbers = [request.number for request in self.waiting]
        assert numbers == sorted(numbers) and not any(request.pages for request in self.waiting)
