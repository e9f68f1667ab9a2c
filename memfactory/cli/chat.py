"""``memfactory chat RUN``: a trained agent in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from memfactory.cli.options import Overrides
from memfactory.cli.serve import Checkpoint, Memory, Run
from memfactory.errors import MemFactoryError

if TYPE_CHECKING:
    from memfactory.serve.desk import Desk, Replied
    from memfactory.serve.transcript import ChatMessage

_HELP = "/memory shows what it remembers of you, /forget removes that, /quit or Ctrl-D ends, Ctrl-C stops an answer"
_HELP_ANEW = "/memory shows its notes for the last question, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    run: Run,
    overrides: Overrides = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", help="Folder of .txt and .md files to ask about.")
    ] = None,
    user: Annotated[str, typer.Option("--user", help="Whose memory.")] = "local",
    checkpoint: Checkpoint = None,
    memory: Memory = None,
    chunk_tokens: Annotated[
        int, typer.Option(min=1, help="Longest piece of a document, where the agent does not cut them itself.")
    ] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the most likely answer.")] = 0.0,
) -> None:
    """Talk to the agent of RUN: a dialogue that goes on tomorrow, or questions about documents.

    An agent over a bank reads the documents once and keeps them; one that keeps a single text reads them for each
    question, as it was trained. See docs/serve.md.
    """
    from memfactory.policy.base import Sampling
    from memfactory.serve.desk import Desk, owner_of
    from memfactory.serve.documents import cut, read_documents
    from memfactory.serve.loading import open_run
    from memfactory.serve.memories import Memories
    from memfactory.serve.transcript import ChatMessage

    texts = read_documents(documents) if documents is not None else []
    served = open_run(run, checkpoint, overrides or [])
    if texts and getattr(served.agent, "chunk_tokens", None) is None:
        texts = cut(texts, served.policy, chunk_tokens)
    anew = bool(texts) and not served.keeps_bank
    file = memory or run / "memories.sqlite"
    desk = Desk(served, None if anew else Memories(file, bank=served.keeps_bank))
    kept = "documents are read for each question" if anew else f"memories in {file}"
    told = f"{served.name} ({served.checkpoint}), {kept}\n{_HELP_ANEW if anew else _HELP}"
    Console(stderr=True).print(told, style="dim", soft_wrap=True, markup=False, highlight=False)
    begin = [ChatMessage("user", text) for text in texts]
    try:
        _talk(desk, owner_of(user), begin, Sampling(temperature), anew)
    finally:
        desk.close()


def _talk(desk: Desk, owner: str, begin: list[ChatMessage], sampling: Any, anew: bool) -> None:
    """Answer line after line until the input ends, or Ctrl-C; one during an answer ends that answer alone.

    Args:
        begin: what stands before the first question.
        anew: whether each question stands alone behind `begin`.
    """
    from memfactory.loops import BackgroundLoop
    from memfactory.serve.desk import Asked
    from memfactory.serve.transcript import ChatMessage

    # the desk has a thread of its own: this one waits for what is typed, and hears Ctrl-C
    console, loop = Console(stderr=True), BackgroundLoop("memfactory-chat")
    said = list(begin)
    replied: Replied | None = None
    while (line := _line()) is not None:
        if not line:
            continue
        if line == "/quit":
            return
        if line == "/memory" and anew:
            _print((replied.episode.memory if replied is not None else "") or "(nothing)")
            continue
        if line == "/forget" and anew:
            _print("(nothing is kept: the documents are read for each question)")
            continue
        if line == "/memory":
            _print(loop.start(desk.shown(owner)).result() or "(nothing)")
            continue
        if line == "/forget":
            loop.start(desk.forget(owner)).result()
            said = list(begin)
            _print("(forgotten)")
            continue
        if line.startswith("/"):
            _print(_HELP_ANEW if anew else _HELP)
            continue
        question = ChatMessage("user", line)
        with console.status("...") as status:
            work = loop.start(desk.answer(Asked(owner, [*said, question], sampling), status.update))
            try:
                replied = work.result()
            except KeyboardInterrupt:
                work.cancel()
                console.print("(stopped)", style="dim", markup=False)
                continue
            except MemFactoryError as error:
                console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
                continue
        _print(replied.text)
        if not anew:
            said += [question, ChatMessage("assistant", replied.text)]


def _line() -> str | None:
    """The next line that is typed, or None at the end of the input, or at Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print(file=sys.stderr)
        return None


def _print(text: str) -> None:
    """Print what a model wrote; what would command the terminal is shown as a mark."""
    print("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text), flush=True)
