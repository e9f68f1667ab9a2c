"""The SLURM script: valid bash for every shape of job, and run for real on two pretended nodes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memfactory.errors import EngineError, RecipeErrors
from memfactory.launch.slurm import render, sbatch_options, submit

# Two names of this machine stand for two nodes.
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) printf '%s\\n' ${SLURM_JOB_NODELIST//,/ } ;;
  requeue) echo "$2" >> "$FAKE_FOLDER/requeued" ;;
esac
"""
# What srun does with these options: the command once on each node of the list, signals passed on.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case "$1" in --nodelist=*) IFS=, read -ra hosts <<< "${1#*=}" ;; --nodes=*) nodes=${1#*=} ;; esac
  shift
done
[[ ${#hosts[@]} == "$nodes" ]] || { echo "fake srun: $nodes nodes, ${#hosts[@]} hosts" >&2; exit 9; }
tasks=()
for id in "${!hosts[@]}"; do
  SLURM_NODEID=$id FAKE_HOST=${hosts[$id]} "$@" &
  tasks+=("$!")
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
  wait "$task" || code=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task" || code=$?; done
done
exit "$code"
"""


def script(tmp_path: Path, **changes) -> Path:
    given = {
        "name": "a-run",
        "recipe": Path("runs/a b/launch/recipe.yaml"),
        "config": Path("runs/a b/launch/accelerate.yaml"),
        "output": Path("runs/a b/launch"),
        "trainer_nodes": 2,
    }
    path = tmp_path / "job.sh"
    path.write_text(render(**(given | changes)))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which `srun` and `scontrol` are the two above."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {
        "PATH": path,
        "FAKE_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),  # decides the port
        "SLURM_JOB_NODELIST": "127.0.0.1,localhost",
    }


SHAPES = [
    pytest.param({"trainer_nodes": 1, "gpus": 8}, id="1 node"),
    pytest.param({"trainer_nodes": 2, "gpus": 8}, id="2 nodes"),
    pytest.param({"trainer_nodes": 4, "gpus": 8, "options": {"partition": "gpu", "exclusive": None}}, id="4 nodes"),
    pytest.param({"trainer_nodes": 2, "rollout_nodes": 2, "gpus": 8}, id="2 and 2 for rollouts"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_valid_bash_with_the_right_header(tmp_path: Path, shape: dict) -> None:
    path = script(tmp_path, **shape)
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""
    header = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert f"#SBATCH --nodes={shape['trainer_nodes'] + shape.get('rollout_nodes', 0)}" in header
    assert "#SBATCH --gpus-per-node=8" in header
    assert "#SBATCH --requeue" in header
    assert "#SBATCH --signal=B:USR1@120" in header
    for name, value in shape.get("options", {}).items():
        assert f"#SBATCH --{name}" + (f"={value}" if value else "") in header
    # sbatch stops reading options at the first command
    assert path.read_text().rindex("#SBATCH") < path.read_text().index("set -euo")


@pytest.mark.parametrize("shape", SHAPES)
def test_shellcheck_finds_nothing(tmp_path: Path, shape: dict) -> None:
    program = shutil.which("shellcheck")
    if program is None:
        assert not os.environ.get("MEMFACTORY_REQUIRE_SHELLCHECK"), "shellcheck is wanted and not there"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, script(tmp_path, **shape)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_options_of_sbatch_are_checked_together() -> None:
    assert sbatch_options(["partition=gpu", "--time=1-00:00:00", "exclusive"]) == {
        "partition": "gpu",
        "time": "1-00:00:00",
        "exclusive": None,
    }
    with pytest.raises(RecipeErrors) as caught:
        sbatch_options(["partiton=gpu", "nodes=3", "comment=two words"])
    text = str(caught.value)
    for words in ("3 errors", "did you mean 'partition'", "use --nodes and --rollout-nodes", "ends at a space"):
        assert words in text


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"(?s)no login node.*sbatch job.sh"):
        submit(Path("job.sh"))


def test_servers_run_beside_the_trainers_and_end_with_them(tmp_path: Path, cluster: dict[str, str]) -> None:
    programs = tmp_path / "programs"
    # a server that runs until it is ended, on the second node; trainers that write down what they are told
    (programs / "memfactory").write_text(
        "#!/usr/bin/env bash\ntrap 'echo ended >> \"$FAKE_FOLDER/server\"; exit 143' TERM\n"
        'echo "$FAKE_HOST $*" > "$FAKE_FOLDER/server"\nwhile :; do sleep 0.1; done\n'
    )
    (programs / "python").write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$FAKE_FOLDER/trainer"\n'
        'until [[ -e "$FAKE_FOLDER/server" ]]; do sleep 0.1; done\n'
    )
    for name in ("memfactory", "python"):
        (programs / name).chmod(0o755)
    path = script(tmp_path, trainer_nodes=1, rollout_nodes=1, gpus=4, outage=3600.0)
    done = subprocess.run(["bash", path], env=cluster, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    served, ended = (tmp_path / "server").read_text().splitlines()
    assert (
        served == "localhost serve-rollouts runs/a b/launch/recipe.yaml --host 0.0.0.0 --port 8000 --data-parallel 4"
    )
    assert ended == "ended", "the server outlived the job"
    told = (tmp_path / "trainer").read_text().splitlines()
    assert told[:2] == ["-m", "memfactory.launch.start"]
    assert told[-2:] == ["rollout.vllm.base_urls=[http://localhost:8000]", "rollout.vllm.outage=3600"]
    assert told[told.index("--machine_rank") + 1] == "0"
    assert told[told.index("--main_process_ip") + 1] == "127.0.0.1"
    assert told[told.index("--config_file") + 1] == "runs/a b/launch/accelerate.yaml"


def trainer(tmp_path: Path, text: str) -> None:
    """Let the `python` of the nodes be a bash script."""
    program = tmp_path / "programs" / "python"
    program.write_text(f"#!/usr/bin/env bash\n{text}")
    program.chmod(0o755)


def test_the_exit_code_of_the_trainers_is_the_jobs(tmp_path: Path, cluster: dict[str, str]) -> None:
    trainer(tmp_path, "exit 7\n")
    done = subprocess.run(
        ["bash", script(tmp_path)], env=cluster, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 7
    assert not (tmp_path / "requeued").exists()


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_warning_and_then_a_pre_emption_wait_for_the_save(tmp_path: Path, cluster: dict[str, str]) -> None:
    saves = """
        trap 'echo told >> "$FAKE_FOLDER/told"' TERM
        touch "$FAKE_FOLDER/told"
        until [[ -e "$FAKE_FOLDER/disk" ]]; do sleep 0.1; done
        touch "$FAKE_FOLDER/saved"
        exit 143
    """
    trainer(tmp_path, saves)
    told = tmp_path / "told"
    running = subprocess.Popen(["bash", script(tmp_path, trainer_nodes=1)], env=cluster)
    try:
        until(told.exists)
        running.send_signal(signal.SIGUSR1)
        until(lambda: len(told.read_text().split()) == 1)
        running.send_signal(signal.SIGTERM)
        until(lambda: len(told.read_text().split()) == 2)
        time.sleep(0.5)
        assert running.poll() is None, "the job ended before the trainer had saved"
    finally:
        (tmp_path / "disk").touch()
    assert running.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]


@pytest.mark.parametrize("cores", ["12", ""])
def test_trainers_get_the_cores_that_the_job_was_given(tmp_path: Path, cluster: dict[str, str], cores: str) -> None:
    trainer(tmp_path, 'echo "${SRUN_CPUS_PER_TASK-not set}" > "$FAKE_FOLDER/cores"\n')
    environ = cluster | ({"SLURM_CPUS_PER_TASK": cores} if cores else {})
    subprocess.run(["bash", script(tmp_path, trainer_nodes=1)], env=environ, timeout=60, check=True)
    assert (tmp_path / "cores").read_text().strip() == (cores or "not set")


@pytest.mark.slow
def test_two_nodes_train_are_told_to_stop_are_queued_again_and_go_on(tmp_path: Path, cluster: dict[str, str]) -> None:
    cluster |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    overrides = (
        *("warmup.steps=5", "environment.train_tasks=16", "environment.test_tasks=4", "train.max_steps=12"),
        *("train.per_device_train_batch_size=8", "train.eval_strategy=no", "output_dir=out"),
    )
    launch = [sys.executable, "-m", "memfactory.cli.main", "launch", "memagent/quickstart", *overrides]
    launch += ["--config", "cpu", "--nodes", "2", "--processes", "1", "--slurm", "--dry-run"]
    done = subprocess.run(launch, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    job, log = ["bash", "out/launch/job.sh"], tmp_path / "job.log"

    with log.open("w") as file:
        running = subprocess.Popen(job, cwd=tmp_path, env=cluster, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while "step    2/12" not in log.read_text() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        running.send_signal(signal.SIGUSR1)  # SLURM's warning goes to the batch shell alone
        code = running.wait(timeout=150)
    text = log.read_text()
    assert code == 0, text[-4000:]
    assert (tmp_path / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["processes"], summary["stopped"]) == (2, "interrupted")
    saved = list((tmp_path / "out/checkpoints").glob("checkpoint-*"))
    assert saved

    again = subprocess.run(job, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "resuming from out/checkpoints/checkpoint-" in again.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["processes"], summary["stopped"], summary["steps"]) == (2, "finished", 12)
    assert len((tmp_path / "requeued").read_text().split()) == 1, "a finished job must not be queued again"
