"""The extension: version, driver probe, and the layout of what host and device share."""

import re
import subprocess
import sysconfig

import pytest

import light_process
from flash8 import _native
from flash8._version import __version__
from repository import ROOT

HOPPER = ROOT / "hopper"
HEADERS = (
    HOPPER / "params.h",
    HOPPER / "attention" / "params.h",
    HOPPER / "forward" / "params.h",
    HOPPER / "backward" / "params.h",
    HOPPER / "decode" / "params.h",
    HOPPER / "decode" / "schedule_params.h",
    HOPPER / "kernel_info.h",
    HOPPER / "quantize" / "append_params.h",
    ROOT / "cutlass_kernels" / "quantize" / "quantize_params.h",
    ROOT / "cutlass_kernels" / "quantize" / "matrix_params.h",
    ROOT / "cutlass_kernels" / "gemm" / "gemm_params.h",
    ROOT / "cutlass_kernels" / "gemm" / "qkv_params.h",
)
LAYOUT = _native.layout()


def declared_fields() -> dict[str, list[str]]:
    """Field names of every shared struct, in order, read from the text of the headers."""
    source = "".join(header.read_text() for header in HEADERS)
    text = re.sub(r"//[^\n]*", "", source)
    structs = {}
    for name, body in re.findall(r"struct (?:alignas\(64\) )?(\w+) \{(.*?)\n\};", text, re.DOTALL):
        declarations = [line for line in body.split(";") if line.strip() and "static" not in line]
        structs[name] = [
            re.findall(r"(\w+)(?:\[\w+\])?$", line.strip())[0] for line in declarations
        ]
    return structs


def probe(driver: str) -> str:
    """What a fresh process says of `driver`."""
    code = (
        "from flash8 import _native; p = _native.probe_driver();"
        "assert not p.available and p.version == 0 and p.devices == [];"
        "print(p.path); print(p.reason)"
    )
    return light_process.run(code, FLASH8_DRIVER=driver)


def test_version_is_that_of_the_package():
    assert _native.__version__ == __version__


def test_layout_names_every_declared_field_in_order():
    declared = declared_fields()
    assert set(declared) == set(LAYOUT)
    for name, fields in declared.items():
        assert list(LAYOUT[name]["fields"]) == fields


@pytest.mark.parametrize("name", LAYOUT)
def test_structs_have_no_implicit_padding(name):
    end = 0
    for field, (offset, size) in LAYOUT[name]["fields"].items():
        assert offset == end, f"padding before {name}.{field}"
        end = offset + size
    assert end == LAYOUT[name]["size"]
    assert end % LAYOUT[name]["align"] == 0


def test_layout_of_abi_version_16():
    """A change here means that old cubins would be misread: raise kAbiVersion with it."""
    sizes = {name: (struct["size"], struct["align"]) for name, struct in LAYOUT.items()}
    assert _native.ABI_VERSION == 16
    assert sizes == {
        "TensorMap": (128, 64),
        "TensorRef": (32, 8),
        "DescaleRef": (32, 8),
        "RowRef": (24, 8),
        "ChannelRef": (24, 8),
        "SequenceParams": (80, 8),
        "PageParams": (40, 8),
        "ScoreParams": (48, 8),
        "DropoutParams": (16, 8),
        "SchedulerParams": (24, 8),
        "OutScaleRef": (24, 8),
        "ForwardParams": (960, 64),
        "BackwardParams": (1280, 64),
        "DecodeParams": (1536, 64),
        "GroupRef": (32, 8),
        "QuantizeParams": (312, 8),
        "AppendedRows": (176, 8),
        "RotaryParams": (56, 8),
        "PlaceParams": (48, 8),
        "AppendParams": (648, 8),
        "ScaleRef": (24, 8),
        "GemmParams": (512, 64),
        "TmaBox": (32, 4),
        "KernelInfo": (420, 4),
        "ScheduleParams": (1600, 64),
        "QuantizeMatrixParams": (120, 8),
        "QkvParams": (832, 64),
    }


@pytest.mark.parametrize("name", ["ForwardParams", "BackwardParams", "DecodeParams", "GemmParams"])
def test_tensor_maps_are_aligned_for_tma(name):
    fields = LAYOUT[name]["fields"]
    maps = [at for field, (at, _) in fields.items() if field.startswith("tma_")]
    assert maps == [128 * i for i in range(len(maps))]


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: f"{path.parent.name}_{path.stem}")
def test_a_shared_header_compiles_alone(header, tmp_path):
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\nint main() {{}}\n')
    compiler = (sysconfig.get_config_var("CXX") or "g++").split()[0]
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, f"-I{HOPPER}", str(source)], check=True)


def test_probe_says_why_a_named_driver_is_missing():
    path, reason = probe("/nowhere/libcuda_absent.so").splitlines()
    assert path == "/nowhere/libcuda_absent.so"
    assert "libcuda_absent.so" in reason
    assert "No such file" in reason


def test_probe_says_which_entry_a_library_lacks():
    libm = "libm.so.6"
    assert f"{libm} has no cuInit; flash8 needs the driver of CUDA 12.0 or newer" in probe(libm)
