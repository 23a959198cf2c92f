"""Reading pickles: what torch writes is read, what asks for code is refused and never run."""

import os
import pickle
import pickletools
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from converter.weights.unpickling import Inert, PickledTensor, UnsafePickleError, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def long(value: int) -> bytes:
    """The opcode that pushes an integer of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(data)) + data


def global_name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


STORAGE = (
    b"(" + text("storage") + global_name("torch", "FloatStorage") + text("0") + text("cpu") + b"Kd"
    b"tQ"
)


def tensor(shape: bytes, stride: bytes, offset: bytes = b"K\0", storage: bytes = STORAGE) -> bytes:
    """A program for one tensor of a storage of 100 elements."""
    rebuild = global_name("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + storage + offset + shape + stride + b"\x89NtR."


# plain content -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_read_from_every_protocol(protocol: int) -> None:
    content = {
        "none": None,
        "flags": [True, False],
        "numbers": (0, -1, 255, 65536, 2**40, -(2**70), 0.5, -1e300),
        "texts": ["", "a", "ä€𝄞", "back\\slash\n", "x" * 300],
        "nested": {"empty": [(), [], {}], "one": (1,), "two": (1, 2), "three": (1, 2, 3)},
    }
    assert read_pickle(pickle.dumps(content, protocol)) == content


@pytest.mark.parametrize("protocol", PROTOCOLS[3:])
def test_bytes_and_byte_arrays_are_read(protocol: int) -> None:
    content = {"small": b"ab", "large": b"x" * 300}
    assert read_pickle(pickle.dumps(content, protocol)) == content


def test_an_object_that_occurs_twice_is_the_same_object() -> None:
    shared = [1]
    first, second = read_pickle(pickle.dumps([shared, shared]))
    assert first is second


def test_a_tensor_is_read_as_a_view_of_its_storage() -> None:
    found = read_pickle(tensor(b"K\2K\3\x86", b"K\3K\1\x86", offset=b"K\4"))
    assert isinstance(found, PickledTensor)
    assert (found.shape, found.stride, found.offset) == ((2, 3), (3, 1), 4)
    assert (found.storage.key, found.storage.dtype, found.storage.size) == ("0", "F32", 100)


# code --------------------------------------------------------------------------------------------


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def attacks(marker: Path) -> dict[str, bytes]:
    """Programs by which Python's own unpickler touches a file."""
    call = text(f"touch {marker}") + b"\x85R."
    evaluate = text(f"__import__('pathlib').Path({str(marker)!r}).touch()") + b"\x85R."
    system = global_name("os", "system")
    command = f"Vtouch {marker}\n".encode()
    # tuple(map(os.system, [command])), each made by its __new__
    lazy = global_name("builtins", "tuple") + global_name("builtins", "map")
    calls = system + b"]" + command + b"a\x86"
    return {
        "REDUCE": pickle.dumps(Attack(marker)),
        "GLOBAL": system + call,
        "STACK_GLOBAL": stack_global("os", "system") + call,
        "STACK_GLOBAL from the memo": text("os") + b"\x94" + text("system") + b"\x93" + call,
        "INST": b"(" + command + b"ios\nsystem\n.",
        "OBJ": b"(" + system + command + b"o.",
        "NEWOBJ": lazy + calls + b"\x81\x85\x81.",
        "NEWOBJ_EX": lazy + calls + b"}\x92\x85}\x92.",
        "posix": global_name("posix", "system") + call,
        "subprocess": global_name("subprocess", "getoutput") + call,
        "Python 2's commands": b"\x80\2" + global_name("commands", "getoutput") + call,
        "eval": global_name("builtins", "eval") + evaluate,
        "Python 2's eval": b"\x80\2" + global_name("__builtin__", "eval") + evaluate,
        "a dotted name": b"\x80\4" + stack_global("torch.serialization", "os.system") + call,
        "the key of a dict": b"}" + system + call[:-1] + b"Ns.",
        "in hyper_parameters": pickle.dumps({"hyper_parameters": {"model": Attack(marker)}}),
        "beside the state dict": pickle.dumps({"state_dict": {}, "x": [(Attack(marker),)]}),
    }


@pytest.mark.parametrize("way", attacks(Path("marker")))
def test_a_pickle_that_runs_code_is_refused_and_not_run(way: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack = attacks(marker)[way]
    pickle.loads(attack)  # noqa: S301  to see that it is an attack
    assert marker.exists()
    marker.unlink()

    with pytest.raises(UnsafePickleError, match=r"system|map|eval|getoutput"):
        read_pickle(attack)

    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.__import__",
        "builtins.exec",
        "builtins.getattr",
        "builtins.open",
        "builtins.dict.__class__",
        "code.interact",
        "copyreg.add_extension",
        "ctypes.CDLL",
        "functools.reduce",
        "importlib.import_module",
        "nt.system",
        "operator.attrgetter",
        "os.execv",
        "pickle.loads",
        "pty.spawn",
        "pydoc.pipepager",
        "runpy._run_code",
        "shutil.rmtree",
        "socket.create_connection",
        "subprocess.check_output",
        "sys.modules",
        "timeit.timeit",
        "webbrowser.open",
    ],
)
def test_what_runs_code_is_refused_by_name_even_uncalled(name: str) -> None:
    with pytest.raises(UnsafePickleError, match=f"^{name}$"):
        read_pickle(global_name(*name.split(".", 1)) + b"0N.")


def test_only_allowed_names_are_read_where_they_are_listed() -> None:
    allowed = {"collections.OrderedDict"}
    assert read_pickle(global_name("collections", "OrderedDict") + b")R.", allowed) == {}
    for module, name in (("torch.hub", "load"), ("builtins", "dict")):
        for program in (global_name(module, name), stack_global(module, name)):
            with pytest.raises(UnsafePickleError, match=f"{module}.{name}"):
                read_pickle(program + b"0N.", allowed)


def test_a_name_that_would_steer_a_terminal_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="names something") as caught:
        read_pickle(stack_global("os\x1b[2J", "system") + b".")
    assert str(caught.value).isprintable()


# foreign objects ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        global_name("mylib.models", "Net") + b"K\1\x85R.",
        global_name("mylib.models", "Net") + b")\x81}X\1\0\0\0aK\1sb.",
        global_name("mylib.models", "Net") + b")}\x92.",
        b"(" + global_name("mylib.models", "Net") + b"K\1o.",
        b"(K\1imylib.models\nNet\n.",
        stack_global("mylib.models", "Net") + b".",
    ],
)
def test_an_object_of_a_foreign_class_is_an_inert_name(program: bytes) -> None:
    found = read_pickle(program)
    assert isinstance(found, Inert)
    assert found.name == "mylib.models.Net"


def test_what_is_put_into_a_foreign_object_is_dropped() -> None:
    net = global_name("mylib", "Net") + b")\x81"
    for filled in (b"K\1a", b"(K\1K\2e", b"K\1K\2s", b"(K\1K\2u"):
        assert isinstance(read_pickle(net + filled + b"."), Inert)


def test_everyday_content_of_checkpoints_is_harmless() -> None:
    import argparse
    import collections
    import datetime
    import pathlib

    content = {
        "namespace": argparse.Namespace(lr=1e-4),
        "counter": collections.Counter("aab"),
        "path": pathlib.PurePosixPath("/a/b"),
        "date": datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC),
        "set": {1, 2},
        "range": range(3),
        "frozen": frozenset("a"),
        "complex": 1j,
        "default": collections.defaultdict(list, a=[1]),
        "bytes": b"ab",
    }
    for protocol in PROTOCOLS:
        found = read_pickle(pickle.dumps(content, protocol))
        assert found.keys() == content.keys()


@pytest.mark.parametrize(
    "module", ["pathlib", "pathlib._local"], ids=["Python 3.12", "Python 3.13"]
)
def test_a_path_is_harmless_whichever_python_pickled_it(module: str) -> None:
    assert isinstance(read_pickle(global_name(module, "PosixPath") + b"Va\n\x85R."), Inert)


def test_keys_that_are_not_text_are_dropped() -> None:
    items = {"a": 1, 2: 3, ("b", ()): 4, None: 5, 1.5: 6}
    assert read_pickle(pickle.dumps(items)) == {"a": 1}


def test_keys_that_are_numbers_of_classes_are_kept_where_they_are_asked_for() -> None:
    items = {"a": 1, 2: 3, -1: 4, True: 5, 65536: 6, 65535: 7}
    assert read_pickle(pickle.dumps(items), numbered=True) == {"a": 1, 2: 3, 65535: 7}


def test_a_key_that_cannot_be_hashed_is_dropped() -> None:
    assert read_pickle(b"}(]K\1}K\2" + text("a") + b"K\3u.") == {"a": 3}


def test_a_tensor_of_a_foreign_storage_is_the_inert_name_of_that() -> None:
    storage = STORAGE.replace(b"FloatStorage", b"ExoticStorage")
    found = read_pickle(tensor(b")", b")", storage=storage))
    assert isinstance(found, Inert)
    assert found.name == "torch.ExoticStorage"


# malformed programs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"N",
        b"\xff",
        b"0.",
        b"1.",
        b"2.",
        b"R.",
        b"K\1K\2R.",
        b"t.",
        b"K\1\x86.",
        b"K\1K\2\x87.",
        b"Na.",
        b"NK\1K\2s.",
        b"}K\1s.",
        b"}(K\1u.",
        b"h\0.",
        b"g0\n.",
        b"gx\n.",
        b"\x93.",
        b"K\1K\2\x93.",
        b"K\1)\x81.",
        b"(o.",
        b"(K\1o.",
        b"Q.",
        b"K\1Q.",
        b"Pid\n.",
        b"\x82\1.",
        b"\x97.",
        b"cos\n",
        b"Lx\nL.",
        b"I1_000x\n.",
        b"Fx\n.",
        b"Vx",
        b"V\\ud8\n.",
        b"X\xff\xff\xff\xff.",
        b"X\1\0\0\0\xff.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"S'a\n.",
        b"S'\\8'\n0",
        b"b.",
        b"e.",
    ],
)
def test_a_malformed_program_is_refused(program: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_pickle(program)


def test_a_program_cut_off_anywhere_is_refused() -> None:
    program = tensor(b"K\2K\3\x86", b"K\3K\1\x86")
    read_pickle(program)
    for length in range(len(program)):
        with pytest.raises(ValueError, match=r"."):
            read_pickle(program[:length])


def test_every_single_opcode_is_read_or_refused() -> None:
    for opcode in pickletools.opcodes:
        for before in (b"", b"N", b"(N", b"](N", b"}(NN", b"NNN"):
            program = before + opcode.code.encode("latin-1") + b"\0" * 8 + b"1\n1\n."
            with suppress(ValueError):
                read_pickle(program)


@pytest.mark.parametrize("digits", [5000, 1_000_000])
def test_a_number_of_thousands_of_digits_is_refused(digits: int) -> None:
    for program in (b"I%s\n.", b"L%sL\n."):
        with pytest.raises(ValueError, match="digits"):
            read_pickle(program % (b"7" * digits))


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        (b"(J\xff\xff\xff\xfft", b"K\1\x85", b"K\0"),
        (b"K\2\x85", b"J\xff\xff\xff\xff\x85", b"K\0"),
        (b"K\2\x85", b"K\1\x85", b"J\xff\xff\xff\xff"),
        (b"G@\0\0\0\0\0\0\0\x85", b"K\1\x85", b"K\0"),
        (b"\x88\x85", b"K\1\x85", b"K\0"),
        (b"K\2\x85", b"\x88\x85", b"K\0"),
        (b"N", b")", b"K\0"),
        (b"K\2", b"K\1\x85", b"K\0"),
        (text("12"), text("12"), b"K\0"),
        (b"}", b"}", b"K\0"),
        (b"K\2\x85", b"K\1K\1\x86", b"K\0"),
        (b"(" + b"K\1" * 65 + b"t", b"(" + b"K\1" * 65 + b"t", b"K\0"),
        (long(2**62) + b"K\4\x86", b"K\1K\1\x86", b"K\0"),
        (b"K\0" + long(2**62) + b"\x86", b"K\1K\1\x86", b"K\0"),
        (long(2**63) + b"\x85", b"K\1\x85", b"K\0"),
        (long(1 << 100_000) + b"\x85", b"K\1\x85", b"K\0"),
        (b"K\1\x85", long(1 << 100_000) + b"\x85", b"K\0"),
        (b"K\1\x85", b"K\1\x85", long(1 << 100_000)),
    ],
)
def test_a_tensor_of_an_impossible_shape_is_refused(
    shape: bytes, stride: bytes, offset: bytes
) -> None:
    with pytest.raises(ValueError, match="impossible shape"):
        read_pickle(tensor(shape, stride, offset))


@pytest.mark.parametrize("size", [b"J\xff\xff\xff\xff", b"\x88", b"N", long(2**63)])
def test_a_storage_of_an_impossible_size_is_refused(size: bytes) -> None:
    with pytest.raises(ValueError, match="storage"):
        read_pickle(tensor(b")", b")", storage=STORAGE.replace(b"Kd", size)))


# resources ---------------------------------------------------------------------------------------

HUGE = 100_000
LONG_SHAPE = b"(" + b"K\1" * HUGE + b"tq\0"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(b"]" * HUGE + b"a" * (HUGE - 1) + b".", id="lists in lists"),
        pytest.param(b"N" + b"\x85" * HUGE + b".", id="tuples in tuples"),
        pytest.param((b"}" + text("a")) * HUGE + b"N" + b"s" * HUGE + b".", id="dicts in dicts"),
        pytest.param(b"(" * HUGE + b"l" * HUGE + b".", id="marks"),
        pytest.param(b"N" + b"2\x86" * HUGE + b".", id="tuples that double at each level"),
        pytest.param(b"]q\0" + b"h\0a" * HUGE + b".", id="a list in itself"),
        pytest.param(
            b"N" + b"".join(b"p-%d\n" % (i * (2**61 - 1)) for i in range(1, 30_000)) + b".",
            id="numbers of objects that collide",
        ),
        pytest.param(
            b"}(" + b"".join(long(i * (2**61 - 1)) + b"N" for i in range(30_000)) + b"u.",
            id="keys that collide",
        ),
        pytest.param(
            LONG_SHAPE + (tensor(b"h\0", b"h\0")[:-1] + b"0") * 5000 + b".",
            id="tensors of endless shape",
        ),
        pytest.param(
            long(1 << 800_000) + b"q\0" + b"(" + b"h\0" * 2000 + b"l.",
            id="giant numbers",
        ),
        pytest.param(b"r\xff\xff\xff\x7f", id="a huge number of an object"),
        pytest.param(b"Nr\xff\xff\xff\x7f.", id="a huge number of an object that is there"),
    ],
)
def test_a_program_made_to_take_long_is_done_with_soon(program: bytes) -> None:
    started = time.process_time()
    with suppress(ValueError):
        read_pickle(program)
    assert time.process_time() - started < 3


def test_an_object_numbered_beyond_the_program_is_refused() -> None:
    for number in (b"p-1\n", b"p1000\n", b"r\xff\xff\xff\xff"):
        with pytest.raises(ValueError, match="invalid number for an object"):
            read_pickle(b"N" + number + b".")
