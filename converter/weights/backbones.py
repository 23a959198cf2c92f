"""The published DINOv3 backbones: what their shapes do not show, and what is known of their files.

Data from github.com/facebookresearch/dinov3 (README.md, hubconf.py) and, for the recorded outputs,
huggingface/transformers models/dinov3_vit/convert_dinov3_vit_to_hf.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from converter.errors import PlanError
from converter.weights.layouts import Translation, split_number
from reference_model.config import Dinov3Config


@dataclass(frozen=True)
class RecordedOutputs:
    """The first five values of two tokens after the final norm, in float32.

    The input is `converter.hub.recorded_picture` as float pixels, resized to 224x224 with
    antialiased bilinear interpolation and normalised with ImageNet's statistics.

    Attributes:
        cls: of the class token.
        patch0: of the first patch.
    """

    cls: tuple[float, ...]
    patch0: tuple[float, ...]


@dataclass(frozen=True)
class KnownBackbone:
    """One architecture of DINOv3.

    Attributes:
        name: Meta's name for it.
        title: its name in a sentence.
        hidden_size, num_hidden_layers, use_gated_mlp: the values by which it is recognised.
        num_attention_heads: the shapes do not show it.
        query_value_bias: whether queries and values have biases; a file may leave out biases that
            are all zeros.
        meta_files: Meta's names of its files, by the data it was trained on; the eight digits
            before .pth are the first of the file's SHA-256.
        outputs: the outputs of the weights that were trained on lvd1689m.
    """

    name: str
    title: str
    hidden_size: int
    num_hidden_layers: int
    use_gated_mlp: bool
    num_attention_heads: int
    query_value_bias: bool
    meta_files: Mapping[str, str]
    outputs: RecordedOutputs

    @property
    def size(self) -> tuple[int, int, bool]:
        """(hidden size, layers, gated MLP): different for every architecture."""
        return self.hidden_size, self.num_hidden_layers, self.use_gated_mlp


KNOWN_BACKBONES: tuple[KnownBackbone, ...] = (
    KnownBackbone(
        name="vits16",
        title="ViT-S",
        hidden_size=384,
        num_hidden_layers=12,
        use_gated_mlp=False,
        num_attention_heads=6,
        query_value_bias=True,
        meta_files={"lvd1689m": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"},
        outputs=RecordedOutputs(
            cls=(
                0.4635618329048157,
                -0.41560935974121094,
                0.40823689103126526,
                -0.12661336362361908,
                -0.28663691878318787,
            ),
            patch0=(
                -0.03875422105193138,
                -0.2508954405784607,
                -0.01639290526509285,
                -0.4554736316204071,
                0.5715821981430054,
            ),
        ),
    ),
    KnownBackbone(
        name="vits16plus",
        title="ViT-S+",
        hidden_size=384,
        num_hidden_layers=12,
        use_gated_mlp=True,
        num_attention_heads=6,
        query_value_bias=True,
        meta_files={"lvd1689m": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth"},
        outputs=RecordedOutputs(
            cls=(
                -0.47134941816329956,
                -1.365778923034668,
                -0.3179832398891449,
                0.37721940875053406,
                -0.769085705280304,
            ),
            patch0=(
                0.14455188810825348,
                -0.3881174623966217,
                -0.39343395829200745,
                -0.1576954871416092,
                -0.6003801226615906,
            ),
        ),
    ),
    KnownBackbone(
        name="vitb16",
        title="ViT-B",
        hidden_size=768,
        num_hidden_layers=12,
        use_gated_mlp=False,
        num_attention_heads=12,
        query_value_bias=True,
        meta_files={"lvd1689m": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth"},
        outputs=RecordedOutputs(
            cls=(
                1.0346431732177734,
                -0.18060928583145142,
                -0.3410182595252991,
                -0.0663769543170929,
                -0.011383970268070698,
            ),
            patch0=(
                -0.08252374082803726,
                -0.45627278089523315,
                -0.7280299663543701,
                -0.4306802451610565,
                -0.15288019180297852,
            ),
        ),
    ),
    KnownBackbone(
        name="vitl16",
        title="ViT-L",
        hidden_size=1024,
        num_hidden_layers=24,
        use_gated_mlp=False,
        num_attention_heads=16,
        query_value_bias=True,
        meta_files={
            "lvd1689m": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
            "sat493m": "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth",
        },
        outputs=RecordedOutputs(
            cls=(
                0.4845271110534668,
                -0.5822147130966187,
                0.4806361198425293,
                0.5920403599739075,
                0.9451664686203003,
            ),
            patch0=(
                -0.2113673835992813,
                -0.490863561630249,
                -0.2571314871311188,
                0.10176393389701843,
                0.1545112431049347,
            ),
        ),
    ),
    KnownBackbone(
        name="vith16plus",
        title="ViT-H+",
        hidden_size=1280,
        num_hidden_layers=32,
        use_gated_mlp=True,
        num_attention_heads=20,
        query_value_bias=True,
        meta_files={"lvd1689m": "dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth"},
        outputs=RecordedOutputs(
            cls=(
                -0.0645759105682373,
                -0.14886680245399475,
                -0.6215243935585022,
                0.6348787546157837,
                0.1526956558227539,
            ),
            patch0=(
                -0.09381738305091858,
                0.287407249212265,
                -0.05003691464662552,
                0.4280431866645813,
                0.09456184506416321,
            ),
        ),
    ),
    KnownBackbone(
        name="vit7b16",
        title="ViT-7B",
        hidden_size=4096,
        num_hidden_layers=40,
        use_gated_mlp=True,
        num_attention_heads=32,
        query_value_bias=False,
        meta_files={
            "lvd1689m": "dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth",
            "sat493m": "dinov3_vit7b16_pretrain_sat493m-a6675841.pth",
        },
        outputs=RecordedOutputs(
            cls=(
                0.2754395306110382,
                -0.261353999376297,
                0.0677720308303833,
                0.049936190247535706,
                -0.15874707698822021,
            ),
            patch0=(
                0.04444204643368721,
                -0.05254213139414787,
                0.07077747583389282,
                -0.0651116818189621,
                -0.026546532288193703,
            ),
        ),
    ),
)


def find_backbone(size: tuple[int, int, bool]) -> KnownBackbone | None:
    """The published architecture of a size like `KnownBackbone.size`; None if there is none."""
    return next((known for known in KNOWN_BACKBONES if known.size == size), None)


def size_of(weights: Translation) -> tuple[int, int, bool]:
    """(hidden size, layers, gated MLP), by names and shapes of tensors; zeros if there are none."""
    norm = weights.shape("layernorm.weight") or (0,)
    layers = {split_number(name)[1] for name in weights.parts if name.startswith("layers.")}
    gated = any(name.endswith("mlp.gate_proj.weight") for name in weights.parts)
    return norm[0], len(layers), gated


def size_in(config: Dinov3Config) -> tuple[int, int, bool]:
    """(hidden size, layers, gated MLP) by a configuration."""
    return config.hidden_size, config.num_hidden_layers, config.use_gated_mlp


def describe(size: tuple[int, int, bool]) -> str:
    """A size in words, with its name if it has one."""
    hidden, layers, gated = size
    known = find_backbone(size)
    title = known.title if known else "a model"
    return f"{title} ({hidden} wide, {layers} layers{', gated' if gated else ''})"


def config_from_shapes(weights: Translation) -> Dinov3Config:
    """The configuration of a backbone that comes without a config.json.

    Sizes are read from the shapes; the number of heads and the biases are those of the published
    architecture of this size. Rotary base and epsilon are the same in all architectures.

    Raises:
        PlanError: no published architecture has this size, or tensors that show sizes are missing.
    """
    known = find_backbone(size_of(weights))
    if known is None:
        raise PlanError(
            f"The backbone is {describe(size_of(weights))}; no published backbone has this size, "
            "and shapes do not show the number of heads.",
            "Give its config.json in transformers' format with --backbone-config.",
        )
    patches = weights.shape("embeddings.patch_embeddings.weight")
    registers = weights.shape("embeddings.register_tokens")
    mlp = weights.shape("layers.0.mlp.up_proj.weight")
    if patches is None or len(patches) != 4 or registers is None or len(registers) != 3 or not mlp:
        raise PlanError("The backbone lacks its patch embedding, register tokens or first layer.")
    return Dinov3Config(
        hidden_size=known.hidden_size,
        intermediate_size=mlp[0],
        num_hidden_layers=known.num_hidden_layers,
        num_attention_heads=known.num_attention_heads,
        patch_size=patches[2],
        num_channels=patches[1],
        num_register_tokens=registers[1],
        hidden_act="silu" if known.use_gated_mlp else "gelu",
        use_gated_mlp=known.use_gated_mlp,
        query_bias=known.query_value_bias,
        value_bias=known.query_value_bias,
    )


def published_repo(sha256: str) -> str | None:
    """The repository with a file of Meta's in transformers' layout; None if the file is unknown.

    Args:
        sha256: of the file. Meta's file names contain its first digits.
    """
    for known in KNOWN_BACKBONES:
        for data, name in known.meta_files.items():
            if sha256.startswith(name.removesuffix(".pth").rpartition("-")[2]):
                return f"facebook/dinov3-{known.name}-pretrain-{data}"
    return None
