"""The server's own tests, with rheap in every process."""

import re
import shutil

from cluster import USER, Cluster, run


def test_the_servers_regression_suite_passes_with_rheap(pg17_control):
    prefix = pg17_control.parent.parent
    settings = dict(rheap__mode="exact", rheap__walk_interval="100ms", max_prepared_transactions=2)
    # rheap asks for query ids, and EXPLAIN would show them: `regress` is the server's own setting against that.
    with Cluster(pg17_control, compute_query_id="regress", **settings) as cluster:
        output = cluster.root / "output"
        output.mkdir()
        if USER and output.owner() == "root":
            shutil.chown(output, USER)
        suite = run(
            prefix / "regress/pg_regress",
            f"--bindir={prefix}/bin",
            f"--inputdir={prefix}/regress",
            f"--expecteddir={prefix}/regress",
            f"--dlpath={prefix}/regress",
            f"--outputdir={output}",
            f"--schedule={prefix}/regress/parallel_schedule",
            f"--host={cluster.root}",
            "--user=postgres",
            check=False,
        )
        differences = output / "regression.diffs"
        assert suite.returncode == 0, differences.read_text()[:5000] if differences.exists() else suite.stdout
        assert "# All 225 tests passed." in suite.stdout
        assert not re.search(r"terminated by signal|PANIC|TRAP:", cluster.log_text())
        leaks = cluster.rows("SELECT backend_type, function, context, reason FROM rheap_leaks() WHERE verdict = 'leak'")
        assert leaks == []
        assert cluster.stop("fast") < 30
