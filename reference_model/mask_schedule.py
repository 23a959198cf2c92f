"""The probabilities of masked attention, read from their buffer only when they have changed."""

from torch import Tensor


class MaskSchedule:
    """The values of `attn_mask_probs` as last read: reading them waits for the GPU.

    Attributes:
        probabilities: of every block.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.probabilities: tuple[float, ...] = tuple(buffer.tolist())
        self._buffer = buffer.detach()  # same memory, same count of changes
        self._version = None if buffer.is_inference() else buffer._version

    def has_changed(self) -> bool:
        """Whether the memory has been written to since, or may have been."""
        return self._version is None or self._buffer._version != self._version

    def is_of(self, buffer: Tensor) -> bool:
        """Whether these still are the values of a buffer."""
        same = buffer.data_ptr() == self._buffer.data_ptr() and not buffer.is_inference()
        return same and buffer._version == self._version and not self.has_changed()
