"""What can go wrong between a kernel's source and its cubin."""


class CompilerNotFoundError(RuntimeError):
    """There is no CUDA compiler, or a part of it is missing; the message says how to get one."""


class CompileError(RuntimeError):
    """The compiler refused the source. `log` is everything it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class MissingVariantError(RuntimeError):
    """A kernel is not in the cache, and FLASH8_COMPILE=never forbids to compile it."""
