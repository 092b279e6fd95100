"""Who is answered when: requests, their pages, and what the device does next, as shapes from a small set. No jax here.

As vLLM's scheduler does it, a step decodes for all who can and reads so many tokens of the oldest prompts in, so that a
long prompt delays nobody, and whoever came last gives way where pages run out; shapes come from ``Buckets``, as in
sglang-jax, since XLA compiles. Other than there, a prompt's last token is not read in but decoded: nothing but decoding
draws tokens, and a prompt that another has brought costs nothing.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from deepseek_jax.inference.buckets import Buckets, fitting
from deepseek_jax.inference.pages import Found, Pages
from deepseek_jax.inference.plans import DecodePlan, Piece, ReadPlan, Request
from deepseek_jax.inference.prompt_scores import PromptScores
from deepseek_jax.inference.serving_config import ServingConfig


class Schedule:
    """The requests of one pool of pages.

    Plans are carried out in the order in which they are made. What one decodes is told to ``answered`` before the next
    ``plan_decode``, and, of the one before, before ``plan_ahead``.
    """

    def __init__(self, config: ServingConfig, buckets: Buckets, *, ahead: bool = False):
        """ahead: ``plan_ahead`` is asked for; where it may answer a step has half of the turns: two are under way."""
        self.config, self.buckets = config, buckets
        self._turns = config.turns // 2 if ahead else config.turns
        self.pages = Pages(config.pages, config.page)
        self.waiting: list[Request] = []  # in order of arrival, those who had to give way among them
        self.running: list[Request] = []  # likewise
        self._slots = list(range(config.slots))[::-1]
        self._expected = 0  # who have just ended, and may ask again
        self.preemptions = self.prompt_tokens = self.found_tokens = 0

    def submit(self, request: Request) -> None:
        """Queue it: a prompt that has room for its answer within ``context``."""
        request.prompt = len(request.ids) - request.begun
        request.scores = PromptScores() if request.sampling.prompt_logprobs else None
        self._expected -= 1
        bisect.insort(self.waiting, request, key=lambda each: each.number)

    def cancel(self, request: Request) -> None:
        """Forget it, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._expected += 1
            self._leave(request)

    def plan_read(self) -> ReadPlan:
        """What is read in next. Nothing, where nobody waits and all are read in, or nobody has room."""
        copies, pieces = self._admit(), self._pieces()
        for piece in pieces:
            self._ready(piece)
        return ReadPlan(copies, pieces)

    def plan_decode(self) -> DecodePlan:
        """What is decoded behind that, when all that was decoded before is told."""
        self._expected = max(self._expected, 0) // 2  # half of them with each step that they do not come
        short = self._expected >= max(len(self.running), 1)  # they would wait for a long step's end
        short |= any(len(request.ids) == request.prompt for request in self.running)
        short |= any(request.unread or request.constraint is not None for request in self.running)
        decoded, turns = self._with_room(1 if short else self.config.turns if self.waiting else self._turns)
        read = [request for request in self.running if not request.unread and not request.left]
        return DecodePlan(decoded, turns, bool(self.waiting), read)

    def plan_ahead(self, before: DecodePlan) -> DecodePlan | None:
        """What is decoded behind ``before``, of which nothing is told yet: the same rows, of which those that end
        meanwhile stand still. None where something else may come next: others wait or read, one is held to a grammar,
        most are about to end, or pages run out."""
        ready, drafts = set(before.decoded), 1 + self.config.drafts
        if not (before.decoded or self.running or self.waiting):
            return DecodePlan([], self._turns, False, [])
        going = [request.left - before.turns for request in self.running if request.left > before.turns]
        turns = min(self._turns, max(going, default=0))
        if not turns or self.waiting or 2 * len(going) <= len(ready) or not ready.issuperset(self.running):
            return None
        if any(request.constraint is not None for request in self.running):
            return None
        needs = [self._missing(request, (before.turns + turns) * drafts) for request in self.running]
        if sum(needs) > self.pages.available:
            return None
        for request, need in zip(self.running, needs, strict=True):
            request.pages += self.pages.take(need)
        return DecodePlan(before.decoded, turns, False, [])

    def answered(self, request: Request, ids: Sequence[int], *, ended: bool) -> None:
        """A request of the plan's has these tokens more."""
        request.ids += ids
        request.length += len(ids)
        self._name(request)
        if ended:
            self._expected += 1
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
            Piece(request, request.length, count, request.scores)
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
