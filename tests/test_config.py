"""EpConfig: frozen, validated when made, with errors that say argument, value, limit and remedy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_ep_plugin import ConfigError, EpConfig, EpError

GOOD = {"num_experts": 8, "num_topk": 2, "hidden": 64, "max_tokens_per_rank": 16, "device": "cpu"}


@pytest.mark.parametrize(
    ("argument", "value", "limit"),
    [
        *[(name, bad, "at least 1") for name in GOOD if name != "device" for bad in (0, -1, 1.5, "8", True, None)],
        ("expert_alignment", 0, "at least 1"),
        *[(name, bad, "None or") for name in ("num_sms", "local_sms") for bad in (0, -3, 0.5)],
        *[(name, bad, "None or") for name in ("host_threads", "pool_bytes") for bad in (0, -3, 0.5)],
        ("num_topk", 33, "at most 32"),
        ("hidden", 12, "16 bytes"),
        ("dtype", torch.float64, "float32"),
        ("dtype", torch.int32, "float32"),
        ("backend", "nccl", "collective"),
        ("wire", "int8", "fp8"),
        ("expand", "three_stage", "two_stage"),
        ("device", "meta", "cuda"),
        *[("timeout_s", bad, "above 0") for bad in (0, -1, float("inf"), float("nan"), "5")],
        ("expert_to_rank", (0, 1), "num_experts"),
    ],
)
def test_bad_setting_names_argument_value_limit_and_remedy(argument, value, limit):
    with pytest.raises(ConfigError) as caught:
        EpConfig(**GOOD | {argument: value})
    text = str(caught.value)
    assert text.startswith(f"{argument} is ")
    assert limit in text
    assert "; " in text
    shown = f"{len(value)} entries" if isinstance(value, tuple) else str(value)
    assert shown in text
    assert isinstance(caught.value, EpError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8)])
def test_row_is_a_multiple_of_16_bytes(dtype, multiple):
    assert EpConfig(**GOOD | {"hidden": multiple, "dtype": dtype}).hidden == multiple
    with pytest.raises(ConfigError, match=f"pad hidden to a multiple of {multiple}"):
        EpConfig(**GOOD | {"hidden": multiple + 1, "dtype": dtype})


def test_frozen_and_hashable():
    config = EpConfig(**GOOD, expert_to_rank=[0, 1] * 4)
    assert config.expert_to_rank == (0, 1) * 4
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 128


def test_replace_validates_again():
    with pytest.raises(ConfigError, match="num_topk"):
        dataclasses.replace(EpConfig(**GOOD), num_topk=0)


def test_agreed_fields_leave_out_what_ranks_may_choose():
    fields = EpConfig(**GOOD).agreed_fields()
    assert fields == EpConfig(**GOOD, host_threads=3, num_sms=5, local_sms=7).agreed_fields()
    assert fields != EpConfig(**GOOD | {"hidden": 128}).agreed_fields()


def test_device_defaults_to_what_the_machine_has():
    config = EpConfig(**GOOD | {"device": None})
    assert config.device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert EpConfig(**GOOD | {"device": "cuda:1"}).device_type == "cuda"
