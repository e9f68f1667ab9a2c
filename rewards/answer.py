"""Rewards on the final answer. Gold answers are aliases: the best one counts, and several questions are averaged."""

import re
from collections.abc import Callable

from memfactory import Episode, ModelOutputError, Score, Turn, reward
from memfactory.modules import last_boxed, strip_reasoning
from memfactory.reward import matching
from memfactory.reward.judge import Judge, Rubric

Value = float | Score


@reward
def exact_match(episode: Episode) -> Value:
    """1 if the extracted answer equals a gold alias after normalisation, else 0; mean over the questions, in [0, 1].

    Source: MemAgent's verifier (arXiv 2507.02259); normalisation of SQuAD (arXiv 1606.05250).
    Gaming: nothing but guessing pays; small answer sets make guesses cheap.
    """
    return _mean(episode, lambda text, gold: float(matching.exact_match(text, gold)))


@reward
def containment(episode: Episode) -> Value:
    """1 if the answer holds a gold alias as whole words, else 0; mean over the questions, in [0, 1].

    Source: sub-EM, as for RULER's question answering (arXiv 2404.06654).
    Gaming: an answer that lists every candidate. Put `length.within` beside it, or use `token_f1`.
    """
    return _mean(episode, lambda text, gold: float(matching.contains(text, gold)))


@reward
def token_f1(episode: Episode) -> Value:
    """F1 = 2 |answer & gold| / (|answer| + |gold|) over words, best alias; mean over the questions, in [0, 1].

    Source: SQuAD (arXiv 1606.05250).
    Gaming: words of the question that are likely in the answer earn a part of it without any memory.
    """
    return _mean(episode, matching.token_f1)


@reward
def bleu_1(episode: Episode) -> Value:
    """BLEU-1: clipped unigram precision times the brevity penalty, best alias; mean over the questions, in [0, 1].

    Source: Papineni et al. (ACL 2002) with n = 1, as Memory-R1 (arXiv 2508.19828) reports it; words are normalised as
    for `exact_match`, and nothing is smoothed.
    Gaming: as `token_f1`; an answer of one sure word is held back by the brevity penalty.
    """
    return _mean(episode, matching.bleu_1)


@reward
def all_parts(episode: Episode) -> Value:
    """Share of the required parts that the answer holds, in any order; mean over the questions, in [0, 1].

    The parts are `metadata["required"]` (several needles, frequent words). A task without has one part: any of its
    aliases. Source: RULER's string_match_all (arXiv 2404.06654).
    Gaming: as `containment`.
    """
    parts = episode.task.metadata.get("required")
    if parts is None:
        return _mean(episode, lambda text, gold: float(matching.contains(text, gold)))
    return _mean(episode, lambda text, gold: sum(matching.contains(text, [part]) for part in parts) / len(parts))


@reward
def number_match(episode: Episode) -> Value:
    """1 if the answer names the gold number and no other, digit by digit; mean over the questions, in [0, 1].

    For codes, where 007 is not 7; `numeric` compares values.
    Gaming: guessing, where codes are short.
    """
    return _mean(episode, lambda text, gold: float(set(re.findall(r"\d+", text)) == {gold[0]}))


@reward(module="answer", missing="drop")
def own_match(episode: Episode, turn: Turn) -> Value:
    """1 if the answer that this turn gave equals a gold alias after normalisation, else 0: of turns, in [0, 1].

    For credit by module: each question's turn is compared with the same question's turns of the group, and with
    `credit.attribute` the turns that wrote what it was shown answer for it. None where the record does not say which
    turn gave which answer. Source and normalisation as `exact_match`.
    Gaming: as `exact_match`.
    """
    for answer in episode.answers:
        if answer.turn is not None and episode.turns[answer.turn] is turn:
            return 0.0 if answer.text is None else float(matching.exact_match(answer.text, answer.probe.answers))
    return Score(None, "it is not recorded which answer this turn gave")


@reward(missing="drop")
def numeric(episode: Episode, *, tolerance: float = 0.0) -> Value:
    """1 if the answer names one number x, maybe repeatedly, and |x - gold| <= `tolerance`, else 0; mean over the
    questions, in [0, 1]. None where no gold answer is a number.

    1,000 is 1e3, 3.50 is 3.5, 25% is 0.25; numbers in words are not read. With tolerance 0 the comparison is exact.
    Gaming: a wide tolerance pays for the middle of the likely range.
    """
    golds = [[n for n in map(matching.the_number, a.probe.answers) if n is not None] for a in episode.answers]
    found = [None if a.text is None else matching.the_number(a.text) for a in episode.answers]
    values = [
        float(number is not None and any(matching.close(number, one, tolerance) for one in gold))
        for number, gold in zip(found, golds, strict=True)
        if gold
    ]
    return sum(values) / len(values) if values else Score(None, "no gold answer is a number")


@reward
def boxed(episode: Episode) -> Value:
    r"""1 if the content of the reply's last \boxed{...} equals a gold alias after normalisation, else 0; mean over the
    questions, in [0, 1].

    Reads the whole reply behind its reasoning, whatever the agent's answer format. An unclosed last box is 0, even
    where an earlier one is right. Source: MemAgent's verifier (arXiv 2507.02259), which looks at 300 characters.
    Gaming: none beyond guessing, because only the last box counts.
    """
    boxes = [_box(answer.raw) for answer in episode.answers]
    return _mean_of(boxes, episode, lambda box, gold: float(matching.exact_match(box, gold)))


def _mean(episode: Episode, score: Callable[[str, tuple[str, ...]], float]) -> Value:
    return _mean_of([answer.text for answer in episode.answers], episode, score)


def _mean_of(texts: list[str | None], episode: Episode, score: Callable[[str, tuple[str, ...]], float]) -> Value:
    """Mean of `score` over the questions; an answer that could not be extracted scores 0."""
    golds = [answer.probe.answers for answer in episode.answers]
    values = [0.0 if text is None else score(text, gold) for text, gold in zip(texts, golds, strict=True)]
    return sum(values) / len(values) if values else Score(None, "the episode answers no question")


def _box(raw: str) -> str | None:
    try:
        return last_boxed(strip_reasoning(raw), window=None)
    except ModelOutputError:  # reasoning without an end: there is no reply
        return None


CORRECT = Rubric(
    name="answer-correct",
    version="1",
    instructions=(
        "Compare the answer with the gold answers to the question. Answer yes if it says the same as one of them, in "
        "whatever words or form of a date or number; details beyond it do not matter if they do not contradict it. "
        "Answer no if it says something else, names several candidates, or does not answer."
    ),
    labels={"yes": 1.0, "no": 0.0},
    rule=lambda fields: float(matching.exact_match(fields["answer"], fields["gold"].split("\n"))),
)


@reward
async def correct_judge(episode: Episode, *, judge: Judge) -> Value:
    """1 if a judge finds that the answer says what a gold answer says, else 0; mean over the questions, in [0, 1].

    Without an endpoint the rubric's rule stands in: `exact_match`. A question that the judge could not grade leaves
    the episode without a score. Source: the judge of MemFactory (arXiv 2603.29493) and Memory-R1 (arXiv 2508.19828).
    Gaming: judges accept vague and long answers; an audit of LoCoMo found that up to 63 % of deliberately wrong ones
    passed. Report it beside a rule, never alone.
    """
    values = []
    for answer in episode.answers:
        if answer.text is None:
            values.append(0.0)
            continue
        gold = "\n".join(answer.probe.answers)
        score = await judge.grade(CORRECT, question=answer.probe.question, gold=gold, answer=answer.text)
        if score.value is None:
            return score
        values.append(score.value)
    return sum(values) / len(values) if values else Score(None, "the episode answers no question")
