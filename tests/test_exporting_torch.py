"""Models written as programs of torch.export, and read without this package."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from small_models import small_model
from torch.export import ExportedProgram

from converter.checks.diagnosis.stages import named_outputs
from converter.exporting.torch_writing import write_torch
from converter.exporting.tracing import output_names, trace
from reference_model import EomtDinov3ForUniversalSegmentation

Model = EomtDinov3ForUniversalSegmentation


def unmasked() -> Model:
    model = small_model(num_hidden_layers=2, num_blocks=1)
    model.attn_mask_probs.zero_()
    return model.eval()


def traced() -> ExportedProgram:
    return trace(unmasked(), image_size=None, layers=True)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return traced()


@pytest.fixture(scope="module")
def path(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_torch(program, tmp_path_factory.mktemp("torch"))


def test_another_program_reads_and_runs_it_at_any_size(path: Path, tmp_path: Path) -> None:
    pixels = torch.randn(3, 3, 96, 32, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, tmp_path / "pixels")
    code = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "outputs = program.module()(torch.load('pixels'))\n"
        "assert type(outputs) is tuple\n"
        "torch.save(dict(zip(program.graph_signature.user_outputs, outputs)), 'outputs')\n"
        "assert not {'reference_model', 'converter'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / "outputs")
    model = unmasked()
    with torch.no_grad():
        expected = named_outputs(model(pixels, output_hidden_states=True))
    expected["masks_queries_logits"] = expected["mask_logits"]
    expected["class_queries_logits"] = expected["class_logits"]

    names = output_names(model.config, layers=True)
    assert list(outputs) == [name.replace(".", "_") for name in names]
    for name, output in zip(names, outputs.values(), strict=True):
        torch.testing.assert_close(output, expected[name])


def test_tensors_have_the_models_names_and_values(path: Path) -> None:
    stored, expected = torch.export.load(path).state_dict, unmasked().state_dict()

    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def test_it_holds_no_pickle_no_path_and_no_stack_trace(path: Path) -> None:
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        sizes = {
            name.partition("/")[2]: archive.getinfo(name).file_size for name in archive.namelist()
        }
        weights = json.loads(archive.read("archive/data/weights/model_weights_config.json"))

    assert sizes["data/sample_inputs/model.pt"] == 0
    assert not any(entry["use_pickle"] for entry in weights["config"].values())
    for text in (str(Path.cwd()), str(Path.home()), sys.prefix, "stack_trace", ".py"):
        assert text.encode() not in content


@pytest.mark.parametrize("seed", ["1", "3"])  # which give torch's sets two orders
def test_another_process_writes_the_same_bytes(path: Path, tmp_path: Path, seed: str) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_exporting_torch import traced, write_torch\n"
        "write_torch(traced(), Path.cwd())\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    as_users_have_it = os.environ | {
        "PYTHONHASHSEED": seed,
        "TORCH_FAKE_TENSOR_DISPATCH_CACHE": "1",
    }
    subprocess.run(command, cwd=tmp_path, check=True, env=as_users_have_it)

    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error(program: ExportedProgram, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left"):
        write_torch(program, tmp_path)


def test_a_traced_model_is_as_it_was() -> None:
    model = unmasked()
    trace(model, image_size=(32, 32), layers=False)

    assert type(model(torch.zeros(1, 3, 32, 32))).__name__ == f"{Model.__name__}Output"
    assert model(torch.zeros(1, 3, 32, 32)).hidden_states is None
