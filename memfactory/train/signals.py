"""How a run is ended from outside: Ctrl-C, SIGTERM, and SIGUSR1 as batch systems send it before they kill."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from memfactory.train.ranks import Ranks

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_SAME = 0.5
"""A launcher passes on what the terminal sent to all: within this time a second one is the first. Unit: seconds."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run where there is no step to finish first: loading, warm-up, evaluation outside of training.

    Like Ctrl-C no `Exception`, so that nothing that recovers from errors holds it up.
    """


def exit_code(name: str) -> int:
    """What a process ends with that stopped on the signal of this `name`: 130 for SIGINT, 143 for the others."""
    return 130 if name == "SIGINT" else 143


class StopOnSignal(TrainerCallback):
    """Ends a run well. Used with `with`, around everything that should be ended so.

    While it trains, the first signal lets the step be finished, a checkpoint be saved, and the run stop; at any other
    time it raises :class:`Interrupted` at once. A second SIGINT raises KeyboardInterrupt in any case. Where several
    processes train, one of them that got the signal is enough: they agree after every step. There SIGTERM is the
    second SIGINT, where the first signal was one: that is how torchrun passes a second Ctrl-C on.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.number = 0
        """The signal; 0 while there was none."""
        self.opened = False
        """The run has its folder: from then on its summary says how it was stopped."""
        self._own: tuple[int, float] | None = None
        """The first signal that this process itself got, and when; the others may have told it before."""
        self._training = False
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """Of the signal; empty while there was none."""
        return signal.Signals(self.number).name if self.number else ""

    def __enter__(self) -> StopOnSignal:
        for number in _SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: whoever runs it handles signals
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first, self._own = self._own, self._own or (number, now)
        if self.number:
            if first is None:  # what the others have told was this one, which is late
                return
            several = Ranks().count > 1
            again = number == signal.SIGINT or (several and number == signal.SIGTERM and first[0] == signal.SIGINT)
            if again and not (several and now - first[1] < _SAME):
                raise KeyboardInterrupt
            return
        self.number = number
        if not self._training:
            raise Interrupted
        self.console.print("[yellow]stopping after this step, with a checkpoint (Ctrl-C again: at once)[/yellow]")

    def _agree(self) -> bool:
        """Whether any process got a signal; then all of them know which."""
        self.number = Ranks().max(self.number)
        return bool(self.number)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True
        if self.number:  # it came where nothing could be raised, e.g. while an object was being deleted
            raise Interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._agree():
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # the step before it is finished; what the evaluation has measured is kept, so that it is not repeated
        if self._training and self._agree():
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False
