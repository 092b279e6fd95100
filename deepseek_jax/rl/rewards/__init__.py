"""Rewards by rule, each a function `score(completion, row) -> float | None`; None: it does not apply to the row.

`named` lists those of the package by the name that `--reward NAME[:ARGUMENT...][=WEIGHT]` gives; a module each: `form`
(markers and tags, the answer to the letter), `maths`, `choice`, `language`, `repetition`, `length`. `completion` is the
text with `<think>` and `</think>`, the end-of-sentence token left out. Those that compare find what is right, as the
task has it, in the row's `answer`. All cost a time that is linear in the length, but `maths`, which runs where it can
be killed.
"""

from deepseek_jax.rl.rewards.form import accuracy_reward, format_reward, tags_reward

__all__ = ["accuracy_reward", "format_reward", "tags_reward"]
