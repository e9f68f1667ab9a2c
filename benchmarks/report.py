"""What a report of many episodes costs: seconds and memory to write it, its size, and seconds to open it, to sort it
and to filter it.

    python benchmarks/report.py                     # 10,000 episodes of 4 turns of 100 to 200 words
    python benchmarks/report.py --episodes 2000 --keep report.html

The run has token ids and log-probabilities, as training writes them: 400 tokens of prompt and 150 of completion on
every turn. Opening is measured with a headless Chromium where there is one: seconds of wall clock from the address to
the first episode painted on the page; sorting and filtering from the choice to the new list and its first episode,
painted; the smallest of three browsers. A chunk is 150 words, a prompt repeats chunk and memory, groups have 8
episodes, and words are drawn with the frequencies of a language (Zipf), which packs worse than real text.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chromium import NO_NETWORK, OPENED, Tab, acting

from memfactory.episode import Answer, Episode, Evidence, Probe, Score, StopReason, Task, Turn
from memfactory.evaluate.report import write_report
from memfactory.recipe import Recipe
from memfactory.runs import RunFolder

RECIPE = {
    "name": "many-episodes",
    "model": {"tiny": {}},
    "environment": {"name": "fact_words"},
    "rewards": [{"name": "answer.exact_match"}],
}
GROUP, STEPS = 8, 25
PROMPT, COMPLETION = 400, 150
"""Tokens of a turn, from a vocabulary of 150,000."""


class Words:
    """Words of a made-up language, frequent ones more often."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgk"
        self.known = ["".join(self.rng.choices(letters, k=self.rng.randint(2, 9))) for _ in range(8000)]
        self.weights = [1 / (rank + 3) for rank in range(len(self.known))]

    def text(self, low: int, high: int) -> str:
        return " ".join(self.rng.choices(self.known, self.weights, k=self.rng.randint(low, high)))


def write_run(path: Path, episodes: int, turns: int) -> None:
    """A run folder with that many episodes."""
    words = Words(0)
    run = RunFolder.open(path, Recipe.model_validate(RECIPE), resume=False)
    for step in range(1, STEPS + 1):
        run.log_metrics(step, {"reward": step / STEPS, "reward_std": 0.2}, phase="train")
        count = episodes // STEPS
        logged: list[Episode] = []
        for number in range(count):
            if number % GROUP == 0:
                stream = tuple(words.text(150, 150) for _ in range(turns - 1))
                probe = Probe(words.text(12, 18), (words.text(1, 3),), (Evidence(stream[0][:40], 0),))
                task = Task(f"task-{step}-{number}", stream, (probe,))
            logged.append(make_episode(words, task, f"{step}/{number}", f"{step}/{number // GROUP}"))
        run.log_episodes(step, "train", logged)  # with tokens, as `memfactory train` does


def make_episode(words: Words, task: Task, id: str, group: str) -> Episode:
    episode, memory, reward = Episode(task, id=id, group=group), "", words.rng.random()
    probe = task.probes[0]
    for chunk in [*range(len(task.stream)), None]:
        read = task.stream[chunk] if chunk is not None else ""
        text = words.text(100, 200)
        prompt = f"Keep notes to answer: {probe.question}\n\nThe piece:\n{read}\n\nYour notes:\n{memory}"
        after = text if chunk is not None else memory
        ids = [[words.rng.randrange(150_000) for _ in range(count)] for count in (PROMPT, COMPLETION)]
        logprobs = [-words.rng.expovariate(2) for _ in range(COMPLETION)]
        messages = [{"role": "user", "content": prompt}]
        turn = Turn("write", *ids, logprobs, text, StopReason.STOP, messages, chunk=chunk)
        turn.memory_before, turn.memory_after = memory, after
        episode.turns.append(turn)
        memory = after
    episode.answers = [Answer(probe, words.text(1, 3))]
    episode.scores = {name: Score(round(words.rng.random(), 3)) for name in ("exact", "brief", "grounded")}
    episode.memory, episode.reward, episode.advantage = memory, reward, reward - 0.5
    return episode


ACTIONS: dict[str, dict[str, str]] = {
    "sorted by disagreement": {"sort": "apart", "step": "all"},
    "sorted by reward": {"sort": "reward"},
    "filtered by text": {"sort": "logged", "find": "e9"},
    "filtered by a bound": {"find": "", "measure": "apart", "limit": "0.5"},
    "another step": {"limit": "", "step": "3"},
}
"""What a user does, one after the other."""


def looking(
    browser: str, page: Path, folder: Path, until: str, actions: dict[str, dict[str, str]]
) -> dict[str, float]:
    """Seconds by what was done, the smallest of three browsers: to start, to open `page`, and for each action."""
    tried: list[dict[str, float]] = []
    for number in range(3):
        start = time.perf_counter()
        with Tab(browser, folder / f"{page.stem}{number}", *NO_NETWORK) as tab:
            seconds = {"started": time.perf_counter() - start, "opened": tab.open(page.as_uri(), until)}
            seconds |= {name: tab.evaluate(acting(**values)) / 1000 for name, values in actions.items()}
        tried.append(seconds)
    return {name: min(seconds[name] for seconds in tried) for name in tried[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=4, help="of each episode, the answer included")
    parser.add_argument("--keep", type=Path, help="file to copy the page to")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # in a process of its own, to know its memory
    given = parser.parse_args()
    if given.write is not None:
        start, cpu = time.perf_counter(), time.process_time()
        write_report(given.write)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        wall, used = time.perf_counter() - start, time.process_time() - cpu
        print(f"written in {wall:.1f} s ({used:.1f} CPU s), peak memory {peak:.0f} MiB")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_run(folder / "run", given.episodes, given.turns)
        size = (folder / "run" / "episodes.jsonl").stat().st_size
        print(f"{given.episodes} episodes of {given.turns} turns, episodes.jsonl {size / 1e6:.0f} MB", flush=True)
        subprocess.run([sys.executable, __file__, "--write", str(folder / "run")], check=True)
        page = folder / "run" / "report.html"
        print(f"page {page.stat().st_size / 1e6:.1f} MB", flush=True)
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if browser is None:
            print("not opened: no Chromium on this machine")
        else:
            empty = folder / "empty.html"
            empty.write_text("<!doctype html><body><p id=empty></p></body>")
            nothing = looking(browser, empty, folder, "document.querySelector('#empty') !== null", {})
            print(
                f"an empty page: opened in {nothing['opened']:.2f} s, the browser started in {nothing['started']:.2f}"
            )
            for name, seconds in looking(browser, page, folder, OPENED, ACTIONS).items():
                print(f"{name} in {seconds:.2f} s")
        if given.keep:
            shutil.copyfile(page, given.keep)


if __name__ == "__main__":
    main()
