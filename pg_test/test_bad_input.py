"""Wrong use gets a clear error with SQLSTATE and a hint that says what to write instead."""

import pytest
from cluster import Cluster, SqlError


def error(cluster, sql, **options):
    with pytest.raises(SqlError) as caught:
        cluster.sql(sql, **options)
    return caught.value


@pytest.mark.parametrize("function", ["rheap_leaks", "rheap_call_sites", "rheap_contexts", "rheap_processes", "rheap_reset"])
@pytest.mark.parametrize("pid", ["1", "-5", "2147483647"])
def test_a_pid_that_is_no_process_of_the_cluster(exact, function, pid):
    e = error(exact, f"SELECT * FROM {function}({pid})")
    assert (e.sqlstate, e.message) == ("22023", f"no process of this cluster has the pid {pid}")
    assert "rheap_processes" in e.hint


@pytest.mark.parametrize(
    "setting, value, hint",
    [
        ("mode", "fast", "Available values: off, sampled, exact."),
        ("scope", "none", "Available values: session, all."),
        ("sample_bytes", "-1", "Write a size from 1B to 1GB, for example '4kB'; 1B records nearly everything."),
        ("adopt_bytes", "-1kB", "Write a size of at least 64kB, for example '64MB'."),
        ("walk_interval", "-1s", "Write a time from 10ms to 1d, for example '10s'."),
        ("min_leak_bytes", "-64kB", "Write a size of 0 or more, for example '64kB'."),
        ("stack_depth", "65", "Write a number of frames from 1 to 64."),
        ("memory_limit", "1MB", "Write a size of at least 4MB, for example '32MB'."),
    ],
)
def test_a_setting_out_of_bounds(exact, setting, value, hint):
    e = error(exact, f"SET rheap.{setting} = '{value}'")
    assert e.sqlstate == "22023"
    assert e.message.startswith(f'invalid value for parameter "rheap.{setting}"')
    assert e.hint == hint


def test_an_unknown_setting(exact):
    assert error(exact, "SET rheap.moode = 'exact'").sqlstate == "42602"


def test_the_size_of_the_shared_table_needs_a_restart(exact):
    assert error(exact, "SET rheap.max_call_sites = 5000").sqlstate == "55P02"


def test_settings_are_the_superusers(exact):
    exact.sql("CREATE ROLE plain LOGIN")
    try:
        e = error(exact, "SET rheap.mode = 'exact'", user="plain")
        assert e.sqlstate == "42501" and "GRANT SET ON PARAMETER" in e.hint
    finally:
        exact.sql("DROP ROLE plain")


def test_an_extension_script_of_another_version_is_refused(server):
    import subprocess
    from pathlib import Path

    share = Path(subprocess.check_output([server, "--sharedir"], text=True).strip()) / "extension"
    script = share / "rheap--9.9.9.sql"
    script.write_text((share / "rheap--0.1.0.sql").read_text().replace("'0.1.0'", "'9.9.9'"))
    try:
        with Cluster(server) as cluster:
            cluster.sql("DROP EXTENSION rheap")
            e = error(cluster, "CREATE EXTENSION rheap VERSION '9.9.9'")
            assert e.sqlstate == "55000"
            assert e.message == "the loaded library is rheap 0.1.0, the extension script is of version 9.9.9"
            assert "Restart the server" in e.hint
            cluster.sql("CREATE EXTENSION rheap")
    finally:
        script.unlink()
