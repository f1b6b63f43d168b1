"""Calls ``install()`` below ``python -m p2pclient_rs run``, once a package to replace is imported.

``PYTHONPATH`` begins with this folder, so every Python process below ``run`` imports this file when
it starts. That Python may lack this package, so this file imports the rest of it only when needed.
"""

import os
import sys
import warnings
from contextlib import suppress
from importlib.abc import MetaPathFinder

# The options of `run`; compat/subprocesses.py sets the variable.
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
        with suppress(ValueError):  # Another thread may have removed it.
            sys.meta_path.remove(self)
        try:
            from p2pclient_rs.compat.install import install_in_child
            from p2pclient_rs.compat.subprocesses import parse_options
        except ImportError as error:
            message = f"{fullname} runs as it is, for {sys.executable} has no p2pclient_rs: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            install_in_child(parse_options(_OPTIONS)[0])
        # The import system would continue with the finders after this one, and miss the import hook
        # that is now the first. So ask all finders.
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                return spec
        return None


def _run_hidden_sitecustomize() -> None:
    """Imports the sitecustomize that this one hides; it replaces this one in ``sys.modules``."""
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
_run_hidden_sitecustomize()
