"""What a report of many episodes costs: seconds and memory to write it, its size, and seconds to open it.

    python benchmarks/report.py                     # 10,000 episodes of 4 turns of 100 to 200 words
    python benchmarks/report.py --episodes 2000 --keep report.html

Opening is measured with a headless Chromium where there is one: seconds of wall clock from its start to the first
episode on the page, less those of an empty page; the smallest of three. A chunk is 150 words, a prompt repeats
chunk and memory, groups have 8 episodes, and words are drawn with the frequencies of a language (Zipf), which packs
worse than real text.
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
        run.log_episodes(step, "train", logged, tokens=False)


def make_episode(words: Words, task: Task, id: str, group: str) -> Episode:
    episode, memory, reward = Episode(task, id=id, group=group), "", words.rng.random()
    probe = task.probes[0]
    for chunk in [*range(len(task.stream)), None]:
        read = task.stream[chunk] if chunk is not None else ""
        text = words.text(100, 200)
        prompt = f"Keep notes to answer: {probe.question}\n\nThe piece:\n{read}\n\nYour notes:\n{memory}"
        after = text if chunk is not None else memory
        turn = Turn("write", [], [], [], text, StopReason.STOP, [{"role": "user", "content": prompt}], chunk=chunk)
        turn.memory_before, turn.memory_after, turn.counts = memory, after, (400, 150)
        episode.turns.append(turn)
        memory = after
    episode.answers = [Answer(probe, words.text(1, 3))]
    episode.scores = {name: Score(round(words.rng.random(), 3)) for name in ("exact", "brief", "grounded")}
    episode.memory, episode.reward, episode.advantage = memory, reward, reward - 0.5
    return episode


DRIVER = """<script>const waiting = setInterval(() => {
  if (!document.querySelector(".turn, #empty")) return;
  clearInterval(waiting);
  document.documentElement.replaceChildren("it is open");
}, 10);</script></body>"""


def opening(browser: str, page: Path, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds from the start of the browser to the first episode; the smallest of three each."""
    # the policy of the page allows its own script alone; the document is emptied, because printing it takes longer
    text = page.read_text(encoding="utf-8").replace("script-src 'sha256", "script-src 'unsafe-inline' 'x", 1)
    copy = folder / f"driven-{page.name}"
    copy.write_text(text.replace("</body>", DRIVER), encoding="utf-8")
    wall, cpu = [], []
    for number in range(3):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--virtual-time-budget=20000", f"--user-data-dir={folder / f'{page.stem}{number}'}", "--dump-dom"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([*command, copy.as_uri()], capture_output=True, check=True, timeout=300)
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if b"it is open" not in done.stdout:
            raise SystemExit(f"{page} did not open")
    return min(wall), min(cpu)


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
            (wall, cpu), (no_wall, no_cpu) = opening(browser, page, folder), opening(browser, empty, folder)
            print(f"opened in {wall - no_wall:.2f} s ({cpu - no_cpu:.2f} CPU s; an empty page takes {no_wall:.2f} s)")
        if given.keep:
            shutil.copyfile(page, given.keep)


if __name__ == "__main__":
    main()
