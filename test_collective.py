# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the collective-states authors
"""The suite of collective.py: put the two files side by side and run `python -m pytest`.

    python -m pytest                               quick: half a minute at most
    COLLECTIVE_SLOW=1 python -m pytest             also depth, threads, devices, README
    COLLECTIVE_BENCH=1 python -m pytest -sk bench  prints what things cost, as ratios

The tables of named cases are the shortest way to learn the rules. To stay quick, tests use one shape, `float32[3]`,
three members, and NumPy constants, which compile nothing.
"""

import os
import sys

if "jax" not in sys.modules:  # eight devices for the tests of sharding
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {flags}"

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import doctest
import functools
import gc
import importlib.util
import inspect
import itertools
import pickle
import random
import re
import subprocess
import time
import warnings
import weakref
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import collective as co
from collective import (
    HiddenState,
    LongTermState,
    Module,
    ParamState,
    ShortTermState,
    State,
    StateTree,
    apply,
    assign,
    assign_state_values,
    call_all,
    call_all_fns,
    call_order,
    flat_dict,
    init,
    init_all_states,
    member,
    partition,
    reset,
    reset_all_states,
    restore,
    snapshot,
    stack,
    subtree,
    traverse,
    vmap,
    vmap_apply,
    vmap_call_all,
    vmap_call_all_fns,
    vmap_init,
    vmap_init_all_states,
    vmap_reset,
    vmap_reset_all_states,
    where,
)

HERE = Path(co.__file__).parent
SLOW = os.environ.get("COLLECTIVE_SLOW")
BENCH = os.environ.get("COLLECTIVE_BENCH")
slow = pytest.mark.skipif(not SLOW, reason="runs with COLLECTIVE_SLOW=1")
bench = pytest.mark.skipif(not BENCH, reason="runs with COLLECTIVE_BENCH=1")
many_devices = pytest.mark.skipif("len(jax.devices()) < 8", reason="needs eight devices")

COMPILED = []  # one entry for each computation that XLA compiled since this file began

def count_compilation(event, seconds, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)

jax.monitoring.register_event_duration_secs_listener(count_compilation)

@pytest.fixture(scope="module", autouse=True)
def forget_what_other_files_compiled():
    COMPILED.clear()

def cases(names, table):
    """One test for each row of a table, under the row's name."""
    return pytest.mark.parametrize(names, table.values(), ids=table)

def each(name, *values):
    """One test for each of these values."""
    name_of = lambda value: getattr(value, "__name__", repr(value))
    return pytest.mark.parametrize(name, values, ids=name_of)

# ---- The models ----------------------------------------------------------------------------------
ZEROS = np.zeros(3, np.float32)
ONES = np.ones(3, np.float32)
STEPS = np.arange(3, dtype=np.float32)
ROWS = np.arange(9, dtype=np.float32).reshape(3, 3)  # one for each of three members
FIVE = np.zeros((5, 3), np.float32)
LEGACY = np.zeros(2, np.uint32)  # a_key(0), as keys were before they had a type
for constant in (ZEROS, ONES, STEPS, ROWS, FIVE, LEGACY):
    constant.setflags(write=False)  # so that no test can change another's

EMPTY = StateTree({})
BOX = partial(State, ONES)

@functools.cache
def a_key(number=0):
    """A key, made when it is asked for: nothing is computed while pytest collects."""
    with jax.ensure_compile_time_eval():  # under a trace, too
        return jax.random.key(number)

def uniform(key):
    return jax.random.uniform(key, (3,))

class Recurrent(Module):
    """A bias that all members share; a weight and a hidden state for each of them."""
    def __init__(self):
        self.bias = ParamState({"b": ONES, "scale": np.float32(2)})

    def init_state(self, *, key):
        self.weight = ParamState(uniform(key))
        self.h = HiddenState(ZEROS)

    def reset_state(self):
        self.h.value = ZEROS

    def update(self, x):
        self.h.value = self.h.value * self.weight.value + x
        return self.h.value + self.bias.value["b"]

class Spiking(Module):
    """Draws its potential at every reset; keeps traces in a list that `init_state` makes."""
    def __init__(self):
        self.threshold = LongTermState(1)
        self.traces = None

    def init_state(self, *, key):
        self.V = HiddenState(uniform(key))
        self.traces = [ShortTermState(ZEROS), ShortTermState(0)]

    def reset_state(self, *, key):
        self.V.value = uniform(key)
        for trace in self.traces:
            trace.value = trace.value * 0

    def update(self, x):
        self.V.value = self.V.value + x - self.threshold.value
        for trace in self.traces:
            trace.value = trace.value + 1
        return self.V.value

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
        self.h = HiddenState(uniform(key))

    def reset_state(self):
        self.h.value = ZEROS

    def update(self, x):
        self.h.value = self.h.value + self.second(x)
        return self.tied(self.h.value)

Pair = collections.namedtuple("Pair", "left right")

class Mixed(Module):
    """States and modules in every kind of container, under strings and numbers."""
    def __init__(self):
        self.table = {10: State(STEPS), 9: BOX(), "b": [BOX()]}
        nested = [Linear(), {"deep": (Linear(ONES), "text")}]
        self.pair = Pair(nested, BOX())
        self.ordered = OrderedDict(z=BOX(), a=None)
        self.lists = defaultdict(list, k=[BOX()])

    def init_state(self, *, key):
        self.ordered["a"] = HiddenState(uniform(key))
        self.lists["new"].append(HiddenState(ZEROS))

    def reset_state(self):
        self.ordered["a"].value = ZEROS

    def update(self, x):
        hidden = self.ordered["a"]
        hidden.value = hidden.value + x
        return self.pair.left[0](hidden.value)

class Keeper(Module):
    """Keeps what it is given, in a new state or in the one that it has."""
    def init_state(self, given):
        self.h = HiddenState({"deep": [given]})

    def update(self, given):
        self.h.value = given

    def replace(self, h):
        self.h = h

def holds(part):
    model = Module()
    model.part = part
    return model

def keeper(value=ONES):
    model = Keeper()
    model.h = State(value)
    return model

def module_with(base=Module, **methods):
    """A module of a class of its own, with these methods."""
    return type("Own", (base,), methods)()

MODELS = {
    "recurrent": Recurrent,
    "spiking": Spiking,
    "shared": SharedWeights,
    "mixed": Mixed,
}
every_model = cases("make", MODELS)

FORMS = {  # `form(model, name, *args, **options)` calls a method of all nodes
    "call_all": lambda m, *args, **options: call_all(
        m, snapshot(m), *args, **options
    ),
    "call_all_fns": call_all_fns,
    "vmap_call_all": lambda m, *args, **options: vmap_call_all(
        m, snapshot(m), *args, axis_size=3, **options
    ),
    "vmap_call_all_fns": partial(vmap_call_all_fns, axis_size=3),
}
every_form = cases("form", FORMS)

class Node(Module):
    """A node of a random graph: it counts, draws and creates."""
    def init_state(self, *, key):
        if self.creates:
            self.fresh = HiddenState(uniform(key))

    def reset_state(self, *, key):
        if self.creates:
            self.fresh.value = uniform(key)

    def update(self):
        mine = [part for part in vars(self).values() if isinstance(part, State)]
        for state in mine:
            state.value = state.value * 2 + 1
        return [state.value for state in mine]

def random_graph(seed):
    """Nodes with shared children and states, cycles through `parent`, and nested containers."""
    rng = random.Random(seed)
    nodes = [Node() for _ in range(rng.randint(2, 7))]
    shared = [State(STEPS + number) for number in range(3)]
    for index, node in enumerate(nodes):
        node.creates = rng.random() < 0.5
        for name in rng.sample("abcdef", rng.randint(0, 4)):
            own = State(STEPS * rng.random())
            setattr(node, name, rng.choice([*shared, own, 3, None]))
        below = nodes[index + 1 :]
        for name in rng.sample("xyz", min(2, len(below))):
            child = rng.choice(below)
            child.parent = node
            nested = ([{"deep": (child,)}], 1)
            holders = [child, [child], {3: child, "k": BOX()}, nested]
            setattr(node, name, rng.choice(holders))
    return nodes[0]

# ---- What the tests compare with -----------------------------------------------------------------
def on_host(leaf):
    """A leaf as NumPy, with keys as their data."""
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

def same(one, two, tolerance=0.0):
    """Whether two pytrees have the same structure, shapes, dtypes and values."""
    if jax.tree.structure(one) != jax.tree.structure(two):
        return False
    for pair in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        left, right = map(on_host, pair)
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return False
        if not np.allclose(left, right, tolerance, tolerance):
            return False
    return True

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
        return type(thing), str(array.dtype), array.tolist()
    if not isinstance(thing, WITH_PARTS):
        return repr(thing)
    if id(thing) in seen:
        return "again", seen[id(thing)]
    seen[id(thing)] = len(seen)
    parts = parts_of(thing).items()
    return type(thing), [(name, frozen(part, seen)) for name, part in parts]

def plain_walk(root):
    """Modules and states by first path, with recursion: the plainest reading of the contract."""
    modules, states, seen = {}, {}, set()

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
            modules[path] = thing

    visit((), root)
    return modules, states

def dotted(path):
    return ".".join(map(str, path))

def names_of(paths):
    return " ".join(map(dotted, paths))

def times(number, tree):
    return jax.tree.map(lambda leaf: number * leaf, tree)

def mapped_of(tree):
    return {dotted(path): box.mapped for path, box in tree.states().items()}

def mapped(box, count=1):
    """A box whose value already has leading axes, one entry for each member."""
    box.mapped = count
    return box

def tree_of(**parts):
    """A tree of boxes; what is no box goes into a `State`."""
    for name, part in parts.items():
        if not isinstance(part, (State, StateTree)):
            parts[name] = State(part)
    return StateTree(parts)

def single(tree, index):
    """One member's tree, sliced by NumPy."""
    boxes = tree.states()
    for box in boxes.values():
        if box.mapped:
            box.mapped -= 1
            box.value = jax.tree.map(
                lambda leaf: np.asarray(leaf)[index], box.value
            )
    return StateTree(boxes)

def singles(tree):
    return [single(tree, index) for index in range(3)]

def stacked(results, shared=()):
    """Results of members as one result, by NumPy: all states but the shared ones gain an axis."""
    is_tree = lambda part: isinstance(part, StateTree)
    return jax.tree.map(partial(stack_parts, shared), *results, is_leaf=is_tree)

def stack_parts(shared, *parts):
    if not isinstance(parts[0], StateTree):
        return np.stack([*map(on_host, parts)])
    boxes = parts[0].states()
    for path, box in boxes.items():
        values = [part[path] for part in parts]
        if path in shared:
            assert all(same(value, box.value) for value in values), path
        else:
            box.value = stacked(values)
            box.mapped += 1
    return StateTree(boxes)

@contextlib.contextmanager
def unchanged(thing):
    """A model, or whatever `frozen` takes, is the same after it as before."""
    before = frozen(thing)
    yield
    assert frozen(thing) == before

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
    with raises(TypeError, "tag"):
        HiddenState(ONES, tag=tag)

def test_a_kind_may_forget_to_call_super():
    class Decaying(HiddenState):
        def __init__(self, value, decay):
            self.value = value * decay

    model = holds(Decaying(ONES, 0.5))
    box = init(model).states()["part",]
    assert type(box) is Decaying
    assert (box.tag, box.mapped) == (None, 0)

@each("base", Module, HiddenState)
def test_slots_are_refused_where_the_class_is_defined(base):
    slots = {"__slots__": ("extra",)}
    mix_in = type("MixIn", (), slots)
    for bases, body in (((base,), slots), ((base, mix_in), {})):
        with raises(TypeError, "Slotted", "__slots__"):
            type("Slotted", bases, body)

FILTERS = {
    "a type": (ParamState, "w"),
    "a base": (LongTermState, "w"),
    "another base": (ShortTermState, "h"),
    "a tag": ("slow", "s"),
    "a callable": (lambda path, box: path == ("h",) and box.tag is None, "h"),
    "all": (..., "h s w"),
    "True": (True, "h s w"),
    "None": (None, ""),
    "False": (False, ""),
    "any of these": ([ParamState, (None, ["slow"])], "s w"),
}
@cases("filter, passing", FILTERS)
def test_a_filter_lets_pass(filter, passing):
    tree = tree_of(
        w=ParamState(ONES), h=HiddenState(ZEROS), s=State(ONES, tag="slow")
    )
    matching, rest = partition(tree, filter)
    assert names_of(matching) == passing
    assert {*restore(Module(), tree).states(filter)} == {*matching}
    assert same(matching | rest, tree)

@each("bad", 3, {"a"}, Module(), [ParamState, 3])
def test_what_is_no_filter_is_refused(bad):
    for use in (Module().nodes, partial(partition, EMPTY)):
        with raises(TypeError, "filter"):
            use(bad)

def test_a_filter_of_nodes_excludes_the_module_and_not_its_children():
    outer = Recurrent()
    outer.inner = Recurrent()
    outer.tag = "top"
    assert list(outer.nodes("top")) == [()]
    tree = init(
        outer, key=a_key(), node_to_exclude=lambda path, node: node is outer
    )
    assert names_of(tree) == "bias inner.bias inner.h inner.weight"

def test_a_predicate_that_changes_what_it_is_shown_changes_nothing():
    def spoil(path, box):
        box.value["w"] = box.tag = "spoilt"

    tree = tree_of(a={"w": ONES})
    before = frozen(tree.states())
    _, rest = partition(tree, spoil)
    assert frozen(tree.states()) == frozen(rest.states()) == before

# ---- Modules and the walk ------------------------------------------------------------------------
GRAPHS = MODELS | {f"graph {i}": partial(random_graph, i) for i in range(40)}

def walk(model):
    return list(traverse(model))

WALKS = {
    "traverse": walk,
    "snapshot": snapshot,
    "init": init,
    "init_all_states": init_all_states,
}
@cases("make", GRAPHS)
def test_the_walk_is_that_of_a_plain_recursion(make):
    model = init_all_states(make(), key=LEGACY)
    modules, states = plain_walk(model)
    assert walk(model) == list(modules.items())
    assert walk(model) == list(model.nodes().items())
    assert model.states() == states
    assert {*snapshot(model)} == {*states}

@each("bad", 3, None, Module, BOX(), [3])
def test_anything_but_modules_is_no_target(bad):
    of_trees = [partial(use, state=EMPTY) for use in (apply, reset, restore)]
    for use in (*WALKS.values(), *of_trees):
        with raises(TypeError, "module"):
            use(bad)

Word = type("Word", (str,), {})

@each("key", True, 1.0, None, b"k", ("a", 1), np.int64(1), Word("w"))
def test_a_key_that_is_no_str_or_int_leads_to_no_state_and_no_module(key):
    model = Module()
    for part in (State(ONES), [Linear()]):
        model.table = {"x": {key: part}}
        for use in WALKS.values():
            with raises(TypeError, repr(key), "table", "x"):
                use(model)
    model.table = {key: [1, {key: ONES}]}
    assert len(init(model)) == 0

@each("base", list, tuple, dict)
def test_a_users_container_is_shared_and_may_hold_no_module(base):
    own = type("Own", (base,), {})
    model = holds([own([("k", 3)])])
    copied, _ = apply(model, EMPTY, "part", method="__getattribute__")
    assert copied[0] is model.part[0]
    for part in (BOX(), Linear()):
        model.part = [own([("k", part)])]
        for use in WALKS.values():
            with raises(TypeError, "part.0"):
                use(model)

def test_fields_make_no_named_tuple():
    record = type("Record", (), {"_fields": ["h"], "h": BOX()})
    assert len(snapshot(holds(record()))) == 0

def test_the_repr_of_a_module_has_a_line_for_each_part_below_its_owner():
    model = Module()
    child = Linear()
    child.parent = model
    child.hidden = mapped(HiddenState(ROWS))
    model.table = {7: State(ONES), "k": [child]}
    parts = (
        "Module",
        "7: State(float32[3])",
        "0: Linear",
        "hidden: HiddenState(float32[3,3], mapped=1)",
        "weight: ",
    )
    lines = repr(model).splitlines()
    assert all(part in line for part, line in zip(parts, lines, strict=True))
    indents = [len(line) - len(line.lstrip()) for line in lines]
    assert indents[0] < indents[2] < indents[3] == indents[4]

def test_the_repr_of_a_module_never_raises():
    model = keeper(object())
    model.bare = HiddenState.__new__(HiddenState)
    model.none = State(None)
    model.loop = [model]
    model.loop.append(model.loop)
    for part in ("bare: HiddenState(", "h: State(", "none: State(NoneType)"):
        assert part in repr(model)
    model.table = {2.5: BOX()}
    assert repr(model).startswith("Keeper")

def test_modules_mix_into_dataclasses_and_need_not_compare_hash_or_count():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Frozen(Module):
        h: State
        below: object = None
        __eq__ = __hash__ = __bool__ = __len__ = None  # each of them raises

    model = Frozen(State(ONES), [Frozen(State(ONES))])
    tree = reset(model, snapshot(model))
    assert names_of(tree) == "below.0.h h"
    assert same(snapshot(reset_all_states(model)), tree)

def test_a_plain_value_does_not_take_the_place_of_a_state():
    model = keeper()
    values = ONES, jnp.asarray(ONES), np.float32(1), 1.0, {"w": ONES, "n": "x"}
    words = "'h' is a State; write self.h.value ="
    for form in FORMS.values():
        for value in values:
            with unchanged(model), raises(TypeError, words):
                form(model, "replace", value)

@pytest.fixture(scope="module")
def another_copy():
    """The file once more, as a second package may have vendored it."""
    module = importlib.util.module_from_spec(co.__spec__)
    module.__file__ = "vendored.py"
    co.__loader__.exec_module(module)
    return module

@each("kind", "Module", "HiddenState")
def test_modules_and_states_of_another_copy_are_refused(kind, another_copy):
    foreign = getattr(another_copy, kind)
    model = Module()
    model.deep = {"k": (foreign.__new__(foreign),)}
    for use in WALKS.values():
        with raises(TypeError, kind, co.__file__, another_copy.__file__):
            use(model)

TREE_USES = {
    "partition": partial(partition, filter=...),
    "flat_dict": flat_dict,
    "where": partial(where, True, EMPTY),
    "stack": stack,
    "|": EMPTY.__or__,
    "restore": partial(restore, Module()),
    "apply": partial(apply, Module()),
    "vmap_reset": partial(vmap_reset, Module(), axis_size=3),
    "assign": assign,
}
MORE_USES = {
    "StateTree": lambda tree: StateTree({"a": tree}),
    "assign from it": partial(assign, EMPTY),
    "vmap": lambda tree: vmap(lambda trees: trees)([{"k": tree}]),
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
    restore(model, tree)
    for path, node in walk(model):
        assert node.h.value is tree[path + ("h",)]

# ---- State trees ---------------------------------------------------------------------------------
def test_paths_come_in_canonical_order_numbers_before_strings():
    for names in itertools.permutations(["b", "a.10.x", "a.9.x", "a.b"]):
        tree = StateTree({name: BOX() for name in names})
        assert names_of(tree) == "a.9.x a.10.x a.b b"

def pickled(thing):
    return pickle.loads(pickle.dumps(thing))

WAYS_BACK = {
    "boxes": lambda tree: StateTree(tree.states()),
    "a graft": lambda tree: subtree(StateTree({"x.y": tree}), ("x", "y")),
    "two parts": lambda tree: StateTree.__or__(*partition(tree, HiddenState)),
    "a pickle": pickled,
    "a pickled treedef": lambda tree: jax.tree.unflatten(
        pickled(jax.tree.structure(tree)), jax.tree.leaves(tree)
    ),
    "a deep copy": copy.deepcopy,
}
@cases("way", WAYS_BACK)
@every_model
def test_a_tree_comes_back_whole_from(make, way):
    tree = init(make(), key=a_key()) | tree_of(
        more=mapped(State({"v": ROWS}, tag="t"))
    )
    back = way(tree)
    assert same(back, tree)
    assert hash(jax.tree.structure(back)) == hash(jax.tree.structure(tree))

def test_a_look_up_takes_paths_and_dotted_names():
    tree = StateTree({"layers.0.w": BOX(), "a.01.²": BOX()})
    assert list(tree) == [("a", "01", "²"), ("layers", 0, "w")]
    for path in tree:
        assert path in tree
        assert dotted(path) in tree
        assert tree[path] is tree[dotted(path)]
    for path in ("layers.1.w", ("layers", 0), 3):
        assert path not in tree
        assert tree.get(path) is None

NOT_FOUND = {
    "a slip": (StateTree.__getitem__, "layers.0.wieght", "layers.0.weight"),
    "states below it": (
        StateTree.__getitem__,
        "layers.0",
        "subtree(tree, 'layers.0')",
    ),
    "a subtree of nothing": (subtree, "layer", "layers.0.weight"),
    "a subtree of a state": (subtree, "out", "layers.0.weight"),
    "half of a key": (subtree, "k", "k.l.w"),
}
@cases("look_up, name, word", NOT_FOUND)
def test_a_look_up_that_fails_names_the_closest_paths(look_up, name, word):
    tree = StateTree(
        {"layers.0.weight": BOX(), "out": BOX(), ("k.l", "w"): BOX()}
    )
    with raises(KeyError, repr(name), word):
        look_up(tree, name)

CLASHES = {
    "paths": lambda: StateTree({("a", "b"): BOX(), ("a.b",): BOX()}),
    "spellings": lambda: StateTree({("a", "b"): BOX(), "a.b": BOX()}),
    "leaves": lambda: tree_of(a={"b": {"c": 1}, "b.c": 2}),
    "a graft and a state": lambda: StateTree(
        {"a": tree_of(b=1), ("a.b",): BOX()}
    ),
    "parts of a model": lambda: snapshot({"a": {"b": keeper()}, "a.b": keeper()}),
}
@cases("make", CLASHES)
def test_two_paths_may_not_share_a_dotted_name(make):
    with raises(ValueError, "('a', 'b", "rename"):
        make()

@each("name", 3, (), "", None, ("a", 1.0), (True, "w"))
@each("part", BOX(), EMPTY)
def test_a_tree_has_no_other_names_than_paths(name, part):
    with raises(TypeError, repr(name)):
        StateTree({name: part})

@each("part", 1, ONES, {"h": BOX()}, Module())
def test_a_tree_is_made_of_boxes_and_trees(part):
    with raises(TypeError, "'a'"):
        StateTree({"a": part})

TOO_LARGE = np.iinfo(jax.dtypes.canonicalize_dtype(int)).max + 1

@each(
    "value",
    "text",
    [ONES, "text"],
    State(ONES),
    np.array([None]),
    np.ma.masked_array(ONES, ONES),
    TOO_LARGE,
)
def test_what_is_no_array_cannot_enter_a_tree(value):
    model = {"child": [keeper(value)]}
    for use in (snapshot, init):
        with raises(TypeError, "child.0.h"):
            use(model)
    with raises(TypeError, "'x'"):
        tree_of(x={"y": value})

def test_python_numbers_become_strongly_typed():
    tree = tree_of(a=0.0, b=1, c=True, d={"e": 1j})
    output_and_tree = apply(keeper(), tree_of(h=1), given=0.0)
    leaves = jax.tree.leaves([tree, output_and_tree])
    assert [leaf.dtype.kind for leaf in leaves] == [*"fibcf"]
    assert not any(leaf.weak_type for leaf in leaves)

def test_trees_compare_and_hash_by_identity():
    one, two = tree_of(a=1), tree_of(a=1)
    assert one == one and one != two
    assert len({one, two}) == 2

def test_the_right_side_of_a_union_wins_but_cannot_change_mapped():
    box = HiddenState(2, tag="t")
    union = tree_of(a=1, b=1) | tree_of(b=box, c=3)
    assert same(union, tree_of(a=1, b=box, c=3))
    ensemble = tree_of(b=mapped(State(ROWS)))
    for left, right in ((union, ensemble), (ensemble, union)):
        with raises(ValueError, "'b'", "mapped"):
            left | right

def test_the_repr_of_a_tree_is_a_table_of_leaves_without_contents():
    value = {"b": ONES, "n": np.zeros(1222, np.int8)}
    tree = tree_of(h=mapped(HiddenState(ROWS)), w=ParamState(value))
    table = """path  kind   value         mapped
        h    HiddenState  float32[3,3]  1
        w.b  ParamState   float32[3]    0
        w.n  ParamState   int8[1222]    0
        3 leaves, 1,234 numbers, 1,270 bytes"""
    assert repr(tree).split() == table.split()
    assert repr(jax.eval_shape(lambda: tree)) == repr(tree)

def test_a_treedef_shows_kinds_tags_and_mapped_axes():
    tree = tree_of(
        one=HiddenState(ONES, tag="slow"), two=mapped(ParamState(ROWS))
    )
    shown = "one.*HiddenState.*slow.*mapped=0.*two.*ParamState.*mapped=1"
    assert re.search(shown, str(jax.tree.structure(tree)))

def test_boxes_and_values_taken_from_a_tree_are_fresh():
    tree = tree_of(h={"v": [ONES]})
    before = frozen(tree.states())
    box = tree.states()["h",]
    box.value["v"].append(1)
    box.tag = "other"
    box.mapped = 1
    tree["h"]["v"].append(2)
    assert frozen(tree.states()) == before

VALUES_IN = {
    "the constructor": lambda value: tree_of(h={"x": [value]}),
    "snapshot": lambda value: snapshot(keeper({"x": [value]})),
    "init": partial(init, Keeper()),
    "apply": lambda value: apply(keeper(), tree_of(h=ONES), value)[1],
    "vmap_init": partial(vmap_init, Keeper(), axis_size=3),
    "assign": lambda value: assign(tree_of(h=ONES), {"h": value}).state,
}
TREES_IN = {  # trees whose leaves a `tree.map` made NumPy
    "reset": partial(reset, Module()),
    "vmap_reset": partial(vmap_reset, Module(), axis_size=3),
    "assign to a tree": lambda tree: assign(tree, {}).state,
    "assign of a tree": lambda tree: assign(tree_of(h=ONES), tree).state,
    "|": EMPTY.__or__,
    "where": lambda tree: where(True, tree, jax.tree.map(np.copy, tree)),
    "where of one tree": lambda tree: where(True, tree, tree),
    "stack": stack,
    "partition": partial(partition, filter=None),
    "a look-up": lambda tree: tree["h"],
    "restore": lambda tree: snapshot(restore(Module(), tree)),
    "flat_dict": flat_dict,
}
def check_memory(way, wrap):
    """JAX takes over memory of this alignment, so that a way into a tree must copy it."""
    memory = np.zeros(256, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 12].view(np.float32)
    leaves = jax.tree.leaves(way(wrap(array)))
    array[:] = 7
    assert leaves
    for leaf in leaves:
        assert isinstance(leaf, jax.Array)
        assert 7 not in np.asarray(leaf)

@each("wrap", np.asarray, memoryview)
@cases("way", VALUES_IN)
def test_the_memory_of_an_array_is_not_kept_by(way, wrap):
    check_memory(way, wrap)

@cases("way", TREES_IN)
def test_the_memory_of_a_tree_of_numpy_arrays_is_not_kept_by(way):
    check_memory(
        way, lambda array: jax.tree.map(lambda leaf: array, tree_of(h=ONES))
    )

def test_leaves_have_the_names_of_flat_dict_which_gives_keys_as_their_data():
    tree = StateTree(
        {"w.0": ParamState({"b": ONES, "k": a_key()}), "h": State(ROWS)}
    )
    flat = flat_dict(tree)
    assert " ".join(flat) == "h w.0.b w.0.k"
    assert flat["h"] is tree["h"]
    assert np.array_equal(flat["w.0.k"], LEGACY)
    for (path, _), name in zip(jax.tree_util.tree_leaves_with_path(tree), flat):
        assert jax.tree_util.keystr(path) == f"['{name}']"

# ---- where ---------------------------------------------------------------------------------------
MASK = np.array([True, False, True])
SQUARE = FIVE[:3]
CHOSEN = np.where(MASK[:, None], ROWS, SQUARE)

def ensemble_of(h, w):
    return tree_of(h=mapped(HiddenState(h)), w=ParamState(w))

@each("count", 0, 2)
def test_where_chooses_along_the_axes_of_the_mask(count):
    trees = []
    for h in (ROWS, SQUARE):
        trees.append(tree_of(h=mapped(HiddenState(h), count)))
    assert same(where(MASK, *trees)["h"], CHOSEN)
    chosen = where(ROWS > 4, *trees)
    assert same(chosen["h"], np.where(ROWS > 4, ROWS, SQUARE))

def test_a_mask_of_two_axes_needs_two_mapped_axes():
    old = tree_of(h=mapped(HiddenState(SQUARE), 2), p=mapped(ParamState(SQUARE)))
    new = jax.tree.map(np.ones_like, old)
    with raises(ValueError, "'p'", "(3, 3)"):
        where(ROWS > 4, new, old)

def test_where_chooses_between_keys_and_under_jit():
    data = np.arange(12, dtype=np.uint32).reshape(2, 3, 2)
    trees = [tree_of(key=jax.random.wrap_key_data(part)) for part in data]
    chosen = jax.jit(where)(MASK, *trees)
    assert same(on_host(chosen["key"]), np.where(MASK[:, None], *data))

def test_where_keeps_what_is_the_same_object_in_both():
    old = ensemble_of(SQUARE, ZEROS)
    chosen = where(MASK, ensemble_of(ROWS, old["w"]), old)
    assert chosen["w"] is old["w"]
    assert same(chosen, ensemble_of(CHOSEN, ZEROS))

NO_CHOICE = {
    "states": (
        lambda: ensemble_of(ROWS, ZEROS) | tree_of(extra=1),
        ["extra"],
    ),
    "shapes": (lambda: ensemble_of(ROWS, ONES[:2]), ["'w'"]),
    "dtypes": (lambda: ensemble_of(ROWS, MASK), ["'w'"]),
    "mapped axes": (
        lambda: single(ensemble_of(ROWS, ZEROS), 0),
        ["mapped=1", "mapped=0"],
    ),
    "shared values": (
        lambda: ensemble_of(ROWS, ONES),
        ["'w'", "jit", "partition"],
    ),
}
@cases("new, words", NO_CHOICE)
def test_where_refuses_trees_with_other(new, words):
    with raises(ValueError, *words):
        where(MASK, new(), ensemble_of(SQUARE, ZEROS))

# ---- Copy, snapshot, restore ---------------------------------------------------------------------
@every_model
def test_restore_after_snapshot_is_the_identity(make):
    model = init_all_states(make(), key=LEGACY)
    tree = snapshot(model)
    before = frozen(restore(model, tree))  # whose values are JAX's now
    reset_all_states(model, key=a_key(1))
    assert restore(model, tree) is model
    assert frozen(model) == before
    assert same(snapshot(model), tree)

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
        self.other = Linear().update
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

PLACES = {
    "None": (None, "part"),
    "an empty list": ([], "part.0 part.1"),
    "the end of a list": ([Linear(), 3], "part.2"),
    "an item that is None": ([None, Linear()], "part.0"),
    "a new key": ({"a": 1}, "part.k part.0"),
    "a new dict": (None, "part.a.5 part.a.6.0 part.0"),
    "a new dict in a dict": ({}, "part.k.l"),
    "below a module": ((Linear(),), "part.0.h.0"),
}
@cases("part, names", PLACES)
def test_a_new_state_is_put_at(part, names):
    model = holds(copy.deepcopy(part))
    new = StateTree({name: BOX() for name in names.split()})
    tree = snapshot(model) | new
    with unchanged(model):
        assert same(reset(model, tree), tree)
    assert same(snapshot(restore(model, tree)), tree)

def test_new_containers_are_lists_where_the_keys_count_from_0_and_dicts_elsewhere():
    tree = StateTree({"a.0": BOX(), "a.1.5": BOX(), "a.2.k": BOX()})
    model = restore(Module(), tree)
    assert [*map(type, [model.a, *model.a])] == [list, State, dict, dict]

NO_PLACES = {
    "an item of a tuple": (holds((None, None)), "part.0"),
    "a number": (holds(3), "part"),
    "an item of a list": (holds([3, 4]), "part.1"),
    "an item past the end": (holds([3]), "part.2"),
    "a name in a list": (holds([None]), "part.x"),
    "a number in a module": (Module(), "0"),
    "a value of a dict": (holds({"k": 3}), "part.k"),
    "a layer in a list": (holds([Linear()]), "part.1.weight"),
    "a layer in a tuple": (holds((Linear(),)), "part.1.weight"),
    "a layer in a nested list": (holds([[], [Linear()]]), "part.1.1.weight"),
    "a layer in a dict": (holds({0: Linear()}), "part.1.weight"),
    "a target that is a list": ([Linear()], "1"),
    "a target that is a tuple": ((Linear(),), "1"),
    "a target that is a dict": ({0: Linear()}, "1"),
}
@cases("model, name", NO_PLACES)
def test_there_is_no_place_for_a_new_state_at(model, name):
    tree = snapshot(model) | StateTree({name: BOX()})
    words = f"no place for these states of the tree:\n  '{name[:4]}", "None"
    for use in (restore, reset, partial(vmap_reset, axis_size=3)):
        with unchanged(model), raises(ValueError, *words):
            use(model, tree)

def test_a_tree_that_lacks_states_of_the_module_is_refused():
    model = [Recurrent(), Recurrent()]
    _, hidden = partition(init(model, key=LEGACY), ParamState)
    with raises(ValueError, "'0.bias'", "'1.bias'", "params | rest"):
        reset(model, hidden)

class Tied(Module):
    """Two layers that share a state, which each of them re-creates."""
    def __init__(self):
        self.one = Keeper()
        self.two = Keeper()
        self.one.h = self.two.h = State(ZEROS)
    def reset_state(self):
        self.two.h.value = ONES

def test_owners_that_each_re_create_a_tied_state_have_their_own_from_then_on():
    tree = init(Tied(), ROWS, node_to_exclude=Tied)
    assert names_of(tree) == "one.h two.h"
    assert same(
        tree, snapshot(init_all_states(Tied(), ROWS, node_to_exclude=Tied))
    )
    assert same(tree, snapshot(restore(Tied(), tree)))
    after = reset(Tied(), tree)
    assert same([*after.values()], [tree["one.h"], ONES])

# ---- All or nothing ------------------------------------------------------------------------------
class Vandal(Module):
    def __init__(self):
        self.inside = self.again = State({"list": [ZEROS]})
        self.tagged = State(ZEROS, tag="old")
        self.kind = State(ZEROS)
        self.table = {"k": [1]}
        self.pair = ([1], Linear())
        self.ordered = OrderedDict(b=1, a=2)
        self.lists = defaultdict(list, k=[State(ZEROS)])
        self.lost = State(ZEROS)
    def act(self, error):
        self.inside.value["list"].append(ONES)
        self.again = self.new = State(ONES)
        self.tagged.tag = "new"
        restore(self, tree_of(kind=ParamState(ONES)))
        self.table["k"].clear()
        self.pair[0].append(2)
        self.pair[1].weight = State(ONES)
        self.ordered.move_to_end("b")
        self.lists["k"][0].value = ONES
        self.lists["new"].append(1)
        del self.lost
        raise error("half way")

@every_form
def test_a_method_that_raises_leaves_all_as_it_was(form):
    model = Vandal()
    attributes = dict(vars(model))
    with unchanged(model), raises(RuntimeError, "half way") as info:
        form([model], "act", RuntimeError, node_to_exclude=Linear)
    for name, part in attributes.items():
        assert getattr(model, name) is part
    note = " ".join(info.value.__notes__)
    assert "'act'" in note and "'0' (Vandal)" in note

class NoNotes(Exception):
    add_note = None

@each("error", NoNotes, StopIteration, KeyboardInterrupt)
def test_an_odd_exception_keeps_its_type_and_puts_all_back(error):
    model = Vandal()
    for form in (FORMS["call_all"], call_all_fns):
        with unchanged(model), raises(error, "half way"):
            form(model, "act", error, node_to_exclude=Linear)

# ---- The call engine -----------------------------------------------------------------------------
def recorder(log, level, *children):
    """A module that notes its level in a log outside the model, where no copy hides it."""
    def note(self):
        log.append(level)

    method = note if level is None else call_order(level)(note)
    node = module_with(note=method)
    node.children = list(children)
    return node

@every_form
def test_undecorated_methods_run_first_then_ascending_levels(form):
    log = []
    inner = recorder(log, 1, recorder(log, 0), recorder(log, None))
    form(recorder(log, 0, inner, recorder(log, 1)), "note")
    assert log == [None, 0, 0, 1, 1]

class Echo(Module):
    def init_state(self, *args, **kwargs):
        return args, kwargs

def test_outputs_come_by_path_in_call_order_without_none():
    model = {"c": [Echo()], "a": Module(), "b": Echo()}
    outputs, _ = call_all(model, EMPTY, "init_state", [7], {"k": 8})
    given = ([7],), {"k": 8}
    assert outputs == {("b",): given, ("c", 0): given}
    assert names_of(outputs) == "c.0 b"

def test_call_order_leaves_its_level_on_the_function():
    assert co.MAX_ORDER == 10
    assert call_order()(walk).call_order == 0
    for args in ((9,), (-3, False), (10, False)):
        assert call_order(*args)(walk).call_order == args[0]

@each("level", -1, 10, 1.0, "1", None, True, len)
def test_a_level_is_an_integer_in_the_range(level):
    error = ValueError if type(level) is int else TypeError
    with raises(error, "level must be an integer", repr(level)):
        call_order(level)

class Odd(Module):
    note = 3
    gone = None

BAD_CALLS = {
    "missing": (
        AttributeError,
        "'b' (Linear), 'c.0' (Linear)",
        dict(node_to_exclude=Odd),
    ),
    "None": (
        AttributeError,
        "'c.1' (Odd)",
        dict(fn_name="gone", node_to_exclude=Linear),
    ),
    "no method": (TypeError, "'c.1' (Odd)", dict(node_to_exclude=Linear)),
    "a bad policy": (ValueError, "'ignore'", dict(fn_if_not_exist="ignore")),
    "a bad name": (TypeError, "fn_name", dict(fn_name=len)),
    "bad kwargs": (TypeError, "kwargs", dict(kwargs=[1])),
    "a bad key": (TypeError, "jax.random.key(0)", dict(key=0)),
    "two keys": (TypeError, "kwargs", dict(key=LEGACY, kwargs={"key": 1})),
}
@every_form
@cases("error, word, options", BAD_CALLS)
def test_nothing_runs_in_a_bad_call(error, word, options, form):
    log = []
    model = {
        "a": recorder(log, None),
        "b": Linear(),
        "c": [Linear(), Odd()],
    }
    options = {"fn_name": "note", "node_to_exclude": (Linear, Odd)} | options
    with raises(error, word):
        form(model, **options)
    assert log == []

@every_form
def test_nodes_without_the_method_are_passed_over_if_told_so(form):
    log = []
    model = {"a": recorder(log, None), "b": Linear()}
    with pytest.warns(UserWarning, match="'b'.*'note'") as warned:
        for policy in ("warn", "pass", "none"):
            form(model, "note", fn_if_not_exist=policy)
    assert len(log) == 3 * len(warned)

@each("call", apply, vmap_apply)
def test_apply_checks_its_method_too(call):
    for target, method, error in (
        (Odd(), "gone", AttributeError),
        (Odd(), "note", TypeError),
        ({"a": Odd()}, "update", AttributeError),
    ):
        with raises(error, repr(method)):
            call(target, EMPTY, STEPS, method=method)

# ---- Keys ----------------------------------------------------------------------------------------
class Roller(Module):
    def roll(self, key):
        return key

def drawn(model, key, method="roll"):
    """The key that each node gets, by dotted path."""
    outputs, _ = call_all(model, EMPTY, method, key=key)
    return {dotted(path): on_host(key).tolist() for path, key in outputs.items()}

GOLDEN = {  # of a_key(0) at these paths: if one changes, every model draws other numbers
    "": [3214996521, 385768613],
    "a": [925614511, 4172301366],
    "b.0": [1513102251, 4248077607],
    "b.1": [2230668142, 2784512011],
}
def test_a_node_draws_from_its_own_path_alone_in_every_process():
    model = {"b": (Roller(), Roller()), "a": Roller()}
    assert drawn(model, a_key()) | drawn(Roller(), LEGACY) == GOLDEN
    assert drawn({"a": Roller()}, a_key())["a"] == GOLDEN["a"]
    assert drawn({"a": Roller()}, a_key(1))["a"] != GOLDEN["a"]
    by_number = drawn([Roller()], a_key())
    assert by_number != drawn({"0": Roller()}, a_key())

@each("key", "key", ONES, np.uint32(0), np.zeros((3, 2), np.uint32))
def test_what_is_no_key_is_refused(key):
    with raises(TypeError, "jax.random.key(0)"):
        init(Module(), key=key)

TAKERS = {
    "a parameter": (lambda self, key: key, True),
    "a keyword": (lambda self, *args, key=None: key, True),
    "**kwargs": (lambda self, **kwargs: kwargs.get("key"), True),
    "nothing": (lambda self: None, False),
    "a positional parameter": (lambda self, key=None, /: key, False),
    "*key": (lambda self, *key: key or None, False),
}
@each("name", "update", "__call__")
@cases("method, takes", TAKERS)
def test_a_key_goes_to_methods_that_can_take_it(method, takes, name):
    keys = drawn({"a": module_with(update=method)}, a_key(), name)
    assert [*keys.values()] == [GOLDEN["a"]] * takes

@every_form
def test_a_key_that_is_required_is_asked_for(form):
    with raises(TypeError, "'key'") as info:
        form([Roller()], "roll")
    assert "key=jax.random.key(0)" in " ".join(info.value.__notes__)

def test_a_key_in_kwargs_and_the_key_of_apply_go_to_the_method_as_they_are():
    kwargs = {"key": a_key()}
    outputs, _ = call_all([Roller()], EMPTY, "roll", kwargs=kwargs)
    output, _ = apply(Roller(), EMPTY, method="roll", key=a_key())
    assert outputs[0,] is output is a_key()
    with raises(TypeError, "'key'"):
        apply(Linear(), snapshot(Linear()), ONES, key=LEGACY)

# ---- Pure calls ----------------------------------------------------------------------------------
def pure_life(model, step=apply):
    tree = init(model, key=a_key())
    lived = [tree]
    for x in ROWS:
        output, tree = step(model, tree, x)
        lived += [output, tree]
    return [*lived, reset(model, tree, key=a_key(1))]

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
    assert same(lived, pure_life(template), tolerance=1e-6)
    assert len(traces) == 1

@each("seed", *range(40))
def test_pure_calls_on_a_random_graph_equal_calls_in_place(seed):
    template = random_graph(seed)
    real = random_graph(seed)
    before = frozen(template)
    tree = init(template, key=LEGACY)
    assert same(tree, snapshot(init_all_states(real, key=LEGACY)))
    outputs, tree = call_all(template, tree, "update")
    expected = {path: node.update() for path, node in walk(real)}
    assert list(outputs) == list(expected)
    assert same([outputs, tree], [expected, snapshot(real)])
    tree = reset(template, tree, key=LEGACY)
    assert same(tree, snapshot(reset_all_states(real, key=LEGACY)))
    assert frozen(template) == before

class Creator(Module):
    def states_only(self):
        self.h = State(ONES)
        self.other = 3
    def modules(self):
        self.new = [Linear()]

def test_only_states_cross_a_pure_call():
    model = Creator()
    _, tree = apply(model, EMPTY, method="states_only")
    assert list(tree) == [("h",)]
    assert vars(model) == {}

@every_form
def test_only_call_all_fns_may_create_modules(form):
    model = {"m": Creator()}
    if form is call_all_fns:
        assert names_of(snapshot(form(model, "modules"))) == "m.new.0.weight"
        return
    with raises(ValueError, "'m.new.0' (Linear)", "__init__", "init_state"):
        form(model, "modules")
    assert vars(model["m"]) == {}

# ---- No dead tracers -----------------------------------------------------------------------------
class Looping(Module):
    """Runs its child inside a loop of JAX's, which is right only by way of trees."""
    def __init__(self, loop=None):
        self.child = Recurrent()
        self.loop = loop
    def update(self, x):
        return self.loop(self.child, x)
    def roll(self, xs):
        step = lambda tree, x: apply(self.child, tree, x)[::-1]
        tree, outputs = jax.lax.scan(step, snapshot(self.child), xs)
        restore(self.child, tree)
        return outputs

LOOPS = {
    "scan": lambda f, x: jax.lax.scan(lambda carry, x: (carry, f(x)), None, ROWS),
    "cond": lambda f, x: jax.lax.cond(x[0] < 9, f, f, x),
    "while_loop": lambda f, x: jax.lax.while_loop(
        lambda x: x[0] < 9, lambda x: f(x) + 1, x
    ),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "jit": lambda f, x: jax.jit(f)(x),
}
@cases("loop", LOOPS)
@each("in_members", False, True)
def test_a_state_written_inside_a_loop_of_jax_is_refused(loop, in_members):
    model = restore([Looping(loop)], StateTree({"0.child": ensemble()}))
    calls = FORMS["vmap_call_all"], FORMS["vmap_call_all_fns"]
    if not in_members:
        restore(model, single(snapshot(model), 0))
        calls = FORMS["call_all"], call_all_fns
    for call in calls:
        with (
            unchanged(model),
            raises(ValueError, "'0.child.h'", "apply", "snapshot", "restore"),
        ):
            call(model, "update", STEPS, node_to_exclude=Recurrent)

def test_apply_on_a_snapshot_inside_the_loop_is_the_way_out():
    model = init_all_states(Looping(), key=LEGACY)
    twin = copy.deepcopy(model.child)
    expected = stacked([twin(x) for x in ROWS])
    outputs, tree = apply(model, snapshot(model), ROWS, method="roll")
    assert same(outputs, expected, tolerance=1e-6)
    assert same(tree, StateTree({"child": snapshot(twin)}), tolerance=1e-6)

# ---- Slow: threads and memory --------------------------------------------------------------------
@slow
def test_sixteen_threads_use_one_template_at_once():
    template = Mixed()
    with unchanged(template), concurrent.futures.ThreadPoolExecutor(16) as pool:
        lives = [*pool.map(pure_life, [template] * 16)]
    assert all(same(life, lives[0]) for life in lives)

@slow
def test_nothing_that_a_call_made_stays_alive():
    class Passing(Recurrent):
        def update(self, x):
            made.append(weakref.ref(self))
            return super().update(x)

    made = [weakref.ref(Passing)]
    model = Passing()
    tree = vmap_init(model, axis_size=3, key=LEGACY)
    gc.collect()
    gc.disable()
    try:
        apply(model, single(tree, 0), STEPS)
        assert made[1]() is None  # with no garbage collector: there is no cycle
    finally:
        gc.enable()
    vmap_apply(model, tree, ROWS)
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
def split(number):
    """The keys that `LEGACY` is split into, on the host."""
    return on_host(jax.random.split(LEGACY, number))

PLAIN = init, apply, reset
VMAPPED = partial(vmap_init, axis_size=3), vmap_apply, vmap_reset

def life(calls, levels, model, key, x):
    """A tree, a step and a reset, with each of these calls under some levels of `vmap`."""
    def deep(call):
        for _ in range(levels):
            call = vmap(call)
        return call

    begin, step, again = calls
    tree = deep(lambda key: begin(model, key=key))(key)
    output, stepped = deep(partial(step, model))(tree, x)
    after = deep(lambda tree, key: again(model, tree, key=key))(stepped, key)
    return tree, output, stepped, after

@each("levels", 1, 2, pytest.param(3, marks=slow))
@every_model
def test_each_member_is_a_single_model_with_its_key_at_each_level(make, levels):
    model = make()
    outer = split(3 ** (levels - 1))
    keys = np.concatenate([jax.random.split(key, 3) for key in outer])
    numbers = np.arange(3 * len(keys), dtype=np.float32)
    xs = numbers.reshape(-1, 3)
    alone = jax.jit(partial(life, PLAIN, 0, model))
    lives = [*map(alone, keys, xs)]
    shared = {*snapshot(model)}
    while len(lives) > 1:
        triples = [lives[i : i + 3] for i in range(0, len(lives), 3)]
        lives = [stacked(triple, shared) for triple in triples]
        shared = ()  # each outer level maps all
    shape = (3,) * (levels - 1)
    nested = outer.reshape(*shape, 2), xs.reshape(*shape, 3, 3)
    together = jax.jit(partial(life, VMAPPED, levels - 1, model))
    with unchanged(model), jax.checking_leaks():
        assert same(together(*nested), lives[0], tolerance=1e-5)

@each("seed", *range(20))
def test_vmapped_calls_on_a_random_graph_equal_a_loop_over_members(seed):
    model = [random_graph(seed), Recurrent()]
    shared = {*snapshot(model)}
    tree = vmap_init(model, axis_size=3, key=LEGACY)
    trees = [init(model, key=key) for key in split(3)]
    assert same(tree, stacked(trees, shared))
    update = {"fn_name": "update", "node_to_exclude": Recurrent}
    results = [call_all(model, part, **update) for part in singles(tree)]
    assert same(vmap_call_all(model, tree, **update), stacked(results, shared))

class Axes(Module):
    """Each call makes four states, two of them in the place of others."""
    def update(self):
        self.new = State(ZEROS)
        self.for_shared = State(ZEROS)
        self.for_mapped = State(ZEROS)
        self.new_out = State(ZEROS, tag="out")
    init_state = reset_state = update

OUT = {"state_to_exclude": "out"}
NAMES = "shared", "mapped", "out", "new", "for_shared", "for_mapped", "new_out"
AXES = {  # how many mapped axes each state has after a call of five members
    # that it was given       and that it makes
    # shared mapped excluded  new for_shared for_mapped excluded
    "before":         "0 1 1  - 0 1 -",
    "vmap_init":      "0 1 1  1 1 1 0",
    "vmap_reset":     "0 1 1  1 1 1 0",
    "vmap_call_all":  "0 1 1  1 1 1 0",
    "vmap_apply":     "0 1 1  1 1 1 1",  # which excludes nothing
    "vmap(fn)":       "0 1 1  1 0 1 1",  # which goes by paths
    "vmap(fn, None)": "0 1 1  1 0 1 -",  # which sees all members
}
CALLS = {
    "vmap_init": lambda m, tree: vmap_init(restore(m, tree), axis_size=5, **OUT),
    "vmap_reset": lambda m, tree: vmap_reset(m, tree, **OUT),
    "vmap_call_all": lambda m, tree: vmap_call_all(m, tree, "update", **OUT)[1],
    "vmap_apply": lambda m, tree: vmap_apply(m, tree)[1],
    "vmap(fn)": lambda m, tree: vmap(lambda tree: apply(m, tree)[1])(tree),
    "vmap(fn, None)": lambda m, tree: vmap(
        lambda tree: tree | tree_of(new=tree["mapped"][0]), None, axis_size=5
    )(tree),
}
def counts_of(name):
    counts = zip(NAMES, AXES[name].split())
    return {state: int(count) for state, count in counts if count != "-"}

@each("name", *CALLS)
def test_the_axes_of_every_state_after(name):
    boxes = {}
    for state, count in counts_of("before").items():
        boxes[state] = mapped(State(FIVE if count else ZEROS), count)
    boxes["out"].tag = "out"
    after = jax.eval_shape(lambda: CALLS[name](Axes(), StateTree(boxes)))
    assert mapped_of(after) == counts_of(name)
    for path, box in after.states().items():
        assert after[path].shape == (5,) * box.mapped + (3,), path

class Bag(Module):
    def __init__(self):
        self.shared = State(ZEROS)
        self.own = mapped(State(ROWS))
        self.spare = None
    def update(self):
        self.spare = [self.own, State(ZEROS), State(None, tag="own")]
        self.own = None

def test_a_box_that_moves_keeps_its_axis_and_its_tag_and_new_ones_get_the_state_tag():
    _, tree = vmap_call_all(Bag(), snapshot(Bag()), "update", state_tag="new")
    assert mapped_of(tree) == {
        "shared": 0,
        "spare.0": 1,
        "spare.1": 1,
        "spare.2": 1,
    }
    tags = [box.tag for box in tree.states().values()]
    assert tags == [None, None, "new", "own"]
    assert same(tree["spare.0"], ROWS)

def test_a_new_state_that_is_excluded_has_the_value_of_the_first_member():
    tree = vmap_init(
        Recurrent(), axis_size=3, state_to_exclude=ParamState, key=LEGACY
    )
    assert mapped_of(tree) == {"bias": 0, "weight": 0, "h": 1}
    first = init(Recurrent(), key=split(3)[0])
    assert same(tree["weight"], first["weight"])

def test_a_constructor_under_vmap_makes_independent_members():
    born = lambda key: snapshot(Linear(uniform(key)))
    trees = [*map(born, split(3))]
    assert same(vmap(born)(split(3)), stacked(trees))
    without_arguments = vmap(lambda: snapshot(Linear()), axis_size=5)
    tree = jax.eval_shape(without_arguments)
    assert tree["weight"].shape == (5, 3)

def test_trees_stand_anywhere_in_arguments_and_results():
    def apart(given, pair):
        params, rest = partition(given["tree"], ParamState)
        assert mapped_of(params | rest) == {"bias": 0, "weight": 0, "h": 0}
        assert params["bias"]["b"].shape == rest["h"].shape == (3,)
        table = {"rest": [rest, Pair(params, pair.right)], "none": None}
        return table, pair.left, tree_of(new=ONES)

    old = StateTree({"old": ensemble()})
    table, tree, new = vmap(apart)(
        {"tree": ensemble(), "none": None}, Pair(old, ROWS)
    )
    rest, (params, x) = table["rest"]
    assert same([rest | params, tree], [ensemble(), old])
    assert same([x, table["none"]], [ROWS, None])
    assert same(new, stacked([tree_of(new=ONES)] * 3))  # which no argument has

CUBE = np.zeros((3, 4, 3), np.float32)
TABLE = {"a": ROWS, "b": (CUBE, ZEROS)}
IN_AXES = {
    "0 for all": (0, (CUBE, TABLE)),
    "a list": ([2, -3], (CUBE, CUBE)),
    "a shared number": ((None, -1), (2.0, CUBE)),
    "a tree": (({"a": 0, "b": (2, None)}, 2), (TABLE, CUBE)),
    "a tree in a list": ([{"a": None, "b": (-1, 0)}, None], (TABLE, CUBE)),
    "None as an argument": (0, (CUBE, None)),
}
@cases("in_axes, args", IN_AXES)
def test_arrays_are_mapped_as_by_jax_vmap(in_axes, args):
    fn = lambda *args: {"all": args, "none": None}
    ours = jax.eval_shape(lambda: vmap(fn, in_axes)(*args))
    assert ours == jax.eval_shape(lambda: jax.vmap(fn, in_axes)(*args))

@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mantissa"],
    meta_fields=["unit"],
)
@dataclasses.dataclass
class Quantity:
    """Three numbers in some unit."""

    mantissa: object
    unit: str = "mV"
    def __post_init__(self):
        assert self.mantissa.shape == (3,)

def test_a_class_that_checks_itself_is_never_rebuilt_with_anything_but_arrays():
    add = lambda self, given, x: self.h.value.mantissa + given.mantissa + x
    model = module_with(update=add)
    args = tree_of(h=Quantity(ZEROS)), Quantity(ONES), ROWS
    results = vmap_apply(model, *args, in_axes=(None, 0))
    assert same(results, (ROWS + 1, args[0]))
    assert same(vmap(partial(apply, model), (0, None, 0))(*args), results)

def test_where_arguments_disagree_the_one_with_the_states_of_the_result_decides():
    shared = tree_of(h=HiddenState(ONES))
    results = vmap(lambda *args: args)(ensemble(), shared)
    assert same(results, (ensemble(), shared))

def train_step(params, momentum, rest, x):
    def loss(params):
        output, _ = apply(Recurrent(), params | rest, x)
        return jnp.sum(output**3)

    add = lambda factor, leaf, other: factor * leaf + other
    slopes = jax.grad(loss)(params)
    momentum = jax.tree.map(partial(add, 0.5), momentum, slopes)
    return jax.tree.map(partial(add, -0.1), momentum, params), momentum

def test_each_member_trains_with_its_own_optimiser_as_if_alone():
    def train(lift, tree, x):  # lift is the identity, or vmap
        params, rest = partition(tree, ParamState)
        momentum = lift(partial(times, 0))(params)
        for _ in range(2):
            params, momentum = lift(train_step)(params, momentum, rest, x)
        return params, momentum

    alone = jax.jit(partial(train, lambda fn: fn))
    tree = stacked(singles(ensemble()))  # in which the bias is mapped, too
    got = jax.jit(partial(train, vmap))(tree, ROWS)
    results = [*map(alone, singles(tree), ROWS)]
    assert same(got, stacked(results), tolerance=1e-5)

def test_trees_inside_of_values_count_mapped_axes_too():
    begin = lambda tree: tree_of(opt=[1.0, {"momentum": tree}])
    tree = tree_of(h=mapped(State(ROWS)))
    whole = jax.eval_shape(vmap(begin), tree)
    assert mapped_of(whole["opt"][1]["momentum"]) == {"h": 1}
    part = jax.eval_shape(
        lambda: member(vmap(lambda whole: whole)(vmap(begin)(tree)), 0)
    )
    expected = begin(single(tree, 0))
    assert jax.tree.structure(part) == jax.tree.structure(expected)
    hessian = jax.hessian(lambda tree: jnp.sum(tree["h"] ** 3))
    assert mapped_of(jax.eval_shape(vmap(hessian), tree)["h"]) == {"h": 1}

class Mean(Module):
    """A sum of the means over members, which they all share."""
    def __init__(self):
        self.mean = LongTermState(ZEROS)
        self.steps = LongTermState(0)
    def update(self, x, axis=None):
        self.steps.value = self.steps.value + 1
        x = jax.lax.pmean(x, axis) if axis else x
        self.mean.value = self.mean.value + x

def test_a_shared_statistic_is_updated_from_all_members_of_all_levels():
    step = partial(vmap_apply, Mean(), axis_name="m")
    expected = tree_of(
        mean=LongTermState(ROWS.mean(axis=0)), steps=LongTermState(1)
    )
    assert same(step(snapshot(Mean()), ROWS, axis="m")[1], expected)
    agents = vmap(partial(step, axis=("m", "outer")), axis_name="outer")
    both = np.stack([ROWS * 0, ROWS * 2])
    _, tree = agents(snapshot(Mean()), both)
    assert same(tree, expected)

WAYS_OUT = (
    "init_state",
    "vmap",
    "state_to_exclude",
    "pmean",
    "axis_name",
    "flat_dict",
)

@each("name", None, "m")
def test_a_shared_state_that_differs_is_refused_with_every_way_out(name):
    tree = snapshot(Mean()) | tree_of(fixed=ONES)
    with raises(ValueError, "'mean'", *WAYS_OUT) as info:
        vmap_apply(Mean(), tree, ROWS, axis_name=name)
    assert not re.search("'fixed'|out_axes", str(info.value))
    if name is None:  # else all that changed are listed
        assert "'steps'" not in str(info.value)

class Die(Module):
    def __init__(self, box=None):
        self.box = box
    def update(self, x=None, key=None):
        return jax.random.key_data(key)
    def draw(self):
        self.box.value = jax.random.split(self.box.value)[0]

def test_member_i_gets_key_i_of_the_split():
    for key in (a_key(), LEGACY):
        outputs, _ = vmap_apply(Die(), EMPTY, axis_size=np.int64(3), key=key)
        assert same(outputs, split(3))
    outputs, _ = vmap_apply(Die(), EMPTY, ROWS, LEGACY, in_axes=(0, None))
    assert same(outputs, np.stack([LEGACY] * 3))

def test_a_shared_key_that_changed_is_warned_of_and_no_other():
    def step(box, method):
        call = partial(vmap_apply, Die(box), axis_size=3, method=method)
        jax.eval_shape(call, tree_of(box=box))

    words = "all members drew the same numbers.*'box' .State."
    with pytest.warns(UserWarning, match=words):
        step(State(a_key()), "draw")
    with warnings.catch_warnings(action="error"):
        step(State(a_key()), "init_state")
        step(mapped(State(jax.random.wrap_key_data(split(3)))), "draw")

@each("use", vmap_init, vmap_init_all_states)
def test_a_vmapped_init_that_maps_nothing_is_warned_of(use):
    words = r"no state is mapped.*vmap\(lambda key: init"
    for model, excluded in ((Linear(), None), (Axes(), ...)):
        with pytest.warns(UserWarning, match=words):
            use(model, axis_size=3, state_to_exclude=excluded)
    with warnings.catch_warnings(action="error"):
        use(Axes(), axis_size=3)

# ---- What is refused
def weights(value, count=1):
    return tree_of(weight=mapped(LongTermState(value), count))

@each("size", 0, -1, True, 3.0)
def test_a_size_is_a_positive_integer(size):
    with raises(ValueError, f"axis_size is a positive int; got {size!r}"):
        vmap(dict, axis_size=size)()

CELL = Recurrent()
GROWING = module_with(
    Recurrent, init_state=Keeper.update, reset_state=Keeper.update
)
MEMORY = mapped(HiddenState({"v": ROWS, "buffer": CUBE}))
LEVELS = "'h' (HiddenState)", "vmap(functools.partial(vmap_reset, module))"
LOST = "'weight' (LongTermState)", "vmap", "stack"
GROWN = "'h' (HiddenState)", "in_axes", "keyword"
DISAGREE = "'h'", "StateTree({'actor': a, 'critic': c})"
REFUSED = {  # a call with an ensemble of three; words of its ValueError (no min runs)
    "no size": (lambda s: vmap_init(Axes()), "no state is mapped"),
    "unlike a state": (
        lambda s: vmap_reset(CELL, s, axis_size=5),
        "5",
        "'h'",
        "init_all_states",
    ),
    "unlike all": (
        lambda s: vmap(min, axis_size=4)({"x": [FIVE]}, (s,)),
        "args[0]['x'][0]: 5",
        "'h' of args[1][0]: 3",
    ),
    "a lost axis": (lambda s: vmap(min, axis_size=3)(weights(1.0)), "'weight'"),
    "a disagreement": (
        lambda s: vmap(lambda *args: args[0])(s, single(s, 0)),
        *DISAGREE,
    ),
    "about a part": (
        lambda s: vmap(lambda *args: args[0] | tree_of(x=1))(s, single(s, 0)),
        *DISAGREE,
    ),
    "what differs": (
        lambda s: vmap(lambda s, x: jax.tree.map(x.__add__, s))(s, ROWS),
        "'bias",
    ),
    "a level too few": (lambda s: reset(CELL, s), *LEVELS),
    "one of two": (lambda s: vmap_reset(CELL, stack(s, s)), *LEVELS),
    "a stack by hand": (lambda s: apply(Linear(), weights(ROWS, 0), ONES), *LOST),
    "a mean over members": (
        lambda s: vmap_apply(Linear(), weights(STEPS), ROWS),
        *LOST,
    ),
    "a reset to a batch": (lambda s: vmap_reset(GROWING, s, ROWS), *GROWN),
    "a batch by keyword": (lambda s: vmap_apply(CELL, s, x=ROWS), *GROWN),
    "a batch under None": (
        lambda s: vmap_apply(
            Keeper(), tree_of(h=MEMORY), MEMORY.value, in_axes=None
        ),
        *GROWN,
    ),
    "an error of one's own": (
        lambda s: vmap(lambda s: jax.vmap(lambda x: [x], 0, [None])(ROWS))(s),
        "out_axes",
    ),
    "one with a name": (
        lambda s: vmap(lambda s: jax.vmap(dict, 0, None, "q")(x=ROWS))(s),
        "out_axes",
    ),
}
@each("name", *REFUSED)
def test_what_cannot_be_meant_is_refused(name):
    call, *words = REFUSED[name]
    with raises(ValueError, *words):
        call(ensemble())

def test_what_resembles_a_refused_call_and_can_be_meant_passes():
    mean = weights(STEPS)  # of members, as jax.tree.map makes it: one model
    assert same(apply(Linear(), mean, ONES), (STEPS, mean))
    batch = tree_of(h=HiddenState(ROWS))  # made by hand
    assert same(apply(keeper(), batch, FIVE)[1]["h"], FIVE)
    holder = restore(Linear(), weights(ROWS))
    for tree in (weights(STEPS), weights(ROWS, 0)):
        assert same(reset(holder, tree), tree)
    model = keeper()
    model.h = mapped(State(ROWS))
    _, tree = apply(model, snapshot(model), FIVE.T)  # other axes than leading ones
    assert same(tree["h"], FIVE.T)
    model = restore(copy.copy(GROWING), ensemble())
    grown = jax.eval_shape(lambda: vmap_init(model, ROWS, axis_size=3))
    assert grown["h"].shape == (3, 3, 3)
    options = {"axis_size": 3, "method": "replace", "h": State(FIVE)}
    replace = partial(vmap_apply, keeper(), **options)
    _, replaced = jax.eval_shape(replace, tree_of(h=ONES))
    assert replaced["h"].shape == (3, 5, 3)
    model = init_all_states(vmap_init_all_states(Axes(), axis_size=3))
    assert same(vmap_init_all_states(model, axis_size=5).new.value, FIVE)

UNLIKE = {
    "shapes": (State(ZEROS[:2]), "float32[2]"),
    "dtypes": (State(ONES > 0), "bool[3]"),
    "kinds": (HiddenState(ZEROS), "HiddenState"),
    "tags": (State(ZEROS, tag="t"), "tag='t'"),
    "axes": (mapped(State(ZEROS)), "mapped=1"),
}
@cases("box, word", UNLIKE)
def test_stack_refuses_trees_of_unlike(box, word):
    with raises(ValueError, word):
        stack(tree_of(v=ONES), tree_of(v=box))

def test_a_module_or_its_method_is_not_mapped_by_vmap():
    model = keeper()
    for fn in (model, model.update):
        with raises(TypeError, "vmap_apply"):
            vmap(fn)(ROWS)

BAD_AXES = {
    "too large": (2, [ROWS], "args[0], float32[3,3]"),
    "too small": (-3, [ROWS], "args[0], float32[3,3]"),
    "a flag": (0, [ZEROS, True], "args[1], bool", "keyword"),
    "a key": (0, [ROWS, a_key], "args[1], key", "key="),
    "a bool": ((False,), [ROWS], "args[0]"),
    "too many": ((0, 0), [ZEROS], "(0, 0)", "float32[3]"),
    "too few": ([0], [ZEROS, ZEROS], "[0]", "2 arguments"),
    "deep within": (
        ({"x": (0, "1")},),
        [{"x": (ZEROS, ZEROS)}],
        "args[0]['x'][1]",
    ),
    "of a text": (0, [{"name": "text"}], "args[0]['name'], str"),
    "1 for a tree": (1, [EMPTY], "args[0]", "StateTree takes 0"),
}
@each("name", *BAD_AXES)
def test_bad_in_axes_are_told_in_terms_of_the_callers_arguments(name):
    in_axes, args, *words = BAD_AXES[name]
    args = tuple(arg() if arg is a_key else arg for arg in args)
    for call in (
        lambda: vmap(max, in_axes)(*args),
        lambda: vmap_apply(keeper(), tree_of(h=1), *args, in_axes=in_axes),
        lambda: vmap_call_all(
            keeper(), tree_of(h=1), "update", args, in_axes=in_axes
        ),
    ):
        with raises(TypeError, "in_axes is an int or None", *words):
            call()

NO_OUTPUTS = {
    "a str": lambda self: "text",
    "a state": lambda self: State(ZEROS),
    "a module": lambda self: self,
    "a generator": lambda self: (x for x in ()),
    "a generator within": lambda self: {"k": [ONES, (x for x in ())]},
    "texts": lambda self: np.array(["text"]),
}
@cases("update", NO_OUTPUTS)
def test_an_output_that_is_no_array_is_refused_with_its_place(update):
    fine = module_with(update=lambda self: ONES)
    model = {"fine": fine, "odd": [module_with(update=update)]}
    for name in ("vmap_call_all", "vmap_call_all_fns"):
        with raises(TypeError, "'update' of 'odd.0' (Own)", "cannot cross"):
            FORMS[name](model, "update")

def test_what_a_vmapped_method_returns_becomes_an_array_of_jax():
    outputs, _ = vmap_apply(Echo(), EMPTY, ROWS, method="init_state")
    assert isinstance(outputs[0][0], jax.Array)

class Learner(Recurrent):
    def update(self, x, target):
        output = super().update(x) - target["weight"]
        return output, StateTree({"bias": self.bias, "new": self.h})

def test_a_target_network_is_no_state_and_a_returned_tree_is_per_member_as_a_whole():
    expected, stepped = vmap_apply(Recurrent(), ensemble(), ROWS)
    target = single(ensemble(), 1)
    step = partial(vmap_apply, Learner(), in_axes=(0, None))
    (output, inner), tree = step(ensemble(), ROWS, target)
    assert same(output, on_host(expected) - on_host(target["weight"]))
    assert same(tree, stepped)
    assert mapped_of(inner) == {"bias": 1, "new": 1}
    assert same(inner["new"], tree["h"])

# ---- A plain call sees one model
FOR_ENSEMBLES = "vmap_apply", "vmap_reset", "vmap_call_all"
TOUCHES = {
    "reads": lambda self: self.h.value,
    "writes": lambda self: setattr(self.h, "value", ZEROS),
    "makes it anew": lambda self: setattr(self, "h", HiddenState(ZEROS)),
}
SEES_ALL = {
    "apply": apply,
    "reset": reset,
    "a step that closes over it": lambda model, tree: vmap(
        lambda x: apply(model, tree)[0]
    )(ROWS),
    "a call that excludes it": partial(vmap_reset, state_to_exclude=HiddenState),
}
@cases("touch", TOUCHES)
@cases("call", SEES_ALL)
def test_what_is_of_all_members_is_hidden_from_a_method(call, touch):
    model = module_with(Recurrent, update=touch, reset_state=touch)
    with raises(ValueError, "'h' (HiddenState)", *FOR_ENSEMBLES):
        call(model, ensemble())

def test_what_is_hidden_comes_out_as_it_went_in():
    model = module_with(Recurrent, update=lambda self: repr(self.h))
    tree = stacked(singles(ensemble()))  # in which the bias is mapped, too
    text, after = apply(model, tree)
    assert text.startswith("HiddenState(")
    assert same(after, tree)

def test_an_ensemble_of_layers_is_seen_one_by_one_in_a_scan_and_whole_in_a_model_that_holds_it():
    step = lambda x, layer: (apply(Linear(), layer, x)[0], None)
    product, _ = jax.lax.scan(step, ONES, weights(ROWS))
    assert same(product, ROWS[0] * ROWS[1] * ROWS[2])
    model = restore(Recurrent(), ensemble())
    expected = vmap_apply(Recurrent(), ensemble(), ROWS)
    assert same(apply(model, ensemble(), ROWS), expected)
    assert same(vmap_apply(model, ensemble(), ROWS), expected)

CHANGED = {
    "an axis less, though sizes coincide": {"deep": ZEROS},
    "another size": {"deep": FIVE},
    "an axis more": {"deep": CUBE},
    "a leaf without the axis": {"deep": ROWS, "more": np.float32(0)},
}
@cases("value", CHANGED)
def test_a_plain_call_keeps_the_leading_axes_of_every_leaf(value):
    model = keeper()
    model.h = mapped(State({"deep": ROWS}))
    for call in (
        lambda: apply(model, snapshot(model), value),
        lambda: apply(model, snapshot(model), State(value), method="replace"),
        lambda: call_all_fns([model], "update", value),
    ):
        with unchanged(model), raises(ValueError, "h' (State)", *FOR_ENSEMBLES):
            call()

def test_methods_run_once_however_many_the_members():
    log = []
    vmap_call_all([recorder(log, None)], EMPTY, "note", axis_size=64)
    vmap(lambda: log.append(3), axis_size=64)()
    assert log == [None, 3]

def test_stack_and_member_are_inverse():
    assert same(stack(*singles(ensemble())), stacked(singles(ensemble())))
    for use in (member, jax.jit(member)):
        members = [use(ensemble(), i) for i in range(-3, 3)]
        assert same(members, singles(ensemble()) * 2)

def test_a_vector_of_integers_takes_members_from_the_mapped_states_alone():
    expected = ensemble_of(ROWS[[2, 0, 2]], ZEROS)
    for use in (member, jax.jit(member)):
        tree = use(ensemble_of(ROWS, ZEROS), np.array([2, 0, 2]))
        assert same(tree, expected)
    none_is_mapped = snapshot(Mixed())
    for i in (5, [7, 7]):
        assert same(member(none_is_mapped, i), none_is_mapped)

def test_members_are_chosen_by_integers_in_the_range():
    for i in (3, -4, [0, 3]):
        with raises(IndexError, "3"):
            member(ensemble(), i)
    for i in (1.0, None, True, [True, False, True], [[0, 1]]):
        with raises(TypeError, "integer"):
            member(ensemble(), i)

# ---- Assigning -----------------------------------------------------------------------------------
def of_dtype(name, values):
    """An array of any dtype, even of one that NumPy alone lacks, such as bfloat16."""
    return np.asarray(values, np.float32).astype(jnp.dtype(name))

of_jax = partial(jax.ShapeDtypeStruct, (3,))  # all that is known of a traced array
FITS = {  # what is given; dtypes of leaves of its shape that it fits; others
    "ints": (np.arange(3), "int32 uint8 float32 bfloat16 complex64", "bool"),
    "floats": (np.ones(3), "float32 float16 complex64", "int32 bool"),
    "complex numbers": (ONES * 1j, "complex64", "float32"),
    "bools": (np.array([True, False, True]), "int8 float32", ""),
    "infinities": (np.array([np.inf, -np.inf, np.nan]), "float16", "int32"),
    "no numbers": (np.zeros((0, 3), int), "uint8", "bool"),
    "a number": (2.5, "bfloat16", "int8"),
    "200": (np.array([0, 0, 200], np.uint8), "uint8", "int8"),
    "70000": (70000, "int32 float32 bfloat16", "float16"),
    "1e39": (1e39, "", "bfloat16"),
    "JAX ints, by their dtype": (of_jax("int8"), "int32 float16", "uint8"),
    "larger JAX ints": (of_jax("int32"), "float32", "int8 float16"),
    "JAX floats": (of_jax("float32"), "float16", "int32"),
    "a timedelta": (np.ones(3, "m8[s]"), "", "int32"),
    "text": ("1.0", "", "float32"),
    "objects": (np.array([1, 2, 3], object), "", "int32"),
    "a masked array": (np.ma.masked_array(ONES), "", "float32"),
    "None": (None, "", "float32"),
    "raw bytes": (np.zeros(3, "V1"), "int4 float8_e4m3fn", "int8 bool bfloat16"),
    "bytes in pairs": (np.zeros(3, "V2"), "bfloat16", "float16"),
    "a structured array": (np.zeros(3, [("a", "u1")]), "", "int4"),
}
def load(old, given):
    """`assign` of one value, named `w`; a traced one is only looked at."""
    if isinstance(given, jax.ShapeDtypeStruct):
        return jax.eval_shape(partial(load, old), given)
    return assign(tree_of(w=old), {"w": given}).state["w"]

@cases("given, fits, misfits", FITS)
def test_what_fits(given, fits, misfits):
    shape = np.shape(given)
    for dtype in fits.split():
        leaf = load(of_dtype(dtype, np.zeros(shape)), given)
        assert (leaf.dtype, leaf.shape, leaf.weak_type) == (dtype, shape, False)
        if isinstance(leaf, jax.Array) and np.asarray(given).dtype.kind != "V":
            cast = np.asarray(given).astype(leaf.dtype)
            assert np.asarray(leaf).tobytes() == cast.tobytes()
    for dtype in misfits.split():
        with raises(ValueError, f"'w' expected {dtype}[", "got "):
            load(of_dtype(dtype, np.zeros(shape)), given)

@each("dtype", "int4", "int8", "uint8", "int32", "uint32")
def test_the_limits_of_ints_fit_and_no_number_beyond(dtype):
    limits = jnp.iinfo(dtype)
    for kind in (int, np.int64):
        for limit, step in ((limits.min, -1), (limits.max, 1)):
            number = int(limit)
            assert load(of_dtype(dtype, 0), kind(number)).item() == number
            with raises(ValueError, f"'w' expected {dtype}[]"):
                load(of_dtype(dtype, 0), kind(number + step))

def test_concrete_jax_arrays_go_by_dtype_and_lose_their_weak_type():
    assert not load(0.0, jnp.asarray(2.5)).weak_type
    narrow = jax.device_put(np.int8(3))
    assert same(load(0, narrow), np.int32(3))
    unsigned = jax.device_put(np.uint32(3))
    with raises(ValueError, "'w' expected int32[], got uint32[]"):
        load(0, unsigned)

NEW = {"bias": ONES, "scale": np.float32(3)}
WRITINGS = {
    "a state by path": {("W", "weight"): NEW},
    "leaves by path": {
        ("W", "weight", "bias"): ONES,
        ("W", "weight", "scale"): 3,
    },
    "nested dicts": {"W": {"weight": NEW}},
    "a box": {"W.weight": State(NEW)},
    "a tree": StateTree({"W.weight": HiddenState(NEW, tag="other")}),
    "a tree below a name": {"W": StateTree({"weight": State(NEW)})},
}
@cases("given", WRITINGS)
def test_one_leaf_is_reached_however_it_is_written(given):
    weight = ParamState({"bias": ZEROS, "scale": 0.0})
    tree = StateTree({"W.weight": weight, "h": HiddenState(ZEROS)})
    after, unexpected, missing = assign(tree, given)
    assert (unexpected, missing) == ([], [("h",)])
    assert same(after, tree | StateTree({"W.weight": ParamState(NEW)}))

def test_names_with_dots_and_numbers_are_reached_too():
    tree = StateTree(
        {
            ("t", "a.b"): State({"x.y": [ZEROS]}),
            ("t", "0"): State(ZEROS),
        }
    )
    nested = {"t": {"a": {"b.x": {"y": [ONES]}}, 0: ONES}}
    for given in (nested, {"t.a.b.x.y.0": ONES, "t.0": ONES}):
        after, *rest = assign(tree, given)
        assert rest == [[], []]
        assert same(jax.tree.leaves(after), [ONES, ONES])

def test_later_snapshots_win_and_unexpected_and_missing_are_sorted_paths_of_leaves():
    tree = tree_of(
        b=ZEROS,
        c={10: ZEROS, 9: ZEROS},
        d=OrderedDict(z=0, a=0),
        none=None,
    )
    first = {"z": [1], 5: {"y": ONES}, "c": {3: 1}, "b": ROWS}
    after, *rest = assign(tree, first, {"c": {10: ONES}, "b": ONES})
    assert [*map(names_of, rest)] == ["5.y c.3 z.0", "c.9 d.a d.z"]
    new = tree_of(b=ONES, c={10: ONES, 9: ZEROS})
    assert same(after, tree | new)
    assert assign(tree, tree)[1:] == ([], [])

def test_a_snapshot_is_a_mapping():
    for given in (3, [("w", 1)], None):
        with raises(TypeError, "a snapshot is a mapping", type(given).__name__):
            assign(EMPTY, given)

def test_all_that_does_not_fit_is_listed_and_nothing_is_assigned():
    nested = keeper({"x": np.int32(0), "y": [ZEROS]})
    model = {"a": keeper(ZEROS), "b": nested, "c": keeper(ZEROS)}
    given = {
        "a.h": ROWS,
        "b.h": {"x": 0.5, "y": [ONES[:, None]]},
        "c.h": ONES,
    }
    faults = """nothing was assigned, since these values do not fit:
  'a.h' expected float32[3], got float32[3,3]
  'b.h.x' expected int32[], got float
  'b.h.y.0' expected float32[3], got float32[3,1]"""
    with unchanged(model), raises(ValueError, faults):
        assign_state_values(model, given)

def test_keys_are_written_as_keys_or_as_their_data():
    for given in (a_key(), LEGACY):
        assert same(load(a_key(1), given), a_key())

BAD_KEYS = {
    "another kind": (
        lambda: jax.random.key(0, impl="rbg"),
        "key<fry>[], got key<rbg>[]",
    ),
    "too many": (
        lambda: jax.random.wrap_key_data(split(3)),
        "key<fry>[], got key<fry>[3]",
    ),
    "data of too many": (lambda: split(3), "uint32[2], got uint32[3,2]"),
}
@cases("make, words", BAD_KEYS)
def test_keys_that_do_not_fit_are_told_in_like_terms(make, words):
    with raises(ValueError, f"'w' expected {words}"):
        jax.eval_shape(lambda key: load(key, make()), a_key())

def test_all_that_npz_writes_is_read_back_raw_bytes_too(tmp_path):
    names = "bfloat16", "float8_e4m3fn", "int4", "uint4"
    raw = {name: of_dtype(name, [1, 0, 1]) for name in names}
    tree = tree_of(rows=ROWS, half=np.ones(3, np.float16), flag=MASK, **raw)
    np.savez(tmp_path / "tree.npz", **flat_dict(tree))
    with np.load(tmp_path / "tree.npz") as loaded:
        assert {loaded[name].dtype.kind for name in raw} == {"V"}
        after, *rest = assign(jax.tree.map(np.zeros_like, tree), loaded)
    assert rest == [[], []]
    assert frozen(after.states()) == frozen(tree.states())

def test_a_value_in_another_unit_is_refused_and_a_mapping_of_its_fields_is_taken():
    for given in (Quantity(ONES), {"mantissa": ONES}):
        assert same(load(Quantity(ZEROS), given), Quantity(ONES))
    with raises(ValueError, "'w' expected ", "'mV'", "'V'"):
        load(Quantity(ZEROS), Quantity(ONES, "V"))

def test_assigning_works_on_what_is_traced():
    assert same(jax.jit(load)(ZEROS, np.arange(3)), STEPS)
    assert same(jax.jit(partial(load, ZEROS))(STEPS), STEPS)

def test_nothing_is_compiled_for_numpy_arrays_of_new_shapes():
    load(ZEROS, jnp.asarray(ONES) + 101)
    assert (before := len(COMPILED))  # what is compiled is counted
    for size in range(103, 108):
        for dtype in ("float32", "int4"):
            load(of_dtype(dtype, np.zeros(size)), np.ones(size, int))
    assert len(COMPILED) == before

# ---- In place: the documented API ----------------------------------------------------------------
TARGETS = MODELS | {
    "a list": lambda: [random_graph(1), Recurrent()],
    "a tuple": lambda: (Recurrent(), [Recurrent()]),
    "a dict": lambda: {"a": Recurrent(), 0: (random_graph(2), Recurrent())},
}
LIVES = {
    "a plain call": (
        (init_all_states, call_all_fns, reset_all_states),
        (init, call_all, reset),
        {},
        {"args": ONES},
    ),
    "a vmapped call": (
        (vmap_init_all_states, vmap_call_all_fns, vmap_reset_all_states),
        (vmap_init, vmap_call_all, vmap_reset),
        {"axis_size": 3},
        {"args": ROWS, "in_axes": 0},
    ),
}
@cases("in_place, pure, at_first, at_a_step", LIVES)
@cases("make", TARGETS)
def test_calls_in_place_equal_pure_ones(make, in_place, pure, at_first, at_a_step):
    def real_calls(begin, call, again):
        assert begin(target, key=LEGACY, **at_first) is target
        yield snapshot(target)
        assert call(target, "update", node_to_exclude=Node, **at_a_step) is target
        yield snapshot(target)
        assert again(target, key=LEGACY) is target
        yield snapshot(target)

    def pure_calls(begin, call, again):
        tree = begin(template, key=LEGACY, **at_first)
        _, stepped = call(
            template, tree, "update", node_to_exclude=Node, **at_a_step
        )
        return [tree, stepped, again(template, stepped, key=LEGACY)]

    target, template = make(), make()
    _, boxes = plain_walk(target)
    with unchanged(template):
        lives = jax.jit(lambda: ([*real_calls(*in_place)], pure_calls(*pure)))
        assert same(*lives())
    assert boxes.items() <= plain_walk(target)[1].items()

ORDERS = {
    call_all_fns: "target fn_name args kwargs node_to_exclude fn_if_not_exist",
    vmap_call_all_fns: "target fn_name args kwargs axis_size node_to_exclude state_tag fn_if_not_exist",
}
@each("call", *ORDERS)
def test_arguments_come_in_the_documented_order(call):
    parameters = inspect.signature(call).parameters.values()
    names = [
        one.name for one in parameters if one.kind == one.POSITIONAL_OR_KEYWORD
    ]
    assert " ".join(names) == ORDERS[call]

class Taker(Keeper):
    reset_state = update = Keeper.init_state

SAYS = {  # what a call says of {3}, which no option can be
    "kwargs": "kwargs",  # or what the method says of it
    "axis_size": "axis_size {3}",
    "axis_name": "unhashable",
    "in_axes": "in_axes is",
    "node_to_exclude": "a filter is",
    "state_to_exclude": "a filter is",
    "state_tag": "a tag is",
    "key": "key= is one PRNG key",
}
TWINS = {
    init: init_all_states,
    reset: reset_all_states,
    call_all: call_all_fns,
    vmap_init: vmap_init_all_states,
    vmap_reset: vmap_reset_all_states,
    vmap_call_all: vmap_call_all_fns,
}
@each("call", *TWINS)
def test_every_argument_and_option_is_passed_on(call):
    options = inspect.signature(call).parameters
    args = ["update", ROWS] if "fn_name" in options else [ROWS]
    axes = {"in_axes": 0} if "in_axes" in options else {}
    tree = [EMPTY] if "state" in options else []
    pure = partial(call, Taker(), *tree)
    in_place = partial(TWINS[call], Taker())
    for form in (pure, in_place):
        form(*args, **axes)
        for option in options.keys() & SAYS.keys():
            with raises((TypeError, ValueError), SAYS[option]):
                form(*args, **axes | {option: {3}})

def test_assigning_in_place_writes_into_the_boxes_that_are_there():
    model = [keeper(), keeper({"b": ZEROS, "scale": ZEROS})]
    _, boxes = plain_walk(model)
    rest = assign_state_values(
        model, {"1.h": {"b": STEPS, "new": 1}}, {"1.h.b": ONES}
    )
    assert [*map(names_of, rest)] == ["1.h.new", "0.h 1.h.scale"]
    assert plain_walk(model)[1] == boxes  # which compare by identity
    values = [box.value for box in boxes.values()]
    assert same(values, [ONES, {"b": ONES, "scale": ZEROS}])

# ---- Slow: transformations and devices -----------------------------------------------------------
def total_of_members(tree):
    return jnp.sum(vmap_apply(Recurrent(), tree, ROWS)[0] ** 3)

def total_of_a_loop(tree):
    total = 0
    for h, weight, x in zip(tree["h"], tree["weight"], ROWS):
        total += jnp.sum((h * weight + x + tree["bias"]["b"]) ** 3)
    return total

DERIVATIVES = {
    "grad": jax.value_and_grad,
    "jvp": lambda fn: lambda tree: jax.jvp(fn, (tree,), (times(2, tree),)),
    "checkpoint": lambda fn: jax.grad(jax.checkpoint(fn)),
    "scan": lambda fn: lambda tree: jax.lax.scan(
        lambda carry, x: (carry, fn(times(x, tree))), None, STEPS
    ),
    "hessian": jax.hessian,
}
@slow
@cases("transform", DERIVATIVES)
def test_a_vmapped_call_is_transformed_like_a_loop(transform):
    tree = times(0.1, ensemble())
    expected = jax.jit(transform(total_of_a_loop))(tree)
    assert same(jax.jit(transform(total_of_members))(tree), expected, tolerance=1e-4)

Spec = jax.sharding.PartitionSpec
EIGHT = np.arange(24, dtype=np.float32).reshape(8, 3)

def devices():
    return jax.sharding.Mesh(np.array(jax.devices()[:8]), "m")

def placed(*spec):
    return jax.sharding.NamedSharding(devices(), Spec(*spec))

def places_of(tree, of_members, shared):
    """`of_members` for each leaf of eight members, `shared` for the others."""
    place_of = lambda leaf: of_members if leaf.shape[:1] == (8,) else shared
    return jax.tree.map(place_of, tree)

@slow
@many_devices
def test_an_ensemble_is_born_spread_and_stays_so_under_jit():
    def step(tree):
        _, stepped = vmap_apply(Spiking(), tree, EIGHT)
        fresh = vmap_reset(Spiking(), stepped, key=LEGACY)
        return where(np.arange(8) < 4, fresh, stepped)

    born = partial(vmap_init, Spiking(), axis_size=8)
    shapes = jax.eval_shape(lambda: born(key=LEGACY))
    places = places_of(shapes, placed("m"), placed())
    tree = jax.jit(born, out_shardings=places)(key=LEGACY)
    after = jax.jit(step)(tree)
    assert same(after, jax.jit(step)(born(key=LEGACY)), tolerance=1e-6)
    for place, *leaves in zip(*map(jax.tree.leaves, (places, tree, after))):
        for leaf in leaves:
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)

@slow
@many_devices
def test_assign_keeps_shardings_and_leaves_what_is_traced_where_it_is():
    second, third = jax.devices()[1:3]
    keys = jax.random.split(a_key(), 8)
    tree = tree_of(
        spread=jax.device_put(EIGHT * 0, placed("m")),
        keys=jax.device_put(keys, placed("m")),
        second=jax.device_put(ZEROS, second),
    )
    other_keys = on_host(keys)[::-1]
    for given in (np.float64(EIGHT), jnp.asarray(EIGHT)):
        new = {"spread": given, "keys": other_keys, "second": ONES}
        with jax.default_device(third):
            after = assign(tree, new).state
        for leaf, old in zip(after.values(), tree.values()):
            assert leaf.sharding == old.sharding
        assert same([*map(on_host, after.values())], [other_keys, ONES, EIGHT])
    free = jax.jit(lambda new: assign(tree, {"second": new}).state["second"])
    traced = jax.device_put(ONES, third)  # which stays where it is
    assert free(traced).devices() == {third}

@slow
@many_devices
def test_vmapped_calls_run_inside_shard_map():
    def slopes(step):
        loss = lambda tree: jnp.sum(step(tree, EIGHT)[0] ** 3)
        return jax.jit(jax.value_and_grad(loss))(tree)

    tree = vmap_init(Recurrent(), axis_size=8, key=LEGACY)
    specs = places_of(tree, Spec("m"), Spec())
    step = partial(vmap_apply, Recurrent())
    options = {"in_specs": (specs, Spec("m")), "out_specs": (Spec("m"), specs)}
    spread = jax.shard_map(step, mesh=devices(), **options)
    assert same(slopes(spread), slopes(step), tolerance=1e-5)

class Noisy(Module):
    """Its constants are JAX's, since `jax.vmap` does not spread NumPy's over a mesh."""
    def __init__(self):
        self.bias = ParamState(jnp.ones(3))
    def init_state(self, key):
        self.h = HiddenState(uniform(key))
    def update(self, x):
        self.h.value = self.h.value + x * self.bias.value
    reset_state = init_state

def noisy_life(keys, xs):
    """A constructor, the start of an optimiser, a train step, and vmapped calls with a shared bias and a key."""
    def train(tree, x):
        loss = lambda tree: jnp.sum(apply(Noisy(), tree, x)[1]["h"] ** 2)
        slopes = jax.grad(loss)(tree)
        return jax.tree.map(jnp.subtract, tree, slopes)

    built = vmap(lambda key: init(Noisy(), key=key))(keys)
    started = vmap(partial(times, 0))(built)
    shared = partition(built, HiddenState)[0] | snapshot(Noisy())
    _, stepped = vmap_apply(Noisy(), shared, xs)
    after = vmap_reset(Noisy(), shared, key=a_key())
    return built, started, vmap(train)(built, xs), stepped, after

@slow
@many_devices
@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs explicit meshes")
def test_an_explicit_mesh_changes_nothing_but_where_arrays_lie():
    mesh = jax.make_mesh((8,), ("m",))
    if "Explicit" not in str(mesh.axis_types):
        pytest.skip("the axes of a mesh are not explicit")
    args = jax.random.split(a_key(), 8), EIGHT
    expected = noisy_life(*args)
    with jax.set_mesh(mesh):
        spread = jax.sharding.NamedSharding(mesh, Spec("m"))
        got = noisy_life(*jax.device_put(args, spread))
    assert same(got, expected, tolerance=1e-5)
    for leaf in jax.tree.leaves(got):
        assert leaf.shape == (3,) or leaf.sharding.spec[0] == "m"

# ---- Slow: many states, other programs, documents ------------------------------------------------
PATH_USES = {
    "a search": lambda tree: tree.get("nothing"),
    "partition": partial(partition, filter=ParamState),
    "subtree": lambda tree: subtree(StateTree({"x": tree}), "x"),
    "where": lambda tree: where(True, tree, tree),
    "repr": repr,
}
@slow
@cases("use", PATH_USES)
def test_10000_states_and_500_nested_modules_take_less_than_two_seconds(use):
    wide = StateTree({f"wide.{i}": BOX() for i in range(10_000)})
    for tree in (wide, snapshot(chain(500))):
        start = time.process_time()  # other programs do not count
        use(tree)
        assert time.process_time() - start < 2

@slow
def test_shared_states_that_differ_are_refused_in_linear_time():
    def seconds(number):
        model = [keeper(ZEROS) for _ in range(number)]
        start = time.process_time()
        with raises(ValueError, "shared states ended up different"):
            vmap_call_all(model, snapshot(model), "update", ROWS, in_axes=0)
        return time.process_time() - start

    seconds(10)
    assert seconds(1200) < 8 * seconds(300)  # a square would take 16 times as long

@slow
def test_the_examples_of_all_docstrings_hold():
    failed, attempted = doctest.testmod(co, optionflags=doctest.ELLIPSIS)
    assert failed == 0 and attempted > 50

@slow
@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="needs the README")
def test_the_examples_of_the_readme_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text().replace("```", "\n")
    examples = doctest.DocTestParser().get_doctest(text, {}, "README.md", None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed, attempted = runner.run(examples)
    assert failed == 0 and attempted > 9

@slow
@each("wrong", 0, 1)
def test_the_file_shows_its_example_and_notices_a_wrong_result(wrong, tmp_path):
    source = Path(co.__file__).read_text()
    changed = source.replace("\n(3, 3)\n", f"\n({3 + wrong}, 3)\n", 1)
    (tmp_path / "collective.py").write_text(changed)
    command = [sys.executable, "collective.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (wrong, "")
    number = co.__doc__.count("\n>>> ")
    last = f"\n{number - wrong} of {number} examples hold with jax {jax.__version__} on "
    assert last in shown.stdout
    assert not re.search(r"\b_[a-z]", shown.stdout)

@slow
def test_only_public_jax_numpy_and_the_standard_library_are_used():
    source = Path(co.__file__).read_text()
    imported = {*re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE)}
    assert imported - {*sys.stdlib_module_names} == {"jax", "numpy"}
    private = r"\b(?:jax|jnp|np|tree_util)\.(?:\w+\.)*(?:_[a-z]|core\b|interpreters\b)"
    assert not re.findall(private, source)

# ---- What things cost, as ratios to their limits -------------------------------------------------
class Cheap(Module):
    """One state that fades towards what comes in."""
    def __init__(self):
        self.state = State(jnp.zeros(8))
    def reset_state(self):
        self.state.value = jnp.zeros(8)
    def update(self, x):
        self.state.value = self.state.value * 0.9 + x

class Group(Module):
    def __init__(self, number):
        self.cells = [Cheap() for _ in range(number)]
    def update(self, x):
        for cell in self.cells:
            cell.update(x)

def in_turns(ours, bare):
    """The median seconds of two calls, timed in turns, so that a noisy moment hits both."""
    seconds = [], []
    for _ in range(16):
        for call, spent in zip((ours, bare), seconds):
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent.append(time.perf_counter() - start)
    return [np.median(spent[1:]) for spent in seconds]  # the first round compiles

def often(fn, *args):
    return lambda: [fn(*args) for _ in range(100)][-1]

def lowered(fn, *args):  # as a new function each time, since JAX remembers the last
    return lambda: jax.jit(lambda *args: fn(*args)).lower(*args) and None

# Rows: a name, our call, the bare one, and the limit of their ratio; or of the extra
# microseconds of ours for each of so many parts.
def costs_of_steps():
    for number in (1, 10, 1000):
        tree = snapshot(Group(number))
        leaves = tuple(jax.tree.leaves(tree))
        step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))
        limit = [1.05] if number == 1000 else [1.2, 100]
        yield (
            f"jitted step of {number:,} states",
            often(step, tree),
            often(step, leaves),
            *limit,
        )
    model = Group(1000)
    x = jnp.ones(8)
    ensemble = stack(tree, tree)
    many = tuple(jax.tree.leaves(ensemble))
    begin = lambda leaves: tuple(jnp.zeros(8) for _ in leaves)
    step = lambda leaves, x: tuple(leaf * 0.9 + x for leaf in leaves)
    again = partial(reset, model)
    vmap_step = partial(vmap_apply, model, in_axes=None)
    yield (
        "jitted reset",
        often(jax.jit(again), tree),
        often(jax.jit(begin), leaves),
        1.05,
    )
    yield (
        "trace apply",
        lowered(partial(apply, model), tree, x),
        lowered(step, leaves, x),
        1.2,
    )
    yield "trace reset", lowered(again, tree), lowered(begin, leaves), 1.2
    yield (
        "trace vmap_apply",
        lowered(vmap_step, ensemble, x),
        lowered(jax.vmap(step, (0, None)), many, x),
        1.5,
    )
    yield (
        "trace vmap_reset",
        lowered(partial(vmap_reset, model), ensemble),
        lowered(jax.vmap(begin), many),
        1.5,
    )

def costs_of_eager_calls():
    for number in (100, 1000, 10_000):
        model = Group(number)
        tree = snapshot(model)
        bare = lambda: [cell.init_state() for cell in model.cells]
        yield (
            f"call_all_fns of {number:,}",
            lambda: call_all_fns(model, "init_state") and None,
            bare,
            10,
            number,
        )
        yield (
            f"pure call of {number:,}",
            lambda: call_all(model, tree, "init_state") and None,
            bare,
            25,
            number,
        )
    tree = snapshot(Group(1000))
    new = jax.tree.map(lambda leaf: leaf + 1, tree)
    flat = flat_dict(new)
    yield "assign of a tree", lambda: assign(tree, new).state, int, 20, 1000
    yield "assign of JAX arrays", lambda: assign(tree, flat).state, int, 20, 1000
    yield "partition", lambda: partition(tree, State), int, 4, 1000
    yield "flat_dict", lambda: flat_dict(tree), int, 4, 1000
    mask = jnp.arange(8) < 4
    bare = lambda: jax.tree.map(partial(jnp.where, mask), new, tree)
    yield "eager where", lambda: where(mask, new, tree), bare, 3
    arrays = []
    for start in range(0, 800, 50):  # for each of the 16 rounds
        arrays.append({str(i): np.ones((start + i, 3)) for i in range(50)})
    trees = iter([tree_of(**row) for row in arrays])
    ours = iter(arrays)
    bare = iter(arrays)
    first = lambda: assign(next(trees), next(ours)).state
    yield (
        "first assign of 50 new shapes",
        first,
        lambda: jax.device_put(next(bare)),
        3,
    )
    again = lambda: co.__loader__.exec_module(
        importlib.util.module_from_spec(co.__spec__)
    )
    yield "import", again, int, 20_000, 1

@bench
def test_bench_prints_costs_as_ratios_to_their_limits(capsys):
    line = "{:<34}{:>12}{:>12}{:>8}".format
    lines = [line("", "cost", "limit", "ratio")]
    rows = itertools.chain(costs_of_steps(), costs_of_eager_calls())
    gc.disable()  # as timeit does
    for name, ours, bare, limit, *parts in rows:
        ours, bare = in_turns(ours, bare)
        cost = (ours - bare) / parts[0] * 1e6 if parts else ours / bare
        shown = f"{cost:.2f}{' us' * len(parts)}"
        lines.append(line(name, shown, limit, f"{cost / limit:.2f}"))
    gc.enable()
    with capsys.disabled():
        print(f"\njax {jax.__version__} on {jax.devices()[0].device_kind}")
        print(*lines, sep="\n")

# ---- The count of compilations; it stays last -----------------------------------------------------
def test_the_quick_run_compiles_little(capsys):
    with capsys.disabled():
        print(f"\ncompiled {len(COMPILED)} computations")
    assert SLOW or BENCH or len(COMPILED) <= 250
