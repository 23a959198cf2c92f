"""Every layout and kind that weights come in gives the same model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from hub_server import Hub
from safetensors.torch import load_file, save_file

import converter
from converter.errors import (
    AccessError,
    EomtConvertError,
    PlanError,
    UnreadableFileError,
    UsageError,
)

BACKBONES = ("transformers", "sharded", "meta", "timm", "timm_qkvb")
WEIGHTS = ("delta", "lightning delta", "compiled delta", "absolute", "lightning absolute")

# recorded in all three layouts, or in transformers' alone
NAMES = ("tiny_panoptic_64", "tiny_instance_64_gated")
OTHERS = ("shapes_panoptic_128", "tiny_panoptic_48x80", "tiny_semantic_48")

COMBINATIONS = [(name, kind, layout) for name in NAMES for kind in WEIGHTS for layout in BACKBONES]
COMBINATIONS += [
    (name, kind, layout)
    for name in OTHERS
    for kind in ("delta", "absolute", "lightning delta")
    for layout in ("transformers", "sharded")
]


class Trainer:
    """A class that a checkpoint's hyper-parameters may refer to."""

    def __init__(self) -> None:
        self.steps = 3


def expected_digests(name: str) -> dict[str, str]:
    tensors = json.loads((FIXTURES / name / "converted.json").read_text())["tensors"]
    return {tensor: entry["sha256"] for tensor, entry in tensors.items()}


def digests(folder: Path) -> dict[str, str]:
    tensors = json.loads((folder / "conversion.json").read_text())["tensors"]
    return {tensor: entry["sha256"] for tensor, entry in tensors.items()}


def backbone(name: str, layout: str, folder: Path) -> Path:
    source = FIXTURES / name
    if layout == "transformers":
        return source / "backbone"
    if layout in ("meta", "timm"):
        return source / f"backbone_{layout}"
    if layout == "sharded":
        return sharded(source / "backbone", folder / "sharded")
    # as timm publishes it with biases; they are zeros in its other repositories
    state = load_file(source / "backbone_timm" / "model.safetensors")
    for tensor in [tensor for tensor in state if tensor.endswith("qkv.weight")]:
        prefix, size = tensor.removesuffix("qkv.weight"), state[tensor].shape[1]
        if name == "tiny_panoptic_64":  # the other one has no such biases
            state.setdefault(f"{prefix}q_bias", torch.zeros(size))
            state.setdefault(f"{prefix}v_bias", torch.zeros(size))
    (folder / "timm").mkdir()
    save_file(state, folder / "timm" / "model.safetensors")
    return folder / "timm"


def sharded(source: Path, folder: Path) -> Path:
    state = load_file(source / "model.safetensors")
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def recorded_delta(name: str) -> dict[str, torch.Tensor]:
    content = torch.load(FIXTURES / name / "delta" / "pytorch_model.bin")
    state: dict[str, torch.Tensor] = content.get("state_dict", content)
    return state


def absolute(name: str) -> dict[str, torch.Tensor]:
    """The weights as training saves them."""
    state = recorded_delta(name)
    base = load_file(FIXTURES / name / "backbone" / "model.safetensors")
    for key in state:
        if key.startswith("network.encoder.backbone."):
            short = key.removeprefix("network.encoder.backbone.")
            short = short.replace("blocks.", "layer.").replace("patch_embed.", "embeddings.")
            state[key] = base[short] + state[key]
    for key, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
        state[f"network.encoder.pixel_{key}"] = torch.tensor(values).view(1, 3, 1, 1)
    return state


def weights(name: str, kind: str, folder: Path) -> Path:
    state = absolute(name) if "absolute" in kind else recorded_delta(name)
    if "compiled" in kind:
        state = {k.replace("network.", "network._orig_mod.", 1): v for k, v in state.items()}
    content: dict[str, Any] = state
    if "lightning" in kind:
        content = {
            "state_dict": state,
            "epoch": 11,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
            "hyper_parameters": {"trainer": Trainer(), "tags": {"a", "b"}, "path": Path("x")},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}},
        }
    torch.save(content, folder / "weights.ckpt")
    return folder / "weights.ckpt"


@pytest.mark.parametrize(("name", "kind", "layout"), COMBINATIONS)
def test_every_combination_gives_the_same_bytes(
    name: str, kind: str, layout: str, tmp_path: Path
) -> None:
    conversion = converter.convert(
        name,
        tmp_path / "out",
        delta=str(weights(name, kind, tmp_path)),
        backbone=str(backbone(name, layout, tmp_path)),
        verify=False,
    )

    assert digests(tmp_path / "out") == expected_digests(name)
    assert conversion.inputs.weights == ("absolute" if "absolute" in kind else "delta")


def test_the_recorded_absolute_checkpoint_gives_the_deltas_digests(tmp_path: Path) -> None:
    """Without backbone weights: the backbone's config.json is enough."""
    conversion = converter.convert(
        output=tmp_path / "out",
        delta=str(FIXTURES / "tiny_panoptic_64" / "absolute.ckpt"),
        backbone_config=FIXTURES / "tiny_panoptic_64" / "backbone" / "config.json",
        task="panoptic",
        image_size=64,
        recorded=FIXTURES / "tiny_panoptic_64",
    )

    assert digests(tmp_path / "out") == expected_digests("tiny_panoptic_64")
    assert conversion.verdict.verdict == "passed"
    assert set(conversion.sources) == {"weights"}


def test_the_key_bias_of_metas_files_is_left_out() -> None:
    """It holds 0.37 in the recorded file, switched off by bias_mask."""
    state = torch.load(FIXTURES / "tiny_panoptic_64" / "backbone_meta" / "tiny_panoptic_64.pth")
    assert (state["blocks.0.attn.qkv.bias"][64:128] == 0.37).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_rotary_periods_are_not_used(tmp_path: Path, dtype: torch.dtype) -> None:
    source = FIXTURES / "tiny_panoptic_64" / "backbone_meta" / "tiny_panoptic_64.pth"
    state = torch.load(source)
    state["rope_embed.periods"] = torch.full((4,), 7.0, dtype=dtype)
    torch.save(state, tmp_path / "backbone.pth")

    converter.convert(
        "tiny_panoptic_64",
        tmp_path / "out",
        backbone=str(tmp_path / "backbone.pth"),
        verify=False,
    )

    assert digests(tmp_path / "out") == expected_digests("tiny_panoptic_64")


def test_a_layout_can_be_given(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "backbone": str(FIXTURES / "tiny_panoptic_64" / "backbone_meta"),
        "verify": False,
    }
    with pytest.raises(PlanError, match="missing from the backbone"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", backbone_layout="timm", **arguments)
    converter.convert("tiny_panoptic_64", tmp_path / "out", backbone_layout="meta", **arguments)

    assert digests(tmp_path / "out") == expected_digests("tiny_panoptic_64")


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = backbone("tiny_panoptic_64", "sharded", tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(UnreadableFileError, match=r"model-00002-of-00002\.safetensors is missing"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", backbone=str(folder))


def test_sharded_repositories_are_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    folder = backbone("tiny_panoptic_64", "sharded", tmp_path)
    hub.create_repo("meta/backbone", {path.name: path for path in folder.iterdir()})

    converter.convert("tiny_panoptic_64", tmp_path / "out", backbone="meta/backbone", verify=False)
    hub.requests.clear()
    converter.convert(
        "tiny_panoptic_64",
        tmp_path / "again",
        backbone="meta/backbone",
        verify=False,
        local_files_only=True,
    )

    assert digests(tmp_path / "out") == expected_digests("tiny_panoptic_64")
    assert digests(tmp_path / "again") == expected_digests("tiny_panoptic_64")
    assert hub.requests == []
    files = json.loads((tmp_path / "out" / "conversion.json").read_text())["sources"]["backbone"]
    assert set(files["files"]) == {path.name for path in folder.iterdir()}


def test_timms_config_is_not_taken_for_transformers(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--backbone-config"):
        converter.convert(
            output=tmp_path / "out",
            delta=str(FIXTURES / "tiny_panoptic_64" / "delta"),
            backbone=str(FIXTURES / "tiny_panoptic_64" / "backbone_timm"),
            task="panoptic",
            image_size=64,
        )


# delta or absolute -----------------------------------------------------------------------------


def test_mixed_evidence_is_refused_with_its_signs(tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "tiny_panoptic_64" / "delta" / "pytorch_model.bin")
    state["network.encoder.pixel_std"] += 0.2
    torch.save(state, tmp_path / "weights.bin")

    with pytest.raises(EomtConvertError, match="cannot be decided") as caught:
        converter.convert("tiny_panoptic_64", tmp_path / "out", delta=str(tmp_path / "weights.bin"))
    assert "pixel_std is 0.2" in caught.value.message
    assert "--weights" in caught.value.remedy

    conversion = converter.convert(
        "tiny_panoptic_64",
        tmp_path / "out",
        delta=str(tmp_path / "weights.bin"),
        weights="delta",
    )
    assert conversion.verdict.verdict == "passed"


def test_the_evidence_is_reported(tmp_path: Path) -> None:
    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out")

    assert [sign.speaks_for for sign in conversion.inputs.evidence] == ["delta", "delta"]


def test_a_delta_without_a_backbone_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--backbone must be given"):
        converter.convert(
            output=tmp_path / "out",
            delta=str(FIXTURES / "tiny_panoptic_64" / "delta"),
            task="panoptic",
            image_size=64,
        )


def small_absolute(folder: Path) -> Path:
    """Absolute weights with the names and shapes of the small published checkpoint."""
    layouts = json.loads((FIXTURES / "layouts.json").read_text())
    shapes = layouts["checkpoints"]["coco_panoptic_eomt_small_640_dinov3"]["delta"]
    torch.save({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, folder / "a.ckpt")
    return folder / "a.ckpt"


def test_absolute_weights_of_a_published_size_ask_the_hub_for_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    conversion = converter.convert(
        "coco_panoptic_small_640", tmp_path / "out", delta=str(small_absolute(tmp_path))
    )

    assert hub.requests == []
    assert conversion.plan.config.num_attention_heads == 6
    assert conversion.verdict.verdict == "unverified"


def test_a_gated_backbone_is_found_out_before_the_delta_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    delta, backbone = (
        "tue-mps/coco_panoptic_eomt_small_640_dinov3",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
    )
    hub.create_repo(delta, {"pytorch_model.bin": b"large"})
    hub.create_repo(backbone, {"config.json": b"{}", "model.safetensors": b""}, gated=True)

    with pytest.raises(AccessError, match="is gated"):
        converter.convert("coco_panoptic_small_640", tmp_path / "out")
    assert hub.served == []


# already in transformers' layout ---------------------------------------------------------------


def test_a_converted_folder_passes_through(model: Path, tmp_path: Path) -> None:
    conversion = converter.convert(
        output=tmp_path / "out", delta=str(model), recorded=FIXTURES / "tiny_panoptic_64"
    )

    assert conversion.verdict.verdict == "passed"
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name


def test_what_a_fine_tune_added_to_its_config_is_kept(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"trained_by": "someone"}))

    converter.convert(output=tmp_path / "out", delta=str(model), verify=False)

    assert json.loads((tmp_path / "out" / "config.json").read_text())["trained_by"] == "someone"


def test_a_converted_folder_is_refused_as_a_delta(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="converted already"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", delta=str(model), weights="delta")


# types and shards ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["shapes_panoptic_128", *NAMES])
def test_rounded_models_pass_within_their_tolerance(name: str, dtype: Any, tmp_path: Path) -> None:
    conversion = converter.convert(name, tmp_path / "out", dtype=dtype)

    assert conversion.verdict.verdict == "passed"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert converter.verify(tmp_path / "out").verdict == "passed"


def test_a_rounded_model_that_was_changed_fails(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "out", dtype="bfloat16")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["layers.0.attention.q_proj.weight"] *= -1
    save_file(state, tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "conversion.json").unlink()

    verdict = converter.verify(tmp_path / "out", recorded=FIXTURES / "tiny_panoptic_64")

    assert verdict.verdict == "failed"


def test_shards_are_verified_and_loaded_by_both(tmp_path: Path) -> None:
    import transformers

    from reference_model import EomtDinov3ForUniversalSegmentation

    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", max_shard_size="300KB")

    assert conversion.verdict.verdict == "passed"
    assert converter.verify(tmp_path / "out").verdict == "passed"
    ours = EomtDinov3ForUniversalSegmentation.from_pretrained(tmp_path / "out").state_dict()
    transformers.logging.disable_progress_bar()
    loaded: Any = transformers.EomtDinov3ForUniversalSegmentation.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    theirs, info = loaded
    assert not any(info.values())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
