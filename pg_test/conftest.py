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


@pytest.fixture(scope="session", params=["15", "17"])
def server(request):
    """Each server that behaviour is tested on: one with frame pointers and without debug information, one the
    other way round."""
    return request.getfixturevalue("pg15" if request.param == "15" else "pg17_control")


@pytest.fixture(scope="session")
def exact(server):
    """A cluster in exact mode with the leaky functions, for tests that only look at sessions of their own."""
    with Cluster(server, rheap__mode="exact", rheap__walk_interval="100ms") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        yield cluster
