"""What the tests of reports share: a session whose figures stand still, and the sums of the view to compare with."""

import os
import signal
import subprocess
import time

import pytest

METRICS = {
    "live": "sum(live_bytes)",
    "live_count": "sum(live_count)",
    "allocated": "sum(alloc_bytes)",
    "allocations": "sum(alloc_count)",
    "temporary": "sum(free_count)",
    "growth": "sum(round(greatest(growth_bytes_per_s, 0)))",
}


def tool(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def frozen(exact):
    """The pid of a session that leaks, churns, and is stopped: its figures stand still."""
    session = exact.session()
    for _ in range(12):
        session("SELECT leaky_leak(200, 1000), leaky_churn(300, 50)")
        time.sleep(0.05)
    session("SELECT leaky_sites(1, 20, 40)")
    session("SELECT pg_sleep(0.3)")
    session("SELECT 1")
    os.kill(session.pid, signal.SIGSTOP)
    yield session.pid
    os.kill(session.pid, signal.SIGCONT)
    session.close()


@pytest.fixture(scope="module")
def totals(exact, frozen):
    columns = ", ".join(f"{sum}::int8 AS {name}" for name, sum in METRICS.items())
    [row] = exact.rows(f"SELECT {columns} FROM rheap_call_sites({frozen})")
    return row


def folded_sum(text):
    return sum(int(line.rsplit(" ", 1)[1]) for line in text.splitlines())


def saved(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pprof_file(cluster, pid, folder):
    return saved(folder, "rheap.pb.gz", bytes.fromhex(cluster.sql(f"SELECT encode(rheap_pprof({pid}), 'hex')")))
