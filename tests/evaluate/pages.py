"""Runs and episodes made by hand for reports, and a headless browser to open them."""

from __future__ import annotations

import html
import random
import re
import subprocess
from pathlib import Path

from memfactory.episode import Answer, Episode, Evidence, Probe, Score, StopReason, Task, Turn
from memfactory.recipe import Recipe
from memfactory.runs import RunFolder

ATTACK = (
    "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'</script><!--<b>\u2028\ud800"
)
ESCAPED = "&lt;img src=x onerror="


def make_run(path: Path, *, name: str = "quickstart") -> RunFolder:
    recipe = {
        "name": name,
        "model": {"tiny": {}},
        "environment": {"name": "ledger"},
        "rewards": [{"name": "answer.exact_match"}, {"name": "memory.brevity", "weight": 0.1}],
        "train": {"max_steps": 60, "learning_rate": 1e-3},
    }
    return RunFolder.open(path, Recipe.model_validate(recipe), resume=False)


def make_episode(rng: random.Random, skill: float, id: str, *, attack: str = "", group: str = "g0") -> Episode:
    """A plausible episode over four chunks, answered rightly with probability `skill`."""
    people, places = ["Ann", "Bertil", "Chiara", "Deniz"], ["Oslo", "Lima", "Kyoto", "Accra", "Turin"]
    where = {person: rng.choice(places) for person in people}
    stream = tuple(
        f"The harbour was quiet that day. {person} moved to {where[person]} and bought a small boat. "
        f"Nobody in the market spoke of it.{attack}"
        for person in people
    )
    asked = rng.choice(people)
    evidence = Evidence(f"{asked} moved to {where[asked]}", people.index(asked))
    probe = Probe(f"Where does {asked} live now?{attack}", (where[asked],), (evidence,))
    right, memory, turns = rng.random() < skill, "", []
    for index, chunk in enumerate(stream):
        known = people[index] if right or people[index] != asked else "Somebody"
        kept = memory if right or index != 3 else memory.partition(" ")[2]  # a wrong episode forgets a word
        after = f"{kept} {known}: {where[people[index]]}.".strip() + attack
        turns.append(
            Turn(
                module="write",
                prompt_ids=list(range(180 + len(memory) // 4)),
                completion_ids=list(range(len(after) // 4)),
                logprobs=[-0.1] * (len(after) // 4),
                text=after,
                stop=StopReason.STOP if right or index != 2 else StopReason.LENGTH,
                messages=[
                    {
                        "role": "user",
                        "content": f"Keep notes to answer: {probe.question}\n\n{chunk}\n\nYour notes: {memory}",
                    }
                ],
                chunk=index,
                memory_before=memory,
                memory_after=after,
                error="" if right or index != 2 else "the text has no <memory> block",
            )
        )
        memory = after
    given = where[asked] if right else None if rng.random() < 0.3 else rng.choice(places)
    reward = float(given == where[asked])
    turns.append(
        Turn(
            "answer",
            list(range(120)),
            list(range(6)),
            [-0.1] * 6,
            f"The answer is \\boxed{{{given or ''}}}",
            StopReason.STOP,
            [{"role": "user", "content": f"{memory}\n\n{probe.question}"}],
            memory_before=memory,
            memory_after=memory,
        )
    )
    brevity = Score(None, "the tokenizer could not be asked") if rng.random() < 0.1 else Score(round(rng.random(), 2))
    episode = Episode(
        Task(f"task-{id}", stream, (probe,)),
        turns,
        [Answer(probe, given, turns[-1].text)],
        memory,
        id,
        group,
        {
            f"answer.exact_match{attack}": Score(reward, f"'{given}' against '{where[asked]}'{attack}"),
            "memory.brevity": brevity,
        },
        reward,
        reward - skill,
    )
    for turn in turns:
        turn.advantage = episode.advantage
    return episode


def browse(chromium: str, profile: Path, *arguments: str) -> str:
    """Run a headless Chromium with a new profile; returns its standard output."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", *arguments], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode("utf-8", errors="replace")


def dom(chromium: str, page: Path, tmp_path: Path, fragment: str = "") -> str:
    """The document after its scripts ran, without the text of its script elements."""
    text = browse(chromium, tmp_path / "profile", "--dump-dom", page.as_uri() + fragment)
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def plain(markup: str) -> str:
    """The text a reader sees in a piece of markup."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def rows(body: str, name: str) -> list[list[tuple[str, str]]]:
    """The first table of class `name`, its head included: tooltip and markup of every cell."""
    table = re.search(f'<table class="{name}">(.*?)</table>', body, re.DOTALL)
    assert table is not None
    return [
        [
            (html.unescape("".join(re.findall(r'title="(.*?)"', attributes))), markup)
            for attributes, markup in re.findall(r"<t[hd]\b(.*?)>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr\b.*?</tr>", table[1], re.DOTALL)
    ]


def driven(page: Path, script: str) -> Path:
    """A copy of the page in which `script` acts in the place of a user."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    copy = page.with_name("driven.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy
