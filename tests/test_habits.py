"""What people are used to from transformers works, or is refused with the alternative."""

import ast
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import FIXTURES, same_but_for_edges
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import small_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import EomtDinov3ForUniversalSegmentation as TransformersModel
from transformers import EomtImageProcessorPil
from transformers.models.eomt_dinov3.modeling_eomt_dinov3 import (
    EomtDinov3ForUniversalSegmentationOutput as TransformersOutput,
)

from reference_model import EomtDinov3Config as Config
from reference_model import EomtDinov3ForUniversalSegmentation as Model
from reference_model import EomtDinov3ForUniversalSegmentationOutput as Output
from reference_model import EomtImageProcessor as Processor
from reference_model import pretrained
from reference_model.masked_attention import attention_mask

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("### Habits from transformers\n")[2].partition("\n### ")[0]
WORKS, REFUSED = (
    dict(re.findall(r"^\| `(.*?)` \| (.*) \|$", table, re.MULTILINE))
    for table in SECTION.split("What follows is refused")
)
HEAD = {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def names(
    converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the code of README's tables uses."""
    monkeypatch.chdir(tmp_path)
    folder = converted("shapes_panoptic_128")
    model, processor = Model.from_pretrained(folder), Processor.from_pretrained(folder)
    image = Image.open(FIXTURES / "shapes_panoptic_128" / "images" / "3.png")
    inputs = processor(image)
    return {
        "Model": Model,
        "Config": Config,
        "Processor": Processor,
        "folder": folder,
        "model": model,
        "eager": Model.from_pretrained(folder, attn_implementation="eager"),
        "config": model.config,
        "processor": processor,
        "image": image,
        "inputs": inputs,
        "outputs": model(**inputs),
        "numpy": numpy,
    }


def run(code: str, names: dict[str, Any]) -> Any:
    """The value of an expression; None of a statement."""
    if isinstance(ast.parse(code).body[0], ast.Expr):
        return eval(code, names)  # noqa: S307
    exec(code, names)  # noqa: S102
    return None


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


# by code, whether the value is what README says
CHECKS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    'Model.from_pretrained(folder, torch_dtype="bfloat16")': lambda model, _: (
        model.dtype == torch.bfloat16
    ),
    'Model.from_pretrained(folder, device_map="auto")': lambda model, _: (
        model.device.type == str(torch.accelerator.current_accelerator(True) or "cpu")
    ),
    'Model.from_pretrained(folder, attn_implementation="eager")': lambda model, _: (
        model.layers[0].attention.attn_implementation == "eager"
    ),
    "Model.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)": lambda model, _: (
        model.class_predictor.out_features == 4
    ),
    "Model.from_pretrained(folder, output_loading_info=True)": lambda loaded, _: (
        isinstance(loaded[0], Model) and not any(loaded[1].values())
    ),
    "eager(**inputs, output_attentions=True).attentions": lambda weights, names: (
        len(weights) == names["config"].num_hidden_layers
    ),
    "model(**inputs, return_dict=False)": lambda outputs, names: all(
        map(same, outputs, names["outputs"].to_tuple())
    ),
    "outputs.to_tuple()": lambda outputs, _: len(outputs) == 3,
    "outputs[0]": lambda logits, names: same(logits, names["outputs"].class_queries_logits),
    'outputs["masks_queries_logits"]': lambda logits, names: same(
        logits, names["outputs"].masks_queries_logits
    ),
    "model.num_parameters(only_trainable=True)": lambda count, names: (
        count == sum(parameter.numel() for parameter in names["model"].parameters())
    ),
    'model.save_pretrained("sharded", max_shard_size="500KB")': lambda *_: (
        Path("sharded", INDEX).exists() and len(list(Path("sharded").glob("*-of-*"))) > 1
    ),
    "Config(num_labels=4)": lambda config, _: (
        config.id2label == {index: f"LABEL_{index}" for index in range(4)}
    ),
    'Config(rope_parameters={"rope_theta": 100.0})': lambda config, _: (
        config.rope_parameters == {"rope_type": "default", "rope_theta": 100.0}
    ),
    "Config.from_pretrained(folder, num_labels=4)": lambda config, _: config.num_labels == 4,
    "config.to_json_string()": lambda text, names: (
        Config.from_dict(json.loads(text)) == names["config"]
    ),
    "processor.do_pad = False": lambda _, names: names["processor"].do_pad is False,
    "processor(image, size=72)": lambda inputs, _: inputs.pixel_values.shape[-2:] == (72, 72),
    "processor.preprocess(image)": lambda inputs, names: same(
        inputs.pixel_values, names["inputs"].pixel_values
    ),
    "Processor.from_dict(processor.to_dict())": lambda processor, names: (
        processor == names["processor"]
    ),
    "processor.to_json_string()": lambda text, names: (
        Processor.from_dict(json.loads(text)) == names["processor"]
    ),
    "processor(image, do_convert_rgb=True)": lambda inputs, names: same(
        inputs.pixel_values, names["inputs"].pixel_values
    ),
}


def test_every_row_that_works_has_a_check() -> None:
    assert WORKS.keys() == CHECKS.keys()
    assert len(REFUSED) == 9


@pytest.mark.parametrize("code", WORKS)
def test_what_readme_says_to_work_does(code: str, names: dict[str, Any]) -> None:
    assert CHECKS[code](run(code, names), names)


@pytest.mark.parametrize("code", REFUSED)
def test_what_readme_says_to_be_refused_is_and_the_alternative_named(
    code: str, names: dict[str, Any]
) -> None:
    alternative = REFUSED[code].split("`")[1]

    with pytest.raises((ValueError, TypeError, AttributeError), match=re.escape(alternative)):
        run(code, names)


# a class head for other classes ----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model(id2label=dict(enumerate("abcd")), stuff_classes=(3,)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("classes", [{"num_labels": 5}, {"id2label": {0: "sky", 1: "sea"}}])
def test_only_the_class_head_is_new_and_it_is_named(
    saved: Path, classes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, info = Model.from_pretrained(
        saved, **classes, ignore_mismatched_sizes=True, output_loading_info=True
    )

    old, new = load_file(saved / "model.safetensors"), model.state_dict()
    assert {name for name in old if old[name].shape == new[name].shape} == old.keys() - HEAD
    assert all(torch.equal(new[name], old[name]) for name in old.keys() - HEAD)
    count = model.config.num_labels
    assert info["mismatched_keys"] == {
        ("class_predictor.weight", (5, 32), (count + 1, 32)),
        ("class_predictor.bias", (5,), (count + 1,)),
        ("criterion.empty_weight", (5,), (count + 1,)),
    }
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "newly initialized" in record.message
    assert all(f"  {name}: (5" in record.message for name in HEAD)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_new_class_head_has_the_values_that_torch_gives_a_linear_layer(saved: Path) -> None:
    """As in the original: models/eomt.py, training/mask_classification_loss.py."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model.from_pretrained(saved, num_labels=2, ignore_mismatched_sizes=True)
        torch.manual_seed(0)
        expected = nn.Linear(32, 3)

    assert torch.equal(model.class_predictor.weight, expected.weight)
    assert torch.equal(model.class_predictor.bias, expected.bias)
    assert_close(model.criterion.empty_weight, torch.tensor([1, 1, 0.1]))


def test_a_new_class_head_can_be_trained_saved_and_loaded(saved: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(
        saved, num_labels=2, ignore_mismatched_sizes=True, torch_dtype=torch.float32
    ).train()
    labels = [torch.ones(1, 64, 64)], [torch.tensor([1])]
    model(torch.zeros(1, 3, 64, 64), *labels).loss.backward()
    assert model.class_predictor.weight.grad is not None
    assert model.class_predictor.weight.grad.any()

    model.save_pretrained(tmp_path / "tuned")
    again = Model.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again.class_predictor.weight, model.class_predictor.weight)
    assert again.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_new_class_head_has_the_dtype_of_the_others(saved: Path) -> None:
    model = Model.from_pretrained(
        saved, num_labels=2, ignore_mismatched_sizes=True, dtype="bfloat16"
    )
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "stuff_classes"),
    [
        ({"num_labels": 2}, None),
        ({"num_labels": 2, "stuff_classes": [0]}, (0,)),
        ({"id2label": dict(enumerate("efgh"))}, None),
        ({"id2label": dict(enumerate("abcd"))}, (3,)),
        ({"num_labels": 4}, (3,)),
        ({"drop_path_rate": 0.1}, (3,)),
    ],
)
def test_stuff_classes_of_other_classes_do_not_apply(
    saved: Path, settings: dict[str, Any], stuff_classes: tuple[int, ...] | None
) -> None:
    assert Config.from_pretrained(saved, **settings).stuff_classes == stuff_classes


def test_names_stay_with_the_same_number_of_classes(saved: Path) -> None:
    assert Model.from_pretrained(saved, num_labels=4).config.id2label == dict(enumerate("abcd"))


def test_a_given_config_takes_settings_too(saved: Path) -> None:
    config = Config.from_pretrained(saved)
    model = Model.from_pretrained(saved, config=config, hidden_dropout_prob=0.5)

    assert model.dropout.p == 0.5
    assert config.hidden_dropout_prob == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 3}, "shape .*: query.weight"),
        ({"num_blocks": 1, "num_labels": 2}, r"shape .*: attn_mask_probs$"),
        ({"num_labels": 2, "id2label": {0: "sky"}}, "num_labels is 2; expected the 1 of id2label"),
    ],
)
def test_nothing_but_the_class_head_may_have_another_size(
    saved: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(saved, **settings, ignore_mismatched_sizes=True)


def test_a_class_head_of_integers_is_not_replaced(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    whole = {name: tensor.to(torch.int8) for name, tensor in state.items() if name in HEAD}
    save_file(state | whole, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"dtype I8 .*: class_predictor\.weight"):
        Model.from_pretrained(saved, num_labels=2, ignore_mismatched_sizes=True)


def test_an_argument_that_does_not_exist_is_named(saved: Path) -> None:
    with pytest.raises(TypeError, match="has no ignore_mismatch_sizes"):
        Model.from_pretrained(saved, ignore_mismatch_sizes=True)


def test_loading_without_new_tensors_warns_of_nothing(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Model.from_pretrained(saved, ignore_mismatched_sizes=True)
    assert caplog.records == []


# other arguments for loading -------------------------------------------------------------------


def test_the_old_name_of_dtype_is_deprecated_in_transformers_words(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Model.from_pretrained(saved, torch_dtype=torch.float16)
    assert caplog.messages == ["`torch_dtype` is deprecated! Use `dtype` instead!"]


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_all_of_a_model_goes_to_one_device(saved: Path, device_map: Any) -> None:
    assert Model.from_pretrained(saved, device_map=device_map).device.type == "cpu"


def test_automatic_means_the_accelerator_and_without_one_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for accelerator, device in ((torch.device("cuda"), "cuda"), (None, "cpu")):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda found=accelerator, **_: found
        )
        assert pretrained._device(None, "auto") == device


@pytest.mark.parametrize("device_map", ["sequential", {"layers": 0, "": "cpu"}, "disk"])
def test_several_devices_are_refused(saved: Path, device_map: Any) -> None:
    with pytest.raises(ValueError, match=r"device_map is .*; expected one device"):
        Model.from_pretrained(saved, device_map=device_map)


def test_one_device_is_named_once(saved: Path) -> None:
    with pytest.raises(ValueError, match="device and device_map"):
        Model.from_pretrained(saved, device="cpu", device_map="cpu")


# attention and outputs -------------------------------------------------------------------------


def assert_near(ours: Tensor, expected: Tensor) -> None:
    assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.numbers
@torch.inference_mode()
def test_attention_weights_are_those_of_transformers(saved: Path) -> None:
    eager = Model.from_pretrained(saved, attn_implementation="eager")
    theirs: Any = TransformersModel.from_pretrained(saved, attn_implementation="eager").eval()
    for model in (eager, theirs):
        model.attn_mask_probs.zero_()

    output = eager(pixels(), output_attentions=True)
    expected = theirs(pixels(), output_attentions=True)
    assert_near(output.masks_queries_logits, expected.masks_queries_logits)
    assert len(output.attentions) == 3
    for weights, their_weights in zip(output.attentions, expected.attentions, strict=True):
        assert_near(weights, their_weights)


@torch.inference_mode()
def test_eager_attention_has_masks_too(saved: Path) -> None:
    masks = [torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    eager = Model.from_pretrained(saved, attn_implementation="eager")
    output = eager(pixels(), block_mask_logits=masks, output_attentions=True)
    expected = Model.from_pretrained(saved)(pixels(), block_mask_logits=masks)

    assert_near(output.masks_queries_logits, expected.masks_queries_logits)
    allowed = attention_mask(masks[1], (4, 4), 5, 1.0).expand(-1, 2, -1, -1)
    assert torch.equal(output.attentions[-1] > 0, allowed)


def test_an_eager_model_is_exported_and_compiled_too() -> None:
    torch.compiler.reset()
    model = Model(small_model().config, attn_implementation="eager").eval()
    model.attn_mask_probs.zero_()
    expected = model.eval()(pixels()).masks_queries_logits

    exported = torch.export.export(model, (pixels(),)).module()
    assert torch.equal(exported(pixels()).masks_queries_logits, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels(), return_dict=False)[1], expected)


def test_positions_of_outputs_are_those_of_transformers() -> None:
    values: dict[str, Any] = {
        name: torch.tensor(float(index))
        for index, name in enumerate(TransformersOutput.__dataclass_fields__)
    }
    assert Output(**values).to_tuple() == TransformersOutput(**values).to_tuple()


@pytest.mark.parametrize("key", ["loss", "to_tuple"])
def test_an_output_that_there_is_not_is_a_key_error(key: str) -> None:
    with pytest.raises(KeyError, match=key):
        small_model()(torch.zeros(1, 3, 64, 64))[key]


def test_frozen_parameters_are_not_trainable() -> None:
    model = small_model()
    every = model.num_parameters()
    model.query.weight.requires_grad_(False)
    assert model.num_parameters() == every
    assert model.num_parameters(only_trainable=True) == every - 6 * 32


# shards ----------------------------------------------------------------------------------------


def test_shards_are_those_that_transformers_writes(saved: Path, tmp_path: Path) -> None:
    Model.from_pretrained(saved).save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    theirs: Any = TransformersModel.from_pretrained(saved)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")

    ours, expected = (
        json.loads((tmp_path / who / INDEX).read_text()) for who in ("ours", "theirs")
    )
    assert ours["metadata"] == expected["metadata"]
    assert ours["weight_map"].keys() == expected["weight_map"].keys()
    for path in (tmp_path / "ours").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 100_000
    for kind in (Model, TransformersModel):
        again: Any = kind.from_pretrained(tmp_path / "ours")
        for name, tensor in load_file(saved / "model.safetensors").items():
            assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("sizes", [("100KB", "50GB"), ("50GB", "100KB"), ("50KB", "100KB")])
def test_a_model_saved_over_another_leaves_nothing_of_it(
    tmp_path: Path, sizes: tuple[str, str]
) -> None:
    folder, alone = tmp_path / "model", tmp_path / "alone"
    small_model(0).save_pretrained(folder, max_shard_size=sizes[0])
    (folder / "model_notes.safetensors").touch()
    loaded = Model.from_pretrained(folder)
    loaded.save_pretrained(folder, max_shard_size=sizes[1])
    loaded.save_pretrained(alone, max_shard_size=sizes[1])

    assert {path.name for path in folder.iterdir()} == {
        "model_notes.safetensors",
        *(path.name for path in alone.iterdir()),
    }
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in Model.from_pretrained(folder).state_dict().items()
    )


def test_a_failure_while_shards_are_written_leaves_the_old_model(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.glob("*.safetensors")}
    with pytest.raises(ValueError, match="lots"):
        small_model(1).save_pretrained(saved, max_shard_size="lots")
    assert {path.name: path.read_bytes() for path in saved.glob("*.safetensors")} == before


# the processor ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("size", {"height": 3}), ("do_pad", "yes"), ("image_std", [0, 1, 1])]
)
def test_an_attribute_is_not_set_to_a_value_that_cannot_work(name: str, value: Any) -> None:
    processor = Processor()
    with pytest.raises(ValueError, match=f"{name} is "):
        setattr(processor, name, value)
    assert processor == Processor()


def test_an_attribute_that_does_not_exist_cannot_be_set() -> None:
    with pytest.raises(TypeError, match="crop_size"):
        Processor().crop_size = 3


def test_an_attribute_is_set_as_it_is_when_a_processor_is_made() -> None:
    processor = Processor()
    for name, value in {"size": 72, "image_mean": [0.5, 0.5, 0.5]}.items():
        setattr(processor, name, value)
    assert processor == Processor(size={"shortest_edge": 72}, image_mean=(0.5, 0.5, 0.5))


def test_settings_replace_those_of_a_dict() -> None:
    values = Processor(do_pad=True).to_dict()
    assert Processor.from_dict(values, size=42) == Processor(
        do_pad=True, size={"shortest_edge": 42}
    )


@pytest.mark.numbers
def test_windows_asked_for_in_one_call_are_put_together() -> None:
    processor = Processor(size={"shortest_edge": 32})
    inputs = processor(Image.new("RGB", (80, 32)), do_split_image=True)
    generator = torch.Generator().manual_seed(0)
    masks = 5 * torch.randn(3, 5, 8, 8, generator=generator)
    classes = 3 * torch.randn(3, 5, 4, generator=generator)
    outputs = Output(masks, classes, torch.empty(0), inputs.patch_offsets)

    (ours,) = processor.post_process_semantic_segmentation(outputs, [(32, 80)])
    sliding = replace(processor, do_split_image=True)
    assert torch.equal(ours, sliding.post_process_semantic_segmentation(outputs, [(32, 80)])[0])
    size: Any = {"shortest_edge": 32, "longest_edge": None}
    theirs: Any = EomtImageProcessorPil(size=size)
    (expected,) = theirs.post_process_semantic_segmentation(outputs, [(32, 80)])
    assert same_but_for_edges(ours, expected)
