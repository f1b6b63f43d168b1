#!/bin/sh
# Runs the Python tests on CPython releases that are newer than the machine's, from Debian unstable.
#
# Usage: run.sh [VERSION…] [-- PYTEST_ARGS…]     (3.14 and 3.15 unless given)
#
# Unpacks Debian unstable into the cache folder once, and runs there in a private mount namespace, with this
# checkout and the user's home (Rust, pip's and this project's caches) mounted. Needs root and debootstrap.
set -eu

versions=
while [ $# -gt 0 ]; do
    case $1 in
    --) shift; break ;;
    *) versions="$versions $1"; shift ;;
    esac
done
versions=${versions:-3.14 3.15}

repository=$(cd "$(dirname "$0")/../.." && pwd)
root=${XDG_CACHE_HOME:-$HOME/.cache}/p2pclient-rs/debian-unstable

command -v debootstrap > /dev/null || { echo "needs debootstrap: apt-get install debootstrap" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "needs root, for chroot" >&2; exit 1; }

packages=ca-certificates,make,gcc,g++,libc6-dev,libffi-dev,procps
for version in 3.14 3.15; do
    packages=$packages,python$version,python$version-venv,python$version-dev
done
# An interrupted installation starts over.
if [ "$(cat "$root/.packages" 2> /dev/null)" != "$packages" ]; then
    rm -rf "$root"
    mkdir -p "$root"
    debootstrap --variant=minbase --include="$packages" sid "$root"
    echo "$packages" > "$root/.packages"
fi

# How this machine reaches its package registries.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$file" ]; then cp -L "$file" "$root$file"; fi
done

# The build scripts there need a newer C library than this machine may have.
export repository root CARGO_TARGET_DIR="$repository/target/newest"
outcomes=
failed=0
for version in $versions; do
    export version
    unshare --mount --propagation private sh -eu -c '
        for folder in /proc /sys /dev /tmp "$HOME" "$repository"; do
            mkdir -p "$root$folder"
            mount --rbind "$folder" "$root$folder"
        done
        exec chroot "$root" make -C "$repository" \
            test-python "PYTHON=python$version" "VENV=.venv-$version" "PYTEST_ARGS=$*"
    ' sh "$@" && outcome=passed || { outcome=failed; failed=1; }
    outcomes="$outcomes
== $(chroot "$root" "python$version" --version): $outcome"
done
echo "$outcomes"
exit $failed
