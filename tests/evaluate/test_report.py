"""The report opens in a real browser, shows what the run folder holds, and runs nothing that a model wrote."""

from __future__ import annotations

import base64
import html
import json
import math
import random
import re
import struct
import zlib
from pathlib import Path

import pytest

from memfactory.episode import Episode, Operation, Retrieved, Score, Turn
from memfactory.errors import DataError, JudgeError
from memfactory.evaluate import report_episodes, report_rewards
from memfactory.evaluate.report import script_json, write_report
from memfactory.evaluate.report_episodes import COLUMNS, Packed
from memfactory.evaluate.report_numbers import curves, facts, results
from memfactory.evaluate.report_rewards import summarise_rewards, wanted_episodes
from memfactory.reward import reward
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.system import RewardSystem
from memfactory.runs import Record, RunFolder
from tests.evaluate.pages import ATTACK, ESCAPED, browse, dom, driven, make_episode, make_run, plain, rows


def sample_episodes(run: RunFolder, wanted: list[tuple[int, str]] | None = None) -> tuple[list[Record], int]:
    """The episodes that the page would have, each with what its block says of it, and how many were logged."""
    packed = Packed()
    logged = report_episodes.sample_episodes(run, packed, wanted=wanted or ())
    blocks = [json.loads(zlib.decompress(base64.b64decode(block))) for block in packed.blocks]
    shown = []
    for line in packed.index:
        entry = dict(zip(COLUMNS, line, strict=True))
        block = blocks[entry["block"]]
        shown.append({**entry, **block["episodes"][entry["place"]], "texts": block["texts"]})
    return shown, logged


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


@reward
def right(episode: Episode) -> float:
    return float(episode.scores["answer.exact_match"].value or 0)


@reward
def short(episode: Episode) -> float:
    return 1 - min(1, len(episode.memory) / 60)


@reward(role="gate")
def usable(episode: Episode) -> float:
    return 1 - sum(bool(turn.error) for turn in episode.turns) / len(episode.turns)


@reward(role="bonus", missing="drop")
async def judged(episode: Episode) -> Score:
    seed = random.Random(episode.id).random()
    if seed < 0.1:
        raise JudgeError(f"the judge on {episode.id}", "the reply is <b>no JSON</b>", "another model")
    return Score(None, f"no opinion on <i>{episode.task.stream[0][:3]}</i>") if seed < 0.3 else Score(seed)


@reward(module="write", missing="drop")
def growth(episode: Episode, turn: Turn) -> float:
    if int(episode.id.split("/")[0]) >= 6 and len(turn.memory_after) % 41 == 0:
        raise ZeroDivisionError("an edge that nobody thought of")
    return min(1, (len(turn.memory_after) - len(turn.memory_before)) / 20)


@reward
def same(episode: Episode) -> float:
    return 0.5


def reward_system(attack: str = "") -> RewardSystem:
    dimensions = [
        WeightedDimension(f"format.usable{attack}", usable, threshold=0.9),
        WeightedDimension("answer.right", right, 0.7),
        WeightedDimension("memory.short", short, 0.3),
        WeightedDimension("judge.faithful", judged, 0.2),
        WeightedDimension("memory.growth", growth, 0.5),
        WeightedDimension("always.same", same, 0.0),
    ]
    return RewardSystem(dimensions)


def log_rewarded(run: RunFolder, steps: int, per_step: int = 24, logged: int = 8, attack: str = "") -> list[Episode]:
    """Training steps as the trainer logs them, with real rewards; returns all episodes, also those not logged."""
    rng, system, everyone = random.Random(1), reward_system(attack), []
    for step in range(1, steps + 1):
        skill = 0.2 + 0.7 * step / steps
        episodes = [
            make_episode(rng, skill, f"{step - 1}/0/{i}", attack=attack, group=f"{step - 1}/{i // 8}")
            for i in range(per_step)
        ]
        for episode in episodes:
            episode.scores = {"answer.exact_match": next(iter(episode.scores.values()))}
        faults = system.begin().finish(episodes)
        for episode in episodes:
            del episode.scores["answer.exact_match"]
        assessment = system.assess(episodes, faults)
        rewards = [episode.reward for episode in episodes if episode.reward is not None]
        run.log_metrics(step, {"reward": sum(rewards) / len(rewards), **assessment.metrics}, phase="train")
        run.log_rewards(step, assessment.record)
        named = {item["episode"] for item in assessment.record["disagreements"]}
        shown = [episode for number, episode in enumerate(episodes) if number < logged or episode.id in named]
        run.log_episodes(step, "train", shown, tokens=False)
        everyone += episodes
    return everyone


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
    with pytest.raises(DataError, match="no run folder and no evaluation folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_training(run, steps=10, per_step=2)
    page = write_report(run.path).read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    recipe = run.recipe_file.read_text(encoding="utf-8")  # it is shown as text, with the addresses it names
    addresses -= set(re.findall(r"https?://[^\s\"'<>]+", recipe))
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
        monkeypatch.setattr(report_episodes, "MAX_EPISODES", limit)
        shown, logged = sample_episodes(run)
        assert (len(shown), logged) == (limit, 37)
        assert {0, 12} <= {episode["step"] for episode in shown}
    monkeypatch.setattr(report_episodes, "MAX_BYTES", 1)
    assert len(sample_episodes(run)[0]) == 1


def test_an_evaluation_done_twice_is_shown_once_the_newer_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rng = random.Random(0)
    for value in (0.25, 0.75):
        episodes = [make_episode(rng, 0.5, f"eval/{i}") for i in range(3)]
        for episode in episodes:
            episode.reward = value
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
    assert shown["texts"][shown["turns"][1]["chunk_text"]] == episode.task.stream[1]
    assert "prompt_ids" not in shown["turns"][0]


def line(step: int, **changes: object) -> Record:
    """One line of ``rewards.jsonl``."""
    dimensions = {"a": {"role": "objective", "scope": "episode", "weight": 1.0, "mean": 0.5, "std": 0.1}}
    faults: Record = {"count": {}, "examples": [], "tracebacks": []}
    return {"schema": 1, "step": step, "dimensions": dimensions, "disagreements": [], "faults": faults, **changes}


def test_disagreements_are_the_widest_of_the_run_each_episode_once() -> None:
    def item(id: str, gap: float) -> Record:
        return {"episode": id, "gap": gap, "high": {"name": "a", "value": 1.0}, "low": {"name": "b", "value": 0.0}}

    lines = [
        line(1, disagreements=[item("0/0/1", 2.0), item("", 1.5)]),
        line(2, disagreements=[item("0/0/1", 3.0), item("", 1.0)]),
        *(line(3 + k, disagreements=[item(f"{2 + k}/0/0", 0.1 + k / 100)]) for k in range(30)),
    ]
    found = summarise_rewards(lines)
    assert found is not None
    assert [(d["step"], d["episode"], d["gap"]) for d in found["disagreements"][:3]] == [
        (2, "0/0/1", 3.0),
        (1, "", 1.5),
        (2, "", 1.0),
    ]
    assert len(found["disagreements"]) == report_rewards.MAX_DISAGREEMENTS
    assert wanted_episodes(found)[3] == (32, "31/0/0")
    assert wanted_episodes(None) == []
    assert summarise_rewards([]) is None


def test_correlations_are_a_mean_over_the_last_steps_that_have_them() -> None:
    def matrix(names: list[str], value: float | None) -> Record:
        return {"names": names, "matrix": [[1.0, value], [value, 1.0]]}

    early = [line(step, correlation=matrix(["a", "b"], -1.0)) for step in range(1, 5)]
    late = [line(step, correlation=matrix(["b", "a"], 0.5)) for step in range(5, 14)]
    found = summarise_rewards([*early, *late, line(14, correlation=matrix(["a", "b"], None))])
    assert found is not None
    assert found["correlation"] == {
        "names": ["a", "b"],
        "matrix": [[1.0, 0.5], [0.5, 1.0]],
        "steps": [5, 14],
        "count": 10,
    }
    alone = summarise_rewards([line(1, correlation=matrix(["a", "b"], None))])
    assert alone is not None
    assert alone["correlation"]["matrix"][0] == [1.0, None]


def test_reasons_and_faults_that_differ_in_numbers_alone_are_one() -> None:
    def dimensions(reasons: dict[str, int]) -> Record:
        return {"a": {"role": "gate", "scope": "episode", "weight": 1.0, "none_share": 0.5, "reasons": reasons}}

    def faults(number: int) -> Record:
        texts = [f"timeout on episode {number}", f"broken on {number}"]
        return {"count": {"judge": 2}, "examples": texts, "tracebacks": ["x" * 5000 + f"end {number}"]}

    first = line(1, dimensions=dimensions({"timed out after 3 s": 2, "empty": 1}), faults=faults(1))
    later = line(2, dimensions=dimensions({"timed out after 4 s": 5, "y" * 900: 1}), faults=faults(2))
    found = summarise_rewards([first, later])
    assert found is not None
    (row,) = found["dimensions"]
    assert row["reasons"][:2] == [("timed out after 3 s", 7), ("empty", 1)]
    assert len(row["reasons"][2][0]) == report_rewards.MAX_TEXT + 1
    assert (row["none_share"], row["pass_rate"], row["mean"]) == (0.5, [None, None], [None, None])
    assert found["faults"]["count"] == {"judge": 4}
    assert found["faults"]["examples"] == [(1, "timeout on episode 1"), (1, "broken on 1")]
    ((step, traceback),) = found["faults"]["tracebacks"]
    assert step == 1
    assert traceback.endswith("end 1")
    assert len(traceback) == report_rewards.MAX_TRACEBACK + 1


def test_a_step_logged_twice_counts_once() -> None:
    found = summarise_rewards([line(2), line(1), line(2, faults={"count": {"reward": 3}})])
    assert found is not None
    assert found["steps"] == [1, 2]
    assert found["faults"]["count"] == {"reward": 3}


def test_correlations_are_not_embedded_as_curves() -> None:
    values = {"rewards/a/mean": 0.5, "rewards/correlation/a~b": 0.1}
    assert curves([{"phase": "train", "step": 1, "values": values}])["train"] == [(1, {"rewards/a/mean": 0.5})]


def test_episodes_that_the_page_links_to_are_in_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    rng = random.Random(0)
    for step in range(12):
        run.log_episodes(step, "train", [make_episode(rng, 0.5, f"{step}-{i}") for i in range(10)], tokens=False)
    wanted = [(3, "3-9"), (7, "7-8"), (7, "no such"), (7, "7-9")]
    for limit, kept in ((20, 3), (3, 2), (1, 1)):
        monkeypatch.setattr(report_episodes, "MAX_EPISODES", limit)
        shown, _ = sample_episodes(run, wanted)
        assert len(shown) == limit
        assert len({(e["step"], e["id"]) for e in shown} & set(wanted)) == kept
    monkeypatch.setattr(report_episodes, "MAX_EPISODES", 20)
    assert {0, 11} <= {episode["step"] for episode in sample_episodes(run, wanted)[0]}


# ------------------------------------------------------------------------------------- in a browser


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
def test_the_rewards_of_a_run_are_shown_as_they_were_logged(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_rewarded(run, steps=12)
    page = write_report(run.path)
    body = dom(chromium, page, tmp_path)
    lines = run.read_rewards()
    first, last = lines[0]["dimensions"], lines[-1]["dimensions"]

    head, *shown = rows(body, "dimensions")
    heads = [plain(markup) for _, markup in head]
    assert heads == ["Dimension", "Role", "Scope", "Weight", "Mean", "Spread", "Pass rate", "None"]
    by_name = {plain(row[0][1]): row for row in shown if len(row) == len(heads)}
    assert list(by_name) == list(last)
    for name, summary in last.items():
        cells = dict(zip(heads, by_name[name], strict=True))
        assert [plain(cells[key][1]) for key in ("Role", "Scope")] == [summary["role"], summary["scope"]]
        for title, key in (("Mean", "mean"), ("Spread", "std"), ("Pass rate", "pass_rate")):
            if key in summary:
                numbers = list(dict.fromkeys([first[name][key], summary[key]]))
                assert [float(number) for number in cells[title][0].split(" → ")] == numbers
        share = sum(line["dimensions"][name]["none_share"] for line in lines) / len(lines)
        assert float(cells["None"][0]) == pytest.approx(share, abs=1e-12)
        assert plain(cells["None"][1]) == f"{share * 100:.1f} %"
    gate = by_name["format.usable"][6][1]
    assert f"<b>{last['format.usable']['pass_rate'] * 100:.1f} %</b>" in gate
    assert plain(by_name["answer.right"][6][1]) == ""

    reasons = [plain(row[0][1]) for row in shown if len(row) == 1]
    assert len(reasons) == 2
    assert "× no opinion on <i>The</i>" in reasons[0]
    assert "× the reply is <b>no JSON</b>" in reasons[0]
    assert "an edge that nobody thought of" in reasons[1]

    head, *shown = rows(body, "correlation")
    names = list(last)
    assert [plain(row[0][1]) for row in shown] == [f"{k + 1}{name}" for k, name in enumerate(names)]
    for i, row in enumerate(shown):
        for j, (_, text) in enumerate(row[1:]):
            known = [value for line in lines[-10:] if (value := line["correlation"]["matrix"][i][j]) is not None]
            if not known:
                assert text == "–"
            else:
                assert float(text.replace("−", "-")) == pytest.approx(sum(known) / len(known), abs=0.0051)
    assert {text for _, text in shown[names.index("always.same")][1:]} == {"–"}
    assert "mean over the last 10 logged steps (3 to 12)" in plain(body)

    for title in ("Reward dimensions", "Gate pass rate", "Parts of the reward", "Not measured", "Faults"):
        assert f"<h3>{title}</h3>" in body
    assert re.search(r'aria-label="Gate pass rate\. format\.usable: [\d.]+ % at step 1, [\d.]+ % at step 12', body)
    assert re.search(r'aria-label="Parts of the reward\. gate: [\d.]+ at step 1.*?utility: [\d.]+ at step 1', body)
    driver = "document.getElementById('reward-more').open = true"
    assert f'aria-label="{names[1]}. mean: ' in dom(chromium, driven(page, driver), tmp_path)

    total = sum((line["faults"]["count"].get("judge", 0) for line in lines), 0)
    counts = {plain(row[0][1]): plain(row[1][1]) for row in rows(body, "faults")}
    assert counts["judge"] == str(total)
    examples = plain(body[body.index('<details class="examples">') :])
    assert "the reply is <b>no JSON</b>" in examples
    assert "ZeroDivisionError: an edge that nobody thought of" in examples[examples.index("Tracebacks") :]
    assert "NaN" not in body
    assert "undefined" not in body


@pytest.mark.browser
@pytest.mark.parametrize("way", ["click", "address", "again"])
def test_a_disagreement_opens_its_episode(chromium: str, tmp_path: Path, way: str) -> None:
    run = make_run(tmp_path / "run")
    log_rewarded(run, steps=6, logged=4)
    page = write_report(run.path)
    body = dom(chromium, page, tmp_path)
    widest = sorted((item for line in run.read_rewards() for item in line["disagreements"]), key=lambda d: -d["gap"])
    _, *shown = rows(body, "disagreements")
    assert len(shown) == 20
    assert [float(row[2][0]) for row in shown] == [item["gap"] for item in widest[:20]]
    assert [plain(row[0][1]) for row in shown[:3]] == [item["episode"] for item in widest[:3]]
    assert plain(shown[0][3][1]).startswith(widest[0]["high"]["name"])
    assert plain(shown[0][4][1]).startswith(widest[0]["low"]["name"])

    # neither the step that a page opens with nor the first episode of its step
    place = next(
        k for k, item in enumerate(widest) if not item["episode"].startswith("5/") and item["episode"][-2] != "/"
    )
    address = re.findall(r'href="(#episode/.*?)"', shown[place][0][1])[0]
    expected = widest[place]
    if way == "address":
        body = dom(chromium, page, tmp_path, address)
    else:
        click = f"const link = document.querySelectorAll('.disagreements a')[{place}]; link.click();"
        if way == "again":  # go elsewhere in between, so that the address is already that of the link
            click += (
                "setTimeout(() => { const step = document.getElementById('step'); step.selectedIndex = 0;"
                "step.dispatchEvent(new Event('change')); setTimeout(() => link.click(), 50); }, 50)"
            )
        body = dom(chromium, driven(page, click), tmp_path)
    episode = body[body.index('<article id="episode">') :]
    assert f"<dt>Episode</dt><dd>{expected['episode']}</dd>" in episode
    high, low = expected["high"]["name"], expected["low"]["name"]
    facts = plain(episode[episode.index("Dimensions disagree") : episode.index("</dl>", episode.index("Reward</dt>"))])
    assert facts.startswith(f"Dimensions disagreehigh: {high}")
    assert f"low: {low}" in facts


@pytest.mark.browser
def test_an_episode_that_was_not_logged_is_named_without_a_link(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_rewarded(run, steps=2, logged=0)
    run.episodes_file.unlink()
    body = dom(chromium, write_report(run.path), tmp_path)
    _, *shown = rows(body, "disagreements")
    assert shown
    assert all("<a" not in row[0][1] and plain(row[0][1]) for row in shown)


@pytest.mark.browser
def test_a_turn_shows_its_scores_and_what_it_did_to_the_memory(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    episode = make_episode(random.Random(0), 1.0, "e")
    episode.scores["judge.faithful"] = Score(None, "the judge was silent")
    turn = episode.turns[0]
    turn.scores = {"memory.growth": Score(0.25), "memory.schema": Score(None, "no <schema> to check")}
    turn.operations = [
        Operation("UPDATE", "m7", "Ann lives in <b>Oslo</b>"),
        Operation("DELETE", "m9", error="there is no entry m9"),
    ]
    turn.retrieved = [Retrieved("m1", "Ann likes boats"), Retrieved("m2", "Bertil sails")]
    turn.cited = ["m2", "m5"]
    run.log_episodes(0, "eval", [episode])
    body = dom(chromium, write_report(run.path), tmp_path)
    cards = body.split('class="turn"')
    card = plain(cards[1])
    for expected in (
        "memory.growth0.250",
        "memory.schemanot measuredno <schema> to check",
        "UPDATE m7 Ann lives in <b>Oslo</b>",
        "DELETE m9there is no entry m9",
        "m1  Ann likes boats",
        "m2 cited Bertil sails",
        "Cited without having been retrievedm5",
    ):
        assert expected in card
    assert "Operations" not in plain(cards[2])
    assert "judge.faithfulnot measuredthe judge was silent" in plain(cards[0])
    assert "No rewards were logged." in body


@pytest.mark.browser
def test_the_reward_part_of_the_page_runs_nothing_that_a_model_wrote(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_rewarded(run, steps=3, per_step=8, attack=ATTACK)
    record = run.read_rewards()[-1]
    record["dimensions"]["answer.right"]["reasons"] = {ATTACK: 3}
    record["faults"] = {"count": {ATTACK: 2}, "examples": [ATTACK], "tracebacks": [ATTACK]}
    record["disagreements"] = [{**item, "episode": ATTACK} for item in record["disagreements"]]
    run.log_rewards(4, {key: value for key, value in record.items() if key not in ("schema", "step")})
    run.log_metrics(4, {f"faults/{ATTACK}": 2.0, f"reward/{ATTACK}": 0.5}, phase="train")
    page = write_report(run.path)
    body = dom(chromium, driven(page, ""), tmp_path)
    assert "<title>pwned" not in body
    assert "<img" not in body
    assert ESCAPED in rows(body, "dimensions")[1][0][1]
    assert ESCAPED in "".join(markup for row in rows(body, "dimensions") if len(row) == 1 for _, markup in row)
    assert ESCAPED in rows(body, "correlation")[1][0][1]
    assert ESCAPED in "".join(markup for row in rows(body, "disagreements") for _, markup in row)
    assert ESCAPED in "".join(markup for row in rows(body, "faults") for _, markup in row)
    assert ESCAPED in body[body.index("Tracebacks") :]


@pytest.mark.browser
def test_a_run_folder_without_rewards_has_its_curves(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_training(run, steps=10, per_step=2)
    old = [json.loads(text) for text in run.episodes_file.read_text().splitlines()]
    for turn in (turn for record in old for turn in record["turns"]):
        for key in ("operations", "retrieved", "cited", "scores"):
            del turn[key]
    run.episodes_file.write_text("".join(json.dumps(record) + "\n" for record in old))
    body = dom(chromium, write_report(run.path), tmp_path)
    rewards = body[body.index('id="rewards"') : body.index('id="episodes"')]
    assert "<h3>Reward dimensions</h3>" in rewards
    assert '<div id="reward-table"></div>' in rewards
    assert '<div id="reward-details"></div>' in rewards
    assert body.count('class="turn"') == 5


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


def test_the_prompts_of_a_run_are_summed_up() -> None:
    ledger = {"issued": 30, "trained": 18, "dropped": {"solved": 10, "no room": 2}, "open": 0}
    assert ("Prompts", "30 issued: 18 trained, 10 solved, 2 no room") in facts({"ledger": ledger}, [])
    assert "Prompts" not in dict(facts({}, []))
