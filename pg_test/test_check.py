"""rheap_check and rheap_assert_no_leaks, in a session that has rheap by LOAD only."""

import pytest

import corpus
from cluster import HERE, Cluster, SqlError

CHECK = "SELECT function, context, bytes_per_call, count_per_call, kept_bytes, kept_count FROM rheap_check("


@pytest.fixture(scope="module")
def loaded(slow_server):
    with Cluster(slow_server, preload="", max_connections=20) as cluster:
        cluster.sql("CREATE EXTENSION rheap")
        cluster.run_file(HERE / "modules/corpus.sql")
        yield cluster


def found(session, statement, *arguments):
    quoted = statement.replace("'", "''")
    text = session(f"{CHECK}'{quoted}'" + "".join(f", {a}" for a in arguments) + ")")
    rows = [line.split("\t") for line in text.splitlines()]
    return [(f, c, float(b), float(n), int(kb), int(kn)) for f, c, b, n, kb, kn in rows]


def test_random_of_the_patched_server_keeps_120_bytes(pg17_leaks, pg17_control):
    with Cluster(pg17_leaks, preload="") as cluster:
        cluster.sql("CREATE EXTENSION rheap")
        session = cluster.session()
        session("LOAD 'rheap'")
        assert found(session, "select random()") == [("drandom", "TopMemoryContext", 120, 1, 12000, 100)]
        # Once more, and with other numbers: it is exact each time.
        assert found(session, "select random(), random()", 7, 0) == [("drandom", "TopMemoryContext", 240, 2, 1680, 14)]
        with pytest.raises(SqlError) as error:
            session("SELECT rheap_assert_no_leaks('select random()')")
        assert error.value.sqlstate == "P0004"
        assert "12000 bytes in 100 allocations kept by 100 calls" in str(error.value)
        assert "drandom" in str(error.value)
        # The statement's own stack, without what runs it.
        stack = session("SELECT stack[1], stack[cardinality(stack)] FROM rheap_check('select random()')")
        assert stack.startswith("drandom at") and "SPI_execute at src/backend/executor/spi.c" in stack
    with Cluster(pg17_control, preload="") as cluster:
        cluster.sql("CREATE EXTENSION rheap")
        session = cluster.session()
        session("LOAD 'rheap'")
        assert found(session, "select random()") == []
        assert session("SELECT rheap_assert_no_leaks('select random()')") == ""


# Bytes and allocations of one call.
LEAKS = {
    "small": (2400, 20), "rare": (2400, 10), "large": (20000, 1), "cache": (4000, 20), "child": (3000, 30),
    "generation": (3000, 10), "slab": (3200, 20), "shared": (3000, 30), "recursion": (3200, 16),
    "contexts": (3000, 10), "reparented": (3000, 10), "array": (3000, 0),
}


@pytest.mark.parametrize("name", LEAKS)
def test_each_leak_of_the_corpus(loaded, name):
    session = loaded.session()
    session("LOAD 'rheap'")
    rows = found(session, f"SELECT corpus_{name}()", 40, 5)
    assert {row[0] for row in rows} == {f"{name}_site"}
    assert (sum(row[4] for row in rows) / 40, sum(row[5] for row in rows) / 40) == LEAKS[name]
    session.close()


def test_two_leaks_of_one_statement(loaded):
    session = loaded.session()
    session("LOAD 'rheap'")
    rows = found(session, "SELECT corpus_nine()", 40, 5)
    kept = {name: sum(r[2] for r in rows if r[0] == name) for name in ("nine_site", "one_site")}
    assert kept == {"nine_site": 9000, "one_site": 1000}
    assert rows[0][0] == "nine_site"
    session.close()


# What cannot stand in a function, belongs to a session's whole life, or is forgotten when the transaction ends only:
# what the catalog caches know of tables that were made and dropped in it.
NOT_IN_A_FUNCTION = {"cursors", "subtransactions", "vacuum", "temporary table refilled", "call with commit",
                     "failing statements", "many tables", "savepoints", "cursors that sort"}


@pytest.mark.parametrize("name", [s.name for s in corpus.benign() if s.name not in NOT_IN_A_FUNCTION])
def test_what_is_benign_gives_no_row(loaded, name):
    if loaded.sql("SELECT to_regclass('parted') IS NULL") == "t":
        loaded.sql(corpus.PREPARATION.format(rows=1000))
    scenario = next(s for s in corpus.benign() if s.name == name)
    session = loaded.session()
    session("LOAD 'rheap'")
    if scenario.setup:
        session(scenario.setup)
    # 600 calls outlast the filling of each cache here; 400 of them only warm up.
    assert found(session, "; ".join(scenario.work).replace("{n}", "1"), 200, 400) == []
    session.close()


BUILT_IN = """
abs(-1) | sqrt(2.0) | exp(1.0) | ln(2.0) | log(2, 64.0) | power(2, 10.5) | mod(7, 3) | gcd(12, 18) | factorial(30)
round(2.567, 2) | trunc(2.567, 1) | width_bucket(5.35, 0.024, 10.06, 5) | random() | setseed(0.5) | sin(1) | degrees(1)
length('abc') | lower('ABC') | initcap('a b') | repeat('x', 20000) | reverse('abc') | lpad('a', 100, 'xy')
replace('aXa', 'X', 'yy') | translate('abc', 'ab', 'xy') | split_part('a,b', ',', 2) | substring('abcdef' from 'b.*e')
regexp_replace('aaa', 'a+', 'b') | regexp_split_to_array('a b c', ' ') | regexp_count('abab', 'ab') | md5('x')
sha256('x') | sha512('x') | encode('abc', 'base64') | decode('YWJj', 'base64') | format('%s-%I', 1, 'a b') | quote_ident('a b')
quote_literal('x') | concat_ws(',', 1, 2, 3) | chr(65) | ascii('A') | btrim(' x ') | strpos('abc', 'b') | to_hex(255)
string_to_array('a,b', ',') | array_to_string(ARRAY[1,2], ',') | array_append(ARRAY[1], 2) | array_remove(ARRAY[1,2], 1)
array_agg(1) | string_agg('a', ',') | unnest(ARRAY[1,2,3]) | array_fill(7, ARRAY[3,3]) | cardinality(ARRAY[1])
array_position(ARRAY[1,2], 2) | generate_series(1, 1000) | generate_subscripts(ARRAY[1,2], 1) | now() | clock_timestamp()
date_trunc('day', now()) | age(now()) | extract(epoch from now()) | to_char(now(), 'YYYY-MM-DD HH24:MI TZ')
to_timestamp('2026-11-24', 'YYYY-MM-DD') | make_date(2026, 11, 24) | date_part('dow', now()) | timezone('UTC', now())
justify_days('35 days') | date_bin('15 minutes', now(), now()) | make_interval(days => 10) | to_number('12,454', '99G999')
to_char(1234.5, '9G999D9') | json_build_object('a', 1) | jsonb_build_array(1, 'x') | to_jsonb(ROW(1, 'a'))
jsonb_set('{"a":1}', '{a}', '2') | jsonb_path_query('{"a":[1,2]}', '$.a[*]') | jsonb_pretty('{"a":[1,2]}')
json_object_keys('{"a":1}') | jsonb_each('{"a":1}') | json_populate_record(NULL::pg_catalog.pg_am, '{"oid":1}')
row_to_json(ROW(1, 2)) | to_tsvector('english', 'the quick brown foxes') | to_tsquery('english', 'fox & quick')
ts_headline('the quick fox', to_tsquery('fox')) | plainto_tsquery('quick fox') | int4range(1, 5) | range_merge('[1,2]'::int4range, '[4,5]')
lower('[1,5)'::int4range) | inet_merge('10.0.0.1', '10.0.1.1') | host('10.0.0.1/8'::inet) | point(1, 2) | box(point(0,0), point(1,1))
area(box '(0,0,1,1)') | polygon(box '(0,0,1,1)') | gen_random_uuid() | pg_typeof(1) | format_type(23, NULL)
pg_get_viewdef('pg_tables'::regclass) | pg_get_functiondef('pg_get_keywords'::regproc) | pg_get_indexdef('pg_class_oid_index'::regclass)
pg_relation_size('pg_class') | pg_total_relation_size('pg_class') | pg_size_pretty(12345678.0) | obj_description('pg_class'::regclass)
col_description('pg_class'::regclass, 1) | has_table_privilege('pg_class', 'SELECT') | current_setting('work_mem')
set_config('application_name', 'x', false) | pg_backend_pid() | version() | current_database() | pg_get_keywords()
pg_timezone_names() | pg_show_all_settings() | pg_stat_get_activity(NULL) | pg_lock_status() | pg_stat_get_numscans('pg_class'::regclass)
pg_try_advisory_xact_lock(1) | txid_current() | pg_current_snapshot() | pg_current_wal_lsn() | query_to_xml('select 1', true, false, '')
xmlelement(name a, 'b') | percentile_cont(0.5) WITHIN GROUP (ORDER BY 1.0) | corr(1, 2) | bit_and(1) | mode() WITHIN GROUP (ORDER BY 1)
"""


def test_a_hundred_functions_of_the_server(loaded):
    calls = [c.strip() for line in BUILT_IN.strip().splitlines() for c in line.split(" | ")]
    assert len(calls) >= 100
    session = loaded.session()
    session("LOAD 'rheap'")
    findings, cannot = {}, {}
    for call in calls:
        # Slow ones get fewer repeats.
        repeat = 10 if call.startswith(("pg_timezone_names", "pg_show_all", "pg_stat_get_activity")) else 100
        try:
            rows = found(session, f"SELECT {call}", repeat)
        except SqlError as error:
            cannot[call] = error.message
            continue
        if rows:
            findings[call] = rows
    assert findings == {}
    # Debian's server has libxml, ours has not; regexp_count came with 15.
    assert {c for c in cannot if "xml" not in c} == set(), cannot
    session.close()


@pytest.mark.parametrize("arguments, says, hint", [
    ("''", "needs a statement", "Write it as text"),
    ("'select 1', 1", "1 repeats", "100 is the default"),
    ("'select 1', 10, -1", "-1 calls to warm up", "10 is the default"),
])
def test_arguments_that_make_no_sense(loaded, arguments, says, hint):
    for function in ("rheap_check", "rheap_assert_no_leaks"):
        with pytest.raises(SqlError) as error:
            loaded.sql(f"LOAD 'rheap'; SELECT {function}({arguments})")
        assert error.value.sqlstate == "22023"
        assert says in error.value.message and hint in error.value.hint


def test_an_error_of_the_statement_is_the_callers(loaded):
    session = loaded.session()
    session("LOAD 'rheap'")
    for statement, state in [("select 1/0", "22012"), ("select * from nowhere", "42P01"), ("begin", "0A000")]:
        with pytest.raises(SqlError) as error:
            found(session, statement)
        assert error.value.sqlstate == state
    # And the session's books are as the settings say again.
    assert found(session, "select 1") == []
    session.close()
