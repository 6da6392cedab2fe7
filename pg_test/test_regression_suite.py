"""The server's own tests, with rheap in every process."""

import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import HERE, USER, Cluster, run

SAMPLED = dict(rheap__walk_interval="100ms")
EXACT = dict(rheap__mode="exact", rheap__walk_interval="100ms")
ALL = dict(rheap__mode="exact", rheap__scope="all", rheap__walk_interval="100ms")
SETTINGS = {"sampled": SAMPLED, "exact": EXACT, "exact, all": ALL}
# rheap computes query ids, and EXPLAIN would show them: `regress` is the server's own setting against that.
COMMON = dict(compute_query_id="regress", max_prepared_transactions=2)


def folder(cluster, name):
    made = cluster.root / name
    made.mkdir()
    if os.getuid() == 0:
        shutil.chown(made, USER)
    return made


@contextmanager
def no_alarm(cluster):
    """Asks for leaks once a second meanwhile: there must be none, and no more than one suspect for ten tests."""
    seen, looks, done, failed = {"leak": {}, "suspect": {}}, [], threading.Event(), []

    def look():
        try:
            session = cluster.session()
            while not done.wait(1):
                asked = "SELECT verdict, backend_type, function, context, reason FROM rheap_leaks()"
                for verdict, *whose, reason in (line.split("\t") for line in session(asked).splitlines()):
                    seen[verdict][tuple(whose)] = reason
                looks.append(time.monotonic())
            session.close()
        except Exception as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield
    finally:
        done.set()
        looker.join()
    assert failed == []
    for verdict, most in ("leak", 0), ("suspect", 22):
        if len(seen[verdict]) > most:
            pytest.fail("\n".join(f"{verdict}: {' '.join(whose)}: {why}" for whose, why in seen[verdict].items()))
    assert len(looks) >= 10


def regression(cluster, tests):
    """Runs the core suite of a folder of the server's tests; returns (output, differences)."""
    output = folder(cluster, "output")
    with no_alarm(cluster):
        suite = run(
            tests / "pg_regress",
            f"--bindir={cluster.bin}",
            f"--inputdir={tests}",
            # 15 has them beside the input, without a say.
            *([f"--expecteddir={tests}"] if cluster.major > 15 else []),
            f"--dlpath={tests}",
            f"--outputdir={output}",
            f"--schedule={tests}/parallel_schedule",
            f"--host={cluster.root}",
            "--user=postgres",
            check=False,
            timeout=1800,
        )
    differences = output / "regression.diffs"
    return suite, differences.read_text() if differences.exists() else ""


def isolation(cluster, tests):
    output = folder(cluster, "isolation")
    # The runner looks for its tester beside itself, and for the server's programs on the path.
    suite = run(
        tests / "pg_isolation_regress",
        f"--bindir={cluster.bin}",
        f"--inputdir={tests}",
        f"--expecteddir={tests}",
        f"--outputdir={output}",
        f"--schedule={tests}/isolation_schedule",
        f"--host={cluster.root}",
        "--user=postgres",
        check=False,
        timeout=1800,
    )
    differences = output / "regression.diffs"
    return suite, differences.read_text() if differences.exists() else ""


def unharmed(cluster):
    assert not re.search(r"terminated by signal|PANIC|TRAP:|rheap runs without", cluster.log_text())
    assert cluster.sql("SELECT count(*) FROM rheap_call_sites() WHERE alloc_count - free_count <> live_count") == "0"
    leaks = cluster.rows("SELECT backend_type, function, context, reason FROM rheap_leaks() WHERE verdict = 'leak'")
    assert leaks == []
    # Nobody was killed.
    assert cluster.sql("SELECT count(*) FROM rheap_ended() WHERE how = 'killed'") == "0"
    assert cluster.stop("fast") < 30


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_servers_regression_suite_passes_with_rheap(pg17_control, settings):
    with Cluster(pg17_control, **COMMON, **SETTINGS[settings]) as cluster:
        suite, differences = regression(cluster, pg17_control.parent.parent / "regress")
        assert suite.returncode == 0, differences[:5000] or suite.stdout
        assert "# All 225 tests passed." in suite.stdout
        unharmed(cluster)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_servers_isolation_suite_passes_with_rheap(pg17_control, settings):
    with Cluster(pg17_control, **COMMON, **SETTINGS[settings]) as cluster:
        suite, differences = isolation(cluster, pg17_control.parent.parent / "isolation")
        assert suite.returncode == 0, differences[:5000] or suite.stdout
        assert re.search(r"# All \d+ tests passed.", suite.stdout)
        unharmed(cluster)


def test_no_assertion_of_the_server_fails_in_its_regression_suite(pg17_cassert):
    """With checks of every chunk, and with every allocation of every context recorded."""
    with Cluster(pg17_cassert, **COMMON, **ALL) as cluster:
        assert cluster.sql("SHOW debug_assertions") == "on"
        suite, differences = regression(cluster, pg17_cassert.parent.parent / "regress")
        assert suite.returncode == 0, differences[:5000] or suite.stdout
        unharmed(cluster)


def test_plans_that_are_all_parallel_pass_the_regression_suite(pg17_control):
    with Cluster(pg17_control, **COMMON, **EXACT, debug_parallel_query="regress") as cluster:
        suite, differences = regression(cluster, pg17_control.parent.parent / "regress")
        assert suite.returncode == 0, differences[:5000] or suite.stdout
        unharmed(cluster)


def test_code_that_is_all_jit_compiled_passes_the_regression_suite(pg15):
    """On the server with LLVM. What the suite shows of JIT itself, and of the Debian build, is the same without rheap."""
    tests = Path(subprocess.check_output([HERE / "servers/tests15.sh", pg15], text=True).split()[-1])
    jit = dict(jit="on", jit_above_cost=0, jit_optimize_above_cost=1000, jit_inline_above_cost=1000)
    # One line of defaults, which the suite's own runner would have set in a cluster of its own.
    with Cluster(pg15, **COMMON, **EXACT, **jit) as cluster:
        if cluster.sql("SELECT pg_jit_available()") != "t":
            pytest.skip("this build has no LLVM")
        suite, differences = regression(cluster, tests)
        assert re.search(r"All 21\d tests passed|of 21\d tests failed", suite.stdout), suite.stdout
        with_rheap = failures(suite.stdout)
        unharmed(cluster)
    if with_rheap:
        with Cluster(pg15, preload="", compute_query_id="regress", max_prepared_transactions=2, **jit) as cluster:
            suite, _ = regression(cluster, tests)
            assert with_rheap <= failures(suite.stdout), differences[:5000]


def failures(output):
    """Names of the tests that failed, in the runner's output of any version."""
    return set(re.findall(r"^(?:test|    ) ?(\S+) +\.\.\. FAILED", output, re.M)) | set(re.findall(r"^not ok \d+ +[+-] (\S+)", output, re.M))
