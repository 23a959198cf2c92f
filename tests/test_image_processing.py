"""From pictures to the network's input, and the processor's own file."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, NAMES, same_but_for_edges
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, EomtImageProcessorPil

from converter.checks.diagnosis.stages import STAGE_TOLERANCE
from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor

pytestmark = pytest.mark.numbers

SEMANTIC = "tiny_semantic_48"
SQUARE = EomtImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}, do_pad=True)


def paths(name: str) -> list[Path]:
    return sorted((FIXTURES / name / "images").iterdir())


def levels(images: Any, processor: EomtImageProcessor = SQUARE, **settings: Any) -> torch.Tensor:
    """Pixels before they are rescaled and normalised, (batch, 3, height, width)."""
    inputs = processor(images, do_rescale=False, do_normalize=False, **settings)
    pixels: torch.Tensor = inputs.pixel_values
    return pixels


def first_pixel(image: Any) -> list[float]:
    values: list[float] = levels(image)[0, :, 0, 0].tolist()
    return values


def random_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(256, size=(height, width, *channels), dtype=np.uint8))


def square_settings(windows: bool) -> dict[str, Any]:
    size = {"shortest_edge": 32, "longest_edge": None if windows else 32}
    return {"size": size, "do_split_image": windows, "do_pad": not windows}


# recorded pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recorded_inputs_are_reproduced_bit_for_bit(
    name: str, converted: Callable[[str], Path]
) -> None:
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    expected = recorded["pipeline.crops" if name == SEMANTIC else "pipeline.pixels"]
    processor = EomtImageProcessor.from_pretrained(converted(name))

    assert torch.equal(levels(paths(name), processor), expected.float())


def test_recorded_windows_are_reproduced(converted: Callable[[str], Path]) -> None:
    recorded = load_file(FIXTURES / SEMANTIC / "recorded.safetensors")
    inputs = EomtImageProcessor.from_pretrained(converted(SEMANTIC))(paths(SEMANTIC))

    assert torch.equal(torch.stack(inputs.patch_offsets), recorded["pipeline.origins"])


def test_pixels_are_normalised_as_the_original_does_bit_for_bit() -> None:
    every_level = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = SQUARE(every_level, do_resize=False, do_pad=False).pixel_values

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = torch.from_numpy(every_level).expand(3, -1, -1)
    assert torch.equal(values[0], (pixels / 255 - mean) / std)


def test_patch_embeddings_of_recorded_pictures_are_the_recorded_ones(
    converted: Callable[[str], Path],
) -> None:
    name = "tiny_panoptic_64"
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    pixels = recorded["pixels"].permute(0, 2, 3, 1).numpy()
    processor = EomtImageProcessor.from_pretrained(converted(name))
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(converted(name))

    with torch.inference_mode():
        embeddings = model.embeddings(processor(pixels).pixel_values)

    # sums of 768 products: equal to the last bit where the processor adds up in the same order
    expected = recorded["patch_embeddings"]
    tolerance = STAGE_TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=tolerance)


# kinds of pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (Image.new("L", (4, 4), 200), [200, 200, 200]),
        (Image.new("1", (4, 4), 1), [255, 255, 255]),
        (Image.new("CMYK", (4, 4), (0, 255, 0, 0)), [255, 0, 255]),
        (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(2), [10, 20, 30]),
        (Image.new("RGBA", (4, 4), (200, 100, 50, 51)), [40, 20, 10]),
        (Image.new("LA", (4, 4), (200, 51)), [40, 40, 40]),
        (Image.new("I;16", (4, 4), 0x8080), [128, 128, 128]),
        (Image.new("I", (4, 4), 0x8080), [128, 128, 128]),
        (Image.new("I", (4, 4), 70_000), [255, 255, 255]),
    ],
    ids=["grey", "bit", "cmyk", "palette", "rgba", "grey-alpha", "16-bit", "32-bit", "beyond"],
)
def test_every_kind_of_image_becomes_rgb(image: Image.Image, rgb: list[int]) -> None:
    assert first_pixel(image) == rgb


def test_a_transparent_palette_colour_becomes_black(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    Image.new("RGB", (4, 4), (10, 20, 30)).quantize(2).save(path, transparency=0)

    assert first_pixel(path) == [0, 0, 0]


def test_16_bit_files_are_scaled_not_clipped(tmp_path: Path) -> None:
    steps = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    path = tmp_path / "depth.png"
    Image.fromarray(steps).save(path)

    expected = torch.from_numpy(np.round(steps / 257)).float()
    assert torch.equal(levels(path)[0, 0], expected)
    assert torch.equal(levels(steps)[0, 0], expected)


def test_files_are_turned_upright_and_opened_images_are_not(tmp_path: Path) -> None:
    path = tmp_path / "rotated.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    image = random_image(20, 32)
    image.save(path, exif=exif)
    upright = levels(image.transpose(Image.Transpose.ROTATE_270))

    assert torch.equal(levels(path), upright)
    assert torch.equal(levels(str(path)), upright)
    with path.open("rb") as file:
        assert torch.equal(levels(file), upright)
    assert torch.equal(levels(BytesIO(path.read_bytes())), upright)
    with Image.open(path) as opened:
        assert torch.equal(levels(opened), levels(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_arrays_and_tensors_are_pictures_with_channels_on_either_side(mode: str) -> None:
    image = random_image(21, 34, mode)
    expected = levels(image)
    last = np.asarray(image).reshape(21, 34, -1)
    first = np.moveaxis(last, -1, 0)

    for pixels in (last, first, torch.from_numpy(last.copy()), torch.from_numpy(first.copy())):
        assert torch.equal(levels(pixels), expected)
    assert torch.equal(levels(last.astype(np.int64)), expected)


def test_an_ambiguous_shape_is_channels_first_unless_specified() -> None:
    pixels = np.zeros((3, 8, 3), dtype=np.uint8)
    pixels[0] = 255

    assert first_pixel(pixels) == [255, 0, 0]
    in_rows = levels(pixels, do_pad=False, input_data_format="channels_last")
    assert in_rows[0, :, 0, 0].tolist() == [255, 255, 255]


def test_a_batch_may_be_a_list_or_a_fourth_dimension() -> None:
    pictures = torch.stack([torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (1, 2)])

    assert torch.equal(levels(pictures), levels(list(pictures)))
    assert levels(pictures)[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((3, 8, 8), dtype=np.float32), "float32 values"),
        (np.full((8, 8), 256), "from 256 to 256"),
        (np.zeros((8, 8, 2), dtype=np.uint8), r"shape \(8, 8, 2\)"),
    ],
)
def test_arrays_that_are_not_pictures_are_refused(picture: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SQUARE(picture)


# sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "filled"),
    [(30, 100, (24, 80)), (100, 30, (48, 14)), (48, 80, (48, 80)), (1, 1000, (1, 80))],
)
def test_pictures_fit_into_a_size_that_is_not_square(
    height: int, width: int, filled: tuple[int, int]
) -> None:
    pixels = levels(np.full((height, width), 255, dtype=np.uint8), size={"height": 48, "width": 80})

    assert pixels.shape == (1, 3, 48, 80)
    assert pixels[0, 0, : filled[0], : filled[1]].eq(255).all()
    assert pixels.count_nonzero() == 3 * filled[0] * filled[1]


@pytest.mark.parametrize(
    ("height", "width", "offsets"),
    [
        (48, 200, [[0, 0, 80], [0, 60, 140], [0, 120, 200]]),
        (96, 80, [[0, 0, 48], [0, 48, 96]]),
        (48, 80, [[0, 0, 80]]),
    ],
)
def test_windows_that_are_not_square_slide_along_the_side_that_is_too_long(
    height: int, width: int, offsets: list[list[int]]
) -> None:
    image = random_image(height, width)
    processor = EomtImageProcessor(size={"height": 48, "width": 80}, do_split_image=True)
    windows = levels(image, processor)

    assert torch.stack(processor(image).patch_offsets).tolist() == offsets
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    axis = 1 if height > 48 else 2
    for window, (_, start, end) in zip(windows, offsets, strict=True):
        assert torch.equal(window, pixels.narrow(axis, start, end - start))


def test_a_size_with_only_one_side_is_refused() -> None:
    with pytest.raises(ValueError, match="height and width"):
        EomtImageProcessor(size={"height": 48})


def test_windows_without_resizing_are_refused() -> None:
    with pytest.raises(ValueError, match="do_split_image needs do_resize"):
        SQUARE(random_image(8, 8), do_split_image=True, do_resize=False)


def test_unpadded_pictures_of_several_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one: pad them"):
        SQUARE([random_image(8, 16), random_image(16, 8)], do_pad=False)


@pytest.mark.parametrize("windows", [False, True])
def test_pixel_values_equal_transformers_if_sizes_need_no_rounding(windows: bool) -> None:
    settings = square_settings(windows)
    image = random_image(48, 96)
    ours = EomtImageProcessor(**settings)(image)
    theirs = EomtImageProcessorPil(**settings)(image, return_tensors="pt")

    torch.testing.assert_close(ours.pixel_values, theirs.pixel_values, rtol=0, atol=1e-6)
    for our_offset, their_offset in zip(
        ours.get("patch_offsets", []), theirs["patch_offsets"], strict=True
    ):
        assert torch.equal(our_offset, their_offset)


# segmentation maps -----------------------------------------------------------------------------

INSTANCES = {0: 0, 1: 4, 2: 3, 3: 4, 300: 1}


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize(
    ("classes", "windows"),
    [
        (None, False),
        (None, True),
        (INSTANCES, False),
        (INSTANCES, True),
        # for windows, transformers looks such lists up by window
        ([INSTANCES, {**INSTANCES, 2: 1}], False),
    ],
)
def test_segmentation_maps_become_the_labels_that_transformers_makes(
    classes: Any, windows: bool, ignore_index: int | None
) -> None:
    random = np.random.default_rng(0)
    maps = [random.choice([0, 1, 2, 3], size=size).repeat(8, 0) for size in ((6, 96), (8, 40))]
    images = [random_image(*entry.shape) for entry in maps]
    settings = {**square_settings(windows), "ignore_index": ignore_index}
    ours = EomtImageProcessor(**settings)(images, maps, classes)
    theirs = EomtImageProcessorPil(**settings)(images, maps, classes, return_tensors="pt")

    for name in ("mask_labels", "class_labels"):
        for our_label, their_label in zip(ours[name], theirs[name], strict=True):
            assert our_label.dtype == their_label.dtype
            assert torch.equal(our_label, their_label)


def test_ids_of_maps_may_be_large_and_maps_images() -> None:
    ids = np.zeros((32, 32), dtype=np.int32)
    ids[:, 16:] = 70_000
    inputs = SQUARE(random_image(32, 32), Image.fromarray(ids), {0: 5, 70_000: 2})

    assert inputs.class_labels[0].tolist() == [5, 2]
    assert torch.equal(inputs.mask_labels[0][1], torch.from_numpy(ids > 0).float())


def test_a_map_of_ignored_pixels_only_has_no_labels() -> None:
    inputs = SQUARE(random_image(32, 32), np.zeros((32, 32), dtype=np.uint8), ignore_index=255)

    assert inputs.mask_labels[0].shape == (0, 32, 32)
    assert inputs.class_labels[0].shape == (0,)


@pytest.mark.parametrize(
    ("segmentation_map", "message"),
    [
        (np.zeros((8, 9), dtype=np.uint8), "of their size"),
        (np.zeros((8, 8)), "float64 of shape"),
        (np.full((8, 8), 7), "no class for id 7"),
    ],
)
def test_maps_that_do_not_fit_are_refused(segmentation_map: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SQUARE(random_image(8, 8), segmentation_map, {0: 0})


# what goes on to the model ---------------------------------------------------------------------


def test_moving_inputs_to_a_dtype_leaves_integers_alone() -> None:
    inputs = EomtImageProcessor(size={"shortest_edge": 32}, do_split_image=True)(
        random_image(32, 64), np.ones((32, 64), dtype=np.uint8)
    )

    assert inputs.to("cpu", torch.bfloat16) is inputs
    assert inputs.pixel_values.dtype == torch.bfloat16
    assert inputs["patch_offsets"][0].dtype == torch.int64
    assert inputs.class_labels[0].dtype == torch.int64
    assert inputs.to(device="meta").patch_offsets[0].is_meta


def test_the_documented_example_runs_with_other_imports(converted: Callable[[str], Path]) -> None:
    from reference_model import EomtDinov3ForUniversalSegmentation
    from reference_model import EomtImageProcessor as AutoImageProcessor

    model_id = converted("shapes_panoptic_128")
    processor = AutoImageProcessor.from_pretrained(model_id)
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(model_id)
    image = Image.open(paths("shapes_panoptic_128")[1])

    inputs = processor(images=image, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    segmentation = processor.post_process_panoptic_segmentation(
        outputs, target_sizes=[image.size[::-1]]
    )[0]["segmentation"]

    recorded = load_file(FIXTURES / "shapes_panoptic_128" / "recorded.safetensors")
    assert same_but_for_edges(segmentation, recorded["pipeline.1.panoptic@0.8"][..., 1])


def test_only_torch_tensors_are_returned() -> None:
    with pytest.raises(ValueError, match="return_tensors is 'np'"):
        SQUARE(random_image(8, 8), return_tensors="np")


# loading and saving ----------------------------------------------------------------------------


def test_stuff_classes_come_from_the_models_config(converted: Callable[[str], Path]) -> None:
    processor = EomtImageProcessor.from_pretrained(converted("tiny_panoptic_64"))

    assert processor.stuff_classes == (4, 5, 6)


def test_without_a_config_the_stuff_classes_are_unknown(model: Path) -> None:
    (model / "config.json").unlink()

    assert EomtImageProcessor.from_pretrained(model).stuff_classes is None


def test_settings_given_when_loading_override_the_file(model: Path) -> None:
    processor = EomtImageProcessor.from_pretrained(model, do_pad=False, stuff_classes=[1])

    assert not processor.do_pad
    assert processor.stuff_classes == (1,)


def test_a_processor_loads_from_the_hub_at_a_revision(model: Path, hub: Hub) -> None:
    names = ("config.json", "preprocessor_config.json")
    hub.create_repo("owner/model", {name: (model / name).read_bytes() for name in names})

    processor = EomtImageProcessor.from_pretrained("owner/model", revision="main")

    assert processor == EomtImageProcessor.from_pretrained(model)
    assert processor == EomtImageProcessor.from_pretrained("owner/model", local_files_only=True)


def test_a_processor_loads_from_a_repository_without_a_config(model: Path, hub: Hub) -> None:
    name = "preprocessor_config.json"
    hub.create_repo("owner/model", {name: (model / name).read_bytes()})

    assert EomtImageProcessor.from_pretrained("owner/model").stuff_classes is None


def test_a_saved_processor_comes_back_equal(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in NAMES:
        processor = EomtImageProcessor.from_pretrained(converted(name))
        processor.save_pretrained(tmp_path / name)
        assert EomtImageProcessor.from_pretrained(tmp_path / name) == processor


def test_transformers_loads_what_is_saved_and_the_other_way_round(tmp_path: Path) -> None:
    ours = EomtImageProcessor(
        size={"shortest_edge": 48, "longest_edge": None},
        do_split_image=True,
        image_mean=[0.1, 0.2, 0.3],
        stuff_classes=[3],
    )
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    assert isinstance(theirs, EomtImageProcessorPil)
    image = random_image(48, 96)
    inputs = theirs(image, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], ours(image).pixel_values)
    assert EomtImageProcessor.from_pretrained(tmp_path / "theirs").image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "preprocessor_config.json"),
        ("[]", "expected a JSON object"),
        ('{"image_processor_type": "ViTImageProcessor"}', "is for ViTImageProcessor"),
        ('{"size": {"height": 0, "width": 4}}', "preprocessor_config.json: size is"),
    ],
)
def test_a_file_of_another_processor_is_refused_by_name(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)

    with pytest.raises(ValueError, match=message):
        EomtImageProcessor.from_pretrained(tmp_path)


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        EomtImageProcessor.from_pretrained(tmp_path)


def test_the_saved_file_has_the_keys_that_the_converter_writes(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = converted("tiny_instance_64_gated")
    EomtImageProcessor.from_pretrained(folder).save_pretrained(tmp_path)

    name = "preprocessor_config.json"
    saved, written = (json.loads((place / name).read_text()) for place in (tmp_path, folder))
    assert saved == {**written, "stuff_classes": []}
