"""Loading and launching a cubin on torch's current context, through the CUDA driver alone."""

import ctypes

import torch
from torch import Tensor


class Module:
    """The kernels of one cubin or PTX image."""

    def __init__(self, image: bytes) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes the primary context current
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(self._module), image + b"\0"))

    def launch(self, name: str, blocks: int, threads: int, *arguments: Tensor | int) -> None:
        """Runs a kernel and waits for it."""
        function = ctypes.c_void_p()
        self._check(
            self._cuda.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
        )
        values = [
            ctypes.c_int(x) if isinstance(x, int) else ctypes.c_void_p(x.data_ptr())
            for x in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._cuda.cuLaunchKernel(
                function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None
            )
        )
        torch.cuda.synchronize()

    def _check(self, status: int) -> None:
        if status != 0:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"the CUDA driver answered {status} ({name.value!r})")
