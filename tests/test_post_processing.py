"""From the network's outputs to segments: as recorded, and as transformers makes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EDGES, FIXTURES, same_but_for_edges
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EomtImageProcessorPil

from converter.checks.comparison import TOLERANCE
from reference_model import (
    EomtDinov3ForUniversalSegmentation,
    EomtDinov3ForUniversalSegmentationOutput,
    EomtImageProcessor,
    post_processing,
)

pytestmark = pytest.mark.numbers

PANOPTIC = ("shapes_panoptic_128", "tiny_panoptic_64", "tiny_panoptic_48x80")
SEMANTIC = "tiny_semantic_48"
INSTANCE = "tiny_instance_64_gated"
SQUARE = {"shortest_edge": 64, "longest_edge": 64}
# how maps are compared if they come from recorded outputs, and from a model's own
SAME = {"recording": torch.equal, "model": same_but_for_edges}
SIZES = [(64, 64), (96, 192), (211, 50)]  # (height, width), one for each of a batch


def output_of(
    mask_logits: Tensor, class_logits: Tensor, patch_offsets: list[Tensor] | None = None
) -> EomtDinov3ForUniversalSegmentationOutput:
    return EomtDinov3ForUniversalSegmentationOutput(
        mask_logits, class_logits, torch.empty(0), patch_offsets
    )


class Recording:
    """A recorded pipeline: its tensors, pictures, sizes and processor."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(FIXTURES / name / "recorded.safetensors")
        self.pictures = sorted((FIXTURES / name / "images").iterdir())
        self.sizes = []
        for path in self.pictures:
            with Image.open(path) as image:
                self.sizes.append((image.height, image.width))
        self.processor = EomtImageProcessor.from_pretrained(folder)

    def outputs(self, source: str) -> EomtDinov3ForUniversalSegmentationOutput:
        """The recorded outputs, or our own model's for the same pictures."""
        inputs = self.processor(self.pictures)
        if source == "model":
            model = EomtDinov3ForUniversalSegmentation.from_pretrained(self.folder)
            with torch.inference_mode():
                outputs: EomtDinov3ForUniversalSegmentationOutput = model(**inputs)
                return outputs
        return output_of(
            self.tensors["pipeline.mask_logits"],
            self.tensors["pipeline.class_logits"],
            inputs.get("patch_offsets"),
        )


def random_outputs(queries: int, classes: int, batch: int = 3) -> Any:
    """Round masks; half of the queries are sure of a class."""
    random = torch.Generator().manual_seed(0)
    centres = 16 * torch.rand(2, batch, queries, 1, 1, generator=random)
    rows, columns = torch.arange(16.0)[:, None], torch.arange(16.0)
    masks = 12 - 4 * ((rows - centres[0]) ** 2 + (columns - centres[1]) ** 2).sqrt()
    logits = torch.randn(batch, queries, classes + 1, generator=random)
    labels = torch.randint(classes, (queries // 2,), generator=random)
    logits[:, range(queries // 2), labels] += 12
    return output_of(masks, logits)


def recorded(name: str, converted: Callable[[str], Path]) -> Recording:
    return Recording(name, converted(name))


# recorded results ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["recording", "model"])
@pytest.mark.parametrize(("threshold", "overlap"), [(0.8, 0.8), (0.3, 0.1)])
@pytest.mark.parametrize("name", PANOPTIC)
def test_recorded_panoptic_maps_are_reproduced(
    name: str, threshold: float, overlap: float, source: str, converted: Callable[[str], Path]
) -> None:
    recording = recorded(name, converted)
    outputs = recording.outputs(source)
    results = recording.processor.post_process_panoptic_segmentation(
        outputs, recording.sizes, threshold=threshold, overlap_mask_area_threshold=overlap
    )

    no_class = outputs.class_queries_logits.shape[-1] - 1
    for index, result in enumerate(results):
        expected = recording.tensors[f"pipeline.{index}.panoptic@{threshold}"]
        labels = [segment["label_id"] for segment in result["segments_info"]]
        assert [segment["id"] for segment in result["segments_info"]] == list(range(len(labels)))
        classes = torch.tensor([*labels, no_class])[result["segmentation"]]
        for ours, theirs in zip(
            (classes, result["segmentation"]), expected.unbind(-1), strict=True
        ):
            assert SAME[source](ours, theirs)


@pytest.mark.parametrize("source", ["recording", "model"])
def test_recorded_semantic_maps_and_scores_are_reproduced(
    source: str, converted: Callable[[str], Path]
) -> None:
    recording = recorded(SEMANTIC, converted)
    outputs = recording.outputs(source)
    post_process = recording.processor.post_process_semantic_segmentation
    maps = post_process(outputs, recording.sizes)
    scored = post_process(outputs, recording.sizes, return_segmentation_scores=True)

    for index, (segmentation, result) in enumerate(zip(maps, scored, strict=True)):
        expected = recording.tensors[f"pipeline.{index}.semantic_scores"]
        assert SAME[source](segmentation, recording.tensors[f"pipeline.{index}.semantic"])
        assert torch.equal(result.segmentation, segmentation)
        # scores of a model's own outputs are off by no more than its logits
        atol = 1e-5 if source == "recording" else TOLERANCE
        torch.testing.assert_close(result.segmentation_scores, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("source", ["recording", "model"])
def test_recorded_instances_are_reproduced(source: str, converted: Callable[[str], Path]) -> None:
    recording = recorded(INSTANCE, converted)
    outputs = recording.outputs(source)
    results = recording.processor.post_process_instance_segmentation(
        outputs, recording.sizes, top_k=60, return_binary_maps=True
    )

    for index, (result, size) in enumerate(zip(results, recording.sizes, strict=True)):
        scores, labels, areas = (
            recording.tensors[f"pipeline.{index}.instance_{what}"]
            for what in ("scores", "labels", "areas")
        )
        order = scores.argsort(descending=True)
        ours = sorted(result["segments_info"], key=lambda segment: -segment["score"])
        assert result["binary_maps"].shape == (60, *size)
        assert result["binary_maps"].dtype == torch.bool
        assert [segment["label_id"] for segment in ours] == labels[order].tolist()
        assert [segment["score"] for segment in ours] == pytest.approx(
            scores[order].tolist(), rel=0, abs=1e-5
        )
        our_areas = [int(result["binary_maps"][segment["id"]].sum()) for segment in ours]
        tolerance = 0 if source == "recording" else EDGES * size[0] * size[1]
        assert our_areas == pytest.approx(areas[order].tolist(), rel=0, abs=tolerance)


# transformers' results -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_panoptic_results_are_those_of_transformers(threads: int) -> None:
    outputs, before = random_outputs(40, 9), torch.get_num_threads()
    settings: Any = {"size": SQUARE, "do_pad": True}
    arguments: Any = {"overlap_mask_area_threshold": 0.3, "stuff_classes": [1, 2, 5]}
    torch.set_num_threads(threads)
    try:
        ours, theirs = (
            kind(**settings).post_process_panoptic_segmentation(outputs, SIZES, **arguments)
            for kind in (EomtImageProcessor, EomtImageProcessorPil)
        )
    finally:
        torch.set_num_threads(before)

    assert all(len(result["segments_info"]) > 3 for result in ours)
    assert_equal_results(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2])
def test_instance_results_are_those_of_transformers(threads: int) -> None:
    outputs, before = random_outputs(40, 9), torch.get_num_threads()
    settings: Any = {"size": SQUARE, "do_pad": True}
    torch.set_num_threads(threads)
    try:
        ours, theirs = (
            kind(**settings).post_process_instance_segmentation(outputs, SIZES)
            for kind in (EomtImageProcessor, EomtImageProcessorPil)
        )
    finally:
        torch.set_num_threads(before)

    assert all(len(result["segments_info"]) > 3 for result in ours)
    assert_equal_results(ours, theirs)


def assert_equal_results(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for result, expected in zip(ours, theirs, strict=True):
        assert result["segments_info"] == expected["segments_info"]
        assert torch.equal(result["segmentation"], expected["segmentation"].long())


@pytest.mark.parametrize("working_elements", [1, 2**13, 2**21])
def test_semantic_results_are_those_of_transformers_bit_for_bit(
    working_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post_processing, "WORKING_ELEMENTS", working_elements)
    outputs = random_outputs(20, 30, batch=5)
    outputs.patch_offsets = list(
        torch.tensor([[0, 0, 64], [0, 64, 128], [1, 0, 64], [1, 32, 96], [2, 0, 64]])
    )
    sizes = [(50, 100), (240, 160), (70, 70)]
    settings: Any = {
        "size": {"shortest_edge": 64, "longest_edge": None},
        "do_split_image": True,
    }
    ours, theirs = (
        kind(**settings).post_process_semantic_segmentation(
            outputs, sizes, return_segmentation_scores=True
        )
        for kind in (EomtImageProcessor, EomtImageProcessorPil)
    )
    maps = EomtImageProcessor(**settings).post_process_semantic_segmentation(outputs, sizes)

    for result, expected, segmentation in zip(ours, theirs, maps, strict=True):
        assert torch.equal(result["segmentation_scores"], expected["segmentation_scores"])
        assert torch.equal(result["segmentation"], expected["segmentation"])
        assert torch.equal(segmentation, expected["segmentation"])


def test_a_size_that_is_not_a_power_of_two_times_the_masks_is_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(post_processing, "WORKING_ELEMENTS", 1)
    outputs = random_outputs(20, 30, batch=1)
    settings: Any = {"size": {"shortest_edge": 80, "longest_edge": None}}
    kinds: tuple[Any, Any] = EomtImageProcessor, EomtImageProcessorPil
    (ours,), (theirs,) = (
        kind(**settings).post_process_semantic_segmentation(
            outputs, [(80, 80)], return_segmentation_scores=True
        )
        for kind in kinds
    )

    assert torch.equal(ours["segmentation_scores"], theirs["segmentation_scores"])


# what the original does and transformers does not ----------------------------------------------


def full_masks(labels: list[int], classes: int) -> EomtDinov3ForUniversalSegmentationOutput:
    """One query per label, sure of it, each with an upright stripe of the masks of its own."""
    masks = torch.full((1, len(labels), 16, 16), -20.0)
    for query, stripe in enumerate(torch.arange(16).chunk(len(labels))):
        masks[0, query, :, stripe] = 20
    logits = torch.zeros(1, len(labels), classes + 1)
    logits[0, range(len(labels)), labels] = 20
    return output_of(masks, logits)


@pytest.mark.parametrize(
    ("known", "argument", "segments"),
    [((2,), None, 3), ((2,), [], 4), ((2,), [1], 4), (None, None, 4), (None, [2], 3)],
)
def test_segments_of_a_stuff_class_are_merged_unless_the_argument_says_otherwise(
    known: tuple[int, ...] | None, argument: list[int] | None, segments: int
) -> None:
    processor = EomtImageProcessor(size=SQUARE, do_pad=True, stuff_classes=known)
    (result,) = processor.post_process_panoptic_segmentation(
        full_masks([0, 2, 1, 2], 3), [(64, 64)], stuff_classes=argument
    )

    assert len(result["segments_info"]) == segments
    second, fourth = result["segmentation"][0, [20, 60]].tolist()
    assert (second == fourth) == (segments == 3)


def test_a_segment_stays_whose_overlap_is_just_the_threshold() -> None:
    masks = torch.full((1, 2, 16, 16), -20.0)
    masks[0, 0] = 2
    masks[0, 1, :8] = 20  # takes half of the first one's pixels
    logits = torch.tensor([[[20.0, 0, 0], [0, 20.0, 0]]])
    processor = EomtImageProcessor(size={"shortest_edge": 16, "longest_edge": 16}, do_pad=True)
    (result,) = processor.post_process_panoptic_segmentation(
        output_of(masks, logits), [(16, 16)], overlap_mask_area_threshold=0.5
    )

    assert [segment["label_id"] for segment in result["segments_info"]] == [0, 1]


def test_pictures_without_a_segment_have_an_empty_map() -> None:
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    outputs = output_of(torch.zeros(1, 5, 16, 16), torch.zeros(1, 5, 4))

    (panoptic,) = processor.post_process_panoptic_segmentation(outputs, [(30, 40)])
    (instances,) = processor.post_process_instance_segmentation(
        outputs, [(30, 40)], return_binary_maps=True
    )
    for result in (panoptic, instances):
        assert result["segments_info"] == []
        assert torch.equal(result["segmentation"], torch.full((30, 40), -1))
    assert instances["binary_maps"].shape == (0, 30, 40)


def test_top_k_keeps_pairs_with_empty_masks_and_low_scores() -> None:
    outputs = full_masks([0, 1], 3)
    outputs.masks_queries_logits[0, 1] = -20
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    (result,) = processor.post_process_instance_segmentation(
        outputs, [(64, 64)], top_k=4, return_binary_maps=True
    )
    segments = result["segments_info"]

    assert [segment["id"] for segment in segments] == [0, 1, 2, 3]
    assert {segment["label_id"] for segment in segments[:2]} == {0, 1}
    empty = next(segment for segment in segments if segment["label_id"] == 1)
    assert empty["score"] == 0
    assert not result["binary_maps"][empty["id"]].any()
    assert segments[-1]["score"] < 1e-6


def test_a_threshold_that_is_given_holds_for_top_k_too() -> None:
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    (result,) = processor.post_process_instance_segmentation(
        full_masks([0, 1], 3), [(64, 64)], top_k=4, threshold=0.5
    )

    assert [segment["label_id"] for segment in result["segments_info"]] == [0, 1]


def test_top_k_beyond_all_pairs_gives_them_all_with_the_best_on_top() -> None:
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    (result,) = processor.post_process_instance_segmentation(
        full_masks([2], 3), [(64, 64)], top_k=100
    )

    assert len(result["segments_info"]) == 3
    assert result["segments_info"][0]["label_id"] == 2
    assert torch.equal(result["segmentation"], torch.zeros(64, 64, dtype=torch.long))


def test_binary_maps_are_the_whole_masks_of_segments_that_overlap() -> None:
    outputs = full_masks([0, 1], 3)
    outputs.masks_queries_logits[0, 1] = 20
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    (result,) = processor.post_process_instance_segmentation(
        outputs, [(64, 64)], return_binary_maps=True
    )

    assert result["binary_maps"].dtype == torch.bool
    assert result["binary_maps"].flatten(1).sum(1).tolist() == [64 * 32, 64 * 64]
    assert result["segmentation"].unique().tolist() == [1]


def test_the_padding_of_a_semantic_picture_is_cut_off() -> None:
    outputs = full_masks([0, 1], 3)  # of the picture, 64x32 when resized, only the left stripe
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    (segmentation,) = processor.post_process_semantic_segmentation(outputs, [(128, 60)])

    assert torch.equal(segmentation, torch.zeros(128, 60, dtype=torch.long))


def test_masks_of_unpadded_pictures_are_of_the_whole_picture() -> None:
    processor = EomtImageProcessor(size=SQUARE)
    outputs = full_masks([0, 1], 3)
    outputs.masks_queries_logits = outputs.masks_queries_logits[:, :, :8]  # of a picture 32x64
    (result,) = processor.post_process_panoptic_segmentation(outputs, [(20, 40)])

    assert result["segmentation"][0].tolist() == [0] * 20 + [1] * 20


def test_pictures_that_were_not_resized_lie_in_the_padding_as_they_are() -> None:
    processor = EomtImageProcessor(size=SQUARE, do_resize=False, do_pad=True)
    (result,) = processor.post_process_panoptic_segmentation(full_masks([0, 1], 3), [(20, 40)])

    assert result["segmentation"][0].tolist() == [0] * 32 + [1] * 8


def test_another_size_of_the_inputs_is_given_by_its_argument() -> None:
    outputs = random_outputs(10, 4, batch=1)
    wide: Any = {"height": 32, "width": 64}
    expected = EomtImageProcessor(size=wide, do_pad=True).post_process_panoptic_segmentation(
        outputs, [(50, 50)]
    )
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)

    assert_equal_results(
        processor.post_process_panoptic_segmentation(outputs, [(50, 50)], size=wide), expected
    )


# time and memory -------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_no_more_than_one_mask_is_enlarged_at_a_time(task: str) -> None:
    outputs = random_outputs(20, 4, batch=1)
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    post_process = getattr(processor, f"post_process_{task}_segmentation")
    with LargestTensor() as largest:
        (result,) = post_process(outputs, [(500, 500)])

    assert len(result["segments_info"]) > 3
    assert largest.bytes == 8 * 500 * 500  # the map, in int64


class Readings(TorchDispatchMode):
    """Counts the values that are read from tensors, each of which waits for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_no_value_is_read_back_for_a_query(task: str) -> None:
    outputs = random_outputs(20, 4, batch=1)
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    with Readings() as readings:
        getattr(processor, f"post_process_{task}_segmentation")(outputs, [(50, 50)])

    assert readings.count == 0


@pytest.mark.parametrize("size", [(64, 64), (31, 200), (211, 50)])
@pytest.mark.parametrize("mask_threshold", [0.2, 0.5])
def test_parts_of_a_picture_are_only_left_out_where_a_query_changes_nothing(
    size: tuple[int, int], mask_threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = random_outputs(40, 4)
    outputs.masks_queries_logits[0, :20] *= 3
    outputs.masks_queries_logits[1, :20] -= 300
    outputs.masks_queries_logits[2, 3, :5, :5] = torch.inf
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    thresholds: dict[str, Any] = {
        "mask_threshold": mask_threshold,
        "overlap_mask_area_threshold": 0.3,
    }
    regions, left_out = post_processing._regions, 0

    def spy(*arguments: Any) -> list[tuple[slice, slice]]:
        nonlocal left_out
        found = regions(*arguments)
        left_out += sum(rows.stop - rows.start < size[0] for rows, _ in found)
        return found

    monkeypatch.setattr(post_processing, "_regions", spy)
    cut = processor.post_process_panoptic_segmentation(outputs, [size] * 3, **thresholds)
    everything = slice(0, size[0]), slice(0, size[1])
    monkeypatch.setattr(post_processing, "_regions", lambda logits, *_: [everything] * len(logits))
    whole = processor.post_process_panoptic_segmentation(outputs, [size] * 3, **thresholds)

    assert left_out > 10
    for ours, expected in zip(cut, whole, strict=True):
        assert ours["segments_info"] == expected["segments_info"]
        assert torch.equal(ours["segmentation"], expected["segmentation"])


def test_classes_are_enlarged_one_at_a_time() -> None:
    outputs = random_outputs(60, 50, batch=1)
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    with LargestTensor() as largest:
        processor.post_process_semantic_segmentation(outputs, [(500, 500)])

    assert largest.bytes == 8 * 500 * 500


def test_classes_that_cannot_win_anywhere_are_not_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarged = []
    resize = post_processing._resize

    def counting(x: Tensor, size: tuple[int, int]) -> Tensor:
        enlarged.append(size)
        return resize(x, size)

    monkeypatch.setattr(post_processing, "_resize", counting)
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    processor.post_process_semantic_segmentation(full_masks([3, 40], 100), [(300, 300)])

    assert enlarged.count((300, 300)) == 2


def test_a_class_may_win_between_pixels_that_others_have() -> None:
    masks = torch.full((1, 3, 16, 16), -20.0)
    masks[0, 0, :, :8] = 20
    masks[0, 1, :, 8:] = 20
    masks[0, 2] = 0.4  # a probability of 0.6
    processor = EomtImageProcessor(size={"shortest_edge": 16, "longest_edge": 16}, do_pad=True)
    (segmentation,) = processor.post_process_semantic_segmentation(
        output_of(masks, 20 * torch.eye(3, 4)[None]), [(160, 160)]
    )

    assert segmentation[0, 77:83].tolist() == [0, 0, 2, 2, 1, 1]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_mean_probability_is_to_the_last_bit_that_of_all_masks_at_once(threads: int) -> None:
    logits = torch.randn(8, 300, 300, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = torch.stack([post_processing._mask_and_mean(entry)[1] for entry in logits])
        masks = (logits > 0).flatten(1)  # and as the original computes it
        expected = (logits.sigmoid().flatten(1) * masks).sum(1) / (masks.sum(1) + 1e-6)
    finally:
        torch.set_num_threads(before)

    assert torch.equal(ours, expected)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_outputs_may_be_in_half_precision_or_need_gradients(task: str) -> None:
    processor = EomtImageProcessor(size=SQUARE, do_pad=True)
    post_process = getattr(processor, f"post_process_{task}_segmentation")
    outputs = random_outputs(10, 4)
    masks, classes = outputs.masks_queries_logits, outputs.class_queries_logits
    half = output_of(masks.bfloat16(), classes.bfloat16())
    same = output_of(half.masks_queries_logits.float(), half.class_queries_logits.float())
    same.masks_queries_logits.requires_grad_()

    for ours, expected in zip(post_process(half, SIZES), post_process(same, SIZES), strict=True):
        if task == "semantic":
            assert torch.equal(ours, expected)
        else:
            assert_equal_results([ours], [expected])


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_one_target_size_is_needed_for_every_picture(task: str) -> None:
    post_process = getattr(EomtImageProcessor(size=SQUARE), f"post_process_{task}_segmentation")

    with pytest.raises(ValueError, match="there are 2 target_sizes; expected 3"):
        post_process(random_outputs(10, 4), SIZES[:2])
