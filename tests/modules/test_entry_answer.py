"""`CitedAnswer` and its sisters on what a real model writes, and on what nobody should write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import ModelOutputError
from memfactory.memory.entries import Entry
from memfactory.modules.entry_answer import CitedAnswer, DirectAnswer, DistilledAnswer, EntriesState, Reply, WordAnswer

# Replies of SmolLM2-135M-Instruct (Q4_1, greedy and at temperature 1) to `CitedAnswer().render(...)` over three
# entries, as they came; it mostly does not do as it is asked, which is what a parser must survive.
REAL = [
    (
        "I'm sorry for your loss, but as a chatbot, I don't have the ability to access personal data unless it's "
        "shared with me in a private conversation. I'm designed to respect user privacy and confidentiality. I'm here "
        "to assist you with your questions or provide information. If you're",
        (),
    ),
    ("You can use the [NO_CITE] option to avoid using the [CITE] mark.", ()),
    ('Milo says: "5! We should agree with her."', ()),
    ('This user, "Martha," goes "E3-E7".', ()),
    (
        "It's a widespread availability conjecture, but my staffnote or one of my mates used to point to [GAFE1, "
        "GAFE2, GAFE3, GAFE4, GAFE5, E1, E4, E2, GAFE4,",
        (),
    ),
    (
        "Don't use [NO_CITE] with this input as it is deprecated as it will match the snark. Please use other badges "
        "to represent approved input.",
        (),
    ),
    (
        "Mm, now I have more information about a famous soldier.\nMn, i can never say no to that. And the e21, nah, i "
        "think he means something. He's angry about kaiser albania.",
        (),
    ),
]


@pytest.mark.parametrize(("text", "cited"), REAL)
def test_real_replies_cite_only_in_brackets_and_keep_their_words(text: str, cited: tuple[str, ...]) -> None:
    reply = CitedAnswer().parse(text)
    assert reply.cited == cited
    assert reply.text == " ".join(text.replace("[NO_CITE]", "").split())


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("A goat. [e1, e4]", Reply("A goat.", ("e1", "e4"))),
        ("A goat [e1] and a dog [e12].", Reply("A goat and a dog .", ("e1", "e12"))),
        ("A goat. [NO_CITE]", Reply("A goat.")),
        ("A goat.", Reply("A goat.")),
        ("A goat. [e1][e1] [e1,e2]", Reply("A goat.", ("e1", "e2"))),
        ("A goat. [e1; e2 and e3]", Reply("A goat.", ("e1", "e2", "e3"))),
        ("A goat. [see e7]", Reply("A goat.", ("e7",))),
        ("The list [1, 2] stays. [e2]", Reply("The list [1, 2] stays.", ("e2",))),
        ("<think>[e9] no, [e1]</think>A goat. [e2]", Reply("A goat.", ("e2",))),
        ("[e3] A goat.", Reply("A goat.", ("e3",))),
        # not ids
        ("A goat. [e0]", Reply("A goat. [e0]")),
        ("A goat. [e01]", Reply("A goat. [e01]")),
        ("A goat. [E1]", Reply("A goat. [E1]")),
        ("A goat. [the1, e2x, _e3]", Reply("A goat. [the1, e2x, _e3]")),
        ("A goat. [e" + "1" * 40 + "]", Reply("A goat. [e" + "1" * 40 + "]")),
        # nested, unclosed and empty brackets
        ("A goat. [[e1]]", Reply("A goat. []", ("e1",))),
        ("A goat. [e1", Reply("A goat. [e1")),
        ("A goat. []", Reply("A goat. []")),
        ("A goat. [e1\ne2]", Reply("A goat.", ("e1", "e2"))),
        # both: what is cited counts
        ("A goat. [NO_CITE] [e1]", Reply("A goat.", ("e1",))),
        ("A goat. [NO_CITE, e1]", Reply("A goat.", ("e1",))),
        # longer than any citation: text
        ("A goat. [" + "e1 " * 200 + "]", Reply("A goat. [" + ("e1 " * 200) + "]")),
    ],
)
def test_citations_are_taken_out_and_nothing_else(text: str, reply: Reply) -> None:
    assert CitedAnswer().parse(text) == reply


@pytest.mark.parametrize("text", ["", "  \n", "[e1]", "[e1] [NO_CITE]", "<think>A goat. [e1]</think>"])
def test_a_reply_without_words_is_none(text: str) -> None:
    with pytest.raises(ModelOutputError):
        CitedAnswer().parse(text)


def test_a_reply_of_brackets_takes_no_time() -> None:
    for text in ("[" * 100_000, "[e1" * 30_000, "[]" * 50_000 + "a", "[" + "e1," * 30_000):
        assert CitedAnswer().parse(text).text


@given(st.text(max_size=80))
def test_any_text_gives_a_reply_or_says_why_not(text: str) -> None:
    for module in (CitedAnswer(), DistilledAnswer(), DirectAnswer(), WordAnswer()):
        try:
            reply = module.parse(text)
        except ModelOutputError:
            continue
        assert reply.text.strip()
        assert len(set(reply.cited)) == len(reply.cited)


@given(
    st.from_regex(r"[a-z]{1,8}( [a-z]{1,8}){0,3}", fullmatch=True),
    st.lists(st.integers(1, 99).map("e{}".format), unique=True, max_size=4),
)
def test_what_a_teacher_writes_is_read_back(text: str, cited: list[str]) -> None:
    reply = Reply(text, tuple(cited))
    for module in (CitedAnswer(), DistilledAnswer(), WordAnswer()):
        assert module.parse(module.write(reply)) == reply
    assert DirectAnswer().parse(DirectAnswer().write(reply)) == Reply(text)


# SmolLM2-135M-Instruct again, asked by `DistilledAnswer().render(...)`.
@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("The answer: The answer is the answer.", Reply("The answer is the answer.")),
        (
            "<entries>\ne1: Anna has a goat named Billy.\ne4: Anna's sister plays the oboe.\ne7: Anna's sister works "
            "as a baker in Lima.\n</entries>\n<question>Where do I work?</question>\nAnswer: the",
            Reply("the", ("e1", "e4", "e7")),
        ),
        (
            "Reply with two lines:\nTurn relative dates into calendar dates. Usage of older entry did not contradict "
            "our request. Use useful full entries. Here's the answer: E12: Tom's exam is on 14 May 2024.",
            Reply("E12: Tom's exam is on 14 May 2024."),
        ),
    ],
)
def test_real_distilled_answers(text: str, reply: Reply) -> None:
    assert DistilledAnswer().parse(text) == reply


@pytest.mark.parametrize(
    "text",
    [
        "The answer is: e1",
        "Where does Jeb hold a kangaroo?",
        "<legend>Dice?</legend>\nConsult the archive.</legend>",
        "Alright, so there's the ID 48, but no answer 53. So the answer to that question is either the answer 48, or",
    ],
)
def test_real_distilled_answers_that_have_no_answer(text: str) -> None:
    with pytest.raises(ModelOutputError, match="Answer:"):
        DistilledAnswer().parse(text)


def test_the_prompt_shows_entries_with_their_times_as_data() -> None:
    entries = (
        Entry(id="e1", owner="", text="{{ question }} </entries>", time="2024-05-12"),
        Entry(id="e2", owner="", text="a dog"),
    )
    prompt = CitedAnswer().render(EntriesState("who?", entries))[0]["content"]
    assert "e1 (2024-05-12): {{ question }} </entries>\ne2: a dog\n" in prompt
    assert "(the memory holds nothing about this)" in CitedAnswer().render(EntriesState("who?", ()))[0]["content"]
