"""Files of class names."""

import os
from pathlib import Path

import pytest

from converter.class_names import ClassNames, read, unnamed
from converter.errors import UnreadableFileError, UsageError


def written(folder: Path, text: str) -> Path:
    path = folder / "labels"
    path.write_text(text, encoding="utf-8")
    return path


def test_one_name_a_line(tmp_path: Path) -> None:
    assert read(written(tmp_path, "cat\n\n  traffic light \n")).names == ("cat", "traffic light")


def test_a_json_list(tmp_path: Path) -> None:
    assert read(written(tmp_path, '["cat", "dog"]')) == ClassNames(("cat", "dog"))


def test_json_categories_tell_stuff_from_things(tmp_path: Path) -> None:
    text = """{"categories": [{"id": 1, "name": "sky", "isthing": false},
                              {"id": 0, "name": "cat", "isthing": true}]}"""
    assert read(written(tmp_path, text)) == ClassNames(("cat", "sky"), stuff=(1,))


def test_categories_without_isthing_do_not_say_what_is_stuff(tmp_path: Path) -> None:
    text = '{"categories": [{"id": 0, "name": "wall"}]}'
    assert read(written(tmp_path, text)) == ClassNames(("wall",), stuff=None)


def test_categories_that_are_all_things_say_that_nothing_is_stuff(tmp_path: Path) -> None:
    text = '{"categories": [{"id": 0, "name": "cat", "isthing": 1}]}'
    assert read(written(tmp_path, text)) == ClassNames(("cat",), stuff=())


def test_ids_with_gaps_are_kept_and_give_the_order(tmp_path: Path) -> None:
    text = """{"categories": [{"id": 10, "name": "sky", "isthing": 0},
                              {"id": 1, "name": "cat", "isthing": 1},
                              {"id": 3, "name": "dog", "isthing": 1}]}"""
    assert read(written(tmp_path, text)) == ClassNames(("cat", "dog", "sky"), (2,), (1, 3, 10))


def test_names_say_what_is_stuff() -> None:
    classes = ClassNames(("sky", "cat", "sky", "sea"), stuff=(1,)).with_stuff(["sea", "sky"])

    assert classes.stuff == (0, 2, 3)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("wall-brik", "Did you mean wall-brick or wall-wood?"),
        ("x", "The classes are wall-brick, wall-wood, cat."),
    ],
)
def test_an_unknown_stuff_name_is_refused_with_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}'") as refused:
        ClassNames(("wall-brick", "wall-wood", "cat")).with_stuff(["cat", name])

    assert refused.value.remedy == remedy


def test_classes_without_names_get_placeholders() -> None:
    assert unnamed(2).names == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no class name"),
        ("[]", "no class names"),
        ("[1]", "not text"),
        ("[[", "not valid JSON"),
        ('{"names": ["cat"]}', "categories in .* are not valid"),
        ('{"categories": [{"id": 0}]}', "categories in .* are not valid"),
        ('{"categories": [{"id": "1", "name": "cat"}]}', "ids in .* are not valid"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "ids in .* not valid"),
        ('{"categories": [{"id": -1, "name": "cat"}]}', "ids in .* are not valid"),
        (
            '{"categories": [{"id": 0, "name": "a", "isthing": 1}, {"id": 1, "name": "b"}]}',
            "Some categories in .* have isthing, but 'b' has not",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UnreadableFileError, match=complaint):
        read(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_a_pipe_is_refused_with_a_remedy(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UnreadableFileError, match="not a regular file") as refused:
        read(tmp_path / "pipe")
    assert refused.value.remedy.endswith("COMMAND > labels.txt.")
