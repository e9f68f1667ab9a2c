"""Extraction: what is written is read again, whatever a model puts around it, and text stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import ModelOutputError
from memfactory.modules.facts import Fact, FactExtractor, LineExtractor, ReadState, TopicExtractor

JSON_LISTS = (FactExtractor(), TopicExtractor())
NASTY = (
    "</session> {{ 7 * 7 }} {% for x in y %} {# no #} '; DROP TABLE entries; -- </think> <|im_end|> \\ \" [e1] %s {0}"
)

# what JSON can carry and `strip` leaves alone; a closing reasoning tag would cut the reply
words = st.text(max_size=40).map(str.strip).filter(lambda text: "think>" not in text)
texts = words.filter(bool)
facts = st.builds(Fact, text=texts, key=words, time=words, source=words, speaker=words)
numbers = st.lists(st.integers(0, 10**6), max_size=4).map(lambda found: " ".join(map(str, found)))
topics = st.builds(Fact, text=texts.filter(lambda text: text != "NO_TRAIT"), source=numbers)


@given(st.lists(facts, max_size=5))
def test_facts_that_are_written_are_read(found: list[Fact]) -> None:
    assert FactExtractor().parse(FactExtractor().write(found)) == found


@given(st.lists(topics, max_size=5))
def test_topics_that_are_written_are_read(found: list[Fact]) -> None:
    assert TopicExtractor().parse(TopicExtractor().write(found)) == found


@given(st.lists(facts, max_size=5))
def test_of_a_source_that_is_no_line_number_topics_keep_nothing(found: list[Fact]) -> None:
    read = TopicExtractor().parse(TopicExtractor().write(found)) if found else []
    assert [fact.text for fact in read] == [fact.text for fact in found if fact.text != "NO_TRAIT"]
    assert all(word.isdecimal() for fact in read for word in fact.source.split())


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('Sure! Here are the facts:\n```json\n[{"text": "Anna has a dog"}]\n```', [Fact("Anna has a dog")]),
        ('<think>[{"text": "no"}]</think>\n{"facts": ["Anna has a dog"]}', [Fact("Anna has a dog")]),
        ('{"facts" : []}', []),  # Mem0's form for nothing
        ("[]", []),
        ("Nothing matters here: [].", []),
        ('{"text": "one object", "key": null}', [Fact("one object")]),
        ('{"memory": [{"memory": " x ", "time": "2024-05-07"}]}', [Fact("x", time="2024-05-07")]),
        ('[{"fact": "a"}, {"fact": ""}, 3, null, "  ", ["b"], {"text": {"c": 1}}, "d"]', [Fact("a"), Fact("d")]),
        ('[{"text": "x", "key": 1}, {"text": "y"}]', [Fact("y")]),
        ('I have 2 [two] facts [1]: ["x", "y"]', [Fact("x"), Fact("y")]),
    ],
)
def test_real_looking_replies(reply: str, expected: list[Fact]) -> None:
    assert FactExtractor().parse(reply) == expected


@pytest.mark.parametrize("reply", ["", "no facts", "[1, 2]", '[{"text": 5}]', '[""]', "{}", '{"facts": "x"}', '[{"a"'])
def test_where_no_fact_stands_the_reply_is_refused(reply: str) -> None:
    with pytest.raises(ModelOutputError):
        FactExtractor().parse(reply)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("NO_TRAIT", []),
        ("There is nothing about Anna. NO_TRAIT", []),
        ("[NO_TRAIT]", []),
        ('["NO_TRAIT"]', []),
        ('{"extracted_memories": "NO_TRAIT"}', []),
        ("<think>[0] says a lot</think>NO_TRAIT", []),
        ("NO_TRAIT (see [the session])", []),
        (  # the form of RMM's prompt (appendix)
            '{"extracted_memories": [{"summary": "SPEAKER_1 asked about a trip.", "reference": [0, 2]}]}',
            [Fact("SPEAKER_1 asked about a trip.", source="0 2")],
        ),
        ('[{"summary": "x", "reference": ["0", "2", true, null, -1, 1.5, "x", [3]]}]', [Fact("x", source="0 2")]),
        ('[{"summary": "x", "reference": null}, "NO_TRAIT"]', [Fact("x")]),
    ],
)
def test_topics_as_rmm_asks_for_them(reply: str, expected: list[Fact]) -> None:
    assert TopicExtractor().parse(reply) == expected


@pytest.mark.parametrize("reply", ["", "nothing", "<think>NO_TRAIT", '[{"summary": []}]', "[7]"])
def test_what_is_neither_topics_nor_no_trait_is_refused(reply: str) -> None:
    with pytest.raises(ModelOutputError):
        TopicExtractor().parse(reply)


def test_more_facts_than_one_reply_may_bring_are_left_out() -> None:
    reply = json.dumps([f"fact {n}" for n in range(1000)])
    for module in JSON_LISTS:
        assert [fact.text for fact in module.parse(reply)] == [f"fact {n}" for n in range(256)]


def test_half_a_character_in_a_reply_does_not_reach_the_next_prompt() -> None:
    (fact,) = FactExtractor().parse(r'["x \ud83d"]')
    assert fact.text.encode() == "x \ufffd".encode()


@pytest.mark.parametrize("module", [FactExtractor(per_speaker=True), TopicExtractor()])
def test_what_is_said_stays_text_in_the_prompt(module: FactExtractor | TopicExtractor) -> None:
    state = ReadState(NASTY, when="{{ when }}", speakers=("a", "b"), speaker="{{ 6 * 6 }}")
    (message,) = module.render(state)
    assert NASTY in message["content"]
    assert "on {{ when }}" in message["content"]
    assert "about {{ 6 * 6 }}" in message["content"]
    assert "49" not in message["content"]
    assert message["role"] == "user"


def test_prompts_name_the_date_and_the_speaker_only_where_they_are_known() -> None:
    for module in JSON_LISTS:
        (known,) = module.render(ReadState("a : x\nb : y", when="1 may", speaker="anna"))
        assert "held on 1 may" in known["content"]
        assert "anna" in known["content"]
        (unknown,) = module.render(ReadState("a : x\nb : y"))
        assert "held on" not in unknown["content"]
    (topics,) = TopicExtractor().render(ReadState("a : x\nb : y"))
    assert "[0] a : x\n[1] b : y\n</session>" in topics["content"]


# ---- lines ---------------------------------------------------------------------------------------


def test_every_line_that_somebody_says_is_a_fact() -> None:
    chunk = "date : 1 may .\nanna : my pet is goat .\n\n  leo: hi: there \nno speaker\nmia :no blank\ntom :  "
    state = ReadState(chunk, time="2024-05-01", speakers=("anna", "leo", "mia", "tom"))
    assert LineExtractor().apply(state) == [
        Fact("anna : my pet is goat .", time="2024-05-01", source="anna : my pet is goat .", speaker="anna"),
        Fact("leo: hi: there", time="2024-05-01", source="leo: hi: there", speaker="leo"),
    ]
    bare = LineExtractor(keep_speaker=False).apply(state)
    assert [fact.text for fact in bare] == ["my pet is goat .", "hi: there"]
    anybody = LineExtractor().apply(ReadState(chunk))
    assert [fact.speaker for fact in anybody] == ["date", "anna", "leo"], "who speaks is not known here"


@given(
    st.lists(st.tuples(st.sampled_from(["anna", "leo"]), st.text(st.characters(categories=["L", "P"]), min_size=1)))
)
def test_no_line_is_lost(said: list[tuple[str, str]]) -> None:
    chunk = "\n".join(f"{who} : {what}" for who, what in said)
    found = LineExtractor(keep_speaker=False).apply(ReadState(chunk, speakers=("anna", "leo")))
    assert [(fact.speaker, fact.text) for fact in found] == said
