#!/usr/bin/env bash
# What rheap says of known leaks and of what only looks like them, as a table with a sum.
#
#   pg_test/scripts/corpus.sh PG_CONFIG sampled|exact
set -euo pipefail
cd "$(dirname "$0")/../.."
. pg_test/scripts/needs.sh
pg_config=${1:?usage: corpus.sh PG_CONFIG MODE} mode=${2:?usage: corpus.sh PG_CONFIG MODE}
step="building"
need_cargo
pg_test/scripts/install.sh "$pg_config"
make -s -C pg_test/modules clean PG_CONFIG="$pg_config"
make -s -C pg_test/modules install PG_CONFIG="$pg_config" >/dev/null
make -s -C pg_test/modules clean PG_CONFIG="$pg_config"
python=python3; [ -x /usr/bin/python3 ] && python=/usr/bin/python3
exec "$python" pg_test/corpus.py --pg-config "$pg_config" --mode "$mode"
