"""The training loss: against transformers, on hand-made cases, and in a short training run."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HANGS
from small_models import small_model
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EomtDinov3ForUniversalSegmentation as TransformersModel
from transformers import logging as transformers_logging

from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation, Prediction
from reference_model.loss import Labels, SetCriterion, match

pytestmark = pytest.mark.numbers

# transformers' model takes squares only, and its masks are wrong for gated backbones
PLAIN_AND_SQUARE = ("shapes_panoptic_128", "tiny_panoptic_64", "tiny_semantic_48")
PARTS = {"loss_mask", "loss_dice", "loss_cross_entropy"}

Converted = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _random_numbers_of_its_own() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def load(folder: Path, **changes: Any) -> EomtDinov3ForUniversalSegmentation:
    config = replace(EomtDinov3Config.from_pretrained(folder), **changes)
    return EomtDinov3ForUniversalSegmentation.from_pretrained(folder, config=config)


def load_transformers(folder: Path) -> Any:
    transformers_logging.disable_progress_bar()
    return TransformersModel.from_pretrained(folder)


def scenes(config: EomtDinov3Config, *counts: int) -> dict[str, Any]:
    """Pictures of so many rectangles in their classes' colours, with labels, as model inputs."""
    random = torch.Generator().manual_seed(5)
    assert isinstance(config.image_size, int)
    size = config.image_size
    colours = torch.randn(config.num_labels, 3, generator=random)
    pixel_values = 0.1 * torch.randn(len(counts), 3, size, size, generator=random)
    mask_labels, class_labels = [], []
    for picture, count in zip(pixel_values, counts, strict=True):
        classes = torch.randint(config.num_labels, (count,), generator=random)
        masks = torch.zeros(count, size, size)
        for index in range(count):
            top, left = torch.randint(size // 2, (2,), generator=random).tolist()
            height, width = torch.randint(size // 4, size // 2, (2,), generator=random).tolist()
            area = slice(top, top + height), slice(left, left + width)
            masks[:, *area] = 0  # what lies in front hides what lies behind
            masks[index, *area] = 1
            picture[:, *area] += colours[classes[index]][:, None, None]
        mask_labels.append(masks)
        class_labels.append(classes)
    return {
        "pixel_values": pixel_values,
        "mask_labels": mask_labels,
        "class_labels": class_labels,
    }


def seeded(model: Any, inputs: dict[str, Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return model(**inputs)


def given_to_the_loss(output: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """A model's final logits, masks and classes, and the labels: what losses are computed from."""
    logits = output.masks_queries_logits, output.class_queries_logits
    return *logits, inputs["mask_labels"], inputs["class_labels"]


def criterion(**changes: Any) -> SetCriterion:
    values: dict[str, Any] = {
        "id2label": {0: "sky", 1: "sea", 2: "sand"},
        "train_num_points": 2000,
    }
    return SetCriterion(EomtDinov3Config(**(values | changes)))


def losses_of(
    criterion: SetCriterion, masks: Tensor, classes: Tensor, *labels: Any
) -> dict[str, Tensor]:
    """The losses of one prediction."""
    return criterion.forward([Prediction(masks, classes)], *labels)[0]


def quarters(size: int = 16) -> Tensor:
    """The four quarters of a picture as masks, (4, size, size)."""
    half = size // 2
    masks = torch.zeros(2, 2, 2, half, 2, half)
    for row in range(2):
        for column in range(2):
            masks[row, column, row, :, column] = 1
    return masks.reshape(4, size, size)


# --- transformers' loss ---------------------------------------------------------------------


# As a share of sums of a few dozen losses, each a mean over some 10,000 points: transformers sums
# in another order, and float32 rounds each sum to 6e-8 of it.
SUMMATION = 1e-6


@pytest.mark.parametrize("name", PLAIN_AND_SQUARE)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@torch.no_grad()
def test_the_loss_equals_transformers(
    name: str, training: bool, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same predictions: those of transformers' model differ in the last bits.

    The points whose masks are the least decided are chosen by their logits, and one point more or
    less moves a loss of 90 by 1e-4.
    """
    ours, theirs = load(converted(name)), load_transformers(converted(name))
    inputs, predict = scenes(ours.config, 3, 0, 5), ours.predict
    predictions: list[Prediction] = []

    def predict_and_keep(*arguments: Any) -> Prediction:
        predictions.append(predict(*arguments))
        return predictions[-1]

    monkeypatch.setattr(ours, "predict", predict_and_keep)
    monkeypatch.setattr(theirs, "predict", lambda _: predictions.pop(0))
    for keep_probability in (0.0, 0.5, 1.0):  # of the masks of masked attention
        losses = []
        for model in (ours, theirs):
            model.train(training).attn_mask_probs.fill_(keep_probability)
            losses.append(seeded(model, inputs).loss)
        assert not predictions
        assert_close(losses[0], losses[1], rtol=SUMMATION, atol=0)


def test_its_gradients_equal_transformers(converted: Converted) -> None:
    folder = converted("shapes_panoptic_128")
    ours, theirs = load(folder).train(), load_transformers(folder).train()
    for model in (ours, theirs):
        seeded(model, scenes(ours.config, 4, 2)).loss.backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        gradient = expected[key].grad
        assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("name", [*PLAIN_AND_SQUARE, "tiny_instance_64_gated"])
@torch.no_grad()
def test_the_same_logits_cost_the_same_as_in_transformers(name: str, converted: Converted) -> None:
    ours, theirs = load(converted(name)), load_transformers(converted(name))
    inputs = scenes(ours.config, 2, ours.config.num_queries)
    output = seeded(ours, inputs)
    torch.manual_seed(3)
    expected = theirs.get_loss_dict(*given_to_the_loss(output, inputs), auxiliary_predictions=None)
    assert_close(output.loss_dict, expected, rtol=SUMMATION, atol=0)


@pytest.mark.parametrize("name", [*PLAIN_AND_SQUARE, "tiny_instance_64_gated"])
@torch.no_grad()
def test_more_segments_than_queries_cost_what_they_do_in_the_original(
    name: str, converted: Converted
) -> None:
    ours, theirs = load(converted(name)), load_transformers(converted(name))
    queries = ours.config.num_queries
    inputs = scenes(ours.config, 2, queries + 10)
    output = seeded(ours, inputs)
    masks, classes, *labels = given_to_the_loss(output, inputs)

    # training/mask_classification_loss.py: what transformers gives for one mask, by the pairs
    torch.manual_seed(3)
    matches = theirs.criterion.matcher(masks, classes, *labels)
    sums = theirs.criterion.loss_masks(masks, labels[0], matches, 1)
    pairs = sum(len(segments) for _, segments in matches)
    assert pairs == 2 + queries
    for part in ("loss_mask", "loss_dice"):
        expected = theirs.weight_dict[part] * sums[part] / pairs
        assert_close(output.loss_dict[part], expected, rtol=SUMMATION, atol=0)

    # transformers itself divides by the segments, and has the same cross entropy
    torch.manual_seed(3)
    other = theirs.get_loss_dict(masks, classes, *labels, auxiliary_predictions=None)
    share = pairs / sum(map(len, labels[1]))
    for part, factor in {"loss_mask": share, "loss_dice": share, "loss_cross_entropy": 1}.items():
        assert_close(other[part], factor * output.loss_dict[part], rtol=SUMMATION, atol=0)


# --- what the loss covers -------------------------------------------------------------------


def test_training_covers_the_predictions_of_every_block(converted: Converted) -> None:
    model = load(converted("tiny_panoptic_64")).train()
    output = seeded(model, scenes(model.config, 2))
    suffixes = ["", *(f"_{block}" for block in range(model.config.num_blocks))]
    assert output.loss_dict.keys() == {part + suffix for part in PARTS for suffix in suffixes}
    assert_close(output.loss, sum(output.loss_dict.values()))


def test_evaluation_covers_the_predictions_that_it_makes(converted: Converted) -> None:
    model = load(converted("tiny_panoptic_64"))
    inputs = scenes(model.config, 2)
    assert seeded(model, inputs).loss_dict.keys() == PARTS
    model.attn_mask_probs[-1] = 1
    last = model.config.num_blocks - 1
    masked = seeded(model, inputs).loss_dict
    assert masked.keys() == PARTS | {f"{part}_{last}" for part in PARTS}
    asked = seeded(model, inputs | {"output_block_logits": True}).loss_dict
    assert len(asked) == 3 * (model.config.num_blocks + 1)


def test_there_is_no_loss_without_labels(converted: Converted) -> None:
    output = load(converted("tiny_panoptic_64"))(torch.zeros(1, 3, 64, 64))
    assert output.loss is None
    assert output.loss_dict is None


# --- hand-made cases ------------------------------------------------------------------------


def test_a_right_answer_costs_almost_nothing_in_whatever_order_it_is_given() -> None:
    labels = [quarters(128)], [torch.tensor([0, 1, 2, 0])]
    order = [2, 5, 0, 4]  # the queries of the segments
    masks, classes = torch.full((1, 6, 128, 128), -30.0), torch.full((1, 6, 4), -30.0)
    masks[0, order] = 60 * quarters(128) - 30
    classes[0, order, [0, 1, 2, 0]] = 30
    classes[0, [1, 3], 3] = 30
    right = losses_of(criterion(), masks, classes, *labels)
    assert right["loss_cross_entropy"] < 1e-4
    # between pixels the edges are blurred, in the logits less than in the labels
    assert right["loss_dice"] < 0.2
    assert right["loss_mask"] < 1

    inverted = losses_of(criterion(), -masks, -classes, *labels)
    assert all(loss > 2 for loss in inverted.values())


@pytest.mark.smoke  # of scipy
def test_a_query_takes_the_segment_that_suits_its_mask_and_its_class() -> None:
    masks = torch.zeros(3, 16, 16)
    masks[:2] = 20 * quarters()[:2] - 10
    classes = torch.zeros(3, 4)
    classes[2, 1] = 5
    labels = Labels(quarters()[[1, 0, 3]], torch.tensor([0, 0, 1]), [3])
    points = criterion().draw_points([3], 3, masks.device).matching
    costs = criterion().costs(Prediction(masks[None], classes[None]), labels, points)
    queries, segments = match(costs[None], [3])[0]
    assert dict(zip(queries.tolist(), segments.tolist(), strict=True)) == {0: 1, 1: 0, 2: 2}


def test_queries_without_a_segment_count_little_in_the_cross_entropy() -> None:
    classes = torch.tensor([[[2.0, 0, 0, 1], [0, 1, 0, 3], [0, 0, 0, 0]]])
    masks = torch.full((1, 3, 16, 16), -10.0)
    masks[0, 0] = 20 * quarters()[0] - 10
    weighted = criterion(no_object_weight=0.25, class_weight=3.0)
    labels = [quarters()[:1]], [torch.tensor([0])]
    loss = losses_of(weighted, masks, classes, *labels)["loss_cross_entropy"]
    logs = -classes[0].log_softmax(dim=-1)
    expected = 3 * (logs[0, 0] + 0.25 * logs[1, 3] + 0.25 * logs[2, 3]) / 1.5
    assert_close(loss, expected)


def test_parts_are_weighted_by_the_config() -> None:
    masks, classes = torch.randn(1, 6, 16, 16), torch.randn(1, 6, 4)
    labels = [quarters()], [torch.tensor([0, 1, 2, 0])]

    losses = []
    for scale in (1.0, 2.0):
        weighted = criterion(mask_weight=scale, dice_weight=2 * scale, class_weight=3 * scale)
        torch.manual_seed(0)
        losses.append(losses_of(weighted, masks, classes, *labels))
    assert_close(losses[1], {name: 2 * loss for name, loss in losses[0].items()})


def test_segments_without_a_query_do_not_dilute_the_others() -> None:
    # undecided everywhere: log 2 at every point, whatever the segments
    logits, labels = (torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 4)), torch.tensor([0, 1, 2, 0])
    loss = losses_of(criterion(mask_weight=3.0), *logits, [quarters()], [labels])["loss_mask"]
    assert_close(loss, 3 * torch.tensor(2.0).log())


def test_points_gather_where_a_mask_is_undecided() -> None:
    logits = torch.linspace(-5, 5, 64).expand(2, 1, 64, 64)  # undecided at x = 0.5
    sampling = criterion(oversample_ratio=3.0, importance_sample_ratio=0.75)
    drawn = sampling.draw_points([2], 2, logits.device)
    points = sampling.uncertain_points(logits, drawn)
    assert points.shape == (2, 2000, 2)
    # of three times as many candidates the nearest quarter lies within 0.125
    near = (points[:, :, 0] - 0.5).abs() < 0.14
    # zeros lie around the mask, and the outermost half pixels change over to them
    edge = ((points - 0.5).abs() > 0.5 - 0.5 / 64).any(dim=2)
    assert (near | edge)[:, :1500].all()
    assert (near | edge)[:, 1500:].float().mean() < 0.4
    assert points[:, :, 1].std() > 0.25


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.float64])
def test_the_labels_of_each_picture_may_have_any_dtype(
    dtype: torch.dtype, converted: Converted
) -> None:
    model = load(converted("tiny_panoptic_64"))
    inputs = scenes(model.config, 2, 1)
    masks, classes = inputs["mask_labels"], inputs["class_labels"]
    cast = inputs | {
        "mask_labels": [masks[0].to(dtype), masks[1].to(torch.uint8)],
        "class_labels": [classes[0].to(torch.uint16), classes[1].int()],
    }
    assert torch.equal(seeded(model, cast).loss, seeded(model, inputs).loss)


def test_pictures_without_segments_still_train_the_class_no_object(converted: Converted) -> None:
    model = load(converted("tiny_panoptic_64")).train()
    output = seeded(model, scenes(model.config, 0, 0))
    assert output.loss_dict["loss_mask"] == 0
    assert output.loss_dict["loss_dice"] == 0
    assert output.loss > 0
    output.loss.backward()
    for key, parameter in model.named_parameters():  # which distributed training insists on
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_the_seed_decides_the_loss(converted: Converted) -> None:
    model = load(converted("tiny_panoptic_64")).train()
    inputs = scenes(model.config, 2, 1)
    first, again, other = (seeded(model, inputs, seed).loss for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_overflow_does_not_stop_training() -> None:
    masks, classes = torch.randn(1, 6, 16, 16), torch.randn(1, 6, 4)
    masks[0, 0] = torch.nan
    masks[0, 1] = torch.inf
    labels = [quarters()], [torch.tensor([0, 1, 2, 0])]
    losses = losses_of(criterion(), masks, classes, *labels)
    assert all(loss.isfinite() for loss in losses.values())
    masks[:] = torch.nan
    assert losses_of(criterion(), masks, classes, *labels)["loss_mask"].isnan()


# --- precision and processes ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_a_loss_in_float32(dtype: torch.dtype, converted: Converted) -> None:
    model = load(converted("tiny_panoptic_64"), train_num_points=1000).train()
    inputs = scenes(model.config, 4, 2)
    expected = seeded(model, inputs).loss
    with torch.autocast("cpu", dtype):
        loss = seeded(model, inputs).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.03, atol=0)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_half_precision_and_autocast_leave_the_criterion_alone() -> None:
    masks, classes = torch.randn(1, 6, 16, 16).bfloat16(), torch.randn(1, 6, 4).bfloat16()
    labels = [quarters()], [torch.tensor([0, 1, 2, 0])]
    losses = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(losses_of(criterion(), masks, classes, *labels))
    assert losses[0]["loss_mask"].dtype == torch.float32
    assert_close(losses[1], losses[0], rtol=0, atol=0)


PROCESS = """
import sys
import torch
from reference_model import EomtDinov3Config, Prediction
from reference_model.loss import SetCriterion

rank = int(sys.argv[2])
criterion = SetCriterion(EomtDinov3Config(train_num_points=100))
masks = (torch.arange(64).view(8, 8) % (rank + 2) == 0).float().expand(1 + 5 * rank, 8, 8)

def loss():
    torch.manual_seed(0)
    prediction = Prediction(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 3))
    return criterion([prediction], [masks], [torch.zeros(len(masks))])[0]["loss_mask"]

alone = loss()
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2
)
print((loss() / alone).item())
torch.distributed.destroy_process_group()
"""


def test_processes_share_the_number_of_pairs(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ratios = [float(process.communicate(timeout=HANGS)[0]) for process in processes]
    # 1 and 6 segments for 4 queries, so 1 and 4 pairs, each divided by their mean 2.5
    assert ratios == pytest.approx([1 / 2.5, 4 / 2.5])


# --- waits for the device -------------------------------------------------------------------


META = torch.device("meta")


class CopiesToTheHost(TorchDispatchMode):
    """Gives the host zeros for what it reads of the meta device, which has no values.

    Attributes:
        waits: shapes of what it waits for.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.waits: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._to_copy.default or kwargs.get("device") in (None, META):
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            self.waits.append(tuple(args[0].shape))
        return torch.zeros_like(args[0], device=kwargs["device"])


def test_a_training_step_waits_for_the_device_twice_whatever_the_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device without values, everything else that reads a value fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no meta device
    model = small_model(train_num_points=10).to(META)
    pixel_values = torch.zeros(3, 3, 64, 64, device=META)
    for device in ("meta", "cpu"):
        with torch.device(device):
            masks = [torch.zeros(count, 16, 16, dtype=torch.bool) for count in (3, 0, 7)]
            classes = [torch.zeros(len(own), dtype=torch.int) for own in masks]
        with CopiesToTheHost() as copies:
            model.train()(pixel_values, masks, classes).loss.backward()
        # the probabilities of the blocks' masks; (predictions, queries, segments), the costs
        assert copies.waits == [(2,), (3, 6, 10)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_step_waits_for_a_gpu_twice() -> None:
    model = small_model(train_num_points=10).train().cuda()
    with torch.device("cuda"):
        labels = [torch.ones(5, 64, 64)] * 2, [torch.zeros(5, dtype=torch.long)] * 2
        pixel_values = torch.zeros(2, 3, 64, 64)
    model(pixel_values, *labels).loss.backward()  # what happens but once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(pixel_values, *labels).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught]
    assert sum("called a synchronizing" in wait for wait in waits) == 2, waits


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_probability", [0.0, 1.0])
def test_every_parameter_learns(keep_probability: float, converted: Converted) -> None:
    model = load(converted("shapes_panoptic_128")).train()
    model.attn_mask_probs.fill_(keep_probability)
    seeded(model, scenes(model.config, 4, 2)).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_a_short_training_run_teaches_new_heads(converted: Converted) -> None:
    model = load(converted("shapes_panoptic_128"), train_num_points=1000).train()
    inputs = scenes(model.config, 4, 3)
    model.class_predictor.reset_parameters()
    model.mask_head.fc3.reset_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(12):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.anneal_attention_masks(step + 1, [0, 4], [4, 8])
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_masked_attention_fades_block_by_block(converted: Converted) -> None:
    model = load(converted("shapes_panoptic_128"))
    starts, ends = [100, 200], [200, 400]
    for step, expected in (
        (0, [1, 1]),
        (100, [1, 1]),
        (125, [0.75**0.9, 1]),
        (200, [0, 1]),
        (300, [0, 0.5**0.9]),
        (400, [0, 0]),
        (10_000, [0, 0]),
    ):
        model.anneal_attention_masks(step, starts, ends)
        assert_close(model.attn_mask_probs, torch.tensor(expected, dtype=torch.float32))
    model.anneal_attention_masks(125, starts, ends, power=2.0)
    assert model.attn_mask_probs.tolist() == [0.5625, 1]


def test_an_end_at_the_start_switches_masking_off_at_once(converted: Converted) -> None:
    model = load(converted("shapes_panoptic_128"))
    model.anneal_attention_masks(7, [7, 8], [7, 8])
    assert model.attn_mask_probs.tolist() == [0, 1]


# --- refusals -------------------------------------------------------------------------------


def test_every_block_needs_its_steps(converted: Converted) -> None:
    model = load(converted("shapes_panoptic_128"))
    with pytest.raises(ValueError, match="start_steps has 1 values and end_steps 2; expected 2"):
        model.anneal_attention_masks(0, [1], [2, 3])


def test_masks_without_classes_are_refused(converted: Converted) -> None:
    model = load(converted("tiny_panoptic_64"))
    with pytest.raises(ValueError, match="both mask_labels and class_labels"):
        model(torch.zeros(1, 3, 64, 64), mask_labels=[torch.zeros(1, 64, 64)])


@pytest.mark.parametrize(
    ("masks", "classes", "message"),
    [
        ([(1, 16, 16)], [[0]], "mask_labels are for 1 .* expected both for the 2"),
        ([(1, 16, 16), (1, 16, 16)], [[0]], "class_labels for 1; expected both for the 2"),
        ([(1, 16, 16), (16, 16)], [[0], [0]], r"mask_labels\[1\] has the shape \(16, 16\)"),
        ([(1, 16, 16), (1, 16, 8)], [[0], [0]], r"mask_labels\[1\] .* the same height and width"),
        ([(1, 16, 16), (2, 16, 16)], [[0], [0]], r"class_labels\[1\] \(1,\); expected"),
        ([(1, 16, 16), (2, 16, 16)], [[0], [1, 3]], r"class_labels\[1\] goes from 1 to 3; .* to 2"),
        ([(2, 16, 16), (1, 16, 16)], [[-1, 9], [0]], r"class_labels\[0\] goes from -1 to 9"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    masks: list[tuple[int, ...]], classes: list[list[int]], message: str
) -> None:
    labels = [torch.zeros(shape) for shape in masks], [torch.tensor(ids) for ids in classes]
    with pytest.raises(ValueError, match=message):
        losses_of(criterion(), torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 4), *labels)


def test_a_missing_scipy_is_named_with_the_remedy(
    converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(converted("tiny_panoptic_64"))
    inputs = scenes(model.config, 1)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"SciPy.*eomt-convert\[train\]"):
        model(**inputs)
    assert model(inputs["pixel_values"]).loss is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask_weight", -1),
        ("dice_weight", "much"),
        ("class_weight", None),
        ("train_num_points", 0),
        ("oversample_ratio", 0.5),
        ("importance_sample_ratio", 1.5),
    ],
)
def test_invalid_settings_of_the_loss_are_refused_by_the_config(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key} is {value!r}"):
        criterion(**{key: value})
