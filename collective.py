# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the collective-states authors
"""Initialise, reset, call, batch and restore every module of a JAX model at once.

* A **state** is a `State` box that holds an array, or any pytree of arrays.
* A **module** is an instance of `Module`. Its states and child modules are found in its
  attributes, directly or inside lists, tuples and dicts at any depth.
* A **path** is the tuple of names, keys and indices from the root to a state or a module:
  ``('layers', 0, 'weight')``, also written ``'layers.0.weight'`` where a path is read.
* A **state tree** is a `StateTree`: an immutable mapping from path to value, and a pytree.
* A **member** is one model of an ensemble; the members lie along leading *mapped axes*.

Pure functions take a module as a template, which they only read, and a state tree; they return
a new tree, so they work inside ``jit``, ``grad``, ``vmap`` and ``scan``::

    traverse(module)              -> iterator of (path, module), children before parents
    snapshot(module)              -> state              restore(module, state) -> module
    init(module, *args)           -> state              vmap_init(..., axis_size=n)
    reset(module, state, *args)   -> state              vmap_reset(...)
    apply(module, state, *args)   -> (output, state)    vmap_apply(...)
    call_all(module, state, name) -> (outputs, state)   vmap_call_all(...)
    partition(state, filter)      -> (matching, rest)   matching | rest -> state
    where(mask, new, old)         -> state              flat_dict(state) -> {name: array}
    stack(*states)                -> state              member(state, i) -> state
    assign(state, *snapshots)     -> (state, unexpected, missing)

In place: `call_all_fns`, `init_all_states`, `reset_all_states`, their ``vmap_`` forms and
`assign_state_values`. `call_order` orders the calls of both families. A list, tuple or dict of
modules goes wherever a module does, but in `apply`; anything else is a `TypeError`. All that can
be checked is checked before the first method runs, and a call that raises changes nothing.

>>> class Cell(Module):
...     def __init__(self, size):
...         self.weight = ParamState(0.5 * jnp.eye(size))        # one, shared by all members
...     def init_state(self, *, key):
...         self.h = HiddenState(jax.random.normal(key, (3,)))   # one for each member
...     def update(self, x):
...         self.h.value = jnp.tanh(self.weight.value @ self.h.value + x)
...         return self.h.value
>>> cell = Cell(3)
>>> state = vmap_init(cell, axis_size=4, key=jax.random.key(0))
>>> state
path    kind         value         mapped
h       HiddenState  float32[4,3]  1
weight  ParamState   float32[3,3]  0
>>> @jax.jit
... def rollout(state, xs):                                      # xs: (time, member, 3)
...     return jax.lax.scan(lambda state, x: vmap_apply(cell, state, x)[::-1], state, xs)
>>> state, outputs = rollout(state, jnp.ones((10, 4, 3)))
>>> outputs.shape, state['h'].shape
((10, 4, 3), (4, 3))

Needs Python >= 3.11 and jax >= 0.4.30; tested with jax 0.4.30, 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__version__ = "0.1.0"

__all__ = [
    "MAX_ORDER", "Assigned", "HiddenState", "LongTermState", "Module", "ParamState", "Path",
    "ShortTermState", "State", "StateTree", "apply", "assign", "assign_state_values", "call_all",
    "call_all_fns", "call_order", "flat_dict", "init", "init_all_states", "member", "partition",
    "reset", "reset_all_states", "restore", "snapshot", "stack", "traverse", "vmap_apply",
    "vmap_call_all", "vmap_call_all_fns", "vmap_init", "vmap_init_all_states", "vmap_reset",
    "vmap_reset_all_states", "where",
]

Path = tuple[Hashable, ...]  # attribute names, dict keys and list indices, from the root
Filter = Any  # a type, a tag, a predicate, `...`, None, or a list of these: see `_predicate`
Key = Any  # one PRNG key, typed or legacy, or None
Kwargs = Mapping[str, Any] | None  # keyword arguments of a method
Outputs = dict[Path, Any]  # what methods returned, by the paths of their modules, in call order
T = TypeVar("T")  # what comes back as it came, such as a module or a list of modules


# ---- States and filters --------------------------------------------------------------------------


class State:
    """A box for one value of a module: an array, or any pytree of arrays.

    `tag` is a label for filters; `mapped` counts the leading ensemble axes of the value.
    Subclasses are kinds: filters select by them, and state trees record them.

    >>> State({'bias': jnp.zeros(2)}, tag='slow')
    State(bias float32[2])
    """

    def __init__(self, value: Any, *, tag: Hashable = None) -> None:
        self.value, self.tag, self.mapped = value, tag, 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_described(self.value)})"


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


def _chosen(things: Mapping[Path, T], filter: Filter) -> dict[Path, T]:
    chosen = _predicate(filter)
    return {path: thing for path, thing in things.items() if chosen(path, thing)}


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _path(name: Any) -> Path:
    """The path that a dotted name spells; any other key is a path, or one step of it."""
    if not isinstance(name, str):
        return name if isinstance(name, tuple) else (name,)
    return tuple(int(part) if part.isdecimal() and part == str(int(part)) else part
                 for part in name.split("."))


def _rank(path: Any) -> list[tuple[int, Any]]:
    """Where a path comes in canonical order: ints by number, then strings, then others by repr."""
    return [(0, part) if isinstance(part, int) else (1, part) if isinstance(part, str)
            else (2, repr(part)) for part in (path if isinstance(path, tuple) else (path,))]


def _in_order(paths: Iterable[Path]) -> list[Path]:
    paths = list(paths)
    with contextlib.suppress(TypeError):
        if {*map(type, itertools.chain.from_iterable(paths))} <= {int, str}:
            return sorted(paths)  # the same order, only faster, where no int meets a string
    return sorted(paths, key=_rank)


def _sites(things: Mapping[Path, Any], paths: Iterable[Path]) -> str:
    """Where some of the things are, for messages: "'layers.0' (Linear), 'layers.1' (Linear)"."""
    names = {path: repr(_dotted(path)) if path else "the root" for path in _in_order(paths)}
    return ", ".join(f"{name} ({type(things[path]).__name__})" for path, name in names.items())


def _leaves(value: Any, path: Path = (), is_leaf: Any = None) -> list[tuple[Path, Any]]:
    """The leaves of a pytree with their paths, in the order in which JAX flattens it."""
    return [(path + tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
                          for key in keys), leaf)
            for keys, leaf in jax.tree_util.tree_flatten_with_path(value, is_leaf)[0]]


def _described(value: Any) -> str:
    """Dtypes and shapes of a pytree: "bias float32[2], weight float32[4,2]"."""
    return ", ".join(
        f"{_dotted(path)} {leaf.dtype}[{','.join(map(str, leaf.shape))}]".lstrip()
        if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else type(leaf).__name__
        for path, leaf in _leaves(value, is_leaf=lambda part: part is None))


# ---- Modules and the walk ------------------------------------------------------------------------


class Module:
    """Base class of what holds states, to mix in; define `update`, `init_state`, `reset_state`.

    >>> class Scale(Module):
    ...     def __init__(self, size): self.factor = ParamState(jnp.ones(size))
    ...     def update(self, x): return self.factor.value * x
    >>> Scale(2)(3.), Scale(2)
    (Array([3., 3.], dtype=float32), Scale
      factor: ParamState(float32[2]))
    """

    update: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        slots = itertools.chain(*(vars(base).get("__slots__", ()) for base in cls.__mro__))
        if names := sorted({*slots} - {"__dict__", "__weakref__"}):
            raise TypeError(f"{cls.__name__} has __slots__ {names}, where no state is found; "
                            "remove them")

    def init_state(self, *args: Any, **kwargs: Any) -> Any:
        """Create the states of this module; does nothing by default."""

    def reset_state(self, *args: Any, **kwargs: Any) -> Any:
        """Set the states of this module back; does nothing by default."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.update(*args, **kwargs)

    def states(self, filter: Filter = ...) -> dict[Path, State]:
        """The live states that pass a filter, each once, under its first path."""
        return _chosen(_walk(self).states, filter)

    def nodes(self, filter: Filter = ...) -> dict[Path, Module]:
        """The modules that pass a filter, this one included, in the order of `traverse`."""
        return _chosen(_walk(self).modules, filter)

    def __repr__(self) -> str:
        graph = _walk(self)
        texts = {path: type(node).__name__ for path, node in graph.modules.items()} | graph.states
        return "\n".join("  " * len(path) + f"{_dotted(path)}: {texts[path]}".removeprefix(": ")
                         for path in _in_order(texts))


class _Roles(dict[type, Any]):
    """What a type is to the walk, if anything; cached, since type checks took half of its time."""

    def __missing__(self, kind: type) -> Any:
        bases = (Module, State, dict, list, tuple, types.MethodType, jax.Array)
        return self.setdefault(kind, next((base for base in bases if issubclass(kind, base)), None))


_ROLES = _Roles()


class _Graph(NamedTuple):
    """What one walk finds: every object once, under the path by which it was met first."""

    root: Any
    modules: dict[Path, Module]  # children before parents
    containers: dict[Path, Any]  # lists, tuples and dicts
    states: dict[Path, State]
    methods: list[types.MethodType]  # bound methods kept as attributes


def _inside(holder: Any) -> Any:
    """The dict, list or tuple in which a module or container has its parts."""
    return holder.__dict__ if isinstance(holder, Module) else holder


def _parts(holder: Any) -> Iterable[tuple[Any, Any]]:
    inside = _inside(holder)
    return inside.items() if isinstance(inside, dict) else enumerate(inside)


def _walk(root: Any) -> _Graph:
    """Walk a module, or a list, tuple or dict of modules, depth first and without recursion."""
    role, holders = _ROLES[type(root)], (Module, list, tuple, dict)
    kinds = {type(part) for _, part in _parts(root)} if role in holders[1:] else {type(root)}
    if strays := sorted(kind.__name__ for kind in kinds if not issubclass(kind, holders)):
        raise TypeError(f"expected a module, or a list, tuple or dict of modules; got {strays}")
    _, modules, containers, states, methods = graph = _Graph(root, {}, {}, {}, [])
    path: Path = ()
    stack: list[Any] = []  # the holders above, and how far their parts are read
    holder, items, seen = root, iter(_parts(root)), {id(root)}
    roles, array = _ROLES, jax.Array
    while True:
        for name, part in items:
            kind = roles[type(part)]
            if kind is None or kind is array or (identity := id(part)) in seen:
                continue
            seen.add(identity)
            if kind is State:
                states[path + (name,)] = part
            elif kind is types.MethodType:
                methods.append(part)
            else:
                stack.append((path, holder, role, items))
                path, holder, role = path + (name,), part, kind
                items = iter(part.__dict__.items() if kind is Module else _parts(part))
                break
        else:
            (modules if role is Module else containers)[path] = holder
            if not stack:
                return graph
            path, holder, role, items = stack.pop()


def traverse(module: Any) -> Iterator[tuple[Path, Module]]:
    """Iterate over ``(path, module)``: each once, by its first path, children before parents.

    >>> [path for path, _ in traverse({'encoder': [Module()], 'decoder': Module()})]
    [('encoder', 0), ('decoder',)]
    """
    return iter(_walk(module).modules.items())


# ---- State trees ---------------------------------------------------------------------------------
#
# A tree holds its values in one tuple, in canonical order, so that JAX flattens it with one call.
# All else is static; `_tree` makes equal static parts one object: treedefs compare by identity.

_Entry = tuple[type[State], Hashable, int]  # kind, tag and mapped count of one state
_Rows = dict[Path, tuple[_Entry, Any]]  # what a tree is built from: an entry and a value each


def _found(paths: Iterable[Path]) -> dict[Any, list[Path]]:
    """Paths by themselves, and by dotted name, which several may share."""
    found: dict[Any, list[Path]] = {}
    for path in paths:
        found.setdefault(path, []).append(path)
        found.setdefault(_dotted(path), []).append(path)
    return found


class _Static:
    """What all trees with the same states share."""

    def __init__(self, paths: tuple[Path, ...], entries: tuple[_Entry, ...]) -> None:
        self.paths, self.entries = paths, entries
        self.positions = dict(zip(paths, itertools.count()))

    def __repr__(self) -> str:  # as JAX shows it in its messages
        return ", ".join(map(_dotted, self.paths))

    @functools.cached_property
    def found(self) -> dict[Any, list[Path]]:
        return _found(self.paths)


_statics: weakref.WeakValueDictionary[Any, _Static] = weakref.WeakValueDictionary()
_statics_lock = threading.RLock()  # or two threads could make two of the same


def _tree(rows: _Rows) -> StateTree:
    paths = tuple(_in_order(rows))
    contents = paths, tuple([rows[path][0] for path in paths])
    with _statics_lock:
        static = _statics.get(contents) or _statics.setdefault(contents, _Static(*contents))
    return _with_values(static, [rows[path][1] for path in paths])


def _with_values(static: _Static, values: Iterable[Any]) -> StateTree:
    tree = object.__new__(StateTree)
    tree._static, tree._values = static, tuple(values)
    return tree


def _rows(tree: StateTree) -> _Rows:
    if not isinstance(tree, StateTree):
        raise TypeError(f"expected a StateTree, as of snapshot(module); got {type(tree).__name__}")
    return dict(zip(tree._static.paths, zip(tree._static.entries, tree._values)))


def _load(box: State, entry: _Entry, value: Any) -> State:
    """Fill a box, which need not be of the right kind, nor have been initialised."""
    box.__class__, box.tag, box.mapped = entry
    box.value = _fresh(value)
    return box


def _fresh(value: Any, convert: Any = (np.ndarray, np.generic)) -> Any:
    """A value in new containers, with leaves of the types to convert as new JAX arrays."""
    return value if _ROLES[type(value)] is jax.Array else jax.tree.map(
        lambda leaf: jnp.array(leaf) if isinstance(leaf, convert)
        and not isinstance(leaf, jax.Array) else leaf, value)


def _tree_of(boxes: Mapping[Path, State]) -> StateTree:
    rows: _Rows = {}
    for path, box in boxes.items():
        try:
            rows[path] = (type(box), box.tag, box.mapped), _fresh(box.value, object)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"no array in {_sites(boxes, [path])}: {error}") from error
    return _tree(rows)


class StateTree(Mapping[Path, Any]):
    """An immutable mapping from path to value, and a JAX pytree whose leaves are the arrays.

    Made from a mapping of paths, or dotted names, to `State` boxes: `TypeError` for anything else.
    Containers are copied; NumPy arrays become JAX arrays. Paths, kinds, tags and mapped counts are
    static. Trees compare by identity; ``b`` wins in ``a | b``. A look-up is a `KeyError` unless
    exactly one state goes by the name.

    >>> tree = StateTree({'W': ParamState({'w': jnp.ones((2, 3)), 'b': 0.})})
    >>> tree | StateTree({'cells.0.h': HiddenState(jnp.zeros(3))})
    path       kind         value                        mapped
    W          ParamState   b float32[], w float32[2,3]  0
    cells.0.h  HiddenState  float32[3]                   0
    """

    __slots__ = ("_static", "_values", "__weakref__")
    _static: _Static
    _values: tuple[Any, ...]

    def __init__(self, states: Mapping[Any, State]) -> None:
        boxes: dict[Path, State] = {}
        for name, box in dict(states).items():
            if not (isinstance(name, (str, tuple)) and name and isinstance(box, State)):
                raise TypeError("expected a tuple path, or a dotted name, and a State; "
                                f"got {name!r} and {type(box).__name__}")
            if _path(name) in boxes:
                raise ValueError(f"two of the names spell the path {_path(name)}; give one of them")
            boxes[_path(name)] = box
        tree = _tree_of(boxes)
        self._static, self._values = tree._static, tree._values

    def __getitem__(self, path: Path | str) -> Any:
        paths: Any = [path] if path in self._static.positions else self._static.found.get(path, [])
        if len(paths) == 1:
            return _fresh(self._values[self._static.positions[paths[0]]])
        if paths:
            raise KeyError(f"{path!r} names several states: {paths}")
        name = _dotted(path) if isinstance(path, tuple) else str(path)
        close = difflib.get_close_matches(name, map(_dotted, self), cutoff=0)
        raise KeyError(f"no state {name!r}; the closest are {close}")

    def __contains__(self, path: object) -> bool:
        return path in self._static.positions or len(self._static.found.get(path, [])) == 1

    def __iter__(self) -> Iterator[Path]:
        return iter(self._static.paths)

    def __len__(self) -> int:
        return len(self._values)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __or__(self, other: StateTree) -> StateTree:
        return _tree(_rows(self) | _rows(other)) if isinstance(other, StateTree) else NotImplemented

    def __reduce__(self) -> Any:
        return _tree, (_rows(self),)

    def __repr__(self) -> str:
        table = [("path", "kind", "value", "mapped")] + [
            (_dotted(path), kind.__name__, _described(value), str(mapped))
            for path, ((kind, _, mapped), value) in _rows(self).items()]
        widths = [max(map(len, column)) for column in zip(*table)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)

    def states(self) -> dict[Path, State]:
        """Fresh boxes with the kinds, tags, mapped counts and values of this tree."""
        return {path: _load(object.__new__(row[0][0]), *row) for path, row in _rows(self).items()}


jax.tree_util.register_pytree_with_keys(
    StateTree,
    lambda tree: ([(jax.tree_util.DictKey(_dotted(path)), value)
                   for path, value in zip(tree, tree._values)], tree._static),
    _with_values, lambda tree: (tree._values, tree._static))


def _tree_leaves(state: StateTree) -> list[tuple[Path, Any]]:
    """The leaves of a tree with full paths, in the order in which JAX flattens it."""
    return [leaf for path, (_, value) in _rows(state).items() for leaf in _leaves(value, path)]


def partition(state: StateTree, filter: Filter) -> tuple[StateTree, StateTree]:
    """Split a tree into ``(matching, rest)``; ``matching | rest`` is the whole again.

    >>> params, rest = partition(StateTree({'w': ParamState(1.), 'h': HiddenState(0.)}), ParamState)
    >>> list(params), list(rest)
    ([('w',)], [('h',)])
    """
    rows, chosen = _rows(state), _chosen(state.states(), filter)
    return (_tree({path: rows[path] for path in chosen}),
            _tree({path: rows[path] for path in rows if path not in chosen}))


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flat_dict(state: StateTree) -> dict[str, Any]:
    """All leaves, typed keys as their data, by dotted name: `ValueError` if two share one.

    >>> list(flat_dict(StateTree({'layers.0': ParamState({'bias': 0., 'weight': 1.})})))
    ['layers.0.bias', 'layers.0.weight']
    """
    leaves = _tree_leaves(state)
    if shared := [paths for paths in _found(path for path, _ in leaves).values() if paths[1:]]:
        raise ValueError(f"leaves share one dotted name: {shared}; rename a key of one of them")
    return {_dotted(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
            for path, leaf in leaves}


def _check_alike(*states: StateTree) -> None:
    first, *others = [{path: (entry, jax.tree.structure(value), _described(value))
                       for path, (entry, value) in _rows(state).items()} for state in states]
    if unlike := {path for each in others for path in first | each
                  if first.get(path) != each.get(path)}:
        raise ValueError("only the values of the trees may differ, not states, kinds, tags, mapped "
                         f"counts, shapes or dtypes, as at {[*map(_dotted, _in_order(unlike))]}")


def where(mask: Any, new: StateTree, old: StateTree) -> StateTree:
    """A tree with ``new`` where ``mask`` holds and ``old`` elsewhere, along the axes of the mask.

    Leaves that are the same object in both trees are kept, whatever their shape. Raises
    `ValueError` if the trees differ in more than values, or a leaf is not ``(*mask.shape, ...)``.

    >>> old = StateTree({'h': HiddenState(jnp.ones(2))})
    >>> where([True, False], jax.tree.map(jnp.zeros_like, old), old)['h']
    Array([0., 1.], dtype=float32)
    """
    _check_alike(new, old)
    mask = jnp.asarray(mask)
    pairs = zip(_tree_leaves(old), jax.tree.leaves(new))
    if unfit := [f"{_dotted(path)!r} {_described(leaf)}" for (path, leaf), other in pairs
                 if leaf is not other and leaf.shape[:mask.ndim] != mask.shape]:
        raise ValueError(f"the axes {mask.shape} of the mask do not lead in {', '.join(unfit)}")
    chosen: StateTree = jax.tree.map(lambda fresh, leaf: leaf if leaf is fresh else jnp.where(
        jnp.expand_dims(mask, range(mask.ndim, leaf.ndim)), fresh, leaf), new, old)
    return chosen


# ---- Copy, snapshot, restore ---------------------------------------------------------------------


def snapshot(module: Any) -> StateTree:
    """The states of a module as a tree, each shared state once, under its first path.

    >>> list(snapshot(restore(Module(), StateTree({'h': State(0.)}))))
    [('h',)]
    """
    return _tree_of(_walk(module).states)


@contextlib.contextmanager
def _all_or_nothing(graph: _Graph) -> Iterator[None]:
    """Put a graph, and the kinds and values of its states, back as now if the body raises."""
    dicts = [*map(vars, graph.modules.values()), *map(vars, graph.states.values())]
    dicts += [part for part in graph.containers.values() if isinstance(part, dict)]
    lists: list[Any] = [part for part in graph.containers.values() if isinstance(part, list)]
    values = [box.value for box in graph.states.values()
              if _ROLES[type(box.value)] is not jax.Array]
    seen: set[int] = set()
    for value in values:  # grows by the parts of each
        if id(value) in seen or isinstance(value, (jax.Array, type)):
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple, np.ndarray)):
            lists.append(value)
            values += () if isinstance(value, np.ndarray) else value
        else:  # a dict, or an instance of a registered class
            dicts.append(value if isinstance(value, dict) else getattr(value, "__dict__", {}))
            values += dicts[-1].values()
    parts: list[Any] = []  # one flat list, since many new objects would wake the garbage collector
    for each in dicts:
        parts.append(len(each))
        parts.extend(each)
        parts.extend(each.values())
    kept: list[Any] = [(each, each.copy()) for each in lists if isinstance(each, list)
            or isinstance(each, np.ndarray) and each.flags.writeable]
    kinds = [*map(type, graph.states.values())]  # which `restore` may change
    try:
        yield
    except BaseException:
        for box, kind in zip(graph.states.values(), kinds):
            box.__class__ = kind
        rest = iter(parts)
        for each in dicts:
            names = list(itertools.islice(rest, next(rest)))
            each.clear()
            for name, part in zip(names, rest):  # what `update` does depends on the class
                each[name] = part
        for part, before in kept:
            part[... if isinstance(part, np.ndarray) else slice(None)] = before
        raise


def _through_tuples(part: Any, path: Any) -> Any:
    """What the steps of a path lead to, as far as they go through tuples."""
    for step in path:
        if isinstance(part, tuple):
            part = dict(enumerate(part)).get(step)
    return part


def _fill(root: Any, nodes: dict[Path, Any], boxes: dict[Path, State], rows: _Rows) -> None:
    """Load rows into boxes; make those that the root lacks, in new containers if need be."""
    lacking: list[Any] = [path for path in rows if path not in boxes]
    made = []  # what holds a new dict, and where
    for path in lacking:
        start = len(path) if path[:-1] in nodes else 1  # most are in a module: no need to descend
        inside = _inside(nodes.get(path[:-1], root))
        try:
            for end, step in enumerate(path[start - 1:], start):
                if isinstance(inside, list):
                    inside += [None] * (step + 1 - len(inside) if inside is not root else 0)
                part: Any = inside.get(step) if isinstance(inside, dict) else inside[step]
                role = _ROLES[type(part)]
                if role is State or role is Module and end == len(path):
                    inside, end = part, end + 1
                    raise TypeError  # since what is there has to stay, and is named
                if end == len(path):
                    inside[step] = boxes[path] = object.__new__(rows[path][0][0])
                    break
                if role is tuple and not isinstance(
                        _through_tuples(part, path[end:-1]), (Module, dict, list)):
                    part, role = list(part), list  # which can take the state
                    inside[step] = part
                if role not in (Module, dict, list, tuple) or (
                        role is list and not part and not isinstance(path[end], int)):
                    part = inside[step] = {}
                    made.append((inside, step))
                inside = _inside(part)
        except (IndexError, TypeError):
            place = _dotted(path[:end - 1]) or "the root"
            raise ValueError(f"no place for the state {_dotted(path)!r}: the module has a "
                             f"{type(inside).__name__} at {place!r}") from None
    for inside, step in reversed(made):  # inner ones first
        if list(inside[step]) == list(range(len(inside[step]))):
            inside[step] = list(inside[step].values())
    for path, (entry, value) in rows.items():
        _load(boxes[path], entry, value)


def restore(module: T, state: StateTree) -> T:
    """Write a tree's values into a module, in place; states that the tree lacks keep theirs.

    States that the module lacks are created: `ValueError` if there is no place for one.

    >>> restore(Module(), StateTree({'h': HiddenState(jnp.ones(2))})).h
    HiddenState(float32[2])
    """
    graph = _walk(module)
    with _all_or_nothing(graph):
        _fill(module, graph.modules, graph.states, _rows(state))
    return module


def _copied(graph: _Graph, state: StateTree) -> tuple[Any, dict[Path, Any], dict[Path, State]]:
    """A private copy, filled from a tree: its root, modules and states; all else is shared."""
    rows = _rows(state)
    if lacking := [path for path in graph.states if path not in rows]:
        raise ValueError(f"the state tree lacks {_sites(graph.states, lacking)}, which the module "
                         "has; pass the whole tree, such as `params | rest`")
    copies: dict[int, Any] = {id(old): copy.copy(old) for old in graph.containers.values()
                              if not isinstance(old, tuple)}
    for thing in (*graph.modules.values(), *graph.states.values()):
        try:
            copies[id(thing)] = new = object.__new__(type(thing))
        except TypeError:  # of a class that mixes in a builtin one
            copies[id(thing)] = new = copy.copy(thing)
        new.__dict__.update(thing.__dict__)
    for method in graph.methods:
        if id(method.__self__) in copies:
            copies[id(method)] = types.MethodType(method.__func__, copies[id(method.__self__)])
    tuples = [old for old in graph.containers.values() if isinstance(old, tuple)]
    for old in tuples:  # which cannot take up copies later
        if any(isinstance(part, tuple) and id(part) not in copies for part in old):
            tuples.append(old)  # to come again, after the tuples in it
            continue
        new = [copies.get(id(part), part) for part in old]
        same = all(part is copied for part, copied in zip(old, new))
        copies[id(old)] = old if same else tuple.__new__(type(old), new)
    for old in (*graph.modules.values(), *graph.containers.values()):
        new = _inside(copies[id(old)])
        if not isinstance(new, tuple):
            for name, part in _parts(old):
                if id(part) in copies:
                    new[name] = copies[id(part)]
    nodes = {path: copies[id(node)] for path, node in graph.modules.items()}
    boxes = {path: copies[id(box)] for path, box in graph.states.items()}
    _fill(copies[id(graph.root)], nodes, boxes, rows)
    return copies[id(graph.root)], nodes, boxes


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
        raise TypeError(f"call_order takes an int, as in @call_order(1); got {level!r}")
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
    steps: dict[Any, list[Path]]  # by level, in traversal order
    keyed: set[Path]  # where the method takes a key


_ABSENT = ("is no method of {}; define it there or, in a call to all nodes, pass "
           "node_to_exclude= or fn_if_not_exist='pass'")


def _use(method: Any, function: Any, plan: _Plan) -> tuple[Any, bool]:
    """The level of a method, or what is wrong with it; and whether it gets a key."""
    if not callable(method):
        return _ABSENT if method is _ABSENT else "is an attribute, but no method, of {}", False
    parameters: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError):  # of a builtin that does not tell
        parameters = inspect.signature(method).parameters
    key: Any = parameters.get("key")
    named = key is not None and key.kind in (key.POSITIONAL_OR_KEYWORD, key.KEYWORD_ONLY)
    given = "key" in plan.kwargs or named and key.kind is not key.KEYWORD_ONLY and (
        "key" in list(parameters)[:len(plan.args)])
    if named and plan.key is None and not given and key.default is key.empty:
        return "requires a key on {}; pass key=jax.random.key(0)", False
    if named and plan.key is not None and given:
        return "gets one key by position and another by key= on {}; pass one of them", False
    silent = function is Module.init_state or function is Module.reset_state  # do nothing
    takes = plan.key is not None and not silent and (
        named or any(each.kind is each.VAR_KEYWORD for each in parameters.values()))
    return getattr(function, "call_order", float("-inf")), takes


def _plan(nodes: dict[Path, Module], fn_name: str, args: Any = (), kwargs: Kwargs = None,
          node_to_exclude: Filter = None, fn_if_not_exist: str = "raise", key: Key = None) -> _Plan:
    """Check all that can be checked before the first method runs."""
    if not isinstance(fn_name, str) or not isinstance(kwargs, (Mapping, type(None))):
        raise TypeError("expected the name of a method and a mapping of keyword arguments; "
                        f"got {fn_name!r} and {type(kwargs).__name__}")
    if fn_if_not_exist not in ("raise", "warn", "pass", "none"):
        raise ValueError(f"fn_if_not_exist is 'raise', 'warn' or 'pass'; got {fn_if_not_exist!r}")
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    legacy = getattr(key, "dtype", None) == np.uint32
    if key is not None and (not (legacy or _is_key(key)) or np.ndim(key) != legacy):
        raise TypeError(f"key= is one PRNG key, as of jax.random.key(0); got {_described(key)}")
    if key is not None and "key" in kwargs:
        raise TypeError("a key came both as key=, which gives each node its own, and in kwargs=, "
                        "which gives all nodes the same; pass one of them")
    groups: dict[Any, list[Path]] = {}  # by level, or by what is wrong
    plan = _Plan(fn_name, args, kwargs, key, groups, set())
    excluded = _predicate(node_to_exclude)
    chosen = nodes if node_to_exclude is None else _chosen(nodes, lambda *at: not excluded(*at))
    uses: dict[int, Any] = {}  # by function, kept alive, so that one look serves all its nodes
    for path, node in chosen.items():
        method = getattr(node, fn_name, _ABSENT)
        function = getattr(method, "__func__", method)
        use = uses.get(id(function))
        if use is None:
            group, takes_key = _use(method, function, plan)
            use = uses[id(function)] = groups.setdefault(group, []), takes_key, function
        places, takes_key, _ = use
        places.append(path)
        if takes_key:
            plan.keyed.add(path)
    absent = groups.pop(_ABSENT, []) if fn_if_not_exist != "raise" else []
    for fault in groups:
        if isinstance(fault, str):
            raise (AttributeError if fault is _ABSENT else TypeError)(
                f"{fn_name!r} {fault.format(_sites(nodes, groups[fault]))}")
    if absent and fn_if_not_exist == "warn":
        warnings.warn(f"{fn_name!r} {_ABSENT.format(_sites(nodes, absent))}", stacklevel=3)
    return plan


_fold_in = jax.jit(lambda key, words: functools.reduce(jax.random.fold_in, words, key))


def _node_key(key: Key, path: Path) -> Key:
    """The key of a node: a matter of its path alone, in every process, unlike `hash`."""
    digest = hashlib.blake2b(repr(_rank(path)).encode(), digest_size=8).digest()
    return _fold_in(key, np.frombuffer(digest, "<u4").astype(np.uint32))


def _run(plan: _Plan, nodes: Mapping[Path, Module], boxes: Mapping[Path, State]) -> Outputs:
    """Run a plan on nodes, or on copies of them; `ValueError` if mapped axes of boxes change."""
    fn_name, args, kwargs, key, steps, keyed = plan
    outputs, mapped = {}, {path: (box.mapped, [*map(np.shape, jax.tree.leaves(box.value))])
                           for path, box in boxes.items() if box.mapped}
    for path in [path for level in sorted(steps) for path in steps[level]]:
        try:
            method = getattr(nodes[path], fn_name)
            output = method(*args, **kwargs) if path not in keyed else method(
                *args, **kwargs, key=_node_key(key, path))
        except Exception as error:
            error.add_note(f"raised by {fn_name!r} of {_sites(nodes, [path])}")
            raise
        if output is not None:
            outputs[path] = output
    if changed := [path for path, (axes, before) in mapped.items()
                   for shape in map(np.shape, jax.tree.leaves(boxes[path].value))
                   if len(shape) < min(map(len, before), default=0)
                   or shape[:axes] not in [each[:axes] for each in before]]:
        pure = {"init_state": "vmap_init", "reset_state": "vmap_reset"}.get(fn_name)
        forms = f"{pure} or {pure}_all_states" if pure else "vmap_apply or vmap_call_all(_fns)"
        raise ValueError(f"{fn_name!r} ran once for all members and changed the leading axes of "
                         f"{_sites(boxes, changed)}; run it once per member, with {forms}")
    return outputs


def _run_on_copy(graph: _Graph, state: StateTree, plan: _Plan) -> tuple[Outputs, Any, Any]:
    """Run a plan on a copy: the outputs, the boxes before, and the boxes after, by path."""
    root, nodes, before = _copied(graph, state)
    outputs, after = _run(plan, nodes, before), _walk(root)
    known = set(map(id, nodes.values()))
    if created := [path for path, node in after.modules.items() if id(node) not in known]:
        raise ValueError(f"{plan.fn_name!r} created modules, {_sites(after.modules, created)}; "
                         "create modules in __init__, states in init_state")
    return outputs, before, after.states


# ---- Pure calls ----------------------------------------------------------------------------------


def apply(module: Module, state: StateTree, *args: Any, method: str = "__call__",
          **kwargs: Any) -> tuple[Any, StateTree]:
    """Call one method of a module: ``(output, state)``, with a new tree.

    Raises `ValueError` if the tree lacks a state of the module, or if the method creates modules
    or changes the leading axes of a mapped state.

    >>> class Counter(Module):
    ...     def update(self, by): self.count.value += by
    >>> apply(Counter(), StateTree({'count': State(jnp.array(0))}), 5)[1]['count'].item()
    5
    """
    graph, plan = _walk(module), _plan({(): module}, method, args, kwargs)
    outputs, _, after = _run_on_copy(graph, state, plan)
    return outputs.get(()), _tree_of(after)


def call_all(module: Any, state: StateTree, fn_name: str, args: Any = (), kwargs: Kwargs = None, *,
             node_to_exclude: Filter = None, fn_if_not_exist: str = "raise",
             key: Key = None) -> tuple[Outputs, StateTree]:
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
    return outputs, _tree_of(after)


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


# ---- Vmapped calls -------------------------------------------------------------------------------


def _members(mapped: StateTree, size: Any = None) -> int:
    """The number of members that an ``axis_size`` and the mapped states agree on."""
    shapes = {path: np.shape(leaf)[:1] for path, leaf in _tree_leaves(mapped)}
    if size is None:
        size = next(itertools.chain.from_iterable(shapes.values()), None)
    if odd := [f"{_dotted(path)!r} {shape}" for path, shape in shapes.items() if shape != (size,)]:
        raise ValueError(f"axis_size {size} is at odds with the mapped axis of {', '.join(odd)}")
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(f"pass a positive int as axis_size, or mapped states; got {size!r}")
    return int(size)


def _with_axes(state: StateTree, count: int) -> StateTree:
    """The same values, said to have so many more mapped axes."""
    return _tree({path: ((kind, tag, mapped + count), value)
                  for path, ((kind, tag, mapped), value) in _rows(state).items()})


def _run_members(graph: _Graph, state: StateTree, plan: _Plan, axis_size: int | None, in_axes: Any,
                 state_to_exclude: Filter = None, state_tag: Hashable = None) -> tuple[Any, Any]:
    """Run a plan under one `jax.vmap`, on a copy that lives inside it: ``(outputs, state)``."""
    excluded = _predicate(state_to_exclude)
    mapped, shared = partition(state, lambda path, box: box.mapped and not excluded(path, box))
    size = _members(mapped, axis_size)
    keys = None if plan.key is None else jax.random.split(plan.key, size)
    in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes  # as jax.vmap takes them
    output_paths: list[Path] = []
    # A batching rule sees what is batched by the innermost vmap that batches any operand, and
    # `index` is batched by the one below.
    same_for_all = jax.custom_batching.custom_vmap(lambda index, common: common)

    @same_for_all.def_vmap
    def check(size: int, batched: Any, index: Any, common: StateTree) -> tuple[StateTree, Any]:
        if unlike := [path for path in common if any(jax.tree.leaves(batched[1][path]))]:
            raise ValueError(
                f"shared states ended up different per member: {_sites(common.states(), unlike)}; "
                "create them in init_state under a vmapped call, or make their values the same")
        return common, batched[1]

    def run_member(index: Any, key: Key, mapped: StateTree, args: Any) -> Any:
        member_plan = plan._replace(args=args, key=key)
        outputs, before, after = _run_on_copy(graph, mapped | shared, member_plan)
        outputs = {path: output for path, output in outputs.items()
                   if not isinstance(output, Module)}  # such as self, which cannot cross
        output_paths.extend(outputs)
        is_mapped = {id(box): path in mapped for path, box in before.items()}
        own: dict[Path, State] = {}
        common: dict[Path, State] = {}
        for path, box in after.items():
            if id(box) not in is_mapped and box.tag is None:
                box.tag = state_tag
            (own if is_mapped.get(id(box), not excluded(path, box)) else common)[path] = box
        return list(outputs.values()), _tree_of(own), same_for_all(index, _tree_of(common))

    run_members = jax.vmap(run_member, in_axes=(0, 0, 0, in_axes), out_axes=(0, 0, None))
    outputs, own, common = run_members(jnp.arange(size), keys, _with_axes(mapped, -1), plan.args)
    return dict(zip(output_paths, outputs)), _with_axes(own, +1) | common


def vmap_apply(module: Module, state: StateTree, *args: Any, in_axes: Any = 0,
               axis_size: int | None = None, method: str = "__call__",
               **kwargs: Any) -> tuple[Any, StateTree]:
    """Call one method of a module once per member: ``(outputs, state)``, with a new tree.

    Positional arguments are mapped by ``in_axes``, as in `jax.vmap`; keyword arguments are shared.
    Outputs are ``(axis_size, *shape)``. Raises what `vmap_call_all` raises.

    >>> class Square(Module):
    ...     def update(self, x): return x ** 2
    >>> vmap_apply(Square(), StateTree({}), jnp.arange(3), axis_size=3)[0]
    Array([0, 1, 4], dtype=int32)
    """
    graph, plan = _walk(module), _plan({(): module}, method, args, kwargs)
    outputs, state = _run_members(graph, state, plan, axis_size, in_axes)
    return outputs.get(()), state


def vmap_call_all(module: Any, state: StateTree, fn_name: str, args: Any = (),
                  kwargs: Kwargs = None, *, axis_size: int | None = None, in_axes: Any = None,
                  node_to_exclude: Filter = None, state_to_exclude: Filter = None,
                  state_tag: Hashable = None, fn_if_not_exist: str = "raise",
                  key: Key = None) -> tuple[Outputs, StateTree]:
    """Call a method on every node, once per member: ``(outputs, state)``, with a new tree.

    Mapped states are seen one member at a time; the others, and those that match
    ``state_to_exclude``, are shared by all. A state created during the call gains an axis of
    ``axis_size``, by default that of the mapped states, and the tag ``state_tag`` if it has none.
    ``in_axes`` maps ``args``, by default shared. Member ``i`` sees the key
    ``jax.random.split(key, axis_size)[i]``. Outputs are ``(axis_size, *shape)``. Raises what
    `call_all` raises, and `ValueError` for an ``axis_size`` that is no positive integer or at odds
    with a mapped state, and for a shared state that becomes one per member.

    >>> class Die(Module):
    ...     def roll(self, key): return jax.random.randint(key, (2,), 1, 7)
    >>> vmap_call_all(Die(), StateTree({}), 'roll', axis_size=5, key=jax.random.key(0))[0][()].shape
    (5, 2)
    """
    graph = _walk(module)
    plan = _plan(graph.modules, fn_name, args, kwargs, node_to_exclude, fn_if_not_exist, key)
    return _run_members(graph, state, plan, axis_size, in_axes, state_to_exclude, state_tag)


def vmap_init(module: Any, *args: Any, axis_size: int | None, in_axes: Any = None,
              node_to_exclude: Filter = None, state_to_exclude: Filter = None,
              state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> StateTree:
    """`init` per member: what ``init_state`` creates is ``(axis_size, *shape)``, the rest shared.

    >>> class Cell(Module):
    ...     def init_state(self, key): self.h = HiddenState(jax.random.normal(key, (3,)))
    >>> vmap_init(Cell(), axis_size=4, key=jax.random.key(0))['h'].shape
    (4, 3)
    """
    return vmap_call_all(module, snapshot(module), "init_state", args, kwargs, axis_size=axis_size,
                         in_axes=in_axes, node_to_exclude=node_to_exclude, key=key,
                         state_to_exclude=state_to_exclude, state_tag=state_tag)[1]


def vmap_reset(module: Any, state: StateTree, *args: Any, axis_size: int | None = None,
               in_axes: Any = None, node_to_exclude: Filter = None, state_to_exclude: Filter = None,
               state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> StateTree:
    """`reset` of every member, each of which sees the shapes of a single model.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h.value = jnp.zeros(3)
    >>> vmap_reset(Cell(), stack(StateTree({'h': HiddenState(jnp.ones(3))})))['h'].shape
    (1, 3)
    """
    return vmap_call_all(module, state, "reset_state", args, kwargs, axis_size=axis_size,
                         in_axes=in_axes, node_to_exclude=node_to_exclude, key=key,
                         state_to_exclude=state_to_exclude, state_tag=state_tag)[1]


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
    """Member ``i`` of an ensemble as a single tree. A JAX array ``i`` is clamped, as by JAX.

    Raises `TypeError` unless ``i`` is one integer, and `IndexError` if it is out of range.

    >>> member(stack(*[StateTree({'h': HiddenState(float(i))}) for i in range(3)]), -1)['h'].item()
    2.0
    """
    if np.ndim(i) or not jnp.issubdtype(getattr(i, "dtype", type(i)), np.integer):
        raise TypeError(f"a member is chosen by one integer; got {_described(i)}")
    mapped, shared = partition(state, lambda path, box: box.mapped)
    if not isinstance(i, jax.Array) and jax.tree.leaves(mapped):
        if not -(size := _members(mapped)) <= i < size:
            raise IndexError(f"member {i} of {size}")
    return _with_axes(jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], mapped), -1) | shared


# ---- Assigning -----------------------------------------------------------------------------------


class Assigned(NamedTuple):
    """What `assign` returns."""

    state: StateTree
    unexpected: list[Any]  # keys as the caller wrote them, or paths of extra leaves
    missing: list[Path]  # paths of states, or of leaves where only part of a state was given


def _flattened(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested mappings, boxes and pytrees, with their paths."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flattened(part, path + _path(key))
    else:
        value = value.value if isinstance(value, State) else value
        yield from _leaves(value, path, is_leaf=lambda part: part is None)


def _fitted(new: Any, old: Any) -> Any:
    """A value with the dtype, shape and sharding of a leaf; None if it does not fit."""
    def kind(dtype: Any) -> int:  # casts to a later kind lose nothing of note
        kinds = (np.bool_, np.integer, np.floating, np.complexfloating)
        return next((i for i, each in enumerate(kinds) if jnp.issubdtype(dtype, each)), 4)

    if _is_key(old) and not _is_key(new):
        data, impl = _fitted(new, jax.random.key_data(old)), jax.random.key_impl(old)
        return data if data is None else jax.random.wrap_key_data(data, impl=impl)
    if not isinstance(new, jax.Array):
        new = np.asarray(new)
        if new.dtype.type is np.void and new.dtype.itemsize == old.dtype.itemsize:
            new = new.view(old.dtype)  # what npz gives back for bfloat16
    fits = new.dtype == old.dtype or kind(new.dtype) <= kind(old.dtype) < 4
    if new.shape != old.shape or not fits:
        return None
    new = jnp.array(new, old.dtype, copy=not isinstance(new, jax.Array))
    sharding = getattr(old, "sharding", None)  # a traced array has none
    stays = sharding is None or getattr(new, "sharding", None) == sharding
    return new if stays else jax.device_put(new, sharding)


def assign(state: StateTree, *snapshots: Mapping[Any, Any]) -> Assigned:
    """Load values into a tree by name: ``(state, unexpected, missing)``, with a new tree.

    A snapshot is a state tree, or a mapping from paths or dotted names to values, leaves or nested
    dicts: all reach the leaf that has the dotted name. Later snapshots win. Each leaf keeps the
    dtype, shape and sharding that it had. Raises one `ValueError` that lists every leaf of another
    shape, of a kind that does not fit (float into int, complex into float) or that is no array;
    `ValueError` for a dotted name that several leaves share; `TypeError` for what is no mapping.

    >>> tree = StateTree({'W': ParamState({'bias': 0., 'weight': 1.})})
    >>> tree, unexpected, missing = assign(tree, {'W.bias': np.float64(2), 'V': np.ones(2)})
    >>> tree['W']['bias'].item(), unexpected, missing
    (2.0, ['V'], [('W', 'weight')])
    """
    leaves, new = _tree_leaves(state), {}
    old = dict(leaves)
    unexpected: list[Any] = []
    paths = _found(path for path, _ in leaves)
    for each in snapshots:
        if not isinstance(each, Mapping):
            raise TypeError(f"a snapshot is a mapping; got {type(each).__name__}")
        for key, value in each.items():
            found, extra = {}, []
            for path, leaf in _flattened(value, _path(key)):
                named = paths.get(path if isinstance(key, tuple) and path in old else _dotted(path))
                if named and len(named) > 1:
                    raise ValueError(f"{_dotted(path)!r} names several leaves: {named}; "
                                     "use a tuple path as the key")
                if named:
                    found[named[0]] = leaf
                elif leaf is not None:  # which may also be an empty part of a state
                    extra.append(path)
            new.update(found)
            unexpected += extra if found else [key] if extra or key not in state else []
    fitted = {path: _fitted(leaf, old[path]) for path, leaf in new.items()}
    if unfit := [f"{_dotted(path)!r} expected {_described(old[path])}, got {_described(new[path])}"
                 for path in _in_order(fitted) if fitted[path] is None]:
        raise ValueError(f"nothing was assigned, since values do not fit: {'; '.join(unfit)}")
    missing: list[Path] = []
    for path, (_, value) in _rows(state).items():
        within = [leaf_path for leaf_path, _ in _leaves(value, path)]
        lost = [leaf_path for leaf_path in within if leaf_path not in fitted]
        missing += [path] if lost and lost == within else lost
    assigned = jax.tree.unflatten(jax.tree.structure(state),
                                  [fitted.get(path, leaf) for path, leaf in leaves])
    return Assigned(assigned, _in_order(dict.fromkeys(unexpected)), _in_order(missing))


# ---- In place: the documented API ----------------------------------------------------------------


def call_all_fns(target: T, fn_name: str, args: Any = (), kwargs: Kwargs = None,
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
    with _all_or_nothing(graph):
        _run(plan, graph.modules, graph.states)
    return target


def vmap_call_all_fns(target: T, fn_name: str, args: Any = (), kwargs: Kwargs = None,
                      axis_size: int | None = None, node_to_exclude: Filter = None,
                      state_tag: Hashable = None, fn_if_not_exist: str = "raise", *,
                      in_axes: Any = None, state_to_exclude: Filter = None, key: Key = None) -> T:
    """`vmap_call_all` whose states, and nothing else, are written into the target.

    States that a method drops stay.

    >>> class Cell(Module):
    ...     def start(self, key): self.h = HiddenState(jax.random.normal(key, (3,)))
    >>> vmap_call_all_fns(Cell(), 'start', axis_size=4, key=jax.random.key(0)).h
    HiddenState(float32[4,3])
    """
    return restore(target, vmap_call_all(
        target, snapshot(target), fn_name, args, kwargs, axis_size=axis_size, in_axes=in_axes,
        node_to_exclude=node_to_exclude, state_to_exclude=state_to_exclude, state_tag=state_tag,
        fn_if_not_exist=fn_if_not_exist, key=key)[1])


def init_all_states(target: T, *args: Any, node_to_exclude: Filter = None, key: Key = None,
                    **kwargs: Any) -> T:
    """`init` in place. Returns the target.

    >>> init_all_states([Module()])
    [Module]
    """
    return call_all_fns(target, "init_state", args, kwargs, node_to_exclude, key=key)


def reset_all_states(target: T, *args: Any, node_to_exclude: Filter = None, key: Key = None,
                     **kwargs: Any) -> T:
    """`reset` in place. Returns the target.

    >>> reset_all_states([Module()])
    [Module]
    """
    return call_all_fns(target, "reset_state", args, kwargs, node_to_exclude, key=key)


def vmap_init_all_states(target: T, *args: Any, axis_size: int | None = None,
                         node_to_exclude: Filter = None, state_to_exclude: Filter = None,
                         state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> T:
    """`vmap_init` in place. Returns the target.

    >>> vmap_init_all_states([Module()], axis_size=4)
    [Module]
    """
    return vmap_call_all_fns(target, "init_state", args, kwargs, axis_size, node_to_exclude,
                             state_tag, state_to_exclude=state_to_exclude, key=key)


def vmap_reset_all_states(target: T, *args: Any, axis_size: int | None = None,
                          node_to_exclude: Filter = None, state_to_exclude: Filter = None,
                          state_tag: Hashable = None, key: Key = None, **kwargs: Any) -> T:
    """`vmap_reset` in place. Returns the target.

    >>> vmap_reset_all_states([Module()], axis_size=4)
    [Module]
    """
    return vmap_call_all_fns(target, "reset_state", args, kwargs, axis_size, node_to_exclude,
                             state_tag, state_to_exclude=state_to_exclude, key=key)


def assign_state_values(target: Any, *state_by_abs_path: Mapping[Any, Any],
                        ) -> tuple[list[Any], list[Path]]:
    """`assign` in place: ``(unexpected, missing)``.

    >>> assign_state_values(Module(), {'v': np.ones(2)})
    (['v'], [])
    """
    state, unexpected, missing = assign(snapshot(target), *state_by_abs_path)
    untouched = set(missing)
    restore(target, partition(state, lambda path, box: path not in untouched)[0])
    return unexpected, missing


# ---- The demonstration: python -m collective -----------------------------------------------------


class _Cell(Module):
    def init_state(self, key: Key) -> None:
        self.h = HiddenState(jax.random.normal(key, (3,)))

    def reset_state(self) -> None:
        self.h.value = jnp.zeros(3)

    def update(self, x: jax.Array) -> None:
        self.h.value += 0.5 * (jnp.tanh(x * self.h.value) - self.h.value)


def _demonstrate() -> None:
    cells = [_Cell()]
    state = vmap_init(cells, axis_size=4, key=jax.random.key(0))
    print(f"vmap_init: four members, each with a hidden state of its own\n{state}")
    step = lambda state, x: (vmap_call_all(cells, state, "update", x)[1], None)  # noqa: E731
    after, _ = jax.jit(functools.partial(jax.lax.scan, step))(state, jnp.ones((20, 3)))
    print(f"rollout: 20 steps in one jitted scan, h[0] {state['0.h'][0]} -> {after['0.h'][0]}")
    state = vmap_reset(cells, after)
    print(f"vmap_reset: h[0] {state['0.h'][0]}, all of shape {state['0.h'].shape} as before")
    np.savez(file := io.BytesIO(), **flat_dict(after))
    state, unexpected, missing = assign(state, np.load(io.BytesIO(file.getvalue())))
    print(f"assign from npz: h[0] {state['0.h'][0]}, {unexpected=}, {missing=}")
    print(f"restore: member 2 alone in the module\n{restore(cells, member(state, 2))[0]}")


if __name__ == "__main__":
    _demonstrate()
