"""Comparing an answer with its gold answers. Used by reward functions and by evaluation alike."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    # 2PR/(P+R) with P = common/len(answer) and R = common/len(gold)
    return 2 * common / (len(answer) + len(gold))
