"""The report opens in a real browser, shows what the run folder holds, and runs nothing that a model wrote."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from memfactory.episode import Answer, Episode, Evidence, Probe, Score, StopReason, Task, Turn
from memfactory.errors import DataError
from memfactory.evaluate import report
from memfactory.evaluate.report import results, sample_episodes, script_json, write_report
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


def log_training(run: RunFolder, steps: int = 60, per_step: int = 8, attack: str = "") -> None:
    rng = random.Random(0)
    for step in range(1, 121):
        run.log_metrics(step, {"loss": 0.05 + 5 * math.exp(-step / 30)}, phase="warmup")
    for step in range(steps + 1):
        skill = 0.15 + 0.8 / (1 + math.exp(-(step - 25) / 7))
        if step % 10 == 0:
            evaluation: dict[str, float | None] = {"n": 256}
            for mode, plus in (("sampled", 0.0), ("greedy", 0.02)):
                evaluation[f"{mode}_em"] = min(1, max(0, skill + plus + rng.gauss(0, 0.01)))
                evaluation[f"{mode}_failed"] = 0.0
                evaluation[f"{mode}_memory.brevity"] = 0.5
                evaluation[f"{mode}_capture"] = min(1, skill + 0.04 + plus)
                evaluation[f"{mode}_retain"] = min(1, skill + plus)
            run.log_metrics(step, evaluation, phase="eval")
            episodes = [make_episode(rng, skill, f"{step}-e{i}", attack=attack) for i in range(per_step)]
            run.log_episodes(step, "eval", episodes, tokens=False)
        if step == 0:
            continue
        reward = min(1, max(0, skill + rng.gauss(0, 0.04)))
        values: dict[str, float | None] = {
            "loss": rng.gauss(0, 0.01),
            "grad_norm": 0.5 + rng.random() * 0.3 if step != 7 else math.nan,
            "learning_rate": 1e-3 * (1 - step / 70),
            "reward": reward,
            "reward_std": math.sqrt(reward * (1 - reward)),
            "rewards/answer.exact_match/mean": reward,
            "rewards/answer.exact_match/std": 0.4,
            f"rewards/memory.brevity{attack}/mean": 0.5 + 0.1 * math.sin(step / 9) + rng.gauss(0, 0.01),
            "groups/dead_share": min(1, max(0, (2 * reward - 1) ** 4 + rng.gauss(0, 0.03))),
            "groups/solved_share": min(1, max(0, (2 * reward - 1) ** 4)) if reward > 0.5 else 0.0,
            "groups/tied_share": 0.0,
            "groups/count": 16,
            "episodes/count": 128,
            "episodes/failed": rng.choice([0, 0, 0, 1]),
            "turns/per_episode": 5,
            "rows/count": 640,
            "rows/trained": 640 * (1 - (2 * reward - 1) ** 4),
            "stop/length_share": max(0, 0.2 - skill / 4),
            "completions/mean_length": 14 + rng.random(),
            "time/generate": 2.4 + rng.random() * 0.4,
            "time/reward": 0.05,
            "time/train": 1.6 + rng.random() * 0.2,
            "time/optimizer": 0.1,
            "time/other": 0.15,
            "tokens/generated": 9000 + rng.randrange(500),
            "tokens/trained": 8500,
            "tokens/real_over_computed": 0.91,
            "entropy": 0.25 + 0.6 * math.exp(-step / 20),
            "clip_ratio/region_mean": 0.01 * rng.random(),
        }
        run.log_metrics(step, values, phase="train")
        if step % 5 == 0:
            group = [make_episode(rng, skill, f"{step}-t{i}", attack=attack) for i in range(per_step)]
            run.log_episodes(step, "train", group)


def log_summary(run: RunFolder, **changes: object) -> None:
    evals = [line["values"] for line in run.read_metrics() if line["phase"] == "eval"]
    summary = {
        "name": "quickstart",
        "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.12.0", "trl": "1.16.0"},
        "recipe_hash": "0123456789ab",
        "before": evals[0],
        "after": evals[-1],
        "wall_seconds": 312.4,
        "cpu_seconds": 598.0,
        "peak_memory_bytes": 1_270_000_000,
        "parameters": 1_204_224,
        "device": "cpu",
        "steps": 60,
        "stopped": "finished",
    }
    run.write_summary({**summary, **changes})


def test_without_a_run_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_training(run, steps=10, per_step=2)
    page = write_report(run.path).read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address that is loaded
    assert not re.search(r"<link|<img|@import|url\(|src=", page.split('<script id="data"')[0])


def test_data_cannot_leave_its_script_element() -> None:
    text = script_json({"x": ATTACK})
    assert not re.search("[<>&]", text)
    assert json.loads(text) == {"x": ATTACK.replace("\ud800", "?")}


def test_results_come_from_the_newest_evaluation_while_there_is_no_summary() -> None:
    evals: list[tuple[int, dict[str, float | None]]] = [
        (0, {"sampled_em": 0.1, "greedy_em": 0.2, "n": 8}),
        (20, {"sampled_em": 0.6, "greedy_em": 0.7, "n": 8}),
    ]
    found = results({}, evals)
    assert [mode["mode"] for mode in found["modes"]] == ["sampled", "greedy"]
    assert found["modes"][0]["rows"] == [{"name": "em", "before": 0.1, "after": 0.6}]
    assert found["when"] == "at step 20, so far"
    assert results({}, evals[:1])["modes"][0]["rows"] == [{"name": "em", "before": 0.1, "after": None}]
    assert results({}, [])["modes"] == []
    failures = results({"before": {"sampled_em": 0.1, "sampled_failed": 0.0}, "after": {"sampled_failed": 2.0}}, [])
    assert [row["name"] for row in failures["modes"][0]["rows"]] == ["em", "failed"]
    assert len(results({"before": {"sampled_em": 0.1, "sampled_failed": 0.0}}, [])["modes"][0]["rows"]) == 1


def test_a_sample_is_bounded_and_keeps_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    rng = random.Random(0)
    for step in range(12):
        run.log_episodes(step, "train", [make_episode(rng, 0.5, f"{step}-{i}") for i in range(3)], tokens=False)
    run.log_episodes(12, "eval", [make_episode(rng, 0.5, "e0")], tokens=False)
    for limit in (2, 5, 20, 30):
        monkeypatch.setattr(report, "MAX_EPISODES", limit)
        shown, logged = sample_episodes(run)
        assert (len(shown), logged) == (limit, 37)
        assert {0, 12} <= {episode["step"] for episode in shown}
    monkeypatch.setattr(report, "MAX_BYTES", 1)
    assert len(sample_episodes(run)[0]) == 1


def test_an_evaluation_done_twice_is_shown_once_the_newer_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rng = random.Random(0)
    for reward in (0.25, 0.75):
        episodes = [make_episode(rng, 0.5, f"eval/{i}") for i in range(3)]
        for episode in episodes:
            episode.reward = reward
        run.log_episodes(60, "eval", episodes)
    shown, logged = sample_episodes(run)
    assert ([episode["reward"] for episode in shown], logged) == ([0.75] * 3, 3)


def test_a_chunk_that_the_turn_did_not_read_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    episode = make_episode(random.Random(0), 1.0, "e")
    episode.turns[0].messages = [{"role": "user", "content": "another piece of the document"}]
    run.log_episodes(0, "eval", [episode])
    (shown,) = sample_episodes(run)[0]
    assert shown["turns"][0]["chunk_text"] is None
    assert shown["turns"][1]["chunk_text"] == episode.task.stream[1]
    assert "prompt_ids" not in shown["turns"][0]


# ------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        if os.environ.get("MEMFACTORY_REQUIRE_BROWSER") == "1":
            pytest.fail("MEMFACTORY_REQUIRE_BROWSER=1, but no Chromium is installed; apt-get install chromium")
        pytest.skip("no Chromium installed")
    return found


def browse(chromium: str, profile: Path, *arguments: str) -> str:
    """Run a headless Chromium with a new profile; returns its standard output."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", *arguments], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode("utf-8", errors="replace")


def dom(chromium: str, page: Path, tmp_path: Path) -> str:
    """The document after its scripts ran, without the text of its script elements."""
    text = browse(chromium, tmp_path / "profile", "--dump-dom", page.as_uri())
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def pixels(png: bytes) -> bytes:
    """The image data of a PNG, decompressed: enough to see whether it is of one colour."""
    position, packed = 8, b""
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        if kind == b"IDAT":
            packed += png[position + 8 : position + 8 + length]
        position += 12 + length
    return zlib.decompress(packed)


@pytest.mark.browser
def test_a_finished_run(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_training(run, per_step=4)
    log_summary(run)
    body = dom(chromium, write_report(run.path), tmp_path)
    text = html.unescape(re.sub(r"<[^>]+>", "", body))
    assert body.index("Accuracy, sampled") < body.index("Accuracy, greedy")
    for expected in ("finished", "0123456789ab", "5 min 12 s", "1.18 GiB", "1.2 M", "n = 256", "2.13.0"):
        assert expected in text
    for title in ("Reward", "Dead groups", "Reward dimensions", "Entropy", "Turns", "Rows", "Time per step"):
        assert f"<h3>{title}</h3>" in body
    assert body.count("<svg") >= 9
    assert re.search(r'aria-label="Accuracy\. sampled: [\d.]+ % at step 0, [\d.]+ % at step 60', body)
    assert "NaN" not in body
    assert "Infinity" not in body
    assert "undefined" not in body
    # the first episode is open: its turns, the difference of its memories, its evidence and its scores
    assert body.count('class="turn"') == 5
    assert "<ins>" in body
    assert '<mark title="evidence">' in body
    assert "answer.exact_match" in text
    assert "all right" in text
    assert "all equal" not in text
    assert "All 76 logged episodes." in text


@pytest.mark.browser
def test_words_that_the_memory_lost_are_marked(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    episode = make_episode(random.Random(0), 0.0, "e")
    turn = episode.turns[1]
    turn.memory_before, turn.memory_after, turn.text = "the red boat sank", "the boat sank twice", "I rewrite"
    run.log_episodes(0, "eval", [episode])
    body = dom(chromium, write_report(run.path), tmp_path)
    assert "the <del>red </del>boat sank</div>" in body
    assert "the boat sank<ins> twice</ins></div>" in body
    assert "I rewrite" in body


@pytest.mark.browser
def test_text_of_a_model_is_never_run(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=ATTACK[:60])
    log_training(run, steps=10, per_step=2, attack=ATTACK)
    log_summary(run, name=ATTACK, device=ATTACK)
    page = write_report(run.path)
    # the policy must not be what saves us, so the attack is tried without it as well
    bare = page.with_name("bare.html")
    bare.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8")), encoding="utf-8")
    for file in (page, bare):
        body = dom(chromium, file, tmp_path)
        assert "pwned" not in re.search(r"<title>(.*?)onerror", body + "onerror", re.DOTALL).group(1)  # type: ignore[union-attr]
        assert "<title>pwned" not in body
        assert "<img" not in body
        assert ESCAPED in body
        assert body.count('class="turn"') == 5


@pytest.mark.browser
@pytest.mark.parametrize("state", ["empty", "torn", "interrupted", "no-evaluation", "one-step"])
def test_a_run_that_is_not_finished(chromium: str, tmp_path: Path, state: str) -> None:
    run = make_run(tmp_path / "run")
    expected = ["No episodes were logged."]
    if state == "empty":
        expected += ["unfinished", "No evaluation yet.", "No metrics yet."]
        run.metrics_file.touch()
    elif state == "torn":
        expected += ["No metrics yet."]
        run.metrics_file.write_text('{"schema":1,"st')
    elif state == "interrupted":
        log_training(run, steps=12, per_step=1)
        log_summary(run, stopped="interrupted", after=None, steps=12)
        expected = ["was interrupted", "at step 10, so far", "Dead groups"]
    elif state == "no-evaluation":
        run.log_metrics(1, {"reward": None, "time/generate": 1.0}, phase="train")
        run.log_metrics(2, {"reward": None, "time/generate": None}, phase="train")
        expected += ["No evaluation yet.", "Time per step"]
    else:
        run.log_metrics(0, {"sampled_em": 0.25, "n": 8}, phase="eval")
        run.log_metrics(1, {"reward": 0.0, "reward_std": 0.0}, phase="train")
        expected += ["Accuracy, sampled", "Reward"]
    body = dom(chromium, write_report(run.path), tmp_path)
    for text in expected:
        assert text in body
    assert "NaN" not in body
    assert "undefined" not in body


@pytest.mark.browser
def test_a_screenshot_is_not_blank(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_training(run, steps=20, per_step=2)
    log_summary(run)
    image = tmp_path / "report.png"
    page = write_report(run.path).as_uri()
    browse(chromium, tmp_path / "profile", f"--screenshot={image}", "--window-size=900,1600", page)
    assert len(set(pixels(image.read_bytes()))) > 30
