#!/usr/bin/env bash
# Builds rheap for the server of a pg_config and installs it there; more pg_configs of the same major version, and with
# assertions if the first has them, get the same build.
#
#   pg_test/scripts/install.sh PG_CONFIG [PG_CONFIG…]
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
pg_config=${1:?usage: install.sh PG_CONFIG [PG_CONFIG…]}
"$pg_config" --version >/dev/null 2>&1 || { echo "install.sh: '$pg_config' is no pg_config that runs; write PG_CONFIG=/path/to/pg_config" >&2; exit 1; }
major=$("$pg_config" --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
case $major in
    15|16|17|18) ;;
    *) echo "install.sh: PostgreSQL $major is not supported; rheap knows 15, 16, 17 and 18" >&2; exit 1;;
esac
for other in "$@"; do
    [[ $("$other" --version) == "PostgreSQL $major"* ]] || {
        echo "install.sh: '$other' is not of PostgreSQL $major like the first; write one command for each major version" >&2; exit 1; }
done
command -v cargo >/dev/null || { echo "install.sh: cargo is missing; install Rust 1.88 or later (https://rustup.rs)" >&2; exit 1; }
[ -e "$("$pg_config" --includedir-server)/postgres.h" ] || {
    echo "install.sh: the server's headers are missing; on Debian: apt-get install postgresql-server-dev-$major" >&2; exit 1; }

cd "$top"
target=${CARGO_TARGET_DIR:-$top/target}/pg$major
# A server with assertions has other structures.
! grep -q '^#define USE_ASSERT_CHECKING 1' "$("$pg_config" --includedir-server)/pg_config.h" || target=$target-cassert
# Beside that the bindings depend on the major version only, so one pg_config stands for all of a version.
stamp=$target/pg_config
mkdir -p "$target"
[ -x "$(cat "$stamp" 2>/dev/null)" ] || echo "$pg_config" >"$stamp"
CARGO_TARGET_DIR=$target PGRX_PG_CONFIG_PATH=$(cat "$stamp") \
    cargo build --quiet --release --locked --lib --no-default-features --features "pg$major"

for pg_config in "$@"; do
    lib=$("$pg_config" --pkglibdir) extension=$("$pg_config" --sharedir)/extension
    # A new file beside the old one and a rename: a server that has the old one mapped keeps it whole.
    install -m 755 "$target/release/librheap.so" "$lib/.rheap.so.new"
    mv -f "$lib/.rheap.so.new" "$lib/rheap.so"
    install -m 644 rheap.control sql/rheap--*.sql "$extension/"
    echo "rheap for PostgreSQL $major is installed in $lib"
done
