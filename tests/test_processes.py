"""Which device things are exchanged on, with GPUs that are made up: tensors without numbers, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore

import influence_framework as inf
from influence_framework.cli import run
from influence_framework.processes import Processes

GPU, OTHER, CPU = torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")
Exchanged = list[Tensor]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Exchanged]]:
    """Have the group be of a backend that refuses tensors on devices which it is not for."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    exchanged: Exchanged = []

    def made(backend: str) -> Exchanged:
        types = [part.partition(":")[0] for part in backend.split(",")]

        def all_reduce(tensor: Tensor, *_: object, **__: object) -> None:
            # As NCCL: its own devices, one GPU a process, and memory without gaps.
            assert tensor.device.type in types, f"No backend type associated with device type {tensor.device}"
            assert tensor.device in (GPU, CPU), f"Duplicate GPU detected: {tensor.device}"
            assert tensor.is_contiguous()
            exchanged.append(tensor)

        monkeypatch.setattr(distributed, "get_backend_config", lambda group: backend)
        monkeypatch.setattr(distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: GPU.index)
        return exchanged

    yield made
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "small"), [("cuda:nccl", GPU), ("cpu:gloo,cuda:nccl", CPU), ("cpu:gloo,cuda:gloo", CPU)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_go_where_the_backend_takes_them_and_come_back(
    backend: str, small: torch.device, dtype: torch.dtype, pretended: Callable[[str], Exchanged]
) -> None:
    exchanged, processes = pretended(backend), Processes()
    with FakeTensorMode():
        for device, through in ((GPU, GPU), (CPU, small)):
            # No gaps to be closed on the GPU: without one, tensors that are made up cannot be copied there.
            whole = torch.ones(4, 3, dtype=dtype, device=device)
            for tensor in (whole.T if through == CPU else whole, torch.ones((), device=device)):
                summed = processes._sum(tensor)
                assert (summed.device, summed.dtype, summed.shape) == (device, tensor.dtype, tensor.shape)
                assert exchanged.pop().device == through
        assert processes._exchange(0.0, 1.0, 2.0, 3.0).device == CPU
        assert exchanged.pop().device == small
    assert not exchanged


def model_on(device: torch.device) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, device=device))
    return model


@pytest.mark.parametrize("backend", ["cuda:nccl", "cpu:gloo,cuda:nccl"])
def test_a_model_on_another_gpu_than_the_current_one_is_refused_where_all_goes_through_that(
    backend: str, pretended: Callable[[str], Exchanged]
) -> None:
    pretended(backend)
    with FakeTensorMode():
        right, wrong, host = (model_on(device) for device in (GPU, OTHER, CPU))
    for model in (right, host):
        Processes()._check_device({parameter.device for parameter in model.parameters()})
    if backend == "cuda:nccl":
        with pytest.raises(inf.InvalidInputError, match=r"on cuda:0.*cuda:1: call .*set_device\(0\)"):
            Processes().check_model(wrong)
    else:
        Processes()._check_device({parameter.device for parameter in wrong.parameters()})


@pytest.mark.parametrize(
    ("gpus", "local", "backend"),
    [(0, 2, "gloo"), (1, 2, "gloo"), (2, 2, "cpu:gloo,cuda:nccl"), (8, 2, "cpu:gloo,cuda:nccl")],
)
def test_the_command_gives_each_process_a_gpu_where_there_are_enough(
    gpus: int, local: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert run._backend() == backend
    assert chosen == ([] if backend == "gloo" else [1])
