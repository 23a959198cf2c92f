"""The model card: what it contains, and whether a push keeps people's edits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import Result
from conftest import FIXTURES
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markdown_it import MarkdownIt

from converter.errors import EomtConvertError
from converter.files import FileDigest
from converter.history import PastSource
from converter.outside import link, prose
from converter.publishing.card import BEGIN, END, ModelRecord, model_card, updated
from converter.publishing.release import Release, Step
from converter.weights.plan import Source

REPO = "me/model"

Command = Callable[..., Result]


def record_of(folder: Path) -> ModelRecord:
    return ModelRecord.read(folder)


def changed(made: ModelRecord, **changes: Any) -> ModelRecord:
    """A record with other values of conversion.json."""
    return replace(made, history=replace(made.history, **changes))


def with_source(made: ModelRecord, role: Source, **changes: Any) -> ModelRecord:
    sources = made.history.sources
    return changed(made, sources={**sources, role: replace(sources[role], **changes)})


def metadata(card: ModelCard) -> ModelCardData:
    return cast(ModelCardData, card.data)


@pytest.fixture
def published(derived: Path) -> ModelRecord:
    return record_of(derived)


@pytest.fixture
def card(published: ModelRecord) -> ModelCard:
    return model_card(REPO, published)


def test_the_metadata_says_what_the_model_is_and_what_it_comes_from(card: ModelCard) -> None:
    data = metadata(card)

    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-segmentation")
    assert data.base_model == "facebook/dinov3-vits16-pretrain-lvd1689m"
    assert data.get("base_model_relation") == "finetune"
    assert data.datasets == ["coco"]
    assert data.tags == ["eomt", "dinov3", "panoptic-segmentation"]
    assert (data.license, data.license_name) == ("other", "dinov3-license")
    assert str(data.license_link).startswith("https://ai.meta.com/")


def test_the_published_figure_is_a_result_with_its_source(card: ModelCard) -> None:
    results = metadata(card).eval_results

    assert results is not None
    assert [(result.metric_name, result.metric_value) for result in results] == [("PQ", 47.2)]
    assert results[0].dataset_name == "COCO panoptic val2017"
    assert str(results[0].source_url).endswith("model_zoo/dinov3.md")


def test_the_card_survives_a_round_trip(card: ModelCard, tmp_path: Path) -> None:
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")

    assert str(loaded) == str(card)
    assert metadata(loaded).eval_results == metadata(card).eval_results
    assert loaded.data.to_dict() == card.data.to_dict()  # type: ignore[no-untyped-call]  # no types in huggingface_hub


def test_the_text_has_verdict_command_sources_and_use(
    card: ModelCard, published: ModelRecord
) -> None:
    text = card.text
    delta = published.history.sources["delta"]

    assert "**Verified.**" in text
    assert "| structure | passed | tensors " in text
    command = (
        "eomt-convert --checkpoint coco_panoptic_small_640 --image-size 64x64 --labels labels.json"
    )
    assert command in text
    assert f"| delta | `{delta.repo_id}` | `{delta.revision}` | `pytorch_model.bin` |" in text
    assert f'EomtDinov3ForUniversalSegmentation.from_pretrained("{REPO}")' in text
    assert "from transformers import AutoImageProcessor" in text
    assert "from reference_model import" in text
    assert "PQ 47.2 on COCO panoptic val2017" in text
    assert "[LICENSE.md](LICENSE.md)" in text
    assert "kerssies2025eomt" in text


def test_nothing_unverified_is_called_verified(published: ModelRecord) -> None:
    made = changed(published, verdict={"verdict": "unverified", "levels": []})
    text = model_card(REPO, made).text

    assert "**Not verified.**" in text
    assert "**Verified.**" not in text


def test_a_figure_is_not_claimed_for_other_weights(published: ModelRecord) -> None:
    card = model_card(REPO, with_source(published, "delta", repo_id="somebody/fine-tune"))

    assert metadata(card).eval_results is None
    assert metadata(card).datasets is None
    assert "Published figure" not in card.text


def test_a_file_of_metas_is_known_by_its_digest(published: ModelRecord) -> None:
    files = {"x.pth": FileDigest(1, "8aa4cbdd" + 56 * "0")}
    made = with_source(published, "backbone", repo_id=None, revision=None, files=files)

    assert made.backbone == "facebook/dinov3-vitl16-pretrain-lvd1689m"


def test_no_backbone_is_invented(published: ModelRecord) -> None:
    made = changed(published, sources={"weights": published.history.sources["delta"]})

    assert made.backbone is None
    assert made.derived
    assert metadata(model_card(REPO, made)).base_model is None


def test_an_offline_checkpoint_is_not_derived_from_metas_weights(
    converted: Callable[[str], Path],
) -> None:
    made = record_of(converted("shapes_panoptic_128"))

    assert not made.derived
    assert metadata(model_card(REPO, made)).license == "apache-2.0"


def test_an_offline_checkpoint_with_another_backbone_may_be_derived(
    converted: Callable[[str], Path],
) -> None:
    made = record_of(converted("shapes_panoptic_128"))

    assert with_source(
        made, "backbone", files={"model.safetensors": FileDigest(1, 64 * "0")}
    ).derived


@pytest.mark.parametrize(
    ("name", "reason"),
    [("tiny_panoptic_48x80", "square models only"), ("tiny_instance_64_gated", "gated MLP")],
)
def test_transformers_is_not_recommended_where_it_is_wrong(
    converted: Callable[[str], Path], name: str, reason: str
) -> None:
    text = model_card(REPO, record_of(converted(name))).text

    assert reason in text
    assert "from transformers import" not in text
    assert "from reference_model import" in text


def test_the_example_for_a_semantic_model_is_semantic_segmentation(
    converted: Callable[[str], Path],
) -> None:
    text = model_card(REPO, record_of(converted("tiny_semantic_48"))).text

    assert "post_process_semantic_segmentation" in text
    assert "segmentation = results[0]\n" in text


# text from outside ------------------------------------------------------------------------------

HOSTILE = (
    "a`b``|c\\|\n\n# Heading\n\n```\n~~~\n<b>[link](http://evil.example)</b> **d** _e_ \ud800"
    "\u202e https://evil.example www.evil.example <http://evil.example> --> {{ 7 * 7 }} &lt;"
)


def structure(text: str) -> list[tuple[str, ...]]:
    """The structure of rendered Markdown, without its words."""
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(text)
    tokens = [inner for token in tokens for inner in (token, *(token.children or ()))]
    return [
        (token.type, token.tag, *sorted(str(token.attrs.get(name)) for name in ("href", "src")))
        for token in tokens
        if token.type not in ("inline", "text", "text_special")
    ]


@pytest.mark.parametrize("hostile", [HOSTILE, "```", "`", "|", "\\", "x" * 70_000, "-->"])
def test_text_from_conversion_json_is_harmless_in_the_card(
    published: ModelRecord, hostile: str
) -> None:
    delta = published.history.sources["delta"]
    source = PastSource(f"somebody/{hostile}", hostile, {hostile: FileDigest(1, hostile)})
    clean = PastSource("somebody/model", "main", {"delta.bin": FileDigest(1, 64 * "0")})

    def card(source: PastSource, command: str, version: str) -> str:
        sources: dict[Source, PastSource] = {"delta": source, "backbone": delta}
        made = changed(published, sources=sources, command=command, version=version)
        return model_card(REPO, made).text

    text = card(source, hostile, hostile)
    assert structure(text) == structure(card(clean, "eomt-convert", "0.1"))
    assert "49" not in text.partition("How it was made")[2].partition("Licence")[0]
    assert max(map(len, text.splitlines())) < 6000
    assert text.encode()


@pytest.mark.parametrize(
    "repo_id", ["a/b\u202e", "a/b\x9b31m", "a/b\nlicense: mit", "a/b/c", "../b", "b" * 70_000, ""]
)
def test_a_backbone_with_an_invalid_repository_name_is_left_out(
    published: ModelRecord, repo_id: str
) -> None:
    files = {"model.safetensors": FileDigest(1, 64 * "0")}
    made = with_source(published, "backbone", repo_id=repo_id, files=files)
    text = str(model_card(REPO, made))

    assert made.backbone is None
    assert "base_model" not in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_file_with_a_heading_in_its_name_is_published_harmlessly(
    command: Command, tmp_path: Path
) -> None:
    name = "delta`\n\n# Heading\n\n```\n<b>[x](http:evil)<b>\n|.bin"
    source = FIXTURES / "tiny_panoptic_64"
    shutil.copy(source / "delta" / "pytorch_model.bin", tmp_path / name)
    command(
        *("--delta", name, "--backbone", source / "backbone", "--task", "panoptic"),
        *("--image-size", "64", "--output", "out", "--no-verify"),
    )
    text = model_card(REPO, ModelRecord.read(tmp_path / "out")).text

    assert "\n# Heading" not in text
    assert "| `delta\\x60\\n\\n# Heading\\n" in text
    assert [entry for entry in structure(text) if "evil" in str(entry)] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("PQ 47.2 on COCO panoptic val2017, 1e-05, coco_panoptic", None),
        ("a `b` *c* _d_ [e](f) <g> h|i ~j~", r"a \`b\` \*c\* \_d\_ \[e\](f) \<g\> h\|i \~j\~"),
        ("# a", r"\# a"),
        ("1. a", r"1\. a"),
        ("  12) a", r"  12\) a"),
        ("__a__ ___b___ c_d", r"\_\_a\_\_ \_\_\_b\_\_\_ c_d"),
        ("http://a www.b a@b &lt;", r"http\://a www\.b a\@b \&lt;"),
        ("a\nb\x1b", r"a\\nb\\x1b"),
    ],
)
def test_prose_shows_as_it_is_written(text: str, shown: str | None) -> None:
    assert prose(text) == (text if shown is None else shown)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://a.b/c/tree/main", "[x_y](https://a.b/c/tree/main)"),
        ("https://a.b/) [c](d <e>\n\ud800", "[x_y](https://a.b/%29%20%5Bc%5D%28d%20%3Ce%3E%0A?)"),
        ("javascript:alert(1)", "x_y"),
        ("", "x_y"),
    ],
)
def test_links_lead_to_web_addresses_only(address: str, shown: str) -> None:
    assert link("x_y", address) == shown


def test_release_notes_are_a_table_whatever_release_json_contains(tmp_path: Path) -> None:
    name = "tiny_panoptic_64"
    wrong = Step(name, HOSTILE, "published", HOSTILE, HOSTILE, HOSTILE, f"https://a/{HOSTILE}")
    clean = Step(name, "me/a", "published", "passed", "original", "0123456789ab", "https://a/b")
    found, expected = (
        [kind for kind, *_ in structure(Release(tmp_path, (step,)).markdown())]
        for step in (wrong, clean)
    )

    assert found == expected


# edits -----------------------------------------------------------------------------------------


def test_an_unchanged_card_stays_byte_for_byte(card: ModelCard) -> None:
    as_people_write_it = str(card).replace("- eomt\n", '- "eomt"\n')

    assert updated(str(card), card) == str(card)
    assert updated(as_people_write_it, card) == as_people_write_it


def test_text_outside_the_marks_is_kept_and_inside_replaced(card: ModelCard) -> None:
    edited = str(card).replace(BEGIN, f"Read this first.\n\n{BEGIN}\nstale")
    edited += "\n## Thanks\n\nTo all.\n"
    result = updated(edited, card)

    assert "Read this first." in result
    assert result.endswith("\n## Thanks\n\nTo all.\n")
    assert "stale" not in result
    assert result[result.index(BEGIN) : result.index(END)] in str(card)


def test_a_card_without_marks_keeps_all_its_text(card: ModelCard) -> None:
    result = updated("# By hand\n\nWords.\n", card)

    assert "# By hand\n\nWords." in result
    assert result.rstrip().endswith(END)
    assert metadata(ModelCard(result)).license == "other"
    assert updated(result, card) == result


@pytest.mark.parametrize("lost", [BEGIN, END])
def test_a_missing_mark_is_an_error(card: ModelCard, lost: str) -> None:
    with pytest.raises(EomtConvertError, match="must have both marks around eomt-convert's part"):
        updated(str(card).replace(lost, ""), card)


def test_metadata_that_people_added_is_kept(card: ModelCard) -> None:
    theirs = ModelCard(str(card))
    data = metadata(theirs)
    data.tags = [*(data.tags or []), "cute"]
    cast(Any, data).thumbnail = "https://example.org/x.png"
    measured = EvalResult(
        task_type="image-segmentation",
        dataset_type="mine",
        dataset_name="Mine",
        metric_type="pq",
        metric_value=12.5,
    )
    data.eval_results = [*(data.eval_results or []), measured]
    data.license = "mit"
    result = metadata(ModelCard(updated(str(theirs), card)))

    assert result.tags == ["eomt", "dinov3", "panoptic-segmentation", "cute"]
    assert result.get("thumbnail") == "https://example.org/x.png"
    assert [found.metric_value for found in result.eval_results or []] == [47.2, 12.5]
    assert result.license == "other"


def test_a_changed_figure_replaces_the_old_one(card: ModelCard) -> None:
    old = str(card).replace("47.2", "46.0")

    assert [
        result.metric_value for result in metadata(ModelCard(updated(old, card))).eval_results or []
    ] == [47.2]


def test_metadata_that_is_not_yaml_is_an_error(card: ModelCard) -> None:
    with pytest.raises(EomtConvertError, match=r"metadata of README\.md on the Hub"):
        updated("---\na: [\n---\n", card)


def test_fixtures_of_the_package_are_recognised_by_their_digests() -> None:
    for folder in FIXTURES.iterdir():
        if folder.is_dir():
            known = json.loads((folder / "recorded.json").read_text())["sha256"]
            assert "delta/pytorch_model.bin" in known
