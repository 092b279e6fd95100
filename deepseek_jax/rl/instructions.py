"""Instructions that a program can check, by the identifiers of IFEval (arXiv 2311.07911, table 1).

A check is `(reply, **arguments) -> bool`, its arguments those of the data set's `kwargs`. They are written from the
paper's descriptions. Known to differ from the authors' program: sentences are split by punctuation and not by NLTK's
trained model, keywords are text and not patterns, `*` and `**` around one text are one highlight, P.P.S. is no P.S.,
and English capitals or small letters are any language's.
"""

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)")
# A full stop behind one of these, or behind a single capital, ends no sentence.
_SHORT = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|Ltd|Co|e\.g|i\.e)|\b[A-Z])\.$")
_WORD = re.compile(r"\w+")
_CAPITAL_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, relation: str, limit: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r}: expected less than or at least")
    return count < limit if relation == "less than" else count >= limit


def count_sentences(text: str) -> int:
    """Pieces that end in `.`, `!` or `?` before white space or the end; a last piece without such an end counts."""
    count, last = 0, 0
    for end in _SENTENCE_END.finditer(text):
        piece = text[last : end.end()].strip()
        if _SHORT.search(text, last, end.end()) and text[end.end() :].strip():
            continue
        count, last = count + bool(_WORD.search(piece)), end.end()
    return count + bool(_WORD.search(text, last))


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(text.lower().count(keyword.lower()), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _language(text: str, language: str) -> bool:
    import py3langid  # pyright: ignore[reportMissingImports]

    return py3langid.classify(text)[0] == language


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(_WORD.findall(text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Divided by `***`; an empty one is none at the ends and wrong between others."""
    parts = [part.strip() for part in text.strip().split("***")]
    parts = parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]
    return len(parts) == num_paragraphs and all(parts)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs divided by an empty line: so many, and the nth, from 1, begins with the word."""
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    said = re.match(r"[\"'“‘]*([^\s.,?!'\"]*)", parts[nth_paragraph - 1])
    return said is not None and said[1].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\n\[\]]*\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = r"\s?".join(map(re.escape, postscript_marker.replace(" ", "")))
    return re.search(rf"(?<!\w)(?<!p\.){marker}", text, re.IGNORECASE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-).*\S", text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    fenced = _FENCED.fullmatch(text.strip())
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip(" <>") for title in re.findall(r"<<([^\n]+?)>>", text))


def _two(text: str) -> bool:
    parts = [part.strip() for part in text.strip().split("******")]
    parts = parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeated(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip().startswith('"') and text.strip().endswith('"')


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in _CAPITAL_WORD.findall(text)), capital_relation, capital_frequency)


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeated,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}


def follows(reply: str, instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a reply does what an instruction says; an empty one does nothing. Arguments that are None are absent.

    ValueError for an instruction that is not in ``CHECKS`` and for arguments that are not its own.
    """
    if instruction not in CHECKS:
        raise ValueError(f"instruction {instruction!r}: expected one of {', '.join(CHECKS)}")
    if instruction == "language:response_language" and importlib.util.find_spec("py3langid") is None:
        raise ValueError(f"{instruction} needs py3langid: pip install 'deepseek-jax[rewards]'")
    check = CHECKS[instruction]
    takes = [] if check in (str.isupper, str.islower) else [*inspect.signature(check).parameters][1:]
    given = {name: value for name, value in arguments.items() if value is not None}
    # JSON and Parquet have whole numbers as 3.0 where others of their column are missing.
    given = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in given.items()}
    if set(given) != set(takes):
        raise ValueError(f"{instruction} takes {', '.join(takes) or 'no arguments'}, got {', '.join(given) or 'none'}")
    return bool(reply.strip()) and bool(check(reply, **given))
