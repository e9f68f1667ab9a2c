"""Memory stores: what an agent remembers. Every store can `snapshot()` and `restore()`."""

from memfactory.memory.text import TextMemory, TextSnapshot

__all__ = ["TextMemory", "TextSnapshot"]
