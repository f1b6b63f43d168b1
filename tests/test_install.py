"""install(), uninstall() and `python -m p2pclient_rs run`."""

from __future__ import annotations

import ast
import asyncio
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import threading
import types
import warnings
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import anyio
import forking
import hivemind_tree
import pytest

import p2pclient_rs
from p2pclient_rs._native import Reconnection
from p2pclient_rs.compat import reconnect
from p2pclient_rs.compat.install import KNOWN_HIVEMIND

pytestmark = pytest.mark.independent

PEER_ID = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7"


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    p2pclient_rs.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "p2pclient"]:
        del sys.modules[name]


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package named p2pclient that is not ours."""
    package = tmp_path / "site" / "p2pclient"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("original = True\n")
    (package / "dht.py").write_text("original = True\n")
    (package / "only_in_original.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_imports_by_either_name_give_the_same_module() -> None:
    p2pclient_rs.install()
    import p2pclient.pb.p2pd_pb2 as p
    from p2pclient import config, dht
    from p2pclient.libp2p_stubs.peer.id import ID

    import p2pclient_rs.compat.p2pclient.config as own_config
    import p2pclient_rs.compat.p2pclient.dht as own_dht
    import p2pclient_rs.compat.p2pclient.pb.p2pd_pb2 as own_p

    assert p is own_p
    assert p.__name__ == "p2pclient_rs.compat.p2pclient.pb.p2pd_pb2"
    assert dht is own_dht
    assert config is own_config
    assert ID is p2pclient_rs.PeerID


def test_package_has_the_modules_it_imports_as_attributes() -> None:
    p2pclient_rs.install()
    package = importlib.import_module("p2pclient")
    assert sys.modules["p2pclient.control"] is package.control
    assert sys.modules["p2pclient.pb.p2pd_pb2"] is package.pb.p2pd_pb2


def test_install_imports_nothing_ahead_of_time() -> None:
    code = dedent("""
        import sys, p2pclient_rs
        before = set(sys.modules)
        report = p2pclient_rs.install()
        layer = "p2pclient_rs.compat.p2pclient"
        assert not {"multiaddr", "google.protobuf", layer} & set(sys.modules)
        assert set(sys.modules) == before, set(sys.modules) - before
        import p2pclient.config
        assert "p2pclient_rs.compat.p2pclient.daemon" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_original_is_hidden_until_uninstall(original: Path) -> None:
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


def test_uninstall_restores_modules_imported_before(original: Path) -> None:
    before = importlib.import_module("p2pclient"), importlib.import_module("p2pclient.dht")
    report = p2pclient_rs.install()
    assert report.replaced[0].imported == ("p2pclient", "p2pclient.dht")
    assert "already imported: p2pclient, p2pclient.dht" in repr(report)
    assert not hasattr(importlib.import_module("p2pclient.dht"), "original")
    p2pclient_rs.uninstall()
    assert (sys.modules["p2pclient"], sys.modules["p2pclient.dht"]) == before
    assert before[0].dht is before[1]


def test_uninstall_without_an_original_leaves_no_p2pclient() -> None:
    if importlib.util.find_spec("p2pclient"):
        pytest.skip("the original is installed here")
    assert "original not installed" in repr(p2pclient_rs.install())
    importlib.import_module("p2pclient.dht")
    p2pclient_rs.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("p2pclient")


def test_install_and_uninstall_are_idempotent() -> None:
    finders = list(sys.meta_path)
    p2pclient_rs.uninstall()
    assert sys.meta_path == finders
    report = p2pclient_rs.install()
    assert p2pclient_rs.install() is report
    assert len(sys.meta_path) == len(finders) + 1
    p2pclient_rs.uninstall()
    p2pclient_rs.uninstall()
    assert sys.meta_path == finders


def test_many_threads_can_install_and_import_at_once() -> None:
    barrier = threading.Barrier(8)
    seen: list[object] = []

    def install_and_import() -> None:
        barrier.wait()
        p2pclient_rs.install()
        seen.append(importlib.import_module("p2pclient.libp2p_stubs.peer.id").ID)

    threads = [threading.Thread(target=install_and_import) for _ in range(8)]
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


def test_ids_pickled_while_installed_unpickle_after_uninstall() -> None:
    p2pclient_rs.install()
    cls = importlib.import_module("p2pclient.libp2p_stubs.peer.id").ID
    pickled = pickle.dumps(cls.from_base58(PEER_ID))
    assert pickle.loads(pickled) == PEER_ID
    p2pclient_rs.uninstall()
    assert pickle.loads(pickled) == PEER_ID


def test_metadata_of_distributions_is_unchanged() -> None:
    def version() -> str | None:
        try:
            return importlib.metadata.version("p2pclient")
        except importlib.metadata.PackageNotFoundError:
            return None

    before = version()
    p2pclient_rs.install()
    assert version() == before


def test_missing_dependency_is_named_with_the_extra_to_install() -> None:
    code = dedent("""
        import sys, p2pclient_rs
        sys.modules["multiaddr"] = None
        p2pclient_rs.install()
        import p2pclient
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'p2pclient-rs[p2pclient]'" in result.stderr.splitlines()[-1]
    assert "multiaddr" in result.stderr.splitlines()[-1]


# --- the installed p2pclient's version ---


def p2pclient_of(site: Path, version: str | None, *, dist_info: str | None = None) -> Path:
    """Makes a p2pclient with some of the original's modules."""
    package = site / "p2pclient"
    (package / "pb").mkdir(parents=True)
    (package / "__init__.py").write_text("from .p2pclient import Client\noriginal = True\n")
    (package / "p2pclient.py").write_text("class Client: ...\n")
    if version is not None:
        (package / "_version.py").write_text(f'__version__ = "{version}"\n')
    if dist_info is not None:
        folder = site / f"p2pclient-{dist_info}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: p2pclient\nVersion: {dist_info}\n")
    return package


def test_p2pclient_0_3_0_is_replaced_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p2pclient_of(tmp_path, "0.3.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (entry, _) = p2pclient_rs.install().replaced
    assert (entry.version, entry.refused, entry.warning) == ("0.3.0", None, None)
    assert importlib.import_module("p2pclient").Client.__module__.startswith("p2pclient_rs")


@pytest.mark.parametrize("version", ["0.2.0", "0.2.1"])
def test_p2pclient_0_2_is_replaced_with_a_warning_that_lists_the_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    p2pclient_of(tmp_path, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(p2pclient_rs.CompatibilityWarning) as caught:
        report = p2pclient_rs.install()
    (warning,) = caught
    assert f"p2pclient {version}" in str(warning.message)
    assert "GoDaemon listens" in str(warning.message)
    assert warning.category is p2pclient_rs.CompatibilityWarning
    assert warning.filename == __file__
    assert report.replaced[0].warning == str(warning.message)
    assert str(warning.message) in repr(report)
    assert p2pclient_rs.install() is report  # A second warning would be an error.
    assert importlib.import_module("p2pclient").Client.__module__.startswith("p2pclient_rs")


UNKNOWN = {
    "older, by its distribution": (None, "0.1.3"),
    "older, without a version": (None, None),
    "newer": ("0.4.0", None),
    "newer, with the distribution of a known one": ("1.0", "0.3.0"),
}


@pytest.mark.parametrize(("version", "dist_info"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_p2pclient_is_refused_by_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, dist_info: str | None
) -> None:
    package = p2pclient_of(tmp_path / "site", version, dist_info=dist_info)
    # Another copy, later on the path.
    p2pclient_of(tmp_path / "other", "0.3.0", dist_info="0.3.0")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    report = p2pclient_rs.install()
    name = f"p2pclient {version or dist_info or '(unknown version)'} at {package}"
    assert report.replaced[0].refused is not None
    assert name in report.replaced[0].refused
    for module in ("p2pclient", "p2pclient.dht", "p2pclient"):
        with pytest.raises(p2pclient_rs.UnsupportedVersion, match="does not know") as raised:
            importlib.import_module(module)
        assert name in str(raised.value)
        assert "0.2.0, 0.2.1, 0.3.0" in str(raised.value)
    p2pclient_rs.uninstall()
    assert importlib.import_module("p2pclient").original


def test_unknown_p2pclient_imported_before_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p2pclient_of(tmp_path, "0.4.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    original, finders = importlib.import_module("p2pclient"), list(sys.meta_path)
    with pytest.raises(p2pclient_rs.UnsupportedVersion, match=r"p2pclient 0\.4\.0"):
        p2pclient_rs.install()
    assert sys.meta_path == finders
    assert sys.modules["p2pclient"] is original
    (entry,) = p2pclient_rs.install(p2pclient=False).replaced
    assert entry.name == "hivemind"


def test_unknown_p2pclient_is_replaced_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = p2pclient_of(tmp_path, "0.4.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert p2pclient_rs.install().replaced[0].refused
    with pytest.warns(p2pclient_rs.UnknownVersionWarning) as caught:
        report = p2pclient_rs.install(force=True)
    assert f"p2pclient 0.4.0 at {package}" in str(caught[0].message)
    assert (report.replaced[0].version, report.replaced[0].refused) == ("0.4.0", None)
    assert importlib.import_module("p2pclient").Client.__module__.startswith("p2pclient_rs")


def test_version_is_read_from_an_archive_and_from_a_module_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        archive.writestr("p2pclient/__init__.py", "")
        archive.writestr("p2pclient/p2pclient.py", "")
        archive.writestr("p2pclient/_version.py", "__version__ = '0.5.0'")
    monkeypatch.syspath_prepend(str(tmp_path / "site.zip"))
    assert p2pclient_rs.install().replaced[0].version == "0.5.0"
    p2pclient_rs.uninstall()
    module: Any = types.ModuleType("p2pclient")
    module.__version__ = "0.6.0"
    monkeypatch.setitem(sys.modules, "p2pclient", module)
    with pytest.raises(p2pclient_rs.UnsupportedVersion, match=r"p2pclient 0\.6\.0"):
        p2pclient_rs.install()


def test_directory_without_modules_is_no_p2pclient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p2pclient").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    report = p2pclient_rs.install()
    assert "p2pclient -> p2pclient_rs.compat.p2pclient (original not installed)" in repr(report)
    assert importlib.import_module("p2pclient").Client.__module__.startswith("p2pclient_rs")


@pytest.mark.anyio
async def test_messages_pass_over_streams_with_only_the_methods_of_anyio_1() -> None:
    p2pclient_rs.install()
    utils, serialization = (
        importlib.import_module(f"p2pclient.{name}") for name in ("utils", "serialization")
    )
    pb = importlib.import_module("p2pclient.pb.p2pd_pb2")

    class Stream(io.BytesIO):
        async def receive_exactly(self, n: int) -> bytes:
            return self.read(n)

        async def send_all(self, data: bytes) -> None:
            self.write(data)

    stream = Stream()
    await serialization.write_unsigned_varint(stream, 300)
    await utils.write_pbmsg(stream, pb.PeerInfo(id=b"id"))
    stream.seek(0)
    assert await serialization.read_unsigned_varint(stream) == 300
    await utils.read_pbmsg_safe(stream, message := pb.PeerInfo())
    assert message.id == b"id"
    with pytest.raises(anyio.IncompleteRead):
        await serialization.read_unsigned_varint(stream)


# --- hivemind: each test in its own process, since hivemind's modules stay imported ---

WHERE = """
import sys, importlib
def where(name="hivemind"):
    control = importlib.import_module(f"{name}.p2p.p2p_daemon_bindings.control")
    client = importlib.import_module(f"{name}.p2p.p2p_daemon_bindings.p2pclient")
    found = [control.ControlClient, control.DaemonConnector,
             client.Client, client.ControlClient, client.DaemonConnector]
    (package,) = {cls.__module__.partition(".")[0] for cls in found}
    return package
"""


@pytest.fixture(scope="module")
def hivemind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory to import hivemind from."""
    return hivemind_tree.make(tmp_path_factory.mktemp("hivemind"))


def run_with(path: Path, code: str, *args: str, more_args: Sequence[str] = (), **more: str) -> str:
    """Runs a program that finds packages in ``path``, and returns its output."""
    environment = {**os.environ, "PYTHONPATH": str(path), **more}
    environment["PYTHONWARNINGS"] = "ignore:p2pclient_rs was built:RuntimeWarning"
    command = [sys.executable, *args, "-c", WHERE + dedent(code), *more_args]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hivemind_gets_our_clients_and_its_own_after_uninstall(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import p2pclient_rs
        p2pclient_rs.install()
        assert "hivemind" not in sys.modules
        assert where() == "p2pclient_rs"
        from hivemind.p2p.p2p_daemon_bindings import control
        import p2pclient_rs.compat.hivemind.control as ours
        # The types are hivemind's.
        assert ours.PeerID is control.PeerID and ours.P2PDaemonError is control.P2PDaemonError
        # The module's attributes are those that it has without the import hook.
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
    await reader.read()  # Wait for the caller: the daemon may lose data before an early close.
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


def test_hiveminds_p2p_behaves_the_same_with_and_without_install(hivemind: Path) -> None:
    theirs = run_with(hivemind, P2P_PROGRAM).splitlines()
    install = "import p2pclient_rs; p2pclient_rs.install()"
    ours = run_with(hivemind, install + P2P_PROGRAM).splitlines()
    assert (theirs.pop(0), ours.pop(0)) == ("hivemind", "p2pclient_rs")
    assert ours == theirs == [f"42 {[number**2 for number in range(100)]}"] * 2


def test_hivemind_imported_before_gets_our_clients_in_all_modules(hivemind: Path) -> None:
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


def test_report_names_the_hivemind_that_is_replaced(hivemind: Path) -> None:
    output = run_with(hivemind, "import p2pclient_rs; print(p2pclient_rs.install())")
    layer = "p2pclient_rs.compat.hivemind"
    assert f"hivemind 1.1.12 -> {layer} (original: {hivemind}/hivemind/" in output
    assert "refused" not in output
    nothing = run_with(Path("/nonexistent"), "import p2pclient_rs; print(p2pclient_rs.install())")
    assert "hivemind -> p2pclient_rs.compat.hivemind (original not installed)" in nothing


def test_only_requested_packages_are_replaced(hivemind: Path) -> None:
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


def test_packages_requested_later_are_replaced_too(hivemind: Path) -> None:
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
            assert p2pclient.__name__ == "p2pclient_rs.compat.p2pclient"
            p2pclient_rs.uninstall()
            assert sys.meta_path == finders
            assert where() == "hivemind"
            """,
        )


def test_hivemind_requested_later_may_be_imported_already(hivemind: Path) -> None:
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


def test_install_waits_for_a_thread_that_imports_hivemind(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import faulthandler, importlib, threading
        import p2pclient_rs
        faulthandler.dump_traceback_later(30, exit=True)
        module = sys.modules["p2pclient_rs.compat.install"]
        control = "hivemind.p2p.p2p_daemon_bindings.control"
        half_way = threading.Event()

        class Gate:
            # A module that the bindings import calls install(), too.
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
    """The directory of a hivemind with an unknown version and unknown bindings."""
    directory = hivemind_tree.make(tmp_path, "1.3.0")
    p2p = directory / "hivemind" / "p2p"
    source = p2p.resolve()
    p2p.unlink()
    (p2p / "p2p_daemon_bindings").mkdir(parents=True)
    for file in [*source.glob("*.py"), *source.glob("*/*.py")]:
        text = file.read_text() + ("\n# changed\n" if file.name == "control.py" else "")
        (p2p / file.relative_to(source)).write_text(text)
    return directory


def test_unknown_hivemind_alone_is_refused_by_its_import(
    unknown_hivemind: Path,
) -> None:
    output = run_with(
        unknown_hivemind,
        """
        import p2pclient_rs
        report = p2pclient_rs.install()
        assert "does not know the bindings of hivemind 1.3.0" in report.replaced[1].refused
        import p2pclient
        assert p2pclient.__name__ == "p2pclient_rs.compat.p2pclient"
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


def test_checkout_with_known_bindings_is_replaced(tmp_path: Path) -> None:
    directory = hivemind_tree.make(tmp_path, "1.2.0.dev0")
    run_with(
        directory,
        "import p2pclient_rs; p2pclient_rs.install(); assert where() == 'p2pclient_rs'",
    )


# --- forks: unknown bindings by force, and copies in other packages ---


@pytest.fixture
def fork(unknown_hivemind: Path) -> Path:
    """The folder of an unknown hivemind's bindings."""
    return unknown_hivemind / "hivemind" / "p2p" / "p2p_daemon_bindings"


@pytest.mark.parametrize("imported", ["", "import hivemind"])
def test_fork_is_replaced_by_force_with_a_warning_that_names_changed_files(
    fork: Path, unknown_hivemind: Path, imported: str
) -> None:
    with (fork / "utils.py").open("a") as file:
        file.write("# changed\n")
    run_with(
        unknown_hivemind,
        f"""
        import warnings
        import p2pclient_rs
        {imported}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = p2pclient_rs.install(force=True)
            assert p2pclient_rs.install(force=True) is report
        (warning,) = caught
        assert warning.category is p2pclient_rs.UnknownVersionWarning
        assert "hivemind 1.3.0 at {unknown_hivemind}" in str(warning.message)
        assert "control.py, utils.py differ" in str(warning.message), warning.message
        assert report.replaced[1].differs == ("control.py", "utils.py")
        assert report.replaced[1].warning == str(warning.message)
        warnings.simplefilter("error")
        assert where() == "p2pclient_rs"
        p2pclient_rs.uninstall()
        assert where() == "hivemind"
        """,
    )


def test_refused_version_can_be_forced_later(unknown_hivemind: Path) -> None:
    run_with(
        unknown_hivemind,
        """
        import warnings
        import p2pclient_rs
        assert p2pclient_rs.install().replaced[1].refused
        warnings.simplefilter("ignore", p2pclient_rs.UnknownVersionWarning)
        assert not p2pclient_rs.install(force=True).replaced[1].refused
        assert where() == "p2pclient_rs"
        """,
    )


def test_known_version_with_a_changed_file_is_replaced_with_a_warning(
    tmp_path: Path, unknown_hivemind: Path
) -> None:
    init = unknown_hivemind / "hivemind" / "__init__.py"
    init.write_text(init.read_text().replace("1.3.0", "1.1.12"))
    run_with(
        unknown_hivemind,
        """
        import warnings
        import p2pclient_rs
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p2pclient_rs.install()
        assert [w.category for w in caught] == [p2pclient_rs.UnknownVersionWarning]
        assert "control.py differs" in str(caught[0].message)
        assert where() == "p2pclient_rs"
        """,
    )


UNUSABLE = {
    "no class": ("control.py", "class ControlClient", "class Other", "control.py has no Control"),
    "no types": ("datastructures.py", "class StreamInfo", "class Other", "has no StreamInfo"),
    "no errors": ("utils.py", "class DispatchFailure", "class Other", "has no DispatchFailure"),
    "no file": ("p2pclient.py", None, None, "there is no p2p/p2p_daemon_bindings/p2pclient.py"),
    "not Python": ("p2pclient.py", "class Client", "class class", "not valid Python"),
}


@pytest.mark.parametrize(("file", "old", "new", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_fork_without_the_needed_classes_is_refused_even_by_force(
    fork: Path, unknown_hivemind: Path, file: str, old: str | None, new: str, reason: str
) -> None:
    if old is None:
        (fork / file).unlink()
    else:
        (fork / file).write_text((fork / file).read_text().replace(old, new))
    run_with(
        unknown_hivemind,
        f"""
        import p2pclient_rs
        report = p2pclient_rs.install(force=True)
        assert {reason!r} in (report.replaced[1].refused or ""), report
        try:
            import hivemind.p2p.p2p_daemon_bindings.control
        except p2pclient_rs.UnsupportedVersion as error:
            assert {reason!r} in str(error)
        else:
            raise AssertionError("imported")
        """,
    )


@pytest.mark.parametrize("first", [True, False])
def test_import_fails_if_classes_turn_out_to_be_missing(
    fork: Path, unknown_hivemind: Path, first: bool
) -> None:
    (fork / "control.py").write_text("from hivemind.p2p.p2p_daemon_bindings.utils import *\n")
    (fork / "p2pclient.py").write_text("class Client: ...\n")
    load = "importlib.import_module('hivemind.p2p.p2p_daemon_bindings.control')"
    (unknown_hivemind / "hivemind" / "p2p" / "__init__.py").write_text("")
    run_with(
        unknown_hivemind,
        f"""
        import warnings
        import p2pclient_rs
        warnings.simplefilter("ignore", p2pclient_rs.UnknownVersionWarning)
        finders = list(sys.meta_path)
        try:
            {load if first else "pass"}
            p2pclient_rs.install(force=True)
            {"pass" if first else load}
        except p2pclient_rs.UnsupportedVersion as error:
            assert "has no ControlClient and no DaemonConnector" in str(error), error
        else:
            raise AssertionError("replaced")
        assert {not first} or sys.meta_path == finders
        """,
    )


COPY = "fork.vendor.hivemind"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory to import hivemind, and a copy of it, from."""
    directory = hivemind_tree.make(tmp_path_factory.mktemp("copy"))
    hivemind_tree.make_copy(directory, COPY)
    return directory


@pytest.mark.parametrize("imported", ["", f"import {COPY}, hivemind"])
def test_copy_in_another_package_gets_clients_of_its_own(copy: Path, imported: str) -> None:
    run_with(
        copy,
        f"""
        {imported}
        before = {{n: dict(vars(m)) for n, m in sys.modules.items()
                  if n.startswith(("hivemind", "fork"))}}
        import warnings
        import p2pclient_rs
        warnings.simplefilter("error")
        report = p2pclient_rs.install(hivemind_package={COPY!r})
        assert [entry.name for entry in report.replaced] == ["p2pclient", {COPY!r}]
        assert report.replaced[1].version == "1.1.12+fork"
        assert "fork" not in sys.modules or {bool(imported)}
        assert where({COPY!r}) == "p2pclient_rs"
        assert where() == "hivemind"
        from {COPY}.p2p.p2p_daemon_bindings import control, utils
        import hivemind.p2p.p2p_daemon_bindings.control as other
        ours = sys.modules[control.ControlClient.__module__]
        assert ours.PeerID is control.PeerID is not other.PeerID
        assert ours.Multiaddr is control.Multiaddr
        assert issubclass(ours.P2PHandlerError, utils.P2PHandlerError)

        p2pclient_rs.install()
        assert where() == where({COPY!r}) == "p2pclient_rs"
        assert other.ControlClient is not control.ControlClient
        assert sys.modules[other.ControlClient.__module__].PeerID is other.PeerID

        p2pclient_rs.uninstall()
        assert where() == "hivemind"
        assert where({COPY!r}) == "fork"
        assert {{name: vars(sys.modules[name]) for name in before}} == before
        p2pclient_rs.install()
        assert where() == "p2pclient_rs"
        assert where({COPY!r}) == "fork"
        """,
    )


def test_hivemind_and_a_copy_communicate_in_one_process(copy: Path) -> None:
    output = run_with(
        copy,
        f"""
        import asyncio, pickle
        import p2pclient_rs
        p2pclient_rs.install(hivemind_package={COPY!r})
        p2pclient_rs.install()
        from hivemind import p2p as one
        from {COPY} import p2p as two

        async def main():
            async def double(data, peer):
                assert type(peer) is two.PeerID, type(peer)
                return 2 * data

            server = await two.P2P.create()
            peers = [str(maddr) for maddr in await server.get_visible_maddrs()]
            client = await one.P2P.create(initial_peers=peers)
            await server._client.add_unary_handler("double", double)
            server_id = one.PeerID(server.peer_id.to_bytes())
            print(await client._client.call_unary_handler(server_id, "double", b"ab"))
            for p2p, types, others in ((client, one, two), (server, two, one)):
                assert [type(peer) for peer in await p2p.list_peers()] == [types.PeerInfo]
                peer_id = types.PeerID((await p2p.list_peers())[0].peer_id.to_bytes())
                try:
                    await p2p._client.call_unary_handler(peer_id, "nothing", b"")
                except types.P2PDaemonError as error:
                    assert not isinstance(error, others.P2PDaemonError)
                    assert isinstance(error, p2pclient_rs.P2PDaemonError)
                    assert type(error.peer_id) is types.PeerID
                    print(pickle.dumps(error).hex())
            await client.shutdown()
            await server.shutdown()

        asyncio.run(main())
        """,
    )
    reply, of_client, of_server = output.splitlines()
    assert reply == "b'abab'"
    # Without install(), and without hivemind.
    code = """
    import pickle
    error = pickle.loads(bytes.fromhex(sys.argv[1]))
    print(type(error).__name__, [cls.__module__ for cls in type(error).__mro__ if cls.__name__ ==
          "P2PDaemonError"], error.peer_id is not None)
    """
    for error, package in ((of_client, "hivemind"), (of_server, COPY)):
        module = f"{package}.p2p.p2p_daemon_bindings.utils"
        printed = run_with(copy, code, more_args=[error])
        assert printed.split(" ", 1)[0] == "DaemonRefused"
        assert module in printed
        assert "p2pclient_rs.exceptions" in run_with(Path("/nonexistent"), code, more_args=[error])


def test_copy_with_changed_bindings_is_refused_or_forced_by_its_name(tmp_path: Path) -> None:
    folder = hivemind_tree.make_copy(tmp_path, "my_hivemind", "2.0")
    with (folder / "p2p" / "p2p_daemon_bindings" / "control.py").open("a") as file:
        file.write("# changed\n")
    run_with(
        tmp_path,
        """
        import warnings
        import p2pclient_rs
        report = p2pclient_rs.install(hivemind_package="my_hivemind")
        assert "bindings of my_hivemind 2.0 at" in report.replaced[1].refused
        assert "(control.py differ" in report.replaced[1].refused
        try:
            import my_hivemind
        except p2pclient_rs.UnsupportedVersion as error:
            assert "my_hivemind 2.0" in str(error)
        else:
            raise AssertionError("imported")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p2pclient_rs.install(hivemind_package="my_hivemind", force=True)
        assert "control.py differs" in str(caught[0].message)
        assert where("my_hivemind") == "p2pclient_rs"
        """,
    )


@pytest.mark.parametrize(
    "name", ["", ".hivemind", "fork..hivemind", "a b", "p2pclient", "p2pclient_rs.compat.hivemind"]
)
def test_invalid_name_of_a_copy_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hivemind_package cannot be"):
        p2pclient_rs.install(hivemind_package=name)
    with pytest.raises(ValueError, match="hivemind=False"):
        p2pclient_rs.install(hivemind_package="fork", hivemind=False)
    with pytest.raises(TypeError):
        p2pclient_rs.install(hivemind_package=None)  # type: ignore[arg-type]


def test_parents_of_a_copy_are_not_imported_to_find_it(tmp_path: Path) -> None:
    hivemind_tree.make_copy(tmp_path, COPY)
    (tmp_path / "fork" / "__init__.py").write_text("print('imported')\n")
    code = f"""
    import p2pclient_rs
    print(p2pclient_rs.install(hivemind_package={COPY!r}).replaced[1].version)
    print(where({COPY!r}))
    """
    assert run_with(tmp_path, code) == "1.1.12+fork\nimported\np2pclient_rs\n"
    missing = "import p2pclient_rs; print(p2pclient_rs.install(hivemind_package='no.such.thing'))"
    assert "no.such.thing -> " in run_with(tmp_path, missing)


def test_hivemind_layer_imports_its_own_modules_by_relative_names() -> None:
    # With absolute names, a copy of hivemind would get the classes of hivemind itself.
    folder = Path(p2pclient_rs.__file__).parent / "compat" / "hivemind"
    files = list(folder.glob("*.py"))
    assert folder / "control.py" in files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("p2pclient_rs.compat.hivemind."), file
                imported = [alias.name for alias in node.names]
                assert node.module != "p2pclient_rs.compat" or "hivemind" not in imported, file


def test_default_limits_apply_to_the_layers_clients_until_uninstall(hivemind: Path) -> None:
    run_with(
        hivemind,
        """
        import p2pclient_rs
        import p2pclient_rs.compat.hivemind.control as layer
        def limits():
            names = "DEFAULT_MAX_UNANSWERED", "DEFAULT_MAX_UNANSWERED_BYTES"
            return [vars(layer.ControlClient).get(name, "none") for name in names]
        before = limits()
        p2pclient_rs.install()
        assert limits() == before
        p2pclient_rs.install(max_unanswered_calls=7)
        from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
        assert ControlClient is layer.ControlClient
        assert limits() == [7, before[1]]
        p2pclient_rs.install(max_unanswered_bytes=1 << 30)
        assert limits() == [7, 1 << 30]
        p2pclient_rs.uninstall()
        assert limits() == before
        """,
    )
    later = """
    import p2pclient_rs
    p2pclient_rs.install(max_unanswered_calls=7)
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
    assert ControlClient.DEFAULT_MAX_UNANSWERED == 7
    """
    run_with(hivemind, later)
    for limit in (-1, float("nan")):
        with pytest.raises(ValueError, match="max_unanswered_bytes cannot be"):
            p2pclient_rs.install(max_unanswered_bytes=limit)  # type: ignore[arg-type]


# --- install(reconnect=True); with real daemons: tests/hivemind_swarm/test_reconnecting.py ---


class Quick:
    """A `Reconnection` with short pauses."""

    TIMEOUT = 5.0

    def __init__(self) -> None:
        self._schedule = Reconnection()

    def connected(self) -> tuple[float, bool]:
        return 0.01, self._schedule.connected()[1]

    def failed(self, reason: str) -> tuple[float, bool]:
        return 0.01, self._schedule.failed(reason)[1]


class FakeP2P:
    """The part of hivemind's ``P2P`` that reconnecting uses, without a daemon."""

    peer_id = PEER_ID
    _child: Any = None
    _client: Any = None
    is_alive = True

    @classmethod
    async def create(cls, initial_peers: Any = None, *, use_ipfs: bool = False) -> FakeP2P:
        p2p = cls()
        connector = p2pclient_rs.DaemonConnector("/unix/nonexistent/p2pd.sock")
        p2p._client = types.SimpleNamespace(control=p2pclient_rs.ControlClient(connector))
        return p2p

    def _terminate(self) -> None:
        self.is_alive = False


@pytest.fixture
def p2p_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A class ``P2P`` that reconnects."""
    monkeypatch.setattr(reconnect, "Reconnection", Quick)
    cls: Any = type("P2P", (FakeP2P,), {})
    own = vars(cls).copy()
    module: Any = types.ModuleType("p2p_daemon")
    module.P2P = cls
    reconnect.wrap(module)
    reconnect.wrap(module)
    yield cls
    reconnect.restore()
    assert vars(cls) == own


BOOTSTRAP = (f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}",)


def watchdogs() -> list[asyncio.Task[Any]]:
    """Returns the running tasks that watch a P2P."""
    names = {task: getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return [task for task, name in names.items() if "_Watchdog" in name]


@pytest.mark.parametrize("end", ["terminate", "another thread", "uninstall", "forget", "child"])
def test_watchdog_ends_with_its_p2p_and_does_not_keep_it_alive(p2p_class: Any, end: str) -> None:
    async def main() -> None:
        p2p = await p2p_class.create(initial_peers=BOOTSTRAP)
        (task,) = watchdogs()
        await asyncio.sleep(0.05)
        assert not task.done()
        match end:
            case "terminate":
                p2p._terminate()
                assert not p2p.is_alive
            case "another thread":
                await asyncio.to_thread(p2p._terminate)
            case "uninstall":
                reconnect.restore()
            case "forget":
                alive = weakref.ref(p2p)
                del p2p
                gc.collect()
                assert alive() is None
            case "child":
                p2p._child = types.SimpleNamespace(returncode=-9)
        await asyncio.wait([task], timeout=5)
        assert task.done()
        assert watchdogs() == []

    asyncio.run(main())


def test_p2p_without_bootstrap_peers_has_no_watchdog(p2p_class: Any) -> None:
    async def main() -> None:
        _without = [
            await p2p_class.create(),
            await p2p_class.create(initial_peers=[]),
            await p2p_class.create(use_ipfs=True),
        ]
        assert watchdogs() == []

    asyncio.run(main())


def test_event_loop_may_end_before_the_watchdog(
    p2p_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.new_event_loop()
    p2p = loop.run_until_complete(p2p_class.create(BOOTSTRAP))
    loop.run_until_complete(asyncio.sleep(0.02))
    loop.close()
    p2p._terminate()
    del p2p, loop
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_forked_child_leaves_its_parents_watchdog_alone(p2p_class: Any) -> None:
    async def main() -> None:
        p2p = await p2p_class.create(BOOTSTRAP)
        (task,) = watchdogs()
        pid = forking.fork()
        if pid == 0:
            p2p._terminate()
            os._exit(task.cancelling() if sys.version_info >= (3, 11) else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        await asyncio.sleep(0.03)
        assert not task.done()

    asyncio.run(main())


def test_repeated_failure_is_logged_once(p2p_class: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        _p2p = await p2p_class.create([*BOOTSTRAP, "/ip4/127.0.0.1/tcp/9"])
        await asyncio.sleep(0.1)

    asyncio.run(main())
    records = [record for record in caplog.records if record.name == "p2pclient_rs.compat.hivemind"]
    unusable, unknown = [record.getMessage() for record in records]
    assert unusable.startswith("cannot reconnect to the bootstrap peer /ip4/127.0.0.1/tcp/9: ")
    assert unknown.startswith(f"P2P {PEER_ID}: its peers are unknown: ")


def test_unknown_p2p_class_is_not_reconnected_but_warned_about(
    unknown_hivemind: Path,
) -> None:
    (unknown_hivemind / "hivemind" / "p2p" / "p2p_daemon.py").write_text("class P2P: ...\n")
    (unknown_hivemind / "hivemind" / "p2p" / "__init__.py").write_text("")
    run_with(
        unknown_hivemind,
        """
        import warnings
        import p2pclient_rs
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p2pclient_rs.install(force=True, reconnect=True)
            import hivemind.p2p.p2p_daemon
        assert [w.category for w in caught] == [p2pclient_rs.UnknownVersionWarning] * 2
        assert "hivemind.p2p.p2p_daemon is not as in hivemind" in str(caught[1].message)
        assert where() == "p2pclient_rs"
        """,
    )


@pytest.mark.parametrize("imported", ["", "import hivemind.p2p"])
def test_reconnecting_is_activated_and_undone(hivemind: Path, imported: str) -> None:
    run_with(
        hivemind,
        f"""
        {imported}
        import p2pclient_rs
        p2pclient_rs.install()
        from hivemind.p2p import P2P
        before = dict(vars(P2P))
        p2pclient_rs.install(reconnect=True)
        assert P2P.create.__wrapped__ is before["create"].__func__
        import inspect
        assert "initial_peers" in inspect.signature(P2P.create).parameters
        p2pclient_rs.uninstall()
        assert vars(P2P) == before
        """,
    )


# --- processes that this one starts ---

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
def test_children_of_multiprocessing_use_our_clients(
    tmp_path: Path, hivemind: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(hivemind))
    (tmp_path / "parent.py").write_text(PARENT)
    result = python("parent.py", method, how, cwd=tmp_path, ours=how == "run")
    package = "hivemind" if how == "neither" else "p2pclient_rs"
    assert (result.stdout, result.stderr) == (f"{package}\n" * 2, "")


PARENT_OF_FORKS = WHERE + dedent("""
    import multiprocessing, warnings

    def child(queue, names):
        queue.put([where(name) for name in names])

    def grandchild(queue, names, method):
        process = multiprocessing.get_context(method).Process(target=child, args=(queue, names))
        process.start()
        process.join()

    if __name__ == "__main__":
        how, method, *names = sys.argv[1:]
        if how == "install":
            import p2pclient_rs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", p2pclient_rs.UnknownVersionWarning)
                for name in names:
                    p2pclient_rs.install(hivemind_package=name, force=True)
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        for target, args in ((child, (queue, names)), (grandchild, (queue, names, method))):
            process = context.Process(target=target, args=args)
            process.start()
            print(*queue.get())
            process.join()
        assert not {"hivemind", "fork"} & set(sys.modules)
""")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory to import two copies of hivemind from. One has unknown bindings."""
    directory = tmp_path_factory.mktemp("forks")
    hivemind_tree.make_copy(directory, COPY)
    folder = hivemind_tree.make_copy(directory, "my_hivemind", "2.0")
    with (folder / "p2p" / "p2p_daemon_bindings" / "control.py").open("a") as file:
        file.write("# changed\n")
    return directory


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("how", ["install", "run"])
def test_children_of_multiprocessing_inherit_options_but_do_not_warn_again(
    tmp_path: Path, forks: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(forks))
    (tmp_path / "parent.py").write_text(PARENT_OF_FORKS)
    options = [f"--hivemind-package={name}" for name in (COPY, "my_hivemind")]
    options = [*options, "--force"] if how == "run" else []
    arguments = ["parent.py", how, method, COPY, "my_hivemind"]
    result = python(*options, *arguments, cwd=tmp_path, ours=how == "run")
    assert result.stdout == "p2pclient_rs p2pclient_rs\n" * 2, result.stderr
    assert result.stderr.count("UnknownVersionWarning") == (how == "run")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_multiprocessing_inherit_limits_of_0(
    tmp_path: Path, hivemind: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(hivemind))
    (tmp_path / "parent.py").write_text(
        dedent("""
            import multiprocessing, sys

            def child():
                from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
                print(ControlClient.DEFAULT_MAX_UNANSWERED)
                print(ControlClient.DEFAULT_MAX_UNANSWERED_BYTES)

            if __name__ == "__main__":
                import p2pclient_rs
                p2pclient_rs.install(max_unanswered_calls=0, max_unanswered_bytes=0)
                process = multiprocessing.get_context(sys.argv[1]).Process(target=child)
                process.start()
                process.join()
        """)
    )
    result = python("parent.py", method, cwd=tmp_path, ours=False)
    assert (result.stdout, result.stderr) == ("0\n0\n", "")


def test_subprocesses_inherit_the_options_of_run(
    tmp_path: Path, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(forks))
    code = f"print(where({COPY!r}), where('my_hivemind'))\n"
    (tmp_path / "child.py").write_text(
        "import subprocess, sys\n"
        # `run` without options, below a `run` with options.
        "command = [sys.executable, '-m', 'p2pclient_rs', 'run', 'grandchild.py']\n"
        f"subprocess.check_call(command)\n{WHERE}{code}"
    )
    (tmp_path / "grandchild.py").write_text(WHERE + code)
    (tmp_path / "program.py").write_text(
        "import subprocess, sys; subprocess.check_call([sys.executable, 'child.py'])\n"
    )
    options = ["--force", "--hivemind-package", COPY, "--hivemind-package=my_hivemind"]
    result = python(*options, "program.py", cwd=tmp_path, ours=True)
    assert result.stdout == "p2pclient_rs p2pclient_rs\n" * 2, result.stderr


@pytest.mark.parametrize("method", ["spawn", "run"])
def test_children_inherit_reconnect(
    tmp_path: Path, hivemind: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(hivemind))
    (tmp_path / "child.py").write_text(
        "import multiprocessing\n"
        "def child():\n"
        "    from hivemind.p2p import P2P\n"
        "    print(P2P.create.__code__.co_filename)\n"
        "if __name__ == '__main__':\n"
        "    import sys, p2pclient_rs\n"
        "    if 'spawn' in sys.argv:\n"
        "        p2pclient_rs.install(reconnect=True)\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    options = ["--reconnect"] if method == "run" else []
    result = python(*options, "child.py", method, cwd=tmp_path, ours=method == "run")
    assert result.stdout.endswith("p2pclient_rs/compat/reconnect.py\n"), result.stderr


def test_children_started_after_uninstall_are_not_affected(hivemind: Path, tmp_path: Path) -> None:
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


def test_child_finds_the_package_by_its_parents_sys_path(tmp_path: Path, hivemind: Path) -> None:
    # The parent itself extends sys.path, as a zip application or a notebook does.
    code = PARENT.replace("import p2pclient_rs", "sys.path += sys.argv[3:]; import p2pclient_rs")
    (tmp_path / "parent.py").write_text(code)
    paths = [str(hivemind), *sys.path[1:]]
    command = [sys.executable, "-I", "-S", "parent.py", "spawn", "install", *paths]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "p2pclient_rs\n" * 2, result.stderr


def test_subprocesses_below_run_use_our_clients(
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
    assert result.stdout == "p2pclient_rs\np2pclient_rs.compat.hivemind.p2pclient\n", result.stderr


def test_subprocesses_below_run_see_an_unchanged_environment(
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
def test_subprocesses_below_run_see_the_same_sys_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    # An empty entry means the current directory, except in an empty variable.
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


def test_two_threads_can_be_the_first_to_import_a_replaced_package() -> None:
    code = """
        import runpy, sys
        sys.modules["sitecustomize"] = sys
        runpy.run_path(sys.argv[1])
        (trigger,) = [f for f in sys.meta_path if type(f).__name__ == "_Trigger"]
        # Another thread has removed the trigger, and one finder has the old interface.
        sys.meta_path.remove(trigger)
        class OldFinder:
            def find_module(self, name, path=None): ...

        sys.meta_path.insert(0, OldFinder())
        assert trigger.find_spec("p2pclient") is not None
    """
    file = Path(p2pclient_rs.__file__).parent / "compat" / "pythonpath" / "sitecustomize.py"
    subprocess.run([sys.executable, "-c", dedent(code), str(file)], check=True)


def test_subprocess_without_p2pclient_rs_warns(
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
    """Runs ``python ARGS``; ``python -m p2pclient_rs run ARGS`` if ``ours``."""
    flags = [arg for arg in args[:1] if arg == "-P"]
    run = ["-m", "p2pclient_rs", "run"] if ours else []
    command = [sys.executable, *flags, *run, *args[len(flags) :]]
    # A debug build warns when it is imported.
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
        "probe.py --force --reconnect --hivemind-package=x",
        *(["-P probe.py", "-P package"] if sys.version_info >= (3, 11) else []),
    ],
)
def test_program_under_run_sees_the_same_main_module(programs: Path, command: str) -> None:
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
def test_program_under_run_fails_with_the_same_output(tmp_path: Path, program: str) -> None:
    (tmp_path / "program.py").write_text(program)
    theirs = python("program.py", cwd=tmp_path, ours=False)
    ours = python("program.py", cwd=tmp_path, ours=True)
    assert theirs.returncode != 0
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)
    assert ours.returncode == theirs.returncode


def test_program_under_run_can_pickle_its_classes_at_exit(tmp_path: Path) -> None:
    program = "import atexit, pickle\nclass C: pass\natexit.register(lambda: pickle.dumps(C()))"
    (tmp_path / "program.py").write_text(program)
    result = python("program.py", cwd=tmp_path, ours=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_program_under_run_imports_our_p2pclient(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(original.parent))
    (tmp_path / "program.py").write_text("import p2pclient; print(p2pclient.__name__)")
    result = python("program.py", cwd=tmp_path, ours=True)
    assert result.stdout == "p2pclient_rs.compat.p2pclient\n", result.stderr


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("", "which command?"),
        ("ran x.py", "unknown command or option 'ran'"),
        ("run", "run: no program given"),
        ("run -m", "run: no program given"),
        ("run --fast x.py", "run: unknown option --fast"),
        ("run -m --fast x", "run: unknown option --fast"),
        ("run --force", "run: no program given"),
        ("run --hivemind-package", "run: --hivemind-package needs the name of a package"),
        (
            "run --hivemind-package --force x.py",
            "run: --hivemind-package needs the name of a package",
        ),
        ("run --hivemind-package= x.py", "run: --hivemind-package needs the name of a package"),
        ("run --hivemind-package=a..b x.py", "run: hivemind_package cannot be 'a..b'"),
        ("run nothere.py", "can't open 'nothere.py': No such file or directory"),
    ],
)
def test_invalid_command_line_is_explained(tmp_path: Path, args: str, complaint: str) -> None:
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
