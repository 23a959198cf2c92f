"""The verdict on a model: the result of each check, and what is wrong if one failed."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from converter.configs import Dtype

LEVELS = ("structure", "arithmetic", "numbers", "pictures", "peers", "published")

# The levels that `--level` counts, from 1. Pictures have no number: they are checked if a level
# after numbers is asked for.
NUMBERED = ("structure", "arithmetic", "numbers", "peers", "published")

# how the reason begins for a level that was left out
NOT_ASKED = "Only levels up to"

# the reason of an unverified verdict if there are no recorded outputs of the model
NOTHING_RECORDED = "No recorded outputs to compare the model with."

# who computed what an export was compared with, if nothing was recorded
SAME_WEIGHTS = "the reference model with the same weights"

# who computed what a delta's sum with its backbone was compared with
ROUND_TRIP = "the model that the delta was made of"

# who computed outputs, in words; all others are of unknown origin
_SOURCES = {
    "reference": "the reference model",
    "export": "an exported file",
    SAME_WEIGHTS: SAME_WEIGHTS,
}


def is_asked(name: str, last: int) -> bool:
    """Whether to check a level.

    Args:
        name: of the level; pictures are checked if a level after numbers is asked for.
        last: number of the last level that was asked for.
    """
    return last > NUMBERED.index("peers" if name == "pictures" else name)


def not_asked(last: int) -> str:
    """Why a level after the last one that was asked for is not checked."""
    return f"{NOT_ASKED} {last} were asked for."


Status = Literal["passed", "failed", "not checked"]

# The evidence for a passed verdict, the strongest first: outputs recorded from the original
# implementation; published numbers, with every tensor proven from its sources; outputs recorded
# with our reference model, which only show that nothing has changed since.
Basis = Literal["original", "published", "reference"]
BASES: tuple[Basis, ...] = ("original", "published", "reference")

# only weights that were rounded are allowed a larger share of the range
_OF_FLOAT32 = 1e-4

# what weights may have been rounded to; the last one is for a conversion.json of version 0.1
_ROUNDED = ("bfloat16", "float16", "16 bits")

# figures that are the same on every machine
_KEPT = (
    "tensors",
    "parameters",
    "against",
    "of_published",
    "recorded_sha256",
    "basis",
    "recorded_by",
    "known_recording",
    "tolerance",
    "relative_tolerance",
    "rounded_to",
    "unrounded",
    "computed_in",
    "recorded_in",
    "pictures",
    "task",
    "least_equal_pixels",
    "not_checked",
)


@dataclass(frozen=True)
class Level:
    """One kind of check.

    Attributes:
        level: one of `LEVELS`.
        status: the result.
        reason: why it failed or was not checked, or a remark, in a sentence.
        figures: what was measured.
    """

    level: str
    status: Status
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The level as JSON shows it."""
        return {
            "level": self.level,
            "status": self.status,
            "reason": self.reason,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class FirstDifference:
    """The first place where a model differs from the recording.

    Attributes:
        layer: the part of the network, by the canonical name of its tensors: ``layers.2``.
        tensor: the recorded tensor: ``hidden_states.2``.
        max_abs: largest absolute difference there; None if it is NaN or infinite.
    """

    layer: str
    tensor: str
    max_abs: float | None


@dataclass(frozen=True)
class Cause:
    """The fault that explains a difference.

    Attributes:
        name: name of the fault; README lists them.
        tensors: the faulty tensors; empty if the fault is in a configuration file.
        residual: largest difference from the recording after undoing the fault; None if the fault
            is known from digests alone.
        explanation: what was tried and with what result, in a sentence.
        explained: share that it explains, from 0 to 1: of the parts of the network that are off or,
            if none is off, of the tensors with wrong values; None if there are neither.
    """

    name: str
    tensors: tuple[str, ...]
    residual: float | None
    explanation: str
    explained: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The cause as JSON shows it."""
        return {
            "name": self.name,
            "tensors": list(self.tensors),
            "residual": self.residual,
            "explained": self.explained,
        }


@dataclass(frozen=True)
class Trial:
    """A fault that was looked for.

    Attributes:
        name: name of the fault.
        status: whether undoing it removes all of the difference, some of it, or none. A fault that
            cannot be undone never explains all of it.
        residual: largest difference (root mean square if weights were rounded) that is left in the
            parts of the network that were wrong, each run on its recorded input; None if nothing
            was run.
        reason: what was tried, or why nothing was, in a sentence.
        explained: as in `Cause`.
    """

    name: str
    status: Literal["explains all", "explains part", "explains nothing", "not tried"]
    residual: float | None
    reason: str
    explained: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of checking a model.

    Attributes:
        levels: every check, including those that were not made.
        first_difference: where its numbers first differ, if they do.
        cause: the fault that explains the difference, if one was found.
        tried: the faults that were looked for; empty if nothing differs.
    """

    levels: tuple[Level, ...]
    first_difference: FirstDifference | None = None
    cause: Cause | None = None
    tried: tuple[Trial, ...] = ()

    @property
    def verdict(self) -> Literal["passed", "failed", "unverified"]:
        """Failed if any level failed; passed if there is a basis; otherwise unverified."""
        if any(level.status == "failed" for level in self.levels):
            return "failed"
        return "passed" if self._bases else "unverified"

    @property
    def basis(self) -> Basis | None:
        """The strongest evidence for a passed verdict; None if it is not passed."""
        return min(self._bases, key=BASES.index) if self.verdict == "passed" else None

    @property
    def proven(self) -> bool:
        """Whether the model was shown to be right, not only to be unchanged."""
        return self.basis in ("original", "published")

    @property
    def _bases(self) -> list[Basis]:
        """The evidence for the levels that passed, whatever the result of the others."""
        passed = {level.level: level.figures for level in self.levels if level.status == "passed"}
        bases: list[Basis] = []
        if "numbers" in passed:
            bases.append(passed["numbers"].get("basis", "reference"))
        # a few numbers prove little by themselves; with tensors made of the published files, enough
        if "published" in passed and passed.get("arithmetic", {}).get("of_published"):
            bases.append("published")
        return bases

    @property
    def of_outputs(self) -> bool:
        """Whether only a file of outputs was checked, whatever computed them, and no model."""
        return "outputs_sha256" in self._figures_of("numbers")

    @property
    def of_export(self) -> bool:
        """Whether it is on an exported file."""
        return "format" in self._figures_of("structure")

    @property
    def compared_with(self) -> str:
        """What the model, or its outputs, were compared with, as the end of a sentence.

        Model cards on the Hub contain this text: if it changes, a push changes them.
        """
        if self.basis == "published":
            return (
                "its published sources, from which every tensor is proven to come, and with the "
                "published numbers, as a spot check"
            )
        return self._recorded_by + self._rounded + self._computed

    @property
    def _rounded(self) -> str:
        """How rounded weights limit the check, as the end of a sentence."""
        numbers = self._figures_of("numbers")
        dtype = numbers.get("rounded_to")
        if dtype is None:
            return ""
        if numbers.get("unrounded"):
            return f", using the float32 sums before they were rounded to {dtype}"
        return f", as closely as weights in {dtype} allow: faults smaller than rounding do not show"

    @property
    def _computed(self) -> str:
        """How it was computed, besides in float32, and what that cannot show; likewise."""
        numbers = self._figures_of("numbers")
        dtype, recorded_in, mode = (
            numbers.get(key) for key in ("computed_in", "recorded_in", "compiled")
        )
        steps = [f"compiled ({mode})"] if mode else []
        if dtype or recorded_in:
            recording = f", the recording in {recorded_in}" if recorded_in else ""
            # the weights of what is not exported were compared before, if the recording allows it
            faults = "faults" if recording or self.of_export else "faults of the computation"
            steps.append(
                f"computed in {dtype or 'float32'}{recording}, as closely as 16 bits allow: "
                f"{faults} smaller than its rounding do not show"
            )
        then = "then " if (dtype or mode) and not self.of_export else ""
        return f"; {then}{' and '.join(steps)}" if steps else ""

    @property
    def _recorded_by(self) -> str:
        numbers = self._figures_of("numbers")
        if numbers.get("recorded_by") == "original":
            stated = "" if numbers.get("known_recording") else ", as recorded.json states"
            return f"outputs recorded from the original implementation{stated}"
        theirs = f"outputs of {_SOURCES.get(numbers.get('recorded_by', ''), 'unknown origin')}"
        if self.basis == "original":
            return (
                f"{theirs}, recorded from exactly these files after they had passed a comparison "
                "with the original's, as recorded.json states"
            )
        if numbers.get("recorded_by") == SAME_WEIGHTS:
            if "against" in self._figures_of("arithmetic"):  # the weights are the model's
                return (
                    f"{theirs}, for random pixels: it computes what the model computes, but this "
                    "does not show that the model is right"
                )
            return (
                f"{theirs}, for random pixels: the file computes what the reference model computes "
                "with the weights in the file, but this does not show that they are right"
            )
        if numbers.get("recorded_by") == ROUND_TRIP:
            return (
                f"{ROUND_TRIP}: adding it to the backbone gives that model again, as closely as "
                "the levels below say, but this does not show that the model is right"
            )
        if self.of_outputs:
            return f"{theirs}: this does not show that those were right"
        return (
            f"{theirs}: nothing has changed since they were recorded, but this does not show that "
            "it was right then"
        )

    @property
    def shortfall(self) -> str:
        """Why a model, or outputs, that did not fail are not proven, in a sentence."""
        if self.of_outputs:
            return f"The outputs were only compared with {self.compared_with}."
        if self.basis:
            return f"The model was only compared with {self.compared_with}."
        return f"The model is unverified. {self.reason}".strip()

    def _figures_of(self, name: str) -> Mapping[str, Any]:
        return next((level.figures for level in self.levels if level.level == name), {})

    @property
    def reason(self) -> str:
        """Why the verdict is not passed, in a sentence; empty if it is passed."""
        match self.verdict:
            case "passed":
                return ""
            case "failed":
                return next(level.reason for level in self.levels if level.status == "failed")
        kinds = ("numbers",) if self.of_export else ("numbers", "published")
        recorded = [level for level in self.levels if level.level in kinds]
        if any(level.status == "passed" for level in recorded):
            return (
                "The published numbers agree, but they are only a spot check: not every tensor is "
                "proven to come from its sources."
            )
        if not recorded:
            return ""
        asked = [level for level in recorded if not level.reason.startswith(NOT_ASKED)]
        return (asked or recorded)[-1].reason

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON shows it."""
        return {
            "verdict": self.verdict,
            "basis": self.basis,
            "levels": [level.to_dict() for level in self.levels],
            "first_difference": asdict(self.first_difference) if self.first_difference else None,
            "cause": self.cause.to_dict() if self.cause else None,
            "tried": [asdict(trial) for trial in self.tried],
        }

    def record(self) -> dict[str, Any]:
        """The verdict as conversion.json keeps it: only figures that are the same everywhere."""
        levels = []
        for level in self.levels:
            figures = {key: level.figures[key] for key in _KEPT if key in level.figures}
            if left_out := figures.pop("not_checked", []):
                figures["not_checked"] = "; ".join(left_out)
            levels.append({"level": level.level, "status": level.status, "figures": figures})
        return {"verdict": self.verdict, "basis": self.basis, "levels": levels}


def read_record(content: Mapping[str, Any], known_recordings: Collection[str]) -> Verdict:
    """Reads the verdict that `Verdict.record` wrote, and checks it against its levels.

    Args:
        content: the ``verdict`` of a conversion.json.
        known_recordings: SHA-256 of recordings of the original. eomt-convert 0.1 did not store who
            made a recording: it was the original if the recording is one of these.

    Raises:
        ValueError: the content is malformed, or claims more than its levels show.
    """
    levels = []
    for entry in content["levels"]:
        figures = {key: entry["figures"][key] for key in _KEPT if key in entry["figures"]}
        if entry["level"] not in LEVELS or entry["status"] not in get_args(Status):
            raise ValueError(
                f"unknown level {entry['level']!r} or unknown status {entry['status']!r}"
            )
        if any(not isinstance(value, str | int | float) for value in figures.values()):
            raise ValueError(f"the figures of {entry['level']} are not text or numbers")
        if figures.get("rounded_to", _ROUNDED[0]) not in _ROUNDED:
            raise ValueError(f"rounded_to is unknown, expected one of {', '.join(_ROUNDED)}")
        for key in ("computed_in", "recorded_in"):
            if figures.get(key, "float32") not in get_args(Dtype):
                raise ValueError(f"{key} is unknown, expected one of {', '.join(get_args(Dtype))}")
        if figures.get("unrounded", True) is not True or (
            "unrounded" in figures and "rounded_to" not in figures
        ):
            raise ValueError("unrounded must be true, and needs rounded_to")
        if entry["level"] == "numbers" and "basis" not in content:
            known = figures.get("recorded_sha256") in known_recordings
            figures |= {"known_recording": known, "basis": "original" if known else "reference"}
            figures["recorded_by"] = "original" if known else "unknown"
        share = figures.get("relative_tolerance", 0)
        large = isinstance(share, str) or share > _OF_FLOAT32
        explained = figures.keys() & {"computed_in", "recorded_in"}
        if entry["level"] == "numbers" and large and not explained:
            figures.setdefault("rounded_to", "16 bits")  # 0.1 did not store the dtype
        if figures.get("basis", "original") not in BASES:
            raise ValueError(f"unknown basis {figures['basis']!r}")
        levels.append(Level(entry["level"], entry["status"], figures=figures))
    found = Verdict(tuple(levels))
    of = {level.level: level.figures for level in levels}
    if (
        of.get("numbers", {}).get("unrounded")
        and of.get("arithmetic", {}).get("against") != "sources"
    ):
        raise ValueError(
            "its numbers are for float32 sums, but the weights are not proven from their sources"
        )
    stated = content["verdict"], content.get("basis")
    if "basis" in content and stated != (found.verdict, found.basis):
        raise ValueError(
            f"it says {stated[0]!r} with the basis {stated[1]!r}, but its levels give "
            f"{found.verdict!r} with the basis {found.basis!r}"
        )
    return found


def unverified(reason: str) -> Verdict:
    """The verdict on a model that was not compared with anything."""
    return Verdict((Level("numbers", "not checked", reason),))
