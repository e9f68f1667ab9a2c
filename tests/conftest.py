"""What every test shares: no network, few threads, no deadline on machines that are busy."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("memfactory", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("memfactory")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no process is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory):
    """Runs `memfactory` in forks of a process that has imported everything, see :mod:`tests.forked`."""
    from tests.forked import Server

    server = Server(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()
