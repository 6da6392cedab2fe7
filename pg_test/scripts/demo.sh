#!/usr/bin/env bash
# Shows rheap at work: a throw-away cluster of the distribution's PostgreSQL 15 with a module that leaks in a backend
# and in the postmaster, and rheap_leaks() finding both while they run. The reports stay, in a folder that is named at the
# end ($RHEAP_DEMO_REPORTS, or a new one).
set -euo pipefail
cd "$(dirname "$0")/../.."
top=$PWD
. pg_test/scripts/needs.sh
step=start
trap 'status=$?; cleanup; if [ $status != 0 ]; then printf "\n** The demonstration ended early, at: %s\n" "$step" >&2; fi; exit $status' EXIT

cleanup() {
    [ -n "${root:-}" ] || return 0
    exec 3>&- || true
    as_server_user "$bin/pg_ctl" stop -s -m fast -D "$root/data" >/dev/null 2>&1 || true
    rm -rf "$root"
    root=
}

say "1/5  Packages"
need_build_packages
need_cargo
echo "PostgreSQL $(/usr/lib/postgresql/15/bin/pg_config --version | awk '{print $2}'), $(rustc --version)"

say "2/5  Building rheap (two minutes the first time) and a module that leaks"
pg_config=${RHEAP_PG15:-/usr/lib/postgresql/15/bin/pg_config}
bin=$($pg_config --bindir)
step="building rheap"; pg_test/scripts/install.sh "$pg_config"
step="building the leaking module"
make -s -C pg_test/modules PG_CONFIG="$pg_config" install >/dev/null
make -s -C pg_test/modules PG_CONFIG="$pg_config" clean

say "3/5  A cluster with shared_preload_libraries = 'rheap, leaky'"
step="starting the cluster"
root=$(mktemp -d /tmp/rheap-demo.XXXXXX)
[ "$(id -u)" = 0 ] && chown "${RHEAP_TEST_USER:-postgres}" "$root"
chmod 755 "$root"
as_server_user "$bin/initdb" -D "$root/data" -U postgres -A trust -N >"$root.log" 2>&1 || { cat "$root.log"; exit 1; }
rm -f "$root.log"
as_server_user tee -a "$root/data/postgresql.conf" >/dev/null <<CONF
shared_preload_libraries = 'rheap, leaky'
listen_addresses = ''
unix_socket_directories = '$root'
rheap.walk_interval = '1s'
rheap.mode = 'exact'
CONF
as_server_user "$bin/pg_ctl" start -s -w -D "$root/data" -l "$root/log"
psql() { as_server_user "$bin/psql" -X -h "$root" -U postgres -P pager=off "$@" postgres; }
psql -q -c 'CREATE EXTENSION rheap' -f - <pg_test/modules/leaky.sql
echo "running as $(as_server_user id -un), in $root"

say "4/5  A session leaks in a SQL function, and the postmaster leaks for each connection"
step="leaking"
mkfifo "$root/statements"; chmod 666 "$root/statements"
(while read -r line; do echo "$line"; done <"$root/statements" | psql -qAt >/dev/null) &
exec 3>"$root/statements"
leak() {
    for _ in $(seq 10); do echo "SELECT leaky_leak($1, 120);" >&3; done
    for _ in $(seq "$2"); do psql -qAtc 'SELECT 1' >/dev/null; done
    sleep 1.5
}
show() {
    echo
    echo "postgres=# SELECT verdict, backend_type, function, context, live_bytes, live_count, generations, location"
    echo "postgres-# FROM rheap_leaks();"
    psql -c "SELECT verdict, backend_type, function, context, live_bytes, live_count, generations,
             regexp_replace(location, '^.*/', '') AS location FROM rheap_leaks()"
}
# 80 bytes for each process that the postmaster starts are reported from 8 kB on here, that nobody has to wait.
psql -qc "ALTER SYSTEM SET rheap.min_leak_bytes = '8kB'" -c 'SELECT pg_reload_conf()' >/dev/null
leak 2000 120
step="asking rheap"
show
echo "... both go on leaking; the same question again:"
leak 3000 60
show
psql -c "SELECT reason FROM rheap_leaks()" -c "SELECT unnest(stack) AS \"stack of the first\" FROM (SELECT stack FROM rheap_leaks() LIMIT 1) l"
echo "What rheap itself costs:"
psql -c "SELECT pid, backend_type, mode, watched_contexts, allocations, captures, pg_size_pretty(own_bytes) AS own FROM rheap_processes"
found=$(psql -qAtc "SELECT string_agg(DISTINCT backend_type, ',' ORDER BY backend_type) FROM rheap_leaks() WHERE verdict = 'leak' AND function IN ('leaky_leak', 'leak_at_fork')")
step="finding both leaks (found in: $found)"
[ "$found" = "client backend,postmaster" ]
step="writing the reports"
reports=${RHEAP_DEMO_REPORTS:-$(mktemp -d /tmp/rheap-reports.XXXXXX)}
mkdir -p "$reports"
psql -qAtc 'SELECT rheap_html()' >"$reports/report.html"
psql -qAtc 'SELECT rheap_flamegraph()' >"$reports/live.svg"
psql -qAtc 'SELECT rheap_report()' >"$reports/report.txt"
psql -qAtc "SELECT encode(rheap_pprof(), 'base64')" | base64 -d >"$reports/rheap.pb.gz"
chmod -R a+rX "$reports"
for file in report.html live.svg report.txt rheap.pb.gz; do [ -s "$reports/$file" ]; done
grep -q leaky_leak "$reports/live.svg" "$reports/report.html" && gzip -t "$reports/rheap.pb.gz"

say "5/5  Done"
step="stopping the cluster"
cleanup
cat <<TEXT
rheap found the backend's leak (leaky_leak) and the postmaster's (leak_at_fork), live, and the cluster is gone.
The same as pictures, in $reports:
    report.html     a page for any browser: reasons, growth charts, flame graph, call sites
    live.svg        the flame graph alone
    rheap.pb.gz     for the profiler: go tool pprof -http=: $reports/rheap.pb.gz
    report.txt      the report for a terminal
On a server of yours:
    make install PG_CONFIG=/path/to/pg_config
    shared_preload_libraries = 'rheap'          in postgresql.conf, and restart
    CREATE EXTENSION rheap;
    SELECT * FROM rheap_leaks();
TEXT
