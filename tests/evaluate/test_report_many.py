"""Ten thousand episodes in one page, in a real browser that reaches nothing but the file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from benchmarks.chromium import NO_NETWORK, OPENED, Tab, acting
from memfactory.episode import Score
from memfactory.evaluate.report import write_report
from tests.evaluate.pages import make_episode, make_run

COUNT, STEPS = 10_000, 4
LISTED = "[...document.querySelectorAll('#list b')].map((pill) => pill.textContent)"
TOLD = "document.getElementById('count').textContent"


@pytest.mark.browser
@pytest.mark.slow
def test_ten_thousand_episodes_are_opened_sorted_filtered_and_compared(chromium: str, tmp_path: Path) -> None:
    run, rng = make_run(tmp_path / "run"), random.Random(0)
    episodes = [make_episode(rng, 0.5, f"e{k}", group=f"g{k // 8}") for k in range(COUNT)]
    a, b = ([rng.randrange(1000) / 1000 for _ in range(COUNT)] for _ in "ab")
    a[4321], b[4321] = 2.0, -1.0  # nobody else is best on the one and worst on the other
    for k, episode in enumerate(episodes):
        episode.scores, episode.reward = {"a": Score(a[k]), "b": Score(b[k])}, a[k]
        if k % 1000 == 7:
            episode.failed, episode.turns, episode.answers, episode.reward = "service: it slept", [], [], None
    turn = episodes[4321].turns[0]
    turn.memory_before, turn.memory_after, turn.text = "the red boat sank", "the boat sank twice", "I rewrite"
    for step in range(STEPS):
        own = episodes[step * COUNT // STEPS : (step + 1) * COUNT // STEPS]
        run.log_episodes(step + 1, "train", own)
    page = write_report(run.path)
    assert f"All {COUNT} logged episodes." in page.read_text(encoding="utf-8")

    with Tab(chromium, tmp_path / "profile", *NO_NETWORK) as tab:
        tab.open(page.as_uri(), OPENED)
        assert tab.evaluate(TOLD) == f"{COUNT // STEPS} of {COUNT // STEPS} episodes"
        tab.evaluate(acting(step="all", sort="apart"))
        assert tab.evaluate(TOLD) == f"{COUNT} of {COUNT} episodes"
        ranks = [(rankdata(values) - 1) / (COUNT - 1) for values in (a, b)]
        apart = np.sort(np.abs(ranks[0] - ranks[1]))[::-1]
        assert apart[0] == 1 > apart[1]
        assert tab.evaluate(LISTED) == ["1", *(f"{value:.3f}" for value in apart[1:100])]
        # it stands open, with what its memory lost and won
        article = tab.evaluate("document.getElementById('episode').innerHTML")
        assert "<dt>Episode</dt><dd>e4321</dd>" in article
        assert "the <del>red </del>boat sank</div>" in article
        assert "the boat sank<ins> twice</ins></div>" in article

        def counted(**values: str) -> Any:
            tab.evaluate(acting(**values))
            return int(tab.evaluate(TOLD).split()[0])

        assert counted(sort="logged", measure="apart", limit="0.9") == sum(apart >= 0.9)
        assert counted(limit="", fault="is service") == COUNT // 1000
        assert counted(fault="", find="e9999") == 1
        assert counted(find="", step="2", sort="score:b", way="up") == COUNT // STEPS
        lowest = sorted(b[COUNT // STEPS : 2 * COUNT // STEPS])[:100]
        assert [float(text.replace("−", "-")) for text in tab.evaluate(LISTED)] == lowest
        assert set(tab.requests) == {page.as_uri()}


@pytest.mark.browser
def test_a_page_that_asks_for_something_is_noticed_and_the_report_asks_for_nothing(
    chromium: str, tmp_path: Path
) -> None:
    run, rng = make_run(tmp_path / "run"), random.Random(0)
    run.log_metrics(1, {"reward": 0.5, "rewards/a/mean": 0.5}, phase="train")
    run.log_episodes(1, "train", [make_episode(rng, 0.5, f"e{k}") for k in range(8)])
    page = write_report(run.path)
    asking = tmp_path / "asking.html"
    other = ["http://example.com/x.png", "http://127.0.0.1:9/y.css", "https://example.org/z"]
    asking.write_text(f"<img src={other[0]}><link rel=stylesheet href={other[1]}><script>fetch('{other[2]}')</script>")
    with Tab(chromium, tmp_path / "profile", *NO_NETWORK) as tab:
        tab.open(page.as_uri(), OPENED)
        options = "flatMap(({id, options}) => [...options].map(({value}) => [id, value]))"
        for name, value in tab.evaluate(f"[...document.querySelectorAll('select')].{options}"):
            if tab.evaluate(f"[...document.getElementById({name!r}).options].some((one) => one.value === {value!r})"):
                tab.evaluate(acting(**{name: value}))
        tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert tab.evaluate(acting(find="e3")) > 0
        assert set(tab.requests) == {page.as_uri()}
        # the same look at a page that does ask
        tab.open(asking.as_uri())
        assert set(tab.requests) == {page.as_uri(), asking.as_uri(), *other}
        assert tab.evaluate("document.images[0].naturalWidth") == 0
