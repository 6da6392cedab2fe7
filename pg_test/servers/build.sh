#!/usr/bin/env bash
# Builds PostgreSQL 17 from Debian's source package, three times: `leaks` with pg17-leaks.patch, `control` without, and
# `cassert` without and with the server's own assertions and checks of memory.
# Prints the installation prefix of the one asked for; everything else goes to stderr or a log.
#
#   pg_test/servers/build.sh leaks|control|cassert
#
# The builds are cached in $RHEAP_CACHE (default: /var/cache/rheap for root, since the servers then run as another
# user who cannot enter root's home, else ~/.cache/rheap), keyed by version, patch and this script.
set -euo pipefail
# The server's Makefiles make their generated headers only where make was not called by make.
unset MAKELEVEL MAKEFLAGS MFLAGS
here=$(cd "$(dirname "$0")" && pwd)
flavour=${1:?usage: build.sh leaks|control|cassert}
case $flavour in leaks|control|cassert) ;; *) echo "build.sh: '$flavour' is none of leaks, control, cassert" >&2; exit 2;; esac
if [ "$(id -u)" = 0 ]; then default_cache=/var/cache/rheap; else default_cache=$HOME/.cache/rheap; fi
cache=${RHEAP_CACHE:-$default_cache}
mkdir -p "$cache"; chmod 755 "$cache"

# A minor release that is known to work is preferred, so that two machines test the same server; when the mirror
# has dropped it, whatever the suite's index names is taken.
version=17.11
sha256=dd27f2b3c59e73ed14aa3324901242bf69a032a6347805f274e6260322d42979

configure=(--enable-debug --without-icu --without-readline)
if [ "$flavour" = cassert ]; then configure+=(--enable-cassert); fi
key=$( { echo "$version ${configure[*]}"; if [ "$flavour" = leaks ]; then cat "$here/pg17-leaks.patch"; else echo with regress, isolation and spi; fi; } | sha256sum | cut -c1-12)
prefix=$cache/pg17-$flavour-$key
if [ -e "$prefix/.complete" ]; then echo "$prefix"; exit 0; fi

exec 9>"$cache/.lock"; flock 9
if [ -e "$prefix/.complete" ]; then echo "$prefix"; exit 0; fi
log=$cache/build-$flavour.log
say() { echo "build.sh: $*" >&2; }
fail() { say "$* failed; the last lines of $log:"; tail -n 15 "$log" >&2; exit 1; }

mirrors() {  # the Debian mirrors of this machine's own apt configuration
    { sed -n 's/^URIs:[[:space:]]*//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | tr ' ' '\n'
      grep -rhoE '^deb(-src)?[[:space:]]+(\[[^]]*\][[:space:]]+)?[^[:space:]]+' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | awk '{print $NF}'
    } | grep -E '/debian(-security)?/?$' | sed 's,/$,,' | sort -u
}

fetch_pinned() {
    for mirror in $(mirrors | grep '/debian$'); do
        /usr/lib/apt/apt-helper download-file \
            "$mirror/pool/main/p/postgresql-17/postgresql-17_$version.orig.tar.bz2" "$1" "SHA256:$sha256" >>"$log" 2>&1 && return 0
    done
    return 1
}

fetch_indexed() {  # through a private apt configuration: the machine's own is not touched
    local apt=$cache/apt mirror suite
    rm -rf "$apt"; mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/source"
    for mirror in $(mirrors); do
        case $mirror in *security) suite=trixie-security;; *) suite=trixie;; esac
        echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/sources.list"
        local options=(-o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
                       -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
        apt-get "${options[@]}" update >>"$log" 2>&1 || continue
        (cd "$apt/source" && apt-get "${options[@]}" source --download-only postgresql-17 >>"$log" 2>&1) || continue
        mv "$apt"/source/postgresql-17_*.orig.tar.bz2 "$1" && return 0
    done
    return 1
}

: >"$log"
tarball=$cache/postgresql-17.orig.tar.bz2
if [ ! -e "$tarball" ]; then
    say "fetching the source of PostgreSQL 17"
    fetch_pinned "$tarball.part" || fetch_indexed "$tarball.part" || fail "fetching the source package postgresql-17"
    mv "$tarball.part" "$tarball"
fi

source=$cache/src-$flavour
rm -rf "$source" "$prefix"; mkdir -p "$source"
tar -xjf "$tarball" -C "$source" --strip-components=1
if [ "$flavour" = leaks ]; then
    patch -p1 -d "$source" <"$here/pg17-leaks.patch" >>"$log" 2>&1 || fail "applying pg17-leaks.patch"
fi
say "building PostgreSQL 17 ($flavour): about 4 minutes on 2 cores, log in $log"
cd "$source"
./configure --prefix="$prefix" "${configure[@]}" >>"$log" 2>&1 || fail "configure"
make -s -j"$(nproc)" -C src all >>"$log" 2>&1 || fail "make"
make -s -C src install >>"$log" 2>&1 || fail "make install"
if [ "$flavour" != leaks ]; then
    # What the regression and isolation suites need to run without the build tree.
    make -s -j"$(nproc)" -C src/test/regress all >>"$log" 2>&1 || fail "make in src/test/regress"
    make -s -C contrib/spi >>"$log" 2>&1 || fail "make in contrib/spi"
    mkdir -p "$prefix/regress"
    cp -r src/test/regress/{sql,expected,data,parallel_schedule,resultmap,pg_regress,regress.so} "$prefix/regress/"
    cp contrib/spi/{refint,autoinc}.so "$prefix/regress/"
    make -s -j"$(nproc)" -C src/test/isolation all >>"$log" 2>&1 || fail "make in src/test/isolation"
    mkdir -p "$prefix/isolation"
    cp -r src/test/isolation/{specs,expected,isolation_schedule,pg_isolation_regress,isolationtester} "$prefix/isolation/"
fi
# The tests look up the lines of the leaks here.
mkdir -p "$prefix/src"
cp src/backend/postmaster/postmaster.c src/backend/utils/adt/pseudorandomfuncs.c "$prefix/src/"
cd /; rm -rf "$source"
chmod -R a+rX "$prefix"
touch "$prefix/.complete"
say "PostgreSQL 17 ($flavour) is in $prefix"
echo "$prefix"
