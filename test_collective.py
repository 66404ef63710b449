# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the collective-states authors
"""The suite of collective.py: put the two files side by side and run `python -m pytest`.

    python -m pytest                                quick: half a minute at most, 250 compilations
    COLLECTIVE_SLOW=1 python -m pytest              also depth, threads, devices, processes, README
    COLLECTIVE_BENCH=1 python -m pytest -s -k bench prints what things cost, as ratios

The tables of named cases are the shortest way to learn the rules. To stay quick, tests use one shape, `float32[3]`,
three members, and NumPy constants, which compile nothing.
"""

import os
import sys

if "jax" not in sys.modules and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags  # before jax starts, for the tests of sharding

import ast
import collections
import contextlib
import copy
import dataclasses
import doctest
import functools
import gc
import importlib.util
import inspect
import pickle
import random
import re
import subprocess
import threading
import time
import warnings
import weakref
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import collective as co
from collective import HiddenState, LongTermState, Module, ParamState, ShortTermState, State, StateTree
from collective import apply, assign, call_all, call_all_fns, call_order, flat_dict, init, init_all_states
from collective import member, partition, reset, reset_all_states, restore, snapshot, stack, subtree, traverse
from collective import vmap_apply, vmap_call_all, vmap_call_all_fns, vmap_init, vmap_init_all_states
from collective import vmap_reset, vmap_reset_all_states

HERE = Path(co.__file__).parent
SLOW = os.environ.get("COLLECTIVE_SLOW")
BENCH = os.environ.get("COLLECTIVE_BENCH")
slow = pytest.mark.skipif(not SLOW, reason="runs with COLLECTIVE_SLOW=1")
bench = pytest.mark.skipif(not BENCH, reason="runs with COLLECTIVE_BENCH=1")
many_devices = pytest.mark.skipif("len(jax.devices()) < 8", reason="needs eight devices")

COMPILED = []  # one entry for each computation that XLA compiled since this file began

def count_compilation(event, seconds, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(seconds)

jax.monitoring.register_event_duration_secs_listener(count_compilation)

@pytest.fixture(scope="module", autouse=True)
def compiled_by_this_file():
    """The last test of the file reads it: what other files compiled does not count."""
    COMPILED.clear()

def cases(names, table):
    """One test for each row of a table, under the row's name."""
    return pytest.mark.parametrize(names, table.values(), ids=table)

def each(name, *values):
    """One test for each of these values."""
    return pytest.mark.parametrize(name, values, ids=lambda value: getattr(value, "__name__", repr(value)))

# ---- The models ----------------------------------------------------------------------------------

ZEROS, ONES, STEPS = np.zeros(3, np.float32), np.ones(3, np.float32), np.arange(3, dtype=np.float32)
ROWS = np.arange(9, dtype=np.float32).reshape(3, 3)  # one argument for each of three members
for constant in (ZEROS, ONES, STEPS, ROWS):
    constant.setflags(write=False)  # so that no test can change another's

@functools.cache
def a_key(number=0):
    """A key, made when it is asked for: nothing is computed while pytest collects."""
    with jax.ensure_compile_time_eval():  # under a trace, too
        return jax.random.key(number)

class Recurrent(Module):
    """A bias that all members share; a weight and a hidden state for each of them."""
    def __init__(self):
        self.bias = ParamState({"b": ONES, "scale": np.float32(2)})

    def init_state(self, *, key):
        self.weight = ParamState(jax.random.uniform(key, (3,)))
        self.h = HiddenState(ZEROS)

    def reset_state(self):
        self.h.value = ZEROS

    def update(self, x):
        self.h.value = self.h.value * self.weight.value + x
        return self.h.value + self.bias.value["b"]

class Spiking(Module):
    """Draws its potential at every reset; keeps traces in a list that `init_state` makes."""
    def __init__(self):
        self.threshold = LongTermState(np.float32(1), tag="constant")
        self.traces = None

    def init_state(self, *, key):
        self.V = HiddenState(jax.random.uniform(key, (3,)))
        self.traces = [ShortTermState(ZEROS), ShortTermState(ZEROS)]
        self.count = ShortTermState(0)

    def reset_state(self, *, key):
        self.V.value = jax.random.uniform(key, (3,))
        for trace in self.traces:
            trace.value = ZEROS
        self.count.value = 0

    def update(self, x):
        spikes = self.V.value > self.threshold.value
        self.V.value = self.V.value + x - spikes
        for trace in self.traces:
            trace.value = trace.value + spikes
        self.count.value += 1
        return spikes

class Linear(Module):
    def __init__(self, weight=STEPS):
        self.weight = ParamState(weight)

    def update(self, x):
        return x * self.weight.value

class SharedWeights(Module):
    """One child under two names, one state under two, and a child that knows its parent."""
    def __init__(self):
        self.first = self.second = Linear()
        self.tied = Linear()
        self.tied.weight = self.first.weight
        self.tied.parent = self

    def init_state(self, *, key):
        self.h = HiddenState(jax.random.uniform(key, (3,)))

    def reset_state(self):
        self.h.value = ZEROS

    def update(self, x):
        self.h.value = self.h.value + self.second(x)
        return self.tied(self.h.value)

Pair = collections.namedtuple("Pair", "left right")

class Mixed(Module):
    """States and modules in every kind of container, under strings and numbers."""
    def __init__(self):
        self.table = {10: State(ONES), 9: State(ZEROS), "b": [State(STEPS)]}
        self.nest = ([Linear(), {"deep": (Linear(ONES), "text")}], 3.5)
        self.pair = Pair(State(ZEROS), None)
        self.ordered = OrderedDict(z=State(ONES), a=None)
        self.lists = defaultdict(list, k=[State(ONES)])

    def init_state(self, *, key):
        self.ordered["a"] = HiddenState(jax.random.uniform(key, (3,)))
        self.lists["new"].append(HiddenState(ZEROS))

    def reset_state(self):
        self.ordered["a"].value = ZEROS

    def update(self, x):
        hidden = self.ordered["a"]
        hidden.value = hidden.value + x
        return self.nest[0][0](hidden.value) + self.table["b"][0].value

class Keeper(Module):
    """Keeps what it is given, in a new state or in the one that it has."""
    def init_state(self, given):
        self.h = HiddenState({"deep": [given]})

    def update(self, given):
        self.h.value = given

    def replace(self, h):
        self.h = h

def keeper(value=ONES):
    model = Keeper()
    model.h = State(value)
    return model

MODELS = {"recurrent": Recurrent, "spiking": Spiking, "shared": SharedWeights, "mixed": Mixed}
every_model = cases("make", MODELS)

# the same call of one method on all nodes, in four forms: `form(model, name, *args, **options)`
FORMS = {
    "call_all": lambda m, *args, **options: call_all(m, snapshot(m), *args, **options),
    "call_all_fns": call_all_fns,
    "vmap_call_all": lambda m, *args, **options: vmap_call_all(m, snapshot(m), *args, axis_size=3, **options),
    "vmap_call_all_fns": partial(vmap_call_all_fns, axis_size=3),
}
every_form = cases("form", FORMS)

class Node(Module):
    """A node of a random graph: it counts, draws and creates."""
    def init_state(self, *, key):
        if self.creates:
            self.fresh = HiddenState(jax.random.uniform(key, (3,)))

    def reset_state(self, *, key):
        if self.creates:
            self.fresh.value = jax.random.uniform(key, (3,))

    def update(self):
        mine = [part for part in vars(self).values() if isinstance(part, State)]
        for state in mine:
            state.value = state.value * 2 + 1
        return [state.value for state in mine]

def random_graph(seed):
    """Nodes with shared children and states, cycles through `parent`, and nested containers."""
    rng = random.Random(seed)
    nodes = [Node() for _ in range(rng.randint(2, 7))]
    shared = [State(np.full(3, number, np.float32)) for number in range(3)]
    for index, node in enumerate(nodes):
        node.creates = rng.random() < 0.5
        for name in rng.sample("abcdef", rng.randint(0, 4)):
            own = State(np.full(3, rng.random(), np.float32))
            setattr(node, name, rng.choice([*shared, own, 3, None]))
        below = nodes[index + 1 :]
        for name in rng.sample("xyz", min(2, len(below))):
            child = rng.choice(below)
            child.parent = node
            holders = [child, [child], {3: child, "k": State(ONES)}, ([{"deep": (child,)}], 1)]
            setattr(node, name, rng.choice(holders))
    return nodes[0]

# ---- What the tests compare with -----------------------------------------------------------------

def on_host(leaf):
    """A leaf as NumPy, with keys as their data."""
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

def same(one, two, rtol=0.0):
    """Whether two pytrees have the same structure, shapes, dtypes and values."""
    alike = jax.tree.structure(one) == jax.tree.structure(two)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        left, right = on_host(left), on_host(right)
        alike &= left.shape == right.shape and left.dtype == right.dtype
        alike = alike and np.allclose(left, right, rtol=rtol, atol=rtol)
    return alike

WITH_PARTS = Module, State, list, tuple, dict

def parts_of(thing):
    """What a module, state or container holds, by attribute name, key or index."""
    if isinstance(thing, (list, tuple)):
        return dict(enumerate(thing))
    return thing if isinstance(thing, dict) else vars(thing)

def frozen(thing, seen=None):
    """A deep image of a model or a value, which later changes do not reach: compare two with ==."""
    seen = {} if seen is None else seen
    if isinstance(thing, (np.ndarray, jax.Array)):
        array = on_host(thing)
        return isinstance(thing, jax.Array), str(array.dtype), array.shape, array.tobytes()
    if not isinstance(thing, WITH_PARTS):
        return repr(thing)
    if id(thing) in seen:
        return "again", seen[id(thing)]
    seen[id(thing)] = len(seen)
    return type(thing), [(name, frozen(part, seen)) for name, part in parts_of(thing).items()]

def plain_walk(root):
    """Modules and states by first path, with recursion: the plainest reading of the contract."""
    modules, states, seen = [], {}, set()

    def visit(path, thing):
        if not isinstance(thing, WITH_PARTS) or id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, State):
            states[path] = thing
            return
        for name, part in parts_of(thing).items():
            visit((*path, name), part)
        if isinstance(thing, Module):
            modules.append((path, thing))

    visit((), root)
    return modules, states

def dotted(path):
    return ".".join(map(str, path))

def mapped_of(tree):
    return {dotted(path): box.mapped for path, box in tree.states().items()}

def mapped(box, count=1):
    """A box whose value already has leading axes, one entry for each member."""
    box.mapped = count
    return box

def tree_of(**boxes):
    """A tree of boxes; what is no box goes into a `State`."""
    wrap = lambda part: part if isinstance(part, (State, StateTree)) else State(part)
    return StateTree({name: wrap(part) for name, part in boxes.items()})

def host_slice(leaf, index):
    part = on_host(leaf)[index]
    return part if leaf.dtype == part.dtype else jax.random.wrap_key_data(part)

def single(tree, index):
    """One member's tree, sliced by NumPy."""
    boxes = tree.states()
    for box in boxes.values():
        if box.mapped:
            box.mapped -= 1
            box.value = jax.tree.map(lambda leaf: host_slice(leaf, index), box.value)
    return StateTree(boxes)

def loop(fn, tree, *args, size=3):
    """A vmapped call as it is meant: `fn(tree, *args)` for each member in turn, then everything stacked.

    Of the trees that `fn` returns, states that `tree` shares stay shared; all others have one value a member.
    """
    results = [fn(single(tree, i), *[arg[i] for arg in args]) for i in range(size)]
    shared = {path for path, box in tree.states().items() if not box.mapped}
    is_tree = lambda part: isinstance(part, StateTree)
    return jax.tree.map(lambda *parts: stacked(parts, shared), *results, is_leaf=is_tree)

def stacked(parts, shared=()):
    """Arrays, or trees, of several members in one, by NumPy."""
    if not isinstance(parts[0], StateTree):
        arrays = np.stack([on_host(part) for part in parts])
        return arrays if hasattr(parts[0].dtype, "kind") else jax.random.wrap_key_data(arrays)
    boxes = [part.states() for part in parts]
    for path, box in boxes[0].items():
        values = [each[path].value for each in boxes]
        if path in shared:
            assert all(same(value, box.value) for value in values), f"members differ in {path}"
        else:
            box.value = jax.tree.map(lambda *leaves: stacked(leaves), *values)
            box.mapped += 1
    return StateTree(boxes[0])

@contextlib.contextmanager
def raises(error, *words):
    """`pytest.raises`, where the message has all these words in it, as they stand."""
    with pytest.raises(error) as info:
        yield info
    for word in words:
        assert word in str(info.value), f"{word!r} is not in {info.value}"

# ---- States and filters --------------------------------------------------------------------------

@each("tag", 1, True, b"t", ("a", 1))
def test_a_tag_is_a_string(tag):
    assert HiddenState(ONES, tag="slow").tag == "slow"
    with raises(TypeError, "tag"):
        HiddenState(ONES, tag=tag)

def test_a_kind_may_forget_to_call_super():
    class Decaying(HiddenState):
        def __init__(self, decay):
            self.value = ONES
            self.decay = decay

    model = Module()
    model.h = Decaying(0.5)
    box = init(model).states()["h",]
    assert type(box) is Decaying
    assert model.h.tag is box.tag is None
    assert model.h.mapped == box.mapped == 0

@each("base", Module, HiddenState)
def test_slots_are_refused_where_the_class_is_defined(base):
    slots = {"__slots__": ("extra",)}
    with raises(TypeError, "Slotted", "__slots__"):
        type("Slotted", (base,), slots)
    with raises(TypeError, "Slotted", "__slots__"):
        type("Slotted", (base, type("MixIn", (), slots)), {})

FILTERS = {
    "a type": (ParamState, "w"),
    "a base": (LongTermState, "w"),
    "a tag": ("slow", "s"),
    "a callable": (lambda path, box: path == ("h",) and box.tag is None, "h"),
    "all": (..., "hsw"),
    "True": (True, "hsw"),
    "None": (None, ""),
    "False": (False, ""),
    "any of these": ([ParamState, (None, ["slow"])], "sw"),
}

@cases("filter, passing", FILTERS)
def test_a_filter_lets_pass(filter, passing):
    model = Module()
    model.w = ParamState(ONES)
    model.h = HiddenState(ZEROS)
    model.s = State(ONES, tag="slow")
    matching, rest = partition(snapshot(model), filter)
    assert "".join(map(dotted, matching)) == passing
    assert {*model.states(filter)} == {*matching}
    assert same(matching | rest, snapshot(model))

@each("bad", 3, {"a"}, Module(), [ParamState, 3])
def test_anything_else_is_no_filter(bad):
    with raises(TypeError, "filter"):
        partition(StateTree({}), bad)
    with raises(TypeError, "filter"):
        Module().nodes(bad)
    with raises(TypeError, "filter"):
        init(Module(), node_to_exclude=bad)
    with raises(TypeError, "filter"):
        vmap_init(Module(), axis_size=3, state_to_exclude=bad)

def test_a_filter_of_nodes_sees_the_modules_themselves_and_spares_their_children():
    outer = Recurrent()
    outer.inner = Recurrent()
    outer.tag = "top"
    assert list(outer.nodes("top")) == [()]
    tree = init(outer, key=a_key(), node_to_exclude=lambda path, node: node is outer)
    assert [*map(dotted, tree)] == ["bias", "inner.bias", "inner.h", "inner.weight"]

def test_a_predicate_that_changes_what_it_is_shown_changes_nothing():
    def spoil(path, box):
        box.value["w"] = box.tag = "spoilt"

    tree = tree_of(a={"w": ONES})
    before = frozen(tree.states())
    _, rest = partition(tree, spoil)
    assert frozen(tree.states()) == frozen(rest.states()) == before

# ---- Modules and the walk ------------------------------------------------------------------------

GRAPHS = MODELS | {f"graph {i}": partial(random_graph, i) for i in range(40)}
every_graph = cases("make", GRAPHS)

def walk(model):
    return list(traverse(model))

@every_graph
def test_the_walk_is_that_of_a_plain_recursion(make):
    model = init_all_states(make(), key=a_key())
    modules, states = plain_walk(model)
    assert walk(model) == list(model.nodes().items()) == modules
    assert model.states() == states
    assert {*snapshot(model)} == {*states}

def test_children_come_before_their_parents_and_attributes_in_definition_order():
    model = Module()
    model.b = Pair(Linear(), [Linear()])
    model.a = {"k.l": Linear(), -1: Linear()}
    assert [*map(dotted, model.nodes())] == ["b.0", "b.1.0", "a.k.l", "a.-1", ""]
    assert next(traverse([model])) == ((0, "b", 0), model.b.left)

@each("bad", 3, None, "text", Module, {1}, State(1), [3], {"a": State(1)})
def test_anything_but_modules_is_no_target(bad):
    for use in (walk, snapshot, init_all_states, init):
        with raises(TypeError, "module"):
            use(bad)
    for use in (apply, reset, restore):
        with raises(TypeError, "module"):
            use(bad, StateTree({}))

Word = type("Word", (str,), {})

@each("key", True, 1.0, None, b"k", ("a", 1), np.int64(1), Word("w"))
def test_any_other_key_leads_to_no_state_and_to_no_module(key):
    model = Module()
    for part in (State(ONES), {"deep": [Linear()]}):
        model.table = {"x": {key: part}}
        for use in (snapshot, init_all_states, walk):
            with raises(TypeError, repr(key), "table", "x"):
                use(model)
    model.table = {key: [1, {key: ONES}]}
    assert len(init(model)) == 0

@each("base", list, tuple, dict, collections.Counter)
def test_another_subclass_of_a_container_is_shared_and_may_hold_no_module_and_no_state(base):
    own = type("Own", (base,), {})
    hold = lambda part: own({"k": part} if issubclass(base, dict) else [part])
    model = Keeper()
    model.parts = [hold(3)]
    model.record = type("Record", (), {"_fields": ["h"], "h": State(ONES)})()  # no named tuple
    parts, _ = apply(model, StateTree({}), "parts", method="__getattribute__")
    assert parts[0] is model.parts[0]
    for part in (State(ONES), [Linear()]):
        model.parts = [hold(part)]
        for use in (snapshot, init_all_states, walk):
            with raises(TypeError, "parts.0"):
                use(model)

def test_the_repr_of_a_module_has_a_line_for_each_part_below_its_owner():
    model = Module()
    child = Linear()
    model.table = {7: State(np.ones(2, np.int8)), "k": [child]}
    child.parent = model
    child.hidden = mapped(HiddenState(ROWS))
    ends = """Module
        7: State(int8[2])
        0: Linear
        hidden: HiddenState(float32[3,3], mapped=1)
        weight: ParamState(float32[3])"""
    lines = repr(model).splitlines()
    for line, end in zip(lines, ends.splitlines(), strict=True):
        assert line.endswith(end.strip())  # the name before may be whole or relative
    indents = [len(line) - len(line.lstrip()) for line in lines]
    assert indents[0] < indents[2] < indents[3] == indents[4]

def test_the_repr_of_a_module_never_raises():
    model = Module()
    model.bare = HiddenState.__new__(HiddenState)
    model.odd, model.none = State(object()), State(None)
    model.loop = [model]
    model.loop.append(model.loop)
    assert all(part in repr(model) for part in ("bare: HiddenState(", "odd: State(", "none: State(NoneType)"))
    model.table = {2.5: State(ONES)}
    assert repr(model).startswith("Module")

def test_modules_mix_into_dataclasses_and_need_not_compare_hash_or_count():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Odd(Module):
        h: State
        below: Any = None
        __eq__ = __hash__ = __bool__ = __len__ = None  # each of them raises

    model = Odd(State(ONES), [Odd(State(ONES))])
    tree = reset(model, snapshot(model))
    assert list(tree) == [("below", 0, "h"), ("h",)]
    assert same(snapshot(reset_all_states(model)), tree)

def test_an_array_does_not_take_the_place_of_a_state():
    model = keeper()
    before = frozen(model)
    words = "'h' is a State; write self.h.value ="
    for value in (ONES, jnp.asarray(ONES), 1.0, {"w": ONES}):
        with raises(TypeError, words):
            model.h = value
    for form in FORMS.values():
        with raises(TypeError, words):
            form(model, "replace", ONES)
    with raises(TypeError, words):
        jax.eval_shape(model.replace, ONES)
    assert frozen(model) == before

@pytest.fixture(scope="module")
def another_copy(tmp_path_factory):
    """The file once more, as a second package may have vendored it."""
    path = tmp_path_factory.mktemp("vendored") / "collective.py"
    path.write_text(Path(co.__file__).read_text())
    spec = importlib.util.spec_from_file_location("vendored", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@each("kind", "Module", "HiddenState")
def test_modules_and_states_of_another_copy_of_the_file_are_refused(kind, another_copy):
    foreign = getattr(another_copy, kind)
    model = Module()
    model.deep = {"k": (foreign.__new__(foreign),)}
    for use in (snapshot, init, walk, init_all_states):
        with raises(TypeError, kind, co.__file__, another_copy.__file__):
            use(model)

TREE_USES = {
    "partition": partial(partition, filter=...),
    "flat_dict": flat_dict,
    "where": partial(co.where, True, StateTree({})),
    "stack": stack,
    "|": StateTree({}).__or__,
    "restore": partial(restore, Module()),
    "apply": partial(apply, Module()),
    "vmap_reset": partial(vmap_reset, Module(), axis_size=3),
    "assign": assign,
}
MORE_USES = {
    "StateTree": lambda tree: StateTree({"a": tree}),
    "assign from it": partial(assign, StateTree({})),
    "vmap": lambda tree: co.vmap(lambda x, trees: x)(ROWS, [{"k": tree}]),
}

@cases("use", TREE_USES | MORE_USES)
def test_a_tree_of_another_copy_of_the_file_is_refused_by(use, another_copy):
    with raises(TypeError, "StateTree", co.__file__, another_copy.__file__):
        use(another_copy.StateTree({"w": another_copy.State(ROWS)}))

@cases("use", TREE_USES)
def test_a_mapping_is_no_tree_for(use):
    with raises(TypeError, "StateTree"):
        use({"w": ONES})

def chain(length):
    """Modules, each of which holds the next."""
    top = keeper()
    for _ in range(length - 1):
        below, top = top, keeper()
        top.next = below
    return top

MANY_MODULES = {
    "nested": lambda: chain(3000),
    "siblings": lambda: [keeper() for _ in range(20_000)],
}

@slow
@cases("make", MANY_MODULES)
def test_many_modules_are_nothing_special_at_the_default_recursion_limit(make):
    assert sys.getrecursionlimit() <= 3000
    model = make()
    _, tree = call_all(model, snapshot(model), "update", ZEROS)
    assert len(tree) == len(walk(model)) >= 3000
    assert not np.any([*tree.values()])
    restore(model, tree)
    assert all(node.h.value is tree[path + ("h",)] for path, node in walk(model))

# ---- State trees ---------------------------------------------------------------------------------

def test_paths_come_in_canonical_order_numbers_before_strings():
    names = ["b", "a.10.x", "a.9.x", "a.b"]
    for order in (names, names[::-1]):
        tree = StateTree({name: State(ONES) for name in order})
        assert list(tree) == [("a", 9, "x"), ("a", 10, "x"), ("a", "b"), ("b",)]

WAYS_BACK = {
    "boxes": lambda tree: StateTree(tree.states()),
    "a graft": lambda tree: subtree(StateTree({"x.y": tree}), ("x", "y")),
    "two parts": lambda tree: StateTree.__or__(*partition(tree, HiddenState)),
    "tree.map": partial(jax.tree.map, lambda leaf: leaf),
    "a pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
    "a deep copy": copy.deepcopy,
}

@cases("way", WAYS_BACK)
@every_model
def test_a_tree_comes_back_whole_from(make, way):
    tree = init(make(), key=a_key())
    tree = tree | tree_of(more=mapped(State({"v": ROWS}, tag="t")))
    assert same(way(tree), tree)

def test_a_treedef_equals_its_copies():
    treedef = jax.tree.structure(tree_of(h=mapped(HiddenState({"v": ROWS}, tag="t"))))
    for twin in (copy.deepcopy(treedef), pickle.loads(pickle.dumps(treedef))):
        assert twin == treedef
        assert hash(twin) == hash(treedef)

def test_a_look_up_takes_paths_and_dotted_names():
    tree = StateTree({"layers.0.w": State(ONES), "a.01": State(ZEROS)})
    assert list(tree) == [("a", "01"), ("layers", 0, "w")]
    for path in tree:
        assert path in tree and dotted(path) in tree
        assert tree[path] is tree[dotted(path)]
    for path in ("layers.1.w", ("layers", 0), 3):
        assert path not in tree
        assert tree.get(path) is None

NOT_FOUND = {
    "a slip": (StateTree.__getitem__, "layers.0.wieght", "layers.0.weight"),
    "a slip in a path": (StateTree.__getitem__, ("layers", 0, "weigth"), "layers.0.weight"),
    "states below it": (StateTree.__getitem__, "layers.0", "subtree(tree, 'layers.0')"),
    "a subtree of nothing": (subtree, "layer", "layers.0.weight"),
    "a subtree of a state": (subtree, "out", "out"),
    "half of a key": (subtree, "k", "'k'"),
}

@cases("look_up, path, word", NOT_FOUND)
def test_a_look_up_that_fails_names_the_closest_paths(look_up, path, word):
    tree = StateTree({"layers.0.weight": State(1), "out": State(1), ("k.l", "w"): State(1)})
    with raises(KeyError, repr(dotted(path) if isinstance(path, tuple) else path), word):
        look_up(tree, path)

def clashing_model():
    model = Module()
    model.a = {"b": State(1)}
    setattr(model, "a.b", State(2))
    return model

BOX = partial(State, ONES)
CLASHES = {
    "paths": lambda: StateTree({("a", "b"): BOX(), ("a.b",): BOX()}),
    "spellings": lambda: StateTree({("a", "b"): BOX(), "a.b": BOX()}),
    "leaves": lambda: tree_of(a={"b": {"c": 1}, "b.c": 2}),
    "a leaf and a state": lambda: tree_of(a={"b": 1}) | StateTree({("a.b",): BOX()}),
    "a graft and a state": lambda: StateTree({"a": tree_of(b=1), ("a.b",): BOX()}),
    "parts of a model": lambda: snapshot(clashing_model()),
}

@cases("make", CLASHES)
def test_one_dotted_name_is_refused_for_two(make):
    with raises(ValueError, "('a', 'b", "rename"):
        make()

@each("name", 3, (), "", None, ("a", 1.0), (True, "w"))
def test_a_tree_has_no_other_names_than_paths(name):
    for part in (State(1), tree_of(h=1)):
        with raises(TypeError, repr(name)):
            StateTree({name: part})

@each("part", 1, ONES, {"h": State(1)}, Module())
def test_a_tree_is_made_of_boxes_and_trees(part):
    with raises(TypeError, "'a'"):
        StateTree({"a": part})

TOO_LARGE = np.iinfo(jax.dtypes.canonicalize_dtype(int)).max + 1
MASKED = np.ma.masked_array(ONES, ONES)

@each("value", "text", [ONES, "text"], State(ONES), np.array([None]), MASKED, TOO_LARGE)
def test_what_is_no_array_cannot_enter_a_tree(value):
    model = Module()
    model.child = Module()
    model.child.odd = HiddenState(value)
    for use in (snapshot, init):
        with raises(TypeError, "child.odd"):
            use(model)
    with raises(TypeError, "child.odd"):
        StateTree(model.states())

def test_python_numbers_become_strongly_typed():
    tree = tree_of(a=0.0, b=1, c=True, d={"e": 1j})
    _, after = apply(keeper(), snapshot(keeper()), 0.0)
    leaves = jax.tree.leaves((tree, after))
    assert [leaf.dtype.kind for leaf in leaves] == [*"fibcf"]
    assert not any(leaf.weak_type for leaf in leaves)

def test_trees_compare_and_hash_by_identity():
    one, two = tree_of(a=1), tree_of(a=1)
    assert one == one
    assert len({one, two}) == 2

def test_the_right_side_of_a_union_wins_but_cannot_change_mapped():
    union = tree_of(a=1, b=1) | tree_of(b=HiddenState(2, tag="t"), c=3)
    assert [*map(int, union.values())] == [1, 2, 3]
    box = union.states()["b",]
    assert type(box) is HiddenState and box.tag == "t"
    ensemble = tree_of(b=mapped(State(ROWS)))
    for left, right in ((union, ensemble), (ensemble, union)):
        with raises(ValueError, "'b'", "mapped"):
            left | right

def test_the_repr_of_a_tree_is_a_table_of_leaves_without_contents():
    value = {"b": ONES, "n": np.zeros(1222, np.int8)}
    tree = tree_of(h=mapped(HiddenState(ROWS)), w=ParamState(value))
    table = """
        h    HiddenState  float32[3,3]  1
        w.b  ParamState   float32[3]    0
        w.n  ParamState   int8[1222]    0
        3 leaves, 1,234 numbers, 1,270 bytes"""
    _, _, below = repr(tree).partition("\n")
    assert below.split() == table.split()
    assert repr(jax.eval_shape(lambda: tree)) == repr(tree)

def test_a_treedef_shows_kinds_tags_and_mapped_axes():
    slow = HiddenState(ONES, tag="slow")
    tree = tree_of(one=slow, two=mapped(ParamState(ROWS)))
    one, two = str(jax.tree.structure(tree)).split("two")
    for text, words in ((one, "one HiddenState slow mapped=0"), (two, "ParamState mapped=1")):
        assert all(word in text for word in words.split())

def test_boxes_and_values_taken_from_a_tree_are_fresh():
    tree = tree_of(h=mapped(HiddenState({"v": [ROWS]}, tag="t")))
    before = frozen(tree.states())
    box = tree.states()["h",]
    box.value["v"].append(1)
    box.tag = "other"
    box.mapped = 0
    tree["h"]["v"].append(2)
    assert frozen(tree.states()) == before

class HasArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array.copy() if copy else self.array

VALUES_IN = {
    "the constructor": lambda value: tree_of(h={"x": [value, (value,)]}),
    "snapshot": lambda value: snapshot(keeper({"x": [value]})),
    "init": partial(init, Keeper()),
    "apply": lambda value: apply(keeper(), tree_of(h=ONES), value)[1],
    "vmap_init": partial(vmap_init, Keeper(), axis_size=3),
    "assign": lambda value: assign(tree_of(h=ONES), {"h": value}).state,
}
TREES_IN = {  # trees whose leaves a `tree.map` made NumPy
    "reset": partial(reset, Module()),
    "vmap_reset": partial(vmap_reset, Module(), axis_size=3),
    "assign of a tree": lambda tree: assign(tree_of(h=ONES), tree).state,
    "|": StateTree({}).__or__,
    "where": lambda tree: co.where(True, tree, jax.tree.map(np.copy, tree)),
    "where of one tree": lambda tree: co.where(True, tree, tree),
    "stack": stack,
    "partition": partial(partition, filter=None),
    "a look-up": lambda tree: tree["h"],
    "restore": lambda tree: restore(Module(), tree).h.value,
}
WAYS_IN = [pytest.param(way, np.asarray, True, id=name) for name, way in TREES_IN.items()]
for kind in (np.asarray, memoryview, HasArray):
    for name, way in VALUES_IN.items():
        WAYS_IN.append(pytest.param(way, kind, False, id=f"{name} of {kind.__name__}"))

@pytest.mark.parametrize("way, kind, of_tree", WAYS_IN)
def test_the_memory_of_a_numpy_array_is_not_kept_by(way, kind, of_tree):
    memory = np.zeros(256, np.uint8)
    start = -memory.ctypes.data % 64  # where JAX takes memory over without a copy
    array = memory[start : start + 12].view(np.float32)
    given = kind(array)
    if of_tree:
        given = jax.tree.map(lambda leaf: array, tree_of(h=ONES))
    leaves = jax.tree.leaves(way(given))
    array[:] = 7
    assert leaves
    for leaf in leaves:
        assert isinstance(leaf, jax.Array)
        assert 7 not in np.asarray(leaf)

def test_leaves_have_the_names_of_flat_dict_which_gives_keys_as_their_data():
    tree = StateTree({"w.0": ParamState({"b": ONES, "k": a_key()}), "h": State(ROWS)})
    flat = flat_dict(tree)
    assert [*flat] == ["h", "w.0.b", "w.0.k"]
    assert flat["h"] is tree["h"]
    assert flat["w.0.k"].dtype == np.uint32
    assert same(flat["w.0.k"], LEGACY)
    for (path, _), name in zip(jax.tree_util.tree_leaves_with_path(tree), flat):
        assert jax.tree_util.keystr(path).replace("']['", ".") == f"['{name}']"
    assert isinstance(flat_dict(jax.tree.map(np.asarray, tree_of(h=ROWS)))["h"], jax.Array)

# ---- where ---------------------------------------------------------------------------------------

MASK = np.array([True, False, True])
SQUARE = np.zeros((3, 3), np.float32)

def ensemble_of(h, w):
    return tree_of(h=mapped(HiddenState(h)), w=ParamState(w))

@each("count", 0, 2)
def test_where_chooses_along_the_axes_of_the_mask(count):
    trees = [tree_of(h=mapped(HiddenState(h), count)) for h in (ROWS, SQUARE)]
    for mask in (MASK, ROWS > 4):
        chosen = co.where(mask, *trees)
        spread = mask.reshape(3, -1)
        assert same(chosen["h"], np.where(spread, ROWS, SQUARE))

def test_where_takes_no_axis_of_a_members_own_for_episodes():
    old = tree_of(h=mapped(HiddenState(SQUARE), 2), p=mapped(ParamState(SQUARE)))
    new = jax.tree.map(np.ones_like, old)
    with raises(ValueError, "'p'", "(3, 3)"):
        co.where(ROWS > 4, new, old)

def test_where_chooses_between_keys_and_under_jit():
    data = np.arange(12, dtype=np.uint32).reshape(2, 3, 2)
    trees = [tree_of(key=jax.random.wrap_key_data(part)) for part in data]
    chosen = jax.jit(co.where)(MASK, *trees)
    assert same(on_host(chosen["key"]), np.where(MASK[:, None], *data))

def test_where_keeps_what_is_the_same_object_in_both():
    old = ensemble_of(SQUARE, ZEROS)
    new = ensemble_of(ROWS, old["w"])
    chosen = co.where(MASK, new, old)
    assert chosen["w"] is old["w"]
    assert same(chosen["h"], np.where(MASK[:, None], ROWS, SQUARE))

NO_CHOICE = {
    "another state": (lambda: ensemble_of(ROWS, ZEROS) | tree_of(extra=1), ["extra"]),
    "another shape": (lambda: ensemble_of(ROWS, ONES[:2]), ["'w'"]),
    "another dtype": (lambda: ensemble_of(ROWS, np.zeros(3, np.int32)), ["'w'"]),
    "one model": (lambda: single(ensemble_of(ROWS, ZEROS), 0), ["mapped=1", "mapped=0"]),
    "a shared state": (lambda: ensemble_of(ROWS, ONES), ["'w'", "jit", "partition"]),
}

@cases("new, words", NO_CHOICE)
def test_where_refuses_trees_that_differ_in(new, words):
    with raises(ValueError, *words):
        co.where(MASK, new(), ensemble_of(SQUARE, ZEROS))

# ---- Copy, snapshot, restore ---------------------------------------------------------------------

@every_model
def test_restore_after_snapshot_is_the_identity(make):
    model = init_all_states(make(), key=a_key())
    tree = snapshot(model)
    before = frozen(restore(model, tree))
    reset_all_states(model, key=a_key(1))
    assert restore(model, tree) is model
    assert same(snapshot(model), tree)
    assert frozen(model) == before

def test_restore_keeps_what_the_tree_lacks_and_every_box():
    model = [Linear(), Linear()]
    box = model[0].weight
    restore(model, StateTree({"0.weight": mapped(HiddenState(ROWS, tag="new"))}))
    assert model[0].weight is box
    assert (type(box), box.tag, box.mapped) == (HiddenState, "new", 1)
    assert model[1].weight.value is STEPS

class Cyclic(Module):
    def __init__(self):
        self.inner = ([self],)
        self.inner[0].append(self.inner)
        self.hook = self.update
        self.other = object()

    def update(self):
        self.mark = True
        assert self.inner[0][0] is self.hook.__self__ is self
        assert self.inner[0][1] is self.inner
        return self.other

def test_a_copy_refers_to_itself_and_shares_what_is_opaque():
    model = Cyclic()
    output, _ = apply(model, snapshot(model))
    assert output is model.other
    assert not hasattr(model, "mark")

@every_graph
def test_the_copy_has_the_same_parts_in_containers_of_the_same_kinds(make):
    class Root(Module):
        def update(self):
            return frozen(self)

    root = Root()
    root.model = restore(make(), init(make(), key=a_key()))
    assert apply(root, snapshot(root))[0] == frozen(root)

class Maker(Module):
    """Its `init_state` makes a new part of the old one."""
    def __init__(self, part, make):
        self.part = copy.deepcopy(part)
        self.make = make

    def init_state(self):
        self.part = self.make(self.part)

PLACES = {
    "None": (None, lambda old: BOX()),
    "an empty list": ([], lambda old: [BOX(), BOX()]),
    "the end of a list": ([Linear(), 3], lambda old: [*old, BOX()]),
    "a new key": ({"a": 1}, lambda old: old | {"k": BOX(), 0: BOX()}),
    "a new dict": (None, lambda old: {"a": {5: BOX(), 6: [BOX()]}, 0: BOX()}),
    "a new dict in a dict": ({}, lambda old: {"k": {"l": BOX()}}),
    "below a module": ((Linear(),), lambda old: setattr(old[0], "h", [BOX()]) or old),
}

@cases("part, make", PLACES)
def test_a_new_state_comes_back_at(part, make):
    tree = init(Maker(part, make))
    assert same(snapshot(restore(Maker(part, make), tree)), tree)
    assert same(reset(Maker(part, make), tree), tree)
    text, _ = apply(Maker(part, make), tree, method="__repr__")
    assert text == repr(init_all_states(Maker(part, make)))

NO_PLACES = {
    "an item of a tuple": ((None, None), lambda old: (BOX(), None)),
    "a number": (3, lambda old: BOX()),
    "an item of a list": ([3, 4], lambda old: [3, BOX()]),
    "an item past the end": ([3], lambda old: [3, 4, BOX()]),
    "a value of a dict": ({"k": 3}, lambda old: {"k": BOX()}),
    "a layer in a list": ([Linear()], lambda old: [*old, [BOX()]]),
    "a layer in a dict": ({"a": Linear()}, lambda old: old | {"b": {"h": BOX()}}),
}

@cases("part, make", NO_PLACES)
def test_a_new_state_never_takes_the_place_of(part, make):
    tree = init(Maker(part, make))
    model = Maker(part, make)
    before = frozen(model)
    for use in (restore, reset, partial(vmap_reset, axis_size=3)):
        with raises(ValueError, "'part", "None"):
            use(model, tree)
    assert frozen(model) == before

def test_a_container_of_modules_takes_no_new_state():
    for target in ((Linear(),), [Linear()], {0: Linear()}):
        with raises(ValueError, "'1"):
            restore(target, StateTree({"1": State(1)}))
    model = Maker([None], None)
    assert len(restore(model, StateTree({"part.0": State(1)})).part) == 1
    for name in ("part.x", "0"):
        with raises(ValueError, repr(name)):
            restore(model, StateTree({name: State(1)}))

class Layered(Module):
    def __init__(self, number, keep):
        self.layers = keep([Recurrent() for _ in range(number)])

KEEPS = {
    "a list": (list, "'layers.2"),
    "a tuple": (tuple, "'layers"),
    "nested lists": (lambda layers: [layers[:1], layers[1:]], "'layers.1.1"),
    "a dict by number": (lambda layers: dict(enumerate(layers)), "'layers.2"),
}

@cases("keep, place", KEEPS)
def test_the_tree_of_three_layers_does_not_fit_into_two(keep, place):
    tree = init(Layered(3, keep), key=a_key())
    two = Layered(2, keep)
    before = frozen(two)
    for use in (restore, reset):
        with raises(ValueError, place):
            use(two, tree)
    assert frozen(two) == before

def test_a_tree_that_lacks_states_of_the_module_is_refused():
    model = Layered(2, list)
    _, hidden = partition(init(model, key=a_key()), ParamState)
    with raises(ValueError, "'layers.0.bias'", "'layers.1.bias'", "params | rest"):
        reset(model, hidden)

class Redrawn(Module):
    def init_state(self, key):
        self.w = ParamState(jax.random.uniform(key, (3,)))

class Tied(Module):
    """Two layers that share a state, which each of them re-creates."""
    def __init__(self):
        self.one, self.two = Redrawn(), Redrawn()
        self.one.w = self.two.w = ParamState(ZEROS)

    def reset_state(self):
        self.two.w.value = ONES

def test_a_tied_state_that_each_owner_re_creates_is_one_for_each_from_then_on():
    tree = init(Tied(), key=a_key())
    assert [*map(dotted, tree)] == ["one.w", "two.w"]
    assert same(tree, snapshot(init_all_states(Tied(), key=a_key())))
    assert same(tree, snapshot(restore(Tied(), tree)))
    after = reset(Tied(), tree)
    assert same(after["one.w"], tree["one.w"])
    assert same(after["two.w"], ONES)

# ---- All or nothing ------------------------------------------------------------------------------

class Vandal(Module):
    def __init__(self):
        self.state = self.again = State({"list": [ZEROS]}, tag="old")
        self.table = {"k": [1]}
        self.pair = ([1], Linear())
        self.ordered = OrderedDict(b=1, a=2)
        self.lists = defaultdict(list, k=[State(ZEROS)])

    def act(self, damage, error):
        damage(self)
        raise error("half way")

DAMAGE = {
    "a value": lambda m: setattr(m.state, "value", ONES),
    "the inside of a value": lambda m: m.state.value["list"].append(ONES),
    "a tag": lambda m: setattr(m.state, "tag", "new"),
    "a kind": lambda m: restore(m, tree_of(state=ParamState(ONES))),
    "a new state": lambda m: setattr(m, "new", State(ONES)),
    "a state with two names": lambda m: setattr(m, "again", State(ONES)),
    "a lost attribute": lambda m: delattr(m, "table"),
    "a list in a dict": lambda m: m.table["k"].clear(),
    "a list in a tuple": lambda m: m.pair[0].append(2),
    "the order of a dict": lambda m: m.ordered.move_to_end("b"),
    "a defaultdict": lambda m: m.lists["new"].append(1),
    "a child": lambda m: setattr(m.pair[1], "weight", State(ONES)),
}

@every_form
@cases("damage", DAMAGE)
def test_a_method_that_raises_leaves_as_it_was(damage, form):
    model = Vandal()
    before = frozen(model)
    attributes = dict(vars(model))
    with raises(RuntimeError, "half way") as info:
        form([model], "act", (damage, RuntimeError), node_to_exclude=Linear)
    assert frozen(model) == before
    for name, part in attributes.items():
        assert getattr(model, name) is part
    note = " ".join(info.value.__notes__)
    for word in ("'act'", "Vandal", "'0'"):
        assert word in note

@dataclasses.dataclass(frozen=True)
class NoNotes(Exception):
    text: str

@each("error", NoNotes, StopIteration, KeyboardInterrupt)
def test_an_odd_exception_keeps_its_type_and_puts_all_back(error):
    model = Vandal()
    before = frozen(model)
    for form in (FORMS["call_all"], call_all_fns):
        with pytest.raises(error):
            form(model, "act", (DAMAGE["a value"], error), node_to_exclude=Linear)
    assert frozen(model) == before

# ---- The call engine -----------------------------------------------------------------------------

def recorder(log, level, *children):
    """A module that notes its level in a log outside the model, where no copy hides it."""
    def note(self):
        log.append(level)

    method = note if level is None else call_order(level)(note)
    node = type("Recorder", (Module,), {"note": method})()
    node.children = list(children)
    return node

@every_form
def test_undecorated_methods_run_first_then_ascending_levels(form):
    log = []
    inner = recorder(log, 1, recorder(log, 0), recorder(log, None))
    form(recorder(log, 0, inner, recorder(log, 1)), "note")
    assert log == [None, 0, 0, 1, 1]

def test_outputs_come_by_path_in_call_order_without_none():
    class Named(Module):
        def init_state(self, *args, **kwargs):
            return args, kwargs

    model = {"b": Named(), "a": Module(), "c": [Named()]}
    outputs, _ = call_all(model, StateTree({}), "init_state", [7], {"k": 8})
    given = ([7],), {"k": 8}
    assert list(outputs.items()) == [(("b",), given), (("c", 0), given)]

def test_call_order_leaves_its_level_on_the_function():
    assert co.MAX_ORDER == 10
    for args, level in (((), 0), ((9,), 9), ((-3, False), -3), ((10, False), 10)):
        assert call_order(*args)(lambda self: None).call_order == level

@each("level", -1, 10)
def test_a_level_is_in_the_range(level):
    with raises(ValueError, f"level must be an integer in [0, 10); got {level}"):
        call_order(level)

@each("level", 1.0, "1", None, True, len)
def test_a_level_is_an_integer(level):
    with raises(TypeError, "level must be an integer"):
        call_order(level)

class Odd(Module):
    note = 3
    gone = None

LEGACY = np.zeros(2, np.uint32)  # a_key(0), as keys were before they had a type
BAD_CALLS = {
    "missing": (AttributeError, "'b' (Linear), 'c.0' (Linear)", dict(node_to_exclude=Odd)),
    "None": (AttributeError, "'c.1' (Odd)", dict(fn_name="gone", node_to_exclude=Linear)),
    "no method": (TypeError, "'c.1' (Odd)", dict(node_to_exclude=Linear)),
    "a bad policy": (ValueError, "'ignore'", dict(fn_if_not_exist="ignore")),
    "a bad name": (TypeError, "fn_name", dict(fn_name=len)),
    "bad kwargs": (TypeError, "kwargs", dict(kwargs=[1])),
    "a bad key": (TypeError, "jax.random.key(0)", dict(key=0)),
    "two keys": (TypeError, "kwargs", dict(key=LEGACY, kwargs={"key": 1})),
}

@every_form
@cases("error, word, options", BAD_CALLS)
def test_nothing_runs_if_there_is(error, word, options, form):
    log = []
    model = {"a": recorder(log, None), "b": Linear(), "c": [Linear(), Odd()]}
    with raises(error, word):
        form(model, **{"fn_name": "note", "node_to_exclude": (Linear, Odd), **options})
    assert log == []

@every_form
def test_nodes_without_the_method_are_passed_over_if_told_so(form):
    log = []
    model = {"a": recorder(log, None), "b": Linear()}
    with pytest.warns(UserWarning, match="'b'.*'note'"):
        form(model, "note", fn_if_not_exist="warn")
    form(model, "note", fn_if_not_exist="pass")
    form(model, "note", fn_if_not_exist="none")
    assert len(log) == 3

@each("call", apply, vmap_apply)
def test_apply_checks_its_method_too(call):
    for target, method in ((Odd(), "gone"), ({"a": Odd()}, "update")):
        with raises(AttributeError, repr(method)):
            call(target, StateTree({}), STEPS, method=method)
    with raises(TypeError, "callable"):
        call(Odd(), StateTree({}), STEPS, method="note")

# ---- Keys ----------------------------------------------------------------------------------------

class Roller(Module):
    def roll(self, key):
        return key

def drawn(model, key, method="roll"):
    """The key that each node gets, by dotted path."""
    outputs, _ = call_all(model, StateTree({}), method, key=key)
    return {dotted(path): tuple(on_host(key).tolist()) for path, key in outputs.items()}

GOLDEN = {  # of a_key(0) at these paths: if one changes, every model draws other numbers
    "": (3214996521, 385768613),
    "a": (925614511, 4172301366),
    "b.0": (1513102251, 4248077607),
    "b.1": (2230668142, 2784512011),
}

def test_a_node_draws_from_its_own_path_alone_in_every_process():
    model = {"b": (Roller(), Roller()), "a": Roller()}
    keys = drawn(model, a_key()) | drawn(Roller(), a_key())
    assert keys == GOLDEN
    assert drawn({"a": Roller()}, LEGACY)["a"] == GOLDEN["a"]
    assert drawn({"a": Roller()}, a_key(1))["a"] != GOLDEN["a"]
    assert drawn([Roller()], a_key()) != drawn({"0": Roller()}, a_key())

@each("key", "key", ONES, np.uint32(0), np.zeros((3, 2), np.uint32))
def test_anything_else_is_no_key(key):
    for use in (init, init_all_states, partial(vmap_init, axis_size=3)):
        with raises(TypeError, "jax.random.key(0)"):
            use(Recurrent(), key=key)

TAKERS = {
    "a parameter": (lambda self, key: key, True),
    "a keyword": (lambda self, *args, key=None: key, True),
    "**kwargs": (lambda self, **kwargs: kwargs.get("key"), True),
    "nothing": (lambda self: None, False),
    "a positional parameter": (lambda self, key=None, /: key, False),
    "*key": (lambda self, *key: key or None, False),
}

@cases("method, takes", TAKERS)
def test_a_key_goes_to_methods_that_can_take_it(method, takes):
    node = type("Node", (Module,), {"update": method})()
    for name in ("update", "__call__"):
        keys = drawn({"a": node}, a_key(), name)
        assert list(keys.values()) == [GOLDEN["a"]] * takes

@every_form
def test_a_key_that_is_required_is_asked_for(form):
    with raises(TypeError, "'key'") as info:
        form([Roller()], "roll")
    assert "key=jax.random.key(0)" in " ".join(info.value.__notes__)

def test_a_key_in_kwargs_and_the_key_of_apply_go_to_the_method_as_they_are():
    outputs, _ = call_all([Roller()], StateTree({}), "roll", kwargs={"key": a_key()})
    output, _ = apply(Roller(), StateTree({}), method="roll", key=a_key())
    assert outputs[0,] is a_key()
    assert output is a_key()

# ---- Pure calls ----------------------------------------------------------------------------------

def pure_life(model, step=apply):
    tree = init(model, key=a_key())
    lived = [tree]
    for x in ROWS:
        output, tree = step(model, tree, x)
        lived += [output, tree]
    return [*lived, reset(model, tree, key=a_key(1))]

def life_in_place(model):
    lived = [snapshot(init_all_states(model, key=a_key()))]
    for x in ROWS:
        lived += [model(x), snapshot(model)]
    return [*lived, snapshot(reset_all_states(model, key=a_key(1)))]

@every_model
def test_pure_calls_equal_calls_in_place_and_leave_the_template(make):
    template = make()
    before = frozen(template)
    assert same(pure_life(template), life_in_place(make()))
    assert frozen(template) == before

@every_model
def test_a_jitted_step_equals_an_eager_one_and_is_traced_once(make):
    traces = []

    @jax.jit
    def step(tree, x):
        traces.append(x)
        params, rest = partition(tree, ParamState)
        return apply(template, params | rest, x)

    template = make()
    lived = pure_life(template, lambda template, tree, x: step(tree, x))
    assert same(lived, pure_life(template), rtol=1e-6)
    assert len(traces) == 1

@each("seed", *range(40))
def test_pure_calls_on_a_random_graph_equal_calls_in_place(seed):
    template, real = random_graph(seed), random_graph(seed)
    before = frozen(template)
    tree = init(template, key=a_key())
    assert same(tree, snapshot(init_all_states(real, key=a_key())))
    outputs, tree = call_all(template, tree, "update")
    expected = {path: node.update() for path, node in plain_walk(real)[0]}
    assert list(outputs) == list(expected)
    assert same([outputs, tree], [expected, snapshot(real)])
    tree = reset(template, tree, key=a_key())
    assert same(tree, snapshot(reset_all_states(real, key=a_key())))
    assert frozen(template) == before

class Creator(Module):
    def states_only(self):
        self.h = State(ONES)
        self.other = 3

    def modules(self):
        self.new = [Linear()]

def test_only_states_cross_a_pure_call():
    model = Creator()
    _, tree = apply(model, StateTree({}), method="states_only")
    assert list(tree) == [("h",)]
    assert vars(model) == {}

@every_form
def test_modules_are_created_in_place_and_in_no_other_call(form):
    model = {"m": Creator()}
    if form is call_all_fns:
        assert list(snapshot(form(model, "modules"))) == [("m", "new", 0, "weight")]
    else:
        with raises(ValueError, "'m.new.0' (Linear)", "__init__", "init_state"):
            form(model, "modules")
        assert vars(model["m"]) == {}

# ---- No dead tracers -----------------------------------------------------------------------------

class Looping(Module):
    """Runs its child inside a loop of JAX's, which is right only by way of trees."""
    def __init__(self, loop=None):
        self.child, self.loop = Recurrent(), loop

    def update(self, x):
        return self.loop(self.child, x)

    def roll(self, xs):
        step = lambda tree, x: apply(self.child, tree, x)[::-1]
        tree, outputs = jax.lax.scan(step, snapshot(self.child), xs)
        restore(self.child, tree)
        return outputs

def scan(f, x):
    return jax.lax.scan(lambda carry, x: (carry, f(x)), None, ROWS)

LOOPS = {
    "scan": scan,
    "cond": lambda f, x: jax.lax.cond(x[0] < 9, f, f, x),
    "while_loop": lambda f, x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: f(x) + 1, x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "jit": lambda f, x: jax.jit(f)(x),
}

def check_leak(model, pure, in_place, x):
    before = frozen(model)
    words = "'child.h'", "apply", "snapshot", "restore"
    with raises(ValueError, *words):
        pure(model, snapshot(model), x)
    with raises(ValueError, *words):
        in_place(model, "update", x, node_to_exclude=Recurrent)
    assert frozen(model) == before

@cases("loop", LOOPS)
def test_a_state_written_by_a_method_inside_its_own(loop):
    model = init_all_states(Looping(loop), key=a_key())
    check_leak(model, apply, call_all_fns, STEPS)

@each("name", "scan", "jit")
def test_a_state_of_members_written_by_a_method_inside_its_own(name):
    model = vmap_init_all_states(Looping(LOOPS[name]), axis_size=3, key=a_key())
    check_leak(model, vmap_apply, partial(vmap_call_all_fns, in_axes=0), ROWS)

def test_apply_on_a_snapshot_inside_the_loop_is_the_way_out():
    model = init_all_states(Looping(), key=a_key())
    twin = copy.deepcopy(model.child)
    expected = np.stack([twin(x) for x in ROWS])
    outputs, tree = apply(model, snapshot(model), ROWS, method="roll")
    assert same(outputs, expected, rtol=1e-6)
    call_all_fns(model, "roll", ROWS, node_to_exclude=Recurrent)
    assert same(tree, snapshot(model))

# ---- Slow: threads and memory --------------------------------------------------------------------

@slow
def test_sixteen_threads_use_one_template_at_once():
    template = Mixed()
    before = frozen(template)
    lives = []
    work = lambda: lives.append(pure_life(template))
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lives) == 16
    assert all(same(life, lives[0]) for life in lives)
    assert frozen(template) == before

@slow
def test_nothing_that_a_call_made_stays_alive():
    class Passing(Recurrent):
        def update(self, x):
            made.append(weakref.ref(self))
            return super().update(x)

    made = []
    model = Passing()
    tree = init(model, key=a_key())
    gc.collect()
    gc.disable()
    try:
        apply(model, tree, STEPS)
        assert made[0]() is None  # with no garbage collector: there is no cycle
    finally:
        gc.enable()
    vmap_apply(model, vmap_init(model, axis_size=3, key=a_key()), ROWS)
    made.append(weakref.ref(Passing))
    del Passing, model
    jax.clear_caches()
    gc.collect()
    assert not any(reference() for reference in made)

# ---- vmap and the vmapped calls ------------------------------------------------------------------

def ensemble():
    """Three members of a `Recurrent`: they share the bias and differ in the rest."""
    weight, h = mapped(ParamState(ROWS)), mapped(HiddenState(ROWS))
    return tree_of(bias=Recurrent().bias, weight=weight, h=h)

@functools.cache
def family_of_keys():
    """Of each of three agents: its key, and the keys of its three members."""
    split = lambda key: [*jax.random.split(key, 3)]
    return jax.jit(lambda key: [(agent, split(agent)) for agent in split(key)])(a_key())

PLAIN = init, apply, reset
VMAPPED = functools.partial(vmap_init, axis_size=3), vmap_apply, vmap_reset

def life(calls, model, key, x, deeper=lambda fn: fn):
    begin, step, again = calls
    tree = deeper(lambda key: begin(model, key=key))(key)
    output, stepped = deeper(lambda tree, x: step(model, tree, x))(tree, x)
    return tree, output, stepped, deeper(lambda tree, key: again(model, tree, key=key))(stepped, key)

def stack_lives(lives, shared=()):
    return tuple(stacked(parts, shared) for parts in zip(*lives))

@every_model
def test_each_member_is_a_single_model_with_its_key_in_ensembles_of_ensembles_too(make):
    model = make()
    before, shared = frozen(model), {*snapshot(model)}
    agents, keys = zip(*family_of_keys())
    xs = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    alone = jax.jit(functools.partial(life, PLAIN, model))
    expected = [stack_lives(map(alone, *each), shared) for each in zip(keys, xs)]
    together = jax.jit(functools.partial(life, VMAPPED, model))
    assert same(together(agents[0], xs[0]), expected[0], rtol=1e-6)
    nested = jax.jit(lambda keys: life(VMAPPED, model, jnp.stack(keys), xs, co.vmap))
    assert same(nested(agents), stack_lives(expected), rtol=1e-6)
    assert frozen(model) == before

@pytest.mark.parametrize("seed", range(20))
def test_vmapped_calls_on_a_random_graph_equal_a_loop_over_members(seed):
    model = [random_graph(seed), Recurrent()]
    key, keys = family_of_keys()[0]
    tree = vmap_init(model, axis_size=3, key=key)
    assert same(tree, stacked([init(model, key=key) for key in keys], {*snapshot(model)}))
    update = {"fn_name": "update", "node_to_exclude": Recurrent}
    expected = loop(lambda tree: call_all(model, tree, **update), tree)
    assert same(vmap_call_all(model, tree, **update), expected)

class Axes(Module):
    """Each call makes four states, two of them in the place of others."""

    def update(self):
        self.new = State(ZEROS)
        self.for_shared = State(ZEROS)
        self.for_mapped = State(ZEROS)
        self.new_out = State(ZEROS, tag="out")

    init_state = reset_state = update

FIVE = np.zeros((5, 3), np.float32)
OUT = {"state_to_exclude": "out"}
# How many mapped axes each state has after a call of five members:
AXES = {
    #                 it was there:           the call makes it:
    #                 shared mapped excluded  new   for_shared for_mapped excluded
    "before":        (0,     1,     1,        None, 0,         1,         None),
    "vmap_init":     (0,     1,     1,        1,    1,         1,         0),
    "vmap_reset":    (0,     1,     1,        1,    1,         1,         0),
    "vmap_call_all": (0,     1,     1,        1,    1,         1,         0),
    "vmap_apply":    (0,     1,     1,        1,    1,         1,         1),  # excludes nothing
    "vmap(fn)":      (0,     1,     1,        1,    0,         1,         1),  # goes by paths
    "vmap(fn, None)": (0,    1,     1,        1,    0,         1,         None),  # sees all members
}  # fmt: skip
NAMES = "shared", "mapped", "out", "new", "for_shared", "for_mapped", "new_out"
CALLS = {
    "vmap_init": lambda model, tree: vmap_init(restore(model, tree), axis_size=5, **OUT),
    "vmap_reset": lambda model, tree: vmap_reset(model, tree, **OUT),
    "vmap_call_all": lambda model, tree: vmap_call_all(model, tree, "update", **OUT)[1],
    "vmap_apply": lambda model, tree: vmap_apply(model, tree)[1],
    "vmap(fn)": lambda model, tree: co.vmap(lambda tree: apply(model, tree)[1])(tree),
    "vmap(fn, None)": lambda model, tree: co.vmap(
        lambda tree: tree | tree_of(new=tree["mapped"][0]), in_axes=None, axis_size=5)(tree),
}  # fmt: skip

def counts_of(name):
    return {state: count for state, count in zip(NAMES, AXES[name]) if count is not None}

@pytest.mark.parametrize("name", CALLS)
def test_the_axes_of_every_state_after(name):
    box = lambda count: mapped(State(FIVE if count else ZEROS), count)
    boxes = {state: box(count) for state, count in counts_of("before").items()}
    boxes["out"].tag = "out"
    after = jax.eval_shape(lambda: CALLS[name](Axes(), StateTree(boxes)))
    assert mapped_of(after) == counts_of(name)
    for path, box in after.states().items():
        assert after[path].shape == (5,) * box.mapped + (3,), path

class Bag(Module):
    def __init__(self):
        self.shared, self.own, self.spare = State(ZEROS), mapped(State(ROWS)), None

    def update(self):
        self.spare = [self.own, State(ZEROS), State(ZEROS, tag="own"), State(None)]
        self.own = None

def test_a_box_that_moves_keeps_its_axis_and_its_tag_and_new_ones_get_the_state_tag():
    _, tree = vmap_call_all(Bag(), snapshot(Bag()), "update", state_tag="new")
    states = [(box.mapped, box.tag) for box in tree.states().values()]
    assert [*map(dotted, tree)] == ["shared", "spare.0", "spare.1", "spare.2", "spare.3"]
    assert states == [(0, None), (1, None), (1, "new"), (1, "own"), (1, "new")]
    assert same(tree["spare.0"], ROWS)

def test_what_a_call_creates_and_excludes_has_the_value_of_the_first_member():
    key, keys = family_of_keys()[0]
    tree = vmap_init(Recurrent(), axis_size=3, state_to_exclude=ParamState, key=key)
    assert mapped_of(tree) == {"bias": 0, "weight": 0, "h": 1}
    assert same(tree["weight"], init(Recurrent(), key=keys[0])["weight"])

def test_a_constructor_under_vmap_makes_independent_members():
    born = lambda key: snapshot(Linear(jax.random.uniform(key, (3,))))
    keys = family_of_keys()[0][1]
    assert same(co.vmap(born)(jnp.stack(keys)), stacked([born(key) for key in keys]))
    tree = jax.eval_shape(co.vmap(lambda: snapshot(Recurrent()), axis_size=5))  # no argument
    assert tree["bias"]["b"].shape == (5, 3)

def test_trees_stand_anywhere_in_arguments_and_results():
    def split(given, pair):
        params, rest = partition(given["tree"], ParamState)
        assert mapped_of(params | rest) == {"bias": 0, "weight": 0, "h": 0}
        assert (params["bias"]["b"].shape, rest["h"].shape) == ((3,), (3,))
        new = tree_of(w=params["bias"]["b"])  # which no argument has
        return {"rest": [rest, Pair(pair.left, params)], "none": None}, pair.right, new

    old = StateTree({"old": ensemble()})
    table, x, new = co.vmap(split)({"tree": ensemble(), "none": None}, Pair(old, ROWS))
    rest, (left, params) = table["rest"]
    assert same(rest | params, ensemble())
    assert same([left, x, table["none"]], [old, ROWS, None])
    assert same(new, tree_of(w=mapped(State(np.ones((3, 3), np.float32)))))

CUBE, WIDE = np.zeros((3, 4, 5)), np.zeros((4, 5, 3))
TABLE = {"a": np.zeros((3, 4)), "b": (np.zeros((3, 2)), np.zeros(3))}
IN_AXES = {
    "0 for all": (0, (CUBE, TABLE)),
    "a tuple": ((-3, -1), (CUBE, WIDE)),
    "a list": ([2, 0], (WIDE, CUBE)),
    "a shared number": ((None, -1), (2.0, CUBE)),
    "a tree": (({"a": 0, "b": (0, None)}, 2), (TABLE, WIDE)),
    "a tree in a list": ([{"a": None, "b": (-2, 0)}, None], (TABLE, CUBE)),
    "None as an argument": (0, (CUBE, None)),
    "None within": ((None, 0), (None, [None, CUBE])),
}

@pytest.mark.parametrize("in_axes, args", IN_AXES.values(), ids=IN_AXES)
def test_arrays_are_mapped_as_by_jax_vmap(in_axes, args):
    fn = lambda *args: {"all": args, "none": None}
    got = jax.eval_shape(lambda: co.vmap(fn, in_axes)(*args))
    assert got == jax.eval_shape(lambda: jax.vmap(fn, in_axes)(*args))

@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=[])
@dataclasses.dataclass
class Checked:
    x: Any

    def __post_init__(self):
        assert self.x.shape == (3,)

def test_a_class_that_checks_itself_is_never_rebuilt_with_anything_but_arrays():
    total = lambda self, checked, x: self.v.value.x + checked.x + x
    model = type("Reader", (Module,), {"update": total})()
    args = tree_of(v=Checked(ZEROS)), Checked(ONES), ROWS
    results = vmap_apply(model, *args, in_axes=(None, 0))
    assert same(results, (ROWS + 1, args[0]))
    assert same(co.vmap(functools.partial(apply, model), (0, None, 0))(*args), results)

def test_arguments_that_disagree_go_by_the_states_of_the_result_or_by_names_of_their_own():
    shared = partition(single(ensemble(), 0), HiddenState)[0]  # just 'h', the same for all
    results = co.vmap(lambda tree, shared: (tree, shared))(ensemble(), shared)
    assert same(results, (ensemble(), shared))
    named = StateTree({"actor": ensemble(), "critic": single(ensemble(), 0)})
    swap = lambda named: partition(named, ParamState)[1] | partition(named, ParamState)[0]
    assert same(co.vmap(swap)(named), named)

def train_step(params, optimiser, rest, x):
    loss = lambda params: jnp.sum(apply(Recurrent(), params | rest, x)[0] ** 3)
    slope, (old, _) = jax.grad(loss)(params), optimiser
    momentum = jax.tree.map(lambda old, new: 0.5 * old + new, old, slope)
    params = jax.tree.map(lambda leaf, new: leaf - 0.1 * new, params, momentum)
    return params, Pair(momentum, None)

def test_each_member_trains_with_its_own_optimiser_as_if_alone():
    def train(start, step, params, rest, x):
        params, optimiser = step(params, start(params), rest, x)
        params, optimiser = step(params, optimiser, rest, x)
        return params, optimiser.left

    start = lambda params: Pair(jax.tree.map(jnp.zeros_like, params), None)
    singles = [single(ensemble(), i) for i in range(3)]
    alone = jax.jit(functools.partial(train, start, train_step))
    expected = [alone(*partition(tree, ParamState), x) for tree, x in zip(singles, ROWS)]
    together = jax.jit(functools.partial(train, co.vmap(start), co.vmap(train_step)))
    got = together(*partition(stacked(singles), ParamState), ROWS)
    assert same(got, stack_lives(expected), rtol=1e-5)

def test_trees_inside_of_values_count_mapped_axes_too():
    params = partition(ensemble(), HiddenState)[0]
    begin = lambda params: tree_of(opt=[1.0, {"momentum": params}])
    whole = jax.eval_shape(co.vmap(begin), params)
    assert mapped_of(whole["opt"][1]["momentum"]) == {"h": 1}
    part = jax.eval_shape(lambda: member(co.vmap(lambda tree: tree)(co.vmap(begin)(params)), 0))
    assert jax.tree.structure(part) == jax.tree.structure(begin(single(params, 0)))
    hessian = jax.hessian(lambda params: jnp.sum(params["h"] ** 3))
    inner = jax.eval_shape(co.vmap(hessian), params)["h"]
    assert (mapped_of(inner), inner["h"].shape) == ({"h": 1}, (3, 3, 3))

class Mean(Module):
    """A sum of the means over members, which they all share."""

    def __init__(self):
        self.mean, self.steps = LongTermState(ZEROS), LongTermState(0)

    def update(self, x, axis=None):
        self.steps.value = self.steps.value + 1
        self.mean.value = self.mean.value + (jax.lax.pmean(x, axis) if axis else x)

def test_a_shared_statistic_is_updated_from_all_members_of_all_levels():
    step = functools.partial(vmap_apply, MEAN, axis_name="m")
    _, tree = step(snapshot(MEAN), ROWS, axis="m")
    assert mapped_of(tree) == {"mean": 0, "steps": 0}
    assert same([tree["mean"], tree["steps"]], [ROWS.mean(axis=0), np.int32(1)])
    agents = co.vmap(functools.partial(step, axis=("m", "outer")), axis_name="outer")
    assert same(agents(snapshot(MEAN), np.stack([ROWS, ROWS]))[1], tree)

@pytest.mark.parametrize("name", [None, "m"])
def test_a_shared_state_that_differs_is_refused_with_every_way_out(name):
    tree = snapshot(MEAN) | tree_of(fixed=ONES)
    with raises(ValueError, "'mean'", *WAYS_OUT) as info:
        vmap_apply(MEAN, tree, ROWS, axis_name=name)
    assert not re.search("'fixed'|out_axes", str(info.value))
    assert name or "'steps'" not in str(info.value)  # under a name, all that changed are listed

class Die(Module):
    def __init__(self, box=None):
        self.box = box

    def update(self, x=None, key=None):
        return jax.random.key_data(key)

    def draw(self):
        self.box.value = jax.random.split(self.box.value)[0]

def test_member_i_gets_key_i_of_the_split():
    key, keys = family_of_keys()[0]
    rolls = np.stack([on_host(key) for key in keys])
    for given in (key, on_host(key)):
        assert same(vmap_apply(Die(), tree_of(), axis_size=3, key=given)[0], rolls)
    shared, _ = vmap_apply(Die(), tree_of(), ROWS, keys[0], in_axes=(0, None))  # as asked for
    assert same(shared, np.stack([rolls[0]] * 3))

def test_a_shared_key_that_changed_is_warned_of_and_no_other():
    def step(box, method):
        tree = snapshot(Die(box))
        jax.eval_shape(lambda: vmap_apply(Die(box), tree, axis_size=3, method=method))

    with pytest.warns(UserWarning, match="all members drew the same numbers.*'box' .State."):
        step(State(a_key()), "draw")
    step(State(a_key()), "init_state")
    step(mapped(State(jnp.stack(family_of_keys()[0][1]))), "draw")

@pytest.mark.parametrize("use", [vmap_init, vmap_init_all_states])
def test_a_vmapped_init_that_maps_nothing_is_warned_of(use):
    for model, excluded in ((Linear(), None), (Axes(), ...)):
        with pytest.warns(UserWarning, match=r"no state is mapped.*vmap\(lambda key: init"):
            use(model, axis_size=3, state_to_exclude=excluded)

# ---- What is refused

def weights(value, count=1):
    return tree_of(weight=mapped(ParamState(value), count))

CELL, LINEAR, MEAN = Recurrent(), Linear(), Mean()
keeps = dict.fromkeys(["init_state", "reset_state"], Keeper.update)  # as they are given
GROWING = type("Growing", (Recurrent,), keeps)()
WAYS_OUT = "init_state", "vmap", "state_to_exclude", "pmean", "axis_name", "flat_dict"
POSITIVE = "axis_size is a positive int; got "
DISAGREE = "'h'", "StateTree({'actor': a, 'critic': c})"
LEVELS = "'h' (HiddenState)", "vmap(functools.partial(vmap_reset, module))"
LOST = "'weight' (ParamState)", "vmap", "stack"
MEMORY = mapped(HiddenState({"v": ROWS, "buffer": np.zeros((3, 4, 3), np.float32)}))
GROWN = "'h' (HiddenState)", "in_axes", "keyword"
REFUSED = {  # a call with an ensemble of three, and words of its ValueError
    "zero members": (lambda s: vmap_init(Axes(), axis_size=0), POSITIVE + "0"),
    "a bool": (lambda s: vmap_init(Axes(), axis_size=True), POSITIVE + "True"),
    "a float": (lambda s: co.vmap(int, axis_size=3.0)(), POSITIVE + "3.0"),
    "no size": (lambda s: vmap_init(Axes()), "no state is mapped"),
    "no rows": (lambda s: co.vmap(len)(ROWS[:0]), POSITIVE + "0"),
    "unlike a state": (lambda s: vmap_reset(CELL, s, axis_size=5), "5", "'h'", "init_all_states"),
    "unlike an argument": (lambda s: vmap_apply(CELL, s, FIVE, axis_size=3), "args[0]"),
    "an argument within": (lambda s: co.vmap(min)(s, {"x": [FIVE]}), "args[1]['x'][0]"),
    "a tree within": (lambda s: co.vmap(min)({"x": FIVE}, (s,)), "'h' of args[1][0]"),
    "a lost axis": (lambda s: co.vmap(min, axis_size=3)(weights(1.0)), "'weight'"),
    "a disagreement": (lambda s: co.vmap(lambda *args: args[0])(s, single(s, 0)), *DISAGREE),
    "about a part": (lambda s: co.vmap(lambda *args: args[0] | tree_of(x=1))(s, single(s, 0)), *DISAGREE),
    "what differs": (lambda s: co.vmap(lambda s, x: jax.tree.map(x.__add__, s))(s, ROWS), "'bias"),
    "a level too few": (lambda s: reset(CELL, s), *LEVELS),
    "one of two": (lambda s: vmap_reset(CELL, stack(s, s)), *LEVELS),
    "by jax.vmap": (lambda s: apply(LINEAR, jax.vmap(lambda w: snapshot(Linear(w)))(ROWS), ONES), *LOST),
    "a stack by hand": (lambda s: vmap_apply(LINEAR, weights(ROWS, 0), ROWS), *LOST),
    "and a reset of it": (lambda s: vmap_reset(LINEAR, weights(ROWS, 0), axis_size=3), *LOST),
    "a mean over members": (lambda s: vmap_apply(LINEAR, weights(STEPS), ROWS), *LOST),
    "a reset to a batch": (lambda s: vmap_reset(GROWING, s, ROWS), *GROWN),
    "a batch by keyword": (lambda s: vmap_apply(CELL, s, x=ROWS), *GROWN),
    "a batch under None": (lambda s: vmap_apply(CELL, s, ROWS, in_axes=None), *GROWN),
    "a batch of a dict": (lambda s: vmap_apply(Keeper(), tree_of(h=MEMORY), dict(MEMORY.value), in_axes=None), *GROWN),
    "unlike shapes": (lambda s: stack(tree_of(v=ONES), tree_of(v=ZEROS[:2])), "'v'", "float32[2]"),
    "unlike dtypes": (lambda s: stack(tree_of(v=ONES), tree_of(v=np.zeros(3, np.int32))), "'v'", "int32"),
    "unlike kinds": (lambda s: stack(tree_of(v=ONES), tree_of(v=HiddenState(ZEROS))), "v: HiddenState"),
    "unlike tags": (lambda s: stack(tree_of(v=ONES), tree_of(v=State(ZEROS, tag="t"))), "tag='t'"),
    "unlike axes": (lambda s: stack(tree_of(v=ONES), tree_of(v=mapped(State(ZEROS)))), "mapped=1", "mapped=0"),
    "an error of one's own": (lambda s: co.vmap(lambda s: jax.vmap(lambda x: [x], 0, [None])(ROWS))(s), "out_axes"),
    "one with a name": (lambda s: co.vmap(lambda s: jax.vmap(dict, 0, None, "q")(x=ROWS))(s), "out_axes"),
}

@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name):
    call, *words = REFUSED[name]
    with raises(ValueError, *words):
        call(ensemble())

def test_what_is_like_it_and_can_be_meant_passes():
    assert same(apply(Linear(), weights(STEPS), ONES)[0], STEPS)  # as jax.tree.map makes a mean: one model
    assert same(apply(keeper(), tree_of(h=HiddenState(ROWS)), ZEROS)[1]["h"], ZEROS)  # a batch by hand
    grown = jax.eval_shape(lambda: vmap_init(restore(copy.copy(GROWING), ensemble()), ROWS, axis_size=3))
    assert grown["h"].shape == (3, 3, 3)
    model = init_all_states(vmap_init_all_states(Axes(), axis_size=3))
    assert same(vmap_init_all_states(model, axis_size=5).new.value, FIVE)

def test_a_module_or_its_method_is_not_mapped_by_vmap():
    model = restore(Recurrent(), single(ensemble(), 0))
    for fn in (model, model.update):
        with raises(TypeError, "vmap_apply"):
            co.vmap(fn)(ROWS)

class Returning(Module):
    def __init__(self, make):
        self.update = make

BAD_AXES = {
    "too large": (2, [ROWS], "args[0], float32[3,3]"),
    "a flag": (0, [ZEROS, True], "args[1], bool", "keyword"),
    "a key": (0, [ROWS, a_key], "args[1], key", "key="),
    "a bool": ((False,), [ROWS], "args[0]"),
    "too many": ((0, 0), [ZEROS], "(0, 0)", "float32[3]"),
    "too few": ([0], [ZEROS, ZEROS], "[0]", "2 arguments"),
    "another key of a dict": (({"x": 0},), [{"y": ZEROS}], "1 arguments"),
    "deep within": (({"x": (0, "1")},), [{"x": (ZEROS, ZEROS)}], "args[0]['x'][1]"),
    "of a text": (0, [{"name": "text"}], "args[0]['name'], str"),
    "1 for a tree": (1, [StateTree({})], "args[0]", "StateTree takes 0"),
}

@pytest.mark.parametrize("name", BAD_AXES)
def test_bad_in_axes_are_told_in_terms_of_the_callers_arguments(name):
    in_axes, args, *words = BAD_AXES[name]
    args = tuple(arg() if arg is a_key else arg for arg in args)
    zero = lambda *args: 0
    for call in (
        co.vmap(zero, in_axes),
        functools.partial(vmap_apply, Returning(zero), tree_of(), in_axes=in_axes),
        lambda *args: vmap_call_all([Returning(zero)], tree_of(), "update", args, in_axes=in_axes),
    ):
        with raises(TypeError, "in_axes is an int or None", *words):
            call(*args)

NO_OUTPUTS = {
    "a str": lambda: "text",
    "a state": lambda: State(ZEROS),
    "a module": Linear,
    "a generator": lambda: (x for x in ()),
    "a generator within": lambda: {"k": [ONES, (x for x in ())]},
    "texts": lambda: np.array(["text"]),
}

@pytest.mark.parametrize("make", NO_OUTPUTS.values(), ids=NO_OUTPUTS)
def test_an_output_that_cannot_cross_is_refused_with_its_place(make):
    model = {"fine": Returning(lambda: ONES), "odd": [Returning(make)]}
    for call in (FORMS["vmap_call_all"], FORMS["vmap_call_all_fns"]):
        with raises(TypeError, "'update' of 'odd.0' (Returning)", "cannot cross"):
            call(model, "update")

class Learner(Recurrent):
    def update(self, x, target):
        return super().update(x) - target["weight"], StateTree({"bias": self.bias, "new": self.h})

def test_a_target_network_is_no_state_and_a_tree_that_is_returned_is_per_member_as_a_whole():
    expected, stepped = vmap_apply(Recurrent(), ensemble(), ROWS)
    for target, axes in ((single(ensemble(), 1), (0, None)), (ensemble(), 0)):
        (output, inner), tree = vmap_apply(Learner(), ensemble(), ROWS, target, in_axes=axes)
        assert same(output, on_host(expected) - on_host(target["weight"]))
        assert same(tree, stepped)
        assert mapped_of(inner) == {"bias": 1, "new": 1}
        assert same([inner["new"], inner["bias"]["b"]], [tree["h"], np.ones((3, 3), np.float32)])

# ---- A plain call sees one model

TOUCHES = {
    "reads": lambda self: self.h.value,
    "writes": lambda self: setattr(self.h, "value", ZEROS),
    "makes it anew": lambda self: setattr(self, "h", HiddenState(ZEROS)),
}

SEES_ALL = {
    "apply": apply,
    "call_all": lambda model, tree: call_all(model, tree, "update"),
    "reset": reset,
    "a mapped step that closes over it": lambda model, tree: co.vmap(lambda x: apply(model, tree)[0])(ROWS),
    "a vmapped call that excludes it": functools.partial(vmap_reset, state_to_exclude=HiddenState),
}

@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
@pytest.mark.parametrize("call", SEES_ALL.values(), ids=SEES_ALL)
def test_what_is_of_all_members_is_hidden_from_a_method(call, touch):
    model = type("Touching", (Recurrent,), {"update": touch, "reset_state": touch})()
    with raises(ValueError, "'h' (HiddenState)", "vmap_apply", "vmap_reset", "vmap_call_all"):
        call(model, ensemble())

def test_what_is_hidden_comes_out_as_it_went_in():
    model = type("Showing", (Recurrent,), {"update": lambda self: repr(self.h)})()
    tree = stacked([single(ensemble(), i) for i in range(3)])  # in which the bias is mapped, too
    text, after = apply(model, tree)
    assert text.startswith("HiddenState(")
    assert same(after, tree)

def test_an_ensemble_of_layers_is_seen_one_by_one_in_a_scan_and_whole_in_a_model_that_holds_it():
    step = lambda x, layer: (apply(Linear(), layer, x)[0], None)
    assert same(jax.lax.scan(step, ONES, weights(ROWS))[0], ROWS[0] * ROWS[1] * ROWS[2])
    model = restore(Recurrent(), ensemble())
    expected = vmap_apply(Recurrent(), ensemble(), ROWS)
    assert same(apply(model, ensemble(), ROWS), expected)
    assert same(vmap_apply(model, ensemble(), ROWS), expected)

CHANGED = {
    "an axis less, though sizes coincide": {"deep": ZEROS},
    "another size": {"deep": FIVE},
    "an axis more": {"deep": np.zeros((3, 3, 3))},
    "a leaf without the axis": {"deep": ROWS, "more": np.float32(0)},
}

@pytest.mark.parametrize("value", CHANGED.values(), ids=CHANGED)
def test_but_it_keeps_the_leading_axes_of_every_leaf(value):
    model = keeper()
    model.h = mapped(State({"deep": ROWS}))
    before = frozen(model)
    for call in (
        lambda: apply(model, snapshot(model), value),
        lambda: apply(model, snapshot(model), State(value), method="replace"),
        lambda: call_all_fns([model], "update", value),
    ):
        with raises(ValueError, "h' (State)", "vmap_apply", "vmap_reset", "vmap_call_all"):
            call()
        assert frozen(model) == before

def test_methods_run_once_however_many_the_members():
    log = []
    model = [Returning(lambda: log.append(1)), Returning(lambda: log.append(2))]
    vmap_call_all(model, tree_of(), "update", axis_size=64)
    co.vmap(lambda: log.append(3), axis_size=64)()
    assert log == [1, 2, 3]

@every_model
def test_no_tracer_is_left_and_arguments_come_out_as_they_went_in(make):
    def meddle(given):
        given["x"].append(given["tree"]["bias"].pop("b"))
        return given.pop("tree")

    model, tree, x = make(), ensemble(), np.array(ROWS)
    given = {"tree": tree, "x": [x, None]}
    before = frozen([model, dict(tree), given["x"]])
    with jax.checking_leaks():
        jax.eval_shape(lambda key: life(VMAPPED, model, key, x), a_key())
    assert same(co.vmap(meddle)(given), tree)
    assert given["tree"] is tree
    assert frozen([model, dict(tree), given["x"]]) == before

def test_stack_and_member_are_inverse():
    singles = [single(ensemble(), i) for i in range(3)]
    assert same(stack(*singles), stacked(singles))
    for use in (member, jax.jit(member)):
        assert all(same(use(ensemble(), i), singles[i]) for i in range(-3, 3))

def test_a_vector_of_integers_takes_members_from_the_mapped_states_alone():
    for use in (member, jax.jit(member)):
        tree = use(ensemble(), np.array([2, 0, 2]))
        assert mapped_of(tree) == mapped_of(ensemble())
        assert same([tree["h"], tree["bias"]], [ROWS[[2, 0, 2]], ensemble()["bias"]])
    for i in (5, [7, 7]):
        assert same(member(snapshot(Mixed()), i), snapshot(Mixed()))  # where none is mapped

def test_members_are_chosen_by_integers_in_the_range():
    for i in (3, -4, [0, 3]):
        with raises(IndexError, "3"):
            member(ensemble(), i)
    for i in (1.0, None, True, [True, False, True], [[0, 1]]):
        with raises(TypeError, "integer"):
            member(ensemble(), i)

# ---- Assigning -----------------------------------------------------------------------------------

def low(name, values):
    """An array of any dtype, of those too that NumPy alone does not know, such as bfloat16."""
    return np.asarray(values, np.float32).astype(jnp.dtype(name))

of_jax = functools.partial(jax.ShapeDtypeStruct, (3,))  # of a traced array nothing else is known
FITS = {  # what is given, the dtype of the leaf that it is for (of the same shape), whether it fits
    "ints for floats": (np.arange(3), "float32", True),
    "a wider dtype": (np.ones(3), "float32", True),
    "bools for ints": (np.array([True, False, True]), "int8", True),
    "floats for complex": (ONES, "complex64", True),
    "a float": (2.5, "bfloat16", True),
    "infinities": (np.array([np.inf, -np.inf, np.nan]), "float16", True),
    "no numbers": (np.zeros((0, 3), int), "uint8", True),
    "floats for ints": (ONES, "int32", False),
    "complex for floats": (ONES * 1j, "float32", False),
    "ints for bools": (np.ones(3, int), "bool", False),
    "200 in int8": (np.array([0, 0, 200], np.uint8), "int8", False),
    "70000 in float16": (np.float32(70000), "float16", False),
    "an int in float16": (70000, "float16", False),
    "1e39 in bfloat16": (1e39, "bfloat16", False),
    "1000 in float8": (1000.0, "float8_e4m3fn", False),
    "JAX ints by dtype": (of_jax("int8"), "int32", True),
    "JAX ints, be they small": (of_jax("int32"), "int8", False),
    "JAX ints, all finite": (of_jax("int32"), "float32", True),
    "JAX ints, not all finite": (of_jax("int32"), "float16", False),
    "JAX ints, some negative": (of_jax("int8"), "uint8", False),
    "JAX floats": (of_jax("float32"), "float16", True),
    "JAX floats for ints": (of_jax("float16"), "int32", False),
    "a timedelta": (np.ones(3, "m8[s]"), "int32", False),
    "text": ("1.0", "float32", False),
    "objects": (np.array([1, 2, 3], object), "int32", False),
    "a thing": (object(), "float32", False),
    "a masked array": (np.ma.masked_array(ONES), "float32", False),
    "None": (None, "float32", False),
    "raw bytes for floats": (np.zeros(3, "V2"), "float16", False),
    "raw bytes for ints": (np.zeros(3, "V1"), "int8", False),
    "raw bytes for bools": (np.zeros(3, "V1"), "bool", False),
    "raw bytes of another width": (np.zeros(3, "V4"), "bfloat16", False),
    "a structured array": (np.zeros(3, [("a", "u1")]), "int4", False),
}

def load(tree, given):
    """`assign` of one leaf `w`; a traced one is only looked at."""
    if isinstance(given, jax.ShapeDtypeStruct):
        return jax.eval_shape(functools.partial(load, tree), given)
    return assign(tree, {"w": given}).state["w"]

@pytest.mark.parametrize("given, dtype, fits", FITS.values(), ids=FITS)
def test_what_fits(given, dtype, fits):
    tree = tree_of(w=low(dtype, np.zeros(np.shape(given))))
    if fits:
        leaf = load(tree, given)
        assert (leaf.dtype, leaf.shape, leaf.weak_type) == (dtype, np.shape(given), False)
        if not isinstance(given, jax.ShapeDtypeStruct):
            assert np.asarray(leaf).tobytes() == np.asarray(given).astype(leaf.dtype).tobytes()
    else:
        with raises(ValueError, f"'w' expected {dtype}[", "got "):
            load(tree, given)

@pytest.mark.parametrize("dtype", ["int4", "int8", "uint8", "int32", "uint32"])
def test_the_limits_of_ints_fit_and_no_number_beyond(dtype):
    lowest, highest = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    for kind in (int, np.int64):
        for number in (lowest, highest):
            assert int(load(tree_of(w=low(dtype, 0)), kind(number))) == number
        for number in (lowest - 1, highest + 1):
            with raises(ValueError, f"'w' expected {dtype}[]"):
                load(tree_of(w=low(dtype, 0)), kind(number))

def test_concrete_jax_arrays_go_by_dtype_and_lose_their_weak_type():
    tree, weak = tree_of(w=np.int32(0), x=0.0), jnp.asarray(2.5)
    assert weak.weak_type
    after = assign(tree, {"w": jax.device_put(np.int8(3)), "x": weak}).state
    assert same(after, tree_of(w=np.int32(3), x=np.float32(2.5)))
    assert not after["x"].weak_type
    with raises(ValueError, "'w' expected int32[], got uint32[]"):
        load(tree, jax.device_put(np.uint32(3)))

NEW = {"bias": ONES, "scale": np.float32(3)}
WRITINGS = {
    "a state by path": {("W", "weight"): NEW},
    "a state by name": {"W.weight": NEW},
    "leaves by path": {("W", "weight", "bias"): ONES, ("W", "weight", "scale"): 3},
    "leaves by name": {"W.weight.bias": ONES, "W.weight.scale": 3.0},
    "nested dicts": {"W": {"weight": NEW}},
    "a mixture": {("W",): {"weight.bias": ONES, ("weight", "scale"): 3}},
    "other mappings": {"W": OrderedDict(weight=OrderedDict(scale=3, bias=ONES))},
    "a box": {"W.weight": State(NEW)},
    "a tree": StateTree({"W.weight": HiddenState(NEW, tag="other")}),
    "a tree below a name": {"W": StateTree({"weight": State(NEW)})},
}

@pytest.mark.parametrize("given", WRITINGS.values(), ids=WRITINGS)
def test_one_leaf_is_reached_however_it_is_written(given):
    tree = StateTree({"W.weight": ParamState({"bias": ZEROS, "scale": 0.0}), "h": HiddenState(ZEROS)})
    after, unexpected, missing = assign(tree, given)
    assert (unexpected, missing) == ([], [("h",)])
    assert same(after, tree | StateTree({"W.weight": ParamState(NEW)}))

def test_names_with_dots_and_numbers_are_reached_too():
    tree = StateTree({("t", "a.b"): State(ZEROS), ("t", "0"): State({"x.y": ZEROS}), "t.1": State([ZEROS])})
    by_key = {"t": {"a.b": ONES, "0": {"x": {"y": ONES}}, 1: {0: ONES}}}
    by_path = {("t", "a.b"): ONES, ("t", "0", "x.y"): ONES, ("t", 1): [ONES]}
    for given in (dict.fromkeys(flat_dict(tree), ONES), by_key, by_path):
        after, *rest = assign(tree, given)
        assert rest == [[], []]
        assert same(jax.tree.leaves(after), [ONES] * 3)

def test_later_snapshots_win_and_unexpected_and_missing_are_sorted_paths_of_leaves():
    tree = StateTree({f"layers.{i}": ParamState({"b": ZEROS, "w": ZEROS}) for i in (2, 10)})
    tree = tree | tree_of(none=None, empty=())  # which have no leaves
    layers = {10: {"b": ROWS, "c": [ONES]}, 3: {"b": ONES}}
    after, *rest = assign(tree, {"z": 1, 5: {"y": ONES}, "layers": layers}, {"layers.10.b": ONES, "a.x": ONES})
    assert rest[0] == [(5, "y"), ("a", "x"), ("layers", 3, "b"), ("layers", 10, "c", 0), ("z",)]
    assert rest[1] == [("layers", 2, "b"), ("layers", 2, "w"), ("layers", 10, "w")]
    assert same(after["layers.10"], {"b": ONES, "w": ZEROS})
    assert assign(tree, tree)[1:] == ([], [])
    for given in (3, [("w", 1)], None):
        with raises(TypeError, "a snapshot is a mapping", type(given).__name__):
            assign(tree, given)

def test_all_that_does_not_fit_is_listed_and_nothing_is_assigned():
    model = {"a": keeper(ZEROS), "b": keeper({"x": np.int32(0), "y": [ZEROS]}), "c": keeper(ZEROS)}
    before, tree = frozen(model), snapshot(model)
    given = {"a.h": ROWS, "b.h": {"x": 0.5, "y": [ONES[:1]]}, "c.h": ONES}
    words = ["'a.h' expected float32[3], got float32[3,3]", "'b.h.x' expected int32[], got float"]
    for use in (assign, co.assign_state_values):
        target = tree if use is assign else model
        with raises(ValueError, *words, "'b.h.y.0' expected float32[3], got float32[1]") as info:
            use(target, given)
        assert "'c.h'" not in str(info.value)
    assert frozen(model) == before
    assert same(tree, snapshot(model))

def test_keys_are_written_as_keys_or_as_their_data():
    tree, data = tree_of(w=a_key()), np.array([1, 2], np.uint32)
    assert same(load(tree, data), jax.random.wrap_key_data(data))
    assert same(load(tree, a_key(1)), a_key(1))

def test_keys_that_do_not_fit_are_told_in_one_unit():
    for make, words in (
        (lambda: jax.random.key(0, impl="rbg"), "key<fry>[], got key<rbg>[]"),
        (lambda: jax.random.split(jax.random.key(0), 3), "key<fry>[], got key<fry>[3]"),
        (lambda: np.zeros((3, 2), np.uint32), "uint32[2], got uint32[3,2]"),
    ):
        with raises(ValueError, f"'w' expected {words}"):
            jax.eval_shape(lambda key: load(tree_of(w=key), make()), a_key())

def test_all_that_npz_writes_is_read_back_raw_bytes_too(tmp_path):
    raw = {name: low(name, [1, 0, 1]) for name in ("bfloat16", "float8_e4m3fn", "int4", "uint4")}
    deep = {"list": [ROWS, np.int32(3)], "flag": np.array([True]), "half": np.ones((), np.float16)}
    tree = tree_of(key=a_key(), deep=deep, **raw)
    np.savez(tmp_path / "tree.npz", **flat_dict(tree))
    other = tree_of(key=a_key(1), deep=jax.tree.map(np.zeros_like, deep), **jax.tree.map(np.zeros_like, raw))
    with np.load(tmp_path / "tree.npz") as loaded:
        assert {loaded[name].dtype.kind for name in raw} == {"V"}
        after, *rest = assign(other, loaded)
    assert rest == [[], []]
    assert frozen(after.states()) == frozen(tree.states())

@functools.partial(jax.tree_util.register_dataclass, data_fields=["mantissa"], meta_fields=["unit"])
@dataclasses.dataclass
class Quantity:
    mantissa: Any
    unit: str

def test_a_value_in_another_unit_is_refused_and_a_mapping_is_taken():
    tree = tree_of(w=Quantity(ZEROS, "mV"))
    for given in (Quantity(ONES, "mV"), {"mantissa": ONES}):
        assert same(load(tree, given), Quantity(ONES, "mV"))
    with raises(ValueError, "'w' expected ", "'mV'", "'V'"):
        load(tree, Quantity(ONES, "V"))

def test_assigning_works_on_what_is_traced():
    tree = tree_of(w=ZEROS, x=ZEROS)
    step = jax.jit(lambda tree, w: assign(tree, {"w": w}).state)
    assert same(step(tree, np.arange(3)), tree_of(w=STEPS, x=ZEROS))
    assert same(jax.jit(functools.partial(load, tree))(STEPS), STEPS)

def test_nothing_is_compiled_for_numpy_arrays_of_new_shapes():
    load(tree_of(w=ZEROS), jnp.asarray(ONES) + 101)
    assert (before := len(COMPILED))  # what is compiled is counted
    for size in range(103, 108):
        tree = tree_of(w=np.zeros((size, 2), np.float32), n=low("int4", np.zeros(size)))
        given = {"w": np.ones((size, 2)), "n": np.ones(size, int)}
        assert np.all(np.asarray(assign(tree, given).state["w"]) == 1)
    assert len(COMPILED) == before

# ---- In place: the documented API ----------------------------------------------------------------

@every_model
def test_vmapped_calls_in_place_equal_pure_ones(make):
    def pure(model, key):
        tree = vmap_init(model, axis_size=3, key=key)
        _, stepped = vmap_apply(model, tree, ROWS)
        return [tree, stepped, vmap_reset(model, stepped, key=key)]

    def in_place(model, key):
        others = lambda path, node: node is not model
        yield snapshot(vmap_init_all_states(model, axis_size=3, key=key))
        yield snapshot(vmap_call_all_fns(model, "update", ROWS, in_axes=0, node_to_exclude=others))
        yield snapshot(vmap_reset_all_states(model, key=key))

    assert same(*jax.jit(lambda key: ([*in_place(make(), key)], pure(make(), key)))(a_key()))

TARGETS = {
    "a list": lambda model: [model, Linear()],
    "a tuple": lambda model: (model, [Linear()]),
    "a dict": lambda model: {"a": model, 0: Linear()},
}

@pytest.mark.parametrize("wrap", TARGETS.values(), ids=TARGETS)
def test_a_target_comes_back_with_the_modules_and_boxes_that_it_had(wrap):
    model = Recurrent()
    bias, target, shapes = model.bias, wrap(model), []

    def use(key):
        yield init_all_states(target, key=key)
        yield reset_all_states(target, node_to_exclude=Linear)
        yield call_all_fns(target, "update", ONES)
        yield vmap_init_all_states(target, axis_size=3, key=key)
        yield vmap_reset_all_states(target)
        yield vmap_call_all_fns(target, "update", ONES)

    look = lambda key: shapes.extend(model.h.value.shape for each in use(key) if each is target)
    jax.eval_shape(look, a_key())
    assert shapes == [(3,)] * 3 + [(3, 3)] * 3
    assert model.bias is bias

@pytest.mark.parametrize("call, size, tag", [(call_all_fns, [], []), (vmap_call_all_fns, [3], ["new"])])
def test_arguments_come_in_the_documented_order(call, size, tag):
    note = lambda self, *args, **kwargs: setattr(self, "made", State([args, kwargs]))
    model = {"a": type("Noting", (Module,), {"note": note})(), "b": Linear(), "c": Module()}
    call(model, "note", (ONES, STEPS), {"k": ZEROS}, *size, Linear, *tag, "pass")
    box, value = model["a"].made, [(ONES, STEPS), {"k": ZEROS}]
    assert (box.mapped, box.tag) == (len(size), *(tag or [None]))
    assert same(box.value, jax.tree.map(lambda leaf: np.stack([leaf] * 3), value) if size else value)
    with raises(AttributeError, "'c' (Module)", "'note'"):
        call(model, "note", (), None, *size, Linear, *tag)

def test_assigning_in_place_writes_into_the_boxes_that_are_there():
    model = {"a": init_all_states(Recurrent(), key=a_key())}
    boxes, weight = plain_walk(model)[1], model["a"].weight.value
    result = co.assign_state_values(model, {"a.bias": {"b": STEPS, "new": ONES}}, {"a.h": STEPS}, {"a.h": ONES})
    assert result == ([("a", "bias", "new")], [("a", "bias", "scale"), ("a", "weight")])
    assert plain_walk(model)[1] == boxes  # which compare by identity
    assert same([boxes["a", name].value for name in ("h", "weight")], [ONES, weight])
    assert same(boxes["a", "bias"].value, {"b": STEPS, "scale": np.float32(2)})

class Layer(Module):
    """What the documentation has: a layer that takes the size of a batch."""

    def init_state(self, *batch):
        self.weight = ParamState({"bias": ONES, "weight": ROWS})
        self.h = HiddenState(np.zeros((*batch, 3), np.float32))

    def reset_state(self):
        self.h.value = jnp.zeros_like(self.h.value)

    def update(self, x):
        self.h.value = self.h.value + x @ self.weight.value["weight"]

    def take_mean(self):
        self.mean = self.weight.value["weight"].mean()

class Forwarding(Module):
    """A parent that passes the call on, though it reaches the child by itself, and before."""

    def __init__(self):
        self.child, self.log = Layer(), []

    @call_order(1)
    def init_state(self, *batch):
        self.log.append(self.child.h.value.shape)
        self.child.init_state(5)

def test_the_documented_life_of_a_model():
    model = init_all_states(Forwarding(), 4)
    assert (model.log, model.child.h.value.shape) == ([(4, 3)], (5, 3))
    call_all_fns(model, "take_mean", node_to_exclude=Forwarding)
    assert model.child.mean == 4
    init_all_states(model, node_to_exclude=Forwarding)
    assert (model.log, model.child.h.value.shape) == ([(4, 3)], (3,))

def test_the_documented_life_of_an_ensemble():
    model = vmap_init_all_states(Layer(), axis_size=3, state_to_exclude=ParamState)
    saved, before = {}, snapshot(model)
    for path, state in model.states().items():
        parts = state.value if isinstance(state.value, dict) else {(): state.value}
        saved.update({path + ((key,) if key else ()): value for key, value in parts.items()})
    vmap_call_all_fns(model, "update", ROWS, in_axes=0)
    assert same([model.h.value, model.weight.value["weight"]], [ROWS @ ROWS, ROWS])
    vmap_reset_all_states(model, axis_size=3)
    assert same(snapshot(model), before)
    vmap_call_all_fns(model, "update", ROWS, in_axes=0)
    assert co.assign_state_values(model, saved) == ([], [])
    assert same(snapshot(model), before)

# ---- Slow: transformations, optimisers, nested ensembles -----------------------------------------

def three_members():
    weight, h = mapped(ParamState(ROWS / 9)), mapped(HiddenState(ROWS[::-1] / 3))
    return tree_of(bias=Recurrent().bias, weight=weight, h=h)

def total_of_members(tree):
    return jnp.sum(vmap_apply(Recurrent(), tree, ROWS)[0] ** 3)

def total_of_a_loop(tree):
    members = zip(tree["h"], tree["weight"], ROWS)
    return sum(jnp.sum((h * weight + x + tree["bias"]["b"]) ** 3) for h, weight, x in members)

times = lambda number, tree: jax.tree.map(lambda leaf: number * leaf, tree)

DERIVATIVES = {
    "grad": jax.value_and_grad,
    "jvp": lambda fn: lambda tree: jax.jvp(fn, (tree,), (times(2, tree),)),
    "checkpoint": lambda fn: jax.grad(jax.checkpoint(fn)),
    "scan": lambda f: jax.grad(lambda tree: jax.lax.scan(lambda c, x: (f(times(x, tree)), c), 0.0, STEPS)[0]),
    "hessian": jax.hessian,
}

@slow
@pytest.mark.parametrize("transform", DERIVATIVES.values(), ids=DERIVATIVES)
def test_a_vmapped_call_is_transformed_like_a_loop(transform):
    got, expected = [jax.jit(transform(f))(three_members()) for f in (total_of_members, total_of_a_loop)]
    assert same(got, expected, rtol=1e-4)

@slow
@every_model
def test_three_levels_of_nested_ensembles_equal_loops(make):
    model = make()

    def life(levels, key, x):
        deep = lambda call: functools.reduce(lambda call, _: co.vmap(call), range(levels), call)
        tree = deep(lambda key: init(model, key=key))(key)
        outputs, stepped = deep(functools.partial(apply, model))(tree, x)
        return outputs, [tree, stepped, deep(lambda tree, key: reset(model, tree, key=key))(stepped, key)]

    keys, xs = jax.random.split(a_key(), (3, 3, 3)), np.arange(81, dtype=np.float32).reshape(3, 3, 3, 3)
    outputs, trees = jax.jit(functools.partial(life, 3))(keys, xs)
    assert {*mapped_of(trees[0]).values()} == {3}
    alone = jax.jit(functools.partial(life, 0))
    for at in np.ndindex(3, 3, 3):
        of_one = [functools.reduce(single, at, tree) for tree in trees]
        assert same((on_host(outputs)[at], of_one), alone(keys[at], xs[at]), rtol=1e-5)

# ---- Slow: devices -------------------------------------------------------------------------------

Spec = jax.sharding.PartitionSpec

mesh_of = lambda shape, *names: jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(shape), names)

def by_mapped(tree, of_members, shared):
    """A tree of the one where a state is mapped, of the other where it is shared."""
    places = []
    for path, box in tree.states().items():
        places += [of_members if box.mapped else shared] * len(jax.tree.leaves(box.value))
    return jax.tree.unflatten(jax.tree.structure(tree), places)

@slow
@many_devices
def test_an_ensemble_is_born_spread_and_stays_so_under_jit():
    def step(tree, done, key=a_key(1)):
        outputs, stepped = vmap_apply(Spiking(), tree, np.ones((8, 3), np.float32))
        return outputs, co.where(done, vmap_reset(Spiking(), stepped, key=key), stepped)

    born, done = lambda key: vmap_init(Spiking(), axis_size=8, key=key), np.arange(8) < 4
    places = [jax.sharding.NamedSharding(mesh_of(8, "m"), spec) for spec in (Spec("m"), Spec())]
    shardings = by_mapped(jax.eval_shape(born, a_key()), *places)
    tree = jax.jit(born, out_shardings=shardings)(a_key())
    outputs, after = jax.jit(step)(tree, done)
    assert same((outputs, after), jax.jit(step)(jax.jit(born)(a_key()), done), rtol=1e-6)
    for spread in (tree, after):
        for leaf, sharding in zip(jax.tree.leaves(spread), jax.tree.leaves(shardings)):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

@slow
@many_devices
def test_assign_keeps_shardings_and_no_device_holds_the_whole():
    mesh, second, third = mesh_of((4, 2), "x", "y"), *jax.devices()[1:3]
    specs = {8: Spec("x"), 4: Spec("x", "y"), 32: Spec(), 16: Spec(None, "y")}
    places = {str(size): jax.sharding.NamedSharding(mesh, spec) for size, spec in specs.items()}
    boxes = {name: State(jax.device_put(np.zeros((8, 4), np.float32), place)) for name, place in places.items()}
    keys = jax.device_put(jax.random.split(a_key(), 8), places["8"])
    tree = StateTree(boxes) | tree_of(second=jax.device_put(ZEROS, second), keys=keys)
    values, data = np.arange(32, dtype=np.float32).reshape(8, 4), on_host(keys)[::-1]
    for given in (np.float64(values), jnp.asarray(values)):
        with jax.default_device(third):
            after = assign(tree, dict.fromkeys(places, given), {"second": ONES, "keys": data}).state
        assert [leaf.sharding for leaf in after.values()] == [leaf.sharding for leaf in tree.values()]
        assert same([after["second"], on_host(after["keys"])], [ONES, data])
        for name in places:
            assert {shard.data.size for shard in after[int(name),].addressable_shards} == {int(name)}
            assert same(after[int(name),], values)
    free = jax.jit(lambda new: assign(tree, {"second": new}).state["second"])
    assert free(jax.device_put(ONES, third)).devices() == {third}  # what is traced stays where it is

@slow
@many_devices
def test_vmapped_calls_run_inside_shard_map():
    def loss(tree, xs):
        outputs, tree = vmap_apply(Recurrent(), tree, xs)
        return jax.lax.pmean(jnp.mean(outputs**2), "m"), tree

    tree = jax.jit(lambda key: vmap_init(Recurrent(), axis_size=16, key=key))(a_key())
    xs, specs = np.arange(48, dtype=np.float32).reshape(16, 3), by_mapped(tree, Spec("m"), Spec())
    options = {"in_specs": (specs, Spec("m")), "out_specs": (Spec(), specs)}
    spread = jax.jit(jax.shard_map(loss, mesh=mesh_of(8, "m"), **options))
    value, after = spread(tree, xs)
    assert np.allclose(value, np.mean((xs + 1) ** 2), rtol=1e-5)
    assert same(after["h"], xs)
    slopes = jax.grad(lambda tree: spread(tree, xs)[0])(tree)
    assert same(slopes["bias"]["b"], 2 * (xs + 1).mean(axis=0) / 3, rtol=1e-5)

class Noisy(Module):
    """Its constants are JAX's, since `jax.vmap` does not spread NumPy's over a mesh."""
    def __init__(self):
        self.bias = ParamState(jnp.ones(3))

    def init_state(self, key):
        self.h = HiddenState(jax.random.uniform(key, (3,)))

    def update(self, x=0, key=None):
        noise = 0 if key is None else jax.random.uniform(key, (3,))
        self.h.value = self.h.value + x * self.bias.value + noise

    reset_state = update

def noisy_step(tree, x):
    slope = jax.grad(lambda tree: jnp.sum(apply(Noisy(), tree, x)[1]["h"] ** 2))(tree)
    return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, tree, slope)

built = lambda keys: co.vmap(lambda key: init(Noisy(), key=key))(keys)
one_bias = lambda keys: partition(built(keys), HiddenState)[0] | snapshot(Noisy())
MESH_CALLS = {
    "a constructor": lambda keys, xs: built(keys),
    "the start of an optimiser": lambda keys, xs: co.vmap(partial(times, 0))(built(keys)),
    "a train step": lambda keys, xs: co.vmap(noisy_step)(built(keys), xs),
    "vmap_apply": lambda keys, xs: vmap_apply(Noisy(), one_bias(keys), xs),
    "vmap_apply with key=": lambda keys, xs: vmap_apply(Noisy(), one_bias(keys), xs, key=a_key()),
    "vmap_reset with key=": lambda keys, xs: vmap_reset(Noisy(), one_bias(keys), key=a_key()),
}

@slow
@many_devices
@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs explicit meshes")
@pytest.mark.parametrize("call", MESH_CALLS.values(), ids=MESH_CALLS)
def test_an_explicit_mesh_changes_nothing_but_where_arrays_lie(call):
    mesh = jax.make_mesh((8,), ("m",))
    if "Explicit" not in str(mesh.axis_types):
        pytest.skip("the axes of a mesh are not explicit")
    args = jax.random.split(a_key(), 8), np.arange(24, dtype=np.float32).reshape(8, 3)
    expected = call(*args)
    with jax.set_mesh(mesh):
        got = call(*jax.device_put(args, jax.sharding.NamedSharding(mesh, Spec("m"))))
    assert same(got, expected, rtol=1e-5)
    of_members = [leaf for leaf in jax.tree.leaves(got) if leaf.shape[:1] == (8,)]
    assert {tuple(leaf.sharding.spec)[:1] for leaf in of_members} == {("m",)}

# ---- Slow: many states, other programs, documents ------------------------------------------------

@slow
def test_functions_of_paths_take_no_seconds_for_10000_states_and_500_nested_modules():
    search, select = lambda tree: tree.get("nothing"), partial(partition, filter=ParamState)
    inner, choose = lambda tree: subtree(StateTree({"x": tree}), "x"), lambda tree: co.where(True, tree, tree)
    for tree in (StateTree({f"wide.{i}": BOX() for i in range(10_000)}), snapshot(chain(500))):
        for use in (search, select, inner, choose, repr):
            start = time.process_time()  # other programs do not count
            use(tree)
            assert time.process_time() - start < 2

@slow
def test_shared_states_that_differ_are_refused_in_linear_time():
    def seconds(number):
        model, start = [keeper(ZEROS) for _ in range(number)], time.perf_counter()
        with raises(ValueError, "shared states ended up different"):
            vmap_call_all(model, snapshot(model), "update", ROWS, in_axes=0)
        return time.perf_counter() - start

    seconds(10)
    assert seconds(2000) < 4 * seconds(1000)

@slow
def test_a_step_of_flat_dicts_is_exported():
    from jax import export

    tree, flat = three_members(), flat_dict(three_members())
    step = lambda flat: flat_dict(vmap_apply(Recurrent(), assign(tree, flat).state, ROWS)[1])
    after = export.export(jax.jit(step))(flat).call(flat)  # to serialise it takes flatbuffers
    assert same(after, {**flat, "h": ROWS[::-1] / 3 * (ROWS / 9) + ROWS}, rtol=1e-6)

@slow
def test_the_examples_of_all_docstrings_hold():
    failed, attempted = doctest.testmod(co, optionflags=doctest.ELLIPSIS)
    assert (failed, attempted > 50) == (0, True)

@slow
@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="needs the README")
def test_the_examples_of_the_readme_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text().replace("```", "\n")
    examples = doctest.DocTestParser().get_doctest(text, {}, "README.md", None, 0)
    failed, attempted = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples)
    assert (failed, attempted > 9) == (0, True)

@slow
def test_the_file_shows_its_example_and_notices_a_wrong_result(tmp_path):
    source, command = Path(co.__file__).read_text(), [sys.executable, "collective.py"]
    for results, status in (("(3, 3)", 0), ("(4, 3)", 1)):
        (tmp_path / "collective.py").write_text(source.replace("\n(3, 3)\n", f"\n{results}\n", 1))
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (shown.returncode, shown.stderr) == (status, "")
        number = co.__doc__.count("\n>>> ")
        last = rf"\n{number - status} of {number} [^\n]* jax {re.escape(jax.__version__)} [^\n]*\.\n$"
        assert re.search(last, shown.stdout)
        assert not re.search(r"\b_[a-z]", shown.stdout)

@slow
@pytest.mark.skipif(not (HERE / "pyproject.toml").exists(), reason="needs the project")
def test_versions_are_stated_alike():
    project, readme = [(HERE / name).read_text() for name in ("pyproject.toml", "README.md")]
    for name, stated in (("jax", '"jax>=(.*)"'), ("Python", 'requires-python = ">=(.*)"')):
        floor = re.search(stated, project)[1]
        assert re.search(rf"{name} *>= *{re.escape(floor)}(?![\d.]*\d)", readme), name
    assert "collective.__version__" in project

@slow
def test_only_public_jax_and_the_standard_library_are_used():
    nodes = [*ast.walk(ast.parse(Path(co.__file__).read_text()))]
    used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in used} - {*sys.stdlib_module_names} == {"jax", "numpy"}
    used |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    private = re.compile(r"(jax|jnp|np|tree_util)\.(.*\.)?(_[a-z]|core\b|interpreters\b)")
    assert not [*filter(private.match, used)]

@slow
def test_everything_public_is_listed_and_shown_by_an_example():
    things = [thing for thing in vars(co).values() if inspect.isclass(thing) or inspect.isfunction(thing)]
    own = {thing.__name__: thing for thing in things if thing.__module__ == co.__name__}
    public = {name for name in own if name[0] != "_"} - {"Assigned"}
    assert public == {*co.__all__} - {"MAX_ORDER", "Path"}
    plain = {name for name in public if ">>> " not in own[name].__doc__}
    assert plain == {"LongTermState", "ShortTermState", "ParamState", "HiddenState"}

# ---- What things cost, as ratios to their limits -------------------------------------------------

class Cheap(Module):
    """One state that fades towards what comes in."""
    def __init__(self, value):
        self.state = State(value)

    def nothing(self):
        pass

    def reset_state(self):
        self.state.value = jnp.zeros(8)

    def update(self, x):
        self.state.value = self.state.value * 0.9 + x

class Group(Module):
    nothing = Cheap.nothing

    def __init__(self, number):
        self.cells = [*map(Cheap, [jnp.zeros(8)] * number)]

    def update(self, x):
        for cell in self.cells:
            cell.update(x)

def in_turns(ours, other=lambda: None, rounds=15, repeat=1):
    """The median seconds of two calls, timed in turns, so that a noisy moment hits both."""
    seconds = [[], []]
    for _ in range(rounds + 1):
        for call, each in zip((ours, other), seconds):
            start = time.perf_counter()
            for _ in range(repeat):
                jax.block_until_ready(call())
            each.append((time.perf_counter() - start) / repeat)
    return [float(np.median(each[1:])) for each in seconds]  # the first round compiles

def ratio(*calls, **options):
    return np.divide(*in_turns(*calls, **options))

def more(ours, other=lambda: None, each=1, **options):
    """Microseconds that our call takes more than the other, for each of some number of parts."""
    ours, other = in_turns(ours, other, **options)
    return (ours - other) / each * 1e6

def lowered(function, *args):  # a new function each time, or JAX would remember the last
    return lambda: jax.jit(lambda *args: function(*args)).lower(*args) and None

def costs_of_jitted_steps():
    for number in (1, 10, 1000):
        tree = snapshot(Group(number))
        leaves = tuple(jax.tree.leaves(tree))
        step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))
        calls = functools.partial(step, tree), functools.partial(step, leaves)
        if number < 1000:
            yield f"jitted step, {number} states, us above a tuple's", more(*calls, rounds=51, repeat=100), 1.2
    yield "jitted step / a tuple's", ratio(*calls, rounds=51), 1.05
    ours, model = jax.jit(lambda state: reset(model, state)), Group(1000)
    bare = jax.jit(lambda leaves: tuple(jnp.zeros(8) for _ in leaves))
    yield "jitted reset / a tuple's", ratio(lambda: ours(tree), lambda: bare(leaves), rounds=51), 1.05

def costs_of_tracing():
    model, x = Group(1000), jnp.ones(8)
    tree = snapshot(model)
    leaves = tuple(jax.tree.leaves(tree))
    ensemble, many = stack(tree, tree), tuple(jnp.stack([leaf, leaf]) for leaf in leaves)
    step = lambda leaves, x: tuple(leaf * 0.9 + x for leaf in leaves)
    again = lambda leaves: tuple(jnp.zeros(8) for _ in leaves)
    stepped, reset_again = jax.vmap(step, (0, None)), jax.vmap(again)
    pairs = {
        "apply": (lambda s, x: apply(model, s, x), step, (tree, x), (leaves, x), 1.2),
        "reset": (lambda s: reset(model, s), again, (tree,), (leaves,), 1.2),
        "vmap_apply": (lambda s, x: vmap_apply(model, s, x, in_axes=None), stepped, (ensemble, x), (many, x), 1.5),
        "vmap_reset": (lambda s: vmap_reset(model, s), reset_again, (ensemble,), (many,), 1.5),
    }
    for name, (ours, bare, our_args, bare_args, limit) in pairs.items():
        yield f"trace {name} / tuples", ratio(lowered(ours, *our_args), lowered(bare, *bare_args), rounds=9), limit

def costs_of_eager_calls():
    for number in (100, 1000, 10_000):
        model = Group(number)
        tree = snapshot(model)
        bare = lambda: [cell.nothing() for cell in model.cells]
        options = {"each": number, "rounds": 20_000 // number + 5}
        us = more(lambda: call_all_fns(model, "nothing") and None, bare, **options)
        yield f"call_all_fns, us for each of {number:,} modules", us, 10
        us = more(lambda: call_all(model, tree, "nothing") and None, bare, **options)
        yield f"pure call, us for each of {number:,} modules", us, 25
    tree = snapshot(Group(1000))
    flat, new, mask = flat_dict(tree), jax.tree.map(lambda leaf: leaf + 1, tree), jnp.arange(8) < 4
    leaves = [*zip(jax.tree.leaves(new), jax.tree.leaves(tree))]
    for name, call, limit in (
        ("assign of a tree", lambda: assign(tree, tree).state, 20),
        ("assign of JAX arrays", lambda: assign(tree, flat).state, 20),
        ("partition", lambda: partition(tree, State), 4),
        ("flat_dict", lambda: flat_dict(tree), 4),
    ):
        yield f"{name}, us for each state", more(call, each=1000), limit
    bare = lambda: [jnp.where(mask, *pair) for pair in leaves]
    yield "eager where / jnp.where of leaves", ratio(lambda: co.where(mask, new, tree), bare, rounds=5), 3
    arrays = [{str(i): np.ones((50 * j + i + 1, 3)) for i in range(50)} for j in range(16)]
    single = [[array.astype(np.float32) for array in each.values()] for each in arrays]
    pairs = [(StateTree(dict(zip(new, map(State, old)))), new) for new, old in zip(arrays, single)]
    ours, bare = map(iter, (pairs, single))
    new_shapes = ratio(lambda: assign(*next(ours)).state, lambda: jax.device_put(next(bare)))
    yield "the first assign of 50 new shapes / device_put", new_shapes, 3

def cost_of_the_import(tmp_path):
    code = "import time, jax; start = time.perf_counter(); import collective; print(time.perf_counter() - start)"
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    run = lambda: subprocess.check_output([sys.executable, "-c", code], cwd=HERE, env=environment)
    yield "import collective after import jax, ms", 1e3 * float(np.median([float(run()) for _ in range(6)])), 20

@bench
def test_bench_prints_costs_as_ratios_to_their_limits(tmp_path, capsys):
    gc.collect()
    gc.freeze()  # or collections of what was made before would fall to one side or the other
    rows = [*costs_of_jitted_steps(), *costs_of_tracing(), *costs_of_eager_calls(), *cost_of_the_import(tmp_path)]
    gc.unfreeze()
    with capsys.disabled():
        print(f"\njax {jax.__version__} on {jax.devices()[0].device_kind}")
        print(f"{'':<52}{'cost':>12}{'limit':>12}{'ratio':>8}")
        for name, cost, limit in rows:
            print(f"{name:<52}{cost:>12.2f}{limit:>12.2f}{cost / limit:>8.2f}")

# ---- The count of compilations; it stays last -----------------------------------------------------

def test_the_quick_run_compiles_little(capsys):
    with capsys.disabled():
        print(f"\ncompiled {len(COMPILED)} computations")
    assert SLOW or BENCH or len(COMPILED) <= 250
