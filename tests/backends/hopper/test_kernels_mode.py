"""FLASH8_KERNELS: its values, what they mean on which device, and who says so."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash8_cli
from flash8 import backends
from flash8.backends.hopper import mode
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust
from flash8.cli import check as check_command


@pytest.fixture
def environment(monkeypatch):
    """Sets FLASH8_KERNELS, as if the process began with it."""

    def forget():
        mode.kernels_mode.cache_clear()
        mode._served.clear()
        backends._tell_about_portable_cuda.cache_clear()

    def set_to(value):
        if value is None:
            monkeypatch.delenv("FLASH8_KERNELS", raising=False)
        else:
            monkeypatch.setenv("FLASH8_KERNELS", value)
        forget()

    yield set_to
    monkeypatch.undo()
    forget()


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as torch would tell of them: a Hopper, and one before it."""
    capabilities = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize("value", [None, "", "auto", "on", "off", "require"])
def test_values(environment, value):
    environment(value)
    assert mode.kernels_mode() == (value or "auto")


@pytest.mark.parametrize("value", ["1", "On", "yes", " on"])
def test_anything_else_is_an_error_with_the_three_in_it(environment, value):
    environment(value)
    with pytest.raises(ValueError, match=f"FLASH8_KERNELS is '{value}'; .* 'auto', 'on' and 'off'"):
        mode.kernels_mode()


@pytest.mark.parametrize(
    ("value", "served"),
    [
        ("auto", [True, False]),
        ("on", [True, True]),
        ("off", [False, False]),
        ("require", [True, True]),  # where it is an error
    ],
)
def test_which_devices_are_for_kernels(environment, gpus, value, served):
    environment(value)
    assert [mode.has_kernels(index) for index in range(2)] == served


def test_a_device_is_asked_once(environment, gpus, monkeypatch):
    environment(None)
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, 0)
    )
    for _ in range(3):
        assert mode.has_kernels(0) and mode.has_kernels(1)
    assert asked == [0, 1]


def test_a_trace_takes_it_for_a_constant(environment, monkeypatch):
    environment(None)

    def why_not(index):
        with open(os.devnull):  # which no trace could look into
            return None if index == 0 else "not this one"

    def call(x):
        return x + 1 if mode.has_kernels(x.dim() - 1) else x - 1

    monkeypatch.setattr(mode, "why_not", why_not)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).tolist() == [1.0]
    assert compiled(torch.zeros(1, 1)).tolist() == [[-1.0]]


def test_fake_tensors_of_a_device_that_is_not_there(environment):
    environment(None)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:5")
        assert x.is_cuda and not backends.kernels_wanted(x)


def test_off_and_on_are_never_checked(environment, monkeypatch):
    monkeypatch.setattr(trust, "find_fault", lambda *_: pytest.fail("checked"))
    environment("on")
    assert trust.is_trusted(ForwardVariant("bf16", 128, 128), torch.device("cpu"))


REASONS = {
    ("off", 0): "FLASH8_KERNELS=off",
    ("auto", 1): "compiled kernels are for compute capability 9.0, and GPU 1 has 8.0",
    ("auto", 0): "there is no compiled kernel for it",
}


@pytest.mark.parametrize(("value", "index"), REASONS)
def test_portable_cuda_calls_say_why(environment, gpus, value, index):
    environment(value)
    with pytest.warns(UserWarning, match="tiled PyTorch") as told:
        backends._tell_about_portable_cuda(index)
    assert REASONS[value, index] in str(told[0].message)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("auto", "passed its check"),
        ("on", "unchecked"),
        ("off", "never"),
        ("require", "is an error"),
    ],
)
def test_info_says_which_and_why(environment, gpus, capsys, value, words):
    environment(value)
    assert flash8_cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"kernels    {value} (FLASH8_KERNELS): " in text and words in text
    assert ("hopper" in text) == (value != "off")
    assert value != "off" or "FLASH8_KERNELS=off" in text


def test_info_says_that_a_required_device_is_missing(environment, gpus, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    environment("require")
    assert flash8_cli.main(["info"]) == 0
    assert "FLASH8_KERNELS=require: an error, since" in capsys.readouterr().out


def test_check_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert flash8_cli.main(["check"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_check_on_another_gpu_says_so(gpus, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert flash8_cli.main(["check"]) == 1
    assert "GPU 1 has 8.0" in capsys.readouterr().err


def test_check_takes_the_kernels_that_it_is_given(monkeypatch, capsys):
    checked = []
    monkeypatch.setattr(check_command, "why_not", lambda: None)
    monkeypatch.setattr(check_command, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(check_command.hopper_kernels, "kernel", lambda *_: None)
    monkeypatch.setattr(trust, "find_fault", lambda variant, device: checked.append(variant.name))
    assert flash8_cli.main(["check", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert names[0] == "forward_bf16_d64" and "quantize_cast_bf16_d128" in names and not checked
    assert flash8_cli.main(["check", names[-1], names[1]]) == 0 and checked == [names[-1], names[1]]
    assert "2 of 2 kernels are ok" in capsys.readouterr().out
    assert flash8_cli.main(["check"]) == 0 and checked[2:] == names
    assert flash8_cli.main(["check", "forward_bf16_d65", names[0]]) == 2
    assert "no shipped kernel is called forward_bf16_d65" in capsys.readouterr().err


def test_check_is_a_table_of_what_was_found(monkeypatch, capsys):
    rows = [ForwardVariant("bf16", 64, 64), ForwardVariant("bf16", 96, 96)]
    found = {rows[0]: None, rows[1]: "O is off by 0.5"}
    monkeypatch.setattr(check_command.hopper_kernels, "shipped", lambda: rows)
    monkeypatch.setattr(check_command.hopper_kernels, "kernel", lambda *_: None)
    monkeypatch.setattr(trust, "find_fault", lambda variant, device: found[variant])
    assert check_command.check(torch.device("cpu")) == 1
    header, _, good, bad, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["kernel", "ms", "found"]
    assert good.split()[0] == rows[0].name and good.endswith("  ok")
    assert bad.split()[0] == rows[1].name and bad.endswith("  O is off by 0.5")
    assert last == "1 of 2 kernels are ok on cpu"
    found[rows[1]] = None
    assert check_command.check(torch.device("cpu")) == 0
