#!/usr/bin/env bash
# Gets the regression suite of PostgreSQL 15 from the source of the minor release that is installed, and compiles its
# library against the installed headers. Prints the folder; everything else goes to stderr or a log.
#
#   pg_test/servers/tests15.sh PG_CONFIG
set -euo pipefail
pg_config=${1:?usage: tests15.sh PG_CONFIG}
if [ "$(id -u)" = 0 ]; then default_cache=/var/cache/rheap; else default_cache=$HOME/.cache/rheap; fi
cache=${RHEAP_CACHE:-$default_cache}
mkdir -p "$cache"; chmod 755 "$cache"
version=$("$pg_config" --version | awk '{print $2}')
tests=$cache/tests-$version
if [ -e "$tests/.complete" ]; then echo "$tests"; exit 0; fi
exec 9>"$cache/.lock-tests"; flock 9
if [ -e "$tests/.complete" ]; then echo "$tests"; exit 0; fi
log=$cache/tests-$version.log
fail() { echo "tests15.sh: $* failed; the last lines of $log:" >&2; tail -n 15 "$log" >&2; exit 1; }
: >"$log"

mirrors() {  # the Debian mirrors of this machine's own apt configuration
    { sed -n 's/^URIs:[[:space:]]*//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | tr ' ' '\n'
      grep -rhoE '^deb(-src)?[[:space:]]+(\[[^]]*\][[:space:]]+)?[^[:space:]]+' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | awk '{print $NF}'
    } | grep -E '/debian(-security)?/?$' | sed 's,/$,,' | sort -u
}

fetch() {
    local mirror pool
    for mirror in $(mirrors); do
        case $mirror in *security) pool=pool/updates;; *) pool=pool;; esac
        /usr/lib/apt/apt-helper download-file "$mirror/$pool/main/p/postgresql-15/postgresql-15_$version.orig.tar.bz2" "$1" >>"$log" 2>&1 && return 0
    done
    return 1
}

work=$cache/src-tests-$version
rm -rf "$work" "$tests"; mkdir -p "$work" "$tests"
fetch "$work/source.tar.bz2" || fail "fetching the source of $version"
tar -xjf "$work/source.tar.bz2" -C "$work" --strip-components=1 --wildcards '*/src/test/regress' '*/contrib/spi' >>"$log" 2>&1 || fail "unpacking"
cp -r "$work"/src/test/regress/{sql,expected,data,parallel_schedule,resultmap} "$tests/"
cp "$("$pg_config" --pkglibdir)/pgxs/src/test/regress/pg_regress" "$tests/"
compile() {  # compile NAME SOURCE: one library of the suite
    printf 'PG_CPPFLAGS = -DREFINT_VERBOSE\nMODULES = %s\noverride with_llvm = no\nPG_CONFIG = %s\nPGXS := %s\ninclude $(PGXS)\n' "$1" "$pg_config" "$("$pg_config" --pgxs)" >"$(dirname "$2")/Makefile"
    make -s -C "$(dirname "$2")" -f Makefile all >>"$log" 2>&1 || fail "compiling $1"
    cp "$(dirname "$2")/$1.so" "$tests/"
}
compile regress "$work/src/test/regress/regress.c"
compile refint "$work/contrib/spi/refint.c"
compile autoinc "$work/contrib/spi/autoinc.c"
rm -rf "$work"
chmod -R a+rX "$tests"
touch "$tests/.complete"
echo "$tests"
