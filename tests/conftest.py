"""What all tests share: one thread, no network but loopback, no BENCH_* settings of the user, no deadline per case."""

import ipaddress
import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy or torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from dashboard import pytest_terminal_summary, size, tally, trials  # noqa: F401  (fixtures and a hook, for all tests)
from hypothesis import HealthCheck, settings

settings.register_profile("touchstone", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("touchstone")


def pytest_addoption(parser):
    parser.addoption("--full-size", action="store_true", help="tests of survival make all of their trials")
    parser.addoption("--times", type=int, default=1, metavar="N", help="and those by chance N times as many")


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """A test sees the defaults, whatever the user has set."""
    for name in [n for n in os.environ if n.startswith("BENCH_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connecting anywhere but to this machine is an error, in this process."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise OSError(f"tests do not use the network: {host}")
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect
