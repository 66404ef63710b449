# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the collective-states authors
"""Initialise, reset, call, batch and restore every module of a JAX model at once.

* A **state** is a `State` box that holds an array, or any pytree of arrays.
* A **module** is an instance of `Module`. Its states and child modules are found in its attributes, directly or inside
  lists, tuples and dicts at any depth.
* A **path** is the tuple of names, keys and indices that leads there: ``('layers', 0, 'w')``, or ``'layers.0.w'``.
* A **state tree** is a `StateTree`: an immutable mapping from path to value, and a JAX pytree.
* A **member** is one model of an ensemble. States of an ensemble have leading *mapped axes*, with one entry for each
  member, and count them as ``mapped``; a state with ``mapped=0`` is *shared* by all members. What ``__init__`` creates
  is shared; what ``init_state`` creates in a vmapped call is one for each member.

Pure functions only read the module, and work inside ``jit``, ``grad``, ``vmap`` and ``scan``::

    snapshot(module)              -> state              restore(module, state) -> module
    init(module, *args)           -> state              vmap_init(..., axis_size=n)
    reset(module, state, *args)   -> state              vmap_reset(...)
    apply(module, state, *args)   -> (output, state)    vmap_apply(...)
    call_all(module, state, name) -> (outputs, state)   vmap_call_all(...)
    vmap(fn)(*args)               -> what fn returns, for each member of the trees in args
    traverse(module)              -> iterator of (path, module), children before parents
    partition(state, filter)      -> (matching, rest)   matching | rest -> state
    subtree(state, path)          -> state              StateTree({path: state}) -> state
    where(mask, new, old)         -> state              flat_dict(state) -> {name: array}
    stack(*states)                -> state              member(state, i) -> state
    assign(state, *snapshots)     -> (state, unexpected, missing)

In place: `call_all_fns`, `init_all_states`, `reset_all_states`, their ``vmap_`` forms, `assign_state_values`.
`call_order` orders the calls of both families. Where a module is expected, a list, tuple or dict of modules will do;
anything else is a `TypeError`. A call that raises changes nothing.

>>> class Cell(Module):                                  # written for a single model
...     def __init__(self):
...         self.w = ParamState(0.5 * jnp.eye(3))        # shared by all members
...     def init_state(self, *, key):
...         self.h = HiddenState(jax.random.normal(key, (3,)))   # one for each member
...     def reset_state(self):
...         self.h.value = jnp.zeros(3)
...     def update(self, x):                             # what model(x) calls
...         self.h.value = jnp.tanh(self.w.value @ self.h.value + x)
...         return self.h.value.sum()
>>> model = Cell()
>>> state = vmap_init(model, axis_size=8, key=jax.random.key(0))
>>> state
path  kind         value         mapped
h     HiddenState  float32[8,3]  1
w     ParamState   float32[3,3]  0
2 leaves, 33 numbers, 132 bytes
>>> step = jax.jit(lambda state, x: vmap_apply(model, state, x))
>>> outputs, state = step(state, jnp.arange(8.))
>>> done = jnp.arange(8) < 2                             # two episodes are over
>>> state = where(done, vmap_reset(model, state), state)
>>> jnp.abs(state['h']).sum(axis=1) > 0
Array([False, False,  True,  True,  True,  True,  True,  True], dtype=bool)
>>> params, rest = partition(state, ParamState)
>>> jax.grad(lambda params: vmap_apply(model, params | rest, jnp.ones(8))[0].sum())(params)['w'].shape
(3, 3)
>>> assign(state, {'w': np.ones((4, 3))})
Traceback (most recent call last):
ValueError: nothing was assigned, since these values do not fit:
  'w' expected float32[3,3], got float64[4,3]
>>> apply(model, state, 1.)                              # one step of all eight, by mistake
Traceback (most recent call last):
ValueError: 'h' (HiddenState) holds the values of all members (mapped=1), ...
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import itertools
import operator
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

__version__ = "0.3.0"

__all__ = [
    "MAX_ORDER", "HiddenState", "LongTermState", "Module", "ParamState", "Path", "ShortTermState", "State",
    "StateTree", "apply", "assign", "assign_state_values", "call_all", "call_all_fns", "call_order", "flat_dict",
    "init", "init_all_states", "member", "partition", "reset", "reset_all_states", "restore", "snapshot", "stack",
    "subtree", "traverse", "vmap", "vmap_apply", "vmap_call_all", "vmap_call_all_fns", "vmap_init",
    "vmap_init_all_states", "vmap_reset", "vmap_reset_all_states", "where",
]

Path = tuple[str | int, ...]  # attribute names, dict keys and list indices, from the root
Filter = Any  # a type, a tag, a predicate, `...`, None, or a list of these: see `_predicate`
Key = Any  # one PRNG key, typed or legacy, or None
Tag = str | None  # a label of states
Kwargs = Mapping[str, Any] | None  # keyword arguments
ByPath = dict[Path, Any]  # states, or what belongs to them, by path
Outputs = dict[Path, Any]  # what methods returned, by the paths of their modules, in call order
T = TypeVar("T")  # what comes back as it came, such as a module or a list of modules

# How the data flows:
#   snapshot: modules --_walk--> graph --_tree_of--> state tree
#   restore:  state tree --_boxes_of--> boxes --_write_states--> modules
# A call in place runs on the real modules. A pure call restores a tree into a private copy of them, runs on the copy
# and takes a snapshot of it. A vmapped call is a pure call inside `jax.vmap`; in place, a `restore` follows it.

# ---- Paths and messages --------------------------------------------------------------------------

def _dotted(path: Path) -> str:
    return ".".join(map(str, path))

def _as_path(name: Any) -> Path:
    """The path that a dotted name spells; a tuple is one already."""
    if isinstance(name, tuple):
        return name
    steps = []
    for text in str(name).split("."):
        is_index = text.isdecimal() and text == str(int(text))
        steps.append(int(text) if is_index else text)
    return tuple(steps)

def _sort_key(path: Path) -> list[Any]:
    """The canonical order of paths: ints by number, before strings."""
    return [(0, step) if isinstance(step, int) else (1, str(step)) for step in path]

_LEAF = tree_util.tree_structure(0)

def _flatten(value: Any) -> Any:
    """The leaves of a pytree, their paths in it, and its structure."""
    if isinstance(value, jax.Array):  # nearly always; half the time
        return [value], ((),), _LEAF
    with_keys, structure = tree_util.tree_flatten_with_path(
        value, is_leaf=lambda part: isinstance(part, Iterator))  # which JAX will not flatten, some day
    leaves = [leaf for _, leaf in with_keys]
    paths = [tuple(map(_step_of, keys)) for keys, _ in with_keys]
    return leaves, tuple(paths), structure

def _step_of(key: Any) -> Any:
    """The name, key or index that one key of a JAX key path holds."""
    return getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))

def _described(value: Any) -> str:
    """Dtypes and shapes of a pytree: "bias float32[2], weight float32[4,2]"."""
    texts = []
    leaves, paths, _ = _flatten(value)
    for leaf, path in zip(leaves, paths):
        text = type(leaf).__name__
        if hasattr(leaf, "dtype"):
            text = f"{leaf.dtype}[{','.join(map(str, np.shape(leaf)))}]"
        texts.append(f"{_dotted(path)} {text}".strip())
    return ", ".join(texts) or type(value).__name__

def _place(path: Path, thing: Any) -> str:
    """Where something is: "'layers.0' (Linear)"."""
    name = repr(_dotted(path)) if path else "the root"
    return f"{name} ({type(thing).__name__})"

def _places(things: ByPath, paths: Any) -> str:
    return ", ".join(_place(path, things[path]) for path in sorted(paths, key=_sort_key))

# ---- States and filters --------------------------------------------------------------------------

class _Stateful:
    """Base of modules and states: what the walk through a model looks for."""
    _collective_file = globals().get("__file__", __name__)  # tells two copies of this file apart

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__basicsize__ != _Stateful.__basicsize__:  # it has room for more than a __dict__
            raise TypeError(f"{cls.__name__} has __slots__ or a builtin base, which copies would lose")

def _refuse_other_copy(thing: Any) -> None:
    """Refuse a module, state or tree of another copy of this file, as two packages may bring."""
    file = getattr(type(thing), "_collective_file", None)
    if file is not None and not isinstance(thing, (_Stateful, StateTree)):
        raise TypeError(f"{type(thing).__name__} comes from another copy of this file, {file}; this one is "
                        f"{_Stateful._collective_file}. Import both from one of them")

class State(_Stateful):
    """A box for one ``value``, an array or any pytree of arrays; subclasses are kinds of states.

    ``tag`` is a label for filters, a str or None (else `TypeError`); ``mapped`` counts leading mapped axes.

    >>> State({'bias': jnp.zeros(2)}, tag='slow')
    State(bias float32[2])
    """

    value: Any
    tag: Tag = None
    mapped: int = 0

    def __init__(self, value: Any, *, tag: Tag = None) -> None:
        _check_tag(tag)
        self.value = value
        self.tag = tag

    def __getattr__(self, name: str) -> Any:
        if name == "value" and "_why_hidden" in self.__dict__:  # see `_hide_members`
            raise ValueError(self.__dict__["_why_hidden"])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        text = "no value"
        with contextlib.suppress(Exception):
            text = _described(self.value)
        if self.mapped:
            text += f", mapped={self.mapped}"
        return f"{type(self).__name__}({text})"

class LongTermState(State):
    """A state that outlives a sequence, such as a running statistic."""

class ShortTermState(State):
    """A state that belongs to one sequence."""

class ParamState(LongTermState):
    """A trainable parameter."""

class HiddenState(ShortTermState):
    """The hidden state of a recurrent cell."""

def _check_tag(tag: Any) -> None:
    if not (tag is None or isinstance(tag, str)):
        raise TypeError(f"a tag is a str or None; got {tag!r}")

def _as_array(leaf: Any) -> Any:
    """A leaf as a JAX array: JAX's own as they are, all else copied; `TypeError` for what is no array or number."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    if isinstance(leaf, (_Stateful, np.ma.MaskedArray)):  # which NumPy would take apart
        raise TypeError(f"{type(leaf).__name__} is not a valid JAX type")
    array = np.array(leaf)  # a copy, since JAX may go on reading the memory that it is given
    if isinstance(leaf, int):
        array = np.array(leaf, jax.dtypes.canonicalize_dtype(array.dtype))  # raises if too large
    return jax.device_put(array)

def _without_numpy(leaf: Any) -> Any:
    """A leaf of a tree, which may be anything after a `jax.tree.map`; NumPy's become JAX's."""
    return _as_array(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else leaf

def _flatten_arrays(value: Any, place: Any) -> Any:
    """`_flatten` into arrays; `TypeError` naming the place where a leaf is none."""
    try:
        leaves, paths, structure = _flatten(value)
        return [*map(_as_array, leaves)], paths, structure
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{place()}: {error}") from error

def _predicate(filter: Filter) -> Any:
    """A filter as a function of a path and the state or module there."""
    if isinstance(filter, type):
        return lambda path, thing: isinstance(thing, filter)
    if isinstance(filter, str):
        return lambda path, thing: getattr(thing, "tag", None) == filter
    if isinstance(filter, (list, tuple)):
        predicates = [_predicate(each) for each in filter]
        return lambda path, thing: any(each(path, thing) for each in predicates)
    if filter is None or filter is ... or isinstance(filter, bool):
        return lambda path, thing: bool(filter)
    if callable(filter) and not isinstance(filter, Module):  # a module can be called, too
        return filter
    raise TypeError("a filter is a type, a tag (str), a callable (path, object) -> bool, `...`, None, or a "
                    f"list or tuple of these; got {type(filter).__name__}")

def _filtered(things: dict[Path, T], filter: Filter) -> dict[Path, T]:
    passes = _predicate(filter)
    return {path: thing for path, thing in things.items() if passes(path, thing)}

# ---- Modules and the walk ------------------------------------------------------------------------

class Module(_Stateful):
    """Base class, or mix-in, of all that holds states. Calling a module calls its ``update``.

    To set an array in the place of a state is a `TypeError`.

    >>> class Scale(Module):
    ...     def __init__(self, size): self.factor = ParamState(jnp.ones(size))
    ...     def update(self, x): return self.factor.value * x
    >>> Scale(2)(3.)
    Array([3., 3.], dtype=float32)
    """

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get(name)
        leaves = tree_util.tree_leaves(value) if isinstance(held, State) else ()
        arrays = (jax.Array, np.ndarray, np.generic, int, float, complex)
        if not isinstance(value, State) and any(isinstance(leaf, arrays) for leaf in leaves):
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
        lines = [type(self).__name__]
        try:
            graph = _walk(self)
        except TypeError as error:  # a model that cannot be called can be looked at
            return f"{lines[0]} ({error})"
        for path in sorted(graph.modules | graph.states, key=_sort_key)[1:]:
            thing = graph.things[path]
            text = repr(thing) if isinstance(thing, State) else type(thing).__name__
            lines.append(f"{'  ' * len(path)}{_dotted(path)}: {text}")
        return "\n".join(lines)

class _Graph:
    """What one walk finds: every module, container and state once, by the path that met it first."""
    def __init__(self, root: Any, things: ByPath) -> None:
        self.root = root
        self.things = things  # all but tuples, which cannot change; what is inside of a thing comes before it
        self.modules = _filtered(things, Module)
        self.states: Any = _filtered(things, State)

def _is_container(thing: Any) -> bool:
    kind = type(thing)
    return kind in (list, tuple, dict, OrderedDict, defaultdict) or issubclass(kind, tuple) and hasattr(kind, "_fields")

def _contents(thing: Any) -> Any:
    """What a module, state or container holds, by attribute name, key or index."""
    if isinstance(thing, _Stateful):
        return thing.__dict__
    return thing if isinstance(thing, dict) else dict(enumerate(thing))

def _check_keys(path: Path) -> None:
    for step in path:
        if type(step) not in (str, int):
            raise TypeError("a dict key on the way to a state or module is a str or an int; got "
                            f"{step!r} ({type(step).__name__}) at {path}")

def _walk(root: Any) -> _Graph:
    """Walk a module, or a list, tuple or dict of modules, depth first and without recursion."""
    for each in _contents(root).values() if _is_container(root) else [root]:
        _refuse_other_copy(each)
        if not (isinstance(each, Module) or _is_container(each)):
            raise TypeError(f"expected a module, or a list, tuple or dict of modules; got {type(each).__name__}")
    things = {}
    first_paths: Any = {}
    stack: Any = [((), root, False)]
    while stack:
        path, thing, inside_is_known = stack.pop()
        if inside_is_known and not isinstance(thing, tuple):
            things[path] = thing
        if inside_is_known or first_paths.setdefault(id(thing), path) is not path:
            continue
        stack.append((path, thing, True))
        if isinstance(thing, _Stateful):
            _check_keys(path)
        if isinstance(thing, State):
            continue
        for name, inner in reversed(_contents(thing).items()):
            place = path + (name,)
            if isinstance(inner, _Stateful) or _is_container(inner):
                stack.append((place, inner, False))
                continue
            _refuse_other_copy(inner)
            inside = [*_contents(inner).values()] if isinstance(inner, (list, tuple, dict)) else ()
            if any(isinstance(leaf, _Stateful) for leaf in tree_util.tree_leaves(inside)):
                raise TypeError(f"{_place(place, inner)} holds a module or state; use the builtin container")
    return _Graph(root, things)

def traverse(module: Any) -> Iterator[tuple[Path, Module]]:
    """Iterate over ``(path, module)``: each once, by its first path, children before parents.

    >>> [path for path, _ in traverse({'encoder': [Module()], 'decoder': Module()})]
    [('encoder', 0), ('decoder',)]
    """
    return iter(_walk(module).modules.items())

# ---- State trees ---------------------------------------------------------------------------------
# A tree holds the leaves of all its states in one tuple, so that JAX flattens it with one call. All else is
# its layout, which is static. To change a tree, take it apart into fresh boxes, and make a new one of these.

class _Entry(NamedTuple):
    """What a layout says of one state."""
    path: Path
    kind: type[State]
    tag: Tag
    mapped: int
    structure: Any  # of the value
    leaf_paths: Any  # in the value

class _Layout:
    """The static part of a tree: an entry for each state, in canonical order."""
    def __init__(self, entries: Any) -> None:
        self.entries = entries
        self.leaf_paths: Any = []  # of the leaves of all states, from the root
        self.leaf_entries: Any = []  # of the states they belong to
        self.by_name: Any = {}  # by path and by dotted name: an entry, and which leaves it has
        for name, entry in zip(_check_names([entry.path for entry in entries]), entries):
            start = len(self.leaf_paths)
            self.leaf_paths.extend(entry.path + below for below in entry.leaf_paths)
            self.leaf_entries.extend([entry] * len(entry.leaf_paths))
            self.by_name[name] = self.by_name[entry.path] = entry, slice(start, len(self.leaf_paths))
        self.leaf_names = _check_names(self.leaf_paths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Layout) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def __reduce__(self) -> Any:
        return _layout_of, (self.entries,)

    def __repr__(self) -> str:  # as JAX shows it where trees do not match
        return "; ".join(f"{_dotted(entry.path)}: {entry.kind.__name__}, tag={entry.tag!r}, "
                         f"mapped={entry.mapped}" for entry in self.entries)

def _check_names(paths: Any) -> Any:
    """The dotted names of paths; `ValueError` if two are the same."""
    first: Any = {}
    for path in paths:
        other = first.setdefault(_dotted(path), path)
        if other is not path:
            raise ValueError(f"two states or leaves have the name {_dotted(path)!r}, {other} and {path}; rename one")
    return first

# Equal layouts are made one object, so that a loop of jitted steps compares them by identity: by value it
# takes 1 us longer with 10 states, and 3 to 5 % longer with 1,000.
_layouts: Any = weakref.WeakValueDictionary()

def _layout_of(entries: Any) -> Any:
    return _layouts.get(entries) or _layouts.setdefault(entries, _Layout(entries))

def _tree_of_leaves(layout: _Layout, leaves: Any) -> StateTree:
    tree = object.__new__(StateTree)
    tree._layout = layout
    tree._leaves = tuple(leaves)
    return tree

def _tree_of(boxes: ByPath) -> StateTree:
    """A tree of these boxes, with leaves that nobody can change."""
    entries = []
    leaves = []
    for path in sorted(boxes, key=_sort_key):
        box = boxes[path]
        own, leaf_paths, structure = _flatten_arrays(box.value, lambda: (
            f"no array in {_place(path, box)}; what is no array goes in a plain attribute"))
        leaves.extend(own)
        _check_tag(box.tag)
        entries.append(_Entry(path, type(box), box.tag, box.mapped, structure, leaf_paths))
    return _tree_of_leaves(_layout_of(tuple(entries)), leaves)

def _is_tree(thing: Any) -> bool:
    """Whether something is a state tree; `TypeError` for one of another copy of this file."""
    _refuse_other_copy(thing)
    return isinstance(thing, StateTree)

def _check_tree(thing: Any) -> None:
    if not _is_tree(thing):
        raise TypeError(f"expected a StateTree, as from snapshot(module); got {type(thing).__name__}")

def _boxes_of(tree: StateTree) -> ByPath:
    """Fresh boxes of a tree, made without calling their kinds, whose `__init__` may take anything."""
    _check_tree(tree)
    boxes = {}
    for entry in tree._layout.entries:
        box = object.__new__(entry.kind)
        box.tag = entry.tag
        box.mapped = entry.mapped
        box.value = tree[entry.path]
        boxes[entry.path] = box
    return boxes

class StateTree(Mapping[Path, Any]):
    """An immutable mapping from path to value, and a JAX pytree whose leaves are the arrays.

    Made of a mapping from paths, or dotted names, to `State` boxes, or to trees, which are grafted there. `TypeError`
    for anything else and for values that are no arrays; `ValueError` where two states, or two leaves, have one dotted
    name. Nobody can change a tree: containers and NumPy arrays are copied. Two trees are equal only if they are one
    object. In ``a | b``, ``b`` wins; `ValueError` where they disagree about ``mapped``.

    >>> StateTree({'W': ParamState({'w': jnp.ones((2, 3)), 'b': 0.}), 'cells.0.h': State(1)})
    path       kind        value         mapped
    W.b        ParamState  float32[]     0
    W.w        ParamState  float32[2,3]  0
    cells.0.h  State       int32[]       0
    3 leaves, 8 numbers, 32 bytes
    """

    __slots__ = ("_layout", "_leaves", "__weakref__")
    _layout: _Layout
    _leaves: Any
    _collective_file = _Stateful._collective_file

    def __new__(cls, states: Mapping[Any, State | StateTree]) -> StateTree:
        boxes: Any = []
        for name, part in dict(states).items():
            _refuse_other_copy(part)
            if not (name and isinstance(name, (str, tuple)) and isinstance(part, (State, StateTree))):
                raise TypeError("expected a path with a State or a StateTree, as in {'w': ParamState(1.)}; "
                                f"got {name!r} with {type(part).__name__}")
            top = _as_path(name)
            _check_keys(top)
            below = {(): part} if isinstance(part, State) else part.states()
            boxes.extend((top + path, box) for path, box in below.items())
        _check_names([path for path, _ in boxes])
        return _tree_of(dict(boxes))

    def __getitem__(self, path: Path | str) -> Any:
        try:
            entry, own = self._layout.by_name[path]
        except KeyError:
            raise _no_state(self, _as_path(path)) from None
        return entry.structure.unflatten(map(_without_numpy, self._leaves[own]))

    def __contains__(self, path: object) -> bool:
        return path in self._layout.by_name

    def __iter__(self) -> Iterator[Path]:
        return (entry.path for entry in self._layout.entries)

    def __len__(self) -> int:
        return len(self._layout.entries)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __or__(self, other: StateTree) -> StateTree:
        left = _boxes_of(self)
        right = _boxes_of(other)
        for path in left.keys() & right.keys():
            if left[path].mapped != right[path].mapped:
                raise ValueError(f"{_dotted(path)!r} has mapped={left[path].mapped} on the left and "
                                 f"mapped={right[path].mapped} on the right; to write a value, use assign")
        return _tree_of(left | right)

    def __reduce__(self) -> Any:
        return _tree_of_leaves, (self._layout, self._leaves)

    def __repr__(self) -> str:
        layout = self._layout
        table = [("path", "kind", "value", "mapped")]
        for name, entry, leaf in zip(layout.leaf_names, layout.leaf_entries, self._leaves):
            row = name, entry.kind.__name__, _described(leaf), str(entry.mapped)
            table.append(row)
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        arrays = [leaf for leaf in tree_util.tree_leaves(self) if hasattr(leaf, "dtype")]
        numbers = sum(leaf.size for leaf in arrays)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
        lines.append(f"{len(table) - 1:,} leaves, {numbers:,} numbers, {size:,} bytes")
        return "\n".join(lines)

    def states(self) -> dict[Path, State]:
        """Fresh boxes with the kinds, tags, mapped counts and values of this tree."""
        return _boxes_of(self)

tree_util.register_pytree_with_keys(StateTree,
    lambda tree: (zip(map(tree_util.DictKey, tree._layout.leaf_names), tree._leaves), tree._layout),
    _tree_of_leaves, operator.attrgetter("_leaves", "_layout"))

def _no_state(state: StateTree, path: Path) -> KeyError:
    """The error for a path that leads to no state."""
    name = _dotted(path)
    if any(each[:-1][:len(path)] == path for each in state):
        return KeyError(f"no state {name!r}; subtree(tree, {name!r}) has the states below it")
    names = sorted(map(_dotted, state), key=lambda each: abs(len(each) - len(name)))
    closest = difflib.get_close_matches(name, names[:50], cutoff=0)
    return KeyError(f"nothing is found for {name!r}; the closest states are {closest}")

def partition(state: StateTree, filter: Filter) -> tuple[StateTree, StateTree]:
    """Split a tree into ``(matching, rest)``; ``matching | rest`` is the whole again.

    >>> params, rest = partition(StateTree({'w': ParamState(1.), 'h': HiddenState(0.)}), ParamState)
    >>> list(params), list(rest)
    ([('w',)], [('h',)])
    """
    chosen = _filtered(_boxes_of(state), filter)
    layout = state._layout

    def part(is_chosen: bool) -> StateTree:
        entries = tuple(entry for entry in layout.entries
                        if (entry.path in chosen) is is_chosen)
        leaves = [state._leaves[layout.by_name[entry.path][1]] for entry in entries]
        return _tree_of_leaves(_layout_of(entries), map(_without_numpy, itertools.chain(*leaves)))
    return part(True), part(False)

def subtree(state: StateTree, path: Path | str) -> StateTree:
    """The states below a path, or dotted name, with paths from there; `KeyError` if there are none.

    >>> list(subtree(StateTree({'encoder.0.w': ParamState(1.), 'out': ParamState(2.)}), 'encoder'))
    [(0, 'w')]
    """
    prefix = _dotted(_as_path(path)) + "."
    below = {}
    for whole, box in _boxes_of(state).items():
        ends = [*itertools.accumulate(len(str(step)) + 1 for step in whole)]  # of the steps, in the dotted name
        if _dotted(whole).startswith(prefix) and len(prefix) in ends:  # at a step, since a key may have dots, too
            below[whole[ends.index(len(prefix)) + 1:]] = box
    if not below:
        raise _no_state(state, _as_path(path))
    return _tree_of(below)

def _is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys, whose dtypes are none of NumPy's."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf.dtype, np.dtype)

def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else _without_numpy(leaf)

def flat_dict(state: StateTree) -> dict[str, Any]:
    """All leaves by dotted name, typed keys as their data: what npz and safetensors take.

    >>> list(flat_dict(StateTree({'layers.0': ParamState({'bias': 0., 'weight': 1.})})))
    ['layers.0.bias', 'layers.0.weight']
    """
    _check_tree(state)
    return dict(zip(state._layout.leaf_names, map(_key_data, state._leaves)))

def _check_alike(*states: StateTree) -> None:
    """Refuse trees that differ in more than values; where their states differ, JAX says how."""
    for state in states:
        _check_tree(state)

    def check(keys: Any, *leaves: Any) -> None:
        if len({(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves}) > 1:
            texts = " against ".join(map(_described, leaves))
            raise ValueError(f"only the values of trees may differ, but {tree_util.keystr(keys)} is {texts}")
    tree_util.tree_map_with_path(check, *states)

def where(mask: Any, new: StateTree, old: StateTree) -> StateTree:
    """A tree with ``new`` where ``mask`` holds and ``old`` elsewhere; leaves that are one object are kept.

    In a tree with mapped states the mask is about members. `ValueError` if the trees differ in more than values, if a
    leaf that changes is not ``(*mask.shape, ...)``, or if a shared state of members changes.

    >>> old = StateTree({'h': HiddenState(jnp.ones(2))})
    >>> where([True, False], jax.tree.map(jnp.zeros_like, old), old)['h']
    Array([0., 1.], dtype=float32)
    """
    _check_alike(new, old)
    mask = jnp.asarray(mask)
    layout = old._layout
    mask_of = functools.cache(lambda rank: mask.reshape(mask.shape + (1,) * (rank - mask.ndim)))
    of_members = any(entry.mapped for entry in layout.entries)
    leaves = []
    unfit = []
    for name, entry, fresh, leaf in zip(layout.leaf_names, layout.leaf_entries, new._leaves, old._leaves):
        shape = np.shape(leaf)
        leading = shape[:entry.mapped] if of_members else shape
        if fresh is not leaf:
            if leading[:mask.ndim] != mask.shape:
                unfit.append(f"\n  {name!r} {_described(leaf)}, mapped={entry.mapped}")
            else:
                leaf = jnp.where(mask_of(len(shape)), _as_array(fresh), _as_array(leaf))
        leaves.append(_as_array(leaf))
    if unfit:
        raise ValueError(f"a mask of shape {mask.shape} cannot choose between the values of{''.join(unfit)}\nA "
                         "shared state must be the same in both trees: call where in the same jitted function as "
                         "the call that made them, or take that state from one of them with partition.")
    return _tree_of_leaves(layout, leaves)

# ---- Copy, snapshot, restore ---------------------------------------------------------------------

def snapshot(module: Any) -> StateTree:
    """The states of a module as a tree. One that is found at several paths comes once, under the first of them.

    >>> list(snapshot(restore(Module(), StateTree({'h': State(0.)}))))
    [('h',)]
    """
    return _tree_of(_walk(module).states)

def _refill(holder: Any, contents: Any) -> None:
    """Make a module, state, list or dict hold these things and nothing else."""
    if isinstance(holder, list):
        holder[:] = contents.values()
    else:
        _contents(holder).clear()
        _contents(holder).update(contents)

def _all_or_nothing(graph: _Graph, run: Any) -> None:
    """Run, and if that raises put all modules, containers and states back as they were."""
    saved = []
    for thing in graph.things.values():
        contents = dict(_contents(thing))
        value = contents.get("value")
        if isinstance(thing, State) and not isinstance(value, (jax.Array, type(None))):
            contents["value"] = tree_util.tree_map(lambda leaf: leaf, value)  # in containers of its own
        saved.append((thing, type(thing), contents))
    try:
        run()
    except BaseException:
        for thing, kind, contents in saved:
            if isinstance(thing, _Stateful):
                thing.__class__ = kind
            _refill(thing, contents)
        raise

def _write_states(graph: _Graph, boxes: ByPath) -> None:
    """Give the states of a graph the kinds, tags, mapped counts and values of these boxes; add those it lacks."""
    new = {path: box for path, box in boxes.items() if path not in graph.states}
    _attach_states(graph, new)
    graph.states.update(new)
    for path, box in boxes.items():
        own = graph.states[path]
        own.__class__ = type(box)
        own.__dict__.update(box.__dict__)

def _attach_states(graph: _Graph, boxes: ByPath) -> None:
    """Put new states where their paths say, in new lists and dicts where there are none yet."""
    by_place: Any = {}
    for path, box in boxes.items():
        end = len(path) - 1
        while end and path[:end] not in graph.things:
            end -= 1
        by_place.setdefault(path[:end + 1], {})[path[end + 1:]] = box
    faults = []
    for place, below in by_place.items():
        above = place[:-1]
        holder = graph.things.get(above, graph.root)
        new = _nested(below)
        # A list or dict below the root takes a single state; one that has no modules in it takes nested ones.
        fits = isinstance(holder, Module) or (above if isinstance(new, State) else not any(
            path[:len(above)] == above for path in graph.modules))
        if not fits or not _put(holder, place[-1], new):
            faults.append(f"\n  {_dotted(place)!r}, in {_place(above, holder)}")
    if faults:
        raise ValueError(f"there is no place for these states of the tree:{''.join(faults)}\nCreate modules "
                         "in __init__, and write None there (not in a tuple) for a state that init_state creates.")

def _nested(below: ByPath) -> Any:
    """States by relative path, as nested dicts; a list where the keys are 0, 1, and so on."""
    if () in below:
        if len(below) > 1:
            raise ValueError(f"one state of the tree lies above another, {_dotted([*below][1])!r} from it; rename one")
        return below[()]
    groups: Any = {}
    for path, box in below.items():
        groups.setdefault(path[0], {})[path[1:]] = box
    new = {step: _nested(group) for step, group in groups.items()}
    return [*new.values()] if [*new] == [*range(len(new))] else new

def _put(holder: Any, step: Any, new: Any) -> bool:
    """Put new states in a place: True if it was free or held a state. On False the caller raises, which undoes it."""
    if isinstance(holder, list) and step in range(len(holder) + 1):
        old = [*holder[step:], None][0]
        holder[step:step + 1] = [new]
    elif isinstance(holder, dict) or (isinstance(holder, Module) and isinstance(step, str)):
        old = _contents(holder).get(step)
        _contents(holder)[step] = new
    else:
        return False
    return old is None or isinstance(old, State) and isinstance(new, State)

def restore(module: T, state: StateTree) -> T:
    """Write a tree's values into a module, with new states; `ValueError` where there is no place for one.

    >>> restore(Module(), StateTree({'h': HiddenState(jnp.ones(2))})).h
    HiddenState(float32[2])
    """
    graph = _walk(module)
    _all_or_nothing(graph, lambda: _write_states(graph, _boxes_of(state)))
    return module

def _copy_graph(graph: _Graph) -> _Graph:
    """A copy of the modules, containers and states of a graph; all else is shared with it."""
    copies = {}
    for thing in graph.things.values():
        is_stateful = isinstance(thing, _Stateful)
        copies[id(thing)] = object.__new__(type(thing)) if is_stateful else copy.copy(thing)
    for thing in graph.things.values():
        parts = _contents(thing).items()
        contents = {name: _copy_of(part, copies) for name, part in parts}
        _refill(copies[id(thing)], contents)
    things = {path: copies[id(thing)] for path, thing in graph.things.items()}
    return _Graph(_copy_of(graph.root, copies), things)

def _copy_of(part: Any, copies: Any) -> Any:
    """What the copy holds where the original holds ``part``. Tuples and bound methods are made anew."""
    if isinstance(part, types.MethodType):
        owner = part.__self__
        return types.MethodType(part.__func__, copies[id(owner)]) if id(owner) in copies else part
    is_tuple = isinstance(part, tuple) and _is_container(part)
    if is_tuple and id(part) not in copies:
        parts = [_copy_of(each, copies) for each in part]
        make = getattr(part, "_make", tuple)
        copies[id(part)] = make(parts)
    return copies.get(id(part), part)

# ---- The call engine -----------------------------------------------------------------------------
# `_plan` finds, orders and checks the methods of a call. `_run` runs them on the modules of its graph: the real ones
# for a call in place, those of a private copy for a pure call.

MAX_ORDER = 10

def call_order(level: int = 0, check_order_boundary: bool = True) -> Callable[[T], T]:
    """Decorate a method to run at a level: after all undecorated ones, lower levels first.

    `TypeError` unless an int, `ValueError` unless in ``[0, MAX_ORDER)`` where that is checked.

    >>> call_order(1)(lambda self: None).call_order
    1
    """
    if type(level) is not int:
        raise TypeError(f"level must be an integer, as in @call_order(1); got {level!r}")
    if check_order_boundary and not 0 <= level < MAX_ORDER:
        raise ValueError(f"level must be an integer in [0, {MAX_ORDER}); got {level}")

    def decorate(method: T) -> T:
        setattr(method, "call_order", level)
        return method
    return decorate

class _Call(NamedTuple):
    """A call that passed every check: of what, with what, and on which nodes in which order."""
    graph: _Graph
    fn_name: str
    args: Any
    kwargs: Any
    key: Key
    of_root: bool  # then the root gets `key` itself; else each node gets a key of its own
    paths: list[Path]
    per_member: bool = False  # whether this is a vmapped call, as one member sees it

def _plan(module: Any, fn_name: str, args: Any, kwargs: Kwargs, key: Key, node_to_exclude: Filter = None,
          fn_if_not_exist: str = "raise", of_root: bool = False) -> _Call:
    """Find and order the methods, and refuse what can be refused before the first of them runs."""
    args = args if isinstance(args, tuple) else (args,)
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(fn_name, str):
        raise TypeError(f"fn_name must be a string, the name of a method; got {fn_name!r}")
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping, of keyword arguments; got {kwargs!r}")
    if fn_if_not_exist not in ("raise", "warn", "pass", "none"):
        raise ValueError(f"fn_if_not_exist is 'raise', 'warn' or 'pass'; got {fn_if_not_exist!r}")
    if key is not None:
        _check_key(key, kwargs)
    graph = _walk(module)
    nodes: ByPath = {(): module} if of_root else graph.modules
    excluded = _filtered(nodes, node_to_exclude)
    levels = {}
    missing = []
    for path, node in nodes.items():
        if path in excluded:
            continue
        method = getattr(node, fn_name, None) if isinstance(node, Module) else None
        if method is None:
            missing.append(path)
        elif callable(method):
            levels[path] = getattr(method, "call_order", float("-inf"))
        else:
            raise TypeError(f"on {_place(path, node)} the attribute {fn_name!r} must be callable")
    if missing and fn_if_not_exist in ("raise", "warn"):
        text = (f"{_places(nodes, missing)} does not have method {fn_name!r}; define it there, or pass "
                "node_to_exclude= or fn_if_not_exist='pass' to a call of all nodes")
        if fn_if_not_exist == "raise":
            raise AttributeError(text)
        warnings.warn(text)
    return _Call(graph, fn_name, args, kwargs, key, of_root, sorted(levels, key=levels.__getitem__))

def _check_key(key: Key, kwargs: Any) -> None:
    is_legacy = getattr(key, "dtype", None) == np.uint32  # then one key is a vector
    if np.ndim(key) != is_legacy or not (is_legacy or _is_key(key)):
        raise TypeError(f"key= is one PRNG key, as of jax.random.key(0); got {_described(key)}")
    if "key" in kwargs:
        raise TypeError("a key came both as key=, of which each node gets its own, and in kwargs=; pass one")

def _takes_key(method: Any) -> bool:
    """Whether a method has a parameter ``key``, or takes any keyword."""
    function = getattr(method, "__func__", None)
    if function is Module.__call__:
        method = method.__self__.update
    with contextlib.suppress(TypeError, ValueError):  # it does not, or is a builtin that cannot tell
        inspect.signature(method).bind_partial(key=None)
        return function not in (Module.init_state, Module.reset_state)  # which do nothing with it
    return False

def _node_key(key: Key, path: Path) -> Key:
    """The key of a node: a matter of its path alone, in every process."""
    digest = hashlib.blake2b(repr(_sort_key(path)).encode(), digest_size=8).digest()
    for word in np.frombuffer(digest, "<u4"):
        key = jax.random.fold_in(key, word)
    return key

def _run(call: _Call) -> tuple[Outputs, _Graph]:
    """Run the methods: what they returned, without None, and the graph as it is afterwards."""
    axes = {path: _axes(box) for path, box in call.graph.states.items() if box.mapped or call.per_member}
    outputs = {}
    for path in call.paths:
        node = call.graph.modules[path]
        method = getattr(node, call.fn_name)
        kwargs = dict(call.kwargs)
        if call.key is not None and (call.of_root or _takes_key(method)):
            kwargs["key"] = call.key if call.of_root else _node_key(call.key, path)
        try:
            output = method(*call.args, **kwargs)
        except Exception as error:
            with contextlib.suppress(Exception):  # some exceptions refuse notes
                error.add_note(f"raised by {call.fn_name!r} of {_place(path, node)}")
                if call.key is None and " 'key'" in str(error):  # as in "missing 1 required argument: 'key'"
                    error.add_note("every method that takes a key gets one if you pass key=jax.random.key(0)")
                if isinstance(error, AttributeError):
                    error.add_note("define it in the class, or create it by init or init_all_states before this call")
            raise
        if output is not None:
            outputs[path] = output
    after = _walk(call.graph.root)
    _check_no_dead_tracers(after.states)
    _check_axes(call, axes, after.states)
    return outputs, after

# A method that writes a state inside its own `scan` or `jit` leaves a tracer of a trace that is over when it returns.
# What tells it from a tracer of a trace that goes on: outside of all traces a new array is concrete.

@functools.cache
def _tracer_of_jit() -> Any:
    """The class of the tracers of jit, scan, cond, while_loop and checkpoint."""
    kinds: Any = []
    jax.eval_shape(lambda leaf: kinds.append(type(leaf)), 0.)
    return kinds[0]

def _leaves(box: Any) -> list[Any]:
    """The leaves of a box; none where its value is hidden."""
    return tree_util.tree_leaves(box.__dict__.get("value"))

def _check_no_dead_tracers(states: ByPath) -> None:
    tracer = _tracer_of_jit()
    traced = [path for path, box in states.items() if any(isinstance(leaf, tracer) for leaf in _leaves(box))]
    if traced and not isinstance(jnp.zeros(()), tracer):
        raise ValueError(f"{_places(states, traced)} was written inside a scan, cond, while_loop, checkpoint or "
                         "jit, and holds a tracer that is of no use outside. Carry a state tree through it: "
                         "snapshot(module) before, apply(module, state, ...) inside, restore(module, state) after")

_ONE_MODEL = ("a plain call is for one model: call vmap_apply, vmap_reset or vmap_call_all, or its form in place; "
              "in an ensemble of ensembles, within vmap: vmap(functools.partial(vmap_reset, module))(state)")

def _axes(box: Any) -> Any:
    """Of each leaf of a box: the number of axes, and the sizes of the mapped ones."""
    return [(np.ndim(leaf), np.shape(leaf)[:box.mapped]) for leaf in _leaves(box)]

def _check_axes(call: _Call, axes: ByPath, after: ByPath) -> None:
    """A state keeps its mapped axes; in a vmapped call, one member's state keeps all its axes."""
    # A state that is replaced may have any rank, and so may any after init_state; a mapped one, only if both are true.
    is_init = call.fn_name == "init_state"
    changed = []
    for path, box in call.graph.states.items():
        now = after.get(path, box)
        is_new = now is not box
        may_change = (is_init and is_new) if box.mapped else (is_init or is_new)
        if not may_change and axes.get(path) and _axes(now) != axes[path]:
            changed.append(f"\n  {_place(path, now)}, which is now {now!r}")
    if changed:
        way_out = "in_axes maps positional arguments, such as a batch; keywords are shared by all members"
        raise ValueError(f"{call.fn_name!r} changed the leading axes of{''.join(changed)}\n"
                         f"{way_out if call.per_member else _ONE_MODEL}")

# ---- Pure calls ----------------------------------------------------------------------------------

def _hide_members(boxes: ByPath, template: ByPath) -> ByPath:
    """Take away and return the values that are of all members, which a plain call must not see.

    Those have a higher ``mapped`` than the state in the module, and values of other ranks. With the same ranks a value
    is of one model: a scan over layers slices the values, but leaves ``mapped`` as it is.
    """
    hidden = {}
    odd = []
    for path, box in boxes.items():
        own = template.get(path, State(()))
        ranks = [*map(np.ndim, _leaves(box))]
        own_ranks = [*map(np.ndim, _leaves(own))]
        for rank, own_rank in zip(ranks, own_ranks):
            single = own_rank - own.mapped
            if isinstance(box, LongTermState) and rank not in (own_rank, single, single + box.mapped):
                odd.append(f"\n  {_place(path, box)}: {box!r}, where the module has {own!r}")
        if box.mapped > own.mapped and ranks != own_ranks:
            hidden[path] = box.__dict__.pop("value")
            of_all = f"holds the values of all members (mapped={box.mapped})"
            box._why_hidden = f"{_place(path, box)} {of_all}, but {_ONE_MODEL}"
    if odd:
        raise ValueError(f"these states have axes that mapped does not count:{''.join(odd)}\nMake an ensemble "
                         "with vmap or stack: jax.vmap and jax.tree.map leave mapped as it is.")
    return hidden

def _run_on_copy(call: _Call, boxes: ByPath) -> tuple[Outputs, ByPath, ByPath]:
    """Run a call on a private copy: outputs, the boxes that it had before the call, and those it has now."""
    template = call.graph.states
    lacking = template.keys() - boxes.keys()
    if lacking:
        raise ValueError(f"the state tree lacks {_places(template, lacking)}, which the module has; pass the "
                         "whole tree, such as `params | rest`")
    copied = _copy_graph(call.graph)
    _write_states(copied, boxes)
    hidden = _hide_members(copied.states, template)
    outputs, after = _run(call._replace(graph=copied))
    for path, value in hidden.items():
        box = copied.states[path]
        text = box.__dict__.pop("_why_hidden")
        if after.states.get(path) is not box or "value" in box.__dict__:
            raise ValueError(text)
        box.value = value
    known = {*map(id, copied.modules.values())}
    created = [path for path, node in after.modules.items() if id(node) not in known]
    if created:
        raise ValueError(f"{call.fn_name!r} created modules, {_places(after.modules, created)}; create modules "
                         "in __init__, states in init_state")
    return outputs, copied.states, after.states

def apply(module: Module, state: StateTree, *args: Any, method: str = "__call__", key: Key = None,
          **kwargs: Any) -> tuple[Any, StateTree]:
    """Call one method of a module, with ``key``, if any, as ``key=``: ``(output, state)``, a new tree.

    `ValueError` if the tree lacks a state of the module, or has axes that ``mapped`` does not count; if the method
    reads or writes a state of all members, changes mapped axes, leaves a tracer, or creates modules.

    >>> class Counter(Module):
    ...     def update(self, by): self.count.value += by
    >>> apply(Counter(), StateTree({'count': State(0)}), 5)[1]['count'].item()
    5
    """
    call = _plan(module, method, args, kwargs, key, of_root=True)
    outputs, _, after = _run_on_copy(call, _boxes_of(state))
    return outputs.get(()), _tree_of(after)

def call_all(module: Any, state: StateTree, fn_name: str, args: Any = (), kwargs: Kwargs = None, *,
             node_to_exclude: Filter = None, fn_if_not_exist: str = "raise",
             key: Key = None) -> tuple[Outputs, StateTree]:
    """Call a method on every node: ``(outputs, state)``, with a new tree.

    Outputs are by path, in call order, without None. With ``key``, each node whose method takes a ``key`` gets its
    own, made of ``key`` and the node's path alone. ``fn_if_not_exist`` is 'raise', 'warn' or 'pass' (or 'none').
    Raises what `apply` raises, `AttributeError` for missing methods, `TypeError` for an attribute that is no method.

    >>> class Layer(Module):
    ...     def norm(self, power): return jnp.sum(self.w.value ** power)
    >>> call_all([Layer()], StateTree({'0.w': ParamState(jnp.ones(3))}), 'norm', 2)[0]
    {(0,): Array(3., dtype=float32)}
    """
    call = _plan(module, fn_name, args, kwargs, key, node_to_exclude, fn_if_not_exist)
    outputs, _, after = _run_on_copy(call, _boxes_of(state))
    return outputs, _tree_of(after)

def init(module: Any, *args: Any, node_to_exclude: Filter = None, key: Key = None, **kwargs: Any) -> StateTree:
    """Call ``init_state`` on every node, starting from ``snapshot(module)``: a new tree.

    >>> class Cell(Module):
    ...     def init_state(self, key): self.h = HiddenState(jax.random.normal(key, (3,)))
    >>> init([Cell()], key=jax.random.key(0))['0.h'].shape
    (3,)
    """
    return call_all(module, snapshot(module), "init_state", args, kwargs, node_to_exclude=node_to_exclude, key=key)[1]

def reset(module: Any, state: StateTree, *args: Any, node_to_exclude: Filter = None, key: Key = None,
          **kwargs: Any) -> StateTree:
    """Call ``reset_state`` on every node: a new tree.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h.value = jnp.zeros(2)
    >>> reset(Cell(), StateTree({'h': HiddenState(jnp.ones(2))}))['h']
    Array([0., 0.], dtype=float32)
    """
    return call_all(module, state, "reset_state", args, kwargs, node_to_exclude=node_to_exclude, key=key)[1]

# ---- vmap and the vmapped calls ------------------------------------------------------------------
# `jax.vmap` knows arrays. `_map_members` gives it the leaves of all arguments: of a tree, those of mapped states along
# their leading axis, the others for all members to share. It has `jax.vmap` check, by `out_axes=None`, that what is
# shared comes out the same for all. `vmap` decides by path what is shared; a vmapped call by box, as it makes boxes.

def _shift_mapped(value: Any, by: int, only: Any = None) -> Any:
    """A pytree whose trees, those inside of trees too, count so many more mapped axes."""
    def shifted(part: Any) -> Any:
        if not isinstance(part, StateTree):
            return part
        boxes = _boxes_of(part)
        for path in boxes if only is None else only:
            boxes[path].mapped += by
            boxes[path].value = _shift_mapped(boxes[path].value, by)  # an optimiser's state has trees in it
        return _tree_of(boxes)
    return tree_util.tree_map(shifted, value, is_leaf=_is_tree)

def _flatten_arguments(given: Any, in_axes: Any, is_mapped: Filter) -> Any:
    """Leaves of what is given, as (name, leaf, axis); its structure, as a member sees it; its trees.

    With each tree come its mapped states, which pass the filter. ``in_axes`` is about ``given['args']``.
    """
    flat, structure = tree_util.tree_flatten_with_path(given, is_leaf=_is_tree)
    prefix = tuple(in_axes) if isinstance(in_axes, list) else in_axes
    wrong = f"in_axes is an int or None, or a tuple or tree of these; {in_axes!r} does not fit "
    axes: Any = []  # by hand, since JAX's own way rebuilds the caller's classes with axes in them
    with contextlib.suppress(TypeError, ValueError):  # there are too few axes then
        tree_util.tree_map(lambda axis, part: axes.extend([axis] * len(tree_util.tree_leaves(part, is_leaf=_is_tree))),
                           dict.fromkeys(given, 0) | {"args": prefix}, given, is_leaf=lambda axis: axis is None)
    if len(axes) != len(flat):
        raise TypeError(f"{wrong}the {len(given['args'])} arguments, {_described(given['args'])}")
    leaves: Any = []
    parts = []
    trees = []
    for ((top, *keys), part), axis in zip(flat, axes):
        name = top.key + tree_util.keystr(tuple(keys))
        valid = range(1) if isinstance(part, StateTree) else range(-np.ndim(part), np.ndim(part))
        if axis is not None and (type(axis) is not int or axis not in valid):
            raise TypeError(f"{wrong}{name}, {_described(part)}. None shares it. A StateTree takes 0, which maps "
                            "its mapped states, or None. To a vmapped call, pass a PRNG key as key=, which gives "
                            "each member its own, and a flag by keyword")
        if isinstance(part, StateTree):
            mapped = _filtered(_boxes_of(part), None if axis is None else is_mapped)
            trees.append((part, mapped))
            for path, value in part.items():
                at = 0 if path in mapped else None
                leaves.extend((f"{_dotted(path)!r} of {name}", leaf, at) for leaf in tree_util.tree_leaves(value))
            part = _shift_mapped(part, -1, mapped)
        else:
            leaves.append((name, part, axis))
        parts.append(part)
    return leaves, tree_util.tree_structure(tree_util.tree_unflatten(structure, parts)), trees

def _axis_size(leaves: Any, axis_size: Any) -> Any:
    """The number of members: as given, or that of the first mapped state or argument."""
    sizes = [(name, [*np.shape(leaf)[axis:], None][0]) for name, leaf, axis in leaves if axis is not None]
    if axis_size is None:
        if not sizes:
            raise ValueError("no state is mapped, and no argument; pass axis_size, or build an ensemble first")
        axis_size = sizes[0][1]
    odd = [f"\n  {name}: {size}" for name, size in sizes if size != axis_size]
    if odd:
        raise ValueError(f"axis_size {axis_size} is at odds with the mapped axis of{''.join(odd)}\n"
                         "An ensemble keeps its size; for another one in place, call init_all_states first.")
    if type(axis_size) is bool or not isinstance(axis_size, (int, np.integer)) or axis_size < 1:
        raise ValueError(f"axis_size is a positive int; got {axis_size!r}")
    return axis_size

def _split_key(key: Key, size: int, leaves: Any) -> Key:
    """A key for each member, spread over an explicit mesh as what is mapped is."""
    keys = jax.random.split(key, size)
    for _, leaf, axis in leaves:
        spec = None if axis is None else jax.typeof(leaf).sharding.spec[axis]
        if spec is not None:
            return jax.device_put(keys, jax.sharding.PartitionSpec(spec))  # type: ignore[no-untyped-call]
    return keys

def _map_members(fn: Any, given: Any, in_axes: Any, axis_size: Any, axis_name: Hashable, is_mapped: Filter,
                 key: Key = None) -> Any:
    """Call ``fn(given, key, trees)`` once per member: the results, with a leading axis.

    ``trees`` has the state trees of ``given`` before the split, each with its mapped states. ``fn`` returns its results
    and a function ``rule``: of a tree in the results, those states are per member that pass the filter ``rule(tree)``.
    """
    leaves, structure, trees = _flatten_arguments(given, in_axes, is_mapped)
    size = _axis_size(leaves, axis_size)
    keys = None if key is None else _split_key(key, size, leaves)
    structures: Any = []
    changed: Any = []  # shared states that may differ

    def of_member(values: Any, key: Key) -> Any:
        results, rule = fn(structure.unflatten(values), key, trees)
        flat, results_structure = tree_util.tree_flatten(results, is_leaf=_is_tree)
        structures.append(results_structure)
        shared = []
        given_to_all = {id(value) for value, axis in zip(values, axes) if axis is None}
        for i, part in enumerate(flat):
            if isinstance(part, StateTree):
                flat[i], rest = partition(part, rule(part))
                shared.append(rest)
                named = zip(rest._layout.leaf_names, rest._leaves)
                changed.extend(name for name, leaf in named if id(leaf) not in given_to_all)
        return shared, flat

    _, values, axes = zip(*leaves) if leaves else [()] * 3
    try:
        shared, flat = jax.vmap(of_member, (axes, 0), (None, 0), axis_name, size)(values, keys)
    except ValueError as error:
        text = str(error)
        names = text.split("'")[1:2] if axis_name is None else changed  # JAX does not say which, under an axis_name
        if not names or not text.startswith("at vmap out_axes[0][" if axis_name is None else "vmap has mapped output"):
            raise
        raise ValueError(
            f"shared states ended up different per member: {names}. Ways out:\n"
            "  create it in init_state under a vmapped call, or build the members with vmap;\n"
            "  exclude it (state_to_exclude of a vmapped init), so that all have the first one's;\n"
            "  make its value the same for all, as by jax.lax.pmean over axis_name;\n"
            "  return a gradient, or another value per member, as flat_dict(tree)") from error
    for i, part in enumerate(flat):
        if isinstance(part, StateTree):
            flat[i] = _shift_mapped(part, 1) | shared.pop(0)
    return structures[-1].unflatten(flat)

def _per_member(given: Any, result: StateTree) -> Filter:
    """The rule of `vmap`: per member is what was mapped in a given tree, and what none of them has."""
    # Where they disagree, the one that has the same states as the result decides.
    alike = [(tree, mapped) for tree, mapped in given if tree.keys() == result.keys()]
    decided = {}
    for path in result:
        votes = {path in mapped for tree, mapped in alike or given if path in tree}
        if len(votes) > 1:
            raise ValueError(f"{_dotted(path)!r} is mapped in one argument, shared in another; give the trees "
                             "names of their own, as in StateTree({'actor': a, 'critic': c})")
        decided[path] = votes != {False}
    return lambda path, box: decided[path]

def vmap(fn: Callable[..., Any], in_axes: Any = 0, *, axis_size: int | None = None,
         axis_name: Hashable = None) -> Callable[..., Any]:
    """`jax.vmap` that knows state trees: ``fn`` once per member.

    Positional arguments are mapped by ``in_axes``, as in `jax.vmap`. Of a state tree, wherever it stands in them,
    ``fn`` sees the mapped states of one member, with ``mapped`` lowered by one, and the shared ones as they are.
    Results are ``(size, *shape)``; in their trees, states that an argument had stay mapped or shared, new ones are
    mapped. `TypeError` for ``in_axes`` that do not fit, and for a module or its method, which `vmap_apply` runs.
    `ValueError` for sizes that disagree, for a shared state that becomes one per member, and for one that arguments
    disagree about.

    >>> class Dense(Module):
    ...     def __init__(self, key): self.w = ParamState(jax.random.normal(key, (3, 2)))
    >>> keys = jax.random.split(jax.random.key(0), 10)
    >>> vmap(lambda key: snapshot(Dense(key)))(keys)['w'].shape
    (10, 3, 2)
    """
    if isinstance(getattr(fn, "__self__", fn), Module):
        raise TypeError("vmap takes a function of trees; for a module, call vmap_apply(module, state, *args)")

    def of_member(given: Any, key: Key, trees: Any) -> Any:
        return fn(*given["args"]), functools.partial(_per_member, trees)

    @functools.wraps(fn)
    def vmapped(*args: Any) -> Any:
        return _map_members(of_member, {"args": args}, in_axes, axis_size, axis_name, lambda path, box: box.mapped)
    return vmapped

def _call_members(call: _Call, state: StateTree, in_axes: Any, axis_size: Any, axis_name: Hashable,
                  state_to_exclude: Filter = None, state_tag: Tag = None) -> tuple[Outputs, StateTree]:
    """Run a planned call once per member, with a key of its own."""
    _check_tree(state)
    excluded = _predicate(state_to_exclude)
    of_first = set()  # new states that are excluded: all members have the first one's
    output_paths: Any = []

    def of_member(given: Any, key: Key, trees: Any) -> Any:
        own_call = call._replace(key=key, args=given["args"], per_member=True)
        outputs, before, after = _run_on_copy(own_call, _boxes_of(given["state"]))
        _, mapped = trees[-1]  # of `state`, which JAX sorts after `args`
        was_mapped = {id(box): path in mapped for path, box in before.items()}
        per_member = {path for path, box in after.items() if was_mapped.get(id(box), True)}
        for path in before.keys() - mapped.keys():
            keys = filter(_is_key, tree_util.tree_leaves(state[path]))
            if {*map(id, keys)} - {*map(id, _leaves(before[path]))}:
                warnings.warn(f"all members drew the same numbers from the key in {_place(path, before[path])}, which "
                              "they share; create it in init_state under a vmapped call, or pass key=")
        for path, box in after.items():
            if id(box) not in was_mapped:
                box.tag = state_tag if box.tag is None else box.tag
                if excluded(path, box):
                    of_first.add(path)
        arrays = []
        for path, output in outputs.items():
            node = _place(path, call.graph.things[path])
            leaves, _, structure = _flatten_arrays(output, lambda: (
                f"{call.fn_name!r} of {node} returned {type(output).__name__}, which cannot cross a vmapped call"))
            arrays.append(structure.unflatten(leaves))
            output_paths.append(path)
        new = _tree_of(after)
        # A tree that a method returns is per member as a whole.
        return (arrays, new), lambda tree: tree is not new or (lambda path, box: path in per_member)

    outputs, new = _map_members(of_member, {"args": call.args, "state": state}, in_axes, axis_size, axis_name,
                                lambda path, box: box.mapped and not excluded(path, box), call.key)
    outputs = tree_util.tree_map(_as_array, outputs)  # such as an argument that came back
    first, new = partition(new, lambda path, box: path in of_first)
    return dict(zip(output_paths, outputs)), new | member(first, 0)

def vmap_apply(module: Module, state: StateTree, *args: Any, in_axes: Any = 0, axis_size: int | None = None,
               axis_name: Hashable = None, method: str = "__call__", key: Key = None,
               **kwargs: Any) -> tuple[Any, StateTree]:
    """Call one method of a module once per member: ``(outputs, state)``, with a new tree.

    Positional arguments are mapped by ``in_axes``, as in `jax.vmap`; keywords are shared; member ``i`` gets
    ``jax.random.split(key, axis_size)[i]`` as ``key=``. Outputs and errors are those of `vmap_call_all`.

    >>> class Square(Module):
    ...     def update(self, x): return x ** 2
    >>> vmap_apply(Square(), StateTree({}), jnp.arange(3))[0]
    Array([0, 1, 4], dtype=int32)
    """
    call = _plan(module, method, args, kwargs, key, of_root=True)
    outputs, state = _call_members(call, state, in_axes, axis_size, axis_name)
    return outputs.get(()), state

def vmap_call_all(module: Any, state: StateTree, fn_name: str, args: Any = (), kwargs: Kwargs = None, *,
                  axis_size: int | None = None, axis_name: Hashable = None, in_axes: Any = None,
                  node_to_exclude: Filter = None, state_to_exclude: Filter = None, state_tag: Tag = None,
                  fn_if_not_exist: str = "raise", key: Key = None) -> tuple[Outputs, StateTree]:
    """Call a method on every node, once per member: ``(outputs, state)``, with a new tree.

    A method sees the mapped states of one member; all members share the others, and those that match
    ``state_to_exclude``. A state that the call creates gains an axis of ``axis_size``, by default that of the mapped
    states or arguments, and the tag ``state_tag`` if it has none (if it is excluded, all share the first member's).
    ``in_axes`` maps ``args``, by default shared; ``axis_name`` is for `jax.lax.pmean` and the like. Member ``i`` gets
    ``jax.random.split(key, axis_size)[i]``. Outputs are ``(axis_size, *shape)``. Raises what `call_all` and `vmap`
    raise; `TypeError` for outputs that are no arrays; `ValueError` if a state gets more or fewer axes.

    >>> class Die(Module):
    ...     def roll(self, key): return jax.random.randint(key, (2,), 1, 7)
    >>> vmap_call_all(Die(), StateTree({}), 'roll', axis_size=5, key=jax.random.key(0))[0][()].shape
    (5, 2)
    """
    call = _plan(module, fn_name, args, kwargs, key, node_to_exclude, fn_if_not_exist)
    return _call_members(call, state, in_axes, axis_size, axis_name, state_to_exclude, state_tag)

def vmap_init(module: Any, *args: Any, axis_size: int | None = None, axis_name: Hashable = None,
              in_axes: Any = None, node_to_exclude: Filter = None, state_to_exclude: Filter = None,
              state_tag: Tag = None, key: Key = None, **kwargs: Any) -> StateTree:
    """`init` per member: what ``init_state`` creates is ``(axis_size, *shape)``; warns if no state is mapped.

    >>> class Cell(Module):
    ...     def init_state(self): self.h = HiddenState(jnp.zeros(3))
    >>> vmap_init(Cell(), axis_size=4)['h'].shape
    (4, 3)
    """
    call = _plan(module, "init_state", args, kwargs, key, node_to_exclude)
    _, state = _call_members(call, snapshot(module), in_axes, axis_size, axis_name, state_to_exclude, state_tag)
    if not any(entry.mapped for entry in state._layout.entries):
        warnings.warn("no state is mapped, so all members are one; create states in init_state, or build members "
                      "by vmap(lambda key: init(Model(key), key=key))(jax.random.split(key, axis_size))")
    return state

def vmap_reset(module: Any, state: StateTree, *args: Any, axis_size: int | None = None,
               axis_name: Hashable = None, in_axes: Any = None, node_to_exclude: Filter = None,
               state_to_exclude: Filter = None, state_tag: Tag = None, key: Key = None,
               **kwargs: Any) -> StateTree:
    """`reset` of every member, each of which sees the shapes of a single model.

    >>> class Cell(Module):
    ...     def reset_state(self): self.h.value = jnp.zeros(3)
    >>> vmap_reset(Cell(), stack(StateTree({'h': HiddenState(jnp.ones(3))})))['h'].shape
    (1, 3)
    """
    call = _plan(module, "reset_state", args, kwargs, key, node_to_exclude)
    return _call_members(call, state, in_axes, axis_size, axis_name, state_to_exclude, state_tag)[1]

def stack(*states: StateTree) -> StateTree:
    """One ensemble, of leaves ``(len(states), *shape)``; `ValueError` if more than values differ.

    >>> stack(*[StateTree({'h': HiddenState(jnp.zeros(3))})] * 2)['h'].shape
    (2, 3)
    """
    _check_alike(*states)
    ensemble = tree_util.tree_map(lambda *leaves: jnp.stack([*map(_as_array, leaves)]), *states)
    return _shift_mapped(ensemble, 1)  # type: ignore[no-any-return]

def member(state: StateTree, i: Any) -> StateTree:
    """Member ``i`` of an ensemble as a single tree; of a vector of integers, the ensemble of those.

    Shared states are kept. `IndexError` if ``i`` is out of range; a JAX array is clamped, as JAX does it.

    >>> ensemble = stack(*[StateTree({'h': HiddenState(float(i))}) for i in range(3)])
    >>> member(ensemble, -1)['h'].item(), member(ensemble, [2, 0, 2])['h'].tolist()
    (2.0, [2.0, 0.0, 2.0])
    """
    index = i if isinstance(i, jax.Array) else np.asarray(i)
    if index.ndim > 1 or not jnp.issubdtype(index.dtype, np.integer):
        raise TypeError(f"members are chosen by an integer or a vector of these; got {_described(i)}")
    mapped, shared = partition(state, lambda path, box: box.mapped)
    if isinstance(index, np.ndarray):
        for leaf in tree_util.tree_leaves(mapped):
            np.arange(len(leaf))[index]  # raises an IndexError, where JAX would take another member
    picked: StateTree = tree_util.tree_map(lambda leaf: leaf[index], mapped)
    if not index.ndim:
        picked = _shift_mapped(picked, -1)
    return picked | shared

# ---- Assigning -----------------------------------------------------------------------------------

class Assigned(NamedTuple):
    """What `assign` returns."""
    state: StateTree
    unexpected: list[Path]  # paths of leaves that the tree does not have
    missing: list[Path]  # paths of leaves of the tree that no snapshot has

def _flatten_given(given: Any, path: Path = ()) -> Iterator[Any]:
    """The values in nested mappings and boxes, with their paths: arrays, or pytrees of arrays."""
    _refuse_other_copy(given)
    if isinstance(given, State):
        given = given.value
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield from _flatten_given(value, path + _as_path(key))
    else:
        yield path, given

_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)  # each can be cast to later ones

def _kind_index(dtype: Any) -> int:
    """Where a dtype stands in `_KINDS`; behind them all if it is none of numbers."""
    is_time = jnp.issubdtype(dtype, np.timedelta64)  # which NumPy counts among the integers
    return [*(jnp.issubdtype(dtype, kind) and not is_time for kind in _KINDS), True].index(True)

def _holds(dtype: Any, array: Any) -> bool:
    """Whether a dtype is of no lesser kind than an array, and holds all its numbers."""
    source = _kind_index(array.dtype)  # 1 is that of integers
    target = _kind_index(dtype)
    if source > target or target == len(_KINDS):
        return False
    if isinstance(array, jax.Array):  # may be traced, so that the limits of its dtype decide
        if source != 1:
            return True
        limits = jnp.iinfo(array.dtype)  # type: ignore[no-untyped-call]
        array = np.array([limits.min, limits.max])
    if target == 1:
        edges = [array.min(), array.max()] if array.size else []
        return all(int(edge) == int(edge.astype(dtype)) for edge in edges)
    with np.errstate(all="ignore"):
        return np.array_equal(np.isfinite(array), np.isfinite(array.astype(dtype)))

def _fitted(new: Any, old: Any) -> Any:
    """A given leaf with the shape and dtype of the one it replaces; None if it does not fit."""
    if _is_key(old) and not _is_key(new):
        data = _fitted(new, jax.random.key_data(old))
        return None if data is None else jax.random.wrap_key_data(data, impl=jax.random.key_impl(old))
    if isinstance(new, np.ma.MaskedArray):
        return None
    if not isinstance(new, jax.Array):
        new = np.array(new)
        if new.dtype == f"V{old.dtype.itemsize}" and old.dtype.isbuiltin != 1:
            new = new.view(old.dtype)  # what npz makes of bfloat16, which it has no name for
    if new.shape != old.shape or (new.dtype != old.dtype and not _holds(old.dtype, new)):
        return None
    if new.dtype == old.dtype and not getattr(new, "weak_type", False):
        return new
    return new.astype(old.dtype)

@functools.cache
def _concrete_types() -> Any:
    """The classes of arrays and keys that are not traced."""
    with jax.ensure_compile_time_eval():
        return type(jnp.zeros(())), type(jax.random.key(0))

def _sharding(new: Any, old: Any) -> Any:
    """Where a leaf goes that replaces another: where that lies, unless it is free to go anywhere."""
    arrays = _concrete_types()  # a tracer would describe its whole trace, only to say that it has no sharding
    if isinstance(old, arrays) and isinstance(new, (np.ndarray, *arrays)) and old.committed:
        return old.sharding
    return None

def assign(state: StateTree, *snapshots: Mapping[Any, Any]) -> Assigned:
    """Write values into a tree by name: a named tuple ``(state, unexpected, missing)``.

    A snapshot is a mapping, such as a state tree, from paths or dotted names to values, leaves or nested dicts: all
    reach the leaf of that dotted name. Later ones win. Each leaf keeps its dtype, shape and sharding. ``unexpected``
    has paths of leaves that the tree lacks, ``missing`` those that were not given. One `ValueError` lists every leaf
    of another shape, of a kind or number that the dtype cannot hold (float into int, 200 into int8), or that is no
    array.

    >>> tree = StateTree({'W': ParamState({'bias': 0., 'weight': 1.})})
    >>> tree, unexpected, missing = assign(tree, {'W.bias': np.float64(2), 'V': np.ones(2)})
    >>> tree['W']['bias'].item(), unexpected, missing
    (2.0, [('V',)], [('W', 'weight')])
    """
    _check_tree(state)
    old = dict(zip(state._layout.leaf_names, map(_as_array, state._leaves)))
    own = {_dotted(path): _flatten(value) for path, value in _flatten_given(state)}
    new: Any = {}
    unexpected = set()
    faults = {}
    for given in snapshots:
        if not isinstance(given, Mapping):
            raise TypeError(f"a snapshot is a mapping; got {type(given).__name__}")
        for path, value in _flatten_given(given):
            name = _dotted(path)
            leaves, leaf_paths, structure = _flatten(value)
            if value is None and name in old:  # which is no leaf to JAX
                new[name] = None
            for leaf, leaf_path in zip(leaves, leaf_paths):
                if _dotted(path + leaf_path) in old:
                    new[_dotted(path + leaf_path)] = leaf
                else:
                    unexpected.add(path + leaf_path)
            _, own_paths, own_structure = own.get(name, [None] * 3)
            if leaf_paths == own_paths and structure != own_structure:  # another class, or unit
                faults[name] = f"expected {own_structure}, got {structure}"
    fitted = {name: _fitted(leaf, old[name]) for name, leaf in new.items()}
    for name, leaf in new.items():
        if fitted[name] is None:
            expected = old[name] if _is_key(leaf) else _key_data(old[name])  # both as keys, or as data
            faults[name] = f"expected {_described(expected)}, got {_described(leaf)}"
    if faults:
        lines = [f"\n  {name!r} {faults[name]}" for name in sorted(faults)]
        raise ValueError(f"nothing was assigned, since these values do not fit:{''.join(lines)}")
    shardings = [_sharding(fitted[name], old[name]) for name in fitted]
    placed = jax.device_put([*fitted.values()], shardings)  # NumPy's go straight to their shards
    old.update(zip(fitted, placed))
    missing = [path for path in state._layout.leaf_paths if _dotted(path) not in new]
    return Assigned(_tree_of_leaves(state._layout, old.values()), sorted(unexpected, key=_sort_key),
                    sorted(missing, key=_sort_key))

# ---- Calls in place ------------------------------------------------------------------------------

def call_all_fns(target: T, fn_name: str, args: Any = (), kwargs: Kwargs = None, node_to_exclude: Filter = None,
                 fn_if_not_exist: str = "raise", *, key: Key = None) -> T:
    """`call_all` in place: the methods run on the modules themselves. Returns the target.

    >>> call_all_fns([Module(), Module()], 'init_state')
    [Module, Module]
    """
    call = _plan(target, fn_name, args, kwargs, key, node_to_exclude, fn_if_not_exist)
    _all_or_nothing(call.graph, lambda: _run(call))
    return target

def vmap_call_all_fns(target: T, fn_name: str, args: Any = (), kwargs: Kwargs = None,
                      axis_size: int | None = None, node_to_exclude: Filter = None, state_tag: Tag = None,
                      fn_if_not_exist: str = "raise", **options: Any) -> T:
    """`vmap_call_all` in place, with its other keywords, too. Returns the target.

    >>> vmap_call_all_fns([Module()], 'reset_state', axis_size=4)
    [Module]
    """
    _, state = vmap_call_all(
        target, snapshot(target), fn_name, args, kwargs, axis_size=axis_size, node_to_exclude=node_to_exclude,
        state_tag=state_tag, fn_if_not_exist=fn_if_not_exist, **options)
    return restore(target, state)

def init_all_states(target: T, *args: Any, node_to_exclude: Filter = None, key: Key = None, **kwargs: Any) -> T:
    """`init` in place. Returns the target.

    >>> class Cell(Module):
    ...     def init_state(self, size): self.h = HiddenState(jnp.zeros(size))
    >>> init_all_states(Cell(), 3).h
    HiddenState(float32[3])
    """
    return call_all_fns(target, "init_state", args, kwargs, node_to_exclude, key=key)

def reset_all_states(target: T, *args: Any, node_to_exclude: Filter = None, key: Key = None, **kwargs: Any) -> T:
    """`reset` in place. Returns the target.

    >>> reset_all_states({'encoder': Module()})
    {'encoder': Module}
    """
    return call_all_fns(target, "reset_state", args, kwargs, node_to_exclude, key=key)

def vmap_init_all_states(target: T, *args: Any, **options: Any) -> T:
    """`vmap_init` in place, with the same keywords. Returns the target.

    >>> class Cell(Module):
    ...     def init_state(self): self.h = HiddenState(jnp.zeros(3))
    >>> vmap_init_all_states(Cell(), axis_size=4).h
    HiddenState(float32[4,3], mapped=1)
    """
    return restore(target, vmap_init(target, *args, **options))

def vmap_reset_all_states(target: T, *args: Any, **options: Any) -> T:
    """`vmap_reset` in place, with the same keywords. Returns the target.

    >>> vmap_reset_all_states([Module()], axis_size=4)
    [Module]
    """
    return restore(target, vmap_reset(target, snapshot(target), *args, **options))

def assign_state_values(target: Any, *state_by_abs_path: Mapping[Any, Any]) -> tuple[list[Path], list[Path]]:
    """`assign` in place: ``(unexpected, missing)``.

    >>> assign_state_values(Module(), {'v': np.ones(2)})
    ([('v',)], [])
    """
    state, unexpected, missing = assign(snapshot(target), *state_by_abs_path)
    restore(target, state)
    return unexpected, missing

# ---- The demonstration: python -m collective -----------------------------------------------------

def _demonstrate() -> bool:
    """Run the example of this file as a person would type it, and compare; True if a result differs."""
    import doctest
    text = ">>> " + str(__doc__).partition("\n>>> ")[2]
    print(text)
    example = doctest.DocTestParser().get_doctest(text, dict(globals()), "collective", None, None)
    failed, attempted = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    print(f"{attempted - failed} of {attempted} examples hold with jax {jax.__version__} on "
          f"{jax.devices()[0].device_kind}.")
    return failed > 0

if __name__ == "__main__":
    raise SystemExit(_demonstrate())
