"""Wrong pairs, each refused or flagged with its reason."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import FIXTURES, in_every_way, products_are_full_float32
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file, save_file

import converter
from converter.configs import read_backbone_config
from converter.errors import AccessError, MismatchError, PlanError, UnreadableFileError
from converter.hub import downloads
from converter.weights import backbones, pairing
from converter.weights.backbones import KnownBackbone, RecordedOutputs
from converter.weights.inspection import Sign
from converter.weights.pairing import PairCheck
from converter.weights.plan import make_plan
from converter.weights.tensorfiles import TensorFile
from reference_model import Dinov3Backbone, EomtDinov3Config

pytestmark = pytest.mark.numbers

TINY = FIXTURES / "tiny_panoptic_64"
LAYOUTS = json.loads((FIXTURES / "layouts.json").read_text())

State = dict[str, torch.Tensor]


def statuses(folder: Path, *, delta: Path | None = None) -> dict[str, str]:
    """The statistical checks of the backbone in a folder and a delta."""
    with (
        TensorFile(folder / "model.safetensors") as base,
        TensorFile(delta or TINY / "delta" / "pytorch_model.bin") as change,
    ):
        config = read_backbone_config(TINY / "backbone" / "config.json")
        plan = make_plan(change.tensors, base.tensors, config)
        checks = pairing.check_pair(base, change, plan, expected_data=None)
    return {check.check: check.status for check in checks}


def changed_backbone(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    state = load_file(TINY / "backbone" / "model.safetensors")
    (folder / "backbone").mkdir()
    shutil.copy(TINY / "backbone" / "config.json", folder / "backbone")
    state = {name: change(name, tensor).contiguous() for name, tensor in state.items()}
    save_file(state, folder / "backbone" / "model.safetensors")
    return folder / "backbone"


def changed_delta(folder: Path, change: Callable[[State], object]) -> Path:
    state = torch.load(TINY / "delta" / "pytorch_model.bin")
    change(state)
    torch.save(state, folder / "delta.bin")
    return folder / "delta.bin"


@pytest.mark.parametrize(
    "name", ["shapes_panoptic_128", "tiny_semantic_48", "tiny_instance_64_gated"]
)
def test_right_pairs_pass(name: str, tmp_path: Path) -> None:
    conversion = converter.convert(name, tmp_path / "out", verify=False)

    found = {check.check: check.status for check in conversion.pair}
    assert (found["layer-norms"], found["rounding"]) == ("passed", "passed")


def test_other_weights_of_the_same_shapes_are_flagged(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)

    def other(_: str, tensor: torch.Tensor) -> torch.Tensor:
        spread = tensor.std() if tensor.numel() > 1 else 1.0
        return torch.randn(tensor.shape, generator=generator) * spread + tensor.mean()

    assert statuses(changed_backbone(tmp_path, other))["rounding"] == "flagged"


def test_layers_in_another_order_are_flagged(tmp_path: Path) -> None:
    state = load_file(TINY / "backbone" / "model.safetensors")

    def shifted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("layer."):
            return tensor
        number = int(name.split(".")[1])
        return state[name.replace(f"layer.{number}.", f"layer.{(number + 1) % 4}.", 1)]

    assert statuses(changed_backbone(tmp_path, shifted))["rounding"] == "flagged"


def test_a_delta_of_zeros_is_flagged(tmp_path: Path) -> None:
    delta = changed_delta(
        tmp_path, lambda state: [t.zero_() for n, t in state.items() if "backbone" in n]
    )

    assert statuses(TINY / "backbone", delta=delta)["rounding"] == "flagged"


def test_absolute_weights_added_to_a_backbone_are_flagged() -> None:
    found = statuses(TINY / "backbone", delta=TINY / "absolute.ckpt")

    assert found["layer-norms"] == "flagged"


def test_a_delta_that_undoes_its_backbone_is_flagged(tmp_path: Path) -> None:
    base = load_file(TINY / "backbone" / "model.safetensors")

    def subtract(state: State) -> None:
        for name in state:
            if name.endswith(("norm1.weight", "norm2.weight", "backbone.norm.weight")):
                short = name.removeprefix("network.encoder.backbone.").replace("blocks", "layer")
                state[name] = state[name] - base[short]

    delta = changed_delta(tmp_path, subtract)

    assert statuses(TINY / "backbone", delta=delta)["layer-norms"] == "flagged"


def test_a_delta_that_was_rounded_has_lost_its_trace(tmp_path: Path) -> None:
    def rounded(state: State) -> None:
        for name in state:
            state[name] = state[name].bfloat16().float()

    delta = changed_delta(tmp_path, rounded)

    assert statuses(TINY / "backbone", delta=delta)["rounding"] in ("not checked", "passed")


def test_a_flagged_pair_warns_and_is_converted(tmp_path: Path) -> None:
    delta = changed_delta(
        tmp_path, lambda state: [t.zero_() for n, t in state.items() if "backbone" in n]
    )
    conversion = converter.convert(
        "tiny_panoptic_64", tmp_path / "out", delta=str(delta), weights="delta", verify=False
    )

    flagged = [check for check in conversion.pair if check.status == "flagged"]
    assert [check.check for check in flagged] == ["rounding"]
    told = json.loads((tmp_path / "out" / "conversion.json").read_text())["pair"]
    assert flagged[0].to_dict() in told


def test_a_delta_said_to_be_absolute_is_flagged(tmp_path: Path) -> None:
    conversion = converter.convert(
        "tiny_panoptic_64", tmp_path / "out", weights="absolute", verify=False
    )

    assert [(check.check, check.status) for check in conversion.pair] == [("weights", "flagged")]


def test_absolute_weights_are_recognised() -> None:
    check = pairing.check_absolute([Sign("layer norms around 1", "absolute")])

    assert check.status == "passed"


# Meta's files ----------------------------------------------------------------------------------


def test_a_meta_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth"
    shutil.copy(TINY / "backbone_meta" / "tiny_panoptic_64.pth", path)

    with pytest.raises(MismatchError, match=r"SHA-256 of .* expected 8aa4cbdd"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", backbone=str(path))
    conversion = converter.convert(
        "tiny_panoptic_64", tmp_path / "out", backbone=str(path), allow_mismatch=True
    )
    assert conversion.verdict.verdict == "passed"


def test_a_meta_file_that_is_what_its_name_says_passes(tmp_path: Path) -> None:
    content = (TINY / "backbone_meta" / "tiny_panoptic_64.pth").read_bytes()
    path = tmp_path / f"dinov3-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)

    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", backbone=str(path))

    assert conversion.pair[0] == PairCheck(
        "file-name", "passed", f"The file's SHA-256 begins with {path.stem[-8:]}, as its name says."
    )


def test_a_meta_file_trained_on_other_data_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (TINY / "backbone_meta" / "tiny_panoptic_64.pth").read_bytes()
    digits = hashlib.sha256(content).hexdigest()[:8]
    path = tmp_path / f"dinov3_vitl16_pretrain_sat493m-{digits}.pth"
    path.write_bytes(content)
    known = replace(backbones.KNOWN_BACKBONES[0], meta_files={"sat493m": path.name})
    monkeypatch.setattr(pairing, "KNOWN_BACKBONES", (known,))

    with TensorFile(path) as file:
        check = pairing.check_file_name(file, "lvd1689m")

    assert check.status == "failed"
    assert (
        "trained on sat493m; the delta was made from weights trained on lvd1689m" in check.finding
    )


def meta_vitl16(folder: Path, *, local_norm: bool) -> Path:
    """A file with the tensor names and sizes of Meta's ViT-L, but hardly any values."""
    layout = "meta_sat493m" if local_norm else "meta"
    shapes = LAYOUTS["backbones"]["vitl16"]["layouts"][layout]
    # of every layer one tensor is enough to count it
    kept = {n: s for n, s in shapes.items() if "blocks" not in n or n.endswith("norm1.weight")}
    kept = {n: s for n, s in kept.items() if "patch_embed" not in n}
    state = {name: torch.zeros(shape) for name, shape in kept.items()}
    state["patch_embed.proj.weight"] = torch.zeros(1024, 3, 1, 1)
    torch.save(state, folder / "backbone.pth")
    return folder / "backbone.pth"


@pytest.mark.parametrize(
    ("local_norm", "expected", "status"),
    [
        (True, "lvd1689m", "failed"),
        (False, "lvd1689m", "passed"),
        (True, "sat493m", "passed"),
        (False, "sat493m", "failed"),
        (True, None, "not checked"),
    ],
)
def test_local_cls_norm_shows_what_a_vit_l_was_trained_on(
    tmp_path: Path, local_norm: bool, expected: str | None, status: str
) -> None:
    with TensorFile(meta_vitl16(tmp_path, local_norm=local_norm)) as file:
        check = pairing.check_local_norm(file, expected)

    assert check.status == status
    assert ("sat493m" if local_norm else "lvd1689m") in check.finding


# the Hub's digests -----------------------------------------------------------------------------


@pytest.fixture
def damaged(hub: Hub) -> Path:
    """A backbone's weights in the cache, with one wrong bit."""
    hub.create_repo("meta/backbone", {p.name: p for p in (TINY / "backbone").iterdir()})
    path = Path(huggingface_hub.hf_hub_download("meta/backbone", "model.safetensors"))
    path.resolve().chmod(0o644)  # files of the store that repositories share are read-only
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


@in_every_way
def test_a_download_that_is_not_what_the_hub_has_is_fetched_once_more(
    hub: Hub, damaged: Path, tmp_path: Path
) -> None:
    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone")

    assert conversion.verdict.verdict == "passed"
    assert damaged.read_bytes() == (TINY / "backbone" / "model.safetensors").read_bytes()


@in_every_way
def test_a_download_that_stays_wrong_is_refused_and_the_error_says_where_it_is(
    hub: Hub, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = damaged.read_bytes()
    real: Callable[..., str] = huggingface_hub.hf_hub_download

    def bring_the_same(*arguments: Any, **keywords: Any) -> str:
        path = Path(real(*arguments, **keywords))
        if path == damaged:
            path.resolve().chmod(0o644)
            path.write_bytes(content)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", bring_the_same)

    with pytest.raises(UnreadableFileError, match="meta/backbone arrived damaged twice") as caught:
        converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone")
    assert f"The damaged file stays in the cache, at {damaged};" in caught.value.remedy
    assert damaged.exists()
    assert not (tmp_path / "out").exists()


@in_every_way
def test_what_other_repositories_have_in_the_cache_is_left_alone(
    hub: Hub, damaged: Path, tmp_path: Path
) -> None:
    hub.create_repo("me/other", {"model.safetensors": TINY / "delta" / "pytorch_model.bin"})
    theirs = Path(huggingface_hub.hf_hub_download("me/other", "model.safetensors"))
    before = theirs.read_bytes()
    with pytest.raises(PlanError):
        converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="me/other")

    assert theirs.read_bytes() == before
    assert damaged.exists()


@in_every_way
def test_a_hub_that_gives_no_digest_leaves_the_weights_unchecked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create_repo("meta/backbone", {p.name: p for p in (TINY / "backbone").iterdir()})
    monkeypatch.setattr("converter.hub.downloads._as_digest", lambda _: None)

    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone")

    assert (conversion.pair[-1].check, conversion.pair[-1].status) == ("hub-digest", "not checked")


def test_a_download_whose_header_is_wrong_is_fetched_once_more(
    hub: Hub, damaged: Path, tmp_path: Path
) -> None:
    damaged.write_bytes(b"\xff" * 1000)

    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone")

    assert conversion.verdict.verdict == "passed"


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that are checked against the Hub's digests after an error."""
    names: list[str] = []

    def is_damaged(path: Path, digest: str) -> bool:
        names.append(path.name)
        return downloads.is_damaged(path, digest)

    monkeypatch.setattr("converter.hub.sources.is_damaged", is_damaged)
    return names


def test_an_error_that_no_download_explains_reads_no_weights_again(
    hub: Hub, tmp_path: Path, digested: list[str]
) -> None:
    hub.create_repo("me/other", {"model.safetensors": TINY / "delta" / "pytorch_model.bin"})
    hub.create_repo("meta/backbone", {p.name: p for p in (TINY / "backbone").iterdir()})
    with pytest.raises(PlanError):
        converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="me/other")
    (tmp_path / "labels").write_bytes(b"\xff")
    with pytest.raises(UnreadableFileError, match="labels"):
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / "out",
            backbone="meta/backbone",
            labels=tmp_path / "labels",
        )

    assert digested == []


def test_after_an_error_only_the_file_that_it_is_about_is_read_again(
    hub: Hub, tmp_path: Path, digested: list[str]
) -> None:
    tensors = load_file(TINY / "backbone" / "model.safetensors")
    tensors["norm.weight"] = torch.full_like(tensors["norm.weight"], float("nan"))
    save_file(tensors, tmp_path / "model.safetensors")
    config = TINY / "backbone" / "config.json"
    nan = {"model.safetensors": tmp_path / "model.safetensors", "config.json": config}
    hub.create_repo("meta/backbone", nan)
    hub.create_repo("me/delta", {"pytorch_model.bin": TINY / "delta" / "pytorch_model.bin"})
    with pytest.raises(UnreadableFileError, match=r"norm.weight in the backbone .* holds NaN"):
        converter.convert(
            "tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone", delta="me/delta"
        )

    assert digested == ["model.safetensors"]


def test_a_download_whose_digest_is_not_the_one_in_its_name_is_fetched_once_more(
    hub: Hub, tmp_path: Path
) -> None:
    (weights,) = (TINY / "backbone_meta").glob("*.pth")
    name = f"dinov3-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.pth"
    hub.create_repo("meta/backbone", {name: weights})
    cached = Path(huggingface_hub.hf_hub_download("meta/backbone", name)).resolve()
    content = bytearray(cached.read_bytes())
    content[content.index(b"PK\x03\x04", 100) - 1] ^= 1  # the end of a tensor
    cached.chmod(0o644)
    cached.write_bytes(content)
    conversion = converter.convert(
        "tiny_panoptic_64",
        tmp_path / "out",
        backbone="meta/backbone",
        backbone_config=TINY / "backbone" / "config.json",
    )

    assert conversion.verdict.verdict == "passed"
    assert cached.read_bytes() == weights.read_bytes()


def test_two_downloads_whose_headers_are_wrong_are_fetched_once_more(
    hub: Hub, damaged: Path, tmp_path: Path
) -> None:
    hub.create_repo("me/delta", {"pytorch_model.bin": TINY / "delta" / "pytorch_model.bin"})
    delta = Path(huggingface_hub.hf_hub_download("me/delta", "pytorch_model.bin"))
    delta.resolve().chmod(0o644)
    for path in (damaged, delta):
        path.write_bytes(b"\xff" * 1000)

    conversion = converter.convert(
        "tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone", delta="me/delta"
    )
    assert conversion.verdict.verdict == "passed"


def test_a_wrong_download_stays_in_the_cache_when_offline(
    hub: Hub, damaged: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnreadableFileError, match="is damaged in the cache"):
        converter.convert(
            "tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone", local_files_only=True
        )
    assert damaged.exists()


def test_a_download_with_the_hubs_digest_passes(hub: Hub, tmp_path: Path) -> None:
    hub.create_repo("meta/backbone", {p.name: p for p in (TINY / "backbone").iterdir()})

    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone")

    assert conversion.pair[-1].check == "hub-digest"
    assert conversion.pair[-1].status == "passed"


# the backbone's recorded outputs ---------------------------------------------------------------


@pytest.fixture
def known_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A picture; tiny_panoptic_64's outputs on it are in the table of known backbones."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    config = json.loads((TINY / "backbone" / "config.json").read_text())
    del config["model_type"]
    backbone = Dinov3Backbone(EomtDinov3Config.from_dict(config))
    state = load_file(TINY / "backbone" / "model.safetensors")
    del state["embeddings.mask_token"]
    backbone.load_state_dict(
        {
            name.replace("layer.", "layers.")
            .replace("norm.w", "layernorm.w")
            .replace("norm.b", "layernorm.b")
            if name.startswith("norm.")
            else name.replace("layer.", "layers."): tensor
            for name, tensor in state.items()
        }
    )
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255,
        size=(224, 224),
        mode="bilinear",
        antialias=True,
    )
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.inference_mode():
        tokens = backbone.eval()((resized - mean) / std)
    outputs = RecordedOutputs(
        cls=tuple(tokens[0, 0, :5].tolist()), patch0=tuple(tokens[0, 5, :5].tolist())
    )
    known = KnownBackbone("tiny", "ViT-Tiny", 64, 4, False, 4, True, {}, outputs)
    monkeypatch.setattr(backbones, "KNOWN_BACKBONES", (known,))
    return tmp_path / "picture.png"


@pytest.mark.parametrize("folder", ["backbone", "backbone_meta", "backbone_timm"])
def test_a_backbone_with_the_recorded_outputs_passes(
    known_tiny: Path, tmp_path: Path, folder: str
) -> None:
    conversion = converter.convert(
        "tiny_panoptic_64",
        tmp_path / "out",
        backbone=str(TINY / folder),
        check_backbone=True,
        image=known_tiny,
    )

    check = conversion.pair[-1]
    assert (check.check, check.status) == ("backbone-outputs", "passed")


def test_a_backbone_with_other_outputs_is_refused(known_tiny: Path, tmp_path: Path) -> None:
    folder = changed_backbone(
        tmp_path, lambda name, tensor: tensor * 1.01 if name == "norm.weight" else tensor
    )

    with pytest.raises(MismatchError, match="other weights than those trained on lvd1689m"):
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / "out",
            backbone=str(folder),
            check_backbone=True,
            image=known_tiny,
        )


def test_the_backbone_is_run_in_full_float32(
    known_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[bool] = []

    def forward(_: Dinov3Backbone, _pixels: torch.Tensor) -> torch.Tensor:
        full.append(products_are_full_float32())
        return torch.zeros(1, 201, 64)

    monkeypatch.setattr(Dinov3Backbone, "forward", forward)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(MismatchError, match="trained on lvd1689m"):
            converter.convert(
                "tiny_panoptic_64", tmp_path / "out", check_backbone=True, image=known_tiny
            )
    finally:
        torch.set_float32_matmul_precision("highest")

    assert full == [True]


def test_a_backbone_without_recorded_outputs_is_not_checked(tmp_path: Path) -> None:
    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", check_backbone=True)

    check = conversion.pair[-1]
    assert (check.check, check.status) == ("backbone-outputs", "not checked")


def test_the_picture_must_be_given_when_offline(known_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="not in the cache") as caught:
        converter.convert(
            "tiny_panoptic_64",
            tmp_path / "out",
            check_backbone=True,
            local_files_only=True,
            cache_dir=tmp_path / "cache",
        )
    assert "--image" in caught.value.remedy
