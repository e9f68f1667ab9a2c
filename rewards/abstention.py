"""Rewards on saying "I do not know" exactly when the memory does not hold the answer."""

from memfactory import Answer, Episode, Score, reward
from memfactory.reward import matching

PHRASES = (
    "I do not know",
    "I don't know",
    "not mentioned",
    "no information",
    "not enough information",
    "insufficient information",
    "cannot be determined",
    "can't be determined",
    "cannot answer",
    "can't answer",
    "unanswerable",
)
"""What counts as abstaining: whole words, after normalisation."""


@reward(role="gate", missing="drop")
def calibrated(episode: Episode, *, phrases: tuple[str, ...] = PHRASES) -> float | Score:
    """1 if the agent abstains where the memory does not support an answer and answers where it does, else 0; mean over
    the questions, in [0, 1].

    An answer is supported if the final memory holds all of the question's evidence, and never where
    ``metadata["answerable"]`` is False. Questions of answerable tasks without evidence are left out; None if that
    leaves none. To abstain is to give an answer with one of `phrases` and no gold alias in it: an answer hidden behind
    a disclaimer is an answer. An answer that could not be extracted scores 0 either way. As a gate, None
    fails: use it on tasks that say what would support their answers.

    Source: the no-supply-reject constraint of SearchLLM (arXiv 2603.10473, section 3.2); LoCoMo's adversarial
    questions look for two of the phrases (arXiv 2402.17753).
    Gaming: remember nothing and always abstain, which scores 1. As a gate that earns nothing where the answer is the
    objective; never use it as an objective alone. A wrong guess behind a disclaimer counts as abstaining.
    """
    pairs = [(_supported(episode, answer), answer) for answer in episode.answers]
    values = [float(_fits(answer, held, phrases)) for held, answer in pairs if held is not None]
    return sum(values) / len(values) if values else Score(None, "nothing says whether the memory supports an answer")


def _supported(episode: Episode, answer: Answer) -> bool | None:
    """Whether the final memory supports an answer; None where the task does not say what would."""
    if episode.task.metadata.get("answerable") is False:
        return False
    held = matching.share_held(episode.memory, (evidence.text for evidence in answer.probe.evidence))
    return None if held is None else held == 1.0


def _fits(answer: Answer, held: bool, phrases: tuple[str, ...]) -> bool:
    if answer.text is None:
        return False
    text = answer.text.replace("\u2019", "'")  # a typographic apostrophe would survive normalisation
    abstains = matching.contains(text, phrases) and not matching.contains(text, answer.probe.answers)
    return abstains != held
