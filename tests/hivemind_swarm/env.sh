#!/bin/sh
# Makes the virtual environment for real hivemind: env.sh VENV
#
# It uses Debian's interpreter and Debian's torch, a CPU build; PyPI's torch comes with gigabytes of
# CUDA. Missing Debian packages are installed, which needs root or sudo.
set -eu

venv=$1
here=$(cd "$(dirname "$0")" && pwd)
python=/usr/bin/python3
packages="python3-torch python3-venv"

ready() {
    "$python" -c 'import ensurepip, numpy, torch, venv' 2>/dev/null
}

if ! ready; then
    if [ "$(id -u)" = 0 ]; then
        sudo=
    elif command -v sudo >/dev/null; then
        sudo=sudo
    else
        echo "hivemind needs Debian's $packages: apt-get install $packages" >&2
        exit 1
    fi
    $sudo apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install --quiet=2 --yes \
        --no-install-recommends $packages >/dev/null
    ready || { echo "$python has no torch, numpy, venv or ensurepip" >&2; exit 1; }
fi

"$python" -m venv --clear --system-site-packages "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --ignore-installed -r "$here/requirements.txt"
