#!/bin/sh
# Runs p2pclient 0.3.0's own test suite, unmodified, on p2pclient_rs.
#
#   run.sh [--incumbent] [PYTEST_ARGS ...]
#
# --incumbent runs it on the original p2pclient instead. Environment variables:
#   PYTHON       an interpreter with p2pclient-rs[p2pclient], trio and pytest (default: python3)
#   P2PD_PATH    the Go daemon (default: p2pd on PATH)
#   JSP2PD_PATH  the JavaScript daemon, for --daemon=js (default: jsp2pd on PATH)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sdist=$("$python" "$here/../get_p2pclient.py")
tar -xzf "$sdist" -C "$work"
mv "$work/p2pclient-0.3.0/tests" "$work/tests"
cp "$here/suite_conftest.py" "$work/tests/conftest.py"

for argument; do
    if [ "$argument" = --incumbent ]; then
        # Only the package itself: p2pclient-rs[p2pclient] has installed its dependencies.
        mkdir "$work/incumbent"
        mv "$work/p2pclient-0.3.0/p2pclient" "$work/incumbent/"
        export PYTHONPATH="$work/incumbent"
    fi
done
rm -rf "$work/p2pclient-0.3.0"

mkdir "$work/bin"
[ -z "${P2PD_PATH:-}" ] || ln -s "$P2PD_PATH" "$work/bin/p2pd"
[ -z "${JSP2PD_PATH:-}" ] || ln -s "$JSP2PD_PATH" "$work/bin/jsp2pd"
export PATH="$work/bin:$PATH"

cd "$work"
"$python" -m pytest -c /dev/null --rootdir "$work" -p no:cacheprovider \
    -o faulthandler_timeout=120 -o faulthandler_exit_on_timeout=true tests "$@"
