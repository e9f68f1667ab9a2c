"""``memfactory serve-rollouts RECIPE``: the vLLM server that samples for a run."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from memfactory.cli.recipes import find_recipe
from memfactory.errors import RecipeError

POLL = 0.5
"""Seconds between two looks at the server."""


def serve_rollouts(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name: the one that is trained.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...] [-- VLLM FLAGS]", help="The overrides that are given to train, too."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other nodes.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Absent: that of the recipe's first base_url.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share one copy of the model.")] = 1,
    data_parallel: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    python: Annotated[
        str | None, typer.Option(help="Python that has vLLM. Absent: MEMFACTORY_VLLM_PYTHON, or this one.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds until it must answer.")] = 1800.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and start nothing.")] = False,
) -> None:
    """Start vLLM with the flags the recipe needs, wait until it answers, and end all of it with Ctrl-C."""
    from memfactory.policy.vllm_process import (
        MARK,
        SERVER,
        RolloutServer,
        ServerOptions,
        check_port,
        end_leftovers,
        environment,
        has_gpu,
        interpreter,
        port_of,
    )
    from memfactory.policy.vllm_process import arguments as flags_of
    from memfactory.recipe import load_recipe

    console = Console()
    overrides = [text for text in arguments or () if "=" in text and not text.startswith("-")]
    extra = [text for text in arguments or () if text not in overrides]
    loaded = load_recipe(find_recipe(recipe), overrides)
    if loaded.rollout.vllm.mode == "colocate":
        why = "the training processes start servers of their own"
        raise RecipeError("rollout.vllm.mode: colocate", why, "rollout.vllm.mode=server, here and for train")
    options = ServerOptions(host, port, tensor_parallel, data_parallel, python, extra)
    gpu = has_gpu()
    flags = flags_of(loaded, loaded.run_dir, options, gpu=gpu)
    number = port_of(loaded, options)
    if dry_run:
        console.print(shlex.join(["python", "-m", SERVER, *flags]), soft_wrap=True, markup=False)
        return
    check_port(host, number)
    command = [interpreter(options), "-m", SERVER, *flags]

    stopping: list[int] = []

    def stop(signal_number: int, frame: FrameType | None) -> None:
        stopping.append(signal_number)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    model = Path(flags[flags.index("--model") + 1])
    _wait_for(model, loaded.run_dir, wait, stopping, console)
    if stopping:
        raise typer.Exit(128 + stopping[0])
    log = loaded.run_dir / f"vllm-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{number}"
    mark = f"{loaded.run_dir.resolve()}:{number}"
    if left := end_leftovers(mark):
        console.print(f"ended {left} processes that a killed server had left")
    with RolloutServer(command, environment(os.environ, gpu=gpu) | {MARK: mark}, url, log) as server:
        console.print(f"starting vLLM; its log: {log}", soft_wrap=True)
        seconds = server.wait_healthy(wait, lambda: not stopping)
        if not stopping:
            console.print(f"serving {model} at {url} after {seconds:.0f} s; Ctrl-C ends it", soft_wrap=True)
        assert server.process is not None
        while not stopping and server.process.poll() is None:
            time.sleep(POLL)
        ended = server.process.poll()
    if not stopping:
        from memfactory.errors import EngineError

        raise EngineError(
            f"the vLLM server ended with code {ended}", f"see {log}", "start it again; the trainer waits for it"
        )
    console.print("stopped")
    raise typer.Exit(128 + stopping[0])


def _wait_for(model: Path, run: Path, seconds: float, stopping: list[int], console: Console) -> None:
    """Wait for a model that the trainer makes: one built from nothing, or warmed up.

    Raises:
        EngineError: it is not there in time.
    """
    from memfactory.errors import EngineError

    if model.parent != run.resolve() or (model / "config.json").is_file():
        return
    console.print(f"waiting for {model}: `memfactory train` makes it before it samples", soft_wrap=True)
    end = time.monotonic() + seconds
    while not stopping and not (model / "config.json").is_file():
        if time.monotonic() > end:
            raise EngineError(
                f"{model} is not there after {seconds:g} s",
                "this recipe's model is made by the trainer",
                "start memfactory train with the same recipe and overrides, also output_dir",
            )
        time.sleep(POLL)
