"""Pushing a converted folder: one commit, or none, and a look at what arrived."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import FIXTURES, HANGS, over_lfs
from hub_faults import ExpiredToken, LostAnswer, MovedParent, Status, WrongBytes
from hub_repos import StoredFile
from hub_server import Hub, client_environment
from huggingface_hub import ModelCard

import converter
from converter.errors import (
    AccessError,
    EomtConvertError,
    HubUnavailableError,
    NotVerifiedError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)

Command = Callable[..., Result]
REPO = "me/model"


@pytest.fixture
def folder(model: Path, me: str) -> Path:
    """A separate copy of the converted tiny_panoptic_64, and a login."""
    return model


def change_verdict(folder: Path, verdict: str) -> None:
    """Makes the verdict in conversion.json failed or unverified, and its levels with it."""
    history = json.loads((folder / "conversion.json").read_text())
    history["verdict"] |= {"verdict": verdict, "basis": None}
    for level in history["verdict"]["levels"]:
        if level["level"] == "numbers":
            level["status"] = "failed" if verdict == "failed" else "not checked"
    (folder / "conversion.json").write_text(json.dumps(history))


def ours(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    files = hub.files(REPO, revision)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


# what is pushed --------------------------------------------------------------------------------


def test_one_commit_holds_everything(hub: Hub, folder: Path) -> None:
    published = converter.publish(folder, REPO)

    assert len(hub.commits(REPO)) == 2  # the Hub's own first one, and ours
    assert hub.commits(REPO)[0].sha == published.commit
    sent = ours(hub)
    assert set(sent) == {path.name for path in folder.iterdir()} | {"README.md"}
    for path in folder.iterdir():
        assert sent[path.name] == path.read_bytes()
    assert ModelCard(sent["README.md"].decode()).data.get("library_name") == "transformers"


def test_a_new_repository_is_private(hub: Hub, folder: Path) -> None:
    assert converter.publish(folder, REPO).private
    assert hub.private(REPO)


def test_a_public_repository_is_made_public_last(hub: Hub, folder: Path) -> None:
    published = converter.publish(folder, REPO, private=False)

    assert not published.private
    assert not hub.private(REPO)
    changes = [line for line in hub.request_lines if line.startswith(("POST", "PUT"))]
    assert changes[-1] == f"PUT /api/models/{REPO}/settings"


def test_an_existing_repository_keeps_its_visibility(hub: Hub, folder: Path) -> None:
    hub.create_repo(REPO, {"notes.txt": b"mine"})
    converter.publish(folder, REPO)

    assert not hub.private(REPO)
    assert hub.files(REPO)["notes.txt"] == b"mine"
    published = converter.publish(folder, REPO, private=True)
    assert hub.private(REPO)
    assert published.private


def test_nothing_to_change_means_no_commit(hub: Hub, folder: Path, tmp_path: Path) -> None:
    first = converter.publish(folder, REPO)
    converter.convert("tiny_panoptic_64", tmp_path / "again")
    again = converter.publish(tmp_path / "again", REPO)

    assert again.commit == first.commit
    assert {change.action for change in again.changes} == {"keep"}
    assert len(hub.commits(REPO)) == 2


def test_only_what_changed_is_sent(hub: Hub, folder: Path) -> None:
    converter.publish(folder, REPO)
    hub.commit(REPO, {"config.json": b"{}"})
    hub.requests.clear()
    published = converter.publish(folder, REPO)

    changed = {change.name for change in published.changes if change.action != "keep"}
    assert changed == {"config.json"}
    assert hub.received == 0


def test_weights_of_another_sharding_are_removed_in_the_same_commit(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "shards", max_shard_size="500KB")
    converter.publish(tmp_path / "shards", REPO)
    published = converter.publish(folder, REPO)

    deleted = {change.name for change in published.changes if change.action == "delete"}
    assert "model.safetensors.index.json" in deleted
    assert {name for name in ours(hub) if "safetensors" in name} == {"model.safetensors"}
    assert len(hub.commits(REPO)) == 3


def test_nothing_but_the_models_own_files_is_sent(hub: Hub, folder: Path) -> None:
    (folder / "notes.txt").write_text("private")
    converter.publish(folder, REPO)

    assert "notes.txt" not in ours(hub)


def test_edits_of_the_card_on_the_hub_are_kept(hub: Hub, folder: Path) -> None:
    converter.publish(folder, REPO)
    card = ours(hub)["README.md"].decode()
    hub.commit(REPO, {"README.md": f"{card}\n## By hand\n".encode(), "config.json": b"{}"})
    converter.publish(folder, REPO)

    assert ours(hub)["README.md"].decode().endswith("## By hand\n")


@over_lfs
def test_a_card_on_the_hub_that_is_not_text_is_left_alone(hub: Hub, folder: Path) -> None:
    converter.publish(folder, REPO)
    hub.commit(REPO, {"README.md": b"\xff\xfe"})

    with pytest.raises(UnreadableFileError, match=r"README\.md of me/model is not a text in UTF-8"):
        converter.publish(folder, REPO)

    assert ours(hub)["README.md"] == b"\xff\xfe"


def test_an_edit_that_is_made_during_a_push_is_not_lost(hub: Hub, folder: Path) -> None:
    converter.publish(folder, REPO)
    hub.commit(REPO, {"config.json": b"{}"})
    hub.break_request(MovedParent(), method="POST", path="/validate-yaml|/preupload/")

    with pytest.raises(EomtConvertError, match="Somebody else has committed"):
        converter.publish(folder, REPO)


# what is not pushed ----------------------------------------------------------------------------


def test_an_unverified_model_is_pushed_only_if_that_is_asked_for(hub: Hub, folder: Path) -> None:
    change_verdict(folder, "unverified")

    with pytest.raises(NotVerifiedError, match="was not verified"):
        converter.publish(folder, REPO)
    assert hub.repo_ids == []
    converter.publish(folder, REPO, allow_unverified=True)
    assert "**Not verified.**" in ours(hub)["README.md"].decode()


def test_a_model_that_failed_is_never_pushed(hub: Hub, folder: Path) -> None:
    change_verdict(folder, "failed")

    with pytest.raises(NotVerifiedError, match="is failed, so it is not published"):
        converter.publish(folder, REPO, allow_unverified=True)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_was_changed_since_is_refused(hub: Hub, folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)

    with pytest.raises(EomtConvertError, match=name.replace(".", r"\.")):
        converter.publish(folder, REPO, allow_unverified=True)
    assert hub.requests == []


def test_a_folder_that_is_not_a_conversion_is_refused(hub: Hub, me: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"has no conversion\.json"):
        converter.publish(tmp_path, REPO)


def test_files_outside_the_folder_are_never_sent(hub: Hub, folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"secret")
    history = json.loads((folder / "conversion.json").read_text())
    digest = hashlib.sha256(b"secret").hexdigest()
    history["files"]["../secret"] = {"size": 6, "sha256": digest}
    (folder / "conversion.json").write_text(json.dumps(history))

    with pytest.raises(UnreadableFileError, match=r"has no file \.\./secret"):
        converter.publish(folder, REPO)


# the licence -----------------------------------------------------------------------------------


def test_the_licence_comes_from_the_backbones_repository(hub: Hub, derived: Path) -> None:
    converter.publish(derived, REPO)

    assert ours(hub)["LICENSE.md"] == b"DINOv3 License\n"


def test_the_licence_is_that_of_the_revision_that_was_merged(hub: Hub, derived: Path) -> None:
    hub.commit("facebook/dinov3-vits16-pretrain-lvd1689m", {"LICENSE.md": b"another"})
    converter.publish(derived, REPO)

    assert ours(hub)["LICENSE.md"] == b"DINOv3 License\n"


def test_a_licence_can_be_given(hub: Hub, derived: Path, tmp_path: Path) -> None:
    (tmp_path / "licence.txt").write_text("given")
    converter.publish(derived, REPO, license_file=tmp_path / "licence.txt")

    assert ours(hub)["LICENSE.md"] == b"given"


def test_derived_weights_without_a_licence_are_refused(hub: Hub, derived: Path) -> None:
    history = json.loads((derived / "conversion.json").read_text())
    history["sources"]["backbone"] |= {"repo": None, "revision": None}
    (derived / "conversion.json").write_text(json.dumps(history))

    with pytest.raises(UsageError, match="licence must go with them") as caught:
        converter.publish(derived, REPO)
    assert "--license-file" in caught.value.remedy
    assert REPO not in hub.repo_ids


def test_a_backbone_that_has_no_licence_is_named(hub: Hub, derived: Path) -> None:
    repo = "facebook/no-licence"
    commit = hub.create_repo(repo, {"config.json": b"{}"})
    history = json.loads((derived / "conversion.json").read_text())
    history["sources"]["backbone"] |= {"repo": repo, "revision": commit}
    (derived / "conversion.json").write_text(json.dumps(history))

    with pytest.raises(UsageError, match="facebook/no-licence has no copy of it"):
        converter.publish(derived, REPO)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_a_licence_that_is_not_text_is_refused(
    hub: Hub, derived: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "licence").write_bytes(content)

    with pytest.raises(UnreadableFileError, match="licence is"):
        converter.publish(derived, REPO, license_file=tmp_path / "licence")


# where it goes ---------------------------------------------------------------------------------


def test_a_branch_is_made_and_main_stays(hub: Hub, folder: Path) -> None:
    published = converter.publish(folder, REPO, revision="candidate")

    assert published.revision == "candidate"
    assert "model.safetensors" in ours(hub, "candidate")
    assert ours(hub) == {}


def test_a_tag_names_the_commit(hub: Hub, folder: Path) -> None:
    published = converter.publish(folder, REPO, tag="v1")
    again = converter.publish(folder, REPO, tag="v1")

    assert hub.refs(REPO)["refs/tags/v1"] == published.commit == again.commit


def test_a_tag_is_never_moved(hub: Hub, folder: Path) -> None:
    converter.publish(folder, REPO, tag="v1")
    commit = hub.commit(REPO, {"config.json": b"{}"})

    with pytest.raises(EomtConvertError, match="already has a tag v1"):
        converter.publish(folder, REPO, tag="v1")
    assert hub.commits(REPO)[0].sha == commit


def test_a_pull_request_leaves_main_alone_and_is_opened_once(hub: Hub, folder: Path) -> None:
    hub.create_repo(REPO, {"notes.txt": b"mine"})
    published = converter.publish(folder, REPO, create_pr=True)
    again = converter.publish(folder, REPO, create_pr=True)

    assert published.revision == again.revision == "refs/pr/1"
    assert published.url.endswith(f"{REPO}/discussions/1")
    assert len(hub.pull_requests(REPO)) == 1
    assert "model.safetensors" in ours(hub, "refs/pr/1")
    assert set(hub.files(REPO)) == {"notes.txt"}


@pytest.mark.parametrize("merge", [True, False])
def test_a_closed_pull_request_is_not_used_again(hub: Hub, folder: Path, merge: bool) -> None:
    hub.create_repo(REPO, {"notes.txt": b"mine"})
    converter.publish(folder, REPO, create_pr=True)
    hub.end_pull_request(REPO, 1, merge=merge)
    hub.commit(REPO, {"config.json": b"{}"})
    published = converter.publish(folder, REPO, create_pr=True)

    assert published.revision == "refs/pr/2"
    assert [request.status for request in hub.pull_requests(REPO)][-1] == "open"


def test_somebody_elses_pull_request_is_not_used(hub: Hub, folder: Path) -> None:
    hub.add_user("eve", "hf_eve")
    hub.create_repo(REPO, {"notes.txt": b"mine"})
    converter.publish(folder, REPO, create_pr=True, token="hf_eve")

    assert converter.publish(folder, REPO, create_pr=True).revision == "refs/pr/2"


@pytest.mark.parametrize("option", [{"tag": "v1"}, {"revision": "x"}, {"private": False}])
def test_a_pull_request_has_neither_tag_nor_branch(folder: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--create-pr"):
        converter.publish(folder, REPO, create_pr=True, **option)


def test_the_message_of_the_commit_can_be_given(hub: Hub, folder: Path) -> None:
    converter.publish(folder, REPO)
    assert hub.commits(REPO)[0].title.startswith("Convert tiny_panoptic_64 with eomt-convert")
    hub.commit(REPO, {"config.json": b"{}"})
    converter.publish(folder, REPO, commit_message="Mend the config")
    assert hub.commits(REPO)[0].title == "Mend the config"


def test_a_dry_run_shows_what_would_change_and_changes_nothing(hub: Hub, folder: Path) -> None:
    planned = converter.publish(folder, REPO, dry_run=True)
    assert {change.action for change in planned.changes} == {"add"}
    assert planned.commit is None
    assert hub.repo_ids == []

    converter.publish(folder, REPO)
    hub.commit(REPO, {"config.json": b"{}"})
    planned = converter.publish(folder, REPO, dry_run=True)
    assert {c.name: c.action for c in planned.changes}["config.json"] == "change"
    assert len(hub.commits(REPO)) == 3


# permissions -----------------------------------------------------------------------------------


def test_nobody_pushes_without_a_login(hub: Hub, model: Path) -> None:
    with pytest.raises(AccessError, match="Nobody is logged in"):
        converter.publish(model, REPO)


def test_a_read_only_token_is_reported(hub: Hub, model: Path) -> None:
    hub.add_user("me", "hf_read", can_write=False)

    with pytest.raises(AccessError, match="may only read, but me/model needs one that may write"):
        converter.publish(model, REPO, token="hf_read")
    assert hub.repo_ids == []


def test_somebody_elses_repository_is_not_written_to(hub: Hub, folder: Path) -> None:
    hub.create_repo("other/model", {"notes.txt": b"theirs"})

    with pytest.raises(AccessError, match="has no permission to do this with other/model"):
        converter.publish(folder, "other/model")
    assert set(hub.files("other/model")) == {"notes.txt"}


@pytest.mark.parametrize("private", [True, False])
def test_a_dry_run_says_where_it_may_not_write(hub: Hub, folder: Path, private: bool) -> None:
    """Somebody else's private repository looks like a missing one."""
    hub.create_repo("other/model", {"notes.txt": b"theirs"}, private=private)

    with pytest.raises(
        AccessError, match=r"it is private|has no permission to do this with other/model"
    ):
        converter.publish(folder, "other/model", dry_run=True)


def test_a_dry_run_needs_a_login_as_the_push_does(hub: Hub, model: Path) -> None:
    hub.create_repo(REPO, {"notes.txt": b"mine"}, private=True)

    with pytest.raises(AccessError, match="Nobody is logged in") as caught:
        converter.publish(model, REPO, dry_run=True)
    assert caught.value.remedy == "Log in with `hf auth login`, or set HF_TOKEN."


def test_a_dry_run_of_a_pull_request_needs_no_right_to_write(hub: Hub, folder: Path) -> None:
    hub.create_repo("other/model", {"notes.txt": b"theirs"})

    planned = converter.publish(folder, "other/model", dry_run=True, create_pr=True)
    assert {change.action for change in planned.changes} == {"add"}


def test_a_dry_run_needs_write_access_to_the_organisation(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "read"}], "auth": None}
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda _: login)

    with pytest.raises(AccessError, match="no repository lab/model"):
        converter.publish(folder, "lab/model", dry_run=True)


def test_a_dry_run_accepts_an_organisations_repository(hub: Hub, folder: Path) -> None:
    hub.add_user("eve", "hf_eve", organizations=["lab"])

    planned = converter.publish(folder, "Lab/model", dry_run=True, token="hf_eve")
    assert {change.action for change in planned.changes} == {"add"}


def test_a_name_without_an_owner_is_refused_before_anything_is_created(
    command: Command, hub: Hub, folder: Path
) -> None:
    """The client would create a repository under the login's name, and not find it afterwards."""
    for arguments in (
        ("push", folder, "shapes"),
        ("--checkpoint", "tiny_panoptic_64", "--output", "new", "--push-to", "shapes"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2
        assert "'shapes' has no owner" in result.stderr
    assert hub.requests == []
    assert hub.repo_ids == []
    assert not Path("new").exists()


def test_an_expired_token_is_reported(hub: Hub, folder: Path) -> None:
    hub.break_request(ExpiredToken(), times=None)

    with pytest.raises(AccessError, match="does not accept the token"):
        converter.publish(folder, REPO)


def test_a_name_that_no_repository_can_have_is_wrong_usage(hub: Hub, folder: Path) -> None:
    with pytest.raises(UsageError, match="not a valid name"):
        converter.publish(folder, "me/a/b")
    assert hub.requests == []


def test_a_renamed_repository_is_not_created_again_under_its_old_name(
    hub: Hub, folder: Path
) -> None:
    hub.create_repo(REPO, {"notes.txt": b"mine"})
    hub.rename(REPO, "me/other")

    with pytest.raises(UsageError, match="me/model was renamed to me/other"):
        converter.publish(folder, REPO)
    assert hub.repo_ids == ["me/other"]


# what goes wrong on the way --------------------------------------------------------------------


def test_a_commit_whose_answer_was_lost_is_found(hub: Hub, folder: Path) -> None:
    hub.break_request(LostAnswer(), method="POST", path="/commit/")
    published = converter.publish(folder, REPO)

    assert hub.broken
    assert published.commit == hub.commits(REPO)[0].sha
    assert len(hub.commits(REPO)) == 2


def test_a_pull_request_whose_answer_was_lost_is_found(hub: Hub, folder: Path) -> None:
    hub.break_request(LostAnswer(), method="POST", path="/commit/")
    published = converter.publish(folder, REPO, create_pr=True)

    assert hub.broken
    assert published.revision == "refs/pr/1"
    assert len(hub.pull_requests(REPO)) == 1


def test_two_releases_at_once_do_not_mix(hub: Hub, folder: Path) -> None:
    hub.create_repo(REPO, {"notes.txt": b"mine"})
    hub.break_request(MovedParent(), method="POST", path="/commit/")

    with pytest.raises(EomtConvertError, match="Somebody else has committed to me/model"):
        converter.publish(folder, REPO)
    assert "model.safetensors" not in hub.files(REPO)
    converter.publish(folder, REPO)
    assert "model.safetensors" in hub.files(REPO)


@over_lfs
def test_an_interrupted_push_continues_without_resending_what_arrived(
    hub: Hub, folder: Path
) -> None:
    hub.break_request(Status(500), method="POST", path="/commit/", times=None)
    with pytest.raises(HubUnavailableError, match="status 500"):
        converter.publish(folder, REPO)
    assert hub.received > 1_000_000
    assert ours(hub) == {}

    hub.mend()
    hub.requests.clear()
    converter.publish(folder, REPO)
    assert hub.received == 0
    assert "model.safetensors" in ours(hub)


def test_pushed_files_are_compared_with_what_was_sent(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file than the one that was sent is in the commit."""
    store = hub.store_plain

    def store_wrong(content: bytes) -> StoredFile:
        return store(content.replace(b"eomt_dinov3", b"dinov3"))

    monkeypatch.setattr(hub, "store_plain", store_wrong)

    with pytest.raises(EomtConvertError, match=r"differs from what was sent: config\.json"):
        converter.publish(folder, REPO)


def test_a_file_without_a_digest_from_the_hub_is_not_checked(
    command: Command, hub: Hub, folder: Path
) -> None:
    hub.gives_blob_ids = False
    result = command("push", folder, REPO, "--tag", "v1")

    assert result.exit_code == 0, result.output
    assert "remote    read back: 1 files as they were sent" in result.stdout
    assert "remote    not checked: README.md, config.json, conversion.json" in result.stdout
    assert ours(hub)["config.json"] == (folder / "config.json").read_bytes()
    again = converter.publish(folder, REPO)
    assert again.unchecked
    assert len(hub.commits(REPO)) == 2
    with pytest.raises(EomtConvertError, match="already has a tag v1"):
        converter.publish(folder, REPO, tag="v1")


def test_without_digests_a_lost_answer_is_not_taken_for_success(hub: Hub, folder: Path) -> None:
    hub.gives_blob_ids = False
    hub.break_request(LostAnswer(), method="POST", path="/commit/")

    with pytest.raises(EomtConvertError, match="It is unknown whether this push arrived"):
        converter.publish(folder, REPO)
    assert converter.publish(folder, REPO).commit == hub.commits(REPO)[0].sha
    assert len(hub.commits(REPO)) == 2


def test_without_digests_a_refused_push_is_not_taken_for_success(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """The existing model has the same weights and another config.json."""
    hub.gives_blob_ids = False
    converter.publish(folder, REPO, tag="v1")
    labels = tmp_path / "labels"
    labels.write_text("\n".join("abcdefg"))
    converter.convert("tiny_panoptic_64", tmp_path / "other", labels=labels)
    hub.break_request(Status(403, "No"), method="POST", path="/commit/", times=None)

    for tag in (None, "v1"):
        with pytest.raises(EomtConvertError):
            converter.publish(tmp_path / "other", REPO, tag=tag)
    assert len(hub.commits(REPO)) == 2


def test_the_model_can_be_downloaded_and_verified_again(hub: Hub, folder: Path) -> None:
    published = converter.publish(folder, REPO, verify_remote=True)

    assert published.verdict is not None
    assert published.verdict.verdict == "passed"
    assert f"{REPO}/model.safetensors" in hub.served


@over_lfs
def test_a_wrong_download_is_reported_before_the_repository_is_public(
    hub: Hub, folder: Path
) -> None:
    hub.break_request(WrongBytes(), method="GET", path=r"/cdn/.*safetensors", times=None)

    with pytest.raises((OutputsDifferError, UnreadableFileError)):
        converter.publish(folder, REPO, verify_remote=True, private=False, tag="v1")
    assert hub.private(REPO)
    assert "refs/tags/v1" not in hub.refs(REPO)


# the command -----------------------------------------------------------------------------------


def test_convert_and_push_then_load_with_both(
    command: Command, hub: Hub, me: str, tmp_path: Path
) -> None:
    import torch
    import transformers
    from recorded_models import pixel_values
    from safetensors.torch import load_file

    import reference_model

    result = command("--checkpoint", "shapes_panoptic_128", "--push-to", "me/shapes")

    assert result.exit_code == 0, result.output
    assert "verdict   passed" in result.stdout
    assert f"commit    {hub.commits('me/shapes')[0].sha}" in result.stdout
    recorded = load_file(FIXTURES / "shapes_panoptic_128" / "recorded.safetensors")
    pixels = pixel_values("shapes_panoptic_128")
    for library in (reference_model, transformers):
        model = library.EomtDinov3ForUniversalSegmentation.from_pretrained("me/shapes").eval()
        with torch.inference_mode():
            output = model(pixels)
        torch.testing.assert_close(
            output.masks_queries_logits, recorded["mask_logits"], atol=2e-4, rtol=0
        )
        torch.testing.assert_close(
            output.class_queries_logits, recorded["class_logits"], atol=2e-4, rtol=0
        )


@pytest.mark.parametrize("requests", [2, 4, 6, 8, 10])
def test_a_push_that_was_killed_ends_in_the_same_single_state(
    hub: Hub, folder: Path, me: str, tmp_path: Path, requests: int
) -> None:
    command = [sys.executable, "-c", "from converter.cli import main; main()", "push"]
    command += [str(folder), REPO, "--tag", "v1"]
    environment = client_environment(hub, tmp_path / "home", token=me)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HANGS
    while len(hub.requests) < requests and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()

    published = converter.publish(folder, REPO, tag="v1")
    assert len(hub.commits(REPO)) == 2
    assert hub.refs(REPO)["refs/tags/v1"] == published.commit == hub.commits(REPO)[0].sha
    assert set(ours(hub)) == {path.name for path in folder.iterdir()} | {"README.md"}


@pytest.mark.parametrize(
    ("output", "code"), [("| head -0", 141), ("> /dev/full", 1), ("--json > /dev/full", 1)]
)
def test_a_complete_push_is_reported_if_standard_output_is_closed(
    hub: Hub, folder: Path, me: str, tmp_path: Path, output: str, code: int
) -> None:
    command = f"{sys.executable} -c 'from converter.cli import main; main()' push"
    done = subprocess.run(
        ["/bin/bash", "-c", f"{command} {folder} {REPO} {output}; exit ${{PIPESTATUS[0]}}"],
        env=client_environment(hub, tmp_path / "home", token=me),
        stderr=subprocess.PIPE,
        text=True,
        timeout=HANGS,
        check=False,
    )

    commit = hub.commits(REPO)[0].sha
    assert done.returncode == code
    assert f"Published commit {commit} at {hub.endpoint}/{REPO}/tree/main.\n" in done.stderr
    assert "fault" not in done.stderr
    assert ("No space left on device" in done.stderr) == (code == 1)


def test_the_same_command_continues_where_a_push_failed(
    command: Command, hub: Hub, me: str
) -> None:
    arguments = ("--checkpoint", "tiny_panoptic_64", "--push-to", REPO)
    hub.break_request(Status(500), method="POST", path="/commit/", times=None)
    assert command(*arguments).exit_code == 1
    hub.mend()

    assert command(*arguments).exit_code == 0
    assert len(hub.commits(REPO)) == 2


def test_an_output_that_was_changed_is_not_replaced_for_a_push(
    command: Command, hub: Hub, me: str, tmp_path: Path
) -> None:
    arguments = ("--checkpoint", "tiny_panoptic_64", "--push-to", REPO)
    command(*arguments)
    config = tmp_path / "tiny_panoptic_64" / "config.json"
    config.write_text(config.read_text() + " ")

    assert "exists" in command(*arguments).stderr
    assert config.read_text().endswith(" ")


def test_the_licence_is_looked_for_before_anything_is_converted(
    command: Command, hub: Hub, derived: Path, tmp_path: Path
) -> None:
    hub.create_repo("facebook/bare", {"config.json": b"{}", "model.safetensors": b""})
    shutil.copytree(FIXTURES / "tiny_panoptic_64" / "backbone", tmp_path / "backbone")
    for backbone, reason in (
        ("facebook/bare", "facebook/bare has no copy of it"),
        (str(tmp_path / "backbone"), "the backbone's repository is unknown"),
    ):
        result = command(
            *("--checkpoint", "coco_panoptic_small_640", "--backbone", backbone),
            *("--output", "new", "--push-to", REPO),
        )
        assert result.exit_code == 2, result.output
        assert reason in result.stderr
        assert not any("pytorch_model.bin" in request.path for request in hub.requests)
        assert not Path("new").exists()


def test_offline_the_sources_come_from_the_cache_and_the_push_goes_to_the_hub(
    command: Command, hub: Hub, derived: Path, tmp_path: Path
) -> None:
    arguments = (
        *("--checkpoint", "coco_panoptic_small_640", "--labels", tmp_path / "labels.json"),
        *("--recorded", FIXTURES / "tiny_panoptic_64", "--output", "new"),
    )
    assert command(*arguments).exit_code == 0  # with a connection, which fills the cache
    hub.requests.clear()
    push = ("--offline", "--push-to", REPO, "--tag", "v1", "--force")
    for _ in range(2):  # into a new repository, and into one that has a card
        result = command(*arguments, *push)
        assert result.exit_code == 0, result.output
    assert len(hub.commits(REPO)) == 2
    assert "LICENSE.md" in ours(hub)
    assert not any("pytorch_model.bin" in request.path for request in hub.requests)


@over_lfs
def test_push_to_deletes_no_file_that_others_put_into_the_output(
    command: Command, hub: Hub, me: str
) -> None:
    arguments = ("--checkpoint", "tiny_panoptic_64", "--output", "new", "--push-to", REPO)
    assert command(*arguments).exit_code == 0
    Path("new/notes.txt").write_text("precious")

    result = command(*arguments)

    assert result.exit_code == 1
    assert "notes.txt" in result.stderr
    assert Path("new/notes.txt").read_text() == "precious"


def test_all_sources_decide_whether_a_licence_is_needed(
    command: Command, hub: Hub, me: str, tmp_path: Path
) -> None:
    """An offline checkpoint's files need no licence, wherever they are; others do."""
    source = FIXTURES / "tiny_panoptic_64"
    hub.create_repo("me/delta", {"pytorch_model.bin": source / "delta" / "pytorch_model.bin"})
    backbone = {path.name: path for path in (source / "backbone").iterdir()}
    hub.create_repo("me/backbone", backbone)
    arguments = ("--checkpoint", "tiny_panoptic_64", "--push-to", REPO)
    result = command(*arguments, "--delta", "me/delta", "--backbone", "me/backbone")
    assert result.exit_code == 0, result.output
    assert "LICENSE.md" not in ours(hub)

    other = FIXTURES / "shapes_panoptic_128" / "delta"
    result = command(*arguments, "--delta", other, "--output", "new")
    assert result.exit_code == 2
    assert "whose licence must go with them" in result.stderr
    assert not Path("new").exists()


def test_the_user_is_looked_up_once(command: Command, hub: Hub, me: str) -> None:
    result = command("--checkpoint", "shapes_panoptic_128", "--push-to", REPO)

    assert result.exit_code == 0, result.output
    assert hub.request_lines.count("GET /api/whoami-v2") == 1


def test_a_login_is_asked_for_before_anything_is_converted(
    command: Command, hub: Hub, tmp_path: Path
) -> None:
    result = command("--checkpoint", "tiny_panoptic_64", "--push-to", REPO)

    assert result.exit_code == 4
    assert "Nobody is logged in" in result.stderr
    assert not (tmp_path / "tiny_panoptic_64").exists()


def test_options_of_a_push_need_a_push(command: Command) -> None:
    result = command("--checkpoint", "tiny_panoptic_64", "--tag", "v1")

    assert result.exit_code == 2
    assert "--tag needs --push-to" in result.stderr


def test_push_prints_every_file_or_one_json_object(
    command: Command, hub: Hub, folder: Path
) -> None:
    planned = command("push", folder, REPO, "--dry-run")
    assert "add  model.safetensors" in planned.stdout
    assert "because of --dry-run" in planned.stdout
    content = json.loads(command("push", folder, REPO, "--json", "--tag", "v1").stdout)
    assert content["commit"] == hub.refs(REPO)["refs/tags/v1"]
    assert {change["action"] for change in content["changes"]} == {"add"}
    assert "nothing had to change" in command("push", folder, REPO).stdout


def test_no_transcript_of_a_push_has_a_token(
    command: Command, hub: Hub, me: str, derived: Path, tmp_path: Path
) -> None:
    transcripts = command("push", derived, REPO, "--debug", "--token", me).output
    hub.break_request(Status(503), path="/api/models", times=None)
    transcripts += command("push", derived, REPO, "--debug").output
    hub.mend()
    hub.break_request(ExpiredToken(), times=None)
    transcripts += command("push", derived, REPO, "--debug", "--json", "--token", me).output

    assert "status 503" in transcripts
    assert "does not accept the token" in transcripts
    assert me not in transcripts
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or me.encode() not in path.read_bytes()
    for content in hub.files(REPO).values():
        assert me.encode() not in content
