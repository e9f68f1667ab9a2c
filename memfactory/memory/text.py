"""`TextMemory`: one slot of text, rewritten as a whole (MemAgent, arXiv 2507.02259)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TextSnapshot:
    """An immutable copy of a :class:`TextMemory`, cheap to keep and to restore."""

    text: str
    writes: tuple[int, ...]


@dataclass(slots=True)
class TextMemory:
    """A memory that is one text. Belongs to one episode (or one user) and is never shared.

    `writes` records provenance: the index of the turn behind each rewrite, oldest first.
    """

    text: str = ""
    writes: list[int] = field(default_factory=list)

    def write(self, text: str, *, turn: int) -> None:
        """Replace the text; `turn` is the index in the episode of the turn that wrote it."""
        self.text = text
        self.writes.append(turn)

    def snapshot(self) -> TextSnapshot:
        """State now. Later writes do not change it."""
        return TextSnapshot(self.text, tuple(self.writes))

    def restore(self, snapshot: TextSnapshot) -> None:
        """Go back to `snapshot`, which stays usable for further restores."""
        self.text, self.writes = snapshot.text, list(snapshot.writes)
