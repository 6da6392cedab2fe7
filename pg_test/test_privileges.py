"""Who may see what."""

import pytest
from cluster import SqlError

READ = ["rheap_leaks", "rheap_call_sites", "rheap_contexts", "rheap_processes", "rheap_ended"]
READ += ["rheap_report", "rheap_report_json", "rheap_folded", "rheap_flamegraph", "rheap_html", "rheap_pprof"]


@pytest.fixture(scope="module")
def roles(exact):
    exact.sql("CREATE ROLE nobody LOGIN; CREATE ROLE monitor LOGIN IN ROLE pg_monitor")
    exact.sql("CREATE ROLE partial LOGIN; GRANT EXECUTE ON FUNCTION rheap_call_sites(int) TO partial")
    yield exact
    exact.sql("REVOKE EXECUTE ON FUNCTION rheap_call_sites(int) FROM partial; DROP ROLE nobody, monitor, partial")


@pytest.mark.parametrize("name", READ)
def test_pg_monitor_reads_and_public_does_not(roles, name):
    for source in (name, f"{name}()"):
        roles.sql(f"SELECT count(*) FROM {source}", user="monitor")
        with pytest.raises(SqlError) as caught:
            roles.sql(f"SELECT count(*) FROM {source}", user="nobody")
        assert caught.value.sqlstate == "42501"
        assert caught.value.hint == "Members of pg_monitor may read it: GRANT pg_monitor TO the role."


def test_what_reads_and_needs_no_argument_has_a_view_of_its_name(exact):
    """Whoever adds a function decides whether it has a view: those without one change something, or write statements."""
    functions = exact.sql(
        """
        SELECT string_agg(proname, ' ' ORDER BY proname)
        FROM pg_depend d JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
        WHERE refobjid = (SELECT oid FROM pg_extension WHERE extname = 'rheap') AND deptype = 'e'
          AND pronargs = pronargdefaults AND NOT EXISTS (SELECT FROM pg_views WHERE viewname = proname)
        """
    )
    assert functions == "rheap_reset rheap_snapshot"


REPORTS = ["report()", "report_json()", "folded()", "flamegraph()", "html()", "pprof()", "heaptrack(pg_backend_pid())", "snapshot()"]


@pytest.mark.parametrize("call", REPORTS)
def test_pg_monitor_makes_reports_and_public_does_not(roles, call):
    assert roles.sql(f"SELECT rheap_{call} IS NOT NULL", user="monitor") == "t"
    with pytest.raises(SqlError) as caught:
        roles.sql(f"SELECT rheap_{call}", user="nobody")
    assert (caught.value.sqlstate, caught.value.hint) == ("42501", "Members of pg_monitor may read it: GRANT pg_monitor TO the role.")


def test_snapshots_are_compared_and_not_forged(roles):
    roles.sql("SELECT count(*) FROM rheap_diff((SELECT max(id) FROM rheap_snapshots))", user="monitor")
    for statement in ("DELETE FROM rheap_snapshots", "INSERT INTO rheap_snapshots (label) VALUES ('x')", "SELECT rheap_no_snapshot(1)"):
        with pytest.raises(SqlError) as caught:
            roles.sql(statement, user="monitor")
        assert caught.value.sqlstate == "42501"


def test_track_is_the_superusers(roles):
    for user in ("monitor", "nobody"):
        with pytest.raises(SqlError) as caught:
            roles.sql("SELECT rheap_track(pg_backend_pid(), 'off')", user=user)
        assert caught.value.sqlstate == "42501"
        assert "GRANT EXECUTE ON FUNCTION rheap_track(int, text)" in caught.value.hint


def test_reset_is_the_superusers(roles):
    for user in ("monitor", "nobody"):
        with pytest.raises(SqlError) as caught:
            roles.sql("SELECT rheap_reset()", user=user)
        assert caught.value.sqlstate == "42501"
        assert "GRANT EXECUTE ON FUNCTION rheap_reset(int)" in caught.value.hint


def test_query_ids_need_pg_read_all_stats(roles):
    query = "SELECT count(query_id) FROM rheap_call_sites()"
    assert int(roles.sql(query, user="monitor")) > 0
    assert roles.sql(query, user="partial") == "0"


def test_every_object_has_a_comment(exact):
    missing = exact.sql(
        """
        SELECT string_agg(pg_describe_object(classid, objid, objsubid), ', ')
        FROM pg_depend d
        WHERE refobjid = (SELECT oid FROM pg_extension WHERE extname = 'rheap') AND deptype = 'e'
          AND classid IN ('pg_proc'::regclass, 'pg_class'::regclass) AND obj_description(objid, classid::regclass::text) IS NULL
        """
    )
    assert missing == ""
    assert exact.sql("SELECT obj_description(oid, 'pg_extension') FROM pg_extension WHERE extname = 'rheap'") != ""


def test_the_contract_of_columns(exact):
    columns = "SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = '{}'::regclass AND attnum > 0"
    leaks = (
        "verdict confidence function location context live_bytes live_count growth_bytes_per_s generations "
        "backend_type processes pid query_id first_seen last_seen reason stack"
    )
    assert exact.sql(columns.format("rheap_leaks")) == leaks
    assert exact.sql(columns.format("rheap_call_sites")) == leaks + " alloc_count alloc_bytes free_count free_bytes exact"
    assert exact.sql(columns.format("rheap_contexts")) == (
        "pid backend_type path name type contexts total_bytes used_bytes free_bytes baseline_bytes growth_bytes "
        "growth_bytes_per_s watched verdict"
    )
    assert exact.sql(columns.format("rheap_processes")) == (
        "pid backend_type mode watched_contexts allocations frees captures dropped own_bytes context_bytes rss_bytes "
        "unattributed_bytes walks last_walk"
    )


def test_settings_have_the_defaults_of_the_contract(exact):
    defaults = exact.sql(
        "SELECT string_agg(name || '=' || boot_val || coalesce(unit, ''), ' ' ORDER BY name) FROM pg_settings WHERE name LIKE 'rheap.%'"
    )
    assert defaults == (
        "rheap.adopt_bytes=65536kB rheap.log_leaks=off rheap.max_call_sites=131072 rheap.memory_limit=32768kB "
        "rheap.min_leak_bytes=64kB rheap.mode=sampled rheap.sample_bytes=4096B rheap.scope=session "
        "rheap.stack_depth=48 rheap.walk_interval=10000ms"
    )
