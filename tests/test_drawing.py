"""Overlays, as far as a program can check them."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from converter.colours import class_colour
from converter.pictures.drawing import Label, draw_overlay


def picture(width: int, height: int, colour: str = "gray") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def halves(image: Image.Image) -> NDArray[np.int64]:
    """An id map: segment 1 on the left, 2 on the right."""
    id_map = np.ones((image.height, image.width), dtype=np.int64)
    id_map[:, image.width // 2 :] = 2
    return id_map


def label(segment_id: int, class_id: int = 0, name: str = "car", note: str = "0.90") -> Label:
    return Label(segment_id, class_id, name, note)


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def legend(size: tuple[int, int], labels: list[Label]) -> Image.Image:
    """What is added to a picture that no segment covers."""
    width, height = size
    drawn = draw_overlay(picture(width, height), np.zeros((height, width), dtype=np.int64), labels)
    left, top = (0, height) if width > height else (width, 0)
    return drawn.crop((left, top, drawn.width, drawn.height))


# colours ----------------------------------------------------------------------------------------


def test_no_two_of_150_classes_have_nearly_the_same_colour() -> None:
    colours = np.array([class_colour(class_id) for class_id in range(150)])
    differences = np.abs(colours[:, None] - colours).sum(axis=-1)
    np.fill_diagonal(differences, 999)
    assert differences.min() > 20


def test_the_first_twelve_classes_are_far_apart() -> None:
    colours = np.array([class_colour(class_id) for class_id in range(12)])
    differences = np.abs(colours[:, None] - colours).sum(axis=-1)
    np.fill_diagonal(differences, 999)
    assert differences.min() > 80


def test_instances_of_a_class_have_colours_of_their_own_near_the_class_colour() -> None:
    assert class_colour(2, 0) == class_colour(2)
    colours = [class_colour(2, instance) for instance in range(20)]
    assert len(set(colours)) == 20
    assert all(blue == max(red, green, blue) for red, green, blue in colours)


def test_a_class_has_the_same_colour_in_every_picture() -> None:
    image = picture(600, 600)
    alone = draw_overlay(image, halves(image) * 0 + 1, [label(1, class_id=5)])
    crowded = draw_overlay(image, halves(image), [label(1, class_id=7), label(2, class_id=5)])
    assert alone.getpixel((500, 500)) == crowded.getpixel((500, 500))
    assert alone.getpixel((100, 500)) != crowded.getpixel((100, 500))


# the picture ------------------------------------------------------------------------------------


def test_pixels_without_a_segment_are_left_grey() -> None:
    image = picture(600, 400, "orange")
    id_map = halves(image) - 1
    drawn = pixels(draw_overlay(image, id_map, [label(1)]))[:400]
    red, green, blue = drawn[200, 150]
    assert red == green == blue
    red, green, blue = drawn[200, 450]
    assert red > green + 50


@pytest.mark.parametrize("colour", ["black", "gray", "white", "red"])
def test_outlines_show_on_any_background(colour: str) -> None:
    image = picture(600, 400, colour)
    drawn = draw_overlay(image, halves(image), [label(1), label(2)])
    luma = pixels(drawn.crop((290, 100, 310, 300)).convert("L"))
    assert (luma.max(axis=1) == 255).all()
    assert (luma.min(axis=1) < 30).all()


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((64, 64), 512), ((100, 60), 500), ((1, 1), 512), ((640, 480), 640), ((1920, 300), 1920)],
)
def test_tiny_pictures_are_enlarged_by_a_whole_number(size: tuple[int, int], enlarged: int) -> None:
    image = picture(*size)
    image.putpixel((0, 0), (255, 255, 255))
    drawn = draw_overlay(image, np.zeros((size[1], size[0]), dtype=np.int64), [])
    factor = enlarged // size[0]
    corner = pixels(drawn.convert("L"))[:factor, :factor]
    assert (corner == 255).all()
    assert drawn.getpixel((factor, 0)) != (255, 255, 255) or size == (1, 1)


# the legend -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (640, 480), (480, 640), (1920, 1080)])
def test_text_is_not_drawn_on_the_picture(size: tuple[int, int]) -> None:
    image = picture(*size)
    factor = max(1, 512 // max(size))
    area = (0, 0, size[0] * factor, size[1] * factor)
    first, second = (
        draw_overlay(image, halves(image), [label(1, note=note), label(2, note=note)])
        for note in ("0.90", "0.11")
    )
    assert first.crop(area).tobytes() == second.crop(area).tobytes()
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize("size", [(512, 512), (512, 320), (480, 640), (1920, 1080)])
def test_every_one_of_120_segments_is_in_the_legend(size: tuple[int, int]) -> None:
    panel = legend(size, [label(number + 1, class_id=number % 30) for number in range(120)])
    colours = {colour for _, colour in panel.getcolors(panel.width * panel.height) or ()}
    for class_id, instance in itertools.product(range(30), range(4)):
        assert class_colour(class_id, instance) in colours


@pytest.mark.parametrize(("size", "side"), [((640, 480), "below"), ((480, 640), "beside")])
def test_the_legend_lies_below_a_landscape_and_beside_a_portrait(
    size: tuple[int, int], side: str
) -> None:
    image = picture(*size)
    drawn = draw_overlay(image, halves(image), [label(1), label(2)])
    assert (drawn.height > size[1]) == (side == "below")
    assert (drawn.width > size[0]) == (side == "beside")


def test_a_long_legend_takes_the_whole_width_of_a_landscape() -> None:
    labels = [label(number + 1, class_id=max(0, number - 40)) for number in range(70)]
    assert legend((640, 480), labels).height < 400


def test_letters_grow_with_the_picture() -> None:
    small, large = (legend(size, [label(1)]).height for size in ((640, 480), (1920, 1080)))
    assert large == pytest.approx(2 * small, rel=0.1)


def test_a_long_class_name_is_cut_short() -> None:
    long, longer = (legend((640, 480), [label(1, name=times * "screen, ")]) for times in (10, 100))
    assert long.tobytes() == longer.tobytes()


@pytest.mark.parametrize(
    ("name", "stands_for"),
    [
        ("arbre élagué", "arbre elague"),
        ("自動車", "class 3"),
        ("", "class 3"),
        ("line\nbreak", "line break"),
        ("tree 🌳", "tree ?"),
    ],
)
def test_characters_that_the_font_lacks_are_replaced(name: str, stands_for: str) -> None:
    drawn, expected = (
        legend((640, 480), [label(1, class_id=3, name=text)]) for text in (name, stands_for)
    )
    assert drawn.tobytes() == expected.tobytes()


def test_a_picture_without_segments_says_so() -> None:
    assert pixels(legend((640, 480), [])).min() < 100


def test_scores_are_legible_on_their_colours() -> None:
    for class_id in range(150):
        panel = pixels(legend((600, 60), [label(1, class_id=class_id)]).convert("L"))
        red, green, blue = class_colour(class_id)
        luma = round(0.299 * red + 0.587 * green + 0.114 * blue)
        columns = np.flatnonzero((np.abs(panel - luma) <= 1).any(axis=0))
        tag = panel[:, columns[-1] - 30 : columns[-1] - 5]
        assert max(tag[8:-8].max() - luma, luma - tag[8:-8].min()) > 100
