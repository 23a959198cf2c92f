"""The command: what it prints, and how it ends."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import FIXTURES, HANGS
from hub_server import Hub

from converter.checks.verdict import LEVELS

TINY = FIXTURES / "tiny_panoptic_64"

Command = Callable[..., Result]

DELTA = str(TINY / "delta")

RUN = "from converter.cli import main; main()"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_summary_says_what_was_read_done_and_found(command: Command, tmp_path: Path) -> None:
    result = command("--checkpoint", "shapes_panoptic_128")

    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("backbone  ")
    assert lines[0].endswith("/model.safetensors (2.77 MB)")
    assert lines[1].startswith("delta     ")
    assert lines[1].endswith("/pytorch_model.bin (3.08 MB)")
    assert "tensors   124: 108 added, 15 copied, 1 filled; 122 of them renamed" in lines
    assert "dropped   backbone:embeddings.mask_token: only masked image modelling uses it" in lines
    assert "output    ./shapes_panoptic_128 (3.36 MB)" in lines
    assert "verdict   passed" in lines
    assert "numbers    passed: tolerance 0.0002 or 1e-05 of the range, largest" in result.stdout
    assert names(tmp_path) == ["shapes_panoptic_128"]


def test_the_summary_says_that_transformers_builds_square_models_only(command: Command) -> None:
    assert (
        "transformers only builds square models"
        in command("--checkpoint", "tiny_panoptic_48x80").stdout
    )
    assert "transformers" not in command("--checkpoint", "tiny_panoptic_64").stdout


def test_json_is_one_object_and_nothing_else(command: Command) -> None:
    result = command("--checkpoint", "tiny_panoptic_64", "--output", "out", "--json")

    content = json.loads(result.stdout)
    assert content["verdict"] == "passed"
    assert [level["level"] for level in content["levels"]] == list(LEVELS)
    assert content["plan"]["counts"]["added"] == 74
    assert content["output"].endswith("/out")
    assert content["files"]["model.safetensors"]["size"] == 1201504


def test_a_dry_run_prints_the_plan(command: Command, tmp_path: Path) -> None:
    result = command("--checkpoint", "tiny_panoptic_64", "--dry-run")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 95 + 4
    norm = next(line for line in lines if line.startswith("layernorm.bias "))
    assert norm.split(maxsplit=3)[1:] == [
        "64",
        "F32",
        "backbone:norm.bias + delta:network.encoder.backbone.norm.bias",
    ]
    assert names(tmp_path) == []


def test_a_dry_run_prints_the_plan_as_json_too(command: Command) -> None:
    content = json.loads(command("--checkpoint", "tiny_panoptic_64", "--dry-run", "--json").stdout)

    rows = {row["name"]: row for row in content["plan"]["rows"]}
    assert rows["attn_mask_probs"]["recipe"] == "zeros"
    assert len(rows) == 95
    assert content["verdict"] == "unverified"


def test_a_users_own_files_are_converted_and_verified(command: Command, tmp_path: Path) -> None:
    result = command(
        *("--delta", TINY / "delta" / "pytorch_model.bin", "--backbone", TINY / "backbone"),
        *("--task", "panoptic", "--image-size", "64x64", "--output", "mine"),
        *("--recorded", TINY),
    )

    assert result.exit_code == 0
    assert "verdict   passed" in result.stdout


@pytest.mark.parametrize("size", ["0", "64x", "x64", "64x64x64", "-64", "big"])
def test_a_malformed_image_size_is_wrong_usage(command: Command, size: str) -> None:
    result = command("--checkpoint", "tiny_panoptic_64", f"--image-size={size}")

    assert result.exit_code == 2
    assert "HEIGHTxWIDTH" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing to convert"),
        (["--checkpoint", "coco_panoptic_lage_640"], 2, "Did you mean coco_panoptic_large_640"),
        (["--nonsense"], 2, "No such option"),
        (["--delta", "x.bin"], 2, "--output must be given"),
        (["--delta", DELTA, "--output", "o"], 2, "--backbone and --task and --image-size must"),
        (["--json", "list"], 2, "Options of list go after its name"),
        (["--checkpoint", "tiny_panoptic_64", "--delta", "x.bin"], 1, "no file or folder x.bin"),
        (["--checkpoint", "tiny_panoptic_64", "--output", "/dev/null"], 1, "is a file"),
        (["--checkpoint", "tiny_panoptic_64", "--output", "/dev/null/out"], 1, "cannot be written"),
        (["verify", "."], 1, "has no preprocessor_config.json"),
        (["inspect", "nothing.bin"], 1, "no file or folder nothing.bin"),
        (["inspect", "nothing"], 2, "nor a repository of the form owner/name"),
    ],
)
def test_exit_codes_and_messages(
    command: Command, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    result = command(*arguments)

    assert result.exit_code == code
    assert said in result.stderr.replace("\n", " ")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == []


def test_outputs_that_differ_end_in_3_and_leave_nothing(command: Command, tmp_path: Path) -> None:
    recorded = FIXTURES / "tiny_semantic_48"
    result = command("--checkpoint", "tiny_panoptic_64", "--recorded", recorded, "--json")

    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert content["verdict"] == "failed"
    assert content["error"]["exit_code"] == 3
    assert "--keep-unverified" in result.stderr
    assert "numbers    failed: no tensor can be compared" in result.stderr
    assert names(tmp_path) == []


def test_a_failing_model_is_kept_on_request(command: Command, tmp_path: Path) -> None:
    recorded = FIXTURES / "tiny_semantic_48"
    result = command(
        "--checkpoint", "tiny_panoptic_64", "--recorded", recorded, "--keep-unverified"
    )

    assert result.exit_code == 3
    assert names(tmp_path) == ["tiny_panoptic_64.unverified"]


def test_a_gated_repository_ends_in_4_with_directions(command: Command, hub: Hub) -> None:
    for repo in (
        "tue-mps/coco_panoptic_eomt_small_640_dinov3",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
    ):
        hub.create_repo(repo, {"config.json": b"{}", "pytorch_model.bin": b""}, gated=True)

    result = command("--checkpoint", "coco_panoptic_small_640", "--token", "hf_secret", "--debug")

    assert result.exit_code == 4
    assert "hf auth login" in result.stderr
    assert "Traceback" in result.stderr
    assert "hf_secret" not in result.output


def test_a_token_that_got_into_a_message_is_not_shown(command: Command) -> None:
    result = command(
        *("--checkpoint", "tiny_panoptic_64", "--delta", "hf_secret.bin", "--token", "hf_secret"),
        *("--json", "--debug"),
    )

    assert result.exit_code == 1
    assert "[token].bin" in result.stderr
    assert "hf_secret" not in result.output


def test_what_is_not_in_the_cache_ends_in_4_when_offline(command: Command, hub: Hub) -> None:
    result = command("--checkpoint", "coco_panoptic_small_640", "--offline", "--json")

    assert result.exit_code == 4
    assert "not in the cache" in result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == 4
    assert hub.requests == []


def test_an_output_that_exists_is_kept_unless_forced(command: Command) -> None:
    assert command("--checkpoint", "tiny_panoptic_64").exit_code == 0
    assert command("--checkpoint", "tiny_panoptic_64").exit_code == 1
    assert command("--checkpoint", "tiny_panoptic_64", "--force").exit_code == 0


def test_a_required_check_that_cannot_be_made_ends_in_1(command: Command) -> None:
    result = command("--checkpoint", "coco_panoptic_small_640", "--require-verified")

    assert result.exit_code == 1
    assert "no recorded outputs" in result.stderr


def test_the_catalogue_is_listed(command: Command) -> None:
    result = command("list")

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1 + 7 + 5
    assert "PQ 58.9" in result.stdout


def test_the_catalogue_is_listed_as_json(command: Command) -> None:
    entries = json.loads(command("list", "--json").stdout)["checkpoints"]

    large = next(entry for entry in entries if entry["name"] == "coco_panoptic_large_640")
    assert large["delta"] == "tue-mps/coco_panoptic_eomt_large_640_dinov3"
    assert large["metric"] == {"dataset": "COCO panoptic val2017", "name": "PQ", "value": 56.8}


def test_a_file_is_inspected(command: Command) -> None:
    result = command("inspect", TINY / "delta")

    assert result.exit_code == 0
    assert "network.q.weight" in result.stdout
    assert "weights     delta" in result.stdout
    assert "eomt-tue" in result.stdout


def test_a_file_is_inspected_as_json(command: Command) -> None:
    content = json.loads(command("inspect", TINY / "backbone", "--json").stdout)

    assert (content["layout"], content["weights"]) == ("dinov3-transformers", "absolute")
    assert content["tensors"]["norm.bias"] == {"dtype": "F32", "shape": [64]}


def test_a_repository_is_inspected(command: Command, hub: Hub) -> None:
    hub.create_repo("tue-mps/delta", {"pytorch_model.bin": TINY / "delta" / "pytorch_model.bin"})

    assert "weights     delta" in command("inspect", "tue-mps/delta").stdout


def test_a_right_model_passes_verification(command: Command, model: Path) -> None:
    result = command("verify", model, "--recorded", TINY, "--json")

    assert result.exit_code == 0
    assert list(json.loads(result.stdout)) == [
        "verdict",
        "basis",
        "levels",
        "first_difference",
        "cause",
        "tried",
    ]
    assert json.loads(result.stdout)["verdict"] == "passed"


def test_changed_weights_end_in_3_with_figures(command: Command, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    state["class_predictor.bias"] += 1
    save_file(state, model / "model.safetensors")

    result = command("verify", model, "--recorded", TINY)

    assert result.exit_code == 3
    assert "class_logits 1" in result.stdout


def test_an_unverified_model_ends_in_0(command: Command, tmp_path: Path) -> None:
    command(
        *("--delta", TINY / "delta", "--backbone", TINY / "backbone", "--task", "panoptic"),
        *("--image-size", "64", "--output", "out"),
    )
    result = command("verify", "out", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["verdict"] == "unverified"


# in separate processes -------------------------------------------------------------------------


def start(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        cwd=folder,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_answers_without_importing_torch() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom converter.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_without_verification_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nimport converter\n"
        "converter.convert('tiny_panoptic_64', sys.argv[1], verify=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)


# Holds the run while it merges, so that it can be interrupted there.
SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have background jobs ignore
from converter.weights import merge
compute = merge.compute
def slow(row, *rest):
    if row.name == "layers.1.norm1.weight":
        print("merging", flush=True)
        time.sleep(3600)
    return compute(row, *rest)
merge.compute = slow
from converter.cli import main
main()
"""


def merging(folder: Path, program: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """A run in a folder that has reached the point where it is held."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--checkpoint", "tiny_panoptic_64", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "merging\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_an_interrupted_run_names_the_signal_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = merging(tmp_path, SLOW)
    assert [name.rpartition("-")[0] for name in names(tmp_path)] == [
        ".tiny_panoptic_64.eomt-convert"
    ]
    process.send_signal(number)
    _, stderr = process.communicate(timeout=HANGS)

    assert process.returncode == 128 + number
    assert "Interrupted" in stderr
    assert names(tmp_path) == []


def test_a_signal_that_arrives_in_a_finaliser_stops_the_run(tmp_path: Path) -> None:
    """Python drops what is raised there."""
    finaliser = "class Closed:\n    def __del__(self):\n"
    finaliser += "        print('merging', flush=True)\n        time.sleep(3600)\n"
    program = SLOW.replace("compute = merge.compute\n", f"compute = merge.compute\n{finaliser}")
    program = program.replace(
        '        print("merging", flush=True)\n        time.sleep(3600)\n', "        Closed()\n"
    )
    process = merging(tmp_path, program)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANGS)

    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_was_ignored_at_the_start_stops_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = merging(
        tmp_path,
        SLOW.replace("3600", "1"),
        "--no-verify",  # which takes seconds, after the signal
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    process.send_signal(number)
    process.communicate(timeout=HANGS)

    assert process.returncode == 0
    assert names(tmp_path) == ["tiny_panoptic_64"]


def test_a_second_signal_does_not_interrupt_the_cleaning_up(tmp_path: Path) -> None:
    slow = "import shutil\nremove = shutil.rmtree\n"
    slow += "def rmtree(path, **options):\n    print('cleaning', flush=True)\n    time.sleep(1)\n"
    slow += "    remove(path, **options)\nshutil.rmtree = rmtree\n"
    process = merging(tmp_path, SLOW.replace("main()\n", slow + "main()\n"))
    assert process.stdout is not None
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANGS)

    assert process.returncode == 128 + signal.SIGHUP
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(
    tmp_path: Path, command: Command, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "--checkpoint", "tiny_panoptic_64"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "merging\n"
    process.send_signal(number)
    process.wait()
    process.stdout.close()

    assert not (tmp_path / "tiny_panoptic_64").exists()
    assert command("--checkpoint", "tiny_panoptic_64").exit_code == 0
    assert names(tmp_path) == ["tiny_panoptic_64"]


def test_a_file_that_may_not_grow_further_leaves_nothing(tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    process = start(tmp_path, "--checkpoint", "tiny_panoptic_64", preexec_fn=limit)
    _, stderr = process.communicate(timeout=HANGS)

    assert process.returncode == 1
    assert "cannot be written: File too large" in stderr
    assert names(tmp_path) == []


def test_the_token_of_the_environment_is_never_shown(tmp_path: Path) -> None:
    environment = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "http://127.0.0.1:9"}
    process = start(
        tmp_path, "--checkpoint", "coco_panoptic_small_640", "--debug", environment=environment
    )
    stdout, stderr = process.communicate(timeout=HANGS)

    assert process.returncode == 1
    assert "could not be reached" in stderr
    assert "Traceback" in stderr
    assert "hf_secret" not in stdout + stderr


def test_no_token_is_shown_wherever_it_comes_from(
    command: Command, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line break in a token makes the HTTP library complain of the whole header."""
    token = "hf_secret\nX-More: 1"  # noqa: S105
    delta = ("inspect", "tue-mps/delta", "--debug")
    shown = command(*delta, "--token", token).output
    monkeypatch.setenv("HF_TOKEN", token)
    shown += command(*delta).output
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text("hf_secret_of_the_login")
    hub.create_repo("tue-mps/delta", {"pytorch_model.bin": b""}, gated=True)
    shown += command(*delta).output

    assert "Traceback" in shown
    assert "hf_secret" not in shown


def test_a_bug_of_the_tool_ends_in_1_without_a_token(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("sent hf_secret")

    monkeypatch.setattr("converter.conversion.run_job", fault)
    result = command("--checkpoint", "tiny_panoptic_64", "--token", "hf_secret")

    assert result.exit_code == 1
    assert "RuntimeError: sent [token]" in result.stderr
    assert "Please report it" in result.stderr
    assert "hf_secret" not in result.output


@pytest.mark.smoke  # of rich
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(tmp_path: Path, terminal: bool) -> None:
    """Standard error is a terminal, or a pipe."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "--checkpoint", "tiny_panoptic_64", "--no-verify"],
        cwd=tmp_path,
        env=os.environ | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=writing,
    )
    os.close(writing)
    shown = b""
    end = time.monotonic() + HANGS
    while time.monotonic() < end and select.select([reading], [], [], HANGS)[0]:
        try:
            data = os.read(reading, 4096)
        except OSError:  # what a terminal gives when its other end is closed
            break
        if not data:
            break
        shown += data
    os.close(reading)
    stdout, _ = process.communicate(timeout=HANGS)

    assert process.returncode == 0
    assert b"verdict" in stdout
    assert (b"Merging" in shown) == terminal
    assert terminal or shown == b""
