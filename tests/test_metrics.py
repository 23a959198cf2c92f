"""Panoptic quality, mask AP and mIoU, on cases whose values can be reasoned out."""

from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import PanopticQuality as TorchmetricsPanopticQuality
from torchmetrics.utilities import dim_zero_cat

from converter.pictures.datasets import IGNORED, Instances, Segments
from converter.pictures.metrics import Figures, MaskAveragePrecision, MeanIoU, PanopticQuality

PERSON, DOG, SKY, GRASS = range(4)
STUFF = (SKY, GRASS)
HALF = np.s_[:, :5]  # of 10 x 10 pixels


def segments(*parts: tuple[int, Any], crowds: Collection[int] = ()) -> Segments:
    """Segments painted one after the other: (class, pixels); some of them crowds, by index."""
    ids = np.full((10, 10), -1)
    for i, (_, pixels) in enumerate(parts):
        ids[pixels] = i
    return Segments(
        ids,
        tuple(class_id for class_id, _ in parts),
        tuple(i in crowds for i in range(len(parts))),
    )


def panoptic_quality(*pairs: tuple[Segments, Segments]) -> Figures:
    metric = PanopticQuality(4, STUFF)
    for prediction, target in pairs:
        metric.update(prediction, target)
    figures: Figures = metric.compute()
    return figures


def counts(figures: Figures, class_id: int) -> tuple[int, int, int]:
    row = figures.per_class[class_id]
    return int(row["tp"]), int(row["fp"]), int(row["fn"])


def test_the_annotations_themselves_have_full_quality() -> None:
    target = segments((SKY, np.s_[:4]), (PERSON, np.s_[4:, :3]), (PERSON, np.s_[4:, 3:7]))

    figures = panoptic_quality((target, target))

    assert figures.images == 1
    assert list(figures.overall) == [
        *("PQ", "SQ", "RQ", "PQ_things", "SQ_things", "RQ_things"),
        *("PQ_stuff", "SQ_stuff", "RQ_stuff"),
    ]
    assert set(figures.overall.values()) == {100.0}
    assert counts(figures, PERSON) == (2, 0, 0)
    assert np.isnan(figures.per_class[DOG]["PQ"])


def test_without_a_prediction_everything_is_missed() -> None:
    target = segments((SKY, np.s_[:4]), (PERSON, np.s_[4:]))

    figures = panoptic_quality((segments(), target))

    assert set(figures.overall.values()) == {0.0}
    assert (counts(figures, SKY), counts(figures, PERSON)) == ((0, 0, 1), (0, 0, 1))


def test_quality_is_the_mean_iou_of_matches_times_their_share() -> None:
    # a person found with 30 of 40 pixels, and one that is not there
    target = segments((PERSON, np.s_[:4]))
    prediction = segments((PERSON, np.s_[:3]), (PERSON, np.s_[8:]))
    background = segments((PERSON, np.s_[:4]), (SKY, np.s_[4:]))

    row = panoptic_quality((prediction, background)).per_class[PERSON]

    assert (row["tp"], row["fp"], row["fn"]) == (1, 1, 0)
    assert row["SQ"] == pytest.approx(75)
    assert row["RQ"] == pytest.approx(100 / 1.5)
    assert row["PQ"] == pytest.approx(75 / 1.5)
    # the rest is not annotated: a segment there is not a false positive
    assert counts(panoptic_quality((prediction, target)), PERSON) == (1, 0, 0)


def test_a_match_needs_more_than_half_of_the_union() -> None:
    target = segments((PERSON, np.s_[:]))

    assert counts(panoptic_quality((segments((PERSON, HALF)), target)), PERSON) == (0, 1, 1)
    more = np.s_[:, :6]
    assert counts(panoptic_quality((segments((PERSON, more)), target)), PERSON) == (1, 0, 0)


def test_another_class_is_not_a_match() -> None:
    figures = panoptic_quality((segments((DOG, np.s_[:])), segments((PERSON, np.s_[:]))))

    assert (counts(figures, DOG), counts(figures, PERSON)) == ((0, 1, 0), (0, 0, 1))


def test_unannotated_pixels_do_not_count_against_a_prediction() -> None:
    # 40 annotated pixels and 30 void ones: the union is 40
    target = segments((PERSON, np.s_[:4]), (SKY, np.s_[7:]))

    row = panoptic_quality((segments((PERSON, np.s_[:7])), target)).per_class[PERSON]

    assert (row["tp"], row["iou_sum"]) == (1, 1.0)


def test_pixels_without_a_predicted_segment_count_against_it() -> None:
    target = segments((PERSON, np.s_[:]))

    figures = panoptic_quality((segments((PERSON, np.s_[:6])), target))
    assert figures.per_class[PERSON]["iou_sum"] == pytest.approx(0.6)
    # torchmetrics' own panoptic quality forgives a segment that is mostly left without prediction
    figures = panoptic_quality((segments((PERSON, np.s_[:2])), target))
    assert counts(figures, PERSON) == (0, 1, 1)


def test_a_crowd_is_neither_matched_nor_missed() -> None:
    target = segments((SKY, np.s_[:2]), (PERSON, np.s_[2:]), crowds=[1])

    assert counts(panoptic_quality((target, target)), PERSON) == (0, 0, 0)
    assert counts(panoptic_quality((segments(), target)), PERSON) == (0, 0, 0)


def test_a_prediction_in_a_crowd_of_its_class_is_not_a_false_positive() -> None:
    target = segments((SKY, np.s_[:2]), (PERSON, np.s_[2:6]), (DOG, np.s_[6:]), crowds=[1])

    inside = segments((PERSON, np.s_[2:5]), (DOG, np.s_[2:5, 0]))
    figures = panoptic_quality((inside, target))
    assert counts(figures, PERSON) == (0, 0, 0)
    assert counts(figures, DOG) == (0, 1, 1)  # a dog in the crowd of people is wrong
    # half in the crowd is not more than half
    half = segments((PERSON, np.s_[5:7]))
    assert counts(panoptic_quality((half, target)), PERSON) == (0, 1, 0)


@pytest.mark.parametrize(
    ("parts", "crowds"),
    [
        ([(PERSON, np.s_[:5]), (PERSON, np.s_[5:])], [0, 1]),
        ([(PERSON, np.s_[:5]), (PERSON, np.s_[9]), (PERSON, np.s_[5:9])], [0, 2]),
        ([(PERSON, np.s_[:5]), (PERSON, np.s_[5:]), (DOG, np.s_[9])], [0, 1, 2]),
        ([(PERSON, np.s_[:3]), (PERSON, np.s_[3:5]), (PERSON, np.s_[5:])], [0, 1, 2]),
    ],
)
def test_of_two_crowds_of_a_class_the_last_counts(
    parts: list[tuple[int, Any]], crowds: list[int]
) -> None:
    target = segments(*parts, crowds=crowds)

    def false_positives(pixels: Any) -> int:
        return counts(panoptic_quality((segments((PERSON, pixels)), target)), PERSON)[1]

    # as panopticapi counts: more than half of the prediction has to lie in the last crowd, which
    # has rows 5 to 8
    assert false_positives(np.s_[5:8]) == 0
    assert false_positives(np.s_[4:7]) == 0
    assert false_positives(np.s_[4:6]) == 1
    assert false_positives(np.s_[3:7]) == 1
    assert false_positives(np.s_[1:5]) == 1


def test_of_two_crowds_of_a_class_the_first_counts_if_it_is_annotated_last() -> None:
    target = segments((PERSON, np.s_[5:]), (PERSON, np.s_[:5]), crowds=[0, 1])
    found = segments((PERSON, np.s_[:3]), (PERSON, np.s_[6:8]), (PERSON, np.s_[4:6]))

    assert counts(panoptic_quality((found, target)), PERSON) == (0, 2, 0)


def test_a_crowd_of_another_class_does_not_displace_a_crowd() -> None:
    target = segments((PERSON, np.s_[:5]), (DOG, np.s_[5:]), crowds=[0, 1])
    found = segments((PERSON, np.s_[:3]), (DOG, np.s_[6:8]))

    figures = panoptic_quality((found, target))
    assert (counts(figures, PERSON), counts(figures, DOG)) == ((0, 0, 0), (0, 0, 0))


def test_unannotated_pixels_and_the_last_crowd_forgive_together() -> None:
    # the first crowd has row 3, the last row 4; rows 0 to 2, 5 and 6 are not annotated
    target = segments((PERSON, np.s_[3]), (PERSON, np.s_[4]), (SKY, np.s_[7:]), crowds=[0, 1])

    def false_positives(pixels: Any) -> int:
        return counts(panoptic_quality((segments((PERSON, pixels)), target)), PERSON)[1]

    assert false_positives(np.s_[3:7]) == 0
    assert false_positives(np.s_[2:5]) == 0
    assert false_positives(np.s_[3:5]) == 1


def test_stuff_of_a_class_is_one_segment() -> None:
    target = segments((SKY, np.s_[:2]), (PERSON, np.s_[2:5]), (SKY, np.s_[5:]))
    prediction = segments((SKY, np.s_[:2]), (SKY, np.s_[5:]))

    assert counts(panoptic_quality((prediction, target)), SKY) == (1, 0, 0)


def test_stuff_is_crowd_where_the_first_segment_is_as_in_the_original() -> None:
    people, sky = (PERSON, np.s_[:2]), (SKY, np.s_[2:])
    found = segments(sky)

    people_first = segments(people, sky, crowds=[0])
    assert counts(panoptic_quality((found, people_first)), SKY) == (0, 0, 0)
    sky_first = segments(sky, people, crowds=[1])
    assert counts(panoptic_quality((found, sky_first)), SKY) == (1, 0, 0)


def test_means_are_over_classes_that_occur() -> None:
    target = segments((PERSON, np.s_[:5]), (GRASS, np.s_[5:]))

    figures = panoptic_quality((segments((PERSON, np.s_[:5])), target))

    assert figures.overall["PQ"] == 50.0  # the mean of person and grass, without dog and sky
    assert (figures.overall["PQ_things"], figures.overall["PQ_stuff"]) == (100.0, 0.0)
    assert figures.means_over == (
        "the 2 of 4 classes that have at least one counted segment, annotated or predicted; "
        "the original counts the other classes as 0"
    )


def test_a_class_that_is_only_predicted_counts_and_one_of_crowds_alone_does_not() -> None:
    target = segments((PERSON, np.s_[:5]), (DOG, np.s_[5:]), crowds=[1])
    found = segments((PERSON, np.s_[:4]), (SKY, np.s_[4:]))

    figures = panoptic_quality((found, target))

    assert [np.isnan(row["PQ"]) for row in figures.per_class] == [False, True, False, True]
    assert figures.overall["PQ"] == pytest.approx((80 + 0) / 2)
    assert figures.means_over.startswith("the 2 of 4 classes ")


def test_the_original_has_zeros_in_the_mean_for_classes_that_do_not_occur() -> None:
    target = segments((PERSON, np.s_[:5]), (GRASS, np.s_[5:]))
    found = segments((PERSON, np.s_[:4]), (GRASS, np.s_[4:]))

    figures = panoptic_quality((found, target))

    # training/lightning_module.py: everything of these but the last class, "no segment"
    original = TorchmetricsPanopticQuality(
        {PERSON, DOG}, {SKY, GRASS, 4}, return_sq_and_rq=True, return_per_class=True
    )
    original.update(
        *(
            torch.from_numpy(np.stack([np.array(found.classes)[found.ids], found.ids], -1))[None]
            for found in (found, target)
        )
    )
    pq, sq, rq = original.compute()[:-1].T.tolist()
    for name, values in (("PQ", pq), ("SQ", sq), ("RQ", rq)):
        assert len(values) == 4
        assert figures.overall[name] * 2 / 4 == pytest.approx(100 * np.mean(values))
    assert figures.overall["PQ_things"] * 1 / 2 == pytest.approx(100 * np.mean(pq[:2]))


def test_other_classes_are_not_mentioned_if_all_occur() -> None:
    quarters = [np.s_[:5, :5], np.s_[:5, 5:], np.s_[5:, :5], np.s_[5:, 5:]]
    target = segments(*zip((PERSON, DOG, SKY, GRASS), quarters, strict=True))

    assert panoptic_quality((segments(), target)).means_over == "all 4 classes"


def independent_counts(pairs: Sequence[tuple[Segments, Segments]]) -> dict[str, dict[int, Any]]:
    """The same counts pixel by pixel, with sets of pixels and exact fractions.

    Of several crowds of a class the last counts, as in panopticapi's evaluation.py.
    """
    result: dict[str, dict[int, Any]] = {key: Counter() for key in ("iou_sum", "tp", "fp", "fn")}
    for prediction, target in pairs:

        def pixels(found: Segments) -> dict[tuple[int, int], set[tuple[int, int]]]:
            areas: dict[tuple[int, int], set[tuple[int, int]]] = {}
            for position, index in np.ndenumerate(found.ids):
                if index >= 0:
                    class_id = found.classes[index]
                    key = (class_id, 0 if class_id in STUFF else int(index))
                    areas.setdefault(key, set()).add(position)
            return areas

        annotated, predicted = pixels(target), pixels(prediction)
        void = set(np.ndindex(target.ids.shape)).difference(*annotated.values())
        crowds = {key for key in annotated if target.crowd[key[1]]}
        last_crowds = {class_id: (class_id, index) for class_id, index in sorted(crowds)}
        unmatched = set(annotated) - crowds
        for key, area in predicted.items():
            matches = [
                (Fraction(len(area & other), len((area - void) | other)), other_key)
                for other_key, other in annotated.items()
                if other_key[0] == key[0] and other_key not in crowds
            ]
            best = max(matches, default=(Fraction(0), key))
            forgiven = void | annotated.get(last_crowds.get(key[0], (-1, -1)), set())
            if best[0] > Fraction(1, 2):
                result["iou_sum"][key[0]] += best[0]
                result["tp"][key[0]] += 1
                unmatched.remove(best[1])
            elif 2 * len(area & forgiven) <= len(area):
                result["fp"][key[0]] += 1
        for key in unmatched:
            result["fn"][key[0]] += 1
    return result


def random_segments(random: np.random.Generator, blocks: NDArray[np.int64]) -> Segments:
    """Rectangles of a few segments, some of them crowds, some pixels outside all."""
    coarse = np.where(
        random.random(blocks.shape) < 0.7, blocks, random.integers(-1, 4, blocks.shape)
    )
    _, inverse = np.unique(np.append(coarse, -1), return_inverse=True)
    ids = (inverse[:-1].reshape(coarse.shape) - 1).repeat(3, 0).repeat(3, 1)
    count = int(ids.max()) + 1
    classes = random.integers(0, 4, count)
    return Segments(ids, tuple(classes.tolist()), tuple((random.random(count) < 0.2).tolist()))


def test_the_counts_equal_an_independent_computation() -> None:
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(200):
        blocks = random.integers(-1, 4, (4, 5))
        target = random_segments(random, blocks)
        found = random_segments(random, blocks)
        classes = tuple(
            target.classes[i] if i < len(target.classes) else class_id
            for i, class_id in enumerate(found.classes)
        )
        pairs.append((Segments(found.ids, classes, (False,) * len(classes)), target))
    expected = independent_counts(pairs)
    assert min(expected[key][class_id] for key in expected for class_id in range(4)) > 10

    figures = panoptic_quality(*pairs)

    for class_id, row in enumerate(figures.per_class):
        assert {key: row[key] for key in ("tp", "fp", "fn")} == {
            key: expected[key][class_id] for key in ("tp", "fp", "fn")
        }
        assert row["iou_sum"] == pytest.approx(float(expected["iou_sum"][class_id]), rel=1e-12)


def instances(image_id: int, *objects: tuple[int, Any, float], crowd: bool = False) -> Instances:
    """Objects of 100 x 100 pixels: (class, pixels, score)."""
    masks = []
    for _, pixels, _ in objects:
        drawn = np.zeros((100, 100), dtype=np.uint8, order="F")
        drawn[pixels] = 1
        masks.append(mask.encode(drawn))
    return Instances(
        image_id,
        tuple(masks),
        tuple(class_id for class_id, _, _ in objects),
        (crowd,) * len(objects),
        tuple(score for _, _, score in objects),
    )


def mask_ap(*pairs: tuple[Instances, Instances]) -> Figures:
    metric = MaskAveragePrecision(3)
    for prediction, target in pairs:
        metric.update(prediction, target)
    figures: Figures = metric.compute()
    return figures


SMALL, MEDIUM, LARGE = np.s_[:20, :20], np.s_[30:70, :40], np.s_[:, :]


def test_objects_found_exactly_have_full_ap(capsys: pytest.CaptureFixture[str]) -> None:
    objects = instances(0, (0, SMALL, 0.9), (0, MEDIUM, 0.8), (2, LARGE, 0.1))

    figures = mask_ap((objects, objects), (instances(1, (2, SMALL, 0.3)),) * 2)

    assert figures.images == 2
    assert list(figures.overall) == ["AP", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large"]
    assert figures.overall == pytest.approx(dict.fromkeys(figures.overall, 100.0))
    assert figures.per_class[0] == pytest.approx({"AP": 100.0, "AP_50": 100.0})
    assert np.isnan(figures.per_class[1]["AP"])
    assert capsys.readouterr().out == ""


def test_ap_counts_the_thresholds_that_an_iou_reaches() -> None:
    target = instances(0, (0, np.s_[:, :100], 1.0))

    # an IoU of 0.72 reaches 0.5, 0.55, 0.6, 0.65 and 0.7 of the ten thresholds
    figures = mask_ap((instances(0, (0, np.s_[:, :72], 1.0)), target))

    assert figures.overall["AP"] == pytest.approx(50)
    assert figures.overall["AP_50"] == pytest.approx(100)
    assert figures.overall["AP_75"] == pytest.approx(0)
    assert np.isnan(figures.overall["AP_small"])


def test_a_wrong_object_costs_only_what_it_outranks() -> None:
    target = instances(0, (0, SMALL, 1.0))

    def ap(wrong_score: float) -> float:
        found = instances(0, (0, SMALL, 0.5), (0, MEDIUM, wrong_score))
        return mask_ap((found, target)).overall["AP"]

    assert ap(0.4) == pytest.approx(100)
    assert ap(0.6) == pytest.approx(50)


def test_objects_in_a_crowd_do_not_count() -> None:
    target = instances(0, (0, SMALL, 1.0))
    crowd = instances(0, (0, MEDIUM, 1.0), crowd=True)
    both = Instances(
        0, target.masks + crowd.masks, target.classes + crowd.classes, target.crowd + crowd.crowd
    )
    found = instances(0, (0, np.s_[35:60, :30], 0.9), (0, SMALL, 0.5))

    assert mask_ap((found, both)).overall["AP"] == pytest.approx(100)


def test_a_picture_without_objects_counts_what_was_found_there() -> None:
    right = instances(0, (0, SMALL, 0.5))

    figures = mask_ap((right, right), (instances(1, (0, SMALL, 0.9)), instances(1)))

    assert figures.overall["AP"] == pytest.approx(50)


def test_mean_ap_is_over_classes_with_an_annotated_object_that_is_not_a_crowd() -> None:
    # class 0 is annotated, class 1 as a crowd only, class 2 is only predicted
    crowd = instances(0, (1, MEDIUM, 1.0), crowd=True)
    target = Instances(
        0,
        instances(0, (0, SMALL, 1.0)).masks + crowd.masks,
        (0, 1),
        (False, True),
    )
    found = instances(0, (0, SMALL, 0.9), (1, SMALL, 0.8), (2, MEDIUM, 0.7))

    figures = mask_ap((found, target))

    assert [np.isnan(row["AP"]) for row in figures.per_class] == [False, True, True]
    assert figures.overall["AP"] == pytest.approx(100)
    assert figures.means_over == (
        "the 1 of 3 classes that have an annotated object that is not a crowd; "
        "AP_small, AP_medium and AP_large are means over the classes that have an object of that "
        "size; the original does the same"
    )


def test_mean_ap_of_a_size_is_over_classes_with_an_object_of_it() -> None:
    target = instances(0, (0, SMALL, 1.0), (1, MEDIUM, 1.0), (2, LARGE, 1.0))

    figures = mask_ap((instances(0, (0, SMALL, 0.9)), target))

    assert figures.overall["AP"] == pytest.approx(100 / 3)
    assert figures.overall["AP_small"] == pytest.approx(100)
    assert figures.means_over.startswith("all 3 classes; AP_small, ")


def test_finding_nothing_is_not_an_error() -> None:
    assert mask_ap((instances(0), instances(0, (0, SMALL, 1.0)))).overall["AP"] == 0.0


def test_ap_is_the_same_however_pictures_are_split_over_processes() -> None:
    pairs = [
        (instances(0, (0, SMALL, 0.9), (1, MEDIUM, 0.5)), instances(0, (0, SMALL, 1.0))),
        (instances(1, (0, np.s_[:15, :20], 0.8)), instances(1, (0, SMALL, 1.0))),
        (instances(2), instances(2, (0, SMALL, 1.0), (1, MEDIUM, 1.0))),
    ]
    first, second = MaskAveragePrecision(3), MaskAveragePrecision(3)
    for metric, share in ((first, pairs[::2]), (second, pairs[1::2])):
        for prediction, target in share:
            metric.update(prediction, target)
    others = iter([dim_zero_cat(state) for state in second.metric_state.values()])
    # as torchmetrics gathers with torch.distributed, state by state
    first.dist_sync_fn = lambda tensor, group: [tensor, next(others)]
    first.distributed_available_fn = lambda: True

    together = mask_ap(*pairs)
    assert 0 < together.overall["AP"] < 100
    assert first.compute().overall == pytest.approx(together.overall, nan_ok=True)


def test_miou_equals_that_of_an_independent_confusion_matrix() -> None:
    random = np.random.default_rng(0)
    metric = MeanIoU(5)
    annotated, predicted = [], []
    for shape in ((20, 30), (7, 9)):
        target = random.integers(0, 4, shape)
        prediction = np.where(random.random(shape) < 0.6, target, random.integers(0, 4, shape))
        target[random.random(shape) < 0.1] = IGNORED
        metric.update(prediction, target)
        annotated.append(target.ravel())
        predicted.append(prediction.ravel())
    a, p = np.concatenate(annotated), np.concatenate(predicted)
    iou = [
        np.sum((a == c) & (p == c)) / np.sum((a != IGNORED) & ((a == c) | (p == c)))
        for c in range(4)
    ]

    figures = metric.compute()

    assert figures.images == 2
    assert figures.overall == pytest.approx({"mIoU": 100 * np.mean(iou)})
    assert [row["IoU"] for row in figures.per_class[:4]] == pytest.approx(100 * np.array(iou))
    assert np.isnan(figures.per_class[4]["IoU"])  # never annotated, never predicted


def test_a_class_that_is_only_predicted_has_an_iou_of_zero() -> None:
    metric = MeanIoU(3)
    metric.update(np.array([[0, 0, 1]]), np.array([[0, 0, 0]]))

    figures = metric.compute()
    assert figures.overall["mIoU"] == pytest.approx((200 / 3 + 0) / 2)
    assert figures.means_over == (
        "the 2 of 3 classes that are annotated, or predicted in annotated pixels; "
        "the original counts the other classes as 0"
    )


def test_the_original_has_zeros_in_miou_for_classes_that_do_not_occur() -> None:
    target, prediction = np.array([[0, 0, 0, IGNORED]]), np.array([[0, 0, 1, 2]])
    metric = MeanIoU(5)
    metric.update(prediction, target)

    # training/lightning_module.py: the mean of these, in which 2 lies in no annotated pixel
    original = MulticlassJaccardIndex(5, average=None, ignore_index=IGNORED)
    original.update(torch.from_numpy(prediction), torch.from_numpy(target))

    assert metric.compute().means_over.startswith("the 2 of 5 classes ")
    mean = original.compute().mean().item()
    assert metric.compute().overall["mIoU"] * 2 / 5 == pytest.approx(100 * mean)


def test_miou_over_all_classes_says_so() -> None:
    metric = MeanIoU(2)
    metric.update(np.array([[0, 0]]), np.array([[0, 1]]))

    assert metric.compute().means_over == "all 2 classes"
