"""What Python processes below ``python -m p2pclient_rs run`` run as they start: the swap is put on
once something that it replaces is imported. Until then it costs nothing.

This folder is the first of their PYTHONPATH for it. It may be any Python that starts here, so this
file imports nothing else of the package.
"""

import os
import sys
import warnings
from contextlib import suppress
from importlib.abc import MetaPathFinder

# What compat/subprocesses.py writes there: the options of `run`.
_OPTIONS = os.environ.get("P2PCLIENT_RS_RUN", "").split()
_PACKAGE = "--hivemind-package="
_REPLACED = {
    "p2pclient",
    "hivemind",
    *(option[len(_PACKAGE) :] for option in _OPTIONS if option.startswith(_PACKAGE)),
}


class _Trigger(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname not in _REPLACED:
            return None
        with suppress(ValueError):  # another thread may be here, too
            sys.meta_path.remove(self)
        try:
            from p2pclient_rs.compat.install import adopt
            from p2pclient_rs.compat.subprocesses import parse_options
        except ImportError as error:
            message = f"{fullname} runs as it is, for {sys.executable} has no p2pclient_rs: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            adopt(parse_options(_OPTIONS)[0])
        # Whoever asked goes on with the finder after the one that was removed.
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                return spec
        return None


def _run_the_next() -> None:
    """Has the sitecustomize that this one hides take its place."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    sys.modules.setdefault("sitecustomize", ours)


sys.meta_path.insert(0, _Trigger())
_run_the_next()
