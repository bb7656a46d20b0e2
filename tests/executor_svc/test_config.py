"""Settings that contradict each other are refused before a model is loaded."""

import pytest

from executor_svc.config import ExecutorConfig, SettingsError, check_settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 24}, "power of two, got 24"),
        ({"max_num_seqs": -1}, "max num seqs must be 1 to 65535, or 0 to suit the device, got -1"),
        ({"max_num_seqs": 65536, "max_num_batched_tokens": 70000}, "max num seqs must be .* got 65536"),
        ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, "max num batched tokens is 64 but max num seqs is 65"),
        ({"attention": "fast"}, "attention must be 'auto', .*, got 'fast'"),
        ({"threads": -1}, "threads must be 0"),
        ({"weights": "int4"}, "weights must be 'int8', or left out .*, got 'int4'"),
        ({"tensor_parallel": 0}, "tensor parallel must be 1 .* got 0"),
        ({"tensor_parallel": 2, "weights": "int8"}, "int8 weights are for steps in C.* but tensor parallel is 2"),
        ({"memory_utilization": 1.5}, "memory utilization must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_settings_that_contradict(settings, message):
    """An operator learns at start what to change, not from failing requests."""
    with pytest.raises(SettingsError, match=message):
        check_settings(ExecutorConfig(model="fake", **settings))


@pytest.mark.parametrize(
    ("given", "device_type", "limits"),
    [
        ((0, 0), "cpu", (64, 512)),
        ((0, 0), "cuda", (256, 2048)),
        ((1000, 0), "cpu", (1000, 1000)),
        ((3, 7), "cuda", (3, 7)),
    ],
)
def test_limits_suit_the_device_where_nobody_has_set_them(given, device_type, limits):
    """A GPU with the limits of a CPU would idle, a CPU with those of a GPU would take seconds for a step."""
    config = ExecutorConfig("fake", max_num_seqs=given[0], max_num_batched_tokens=given[1]).sized_for(device_type)

    check_settings(config)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == limits


def test_takes_the_defaults():
    """What nobody has set must work."""
    check_settings(ExecutorConfig(model="fake"))
