"""The peak that MFU is a share of: dense rates by the name of the device."""

import pytest
import torch

from lightning_megatron.callbacks.peak_flops import known_peak_flops

# TFLOP/s in bf16 without sparsity, by NVIDIA's data sheets.
DENSE = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H20": 148,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-80GB": 312,
}


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_rate_of_a_device(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert known_peak_flops(torch.device("cuda", 0), torch.bfloat16) == pytest.approx(DENSE[name] * 1e12)


def test_a_device_that_no_table_has_is_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X9000")
    assert known_peak_flops(torch.device("cuda", 0), torch.bfloat16) is None
    assert known_peak_flops(torch.device("cpu"), torch.bfloat16) is None
