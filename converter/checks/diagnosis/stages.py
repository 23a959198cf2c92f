"""Cuts the network into stages; each is run on the recorded output of the stage before.

A fault early in a network affects everything after it. A stage that starts from recorded values
shows only its own faults, and is cheap to run again with something changed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from converter.checks.comparison import FLOAT32, RIGHT
from converter.checks.pixels import Normalisation
from converter.checks.recorded import Recorded
from converter.models import build_model
from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation
from reference_model.backbone import Layer, RotaryEmbedding
from reference_model.masked_attention import attention_mask

# Largest difference of a correct stage, as a share of the largest recorded value. 1.1e-6 was
# measured (benchmarks/tolerances.py); STAGE_RIGHT is that with a small margin.
STAGE_TOLERANCE = 5e-6
STAGE_RIGHT = 1.5e-6

PATCH_WEIGHT = "embeddings.patch_embeddings.weight"


class Skeleton:
    """The modules of a configuration without weights, each made when it is needed."""

    def __init__(self, config: EomtDinov3Config) -> None:
        self.config = config

    @cached_property
    def model(self) -> EomtDinov3ForUniversalSegmentation:
        """The whole network."""
        with torch.device("meta"):
            return EomtDinov3ForUniversalSegmentation(self.config).eval()

    @cached_property
    def layer(self) -> Layer:
        """A layer; all layers have the same structure."""
        with torch.device("meta"):
            return Layer(self.config).eval()

    @cached_property
    def rope(self) -> RotaryEmbedding:
        """The rotary positions, which have no weights."""
        return RotaryEmbedding(self.config).eval()

    def module(self, name: str) -> nn.Module:
        """The module that a name means, such as ``layers.2.mlp`` or ``mask_head``."""
        if name.startswith("layers."):
            _, _, inner = name.removeprefix("layers.").partition(".")
            return self.layer.get_submodule(inner)
        if name == "layernorm":
            return self.layer.norm1  # it has the same structure
        return self.model.get_submodule(name)


@dataclass(frozen=True)
class Network:
    """Everything that decides what a model computes.

    Attributes:
        skeleton: its configuration, and the modules built from it.
        weights: its tensors by canonical name, float32.
        normalisation: how pixels are rescaled and normalised.
    """

    skeleton: Skeleton
    weights: Mapping[str, Tensor]
    normalisation: Normalisation

    @property
    def config(self) -> EomtDinov3Config:
        """The model's configuration."""
        return self.skeleton.config

    def with_weights(self, changed: Mapping[str, Tensor]) -> "Network":
        """The network with other values in some tensors."""
        return replace(self, weights={**self.weights, **changed})

    def with_config(self, **changed: Any) -> "Network":
        """The network with other values in config.json.

        Raises:
            ValueError: a value is not possible.
        """
        return replace(self, skeleton=Skeleton(replace(self.config, **changed)))

    def with_normalisation(self, normalisation: Normalisation) -> "Network":
        """The network with other values in preprocessor_config.json."""
        return replace(self, normalisation=normalisation)

    def run(self, pixels: Tensor) -> dict[str, Tensor]:
        """Outputs of the whole network, by the names of recorded tensors.

        Args:
            pixels: (batch, channels, height, width) uint8.
        """
        with torch.inference_mode():
            output = functional_call(
                self.skeleton.model,
                dict(self.weights),
                (self.normalisation(pixels),),
                {"output_hidden_states": True},
                tie_weights=False,  # there are none, and looking for them is slow
            )
        return named_outputs(output)

    def build(self) -> EomtDinov3ForUniversalSegmentation:
        """A model with these weights."""
        return build_model(self.config, self.weights)

    def call(self, module: str, *args: Any) -> Tensor:
        """Runs one module of the network, by its name."""
        prefix = f"{module}."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.weights.items()
            if name.startswith(prefix)
        }
        output: Tensor = functional_call(
            self.skeleton.module(module), weights, args, tie_weights=False
        )
        return output

    def step(self, module: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Runs one part of the network.

        Args:
            module: as in `Stage.modules`.
            x: pixels (batch, channels, height, width) uint8 for ``embeddings``, else tokens
                (batch, tokens, hidden).
            grid: rows and columns of patches.
        """
        queries = self.config.num_queries
        if module == "rope":
            return torch.cat(self.rope(grid), dim=-1)
        if module == "embeddings":
            return self.call(module, self.normalisation(x))
        if module == "class_predictor":
            return self.call(module, x[:, :queries])
        if module == "masks":
            patches = x[:, queries + self.config.num_prefix_tokens :]
            pixels = self.call("upscale_block", patches.mT.reshape(x.shape[0], -1, *grid))
            return torch.einsum("bqc,bchw->bqhw", self.call("mask_head", x[:, :queries]), pixels)
        if module == "layernorm":
            return self.call(module, x)
        block = int(module.removeprefix("layers.")) - first_block(self.config)
        if block == 0:
            x = torch.cat((self.weights["query.weight"].expand(len(x), -1, -1), x), dim=1)
        mask = None
        if block >= 0 and (probability := float(self.weights["attn_mask_probs"][block])) > 0:
            logits = self.step("masks", self.call("layernorm", x), grid)
            mask = attention_mask(logits, grid, self.config.num_prefix_tokens, probability)
        return self.call(module, x, self.rope(grid), mask)

    def rope(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every patch's angles, each (patches, head size)."""
        cos, sin = self.skeleton.rope(grid, torch.float32, torch.device("cpu"))
        return cos, sin


def named_outputs(output: Any) -> dict[str, Tensor]:
    """A model's outputs, and hidden states if it has any, by the names of recorded tensors."""
    states = output.hidden_states or ()
    names = ("patch_embeddings", *(f"hidden_states.{layer}" for layer in range(len(states) - 1)))
    return {
        **dict(zip(names, states, strict=False)),
        "last_hidden_state": output.last_hidden_state,
        "class_logits": output.class_queries_logits,
        "mask_logits": output.masks_queries_logits,
    }


def first_block(config: EomtDinov3Config) -> int:
    """The first layer that sees the queries."""
    return config.num_hidden_layers - config.num_blocks


@dataclass(frozen=True)
class Stage:
    """A part of the network between two recorded points.

    Attributes:
        name: name of the recorded tensor at its end.
        modules: the parts it consists of: ``rope``, ``embeddings``, ``layers.N``, ``layernorm``,
            then ``class_predictor`` or ``masks`` (mask head and upscaling).
        start: its input, as `Network.step` takes it.
        end: its recorded output.
        grid: rows and columns of patches.
        tolerance: largest difference that is allowed.
        right: largest difference that correct networks were measured to have.
        mean_square: whether differences are root mean squares instead of largest values.
    """

    name: str
    modules: tuple[str, ...]
    start: Tensor
    end: Tensor
    grid: tuple[int, int]
    tolerance: float
    right: float
    mean_square: bool = False

    def run(self, network: Network) -> Tensor:
        """A network's output at the end of the stage."""
        x = self.start
        with torch.inference_mode():
            for module in self.modules:
                x = network.step(module, x, self.grid)
        return x[: len(self.end)]

    def difference(self, network: Network) -> float:
        """How far a network is off; infinite if the difference is NaN or shapes differ."""
        output = self.run(network)
        if output.shape != self.end.shape:
            return math.inf
        difference = (output - self.end).abs()
        found = difference.double().square().mean().sqrt() if self.mean_square else difference.max()
        return float(found) if math.isfinite(found) else math.inf

    def is_right(self, network: Network) -> bool:
        """Whether a network is off by no more than correct ones are."""
        return self.difference(network) <= self.right

    def tensors(self, network: Network) -> list[str]:
        """The tensors of a network that this stage uses."""
        prefixes = tuple(
            prefix for module in self.modules for prefix in _prefixes(module, network.config)
        )
        return [name for name in network.weights if name.startswith(prefixes)]


def _prefixes(module: str, config: EomtDinov3Config) -> tuple[str, ...]:
    if module == "masks":
        return ("mask_head.", "upscale_block.")
    if module == f"layers.{first_block(config)}":
        return ("query.", f"{module}.")
    return (f"{module}.",)


def cut(recorded: Recorded, config: EomtDinov3Config) -> tuple[Stage, ...]:
    """Cuts the network at every point that was recorded, with tolerances for float32 weights.

    Args:
        recorded: the recording; where it lacks hidden states, stages are longer.
        config: the model's configuration.
    """
    pixels = recorded.pixels
    height, width = pixels.shape[-2:]
    grid = height // config.patch_size, width // config.patch_size
    found = recorded.tensors
    stages: list[Stage] = []

    def add(name: str, modules: Sequence[str], start: Tensor, end: Tensor) -> None:
        batch = min(len(start), len(end)) if tuple(modules) != ("rope",) else len(end)
        largest = float(end.abs().max())
        # errors add up over several modules
        right = STAGE_RIGHT * largest if len(modules) == 1 else RIGHT * FLOAT32.of(end)
        allowed = STAGE_TOLERANCE * largest
        stages.append(
            Stage(
                name,
                tuple(modules),
                start[:batch],
                end[:batch],
                grid,
                allowed,
                min(right, allowed),
            )
        )

    if {"rope.cos", "rope.sin"} <= found.keys():
        rope = torch.cat((found["rope.cos"], found["rope.sin"]), dim=-1)
        add("rope", ("rope",), pixels, rope)
    trunk = [("embeddings", "patch_embeddings")]
    trunk += [(f"layers.{i}", f"hidden_states.{i}") for i in range(config.num_hidden_layers)]
    trunk += [("layernorm", "last_hidden_state")]
    start, modules = pixels, []
    for module, name in trunk:
        modules.append(module)
        if name in found:
            add(name, modules, start, found[name])
            start, modules = found[name], []
    for module, name in (("class_predictor", "class_logits"), ("masks", "mask_logits")):
        add(name, [*modules, module], start, found[name])
    return tuple(stages)
