"""A reward model's score of an answer, in this process and in batches."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.checkpoint.finding import find_model
from deepseek_jax.checkpoint.model import Model, load
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.preferences import encode_judged, shown
from deepseek_jax.files import read_json_object
from deepseek_jax.model import parameters
from deepseek_jax.parallel.processes import gather, together
from deepseek_jax.parallel.sharding import constrain, place_batch
from deepseek_jax.rl.tasks import Row, Task
from deepseek_jax.rl.workers import Outcome
from deepseek_kernels import Visible

_ROWS, _LEAST_WIDTH = 32, 64  # of a batch


class ModelReward:
    """The score that a run of ``reward-model`` gives an answer to its question, by its own tokenizer and template.

    It is shown what it was trained on: all, be it cut off, and of an answer with calls of tools all turns as one text;
    or the summary of what has ended, which is the last turn's. None for rows that the task's own accuracy grades,
    unless ``always``. An answer without a summary, as one that was cut off, gets the least score of those that are
    graded with it. One that its positions do not hold has none, which is a failure: good or bad, it cannot be told.

    Of several processes each has answers of its own, or none to be judged; all are scored together.
    """

    def __init__(self, path: str, always: str = ""):
        if always not in ("", "always"):
            raise ValueError(f"behind the path stands {always!r}, where only 'always' may")
        try:
            self.folder = find_model(path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        about = read_json_object(self.folder / "config.json")
        if about.get("stage") != "reward_model":
            of = f"of the stage {about['stage']}" if "stage" in about else "a released model's"
            raise ValueError(f"{self.folder} is {of}: a run of `deepseek-jax reward-model` is needed")
        self.judges, self.always = about["recipe"]["judges"], bool(always)
        self._model: Model | None = None

    def open(self, compute: ComputeConfig, mesh: Mesh | None) -> None:
        """Read the model, at the first call; the parameters in the dtype of the arithmetic."""
        if self._model is None:
            compute = dataclasses.replace(compute, param_dtype=compute.dtype)
            self._model = load(self.folder, compute=compute, mesh=mesh)

    def score_all(self, completions: Sequence[str], rows: Sequence[Row], task: Task) -> list[Outcome]:
        """The scores, one for each completion of a row."""
        assert self._model is not None
        judged = [index for index, row in enumerate(rows) if self.always or not task.grades(row)]
        ids = {index: self._ids(completions[index], rows[index], task) for index in judged}
        longest = self._model.config.max_position_embeddings
        fitting = {index: found for index, found in ids.items() if 0 < len(found) <= longest}
        everyones = gather(list(fitting.values()))
        all_scores = self._scores([text for texts in everyones for text in texts])
        begin = sum(map(len, everyones[: jax.process_index()]))
        scores = dict(zip(fitting, all_scores[begin:], strict=False))
        least = min(all_scores, default=None)
        found = [Outcome(scores.get(index, least) if index in ids else None) for index in range(len(rows))]
        for index in judged:
            if (length := len(ids[index])) > longest:
                found[index] = Outcome(None, "unjudged", f"{length} tokens, of which {self.folder} takes {longest}")
        return found

    def _ids(self, completion: str, row: Row, task: Task) -> list[int]:
        """Of question and answer; none where there is nothing to judge."""
        assert self._model is not None
        answer = shown(completion, self.judges)
        return encode_judged(self._model.text, task.messages(row), answer) if answer else []

    def _scores(self, texts: Sequence[list[int]]) -> list[float]:
        """Longest first, in batches of few shapes."""
        model = self._model
        assert model is not None
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        found, compute = [0.0] * len(texts), _compiled(model.config, model.compute.exact)
        rows = min(_ROWS, 1 << (len(texts) - 1).bit_length()) if texts else 1
        ways = int(np.prod([model.mesh.shape[axis] for axis in model.compute.rules.batch]))
        rows = -(-rows // ways) * ways
        for first in range(0, len(order), rows):
            some = order[first : first + rows]
            width = max(_LEAST_WIDTH, 1 << (len(texts[some[0]]) - 1).bit_length())
            tokens_BS = np.full((rows, width), model.text.pad_id, np.int32)
            lengths_B1 = np.ones((rows, 1), np.int32)
            for row, index in enumerate(some):
                tokens_BS[row, : len(texts[index])], lengths_B1[row] = texts[index], len(texts[index])
            with jax.set_mesh(model.mesh):
                batch = {"tokens": tokens_BS, "lengths": lengths_B1}
                placed = place_batch(batch, model.mesh, model.compute.rules, whole=True)
                scores_B = jax.device_get(compute(model.params, model.router_bias, placed))
            for index, score in zip(some, scores_B, strict=False):
                found[index] = float(score)
        return found


@functools.cache
def _compiled(config: ModelConfig, compute: ComputeConfig):
    """(params, router_bias, batch) -> the score of each row's last token."""

    @jax.jit
    def run(params, router_bias, batch):
        network = parameters.merge(config, params, router_bias, compute)
        tokens_BS, last_B1 = batch["tokens"], batch["lengths"] - 1
        segments_BS = (jnp.arange(tokens_BS.shape[1]) <= last_B1).astype(jnp.int32)
        out = network(tokens_BS, segment_ids_BS=segments_BS, visible=Visible.rows())
        assert out.scores is not None
        scores_B = jnp.take_along_axis(out.scores[..., 0], last_B1, axis=1)[:, 0]
        return constrain(scores_B, compute.rules, None)  # every process reads them all

    return together(run)
