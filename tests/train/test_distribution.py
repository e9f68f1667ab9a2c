"""Where accelerate would fall back in silence, the run ends and says so. The fallbacks here are real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from memfactory.errors import EngineError, RecipeError
from memfactory.train.distribution import Asked, check_options, check_started, check_wrapped
from tests.train.launching import ROOT
from tests.train.rank_jobs import RECIPE


def arguments(**values):
    return SimpleNamespace(
        **{"fsdp": None, "fsdp_config": None, "deepspeed": None, "ds3_gather_for_generation": True} | values
    )


def asked(environ=(), launcher=(), **values):
    return Asked.of(arguments(**values), dict(environ), list(launcher))


def test_what_is_asked_is_found_where_people_ask(tmp_path):
    assert asked() == Asked()
    assert asked({"WORLD_SIZE": "4"}).processes == asked({"OMPI_COMM_WORLD_SIZE": "4"}).processes == 4
    launch = ["python3", "/somewhere/bin/accelerate", "launch", "--cpu"]
    assert asked(launcher=[*launch, "--num_processes", "2", "train.py"]).processes == 2
    assert asked(launcher=[*launch, "--num-processes=3", "train.py"]).processes == 3
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 5\n")
    assert asked(launcher=[*launch, "--config_file", str(file)]).processes == 5
    assert asked(launcher=["bash", "-c", "run --num_processes 2"]).processes == 1
    assert asked({"WORLD_SIZE": "4"}, [*launch, "--num_processes", "8"]).processes == 4

    assert asked(fsdp=True).fsdp == asked({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}).fsdp == 2
    assert asked({"ACCELERATE_USE_FSDP": "true"}).fsdp == 1
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert asked(deepspeed={"zero_optimization": {"stage": 1}}).stage == 1
    assert asked(deepspeed=str(file)).stage == 3
    environ = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert asked(environ).stage == 2
    assert asked(environ | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}).stage == 3
    assert asked(environ | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}).stage == 3
    with pytest.raises(RecipeError, match=r"none\.json cannot be read"):
        asked(deepspeed=str(tmp_path / "none.json"))


def test_options_under_which_ranks_would_wait_for_ever_are_refused():
    check_options(arguments(), Asked(fsdp=2))
    check_options(arguments(), Asked(deepspeed=True, stage=3))
    with pytest.raises(RecipeError, match="version 2"):
        check_options(arguments(), Asked(fsdp=1))
    with pytest.raises(RecipeError, match="ds3_gather_for_generation"):
        check_options(arguments(ds3_gather_for_generation=False), Asked(deepspeed=True, stage=3))


def state(processes, kind, cpu=False):
    return SimpleNamespace(num_processes=processes, distributed_type=kind, _cpu=cpu)


def test_processes_and_kind_are_compared():
    check_started(Asked(2), state(2, DistributedType.MULTI_CPU))
    check_started(Asked(2, fsdp=2), state(2, DistributedType.MULTI_GPU))
    check_started(Asked(1, deepspeed=True, stage=3), state(1, DistributedType.NO))  # one GPU with offloading
    with pytest.raises(EngineError, match="8 processes were asked for"):
        check_started(Asked(8), state(1, DistributedType.NO))
    with pytest.raises(EngineError, match="stage 3 was asked for, and accelerate runs MULTI_CPU"):
        check_started(Asked(2, deepspeed=True, stage=3), state(2, DistributedType.MULTI_CPU, cpu=True))


def test_wrapping_is_compared():
    class Engine:
        def zero_optimization_stage(self):
            return 2

        def gradient_clipping(self):
            return 0.5

    check_wrapped(Asked(2, deepspeed=True, stage=2), Engine(), 2, SimpleNamespace(max_grad_norm=0.5))
    with pytest.raises(EngineError, match="ZeRO stage 2"):
        check_wrapped(Asked(2, deepspeed=True, stage=3), Engine(), 2, SimpleNamespace(max_grad_norm=0.5))
    with pytest.raises(EngineError, match="wrapped as object"):
        check_wrapped(Asked(2), object(), 2, None)
    check_wrapped(Asked(), object(), 1, None)


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_process_of_two(tmp_path):
    # by the name that people type: the check reads it
    script = tmp_path / "accelerate"
    script.write_text("from accelerate.commands.accelerate_cli import main\nmain()\n")
    command = [sys.executable, str(script), "launch", "--cpu", "--num_processes", "2", "-m", "memfactory.cli.main"]
    command += ["train", "memagent/quickstart", f"output_dir={tmp_path / 'run'}", *RECIPE]
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "2 processes were asked for (by accelerate launch), and accelerate runs 1" in done.stderr, done.stderr
    assert "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fsdp_that_becomes_ddp(pairs):
    text = pairs["ddp"][1]["FSDP on CPUs"]
    assert text.startswith("EngineError: FSDP 2 was asked for, and accelerate runs MULTI_CPU on 2 processes")
    assert "fix:" in text


@pytest.mark.slow
def test_deepspeed_that_clips_at_another_norm(pairs):
    text = pairs["zero"][1]["DeepSpeed that clips"]
    assert text.startswith("RecipeError: train.max_grad_norm: 0.5, and DeepSpeed clips at 1.0")
