"""LoCoMo's own metric, which scores by the category of the question (arXiv 2402.17753, official evaluation)."""

import re
import string
from collections import Counter
from functools import cache
from typing import Any

from memfactory import Answer, Episode, Score, reward
from memfactory.environments.dialogue_sessions import NO_INFORMATION
from memfactory.errors import RewardError

MULTI_HOP, OPEN_DOMAIN, ADVERSARIAL = "1", "3", "5"

_ARTICLES = re.compile(r"\b(a|an|the|and)\b")  # LoCoMo leaves out "and" too; SQuAD does not
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@reward
def f1(episode: Episode) -> float | Score:
    """Word overlap by LoCoMo's rule for the category of the question; mean over the questions, in [0, 1].

    - 1, multi-hop: answer and gold are split at commas. Each part of the gold takes its best F1 over the parts of the
      answer; the score is the mean over the parts of the gold.
    - 3, open-domain: F1 against the gold up to its first semicolon, behind which stands a reason.
    - 5, adversarial: 1 if the answer says "no information available" or "not mentioned", else 0.
    - any other: F1.

    F1 = 2 |answer & gold| / (|answer| + |gold|) over the stems (nltk's Porter stemmer, as in the official script) of
    lower-cased words without punctuation and without a, an, the and "and". Of several golds the best counts.

    Gaming: as `answer.token_f1`. In category 1 an answer that lists many parts pays, because parts that are in no gold
    cost nothing. In category 5 a disclaimer before a wrong answer is enough.
    """
    values = [0.0 if answer.text is None else _score(answer.text, answer) for answer in episode.answers]
    return sum(values) / len(values) if values else Score(None, "the episode answers no question")


def _score(text: str, answer: Answer) -> float:
    category = answer.probe.category
    if category == ADVERSARIAL:
        return float(any(phrase.lower() in text.lower() for phrase in NO_INFORMATION))
    return max((_against(text, gold, category) for gold in answer.probe.answers), default=0.0)


def _against(text: str, gold: str, category: str) -> float:
    if category == MULTI_HOP:
        parts = [max(_overlap(said, part) for said in text.split(",")) for part in gold.split(",")]
        return sum(parts) / len(parts)
    return _overlap(text, gold.split(";")[0] if category == OPEN_DOMAIN else gold)


def _overlap(text: str, gold: str) -> float:
    answer, wanted = _words(text), _words(gold)
    common = sum((Counter(answer) & Counter(wanted)).values())
    # 2PR/(P+R) with P = common/len(answer) and R = common/len(wanted); no common word is 0, of empty texts too
    return 2 * common / (len(answer) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return [_stem(word) for word in _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()]


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@cache
def _stemmer() -> Any:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        why = "it reduces words to their stems with nltk, which is not installed"
        raise RewardError("locomo.f1", why, "pip install 'memfactory[train]'") from error
    return PorterStemmer()
