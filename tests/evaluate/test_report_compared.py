"""Reports of evaluations and of several runs: tables, Pareto front, filters, and what fits into a page."""

from __future__ import annotations

import base64
import html
import json
import random
import re
import zlib
from pathlib import Path

import pytest

from memfactory.episode import Score
from memfactory.errors import DataError
from memfactory.evaluate.report import write_report
from memfactory.evaluate.report_compare import points, recipe_differences
from memfactory.evaluate.report_episodes import COLUMNS, Packed, sample_episodes
from memfactory.evaluate.report_source import JUDGE, read_evaluation, read_source
from memfactory.runs import Record, RunFolder, episode_record
from tests.evaluate.pages import ATTACK, ESCAPED, dom, driven, make_episode, make_run, plain, rows

CANDIDATES = {"base": (0.2, 100.0), "small": (0.5, 200.0), "large": (0.7, 900.0), "wasteful": (0.4, 950.0)}
"""Mean of the metric and tokens of an episode."""


def make_evaluation(path: Path, *, attack: str = "") -> Path:
    """An evaluation folder as `memfactory eval` writes it, of four candidates on one suite."""
    path.mkdir()
    rng, lines, table = random.Random(0), [], []
    for name, (mean, tokens) in CANDIDATES.items():
        for number in range(3):
            record = episode_record(make_episode(rng, mean, f"{number}#0", attack=attack, group=""), tokens=False)
            place = {"split": f"suite{attack}", "candidate": f"{name}{attack}", "mode": f"greedy{attack}", "sample": 0}
            lines.append({"schema": 1, "step": 0, **place, "key": f"{name}-{number}", **record})
        table.append(
            {
                **{"suite": f"suite{attack}", "candidate": f"{name}{attack}", "mode": f"greedy{attack}", "tasks": 3},
                **{"episodes": 3, "failed": 0, "metric": f"answer.exact_match{attack}", "mean": mean, "samples": 1},
                **{"low": mean - 0.125, "high": mean + 0.125, "pass_at": {}, "tokens": tokens, "seconds": 1.5},
                **{
                    "peak_context": 321,
                    "dimensions": {"memory.brevity": 1 - mean},
                    "categories": {f"1{attack}": mean},
                },
                **{
                    "difference": None if name == "base" else mean - 0.2,
                    "difference_low": 0.0,
                    "difference_high": 1.0,
                },
            }
        )
    told = {
        **{"schema": 1, "recipe": f"quickstart{attack}", "recipe_hash": "0123456789ab", "seed": 0, "rows": table},
        "candidates": [{"name": name, "path": "", "fingerprint": name} for name in CANDIDATES],
        **{"suites": [{"name": "suite", "tasks": 3, "metric": "x", "differs": ""}], "notes": [f"A note.{attack}"]},
    }
    (path / "evaluation.json").write_text(json.dumps(told), encoding="utf-8")
    (path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def log_few(run: RunFolder, scores: list[tuple[float, float]]) -> None:
    """One training step; dimensions `a` and `b` have these scores, and the reward is that of `a`. Groups of two."""
    episodes = [make_episode(random.Random(0), 1.0, f"e{k}", group=f"g{k // 2}") for k in range(len(scores))]
    for episode, (a, b) in zip(episodes, scores, strict=True):
        episode.scores, episode.reward = {"a": Score(a), "b": Score(b)}, a
    run.log_episodes(1, "train", episodes, tokens=False)


def choose(**values: str) -> str:
    """A script that sets selects and inputs, one after the other."""
    lines = [
        f"{{ const control = document.getElementById({name!r}); control.value = {value!r};"
        "control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input')); }"
        for name, value in values.items()
    ]
    return "\n".join(lines)


def listed(body: str) -> list[str]:
    """The numbers in the list of episodes, from above."""
    names = body[body.index('<ol id="list">') : body.index("</ol>", body.index('<ol id="list">'))]
    return re.findall(r'class="pill \w+">(.*?)</b>', names)


def test_every_text_comes_back_from_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfactory.evaluate.report_episodes.BLOCK", 4000)
    run, rng = make_run(tmp_path / "run"), random.Random(0)
    made = [make_episode(rng, 0.5, f"{k}", attack=ATTACK if k % 2 else "") for k in range(12)]
    made[0].turns[1].messages = [{"role": "user", "content": "the harbour " * 3 + made[0].task.stream[1] * 2 + "?"}]
    run.log_episodes(1, "train", made)
    packed = Packed()
    assert sample_episodes(run, packed) == 12
    assert len(packed.blocks) > 2
    blocks = [json.loads(zlib.decompress(base64.b64decode(block))) for block in packed.blocks]
    for line, episode in zip(packed.index, made, strict=True):
        entry = dict(zip(COLUMNS, line, strict=True))
        texts, shown = blocks[entry["block"]]["texts"], blocks[entry["block"]]["episodes"][entry["place"]]
        assert len(texts) == len(set(texts))
        assert entry["id"] == episode.id
        for turn, back in zip(episode.turns, shown["turns"], strict=True):
            whole = ["".join(texts[k] for k in message["content"]) for message in back["messages"]]
            told = [message["content"].replace("\ud800", "?") for message in turn.messages]
            assert whole == told
            for name in ("text", "memory_before", "memory_after"):
                assert texts[back[name]] == getattr(turn, name).replace("\ud800", "?")


def test_recipes_are_compared_by_key_and_points_are_checkpoints(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", name="second")
    other.recipe_file.write_text(other.recipe_file.read_text().replace("max_steps: 60", "max_steps: 90"))
    for step in (0, 10):
        one.log_metrics(step, {"sampled_em": 0.5 + step / 100, "n": 8}, phase="eval")
        one.log_metrics(step + 1, {"time/generate": 2.0, "rewards/a/mean": 0.1, "loss": 1.0}, phase="train")
    sources = [read_source(one.path), read_source(other.path), read_source(make_evaluation(tmp_path / "ev"))]
    assert recipe_differences(sources) == [("train.max_steps", ["60", "90"])]
    found = points(sources)
    assert [(point["source"], point["label"]) for point in found[:3]] == [(0, "step 0"), (0, "step 10"), (2, "base")]
    values = {"sampled_em": 0.6, "training: rewards/a/mean": 0.1, "step": 10, "seconds of training": 2.0}
    assert found[1]["values"] == values
    assert found[2]["values"]["tokens per episode"] == 100.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"suite": "x"}]}, "rows.0.candidate: Field required"),
        ({"schema": 99}, "newer than this version"),
        ({"rows": "none"}, "rows: "),
    ],
)
def test_a_broken_evaluation_is_named(tmp_path: Path, change: Record, message: str) -> None:
    file = make_evaluation(tmp_path / "ev") / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        read_evaluation(file)
    file.write_text("{")
    with pytest.raises(DataError, match="is not readable"):
        write_report(file.parent)


@pytest.mark.browser
def test_an_evaluation_has_its_table_its_front_and_its_episodes(chromium: str, tmp_path: Path) -> None:
    page = write_report(make_evaluation(tmp_path / "ev"))
    body = dom(chromium, page, tmp_path)
    _, *table = rows(body, "evaluation")
    first = [plain(markup) for _, markup in table[0]]
    assert first[:5] == ["suite, greedy", "base", "answer.exact_match", "0.200", "0.075 to 0.325"]
    assert "By category: 1 0.200" in plain(table[1][0][1])
    assert plain(table[2][5][1]) == "+0.300 0.000 to 1.000"
    shown = {plain(row[0][1]): plain(row[3][1]) for row in rows(body, "points")[1:]}
    front = "on the front"
    assert shown == {"base": front, "small": front, "large": front, "wasteful": "dominated"}
    assert body.count('class="point dominated') == 1
    assert "3 of 3 episodes" in body
    assert body.count('class="turn"') == 5
    assert "base, greedy" in plain(body)

    less = choose(**{"way-y": "less", "candidate": "large"})
    body = dom(chromium, driven(page, less), tmp_path)
    shown = {plain(row[0][1]): plain(row[3][1]) for row in rows(body, "points")[1:]}
    assert [name for name, where in shown.items() if where == front] == ["base"]
    assert "<dd>large, greedy</dd>" in body


@pytest.mark.browser
def test_two_runs_and_an_evaluation_are_compared(chromium: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name=name) for name in ("one", "two")]
    for number, run in enumerate(runs):
        for step in (1, 2 + number):
            run.log_metrics(step, {"reward": 0.25 + number / 4, "rewards/a/mean": 0.5}, phase="train")
        run.log_metrics(0, {"sampled_em": 0.125, "n": 8}, phase="eval")
        run.write_summary({"name": run.path.name, "before": {"sampled_em": 0.125}, "after": {"sampled_em": 0.5}})
        log_few(run, [(0.5, 0.5), (1.0, 0.0)])
    page = write_report([*(run.path for run in runs), make_evaluation(tmp_path / "ev")], tmp_path / "all.html")
    assert sorted(file.name for file in tmp_path.glob("**/*.html")) == ["all.html"]
    body = dom(chromium, page, tmp_path)
    label = r"Reward\. one: 0\.250 at step 1, 0\.250 at step 2; two: 0\.500 at step 1, 0\.500 at step 3"
    assert re.search(label, body)
    assert "<h3>Reward dimensions: a</h3>" in body
    result = {plain(row[0][1]): [plain(markup) for _, markup in row[1:]] for row in rows(body, "beside")}
    assert result["accuracy, sampled"] == ["0.125 → 0.5", "0.125 → 0.5"]
    assert "the same but for names" in body
    assert "Table of ev" in body
    body = dom(chromium, driven(page, choose(source="1")), tmp_path)
    assert "<dt>Run</dt><dd>two</dd>" in body
    assert "2 of 2 episodes" in body


@pytest.mark.browser
@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"sort": "reward"}, ["1", "0.500", "0.500", "0"]),
        ({"sort": "reward", "way": "up"}, ["0", "0.500", "0.500", "1"]),
        ({"sort": "score:b", "way": "up"}, ["0", "0.500", "0.500", "1"]),
        # a: .5, .5, 0, 1 and b: .5, .5, 1, 0: the last two are best on the one and worst on the other
        ({"sort": "apart"}, ["1", "1", "0", "0"]),
        ({"sort": "spread"}, ["0.500", "0.500", "0", "0"]),
        ({"measure": "apart", "limit": "0.9"}, ["0", "1"]),
        ({"measure": "reward", "bound": "most", "limit": "0.5"}, ["0.500", "0.500", "0"]),
        ({"filter": "zero"}, ["0"]),
    ],
)
def test_episodes_are_sorted_and_filtered(
    chromium: str, tmp_path: Path, choices: dict[str, str], expected: list[str]
) -> None:
    run = make_run(tmp_path / "run")
    log_few(run, [(0.5, 0.5), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
    body = dom(chromium, driven(write_report(run.path), choose(**choices)), tmp_path)
    assert listed(body) == expected


@pytest.mark.browser
def test_a_long_list_is_made_as_one_scrolls(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log_few(run, [(k / 500, 0.5) for k in range(500)])
    page = write_report(run.path)
    body = dom(chromium, page, tmp_path)
    assert len(listed(body)) == 100
    assert "500 of 500 episodes" in body
    # the address opens an episode further down
    body = dom(chromium, page, tmp_path, "#episode/train/1/e450")
    assert "<dt>Episode</dt><dd>e450</dd>" in body
    assert len(listed(body)) == 500


@pytest.mark.browser
def test_names_of_runs_suites_and_candidates_are_never_html(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=ATTACK.replace("\ud800", ""))
    run.log_metrics(0, {f"sampled_{ATTACK}": 0.5}, phase="eval")
    log_few(run, [(0.5, 0.5), (1.0, 0.0)])
    page = write_report([run.path, make_evaluation(tmp_path / "ev", attack=ATTACK)], tmp_path / "all.html")
    bare = tmp_path / "bare.html"  # the policy must not be what saves us
    bare.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8")), encoding="utf-8")
    for file in (page, driven(bare, choose(source="1"))):
        body = dom(chromium, file, tmp_path)
        assert "<img" not in body
        assert "<title>pwned" not in body
        for place in ("<h2>Table of", 'id="pareto"', '<select id="source">'):
            assert ESCAPED in body[body.index(place) :]
        assert ATTACK[:20] in html.unescape("".join(rows_of(body)))


def rows_of(body: str) -> list[str]:
    return [plain(markup) for row in rows(body, "evaluation") for _, markup in row]


@pytest.mark.browser
@pytest.mark.parametrize("choices", [{"filter": "failed"}, {"find": "SERVICE: the"}])
def test_an_episode_that_failed_is_found_by_its_fault(chromium: str, tmp_path: Path, choices: dict[str, str]) -> None:
    run, rng = make_run(tmp_path / "run"), random.Random(0)
    good, failed = (make_episode(rng, 1.0, name) for name in ("good", "failed"))
    failed.turns, failed.answers, failed.scores, failed.reward = [], [], {}, None
    failed.failed = "service: the endpoint did not <b>answer</b>"
    run.log_episodes(1, "train", [good, failed], tokens=False)
    body = dom(chromium, driven(write_report(run.path), choose(**choices)), tmp_path)
    assert listed(body) == ["n/a"]
    assert "It could not be run to its end. service: the endpoint did not <b>answer</b>" in plain(body)
    assert "never asked" in body


def judged_evaluation(path: Path) -> Path:
    """An evaluation with a judge beside the rule: they differ on the second episode of `base`; one episode of `small`
    was not run, and of `large` the judge did not speak about one and one turn was not usable."""
    make_evaluation(path)
    told = json.loads((path / "evaluation.json").read_text())
    told["rows"][0]["judge"] = {"mean": 0.25, "disagree": 1 / 3, "kappa": 0.4}
    told["rows"][1] |= {
        "failed": 1,
        "faults": {"service": 1},
        "judge": {"mean": None, "disagree": None, "kappa": None},
    }
    told["rows"][2] |= {"faults": {"judge": 1, "model": 2}}
    (path / "evaluation.json").write_text(json.dumps(told))
    lines = [json.loads(line) for line in (path / "episodes.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        rule = float(number % 3 == 0)
        verdict = {0: 0.75, 1: 1.0, 2: 0.25}[number % 3]
        line["scores"] = {"answer.exact_match": {"value": rule, "reason": ""}, JUDGE: {"value": verdict, "reason": ""}}
        for turn in line["turns"]:
            turn["error"] = ""
    service, silent, unusable = lines[3], lines[7], lines[8]
    reason = {"value": None, "reason": "the episode was not run to its end"}
    service |= {"failed": "service: no <b>answer</b>", "turns": [], "answers": []}
    service["scores"] = dict.fromkeys(service["scores"], reason)
    silent["scores"][JUDGE] = {"value": None, "reason": "the judge was silent"}
    unusable["turns"][0]["error"] = "the text has no <memory> block"
    (path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_judge_that_the_report_looks_for_is_the_one_that_an_evaluation_asks() -> None:
    assert pytest.importorskip("memfactory.evaluate.job").VERDICT == JUDGE


@pytest.mark.browser
def test_the_judge_stands_beside_the_rule_and_failures_by_fault(chromium: str, tmp_path: Path) -> None:
    page = write_report(judged_evaluation(tmp_path / "ev"))
    body = dom(chromium, page, tmp_path)
    head, *table = rows(body, "evaluation")
    heads = [plain(markup) for _, markup in head]
    shown = [dict(zip(heads, [plain(m) for _, m in row], strict=True)) for row in table if len(row) == len(heads)]
    assert heads.index("Judge") == heads.index("95 %") + 1
    assert [row["Judge"] for row in shown] == ["0.250differs on 33.3%, κ 0.40", "–", "–", "–"]
    under: list[list[str]] = []
    for row in table:
        if len(row) == len(heads):
            under.append([])
        else:
            under[-1].append(plain(row[0][1]))
    assert [[text for text in texts if text.startswith("Faults")] for texts in under] == [
        [],
        ["Faults: service 1"],
        ["Faults: judge 1; model 2"],
        [],
    ]
    assert f'<td colspan="{len(heads)}">By category' in body
    # the episode that is open is the first of the first candidate
    assert '<dt>Rule and judge</dt><dd>agree: <span>answer.exact_match</span> <b title="1">1</b>' in body

    differing = dom(chromium, driven(page, choose(filter="judge")), tmp_path)
    assert "1 of 3 episodes" in differing
    assert "Rule and judgedisagree: answer.exact_match 0, answer.correct_judge 1" in plain(differing)
    # what episodes are sorted by is the disagreement of these two
    apart = dom(chromium, driven(page, choose(sort="apart")), tmp_path)
    assert listed(apart) == ["0.750", "0.500", "0.250"]


def test_an_evaluation_without_judge_and_faults_says_nothing_of_them(tmp_path: Path) -> None:
    page = write_report(make_evaluation(tmp_path / "ev")).read_text(encoding="utf-8")
    table = page[page.index('<table class="evaluation">') : page.index("</table>")]
    assert ">Judge<" not in table
    assert "Faults" not in table


@pytest.mark.browser
@pytest.mark.parametrize(
    ("candidate", "fault", "tasks"),
    [
        ("small", "is service", ["0"]),
        ("small", "none", ["1", "2"]),
        ("large", f"is not measured: {JUDGE}", ["1"]),
        ("large", "is model", ["2"]),
        ("large", "none", ["0"]),
        ("large", "", ["0", "1", "2"]),
    ],
)
def test_episodes_are_filtered_by_fault(
    chromium: str, tmp_path: Path, candidate: str, fault: str, tasks: list[str]
) -> None:
    page = write_report(judged_evaluation(tmp_path / "ev"))
    body = dom(chromium, driven(page, choose(candidate=candidate, fault=fault)), tmp_path)
    assert f"{len(tasks)} of 3 episodes" in body
    offered = body[body.index('<select id="fault">') :]
    offered = offered[: offered.index("</select>")]
    expected = {"small": ["service (1)", "none (2)"], "large": [f"not measured: {JUDGE} (1)", "model (1)", "none (1)"]}
    assert set(expected[candidate]) < set(re.findall(r">([^<]+)</option>", offered))
    episode = body[body.index('<article id="episode">') :]
    assert f"<dd>task-{tasks[0]}#0</dd>" in episode
