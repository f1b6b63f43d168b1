"""The modules of the package, and the files of the crates, have no cyclic dependencies."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.independent

ROOT = Path(__file__).parent.parent
CRATES = [file.parent for file in sorted(ROOT.glob("src/*/Cargo.toml"))]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns one cycle of a dependency graph; an empty list if it has no cycle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


# --- Python: every import statement, including those in functions and for type checkers ---


def python_modules() -> dict[str, Path]:
    modules = {}
    for file in sorted(ROOT.glob("python/**/*.py*")):
        if file.suffix in (".py", ".pyi"):
            parts = file.relative_to(ROOT / "python").with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imports(name: str, file: Path, source: str) -> Iterator[str]:
    """Yields the full name of everything that a module imports."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def python_graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        graph[name] = set()
        for imported in imports(name, file, file.read_text()):
            # A submodule, or a name that a module defines.
            for target in (imported, imported.rpartition(".")[0]):
                if target in modules:
                    graph[name].add(target)
                    break
    return graph


def test_no_python_module_imports_itself_through_others() -> None:
    modules = python_modules()
    graph = python_graph(modules)
    assert "p2pclient_rs.exceptions" in graph["p2pclient_rs.connector"]
    assert cycle(graph) == []


# --- Rust: every path to the same crate, except in comments and tests ---


USE = re.compile(r"^\s*(pub )?use ([^;]*);", re.MULTILINE)


class Crate:
    """The files of one crate, by module path; the crate's root is ``crate``."""

    def __init__(self, folder: Path) -> None:
        self.code: dict[str, str] = {}
        #: The paths of the names that ``use`` brings into each module; its submodules can use them.
        self.imported: dict[str, dict[str, str]] = {}
        for file in sorted(folder.rglob("*.rs")):
            parts = file.relative_to(folder).with_suffix("").parts
            if parts[-1] in ("build", "tests"):
                continue
            if parts[-1] in ("lib", "mod"):
                parts = parts[:-1]
            self.code["::".join(("crate", *parts))] = without_tests(file.read_text())
        for module, code in self.code.items():
            self.imported[module] = dict(uses(code))

    def graph(self) -> dict[str, set[str]]:
        return {module: self._dependencies(module, code) for module, code in self.code.items()}

    def _dependencies(self, module: str, code: str) -> set[str]:
        names = {"crate", "super", "self", *self._children(module)}
        rest = re.sub(USE, "", code)
        paths = re.findall(rf"(?<![\w:])(?:{'|'.join(names)})(?:::\w+)+", rest)
        # Traits need not be named. A re-export counts if the file uses the name itself.
        exported = dict(uses(code, "pub "))
        for name, path in uses(code):
            if name not in exported or re.search(rf"\b{name}\b", rest):
                paths.append(path)
        found = {self._file_of(module, path) for path in paths}
        return {target for target in found if target is not None} - {module}

    def _children(self, module: str) -> set[str]:
        return {m.rpartition("::")[2] for m in self.code if m.rpartition("::")[0] == module}

    def _file_of(self, module: str, path: str, depth: int = 8) -> str | None:
        """Returns the module whose file defines the item that a path in ``module`` refers to."""
        first, *names = path.replace("$", "").split("::")
        match first:
            case "crate":
                at = "crate"
            case "self":
                at = module
            case "super":
                at = module.rpartition("::")[0]
            case child if child in self._children(module):
                at = f"{module}::{child}"
            case _:
                return None
        for i, name in enumerate(names):
            if name == "super":
                at = at.rpartition("::")[0]
            elif f"{at}::{name}" in self.code:
                at = f"{at}::{name}"
            elif depth and name in self.imported.get(at, {}):
                onward = "::".join((self.imported[at][name], *names[i + 1 :]))
                return self._file_of(at, onward, depth - 1)
            else:
                break
        return at if at in self.code else None


def uses(code: str, visibility: str = "") -> Iterator[tuple[str, str]]:
    """Yields the name and the path of everything that ``use`` statements import."""
    for found in USE.finditer(code):
        if visibility in ("", found[1]):
            for path, _, alias in (leaf.partition(" as ") for leaf in leaves(found[2])):
                path = path.removesuffix("::self")
                yield alias.strip() or path.rpartition("::")[2], path


def leaves(tree: str) -> Iterator[str]:
    """Yields the paths of a use tree: ``a::{b, c::d}`` gives ``a::b`` and ``a::c::d``."""
    head, brace, rest = tree.strip().partition("{")
    if not brace:
        yield head.strip()
        return
    depth, start = 0, 0
    inner = rest[: rest.rindex("}")]
    for i, character in enumerate(inner + ","):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            if branch := inner[start:i].strip():
                yield from (head.strip() + leaf for leaf in leaves(branch))
            start = i + 1


def without_tests(code: str) -> str:
    """Removes comments, tests and the scopes of visibility."""
    code = re.sub(r"//.*", "", code)
    code = re.sub(r"\bpub\([^)]*\)", "pub", code)
    code = re.split(r"^#\[cfg\(test\)\]\s*(?:pub\S* )?mod tests", code, flags=re.MULTILINE)[0]
    # In an inline module, ``super`` is the file itself.
    inline = re.compile(r"^mod \w+ \{.*?^\}", re.MULTILINE | re.DOTALL)
    return inline.sub(lambda found: found[0].replace("super::", "self::"), code)


@pytest.mark.parametrize("folder", CRATES, ids=lambda folder: folder.name)
def test_no_file_of_a_crate_depends_on_itself_through_others(folder: Path) -> None:
    assert cycle(Crate(folder).graph()) == []


def test_paths_of_rust_are_followed_to_the_file_that_defines_them(tmp_path: Path) -> None:
    (tmp_path / "lib.rs").write_text("mod a;\nmod b;\npub use a::Thing;\n")
    (tmp_path / "a.rs").write_text("// crate::b\nuse std::fmt;\npub struct Thing;\n")
    (tmp_path / "b.rs").write_text("use crate::{Thing, a::{self, Thing as T}};\n")
    assert Crate(tmp_path).graph() == {"crate": set(), "crate::a": set(), "crate::b": {"crate::a"}}
    (tmp_path / "a.rs").write_text("pub struct Thing(super::b::Other);\n")
    assert cycle(Crate(tmp_path).graph())
