"""A model of ours for EleutherAI's lm-evaluation-harness (pip install 'deepseek-jax[lm-eval]').

    import lm_eval
    from deepseek_jax import load
    from deepseek_jax.evals.lm_eval import LMEval

    lm_eval.simple_evaluate(LMEval(load("DeepSeek-V2-Lite")), tasks=["arc_easy"])

or by name, in a program that has imported this module: `model="deepseek-jax", model_args="path=DIR,batch_size=16"`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from deepseek_jax.checkpoint.model import Model, load
from deepseek_jax.data.chat import encode_prompt, own_template
from deepseek_jax.data.special_tokens import DEEPSEEK_TEMPLATE
from deepseek_jax.evals.likelihood import likelihoods, windows
from deepseek_jax.evals.until import answers_until
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams

_MAX_TOKENS = 256  # of an answer, where a task does not say


@register_model("deepseek-jax")
class LMEval(LM):
    """`loglikelihood`, `loglikelihood_rolling` and `generate_until` of a model, with its own chat template.

    Text begins with BOS where the tokenizer has it so. Special tokens in a text count as such, as they do for
    transformers: a rendered chat is text here.
    """

    def __init__(self, model: Model | None = None, *, path: str = "", batch_size: int | str = 8, **others: Any):
        """model, or the path of one. others: what the command adds, of which device and max_batch_size mean nothing."""
        super().__init__()
        if strange := sorted(set(others) - {"device", "max_batch_size"}):
            raise ValueError(f"model_args {', '.join(strange)}: expected path and batch_size")
        if (model is None) == (not path):
            raise ValueError("give a model, or the path of one")
        self.model = load(path) if model is None else model
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size={batch_size!r}: expected a number; it is not found automatically")
        self.batch_size, self.text = int(batch_size), self.model.text
        self._engine = Engine(self.model)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the continuation's log-probability, and whether it is the greedy one."""
        del disable_tqdm
        return self._scores("loglikelihood", requests, [self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,) its log-probability after BOS (EOS where there is none), in windows where it is long."""
        del disable_tqdm
        prefix, longest = self._prefix(), self.model.config.max_position_embeddings
        parts = [windows(self._encode(request.args[0]), prefix, longest) for request in requests]
        scores = iter(likelihoods(self.model, [pair for each in parts for pair in each], batch_size=self.batch_size))
        return [sum(next(scores)[0] for _ in each) for each in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is answered to each (context, settings): until, max_gen_toks, do_sample, temperature, top_p, top_k and
        seed. Thinking is left out."""
        del disable_tqdm
        given = [_settings(request.args[1], number) for number, request in enumerate(requests)]
        sampling, until = [params for params, _ in given], [texts for _, texts in given]
        prompts = [self._context(request.args[0]) for request in requests]
        room = self.model.config.max_position_embeddings
        if (most := max(params.max_tokens for params in sampling)) >= room:
            raise ValueError(f"max_gen_toks={most}: must be less than max_position_embeddings={room}")
        prompts = [ids[-(room - params.max_tokens) :] for ids, params in zip(prompts, sampling, strict=True)]
        found = answers_until(self._engine, prompts, sampling, until, batch_size=self.batch_size)
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to where an assistant answers, or goes on with its last message."""
        messages, begun = [*chat_history], ""
        if not add_generation_prompt:
            begun = messages.pop()["content"]
        return self.text.decode(encode_prompt(self.text, messages), skip_special_tokens=False) + begun

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the results' file. ValueError for the name of another."""
        if isinstance(chat_template, str) and chat_template:
            raise ValueError(f"chat_template={chat_template!r}: a model has one of its own")
        template = own_template(self.text) if chat_template else None
        return "" if not chat_template else DEEPSEEK_TEMPLATE if template is None else template.source

    @property
    def tokenizer_name(self) -> str:
        """What tells cached requests apart."""
        return self.text.fingerprint

    def _scores(self, what: str, requests: Sequence[Any], pairs: Sequence[Any]) -> list[tuple[float, bool]]:
        found = likelihoods(self.model, pairs, batch_size=self.batch_size)
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial(what, request.args, score)
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Cut where the context's own tokens end: those of both together need not be those of each. Spaces at the
        context's end belong to the word that follows."""
        if not context.strip():
            return [self._prefix()], self._encode(context + continuation)
        start, whole = self._context(context.rstrip()), self._context(context + continuation)
        return start, whole[len(start) :]

    def _encode(self, text: str) -> list[int]:
        return self.text.encode(text, allow_special=True)

    def _context(self, text: str) -> list[int]:
        ids, begin = self._encode(text), self.text.bos_ids
        return ids if begin and ids[:1] == begin else [*begin, *ids]

    def _prefix(self) -> int:
        return self.text.bos_ids[0] if self.text.bos_ids else self.text.eos_id


def _settings(given: Mapping[str, Any], number: int) -> tuple[SamplingParams, list[str]]:
    """number: of the request, so that the same one asked again is answered anew."""
    until = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0) if given.get("do_sample", True) else 0.0
    seed = np.random.SeedSequence((int(given.get("seed") or 0), number)).generate_state(1)[0] >> 1
    sampling = SamplingParams(
        temperature=temperature,
        top_p=float(given.get("top_p") or 1.0),
        top_k=int(given.get("top_k") or 0),
        max_tokens=int(given.get("max_gen_toks") or _MAX_TOKENS),
        seed=int(seed),
    )
    return sampling, [until] if isinstance(until, str) else [*until]
