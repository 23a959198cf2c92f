"""``eomt-convert verify``."""

import sys
from pathlib import Path
from typing import Any, Literal, get_args

import click

from converter.cli.session import (
    SOURCE,
    CompilingCommand,
    Session,
    common_options,
    compile_option,
    hub_options,
    report_option,
    threads_option,
)
from converter.configs import Dtype
from converter.errors import NotVerifiedError, OutputsDifferError, UsageError
from converter.models import Compile

# options that mean something without a model
_WITHOUT_MODEL = (
    *("outputs", "recorded", "report", "require_verified"),
    *("token", "cache_dir", "offline", "as_json", "debug"),
)


class OutputNames(click.ParamType[tuple[str, str]]):
    """Two names with a comma between them."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        masks, comma, classes = str(value).partition(",")
        if not (masks and comma and classes) or "," in classes or masks == classes:
            self.fail(f"{value!r} is not of the form MASKS,CLASSES", param, ctx)
        return masks, classes


@click.command("verify", cls=CompilingCommand)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--outputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="In place of MODEL: outputs that another program computed, as .npz or .safetensors with "
    "mask_logits and class_logits (or masks_queries_logits and class_queries_logits), and any of "
    "patch_embeddings, hidden_states.N and last_hidden_state. Needs --recorded.",
)
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    help="Recorded outputs: a folder, or its recorded.safetensors. [default: those in the model's "
    "folder, or that come with an offline checkpoint]",
)
@click.option(
    "--delta",
    metavar=SOURCE,
    help="The delta it was made from. [default: the one in conversion.json, from the cache]",
)
@click.option(
    "--backbone",
    metavar=SOURCE,
    help="The backbone it was made from, with the same default; if given, it is run alone, too.",
)
@click.option(
    "--against",
    type=click.Choice(["transformers"]),
    help="Another implementation to compare with, layer by layer.",
)
@click.option(
    "--level",
    type=click.IntRange(1, 5),
    default=5,
    show_default=True,
    help="Check up to this level: 1 structure, 2 arithmetic, 3 numbers, 4 peers, 5 published; from "
    "4 on also the recorded pictures.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    help="The picture that published outputs were recorded on. [default: downloaded]",
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    default="float32",
    show_default=True,
    help="Type to compute in: what it costs.",
)
@compile_option
@threads_option
@click.option(
    "--model",
    "made_from",
    metavar="MODEL",
    help="For an export: the model that was exported. [default: known from conversion.json]",
)
@click.option(
    "--provider",
    "providers",
    metavar="NAME[,NAME]",
    default="",
    help="For ONNX: execution providers of onnxruntime, best first, by its names or cpu, cuda, "
    "cuda:1 (the GPU with this number), tensorrt, openvino, coreml. [default: cpu]",
)
@click.option("--input-name", metavar="NAME", help="For ONNX: the input, if not recognised.")
@click.option(
    "--output-names",
    type=OutputNames(),
    metavar="MASKS,CLASSES",
    help="For ONNX: the outputs, if not recognised.",
)
@report_option
@click.option(
    "--save-inputs",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.npz",
    help="Also write the model's normalised input for the recorded pixels, as pixel_values. What "
    "another program computes from it is checked with --outputs.",
)
@click.option(
    "--require-verified",
    is_flag=True,
    help="Fail unless the model, or its outputs, are proven right.",
)
@hub_options
@common_options
@click.pass_context
def verify_command(
    context: click.Context,
    /,
    model: str | None,
    outputs: Path | None,
    recorded: Path | None,
    delta: str | None,
    backbone: str | None,
    against: Literal["transformers"] | None,
    level: int,
    image: Path | None,
    device: str,
    dtype: Dtype,
    compile: Compile | None,
    threads: int | None,
    made_from: str | None,
    providers: str,
    input_name: str | None,
    output_names: tuple[str, str] | None,
    report: Path | None,
    save_inputs: Path | None,
    require_verified: bool,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Check a model, and look for the cause if it is wrong.

    MODEL is a folder, a repository, the folder of an export, or an .onnx or .pt2 file.

    With --outputs, check only what another program computed for the recorded pixels, within the
    tolerance of float32.

    Exit codes: 0 passed or unverified (1 with --require-verified), 3 failed, 1 unreadable.
    """
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter.checks.outputs import verify_outputs
        from converter.checks.verification import verify
        from converter.report import verdict

        if outputs is not None:
            _check_usage(context)
            if recorded is None:
                raise UsageError("--outputs needs --recorded PATH, to compare the outputs with.")
            found = verify_outputs(outputs, recorded=recorded, report=report)
        elif model is None:
            raise UsageError("Nothing to verify was named.", "Give MODEL or --outputs FILE.")
        else:
            found = verify(
                model,
                recorded=recorded,
                delta=delta,
                backbone=backbone,
                against=against,
                level=level,
                image=image,
                device=device,
                dtype=dtype,
                compile=compile,
                made_from=made_from,
                providers=providers,
                input_name=input_name,
                output_names=output_names,
                threads=threads,
                report=report,
                save_inputs=save_inputs,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
            )
        session.show(verdict(found), found.to_dict())
        if found.verdict == "failed":
            sys.exit(OutputsDifferError.exit_code)
        if require_verified and not found.proven:
            session.say(f"Error: --require-verified was given: {found.shortfall}")
            sys.exit(NotVerifiedError.exit_code)


def _check_usage(context: click.Context) -> None:
    """Checks that nothing was given beside --outputs that needs a model.

    Raises:
        UsageError: MODEL or such an option was given.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is click.core.ParameterSource.COMMANDLINE and (
            parameter.name not in _WITHOUT_MODEL
        ):
            name = "MODEL" if parameter.name == "model" else parameter.opts[0]
            raise UsageError(
                f"{name} contradicts --outputs: outputs are checked without a model.",
                "Leave one of the two out.",
            )
