"""A mixture-of-experts server, whose runtime, DHT node and handlers are separate processes."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from hivemind import DHT
from hivemind.moe import (
    ModuleBackend,
    RemoteExpert,
    RemoteMixtureOfExperts,
    Server,
    declare_experts,
    get_experts,
)
from hivemind.p2p import P2PHandlerError
from hivemind.utils import get_dht_time
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from hivemind_swarm.processes import may_be_cut_short

HIDDEN = 256
UIDS = ["expert.0", "expert.1", "expert.2"]


def make_expert() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.GELU())


def _run_server(pipe: Connection, experts: dict[str, Any]) -> None:
    dht = DHT(start=True)
    schema = (BatchTensorDescriptor(HIDDEN),)
    backends = {
        uid: ModuleBackend(uid, expert, args_schema=schema, max_batch_size=16384)
        for uid, expert in experts.items()
    }
    server = Server(dht, backends, num_connection_handlers=2, device="cpu", start=True)
    try:
        # A thread of the server declares the experts; wait until they are known.
        declare_experts(dht, UIDS, expiration_time=get_dht_time() + 300)
        pipe.send(dht.get_visible_maddrs())
        pipe.recv()
    finally:
        server.shutdown()
        server.join()


@dataclass
class Setting:
    """The remote experts, and local modules with the same parameters."""

    dht: DHT
    remote: list[RemoteExpert]
    local: list[Any]


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    local = {uid: make_expert() for uid in UIDS}
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_server, args=(theirs, local))
    process.start()
    theirs.close()
    try:
        dht = DHT(initial_peers=ours.recv(), start=True)
        try:
            remote = get_experts(dht, UIDS)
            assert [expert.uid for expert in remote] == UIDS
            yield Setting(dht, remote, list(local.values()))
        finally:
            dht.shutdown()
    finally:
        ours.send(None)
        ours.close()
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()


@may_be_cut_short
# The larger batch does not fit into a unary call, so hivemind streams it.
@pytest.mark.parametrize("batch", [3, 8192], ids=["unary", "streamed"])
def test_remote_expert_computes_the_same_as_the_local_one(setting: Setting, batch: int) -> None:
    for remote, local in zip(setting.remote, setting.local, strict=True):
        ours = torch.randn(batch, HIDDEN, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        weights = torch.randn(batch, HIDDEN)

        output, expected = remote(theirs), local(ours)
        assert torch.allclose(output, expected, atol=1e-5)
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
        assert torch.allclose(theirs.grad, ours.grad, atol=1e-5)


def test_mixture_finds_and_weighs_experts(setting: Setting) -> None:
    mixture = RemoteMixtureOfExperts(
        in_features=HIDDEN,
        grid_size=(len(UIDS),),
        dht=setting.dht,
        uid_prefix="expert.",
        k_best=len(UIDS),
        k_min=len(UIDS),
    )
    ours = torch.randn(4, HIDDEN, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()

    output = mixture(theirs)
    gates = torch.softmax(mixture.proj(ours), dim=-1)
    outputs = torch.stack([expert(ours) for expert in setting.local], dim=1)
    expected = (gates[..., None] * outputs).sum(dim=1)
    assert torch.allclose(output, expected, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(theirs.grad, ours.grad, atol=1e-4)


def test_missing_expert_is_an_error_at_the_caller(setting: Setting) -> None:
    absent = RemoteExpert(partial(_renamed, setting.remote[0])(), setting.remote[0].p2p)
    with pytest.raises(P2PHandlerError, match="expert.99"):
        absent(torch.zeros(1, HIDDEN))


def _renamed(expert: RemoteExpert) -> Any:
    return expert._info._replace(uid="expert.99")
