"""Text to words, the same way for entries and queries, in any script and without a model.

Unicode is brought to one form (NFKC), case is folded, and runs of letters and digits are words; combining marks
stay with their letter, so Hindi or Arabic words are not torn apart. Chinese, Japanese and Korean letters become
pairs of neighbours, since the first two write no spaces (Lucene's CJK analyzer does the same); a letter that stands
alone is a word, which means that a query of one letter does not find it inside a longer run. Thai, Lao and Khmer
write no spaces either and are not cut: there only whole runs match.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Set
from itertools import pairwise

ENGLISH: frozenset[str] = frozenset(
    "a an and are as at be but by for from had has have he her his i if in into is it its me my no not of on or our"
    " she so such that the their then there these they this to was we were what when where which who will with you"
    " your".split()
)
"""Words that say little in English. Not left out by default: BM25 weighs frequent words down by itself, and a memory
may hang on one of them ("not", "with her")."""


def _marks() -> str:
    """The combining marks of the basic plane, as ranges for a character class. They are no word characters to `re`."""
    points = [point for point in range(0x300, 0xD800) if unicodedata.category(chr(point)) in ("Mn", "Mc")]
    ranges: list[list[int]] = []
    for point in points:
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7a3\U00020000-\U0003134f"
"""Hiragana, Katakana, Han with its extensions, Hangul."""
_WORD = re.compile(rf"[{_CJK}]+|(?:(?![{_CJK}])[^\W_][{_marks()}]*)+")
_IS_CJK = re.compile(f"[{_CJK}]")
_ASCII_WORD = re.compile("[a-z0-9]+")
"""What `_WORD` finds in folded ASCII, at a fifth of the time."""


def words(text: str, stopwords: Set[str] = frozenset()) -> list[str]:
    """The words of `text` in order, repeats included; no words in blank text or punctuation."""
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())
        return [word for word in found if word not in stopwords] if stopwords else found
    found = list[str]()
    for run in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        if len(run) > 1 and _IS_CJK.match(run):
            found.extend(first + second for first, second in pairwise(run))
        elif run not in stopwords:
            found.append(run)
    return found
