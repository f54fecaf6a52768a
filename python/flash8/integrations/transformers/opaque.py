"""An object in the place of a mask tensor that says what is wrong when it is used as one."""

from typing import Any, ClassVar, NoReturn, Self


class MaskUsedAsTensorError(ValueError, AttributeError):
    """A model used its attention mask itself, where flash8 had put a description of the mask.

    An AttributeError too, so that `hasattr` and `getattr` with a default work on the description.
    """


class Opaque:
    """Passes through model code as a mask does, and refuses to be computed with.

    Harmless are: passing it on, `is None`, `ndim`, `to`, `contiguous`, `clone`, `detach`. Any other
    attribute, arithmetic, comparison, indexing, and any torch function that is given one raise
    MaskUsedAsTensorError, for what a model does with its mask by itself would be lost in silence.
    """

    #: The model, for error messages; a field of the subclass.
    owner: str

    #: Anything but 2: transformers converts two-dimensional masks to bool tensors.
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Self:
        return self

    def clone(self) -> Self:
        return self

    def detach(self) -> Self:
        return self

    def refuse(self, use: str) -> NoReturn:
        raise MaskUsedAsTensorError(
            f"{self.owner} computes attention by itself or changes its attention mask ({use}); it "
            "does not leave that to transformers' AttentionInterface, so flash8 cannot serve it: "
            "use attn_implementation='eager' (or 'sdpa', where it has that)"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or name == "owner":  # protocols of Python and of libraries
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.refuse(f"attention_mask.{name}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        found = _first((args, list((kwargs or {}).values())))
        assert found is not None
        found.refuse(f"torch.{name}")

    def __eq__(self, other: object) -> bool:
        # `mask == 0` of a model must not become False; containers compare with anything else.
        if isinstance(other, (int, float)) or hasattr(other, "dtype"):
            self.refuse("==")
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _first(values: Any) -> Opaque | None:
    """The first Opaque in (nested) arguments."""
    for value in values:
        if isinstance(value, Opaque):
            return value
        if isinstance(value, (tuple, list)) and (found := _first(value)) is not None:
            return found
    return None


def _refusing(name: str) -> Any:
    def method(self: Opaque, *args: Any) -> NoReturn:
        self.refuse(name)

    method.__name__ = name
    return method


_REFUSED = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "matmul", "rmatmul", "truediv", "rtruediv"),
    *("floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "and", "rand", "or", "ror", "xor"),
    *("rxor", "invert", "neg", "pos", "abs", "lt", "le", "gt", "ge", "getitem", "setitem"),
    *("len", "bool", "array"),
)
for _name in _REFUSED:
    setattr(Opaque, f"__{_name}__", _refusing(f"__{_name}__"))
