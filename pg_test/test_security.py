"""Nobody sees or reaches what is not theirs; the extension can be dropped, made again and upgraded."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cluster import HERE, Cluster, SqlError

# Whatever a user can put into a name or an argument, and what it would be if somebody formatted, opened or ran it.
HOSTILE = ["%s%n%n%x", "'; DROP TABLE keep; --", "../../../../etc/passwd", "$(touch /tmp/rheap-was-here)", "`id`", "x" * 5000, "é\u2028\t\n"]


def functions(cluster):
    return cluster.sql(
        "SELECT string_agg(p.oid::regprocedure::text, ' ' ORDER BY 1) FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid "
        "WHERE d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'rheap') AND d.deptype = 'e' AND d.classid = 'pg_proc'::regclass"
    )


def test_public_may_execute_and_read_nothing(exact):
    granted = exact.sql(
        """
        SELECT string_agg(objid::text, ' ') FROM pg_depend d
        LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
        LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
        WHERE d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'rheap') AND d.deptype = 'e'
          AND EXISTS (SELECT FROM aclexplode(CASE WHEN p.oid IS NOT NULL THEN coalesce(p.proacl, acldefault('f', p.proowner))
                                                  ELSE coalesce(c.relacl, acldefault('r', c.relowner)) END) a WHERE a.grantee = 0)
          AND (p.oid IS NOT NULL OR c.oid IS NOT NULL)
        """
    )
    assert granted == ""


def test_no_function_takes_an_address_a_path_or_a_command(exact):
    arguments = exact.sql(
        "SELECT string_agg(DISTINCT format_type(t, NULL), ' ' ORDER BY format_type(t, NULL)) FROM pg_proc p, unnest(p.proargtypes) t "
        "WHERE p.proname LIKE 'rheap%'"
    )
    # Pids are looked up among rheap's own slots; a text is a version, a statement, a metric, a label or a mode.
    assert set(arguments.split()) <= {"integer", "text", "bigint"}


def test_hostile_names_are_names(exact):
    before = set(os.listdir("/tmp"))
    exact.sql("CREATE TABLE keep AS SELECT 1 AS n")
    session = exact.session()
    try:
        for text in HOSTILE:
            quoted = text.replace("'", "''")
            identifier = text.replace('"', '""')[:60]
            session(f'PREPARE "{identifier}" AS SELECT n FROM keep')
            session(f"SET application_name = E'{quoted[:60]}'")
            session("SELECT leaky_leak(100, 100)")
            with pytest.raises(SqlError):
                exact.sql(f"SELECT rheap_require_version('{quoted}')")
        for source in ("rheap_leaks", "rheap_call_sites", "rheap_contexts", "rheap_processes", "rheap_ended"):
            exact.sql(f"SELECT * FROM {source}")
        assert exact.sql("SELECT n FROM keep") == "1"
        assert "rheap-was-here" not in set(os.listdir("/tmp")) - before
    finally:
        session.close()
        exact.sql("DROP TABLE keep")


def test_the_mapping_has_no_name_that_others_could_open(exact):
    """It is anonymous: no file, no shared memory object, and the kernel shows it to the server's own user alone."""
    maps = open(f"/proc/{exact.postmaster}/maps").read().splitlines()
    named = [line for line in maps if "rheap" in line.split("/")[-1] and not line.endswith("/rheap.so")]
    assert named == []
    assert not [name for name in os.listdir("/dev/shm") if "rheap" in name]
    library = next(line.split()[-1] for line in maps if line.endswith("rheap.so"))
    assert not os.stat(library).st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # /proc/*/mem and maps belong to the server's user.
    assert os.stat(f"/proc/{exact.postmaster}/maps").st_uid == os.stat(exact.data).st_uid


def test_the_extension_can_be_dropped_and_made_again(server):
    with Cluster(server, rheap__mode="exact") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        session = cluster.session()
        session("SELECT leaky_leak(1000, 100)")
        before = functions(cluster)
        for _ in range(3):
            cluster.sql("DROP EXTENSION rheap")
            assert cluster.sql("SELECT count(*) FROM pg_proc WHERE proname LIKE 'rheap%'") == "0"
            session("SELECT leaky_leak(1000, 100)")
            cluster.sql("CREATE EXTENSION rheap")
        cluster.sql("DROP EXTENSION rheap; CREATE SCHEMA elsewhere; CREATE EXTENSION rheap SCHEMA elsewhere")
        rows = cluster.rows(f"SELECT live_count FROM elsewhere.rheap_call_sites({session.pid}) WHERE function = 'leaky_leak'")
        # The books go on meanwhile: the library keeps them, not the extension.
        assert rows == [{"live_count": 4000}]
        cluster.sql("DROP EXTENSION rheap; CREATE EXTENSION rheap")
        assert functions(cluster) == before


def test_an_upgrade_keeps_rights_and_adds_what_is_new(server):
    """With a second version that the test makes: the first one's objects, and a function more."""
    share = Path(subprocess.check_output([server, "--sharedir"], text=True).strip()) / "extension"
    script = share / "rheap--0.1.0--0.1.1.sql"
    script.write_text(
        "CREATE FUNCTION rheap_is_upgraded() RETURNS boolean LANGUAGE sql AS 'SELECT true';\n"
        "REVOKE ALL ON FUNCTION rheap_is_upgraded() FROM PUBLIC;\n"
    )
    try:
        with Cluster(server) as cluster:
            cluster.sql("CREATE ROLE reader LOGIN; GRANT EXECUTE ON FUNCTION rheap_leaks(int) TO reader")
            assert cluster.sql("SELECT extversion FROM pg_extension WHERE extname = 'rheap'") == "0.1.0"
            cluster.sql("ALTER EXTENSION rheap UPDATE TO '0.1.1'")
            assert cluster.sql("SELECT extversion FROM pg_extension WHERE extname = 'rheap'") == "0.1.1"
            assert cluster.sql("SELECT rheap_is_upgraded()") == "t"
            cluster.sql("SELECT count(*) FROM rheap_leaks()", user="reader")
            with pytest.raises(SqlError):
                cluster.sql("SELECT rheap_is_upgraded()", user="reader")
            cluster.sql("DROP EXTENSION rheap")
            assert cluster.sql("SELECT count(*) FROM pg_proc WHERE proname LIKE 'rheap%'") == "0"
            # A new one gets there by the same way.
            cluster.sql("CREATE EXTENSION rheap VERSION '0.1.1'")
            assert cluster.sql("SELECT rheap_is_upgraded()") == "t"
    finally:
        script.unlink()
