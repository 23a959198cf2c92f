"""Reads torch's pickles without unpickling: nothing that a pickle names is imported or called.

A pickle is a program for a small stack machine. Python's own machine calls whatever the program
names. The machine in this module rebuilds only descriptions of tensors
(https://pytorch.org/docs/stable/notes/serialization) and keeps every other object as a placeholder
that does nothing. It refuses a program that names anything of the standard library that is not
known to be harmless.
"""

import math
import pickletools
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

# safetensors' names of the element types, by the storage classes of torch that pickles name
_STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}

# names in the standard library that checkpoints contain, and that run no code by themselves
_HARMLESS = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bool",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.dict",
    "builtins.float",
    "builtins.frozenset",
    "builtins.int",
    "builtins.list",
    "builtins.object",
    "builtins.range",
    "builtins.set",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "builtins.xrange",
    "collections.Counter",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.deque",
    "copyreg._reconstructor",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "fractions.Fraction",
    "functools.partial",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "types.SimpleNamespace",
    "uuid.UUID",
}

# Python 2's names of modules: pickles use them up to protocol 2, which is torch's default
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess"}

# limits of numpy and torch: axes of a tensor, and bytes of a tensor
_MAX_AXES = 64
_MAX_BYTES = 2**63 - 1

_MAX_NAME = 500

# 16 bits hold the number of a class in every dataset's pictures
_MOST_CLASSES = 1 << 16


class UnsafePickleError(ValueError):
    """Raised for a pickle that names something that can run code; the message is that name."""


@dataclass(frozen=True, eq=False)
class Inert:
    """A placeholder for a global that a pickle names, or for an object built from one."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A flat array of elements, stored in its own record.

    Attributes:
        key: name of the record.
        dtype: safetensors' name of the element type.
        size: number of elements.
    """

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A tensor as a view of a storage; offset and stride are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_count(value: Any) -> bool:
    """Whether a value can be a number of elements or bytes, or a position in a file."""
    return type(value) is int and 0 <= value <= _MAX_BYTES


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of a tensor that numpy can hold, for every element type.

    For numpy's limit, an empty axis counts as one of length 1. The largest elements have 8 bytes.
    """
    return (
        type(value) in (list, tuple)
        and len(value) <= _MAX_AXES
        and all(map(is_count, value))
        and math.prod(max(length, 1) for length in value) <= _MAX_BYTES // 8
    )


def is_name(value: Any) -> bool:
    """Whether a value can be shown as a name: not too long, and without control characters."""
    return type(value) is str and len(value) <= _MAX_NAME and value.isprintable()


def read_pickle(
    data: bytes, allowed: Container[str] | None = None, *, numbered: bool = False
) -> Any:
    """Reads one pickle into dicts, lists, tuples, plain values, `PickledTensor` and `Inert`.

    Args:
        data: the pickle.
        allowed: all that it may name; by default all but what is known to be able to run code.
        numbered: whether to keep items of dicts whose keys are numbers of classes; items with other
            keys than text are dropped.

    Raises:
        UnsafePickleError: it names something that runs code, or that is not allowed.
        ValueError: it is not a valid pickle.
    """
    try:
        return _Machine(allowed, numbered).run(data)
    except ValueError:
        raise
    # pickletools warns about an unknown escape in a text, which is an error if warnings are errors
    except (LookupError, TypeError, AttributeError, OverflowError, DeprecationWarning) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _look_up(module: str, name: str, allowed: Container[str] | None) -> Inert:
    module = _PYTHON_2_MODULES.get(module, module)
    full = f"{module}.{name}"
    if not is_name(full):
        raise ValueError("it names something with an invalid name")
    # a name may have dots: "os.system" in the module torch means os.system, as torch imports os
    modules = {module.partition(".")[0], *name.split(".")[:-1]}
    harmless = full in _HARMLESS or not modules & sys.stdlib_module_names
    if not (harmless if allowed is None else full in allowed):
        raise UnsafePickleError(full)
    return Inert(full)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Inert) or not isinstance(arguments, tuple):
        raise ValueError("it calls something that is not a function")
    match function.name:
        case "collections.OrderedDict" if not arguments:
            return {}
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
            return _tensor(*arguments[:4])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case _:
            return Inert(function.name)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> PickledTensor | Inert:
    if isinstance(storage, Inert):
        return storage
    if not (is_shape(shape) and _are_strides(stride, len(shape)) and is_count(offset)):
        raise ValueError("a tensor has an impossible shape, stride or offset")
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return PickledTensor(storage, offset, tuple(shape), tuple(stride))


def _are_strides(value: Any, axes: int) -> bool:
    return type(value) in (list, tuple) and len(value) == axes and all(map(is_count, value))


def _storage(identifier: Any) -> Storage | Inert:
    """A persistent id: ("storage", class, key, device, number of elements)."""
    kind, storage_class, key, _device, size = identifier
    if kind != "storage" or type(key) is not str or not is_count(size):
        raise ValueError("a storage is not in torch's form")
    dtype = _STORAGE_DTYPES.get(storage_class.name.removeprefix("torch."))
    return Storage(key, dtype, size) if dtype else Inert(storage_class.name)


class _Machine:
    """The stack machine: its stack, the stacks that marks put aside, and its memo."""

    def __init__(self, allowed: Container[str] | None, numbered: bool) -> None:
        self.allowed = allowed
        self.numbered = numbered
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        argument: Any
        for opcode, argument, _position in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _LITERALS:
                self.push(argument)
            elif name in _CONSTANTS:
                self.push(_CONSTANTS[name]())
            elif name in _MEMO_PUTS:
                # PUT's number is text of any size; numbers could be chosen to collide in the dict
                if not 0 <= argument <= len(data):
                    raise ValueError("it has an invalid number for an object in its memo")
                self.memo[argument] = self.stack[-1]
            elif name in _MEMO_GETS:
                self.push(self.memo[argument])
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in _NOTHING_TO_DO:
                raise ValueError(f"opcode {name} is not supported")
        raise ValueError("it ends without STOP")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count:
            raise ValueError("its stack is empty")
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Inert):
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Sets the items that are needed; other keys may be slow to hash, or chosen to collide."""
        if not isinstance(self.stack[-1], Inert):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update({key: value for key, value in pairs if self.is_key(key)})

    def is_key(self, value: Any) -> bool:
        number = self.numbered and type(value) is int and 0 <= value < _MOST_CLASSES
        return type(value) is str or number

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def frozen_set(self, _: Any) -> None:
        self.pop_mark()
        self.push(Inert("builtins.frozenset"))

    def dict_of(self, _: Any) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(_call(function, arguments))

    def new_object(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Inert) or not isinstance(arguments, tuple):
            raise ValueError("it builds an object from something that is not a class")
        self.push(Inert(function.name))

    def new_object_with_keywords(self, _: Any) -> None:
        self.stack.pop()
        self.new_object(None)

    def old_instance(self, argument: str) -> None:
        self.pop_mark()
        self.look_up(argument)

    def old_object(self, _: Any) -> None:
        function, *_arguments = self.pop_mark()
        self.push(Inert(function.name))

    def look_up_on_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("it looks up something whose name is not text")
        self.push(_look_up(module, name, self.allowed))

    def look_up(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self.push(_look_up(module, name, self.allowed))


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Inert("builtins.set"),
}
_MEMO_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_MEMO_GETS = {"GET", "BINGET", "LONG_BINGET"}
_NOTHING_TO_DO = {"PROTO", "FRAME"}
_ACTIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.memoize,
    "POP": lambda m, _: m.stack.pop() if m.stack else m.pop_mark(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "DICT": _Machine.dict_of,
    "FROZENSET": _Machine.frozen_set,
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.pop_mark(),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": _Machine.look_up,
    "STACK_GLOBAL": _Machine.look_up_on_stack,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "INST": _Machine.old_instance,
    "OBJ": _Machine.old_object,
    # drops the state of a placeholder, or the _metadata of a state dict
    "BUILD": lambda m, _: m.stack.pop(),
    "BINPERSID": lambda m, _: m.push(_storage(m.stack.pop())),
}
