"""What this dialect needs that the base install does not bring."""


def missing(error: ImportError) -> ImportError:
    """Says what to install, for an import that failed."""
    return ImportError(
        f"the p2pclient dialect needs {error.name or error}: pip install 'p2pclient-rs[p2pclient]'",
        name=error.name,
        path=error.path,
    )
