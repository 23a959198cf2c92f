"""Shared fixtures: the offline checkpoints, converted once, and the command line."""

import gc
import json
import os
import shutil
import signal
import ssl
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# before torch is imported, here and in child processes: its threads would wait for those of the
# other workers of pytest-xdist
os.environ.setdefault("OMP_NUM_THREADS", "1")

# before torch is imported: with sizes left open, to fill and read the tracer's cache takes longer
# than to compute again. The exports are the same bytes.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

# before onnxruntime is imported by a test, which converter.runtimes does for its users
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from hub_client import TRANSFERS
from hub_server import Hub, choose_transfer, point_client_at, running_hub
from hypothesis import HealthCheck, settings
from numpy.typing import ArrayLike

import converter
from converter.cli import main

# Under nohup and in the background, shells ignore these signals, and child processes of tests would
# inherit that. A Python handler, unlike SIG_IGN, is reset to the default in child processes.
for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = (
    "shapes_panoptic_128",
    "tiny_panoptic_64",
    "tiny_panoptic_48x80",
    "tiny_semantic_48",
    "tiny_instance_64_gated",
)

# No deadline, as the time of examples depends on the load; and the same examples in every run.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("tests")

# seconds after which a process is taken to hang, even on a slow machine
HANGS = 600

# torch 2.9 and newer have a setting for every kind of operation
HAS_NEW_WAY = hasattr(torch.backends, "fp32_precision")


def products_are_full_float32() -> bool:
    """Whether torch is set to multiply float32 in full precision, on CPU and GPU."""
    if HAS_NEW_WAY:
        backends: Any = torch.backends
        found = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
        return found == {"ieee"}
    return torch.get_float32_matmul_precision() == "highest"


# Share of a picture's pixels that may lie on the other side of an edge: where two queries or two
# classes have nearly the same score, rounding decides, and that depends on the machine.
EDGES = 1e-3


def same_but_for_edges(ours: ArrayLike, expected: ArrayLike) -> bool:
    """Whether two maps of segments or classes, of the same size, agree."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    return ours.shape == expected.shape and float((ours != expected).mean()) <= EDGES


def pytest_collection_finish() -> None:
    """Spares the garbage collector what stays: modules and collected tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _separate_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the locks of temporary outputs out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _certificates_read_once() -> Iterator[None]:
    """Loads the system's certificates once for all Hub clients, which do not need them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The converted folder of an offline checkpoint, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        if not (folder / name).exists():
            converter.convert(name, folder / name)
        return folder / name

    return convert


@pytest.fixture(scope="session")
def exported(
    converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The export of an offline checkpoint, made once for all workers; not to be written to."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def export(name: str, **options: Any) -> Path:
        folder = shared / "exported" / "-".join([name, *map(str, options.values())])
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                converter.export(converted(name), folder, **options)
        return folder

    return export


@pytest.fixture
def model(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    """A separate copy of the converted tiny_panoptic_64, which a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(converted("tiny_panoptic_64"), folder)
    return folder


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `eomt-convert` with these arguments in a separate working directory for each test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


# for tests of features that only one way has
over_lfs = pytest.mark.parametrize("transfer", ["lfs"], indirect=True)
over_xet = pytest.mark.parametrize("transfer", ["xet"], indirect=True)
in_every_way = pytest.mark.parametrize("transfer", TRANSFERS, indirect=True)


@pytest.fixture(params=["xet", "lfs"])
def transfer(request: pytest.FixtureRequest) -> str:
    """How the test's client transfers large files; every test of the Hub runs in both ways."""
    way: str = request.param
    return way


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transfer: str) -> Iterator[Hub]:
    """An empty Hub, which this process's client uses without a token."""
    with running_hub() as hub:
        choose_transfer(hub, transfer)
        point_client_at(monkeypatch, hub, tmp_path / "home")
        yield hub


@pytest.fixture
def me(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user of the Hub, logged in; the token."""
    token = "hf_secret_of_me"  # noqa: S105
    hub.add_user("me", token)
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture(scope="session")
def derived_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the folders of `derived` are kept, by the way of their transfer."""
    return tmp_path_factory.mktemp("derived")


@pytest.fixture
def derived(hub: Hub, me: str, tmp_path: Path, transfer: str, derived_before: Path) -> Path:
    """A converted folder whose weights come from the Hub: a published checkpoint, but tiny.

    It was converted once, so that the test's own cache may lack the sources.
    """
    source = FIXTURES / "tiny_panoptic_64"
    hub.create_repo(
        "tue-mps/coco_panoptic_eomt_small_640_dinov3",
        {"pytorch_model.bin": source / "delta" / "pytorch_model.bin"},
    )
    backbone = {path.name: path for path in (source / "backbone").iterdir()}
    hub.create_repo(
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        {**backbone, "LICENSE.md": b"DINOv3 License\n"},
    )
    labels = tmp_path / "labels.json"
    categories = [{"id": i, "name": name, "isthing": i < 4} for i, name in enumerate("abcdefg")]
    labels.write_text(json.dumps({"categories": categories}))
    kept = derived_before / transfer
    if kept.exists():  # every Hub gives the same commits
        return Path(shutil.copytree(kept, tmp_path / "derived"))
    converter.convert(
        "coco_panoptic_small_640",
        tmp_path / "derived",
        image_size=64,
        labels=labels,
        recorded=source,
    )
    hub.requests.clear()
    shutil.copytree(tmp_path / "derived", kept)
    return tmp_path / "derived"
