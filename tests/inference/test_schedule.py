"""Pages and requests without a network: a device that remembers, of each place in a page, what it was computed from."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.inference.buckets import Buckets, fitting
from deepseek_jax.inference.pages import Pages
from deepseek_jax.inference.plans import DecodePlan, ReadPlan, Request
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.schedule import Schedule
from deepseek_jax.inference.serving_config import ServingConfig

CONFIG = ServingConfig(slots=3, pages=10, page=4, chunk=16, turns=3)
BUCKETS = Buckets.of(CONFIG, 40, gathers=True)


class Device:
    """Each place holds the token and all before it that it was computed with; an answer's next token is a function of
    what is read."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.size = schedule, schedule.pages.size
        self.places = [[(-1,)] * self.size for _ in range(schedule.pages.count)]
        self.read = 0

    def write(self, request, at: int, token: int) -> None:
        past = () if at == 0 else self.places[request.pages[(at - 1) // self.size]][(at - 1) % self.size]
        self.places[request.pages[at // self.size]][at % self.size] = (*past, token)

    def read_in(self) -> ReadPlan:
        """What is next, and carry it out."""
        plan = self.schedule.plan_read()
        copied = [list(self.places[source]) for source, _ in plan.copies]
        for (_, target), content in zip(plan.copies, copied, strict=True):
            self.places[target] = content
        for piece in plan.pieces:
            self.read += piece.count
            for at in range(piece.start, piece.start + piece.count):
                self.write(piece.request, at, piece.request.ids[at])
        return plan

    def run(self) -> tuple[ReadPlan, DecodePlan, list[Request]]:
        """A step, and who has ended in it."""
        read, plan = self.read_in(), self.schedule.plan_decode()
        return read, plan, self.decode(plan)

    def decode(self, plan: DecodePlan) -> list[Request]:
        tables = {request.number: list(request.pages) for request in plan.decoded}
        ended = []
        for _ in range(plan.turns):
            for request in plan.decoded:
                if request in ended:
                    continue
                assert request.pages == tables[request.number]
                self.write(request, request.length, request.ids[-1])
                past = self.places[request.pages[request.length // self.size]][request.length % self.size]
                assert past == tuple(request.ids), "it reads another's past"
                over = len(request.ids) - request.prompt + 1 == request.sampling.max_tokens
                self.schedule.answered(request, [following(past)], ended=over)
                ended += [request] * over
            if ended and plan.until_end:
                break
        return ended


def following(ids) -> int:
    return (sum(ids) * 7 + len(ids)) % 5


def expected(prompt, limit) -> list[int]:
    ids = list(prompt)
    for _ in range(limit):
        ids.append(following(ids))
    return ids


def drive(schedule, device, ended):
    read, plan, now = device.run()
    shape = len(read.pieces), max((piece.count for piece in read.pieces), default=0)
    assert any(rows >= shape[0] and size >= shape[1] for rows, size in schedule.buckets.chunks)
    assert not plan.decoded or fitting(schedule.buckets.slots, len(plan.decoded)) <= schedule.config.slots
    assert sum(piece.count for piece in read.pieces) <= schedule.config.chunk
    assert all(piece.start == 0 for piece in read.pieces) or not read.pieces or read.pieces[0].start > 0
    ended += now
    schedule.check()
    return bool(read.pieces or plan.decoded)


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=24)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), PROMPTS, st.integers(1, 16), st.integers(1, 4)),
        st.tuples(st.just("step")),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("update")),
    ),
    max_size=30,
)


@given(EVENTS)
def test_whoever_comes_and_goes_each_reads_its_own_past(events):
    schedule, requests, ended, cancelled = Schedule(CONFIG, BUCKETS), [], [], set()
    device = Device(schedule)
    for event, *more in [*events, *[("step",)] * 3]:
        if event == "submit":
            prompt, limit, copies = more
            for _ in range(copies):
                requests.append(Request(len(requests), list(prompt), SamplingParams(max_tokens=limit)))
                schedule.submit(requests[-1])
        elif event == "cancel" and more[0] < len(requests) and requests[more[0]] not in ended:
            schedule.cancel(requests[more[0]])
            cancelled.add(more[0])
        elif event == "update":
            schedule.forget()
        elif event == "step":
            drive(schedule, device, ended)
        schedule.check()
    steps = 0
    while schedule.waiting or schedule.running:
        assert drive(schedule, device, ended), "nobody moves"
        assert (steps := steps + 1) < 1000
    assert {request.number for request in ended} == set(range(len(requests))) - cancelled
    for request in ended:
        assert request.ids == expected(request.ids[: request.prompt], request.sampling.max_tokens)
    assert schedule.pages.available == CONFIG.pages


def answers(schedule, device, *requests):
    for request in requests:
        schedule.submit(request)
    ended = []
    while len(ended) < len(requests):
        drive(schedule, device, ended)


def request(number, ids, limit=2):
    return Request(number, list(ids), SamplingParams(max_tokens=limit))


def test_samples_of_one_prompt_read_it_once():
    """Whoever comes together waits for the first and copies its last page; whoever comes later finds it all."""
    schedule = Schedule(CONFIG, BUCKETS)
    device = Device(schedule)
    prompt = [1, 2] * 7
    answers(schedule, device, *[request(i, prompt) for i in range(3)])
    assert device.read == schedule.prompt_tokens - schedule.found_tokens == 13
    answers(schedule, device, request(3, prompt))
    assert device.read == 13
    answers(schedule, device, request(4, [*prompt[:9], 0, 0, 0]))  # two whole pages are the same
    assert device.read == 13 + 11 - 8


def test_an_answer_is_found_by_the_next_turn_and_other_weights_find_nothing():
    schedule = Schedule(CONFIG, BUCKETS)
    device = Device(schedule)
    first = request(0, [1] * 5, limit=8)
    answers(schedule, device, first)
    read = device.read
    answers(schedule, device, request(1, [*first.ids, 2, 2]))
    assert device.read - read == 14 - 12  # of 13 tokens, three pages were full
    schedule.forget()
    answers(schedule, device, request(2, [*first.ids, 2, 2]))
    assert device.read - read == 2 + 14


def test_who_was_idle_longest_makes_room():
    pages = Pages(3, 2)
    ids = lambda *ids: np.array(ids, np.int32)  # noqa: E731
    for token in (1, 2):
        (page,) = pages.take(1)
        pages.name(page, pages.root, ids(token, token))
        pages.release([page])
    found = pages.find(ids(1, 1, 9)).pages
    pages.hold(found)
    pages.release(found)  # now the other has been idle longer
    pages.release(pages.take(2))
    assert pages.find(ids(1, 1, 9)).pages == found and not pages.find(ids(2, 2, 9)).pages
    pages.check()


@pytest.mark.parametrize("seed", range(20))
def test_with_hardly_any_pages_all_are_answered_still(seed):
    """Most give way again and again, some while they are read in."""
    rng = np.random.default_rng(seed)
    config = ServingConfig(slots=4, pages=int(rng.integers(6, 9)), page=4, chunk=4, turns=int(rng.integers(1, 6)))
    schedule = Schedule(config, Buckets.of(config, 24, gathers=True))
    device, beginning, ended = Device(schedule), rng.integers(0, 2, 12).tolist(), []
    for number in range(20):
        schedule.submit(request(number, beginning[: rng.integers(1, 13)], limit=int(rng.integers(1, 13))))
        drive(schedule, device, ended)
    for _ in range(1000):
        if len(ended) < 20:
            drive(schedule, device, ended)
    assert len(ended) == 20 and schedule.pages.available == config.pages
    assert all(each.ids == expected(each.ids[: each.prompt], each.sampling.max_tokens) for each in ended)


def test_the_youngest_gives_way_and_comes_back_in_its_turn():
    schedule = Schedule(dataclasses.replace(CONFIG, pages=6), BUCKETS)
    device = Device(schedule)
    answers(schedule, device, *[request(i, [i] * 6, limit=12) for i in range(4)])
    assert schedule.preemptions > 0 and schedule.pages.available == 6


def test_a_long_prompt_delays_nobody():
    config = ServingConfig(slots=2, pages=64, page=4, chunk=8, turns=3)
    schedule = Schedule(config, Buckets.of(config, 80, gathers=True))
    device = Device(schedule)
    short, long = request(0, [1, 2], limit=40), request(1, [3] * 64)
    schedule.submit(short)
    device.run()
    schedule.submit(long)
    for step in range(7):
        read, plan, _ = device.run()
        assert [piece.count for piece in read.pieces] == [8] and plan.decoded == [short] and plan.turns == 1, step


def test_a_step_is_planned_ahead_where_nothing_else_can_come_next():
    """Of the same rows, of which those that end stand still; not while others wait, or read, or when most are about to
    end; and the pages are there for whatever the step before will have brought."""
    config = ServingConfig(slots=4, pages=64, page=4, chunk=64, turns=6)
    schedule = Schedule(config, Buckets.of(config, 80, gathers=True), ahead=True)
    device, rows = Device(schedule), [request(i, [i, 1], limit=7 if i else 30) for i in range(3)]
    for each in rows:
        schedule.submit(each)
    device.read_in()
    first = schedule.plan_decode()
    assert (first.decoded, first.turns) == (rows, 1)
    second = schedule.plan_ahead(first)
    assert second is not None and (second.decoded, second.turns) == (rows, 3)
    assert all(4 * len(each.pages) >= each.length + 1 + 3 for each in rows)
    device.decode(first)
    third = schedule.plan_ahead(second)
    device.decode(second)
    assert third is not None and third.turns == 3
    schedule.cancel(rows[1])
    fourth = schedule.plan_ahead(third)
    assert fourth is None, "two of three are about to end, or have"
    device.decode(dataclasses.replace(third, decoded=[rows[0], rows[2]]))
    schedule.submit(late := request(3, [3, 1], limit=30))
    assert schedule.plan_ahead(schedule.plan_decode()) is None, "one waits"
    device.read_in()
    last = schedule.plan_decode()
    assert late in last.decoded
    assert schedule.plan_ahead(last) is not None
    schedule.pages.take(schedule.pages.available)
    assert schedule.plan_ahead(dataclasses.replace(last, turns=20)) is None, "no page is left"


def test_where_others_wait_and_so_no_step_is_sent_ahead_it_has_all_turns():
    config = ServingConfig(slots=2, pages=64, page=4, chunk=64, turns=6)
    schedule = Schedule(config, Buckets.of(config, 80, gathers=True), ahead=True)
    device = Device(schedule)
    for i in range(3):
        schedule.submit(request(i, [i, 1], limit=30))
    device.run()
    _, plan, _ = device.run()
    assert (plan.turns, plan.until_end) == (6, True) and schedule.plan_ahead(plan) is None


def after_many_have_ended(then, *, cancelled=False) -> list[int]:
    """Turns of seven steps, in the second of which twelve of thirteen end. then: told the step, how many have just
    ended; returns how many ask in their place."""
    config = ServingConfig(slots=16, pages=200, page=4, chunk=64, turns=8)
    schedule, turns, numbers = Schedule(config, Buckets.of(config, 60, gathers=True)), [], itertools.count()
    device, many = Device(schedule), [request(i, [i], limit=50 if cancelled else 8) for i in range(12)]
    for each in (*many, request(20, [20], limit=50)):
        schedule.submit(each)
    for step in range(7):
        _, plan, now = device.run()
        turns.append(plan.turns)
        if cancelled and step == 1:
            for each in many:
                schedule.cancel(each)
        for i in itertools.islice(numbers, then(step, len(now))):
            schedule.submit(request(30 + i, [30 + i], limit=50))
    return turns


def test_steps_are_short_while_those_who_were_answered_may_ask_again():
    assert after_many_have_ended(lambda step, ended: ended) == [1, 8, 1, 8, 8, 8, 8]
    assert after_many_have_ended(lambda step, ended: 0) == [1, 8, 1, 1, 1, 8, 8]
    assert after_many_have_ended(lambda step, ended: 0, cancelled=True) == [1, 8, 1, 1, 1, 8, 8]


def test_who_does_not_ask_again_is_forgotten_while_others_come():
    assert after_many_have_ended(lambda step, ended: 0 < step < 4) == [1, 8, 1, 1, 1, 8, 8]


@given(st.lists(st.lists(st.integers(1, 70), max_size=8), min_size=2, max_size=4).filter(any))
def test_lanes_that_have_no_shape_in_common_are_read_one_after_the_other(lengths):
    """Many short prompts beside a long one."""
    config = ServingConfig(slots=8, pages=150, page=4, chunk=64)
    buckets, plans = Buckets.of(config, 80, gathers=True), []
    for some in lengths:
        schedule = Schedule(config, buckets)
        for number, length in enumerate(some):
            schedule.submit(request(number, [number, *range(length)]))
        plans.append(schedule.plan_read().pieces)
    read = [[] for _ in plans]
    for (rows, size), pieces in buckets.reads(plans):
        assert (rows, size) in buckets.chunks and len(pieces) == len(plans)
        for lane, some in enumerate(pieces):
            assert len(some) <= rows and all(piece.count <= size for piece in some)
            read[lane] += some
    assert read == plans


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="slots=0: must be at least 1"):
        ServingConfig(slots=0)
    with pytest.raises(ValueError, match="context=99: expected at most 40, of max_position_embeddings=64 and"):
        dataclasses.replace(CONFIG, context=99).tokens(64)
    assert CONFIG.tokens(64) == 40 and CONFIG.tokens(32) == 32


def test_shapes_of_chunks():
    """A row or as many as the chunk has room for, and between them those that keep a device busy anyhow."""
    small = Buckets.of(ServingConfig(chunk=512), 1024, gathers=False)
    assert small.chunks == ((1, 32), (16, 32), (1, 128), (4, 128), (1, 512))
    large = Buckets.of(ServingConfig(chunk=8192), 16384, gathers=False, least=512)
    assert large.chunks == ((1, 512), (4, 512), (16, 512), (1, 2048), (4, 2048), (1, 8192))
    for chunk, least in itertools.product((*range(1, 400), 5000), (16, 128)):
        shapes = Buckets.of(ServingConfig(chunk=chunk), chunk + 1, gathers=False, least=least).chunks
        assert shapes[-1] == (1, chunk)
        for _, size in shapes:  # what ``Schedule`` takes for granted
            assert {(1, size), (chunk // size, size)} <= {*shapes}


@pytest.mark.parametrize(("chunk", "least"), [(16, 16), (252, 16), (8192, 128), (32768, 128)])
def test_no_shape_is_longer_than_rows_may_be(chunk, least):
    """And what is read in is the same as with those."""
    of = lambda context: Buckets.of(ServingConfig(chunk=chunk), context, gathers=False, least=least)  # noqa: E731
    all_of_them = of(chunk + 1)
    sizes = [size for _, size in all_of_them.chunks]
    for context in (2, 17, 63, 300, 2304, 5000):
        pieces = [all_of_them.piece(unread) for unread in range(1, context)]
        found, longest = of(context), fitting(sizes, max(pieces))
        assert found.chunks == tuple(shape for shape in all_of_them.chunks if shape[1] <= longest)
        assert [found.piece(unread) for unread in range(1, context)] == pieces


@pytest.mark.parametrize(("chunk", "least"), [(256, 16), (512, 16), (8192, 128)])
def test_a_prompt_fills_at_least_half_of_the_shapes_that_it_is_read_in(chunk, least):
    """From twice ``cut`` on: in pieces, where one shape would be filled by less."""
    buckets = Buckets.of(ServingConfig(chunk=chunk), 16384, gathers=False, least=least)
    sizes = [size for _, size in buckets.chunks]
    for tokens in range(1, 2 * chunk + 1):
        left, filled = tokens, 0
        while left:
            count = buckets.piece(left)
            left, filled = left - count, filled + fitting(sizes, count)
        assert tokens <= filled <= 2 * max(tokens, 2 * buckets.cut), (tokens, filled)
