"""FSDP2 and DeepSpeed on CPUs with gloo, for tests: the sharding is real, the machine is not what it is made for.

accelerate looks for both only where it finds an accelerator; on CPUs it runs DDP instead, without a word. Here it is
told that gloo is such a backend. `python -m tests.train.cpu_shim ...` is `memfactory ...` with that in place.
"""

from __future__ import annotations

import importlib
import os
import sys


def install() -> None:
    """Call before anything makes an accelerator state."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ.pop("ACCELERATE_USE_CPU", None)
    from accelerate.state import DistributedType, PartialState
    from torch.distributed.fsdp import CPUOffloadPolicy

    def gloo(*_: object, **__: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pinned memory needs an accelerator
    if os.environ.get("MEMFACTORY_TEST_ENGINE", "").startswith("zero"):
        # Its shared-memory kernels for CPUs would be compiled first, a minute of work; gloo does without them. (Not an
        # import statement: `deepspeed.comm` has another `torch` among its names.)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


if __name__ == "__main__":
    install()
    from memfactory.cli.main import main

    sys.argv[0] = "memfactory"
    main()
