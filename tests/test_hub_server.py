"""The real client against the loopback Hub."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import huggingface_hub.constants
import pytest
from conftest import in_every_way, over_lfs
from hub_server import (
    Hub,
    choose_transfer,
    client_environment,
    point_client_at,
    running_hub,
    shorten_client_waits,
)
from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoCard,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder

# The client passes uploads to httpx2 in a way that this calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "meta/backbone"
CONFIG = b'{"hidden_size": 8}'
WEIGHTS = bytes(range(256)) * 40  # 10 KiB
NEW_WEIGHTS = WEIGHTS[::-1]
ANN, BOB, EXPIRED = "hf_ann", "hf_bob", "hf_expired"  # tokens, the last one unknown to the Hub


Push = Callable[..., CommitInfo]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transfer: str) -> Iterator[Hub]:
    """A Hub with one public repository, which this process's client uses without a token."""
    weights = tmp_path / "given.safetensors"
    weights.write_bytes(WEIGHTS)
    with running_hub() as hub:
        choose_transfer(hub, transfer)
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


@pytest.mark.parametrize("transfer", ["lfs", "xet-off"], indirect=True)
def test_a_file_in_lfs_is_downloaded_from_the_cdn_without_the_token(hub: Hub) -> None:
    path = hf_hub_download(REPO, "model.safetensors", token=ANN)

    assert Path(path).read_bytes() == WEIGHTS
    asked, *_, downloaded = hub.requests
    assert (str(asked), asked.has_token) == (f"HEAD /{REPO}/resolve/main/model.safetensors", True)
    assert downloaded.path.startswith("/cdn/")
    assert not downloaded.has_token


@pytest.mark.parametrize("transfer", ["xet", "xet-unshared"], indirect=True)
def test_a_file_in_xet_needs_a_token_for_its_storage(hub: Hub, transfer: str) -> None:
    commit = HfApi().model_info(REPO).sha
    hub.requests.clear()
    path = Path(hf_hub_download(REPO, "model.safetensors"))

    assert path.read_bytes() == WEIGHTS
    assert hub.request_lines == [
        f"HEAD /{REPO}/resolve/main/model.safetensors",
        f"GET /api/models/{REPO}/xet-read-token/{commit}",
    ]
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert path.readlink().name == sha256
    assert (path.resolve().name == sha256) is (transfer == "xet-unshared")


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


def test_a_private_repository_is_open_to_its_owner_and_users_with_access(hub: Hub) -> None:
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


def test_an_unknown_token_is_refused_even_for_a_public_repository(hub: Hub) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        hf_hub_download(REPO, "config.json", token=EXPIRED)
    assert error.value.response.status_code == 401
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_whoami_names_the_user_of_a_token(hub: Hub) -> None:
    hub.add_user("eve", "hf_eve", can_write=False, organizations=["lab"])

    assert HfApi(token=ANN).whoami()["name"] == "ann"
    eve = HfApi(token="hf_eve").whoami()
    assert [organization["name"] for organization in eve["orgs"]] == ["lab"]
    assert eve["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token=EXPIRED).whoami()


def test_a_renamed_repository_is_found_under_its_old_name(hub: Hub) -> None:
    hub.rename(REPO, "meta/renamed")

    assert HfApi().model_info(REPO, files_metadata=True).id == "meta/renamed"
    assert hub.request_lines == [f"GET /api/models/{name}" for name in (REPO, "meta/renamed")]
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == CONFIG
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


@over_lfs
@pytest.mark.parametrize(
    ("filename", "content"), [("config.json", CONFIG), ("model.safetensors", WEIGHTS)]
)
def test_an_interrupted_download_continues_where_it_broke_off(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, filename: str, content: bytes
) -> None:
    # The client forgets what has come of an unfinished chunk, and a chunk is 10 MiB.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4)
    shorten_client_waits(monkeypatch)
    hub.interrupt_next_download(after=8)

    path = hf_hub_download(REPO, filename)

    assert Path(path).read_bytes() == content
    assert [r.range for r in hub.requests if r.method == "GET"] == [None, "bytes=8-"]


def test_long_listings_come_in_pages(hub: Hub) -> None:
    hub.page_size = 2

    assert len(HfApi().list_repo_files(REPO)) == 3
    assert len([r for r in hub.requests if "/tree/" in r.path]) == 3  # five entries with folders


def test_paths_are_looked_up_at_once(hub: Hub) -> None:
    found = HfApi().get_paths_info(REPO, ["model.safetensors", "logs", "missing"])

    assert [entry.path for entry in found] == ["logs", "model.safetensors"]
    assert len(hub.requests) == 1


@pytest.fixture
def push(hub: Hub) -> Push:
    """Commits files to ann/model, a new repository of hers."""
    HfApi(token=ANN).create_repo("ann/model")
    hub.requests.clear()

    def commit(
        files: dict[str, bytes],
        *,
        deleted: tuple[str, ...] = (),
        token: str = ANN,
        revision: str = "main",
        parent_commit: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        return HfApi(token=token).create_commit(
            "ann/model",
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in deleted),
            ],
            commit_message="Release",
            commit_description="All of it.",
            revision=revision,
            parent_commit=parent_commit,
            create_pr=create_pr,
        )

    return commit


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_has_an_owner_and_a_first_commit(hub: Hub, private: bool) -> None:
    url = HfApi(token=ANN).create_repo("ann/new", private=private)

    assert (url, url.repo_id) == (f"{hub.endpoint}/ann/new", "ann/new")
    assert hub.private("ann/new") is private
    assert [commit.title for commit in hub.commits("ann/new")] == ["initial commit"]
    assert b"*.safetensors filter=lfs" in hub.files("ann/new")[".gitattributes"]


def test_a_repository_is_created_once(hub: Hub) -> None:
    api = HfApi(token=ANN)
    api.create_repo("ann/new")

    assert api.create_repo("ann/new", exist_ok=True).repo_id == "ann/new"
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo("ann/new")
    assert error.value.response.status_code == 409


def test_users_create_repositories_for_themselves_and_their_organizations(hub: Hub) -> None:
    hub.add_user("eve", "hf_eve", organizations=["lab"])

    assert HfApi(token="hf_eve").create_repo("lab/new").repo_id == "lab/new"
    with pytest.raises(HfHubHTTPError, match='under the namespace "ann"') as error:
        HfApi(token="hf_eve").create_repo("ann/new")
    assert error.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token=False).create_repo("ann/new")
    assert error.value.response.status_code == 401


def test_visibility_and_gate_can_be_changed(hub: Hub, push: Push) -> None:
    HfApi(token=ANN).update_repo_settings("ann/model", private=True, gated="auto")

    info = HfApi(token=ANN).model_info("ann/model")
    assert (hub.private("ann/model"), info.private, info.gated) == (True, True, "auto")


def test_a_commit_holds_plain_files_and_files_in_lfs(hub: Hub, push: Push) -> None:
    info = push({"config.json": CONFIG, "model.safetensors": NEW_WEIGHTS, "empty.bin": b""})

    commit, first = hub.commits("ann/model")
    assert info.oid == commit.sha
    assert commit.parents == (first.sha,)
    assert (commit.title, commit.description) == ("Release", "All of it.")
    assert commit.author == "ann"
    files = hub.files("ann/model")
    del files[".gitattributes"]
    assert files == {"config.json": CONFIG, "empty.bin": b"", "model.safetensors": NEW_WEIGHTS}
    assert [path for path, file in commit.files.items() if file.lfs_sha256] == ["model.safetensors"]
    assert Path(hf_hub_download("ann/model", "model.safetensors")).read_bytes() == NEW_WEIGHTS


def test_a_commit_deletes_files_and_folders(hub: Hub, push: Push) -> None:
    push({"a.txt": b"a", "logs/b.txt": b"b", "logs/c.txt": b"c"})

    push({}, deleted=("a.txt", "logs/"))

    assert list(hub.files("ann/model")) == [".gitattributes"]
    with pytest.raises(RemoteEntryNotFoundError, match="name doesn't exist"):
        push({}, deleted=("a.txt",))


def test_what_did_not_change_is_not_committed(hub: Hub, push: Push) -> None:
    files = {"config.json": CONFIG, "model.safetensors": NEW_WEIGHTS}
    first = push(files)
    received = hub.received

    assert push(files).oid == first.oid
    assert push(files | {"config.json": b"{}"}).oid != first.oid
    assert hub.received == received


def test_what_gitignore_names_is_left_out(hub: Hub, push: Push) -> None:
    push({".gitignore": b"*.log\ncache/\n"})

    push({"a.log": b"a", "cache/b.safetensors": b"b", "c.txt": b"c"})

    assert list(hub.files("ann/model")) == [".gitattributes", ".gitignore", "c.txt"]


def test_a_commit_on_another_parent_is_refused(hub: Hub, push: Push) -> None:
    first = push({"a.txt": b"a"}).oid
    second = push({"a.txt": b"b"}, parent_commit=first).oid

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        push({"a.txt": b"c"}, parent_commit=first)

    assert error.value.response.status_code == 412
    assert hub.commits("ann/model")[0].sha == second
    assert push({"a.txt": b"c"}, parent_commit=second[:7])


@over_lfs
def test_a_large_upload_goes_in_parts(hub: Hub, push: Push) -> None:
    hub.multipart_chunk_size = 4096

    push({"model.safetensors": NEW_WEIGHTS})

    parts = [request.body_size for request in hub.requests if request.is_upload]
    assert parts == [4096, 4096, len(NEW_WEIGHTS) - 8192]
    assert hub.received == len(NEW_WEIGHTS)
    assert hub.files("ann/model")["model.safetensors"] == NEW_WEIGHTS


@over_lfs
def test_an_upload_is_kept_although_nothing_was_committed(hub: Hub, push: Push) -> None:
    weights = CommitOperationAdd("model.safetensors", NEW_WEIGHTS)
    HfApi(token=ANN).preupload_lfs_files("ann/model", [weights])
    assert hub.received == len(NEW_WEIGHTS)
    hub.requests.clear()

    push({"model.safetensors": NEW_WEIGHTS})

    assert hub.received == 0
    assert hub.files("ann/model")["model.safetensors"] == NEW_WEIGHTS


@over_lfs
@pytest.mark.parametrize("chunk_size", [1000, 10**6])
def test_an_upload_of_other_content_than_announced_is_refused(
    hub: Hub, push: Push, chunk_size: int
) -> None:
    hub.multipart_chunk_size = chunk_size
    weights = CommitOperationAdd("model.safetensors", NEW_WEIGHTS)
    weights.path_or_fileobj = bytes(len(NEW_WEIGHTS))

    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        HfApi(token=ANN).preupload_lfs_files("ann/model", [weights])

    assert "is not what arrived" in str(error.value.__cause__)


def test_a_commit_of_a_file_that_was_not_uploaded_is_refused(
    hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub._commit_api._upload_files", lambda **asked: None)

    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        push({"model.safetensors": NEW_WEIGHTS})

    assert len(hub.commits("ann/model")) == 1


def test_branches_and_tags_come_and_go(hub: Hub, push: Push) -> None:
    api = HfApi(token=ANN)
    head = api.model_info("ann/model").sha
    api.create_branch("ann/model", branch="next/one")
    push({"a.txt": b"a"}, revision="next/one")
    api.create_tag("ann/model", tag="v1", revision="next/one")
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_branch("ann/model", branch="next/one")
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_tag("ann/model", tag="v1")

    refs = api.list_repo_refs("ann/model")
    assert [branch.name for branch in refs.branches] == ["main", "next/one"]
    assert [tag.ref for tag in refs.tags] == ["refs/tags/v1"]
    assert hub.refs("ann/model")["refs/heads/main"] == head
    assert "a.txt" in hub.files("ann/model", "v1")
    assert "a.txt" not in hub.files("ann/model")

    api.delete_tag("ann/model", tag="v1")
    api.delete_branch("ann/model", branch="next/one")
    assert list(hub.refs("ann/model")) == ["refs/heads/main"]
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("ann/model", tag="v1")


def test_the_history_is_listed_newest_first(hub: Hub, push: Push) -> None:
    commit = push({"a.txt": b"a"})

    newest, first = HfApi().list_repo_commits("ann/model")

    assert (newest.commit_id, newest.title, newest.authors) == (commit.oid, "Release", ["ann"])
    assert first.title == "initial commit"


def test_users_with_read_access_can_open_a_pull_request(hub: Hub, push: Push) -> None:
    info = push({"model.safetensors": NEW_WEIGHTS}, token=BOB, create_pr=True)

    assert (info.pr_revision, info.pr_num) == ("refs/pr/1", 1)
    assert info.pr_url == f"{hub.endpoint}/ann/model/discussions/1"
    opened = hub.pull_requests("ann/model")
    assert [(each.title, each.author, each.status) for each in opened] == [
        ("Release", "bob", "open")
    ]
    assert hub.files("ann/model", "refs/pr/1")["model.safetensors"] == NEW_WEIGHTS
    assert len(hub.commits("ann/model")) == 1
    refs = HfApi().list_repo_refs("ann/model", include_pull_requests=True)
    assert [(each.ref, each.target_commit) for each in refs.pull_requests or []] == [
        ("refs/pr/1", info.oid)
    ]


def test_a_pull_request_is_merged_as_one_commit(hub: Hub, push: Push) -> None:
    push({"a.txt": b"a", "b.txt": b"b", "c.txt": b"c"})
    push({"a.txt": b"A"}, deleted=("b.txt",), create_pr=True)
    push({"c.txt": b"C"})
    api = HfApi(token=ANN)
    assert [each.num for each in api.get_repo_discussions("ann/model", author="ann")] == [1]

    api.merge_pull_request("ann/model", 1)

    assert hub.commits("ann/model")[0].title == "Release (#1)"
    files = hub.files("ann/model")
    assert (files["a.txt"], files["c.txt"], "b.txt" in files) == (b"A", b"C", False)
    assert list(api.get_repo_discussions("ann/model", discussion_status="open")) == []


@pytest.mark.parametrize("token", [BOB, "hf_read"])
def test_only_users_with_write_access_can_commit(hub: Hub, push: Push, token: str) -> None:
    hub.add_user("ann", "hf_read", can_write=False)
    api = HfApi(token=token)

    for change in (
        lambda: push({"a.txt": b"a"}, token=token),
        lambda: api.create_branch("ann/model", branch="next"),
        lambda: api.create_tag("ann/model", tag="v1"),
        lambda: api.update_repo_settings("ann/model", private=True),
        lambda: api.auth_check("ann/model", write=True),
    ):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: Authorization error") as error:
            change()
        assert error.value.response.status_code == 403
    api.auth_check("ann/model")
    assert len(hub.commits("ann/model")) == len(hub.refs("ann/model")) == 1


def test_users_who_were_granted_write_access_can_write(hub: Hub, push: Push) -> None:
    hub.grant_access("ann/model", "bob", write=True)

    push({"a.txt": b"a", "b.bin": b"b"}, token=BOB)

    assert hub.commits("ann/model")[0].author == "bob"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nlicense: [\n---\n", "bad YAML"),
        ("---\n- mit\n---\n", "must be a mapping"),
        ("---\nlicense: other\n---\n", "license_name"),
        ("---\nbase_model_relation: sum\n---\n", "base_model_relation"),
        ("---\ntags: 3\n---\n", "tags"),
    ],
)
def test_a_card_with_wrong_metadata_is_refused(
    hub: Hub, push: Push, card: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        push({"README.md": card.encode()})

    assert len(hub.commits("ann/model")) == 1


def test_a_card_is_validated_before_anything_is_sent(hub: Hub, push: Push) -> None:
    RepoCard("---\nlicense: mit\n---\n# Model").validate()
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push({"README.md": b"# Model"})

    assert hub.request_lines[:2] == ["POST /api/validate-yaml"] * 2


@in_every_way
def test_another_process_reads_and_writes_large_files_too(hub: Hub, tmp_path: Path) -> None:
    HfApi(token=ANN).create_repo("ann/model")
    mine = Path(hf_hub_download(REPO, "model.safetensors"))
    program = (
        "import huggingface_hub as h\n"
        f"path = h.hf_hub_download('{REPO}', 'model.safetensors')\n"
        "h.upload_file(path_or_fileobj=path, path_in_repo='copy.bin', repo_id='ann/model')"
    )
    environment = client_environment(hub, tmp_path / "child", token=ANN)

    subprocess.run([sys.executable, "-c", program], env=environment, check=True)

    assert hub.files("ann/model")["copy.bin"] == mine.read_bytes() == WEIGHTS
    assert Path(hf_hub_download("ann/model", "copy.bin")).read_bytes() == WEIGHTS


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
