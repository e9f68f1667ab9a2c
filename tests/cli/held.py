"""An agent that waits in the middle of a step, where and as long as a test says, so that a signal meets a step."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from memfactory import Episode
from memfactory.agents import MemAgent
from memfactory.episode import Task


class Held(MemAgent):
    """Waits while there is a file `hold` in the folder `MEMFACTORY_TEST_HELD`; leaves its process id there."""

    async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
        folder = Path(os.environ["MEMFACTORY_TEST_HELD"])
        while (folder / "hold").exists():
            (folder / f"held-{os.getpid()}").touch()
            await asyncio.sleep(0.05)
        return await super().run(task, policy, store)
