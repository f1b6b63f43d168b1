"""install(), uninstall() and `python -m p2pclient_rs run`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import hivemind_tree
import pytest

import p2pclient_rs
from p2pclient_rs.install import KNOWN_HIVEMIND

pytestmark = pytest.mark.independent

PEER_ID = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7"


@pytest.fixture(autouse=True)
def swap_undone() -> Iterator[None]:
    yield
    p2pclient_rs.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "p2pclient"]:
        del sys.modules[name]


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called p2pclient that is not ours."""
    package = tmp_path / "site" / "p2pclient"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("original = True\n")
    (package / "dht.py").write_text("original = True\n")
    (package / "only_in_original.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_imports_give_the_dialects_own_modules_under_both_names() -> None:
    p2pclient_rs.install()
    import p2pclient.pb.p2pd_pb2 as p
    from p2pclient import config, dht
    from p2pclient.libp2p_stubs.peer.id import ID

    import p2pclient_rs.p2pclient.config as own_config
    import p2pclient_rs.p2pclient.dht as own_dht
    import p2pclient_rs.p2pclient.pb.p2pd_pb2 as own_p

    assert p is own_p
    assert p.__name__ == "p2pclient_rs.p2pclient.pb.p2pd_pb2"
    assert dht is own_dht
    assert config is own_config
    assert ID is p2pclient_rs.PeerID


def test_the_package_brings_the_modules_it_uses_as_the_original_does() -> None:
    p2pclient_rs.install()
    package = importlib.import_module("p2pclient")
    assert sys.modules["p2pclient.control"] is package.control
    assert sys.modules["p2pclient.pb.p2pd_pb2"] is package.pb.p2pd_pb2


def test_nothing_is_imported_until_asked_for() -> None:
    code = dedent("""
        import sys, p2pclient_rs
        before = set(sys.modules)
        report = p2pclient_rs.install()
        assert not {"multiaddr", "google.protobuf", "p2pclient_rs.p2pclient"} & set(sys.modules)
        assert set(sys.modules) == before, set(sys.modules) - before
        import p2pclient.config
        assert "p2pclient_rs.p2pclient.daemon" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_original_is_hidden_while_installed_and_back_after(original: Path) -> None:
    report = p2pclient_rs.install()
    assert report.replaced[0].original == str(original / "__init__.py")
    assert report.replaced[0].imported == ()
    assert not hasattr(importlib.import_module("p2pclient"), "original")
    with pytest.raises(ModuleNotFoundError, match=r"p2pclient\.only_in_original") as raised:
        importlib.import_module("p2pclient.only_in_original")
    assert raised.value.name == "p2pclient.only_in_original"
    p2pclient_rs.uninstall()
    assert importlib.import_module("p2pclient").original
    assert importlib.import_module("p2pclient.dht").original


def test_modules_of_the_original_imported_before_are_put_back(original: Path) -> None:
    before = importlib.import_module("p2pclient"), importlib.import_module("p2pclient.dht")
    report = p2pclient_rs.install()
    assert report.replaced[0].imported == ("p2pclient", "p2pclient.dht")
    assert "already imported: p2pclient, p2pclient.dht" in repr(report)
    assert not hasattr(importlib.import_module("p2pclient.dht"), "original")
    p2pclient_rs.uninstall()
    assert (sys.modules["p2pclient"], sys.modules["p2pclient.dht"]) == before
    assert before[0].dht is before[1]


def test_without_an_original_there_is_nothing_after_uninstall() -> None:
    if importlib.util.find_spec("p2pclient"):
        pytest.skip("the original is installed here")
    assert "original not installed" in repr(p2pclient_rs.install())
    importlib.import_module("p2pclient.dht")
    p2pclient_rs.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("p2pclient")


def test_both_are_idempotent() -> None:
    finders = list(sys.meta_path)
    p2pclient_rs.uninstall()
    assert sys.meta_path == finders
    report = p2pclient_rs.install()
    assert p2pclient_rs.install() is report
    assert len(sys.meta_path) == len(finders) + 1
    p2pclient_rs.uninstall()
    p2pclient_rs.uninstall()
    assert sys.meta_path == finders


def test_many_threads_may_install_and_import_at_once() -> None:
    barrier = threading.Barrier(8)
    seen: list[object] = []

    def swap_and_import() -> None:
        barrier.wait()
        p2pclient_rs.install()
        seen.append(importlib.import_module("p2pclient.libp2p_stubs.peer.id").ID)

    threads = [threading.Thread(target=swap_and_import) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [p2pclient_rs.PeerID] * 8


def test_reload_works_under_the_alias() -> None:
    p2pclient_rs.install()
    config = importlib.import_module("p2pclient.config")
    vars(config)["control_maddr_str"] = "/unix/elsewhere"
    assert importlib.reload(config) is config
    assert config.control_maddr_str == "/unix/tmp/p2pd.sock"
    package = importlib.import_module("p2pclient")
    assert importlib.reload(package) is package


def test_ids_pickle_while_installed_and_unpickle_after() -> None:
    p2pclient_rs.install()
    cls = importlib.import_module("p2pclient.libp2p_stubs.peer.id").ID
    pickled = pickle.dumps(cls.from_base58(PEER_ID))
    assert pickle.loads(pickled) == PEER_ID
    p2pclient_rs.uninstall()
    assert pickle.loads(pickled) == PEER_ID


def test_the_metadata_of_distributions_is_untouched() -> None:
    def version() -> str | None:
        try:
            return importlib.metadata.version("p2pclient")
        except importlib.metadata.PackageNotFoundError:
            return None

    before = version()
    p2pclient_rs.install()
    assert version() == before


def test_a_missing_dependency_is_named_with_what_brings_it() -> None:
    code = dedent("""
        import sys, p2pclient_rs
        sys.modules["multiaddr"] = None
        p2pclient_rs.install()
        import p2pclient
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'p2pclient-rs[p2pclient]'" in result.stderr.splitlines()[-1]
    assert "multiaddr" in result.stderr.splitlines()[-1]


# --- hivemind: in processes of their own, since its modules stay imported ---

WHERE = """
import sys, importlib
def where():
    control = importlib.import_module("hivemind.p2p.p2p_daemon_bindings.control")
    client = importlib.import_module("hivemind.p2p.p2p_daemon_bindings.p2pclient")
    found = [control.ControlClient, control.DaemonConnector,
             client.Client, client.ControlClient, client.DaemonConnector]
    (package,) = {cls.__module__.partition(".")[0] for cls in found}
    return package
"""


@pytest.fixture(scope="module")
def hivemind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to import hivemind from."""
    return hivemind_tree.make(tmp_path_factory.mktemp("hivemind"))


def run_with(path: Path, code: str, *args: str, **more: str) -> str:
    """What a program prints that finds packages in ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path), **more}
    environment["PYTHONWARNINGS"] = "ignore:p2pclient_rs was built:RuntimeWarning"
    command = [sys.executable, *args, "-c", WHERE + dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hivemind_gets_our_clients_and_then_its_own_back(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import p2pclient_rs
        p2pclient_rs.install()
        assert "hivemind" not in sys.modules
        assert where() == "p2pclient_rs"
        from hivemind.p2p.p2p_daemon_bindings import control
        import p2pclient_rs.hivemind.control as ours
        # What it takes and gives is hivemind's.
        assert ours.PeerID is control.PeerID and ours.P2PDaemonError is control.P2PDaemonError
        # The module looks as it would without us.
        import importlib.machinery, inspect
        assert type(control.__loader__) is importlib.machinery.SourceFileLoader
        assert control.__spec__.loader is control.__loader__
        assert "class ControlClient" in inspect.getsource(control)
        importlib.reload(control)
        assert where() == "p2pclient_rs"
        p2pclient_rs.uninstall()
        assert where() == "hivemind"
        """,
    )


P2P_PROGRAM = """
import asyncio
from hivemind.p2p import P2P
from hivemind.proto import test_pb2

async def double(request, context):
    return test_pb2.TestResponse(number=2 * request.number)

async def squares(requests, context):
    async for request in requests:
        yield test_pb2.TestResponse(number=request.number**2)

async def numbers(count):
    for number in range(count):
        yield test_pb2.TestRequest(number=number)

async def echo(info, reader, writer):
    await P2P.send_raw_data(await P2P.receive_raw_data(reader), writer)
    await reader.read()  # the caller has it all: the daemon may cut short what is closed sooner
    writer.close()

async def main():
    server = await P2P.create()
    client = await P2P.create(initial_peers=await server.get_visible_maddrs())
    replica = await P2P.replicate(client.daemon_listen_maddr)
    assert replica.peer_id == client.peer_id
    print(*client._client.__class__.__module__.split(".")[:1])
    types = {"input_protobuf_type": test_pb2.TestRequest}
    await server.add_protobuf_handler("double", double, **types)
    await server.add_protobuf_handler(
        "squares", squares, **types, stream_input=True, stream_output=True)
    await server.add_binary_stream_handler("echo", echo)
    for p2p in (client, replica):
        reply = await p2p.call_protobuf_handler(
            server.peer_id, "double", test_pb2.TestRequest(number=21), test_pb2.TestResponse)
        replies = await p2p.iterate_protobuf_handler(
            server.peer_id, "squares", numbers(100), test_pb2.TestResponse)
        print(reply.number, [reply.number async for reply in replies])
        _, reader, writer = await p2p.call_binary_stream_handler(server.peer_id, "echo")
        data = bytes(range(256)) * 40_000
        await P2P.send_raw_data(data, writer)
        assert await P2P.receive_raw_data(reader) == data
        writer.close()
    for p2p in (replica, client, server):
        await p2p.shutdown()

asyncio.run(main())
"""


def test_hivemind_s_p2p_does_the_same_with_and_without_the_swap(hivemind: Path) -> None:
    theirs = run_with(hivemind, P2P_PROGRAM).splitlines()
    swap = "import p2pclient_rs; p2pclient_rs.install()"
    ours = run_with(hivemind, swap + P2P_PROGRAM).splitlines()
    assert (theirs.pop(0), ours.pop(0)) == ("hivemind", "p2pclient_rs")
    assert ours == theirs == [f"42 {[number**2 for number in range(100)]}"] * 2


def test_hivemind_imported_before_gets_our_clients_everywhere(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import types
        assert where() == "hivemind"
        from hivemind.p2p.p2p_daemon_bindings import p2pclient
        user, other = types.ModuleType("petals.user"), types.ModuleType("other")
        user.TheClient = other.TheClient = original = p2pclient.Client
        sys.modules.update({"petals.user": user, "other": other, "petals.nothing": None})
        before = {name: dict(vars(module)) for name, module in sys.modules.items()
                  if name.partition(".")[0] in ("hivemind", "petals") and module}
        import p2pclient_rs
        report = p2pclient_rs.install()
        assert report.replaced[1].imported == (
            "hivemind.p2p.p2p_daemon_bindings.control",
            "hivemind.p2p.p2p_daemon_bindings.p2pclient", "petals.user"), report
        assert p2pclient_rs.install() is report
        assert where() == "p2pclient_rs"
        assert user.TheClient is p2pclient.Client
        assert other.TheClient is original
        p2pclient_rs.uninstall()
        assert {name: vars(sys.modules[name]) for name in before} == before
        p2pclient_rs.install()
        assert where() == "p2pclient_rs"
        """,
    )


def test_the_report_says_which_hivemind_it_is(hivemind: Path) -> None:
    output = run_with(hivemind, "import p2pclient_rs; print(p2pclient_rs.install())")
    assert f"hivemind 1.1.12 -> p2pclient_rs.hivemind (original: {hivemind}/hivemind/" in output
    assert "refused" not in output
    nothing = run_with(Path("/nonexistent"), "import p2pclient_rs; print(p2pclient_rs.install())")
    assert "hivemind -> p2pclient_rs.hivemind (original not installed)" in nothing


def test_only_what_is_asked_for_is_replaced(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import p2pclient_rs
        report = p2pclient_rs.install(hivemind=False)
        assert [replacement.name for replacement in report.replaced] == ["p2pclient"]
        assert where() == "hivemind"
        p2pclient_rs.uninstall()
        report = p2pclient_rs.install(p2pclient=False)
        assert [replacement.name for replacement in report.replaced] == ["hivemind"]
        assert where() == "p2pclient_rs"
        import importlib.util
        assert importlib.util.find_spec("p2pclient") is None
        """,
    )


def test_what_is_asked_for_later_is_replaced_too(hivemind: Path) -> None:
    for first, second in (("p2pclient", "hivemind"), ("hivemind", "p2pclient")):
        run_with(
            hivemind,
            f"""
            import p2pclient_rs
            finders = list(sys.meta_path)
            report = p2pclient_rs.install({second}=False)
            assert [replacement.name for replacement in report.replaced] == ["{first}"]
            assert p2pclient_rs.install({second}=False) is report
            report = p2pclient_rs.install()
            names = [replacement.name for replacement in report.replaced]
            assert names == ["p2pclient", "hivemind"]
            assert p2pclient_rs.install({first}=False) is report
            assert where() == "p2pclient_rs"
            import p2pclient
            assert p2pclient.__name__ == "p2pclient_rs.p2pclient"
            p2pclient_rs.uninstall()
            assert sys.meta_path == finders
            assert where() == "hivemind"
            """,
        )


def test_hivemind_asked_for_later_may_be_loaded_by_then(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import p2pclient_rs
        p2pclient_rs.install(hivemind=False)
        assert where() == "hivemind"
        report = p2pclient_rs.install()
        assert "hivemind.p2p.p2p_daemon_bindings.control" in report.replaced[1].imported
        assert where() == "p2pclient_rs"
        """,
    )


def test_another_thread_may_be_importing_hivemind(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import faulthandler, importlib, threading
        import p2pclient_rs
        faulthandler.dump_traceback_later(30, exit=True)
        module = sys.modules["p2pclient_rs.install"]
        control = "hivemind.p2p.p2p_daemon_bindings.control"
        half_way = threading.Event()

        class Gate:
            # What the bindings import calls install(), too.
            def find_spec(self, name, path=None, target=None):
                if name == "hivemind.utils.asyncio" and control in sys.modules:
                    half_way.set()
                    p2pclient_rs.install()

        sys.meta_path.insert(0, Gate())
        examine = module._examine

        def import_meanwhile(*args):
            if not half_way.is_set() and not thread.is_alive():
                thread.start()
                assert half_way.wait(10)
            return examine(*args)

        thread = threading.Thread(target=importlib.import_module, args=(control,))
        module._examine = import_meanwhile
        p2pclient_rs.install()
        thread.join()
        assert where() == "p2pclient_rs"
        """,
    )


@pytest.fixture
def unknown_hivemind(tmp_path: Path) -> Path:
    """A hivemind whose version is not known, nor are its bindings."""
    directory = hivemind_tree.make(tmp_path, "1.3.0")
    p2p = directory / "hivemind" / "p2p"
    source = p2p.resolve()
    p2p.unlink()
    (p2p / "p2p_daemon_bindings").mkdir(parents=True)
    for file in [*source.glob("*.py"), *source.glob("*/*.py")]:
        text = file.read_text() + ("\n# changed\n" if file.name == "control.py" else "")
        (p2p / file.relative_to(source)).write_text(text)
    return directory


def test_an_unknown_hivemind_is_refused_by_its_import_and_nothing_else_is(
    unknown_hivemind: Path,
) -> None:
    output = run_with(
        unknown_hivemind,
        """
        import p2pclient_rs
        report = p2pclient_rs.install()
        assert "does not know the bindings of hivemind 1.3.0" in report.replaced[1].refused
        import p2pclient
        assert p2pclient.__name__ == "p2pclient_rs.p2pclient"
        for _ in range(2):
            try:
                import hivemind
            except p2pclient_rs.UnsupportedVersion as error:
                print(error)
        p2pclient_rs.uninstall()
        assert where() == "hivemind"
        try:
            p2pclient_rs.install()
        except p2pclient_rs.UnsupportedVersion as error:
            print(error)
        assert where() == "hivemind"
        assert "p2pclient" not in sys.modules
        """,
    )
    lines = output.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert f"hivemind 1.3.0 at {unknown_hivemind}" in line
        assert all(version in line for version in KNOWN_HIVEMIND)


def test_a_checkout_with_known_bindings_will_do(tmp_path: Path) -> None:
    directory = hivemind_tree.make(tmp_path, "1.2.0.dev0")
    run_with(
        directory,
        "import p2pclient_rs; p2pclient_rs.install(); assert where() == 'p2pclient_rs'",
    )


# --- processes started afresh ---

PARENT = WHERE + dedent("""
    import multiprocessing

    def child(queue):
        queue.put(where())

    def grandchild(queue, method):
        process = multiprocessing.get_context(method).Process(target=child, args=(queue,))
        process.start()
        process.join()

    if __name__ == "__main__":
        method = sys.argv[1]
        if "install" in sys.argv:
            import p2pclient_rs
            p2pclient_rs.install(p2pclient=False)
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        for target, args in ((child, (queue,)), (grandchild, (queue, method))):
            process = context.Process(target=target, args=args)
            process.start()
            print(queue.get())
            process.join()
        assert "hivemind" not in sys.modules
""")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("how", ["install", "run", "neither"])
def test_children_of_multiprocessing_have_the_swap(
    tmp_path: Path, hivemind: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(hivemind))
    (tmp_path / "parent.py").write_text(PARENT)
    result = python("parent.py", method, how, cwd=tmp_path, ours=how == "run")
    package = "hivemind" if how == "neither" else "p2pclient_rs"
    assert (result.stdout, result.stderr) == (f"{package}\n" * 2, "")


def test_after_uninstall_children_are_told_nothing(hivemind: Path, tmp_path: Path) -> None:
    run_with(
        hivemind,
        """
        import p2pclient_rs, multiprocessing.spawn
        before = multiprocessing.spawn.get_preparation_data
        p2pclient_rs.install()
        assert "p2pclient_rs" in multiprocessing.spawn.get_preparation_data("x")
        p2pclient_rs.uninstall()
        assert multiprocessing.spawn.get_preparation_data is before
        """,
    )


def test_a_child_finds_us_where_only_the_parent_was_told_to_look(
    tmp_path: Path, hivemind: Path
) -> None:
    # As a zip application or a notebook would: no interpreter knows the path by itself.
    code = PARENT.replace("import p2pclient_rs", "sys.path += sys.argv[3:]; import p2pclient_rs")
    (tmp_path / "parent.py").write_text(code)
    paths = [str(hivemind), *sys.path[1:]]
    command = [sys.executable, "-I", "-S", "parent.py", "spawn", "install", *paths]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "p2pclient_rs\n" * 2, result.stderr


def test_python_processes_below_a_program_run_by_us_have_the_swap(
    tmp_path: Path, hivemind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(hivemind))
    (tmp_path / "grandchild.py").write_text(WHERE + "print(where())\n")
    (tmp_path / "child.py").write_text(
        "import subprocess, sys; subprocess.check_call([sys.executable, 'grandchild.py'])\n"
        "import hivemind; print(hivemind.p2p.p2p_daemon.p2pclient.Client.__module__)\n"
    )
    (tmp_path / "program.py").write_text(
        "import subprocess, sys; subprocess.check_call([sys.executable, 'child.py'])\n"
    )
    result = python("program.py", cwd=tmp_path, ours=True)
    assert result.stdout == "p2pclient_rs\np2pclient_rs.hivemind.p2pclient\n", result.stderr


def test_python_processes_below_see_what_they_would_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys; sys.customized = __file__\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    (tmp_path / "child.py").write_text(
        "import sys, sitecustomize\n"
        "print(sys.path, sys.customized, sitecustomize.__file__)\n"
        "print('p2pclient_rs' in sys.modules, 'anyio' in sys.modules)\n"
    )
    (tmp_path / "program.py").write_text(
        "import subprocess, sys; subprocess.check_call([sys.executable, 'child.py'])\n"
    )
    theirs = python("program.py", cwd=tmp_path, ours=False)
    ours = python("program.py", cwd=tmp_path, ours=True)
    assert str(site / "sitecustomize.py") in theirs.stdout
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


@pytest.mark.parametrize("value", ["", ":", "{site}:", ":{site}", "{site}::{site}"])
def test_pythonpath_means_below_what_it_would_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    # An empty entry is the current directory, but not if there is no other.
    monkeypatch.setenv("PYTHONPATH", value.format(site=tmp_path / "site"))
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "child.py").write_text("import sys; print(sys.path)\n")
    (tmp_path / "programs" / "program.py").write_text(
        "import subprocess, sys; subprocess.check_call([sys.executable, 'programs/child.py'])\n"
    )
    theirs = python("programs/program.py", cwd=tmp_path, ours=False)
    ours = python("programs/program.py", cwd=tmp_path, ours=True)
    assert theirs.stdout.startswith("[")
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


def test_two_threads_may_be_the_first_to_import_what_is_replaced_below() -> None:
    code = """
        import runpy, sys
        sys.modules["sitecustomize"] = sys
        runpy.run_path(sys.argv[1])
        (trigger,) = [f for f in sys.meta_path if type(f).__name__ == "_Trigger"]
        # The other one has come so far, and somebody's finder is of the old kind.
        sys.meta_path.remove(trigger)
        class OfTheOldKind:
            def find_module(self, name, path=None): ...

        sys.meta_path.insert(0, OfTheOldKind())
        assert trigger.find_spec("p2pclient") is not None
    """
    file = Path(p2pclient_rs.__file__).parent / "children" / "sitecustomize.py"
    subprocess.run([sys.executable, "-c", dedent(code), str(file)], check=True)


def test_a_python_below_that_has_no_p2pclient_rs_says_so(
    tmp_path: Path, hivemind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "import sys; sys.modules['p2pclient_rs'] = None; import hivemind"
    (tmp_path / "hivemind.py").write_text("print('its own')")
    (tmp_path / "program.py").write_text(
        f"import subprocess, sys; subprocess.check_call([sys.executable, '-c', {hidden!r}])\n"
    )
    result = python("program.py", cwd=tmp_path, ours=True)
    assert result.stdout == "its own\n"
    assert "hivemind runs as it is" in result.stderr


# --- python -m p2pclient_rs run ---

PROBE = dedent("""
    import sys, inspect
    main = sys.modules["__main__"]
    spec = __spec__ and (__spec__.name, __spec__.origin)
    print(sys.argv, sys.path, __name__, __file__, spec, type(__loader__), __package__)
    print(main.__dict__ is globals(), __builtins__, inspect.currentframe().f_code.co_filename)
    print(sorted(name for name in globals() if name != "__annotations__"))
""")


def python(*args: str, cwd: Path, ours: bool) -> subprocess.CompletedProcess[str]:
    flags = [arg for arg in args[:1] if arg == "-P"]
    swap = ["-m", "p2pclient_rs", "run"] if ours else []
    command = [sys.executable, *flags, *swap, *args[len(flags) :]]
    # A debug build says so with a warning; that is none of the program's.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:p2pclient_rs was built:RuntimeWarning"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The same program as a script, a module, a directory and a zip file."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "link.py").symlink_to("package/__main__.py")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(PROBE)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "probe.py -m x -- --version -h",
        "./package/../probe.py",
        "link.py",
        "package a",
        "app.zip b",
        "-m probe -x",
        "-m package y",
        *(["-P probe.py", "-P package"] if sys.version_info >= (3, 11) else []),
    ],
)
def test_a_program_sees_what_it_would_see_without_us(programs: Path, command: str) -> None:
    theirs = python(*command.split(), cwd=programs, ours=False)
    ours = python(*command.split(), cwd=programs, ours=True)
    assert theirs.returncode == 0, theirs.stderr
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, 0)


@pytest.mark.parametrize(
    "program",
    [
        "def f():\n    raise ValueError('it')\nf()",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('it') from e",
        "x = = 1",
        "raise SystemExit(7)",
        "import sys; sys.exit('said why')",
        "raise KeyboardInterrupt",
        "import sys; sys.excepthook = lambda *a: print('hook', a[1]); raise ValueError('it')",
        "import atexit; atexit.register(print, __name__); raise ValueError('it')",
    ],
)
def test_failures_look_as_they_would_without_us(tmp_path: Path, program: str) -> None:
    (tmp_path / "program.py").write_text(program)
    theirs = python("program.py", cwd=tmp_path, ours=False)
    ours = python("program.py", cwd=tmp_path, ours=True)
    assert theirs.returncode != 0
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)
    assert ours.returncode == theirs.returncode


def test_a_program_can_pickle_its_own_classes_after_its_end(tmp_path: Path) -> None:
    program = "import atexit, pickle\nclass C: pass\natexit.register(lambda: pickle.dumps(C()))"
    (tmp_path / "program.py").write_text(program)
    result = python("program.py", cwd=tmp_path, ours=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_program_run_by_us_gets_the_swap(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(original.parent))
    (tmp_path / "program.py").write_text("import p2pclient; print(p2pclient.__name__)")
    result = python("program.py", cwd=tmp_path, ours=True)
    assert result.stdout == "p2pclient_rs.p2pclient\n", result.stderr


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("", "which command?"),
        ("ran x.py", "unknown command or option 'ran'"),
        ("run", "run: which program?"),
        ("run -m", "run: which program?"),
        ("run --fast x.py", "run: unknown option --fast"),
        ("run -m --fast x", "run: unknown option --fast"),
        ("run nothere.py", "can't open 'nothere.py': No such file or directory"),
    ],
)
def test_wrong_usage_is_explained(tmp_path: Path, args: str, complaint: str) -> None:
    command = [sys.executable, "-m", "p2pclient_rs", *args.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"python -m p2pclient_rs: {complaint}"
    assert result.stdout == ""


def test_version_and_help() -> None:
    def run(option: str) -> str:
        command = [sys.executable, "-m", "p2pclient_rs", option]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert run("--version") == f"p2pclient_rs {p2pclient_rs.__version__}\n"
    assert run("--help").startswith("usage: python -m p2pclient_rs ")
