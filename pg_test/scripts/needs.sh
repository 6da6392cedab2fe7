# To be sourced. What the scripts need from the system, installed on Debian if it is missing and we are root.

say() { printf '\n== %s\n' "$*"; }

fail() { printf '\n** %s failed: %s\n' "$step" "$1" >&2; exit 1; }

# need_packages COMMENT PACKAGE…
need_packages() {
    local why=$1 missing=() package; shift
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    step="installing packages ($why)"
    [ "$(id -u)" = 0 ] || fail "not root; as root: apt-get install ${missing[*]}"
    command -v apt-get >/dev/null || fail "no apt-get here; install these by hand: ${missing[*]}"
    echo "installing ${missing[*]} ($why)"
    { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" \
        || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"; }
    } >/tmp/rheap-apt.log 2>&1 || { tail -n 15 /tmp/rheap-apt.log >&2; fail "apt-get; the log is /tmp/rheap-apt.log"; }
}

# What a build against Debian's own PostgreSQL takes. The package of the server creates a cluster that nobody asked
# for, unless told otherwise.
need_build_packages() {
    if [ "$(id -u)" = 0 ] && [ ! -e /etc/postgresql-common/createcluster.conf ] && [ ! -d /etc/postgresql ]; then
        mkdir -p /etc/postgresql-common && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
    fi
    need_packages "the server and what a build against it takes" \
        postgresql-15 postgresql-server-dev-15 build-essential clang libclang-dev pkg-config
}

need_cargo() {
    [ -x "$HOME/.cargo/bin/cargo" ] && PATH=$HOME/.cargo/bin:$PATH
    step="looking for Rust"
    command -v cargo >/dev/null || fail "cargo is not on the PATH; rheap needs Rust 1.88 or later, see https://rustup.rs, then run this again"
    local version; version=$(rustc --version | awk '{print $2}')
    [ "$(printf '1.88\n%s\n' "$version" | sort -V | head -n 1)" = 1.88 ] || fail "rustc $version is too old; rheap needs 1.88 or later: rustup update stable"
}

# Runs a command as the user that servers run as: PostgreSQL refuses to run as root.
as_server_user() {
    if [ "$(id -u)" = 0 ]; then (cd / && runuser -u "${RHEAP_TEST_USER:-postgres}" -- "$@"); else "$@"; fi
}
