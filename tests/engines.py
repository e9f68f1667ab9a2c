"""Where the engines that are no part of the ordinary environment are: DeepSpeed and vLLM.

`MEMFACTORY_ENGINE_PYTHON` names the Python of an environment that has them; without it this Python is used if it has
the engine. With `MEMFACTORY_REQUIRE_ENGINES=1` (as in CI) a missing engine is a failure, not a skip.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

import pytest


@functools.cache
def _has(python: str, module: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def engine_python(module: str) -> str:
    """The Python that has `module` (``deepspeed`` or ``vllm``); the test skips or fails where there is none."""
    python = os.environ.get("MEMFACTORY_ENGINE_PYTHON") or sys.executable
    if _has(python, module):
        return python
    message = f"{python} has no {module}: set MEMFACTORY_ENGINE_PYTHON to the Python of an environment that has it"
    if os.environ.get("MEMFACTORY_REQUIRE_ENGINES") == "1":
        pytest.fail(message)
    pytest.skip(message)
