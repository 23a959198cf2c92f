"""The states in a file of EoMT weights: recognised by the tails of their names, and one chosen.

Training code puts its own prefixes before the names of a layout: ``module.``
(DistributedDataParallel), ``_orig_mod.`` (torch.compile), ``model.``, or ``ema.`` for an averaged
copy of all weights. Some code leaves out ``network.``, which TU/e's names begin with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from converter.errors import PlanError, UsageError
from converter.weights.layouts import EOMT_TUE, LAYOUTS, Dropped, Layout, plain_name
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile

# parts of a prefix that do not tell one copy of the weights from another
_WRAPPERS = {"module", "model", "network"}

# what TU/e's names begin with, where the state dict is that of the whole training module
_ROOT = "network."

# how many parts a prefix may have; names from outside may have hundreds
_LONGEST = 6

# buffers of averaged copies, which count updates: of torch.optim.swa_utils.AveragedModel, and of
# the package ema-pytorch
_COUNTERS = ("n_averaged", "decay", "initted", "num_updates", "step")


@dataclass(frozen=True)
class State:
    """One copy of EoMT's weights in a file.

    Attributes:
        layout: its layout.
        prefix: what is before the layout's names, without the last dot; often empty.
        names: the names in the file, by the layout's names.
    """

    layout: Layout
    prefix: str
    names: Mapping[str, str]

    @property
    def key(self) -> str:
        """The part of the prefix that tells it from other copies, such as ``ema``; often empty."""
        return ".".join(part for part in self.prefix.split(".") if part not in {*_WRAPPERS, ""})

    @property
    def example(self) -> str:
        """A name of it in the file."""
        return self.names[self.layout.signature[0]]


@dataclass(frozen=True)
class Choice:
    """The state that is converted.

    Attributes:
        state: the chosen one.
        others: the keys of the other states that could be chosen.
        unused: names in the file that are not converted: those of other states, and counters.
    """

    state: State
    others: tuple[str, ...]
    unused: tuple[str, ...]

    def notes(self) -> list[str]:
        """Sentences on names that differ from the layout's, and on other states."""
        found, plain = self.state.example, self.state.layout.signature[0]
        notes = [f"names such as {found} are read as {plain}"] if found != plain else []
        if self.others:
            keys = ", ".join(self.others)
            notes.append(
                f"the file also holds weights under {keys}; --state-key {self.others[0]} converts "
                "them"
            )
        return notes


def rename_to_layout(file: TensorFile | ShardedTensorFile, key: str | None) -> Choice | None:
    """Chooses the state of an open file, and gives its tensors the layout's names.

    Raises:
        UsageError, PlanError: as in `choose_state`.
    """
    choice = choose_state(list(file.tensors), list(file.nested), key)
    if choice:
        file.rename(choice.state.names)
    return choice


def choose_state(
    names: Sequence[str], nested: Sequence[str] = (), key: str | None = None
) -> Choice | None:
    """Finds the states in a file of EoMT weights, and chooses one.

    Args:
        names: the names in the file.
        nested: names of tensors beside the file's state dict, in dicts of their own.
        key: the state to choose, by its key or prefix; None for the one without a key, or the only
            one.

    Returns:
        The choice; None if there is no state, as in a file of another kind.

    Raises:
        UsageError: there is no state with this key.
        PlanError: several states fit, or the names of a state have two forms.
    """
    states = _find_states([*names, *nested])
    if key is not None:
        fitting = [state for state in states if _has_key(state, key)]
        if not fitting:
            raise UsageError(f"There are no EoMT weights under {key!r}.", _keys_of(states))
    else:
        fitting = [state for state in states if not state.key] or states
    if not fitting:
        return None
    if len(fitting) > 1:
        raise PlanError(
            f"It is ambiguous which weights to convert: {fitting[0].example} or "
            f"{fitting[1].example}.",
            "Choose one with --state-key, by what its names begin with, or save it to a file of "
            "its own.",
        )
    chosen = fitting[0]
    _check_root(chosen)
    others = [state for state in states if state is not chosen]
    in_others = {name for state in others for name in state.names.values()} | set(nested)
    copies = tuple(f"{state.prefix}." for state in others if state.key)
    weights, known, unused = dict(chosen.names), set(chosen.names.values()), []
    for name in [*names, *nested]:
        if name in known:
            continue
        if name in in_others or name.startswith(copies) or _is_counter(name):
            unused.append(name)
        else:
            plain = _outside_the_network(name, chosen)
            if weights.setdefault(plain, name) != name:
                raise _two_forms(weights[plain], name)
    return Choice(
        State(chosen.layout, chosen.prefix, _buffers(chosen, others) | weights),
        tuple(sorted({state.key for state in others if state.key})) if key is None else (),
        tuple(unused),
    )


def _find_states(names: Iterable[str]) -> list[State]:
    """The states whose layout's signature is complete."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    layouts = {layout.name: layout for layout in LAYOUTS if layout.kind == "eomt"}
    for name in names:
        for layout in layouts.values():
            if split := _split(name, layout):
                prefix, plain = split
                state = found.setdefault((layout.name, prefix), {})
                if plain in state:
                    raise _two_forms(state[plain], name)
                state[plain] = name
    return [
        State(layouts[layout], prefix, state)
        for (layout, prefix), state in found.items()
        if state.keys() >= set(layouts[layout].signature)
    ]


def _split(name: str, layout: Layout) -> tuple[str, str] | None:
    """A name's prefix, without the last dot, and its name in a layout; None if it has none."""
    parts = plain_name(name).split(".")
    for start in range(min(len(parts), _LONGEST + 1)):
        tail = ".".join(parts[start:])
        for known in (tail, _ROOT + tail) if layout is EOMT_TUE else (tail,):
            if layout.target(known):
                return ".".join(parts[:start]), known
    return None


def _has_key(state: State, key: str) -> bool:
    key = key.removesuffix(".")
    return state.key == key or f"{state.prefix}.".startswith(f"{key}.")


def _keys_of(states: Sequence[State]) -> str:
    keys = sorted({state.key or state.prefix for state in states} - {""})
    if not keys:
        return "The file has no weights that need --state-key: leave it out."
    return f"The file has weights under {', '.join(keys)}."


def _check_root(state: State) -> None:
    """Checks that either all names of TU/e's network begin with ``network.``, or none.

    Raises:
        PlanError: both occur.
    """
    forms: dict[bool, str] = {}
    for plain, name in state.names.items():
        if plain.startswith(_ROOT):
            rest = plain_name(name).removeprefix(f"{state.prefix}.")
            forms.setdefault(rest.startswith(_ROOT), name)
    if len(forms) > 1:
        raise _two_forms(forms[True], forms[False])


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _outside_the_network(name: str, state: State) -> str:
    """The plain name of what is saved beside the network, as the criterion's weights.

    Any other name stays as it is; a plan refuses it.

    Raises:
        PlanError: it is a name of the network, with another prefix than the state's.
    """
    split = _split(name, state.layout)
    if split is None or State(state.layout, split[0], {}).key != state.key:
        return name
    if split[1].startswith("criterion."):
        return split[1]
    raise _two_forms(state.example, name)


def _buffers(state: State, others: Iterable[State]) -> dict[str, str]:
    """Buffers of the state without a key, which a copy of parameters lacks.

    No model gets them, but the length of attn_mask_probs is the number of blocks.
    """
    return {
        plain: name
        for other in others
        if not other.key and other.layout is state.layout
        for plain, name in other.names.items()
        if all(isinstance(part, Dropped) for part in state.layout.target(plain))
    }


def _two_forms(first: str, second: str) -> PlanError:
    return PlanError(
        f"The names of the weights have two forms: {first} and {second}.",
        "Save a state dict whose names have one form.",
    )
