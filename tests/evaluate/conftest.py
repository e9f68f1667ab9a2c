"""A browser for the report."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        if os.environ.get("MEMFACTORY_REQUIRE_BROWSER") == "1":
            pytest.fail("MEMFACTORY_REQUIRE_BROWSER=1, but no Chromium is installed; apt-get install chromium")
        pytest.skip("no Chromium installed")
    return found
