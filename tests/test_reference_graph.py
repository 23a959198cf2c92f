"""The segmentation model as a graph: exported, compiled, and with masks switched in between."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import NAMES, pixel_values, recorded_model
from small_models import small_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.testing import assert_close

from reference_model import (
    EomtDinov3ForUniversalSegmentation,
    EomtDinov3ForUniversalSegmentationOutput,
    masked_attention,
)

Model = EomtDinov3ForUniversalSegmentation


def compiled(model: Model) -> Callable[..., EomtDinov3ForUniversalSegmentationOutput]:
    """As one graph or not at all; the kernels stay those of the eager model."""
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def exported(model: Model) -> Callable[..., EomtDinov3ForUniversalSegmentationOutput]:
    return torch.export.export(model, (pixels(),)).module()


def pixels(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def model() -> Model:
    """With masks off."""
    model = small_model(image_size=32)
    model.attn_mask_probs.zero_()
    return model.eval()


def assert_equal(
    ours: EomtDinov3ForUniversalSegmentationOutput, theirs: EomtDinov3ForUniversalSegmentationOutput
) -> None:
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)


@pytest.mark.numbers
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_and_a_compiled_model_give_the_same_logits(name: str) -> None:
    model, values = recorded_model(name), pixel_values(name)
    with torch.no_grad():
        output = model(values)
        program = torch.export.export(model, (values,))
        assert_equal(program.module()(values), output)
        assert_equal(compiled(model)(values), output)

    operations = {node.op for node in program.graph.nodes}
    assert operations == {"placeholder", "call_function", "output"}
    assert not any("cond" in str(node.target) for node in program.graph.nodes)


def test_masks_that_are_on_are_exported_and_compiled_too(model: Model) -> None:
    off = model(pixels())
    model.attn_mask_probs.fill_(1)
    on = model(pixels())

    assert not torch.equal(on.class_queries_logits, off.class_queries_logits)
    assert_equal(compiled(model)(pixels()), on)
    assert_equal(exported(model)(pixels()), on)


def fill(model: Model) -> None:
    model.attn_mask_probs.fill_(1)


def fill_in_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        model.attn_mask_probs.fill_(1)


def anneal(model: Model) -> None:
    model.anneal_attention_masks(0, start_steps=[1, 1], end_steps=[2, 2])


def load(model: Model) -> None:
    model.load_state_dict(model.state_dict() | {"attn_mask_probs": torch.ones(2)})


def load_in_place(model: Model) -> None:
    model.load_state_dict(model.state_dict() | {"attn_mask_probs": torch.ones(2)}, assign=True)


def replace(model: Model) -> None:
    model.attn_mask_probs = torch.ones(2)


def replace_the_data(model: Model) -> None:
    model.attn_mask_probs.data = torch.ones(2)


def replace_by_an_inference_tensor(model: Model) -> None:
    with torch.inference_mode():
        model.attn_mask_probs = torch.zeros(2)
        model(pixels())
        model.attn_mask_probs.fill_(1)


def replace_by_a_parameter(model: Model) -> None:
    del model.attn_mask_probs
    model.attn_mask_probs = torch.nn.Parameter(torch.ones(2))


def register_again(model: Model) -> None:
    model.register_buffer("attn_mask_probs", torch.ones(2))


def swap(model: Model) -> None:
    torch.utils.swap_tensors(model.attn_mask_probs, torch.ones(2))


def replace_by_a_view(model: Model) -> None:
    both = torch.tensor([1.0, 0.0])
    model.attn_mask_probs = both
    model.eval()
    model.attn_mask_probs = both[:1].expand(2)


def fill_after_a_move(model: Model) -> None:
    model.to(torch.float64).to(torch.float32)
    model.attn_mask_probs.fill_(1)


CHANGES = (
    fill,
    fill_in_inference_mode,
    anneal,
    load,
    load_in_place,
    replace,
    replace_the_data,
    replace_by_an_inference_tensor,
    replace_by_a_parameter,
    replace_by_a_view,
    register_again,
    swap,
    fill_after_a_move,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_whatever_writes_to_the_buffer_switches_masks(
    model: Model, change: Callable[[Model], None]
) -> None:
    ones = {**model.state_dict(), "attn_mask_probs": torch.ones(2)}
    expected = functional_call(model, ones, (pixels(),))
    off = model(pixels())
    change(model)

    assert not torch.equal(off.class_queries_logits, expected.class_queries_logits)
    assert_equal(model(pixels()), expected)
    assert_equal(compiled(model)(pixels()), expected)


@pytest.mark.parametrize("change", [fill, anneal, load, fill_after_a_move])
def test_a_copy_has_masks_of_its_own(model: Model, change: Callable[[Model], None]) -> None:
    off = model(pixels())
    twin = copy.deepcopy(model)
    change(twin)

    assert_equal(model(pixels()), off)
    assert not torch.equal(twin(pixels()).class_queries_logits, off.class_queries_logits)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        fill,
        fill_in_inference_mode,
        anneal,
        replace,
        replace_the_data,
        replace_by_a_view,
        register_again,
        swap,
        fill_after_a_move,
    ],
    ids=lambda change: change.__name__,
)
def test_an_export_of_masks_that_may_have_changed_is_refused(
    model: Model, change: Callable[[Model], None], copied: bool
) -> None:
    model(pixels())
    model = copy.deepcopy(model) if copied else model
    change(model)

    with pytest.raises(RuntimeError, match=r"call eval\(\) on the model"):
        exported(model)
    assert_equal(exported(model.eval())(pixels()), model(pixels()))


def test_a_call_with_other_masks_is_not_what_is_exported(model: Model) -> None:
    off = model(pixels())
    functional_call(model, {"attn_mask_probs": torch.ones(2)}, (pixels(),))

    with pytest.raises(RuntimeError, match=r"call eval\(\) on the model"):
        exported(model)
    assert_equal(exported(model.eval())(pixels()), off)


def test_a_strict_export_has_the_masks_that_are_on(model: Model) -> None:
    model(pixels())
    model.attn_mask_probs = torch.ones(2)

    program = torch.export.export(model, (pixels(),), strict=True)
    assert_equal(program.module()(pixels()), model(pixels()))


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_changes_that_torch_does_not_count_are_read_in_training_and_by_eval(
    model: Model, training: bool
) -> None:
    """As those of DistributedDataParallel, which sends one process's buffers to the others."""
    model.train(training)
    off = model(pixels())
    model.attn_mask_probs.numpy()[:] = 1

    on = model(pixels()) if training else model.eval()(pixels())
    assert not torch.equal(on.class_queries_logits, off.class_queries_logits)


@pytest.mark.parametrize("change", [load, load_in_place])
def test_weights_that_are_loaded_can_be_exported_at_once(
    model: Model, change: Callable[[Model], None]
) -> None:
    model(pixels())
    change(model)

    program = exported(model)
    assert_equal(program(pixels()), model(pixels()))


def test_an_exported_file_is_read_in_another_process(model: Model, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(model, (pixels(),)), tmp_path / "model.pt2")
    code = (
        "import sys, torch\n"
        "from reference_model import EomtDinov3ForUniversalSegmentationOutput as Output\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "assert isinstance(model(torch.zeros(1, 3, 32, 32)), Output)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt2"], check=True)


def test_the_compiler_is_not_imported_with_the_model() -> None:
    """It takes longer to import than a small model to convert."""
    code = "import sys, reference_model.model; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_probabilities_are_marked_as_torch_marks_constants() -> None:
    marked: Any = torch.compiler.assume_constant_result(lambda: None)

    assert vars(marked).items() <= vars(Model._known_probabilities).items()
    assert vars(marked)


@torch.no_grad()
def test_the_buffer_is_read_only_when_it_has_changed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it waits for the GPU."""
    read = []
    read_values = masked_attention._ReadProbabilities

    def count(buffer: Tensor) -> object:
        read.append(buffer)
        return read_values(buffer)

    monkeypatch.setattr(masked_attention, "_ReadProbabilities", count)
    for _ in range(3):
        model(pixels())
    assert read == []
    model.attn_mask_probs.fill_(1)
    for _ in range(3):
        model(pixels())
    assert len(read) == 1
    model.train()  # as some do in every step, which reads it by itself
    assert len(read) == 1


@torch.no_grad()
def test_a_compiled_training_step_follows_the_buffer(model: Model) -> None:
    model.train()
    step = compiled(model)
    outputs = []
    for probability in (1.0, 0.0, 1.0):
        model.attn_mask_probs.fill_(probability)
        outputs.append(step(pixels()).class_queries_logits)
    with_masks, without, again = outputs

    assert torch.equal(with_masks, again)
    assert not torch.equal(with_masks, without)
    model.eval().attn_mask_probs.zero_()
    assert torch.equal(without, model(pixels()).class_queries_logits)


def test_a_compiled_training_step_is_one_graph_whatever_the_labels() -> None:
    """And has the loss and the gradients of the eager step, with its kernels and random numbers."""
    torch.compiler.reset()
    model = small_model(image_size=32, train_num_points=20).train()
    backend = CompileCounter()
    step = torch.compile(model, backend=backend)
    for turn, counts in enumerate([(3, 2), (2, 4), (1, 9), (0, 1), (0, 0)]):
        labels = {
            "mask_labels": [pixels(count)[:, 0] > 0 for count in counts],
            "class_labels": [torch.arange(count) % 2 for count in counts],
        }
        model.attn_mask_probs.fill_(0.8 - 0.2 * turn)
        # nothing is compiled again, not even what has no graph
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            assert_close(
                gradients_of(step, model, labels),
                gradients_of(model, model, labels),
                rtol=0,
                atol=0,
            )
    assert backend.frame_count == 1


def gradients_of(
    step: Callable[..., Any], model: Model, labels: dict[str, list[Tensor]]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses of a training step, and their gradients."""
    torch.manual_seed(0)
    output = step(pixels(2), **labels)
    return output.loss_dict, list(torch.autograd.grad(output.loss, list(model.parameters())))


@torch.no_grad()
def test_an_export_may_leave_the_batch_open(model: Model) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (pixels(2),), dynamic_shapes={"pixel_values": {0: batch}})

    for size in (1, 3):
        assert_equal(program.module()(pixels(size)), model(pixels(size)))
