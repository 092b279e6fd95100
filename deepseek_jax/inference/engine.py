"""Prompts in, completions out: the generator with a tokenizer around it."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.generate import Generated, generate, pad_prompts
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Completion:
    """text: decoded with the thinking marks, without the end of sentence. finish_reason: ``stop`` or ``length``."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Engine:
    """Answers batches of prompts with a model.

    >>> engine = Engine(model, tokenizer)  # doctest: +SKIP
    >>> engine.generate(["def add(a, b):"], SamplingParams(max_tokens=16))[0].text  # doctest: +SKIP

    Prompt widths and batches are rounded up to powers of two, so that few programs are compiled.
    """

    def __init__(self, model: Model | transformer.Transformer, tokenizer: Tokenizer | None = None):
        """tokenizer: by default the model's own."""
        if isinstance(model, transformer.Transformer):
            params, router_bias = transformer.split(model)
            mesh = make_mesh(devices=jax.devices()[:1])
            model = Model(model.config, model.compute.on(mesh), params, router_bias, tokenizer, mesh)
        self.model, self.tokenizer = model, tokenizer or model.text
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model only "
                f"vocab_size={self.config.vocab_size}"
            )

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Complete each prompt: text, with the begin-of-sentence token put in front where the tokenizer has one, or
        token ids as they are.

        An answer ends with one of the tokenizer's ``stop_ids`` or of ``sampling.stop_token_ids``.

        Raises ValueError for an empty prompt, and where prompt and answer would pass max_position_embeddings.
        """
        sampling = sampling or SamplingParams()
        ids = [
            [*self.tokenizer.bos_ids, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
            for prompt in prompts
        ]
        if not ids:
            return []
        out = jax.device_get(self.generate_ids(ids, sampling, jax.random.key(sampling.seed)))
        return [self._completion(out, row) for row in range(len(ids))]

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, key: jax.Array, *, width: int = 0
    ) -> Generated:
        """The arrays behind ``generate``; rows past ``len(prompts)`` are filling. width: of the prompts' rows."""
        longest = max(map(len, prompts))
        width = width or _round_up(longest, 16)
        if longest + sampling.max_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={sampling.max_tokens} pass "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        rows = [*prompts, *[prompts[0]] * (_round_up(len(prompts), 1) - len(prompts))]
        tokens, positions = pad_prompts(rows, self.tokenizer.pad_id, width)
        with jax.set_mesh(self.model.mesh):
            return generate(
                self.config,
                self.model.params,
                self.model.router_bias,
                tokens,
                positions,
                key,
                sampling=dataclasses.replace(sampling, seed=0, stop_token_ids=()),  # what compiles does not need them
                stop_ids=(*self.tokenizer.stop_ids, *sampling.stop_token_ids),
                pad_id=self.tokenizer.pad_id,
                compute=self.model.compute,
            )

    def _completion(self, out: Generated, row: int) -> Completion:
        length, stopped = int(out.lengths_B[row]), bool(out.stopped_B[row])
        ids = np.asarray(out.tokens_BN[row, :length]).tolist()
        text = self.decode(ids[:-1] if stopped else ids)
        return Completion(
            text, ids, np.asarray(out.logprobs_BN[row, :length]).tolist(), "stop" if stopped else "length"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text with ``<think>`` and other special tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def _round_up(n: int, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (n - 1).bit_length())
