"""`memfactory doctor RECIPE`: memory, folders and ports, without any server."""

from __future__ import annotations

import os
import shlex
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from typer.testing import CliRunner

from memfactory.cli.main import app
from memfactory.cli.recipes import find_recipe
from memfactory.doctor import run
from memfactory.doctor.check import Check, Level
from memfactory.doctor.fits import check_memory, check_shared
from memfactory.doctor.folders import check_room, checkpoint_bytes, folder_checks
from memfactory.doctor.machine import GpuMemory
from memfactory.doctor.needs import recipe_packages
from memfactory.doctor.ports import Address, Answer, check_main_port, look, owner
from memfactory.doctor.served import Served, passing_folder, zero_adapter
from memfactory.errors import RecipeErrors
from memfactory.launch.plan import Layout, Plan, Request, lay_out, make_plan
from memfactory.policy.models import load_tokenizer
from memfactory.policy.tiny import tiny_model
from memfactory.train.prepare import Prepared, prepare

ONE_GPU = Request(config="single_gpu", gpus=1)
LORA = "memagent/qwen3-1.7b-lora"


def planned(name: str, request: Request, overrides: list[str] | None = None) -> tuple[Prepared, Layout, Plan]:
    prepared = prepare(find_recipe(name), overrides or [], splits=())
    layout = lay_out(request)
    return prepared, layout, make_plan(prepared, request, layout)


def memory(name: str, gigabytes: float, *, free: float | None = None, overrides: list[str] | None = None) -> Check:
    prepared, layout, plan = planned(name, ONE_GPU, overrides)
    gpu = GpuMemory(int(gigabytes * 1e9), int((free if free is not None else gigabytes) * 1e9))
    (check,) = check_memory(prepared, ONE_GPU, layout, plan, [gpu], None)
    return check


# ---- memory ------------------------------------------------------------------------------------


def test_a_gpu_that_is_large_enough_is_fine_and_one_that_others_fill_is_noted() -> None:
    assert memory(LORA, 80).level is Level.OK
    taken = memory(LORA, 80, free=2)
    assert taken.level is Level.NOTE
    assert "another program" in taken.fix


@pytest.mark.parametrize("name", [LORA, "memagent/qwen3-1.7b"])
def test_what_is_to_be_changed_makes_it_fit(name: str) -> None:
    have = 12.0 if name == LORA else 24.0
    check = memory(name, have)
    assert check.level is Level.WRONG
    typed, _, peak = check.fix.partition(" (then ")
    assert peak
    changed = memory(name, have, overrides=shlex.split(typed))
    assert changed.level is Level.OK, f"{check.fix}: {changed}"


def test_where_nothing_makes_it_fit_it_says_so() -> None:
    check = memory("memagent/qwen2.5-7b", 8)
    assert check.level is Level.WRONG
    assert "more GPUs with --config fsdp2 or zero3" in check.fix


def test_on_a_cpu_all_processes_share_the_machines_memory() -> None:
    request = Request(config="cpu", processes=2)
    prepared, layout, plan = planned("memagent/quickstart", request)
    (roomy,) = check_memory(prepared, request, layout, plan, [], 10**12)
    (tight,) = check_memory(prepared, request, layout, plan, [], 10**7)
    assert (roomy.level, tight.level) == (Level.OK, Level.WRONG)
    assert "rollout." in tight.fix


def test_servers_want_a_gpu_that_does_not_train() -> None:
    request = Request(config="ddp", gpus=2)
    _, _, plan = planned(LORA, request, ["rollout.engine=vllm"])
    (both,) = check_shared(plan, 2)
    assert both.level is Level.NOTE
    assert "--gpus 1" in both.fix
    assert not list(check_shared(plan, 3))
    elsewhere = ["rollout.engine=vllm", "rollout.vllm.base_urls=[http://node7:8000]"]
    assert not list(check_shared(planned(LORA, request, elsewhere)[2], 2))


# ---- folders -----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    prepared, _, plan = planned("memagent/quickstart", ONE_GPU, [f"output_dir={tmp_path / 'file' / 'run'}"])
    (check,) = folder_checks(prepared.recipe, plan)
    assert check.level is Level.WRONG
    assert "output_dir" in check.fix


def test_a_folder_is_looked_at_and_not_made(tmp_path: Path) -> None:
    adapters = tmp_path / "shared"
    overrides = [f"output_dir={tmp_path / 'a' / 'b'}", f"rollout.vllm.adapters={adapters}"]
    prepared, _, plan = planned("memagent/quickstart-vllm", ONE_GPU, overrides)
    checks = list(folder_checks(prepared.recipe, plan))
    assert [check.name for check in checks] == ["run folder", "disk, run folder", "adapters"]
    assert {check.level for check in checks} == {Level.OK}
    assert not list(tmp_path.iterdir())


def test_room_for_checkpoints(tmp_path: Path) -> None:
    _, _, plan = planned("memagent/qwen2.5-7b", ONE_GPU)
    one = checkpoint_bytes(plan)
    assert one == 3 * 4 * 7_615_616_512  # float32 weights and two moments
    levels = [check_room(plan, int(one * share)).level for share in (0.5, 2, 9)]
    assert levels == [Level.WRONG, Level.NOTE, Level.OK]
    _, _, adapted = planned(LORA, ONE_GPU)
    small = checkpoint_bytes(adapted)
    assert small is not None
    assert small < one / 100


# ---- ports -------------------------------------------------------------------------------------


@contextmanager
def listening(body: bytes) -> Iterator[int]:
    """An HTTP server on a free port that answers everything with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_who_is_at_a_port() -> None:
    with listening(b"<html>") as port:
        address = Address.of(f"http://localhost:{port}")
        assert look(address) is Answer.OTHER
        assert str(os.getpid()) in owner(port)
        taken = check_main_port(port)
        assert taken.level is Level.WRONG
        assert str(os.getpid()) in taken.found
    assert look(address) is Answer.NOBODY
    assert check_main_port(port).level is Level.OK
    with listening(b'{"data": []}') as port:
        assert look(Address.of(f"http://localhost:{port}")) is Answer.SERVER
    with socket.socket() as bound:  # as vLLM does while it loads the model
        bound.bind(("127.0.0.1", 0))
        assert look(Address.of(f"http://localhost:{bound.getsockname()[1]}")) is Answer.SILENT
    assert not Address.of("http://node7:8000").local


def served(*overrides: str) -> Served:
    name = "memagent/quickstart-vllm"
    return Served(prepare(find_recipe(name), list(overrides), splits=()), shlex.join([name, *overrides]))


def test_where_nobody_serves_the_command_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    looked = served(f"rollout.vllm.base_urls=[http://localhost:{port}, http://127.0.0.2:1]")
    first, second = looked.checks()
    assert looked.starts_here()
    assert (first.level, second.level) == (Level.NOTE, Level.NOTE)
    assert "memfactory serve-rollouts memagent/quickstart-vllm 'rollout.vllm.base_urls=" in first.fix
    assert "--host 0.0.0.0" in second.fix


def test_a_port_that_something_else_has_is_wrong() -> None:
    with listening(b"hello") as port:
        (check,) = served(f"rollout.vllm.base_urls=[http://localhost:{port}]").checks()
    assert check.level is Level.WRONG
    assert str(os.getpid()) in check.found
    assert "--port" in check.fix


# ---- packages, and all of it ---------------------------------------------------------------------


def test_packages_are_those_the_recipe_asks_for() -> None:
    def asked(*overrides: str, config: str | None = None) -> dict[str, Level]:
        recipe = prepare(find_recipe("memagent/quickstart"), overrides, splits=()).recipe
        return {check.name: check.level for check in recipe_packages(recipe, config)}

    assert asked() == {}
    assert "httpx" in asked("judge={base_url: http://localhost:9000/v1, model: x}")
    assert "deepspeed" in asked(config="zero3")
    assert asked("train.report_to=wandb").keys() == {"wandb"}


def test_an_adapter_of_zeros_has_the_recipes_rank(tmp_path: Path) -> None:
    looked = served("model.lora.r=4", f"output_dir={tmp_path}")
    section = looked.recipe.model
    tokenizer = load_tokenizer(section, looked.prepared.vocabulary)
    assert section.tiny is not None
    tiny_model(section.tiny, tokenizer, 0).save_pretrained(tmp_path / "initial")
    config, state = zero_adapter(looked.recipe, looked.base)
    assert isinstance(config, LoraConfig)
    assert config.r == 4
    assert len(state) == 2 * 7  # A and B of the seven matrices of the first layer
    assert all(4 in value.shape and not torch.any(value) for value in state.values())


def test_nothing_is_left_of_a_passing_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with passing_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    with passing_folder(tmp_path / "kept"):
        (tmp_path / "kept" / "of somebody else").write_text("")
    assert [place.name for place in (tmp_path / "kept").iterdir()] == ["of somebody else"]


def test_the_command_shows_the_recipes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "machine", lambda: [Check("python", "3.11")])
    runner = CliRunner()
    command = ["doctor", "memagent/quickstart", f"output_dir={tmp_path / 'run'}", "--processes", "2"]
    result = runner.invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in ("memory for the run", "port of the processes", "run folder", "disk, run folder"):
        assert name in result.output
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["doctor", "memagent/quickstart", f"output_dir={tmp_path / 'file' / 'run'}"])
    assert result.exit_code == 1
    assert "To mend: run folder." in result.output
    result = runner.invoke(app, ["doctor", "memagent/quickstart", "train.max_stepz=3"])
    assert isinstance(result.exception, RecipeErrors)  # 2 by the command's entry point
