"""Language consistency, as in R1's first reinforcement learning (arXiv 2501.12948, section 2.3.2)."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.rl.rewards.words import script_of, split_words

# Told by script, so one language for each: English text and French have the same share of Latin words.
LANGUAGES = {
    "en": ("Latin",),
    "zh": ("Han",),
    "ja": ("Han", "Kana"),
    "ko": ("Hangul",),
    "ru": ("Cyrillic",),
    "el": ("Greek",),
    "ar": ("Arabic",),
    "he": ("Hebrew",),
    "hi": ("Devanagari",),
    "th": ("Thai",),
}
# Code and formulas are in no language. A part that opens again begins anew, which keeps the cost linear.
_NO_TEXT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$"
    r"|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*",
    re.DOTALL,
)


def language(target: str = "en") -> Callable[[str, Mapping[str, Any]], float | None]:
    """The reward for a target: one of LANGUAGES, unless the row has a column `language`."""
    _scripts(target)

    def score(completion: str, row: Mapping[str, Any]) -> float | None:
        """Words in the target language / words of the thought (of all where no thought ends); None: no words.

        Words are told by script. Code, formulas, numbers, single letters and words in capitals alone, which name
        things in any language, are not counted; a Chinese character is a word.
        """
        scripts = _scripts(row.get("language") or target)
        thought, end, _ = completion.rpartition(END_THINK)
        text = _NO_TEXT.sub(" ", (thought if end else completion).replace(THINK, " "))
        ours = total = 0
        for word, count in Counter(split_words(text)).items():
            script = script_of(word)
            if script != "Number" and not _is_symbol(script, word):
                total += count
                ours += count * (script in scripts)
        return ours / total if total else None

    return score


def _is_symbol(script: str, word: str) -> bool:
    return script in ("Latin", "Greek") and (len(word) == 1 or word.isupper())


def _scripts(name: Any) -> tuple[str, ...]:
    if name not in LANGUAGES:
        raise ValueError(f"language {name!r}: expected one of {', '.join(LANGUAGES)}")
    return LANGUAGES[name]
