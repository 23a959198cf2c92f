"""The report: one page with the results that loads nothing and shows all text as text."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.checks.comparison import Tolerance, agreement
from converter.checks.html_report import (
    Chart,
    Point,
    ReportData,
    ShownSegment,
    SourceFile,
    TensorRow,
    gather,
    render,
    write_report,
)
from converter.checks.numbers import run
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import Recorded, read_recorded
from converter.checks.verdict import Level, Verdict
from converter.errors import OutputError, UnreadableFileError
from reference_model import EomtDinov3ForUniversalSegmentation

Converted = Callable[[str], Path]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'>"


class Page(HTMLParser):
    """A parsed page: its elements, and the text in each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):  # which have no end
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.text[tag] = self.text.get(tag, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, attribute: str) -> list[str]:
        return [
            attributes[attribute] or ""
            for _, attributes in self.elements
            if attribute in attributes
        ]


def outputs_of(folder: Path, recorded: Recorded) -> dict[str, Tensor]:
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(folder).eval()
    normalisation = read_normalisation(folder / "preprocessor_config.json", 3)
    return run(model, normalisation(recorded.pixels))


def data_of(folder: Path, name: str) -> ReportData:
    """What the report shows of a model that is compared with a fixture's recording."""
    recorded = read_recorded(FIXTURES / name)
    verdict = converter.verify(folder, recorded=FIXTURES / name)
    return gather(name, folder, verdict, recorded, outputs_of(folder, recorded))


@pytest.fixture(scope="module")
def right(converted: Converted) -> ReportData:
    return data_of(converted("shapes_panoptic_128"), "shapes_panoptic_128")


@pytest.fixture
def wrong(model: Path) -> ReportData:
    """The data for a model with one changed tensor."""
    change_tensor(model, "layers.1.mlp.up_proj.weight", 1.5)
    return data_of(model, "tiny_panoptic_64")


def change_tensor(folder: Path, name: str, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def picture_in(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


# what it shows ----------------------------------------------------------------------------------


def test_a_right_model_is_shown_with_its_verdict_differences_and_digests(
    right: ReportData, converted: Converted
) -> None:
    page = Page(render(right))
    assert page.text["strong"] == "passed"
    assert page.text["h1"].strip() == "shapes_panoptic_128"
    (chart,) = right.charts
    assert [point.name for point in chart.points][:2] == ["patch_embeddings", "hidden_states.0"]
    assert all(point.within for point in chart.points)
    history = json.loads((converted("shapes_panoptic_128") / "conversion.json").read_text())
    for name, tensor in history["tensors"].items():
        assert name in page.text["code"]
        assert tensor["sha256"] in page.text["code"]
        assert tensor["recipe"] in page.text["code"]
    for source in history["sources"].values():
        for file in source["files"].values():
            assert file["sha256"] in page.text["code"]


def test_recorded_pictures_are_shown_beside_our_segments(right: ReportData) -> None:
    pixels = read_recorded(FIXTURES / "shapes_panoptic_128").pixels.permute(0, 2, 3, 1).numpy()
    assert len(right.pictures) == len(pixels) == 4
    for picture, expected in zip(right.pictures, pixels, strict=True):
        assert np.array_equal(picture_in(picture.images["input"]), expected)
        assert picture.images["recorded"] == picture.images["ours"]
        assert picture.differing == 0
    assert {segment.labels[0] for segment in right.pictures[0].segments} == {
        "grass",
        "sky",
        "circle",
    }
    assert render(right).count("All 1,024 pixels are assigned to the recorded query") == 4


def test_pixels_that_go_to_another_query_are_red(converted: Converted) -> None:
    folder = converted("shapes_panoptic_128")
    recorded = read_recorded(FIXTURES / "shapes_panoptic_128")
    outputs = outputs_of(folder, recorded)
    outputs["mask_logits"] = outputs["mask_logits"].roll(3, dims=-1)
    verdict = converter.verify(folder, level=1)
    pictures = gather("model", folder, verdict, recorded, outputs).pictures
    same = agreement(outputs, recorded.tensors)["same_segment"]
    size = sum(picture.size for picture in pictures)
    assert sum(picture.differing for picture in pictures) == round(size * (1 - (same or 0))) > 0
    for picture in pictures:
        maps = [picture_in(picture.images[name]) for name in ("recorded", "ours")]
        differs = (maps[0] != maps[1]).any(-1).repeat(4, axis=0).repeat(4, axis=1)
        red, green, _ = np.moveaxis(picture_in(picture.images["difference"]).astype(int), -1, 0)
        assert np.array_equal(red > green + 100, differs)


def test_a_wrong_model_is_shown_with_its_first_difference_cause_and_trials(
    wrong: ReportData,
) -> None:
    page = Page(render(wrong))
    assert page.text["strong"].startswith("failed")
    text = " ".join(page.text.values())
    assert wrong.verdict.first_difference
    assert wrong.verdict.first_difference.layer == "layers.1"
    assert "hidden_states.1" in page.text["code"]
    assert "tensor-replaced" in page.text["strong"]
    for trial in wrong.verdict.tried:
        assert trial.name in text
    assert [row.name for row in wrong.tensors if row.status == "other values"] == [
        "layers.1.mlp.up_proj.weight"
    ]
    (chart,) = wrong.charts
    assert next(point.name for point in chart.points if not point.within) == "hidden_states.1"


def test_a_model_without_recording_is_shown_as_unverified(converted: Converted) -> None:
    folder = converted("tiny_panoptic_64")
    verdict = converter.verify(folder, level=2)
    data = gather("model", folder, verdict, None, {})
    page = Page(render(data))
    assert page.text["strong"] == "unverified"
    assert "Only levels up to 2 were asked for." in page.text["p"]
    assert not data.charts
    assert not page.all("img")


def test_a_model_without_conversion_json_has_unknown_sources(model: Path) -> None:
    (model / "conversion.json").unlink()
    data = gather("model", model, converter.verify(model, level=2), None, {})
    assert {row.status for row in data.tensors} == {"not checked"}
    assert "the model has no conversion.json" in render(data)


def test_a_tensor_that_conversion_json_has_and_the_file_lacks_is_shown_as_missing(
    model: Path,
) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["query.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = gather("model", model, converter.verify(model), None, {})
    (row,) = (row for row in data.tensors if row.status == "missing")
    assert (row.name, row.shape, row.sha256) == ("query.weight", (16, 64), None)
    assert "query.weight is missing." in render(data)


def test_rounded_weights_in_shards_have_a_tolerance_for_each_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    converter.convert("tiny_panoptic_64", folder, dtype="bfloat16", max_shard_size=200_000)
    (folder / "conversion.json").unlink()  # it says where the sources are
    data = data_of(folder, "tiny_panoptic_64")
    recorded = read_recorded(FIXTURES / "tiny_panoptic_64").tensors
    (chart,) = data.charts
    allowed = Tolerance(relative=0.04)
    for point in chart.points:
        assert point.tolerance == allowed.of(recorded[point.name])
    assert {row.dtype for row in data.tensors} == {"BF16"}
    page = render(data)
    assert "or, as a share of the range" in page
    assert "0.04" in page


def test_a_conversion_json_that_no_conversion_wrote_is_refused(model: Path) -> None:
    history = json.loads((model / "conversion.json").read_text())
    del history["tensors"]["query.weight"]["shape"]
    verdict = converter.verify(model, level=1)
    (model / "conversion.json").write_text(json.dumps(history))
    with pytest.raises(
        UnreadableFileError, match=r"conversion\.json was not written by a conversion: .* 'shape'"
    ):
        gather("model", model, verdict, None, {})


# the chart --------------------------------------------------------------------------------------


def point(name: str, max_abs: float | None, mean_abs: float | None = None) -> Point:
    return Point(name, max_abs, mean_abs, None, None, tolerance=1e-3)


def test_the_axis_is_logarithmic_with_zero_before_it() -> None:
    chart = Chart("numbers", "it", (point("a", 0.0, 0.0), point("b", 2e-5, 1e-7), point("c", 4.0)))
    assert list(chart.decades) == [-7, -6, -5, -4, -3, -2, -1, 0, 1]
    places = [chart.x(10.0**exponent) for exponent in chart.decades]
    assert np.ptp(np.diff(places)) < 0.02  # as the percentages are rounded
    assert 0 < chart.x(0) < places[0]
    assert places[-1] < 100


def test_differences_beyond_the_tolerance_and_nan_are_shown_differently(right: ReportData) -> None:
    chart = Chart("numbers", "it", (point("a", 1e-3), point("b", 2e-3), point("c", None)))
    assert [point.within for point in chart.points] == [True, False, False]
    text = render(replace(right, charts=(chart,)))
    assert "The largest is 0.002 in b." in text
    assert "2 exceed the tolerance" in text
    assert ">not a number</text>" in text


def test_a_chart_has_a_name_and_a_description_for_screen_readers(
    right: ReportData,
) -> None:
    page = Page(render(right))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for value in page.values("aria-labelledby"):
        assert set(value.split()) <= set(ids)
    (chart,) = (svg for svg in page.all("svg") if svg.get("role") == "img")
    assert chart["aria-labelledby"] == "numbers-title numbers-description"
    assert page.text["desc"].strip()


# what it is made of -----------------------------------------------------------------------------


def test_text_from_a_models_files_is_never_markup(right: ReportData, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = dict.fromkeys(config["id2label"], HOSTILE)
    del config["label2id"]
    (model / "config.json").write_text(json.dumps(config))
    history = json.loads((model / "conversion.json").read_text())
    history["tool"]["name"] = HOSTILE
    for source in history["sources"].values():
        source.update(
            repo=HOSTILE, revision=HOSTILE, files={HOSTILE: {"size": 1, "sha256": HOSTILE}}
        )
    history["tensors"][HOSTILE] = {
        "shape": [1], "dtype": HOSTILE, "recipe": HOSTILE, "sha256": HOSTILE
    }  # fmt: skip
    (model / "conversion.json").write_text(json.dumps(history))
    recorded = read_recorded(FIXTURES / "tiny_panoptic_64")
    wrong = Verdict(
        (Level("structure", "failed", HOSTILE, {"problems": [HOSTILE, HOSTILE]}),),
    )
    data = gather(HOSTILE, model, wrong, recorded, outputs_of(model, recorded))
    assert data.pictures[0].segments[0].labels[0] == HOSTILE
    page, clean = Page(render(data)), Page(render(right))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements} | {"a"}
    assert len(page.all("script")) == 1
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert HOSTILE in page.text["h1"]
    for link in page.all("a"):
        assert (link["href"] or "").startswith("https://huggingface.co/")


def test_every_character_of_the_page_shows_and_long_texts_are_cut(right: ReportData) -> None:
    # an escape sequence and a right-to-left override; halves of characters are no text of a source
    hostile, long = "\x1b[2J\u202edessap", "x" * 70_000
    segment = ShownSegment("#1f77b4", (hostile, long), (0.5, 0.5))
    data = replace(
        right,
        title=hostile + "\ud800",
        verdict=Verdict((Level("structure", "failed", hostile, {"problems": [hostile, long]}),)),
        charts=(Chart("numbers", hostile, (point(hostile, 1.0), point(long, 1.0))),),
        pictures=tuple(replace(picture, segments=(segment,)) for picture in right.pictures),
        tensors=(TensorRow(hostile, (1,), hostile, hostile, long, "as expected"),),
        sources=(SourceFile("delta", hostile, hostile, hostile, hostile),),
        versions={"converted with": hostile},
    )
    page = Page(render(data))
    shown = "\\x1b[2J\\u202edessap"
    assert page.text["h1"] == shown + "\\ud800"
    for tag in ("title", "h1", "h2", "p", "li", "td", "code", "dd", "a"):
        assert shown in page.text[tag]
    texts = [*page.text.values(), *(v or "" for _, found in page.elements for v in found.values())]
    assert all(line.isprintable() for text in texts for line in text.split("\n"))
    assert long[:1001] not in render(data)
    assert [picture_in(source).shape for source in page.values("src")]


def test_the_page_asks_for_nothing_and_allows_only_its_own_style_and_script(
    right: ReportData,
) -> None:
    page = Page(render(right))
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {t for t, _ in page.elements}
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert not page.values("style")
    assert not re.search(r"url\(|@import", page.text["style"])
    (policy,) = (
        str(meta["content"])
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    allowed = dict(entry.strip().split(" ", 1) for entry in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.text[kind].encode()).digest()).decode()
        assert allowed[f"{kind}-src"] == f"'sha256-{digest}'"


def test_the_same_model_in_another_place_has_the_same_report(
    converted: Converted, tmp_path: Path
) -> None:
    shutil.copytree(converted("tiny_panoptic_64"), tmp_path / "elsewhere")
    folders = converted("tiny_panoptic_64"), tmp_path / "elsewhere"
    first, second = (render(data_of(folder, "tiny_panoptic_64")) for folder in folders)
    assert first == second


# the file ---------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(converted: Converted, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "verdict.html"
    folder = converted("tiny_panoptic_64")
    verdict = converter.verify(folder, level=1)
    with pytest.raises(OutputError, match=re.escape(str(path))):
        write_report([path], "model", folder, verdict, None, {})


def test_a_report_replaces_a_link_and_writes_to_a_stream(
    converted: Converted, tmp_path: Path
) -> None:
    folder = converted("tiny_panoptic_64")
    victim, link = (tmp_path / name for name in ("victim", "page.html"))
    victim.write_text("precious")
    link.symlink_to(victim)
    stream = Path(f"/dev/fd/{os.open(tmp_path / 'file', os.O_WRONLY | os.O_CREAT)}")

    write_report([link, stream], "model", folder, converter.verify(folder, level=1), None, {})

    assert victim.read_text() == "precious"
    assert link.read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "file").read_text() == link.read_text()
    os.close(int(stream.name))
