"""Own checkpoints in the forms that training code saves: each gives the model of TU/e's form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from test_layouts import absolute, recorded_delta, sharded

import converter
from converter.errors import PlanError, UsageError
from converter.files import sha256
from converter.history import read_history

NAME = "tiny_panoptic_64"
State = dict[str, torch.Tensor]


def bare(state: State) -> State:
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Weights that give another model."""
    return {name: tensor + 1 if "class_head" in name else tensor for name, tensor in state.items()}


def parameters(state: State) -> State:
    """What code that averages only parameters keeps."""
    buffers = ("attn_mask_probs", "pixel_mean", "pixel_std")
    return {name: tensor for name, tensor in state.items() if not name.endswith(buffers)}


FORMS: dict[str, Callable[[State], dict[str, Any]]] = {
    "bare": bare,
    "bare, in a dict": lambda state: {"model": bare(state), "epoch": 3, "optimizer": {"state": {}}},
    "DDP": lambda state: under("module.", state),
    "DDP around the network": lambda state: under("network.module.", bare(state)),
    "bare DDP": lambda state: under("module.", bare(state)),
    "torch.compile": lambda state: under("_orig_mod.", state),
    "DDP and torch.compile": lambda state: under("module._orig_mod.", bare(state)),
    "model.": lambda state: under("model.", bare(state)),
    "model.network.": lambda state: under("model.", state),
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **under("module.", state)},
    "only EMA": lambda state: {**under("ema.", state), "ema.decay": torch.tensor(0.999)},
    "plain and EMA": lambda state: {
        **state,
        **under("ema.", other(state)),
        "ema.shadow": torch.ones(3),
    },
    "plain and EMA dicts": lambda state: {"model": bare(state), "ema": bare(other(state))},
    "Lightning's averaging": lambda state: {
        "state_dict": state,
        "current_model_state": other(state),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
}

WITH_KEY: dict[str, tuple[str, Callable[[State], dict[str, Any]]]] = {
    "names": ("ema", lambda state: {**other(state), **under("ema.", state)}),
    "bare names": (
        "ema",
        lambda state: {**bare(other(state)), **under("ema.module.", bare(state))},
    ),
    "parameters": ("ema", lambda state: {**other(state), **under("ema.", parameters(state))}),
    "dicts": ("ema", lambda state: {"model": bare(other(state)), "ema": bare(state)}),
    "the plain dict": ("model", lambda state: {"model": bare(state), "ema": bare(other(state))}),
    "beside a state_dict": ("ema_weights", lambda s: {"state_dict": other(s), "ema_weights": s}),
    "one of two": ("student", lambda s: {"student": bare(s), "teacher": bare(other(s))}),
    "two plain ones": ("module", lambda s: {**other(s), **under("module.", s)}),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("expected") / "out"
    converter.convert(NAME, output, verify=False)
    return output


def convert(content: dict[str, Any], folder: Path, **options: Any) -> converter.Conversion:
    torch.save(content, folder / "weights.pth")
    return converter.convert(
        NAME, folder / "out", delta=str(folder / "weights.pth"), verify=False, **options
    )


def assert_same_model(found: Path, expected: Path) -> None:
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert sha256(found / name) == sha256(expected / name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bytes(form: str, tmp_path: Path, expected: Path) -> None:
    conversion = convert(FORMS[form](recorded_delta(NAME)), tmp_path)

    assert_same_model(tmp_path / "out", expected)
    assert conversion.notes()


@pytest.mark.parametrize("form", WITH_KEY)
def test_a_key_chooses_a_copy(form: str, tmp_path: Path, expected: Path) -> None:
    key, make = WITH_KEY[form]
    convert(make(recorded_delta(NAME)), tmp_path, state_key=key)
    history = read_history(tmp_path / "out")

    assert_same_model(tmp_path / "out", expected)
    assert history is not None
    assert history.state_key == key
    assert f"--state-key {key}" in history.command


def test_absolute_weights_may_have_any_form(tmp_path: Path, expected: Path) -> None:
    conversion = convert(under("module.", bare(absolute(NAME))), tmp_path)

    assert conversion.inputs.weights == "absolute"
    assert_same_model(tmp_path / "out", expected)


def test_transformers_names_may_have_a_prefix_in_one_file_or_in_shards(
    tmp_path: Path, expected: Path
) -> None:
    state = load_file(expected / "model.safetensors")
    (tmp_path / "source").mkdir()
    save_file(under("module.", state), tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_bytes((expected / "config.json").read_bytes())
    whole, shards = tmp_path / "source", sharded(tmp_path / "source", tmp_path / "shards")
    for number, source in enumerate((whole, shards)):
        output = tmp_path / str(number)
        converter.convert(
            output=output, delta=str(source), task="panoptic", image_size=64, verify=False
        )
        assert sha256(output / "model.safetensors") == sha256(expected / "model.safetensors")


def test_verify_finds_the_copy_that_was_converted(tmp_path: Path) -> None:
    delta = recorded_delta(NAME)
    convert({**other(delta), **under("ema.", delta)}, tmp_path, state_key="ema")

    verdict = converter.verify(
        tmp_path / "out",
        recorded=FIXTURES / NAME,
        delta=str(tmp_path / "weights.pth"),
        backbone=str(FIXTURES / NAME / "backbone"),
    )

    assert verdict.verdict == "passed"
    assert {level.level: level.status for level in verdict.levels}["arithmetic"] == "passed"


def test_tensors_of_other_copies_are_listed_as_dropped(tmp_path: Path) -> None:
    delta = recorded_delta(NAME)
    conversion = convert({**delta, **under("ema.", delta)}, tmp_path)

    dropped = {str(entry.operand) for entry in conversion.plan.dropped}
    assert {f"delta:ema.{name}" for name in delta} <= dropped


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda s: {**s, **under("module.", s)}, ("network.q.weight", "module.network.q.weight")),
        (lambda s: {"a": bare(s), "b": bare(s)}, ("a.q.weight", "b.q.weight")),
        (
            lambda s: {
                name if "encoder" in name else f"module.{name}": values
                for name, values in s.items()
            },
            ("module.network.q.weight", "network.encoder"),
        ),
        (
            lambda s: {
                name if "encoder" in name else name.removeprefix("network."): values
                for name, values in s.items()
            },
            (" attn_mask_probs", "network.encoder"),
        ),
        (lambda s: {**s, "q.weight": s["network.q.weight"]}, ("network.q.weight", " q.weight")),
    ],
)
def test_mixed_or_ambiguous_names_are_an_error_that_names_both(
    content: Callable[[State], dict[str, Any]], named: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as refused:
        convert(content(recorded_delta(NAME)), tmp_path)

    for name in named:
        assert name in refused.value.message
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_is_refused_with_those_in_the_file(tmp_path: Path) -> None:
    delta = recorded_delta(NAME)
    with pytest.raises(UsageError, match="'averaged'") as refused:
        convert({"model": delta, "ema": delta}, tmp_path, state_key="averaged")

    assert refused.value.remedy == "The file has weights under ema, model."


@pytest.mark.parametrize("prefix", ["module.", "ema."])
def test_a_name_that_no_layout_has_is_refused_as_it_is_in_the_file(
    prefix: str, tmp_path: Path
) -> None:
    delta = under(prefix, {**recorded_delta(NAME), "network.adapter.weight": torch.ones(2)})
    with pytest.raises(PlanError, match=rf"{prefix}network\.adapter\.weight \[2\] .* unexpected"):
        convert(delta, tmp_path)


def test_the_plan_and_the_report_say_how_names_were_read(
    tmp_path: Path, command: Callable[..., Result]
) -> None:
    delta = recorded_delta(NAME)
    torch.save({**under("module.", delta), **under("ema.", delta)}, tmp_path / "weights.pth")
    notes = [
        "names such as module.network.q.weight are read as network.q.weight",
        "the file also holds weights under ema; --state-key ema converts them",
    ]
    options = ("--checkpoint", NAME, "--delta", tmp_path / "weights.pth")

    for more in (["--dry-run"], ["--no-verify"]):
        lines = command(*options, *more).stdout.splitlines()
        assert [line for line in lines if line.startswith("note")] == [
            f"note      {note}" for note in notes
        ]
    assert json.loads(command(*options, "--dry-run", "--json").stdout)["notes"] == notes
    inspected = command("inspect", tmp_path / "weights.pth").stdout.splitlines()
    assert inspected[-2:] == [f"note        {note}" for note in notes]
    assert "layout      eomt-tue: EoMT weights in TU/e's layout" in inspected


def test_inspect_shows_a_file_whose_weights_are_ambiguous(
    tmp_path: Path, command: Callable[..., Result]
) -> None:
    delta = recorded_delta(NAME)
    torch.save({"a": delta, "b": delta}, tmp_path / "weights.pth")

    result = command("inspect", tmp_path / "weights.pth")

    assert result.exit_code == 0
    assert "It is ambiguous which weights to convert" in result.stdout
