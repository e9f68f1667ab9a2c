"""``memfactory serve RUN``: a trained agent behind OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memfactory.cli.options import Overrides
from memfactory.errors import EngineError, RecipeError

Run = Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart-seed0.")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights. Absent: RUN/model, or the newest checkpoint.")
]
Memory = Annotated[Path | None, typer.Option("--memory", help="File of memories. Absent: RUN/memories.sqlite.")]


def serve(
    run: Run,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Others than this machine's need --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="YAML or JSON, a line `user: token` for each user.")
    ] = None,
    memory: Memory = None,
    stateless: Annotated[
        bool, typer.Option("--stateless", help="Every request begins with an empty memory and leaves nothing.")
    ] = False,
    indexed: Annotated[
        int,
        typer.Option("--indexed", min=0, help="Entries of all users together that stay in memory between requests."),
    ] = 100_000,
    at_once: Annotated[int, typer.Option(min=1, help="Requests of one user under way; more are told 429.")] = 64,
    per_minute: Annotated[int, typer.Option(min=1, help="Requests of one user in a minute; more: 429.")] = 6000,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest body in MB; larger ones: 413.")] = 4.0,
    body_seconds: Annotated[float, typer.Option(min=0.1, help="For a body to arrive; longer ones: 408.")] = 30.0,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="For an answer; longer ones: 504.")] = 600.0,
) -> None:
    """Offer the agent of RUN as an OpenAI-compatible server, each user with a memory that survives a restart.

    Ctrl-C and SIGTERM let what is under way come to its end. See docs/serve.md.
    """
    if stateless and memory is not None:
        raise RecipeError("--stateless and --memory", "without a memory there is no file for it", "give one")
    try:
        from memfactory.serve.access import Limits, Tokens, check_reachable
        from memfactory.serve.app import Options, Service
        from memfactory.serve.server import bind
        from memfactory.serve.server import serve as answer
    except ModuleNotFoundError as error:
        fix = "pip install 'memfactory[serve]'"
        raise EngineError("memfactory serve cannot run", f"'{error.name}' is not installed", fix) from error
    known = Tokens.read(tokens) if tokens is not None else Tokens()
    check_reachable(host, known)
    bound = bind(host, port)

    from memfactory.serve.desk import Desk
    from memfactory.serve.loading import open_run
    from memfactory.serve.memories import Memories

    console = Console()
    served = open_run(run, checkpoint, overrides or [])
    file = memory or run / "memories.sqlite"
    memories = None if stateless else Memories(file, bank=served.keeps_bank, indexed=indexed)
    options = Options(int(max_body_mb * 1e6), body_seconds, request_seconds)
    service = Service(Desk(served, memories), known, Limits(at_once, per_minute), options)
    number = bound.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"

    def ready() -> None:
        who = f"{len(known.users)} users by their tokens" if known.users else "this machine alone, without a token"
        kept = "every request begins anew" if stateless else f"memories in {file}"
        told = f"{served.name} ({served.checkpoint}) at {url}\n{who}; {kept}; Ctrl-C ends it"
        console.print(told, soft_wrap=True, markup=False, highlight=False)

    answer(service, bound, ready)
    console.print("stopped")
