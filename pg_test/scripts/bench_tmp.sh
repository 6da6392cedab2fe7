#!/usr/bin/env bash
# What rheap costs, in instructions: prepared point selects in `postgres --single` under callgrind, N statements
# against 2N. Counts repeat to a few digits, whatever else the machine does.
#
#   pg_test/scripts/bench.sh PG_CONFIG      (rheap is installed there)
set -euo pipefail
cd "$(dirname "$0")/../.."
. pg_test/scripts/needs.sh
step="measuring"
pg_config=${1:?usage: bench.sh PG_CONFIG}
need_packages "counting instructions" valgrind
bin=$("$pg_config" --bindir)
root=$(mktemp -d /tmp/rheap-bench.XXXXXX); chmod 755 "$root"
[ "$(id -u)" = 0 ] && chown "${RHEAP_TEST_USER:-postgres}" "$root"
trap 'rm -rf "$root"' EXIT
n=${STATEMENTS:-1000}

as_server_user "$bin/initdb" -D "$root/data" -U postgres -A trust -N >/dev/null
single() { as_server_user "$bin/postgres" --single -D "$root/data" "$@" postgres >/dev/null 2>"$root/err" || { cat "$root/err"; exit 1; }; }
single <<'SQL'
CREATE TABLE accounts (aid int PRIMARY KEY, balance int)
INSERT INTO accounts SELECT g, 0 FROM generate_series(1, 100000) g
VACUUM ANALYZE accounts
SQL
statements() { echo 'PREPARE p(int) AS SELECT balance FROM accounts WHERE aid = $1'; for i in $(seq "$1"); do echo "EXECUTE p($((i * 37 % 100000 + 1)))"; done; }
statements "$n" >"$root/n"; statements $((2 * n)) >"$root/2n"

instructions() {  # of all statements in a file, with settings
    local file=$1; shift
    rm -f "$root"/callgrind.*
    as_server_user valgrind --tool=callgrind --callgrind-out-file="$root/callgrind.out" "$bin/postgres" --single -D "$root/data" "$@" postgres <"$file" >/dev/null 2>"$root/err" \
        || { tail "$root/err"; exit 1; }
    sed -n 's/^summary: //p; s/^totals: //p' "$root/callgrind.out" | tail -n 1
}
measure() { local one two; one=$(instructions "$root/n" "$@"); two=$(instructions "$root/2n" "$@"); echo $(((two - one) / n)); }

base=$(measure)
printf '%s, %s statements, instructions per prepared point select\n\n' "$("$pg_config" --version)" "$n"
printf '| rheap | instructions | cost |\n| --- | --- | --- |\n| not loaded | %s | |\n' "$base"
row() {
    local name=$1 with; shift
    with=$(measure "$@")
    printf '| %s | %s | %+.2f %% |\n' "$name" "$with" "$(awk "BEGIN { print ($with - $base) * 100 / $base }")"
}
# rheap asks for query ids, as pg_stat_statements does: their part of the cost by itself.

for mode in ${MODES:-off sampled exact}; do
    row "$mode" -c shared_preload_libraries=rheap -c rheap.mode=$mode
done
