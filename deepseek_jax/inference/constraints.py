"""Answers held to a JSON schema or a regular expression: which tokens may come next, by llguidance on the host.

Other threads than the engine's do it, and a step waits for them for a moment alone: a grammar that is slow delays its
own answer. What a grammar may cost is limited by llguidance in memory, by ``SECONDS`` in time; the size of the text by
``SamplingParams``.
"""

import concurrent.futures
import decimal
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.sampling import SamplingParams

SECONDS = 0.25  # of a core, for a token
GRACE = 0.005  # seconds that a step waits for those who are at it: a few tokens' work, of each far less than one
MULTIPLES = 20_000  # states that numbers with a multipleOf may take; llguidance's own limits know nothing of them
BLANKS = r"[ \t\r\n]{1,32}"  # between two parts of JSON: with any number some models would never go on
_LONGEST = 200  # characters of a message


class Constraint:
    """Where an answer is in its grammar. allowed_V: the tokens that may come next, a bit for each, 32 in a word."""

    def __init__(self, matcher: Any, width: int):
        self._matcher, self._width = matcher, width
        self._job: concurrent.futures.Future[None] | None = None
        self.allowed_V, self._error = np.zeros(0, np.int32), ""

    @classmethod
    def later(cls, begin: Callable[[], "Constraint"]) -> "Constraint":
        """What another thread begins, so that nobody waits for it; where that fails, so does this one."""
        made = cls(None, 0)
        made._job = _threads().submit(made._become, begin)
        return made

    def _become(self, begin: Callable[[], "Constraint"]) -> None:
        begun = begin()
        self._matcher, self._width, self.allowed_V = begun._matcher, begun._width, begun.allowed_V

    def copy(self) -> "Constraint":
        """One of its own for another answer, before anything was said."""
        other = Constraint(self._matcher.deep_copy(), self._width)
        other.allowed_V = self.allowed_V
        return other

    def advance(self, ids: Sequence[int]) -> None:
        """The answer has gone on with these tokens: find out what may come behind them, see ``settle``."""
        self._job = _threads().submit(self.find, ids)

    @property
    def ready(self) -> bool:
        """Whether that is known."""
        return self._job is None or self._job.done()

    @property
    def error(self) -> str:
        """Why there are none, "" where there are."""
        failed = self._job.exception() if self._job is not None and self._job.done() else None
        return self._error if failed is None else repr(failed)

    def find(self, ids: Sequence[int]) -> None:
        """``advance``, here and now."""
        import llguidance.numpy

        began = time.thread_time()
        self._matcher.consume_tokens([*ids])
        words_1V = llguidance.numpy.allocate_token_bitmask(1, self._width)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, words_1V)
        ended = self._matcher.is_stopped() and not self._matcher.is_accepting()
        if self._matcher.is_error() or ended:
            self._error = self._matcher.get_error()[:_LONGEST] or "nothing can be said"
        elif time.thread_time() - began > SECONDS:
            self._error = f"a token takes more than {SECONDS} seconds"
        self.allowed_V = words_1V[0]


def settle(constraints: Iterable[Constraint]) -> None:
    """Wait for those whose next token is being looked for, but not long."""
    concurrent.futures.wait([each._job for each in constraints if each._job is not None], timeout=GRACE)


class Grammars:
    """Compiles them for a tokenizer and a network of ``width`` tokens. ValueError where that cannot be.

    Takes seconds for a tokenizer of 100,000 tokens, in which no other thread of Python goes on.
    """

    def __init__(self, tokenizer: Tokenizer, width: int):
        try:
            import llguidance
        except ImportError as error:
            wanted = "needs llguidance: pip install 'deepseek-jax[constrained]'"
            raise ValueError(f"json_schema, regex: {wanted}") from error
        if not tokenizer.stop_ids:
            raise ValueError("json_schema, regex: a tokenizer without an end of sentence cannot say when it is enough")
        if width < tokenizer.vocab_size:
            raise ValueError(f"json_schema, regex: vocab_size={width} has no room for all {tokenizer.vocab_size} ids")
        told = json.loads(tokenizer.special_json)
        for token in told.get("added_tokens", []):  # which no text holds, even where they are visible
            token["special"] = True
        self._tokenizer = llguidance.LLTokenizer(json.dumps(told), n_vocab=width, eos_token=[*tokenizer.stop_ids])
        self._width = width
        self._begun = functools.lru_cache(maxsize=16)(self._begin)

    def begin(self, sampling: SamplingParams) -> Constraint:
        """For a new answer. ValueError for what is no grammar, cannot be met, or is too much."""
        return self._begun(sampling.json_schema, sampling.regex).copy()

    def _begin(self, json_schema: str, regex: str) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        try:
            if json_schema:
                check_multiples(json_schema)
                grammar = LLMatcher.grammar_from_json_schema(json_schema, overrides={"whitespace_pattern": BLANKS})
            else:
                grammar = LLMatcher.grammar_from_regex(regex)
            limits = LLParserLimits(verbose_errors=False)
            made = Constraint(LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits), self._width)
            made.find([])
            if made.error:
                raise ValueError(made.error)
        except (ValueError, RecursionError, ArithmeticError) as error:
            told = f"json_schema={json_schema!r:.100}" if json_schema else f"regex={regex!r:.100}"
            raise ValueError(f"{told}: {error}") from error
        return made


def check_multiples(schema: str) -> None:
    """ValueError for what is no JSON, and where numbers would have to be multiples of too much together."""
    found = list[decimal.Decimal]()

    def collect(pairs: list[tuple[str, Any]]) -> None:
        found.extend(
            decimal.Decimal(x)
            for key, x in pairs
            if key == "multipleOf" and isinstance(x, int | decimal.Decimal) and x > 0
        )

    json.loads(schema, parse_float=decimal.Decimal, object_pairs_hook=collect)
    long = any(abs(number.adjusted()) + len(number.as_tuple().digits) > 20 for number in found)
    unit = min((number.normalize().as_tuple().exponent for number in found), default=0)
    assert isinstance(unit, int)
    if long or math.lcm(*(int(number.scaleb(max(-unit, 0))) for number in found)) > MULTIPLES:
        told = ", ".join(map(str, found[:5]))
        raise ValueError(f"multipleOf of {told} take more than {MULTIPLES} states")


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="grammar")
