# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the collective-states authors
"""Initialise, reset, call, batch and restore every module of a JAX model at once.

* A **state** is a `State` box that holds an array, or any pytree of arrays.
* A **module** is an instance of `Module`. Its states and child modules are found in its
  attributes, directly or inside lists, tuples and dicts at any depth.
* A **path** is the tuple of names, keys and indices from the root to a state or a module:
  ``('layers', 0, 'weight')``, also written ``'layers.0.weight'`` where a path is read.
* A **state tree** is a `StateTree`: an immutable mapping from path to value, and a pytree.
* A **member** is one model of an ensemble; the members lie along leading *mapped axes*, which
  the **mark** of a state (``mapped``) counts.

Pure functions only read the module, a template; they take and return state trees, so they work
inside ``jit``, ``grad``, ``vmap`` and ``scan``::

    traverse(module)              -> iterator of (path, module), children before parents
    snapshot(module)              -> state              restore(module, state) -> module
    init(module, *args)           -> state              vmap_init(..., axis_size=n)
    reset(module, state, *args)   -> state              vmap_reset(...)
    apply(module, state, *args)   -> (output, state)    vmap_apply(...)
    call_all(module, state, name) -> (outputs, state)   vmap_call_all(...)
    vmap(fn)(*args)               -> what fn returns, once per member of the trees in args
    partition(state, filter)      -> (matching, rest)   matching | rest -> state
    subtree(state, path)          -> state              StateTree({path: state}) -> state
    where(mask, new, old)         -> state              flat_dict(state) -> {name: array}
    stack(*states)                -> state              member(state, i) -> state
    assign(state, *snapshots)     -> (state, unexpected, missing)

In place: `call_all_fns`, `init_all_states`, `reset_all_states`, their ``vmap_`` forms and
`assign_state_values`. `call_order` orders the calls of both families. A list, tuple or dict of
modules goes wherever a module does, except in `apply`; anything else is a `TypeError`. All that can
be checked is checked before the first method runs, and a call that raises changes nothing.

>>> class Cell(Module):
...     def init_state(self, *, key):                   # what it creates is one per member
...         self.w = ParamState(0.5 * jax.random.normal(key, (8, 9)))
...         self.h = HiddenState(jnp.zeros(8))
...     def reset_state(self):                          # written for a single model
...         self.h.value = jnp.zeros(8)
...     def update(self, x):
...         self.h.value = jnp.tanh(self.w.value @ jnp.append(self.h.value, x))
...         return self.h.value[0]
>>> model, wave = Cell(), jnp.sin(jnp.arange(40) / 3)
>>> state = vmap_init(model, axis_size=3, key=jax.random.key(0))
>>> params, rest = partition(state, ParamState)
>>> params
path  kind        value           mapped
w     ParamState  float32[3,8,9]  1
1 leaves, 216 numbers, 864 B
>>> def losses(params):                                 # of each member, predicting the wave
...     step = lambda state, x: vmap_apply(model, state, x, in_axes=None)[::-1]
...     _, outputs = jax.lax.scan(step, params | rest, wave[:-1])
...     return jnp.mean((outputs - wave[1:, None]) ** 2, axis=0)
>>> def descend(params, _):
...     slopes = jax.grad(lambda params: losses(params).sum())(params)
...     return jax.tree.map(lambda p, slope: p - 0.1 * slope, params, slopes), losses(params)
>>> params, history = jax.jit(lambda p: jax.lax.scan(descend, p, length=200))(params)
>>> history[0], history[-1]                             # before and after
(Array([...], dtype=float32), Array([...], dtype=float32))
>>> _, state = vmap_apply(model, params | rest, jnp.ones(3))
>>> state = where(jnp.array([True, False, True]), vmap_reset(model, state), state)
>>> jnp.abs(state['h']).max(axis=1) > 0                 # whose episode goes on
Array([False,  True, False], dtype=bool)
>>> saved = flat_dict(state)                            # {'h': ..., 'w': ...}, for np.savez
>>> assign(state, {'w': saved['w'][0]})
Traceback (most recent call last):
ValueError: nothing was assigned, since values do not fit: 'w' expected float32[3,8,9], got ...
>>> assign(vmap_init(model, axis_size=3, key=jax.random.key(1)), saved)[1:]
([], [])

Needs Python >= 3.11 and jax >= 0.4.30; tested with jax 0.4.30, 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import pkgutil
import threading
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__version__ = "0.2.0"

__all__ = [
    "MAX_ORDER", "HiddenState", "LongTermState", "Module", "ParamState", "Path", "ShortTermState",
    "State", "StateTree", "apply", "assign", "assign_state_values", "call_all", "call_all_fns",
    "call_order", "flat_dict", "init", "init_all_states", "member", "partition", "reset",
    "reset_all_states", "restore", "snapshot", "stack", "subtree", "traverse", "vmap",
    "vmap_apply", "vmap_call_all", "vmap_call_all_fns", "vmap_init", "vmap_init_all_states",
    "vmap_reset", "vmap_reset_all_states", "where",
]

Path = tuple[Hashable, ...]  # attribute names, dict keys and list indices, from the root
Filter = Any  # a type, a tag, a predicate, `...`, None, or a list of these: see `_predicate`
Key = Any  # one PRNG key, typed or legacy, or None
Outputs = dict[Path, Any]  # what methods returned, by the paths of their modules, in call order
T = TypeVar("T")  # what comes back as it came, such as a module or a list of modules


# ---- Paths and messages --------------------------------------------------------------------------


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _as_path(name: Any) -> Path:
    """The path that a dotted name spells; any other key is a path, or one step of it."""
    if not isinstance(name, str):
        return name if isinstance(name, tuple) else (name,)
    return tuple(int(part) if part.isdecimal() and part == str(int(part)) else part
                 for part in name.split("."))


def _is_step(step: Any) -> bool:
    """Whether a key may be part of a path. Others compare equal (True and 1) or vary in `repr`."""
    return type(step) in (str, int) or type(step) is tuple and all(map(_is_step, step))


def _order(path: Any) -> list[tuple[int, Any]]:
    """The sort key of a path: ints by number, then strings, then others by `repr`."""
    return [(0, step) if isinstance(step, int) else (1, step) if isinstance(step, str)
            else (2, repr(step)) for step in (path if isinstance(path, tuple) else (path,))]


def _in_order(paths: Collection[Path]) -> list[Path]:
    try:
        return sorted(paths)  # the same order, faster; raises where ints meet strings
    except TypeError:
        return sorted(paths, key=_order)


def _check_names(paths: Iterable[Path]) -> None:
    first: dict[str, Path] = {}
    for path in paths:
        if (other := first.setdefault(_dotted(path), path)) is not path:
            raise ValueError(f"{other} and {path} spell one dotted name; rename one of them")


def _leaves(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """The leaves of a pytree at a path, with their paths, in the order of `jax.tree.leaves`."""
    if isinstance(value, jax.Array):
        return [(path, value)]
    return [(path + tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
                          for key in keys), leaf)
            for keys, leaf in jax.tree_util.tree_flatten_with_path(value)[0]]


def _described(value: Any) -> str:
    """Dtypes and shapes of a pytree: "bias float32[2], weight float32[4,2]"."""
    return ", ".join(
        f"{_dotted(path)} {leaf.dtype}[{','.join(map(str, leaf.shape))}]".lstrip()
        if hasattr(leaf, "dtype") else type(leaf).__name__
        for path, leaf in _leaves(value)) or type(value).__name__


def _site(path: Path, thing: Any) -> str:
    """Where a thing is, for messages: "'layers.0' (Linear)"."""
    return f"{repr(_dotted(path)) if path else 'the root'} ({type(thing).__name__})"


def _sites(things: Mapping[Path, Any], paths: Collection[Path]) -> str:
    return ", ".join(_site(path, things[path]) for path in _in_order(paths))


def _is_array(leaf: Any) -> bool:
    """Whether JAX takes a leaf for an array."""
    return isinstance(leaf, (jax.Array, int, float, complex)) or (
        isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufcV")


# ---- States and filters --------------------------------------------------------------------------


class State:
    """A box for one ``value`` of a module: an array, or any pytree of arrays.

    ``tag`` is a label for filters; ``mapped`` counts leading ensemble axes. Subclasses are kinds.

    >>> State({'bias': jnp.zeros(2)}, tag='slow')
    State(bias float32[2])
    """

    _collective_file = globals().get("__file__", __name__)  # tells two copies of this file apart

    def __init__(self, value: Any, *, tag: Hashable = None) -> None:
        self.value, self.tag, self.mapped = value, tag, 0

    def __repr__(self) -> str:
        mark = f", mapped={self.mapped}" if self.mapped else ""
        return f"{type(self).__name__}({_described(self.value)}{mark})"


class LongTermState(State):
    """A state that outlives a sequence, such as a running statistic."""


class ShortTermState(State):
    """A state that belongs to one sequence."""


class ParamState(LongTermState):
    """A trainable parameter."""


class HiddenState(ShortTermState):
    """The hidden state of a recurrent cell."""


def _predicate(filter: Filter) -> Any:
    """A filter as a function of a path and the state or module there."""
    if filter is None or filter is ... or isinstance(filter, bool):
        return lambda path, thing: bool(filter)
    if isinstance(filter, type):
        return lambda path, thing: isinstance(thing, filter)
    if isinstance(filter, str):
        return lambda path, thing: getattr(thing, "tag", None) == filter
    if isinstance(filter, (list, tuple)):
        any_of = [_predicate(each) for each in filter]
        return lambda path, thing: any(each(path, thing) for each in any_of)
    if callable(filter) and not isinstance(filter, Module):  # which is callable, but no filter
        return filter
    raise TypeError("a filter is a type, a tag (str), a callable (path, object) -> bool, `...`, "
                    f"None, or a list or tuple of these; got {type(filter).__name__}")


def _filtered(things: Mapping[Path, T], filter: Filter) -> dict[Path, T]:
    passes = _predicate(filter)
    return {path: thing for path, thing in things.items() if passes(path, thing)}


# ---- Modules and the walk ------------------------------------------------------------------------


class Module:
    """Base class, or mix-in, of everything that holds states.

    Define ``update``, which calling the module calls, and `init_state` and `reset_state`.

    >>> class Scale(Module):
    ...     def __init__(self, size): self.factor = ParamState(jnp.ones(size))
    ...     def update(self, x): return self.factor.value * x
    >>> Scale(2)(3.), Scale(2)
    (Array([3., 3.], dtype=float32), Scale
      factor: ParamState(float32[2]))
    """

    _collective_file = State._collective_file

    def __setattr__(self, name: str, value: Any) -> None:
        held = vars(self).get(name)
        if isinstance(held, State) and not isinstance(value, State) and (
                any(map(_is_array, jax.tree.leaves(value)))):
            raise TypeError(f"{name!r} is a {type(held).__name__}; write self.{name}.value = ...")
        super().__setattr__(name, value)

    def init_state(self, *args: Any, **kwargs: Any) -> Any:
        """Create the states of this module; does nothing by default."""

    def reset_state(self, *args: Any, **kwargs: Any) -> Any:
        """Set the states of this module back; does nothing by default."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.update(*args, **kwargs)  # type: ignore[attr-defined]

    def states(self, filter: Filter = ...) -> dict[Path, State]:
        """The live states that pass a filter, each once, under its first path."""
        return _filtered(_walk(self).states, filter)

    def nodes(self, filter: Filter = ...) -> dict[Path, Module]:
        """The modules that pass a filter, this one included, in the order of `traverse`."""
        return _filtered(_walk(self).modules, filter)

    def __repr__(self) -> str:
        graph, lines, indents = _walk(self), [type(self).__name__], {Path(): ""}
        texts = {path: type(node).__name__ for path, node in graph.modules.items()} | graph.states
        for path in _in_order(texts)[1:]:
            end = next(end for end in reversed(range(len(path))) if path[:end] in indents)
            indents[path] = indents[path[:end]] + "  "
            lines.append(f"{indents[path]}{_dotted(path[end:])}: {texts[path]}")
        return "\n".join(lines)


class _Roles(dict[type, Any]):
    """By type, the class whose methods the walk uses; None for what it passes over.

    A dict, which looks up three times as fast as `functools.cache`. A new kind of holder goes
    here, and into `_walk` (the root), `_refill`, `_new_like` and `_attach`.
    """

    def __missing__(self, kind: type) -> Any:
        bases = (Module, State, OrderedDict, dict, list, tuple)
        role = next((base for base in bases if issubclass(kind, base)), None)
        if role is Module and kind.__basicsize__ != Module.__basicsize__:
            raise TypeError(f"{kind.__name__} has __slots__ or a builtin base class; use neither")
        if role is None and (file := getattr(kind, "_collective_file", None)):
            raise TypeError(f"{kind.__name__} is made with another copy of this file, {file}, than "
                            f"{State._collective_file}; import both from one")
        return self.setdefault(kind, role)


_ROLES = _Roles()


def _inside(holder: Any) -> dict[Any, Any]:
    """What a module, state or container holds, by name, key or index, whatever it overrides."""
    role = _ROLES[type(holder)]
    if role is Module or role is State:
        return holder.__dict__  # type: ignore[no-any-return]
    return dict(role.items(holder) if issubclass(role, dict) else enumerate(role.__iter__(holder)))


class _Graph(NamedTuple):
    """What one walk finds: every object once, under the path by which it was met first."""

    root: Any
    modules: dict[Path, Module]  # children before parents
    containers: dict[Path, Any]  # lists and dicts, for tuples cannot change
    states: dict[Path, State]
    aliases: dict[Path, Path]  # further paths of states, lists, dicts and tuples, with the first

    def things(self) -> list[Any]:
        return [*self.modules.values(), *self.containers.values(), *self.states.values()]


def _walk(root: Any) -> _Graph:
    """Walk a module, or a list, tuple or dict of modules, depth first and without recursion."""
    held = _inside(root).values() if isinstance(root, (list, tuple, dict)) else [root]
    roles = _ROLES
    if odd := sorted({type(each).__name__ for each in held if roles[type(each)] in (None, State)}):
        raise TypeError(f"expected a module, or a list, tuple or dict of modules; got {odd}")
    graph, seen = _Graph(root, {}, {}, {}, {}), dict[int, Path]()
    _, modules, containers, states, aliases = graph
    stack: list[Any] = [((), root, roles[type(root)], None)]
    while stack:
        path, part, role, bad_key_at = stack.pop()
        if bad_key_at and (role is Module or role is State):
            key = bad_key_at[-1]
            raise TypeError("a key on the way to a state or module is a str, an int or a tuple of "
                            f"these; got {key!r} ({type(key).__name__}) at {bad_key_at}")
        if role is None:  # a second visit: all that is inside was visited
            (modules if roles[type(part)] is Module else containers)[path] = part
        elif (first := seen.setdefault(id(part), path)) is not path:
            if role is not Module:
                aliases[path] = first
        elif role is State:
            states[path] = part
        else:
            if role is not tuple:
                stack.append((path, part, None, None))
            for name, inner in reversed(_inside(part).items()):
                if inner_role := roles[type(inner)]:
                    here, bad = path + (name,), bad_key_at
                    if type(name) is not str and not _is_step(name):
                        bad = bad or here
                    stack.append((here, inner, inner_role, bad))
    return graph


def traverse(module: Any) -> Iterator[tuple[Path, Module]]:
    """Iterate over ``(path, module)``: each once, by its first path, children before parents.

    >>> [path for path, _ in traverse({'encoder': [Module()], 'decoder': Module()})]
    [('encoder', 0), ('decoder',)]
    """
    return iter(_walk(module).modules.items())


# ---- State trees ---------------------------------------------------------------------------------
#
# A tree holds its values in one tuple, in canonical order, so that JAX flattens it with one call.
# All else is static; `_static` makes equal static parts one object: treedefs compare by identity.

_Row = tuple[tuple[type[State], Hashable, int], Any]  # kind, tag and mark of a box; its value


class _Static:
    """What all trees with the same states share."""

    def __init__(self, paths: tuple[Path, ...], entries: tuple[Any, ...]) -> None:
        _check_names(paths)
        self.paths, self.entries = paths, entries
        self.positions = {name: i for i, path in enumerate(paths) for name in (path, _dotted(path))}

    def __repr__(self) -> str:  # as JAX shows it in its messages
        return "; ".join(f"{_dotted(path)}: {kind.__name__}, tag={tag!r}, mapped={mapped}"
                         for path, (kind, tag, mapped) in zip(self.paths, self.entries))


_statics: weakref.WeakValueDictionary[Any, _Static] = weakref.WeakValueDictionary()
_statics_lock = threading.RLock()  # or two threads could make two of the same


def _static(paths: tuple[Path, ...], entries: tuple[Any, ...]) -> _Static:
    contents = paths, entries, tuple([_typed(tag) for _, tag, _ in entries if tag is not None])
    with _statics_lock:
        return _statics.get(contents) or _statics.setdefault(contents, _Static(paths, entries))


def _typed(tag: Any) -> Any:
    """A tag with its types, since 1, True and 1.0 are equal."""
    if isinstance(tag, (tuple, frozenset)):
        return type(tag), (tuple if isinstance(tag, tuple) else frozenset)(map(_typed, tag))
    return type(tag), tag


def _owned(value: Any) -> Any:
    """A value in containers of its own, with JAX arrays, which cannot change, for NumPy's."""
    if isinstance(value, jax.Array):
        return value
    return jax.tree.map(lambda leaf: jax.device_put(np.array(leaf))  # JAX may keep that very copy
                        if isinstance(leaf, (np.ndarray, np.generic)) else leaf, value)


def _row(path: Path, box: State) -> _Row:
    """The row of a box, all of whose leaves become arrays."""
    try:
        value = box.value if isinstance(box.value, jax.Array) else (
            jax.tree.map(jnp.asarray, _owned(box.value)))
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"no array in {_site(path, box)}: {error}") from error
    return (type(box), box.tag, box.mapped), value


def _rows(tree: StateTree) -> dict[Path, _Row]:
    """The rows of a tree by path; the values are for the caller to keep."""
    if not isinstance(tree, StateTree):
        raise TypeError(f"expected a StateTree, as of snapshot(module); got {type(tree).__name__}")
    values = [value if isinstance(value, jax.Array) else _owned(value) for value in tree._values]
    return dict(zip(tree._static.paths, zip(tree._static.entries, values)))


def _load(row: _Row, box: State | None = None) -> State:
    """Fill a box, which need not be of the right kind, or a new one."""
    box = object.__new__(row[0][0]) if box is None else box
    (box.__class__, box.tag, box.mapped), box.value = row
    return box


def _tree_from_values(static: _Static, values: Iterable[Any]) -> StateTree:
    tree = object.__new__(StateTree)
    tree._static, tree._values = static, tuple(values)
    return tree


def _tree_from_rows(rows: dict[Path, _Row]) -> StateTree:
    paths = tuple(_in_order(rows))
    values = [rows[path][1] for path in paths]
    if not all([isinstance(value, jax.Array) for value in values]):
        _check_names(name for path, value in zip(paths, values) for name, _ in _leaves(value, path))
    return _tree_from_values(_static(paths, tuple([rows[path][0] for path in paths])), values)


def _tree_from_boxes(boxes: Mapping[Path, State]) -> StateTree:
    return _tree_from_rows({path: _row(path, box) for path, box in boxes.items()})


class StateTree(Mapping[Path, Any]):
    """An immutable mapping from path to value, and a JAX pytree whose leaves are the arrays.

    Made from a mapping of paths, or dotted names, to `State` boxes, or to trees, which are grafted
    there: `TypeError` for anything else, `ValueError` where states or leaves share a dotted name.
    Containers are copied, NumPy arrays become JAX arrays. Trees compare by identity; ``b`` wins in
    ``a | b``. A look-up raises `KeyError` with the closest names.

    >>> StateTree({'W': ParamState({'w': jnp.ones((2, 3)), 'b': 0.}), 'cells.0.h': State(1)})
    path       kind        value         mapped
    W.b        ParamState  float32[]     0
    W.w        ParamState  float32[2,3]  0
    cells.0.h  State       int32[]       0
    3 leaves, 8 numbers, 32 B
    """

    __slots__ = ("_static", "_values", "__weakref__")

    def __init__(self, states: Mapping[Any, State | StateTree]) -> None:
        rows: list[tuple[Path, Any]] = []
        for name, part in dict(states).items():
            path = _as_path(name) if isinstance(name, (str, tuple)) else ()
            if not (name and path and _is_step(path) and isinstance(part, (State, StateTree))):
                raise TypeError("expected a path with a State or tree, as in {'w': ParamState(1.)};"
                                f" got {name!r} with {type(part).__name__}")
            new = _rows(part) if isinstance(part, StateTree) else {(): _row(path, part)}
            rows += [(path + below, row) for below, row in new.items()]
        _check_names(path for path, _ in rows)
        tree = _tree_from_rows(dict(rows))
        self._static, self._values = tree._static, tree._values  # type: _Static, tuple[Any, ...]

    def __getitem__(self, path: Path | str) -> Any:
        if path not in self:
            raise _no_state(self, _dotted(_as_path(path)))
        return _owned(self._values[self._static.positions[path]])

    def __contains__(self, path: object) -> bool:
        return path in self._static.positions

    def __iter__(self) -> Iterator[Path]:
        return iter(self._static.paths)

    def __len__(self) -> int:
        return len(self._values)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __or__(self, other: StateTree) -> StateTree:
        return _tree_from_rows(_rows(self) | _rows(other))

    def __reduce__(self) -> Any:
        return _tree_from_rows, (_rows(self),)

    def __repr__(self) -> str:
        table = [("path", "kind", "value", "mapped")]
        for path, (kind, _, mapped), value in zip(self, self._static.entries, self._values):
            table += [(_dotted(leaf_path), kind.__name__, _described(leaf), str(mapped))
                      for leaf_path, leaf in _leaves(value, path)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        arrays = [leaf for leaf in jax.tree.leaves(self) if hasattr(leaf, "dtype")]
        numbers = sum(leaf.size for leaf in arrays)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
        power = min(max(size.bit_length() - 1, 0) // 10, 5)
        amount = f"{size / 1024**power:.{min(power, 1)}f} {'B KiB MiB GiB TiB PiB'.split()[power]}"
        return "\n".join([*lines, f"{len(table) - 1:,} leaves, {numbers:,} numbers, {amount}"])

    def states(self) -> dict[Path, State]:
        """Fresh boxes with the kinds, tags, mapped counts and values of this tree."""
        return {path: _load(row) for path, row in _rows(self).items()}


jax.tree_util.register_pytree_with_keys(
    StateTree,
    lambda tree: (zip(map(jax.tree_util.DictKey, map(_dotted, tree)), tree._values), tree._static),
    _tree_from_values, lambda tree: (tree._values, tree._static))


def _to_json(static: _Static) -> bytes:
    entries = [(f"{kind.__module__}:{kind.__qualname__}", *rest) for kind, *rest in static.entries]
    return json.dumps([static.paths, entries]).encode()


def _from_json(data: bytes | bytearray) -> _Static:
    def tuples(part: Any) -> Any:
        return tuple(map(tuples, part)) if isinstance(part, list) else part

    paths, entries = tuples(json.loads(data))
    return _static(paths, tuple((pkgutil.resolve_name(name), *rest) for name, *rest in entries))


with contextlib.suppress(ImportError, AttributeError, ValueError):  # jax < 0.4.36; a reload
    from jax import export

    export.register_pytree_node_serialization(
        StateTree, serialized_name=f"{__name__}.StateTree",
        serialize_auxdata=_to_json, deserialize_auxdata=_from_json)


def _no_state(state: StateTree, name: str) -> KeyError:
    names = [*map(_dotted, state)]
    if any(each.startswith(f"{name}.") for each in names):
        return KeyError(f"no state {name!r}; subtree(tree, {name!r}) has those below it")
    near = sorted(names, key=lambda each: abs(len(each) - len(name)))[:100]
    closest = difflib.get_close_matches(name, near, cutoff=0)
    return KeyError(f"no state {name!r}, or none below it; the closest are {closest}")


def _tree_leaves(state: StateTree) -> list[tuple[Path, Any]]:
    """The leaves of a tree with full paths, in the order in which JAX flattens it."""
    return [leaf for path, (_, value) in _rows(state).items() for leaf in _leaves(value, path)]


def partition(state: StateTree, filter: Filter) -> tuple[StateTree, StateTree]:
    """Split a tree into ``(matching, rest)``; ``matching | rest`` is the whole again.

    >>> params, rest = partition(StateTree({'w': ParamState(1.), 'h': HiddenState(0.)}), ParamState)
    >>> list(params), list(rest)
    ([('w',)], [('h',)])
    """
    rows = _rows(state)
    matching = _filtered(state.states(), filter)
    rest = {path: row for path, row in rows.items() if path not in matching}
    return _tree_from_rows({path: rows[path] for path in matching}), _tree_from_rows(rest)


def subtree(state: StateTree, path: Path | str) -> StateTree:
    """The states below a path, or dotted name, with paths from there; `KeyError` if there are none.

    >>> list(subtree(StateTree({'encoder.0.w': ParamState(1.), 'out': ParamState(2.)}), 'encoder'))
    [(0, 'w')]
    """
    name = _dotted(_as_path(path))
    below = {full[end:]: row for full, row in _rows(state).items()
             for end in range(1, len(full)) if _dotted(full[:end]) == name}
    if not below:
        raise _no_state(state, name)
    return _tree_from_rows(below)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys, whose dtypes are none of NumPy's."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf.dtype, np.dtype)


def flat_dict(state: StateTree) -> dict[str, Any]:
    """All leaves by dotted name, typed keys as their data: what npz and safetensors take.

    >>> list(flat_dict(StateTree({'layers.0': ParamState({'bias': 0., 'weight': 1.})})))
    ['layers.0.bias', 'layers.0.weight']
    """
    return {_dotted(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
            for path, leaf in _tree_leaves(state)}


def _check_alike(*states: StateTree) -> None:
    """Refuse trees of other leaves, dtypes or shapes; JAX refuses other kinds, tags and marks."""
    looks: list[set[Any]] = [{(path, np.shape(leaf), getattr(leaf, "dtype", None))
                              for path, leaf in _tree_leaves(state)} for state in states]
    if paths := {path for path, *_ in set.union(*looks) - set.intersection(*looks)}:
        names = [*map(_dotted, _in_order(paths))]
        raise ValueError(f"only the values of the trees may differ, not what is at {names}")


def where(mask: Any, new: StateTree, old: StateTree) -> StateTree:
    """A tree with ``new`` where ``mask`` holds and ``old`` elsewhere, along the axes of the mask.

    Leaves that are one object in both are kept. If any state is mapped, the mask is about members.
    Raises `ValueError` if the trees differ in more than values, if a leaf is not
    ``(*mask.shape, ...)``, or if a shared state differs.

    >>> old = StateTree({'h': HiddenState(jnp.ones(2))})
    >>> where([True, False], jax.tree.map(jnp.zeros_like, old), old)['h']
    Array([0., 1.], dtype=float32)
    """
    _check_alike(new, old)
    mask = jnp.asarray(mask)
    marks = [mapped for _, _, mapped in old._static.entries]
    unfit, of_members = [], any(marks)
    for path, mapped, value, other in zip(old, marks, old._values, new._values):
        for (leaf_path, leaf), fresh in zip(_leaves(value, path), jax.tree.leaves(other)):
            axes = np.shape(leaf)[:mapped] if of_members else np.shape(leaf)
            if leaf is not fresh and axes[:mask.ndim] != mask.shape:
                shared = "" if mapped else ", shared"
                unfit.append(f"{_dotted(leaf_path)!r} {_described(leaf)}{shared}")
    if unfit:
        raise ValueError(f"the mask's axes {mask.shape} do not lead {'; '.join(unfit)}; call where "
                         "in the same jitted function, or take what is shared with partition")
    masks = functools.cache(lambda rank: jnp.expand_dims(mask, tuple(range(mask.ndim, rank))))
    return _tree_from_rows(_rows(jax.tree.map(  # since a leaf that is kept may be NumPy's
        lambda fresh, leaf: leaf if leaf is fresh else jnp.where(
            masks(np.ndim(leaf)), _owned(fresh), _owned(leaf)), new, old)))


# ---- Copy, snapshot, restore ---------------------------------------------------------------------


def snapshot(module: Any) -> StateTree:
    """The states of a module as a tree, each shared state once, under its first path.

    >>> list(snapshot(restore(Module(), StateTree({'h': State(0.)}))))
    [('h',)]
    """
    return _tree_from_boxes(_walk(module).states)


def _refill(holder: Any, parts: dict[Any, Any]) -> None:
    """Make a module, state, list or dict hold these parts and nothing else."""
    role = _ROLES[type(holder)]
    inside, methods = (holder.__dict__, dict) if role in (Module, State) else (holder, role)
    methods.clear(inside)
    if role is list:
        list.extend(inside, parts.values())
    else:
        for name, part in parts.items():  # `OrderedDict.update` would call an overridden method
            methods.__setitem__(inside, name, part)


def _all_or_nothing(graph: _Graph, run: Callable[[], Any]) -> None:
    """Run, and if it raises put a graph, and the kinds and values of its states, back as before."""
    things, saved = graph.things(), list[Any]()  # flat: many dicts wake the garbage collector
    kinds = [*map(type, things)]
    for inside in map(_inside, things):
        saved.append(len(inside))
        saved += inside
        saved += inside.values()
    values = [(box, jax.tree.map(lambda leaf: np.copy(leaf) if type(leaf) is np.ndarray else leaf,
                                 box.value)) for box in graph.states.values()
              if "value" in box.__dict__ and not isinstance(box.value, jax.Array)]
    try:
        run()
    except BaseException:
        rest: Any = iter(saved)
        for thing, kind in zip(things, kinds):
            names = [next(rest) for _ in range(next(rest))]
            _refill(thing, dict(zip(names, rest)))  # names first: zip would draw one part too many
            if type(thing) is not kind:
                thing.__class__ = kind
        for box, value in values:
            box.value = value
        raise


def _attach(graph: _Graph, boxes: Mapping[Path, State]) -> None:
    """Put new states where their paths say: below the deepest holder there is, in new containers.

    A place is free if nothing or None is there or, for a state, a second name of another one. No
    new container goes beside modules: the states of three layers do not fit into two.
    """
    holders = {(): graph.root} | graph.modules | graph.containers
    filled: dict[Path, dict[Any, Any]] = {}  # what holders, new containers too, are to hold
    faults: list[str] = []
    for path, box in boxes.items():
        end = next(end for end in range(len(path) - 1, -1, -1) if path[:end] in holders)
        above, step, is_state = path[:end], path[end], end + 1 == len(path)
        parts = filled[above] = filled.get(above) or _inside(holders[above]).copy()
        old = parts.get(step)
        role = _ROLES[type(holders[above])]
        fits = (isinstance(step, str) if role is Module
                else role is not list or step in parts or step == len(parts))
        free = old is None or (isinstance(old, State) if is_state else (  # a second name
            isinstance(old, (list, dict))
            and all(isinstance(part, State) for part in _inside(old).values())))
        closed = role is not Module and (not above or not is_state and any(
            each[:end] == above for each in graph.modules))
        if closed or not free or not fits:
            at = _site(above, holders[above]) if old is None else _site(path[:end + 1], old)
            faults.append(f"{_dotted(path)!r} at {at}")
            continue
        for below in range(end + 1, len(path)):
            new = holders[path[:below]] = filled[path[:below]] = parts[path[below - 1]] = {}
            parts = new
        parts[path[-1]] = box
    if faults:
        raise ValueError(f"no place for {', '.join(faults)}; create modules in __init__, and write "
                         "None there for a state that init_state creates")
    for place, parts in reversed(filled.items()):  # from the inside to the outside
        if holders[place] is not parts:
            _refill(holders[place], parts)
        elif [*parts] == [*range(len(parts))]:
            filled[place[:-1]][place[-1]] = [*parts.values()]


def _fill(graph: _Graph, rows: dict[Path, _Row]) -> None:
    """Load rows into the states of a graph; make those that it lacks."""
    lacking = {path: _load(row) for path, row in rows.items() if path not in graph.states}
    if lacking:
        _attach(graph, lacking)
        graph.states.update(lacking)
    for path, row in rows.items():
        _load(row, graph.states[path])


def restore(module: T, state: StateTree) -> T:
    """Write a tree's values into a module, in place; states that the tree lacks keep theirs.

    States that the module lacks are created: `ValueError` if there is no place for one.

    >>> restore(Module(), StateTree({'h': HiddenState(jnp.ones(2))})).h
    HiddenState(float32[2])
    """
    graph = _walk(module)
    _all_or_nothing(graph, lambda: _fill(graph, _rows(state)))
    return module


def _new_like(thing: Any, *args: Any) -> Any:
    """A new object of the same class, with the same attributes; ``args`` has a tuple's items."""
    new = _ROLES[type(thing)].__new__(type(thing), *args)
    if attributes := getattr(thing, "__dict__", None):
        new.__dict__.update(attributes)
    if isinstance(thing, defaultdict):
        new.default_factory = thing.default_factory
    return new


def _copy_of(part: Any, copies: dict[int, Any]) -> Any:
    """The copy of a part: also of a tuple or a bound method that has to do with a copy."""
    role = _ROLES[type(part)]
    if role is tuple and id(part) not in copies:
        new = [_copy_of(each, copies) for each in tuple.__iter__(part)]
        changed = [*map(id, new)] != [*map(id, tuple.__iter__(part))]
        copies[id(part)] = _new_like(part, new) if changed else part
    if type(part) is types.MethodType and id(part.__self__) in copies:
        return types.MethodType(part.__func__, copies[id(part.__self__)])
    return copies.get(id(part), part)


def _copied(graph: _Graph, state: StateTree) -> _Graph:
    """A private copy of a graph, filled from a tree; all but what the walk finds is shared."""
    rows = _rows(state)
    if lacking := [path for path in graph.states if path not in rows]:
        raise ValueError(f"the state tree lacks {_sites(graph.states, lacking)}, which the module "
                         "has; pass the whole tree, such as `params | rest`")
    copies = {id(thing): _new_like(thing) for thing in graph.things()}
    for holder in (*graph.modules.values(), *graph.containers.values()):
        _refill(copies[id(holder)], {name: _copy_of(part, copies)
                                     for name, part in _inside(holder).items()})
    modules, containers, states = [{path: copies[id(thing)] for path, thing in things.items()}
                                   for things in (graph.modules, graph.containers, graph.states)]
    copy = _Graph(_copy_of(graph.root, copies), modules, containers, states, graph.aliases)
    _fill(copy, rows)
    return copy


# ---- The call engine -----------------------------------------------------------------------------
#
# A call is planned on the modules as they are (`_plan`) and then run (`_run`): on these modules, on
# a copy of them, or on a copy inside `jax.vmap`. Nothing runs unless the whole plan stands.

MAX_ORDER = 10


def call_order(level: int = 0, check_order_boundary: bool = True) -> Callable[[T], T]:
    """Decorate a method to run at a level: after all undecorated ones, lower levels first.

    `TypeError` unless an int, `ValueError` unless in ``[0, MAX_ORDER)`` where that is checked.

    >>> call_order(1)(lambda self: None).call_order
    1
    """
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(f"level must be an integer, as in @call_order(1); got {level!r}")
    if check_order_boundary and not 0 <= level < MAX_ORDER:
        raise ValueError(f"call_order takes a level in [0, {MAX_ORDER}); got {level}")

    def decorate(method: T) -> T:
        setattr(getattr(method, "__func__", method), "call_order", level)  # of a staticmethod too
        return method

    return decorate


class _Plan(NamedTuple):
    """A call that passed every check: a method, what it is given, and where it runs."""

    fn_name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: Key
    steps: dict[Path, bool]  # by path, in the order of the calls: whether the method takes a key


_MISSING = ("{} does not have method {!r}; define it there (to call a module, `update`) or, in a "
            "call to all nodes, pass node_to_exclude= or fn_if_not_exist='pass'")


def _check_call(fn_name: Any, kwargs: Any, fn_if_not_exist: Any, key: Any) -> None:
    """Check the arguments that tell how to call."""
    if not isinstance(fn_name, str):
        raise TypeError(f"fn_name must be a string, the name of a method; got {fn_name!r}")
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping, of keyword arguments; got {kwargs!r}")
    if fn_if_not_exist not in ("raise", "warn", "pass", "none"):
        raise ValueError(f"fn_if_not_exist is 'raise', 'warn' or 'pass'; got {fn_if_not_exist!r}")
    legacy = getattr(key, "dtype", None) == np.uint32
    if key is not None and (not (legacy or _is_key(key)) or np.ndim(key) != int(legacy)):
        raise TypeError(f"key= is one PRNG key, as of jax.random.key(0); got {_described(key)}")
    if key is not None and "key" in kwargs:
        raise TypeError("a key came both as key=, for each node its own, and in kwargs=; pass one")


def _method(node: Any, name: str) -> Any:
    """A method, or None; of the `__call__` of `Module`, the `update` to which it forwards."""
    if not isinstance(node, Module):
        return None  # `apply` takes no container, whose own methods these would be
    method = getattr(node, name, None)
    if method is None and inspect.getattr_static(node, name, None) is not None:
        return getattr(node, name)  # a property that raises AttributeError is no missing method
    return _method(node, "update") if getattr(method, "__func__", 0) is Module.__call__ else method


def _look(method: Any, args: Any, kwargs: Any, key: Key) -> tuple[str | None, float, bool]:
    """What is wrong with a call of one method, if anything; its level; whether it gets a key."""
    if not callable(method):
        return _MISSING if method is None else "on {} the attribute {!r} must be callable", 0, False
    fault, takes_key = None, False
    with contextlib.suppress(ValueError, TypeError):  # a builtin that does not tell, or arguments
        signature = inspect.signature(method)         # that the call itself will refuse
        kinds = {each.name: each.kind for each in signature.parameters.values()}
        named = kinds.get("key") in (inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                     inspect.Parameter.KEYWORD_ONLY)
        takes_key = key is not None and (named or inspect.Parameter.VAR_KEYWORD in kinds.values())
        given = signature.bind_partial(*args, **kwargs)
        if key is not None and named and "key" in given.arguments:
            fault = ("{} gets one key for {!r} by position and another by key=; pass one of them, "
                     "or put `key` last or after `*`")
        given.apply_defaults()
        if key is None and named and "key" not in given.arguments:
            fault = "{} requires a key for {!r}; pass key=jax.random.key(0)"
    does_nothing = getattr(method, "__func__", 0) in (Module.init_state, Module.reset_state)
    return fault, getattr(method, "call_order", float("-inf")), takes_key and not does_nothing


def _warn(message: str) -> None:
    """Warn at the line that called this file."""
    files = [frame.filename for frame in inspect.stack(0)]
    outside = (level for level, file in enumerate(files, 1) if file != files[0])
    warnings.warn(message, stacklevel=next(outside, len(files)))


def _plan(nodes: Mapping[Path, Any], fn_name: str, args: Any, kwargs: Mapping[str, Any] | None,
          node_to_exclude: Filter = None, fn_if_not_exist: str = "raise", key: Key = None) -> _Plan:
    """Check all that can be checked before the first method runs."""
    args, kwargs = args if isinstance(args, tuple) else (args,), {} if kwargs is None else kwargs
    _check_call(fn_name, kwargs, fn_if_not_exist, key)
    if node_to_exclude is not None:
        excluded = _filtered(nodes, node_to_exclude)
        nodes = {path: node for path, node in nodes.items() if path not in excluded}
    levels: dict[float, dict[Path, bool]] = {}  # a tuple for each node would wake the collector
    faults: dict[str, dict[Path, bool]] = {}
    looks: dict[int, Any] = {}  # by function, kept alive, so that one look serves all its nodes
    for path, node in nodes.items():
        method = _method(node, fn_name)
        function = getattr(method, "__func__", method)
        if id(function) not in looks:
            looks[id(function)] = *_look(method, args, kwargs, key), function
        fault, level, takes_key, _ = looks[id(function)]
        alike = levels.setdefault(level, {}) if fault is None else faults.setdefault(fault, {})
        alike[path] = takes_key
    for fault, alike in faults.items():
        text = fault.format(_sites(nodes, alike), fn_name)
        if fault is not _MISSING or fn_if_not_exist == "raise":
            raise (AttributeError if fault is _MISSING else TypeError)(text)
        if fn_if_not_exist == "warn":
            _warn(text)
    steps = {path: keyed for level in sorted(levels) for path, keyed in levels[level].items()}
    return _Plan(fn_name, args, kwargs, key, steps)


_fold_in = jax.jit(lambda key, words: functools.reduce(jax.random.fold_in, words, key))


def _node_key(key: Key, path: Path) -> Key:
    """The key of a node: a matter of its path (and `_order`) alone, in every process."""
    digest = hashlib.blake2b(repr(_order(path)).encode(), digest_size=8).digest()
    return _fold_in(key, np.frombuffer(digest, "<u4").astype(np.uint32))


def _shapes(path: Path, box: State) -> dict[Path, tuple[int, ...]]:
    return {leaf_path: np.shape(leaf) for leaf_path, leaf in _leaves(box.value, path)}


def _run(plan: _Plan, graph: _Graph) -> Outputs:
    """Run a plan on the modules of a graph; `ValueError` if mapped axes of its states change."""
    name, outputs = plan.fn_name, Outputs()
    before = {path: (box.mapped, _shapes(path, box))
              for path, box in graph.states.items() if box.mapped}
    for path, takes_key in plan.steps.items():
        node = graph.modules[path]
        try:
            key = {"key": _node_key(plan.key, path)} if takes_key else {}
            outputs[path] = getattr(node, name)(*plan.args, **plan.kwargs, **key)
        except Exception as error:
            with contextlib.suppress(Exception):  # a frozen exception, say, refuses notes
                error.add_note(f"raised by {name!r} of {_site(path, node)}")
                if isinstance(getattr(error, "obj", 0), (Module, type(None))):  # as in self.h.value
                    error.add_note("was the model initialised, by init or init_all_states?")
            raise
    after = graph.states
    if before and name != "init_state":  # which may begin anew, with other members
        after = after | _walk(graph.root).states
    changed = []
    for path, (mark, old) in before.items():
        members = next(iter(old.values()), ())[:mark]  # the leading axes that new leaves need, too
        for leaf_path, shape in _shapes(path, after[path]).items():
            was = old.get(leaf_path, members or shape)  # fewer axes: one is lost though sizes agree
            if after[path].mapped < mark or len(shape) < len(was) or shape[:mark] != was[:mark]:
                changed.append(_site(leaf_path, after[path]))
    if changed:
        form = {"init_state": "vmap_init", "reset_state": "vmap_reset"}.get(name, "vmap_call_all")
        raise ValueError(f"{name!r} ran once for all members and changed the leading axes "
                         f"of {', '.join(changed)}; run it with {form} (vmap_apply, or its form in "
                         f"place) or, for nested members, vmap(functools.partial({form}, module))")
    return {path: output for path, output in outputs.items() if output is not None}


# ---- Pure calls ----------------------------------------------------------------------------------


def _run_on_copy(graph: _Graph, state: StateTree, plan: _Plan) -> tuple[dict[Path, Any], ...]:
    """Run a plan on a copy: the outputs, and the boxes before and after, by path."""
    copied = _copied(graph, state)
    outputs, after = _run(plan, copied), _walk(copied.root)
    known = {*map(id, copied.things())}
    if created := [path for path, node in after.modules.items() if id(node) not in known]:
        raise ValueError(f"{plan.fn_name!r} created modules, {_sites(after.modules, created)}; "
                         "create modules in __init__, states in init_state")
    lost = copied.states.keys() - after.states.keys()
    if covered := [path for path in lost if any(map(_is_array, jax.tree.leaves(
            _inside(copied.containers.get(path[:-1], ())).get(path[-1]))))]:
        raise TypeError(f"{plan.fn_name!r} put arrays in the place of "
                        f"{_sites(copied.states, covered)}; write to their .value instead")
    if twice := [f"{_dotted(path)!r} and {_dotted(alias + path[len(first):])!r}"
                 for alias, first in after.aliases.items() if alias not in graph.aliases
                 for path, box in after.states.items()
                 if id(box) not in known and path[:len(first)] == first]:
        raise ValueError(f"{plan.fn_name!r} created states with two names, {', '.join(twice)}; "
                         "share them in __init__")
    return outputs, copied.states, after.states


def apply(module: Module, state: StateTree, *args: Any, method: str = "__call__", key: Key = None,
          **kwargs: Any) -> tuple[Any, StateTree]:
    """Call one method of a module: ``(output, state)``, with a new tree.

    The method is given ``key``, if any, as ``key=``. `ValueError` if the tree lacks a state of the
    module, or if the method creates modules or changes the leading axes of a mapped state.

    >>> class Counter(Module):
    ...     def update(self, by): self.count.value += by
    >>> apply(Counter(), StateTree({'count': State(jnp.array(0))}), 5)[1]['count'].item()
    5
    """
    kwargs = kwargs if key is None else {**kwargs, "key": key}
    graph, plan = _walk(module), _plan({(): module}, method, args, kwargs)
    outputs, _, after = _run_on_copy(graph, state, plan)
    return outputs.get(()), _tree_from_boxes(after)


def call_all(module: Any, state: StateTree, fn_name: str, args: Any = (),
             kwargs: Mapping[str, Any] | None = None, *, node_to_exclude: Filter = None,
             fn_if_not_exist: str = "raise", key: Key = None) -> tuple[Outputs, StateTree]:
    """Call a method on every node: ``(outputs, state)``, with a new tree.

    Outputs, by path in call order, lack those that are None. With ``key``, each node whose method
    has a parameter ``key``, or takes ``**kwargs``, gets its own, made of ``key`` and the node's
    path alone. ``fn_if_not_exist`` is 'raise', 'warn' or 'pass' (or 'none'). Raises what `apply`
    raises; `AttributeError` for a missing method; `TypeError` for an attribute that is no method,
    or a required key that is not given; `ValueError` for a bad policy.

    >>> class Layer(Module):
    ...     def norm(self, power): return jnp.sum(self.w.value ** power)
    >>> call_all([Layer()], StateTree({'0.w': ParamState(jnp.ones(3))}), 'norm', 2)[0]
    {(0,): Array(3., dtype=float32)}
    """
    graph = _walk(module)
    plan = _plan(graph.modules, fn_name, args, kwargs, node_to_exclude, fn_if_not_exist, key)
    outputs, _, after = _run_on_copy(graph, state, plan)
    return outputs, _tree_from_boxes(after)


def init(module: Any, *args: Any, node_to_exclude: Filter = None, key: Key = None,
         **kwargs: Any) -> StateTree:
    """Call ``init_state`` on every node, starting from ``snapshot(module)``: a new tree.

    >>> class Cell(Module):
    ...     def init_state(self, key): self.h = HiddenState(jax.random.normal(key, (3,)))
    >>> init([Cell()], key=jax.random.key(0))['0.h'].shape
    (3,)
    """
    return call_all(module, snapshot(module), "init_state", args, kwargs,
                    node_to_exclude=node_to_exclude, key=key)[1]


def reset(module: Any, state: StateTree, *args: Any, node_to_exclude: Filter = None,
          key: Key = None, **kwargs: Any) -> StateTree:
    """Call ``reset_state`` on every node: a new tree.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h.value = jnp.zeros(2)
    >>> reset(Cell(), StateTree({'h': HiddenState(jnp.ones(2))}))['h']
    Array([0., 0.], dtype=float32)
    """
    return call_all(module, state, "reset_state", args, kwargs,
                    node_to_exclude=node_to_exclude, key=key)[1]


# ---- vmap and the vmapped calls ------------------------------------------------------------------
#
# `jax.vmap` knows arrays. Here the mapped states of a tree go in along their leading axis, with a
# mark less, and the others beside it, as what all members share. A vmapped call does this around a
# plain call and, since it knows which boxes that made, decides by box what `vmap` does by path.


def _is_tree(part: Any) -> bool:
    return isinstance(part, StateTree)


def _with_axes(state: StateTree, count: int) -> StateTree:
    """The same values, said to have so many more mapped axes, as have trees in them."""
    return _tree_from_rows({path: ((kind, tag, mapped + count), jax.tree.map(
        lambda part: _with_axes(part, count) if _is_tree(part) else part, value, is_leaf=_is_tree))
        for path, ((kind, tag, mapped), value) in _rows(state).items()})


def _sizes(mapped: StateTree) -> list[tuple[str, tuple[int, ...]]]:
    return [(repr(_dotted(path)), np.shape(leaf)[:1]) for path, leaf in _tree_leaves(mapped)]


def _split_args(args: Any, in_axes: Any) -> tuple[Any, ...]:
    """Arguments as a member sees them, mapped states with a mark less, and axes for `jax.vmap`;
    names and sizes of all that is mapped; and for each tree, whether each state of it is mapped.
    """
    axes: list[Any] = []
    with contextlib.suppress(TypeError, ValueError):  # then there are too few axes
        jax.tree.map(lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part, _is_tree))),
                     tuple(in_axes) if isinstance(in_axes, list) else in_axes, args,
                     is_leaf=lambda part: part is None or _is_tree(part))
    flat, structure = jax.tree_util.tree_flatten_with_path(args, _is_tree)
    misfit = f"in_axes is an int or None, or a tuple or tree of these; {in_axes!r} does not fit "
    if len(axes) != len(flat):
        raise TypeError(f"{misfit}the {len(args)} arguments, {_described(args)}")
    parts, sizes, trees = [], [], []
    for i, ((keys, part), axis) in enumerate(zip(flat, axes)):
        name, rank = f"args{jax.tree_util.keystr(keys)}", 0 if _is_tree(part) else np.ndim(part)
        if axis is not None and (type(axis) is not int or not (
                _is_tree(part) or -rank <= axis < rank)):
            raise TypeError(f"{misfit}{name}, {_described(part)}; None shares it")
        if isinstance(part, StateTree):
            own, rest = partition(part, None if axis is None else lambda path, box: box.mapped)
            sizes += [(f"{path} of {name}", size) for path, size in _sizes(own)]
            trees.append({path: path in own for path in part})
            part = _with_axes(own, -1) | rest
            axes[i] = _tree_from_values(part._static, [0 if path in own else None for path in part])
        elif axis is not None:
            sizes.append((name, (np.shape(part)[axis],)))
        parts.append(part)
    return jax.tree.unflatten(structure, parts), jax.tree.unflatten(structure, axes), sizes, trees


@jax.custom_batching.custom_vmap
def _same_for_all(index: Any, states: list[StateTree | None]) -> Any:
    """States, of which none may differ between the members; `index`, which does, shows where."""
    return states


@_same_for_all.def_vmap
def _check_same(size: int, batched: Any, index: Any, states: Any) -> tuple[Any, Any]:
    unlike = [_site(path, tree.states()[path]) for tree, each in zip(states, batched[1])
              for path in tree or () if any(jax.tree.leaves(each[path]))]
    if unlike:
        raise ValueError(
            f"shared states ended up different per member: {', '.join(unlike)}; create them in "
            "init_state under a vmapped call, or build the members with vmap; exclude them "
            "(state_to_exclude); or make their values the same, as by jax.lax.pmean over "
            "axis_name. A gradient or other tree per member may leave as flat_dict(tree)")
    return states, batched[1]


def _map_members(call: Callable[..., Any], state: StateTree, args: tuple[Any, ...], in_axes: Any,
                 axis_size: int | None, axis_name: Hashable, key: Key = None) -> Any:
    """What ``call(trees, key, state, *args)`` returns per member, all states of ``state`` mapped.

    ``trees`` are those that `_split_args` tells of. Beside its result, ``call`` returns the rule
    for trees in it, ``rule_of(tree)``: a filter for what is per member; members share the rest.
    """
    args, axes, sizes, trees = _split_args(args, in_axes)
    sizes = [*_sizes(state), *sizes]
    size: Any = sizes[0][1][0] if axis_size is None and sizes and sizes[0][1] else axis_size
    if odd := [f"{name} {shape}" for name, shape in sizes if shape != (size,)]:
        raise ValueError(f"axis_size {size} is at odds with the mapped axis of {', '.join(odd)}")
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError("axis_size is a positive int, or None where a state or an argument is "
                         f"mapped; got {size!r}")
    keys = None if key is None else jax.random.split(key, int(size))
    # `_check_same` runs for the innermost vmap that batches an operand. `index` makes that the one
    # below; it is a mapped leaf if there is one, so that it is sharded as they are.
    index = next(iter(jax.tree.leaves(state)), jnp.arange(size))

    def of_member(index: Any, key: Key, state: StateTree, args: tuple[Any, ...]) -> Any:
        result, rule_of = call(trees, key, state, *args)
        leaves, structure = jax.tree.flatten(result, is_leaf=_is_tree)
        parts = [partition(leaf, rule_of(leaf)) if _is_tree(leaf) else (leaf, None)
                 for leaf in leaves]
        shared = _same_for_all(index, [part[1] for part in parts])
        return jax.tree.unflatten(structure, [part[0] for part in parts]), shared

    mapped = jax.vmap(of_member, (0, 0, 0, axes), (0, None), axis_name, int(size))
    result, shared = mapped(index, keys, _with_axes(state, -1), args)
    leaves, structure = jax.tree.flatten(result, is_leaf=_is_tree)
    return jax.tree.unflatten(structure, [_with_axes(leaf, +1) | rest if _is_tree(leaf) else leaf
                                          for leaf, rest in zip(leaves, shared)])


def _per_member(result: StateTree, arguments: list[dict[Path, bool]]) -> Filter:
    """Which states of a result have one value for each member: those that were so, and new ones.

    Where arguments disagree, those that have just these states decide.
    """
    alike = [mapped for mapped in arguments if mapped.keys() == result.keys()]
    said: dict[Path, set[bool]] = {}
    for path in result:
        decided = {mapped[path] for mapped in alike}
        by_any = {mapped[path] for mapped in arguments if path in mapped}
        said[path] = decided if len(decided) == 1 else by_any
    if unclear := [path for path in said if len(said[path]) > 1]:
        raise ValueError(f"{_sites(result.states(), unclear)}: mapped in one argument, shared in "
                         "another; give the trees names of their own, as in "
                         "StateTree({'actor': a, 'critic': c})")
    return lambda path, box: said[path] != {False}


def vmap(fn: Callable[..., Any], in_axes: Any = 0, *, axis_size: int | None = None,
         axis_name: Hashable = None) -> Callable[..., Any]:
    """`jax.vmap` that knows state trees: ``fn`` once per member.

    Positional arguments are mapped by ``in_axes``, as in `jax.vmap`. Of a state tree, wherever it
    stands in them, ``fn`` sees the mapped states of one member, with a mark less, and all of the
    others (with ``in_axes`` None: all states as they are). Results lead with the new axis,
    ``(size, *shape)``; in their trees, states that an argument had stay mapped or shared, and new
    ones are mapped. Raises `TypeError` for ``in_axes`` that do not fit; `ValueError` for sizes that
    disagree or are not positive, for a shared state that becomes one per member, and for a state
    mapped in one argument and shared in another, unless one alone has the states of the result.

    >>> class Dense(Module):
    ...     def __init__(self, key): self.w = ParamState(jax.random.normal(key, (3, 2)))
    >>> keys = jax.random.split(jax.random.key(0), 10)
    >>> vmap(lambda key: snapshot(Dense(key)))(keys)['w'].shape
    (10, 3, 2)
    """
    def call(trees: Any, key: None, state: StateTree, *args: Any) -> Any:
        return fn(*args), lambda tree: _per_member(tree, trees)

    @functools.wraps(fn)
    def vmapped(*args: Any) -> Any:
        return _map_members(call, StateTree({}), args, in_axes, axis_size, axis_name)

    return vmapped


def _call_members(graph: _Graph, state: StateTree, plan: _Plan, key: Key, in_axes: Any,
                  axis_size: int | None, axis_name: Hashable, state_to_exclude: Filter = None,
                  state_tag: Hashable = None) -> tuple[Outputs, StateTree]:
    """Run a plan once per member, with a key of its own: `vmap` that knows which boxes are new."""
    excluded = _predicate(state_to_exclude)
    own, rest = partition(state, lambda path, box: box.mapped and not excluded(path, box))
    output_paths: list[Path] = []
    of_first: set[Path] = set()  # new states that all members share, as the first one has them

    def call(_: Any, key: Key, own: StateTree, *args: Any) -> Any:
        given = plan._replace(args=args, key=key)
        if key is not None and plan.key is None:  # of `vmap_apply`, whose method takes it as it is
            given = given._replace(kwargs={**plan.kwargs, "key": key})
        outputs, before, after = _run_on_copy(graph, own | rest, given)
        strays = [f"{_site(path, graph.modules[path])} returned {type(leaf).__name__}"
                  for path, output in outputs.items()
                  for leaf in jax.tree.leaves(output, lambda part: isinstance(part, Iterator))
                  if not _is_array(leaf)]
        if strays:
            raise TypeError(f"{plan.fn_name!r} of {'; of '.join(strays)}, which cannot cross a "
                            "vmapped call; return arrays, or pytrees of arrays")
        output_paths.extend(outputs)
        existing = {id(box): path in own for path, box in before.items()}
        shared = {path for path, box in after.items() if existing.get(id(box)) is False}
        for path, box in after.items():
            if id(box) not in existing:
                box.tag = state_tag if box.tag is None else box.tag
                if excluded(path, box):
                    of_first.add(path)
        new = _tree_from_boxes(after)

        def rule_of(tree: StateTree) -> Filter:  # trees that methods returned are so as a whole
            return (lambda path, box: path not in shared) if tree is new else ...

        return ([*outputs.values()], new), rule_of

    outputs, new = _map_members(call, own, plan.args, in_axes, axis_size, axis_name, key)
    if of_first:
        first, others = partition(new, lambda path, box: path in of_first)
        new = others | member(first, 0)
    return dict(zip(output_paths, outputs)), new


def vmap_apply(module: Module, state: StateTree, *args: Any, in_axes: Any = 0,
               axis_size: int | None = None, axis_name: Hashable = None, method: str = "__call__",
               key: Key = None, **kwargs: Any) -> tuple[Any, StateTree]:
    """Call one method of a module once per member: ``(outputs, state)``, with a new tree.

    Positional arguments are mapped by ``in_axes``, as in `jax.vmap`; keyword arguments are shared;
    member ``i`` is given ``jax.random.split(key, axis_size)[i]`` as ``key=``. Outputs are
    ``(axis_size, *shape)``. Raises what `vmap_call_all` raises.

    >>> class Square(Module):
    ...     def update(self, x): return x ** 2
    >>> vmap_apply(Square(), StateTree({}), jnp.arange(3))[0]
    Array([0, 1, 4], dtype=int32)
    """
    graph, plan = _walk(module), _plan({(): module}, method, args, kwargs, key=key)
    plan = plan._replace(key=None, steps={(): False})  # the key goes in by `kwargs`, as it is
    outputs, state = _call_members(graph, state, plan, key, in_axes, axis_size, axis_name)
    return outputs.get(()), state


def vmap_call_all(module: Any, state: StateTree, fn_name: str, args: Any = (),
                  kwargs: Mapping[str, Any] | None = None, *, axis_size: int | None = None,
                  axis_name: Hashable = None, in_axes: Any = None, node_to_exclude: Filter = None,
                  state_to_exclude: Filter = None, state_tag: Hashable = None,
                  fn_if_not_exist: str = "raise", key: Key = None) -> tuple[Outputs, StateTree]:
    """Call a method on every node, once per member: ``(outputs, state)``, with a new tree.

    Mapped states are seen one member at a time; the others, and those that match
    ``state_to_exclude``, are shared. A state created during the call gains an axis of
    ``axis_size``, by default that of the mapped states or arguments, and the tag ``state_tag`` if
    it has none; if it matches ``state_to_exclude``, all share the value of the first member.
    ``in_axes`` maps ``args``, by default shared; ``axis_name`` names the axis, as for
    `jax.lax.pmean`. Member ``i`` sees the key ``jax.random.split(key, axis_size)[i]``. Outputs are
    ``(axis_size, *shape)``. Raises what `call_all` and `vmap` raise, and `TypeError` for outputs
    that are no arrays.

    >>> class Die(Module):
    ...     def roll(self, key): return jax.random.randint(key, (2,), 1, 7)
    >>> vmap_call_all(Die(), StateTree({}), 'roll', axis_size=5, key=jax.random.key(0))[0][()].shape
    (5, 2)
    """
    graph = _walk(module)
    plan = _plan(graph.modules, fn_name, args, kwargs, node_to_exclude, fn_if_not_exist, key)
    return _call_members(graph, state, plan, key, in_axes, axis_size, axis_name, state_to_exclude,
                         state_tag)


def vmap_init(module: Any, *args: Any, axis_size: int | None = None, axis_name: Hashable = None,
              in_axes: Any = None, node_to_exclude: Filter = None, state_to_exclude: Filter = None,
              state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> StateTree:
    """`init` per member: what ``init_state`` creates is ``(axis_size, *shape)``, the rest shared.

    Warns (`UserWarning`) if no state is mapped then; `vmap` builds members from a constructor.

    >>> class Cell(Module):
    ...     def init_state(self): self.h = HiddenState(jnp.zeros(3))
    >>> vmap_init(Cell(), axis_size=4)['h'].shape
    (4, 3)
    """
    _, state = vmap_call_all(
        module, snapshot(module), "init_state", args, kwargs, axis_size=axis_size,
        axis_name=axis_name, in_axes=in_axes, node_to_exclude=node_to_exclude,
        state_to_exclude=state_to_exclude, state_tag=state_tag, key=key)
    if not any(mapped for _, _, mapped in state._static.entries):
        _warn("no state is mapped, so all members are one; create states in init_state, or build "
              "independent members: vmap(lambda key: init(Model(key), key=key))"
              "(jax.random.split(key, axis_size))")
    return state


def _sharding(leaf: Any) -> Any:
    """Where an array lies; None if it is traced, when asking it would describe the whole trace."""
    return getattr(leaf, "sharding", None) if isinstance(leaf, _concrete()) else None


@functools.cache
def _concrete() -> tuple[type, ...]:
    with jax.ensure_compile_time_eval():
        return type(jnp.zeros(())), type(jax.random.key(0))


def vmap_reset(module: Any, state: StateTree, *args: Any, axis_size: int | None = None,
               axis_name: Hashable = None, in_axes: Any = None, node_to_exclude: Filter = None,
               state_to_exclude: Filter = None, state_tag: Hashable = None, key: Key = None,
               **kwargs: Any) -> StateTree:
    """`reset` of every member, each of which sees the shapes of a single model.

    Outside ``jit``, what was spread over devices goes back to the sharding that it had.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h.value = jnp.zeros(3)
    >>> vmap_reset(Cell(), stack(StateTree({'h': HiddenState(jnp.ones(3))})))['h'].shape
    (1, 3)
    """
    _, new = vmap_call_all(
        module, state, "reset_state", args, kwargs, axis_size=axis_size, axis_name=axis_name,
        in_axes=in_axes, node_to_exclude=node_to_exclude, state_to_exclude=state_to_exclude,
        state_tag=state_tag, key=key)
    old = dict(_tree_leaves(state))

    leaves = []
    for path, leaf in _tree_leaves(new):
        here, there = _sharding(leaf), _sharding(old.get(path))  # None of what is traced
        if here and there and leaf.shape == old[path].shape and (
                len(there.device_set) > len(here.device_set) == 1):
            leaf = jax.device_put(leaf, there)
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(new), leaves)  # type: ignore[no-any-return]


def stack(*states: StateTree) -> StateTree:
    """One ensemble, of leaves ``(len(states), *shape)``; `ValueError` if more than values differ.

    >>> stack(*[StateTree({'h': HiddenState(jnp.zeros(3))})] * 2)['h'].shape
    (2, 3)
    """
    if not states:
        raise ValueError("stack takes at least one state tree")
    _check_alike(*states)
    return _with_axes(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), +1)


def member(state: StateTree, i: Any) -> StateTree:
    """Member ``i`` of an ensemble as a single tree; a JAX array ``i`` is clamped, as by JAX.

    `TypeError` unless ``i`` is one integer, `IndexError` if it is out of range.

    >>> member(stack(*[StateTree({'h': HiddenState(float(i))}) for i in range(3)]), -1)['h'].item()
    2.0
    """
    if np.ndim(i) or not jnp.issubdtype(getattr(i, "dtype", type(i)), np.integer):
        raise TypeError(f"a member is chosen by one integer; got {_described(i)}")
    mapped, shared = partition(state, lambda path, box: box.mapped)
    for leaf in () if isinstance(i, jax.Array) else jax.tree.leaves(mapped):
        if not -len(leaf) <= i < len(leaf):
            raise IndexError(f"member {i} of {len(leaf)}")
    return _with_axes(jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], mapped), -1) | shared


# ---- Assigning -----------------------------------------------------------------------------------


class Assigned(NamedTuple):
    """What `assign` returns."""

    state: StateTree
    unexpected: list[Any]  # keys as the caller wrote them, or paths of extra leaves
    missing: list[Path]  # paths of states, or of leaves where only part of a state was given


def _given(value: Any, path: Path) -> list[tuple[Path, Any]]:
    """The leaves of nested mappings, boxes and pytrees, with their paths."""
    value = value.value if isinstance(value, State) else value
    if isinstance(value, Mapping):
        return [leaf for key, part in value.items() for leaf in _given(part, path + _as_path(key))]
    return [(path, value)] if value is None else _leaves(value, path)  # None is no leaf to JAX


def _fits(new: Any, old: Any) -> bool:
    """Whether an array has the shape of a leaf, and can be cast to its dtype without much loss."""
    def rank(dtype: Any) -> int:
        kinds = (np.bool_, np.integer, np.floating, np.complexfloating)  # each fits the later ones
        return next((i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), 4)

    if new.shape != old.shape or new.dtype == old.dtype or not _is_array(new):
        return bool(new.shape == old.shape and new.dtype == old.dtype)
    source, target = rank(new.dtype), rank(old.dtype)
    if source != 1 or target in (0, 4):
        return source <= target < 4
    info: Any = {1: jnp.iinfo, 2: jnp.finfo, 3: jnp.finfo}
    limits, ints = info[target](old.dtype), info[1](new.dtype)
    low, high = map(int if target == 1 else float, (limits.min, limits.max))
    if low <= ints.min and ints.max <= high:
        return True
    with contextlib.suppress(jax.errors.TracerArrayConversionError):  # while tracing, none can tell
        numbers = np.asarray(new)
        return not new.size or low <= int(numbers.min()) and int(numbers.max()) <= high
    return False


def _fitted(new: Any, old: Any) -> Any:
    """A value with the dtype and, if a JAX array, sharding of a leaf; None if it does not fit."""
    if _is_key(old) and not _is_key(new):
        new = _fitted(new, jax.random.key_data(old))
        if new is None:
            return None
        new = jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
    if not isinstance(new, jax.Array):
        new = np.asarray(new)
        if new.dtype == f"V{old.dtype.itemsize}" and old.dtype.isbuiltin != 1:
            new = new.view(old.dtype)  # what npz makes of bfloat16, which it has no name for
    if not _fits(new, old):
        return None
    if not isinstance(new, jax.Array):
        return np.array(new, old.dtype)  # a copy, whose memory JAX may go on using
    if new.dtype != old.dtype or getattr(new, "weak_type", False):
        new = jnp.asarray(new, old.dtype)
    here, there = _sharding(new), _sharding(old)
    return new if None in (here, there) or here == there else jax.device_put(new, there)


def assign(state: StateTree, *snapshots: Mapping[Any, Any]) -> Assigned:
    """Load values into a tree by name: a named tuple ``(state, unexpected, missing)``.

    A snapshot is a state tree, or a mapping from paths or dotted names to values, leaves or nested
    dicts: all reach the leaf that has the dotted name. Later snapshots win. Each leaf keeps its
    dtype, shape and sharding. ``unexpected`` has keys as they were written, or paths of extra
    leaves of a state; ``missing`` has paths of states, or of leaves of a state given in part.
    Raises one `ValueError` that lists every leaf of another shape, of a kind or with an integer
    that does not fit (float into int, 200 into int8), or that is no array.

    >>> tree = StateTree({'W': ParamState({'bias': 0., 'weight': 1.})})
    >>> tree, unexpected, missing = assign(tree, {'W.bias': np.float64(2), 'V': np.ones(2)})
    >>> tree['W']['bias'].item(), unexpected, missing
    (2.0, ['V'], [('W', 'weight')])
    """
    leaves = _tree_leaves(state)
    old, paths = dict(leaves), {_dotted(path): path for path, _ in leaves}
    new: dict[Path, Any] = {}
    unexpected: list[Any] = []
    for each in snapshots:
        if not isinstance(each, Mapping):
            raise TypeError(f"a snapshot is a mapping; got {type(each).__name__}")
        for key, value in each.items():
            given = _given(value, _as_path(key))
            found = {paths[name]: leaf for path, leaf in given if (name := _dotted(path)) in paths}
            extra = [path for path, leaf in given if not (leaf is None or _dotted(path) in paths)]
            new.update(found)
            if found:
                unexpected += extra
            elif extra or key not in state:
                unexpected.append(key)
    fitted = {path: _fitted(leaf, old[path]) for path, leaf in new.items()}
    if unfit := [f"{_dotted(path)!r} expected {_described(old[path])}, got {_described(new[path])}"
                 for path in _in_order(fitted) if fitted[path] is None]:
        raise ValueError(f"nothing was assigned, since values do not fit: {'; '.join(unfit)}")
    host = {path: leaf for path, leaf in fitted.items() if isinstance(leaf, np.ndarray)}
    shardings = [_sharding(old[path]) for path in host]
    default = _sharding(jax.device_put(np.zeros(())))  # what lies there may move on
    fitted |= zip(host, jax.device_put([*host.values()], [
        None if each == default else each for each in shardings]))
    missing: list[Path] = []
    for path, (_, value) in _rows(state).items():
        within = [leaf_path for leaf_path, _ in _leaves(value, path)]
        lost = [leaf_path for leaf_path in within if leaf_path not in fitted]
        missing += [path] if lost and lost == within else lost
    leaves = [fitted.get(path, leaf) for path, leaf in leaves]
    loaded = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return Assigned(loaded, _in_order({*unexpected}), _in_order(missing))


# ---- In place: the documented API ----------------------------------------------------------------


def call_all_fns(target: T, fn_name: str, args: Any = (), kwargs: Mapping[str, Any] | None = None,
                 node_to_exclude: Filter = None, fn_if_not_exist: str = "raise", *,
                 key: Key = None) -> T:
    """`call_all` in place: the methods run on the modules themselves. Returns the target.

    >>> class Counter(Module):
    ...     def tick(self): self.count.value += 1
    >>> call_all_fns(restore(Counter(), StateTree({'count': State(1)})), 'tick').count.value.item()
    2
    """
    graph = _walk(target)
    plan = _plan(graph.modules, fn_name, args, kwargs, node_to_exclude, fn_if_not_exist, key)
    _all_or_nothing(graph, lambda: _run(plan, graph))
    return target


def vmap_call_all_fns(target: T, fn_name: str, args: Any = (),
                      kwargs: Mapping[str, Any] | None = None, axis_size: int | None = None,
                      node_to_exclude: Filter = None, state_tag: Hashable = None,
                      fn_if_not_exist: str = "raise", *, in_axes: Any = None,
                      axis_name: Hashable = None, state_to_exclude: Filter = None,
                      key: Key = None) -> T:
    """`vmap_call_all` whose states alone are written into the target; dropped states stay.

    >>> class Cell(Module):
    ...     def start(self, key): self.h = HiddenState(jax.random.normal(key, (3,)))
    >>> vmap_call_all_fns(Cell(), 'start', axis_size=4, key=jax.random.key(0)).h
    HiddenState(float32[4,3], mapped=1)
    """
    return restore(target, vmap_call_all(
        target, snapshot(target), fn_name, args, kwargs, axis_size=axis_size, axis_name=axis_name,
        in_axes=in_axes, node_to_exclude=node_to_exclude, state_to_exclude=state_to_exclude,
        state_tag=state_tag, fn_if_not_exist=fn_if_not_exist, key=key)[1])


def init_all_states(target: T, *args: Any, node_to_exclude: Filter = None, key: Key = None,
                    **kwargs: Any) -> T:
    """`init` in place. Returns the target.

    >>> class Cell(Module):
    ...     def init_state(self, size): self.h = HiddenState(jnp.zeros(size))
    >>> init_all_states(Cell(), 3).h
    HiddenState(float32[3])
    """
    return call_all_fns(target, "init_state", args, kwargs, node_to_exclude, key=key)


def reset_all_states(target: T, *args: Any, node_to_exclude: Filter = None, key: Key = None,
                     **kwargs: Any) -> T:
    """`reset` in place. Returns the target.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h = HiddenState(jnp.zeros(2))
    >>> reset_all_states(Cell()).h
    HiddenState(float32[2])
    """
    return call_all_fns(target, "reset_state", args, kwargs, node_to_exclude, key=key)


def vmap_init_all_states(target: T, *args: Any, axis_size: int | None = None,
                         node_to_exclude: Filter = None, state_to_exclude: Filter = None,
                         state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> T:
    """`vmap_init` in place. Returns the target.

    >>> class Cell(Module):
    ...     def init_state(self): self.h = HiddenState(jnp.zeros(3))
    >>> vmap_init_all_states(Cell(), axis_size=4).h
    HiddenState(float32[4,3], mapped=1)
    """
    return restore(target, vmap_init(
        target, *args, axis_size=axis_size, node_to_exclude=node_to_exclude,
        state_to_exclude=state_to_exclude, state_tag=state_tag, key=key, **kwargs))


def vmap_reset_all_states(target: T, *args: Any, axis_size: int | None = None,
                          node_to_exclude: Filter = None, state_to_exclude: Filter = None,
                          state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> T:
    """`vmap_reset` in place. Returns the target.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h = HiddenState(jnp.zeros(2))
    >>> vmap_reset_all_states(Cell(), axis_size=4).h
    HiddenState(float32[4,2], mapped=1)
    """
    return restore(target, vmap_reset(
        target, snapshot(target), *args, axis_size=axis_size, node_to_exclude=node_to_exclude,
        state_to_exclude=state_to_exclude, state_tag=state_tag, key=key, **kwargs))


def assign_state_values(target: Any, *state_by_abs_path: Mapping[Any, Any],
                        ) -> tuple[list[Any], list[Path]]:
    """`assign` in place: ``(unexpected, missing)``.

    >>> assign_state_values(Module(), {'v': np.ones(2)})
    (['v'], [])
    """
    state, unexpected, missing = assign(snapshot(target), *state_by_abs_path)
    untouched = {*missing}  # which stay the very objects that they are
    restore(target, partition(state, lambda path, box: path not in untouched)[0])
    return unexpected, missing


# ---- The demonstration: python -m collective -----------------------------------------------------


def _demonstrate() -> None:
    """Run the example of this file, as a person would type it."""
    import doctest

    names = dict(globals())
    np.set_printoptions(precision=3)
    for example in doctest.DocTestParser().get_examples(__doc__ or ""):
        print(">>> " + example.source.rstrip().replace("\n", "\n... "))
        try:
            exec(compile(example.source, "<demonstration>", "single"), names)
        except ValueError as error:
            print(f"ValueError: {error}")
    print(f"\njax {jax.__version__}. Read on: help(collective), README.md")


if __name__ == "__main__":
    _demonstrate()
