"""Text as words: runs of letters of one script, and each sign of a script that is written without spaces."""

import re

# Letters with the marks that belong to them, the most frequent first.
SCRIPTS = {
    "Latin": "A-Za-zªºÀ-ÖØ-öø-ʯ\u1e00-\u1eff\u0300-\u036f",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "Kana": "\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff",
    "Thai": "\u0e01-\u0e2e",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7a3",
    "Arabic": "\u0620-\u065f\u066e-\u06d3\u06d5-\u06ef\u0750-\u077f",
    "Hebrew": "\u0591-\u05f4",
    "Devanagari": "\u0900-\u0963\u0970-\u097f",
}
_SIGNS = ("Han", "Kana", "Thai")  # each a word
_PATTERNS = {name: f"[{letters}]" + ("" if name in _SIGNS else "+") for name, letters in SCRIPTS.items()}
_PATTERNS |= {"Number": r"\d+", "Other": r"[^\W\d_]"}
_WORD = re.compile("|".join(_PATTERNS.values()))
_SCRIPT = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))


def split_words(text: str) -> list[str]:
    """The words and numbers in their order."""
    return _WORD.findall(text)


def script_of(word: str) -> str:
    """The script of a word that `split_words` gave: one of SCRIPTS, Number or Other."""
    found = _SCRIPT.match(word)
    assert found is not None and found.lastgroup is not None
    return found.lastgroup
