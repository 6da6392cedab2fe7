"""Where the servers are that the tests run on. `make test` builds and installs everything that is named here."""

import os
import subprocess
from pathlib import Path

import pytest

from cluster import HERE, Cluster


def built(flavour):
    """pg_config of a PostgreSQL 17 of our own; building it is the script's business, and quick when it is cached."""
    prefix = subprocess.check_output([HERE / "servers/build.sh", flavour], text=True).split()[-1]
    return Path(prefix) / "bin/pg_config"


@pytest.fixture(scope="session")
def pg15():
    return Path(os.environ.get("RHEAP_PG15", "/usr/lib/postgresql/15/bin/pg_config"))


@pytest.fixture(scope="session")
def pg17_leaks():
    return built("leaks")


@pytest.fixture(scope="session")
def pg17_control():
    return built("control")


@pytest.fixture(scope="session")
def pg17_cassert():
    return built("cassert")


def from_wheel(major):
    prefix = subprocess.check_output([HERE / "servers/wheel.sh", major], text=True).split()[-1]
    return Path(prefix) / "bin/pg_config"


@pytest.fixture(scope="session")
def pg16():
    return from_wheel("16")


@pytest.fixture(scope="session")
def pg18():
    return from_wheel("18")


SERVERS = {"15": "pg15", "16": "pg16", "17": "pg17_control", "18": "pg18"}


def pytest_addoption(parser):
    parser.addoption("--pg", help="only the tests on the servers of this major version")


def pytest_collection_modifyitems(config, items):
    """With --pg, drops the tests of other versions, and those that concern no version."""
    wanted = config.getoption("--pg")
    if not wanted:
        return

    def version(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        # A server by its version, or one of the fixtures above by its name.
        by_name = (str(p)[2:4] for p in [parameters.get("version"), *item.fixturenames] if str(p).startswith("pg1"))
        return parameters.get("server") or parameters.get("slow_server") or next(by_name, None)

    config.hook.pytest_deselected(items=[i for i in items if version(i) != wanted])
    items[:] = [i for i in items if version(i) == wanted]


@pytest.fixture(scope="session", params=SERVERS)
def server(request):
    """Each server that behaviour is tested on: 15 with frame pointers and without debug information, 17 the other way
    round, 16 and 18 of another make: at fixed addresses, by another compiler, with symbols only."""
    return request.getfixturevalue(SERVERS[request.param])


@pytest.fixture(scope="session", params=["15", "17"])
def slow_server(request):
    """For what takes long: the two that differ most."""
    return request.getfixturevalue(SERVERS[request.param])


@pytest.fixture(scope="session")
def exact(server):
    """A cluster in exact mode with the leaky functions, for tests that only look at sessions of their own."""
    with Cluster(server, rheap__mode="exact", rheap__walk_interval="100ms") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        yield cluster
