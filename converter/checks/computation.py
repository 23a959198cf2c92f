"""How a model is computed, where not in float32 and as it is: a value."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from converter.configs import Dtype
from converter.errors import UsageError
from converter.models import Compile, check_mode, compile_network, in_dtype

if TYPE_CHECKING:
    from reference_model import EomtDinov3ForUniversalSegmentation


@dataclass(frozen=True)
class Computation:
    """How a model is computed.

    Attributes:
        dtype: of weights and activations.
        compile: the mode of torch.compile; None for none.
    """

    dtype: Dtype = "float32"
    compile: Compile | None = None

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise UsageError(
                f"The dtype to compute in is {self.dtype!r}, expected one of "
                f"{', '.join(get_args(Dtype))}."
            )
        check_mode(self.compile)

    def __bool__(self) -> bool:
        """Whether anything is different from float32 without compiling."""
        return self != Computation()

    def __str__(self) -> str:
        parts = [f"compiled ({self.compile})"] if self.compile else []
        parts += [f"computed in {self.dtype}"] if self.dtype != "float32" else []
        return " and ".join(parts)

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that say how a level's others were computed."""
        figures: dict[str, Any] = {"compiled": self.compile} if self.compile else {}
        return figures | ({"computed_in": self.dtype} if self.dtype != "float32" else {})

    def applied_to(
        self, model: "EomtDinov3ForUniversalSegmentation"
    ) -> "EomtDinov3ForUniversalSegmentation":
        """Another model with the same weights that computes in this way."""
        model = in_dtype(model, self.dtype)
        if self.compile:
            compile_network(model, self.compile)
        return model
