"""Pictures in, files with segments out."""

import json
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import FIXTURES, same_but_for_edges
from hub_server import Hub
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.numpy import load_file

from converter import OutputError, UnreadableFileError, UsageError
from converter.cli.segment import segment_command
from converter.colours import class_colour
from converter.errors import EomtConvertError
from converter.pictures import segmenting
from converter.pictures.coco import encode_mask, id_map_png, measure
from converter.pictures.segmenting import SegmentedPicture, segment
from converter.version import __version__
from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

pytestmark = pytest.mark.numbers

Converted = Callable[[str], Path]

SHAPES, SEMANTIC, INSTANCE = "shapes_panoptic_128", "tiny_semantic_48", "tiny_instance_64_gated"


def images(name: str) -> Path:
    return FIXTURES / name / "images"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A copy of a picture, which a test may change."""
    return Path(shutil.copy(images(SHAPES) / "0.png", tmp_path / "street.png"))


def recorded(name: str) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = load_file(FIXTURES / name / "recorded.safetensors")
    return tensors


def read_ids(found: SegmentedPicture) -> NDArray[np.int64]:
    pixels = np.asarray(Image.open(found.id_map)).astype(np.int64)
    ids: NDArray[np.int64] = pixels @ np.array([1, 256, 256**2])
    return ids


def read_segments(found: SegmentedPicture) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(found.segments_file.read_text())
    return content


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(segment_command, [str(argument) for argument in arguments])


# what is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_panoptic_segments_are_the_recorded_ones(
    batch_size: int, converted: Converted, tmp_path: Path
) -> None:
    found = segment(converted(SHAPES), [images(SHAPES)], tmp_path, batch_size=batch_size)

    for index, picture in enumerate(found.pictures):
        classes, ids = np.moveaxis(recorded(SHAPES)[f"pipeline.{index}.panoptic@0.8"], -1, 0)
        (annotation,) = read_segments(picture)["annotations"]
        category = {0: len(found.names)} | {
            entry["id"]: entry["category_id"] for entry in annotation["segments_info"]
        }
        ours = read_ids(picture)
        assert same_but_for_edges(ours == 0, ids == -1)
        assert same_but_for_edges(np.vectorize(category.get)(ours), classes)
        assert len(np.unique(ours)) == len(np.unique(ids))


def test_semantic_segments_are_the_recorded_ones(converted: Converted, tmp_path: Path) -> None:
    found = segment(converted(SEMANTIC), [images(SEMANTIC)], tmp_path)

    for index, picture in enumerate(found.pictures):
        expected = recorded(SEMANTIC)[f"pipeline.{index}.semantic"]
        assert same_but_for_edges(read_ids(picture) - 1, expected)


def test_instances_have_the_recorded_areas_and_scores(converted: Converted, tmp_path: Path) -> None:
    found = segment(converted(INSTANCE), [images(INSTANCE)], tmp_path, threshold=0.3)

    assert sum(len(picture.segments) for picture in found.pictures) > 5
    for index, picture in enumerate(found.pictures):
        expected = {
            (label, area): score
            for label, area, score in zip(
                *(
                    recorded(INSTANCE)[f"pipeline.{index}.instance_{key}"].tolist()
                    for key in ("labels", "areas", "scores")
                ),
                strict=True,
            )
        }
        for entry in picture.segments:
            # recorded on another CPU, where a pixel at a mask's edge may be on the other side
            near = [
                score
                for (label, area), score in expected.items()
                if label == entry.category_id and abs(area - entry.area) <= 2
            ]
            assert entry.score is not None
            assert min(abs(entry.score - score) for score in near) < 1e-3


def test_a_higher_threshold_leaves_fewer_segments(converted: Converted, tmp_path: Path) -> None:
    arguments = converted(INSTANCE), [images(INSTANCE) / "0.png"]
    few = segment(*arguments, tmp_path / "few", threshold=0.85).pictures[0].segments
    many = segment(*arguments, tmp_path / "many", threshold=0.2).pictures[0].segments

    assert 0 < len(few) < len(many)
    assert all(entry.score is not None and entry.score >= 0.85 for entry in few)


def test_a_picture_is_turned_as_its_exif_data_says(converted: Converted, tmp_path: Path) -> None:
    upright = Image.open(images(SHAPES) / "1.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a quarter turn
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=rotated)

    found = segment(
        converted(SHAPES), [images(SHAPES) / "1.png", tmp_path / "turned.png"], tmp_path / "out"
    )
    straight, turned = found.pictures
    assert turned.size == (96, 160)
    assert straight.overlay is not None
    assert turned.overlay is not None
    assert straight.overlay.read_bytes() == turned.overlay.read_bytes()


# formats ----------------------------------------------------------------------------------------


def test_panoptic_json_describes_the_id_map(converted: Converted, tmp_path: Path) -> None:
    (picture,) = segment(converted(SHAPES), [images(SHAPES) / "2.png"], tmp_path).pictures
    content, ids = read_segments(picture), read_ids(picture)

    assert content["info"] == {"contributor": "eomt-convert", "version": __version__}
    assert content["images"] == [{"id": 1, "file_name": "2.png", "height": 200, "width": 140}]
    assert content["categories"][:4:3] == [
        {"id": 0, "name": "circle", "isthing": 1},
        {"id": 3, "name": "sky", "isthing": 0},
    ]
    (annotation,) = content["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (1, picture.id_map.name)
    assert {entry["id"] for entry in annotation["segments_info"]} == set(np.unique(ids)) - {0}
    for entry in annotation["segments_info"]:
        rows, columns = np.nonzero(ids == entry["id"])
        assert entry["area"] == len(rows)
        left, top, width, height = entry["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert entry["iscrowd"] == 0
        assert 0.8 <= entry["score"] <= 1


def test_semantic_segments_have_the_same_ids_in_every_picture_and_no_scores(
    converted: Converted, tmp_path: Path
) -> None:
    for picture in segment(converted(SEMANTIC), [images(SEMANTIC)], tmp_path).pictures:
        content = read_segments(picture)
        assert not any(category["isthing"] for category in content["categories"])
        for entry in content["annotations"][0]["segments_info"]:
            assert entry["id"] == entry["category_id"] + 1
            assert "score" not in entry


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools, by numpy
def test_pycocotools_reads_the_instances(converted: Converted, tmp_path: Path) -> None:
    arguments = converted(INSTANCE), [images(INSTANCE) / "0.png"], tmp_path
    (picture,) = segment(*arguments, threshold=0.2).pictures
    dataset = COCO(picture.segments_file)
    ids = read_ids(picture)

    scores = [annotation["score"] for _, annotation in sorted(dataset.anns.items())]
    assert scores == sorted(scores, reverse=True)
    covered = np.zeros(picture.size, dtype=bool)
    assert len(dataset.anns) == len(picture.segments) > 3
    for number, annotation in sorted(dataset.anns.items()):
        mask = dataset.annToMask(annotation).astype(bool)
        assert mask.sum() == annotation["area"]
        # the better one covers the other in the id map
        assert ((ids == number) == (mask & ~covered)).all()
        covered |= mask
    assert (covered == (ids > 0)).all()


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 90))))
def test_masks_are_encoded_as_pycocotools_does(mask: NDArray[np.bool_]) -> None:
    expected = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    encoded = encode_mask(mask)
    assert encoded == {"size": expected["size"], "counts": expected["counts"].decode()}


def test_long_runs_are_encoded_as_pycocotools_does() -> None:
    mask = np.zeros((3000, 2000), dtype=bool)
    mask[10:2990, 5:1900:7] = True
    expected = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    assert encode_mask(mask)["counts"] == expected["counts"].decode()


ID_MAPS = arrays.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@given(ID_MAPS)
def test_every_segment_is_measured(id_map: NDArray[np.uint16]) -> None:
    measured = measure(id_map)

    assert list(measured) == np.unique(id_map).tolist()
    for id, (area, (left, top, width, height)) in measured.items():
        rows, columns = np.nonzero(id_map == id)
        assert area == len(rows)
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)


@given(ID_MAPS)
def test_an_id_map_is_read_back_from_its_file(id_map: NDArray[np.uint16]) -> None:
    with Image.open(BytesIO(id_map_png(id_map))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        pixels = np.asarray(image).astype(np.uint16)
    assert (pixels[..., 0] + 256 * pixels[..., 1] == id_map).all()
    assert not pixels[..., 2].any()


def test_the_overlay_has_the_colours_of_the_classes(converted: Converted, tmp_path: Path) -> None:
    arguments = converted(SHAPES), [images(SHAPES) / "0.png"], tmp_path
    (picture,) = segment(*arguments, overlay="png").pictures
    assert picture.overlay is not None
    overlay = Image.open(picture.overlay)
    colours = {colour for _, colour in overlay.getcolors(overlay.width * overlay.height) or ()}
    assert {entry.category_id for entry in picture.segments} == {0, 3, 4}
    for class_id in range(6):
        assert (class_colour(class_id) in colours) == (class_id in {0, 3, 4})


# arguments --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with some pictures and other things."""
    place = tmp_path / "photos"
    (place / "more.png").mkdir(parents=True)
    ours = ("x.overlay.jpg", "x.overlay.png", "x.segments.png")
    for name in ("b.png", "a.JPG", "more.png/c.png", ".hidden.png", *ours):
        Image.new("RGB", (16, 16)).save(place / name)
    (place / "notes.txt").write_text("no picture")
    return place


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["."], ["a.JPG", "b.png"]),
        (["*.png"], ["b.png", "x.overlay.png", "x.segments.png"]),
        (["**/?.png"], ["b.png", "more.png/c.png"]),
        (["b.png", "."], ["b.png", "a.JPG"]),
        (["more.png", "b.*"], ["more.png/c.png", "b.png"]),
    ],
)
def test_folders_and_patterns_are_expanded_to_their_pictures(
    arguments: list[str],
    expected: list[str],
    folder: Path,
    converted: Converted,
    tmp_path: Path,
) -> None:
    pictures = [folder / argument for argument in arguments]
    found = segment(converted(SHAPES), pictures, tmp_path / "out")
    assert [entry.picture for entry in found.pictures] == [folder / name for name in expected]


def test_a_file_with_a_bracket_in_its_name_is_not_a_pattern(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    odd = picture.rename(tmp_path / "street[1].png")
    assert segment(converted(SHAPES), [odd], tmp_path).pictures[0].picture == odd


def test_pictures_of_equal_names_do_not_overwrite_each_other(
    converted: Converted, tmp_path: Path
) -> None:
    names = ["a/x.png", "b/x.png", "b/x.jpg", "b/X.png", "c/x-2.png"]
    for size, name in enumerate(names, start=20):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, 20)).save(tmp_path / name)
    found = segment(converted(SHAPES), [tmp_path / name for name in names], tmp_path / "out")

    assert len({str(entry.overlay).lower() for entry in found.pictures}) == len(names)
    for size, entry in enumerate(found.pictures, start=20):
        assert read_ids(entry).shape == (20, size)


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "not a picture of a known format"),
        (b"", "not a picture of a known format"),
        (png(64, 64), "truncated"),
        (png(60_000, 60_000), "exceeds limit"),
        (png(10_000, 10_000), "exceeds limit"),
        (None, "No such file"),
    ],
)
def test_unreadable_pictures_are_reported_and_skipped(
    content: bytes | None, reason: str, converted: Converted, picture: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "broken.png").write_bytes(content)
    result = run(converted(SHAPES), tmp_path / "broken.png", picture, "--output", tmp_path / "out")

    assert result.exit_code == 1
    assert f"Skipped {tmp_path / 'broken.png'}: " in result.stderr
    assert reason in result.stderr
    assert "street.overlay.jpg: circle, sky, grass" in result.stdout
    assert {path.name.partition(".")[0] for path in (tmp_path / "out").iterdir()} == {"street"}


def test_a_pattern_without_matches_is_reported(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    result = run(converted(SHAPES), tmp_path / "*.gif", picture, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "*.gif: no file matches this pattern" in result.stderr
    assert (tmp_path / "out" / "street.overlay.jpg").exists()


def test_without_any_picture_no_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableFileError, match="no picture in this folder"):
        segment("no/model", [tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [SHAPES, SEMANTIC])
def test_a_very_long_picture_is_skipped(name: str, converted: Converted, tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 1)).save(tmp_path / "strip.png")
    found = segment(converted(name), [tmp_path / "strip.png"], tmp_path / "out")
    assert found.skipped[0].reason == "20000x1 pixels: longer than 16:1"


def test_a_name_that_is_not_unicode_is_accepted(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    odd = picture.rename(tmp_path / "stra\udcffe.png")
    result = run(converted(SHAPES), odd, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["pictures"][0]["picture"].endswith("stra\udcffe.png")


# the output -------------------------------------------------------------------------------------


def test_results_of_an_earlier_run_are_replaced_only_with_force(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    first = segment(converted(SHAPES), [picture], tmp_path).pictures[0]
    Image.new("RGB", (30, 40)).save(picture)
    with pytest.raises(OutputError, match=r"street\.overlay\.jpg exists, and 2 more files"):
        segment(converted(SHAPES), [picture], tmp_path)
    assert read_ids(first).shape == (128, 128)

    segment(converted(SHAPES), [picture], tmp_path, force=True)
    assert read_ids(first).shape == (40, 30)


def test_an_overlay_in_another_format_is_replaced_as_well(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for overlay, files in {
        "png": {"street.overlay.png"},
        "jpg": {"street.overlay.jpg"},
        "none": set[str](),
    }.items():
        options = f"--force --overlay {overlay} --output".split()
        result = run(converted(SHAPES), picture, *options, output)
        (first,) = files or {"street.segments.png"}
        assert f"street.png -> {output / first}: circle" in result.stdout
        written = {path.name for path in output.iterdir()}
        assert written == files | {"street.segments.png", "street.segments.json"}


def test_without_an_overlay_json_has_null(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    found = segment(converted(SHAPES), [picture], tmp_path, overlay="none")
    assert found.pictures[0].overlay is None
    assert found.to_dict()["pictures"][0]["overlay"] is None
    with pytest.raises(UsageError, match="'gif', expected one of jpg, png, none"):
        segment("no/model", [picture], tmp_path, overlay="gif")  # type: ignore[arg-type]


def test_nothing_unfinished_is_left_behind(
    converted: Converted, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(_: Image.Image, file: BinaryIO, *args: Any, **options: Any) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    model = converted(SHAPES)
    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OutputError, match="No space left"):
        segment(model, [picture], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


ENDINGS = ("overlay.jpg", "segments.png", "segments.json")


@pytest.mark.parametrize("ending", ENDINGS)
def test_planted_links_are_not_followed(
    converted: Converted, picture: Path, tmp_path: Path, ending: str
) -> None:
    victim, output = tmp_path / "victim", tmp_path / "out"
    output.mkdir()
    (output / f".street.{ending}.unfinished").symlink_to(victim)

    segment(converted(SHAPES), [picture], output)
    shutil.copy(output / "street.segments.json", victim)  # so that it counts as ours
    precious = victim.read_bytes()
    (output / f"street.{ending}").unlink()
    (output / f"street.{ending}").symlink_to(victim)
    segment(converted(SHAPES), [picture], output, force=True)

    assert victim.read_bytes() == precious
    assert not (output / f"street.{ending}").is_symlink()
    assert len(list(output.iterdir())) == 4


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("ending", [*ENDINGS, "overlay.png"])
def test_files_that_no_earlier_run_made_are_never_replaced(
    converted: Converted, picture: Path, tmp_path: Path, ending: str, force: bool
) -> None:
    mine = tmp_path / f"street.{ending}"
    mine.write_text('{"info": {"contributor": "me"}}')

    with pytest.raises(OutputError, match=rf"street\.{ending} exists, not made by"):
        segment(converted(SHAPES), [picture], tmp_path, force=force)

    assert "me" in mine.read_text()


def test_files_made_while_the_network_runs_are_not_replaced(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "street.overlay.png"

    with pytest.raises(OutputError, match="not made by eomt-convert"):
        segment(
            converted(SHAPES), [picture], tmp_path, progress=lambda *_: mine.write_text("precious")
        )

    assert mine.read_text() == "precious"


@pytest.mark.parametrize("force", [False, True])
def test_a_link_to_nothing_is_not_replaced(
    converted: Converted, picture: Path, tmp_path: Path, force: bool
) -> None:
    (tmp_path / "street.overlay.png").symlink_to("missing")

    with pytest.raises(OutputError, match=r"street\.overlay\.png exists"):
        segment(converted(SHAPES), [picture], tmp_path, force=force)


def test_an_output_that_is_a_file_is_refused(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"street\.png is a file"):
        segment("no/model", [picture], picture)
    with pytest.raises(OutputError, match="cannot be written"):
        segment(converted(SHAPES), [picture], picture / "below")


# the model and how it runs ----------------------------------------------------------------------


def test_a_semantic_model_whose_processor_pads_still_slides_windows(
    converted: Converted, tmp_path: Path
) -> None:
    shutil.copytree(converted(SEMANTIC), tmp_path / "model")
    settings = tmp_path / "model" / "preprocessor_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"do_split_image": False, "do_pad": True}))

    (found,) = segment(tmp_path / "model", [images(SEMANTIC) / "0.png"], tmp_path / "out").pictures
    assert (read_ids(found) - 1 == recorded(SEMANTIC)["pipeline.0.semantic"]).all()


@pytest.mark.parametrize(("name", "task"), [(SHAPES, "panoptic"), (SEMANTIC, "semantic")])
def test_without_conversion_json_the_other_files_show_the_task(
    name: str, task: str, converted: Converted, picture: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted(name), tmp_path / "model")
    (tmp_path / "model" / "conversion.json").unlink()
    assert segment(tmp_path / "model", [picture], tmp_path / "out").task == task


def test_an_unknown_task_must_be_given(converted: Converted, picture: Path, tmp_path: Path) -> None:
    shutil.copytree(converted(INSTANCE), tmp_path / "model")
    (tmp_path / "model" / "conversion.json").unlink()
    with pytest.raises(UsageError, match="--task"):
        segment(tmp_path / "model", [picture], tmp_path / "out")
    assert segment(tmp_path / "model", [picture], tmp_path / "out", task="instance").pictures


def test_a_model_can_be_used_for_another_task(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    (found,) = segment(converted(SHAPES), [picture], tmp_path, task="instance").pictures
    assert {entry.category_id for entry in found.segments} == {0, 3, 4}
    assert all(entry.rle for entry in found.segments)


def test_a_model_on_the_hub_is_downloaded_once(
    converted: Converted, hub: Hub, picture: Path, tmp_path: Path
) -> None:
    files = {path.name: path for path in converted(SHAPES).iterdir()}
    hub.create_repo("me/shapes", files)
    online = segment("me/shapes", [picture], tmp_path / "online")
    hub.requests.clear()
    offline = segment("me/shapes", [picture], tmp_path / "offline", local_files_only=True)

    assert hub.requests == []
    assert online.pictures[0].segments == offline.pictures[0].segments


def test_weights_of_an_unconverted_model_are_not_downloaded(
    hub: Hub, picture: Path, tmp_path: Path
) -> None:
    delta = FIXTURES / SHAPES / "delta" / "pytorch_model.bin"
    hub.create_repo("tue-mps/delta", {"pytorch_model.bin": delta})
    with pytest.raises(UnreadableFileError, match="not a converted model"):
        segment("tue-mps/delta", [picture], tmp_path / "out")
    assert "tue-mps/delta/pytorch_model.bin" not in hub.served


def test_a_missing_model_is_reported(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="There is no folder"):
        segment(tmp_path / "nothing", [picture], tmp_path / "out")


def test_a_threshold_does_not_go_with_semantic_segmentation(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no scores"):
        segment(converted(SEMANTIC), [picture], tmp_path / "out", threshold=0.5)


def test_a_missing_device_is_a_usage_error(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="'nonsense' cannot be used"):
        segment(converted(SHAPES), [picture], tmp_path / "out", device="nonsense")
    assert not (tmp_path / "out").exists()


def test_options_set_dtype_threads_and_batch_size(
    converted: Converted, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(INSTANCE)  # a conversion runs the network, too
    seen = []
    forward = EomtDinov3ForUniversalSegmentation.forward

    def spy(
        self: EomtDinov3ForUniversalSegmentation, pixel_values: torch.Tensor, **inputs: Any
    ) -> Any:
        seen.append((len(pixel_values), pixel_values.dtype, torch.get_num_threads()))
        return forward(self, pixel_values, **inputs)

    monkeypatch.setattr(EomtDinov3ForUniversalSegmentation, "forward", spy)
    threads = torch.get_num_threads()
    options = f"--dtype bfloat16 --threads {threads + 1} --batch-size 2 --output".split()
    result = run(model, images(INSTANCE), picture, *options, tmp_path / "out")

    assert result.exit_code == 0
    assert seen == [(size, torch.bfloat16, threads + 1) for size in (2, 1)]
    assert torch.get_num_threads() == threads


def test_a_small_network_leaves_the_cores_to_the_workers(
    converted: Converted, picture: Path, tmp_path: Path
) -> None:
    seen = []
    threads = torch.get_num_threads()
    segment(
        converted(SHAPES),
        [picture],
        tmp_path,
        device="cpu",
        workers=2,
        progress=lambda *_: seen.append(torch.get_num_threads()),
    )

    assert seen == [1, 1]
    assert torch.get_num_threads() == threads
    assert not segmenting._is_small(EomtDinov3Config())


def test_workers_do_not_change_what_is_written(converted: Converted, tmp_path: Path) -> None:
    pictures: list[str | Path] = [images(SHAPES) / "1.png", tmp_path / "missing.png"]
    pictures += [images(SHAPES) / "0.png", images(SEMANTIC), tmp_path / "missing, too.png"]
    written, skipped = [], []
    for workers in (0, 3):
        output = tmp_path / f"{workers}"
        found = segment(converted(SHAPES), pictures, output, workers=workers, batch_size=2)
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
        skipped.append(found.skipped)

    assert written[0] == written[1]
    assert len(written[0]) == 3 * len(found.pictures) > 6
    assert skipped[0] == skipped[1]
    assert [entry.picture for entry in skipped[1]] == [str(pictures[1]), str(pictures[4])]


def test_few_pictures_are_in_memory_at_once(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write, lock = segmenting._read, segmenting._write, threading.Lock()
    inside, most = 0, 0

    def count(change: int) -> None:
        nonlocal inside, most
        with lock:
            inside += change
            most = max(most, inside)

    def counted_read(path: Path) -> Image.Image:
        count(1)
        return read(path)

    def slow_write(*arguments: Any, **options: Any) -> None:
        time.sleep(0.01)
        write(*arguments, **options)
        count(-1)

    for index in range(24):
        Image.new("RGB", (24, 16)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(segmenting, "_read", counted_read)
    monkeypatch.setattr(segmenting, "_write", slow_write)
    segment(converted(SHAPES), [tmp_path], tmp_path / "out", workers=2, batch_size=3)

    assert inside == 0
    # read ahead, in the network, and to be written
    assert most <= (3 + 2) + 3 + (2 + 1)


def test_an_interruption_leaves_whole_results_and_no_thread(
    converted: Converted, tmp_path: Path
) -> None:
    def interrupt(_: str, done: int, __: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    pictures = [images(SHAPES), images(SEMANTIC)]
    with pytest.raises(KeyboardInterrupt):
        segment(converted(SHAPES), pictures, tmp_path, workers=2, batch_size=2, progress=interrupt)

    assert not [thread for thread in threading.enumerate() if "pictures" in thread.name]
    written = [path.name for path in tmp_path.iterdir()]
    names = {name.partition(".")[0] for name in written}
    assert len(names) <= 4
    assert set(written) == {f"{name}.{ending}" for name in names for ending in ENDINGS}


def test_a_gpu_without_enough_memory_is_not_a_bug(
    converted: Converted, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = converted(SHAPES)
    monkeypatch.setattr(EomtDinov3ForUniversalSegmentation, "forward", overflow)
    with pytest.raises(EomtConvertError, match="--batch-size"):
        segment(model, [picture], tmp_path / "out")


def test_progress_counts_pictures(converted: Converted, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    segment(
        converted(SHAPES),
        [images(SHAPES)],
        tmp_path,
        batch_size=2,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("Segmenting", done, 4) for done in (0, 2, 4)]


def test_json_has_the_files_and_the_segments(converted: Converted, tmp_path: Path) -> None:
    result = run(converted(SHAPES), images(SHAPES) / "0.png", "--output", tmp_path, "--json")
    content = json.loads(result.stdout)

    assert (result.exit_code, content["task"], content["skipped"]) == (0, "panoptic", [])
    (picture,) = content["pictures"]
    assert all(Path(picture[key]).is_file() for key in ("overlay", "id_map", "segments_file"))
    assert (picture["height"], picture["width"]) == (128, 128)
    found = [content["categories"][str(entry["category_id"])] for entry in picture["segments"]]
    assert sorted(found) == ["circle", "grass", "sky"]
