"""Questions answered: in one turn, or in several where the task has tools. The same for training and for evaluation."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from deepseek_jax.data.chat import own_template
from deepseek_jax.data.special_tokens import THINK
from deepseek_jax.data.template import opens_thinking
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import any_process
from deepseek_jax.rl.asking import Question, read_answers
from deepseek_jax.rl.samples import About, Sample, make_sample
from deepseek_jax.rl.tools import FAILURES, Call, Result, Tools, read_call

_SAID, _TOLD = "an-answer-7c21", "a-result-d04e"  # where an answer and a result stand in a rendered text
_CUT = " … (cut off)"


def converse(
    engine: Engine,
    tools: Tools | None,
    questions: Sequence[Question],
    sampling: SamplingParams | Sequence[SamplingParams],
    key: jax.Array | None = None,
    *,
    experts: bool = False,
    filled: int = 0,
    dispatched: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """An answer to each question, as ``Engine.generate_ids`` draws it.

    With tools a turn that ends with a call is followed by its result and another turn, as far as ``tools.calls`` and
    ``max_tokens``, which counts results too, allow: the answer is all of it, of which ``own`` marks the model's tokens,
    and its text is the last turn's. One that would need a call or room beyond has not ended.

    Of several processes each asks its own questions, at the same time, and goes on as long as one has a turn to sample.

    Args:
      filled: rows of the first turn at least, so that a last part of the questions compiles nothing; by one process.
      dispatched: called when the devices have been given a turn to sample.
    """
    each = [sampling] * len(questions) if isinstance(sampling, SamplingParams) else list(sampling)
    seeded = not isinstance(sampling, SamplingParams)
    assert tools is None or key is not None or seeded, "further turns draw by key, or by seeds"
    drafts = [_Draft(question, most=params.max_tokens) for question, params in zip(questions, each, strict=True)]
    frame = None if tools is None else _Frame.of(engine.tokenizer, tools.config.result_tokens)
    going, turn = list(range(len(questions))), 0
    while any_process(bool(going)):
        asked = [drafts[row].question() for row in going]
        if turn == 0:
            out = _sampled(engine, asked, sampling, key, experts, filled)
        else:
            how = [drafts[row].sampling(each[row], turn) for row in going]
            own_key = None if key is None else jax.random.fold_in(key, np.uint32(2**32 - turn))
            out = _sampled(engine, asked, how, own_key, experts)
        dispatched()
        out = out.here()
        for place, (question, answer) in enumerate(zip(asked, read_answers(engine.tokenizer, asked, out), strict=True)):
            drafts[going[place]].turns.append(make_sample(out, place, question, answer))
        if tools is None or frame is None:
            break
        calls = {row: call for row in going if (call := drafts[row].call(tools.config.calls)) is not None}
        results = zip(calls, tools.call(list(calls.values())), strict=True)
        going, turn = [row for row, result in results if drafts[row].tell(result, frame)], turn + 1
    return [draft.whole() for draft in drafts]


def _sampled(
    engine: Engine,
    asked: Sequence[Question],
    how: SamplingParams | Sequence[SamplingParams],
    key: jax.Array | None,
    experts: bool,
    filled: int = 0,
) -> Generated:
    more = {"filled": filled} if filled and jax.process_count() == 1 else {}
    return engine.generate_ids([question.prompt for question in asked], how, key, experts=experts, **more)


def tool_metrics(answers: Sequence[About]) -> dict[str, float]:
    """Calls per answer, and how many failed, by what went wrong, or had a result that was cut off."""
    counts = sum((Counter(answer.calls) for answer in answers), Counter[str]())
    kinds = {**FAILURES, "cut": "cut"}
    failed = {f"tool_{name}": float(counts[kind]) for kind, name in kinds.items()}
    return {"tool_calls": counts["calls"] / len(answers), **failed}


@dataclasses.dataclass(frozen=True)
class _Frame:
    """How a result is told: the ids before and behind it, and how the turn behind those begins."""

    tokenizer: Tokenizer
    before: list[int]
    behind: list[int]
    start: str
    most: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, most: int) -> "_Frame":
        """As a user's message, by the model's own template. ValueError: it writes no second question."""
        template = own_template(tokenizer)
        if template is None:
            before = [tokenizer.user_id, *tokenizer.encode("<result>")]
            return cls(tokenizer, before, [*tokenizer.encode("</result>"), tokenizer.assistant_id], "", most)
        said = [("user", "?"), ("assistant", _SAID), ("user", f"<result>{_TOLD}</result>")]
        text = template.render([{"role": role, "content": content} for role, content in said])
        before, told, behind = text.rpartition(_SAID)[2].partition(_TOLD)
        if _SAID not in text or not told:
            raise ValueError(
                "the chat template writes no question behind an answer: tools cannot be told their results"
            )
        ids = tokenizer.encode(before, allow_special=True)
        ended = ids[:1] if ids and ids[0] in tokenizer.stop_ids else []  # the model has said that itself
        start = THINK if opens_thinking(behind) else ""
        return cls(tokenizer, ids[len(ended) :], tokenizer.encode(behind, allow_special=True), start, most)

    def ids(self, result: str) -> tuple[list[int], bool]:
        """A result as ids, none of them special, and whether some of it was cut off."""
        ids = self.tokenizer.encode(result)
        cut = len(ids) > self.most
        told = [*ids[: self.most], *self.tokenizer.encode(_CUT)] if cut else ids
        return [*self.before, *told, *self.behind], cut


class _Draft:
    """An answer on the way: the model's turns, and what it was told behind each."""

    def __init__(self, question: Question, *, most: int):
        self.asked, self.start, self.most = question, question.start, most
        self.turns: list[Sample] = []
        self.told: list[list[int]] = []
        self.messages: list[dict[str, str]] = []
        self.calls: Counter[str] = Counter()

    def ids(self) -> list[int]:
        told = [*self.told, *[[]] * (len(self.turns) - len(self.told))]
        return [token for turn, rest in zip(self.turns, told, strict=True) for token in [*turn.ids.tolist(), *rest]]

    @property
    def room(self) -> int:
        return self.most - len(self.ids())

    def question(self) -> Question:
        return dataclasses.replace(self.asked, prompt=[*self.asked.prompt, *self.ids()], start=self.start)

    def sampling(self, params: SamplingParams, turn: int) -> SamplingParams:
        """For a later turn: what there is room for, with a seed of its own."""
        seed = int(np.random.SeedSequence((params.seed, turn)).generate_state(1)[0] >> 1)
        return dataclasses.replace(params, max_tokens=self.room, seed=seed)

    def call(self, most: int) -> Call | None:
        """The call that the last turn ends with; one too many ends the answer, unfinished."""
        answer = self.turns[-1].answer
        call = read_call(answer.text) if answer.ended else None
        if call is not None and self.calls["calls"] == most:
            self._cut_off()
            return None
        return call

    def _cut_off(self) -> None:
        answer = dataclasses.replace(self.turns[-1].answer, ended=False)
        self.turns[-1] = dataclasses.replace(self.turns[-1], answer=answer)

    def tell(self, result: Result, frame: _Frame) -> bool:
        """Put it behind the last turn; False where no turn has room behind it, and the answer is cut off there."""
        ids, cut = frame.ids(result.text)
        self.calls += Counter({"calls": 1, result.failure: 1, "cut": int(cut)})
        if self.room - len(ids) < 1:
            self._cut_off()
            return False
        said = self.turns[-1].answer.text
        self.messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": f"<result>{result.text}</result>"},
        ]
        self.told.append(ids)
        self.start = frame.start
        return True

    def whole(self) -> Sample:
        """All turns as one answer."""
        last = self.turns[-1]
        answer = dataclasses.replace(last.answer, turns=tuple(self.messages))
        if len(self.turns) == 1:
            return dataclasses.replace(last, question=self.asked, answer=answer, calls=self.calls)
        own = [
            np.arange(len(turn.ids) + len(told)) < len(turn.ids)
            for turn, told in zip(self.turns, self.told, strict=False)
        ]
        own = np.concatenate([*own, np.ones(len(last.ids), bool)])
        logprobs = np.zeros(len(own), last.logprobs.dtype)
        logprobs[own] = np.concatenate([turn.logprobs for turn in self.turns])
        return Sample(
            self.asked,
            answer,
            np.array(self.ids(), last.ids.dtype),
            logprobs,
            self._experts(),
            own=own,
            start=self.start,
            calls=self.calls,
        )

    def _experts(self) -> np.ndarray | None:
        """Those that were chosen when each token was drawn: later turns have read it again, and chosen for its end."""
        chosen = self.turns[-1].experts_TLK
        if chosen is None:
            return None
        chosen = chosen.copy()
        for turn in self.turns[-2::-1]:
            assert turn.experts_TLK is not None
            seen = chosen[: len(turn.experts_TLK)]
            np.copyto(seen, turn.experts_TLK, where=turn.experts_TLK >= 0)
        return chosen
