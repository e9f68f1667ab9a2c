"""``memfactory push RUN``: a trained model as a folder for the Hugging Face Hub, and on the Hub if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart-seed0.")],
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A checkpoint-N; absent: the model that the run ended with.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder; absent: RUN/hub.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="Evaluation folder whose table goes into the card.")
    ] = None,
    repo: Annotated[str | None, typer.Option("--repo", help="Name on the Hub, OWNER/NAME.")] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="As the Hub writes it, e.g. apache-2.0; absent: not set.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put an adapter into its base, and write that.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    upload: Annotated[bool, typer.Option("--upload", help="Also send the folder to the Hub; needs HF_TOKEN.")] = False,
) -> None:
    """Write model or adapter, tokenizer, model card and recipe into a folder; nothing is sent without --upload."""
    from memfactory.push import folder
    from memfactory.push.source import find_pushed

    target = output or run / "hub"
    folder.check_output(target)
    name = folder.check_upload(repo) if upload else repo
    pushed = find_pushed(run, checkpoint, evaluation, merge=merge)
    written = folder.write_folder(pushed, target, repo=name, license=license)
    for how, files in (("hard-linked", written.linked), ("copied", written.copied)):
        if files:
            typer.echo(f"{how}: {', '.join(files)}")
    if pushed.left_out:
        typer.echo(f"left out: {', '.join(pushed.left_out)}")
    if license is None:
        typer.echo("the card states no license: add it to README.md, or give --license")
    typer.echo(target)
    if upload:
        assert name is not None
        typer.echo(folder.upload(target, name, private=private))
