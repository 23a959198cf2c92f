"""The probabilities of masked attention, read from their buffer only when they have changed."""

from torch import Tensor
from torch._subclasses import FakeTensor


class MaskSchedule:
    """The values of `attn_mask_probs` as last read: reading them waits for the GPU.

    Attributes:
        probabilities: of every block.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.probabilities: tuple[float, ...] = tuple(buffer.tolist())
        self._buffer = buffer
        self._memory = buffer.detach()  # kept, so that no other tensor gets its address
        self._version = None if buffer.is_inference() else buffer._version

    def is_of(self, buffer: Tensor) -> bool:
        """Whether these still are the values of a buffer, or of the one that a fake stands for.

        In an export a fake tensor, which has no values, is in the buffer's place.
        """
        if isinstance(buffer, FakeTensor):
            return _stands_for(buffer, self._buffer) and self._is_unchanged()
        return buffer is self._buffer and self._is_unchanged()

    def _is_unchanged(self) -> bool:
        if self._version is None:  # torch does not count changes of inference tensors
            return False
        same_memory = self._buffer.data_ptr() == self._memory.data_ptr()
        return same_memory and self._buffer._version == self._version


def _stands_for(fake: FakeTensor, buffer: Tensor) -> bool:
    try:
        return fake.fake_mode.from_tensor(buffer) is fake
    except RuntimeError:  # a tensor that the export does not know
        return False
