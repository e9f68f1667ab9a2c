"""Prompts: every variable stands in them as it is, text is never a template, and order decides what is shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import RecipeError
from memfactory.modules import PROMPT_SETS, PromptOrder, prompt_set

EVERY = [pytest.param(name, order, id=f"{name}-{order}") for name in PROMPT_SETS for order in PromptOrder]
INJECTIONS = [
    "{{ question }}",
    "{{ 7 * 7 }}",
    "{% for x in range(10**9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{# nothing #}",
    "{% raw %}",
    "{{",
    "%}",
    "{{ undefined_variable }}",
    "<b>&amp;</b>",
]


@pytest.mark.parametrize(("name", "order"), EVERY)
@pytest.mark.parametrize("text", INJECTIONS)
def test_template_code_in_values_is_inert(name, order, text):
    prompts = prompt_set(name, order)
    for place in ("question", "memory", "chunk"):
        values = {"question": "Q?", "memory": "M", "chunk": "C"} | {place: text}
        assert text in prompts.render_write(**values)
        del values["chunk"]
        if place != "chunk":
            assert text in prompts.render_answer(**values)


@pytest.mark.parametrize(("name", "order"), EVERY)
@given(question=st.text(), memory=st.text(min_size=1), chunk=st.text())
def test_every_value_stands_in_the_prompt_as_it_is(name, order, question, memory, chunk):
    prompts = prompt_set(name, order)
    write = prompts.render_write(question=question, memory=memory, chunk=chunk)
    answer = prompts.render_answer(question=question, memory=memory)
    assert all(value in write for value in (question, memory, chunk))
    assert all(value in answer for value in (question, memory))
    # nothing but the values differs from prompt to prompt
    fixed = len(prompts.render_write(question="", memory="m", chunk="")) - 1
    assert len(write) == fixed + len(question) + len(memory) + len(chunk)


@pytest.mark.parametrize(("name", "order"), EVERY)
def test_the_answer_sees_no_chunk_and_an_empty_memory_is_said(name, order):
    prompts = prompt_set(name, order)
    assert prompts.empty_memory in prompts.render_write(question="Q", memory="", chunk="C")
    assert prompts.empty_memory in prompts.render_answer(question="Q", memory="")
    assert "chunk" not in prompts.answer


@pytest.mark.parametrize("name", list(PROMPT_SETS))
def test_shared_order_shares_everything_up_to_the_memory(name):
    chunk = "the chunk " * 50
    for order, shares_chunk in ((PromptOrder.SHARED, True), (PromptOrder.PAPER, False)):
        prompts = prompt_set(name, order)
        one, other = (
            prompts.render_write(question="Which?", memory=memory, chunk=chunk) for memory in ("alpha", "omega")
        )
        common = one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]
        assert "Which?" in common
        assert (chunk in common) == shares_chunk
        assert one[len(common) :].startswith("alpha")


@pytest.mark.parametrize("name", list(PROMPT_SETS))
def test_both_orders_say_the_same_words(name):
    values = {"question": "Which one?", "memory": "some memory", "chunk": "a chunk of text"}
    paper, shared = (prompt_set(name, order) for order in (PromptOrder.PAPER, PromptOrder.SHARED))
    assert sorted(paper.render_write(**values).split()) == sorted(shared.render_write(**values).split())
    assert paper.answer == shared.answer


def test_unknown_set_names_those_that_exist():
    with pytest.raises(RecipeError, match="document, sentence, words"):
        prompt_set("documents", "shared")
    with pytest.raises(ValueError, match="papr"):
        prompt_set("document", "papr")
