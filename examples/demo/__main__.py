"""Two daemons and two programs exchange a message, a large stream and a DHT record.

Runs listener.py and dialer.py, each in its own process, and shows their output.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    print("starting two daemons and two programs …", flush=True)
    python = [sys.executable, "-u"]
    with subprocess.Popen(
        [*python, HERE / "listener.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as listener:
        assert listener.stdin is not None and listener.stdout is not None
        address = listener.stdout.readline().strip()
        if not address:
            print("the listener did not start")
            return 1
        print(f"listener: {address}", flush=True)
        dialer = subprocess.run(
            [*python, HERE / "dialer.py", address], stdout=subprocess.PIPE, text=True, timeout=120
        )
        listener.stdin.close()
        for name, lines in (("dialer", dialer.stdout), ("listener", listener.stdout.read())):
            for line in lines.splitlines():
                print(f"{name}: {line}")
    failed = dialer.returncode or listener.returncode
    print("demo failed" if failed else "demo done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
