"""Prints the path of p2pclient 0.3.0's source distribution, which contains its test suite."""

from pathlib import Path

from downloads import cache_dir, download

NAME = "p2pclient-0.3.0.tar.gz"
SHA256 = "98ccfd75642de9d0c532f1d1f06aec0c63d115c0f3341a0f488185a6e928a087"


def fetch() -> Path:
    """Returns the path of the archive, downloaded if necessary."""
    kept = cache_dir() / NAME
    if not kept.exists():
        with download("p2pclient==0.3.0", SHA256, "--no-binary=:all:") as archive:
            archive.rename(kept)
    return kept


if __name__ == "__main__":
    print(fetch())
