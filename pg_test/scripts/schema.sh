#!/usr/bin/env bash
# Generates the install script from the code into a file; `make test` compares it with the one in sql/.
#
#   pg_test/scripts/schema.sh FILE
set -euo pipefail
out=$(realpath "${1:?usage: schema.sh FILE}")
cd "$(dirname "$0")/../.."
version=0.18.1
if [ "$(cargo pgrx --version 2>/dev/null | awk '{print $2}')" != "$version" ]; then
    echo "schema.sh: installing cargo-pgrx $version, about 5 to 10 minutes, once" >&2
    cargo install --quiet --locked cargo-pgrx --version "$version"
fi
pg_config=${RHEAP_PG15:-/usr/lib/postgresql/15/bin/pg_config}
target=${CARGO_TARGET_DIR:-$PWD/target}/package
# cargo pgrx wants to be told of a server once. It gets a home of its own here: the user's is not touched.
export PGRX_HOME=$target/pgrx
if [ ! -e "$PGRX_HOME/config.toml" ]; then
    mkdir -p "$PGRX_HOME"
    cargo pgrx init --pg15 "$pg_config" >"$target/init.log" 2>&1 || { cat "$target/init.log" >&2; exit 1; }
fi
# The same command that people type to make a package; it writes the schema among the package's files.
CARGO_TARGET_DIR=$target cargo pgrx package --pg-config "$pg_config" --out-dir "$target/out" >"$target/package.log" 2>&1 \
    || { tail -n 30 "$target/package.log" >&2; exit 1; }
# pgrx orders by a dependency graph, which is stable, and names files by line, which is noise in a diff.
generated=$(find "$target/out" -name 'rheap--*.sql' | head -n 1)
sed -E '/^-- src\/.*:[0-9]+$/d' "$generated" >"$out"
