"""An event loop in a thread of its own, so that judges work while the model generates."""

from __future__ import annotations

from memfactory.loops import BackgroundLoop

LOOP = BackgroundLoop("memfactory-rewards")
"""The one of this process: a judge's connections belong to the loop that opened them, and idle threads add up."""
