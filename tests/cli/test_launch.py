"""What a user sees of `memfactory launch`: every recipe on every configuration, bad input, and two real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from memfactory.cli.launch import checked
from memfactory.cli.main import load
from memfactory.cli.recipes import find_recipe, listed
from memfactory.errors import MemFactoryError, RecipeErrors
from memfactory.launch import plan as plans
from memfactory.launch.accelerate_config import names
from memfactory.launch.files import write
from memfactory.launch.plan import Request
from memfactory.recipe import load_recipe
from memfactory.runs import RunFolder
from tests.forked import Server
from tests.train.launching import free_port

ROOT = Path(__file__).parents[2]
QUICKSTART = "memagent/quickstart"
SMALL = (
    *("warmup.steps=5", "environment.train_tasks=16", "environment.test_tasks=4", "train.max_steps=2"),
    *("train.per_device_train_batch_size=8", "train.eval_strategy=no"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder and a machine without GPUs, whatever this one has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "gpus_here", lambda: 0)


def invoke(*arguments: str) -> str:
    """Output of `memfactory launch`, in this process."""
    import typer

    app = typer.Typer()
    app.command()(__import__("memfactory.cli.launch", fromlist=["launch"]).launch)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def errors_of(*arguments: str) -> str:
    with pytest.raises(MemFactoryError) as caught:
        invoke(*arguments)
    return str(caught.value)


# --- dry runs ---------------------------------------------------------------------------------------------


def goes_with(recipe: str, config: str) -> bool:
    """4-bit weights are not divided (tests/policy/test_quantization.py)."""
    return load_recipe(find_recipe(recipe)).model.quantization is None or not config.startswith(("fsdp", "zero"))


@pytest.mark.parametrize(
    ("recipe", "config"),
    [(row.name, config) for row in listed() for config in names() if goes_with(row.name, config)],
)
def test_every_recipe_on_every_configuration(recipe: str, config: str, tmp_path: Path) -> None:
    per_node = {"single_gpu": {"gpus": 1}, "cpu": {"processes": 2}}.get(config, {"gpus": 8})
    path = find_recipe(recipe)
    if load_recipe(path).rollout.engine == "async" and config != "single_gpu":
        with pytest.raises(RecipeErrors, match="one process trains"):
            checked(path, [], Request(config=config, slurm=config != "cpu", **per_node))
        return
    plan = checked(path, [], Request(config=config, slurm=config not in ("single_gpu", "cpu"), **per_node))
    assert plan.memory is not None, "the model of a shipped recipe has a known size"
    assert plan.batch.generation_batch % plan.batch.generations == 0
    files = write(plan, tmp_path / "launch", sbatch={} if config not in ("single_gpu", "cpu") else None)
    assert load_recipe(files.recipe) == load_recipe(path), "the run starts from this file"
    values = yaml.safe_load(files.accelerate.read_text())
    assert values["num_processes"] == plan.processes == sum(per_node.values())
    if files.deepspeed is not None:
        assert values["deepspeed_config"]["deepspeed_config_file"] == str(files.deepspeed)
        assert json.loads(files.deepspeed.read_text())["zero_optimization"]["stage"] in (1, 2, 3)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_dry_run_for_slurm_writes_everything_and_starts_nothing(nodes: int, tmp_path: Path) -> None:
    output = invoke(
        *("memagent/quickstart", "--config", "zero3", "--gpus", "8", "--nodes", str(nodes), "--slurm", "--dry-run"),
        *("--sbatch", "partition=gpu", "--sbatch", "time=12:00:00", "--output", "out"),
    )
    assert sorted(os.listdir("out")) == ["accelerate.yaml", "deepspeed.json", "job.sh", "recipe.yaml"]
    assert not Path("runs").exists()
    assert f"128 x 1 steps x {8 * nodes} processes = {1024 * nodes}" in output
    assert "would run: sbatch out/job.sh" in output
    script = Path("out/job.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    assert subprocess.run(["bash", "-n", "out/job.sh"], check=False).returncode == 0


def test_a_batch_is_kept_on_eight_processes() -> None:
    output = invoke(QUICKSTART, "--gpus", "8", "--batch", "128", "--dry-run", "--output", "out")
    assert "16 x 1 accumulated x 8 processes = 128" in output
    assert load_recipe("out/recipe.yaml").train["per_device_train_batch_size"] == 16


def test_servers_are_part_of_the_plan() -> None:
    recipe = ("memagent/quickstart", "model.lora={r: 8, alpha: 16}", "rollout.engine=vllm")
    where = ("--gpus", "4", "--nodes", "2", "--slurm", "--dry-run", "--output", "out")
    output = invoke(*recipe, *where, "--rollout-nodes", "1")
    assert "vLLM on 1 nodes of their own" in output
    assert "while generating" not in output, "trainers do not generate"
    assert "#SBATCH --nodes=3\n" in Path("out/job.sh").read_text()
    assert "--rollout-nodes 1" in errors_of("memagent/quickstart", *where, "--rollout-nodes", "1")


def test_a_model_of_unknown_size_is_said_to_be_unknown() -> None:
    output = invoke(
        QUICKSTART, "model.tiny=null", "model.name=nobody/Nothing-7B", "warmup=null", "--gpus", "8", "--dry-run"
    )
    assert "the size of nobody/Nothing-7B is not known" in output


def test_lora_with_zero3_is_pointed_out() -> None:
    output = invoke("memagent/quickstart", "model.lora={r: 8}", "--config", "zero3", "--gpus", "2", "--dry-run")
    assert re.search(r"(?s)note: model.lora with ZeRO-3.*fix: --config ddp", output)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "zreo3", "--gpus", "8"], ["no such configuration", "did you mean 'zero3'"]),
        (["--config", "zero3"], ["for how many processes?", "--gpus 8"]),
        (["--config", "zero3", "--processes", "2"], ["accelerate would not divide anything on a CPU", "--config cpu"]),
        (["--config", "fsdp2", "--processes", "2"], ["accelerate would not divide anything on a CPU"]),
        (["--config", "cpu", "--gpus", "2"], ["runs on CPUs", "--processes 2, or --config ddp"]),
        (["--config", "single_gpu", "--gpus", "8"], ["one process only", "--config ddp"]),
        (["--gpus", "8", "--processes", "8"], ["keep one"]),
        (["--gpus", "8"], ["8 GPUs are asked for and this machine has 0", "--dry-run"]),
        (["--gpus", "8", "--nodes", "2"], ["--slurm, or run this on every node with --node-rank"]),
        (["--gpus", "8", "--nodes", "2", "--port", "0", "--slurm"], ["nodes must agree on a port"]),
        (["--processes", "2", "train.bf16=true", "--config", "no_bf16.yaml"], ["train.bf16=false"]),
        (["--processes", "3", "train.per_device_train_batch_size=4"], ["no whole groups of 8", "use 2, 4, 6, 8"]),
        (["--processes", "3", "--batch", "128"], ["do not divide 128", "use 1, 2, 4, 8, 16, 32, 64, 128 processes"]),
        (["--processes", "2", "train.deepspeed=ds.json"], ["two would contradict each other", "train.deepspeed=null"]),
        (["--gpus", "8", "--slurm", "--sbatch", "partiton=gpu"], ["did you mean 'partition'"]),
        (["--resume", "--start-over"], ["give one"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_input_is_refused_with_what_to_type(arguments: list[str], words: list[str]) -> None:
    Path("no_bf16.yaml").write_text("distributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: 'no'\n")
    text = errors_of(QUICKSTART, *arguments)
    for part in words:
        assert part in text
    assert not Path("runs").exists(), "nothing was written"


def test_errors_of_recipe_and_configuration_are_shown_together() -> None:
    text = errors_of(QUICKSTART, "train.lerning_rate=1", "--config", "zreo3", "--gpus", "8")
    assert "2 errors" in text
    assert "learning_rate" in text
    assert "zero3" in text


def test_a_taken_port_is_noticed() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        text = errors_of(QUICKSTART, "--processes", "2", "--port", str(other.getsockname()[1]))
    assert "another program listens there" in text
    assert "--port 0 takes a free one" in text


def test_deepspeed_that_is_not_installed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "gpus_here", lambda: 2)
    monkeypatch.setattr(plans.importlib.util, "find_spec", lambda name: None)
    text = errors_of(QUICKSTART, "--config", "zero2")
    assert "pip install deepspeed, or --config fsdp2" in text


def test_a_folder_with_another_run_is_refused_or_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder.open(Path("out"), load_recipe(find_recipe(QUICKSTART), ["seed=7"]), resume=False)
    monkeypatch.setattr("memfactory.cli.launch.start", lambda command: None)
    arguments = (QUICKSTART, "output_dir=out", "--processes", "2")
    assert "seed was 7, is 0" in errors_of(*arguments)
    assert "running: " in invoke(*arguments, "--start-over")
    assert Path("out.1/recipe.yaml").is_file()
    assert Path("out/launch/recipe.yaml").is_file()


def test_several_nodes_without_slurm_are_told_where_the_first_is(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("memfactory.cli.launch.start", started.append)
    arguments = (
        QUICKSTART,
        "--config",
        "cpu",
        "--processes",
        "1",
        "--nodes",
        "2",
        "--address",
        "first",
        "--port",
        "29501",
    )
    invoke(*arguments, "--node-rank", "1")
    [command] = started
    text = shlex.join(command)
    assert "--machine_rank 1 --main_process_port 29501 --main_process_ip first" in text
    assert yaml.safe_load(Path("runs/quickstart-seed0/launch/accelerate.yaml").read_text())["num_machines"] == 2
    assert "there are 2 nodes" in errors_of(*arguments, "--node-rank", "2")


def test_the_command_is_in_the_list() -> None:
    assert load("launch").name == "launch"
    with pytest.raises(RecipeErrors):
        checked(find_recipe(QUICKSTART), ["train.nothing=1"], Request(processes=2))


# --- for real ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memfactory.cli.main", "launch", QUICKSTART, *SMALL, "--processes", "2"]
    environ = os.environ | {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "runs/quickstart-seed0/summary.json").read_text())
    assert summary["processes"] == 2
    assert (summary["steps"], summary["stopped"]) == (2, "finished")
    assert summary["totals"]["episodes"] == 2 * 16, "both processes brought their episodes"
    assert "8 x 1 steps x 2 processes = 16" in done.stdout, "as the plan said"


@pytest.mark.slow
def test_two_nodes_without_slurm_train_together(forked: Server, tmp_path: Path) -> None:
    asked = ["launch", QUICKSTART, *SMALL, "warmup.steps=2", "--config", "cpu", "--processes", "1", "--nodes", "2"]
    asked += ["--address", "127.0.0.1", "--port", str(free_port())]
    environment = {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [
        forked.start([*asked, "--node-rank", str(rank)], folder=tmp_path, environment=environment) for rank in range(2)
    ]
    codes = [node.wait() for node in nodes]
    assert codes == [0, 0], "\n".join(node.output[-3000:] for node in nodes)
    summary = json.loads((tmp_path / "runs/quickstart-seed0/summary.json").read_text())
    assert (summary["processes"], summary["steps"], summary["stopped"]) == (2, 2, "finished")
    assert summary["totals"]["episodes"] == 2 * 16, "both nodes brought their episodes"
