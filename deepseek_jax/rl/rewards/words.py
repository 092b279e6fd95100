"""Text as words: runs of letters of one script, and each sign of a script that is written without spaces."""

import re
from collections.abc import Iterator

# Letters with the marks that belong to them; of the first three each sign is a word.
SCRIPTS = {
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "Kana": "\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff",
    "Thai": "\u0e01-\u0e2e",
    "Latin": "A-Za-zªºÀ-ÖØ-öø-ʯ\u1e00-\u1eff\u0300-\u036f",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7a3",
    "Arabic": "\u0620-\u065f\u066e-\u06d3\u06d5-\u06ef\u0750-\u077f",
    "Hebrew": "\u0591-\u05f4",
    "Devanagari": "\u0900-\u0963\u0970-\u097f",
}
_SIGNS = ("Han", "Kana", "Thai")
_WORD = re.compile(
    "|".join(f"(?P<{name}>[{letters}]{'' if name in _SIGNS else '+'})" for name, letters in SCRIPTS.items())
    + r"|(?P<Other>[^\W\d_])|(?P<Number>\d+)"
)


def split_words(text: str) -> Iterator[tuple[str, str]]:
    """Script and text of each word and number."""
    for match in _WORD.finditer(text):
        assert match.lastgroup is not None
        yield match.lastgroup, match.group()
