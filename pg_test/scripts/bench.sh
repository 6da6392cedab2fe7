#!/usr/bin/env bash
# What rheap costs, in one table: installs into 15 and 17, runs criterion for the pure parts, then the servers.
#
#   pg_test/scripts/bench.sh [SECTION…]      (sections: see pg_test/bench/__main__.py; without one: all, about an hour)
set -euo pipefail
cd "$(dirname "$0")/../.."
. pg_test/scripts/needs.sh
step="benchmark"
need_build_packages
need_packages "counting instructions, building PostgreSQL 17, comparing" \
    valgrind heaptrack bison flex perl zlib1g-dev patch bzip2 xz-utils python3
# A row more, which says so where it cannot be had.
(need_packages "comparing with a probe" bpftrace) || true
need_cargo
pg15=${RHEAP_PG15:-/usr/lib/postgresql/15/bin/pg_config}
leaks=$(pg_test/servers/build.sh leaks)/bin/pg_config
control=$(pg_test/servers/build.sh control)/bin/pg_config
pg_test/scripts/install.sh "$pg15"
pg_test/scripts/install.sh "$control" "$leaks"
for pg_config in "$control" "$pg15"; do
    make -s -C pg_test/modules clean PG_CONFIG="$pg_config"
    make -s -C pg_test/modules install PG_CONFIG="$pg_config" >/dev/null
    make -s -C pg_test/modules clean PG_CONFIG="$pg_config"
done
case " $* " in
    *' captures '*|*'  '*) cargo bench --quiet --locked -- --noplot >/dev/null;;
esac
cd pg_test
exec python3 -m bench "$pg15" "$control" "$leaks" "$@"
