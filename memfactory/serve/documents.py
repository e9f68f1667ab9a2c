"""A folder of documents, cut into pieces that a trained agent reads."""

from __future__ import annotations

from pathlib import Path

from memfactory.errors import DataError
from memfactory.policy.base import Policy

ENDINGS = (".txt", ".md")


def read_documents(folder: Path) -> list[str]:
    """The texts below `folder`, a file each, in the order of their paths; empty files are left out.

    Raises:
        DataError: there are none, or one is not UTF-8 or cannot be read (it is named).
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    texts = [text for path in files if (text := _read(path)).strip()]
    if not texts:
        raise DataError(f"{folder}: no documents", f"no text in files {' or '.join(ENDINGS)}", "name another folder")
    return texts


def cut(texts: list[str], policy: Policy, chunk_tokens: int) -> list[str]:
    """`texts` in pieces of at most `chunk_tokens` tokens; none holds parts of two texts."""
    return [piece for text in texts for piece in policy.split(text, chunk_tokens)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"not UTF-8 at byte {error.start}", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(str(path), str(error), "make it readable, or name another folder") from error
