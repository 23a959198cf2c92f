"""The real client against the loopback Hub."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import huggingface_hub.constants
import pytest
from hub_server import Hub, client_environment, point_client_at, running_hub
from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder

REPO = "meta/backbone"
CONFIG = b'{"hidden_size": 8}'
WEIGHTS = bytes(range(256)) * 40  # 10 KiB
ANN, BOB, EXPIRED = "hf_ann", "hf_bob", "hf_expired"  # tokens, the last one unknown to the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one public repository, which this process's client uses without a token."""
    weights = tmp_path / "given.safetensors"
    weights.write_bytes(WEIGHTS)
    with running_hub() as hub:
        files: dict[str, bytes | Path] = {
            "config.json": CONFIG,
            "model.safetensors": weights,
            "logs/2025/loss.csv": b"1,2\n",
        }
        hub.create_repo(REPO, files)
        hub.add_user("ann", ANN)
        hub.add_user("bob", BOB)
        point_client_at(monkeypatch, hub, tmp_path / "home")
        yield hub


def test_model_info_names_the_commit_and_the_files(hub: Hub) -> None:
    info = huggingface_hub.model_info(REPO)

    assert (info.id, info.private, info.gated) == (REPO, False, False)
    assert info.sha
    assert re.fullmatch("[0-9a-f]{40}", info.sha)
    names = [sibling.rfilename for sibling in info.siblings or []]
    assert names == ["config.json", "logs/2025/loss.csv", "model.safetensors"]


def test_model_info_gives_sizes_and_digests_on_request(hub: Hub) -> None:
    info = HfApi().model_info(REPO, files_metadata=True)

    config, _, weights = info.siblings or []
    assert (config.size, config.lfs) == (len(CONFIG), None)
    # printf '{"hidden_size": 8}' | git hash-object --stdin
    assert config.blob_id == "ae17b36e4ae15109840cad63099233fe8d2e16c8"
    assert weights.size == len(WEIGHTS)
    assert weights.lfs is not None
    # sha256sum
    assert weights.lfs.sha256 == "e96760a87768717bcebcfd25ddc7d46b4dbc95a4b0014def080c08539f7d90d0"


def test_files_are_listed_with_and_without_their_folders(hub: Hub) -> None:
    api = HfApi()

    assert api.list_repo_files(REPO) == ["config.json", "logs/2025/loss.csv", "model.safetensors"]
    top_level = api.list_repo_tree(REPO)
    assert [entry.path for entry in top_level if isinstance(entry, RepoFolder)] == ["logs"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "logs")] == ["logs/2025"]


def test_a_plain_file_is_downloaded_from_the_hub_itself(hub: Hub) -> None:
    path = hf_hub_download(REPO, "config.json")

    assert Path(path).read_bytes() == CONFIG
    address = f"/{REPO}/resolve/main/config.json"
    assert hub.request_lines == [f"HEAD {address}", f"GET {address}"]


def test_a_file_in_lfs_is_downloaded_from_the_cdn_without_the_token(hub: Hub) -> None:
    path = hf_hub_download(REPO, "model.safetensors", token=ANN)

    assert Path(path).read_bytes() == WEIGHTS
    asked, downloaded = hub.requests
    assert (str(asked), asked.has_token) == (f"HEAD /{REPO}/resolve/main/model.safetensors", True)
    assert downloaded.path.startswith("/cdn/")
    assert not downloaded.has_token


def test_a_second_download_asks_only_whether_the_file_changed(hub: Hub) -> None:
    first = hf_hub_download(REPO, "model.safetensors")
    hub.requests.clear()

    assert hf_hub_download(REPO, "model.safetensors") == first
    assert hub.request_lines == [f"HEAD /{REPO}/resolve/main/model.safetensors"]


def test_a_second_download_of_a_commit_asks_nothing(hub: Hub) -> None:
    commit = HfApi().model_info(REPO).sha
    first = hf_hub_download(REPO, "config.json", revision=commit)
    hub.requests.clear()

    assert hf_hub_download(REPO, "config.json", revision=commit) == first
    assert hub.requests == []


def test_a_snapshot_fetches_only_the_files_asked_for(hub: Hub) -> None:
    folder = Path(snapshot_download(REPO, allow_patterns=["*.json", "*.csv"]))

    assert (folder / "config.json").read_bytes() == CONFIG
    assert sorted(hub.served) == [f"{REPO}/config.json", f"{REPO}/logs/2025/loss.csv"]


def test_nothing_is_asked_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hf_hub_download(REPO, "config.json")
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    assert hf_hub_download(REPO, "config.json") == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "model.safetensors")
    assert hub.requests == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    hub.tag(REPO, "v1")
    hub.tag(REPO, "release/1")
    first = HfApi().model_info(REPO).sha
    second = hub.commit(REPO, {"config.json": b"{}"})

    def config(revision: str | None) -> bytes:
        return Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes()

    assert first != second
    assert HfApi().model_info(REPO, revision="v1").sha == first
    assert config("v1") == config(first) == config("release/1") == CONFIG
    assert config("main") == config(second) == b"{}"


def test_commit_ids_are_the_same_in_every_run(hub: Hub) -> None:
    with running_hub() as another:
        ids = [each.create_repo("a/b", {"x.bin": b"x"}) for each in (hub, another)]
        ids += [each.commit("a/b", {"x.bin": b"x"}) for each in (hub, another)]

    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_what_does_not_exist_is_not_found(hub: Hub) -> None:
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(REPO, revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "config.yaml")
    assert try_to_load_from_cache(REPO, "config.yaml") is _CACHED_NO_EXIST
    with pytest.raises(RemoteEntryNotFoundError):
        list(HfApi().list_repo_tree(REPO, "log"))


@pytest.mark.parametrize(("token", "status"), [(False, 401), (BOB, 404)])
@pytest.mark.parametrize("repo_id", ["ann/private", "ann/missing"])
def test_a_private_repository_looks_like_a_missing_one(
    hub: Hub, repo_id: str, token: str | bool, status: int
) -> None:
    hub.create_repo("ann/private", {"config.json": CONFIG}, private=True)

    for ask in (
        lambda: HfApi().model_info(repo_id, token=token),
        lambda: hf_hub_download(repo_id, "config.json", token=token),
        lambda: snapshot_download(repo_id, token=token),
    ):
        with pytest.raises(RepositoryNotFoundError) as error:
            ask()
        assert error.value.response.status_code == status
        assert not isinstance(error.value, GatedRepoError)


def test_a_private_repository_is_open_to_its_owner_and_those_let_in(hub: Hub) -> None:
    hub.create_repo("ann/private", {"config.json": CONFIG}, private=True)
    hub.grant_access("ann/private", "bob")

    assert HfApi(token=ANN).model_info("ann/private").private
    assert hf_hub_download("ann/private", "config.json", token=BOB)


@pytest.mark.parametrize(("token", "status"), [(False, 401), (BOB, 403)])
def test_a_gated_repository_shows_its_files_and_refuses_them(
    hub: Hub, token: str | bool, status: int
) -> None:
    hub.create_repo("meta/gated", {"config.json": CONFIG}, gated=True)

    assert HfApi().model_info("meta/gated", token=token).gated == "manual"
    assert HfApi().list_repo_files("meta/gated", token=token) == ["config.json"]
    with pytest.raises(GatedRepoError) as error:
        hf_hub_download("meta/gated", "config.json", token=token)
    assert error.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        snapshot_download("meta/gated", token=token)
    assert hub.served == []


def test_a_gated_repository_opens_to_those_who_were_granted_access(hub: Hub) -> None:
    hub.create_repo("meta/gated", {"model.safetensors": WEIGHTS}, gated="auto")
    hub.grant_access("meta/gated", "ann")

    path = hf_hub_download("meta/gated", "model.safetensors", token=ANN)

    assert Path(path).read_bytes() == WEIGHTS


def test_an_unknown_token_is_refused_even_for_what_is_public(hub: Hub) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        hf_hub_download(REPO, "config.json", token=EXPIRED)
    assert error.value.response.status_code == 401
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_whoami_names_the_user_of_a_token(hub: Hub) -> None:
    assert HfApi(token=ANN).whoami()["name"] == "ann"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token=EXPIRED).whoami()


def test_a_renamed_repository_is_found_under_its_old_name(hub: Hub) -> None:
    hub.rename(REPO, "meta/renamed")

    assert HfApi().model_info(REPO, files_metadata=True).id == "meta/renamed"
    assert hub.request_lines == [f"GET /api/models/{name}" for name in (REPO, "meta/renamed")]
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == CONFIG
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert hub.served == ["meta/renamed/config.json", "meta/renamed/model.safetensors"]


@pytest.mark.parametrize(
    ("filename", "content"), [("config.json", CONFIG), ("model.safetensors", WEIGHTS)]
)
def test_an_interrupted_download_continues_where_it_broke_off(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, filename: str, content: bytes
) -> None:
    # The client forgets what has come of an unfinished chunk, and a chunk is 10 MiB.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the client tries again
    hub.interrupt_next_download(after=8)

    path = hf_hub_download(REPO, filename)

    assert Path(path).read_bytes() == content
    assert [r.range for r in hub.requests if r.method == "GET"] == [None, "bytes=8-"]


def test_a_child_process_uses_the_hub_and_its_token(hub: Hub, tmp_path: Path) -> None:
    hub.create_repo("meta/gated", {"config.json": CONFIG}, gated=True)
    hub.grant_access("meta/gated", "ann")
    program = "import huggingface_hub as h; print(h.hf_hub_download('meta/gated', 'config.json'))"
    environment = client_environment(hub, tmp_path / "child", token=ANN)

    command = [sys.executable, "-c", program]
    printed = subprocess.check_output(command, env=environment, text=True)

    path = Path(printed.strip())
    assert path.read_bytes() == CONFIG
    assert path.is_relative_to(tmp_path / "child")
    assert all(request.has_token for request in hub.requests)


def test_no_token_and_no_proxy_of_the_real_world_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real_world = {
        "HF_TOKEN": "hf_real",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "no_proxy": "else.where",
    }
    for name, value in real_world.items():
        monkeypatch.setenv(name, value)
    huggingface_hub.get_session()  # keeps the proxy
    assert not real_world.keys() & client_environment(hub, tmp_path).keys()

    point_client_at(monkeypatch, hub, tmp_path)
    HfApi().model_info(REPO)

    assert [request.has_token for request in hub.requests] == [False]


def test_nothing_listens_once_the_hub_is_closed() -> None:
    with running_hub() as hub:
        endpoint = hub.endpoint
        assert httpx2.get(endpoint, trust_env=False).status_code == 404

    with pytest.raises(httpx2.ConnectError):
        httpx2.get(endpoint, trust_env=False)
