"""The catalogue: what is in it, and under how many names."""

import pytest

from converter.catalog import CATALOG, find
from converter.errors import UsageError


@pytest.mark.parametrize(
    "name",
    [
        "coco_panoptic_large_640",
        "COCO-panoptic-large-640",
        "tue-mps/coco_panoptic_eomt_large_640_dinov3",
        "coco_panoptic_eomt_large_640_dinov3",
        "tue-mps/eomt-dinov3-coco-panoptic-large-640",
        "tue-mps/coco_panoptic_eomt_dinov3_large_640",
    ],
)
def test_every_name_of_a_checkpoint_means_the_same_entry(name: str) -> None:
    assert find(name).name == "coco_panoptic_large_640"


@pytest.mark.parametrize(
    "name",
    [
        "ade20k_semantic_large_512",
        "tue-mps/ade_semantic_eomt_large_512_dinov3",
        "tue-mps/eomt-dinov3-ade-semantic-large-512",
        "tue-mps/ade20k_semantic_eomt_large_512_dinov3",
    ],
)
def test_ade20k_goes_by_both_of_its_names(name: str) -> None:
    entry = find(name)
    assert entry.name == "ade20k_semantic_large_512"
    assert entry.delta == "tue-mps/ade_semantic_eomt_large_512_dinov3"


def test_an_unknown_name_gets_the_nearest_ones_suggested() -> None:
    with pytest.raises(UsageError, match=r"Did you mean .*coco_panoptic_large_640"):
        find("coco_panoptic_larg_640")


def test_the_models_on_dinov2_are_not_taken_for_those_on_dinov3() -> None:
    with pytest.raises(UsageError):
        find("tue-mps/coco_panoptic_eomt_large_640")


def test_no_two_entries_share_a_name() -> None:
    names = [name.lower() for entry in CATALOG for name in {entry.name, *entry.aliases}]
    assert len(names) == len(set(names))


def test_the_catalogue_holds_the_published_and_the_offline_checkpoints() -> None:
    assert [entry.name for entry in CATALOG if not entry.offline] == [
        "coco_panoptic_small_640",
        "coco_panoptic_base_640",
        "coco_panoptic_large_640",
        "coco_panoptic_large_1280",
        "ade20k_semantic_large_512",
        "coco_instance_large_640",
        "coco_instance_large_1280",
    ]
    assert [entry.delta for entry in CATALOG if entry.name == "coco_instance_large_1280"] == [
        "tue-mps/coco_instance_eomt_large_1280_dinov3"
    ]


def test_published_classes_have_their_names() -> None:
    panoptic = find("coco_panoptic_small_640").class_names(133)
    assert (len(panoptic.names), panoptic.names[0], panoptic.stuff) == (
        133,
        "person",
        tuple(range(80, 133)),
    )
    assert len(find("coco_instance_large_640").class_names(80).names) == 80
    assert len(find("ade20k_semantic_large_512").class_names(150).names) == 150


@pytest.mark.parametrize("entry", [e for e in CATALOG if e.offline], ids=lambda e: e.name)
def test_offline_entries_say_what_was_recorded_with_them(entry: object) -> None:
    import json

    from converter.catalog import Checkpoint

    assert isinstance(entry, Checkpoint)
    assert entry.recorded is not None
    recorded = json.loads((entry.recorded / "recorded.json").read_text())
    classes = entry.class_names(recorded["num_classes"])
    assert entry.task == recorded["task"]
    assert list(entry.image_size) == recorded["image_size"]
    assert list(classes.stuff or ()) == recorded["stuff_classes"]
    if "classes" in recorded:
        assert list(classes.names) == recorded["classes"]
