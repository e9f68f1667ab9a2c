"""From messages to what is read: everything once, nothing twice, whatever a client sends again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memfactory.serve.transcript import ChatMessage, Exchange, marks_of, pieces, plan


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def assistant(text: str) -> ChatMessage:
    return ChatMessage("assistant", text)


def test_the_pieces_of_a_task_are_its_stream() -> None:
    made = plan([*map(user, ["one", "two ?", "user: three"]), user("what ?")])
    assert made.stream == ("one", "two ?", "user: three")
    assert made.question.content == "what ?"


def test_how_roles_are_read() -> None:
    conversation = [
        ChatMessage("system", "be kind"),
        user("a document"),
        user("hello"),
        assistant("good day"),
        assistant("what is it ?"),
        user("  "),
        ChatMessage("user", "so", "anna"),
    ]
    assert pieces(conversation) == [
        "system: be kind",
        "a document",
        "user: hello\nassistant: good day",
        "assistant: what is it ?",
        "anna: so",
    ]


class Reader:
    """Reads as a server does, and answers."""

    def __init__(self) -> None:
        self.read: set[bytes] = set()
        self.last: Exchange | None = None
        self.seen: list[str] = []

    def ask(self, conversation: list[ChatMessage], answer: str) -> tuple[str, ...]:
        made = plan(conversation, self.read, self.last)
        self.read |= set(made.marks)
        self.last = made.answered(answer)
        self.seen += made.stream
        return made.stream


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.lists(st.sampled_from("xyz"), max_size=2)),
        min_size=1,
        max_size=12,
    )
)
def test_conversations_that_are_sent_again_are_read_once_and_in_order(
    steps: list[tuple[int, bool, list[str]]],
) -> None:
    """Some conversations go on by turns; each step sends one in whole, perhaps twice, perhaps with documents."""
    reader, number = Reader(), 0
    conversations: list[list[ChatMessage]] = [[], [], []]
    expected: list[str] = []
    for which, again, documents in steps:
        conversation = conversations[which]
        for document in documents:
            number += 1
            conversation.append(user(f"document {document} {number}"))
        question = user(f"question {number} of {which} at {len(conversation)}")
        waiting = reader.last
        reader.ask([*conversation, question], "first")
        if again:  # the answer got lost on its way
            assert reader.ask([*conversation, question], "second") == ()
        answer = "second" if again else "first"
        if waiting is not None:
            expected.append(waiting.said)
        expected += [f"{message.content}" for message in conversation[len(conversation) - len(documents) :]]
        conversation += [question, assistant(answer)]
    assert reader.seen == expected


def test_an_answer_that_the_client_replaced_is_the_one_that_is_read() -> None:
    reader = Reader()
    reader.ask([user("q1")], "a1")
    assert reader.ask([user("q1"), assistant("better"), user("q2")], "a2") == ("user: q1\nassistant: better",)
    assert reader.ask([user("q1"), assistant("better"), user("q2"), assistant("a2"), user("q3")], "") == (
        "user: q2\nassistant: a2",
    )


def test_marks_depend_on_all_that_stands_before_and_on_who_said_it() -> None:
    variants = [
        [user("a"), user("b")],
        [user("ab"), user("")],
        [user("a"), assistant("b")],
        [ChatMessage("user", "a", "b"), user("")],
        [user("\ud83d"), user("b")],
        [user("c"), user("b")],
    ]
    assert len({tuple(marks_of(variant)) for variant in variants}) == len(variants)
    assert len({marks_of(variant)[-1] for variant in variants}) == len(variants)
