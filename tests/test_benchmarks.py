"""The step benchmark runs, and its contestants do the same amount of work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEP = Path(__file__).parents[1] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All contestants on the toy model: 1 task x G 4, 2 chunks, 6 tokens a turn, 1 thread."""
    return _run(tmp_path_factory.mktemp("benchmark"), "--in-process")


def _run(folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "figures.json"
    size = "--tasks 1 --group 4 --chunks 2 --chunk-tokens 40 --new-tokens 6 --budget 512 --threads 1"
    command = [sys.executable, str(STEP), "--model", "tiny", *size.split(), "--json", str(out), *options]
    # the folder above benchmarks/ for a checkout that is not installed
    paths = os.pathsep.join(filter(None, [str(STEP.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_figure_is_there(report: dict[str, Any]) -> None:
    assert set(report["results"]) == {"ours", "ours_unshared", "handwritten", "generate_only", "plain_trl", "naive"}
    for name, result in report["results"].items():
        seconds = result["seconds"]
        assert set(seconds) == {"generate", "recompute", "forward", "backward", "optimizer", "other"}
        assert sum(seconds.values()) == pytest.approx(result["total_seconds"])
        assert min(seconds.values()) >= 0
        assert result["peak_bytes"] > 10**8
        trains = name != "generate_only"
        assert (seconds["forward"] > 0) == (seconds["backward"] > 0) == (seconds["optimizer"] > 0) == trains
        assert (result["gradient_norm"] > 0) == trains
        assert set(report["rates"][name]) == {
            "episodes_per_second",
            "generated_per_second",
            "trained_per_second",
            "computed_per_second",
            "other_share",
            "real_over_computed",
            "real_over_computed_prefill",
        }
    assert report["results"]["naive"]["seconds"]["recompute"] > 0
    assert all(ratio["value"] is not None and ratio["met"] is not None for ratio in report["ratios"])
    assert len(report["ratios"]) == 9
    assert report["reference"] is False


@pytest.mark.slow
def test_contestants_do_the_same_work(report: dict[str, Any]) -> None:
    episodes, turns, tokens = 4, 3, 6
    for name, result in report["results"].items():
        assert result["episodes"] == episodes, name
        assert result["rows"] == episodes * turns, name
        assert result["generated_tokens"] == episodes * turns * tokens, name
        assert result["prompt_tokens"] == report["results"]["ours"]["prompt_tokens"], name
        if name != "generate_only":
            assert result["trained_tokens"] == result["generated_tokens"], name
            assert result["real_tokens"] == result["prompt_tokens"] + result["trained_tokens"], name
            assert (result["computed_tokens"] < result["real_tokens"]) == (name == "ours"), name


@pytest.mark.slow
def test_a_contestant_in_its_own_process_knows_its_own_memory(tmp_path: Path) -> None:
    report = _run(tmp_path, "--only", "generate_only")
    (result,) = report["results"].values()
    assert result["loaded_bytes"] < result["peak_bytes"] < 3e9
    assert [ratio["value"] for ratio in report["ratios"]] == [None] * 9


@pytest.mark.slow
def test_a_misspelt_contestant_is_named() -> None:
    done = subprocess.run([sys.executable, str(STEP), "--only", "our"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no contestant is called 'our'" in done.stderr
