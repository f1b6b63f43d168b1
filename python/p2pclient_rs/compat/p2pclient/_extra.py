"""Dependencies of this layer that the base install does not have."""


def missing_dependency(error: ImportError) -> ImportError:
    """Returns an error that says what to install, for an import that failed."""
    return ImportError(
        f"p2pclient_rs.compat.p2pclient needs {error.name or error}: "
        "pip install 'p2pclient-rs[p2pclient]'",
        name=error.name,
        path=error.path,
    )
