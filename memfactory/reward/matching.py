"""Comparing an answer with its gold answers, and a memory with what it should hold and was made from.

Used by reward functions and by evaluation alike.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from decimal import Context, Decimal
from functools import lru_cache

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A number keeps its point. Chinese and Japanese write no spaces: there, each character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\d+(?:[.,]\d+)*|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_STOPWORDS = frozenset(
    """
    a about after all also am an and any are as at be because been before being between both but by can could did do
    does doing down during each for from had has have having he her here hers him his how i if in into is it its just
    may me might more most my now of off on once only or other our out over own s same she should so some
    such t than that the their them then there these they this those through to too under until up upon us very was
    we were what when where which while who whom whose why will with would you your
    """.split()
)
_NUMBER = re.compile(
    r"""(?<!\w)(?<!\w\.)               # not inside a word or another number
    (?P<sign>[-+\u2212]?)[$€£]?
    (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+)(?!\.?\d)
    (?P<exponent>[eE][-+]?\d{1,9})?
    (?P<percent>\s?(?:%|percent\b|per\ cent\b))?""",
    re.VERBOSE,
)
_EXACT = Context(prec=1000, traps=[])  # no number in a text makes it raise


def normalise(text: str) -> str:
    """Lower-cased, without punctuation, articles and extra white space (the SQuAD convention)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: Iterable[str]) -> bool:
    """Whether `answer` equals any alias after normalisation. An answer that normalises to nothing
    matches only an alias that does too."""
    return normalise(answer) in {normalise(alias) for alias in gold}


def contains(answer: str, gold: Iterable[str]) -> bool:
    """Whether any alias stands in `answer` as whole words after normalisation (sub-EM)."""
    words = f" {normalise(answer)} "
    return any(alias and f" {alias} " in words for alias in map(normalise, gold))


def token_f1(answer: str, gold: Iterable[str]) -> float:
    """Largest word-overlap F1 over the aliases, in [0, 1] (the SQuAD convention)."""
    return max((_f1(normalise(answer).split(), normalise(alias).split()) for alias in gold), default=0.0)


def bleu_1(answer: str, gold: Iterable[str]) -> float:
    """Largest BLEU-1 over the aliases, in [0, 1], on normalised words.

    BP * (sum over words of min(count in answer, count in gold)) / |answer|, BP = min(1, exp(1 - |gold| / |answer|))
    (Papineni et al., ACL 2002, with n = 1).
    """
    return max((_bleu_1(normalise(answer).split(), normalise(alias).split()) for alias in gold), default=0.0)


def _bleu_1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return min(1.0, math.exp(1 - len(gold) / len(answer))) * common / len(answer)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    # 2PR/(P+R) with P = common/len(answer) and R = common/len(gold)
    return 2 * common / (len(answer) + len(gold))


def share_held(text: str, facts: Iterable[str]) -> float | None:
    """Share of the distinct `facts` that stand in `text` as whole words after normalisation; None without facts."""
    wanted = {fact for fact in map(normalise, facts) if fact}
    if not wanted:
        return None
    words = f" {normalise(text)} "
    return sum(f" {fact} " in words for fact in wanted) / len(wanted)


def content_words(text: str) -> list[str]:
    """Lower-cased words and numbers of `text` in order, without English function words, e.g. articles and auxiliaries.

    Negations stay: "not open" says something else than "open".
    """
    return [word.replace(",", "") for word in _WORD.findall(text.lower()) if word not in _STOPWORDS]


def support(claim: str, sources: Iterable[str]) -> float | None:
    """Share of the distinct content words of `claim` that occur in any of `sources`; None where `claim` has none.

    Words are counted once, so saying a supported thing twice does not hide an unsupported one.
    """
    words = set(content_words(claim))
    known = [_vocabulary(source) for source in sources]
    return sum(any(word in one for one in known) for word in words) / len(words) if words else None


@lru_cache(maxsize=1024)
def _vocabulary(text: str) -> frozenset[str]:
    # a batch compares many short notes with the same few long chunks
    return frozenset(content_words(text))


def distinct_ngrams(items: Sequence[Hashable], n: int) -> float | None:
    """Distinct n-grams over all n-grams of `items` (distinct-n, arXiv 1510.03055); None where there is none.

    Fewer than `n` items are counted one by one.
    """
    size = n if len(items) >= n else 1
    grams = [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]
    return len(set(grams)) / len(grams) if grams else None


def numbers(text: str) -> list[Decimal]:
    """The numbers that `text` names in digits, in order: 1,000 and 1e3 are 1000, 25% is 0.25, "A4" is none."""
    found = []
    for match in _NUMBER.finditer(text):
        value = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
        if match["percent"]:
            value = _EXACT.scaleb(value, Decimal(-2))
        found.append(value.copy_negate() if match["sign"] in ("-", "\u2212") else value)
    return found


def the_number(text: str) -> Decimal | None:
    """The number that `text` names; None if it names none, or several that differ."""
    found = set(numbers(text))
    return found.pop() if len(found) == 1 else None


def close(first: Decimal, second: Decimal, tolerance: float = 0.0) -> bool:
    """Whether two numbers differ by no more than `tolerance`. With 0 the comparison is exact."""
    return first == second or _EXACT.abs(_EXACT.subtract(first, second)) <= Decimal(str(tolerance))
