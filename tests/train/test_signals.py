"""Which signal ends a run how, with real signals."""

from __future__ import annotations

import io
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from memfactory.train import signals
from memfactory.train.signals import Interrupted, StopOnSignal, exit_code


@pytest.fixture
def stop() -> StopOnSignal:
    return StopOnSignal(Console(file=io.StringIO()))


def control() -> Any:
    return SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=True)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_outside_of_training_a_signal_ends_the_run_at_once(stop: StopOnSignal, name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    with stop, pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.Signals[name])
    assert stop.name == name
    assert signal.getsignal(signal.Signals[name]) is before
    assert exit_code(name) == (130 if name == "SIGINT" else 143)


def test_in_training_the_step_is_finished_and_saved_and_a_second_ctrl_c_stops_at_once(stop: StopOnSignal) -> None:
    with stop:
        stop.on_train_begin(None, None, None)
        assert not stop.on_step_end(None, None, control()).should_training_stop
        os.kill(os.getpid(), signal.SIGINT)
        after = stop.on_step_end(None, None, control())
        assert (after.should_save, after.should_training_stop, after.should_evaluate) == (True, True, False)
        os.kill(os.getpid(), signal.SIGTERM)  # batch systems send several; the step is still finished
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGINT"


def test_a_signal_during_an_evaluation_stops_after_it_without_another_step(stop: StopOnSignal) -> None:
    with stop:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGUSR1)
        after = stop.on_evaluate(None, None, control())
        assert (after.should_save, after.should_training_stop) == (True, True)


def test_a_signal_that_could_not_be_raised_ends_the_run_when_training_begins(stop: StopOnSignal) -> None:
    with stop:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)  # as if something had swallowed it
        with pytest.raises(Interrupted):
            stop.on_train_begin(None, None, None)


# --- several processes ------------------------------------------------------------------------------------


class Two:
    """Two processes, the other of which has got `number`."""

    count = 2

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def max(self, value: int) -> int:
        return max(value, self.number)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_torchrun_passes_a_second_ctrl_c_on_as_sigterm(
    stop: StopOnSignal, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "Ranks", Two)
    with stop:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGINT)
        later(0.1)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's, after the terminal's
        os.kill(os.getpid(), signal.SIGTERM)
        later(0.5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_several_sigterms_let_the_step_be_finished(
    stop: StopOnSignal, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "Ranks", Two)
    with stop:
        stop.on_train_begin(None, None, None)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            later(5)
        assert stop.on_step_end(None, None, control()).should_save


def test_the_signal_that_the_others_told_of_may_come_late(
    stop: StopOnSignal, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "Ranks", lambda: Two(signal.SIGINT))
    with stop:
        stop.on_train_begin(None, None, None)
        assert stop.on_step_end(None, None, control()).should_save
        later(3)  # it is saving, in one long call
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("the save was broken off")
        later(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
