"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from stnerp.device import device_of, tensor_cores
from stnerp.errors import InputError


def test_cpu() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_the_gpu_where_there_is_one(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert device_of("auto").type == ("cuda" if available else "cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", torch.device("cuda")])
def test_cuda_where_there_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device='cpu'"):
        device_of(name)


@pytest.mark.parametrize("name", ["gpu", "tpu", "", "cuda:x"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(InputError, match="device"):
        device_of(name)


def test_tensor_cores_are_as_before_afterwards() -> None:
    cuda, now = torch.device("cuda"), torch.get_float32_matmul_precision  # it takes no GPU to ask for it
    before = now()
    with tensor_cores(cuda):
        assert now() == "high"
        with tensor_cores(cuda, allowed=False):
            assert now() == "highest"
        assert now() == "high"
    assert now() == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has no newer name")
def test_tensor_cores_of_an_application_that_uses_the_newer_name() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with tensor_cores(torch.device("cuda"), allowed=False):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_a_cpus_products_are_left_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with tensor_cores(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
