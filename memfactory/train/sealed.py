"""A checkpoint of a trainer, written and read so that a run which is killed in the middle can go on from the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from memfactory.checkpoints import begin, saving, seal
from memfactory.errors import EngineError, boundary
from memfactory.train.ranks import Ranks

# What stateful parts of rewards may keep beside plain data: numpy's arrays and numbers, which a checkpoint is else
# written with and cannot be read with again.
NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    np.zeros(1).__reduce__()[0],
    np.float64(0).__reduce__()[0],
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
# A rank on a CPU calls its device `cpu:0` or `cpu:1`, and torch cannot map what it loads to a device of that name.
torch.serialization.register_package(30, lambda _: None, lambda data, to: data if to.startswith("cpu:") else None)


@contextmanager
def sealed(trainer: Any, trial: Any, ranks: Ranks) -> Iterator[Path]:
    """The folder of a new checkpoint of `trainer`, to be written inside; sealed when all ranks have left.

    Older ones that are over `save_total_limit` are deleted only then: until it is sealed, the one before is what a run
    can go on from.

    Raises:
        EngineError: it could not be written.
    """
    args = trainer.args
    runs = trainer._get_output_dir(trial=trial)
    folder = Path(runs) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        with saving(folder, remove=True):
            if ranks.main:
                begin(folder)
            trainer.accelerator.wait_for_everyone()
            yield folder
            trainer.accelerator.wait_for_everyone()
            if ranks.main:
                seal(folder)
    finally:
        args.save_total_limit = limit
    if args.should_save:
        rotate_checkpoints(runs, limit, trainer.state.best_model_checkpoint, use_mtime=True)


def reading(checkpoint: str) -> AbstractContextManager[None]:
    """Around what reads a checkpoint: an unreadable file becomes an error that says how to go on."""
    fix = f"delete it to go on from the one before: rm -r {checkpoint}, then the same command"
    return boundary(EngineError, f"checkpoint {checkpoint} cannot be read", fix)


def state_file(checkpoint: str, name: str) -> Path:
    """The file `name` of a trainer of ours in `checkpoint`.

    Raises:
        EngineError: it is not there.
    """
    path = Path(checkpoint) / name
    if not path.is_file():
        raise EngineError(f"{checkpoint}: not a checkpoint of this trainer", f"{name} is missing")
    return path


def load_state(path: Path, device: Any) -> dict[str, Any]:
    """Plain data, tensors and numpy's numbers from `path`; nothing in it is executed."""
    with torch.serialization.safe_globals(NUMPY):
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
