"""From a name to files: paths, repositories, and what goes wrong with them."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from conftest import FIXTURES
from hub_faults import MovedParent
from hub_server import Hub

from converter.catalog import CATALOG
from converter.errors import (
    AccessError,
    HubUnavailableError,
    UnreadableFileError,
    UsageError,
)
from converter.hub.access import OPEN_BACKBONES, Access
from converter.hub.sources import Fetched, fetch, fetch_config
from converter.places import HubSource, LocalSource, parse_source

FOLDER = FIXTURES / "tiny_panoptic_64"
BACKBONE, DELTA = "facebook/backbone", "tue-mps/delta"


@pytest.mark.parametrize(
    "text",
    ["/abs/olute", "./here", "../there", "~/home", "weights.bin", "a/b.safetensors", "x.pth"],
)
def test_paths_are_recognised_by_their_form(text: str) -> None:
    assert parse_source(text) == LocalSource(Path(text).expanduser())


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)

    assert parse_source("owner/name") == LocalSource(Path("owner/name"))
    Path("owner/link").symlink_to("nowhere")
    assert parse_source("owner/link") == LocalSource(Path("owner/link"))


def test_anything_else_of_the_form_owner_name_is_a_repository() -> None:
    assert parse_source("tue-mps/delta") == HubSource("tue-mps/delta", "main")
    assert parse_source("tue-mps/delta@v1.0") == HubSource("tue-mps/delta", "v1.0")
    assert parse_source("o/n@refs/pr/1") == HubSource("o/n", "refs/pr/1")


@pytest.mark.parametrize("text", ["delta", "a/b/c", "a/", "a/b@", "@v1", " "])
def test_anything_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_source(text)


def test_a_folder_gives_its_weights_and_config() -> None:
    found = fetch(LocalSource(FOLDER / "backbone"), Access())

    assert found == Fetched(
        FOLDER / "backbone" / "model.safetensors", FOLDER / "backbone" / "config.json"
    )


def test_a_file_gives_itself_and_the_config_beside_it() -> None:
    found = fetch(LocalSource(FOLDER / "backbone" / "model.safetensors"), Access())

    assert found.config == FOLDER / "backbone" / "config.json"


def test_the_only_weights_of_a_folder_are_found_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "epoch=11.ckpt").write_bytes(b"")
    (tmp_path / "README.md").write_bytes(b"")

    assert fetch(LocalSource(tmp_path), Access()).weights.name == "epoch=11.ckpt"


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")

    assert fetch(LocalSource(tmp_path), Access()).weights.name == "model.safetensors"


def test_a_folder_with_several_weights_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    (tmp_path / "b.ckpt").write_bytes(b"")

    with pytest.raises(UnreadableFileError, match=r"several files of weights \(a\.ckpt, b\.ckpt\)"):
        fetch(LocalSource(tmp_path), Access())


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="has no file of weights"):
        fetch(LocalSource(tmp_path), Access())


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="There is no file or folder"):
        fetch(LocalSource(tmp_path / "x.bin"), Access())


@pytest.fixture
def repositories(hub: Hub) -> Hub:
    hub.create_repo(
        BACKBONE,
        {
            "config.json": FOLDER / "backbone" / "config.json",
            "model.safetensors": FOLDER / "backbone" / "model.safetensors",
            "README.md": b"# backbone",
        },
    )
    hub.create_repo(DELTA, {"pytorch_model.bin": FOLDER / "delta" / "pytorch_model.bin"})
    return hub


def test_only_the_needed_files_of_a_repository_are_fetched(repositories: Hub) -> None:
    found = fetch(HubSource(BACKBONE), Access())

    assert found.weights.read_bytes() == (FOLDER / "backbone" / "model.safetensors").read_bytes()
    assert found.config is not None
    asked = {request.path.rpartition("/")[2] for request in repositories.requests[1:]}
    assert asked - {found.revision} == {"config.json", "model.safetensors"}


def test_a_branch_becomes_the_commit_it_was_at(repositories: Hub) -> None:
    first = fetch(HubSource(DELTA), Access()).revision
    repositories.commit(DELTA, {"README.md": b"new"})
    second = fetch(HubSource(DELTA), Access()).revision

    assert first != second
    assert fetch(HubSource(DELTA, str(first)), Access()).revision == first


def test_a_second_run_downloads_nothing(repositories: Hub) -> None:
    fetch(HubSource(BACKBONE), Access())
    repositories.served.clear()
    fetch(HubSource(BACKBONE), Access())

    assert repositories.served == []


def test_the_cache_is_enough_when_offline(repositories: Hub) -> None:
    online = fetch(HubSource(BACKBONE), Access())
    repositories.requests.clear()

    assert fetch(HubSource(BACKBONE), Access(local_files_only=True)) == online
    assert repositories.requests == []


def test_the_environment_can_switch_to_offline_mode(
    repositories: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(AccessError, match="not in the cache"):
        fetch(HubSource(BACKBONE), Access())
    assert repositories.requests == []


def test_offline_the_error_names_what_the_cache_lacks(repositories: Hub) -> None:
    with pytest.raises(AccessError, match=rf"{BACKBONE} at main is not in the cache"):
        fetch(HubSource(BACKBONE), Access(local_files_only=True))


def test_offline_the_error_names_missing_shards(hub: Hub) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    shards = dict.fromkeys(index["weight_map"].values(), b"")
    hub.create_repo(DELTA, {"model.safetensors.index.json": json.dumps(index).encode(), **shards})
    found = fetch(HubSource(DELTA), Access())
    found.shards[1].unlink()

    with pytest.raises(AccessError, match=r"model-2-of-2\.safetensors is missing"):
        fetch(HubSource(DELTA), Access(local_files_only=True))


def test_offline_another_revision_is_not_taken(repositories: Hub) -> None:
    fetch(HubSource(DELTA), Access())

    with pytest.raises(AccessError, match=r"delta at v1 is not in the cache: only other rev"):
        fetch(HubSource(DELTA, "v1"), Access(local_files_only=True))


def test_offline_the_error_names_missing_weights(repositories: Hub) -> None:
    fetch_config(HubSource(BACKBONE), Access())

    with pytest.raises(AccessError) as caught:
        fetch(HubSource(BACKBONE), Access(local_files_only=True))
    assert caught.value.message == (
        f"{BACKBONE} at main is not in the cache: model.safetensors or "
        "model.safetensors.index.json or pytorch_model.bin is missing (files in the cache: "
        "config.json)."
    )


def test_a_repository_that_lacks_a_shard_is_named(hub: Hub) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.create_repo(DELTA, {**files, "model-1-of-2.safetensors": b""})

    with pytest.raises(AccessError, match=r"at main lacks model-2-of-2\.safetensors"):
        fetch(HubSource(DELTA), Access())


def test_all_files_come_from_the_commit_that_the_branch_was_at_first(repositories: Hub) -> None:
    """The branch moves after it was looked up."""
    repositories.break_request(MovedParent("somebody", "config.json"), 1)
    found = fetch(HubSource(BACKBONE), Access())

    assert [str(each.request) for each in repositories.broken] == [
        f"HEAD /{BACKBONE}/resolve/main/config.json"
    ]
    assert found.config is not None
    assert found.config.read_bytes() == (FOLDER / "backbone" / "config.json").read_bytes()
    assert found.revision == repositories.commits(BACKBONE)[1].sha
    assert {path.parent.name for path in (found.weights, found.config)} == {found.revision}


def test_another_cache_may_be_used(repositories: Hub, tmp_path: Path) -> None:
    found = fetch(HubSource(DELTA), Access(cache_dir=tmp_path / "cache"))

    assert (tmp_path / "cache") in found.weights.parents


def test_a_gated_repository_says_where_to_ask_and_how_to_log_in(hub: Hub) -> None:
    hub.create_repo(BACKBONE, {"config.json": b"{}", "model.safetensors": b""}, gated=True)
    hub.add_user("ann", "hf_secret")
    for token in (None, "hf_secret"):
        with pytest.raises(AccessError) as caught:
            fetch(HubSource(BACKBONE), Access(token=token))
        assert f"{BACKBONE} is gated" in caught.value.message
        assert f"https://huggingface.co/{BACKBONE}" in caught.value.remedy
        assert "hf auth login" in caught.value.remedy
        assert "hf_secret" not in str(caught.value)


def test_a_gated_backbone_offers_the_copy_that_is_not(hub: Hub) -> None:
    repo = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    hub.create_repo(repo, {"config.json": b"{}", "model.safetensors": b""}, gated=True)

    with pytest.raises(AccessError) as caught:
        fetch(HubSource(repo), Access())
    assert "--backbone timm/vit_large_patch16_dinov3.lvd1689m" in caught.value.remedy
    assert "licence still applies" in caught.value.remedy


def test_every_published_backbone_has_a_copy_that_is_not_gated() -> None:
    assert {entry.backbone for entry in CATALOG if not entry.offline} <= set(OPEN_BACKBONES)


def test_a_gated_repository_opens_to_users_with_access(hub: Hub) -> None:
    hub.create_repo(DELTA, {"pytorch_model.bin": b"weights"}, gated=True)
    hub.add_user("ann", "hf_secret")
    hub.grant_access(DELTA, "ann")

    assert fetch(HubSource(DELTA), Access(token="hf_secret")).weights.read_bytes() == b"weights"


def test_a_missing_repository_is_named(hub: Hub) -> None:
    with pytest.raises(AccessError, match="no repository tue-mps/nothing"):
        fetch(HubSource("tue-mps/nothing"), Access())


def test_a_missing_revision_is_named(repositories: Hub) -> None:
    with pytest.raises(AccessError, match=r"tue-mps/delta has no revision 'v9'"):
        fetch(HubSource(DELTA, "v9"), Access())


def test_a_repository_without_weights_is_named(hub: Hub) -> None:
    hub.create_repo(DELTA, {"README.md": b""})

    with pytest.raises(AccessError, match="tue-mps/delta at main has no file of weights"):
        fetch(HubSource(DELTA), Access())


def test_an_expired_token_has_its_own_error(repositories: Hub) -> None:
    with pytest.raises(AccessError, match="does not accept the token") as caught:
        fetch(HubSource(DELTA), Access(token="hf_expired"))
    assert "hf_expired" not in str(caught.value)


def test_a_hub_that_is_down_has_its_own_error(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(HubUnavailableError, match="could not be reached"):
        fetch(HubSource(DELTA), Access())


def test_a_name_that_no_repository_can_have_is_wrong_usage(hub: Hub) -> None:
    with pytest.raises(UsageError, match="not a valid name"):
        fetch(HubSource("tue--mps/..delta"), Access())


def test_a_renamed_repository_is_found(repositories: Hub) -> None:
    repositories.rename(DELTA, "tue-mps/new-name")
    found = fetch(HubSource(DELTA), Access())

    assert found.weights.is_file()
    assert found.moved_to == "tue-mps/new-name"
