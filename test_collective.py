# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the collective-states authors
"""The suite of collective.py: run `python -m pytest` beside it.

First the models, then one section for each part of the file, in its order; the life cycle of the
documented API and the costs come last. `python -m pytest -m bench -s` prints the costs.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)  # before jax starts, for the tests of sharding

import abc
import collections
import copy
import dataclasses
import enum
import functools
import gc
import importlib.util
import inspect
import io
import itertools
import json
import logging
import pickle
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import collective
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

jax.config.update("jax_disable_most_optimizations", True)  # half of the time of the suite
KEY = jax.random.key(0)
HERE = Path(collective.__file__).parent
SOURCE = Path(collective.__file__).read_text()
EXPORTS = jax.version.__version_info__ >= (0, 4, 36) and importlib.util.find_spec("flatbuffers")
needs_export = pytest.mark.skipif(not EXPORTS, reason="jax < 0.4.36, or flatbuffers, which it needs")


KINDS = """
import collective, jax
class Spike(collective.HiddenState):
    class Inner(collective.State): pass
class Cell(collective.Module):
    def init_state(self, key):
        self.h, self.i = Spike(jax.random.normal(key, (2,)), tag=("t", 1)), Spike.Inner({"x": 0.5})
    def advance(self, x):
        self.h.value = self.h.value * x + self.i.value["x"][:, None]
"""
EXPORT = """
import jax, kinds, os, collective as c
from jax import export
cell = kinds.Cell()
tree = c.vmap_init(cell, axis_size=3, key=jax.random.key(1))
step = jax.jit(lambda tree, x: c.apply(cell, tree, x, method="advance")[1])
with open("step.bin", "wb") as file:
    file.write(export.export(step)(tree, jax.numpy.ones(2)).serialize())
print(os.getcwd())
"""


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Two other processes, which run beside the suite until the tests ask for their output."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "collective.py").write_text(SOURCE)
    codes = {
        "alone": "import collective, doctest, runpy; failed, attempted = doctest.testmod(collective, optionflags=doctest.ELLIPSIS);"
        "assert attempted > 50 and not failed; runpy.run_path('collective.py', {}, '__main__')",
        "keys": "import jax, collective as c\n"
        "class Noise(c.Module):\n"
        "    def draw(self, key): return jax.random.key_data(key).tolist()\n"
        "print(c.call_all({'a': [Noise()]}, c.StateTree({}), 'draw', key=jax.random.key(0))[0]['a', 0])",
    }
    if EXPORTS:
        (alone / "kinds.py").write_text(KINDS)
        codes["export"] = EXPORT
    environment = dict(os.environ, PYTHONHASHSEED="1")
    started = {
        name: subprocess.Popen([sys.executable, "-c", code], cwd=alone, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for name, code in codes.items()
    }  # fmt: skip

    def output(name):
        text = started[name].communicate()[0]
        assert started[name].returncode == 0, text
        return text

    yield output
    for process in started.values():
        if not process.stdout.closed:  # no test asked for it
            process.kill()
            process.communicate()


# ---- The models ------------------------------------------------------------------------------


def noise(*shape, seed=0):
    """Numbers without a compilation, which takes most of the time of the suite."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / shape[0] ** 0.5, jnp.float32)


class Linear(Module):
    """Weights from a fixed seed in `__init__`, as the layers of the documented API have them."""

    def __init__(self, num_in, num_out, seed=0):
        weight = noise(num_in, num_out, seed=seed)
        self.weight = ParamState({"bias": jnp.zeros(num_out), "weight": weight})

    def update(self, x):
        return x @ self.weight.value["weight"] + self.weight.value["bias"]


class Gelu(Module):
    def update(self, x):
        return jax.nn.gelu(x)


class Relu(Module):
    def update(self, x):
        return jax.nn.relu(x)


class Dropout(Module):
    """Holds the key that its next mask comes from."""

    def __init__(self, prob):
        self.prob = prob

    def init_state(self, *, key=None, **kwargs):
        self.key = ShortTermState(jax.random.key(7) if key is None else key)

    def update(self, x):
        self.key.value, now = jax.random.split(self.key.value)
        return x * jax.random.bernoulli(now, 1 - self.prob, x.shape) / (1 - self.prob)


class Sequential(Module):
    def __init__(self, *layers):
        self.layers = list(layers)

    def update(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class VanillaRNN(Module):
    """Its `reset_state` makes zeros of the single-model shape, whatever the shape is now."""

    def __init__(self, num_in, num_out):
        self.num_out = num_out
        self.W = Linear(num_in + num_out, num_out)

    def _zeros(self, batch_size=None):
        return jnp.zeros((self.num_out,) if batch_size is None else (batch_size, self.num_out))

    def init_state(self, batch_size=None, **kwargs):
        self.h = HiddenState(self._zeros(batch_size))

    def reset_state(self, batch_size=None, **kwargs):
        self.h.value = self._zeros(batch_size)

    def update(self, x):
        self.h.value = jnp.tanh(self.W(jnp.concatenate([x, self.h.value], axis=-1)))
        return self.h.value


class GRU(Module):
    """Weights that `init_state` draws, so that members of an ensemble differ."""

    def __init__(self, num_in, num_out):
        self.sizes = (num_in, num_out)

    def init_state(self, *, key, **kwargs):
        num_in, num_out = self.sizes
        scale = jax.random.uniform(key, minval=0.5)
        self.weights = ParamState({
            gate: scale * noise(num_in + num_out, num_out, seed=seed) for seed, gate in enumerate("zrh")})
        self.h = HiddenState(jnp.zeros(num_out))

    def reset_state(self, **kwargs):
        self.h.value = jnp.zeros(self.sizes[1])

    def update(self, x):
        weights, h = self.weights.value, self.h.value
        both = jnp.concatenate([x, h])
        z, r = jax.nn.sigmoid(both @ weights["z"]), jax.nn.sigmoid(both @ weights["r"])
        self.h.value = (1 - z) * h + z * jnp.tanh(jnp.concatenate([x, r * h]) @ weights["h"])
        return self.h.value


class LIF(Module):
    """Spiking neurons: random membrane potentials at every reset, traces in a new list."""

    def __init__(self, size):
        self.size = size
        self.threshold = LongTermState(jnp.float32(1.0), tag="constant")
        self.traces = None

    def init_state(self, *, key, **kwargs):
        self.V = HiddenState(jax.random.uniform(key, (self.size,)))
        self.traces = [ShortTermState(jnp.zeros(self.size)) for _ in range(2)]
        self.count = ShortTermState(0)

    def reset_state(self, *, key, **kwargs):
        self.V.value = jax.random.uniform(key, (self.size,))
        for trace in self.traces:
            trace.value = jnp.zeros(self.size)
        self.count.value = 0

    def update(self, x):
        V = 0.9 * self.V.value + x.sum()
        spikes = (V > self.threshold.value).astype(jnp.float32)
        self.V.value = V * (1 - spikes)
        for decay, trace in zip((0.5, 0.9), self.traces):
            trace.value = decay * trace.value + spikes
        self.count.value = self.count.value + 1
        return spikes


class Shared(Module):
    """One cell under two names, one state under two, and a child that knows its parent."""

    def __init__(self):
        self.first = self.second = Linear(3, 3)
        self.tied = Linear(3, 3, seed=1)
        self.tied.weight = self.first.weight
        self.child = Sequential(self.first)
        self.child.parent = self

    def update(self, x):
        return self.second(self.child(x)) + self.tied(x)


class Mixed(Module):
    """States in dicts with int and string keys, nested lists and tuples."""

    def __init__(self):
        self.table = {10: State(jnp.ones(3)), 9: State(jnp.zeros(3)), "b": [State(jnp.ones(3))]}
        self.nest = ([State(jnp.ones(3)), (Linear(3, 3), {"deep": Linear(3, 3)})], "text", 3.5)

    def update(self, x):
        for state in (self.table[10], self.table["b"][0], self.nest[0][0]):
            state.value = state.value + x
        return self.nest[0][1][0](x) + self.nest[0][1][1]["deep"](x)


MODELS = {
    "mlp": lambda: Sequential(Linear(3, 4), Gelu(), Dropout(0.3), Linear(4, 3)),
    "vanilla": lambda: VanillaRNN(3, 3),
    "gru": lambda: GRU(3, 3),
    "stack": lambda: Sequential(GRU(3, 4), Relu(), VanillaRNN(4, 5)),
    "lif": lambda: Sequential(LIF(4), Linear(4, 3)),
    "shared": Shared,
    "mixed": Mixed,
}
every_model = pytest.mark.parametrize("model", [MODELS[name]() for name in MODELS], ids=MODELS)


# ---- What the tests compare with ---------------------------------------------------------------


def raw(leaf):
    """A leaf as NumPy, with keys as their data."""
    typed = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)


def same(a, b, exact=True):
    """Whether two pytrees have the same structure and the same values."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = [(raw(x), raw(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    close = np.array_equal if exact else lambda x, y: np.allclose(x, y, rtol=1e-5, atol=1e-6)
    return all(x.shape == y.shape and x.dtype == y.dtype and close(x, y) for x, y in pairs)


def frozen(thing, seen=None):
    """A deep image of a module graph or a value, that shares nothing with it that can change."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return ("again", seen[id(thing)])
    if isinstance(thing, (Module, State, list, tuple, dict)):
        seen[id(thing)] = len(seen)
        if isinstance(thing, (list, tuple)):
            return (type(thing), [frozen(part, seen) for part in thing])
        parts = thing if isinstance(thing, dict) else vars(thing)
        return (type(thing), [(name, frozen(part, seen)) for name, part in parts.items()])
    if isinstance(thing, (np.ndarray, jax.Array)):
        array = raw(thing)
        return (type(thing), str(array.dtype), array.shape, array.tobytes())
    return thing if isinstance(thing, (str, int, float, type(None))) else repr(thing)


def plain_walk(root):
    """Modules and states by first path, with recursion: the plainest reading of the contract."""
    modules, states, seen = [], {}, set()

    def visit(path, thing):
        if isinstance(thing, (Module, State, list, tuple, dict)):
            if id(thing) in seen:
                return
            seen.add(id(thing))
        if isinstance(thing, State):
            states[path] = thing
        elif isinstance(thing, (Module, dict)):
            for name, part in (vars(thing) if isinstance(thing, Module) else thing).items():
                visit(path + (name,), part)
        elif isinstance(thing, (list, tuple)):
            for index, part in enumerate(thing):
                visit(path + (index,), part)
        if isinstance(thing, Module):
            modules.append((path, thing))

    visit((), root)
    return modules, states


class Node(Module):
    """A node of a random graph: it counts, draws and creates."""

    def init_state(self, *, key, **kwargs):
        if self.creates:
            self.fresh = HiddenState(jax.random.uniform(key, (2,)))

    def reset_state(self, *, key, **kwargs):
        if self.creates:
            self.fresh.value = jax.random.uniform(key, (2,))

    def update(self):
        mine = [part for part in vars(self).values() if isinstance(part, State)]
        for state in mine:
            state.value = state.value * 2 + 1
        return sum((jnp.sum(state.value) for state in mine), jnp.float32(len(mine)))


def random_graph(seed):
    """Nodes with shared children, shared states, cycles through `parent`, and nested containers."""
    rng = random.Random(seed)
    nodes = [Node() for _ in range(rng.randint(2, 9))]
    shared = [State(jnp.float32(number)) for number in range(3)]
    for index, node in enumerate(nodes):
        parts = {"creates": rng.random() < 0.5, "plain": rng.random()}
        for name in rng.sample("abcdef", rng.randint(0, 4)):
            parts[name] = rng.choice([*shared, State(jnp.float32(rng.random())), 3, None])
        below = nodes[index + 1 :]
        for name in rng.sample(["x", "y", "z"], min(2, len(below))):
            child = rng.choice(below)
            parts[name] = rng.choice(
                [child, [child], {3: child, "k": State(jnp.ones(2))}, ([{"deep": (child,)}], 1)]
            )
            child.parent = node
        names = list(parts)
        rng.shuffle(names)
        for name in names:
            setattr(node, name, parts[name])
    return nodes[0]


# ---- States and filters --------------------------------------------------------------------------


def test_a_state_starts_without_tag_and_unmapped():
    state = ParamState(jnp.ones(2))
    assert (state.tag, state.mapped) == (None, 0)
    assert State(1, tag="slow").tag == "slow"
    assert issubclass(ParamState, LongTermState) and issubclass(HiddenState, ShortTermState)


def test_the_repr_of_a_state_shows_shapes_and_no_contents():
    assert repr(HiddenState({"v": jnp.full((2, 3), 7.0)})) == "HiddenState(v float32[2,3])"


@pytest.mark.parametrize(
    "filter, expected",
    [
        (ParamState, ["w"]),
        (State, ["h", "s", "w"]),
        ("slow", ["s"]),
        (lambda path, state: path == ("h",) and isinstance(state, HiddenState), ["h"]),
        (..., ["h", "s", "w"]),
        (True, ["h", "s", "w"]),
        (None, []),
        (False, []),
        ([ParamState, "slow"], ["s", "w"]),
        ((None, (HiddenState, [])), ["h"]),
    ],
)
def test_every_filter_means_the_same_everywhere(filter, expected):
    model = Module()
    model.w, model.h = ParamState(jnp.ones(2)), HiddenState(jnp.ones(2))
    model.s = State(jnp.ones(2), tag="slow")
    matching, rest = partition(snapshot(model), filter)
    assert sorted(path[0] for path in matching) == expected
    assert sorted(path[0] for path in model.states(filter)) == expected
    assert same(matching | rest, snapshot(model))


@pytest.mark.parametrize("filter", [3, 1.5, {"a"}, {"a": 1}, Module(), [ParamState, 3]])
def test_anything_else_is_no_filter(filter):
    for use in (
        lambda: partition(StateTree({}), filter),
        lambda: Module().nodes(filter),
        lambda: init(Module(), node_to_exclude=filter),
        lambda: vmap_init(Module(), axis_size=2, state_to_exclude=filter),
    ):
        with pytest.raises(TypeError, match="a filter is a type, a tag"):
            use()


def test_excluding_a_node_spares_its_children_and_sees_the_module_itself():
    model = Sequential(VanillaRNN(2, 2), VanillaRNN(2, 2))
    chosen = model.layers[0]
    tree = init(model, node_to_exclude=lambda path, node: node is chosen)
    assert list(tree) == [
        ("layers", 0, "W", "weight"), ("layers", 1, "W", "weight"), ("layers", 1, "h")]  # fmt: skip
    model.tag = "outer"
    assert ("layers", 0, "h") in init(model, node_to_exclude="outer")


def test_the_repr_of_a_state_shows_its_mark():
    box = stack(tree_of(h=np.zeros((4, 3), np.float32))).states()["h",]
    assert repr(box) == "State(float32[1,4,3], mapped=1)"


# ---- Modules and the walk ------------------------------------------------------------------------


def test_traversal_visits_children_before_parents_in_definition_order():
    model = Module()
    model.b, model.a = Sequential(Relu()), (Gelu(), {"k": Relu(), 1: Gelu()})
    assert [path for path, _ in traverse(model)] == [
        ("b", "layers", 0), ("b",), ("a", 0), ("a", 1, "k"), ("a", 1, 1), ()]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_the_walk_of_random_graphs_is_that_of_the_plain_recursion(seed):
    model = random_graph(seed)
    modules, states = plain_walk(model)
    assert list(traverse(model)) == modules
    assert list(model.nodes().items()) == modules
    assert model.states() == states
    assert set(snapshot(model)) == set(states)


def test_traverse_is_an_iterator_over_a_module_or_a_container_of_modules():
    one, two = Relu(), Gelu()
    assert next(traverse(one)) == ((), one)
    assert list(traverse([one, two])) == [((0,), one), ((1,), two)]
    assert list(traverse({"x": (one,)})) == [(("x", 0), one)]


@pytest.mark.parametrize("target", [3, None, "ab", Module, {Module()}, State(1), [Module(), 3], {"a": State(1)}])
def test_anything_else_is_no_target(target):
    uses = [traverse, snapshot, init, init_all_states, reset_all_states]
    uses += [lambda m: apply(m, StateTree({})), lambda m: restore(m, StateTree({}))]
    uses += [lambda m: vmap_reset_all_states(m, axis_size=2), lambda m: assign_state_values(m, {})]
    for use in uses:
        with pytest.raises(TypeError, match="expected a module, or a list, tuple or dict of modules"):
            use(target)


def test_the_repr_of_a_module_is_indented_and_survives_cycles():
    assert repr(Shared()).splitlines() == [
        "Shared",
        "  child: Sequential",
        "  first: Linear",
        "    weight: ParamState(bias float32[3], weight float32[3,3])",
        "  tied: Linear",
    ]
    assert repr(vmap_init_all_states(Sequential(VanillaRNN(2, 3)), axis_size=4)).splitlines() == [
        "Sequential",
        "  layers.0: VanillaRNN",
        "    W: Linear",
        "      weight: ParamState(bias float32[3], weight float32[5,3])",
        "    h: HiddenState(float32[4,3], mapped=1)",
    ]
    assert len(repr(chain(1000)).splitlines()) == 2000


def test_a_module_mixes_into_any_class_dataclasses_included():
    @dataclasses.dataclass
    class Pair(Module):
        left: Module
        right: Module

    @dataclasses.dataclass(frozen=True)
    class Fixed(Module):
        state: State

        def reset_state(self):
            self.state.value = self.state.value * 0

    model = Pair(Fixed(State(jnp.ones(2))), Fixed(State(jnp.ones(2))))
    tree = reset(model, snapshot(model))
    assert [float(value.sum()) for value in tree.values()] == [0, 0]
    assert float(model.left.state.value.sum()) == 2


def test_slots_are_refused_since_states_would_be_lost_in_them():
    @dataclasses.dataclass(slots=True)
    class Slotted(Module):
        state: State

    with pytest.raises(TypeError, match="Slotted has __slots__"):
        snapshot(Slotted(State(1)))

    class Narrow:
        __slots__ = ("state",)

    class Mixed(Module, Narrow):
        pass

    with pytest.raises(TypeError, match="Mixed has __slots__"):
        snapshot([Mixed()])

    class Base:
        __slots__ = ("__dict__", "__weakref__")

    class Fine(Module, Base):
        __slots__ = ()

    snapshot(Fine())


def test_modules_may_compare_and_count_as_they_like():
    class Odd(Module):
        def __eq__(self, other):
            raise RuntimeError("compared")

        __hash__ = None

        def __bool__(self):
            raise RuntimeError("tested")

        __len__ = __bool__

        def init_state(self):
            self.h = State(jnp.zeros(2))

    model = {"odd": Odd()}
    model["odd"].inner, model["odd"].other = [Odd()], Odd()
    tree = vmap_init(model, axis_size=2)
    assert same(reset(model, tree), tree) and len(tree) == 3
    assert same(snapshot(vmap_init_all_states(model, axis_size=2)), tree)


def test_calling_a_module_forwards_to_update():
    assert Relu()(jnp.array(-1.0)) == 0
    with pytest.raises(AttributeError, match="update"):
        Module()(1)


@pytest.mark.parametrize("key", ["name", "a.b", "", 0, -3, (1, "a"), ("x", ("y", 2)), ()])
def test_strings_ints_and_tuples_of_these_are_keys_on_the_way_to_a_state(key):
    model = Module()
    model.table = {key: {"deep": [State(np.ones(2))]}}
    model.nodes_by_key = {key: Relu()}
    assert list(snapshot(model)) == [("table", key, "deep", 0)]
    assert ("nodes_by_key", key) in dict(traverse(model))
    assert same(snapshot(restore(model, snapshot(model))), snapshot(model))


class Color(enum.IntEnum):
    RED = 1


class Word(str):
    pass


@pytest.mark.parametrize("key", [
    True, False, 1.0, 2.5, None, b"k", frozenset("ab"), (1, True), ("a", (2.0,)), Relu, np.int64(1),
    Color.RED,
    Word("w"), float("nan"),
], ids=range(14))  # fmt: skip
def test_any_other_key_on_the_way_to_a_state_or_module_is_refused(key):
    with_state, with_module = Module(), Module()
    with_state.table = {key: [State(np.ones(2))]}
    with_module.table = {"x": {key: {"deep": Relu()}}}
    text = re.escape(f"{key!r} ({type(key).__name__}) at ")
    for use in (snapshot, lambda m: list(traverse(m)), init, init_all_states, repr, Module.states):
        with pytest.raises(TypeError, match=f"str, an int or a tuple.*{text}\\('table', "):
            use(with_state)
        with pytest.raises(TypeError, match=f"str, an int or a tuple.*{text}\\('table', 'x', "):
            use(with_module)
    with pytest.raises(TypeError, match=text):
        snapshot({key: Relu()})


def test_keys_that_lead_to_no_state_and_no_module_may_be_of_any_kind():
    class Counter(Module):
        def __init__(self):
            self.names = {
                True: "yes",
                2.5: [1, {None: ()}],
                frozenset("a"): {b"k": {}},
                Relu: jnp.ones(2),
            }
            self.state = State(np.zeros(()))

        def update(self):
            self.names[False] = self.names.pop(True)
            self.state.value += len(self.names)

    model = Counter()
    before = frozen(model)
    assert list(snapshot(model)) == [("state",)]
    assert float(apply(model, snapshot(model))[1]["state"]) == 4
    assert frozen(model) == before
    assert call_all_fns(model, "update").names[False] == "yes"


@pytest.mark.parametrize("value", [
    jnp.ones(2), np.ones(2), np.float32(1), 3.0, 2, 1j, {"w": jnp.ones(2)}, [np.zeros(1), "text"],
], ids=range(8))  # fmt: skip
def test_an_array_does_not_take_the_place_of_a_state(value):
    class Cell(Module):
        def __init__(self):
            self.h = HiddenState(np.zeros(2))

        def update(self, x):
            self.h = value

    model, text = Cell(), "'h' is a HiddenState; write self.h.value = "
    box, before = model.h, frozen(model)
    with pytest.raises(TypeError, match=text):
        model.h = value
    for form in families(model):
        with pytest.raises(TypeError, match=text) as info:
            form("update", 1)
        assert "raised by 'update' of the root (Cell)" in info.value.__notes__
    assert model.h is box and frozen(model) == before


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, jax.grad])
def test_a_traced_array_does_not_take_the_place_of_a_state(wrap):
    class Cell(Module):
        def __init__(self):
            self.child = Module()
            self.child.h = HiddenState(np.zeros(2))

        def update(self, x):
            self.child.h = x + 1

    tree = snapshot(Cell())
    with pytest.raises(TypeError, match="'h' is a HiddenState; write self.h.value = "):
        wrap(lambda x: apply(Cell(), tree, x)[0])(
            jnp.ones(()) if wrap is not jax.vmap else jnp.ones(2)
        )


def test_a_state_gives_way_to_another_state_and_to_what_holds_no_array():
    model = Module()
    model.h = State(np.zeros(2))
    for value in (
        ParamState(np.ones(2)),
        None,
        State(1),
        "text",
        State(2),
        [State(3)],
        Relu(),
        jnp.ones(2),
        5,
    ):
        model.h = value
        assert model.h is value
    model.w = State(1)
    del model.w
    model.w = jnp.ones(2)  # nothing is there any more


def load_again(path, name):
    """Another copy of the file, or the same file under another name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("vendored", [True, False])
def test_modules_and_states_of_another_copy_of_the_file_are_refused(vendored, tmp_path):
    path = collective.__file__
    if vendored:
        path = tmp_path / "collective.py"
        path.write_text(SOURCE)
    other = load_again(path, "vendored" if vendored else "again")

    class Foreign(other.Module):
        pass

    assert len(other.snapshot(Foreign())) == 0
    for stranger in (Foreign(), other.HiddenState(np.ones(2))):
        model = Sequential(Relu(), {"deep": (stranger,)})
        for use in (snapshot, init, init_all_states, repr, lambda m: list(traverse(m)),
                    Module.nodes,
                    lambda m: restore(m, StateTree({}))):  # fmt: skip
            with pytest.raises(
                TypeError, match=f"{type(stranger).__name__} .*another copy of this file"
            ) as info:
                use(model)
            assert str(path) in str(info.value) and collective.__file__ in str(info.value)
        with pytest.raises(TypeError, match="another copy of this file"):
            snapshot(stranger)
    foreign = Foreign()
    foreign.child = Relu()
    with pytest.raises(
        TypeError, match=f"Relu .*another copy of this file, {re.escape(collective.__file__)}"
    ):
        other.snapshot(foreign)


def test_the_repr_of_a_module_names_each_line_from_the_line_above():
    model = Module()
    model.table = {"k": [Sequential(Linear(2, 3))], 7: State(np.ones(2, np.int8))}
    model.table["k"][0].layers[0].hidden = [
        stack(tree_of(h=np.zeros((2, 3), np.float16))).states()["h",]
    ]
    assert repr(model).splitlines() == [
        "Module",
        "  table.7: State(int8[2])",
        "  table.k.0: Sequential",
        "    layers.0: Linear",
        "      hidden.0: State(float16[1,2,3], mapped=1)",
        "      weight: ParamState(bias float32[3], weight float32[2,3])",
    ]


# ---- State trees ---------------------------------------------------------------------------------


def tree_of(**values):
    return StateTree({name: State(value) for name, value in values.items()})


def test_paths_come_in_canonical_order_whatever_the_order_of_creation():
    names = ["b", "a.10.x", "a.9.x", "a.b", "c"]
    trees = []
    for order in (names, names[::-1], sorted(names)):
        trees.append(StateTree({name: State(jnp.ones(2)) for name in order}))
    assert list(trees[0]) == [("a", 9, "x"), ("a", 10, "x"), ("a", "b"), ("b",), ("c",)]
    assert len({jax.tree.structure(tree) for tree in trees}) == 1


def test_ints_strings_and_tuples_of_these_have_a_place_in_the_order():
    model = Module()
    model.table = {("b", 1): State(1), (1, 2): State(2), "s": State(3), 4: State(4), "4x": State(5)}
    first = snapshot(model)
    model.table = {key: model.table[key] for key in reversed(model.table)}
    assert jax.tree.structure(first) == jax.tree.structure(snapshot(model))
    assert [path[1] for path in first] == [4, "4x", "s", ("b", 1), (1, 2)]


def graph_in_order(seed, order):
    """A graph fixed by `seed`, with cycles and aliases, whose attributes are set in any `order`.

    An alias is set after the name that it repeats: an object goes by its first path.
    """
    rng, shuffler = random.Random(seed), random.Random(order)

    def build(depth, parent):
        node, parts = Module(), {"parent": parent, "state": State(jnp.ones(2)), "n": rng.random()}
        for name in ["y", "x", "w"][: rng.randint(1, 3) if depth else 0]:
            child = build(depth - 1, node)
            parts[name] = rng.choice([child, [1, child], {7: child, "b": State(1), 3: (child,)}])
        names = list(parts)
        shuffler.shuffle(names)
        for name in names:
            setattr(node, name, parts[name])
        node.alias, node.again = node.state, parts.get("y")
        return node

    return build(3, None)


@pytest.mark.parametrize("seed", range(10))
def test_treedefs_do_not_depend_on_the_order_of_attributes(seed):
    structures = {jax.tree.structure(snapshot(graph_in_order(seed, order))) for order in range(5)}
    assert len(structures) == 1


def test_a_path_may_be_written_as_a_dotted_name():
    tree = snapshot(Sequential(Linear(2, 3)))
    assert tree["layers.0.weight"]["bias"].shape == tree["layers", 0, "weight"]["bias"].shape
    assert "layers.0.weight" in tree and ("layers", 0, "weight") in tree
    assert "layers.1.weight" not in tree and ("layers", 0) not in tree and 3 not in tree
    assert list(StateTree({"layers.0.weight": State(1)})) == [("layers", 0, "weight")]


def test_a_look_up_that_fails_names_the_closest_paths():
    tree = snapshot(Sequential(Linear(2, 3)))
    with pytest.raises(KeyError, match=r"no state 'layers.0.wieght', .*the closest.*layers.0.weight"):
        tree["layers.0.wieght"]
    with pytest.raises(KeyError, match="layers.0.weight"):
        tree["layers", 0, "weigth"]
    assert tree.get("nothing") is None


def test_two_states_of_one_dotted_name_are_refused_when_a_tree_is_made():
    model, nested = Module(), Module()
    model.a = {"b": State(1)}
    nested.t = {(1, 2): Module(), "(1, 2)": Module()}
    nested.t[1, 2].w, nested.t["(1, 2)"].w = State(1), State(2)
    setattr(model, "a.b", State(2))
    part = StateTree({"b": State(1)})
    for make, one, two in [
        (lambda: StateTree({("a", "b"): State(1), ("a.b",): State(2)}), ("a", "b"), ("a.b",)),
        (lambda: StateTree({("a", 1): State(1), ("a", "1"): State(2)}), ("a", 1), ("a", "1")),
        (lambda: snapshot(model), ("a", "b"), ("a.b",)),
        (lambda: snapshot(nested), ("t", (1, 2), "w"), ("t", "(1, 2)", "w")),
        (lambda: StateTree({"a": part}) | StateTree({("a.b",): State(2)}), ("a", "b"), ("a.b",)),
        (lambda: StateTree({"a": part, ("a.b",): State(2)}), ("a", "b"), ("a.b",)),
    ]:
        with pytest.raises(ValueError, match="spell one dotted name") as info:
            make()
        assert repr(one) in str(info.value) and repr(two) in str(info.value)


def test_two_leaves_of_one_dotted_name_are_refused_when_a_tree_is_made():
    model = Module()
    model.a, model.child = State({"b": 1.0}), Module()
    setattr(model, "a.b", State(2.0))
    one, two = ("a", "b"), ("a.b",)
    for make in (
        lambda: StateTree({"a": State({"b": 1.0}), ("a.b",): State(2.0)}),
        lambda: StateTree({"a": State({"b": 1.0})}) | StateTree({("a.b",): State(2.0)}),
        lambda: snapshot(model),
        lambda: init(model),
    ):
        with pytest.raises(ValueError, match="spell one dotted name") as info:
            make()
        assert repr(one) in str(info.value) and repr(two) in str(info.value)
    with pytest.raises(ValueError, match=r"\('a', 'b', 'c'\).*\('a', 'b.c'\)"):
        StateTree({"a": State({"b": {"c": 1.0}, "b.c": 2.0})})
    with pytest.raises(ValueError, match=r"\('a', 'b'\)"):  # one path even
        StateTree({"a": State({"b": 1.0}), "a.b": State(2.0)})
    assert len(flat_dict(StateTree({"a": State({"b": 1.0}), "a.c": State(2.0)}))) == 2


@pytest.mark.parametrize("bad", [{3: State(1)}, {"a": 1}, {("a",): jnp.ones(2)}, {(): State(1)}])
def test_a_tree_is_made_of_paths_and_boxes(bad):
    with pytest.raises(TypeError, match="expected a path with a State or tree"):
        StateTree(bad)


@pytest.mark.parametrize("value", ["text", object(), {"w": {1, 2}}, State(1)])
def test_a_value_without_arrays_is_refused_with_its_path(value):
    model = Module()
    model.child = Module()
    model.child.odd = HiddenState(value)
    with pytest.raises(TypeError, match="no array in 'child.odd' \\(HiddenState\\)"):
        snapshot(model)


def test_a_tree_is_a_pytree_with_readable_key_paths():
    tree = snapshot(Sequential(Linear(2, 3)))
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert keys == ["['layers.0.weight']['bias']", "['layers.0.weight']['weight']"]
    assert same(jax.tree.map(lambda leaf: leaf, tree), tree)


def test_trees_compare_and_hash_by_identity():
    one, two = tree_of(a=1), tree_of(a=1)
    assert one == one and one != two and len({one, two}) == 2


def test_the_union_prefers_its_right_side_and_takes_only_trees():
    union = tree_of(a=1, b=1) | StateTree({"b": HiddenState(2), "c": State(2)})
    assert [int(value) for value in union.values()] == [1, 2, 2]
    assert [type(box) for box in union.states().values()] == [State, HiddenState, State]
    with pytest.raises(TypeError, match="expected a StateTree"):
        union | {"a": State(1)}


def test_the_repr_of_a_tree_is_a_table_of_leaves_without_contents():
    tree = stack(*[snapshot(Sequential(Linear(2, 3)))] * 2) | StateTree({"k": State(KEY)})
    assert repr(tree).splitlines() == [
        "path                    kind        value           mapped",
        "k                       State       key<fry>[]      0",
        "layers.0.weight.bias    ParamState  float32[2,3]    1",
        "layers.0.weight.weight  ParamState  float32[2,2,3]  1",
        "3 leaves, 19 numbers, 80 B",
    ]
    assert repr(StateTree({})).splitlines() == [
        "path  kind  value  mapped", "0 leaves, 0 numbers, 0 B"]  # fmt: skip


def test_the_last_line_of_the_repr_of_a_tree_has_its_totals():
    shapes = {"a": (1, np.int8), "b": ((2, 3), np.float16), "c": (1227, np.float32)}
    tree = tree_of(**{name: np.zeros(*each) for name, each in shapes.items()}, none=None)
    assert repr(tree).splitlines()[-1] == "3 leaves, 1,234 numbers, 4.8 KiB"  # 1 + 12 + 4908 bytes
    for size, total in [(255, "255 numbers, 1020 B"), (384, "384 numbers, 1.5 KiB"),
                        (5 << 16, "327,680 numbers, 1.2 MiB"),
                        (3 << 27, "402,653,184 numbers, 1.5 GiB"),
                        (11 << 37, "1,511,828,488,192 numbers, 5.5 TiB")]:  # fmt: skip
        shape = jax.ShapeDtypeStruct((size,), jnp.float32)
        look = jax.tree.map(lambda leaf: shape, tree_of(a=1.0))
        assert repr(look).splitlines()[-1] == f"1 leaves, {total}"


@every_model
def test_trees_survive_pickling_and_copying(model):
    tree = init(model, key=KEY)
    for twin in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree)):
        assert twin is not tree and same(twin, tree)


def test_boxes_carry_kinds_tags_and_mapped_counts_but_are_fresh():
    tree = stack(StateTree({"a": HiddenState(jnp.ones(2), tag="t")}))
    box = tree.states()["a",]
    assert (type(box), box.tag, box.mapped) == (HiddenState, "t", 1)
    box.value, box.tag = None, "other"
    assert tree["a"].shape == (1, 2) and tree.states()["a",].tag == "t"
    assert same(StateTree(tree.states()), tree)


def test_a_tree_shares_nothing_that_can_change():
    array, value = np.ones(1024, np.float32), {"list": [np.zeros(3)], "w": jnp.ones(2)}
    tree = StateTree({"array": State(array), "value": State(value)})
    array[:] = 7
    value["list"][0][:] = 7
    value["list"].append(1)
    tree["value"]["list"].append(2)
    tree.states()["value",].value["w"] = None
    assert float(tree["array"].max()) == 1
    assert [leaf.tolist() for leaf in jax.tree.leaves(tree["value"])] == [[0, 0, 0], [1, 1]]
    assert isinstance(tree["array"], jax.Array)


def test_a_tree_of_numpy_arrays_is_safe_from_changes_in_place():
    class Adder(Module):
        def __init__(self):
            self.h = HiddenState(jnp.zeros(2))

        def update(self):
            self.h.value += 1

    for convert in (np.array, np.asarray):
        tree = jax.tree.map(convert, snapshot(Adder()))
        model = restore(Adder(), tree)
        model.update()
        box = tree.states()["h",]
        box.value += 1
        assert apply(Adder(), tree)[1]["h"].tolist() == [1, 1]
        assert jax.tree.leaves(tree)[0].tolist() == [0, 0]
    ensemble = jax.device_get(stack(tree, tree))
    assert jax.jit(lambda i: member(ensemble, i)["h"])(1).tolist() == [0, 0]


def test_two_names_of_one_path_are_refused_when_a_tree_is_made():
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*spell one dotted name"):
        StateTree({"a.b": State(1), ("a", "b"): State(2)})
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*spell one dotted name"):
        StateTree({"a": StateTree({"b": State(1)}), "a.b": State(2)})
    assert list(StateTree({"a.01": State(1), "a.1": State(2)})) == [("a", 1), ("a", "01")]


def test_flat_dict_names_every_leaf():
    tree = snapshot(Sequential(Linear(2, 3), Linear(3, 1)))
    assert {name: leaf.shape for name, leaf in flat_dict(tree).items()} == {
        "layers.0.weight.bias": (3,), "layers.0.weight.weight": (2, 3),
        "layers.1.weight.bias": (1,), "layers.1.weight.weight": (3, 1)}  # fmt: skip


def test_where_chooses_along_the_axes_of_the_mask():
    old = tree_of(h=np.zeros((2, 3)), pair=(np.zeros(2), np.zeros((2, 3, 4))))
    new = jax.tree.map(jnp.ones_like, old)
    chosen = where([True, False], new, old)
    assert all(raw(leaf)[0].min() == 1 and raw(leaf)[1].max() == 0 for leaf in jax.tree.leaves(chosen))
    mask = np.array([[True, False, True], [False, False, True]])
    chosen = where(mask, tree_of(h=np.ones((2, 3, 4))), tree_of(h=np.zeros((2, 3, 4))))
    assert np.array_equal(chosen["h"], np.repeat(mask[..., None], 4, -1))


def test_where_keeps_what_is_the_same_object_in_both():
    shared = StateTree({"w": ParamState(jnp.ones((5, 7)))})
    old = shared | tree_of(h=jnp.zeros((2, 3)), key=jax.random.split(KEY, 2))
    new = shared | tree_of(h=jnp.ones((2, 3)), key=jax.random.split(jax.random.key(1), 2))
    chosen = where(jnp.array([False, True]), new, old)
    assert chosen["w"] is shared["w"]
    assert np.array_equal(raw(chosen["key"]), [raw(old["key"])[0], raw(new["key"])[1]])


def test_where_refuses_trees_and_leaves_that_do_not_match():
    old = tree_of(h=jnp.zeros((2, 3)), w=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"\(2,\).*'w' float32\[3\]"):
        where(jnp.array([True, False]), jax.tree.map(jnp.ones_like, old), old)
    for other in (tree_of(h=jnp.zeros((2, 3))), tree_of(h=jnp.zeros((2, 3)), w=jnp.zeros(4)),
                  tree_of(h=jnp.zeros((2, 3)), w=jnp.zeros(3, int))):  # fmt: skip
        with pytest.raises(ValueError, match="only the values of the trees may differ.*'w'"):
            where(True, other, old)


@pytest.mark.parametrize("use", [
    lambda tree: partition(tree, ...), flat_dict, lambda tree: reset(Relu(), tree),
    lambda tree: where(True, tree, tree), lambda tree: member(tree, 0), stack,
    lambda tree: restore(Relu(), tree), lambda tree: assign(tree, {}),
    lambda tree: vmap_reset(Relu(), tree, axis_size=2),
])  # fmt: skip
def test_a_mapping_is_no_state_tree(use):
    with pytest.raises(TypeError, match="expected a StateTree"):
        use({"a": jnp.ones(2)})


@pytest.mark.parametrize("numbers", [*itertools.permutations([1, True, 1.0])])
def test_numbers_that_compare_equal_are_different_tags(numbers):
    for tags in (numbers, [(tag, "x") for tag in numbers], [frozenset([tag]) for tag in numbers]):
        trees = [StateTree({"w": State(np.ones(2), tag=tag)}) for tag in tags]  # all alive at once
        boxes = [tree.states()["w",] for tree in trees]
        assert [repr(box.tag) for box in boxes] == [repr(tag) for tag in tags]
        assert len({jax.tree.structure(tree) for tree in trees}) == 3


def test_a_tree_has_its_own_names_whatever_other_trees_are_alive():
    for key in (True, 1.0, np.int64(1), (True,)):
        with pytest.raises(TypeError, match="expected a path with a State or tree"):
            StateTree({(key, "w"): State(np.ones(2))})
        with pytest.raises(TypeError, match="a key on the way to a state or module"):
            snapshot({0: Link(None), key: Link(None)})
    tree = snapshot([Link(None), Link(None)])
    assert [(type(path[0]), path[0]) for path in tree] == [(int, 0), (int, 1)]
    assert list(flat_dict(tree)) == ["0.state", "1.state"]


def aligned(*shape):
    """Zeros that JAX can take over without a copy, since they are aligned as it likes them."""
    size = int(np.prod(shape)) * 4
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


class Keeper(Module):
    """Keeps what it is given, in a new state or in the one that it has."""

    def init_state(self, buffer):
        self.h = HiddenState({"deep": [buffer]})

    def keep(self, buffer):
        self.h.value = buffer


def of_numpy(buffer, mapped=False):
    """A tree whose leaves a `tree.map` made NumPy."""
    tree = StateTree({"a.h": State({"deep": 0.0}), "a.w": ParamState(0.0)})
    return jax.tree.map(lambda leaf: buffer, stack(tree) if mapped else tree)


WAYS_INTO_A_TREE = {
    "constructor": lambda b: StateTree({"h": State(b)}),
    "constructor, in containers": lambda b: StateTree({"h": State({"x": [b, (b,)]})}),
    "snapshot": lambda b: snapshot(Link(None, b)),
    "snapshot, in containers": lambda b: snapshot(Link(None, {"x": [b]})),
    "init": lambda b: init(Keeper(), b),
    "apply": lambda b: apply(Keeper(), StateTree({"h": State(0.0)}), b, method="keep")[1],
    "call_all": lambda b: call_all([Keeper()], StateTree({"0.h": State(0.0)}), "keep", b)[1],
    "vmap_init, mapped": lambda b: vmap_init(Keeper(), b, axis_size=len(b), in_axes=0),
    "vmap_init, shared": lambda b: vmap_init(Keeper(), b, axis_size=2),
    "vmap_call_all, excluded": lambda b: vmap_call_all(
        Keeper(), StateTree({}), "init_state", b, axis_size=2, state_to_exclude=HiddenState
    )[1],
    "vmap_apply": lambda b: vmap_apply(
        Keeper(), stack(StateTree({"h": State(0.0)})), b[:1], method="keep"
    )[1],
    "vmap_reset of mapped states": lambda b: vmap_reset(Relu(), of_numpy(b, mapped=True)),
    "reset": lambda b: reset(Relu(), of_numpy(b)),
    "assign": lambda b: assign(
        jax.tree.map(lambda leaf: b * 0, of_numpy(b)), {"a.w": b, "a.h.deep": b}
    )[0],
    "assign of nothing": lambda b: assign(of_numpy(b), {})[0],
    "assign of a tree": lambda b: assign(jax.tree.map(jnp.zeros_like, of_numpy(b)), of_numpy(b))[0],
    "left of |": lambda b: of_numpy(b) | StateTree({}),
    "right of |": lambda b: StateTree({}) | of_numpy(b),
    "partition, matching": lambda b: partition(of_numpy(b), ...)[0],
    "partition, rest": lambda b: partition(of_numpy(b), None)[1],
    "where, of one tree": lambda b: where(True, *[of_numpy(b)] * 2),
    "where, of two trees": lambda b: where(True, of_numpy(b), of_numpy(b.copy())),
    "stack": lambda b: stack(of_numpy(b)),
    "member, of a shared state": lambda b: member(of_numpy(b), 0),
    "member, of a mapped state": lambda b: member(of_numpy(b, mapped=True), 0),
    "subtree": lambda b: subtree(of_numpy(b), "a"),
    "a graft": lambda b: StateTree({"x.y": of_numpy(b)}),
    "the boxes of a tree": lambda b: [box.value for box in of_numpy(b).states().values()],
    "a look-up": lambda b: of_numpy(b)["a.h"],
    "the values": lambda b: list(of_numpy(b).values()),
    "restore": lambda b: [
        state.value for state in restore(Module(), of_numpy(b)).states().values()
    ],
    "a pickle": lambda b: pickle.loads(pickle.dumps(of_numpy(b))),
}


@pytest.mark.parametrize("way", WAYS_INTO_A_TREE)
def test_no_way_into_a_tree_keeps_the_memory_of_a_numpy_array(way):
    buffer = aligned(4, 256)
    result = WAYS_INTO_A_TREE[way](buffer)
    assert jax.tree.leaves(jax.block_until_ready(result))
    buffer[:] = 7
    for leaf in jax.tree.leaves(result):
        assert isinstance(leaf, jax.Array) and not np.asarray(leaf).any()


def test_the_static_part_shows_what_differs_where_jax_finds_trees_that_do_not_match():
    one = StateTree({"a.h": HiddenState(np.zeros(2), tag="slow"), "w": ParamState(np.zeros(2))})
    marked = stack(one)
    other_kind = StateTree(
        {"a.h": ShortTermState(np.zeros(2), tag="slow"), "w": ParamState(np.zeros(2))}
    )
    other_tag = StateTree(
        {"a.h": HiddenState(np.zeros(2), tag="fast"), "w": ParamState(np.zeros(2))}
    )
    for other, mine, its in [(marked, "mapped=0", "mapped=1"),
                             (other_kind, "HiddenState", "ShortTermState"),
                             (other_tag, "'slow'", "'fast'")]:  # fmt: skip
        with pytest.raises(ValueError) as info:
            jax.tree.map(jnp.add, one, other)
        for text in ("a.h", "HiddenState", "ParamState", mine, its):
            assert text in str(info.value)
    with pytest.raises(TypeError, match="a.h.*mapped=1"):
        jax.lax.scan(lambda state, _: (marked, None), one, length=2)


def test_a_subtree_has_the_states_below_a_path_with_paths_from_there():
    model = {"encoder": Sequential(VanillaRNN(2, 3), Linear(3, 1)), "encoder2": Linear(2, 2)}
    tree = init(model)
    for path in ("encoder.layers.0", ("encoder", "layers", 0)):
        part = subtree(tree, path)
        assert same(part, init(model["encoder"].layers[0])) and list(part) == [
            ("W", "weight"),
            ("h",),
        ]
    assert same(subtree(tree, "encoder"), init(model["encoder"]))
    assert [box.mapped for box in subtree(stack(tree), "encoder2").states().values()] == [1]
    output, part = apply(model["encoder"], subtree(tree, "encoder"), jnp.ones(2))
    whole = tree | StateTree({"encoder": part})
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    assert whole["encoder.layers.0.h"].tolist() == part["layers.0.h"].tolist() != [0, 0, 0]
    assert same(subtree(whole, "encoder2"), subtree(tree, "encoder2"))


def test_a_subtree_of_nothing_names_the_closest_paths():
    tree = init({"encoder": Sequential(VanillaRNN(2, 3))})
    for path in (
        "encodr",
        ("encoder", "layer"),
        "encoder.layers.0.h",
        "encoder.layers.0.W.weight.bias",
        3,
    ):
        with pytest.raises(KeyError, match="encoder"):
            subtree(tree, path)
    with pytest.raises(KeyError, match=r"subtree\(tree, 'encoder.layers'\)"):
        tree["encoder.layers"]
    with pytest.raises(KeyError, match=r"subtree\(tree, 'encoder'\)"):
        tree["encoder",]


def test_trees_are_grafted_at_a_path_beside_boxes_and_other_trees():
    part = stack(StateTree({"h": HiddenState(np.zeros(3), tag="t"), "c.0": State(np.ones(2))}))
    whole = StateTree(
        {"encoder": part, ("decoder", 1): part, "w": ParamState(np.ones(1)), "none": StateTree({})}
    )
    assert list(whole) == [
        ("decoder", 1, "c", 0),
        ("decoder", 1, "h"),
        ("encoder", "c", 0),
        ("encoder", "h"),
        ("w",),
    ]
    box = whole.states()["encoder", "h"]
    assert (type(box), box.tag, box.mapped) == (HiddenState, "t", 1)
    assert same(subtree(whole, "encoder"), part) and same(subtree(whole, "decoder.1"), part)
    for bad in ({"": part}, {(): part}, {3: part}, {"a": {"h": State(1)}}, {(1.0,): part}):
        with pytest.raises(TypeError, match="expected a path with a State or tree"):
            StateTree(bad)


def test_where_never_mixes_a_shared_state_along_an_axis_of_its_own():
    shared, own = {"w": ParamState(np.zeros((4, 2)))}, {"h": HiddenState(np.zeros(3))}
    old = stack(*[StateTree(own)] * 4) | StateTree(shared)
    new = jax.tree.map(jnp.ones_like, old)
    done = np.array([True, False, False, True])
    with pytest.raises(ValueError, match="do not lead") as info:
        where(done, new, old)
    assert "'w' float32[4,2]" in str(info.value) and "'h'" not in str(info.value)
    assert "jitted" in str(info.value) and "partition" in str(info.value)
    kept = partition(new, HiddenState)[0] | partition(old, ParamState)[0]  # as the message says
    chosen = where(done, kept, old)
    assert chosen["h"][:, 0].tolist() == [1, 0, 0, 1] and not chosen["w"].any()
    jitted = jax.jit(lambda state: where(done, jax.tree.unflatten(jax.tree.structure(state), [
        state["h"] + 1, state["w"]]), state))(old)  # fmt: skip
    assert same(jitted, chosen)
    assert same(where(True, new, old), new)  # all of it or nothing: no axis to mix along


def test_where_in_a_nested_ensemble_takes_a_mask_of_agents_or_of_episodes():
    agents = stack(*[StateTree({"p": ParamState(np.zeros(()))})] * 2)
    episodes = stack(*[stack(*[StateTree({"h": HiddenState(np.zeros(()))})] * 3)] * 2)
    old = agents | episodes
    new = jax.tree.map(jnp.ones_like, old)
    chosen = where([True, False], new, old)
    assert chosen["p"].tolist() == [1, 0] and chosen["h"].tolist() == [[1, 1, 1], [0, 0, 0]]
    mask = np.array([[True, False, False], [False, True, True]])
    with pytest.raises(ValueError, match=r"\(2, 3\).*'p' float32\[2\]"):
        where(mask, new, old)
    assert (
        where(mask, partition(old, ParamState)[0] | partition(new, HiddenState)[0], old)[
            "h"
        ].tolist()
        == mask.tolist()
    )


class Kinds:
    class Nested(HiddenState):
        """A kind whose qualified name has a dot."""


def test_the_static_part_of_a_tree_goes_through_json_with_its_types():
    boxes = {("t", (1, "k"), 3): State(1, tag=("t", (1, True))), "h": HiddenState(2, tag=1.0)}
    for tree in (StateTree(boxes), stack(StateTree(boxes)), StateTree({})):
        static = jax.tree.structure(tree).node_data()[1]
        data = collective._to_json(static)
        assert isinstance(json.loads(data), list) and collective._from_json(data) is static


@needs_export
def test_a_jitted_step_is_exported_serialised_and_run_after_loading():
    from jax import export

    tree = stack(StateTree({
        "a.h": HiddenState({"x": np.zeros(2), "y": np.ones(())}, tag=("t", (1, True))),
        ("t", (1, "k"), 3): State(np.zeros(2, np.int32), tag="slow")})) | StateTree({
        "w": ParamState(np.ones(3), tag=1.0), "nested": Kinds.Nested(np.ones(3))})  # fmt: skip
    step = jax.jit(lambda state, x: (jax.tree.map(lambda leaf: leaf + 1, state), x * 2))
    call = export.deserialize(export.export(step)(tree, 1.0).serialize()).call
    after, x = call(tree, 1.0)
    assert same(after, step(tree, 1.0)[0]) and float(x) == 2
    assert [repr(box.tag) for box in after.states().values()] == [
        repr(box.tag) for box in tree.states().values()
    ]
    with pytest.raises(ValueError):
        call(member(tree, 0), 1.0)


@needs_export
def test_what_another_process_exported_runs_here(elsewhere, monkeypatch):
    from jax import export

    folder = Path(elsewhere("export").strip().splitlines()[-1])
    kinds = load_again(folder / "kinds.py", "kinds")
    monkeypatch.setitem(sys.modules, "kinds", kinds)  # where the names of kinds lead
    step = export.deserialize(bytearray((folder / "step.bin").read_bytes())).call
    tree, x = vmap_init(kinds.Cell(), axis_size=3, key=KEY), np.full(2, 3, np.float32)
    after = step(tree, x)
    assert np.allclose(after["h"], tree["h"] * 3 + 0.5) and same(after["i"], tree["i"])
    assert jax.tree.structure(after) == jax.tree.structure(tree)


# ---- Copy, snapshot, restore ---------------------------------------------------------------------


@every_model
def test_restore_after_snapshot_is_the_identity(model):
    model = init_all_states(copy.deepcopy(model), key=KEY)
    tree = snapshot(model)
    before = frozen(restore(model, tree))
    reset_all_states(model, key=jax.random.key(5))
    assert restore(model, tree) is model
    assert same(snapshot(model), tree) and frozen(model) == before


@every_model
def test_restore_brings_what_init_created_into_a_bare_module(model):
    tree = init(model, key=KEY)
    bare = copy.deepcopy(model)
    assert same(snapshot(restore(bare, tree)), tree)
    x = jnp.ones(3)
    if model.__class__ is not Mixed:
        output, after = apply(model, tree, x)
        assert same(bare(x), output) and same(snapshot(bare), after)


def test_restore_leaves_what_the_tree_lacks_and_keeps_the_boxes():
    model = Sequential(VanillaRNN(2, 2))
    init_all_states(model)
    box = model.layers[0].h
    hidden, _ = partition(jax.tree.map(lambda leaf: leaf + 1, snapshot(model)), HiddenState)
    restore(model, hidden)
    assert model.layers[0].h is box and float(box.value[0]) == 1
    assert same(model.layers[0].W.weight.value, Linear(4, 2).weight.value)


def test_restore_changes_the_kind_of_a_box_for_all_who_hold_it():
    model = Module()
    model.a = model.b = State(jnp.ones(2))
    restore(model, StateTree({"a": HiddenState(jnp.zeros(2), tag="t")}))
    assert model.a is model.b and type(model.b) is HiddenState and model.b.tag == "t"


def test_states_in_new_containers_come_back_at_their_paths():
    class Maker(Module):
        def __init__(self):
            self.filled, self.none, self.empty, self.tuple = [1, 2], None, {}, (Relu(),)
            self.layers, self.hs = [Relu()], []

        def init_state(self):
            self.list = [State(1), [State(2), State(3)]]
            self.dict = {"a": {5: State(4), 6: State(5)}, 0: State(6)}
            self.filled.append(State(7))
            self.none = [State(8), {"k": State(9)}]
            self.empty["k"] = {"l": State(10)}
            self.mixed = [0, State(11)]
            self.numbered = {0: State(1), 1: State(2)}
            self.tuple[0].state = State(12)
            self.layers[0].own = {"k": [State(13)]}
            self.layers.append(State(14))
            self.hs += [State(15), State(16)]

        def update(self):
            names = [self.list[0], self.list[1][1], self.dict["a"][6], self.dict[0], self.filled[2],
                     self.none[1]["k"], self.empty["k"]["l"], self.mixed[1], self.tuple[0].state,
                     self.layers[0].own["k"][0], self.layers[1], self.hs[1]]  # fmt: skip
            kinds = type(self.tuple), type(self.dict), type(self.numbered), type(self.hs)
            return [state.value for state in names], [len(self.list), len(self.list[1]), *kinds]

    tree = init(Maker())
    values, shapes = apply(Maker(), tree)[0]
    assert [int(value) for value in values] == [1, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 16]
    assert shapes == [2, 2, tuple, dict, list, list]
    assert same(snapshot(restore(Maker(), tree)), tree)
    assert same(reset(Maker(), tree), tree)


def test_states_take_the_place_of_nothing_else():
    class Maker(Module):
        def __init__(self, part):
            self.part = part

        def init_state(self, part):
            self.part = part

    for part, new, name in [
        ((None, None), (State(1), None), "part.0"),
        ((), (State(1),), "part.0"),
        (((None,),), ((State(1),),), "part.0.0"),
        ([], {"k": State(1)}, "part.k"),
        ([3, 4], [3, State(1)], "part.1"),
        ([3], [3, 4, State(1)], "part.2"),
        ({"k": 3}, {"k": State(1)}, "part.k"),
        ({"k": 3}, {"k": [State(1)]}, "part.k.0"),
        (3, State(1), "part"),
        ("text", [State(1)], "part.0"),
    ]:
        tree, before = init(Maker(part), new), frozen(part)
        with pytest.raises(ValueError, match=f"no place for .*'{name}' .*write None"):
            apply(Maker(part), tree, None, method="init_state")
        model = Maker(part)
        with pytest.raises(ValueError, match=f"no place for .*'{name}'"):
            restore(model, tree)
        assert frozen(part) == before and model.part is part


def test_a_tree_that_does_not_fit_changes_nothing_and_all_places_are_named():
    model = Sequential(Relu(), Gelu())
    before = frozen(model)
    with pytest.raises(ValueError, match=r"no place for.*'layers.x.h'.* 'layers' \(list\)"):
        restore(model, StateTree({"first": State(1), "layers.0.h": State(1), "layers.x.h": State(1)}))
    with pytest.raises(ValueError, match="'layers.2.h'.*'layers.3.h.k'"):
        restore(model, StateTree({"layers.2.h": State(1), "layers.3": State({"h": 1}),
                                  "layers.3.h.k": State(2)} | {}))  # fmt: skip
    assert frozen(model) == before
    for target, name in (([Relu()], "x"), ([Relu()], "0"),
                         ([Linear(2, 2)], "0.weight.bias"), ([Relu()], "2.h"), ([Relu()], "1.h"),
                         ({"a": Relu()}, "b.h"), ({"a": Relu()}, "a"), (Module(), "1")):
        with pytest.raises(ValueError, match=f"no place for.*'{name}'"):
            restore(target, StateTree({name: State(1)}))


def test_subclasses_of_containers_keep_their_class_in_the_copy():
    Pair = collections.namedtuple("Pair", "left right")

    class Holder(Module):
        def __init__(self):
            self.pair = Pair(Linear(2, 2), 3)
            self.table = collections.defaultdict(list, a=Relu())
            self.plain = Pair(1, 2)

        def update(self):
            self.table["new"].append(1)
            return isinstance(self.pair, Pair), self.pair.right, type(self.table).__name__

    model = Holder()
    before = frozen(model)
    assert apply(model, snapshot(model))[0] == (True, 3, "defaultdict")
    assert frozen(model) == before


def test_the_copy_keeps_what_is_shared_and_cyclic_so():
    class Cyclic(Module):
        def __init__(self):
            inner = ([],)
            self.inner = inner
            inner[0].append((inner, self))
            self.again = inner[0]
            self.hook = self.update
            self.state = self.alias = State(jnp.ones(2))
            self.other = object()

        def update(self):
            (inner, me), same_list = self.again[0], self.inner[0] is self.again
            self.hook.__self__.mark = True
            return (inner is self.inner, me is self, same_list, self.hook.__self__ is self,
                    self.state is self.alias, self.other)  # fmt: skip

    model = Cyclic()
    *same_objects, other = apply(model, snapshot(model))[0]
    assert all(same_objects) and other is model.other
    assert not hasattr(model, "mark")


def test_a_subclass_of_state_keeps_its_own_attributes_and_needs_no_call():
    class Decaying(State):
        def __init__(self, shape, decay):
            super().__init__(jnp.ones(shape))
            self.decay = decay

    class Cell(Module):
        def __init__(self):
            self.s = Decaying((2,), 0.5)

        def init_state(self):
            self.t = Decaying((3,), 0.5)

        def update(self):
            self.s.value = self.s.value * self.s.decay

    tree = apply(Cell(), init(Cell()))[1]
    assert tree["s"].tolist() == [0.5, 0.5] and type(tree.states()["t",]) is Decaying

    class Slotted(State):
        __slots__ = ("extra",)

    tree = restore(Module(), StateTree({"s": Slotted(1)})).states()
    assert type(tree["s",]) is Slotted


@pytest.mark.parametrize("base", [dict, list, tuple, Exception, collections.OrderedDict, int])
def test_a_module_that_is_also_a_builtin_container_or_exception_is_refused(base):
    class Odd(Module, base):
        pass

    with pytest.raises(TypeError, match="Odd has __slots__ or a builtin base class"):
        snapshot(Odd())


def loud(*args, **kwargs):
    raise AssertionError("an overridden method was called")


LOUD = {name: loud for name in (
    "__setitem__", "__delitem__", "__iter__", "__len__", "__getitem__", "__contains__", "__eq__",
    "clear", "update",
    "items", "keys", "values", "get", "pop", "copy", "append", "extend", "insert", "setdefault",
    "__reduce_ex__",
    "__init__", "__copy__", "__deepcopy__")} | {"__hash__": None, "__new__": loud}  # fmt: skip
LoudDict = type("LoudDict", (dict,), LOUD)
LoudDefault = type("LoudDefault", (collections.defaultdict,), LOUD)
LoudList = type("LoudList", (list,), LOUD)
LoudTuple = type("LoudTuple", (tuple,), LOUD)


def loud_container(base, kind, parts):
    """A container made with the methods of its builtin base."""
    if base is tuple:
        return tuple.__new__(kind, parts.values())
    new = base.__new__(kind)
    list.extend(new, parts.values()) if base is list else dict.update(new, parts)
    return new


class Holder(Module):
    def __init__(self, container):
        self.container = container

    def look(self, base):
        parts = (
            dict.items(self.container)
            if issubclass(base, dict)
            else enumerate(base.__iter__(self.container))
        )
        parts = dict(parts)
        for part in parts.values():
            if isinstance(part, State):
                part.value = part.value + 1
        return type(self.container), getattr(self.container, "name", None), parts


loud_containers = pytest.mark.parametrize("base, kind", [
    (dict, LoudDict), (collections.defaultdict, LoudDefault), (list, LoudList),
    (tuple, LoudTuple)])  # fmt: skip


@loud_containers
def test_a_pure_call_copies_a_container_past_the_methods_that_it_overrides(base, kind):
    parts = {"b": State(np.zeros(2)), "a": 3, 0: Relu(), "c": State(np.zeros(1))}
    container = loud_container(base, kind, parts)
    if base is not tuple:
        container.name = "mine"
    model = Holder(container)
    tree = snapshot(model)
    names = (
        [("container", 0), ("container", 3)]
        if base in (list, tuple)
        else [("container", "b"), ("container", "c")]
    )
    assert list(tree) == names
    (its_kind, its_name, inside), after = apply(model, tree, base, method="look")
    assert its_kind is kind and its_name == getattr(container, "name", None)
    assert [type(part) for part in inside.values()] == [type(part) for part in parts.values()]
    assert list(inside) == (list(parts) if base not in (list, tuple) else [0, 1, 2, 3])
    assert all(mine is not its for mine, its in zip(inside.values(), parts.values()) if mine != 3)
    assert [leaf.tolist() for leaf in jax.tree.leaves(after)] == [[1, 1], [1]]
    assert not parts["b"].value.any()


def test_a_dict_that_renames_its_keys_is_copied_as_it_is():
    class Upper(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key.upper(), value)

        def update(self, other):
            for key, value in other.items():
                self[key] = value

    class Names(Module):
        def __init__(self):
            self.table = Upper(lower=State(np.zeros(1)))

        def update(self):
            return list(self.table), type(self.table)

    assert apply(Names(), snapshot(Names()))[0] == (["lower"], Upper)


class Layered(Module):
    """A model of `number` layers that are kept as `keep` says."""

    def __init__(self, number, keep):
        self.layers = keep([VanillaRNN(2, 2) for _ in range(number)])


@pytest.mark.parametrize("keep", [
    list, tuple, lambda layers: [layers], lambda layers: [[layer] for layer in layers],
    lambda layers: [layers[:1], layers[1:]], lambda layers: {"deep": [layers]},
    lambda layers: dict(enumerate(layers)),
    lambda layers: {f"l{i}": layer for i, layer in enumerate(layers)},
    lambda layers: [{"cell": layer, "note": []} for layer in layers],
    lambda layers: [(layer, None) for layer in layers],
], ids=range(10))  # fmt: skip
def test_the_tree_of_three_layers_does_not_fit_into_two(keep):
    tree, two = init(Layered(3, keep)), Layered(2, keep)
    before = frozen(two)
    lost = [path for path in tree if path not in init(two)]
    assert {path[-1] for path in lost} == {"h", "weight"}
    for use in (
        lambda: restore(two, tree),
        lambda: reset(two, tree),
        lambda: vmap_reset(two, tree, axis_size=2),
        lambda: apply(two, tree, method="__repr__"),
        lambda: restore(two, partition(tree, HiddenState)[0]),
    ):
        with pytest.raises(ValueError, match="no place for .*create modules in __init__") as info:
            use()
        assert all(
            repr(".".join(map(str, path))) in str(info.value) for path in lost if path[-1] == "h"
        )
    assert frozen(two) == before


def test_the_tree_of_two_layers_lacks_the_third_in_a_call():
    with pytest.raises(ValueError, match="lacks 'layers.2.W.weight'"):
        reset(Layered(3, list), init(Layered(2, list)))


def test_a_list_takes_new_states_at_its_end_and_a_dict_under_new_keys_also_beside_modules():
    class Grower(Module):
        def __init__(self):
            self.layers, self.table = [Relu(), 3], {"r": Relu()}

        def init_state(self):
            self.layers += [State(np.ones(1)), State(np.full(1, 2))]
            self.table["k"] = State(np.full(1, 3))

        def update(self):
            return [type(part) for part in self.layers], list(self.table)

    tree = init(Grower())
    assert list(tree) == [("layers", 2), ("layers", 3), ("table", "k")]
    assert apply(Grower(), tree)[0] == ([Relu, int, State, State], ["r", "k"])
    assert same(snapshot(restore(Grower(), tree)), tree)
    with pytest.raises(ValueError, match="no place for.*'layers.3'"):  # a place before it is empty
        restore(Grower(), StateTree({"layers.3": State(1)}))


class Tied(Module):
    """Two layers that share a state, which each of them re-creates."""

    class Layer(Module):
        def __init__(self, w):
            self.w = w

        def init_state(self, key):
            self.w = ParamState(jax.random.uniform(key, (2,)))

    def __init__(self):
        shared = ParamState(np.zeros(2, np.float32))
        self.enc, self.dec = self.Layer(shared), self.Layer(shared)

    def reset_state(self):
        self.dec.w.value = self.dec.w.value + 1

    def update(self, x):
        return self.enc.w.value * x, self.dec.w.value * x


def test_a_tied_state_that_each_owner_re_creates_is_one_for_each_from_then_on():
    before, real = frozen(Tied()), init_all_states(Tied(), key=KEY)
    template = Tied()
    assert list(snapshot(template)) == [("enc", "w")]
    tree = init(template, key=KEY)
    assert list(tree) == [("dec", "w"), ("enc", "w")] and same(snapshot(real), tree)
    assert not np.array_equal(tree["dec.w"], tree["enc.w"])
    one, two = apply(template, tree, 2.0)[0]
    assert np.array_equal(one, 2 * tree["enc.w"]) and np.array_equal(two, 2 * tree["dec.w"])
    after = reset(template, tree)
    assert np.array_equal(after["dec.w"], tree["dec.w"] + 1) and same(after["enc.w"], tree["enc.w"])
    restored = restore(Tied(), tree)
    assert same(snapshot(restored), tree) and restored.enc.w is not restored.dec.w
    assert frozen(template) == before


def test_a_tied_state_that_each_owner_re_creates_goes_through_vmapped_calls():
    tree = vmap_init(Tied(), axis_size=3, key=KEY)
    assert {path: box.mapped for path, box in tree.states().items()} == {
        ("dec", "w"): 1,
        ("enc", "w"): 1,
    }
    assert all(
        same(member(tree, i), init(Tied(), key=key))
        for i, key in enumerate(jax.random.split(KEY, 3))
    )
    outputs, after = vmap_apply(Tied(), tree, np.float32(2), in_axes=None)
    assert np.array_equal(outputs[0], 2 * tree["enc.w"]) and same(after, tree)
    assert np.array_equal(vmap_reset(Tied(), tree)["dec.w"], tree["dec.w"] + 1)
    assert same(snapshot(vmap_init_all_states(Tied(), axis_size=3, key=KEY)), tree)


def test_a_module_goes_on_after_a_copy_of_its_tree_was_donated():
    model = VanillaRNN(2, 2)
    tree = jax.tree.map(jnp.copy, init_all_states(model) and snapshot(model))
    for leaf in jax.tree.leaves(tree):
        leaf.delete()  # as donation does
    assert model(jnp.ones(2)).shape == (2,)


# ---- The call engine -----------------------------------------------------------------------------


class Recorder(Module):
    """Notes the order in which the nodes of one log are called."""

    def __init__(self, name, log, *children):
        self.name, self.log, self.children = name, log, list(children)

    def early(self):
        self.log(self.name)

    @call_order(2)
    def late(self):
        self.log(self.name)


class Second(Recorder):
    @call_order(1)
    def late(self):
        self.log(self.name)


class Undecorated(Recorder):
    def late(self):
        self.log(self.name)


def test_undecorated_methods_run_first_then_ascending_levels():
    log = []
    leaf = Recorder("two", log.append)
    model = Recorder("root", log.append, Second("one", log.append, leaf), Undecorated("none", log.append))
    call_all_fns(model, "late")
    assert log == ["none", "one", "two", "root"]
    log.clear()
    call_all(model, snapshot(model), "early")
    assert log == ["two", "one", "none", "root"]


def test_call_order_leaves_its_level_on_the_function_and_checks_it():
    assert collective.MAX_ORDER == 10
    assert call_order()(lambda self: None).call_order == 0
    assert call_order(9)(lambda self: None).call_order == 9
    assert call_order(-3, check_order_boundary=False)(lambda self: None).call_order == -3
    assert call_order(10, False)(lambda self: None).call_order == 10
    for level in (-1, 10):
        with pytest.raises(ValueError, match=rf"\[0, 10\); got {level}"):
            call_order(level)
    for level in (1.0, "1", None, True, lambda self: None):
        with pytest.raises(TypeError, match="must be an integer"):
            call_order(level)


class Sensor(Module):
    """A node whose method notes its runs outside the model, where no copy hides them."""

    def __init__(self, note):
        self.note = note

    def measure(self, *args):
        self.note(args)


def families(model):
    """The same call in all four forms."""
    tree = snapshot(model)
    return [
        lambda *args, **options: call_all(model, tree, *args, **options),
        lambda *args, **options: call_all_fns(model, *args, **options),
        lambda *args, **options: vmap_call_all(model, tree, *args, axis_size=2, **options),
        lambda *args, **options: vmap_call_all_fns(model, *args, axis_size=2, **options),
    ]


@pytest.mark.parametrize("form", range(4))
def test_nothing_runs_unless_the_whole_plan_stands(form):
    class Odd(Module):
        measure = 3

    log = []
    sensor = Sensor(log.append)
    call = families([sensor, Relu(), Sequential(Gelu())])[form]
    with pytest.raises(AttributeError, match=(
            r"'1' \(Relu\), '2' \(Sequential\), '2.layers.0' \(Gelu\) "
            "does not have method 'measure'")):  # fmt: skip
        call("measure")
    with pytest.raises(TypeError, match=r"'1' \(Odd\).*'measure' must be callable"):
        families([sensor, Odd()])[form]("measure", fn_if_not_exist="pass")
    with pytest.raises(ValueError, match="fn_if_not_exist is .*; got 'ignore'"):
        call("measure", fn_if_not_exist="ignore")
    with pytest.raises(TypeError, match="fn_name must be a string"):
        call(len)
    with pytest.raises(TypeError, match="kwargs must be a mapping"):
        call("measure", (), [1])
    assert log == []
    with pytest.warns(UserWarning, match=r"'1' \(Relu\), .* does not have method 'measure'"):
        call("measure", fn_if_not_exist="warn")
    for policy in ("pass", "none"):
        call("measure", fn_if_not_exist=policy)
    assert log == [(), (), ()]


def test_outputs_come_by_path_in_call_order_without_none():
    class Named(Module):
        def __init__(self, output):
            self.output = output

        def get(self, *args, **kwargs):
            return self.output if not args else (self.output, args, kwargs)

    model = {"b": Named(1), "a": Named(None), "c": [Named(3)]}
    outputs, tree = call_all(model, StateTree({}), "get")
    assert list(outputs.items()) == [(("b",), 1), (("c", 0), 3)] and len(tree) == 0
    outputs, _ = call_all(model["b"], StateTree({}), "get", [7], {"k": 8})
    assert outputs == {(): (1, ([7],), {"k": 8})}  # a single non-tuple is one argument


@pytest.mark.parametrize("form", range(4))
def test_an_exception_keeps_its_type_and_tells_method_class_and_path(form):
    class Failing(Module):
        def explode(self):
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom") as info:
        families([Relu(), [Failing()]])[form]("explode", fn_if_not_exist="pass")
    assert "raised by 'explode' of '1.0' (Failing)" in info.value.__notes__


class Vandal(Module):
    """Changes everything that it can reach, and then raises if it is told so."""

    def __init__(self):
        self.array = State(np.zeros(3))
        self.state = State({"array": np.zeros(2), "list": [jnp.zeros(2)]})
        self.names, self.table, self.pair = ["a"], {"k": [1]}, ([1], Relu())
        self.counts, self.turned = collections.Counter(a=3), collections.OrderedDict(a=1, b=2)
        self.turned.move_to_end("a")
        self.child = VanillaRNN(2, 2)

    def wreck(self, fail):
        if isinstance(self.array.value, np.ndarray):
            self.array.value[:] = 7
        self.state.value["list"].append(jnp.ones(2))
        self.state.value["array"] += 1
        self.state.tag, self.new = "wrecked", State(jnp.ones(3))
        self.names.append("b")
        self.table["k"].clear()
        self.table["more"] = self.counts["b"] = self.turned["c"] = 1
        self.pair[0][:] = []
        self.child.W.weight = State(jnp.ones(2))
        del self.child
        if fail:
            raise RuntimeError("half way")


@pytest.mark.parametrize("form", range(4))
def test_a_method_that_raises_leaves_everything_as_it_was(form):
    model = Sequential(Vandal())
    before, names, box = frozen(model), model.layers[0].names, model.layers[0].state
    with pytest.raises(RuntimeError, match="half way"):
        families(model)[form]("wreck", True, fn_if_not_exist="pass")
    assert frozen(model) == before
    assert model.layers[0].names is names and model.layers[0].state is box


@jax.tree_util.register_pytree_node_class
class Mutable:
    """A registered class whose meta field refers to itself and to a class."""

    def __init__(self, v):
        self.v, self.meta, self.kind = v, self, jnp.float32

    def tree_flatten(self):
        return (self.v,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_values_of_any_kind_are_put_back():
    class Odd(Module):
        def __init__(self):
            self.frozen, self.own = State(np.asarray(jnp.ones(2))), State(Mutable(np.ones(2)))

        def wreck(self):
            self.own.value.v += 1
            self.own.value.v, self.own.value.new = None, 3
            raise RuntimeError("half way")

    model = Odd()
    with pytest.raises(RuntimeError, match="half way"):
        call_all_fns(model, "wreck")
    own = model.own.value
    assert own.v.tolist() == [1, 1] and own.v.dtype == np.float64 and isinstance(own.v, np.ndarray)
    assert type(own) is Mutable and own.meta is own and not hasattr(own, "new")
    assert model.frozen.value.tolist() == [1, 1]


def test_the_kind_of_a_state_is_put_back_too():
    class Odd(Module):
        def __init__(self):
            self.state = State(jnp.ones(2), tag="old")

        def wreck(self):
            restore(self, StateTree({"state": ParamState(jnp.zeros(3))}))
            raise RuntimeError("half way")

    model = Odd()
    with pytest.raises(RuntimeError, match="half way"):
        call_all_fns(model, "wreck")
    assert type(model.state) is State and model.state.tag == "old" and model.state.value.shape == (2,)


def test_an_interrupt_leaves_everything_as_it_was_too():
    class Slow(Module):
        def wait(self):
            self.done = True
            raise KeyboardInterrupt

    model = Slow()
    with pytest.raises(KeyboardInterrupt):
        call_all_fns(model, "wait")
    assert not hasattr(model, "done")


def test_pure_calls_change_neither_template_nor_tree_nor_arguments():
    model = Sequential(Vandal())
    tree = snapshot(model)
    args = ({"x": [np.ones(2)]},)
    before = frozen(model), frozen(dict(tree)), frozen(args)
    _, after = call_all(model, tree, "wreck", False, fn_if_not_exist="pass")
    assert after["layers.0.new"].tolist() == [1, 1, 1] and len(after["layers.0.state"]["list"]) == 2
    vmap_call_all(model, tree, "early", args, fn_if_not_exist="pass", axis_size=2)
    with pytest.raises(RuntimeError):
        call_all(model, tree, "wreck", True, fn_if_not_exist="pass")
    assert (frozen(model), frozen(dict(tree)), frozen(args)) == before


@loud_containers
def test_a_container_is_put_back_past_the_methods_that_it_overrides(base, kind):
    class Wrecker(Holder):
        def wreck(self):
            self.before = [1]
            if base is list:
                list.clear(self.container)
                list.append(self.container, 5)
            elif base is not tuple:
                dict.pop(self.container, "b")
                dict.update(self.container, a=4, new=5)
            self.after.clear()
            self.state.value = jnp.ones(2)
            raise KeyError("half way")

    parts = {"b": State(np.zeros(2)), "a": 3}
    model = Wrecker(loud_container(base, kind, parts))
    model.after, model.state = {"k": 1}, State(np.zeros(2))
    container = model.container
    with pytest.raises(KeyError, match="half way"):
        call_all_fns(model, "wreck")
    assert model.container is container and type(container) is kind
    _, _, inside = model.look(base)
    assert list(inside.values()) == list(parts.values())
    assert list(inside) == ([0, 1] if base in (list, tuple) else ["b", "a"])
    assert model.after == {"k": 1} and not model.state.value.any() and not hasattr(model, "before")


def test_arrays_made_read_only_or_resized_are_put_back():
    class Wrecker(Module):
        def __init__(self):
            self.fixed, self.sized = State(np.ones(3)), State({"x": [np.ones(3), 5]})
            self.last = State(np.ones(2))

        def wreck(self):
            self.fixed.value += 1
            self.fixed.value.setflags(write=False)
            self.sized.value["x"][0].resize(7, refcheck=False)
            self.sized.value["x"][1] = 6
            self.last.value[:] = 3
            raise RuntimeError("half way")

    model = Wrecker()
    with pytest.raises(RuntimeError, match="half way"):
        call_all_fns(model, "wreck")
    assert model.fixed.value.tolist() == [1, 1, 1] and model.last.value.tolist() == [1, 1]
    ((array, number),) = model.sized.value.values()
    assert array.tolist() == [1, 1, 1] and number == 5
    model.fixed.value += 1  # as it could be before


class Unnoted(Exception):
    def add_note(self, note):
        raise TypeError("no notes here")


class NoNotes(Exception):
    add_note = None


class OddObject(Exception):
    @property
    def obj(self):
        raise RuntimeError("looked at")


@pytest.mark.parametrize(
    "kind", [Unnoted, NoNotes, OddObject, StopIteration, GeneratorExit, SystemExit]
)
@pytest.mark.parametrize("form", [0, 1])
def test_an_exception_that_refuses_notes_or_ends_iterators_comes_through(kind, form):
    class Failing(Module):
        def __init__(self):
            self.log = []

        def explode(self):
            self.log.append(1)
            raise kind("boom")

    model = [Failing()]
    with pytest.raises(kind, match="boom") as info:
        families(model)[form]("explode")
    assert type(info.value) is kind and model[0].log == []


def test_a_frozen_exception_comes_through_a_pure_call():
    with pytest.raises(Frozen) as info:
        call_all(Freezer(), StateTree({}), "explode")
    assert info.value == Frozen(3)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Freezer(Module):
    def explode(self):
        self.left = True
        raise Frozen(3)


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("policy", ["raise", "warn", "pass", "none"])
def test_a_property_that_fails_is_no_missing_method(form, policy):
    class Odd(Module):
        @property
        def measure(self):
            return self.missing_part

    with pytest.raises(AttributeError, match="'Odd' object has no attribute 'missing_part'"):
        families([Odd()])[form]("measure", fn_if_not_exist=policy)


def test_a_method_that_is_none_is_missing():
    class Without(Relu):
        reset_state = None

    with pytest.raises(AttributeError, match=r"'0' \(Without\) does not have method 'reset_state'"):
        reset([Without(), Relu()], StateTree({}))
    call_all([Without()], StateTree({}), "reset_state", fn_if_not_exist="pass")


@pytest.mark.parametrize("form", range(4))
def test_the_messages_of_the_documented_api_are_kept(form):
    class Odd(Module):
        measure = 3

    call = families({"a": Relu(), "b": [Odd()]})[form]
    for args, options, kind, parts in [
        (("missing",), {}, AttributeError, ["'a' (Relu)",
                                            "'b.0' (Odd)", "does not have method 'missing'",
                                            "node_to_exclude=", "fn_if_not_exist='pass'"]),
        (("measure",), {"node_to_exclude": Relu}, TypeError,
         ["'b.0' (Odd)", "'measure'", "must be callable"]),
        (("measure",), {"fn_if_not_exist": "pass"}, TypeError, ["'b.0' (Odd)", "must be callable"]),
        ((3,), {}, TypeError, ["fn_name must be a string", "3"]),
        ((None,), {}, TypeError, ["fn_name must be a string", "None"]),
        ((b"update",), {}, TypeError, ["fn_name must be a string", "b'update'"]),
        (("update", (), [1]), {}, TypeError, ["kwargs must be a mapping", "[1]"]),
        (("update", (), "ab"), {}, TypeError, ["kwargs must be a mapping", "'ab'"]),
        (("update", (), None), {"fn_if_not_exist": "ignore"}, ValueError,
         ["'raise', 'warn' or 'pass'", "'ignore'"]),
    ]:  # fmt: skip
        with pytest.raises(kind) as info:
            call(*args, **options)
        assert all(part in str(info.value) for part in parts), str(info.value)
        assert ("does not have" in str(info.value)) + ("must be callable" in str(info.value)) <= 1


def test_apply_and_vmap_apply_check_their_arguments_alike():
    for call in (apply, vmap_apply):
        with pytest.raises(TypeError, match="fn_name must be a string"):
            call(Relu(), StateTree({}), jnp.ones(2), method=len)
        with pytest.raises(TypeError, match="the root .* must be callable"):
            call(Dropout(0.5), StateTree({}), jnp.ones(2), method="prob")


@pytest.mark.parametrize("level", [1.0, "1", None, True, np.float32(1), [1]])
def test_a_level_must_be_an_integer(level):
    for check in (True, False):
        with pytest.raises(TypeError, match=f"must be an integer.*{re.escape(repr(level))}"):
            call_order(level, check)


@pytest.mark.parametrize("form", [0, 1, 2, 3])
def test_a_model_that_was_not_initialised_says_so(form):
    model = {"rnn": [VanillaRNN(2, 3)]}
    with pytest.raises(AttributeError, match="has no attribute 'h'") as info:
        families(model)[form]("reset_state")
    assert any(
        "was the model initialised" in note and "init_all_states" in note
        for note in info.value.__notes__
    )
    assert "raised by 'reset_state' of 'rnn.0' (VanillaRNN)" in info.value.__notes__


def test_a_state_that_is_still_none_says_so_too():
    class Cell(Module):
        def __init__(self):
            self.h = None

        def update(self):
            return self.h.value

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'value'") as info:
        apply(Cell(), StateTree({}))
    assert any("was the model initialised" in note for note in info.value.__notes__)

    class Other(Module):
        def update(self):
            return "text".value

    with pytest.raises(AttributeError, match="'str' object") as info:
        apply(Other(), StateTree({}))
    assert not any("initialised" in note for note in info.value.__notes__)


# ---- Keys ----------------------------------------------------------------------------------------


class Noise(Module):
    def draw(self, key):
        return jax.random.uniform(key, (2,))


def test_every_node_draws_from_its_own_path_alone():
    small = {"a": Noise(), "b": [Noise()]}
    large = {"new": Sequential(Noise()), "b": [Noise(), Noise()], "a": Noise()}
    few, _ = call_all(small, StateTree({}), "draw", key=KEY)
    many, _ = call_all(large, StateTree({}), "draw", key=KEY, fn_if_not_exist="pass")
    assert all(same(few[path], many[path]) for path in few)
    assert len({tuple(draw.tolist()) for draw in many.values()}) == 4
    assert not same(few, call_all(small, StateTree({}), "draw", key=jax.random.key(1))[0])


def test_ints_and_strings_of_one_dotted_name_draw_different_numbers():
    model = [{0: Noise(), "0": Noise()}]
    outputs, _ = call_all(model, StateTree({}), "draw", key=KEY)
    assert not same(*outputs.values())


def test_keys_do_not_depend_on_the_process(elsewhere):
    class Here(Module):
        def draw(self, key):
            return jax.random.key_data(key).tolist()

    here = call_all({"z": Here(), "a": [Here()]}, StateTree({}), "draw", key=KEY)[0]["a", 0]
    assert elsewhere("keys").strip() == str(here)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0), np.array([0, 0], np.uint32)])
def test_typed_and_legacy_keys_are_taken(key):
    outputs, _ = call_all([Noise()], StateTree({}), "draw", key=key)
    assert outputs[0,].shape == (2,)
    assert vmap_call_all([Noise()], StateTree({}), "draw", key=key, axis_size=3)[0][0,].shape == (3, 2)


@pytest.mark.parametrize("key", [0, "key", jax.random.split(KEY, 2), jnp.ones(2), jnp.zeros((), np.uint32)])
def test_anything_else_is_no_key(key):
    with pytest.raises(TypeError, match=r"one PRNG key, as of jax.random.key\(0\)"):
        init(Relu(), key=key)


def test_a_method_that_requires_a_key_says_so_before_anything_runs():
    with pytest.raises(TypeError, match=(
            r"'b.0' \(GRU\), 'c' \(GRU\) requires a key for 'init_state'; "
            r"pass key=jax.random.key\(0\)")):  # fmt: skip
        init({"a": Relu(), "b": [GRU(2, 2)], "c": GRU(2, 2)})
    with pytest.raises(TypeError, match="the root .* requires a key"):
        apply(Noise(), StateTree({}), method="draw")


def test_a_key_in_kwargs_is_an_ordinary_argument():
    model = [Noise(), Noise()]
    outputs, _ = call_all(model, StateTree({}), "draw", kwargs={"key": KEY})
    assert same(outputs[0,], outputs[1,]) and same(outputs[0,], jax.random.uniform(KEY, (2,)))
    assert same(call_all(model, StateTree({}), "draw", KEY)[0], outputs)
    with pytest.raises(TypeError, match="a key came both as key="):
        call_all(model, StateTree({}), "draw", kwargs={"key": KEY}, key=KEY)


def test_one_method_does_not_get_two_keys():
    with pytest.raises(TypeError, match=r"the root \(Noise\).*'draw' by position.*by key="):
        call_all(Noise(), StateTree({}), "draw", KEY, key=KEY)


def test_only_nodes_that_take_a_key_get_one():
    class Plain(Module):
        def get(self, x=1):
            return x

    class Open(Module):
        def get(self, **kwargs):
            return sorted(kwargs)

    class Optional(Module):
        def get(self, *, key=None):
            return key is not None

    class Many(Module):
        def get(self, *sizes, key=None):
            return sizes, key is not None

    model = [Plain(), Open(), Optional()]
    assert call_all(Many(), StateTree({}), "get", (1, 2), key=KEY)[0][()] == ((1, 2), True)
    assert list(call_all(model, StateTree({}), "get", key=KEY)[0].values()) == [1, ["key"], True]
    assert list(call_all(model, StateTree({}), "get")[0].values()) == [1, [], False]


def test_a_call_of_call_gives_a_key_to_an_update_that_takes_one_and_to_no_other():
    class Plain(Module):
        def update(self, x):
            return x

    class Drawing(Module):
        def update(self, x, *, key):
            return jax.random.key_data(key)

    class Own(Module):
        def __call__(self, x, key=None):
            return "mine", jax.random.key_data(key)

        def update(self, x):
            loud()

    model = {"plain": Plain(), "drawing": Drawing(), "own": Own()}
    outputs, _ = call_all(model, StateTree({}), "__call__", 3, key=KEY)
    expected, _ = call_all(model, StateTree({}), "update", 3, key=KEY, node_to_exclude=Own)
    assert outputs["plain",] == expected["plain",] == 3
    assert same(outputs["drawing",], expected["drawing",])
    assert outputs["own",][0] == "mine" and not same(outputs["own",][1], outputs["drawing",])
    for use in (
        lambda: call_all(model, StateTree({}), "__call__", 3),
        lambda: call_all_fns(model, "__call__", 3),
        lambda: vmap_call_all(model, StateTree({}), "__call__", 3, axis_size=2),
        lambda: vmap_call_all_fns(model, "__call__", 3, axis_size=2),
    ):
        with pytest.raises(TypeError, match=(
                r"'drawing' \(Drawing\) requires a key for '__call__'; "
                r"pass key=jax.random.key\(0\)")):  # fmt: skip
            use()
    with pytest.raises(TypeError, match=r"the root \(Drawing\) requires a key"):
        apply(Drawing(), StateTree({}), 3)


def test_apply_hands_its_key_to_the_method_as_it_is():
    for key in (KEY, jax.random.PRNGKey(3)):
        output, _ = apply(Noise(), StateTree({}), method="draw", key=key)
        assert same(output, jax.random.uniform(key, (2,)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'key'"):
        apply(Relu(), StateTree({}), 1.0, key=KEY)


def test_vmap_apply_gives_each_member_the_key_of_its_split():
    class Adder(Module):
        def update(self, x, y, *, scale, key):
            return x + scale * jax.random.uniform(key, (2,)) + y

    x = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    expected = [
        row + 2 * jax.random.uniform(key, (2,)) + 1 for row, key in zip(x, jax.random.split(KEY, 3))
    ]
    output, _ = vmap_apply(
        Adder(), StateTree({}), x, np.float32(1), in_axes=(0, None), scale=2, key=KEY
    )
    assert np.allclose(output, expected)
    assert vmap_apply(Noise(), StateTree({}), axis_size=4, method="draw", key=KEY)[0].shape == (
        4,
        2,
    )
    with pytest.raises(TypeError, match=r"one PRNG key, as of jax.random.key\(0\)"):
        vmap_apply(Noise(), StateTree({}), axis_size=3, method="draw", key=jax.random.split(KEY, 3))
    with pytest.raises(TypeError, match="the root .* requires a key"):
        vmap_apply(Noise(), StateTree({}), axis_size=3, method="draw")


@pytest.mark.parametrize("form", range(4))
def test_an_argument_in_the_place_of_the_key_says_where_to_put_the_key(form):
    class Cell(Module):
        def start(self, key, batch=None):
            self.h = HiddenState(jnp.zeros(batch))

    with pytest.raises(TypeError, match=(
            r"'0' \(Cell\).*'start' by position.*by key=.*"
            r"put `key` last or after `\*`")):  # fmt: skip
        families([Cell()])[form]("start", (3,), key=KEY)


def test_keys_of_dicts_have_numbers_of_their_own():
    model = {"table": {}}
    model["table"] |= {
        key: Noise() for key in (1, "1x", (1,), ("1", 2), (1, "2"), ((1,), 2), "k", "(1,)x")
    }
    outputs, _ = call_all(model, StateTree({}), "draw", key=KEY)
    assert len(outputs) == len({draw.tobytes() for draw in map(np.asarray, outputs.values())}) == 8
    alone, _ = call_all({"table": {(1, "2"): Noise()}}, StateTree({}), "draw", key=KEY)
    assert same(alone["table", (1, "2")], outputs["table", (1, "2")])


# ---- Pure calls ----------------------------------------------------------------------------------


@every_model
def test_pure_calls_equal_calls_in_place(model):
    real = copy.deepcopy(model)
    before = frozen(model)
    tree = init(model, key=KEY)
    assert init_all_states(real, key=KEY) is real and same(snapshot(real), tree)
    for _ in range(3):
        output, tree = apply(model, tree, jnp.arange(3.0))
        assert same(real(jnp.arange(3.0)), output) and same(snapshot(real), tree)
    tree = reset(model, tree, key=jax.random.key(1))
    assert same(snapshot(reset_all_states(real, key=jax.random.key(1))), tree)
    assert frozen(model) == before


@pytest.mark.parametrize("seed", range(25))
def test_pure_calls_equal_calls_in_place_on_random_graphs(seed):
    model, real = random_graph(seed), random_graph(seed)
    before = frozen(model)
    tree = init(model, key=KEY)
    assert same(snapshot(init_all_states(real, key=KEY)), tree)
    outputs, tree = call_all(model, tree, "update")
    expected = {path: node.update() for path, node in plain_walk(real)[0]}
    assert list(outputs) == list(expected) and same(list(outputs.values()), list(expected.values()))
    assert same(snapshot(real), tree)
    reset_all_states(real, key=KEY)
    assert same(reset(model, tree, key=KEY), snapshot(real))
    assert frozen(model) == before


@every_model
def test_jitted_calls_equal_eager_ones(model):
    def life(key, x):
        tree = init(model, key=key)
        output, tree = apply(model, tree, x)
        return output, reset(model, tree, key=key), tree

    assert same(jax.jit(life)(KEY, jnp.ones(3)), life(KEY, jnp.ones(3)), exact=False)


def test_a_scan_rolls_out_what_a_loop_does():
    model = Sequential(GRU(3, 4), VanillaRNN(4, 2))
    real = init_all_states(copy.deepcopy(model), key=KEY)
    xs = noise(6, 3)
    expected = [real(x) for x in xs]

    @jax.jit
    def rollout(tree, xs):
        return jax.lax.scan(lambda tree, x: apply(model, tree, x)[::-1], tree, xs)

    tree, outputs = rollout(init(model, key=KEY), xs)
    assert same(list(outputs), expected, exact=False) and same(tree, snapshot(real), exact=False)


def test_gradients_flow_to_the_parameters_through_a_rollout():
    model = VanillaRNN(3, 2)
    params, rest = partition(init(model), ParamState)
    xs = noise(4, 3)

    def loss(params):
        state, outputs = jax.lax.scan(lambda tree, x: apply(model, tree, x)[::-1], params | rest, xs)
        return jnp.sum(outputs**2)

    def plain(weights):
        h, total = jnp.zeros(2), 0.0
        for x in xs:
            h = jnp.tanh(jnp.concatenate([x, h]) @ weights["weight"] + weights["bias"])
            total += jnp.sum(h**2)
        return total

    gradient = jax.jit(jax.grad(loss))(params)
    assert same(gradient["W.weight"], jax.grad(plain)(params["W.weight"]), exact=False)


def test_a_loop_of_pure_calls_is_traced_once():
    model, traces = Sequential(GRU(2, 2), VanillaRNN(2, 2)), []

    @jax.jit
    def step(tree, x):
        traces.append(1)
        params, rest = partition(tree, ParamState)
        _, tree = apply(model, params | rest, x)
        return reset(model, tree)

    tree = init(model, key=KEY)
    for _ in range(4):
        tree = step(tree, jnp.ones(2))
        params, rest = partition(tree, ParamState)
        tree = rest | params
    tree = step(init(model, key=jax.random.key(1)), jnp.ones(2))
    assert len(traces) == 1


def test_only_states_cross_a_pure_call():
    class Logger(Module):
        def __init__(self):
            self.logged = []

        def update(self):
            self.logged.append(1)
            self.state, self.other = State(jnp.ones(2)), 3

    model = Logger()
    _, tree = apply(model, snapshot(model))
    assert list(tree) == [("state",)] and model.logged == [] and not hasattr(model, "other")


@pytest.mark.parametrize("form", [0, 2, 3])
@pytest.mark.parametrize("one, two", [("first", "second"), ("first.0", "second.0"),
                                      ("first", "second.k"), ("child.w", "first")])  # fmt: skip
def test_a_new_state_with_two_names_cannot_cross(form, one, two):
    class Twice(Module):
        def __init__(self):
            self.child = Relu()

        def start(self):
            state = HiddenState(jnp.ones(2))
            if one == "child.w":
                self.child.w = self.first = state
            elif two == "second.k":
                self.first, self.second = state, {"k": state}
            elif one == "first":
                self.first = self.second = state
            else:
                self.first = self.second = [state]

    model = Twice()
    before = frozen(model)
    with pytest.raises(ValueError, match=f"'start' created .*'{one}' and '{two}'"):
        families(model)[form]("start", fn_if_not_exist="pass")
    assert frozen(model) == before


def test_a_new_state_with_two_names_is_shared_in_place():
    class Twice(Module):
        def init_state(self):
            self.first = self.second = HiddenState(jnp.ones(2))

    model = init_all_states(Twice())
    assert model.first is model.second and list(snapshot(model)) == [("first",)]


def test_a_state_that_init_shares_keeps_its_two_names_in_pure_calls():
    class Twice(Module):
        def __init__(self):
            self.first = self.second = HiddenState(jnp.ones(2))

        def names(self):
            self.first.value = self.first.value + 1
            return sorted(vars(self)), self.first is self.second, self.second.value

    (names, one, value), tree = apply(Twice(), init(Twice()), method="names")
    assert names == ["first", "second"] and one and value.tolist() == [2, 2]
    assert list(tree) == [("first",)]


def test_a_second_name_of_a_state_that_was_there_is_fine_beside_new_states():
    class Twin(Module):
        def __init__(self):
            self.a = State(jnp.ones(2))

        def init_state(self):
            self.b, self.c = self.a, State(jnp.zeros(3))

    assert list(init(Twin())) == [("a",), ("c",)]
    assert list(vmap_init(Twin(), axis_size=2)) == [("a",), ("c",)]


def test_a_created_state_of_a_subclass_is_made_anew_without_its_own_attributes():
    class Decaying(HiddenState):
        decay = 0.5

    class Cell(Module):
        def init_state(self):
            self.h = Decaying(jnp.ones(2), tag="t")
            self.h.decay = 0.9

        def look(self):
            return type(self.h), self.h.decay, self.h.tag

    assert apply(Cell(), init(Cell()), method="look")[0] == (Decaying, 0.5, "t")


def test_a_tree_that_lacks_states_of_the_module_is_refused():
    model = Sequential(Linear(2, 2), VanillaRNN(2, 2))
    params, rest = partition(init(model), HiddenState)
    with pytest.raises(ValueError, match=(
            r"lacks 'layers.0.weight' \(ParamState\), 'layers.1.W.weight' \(ParamState\).*"
            r"params \| rest")):  # fmt: skip
        reset(model, params)


def test_apply_calls_one_module():
    class Two(Module):
        def other(self, x, *, scale=1):
            return x * scale

    assert apply(Two(), StateTree({}), 2, method="other", scale=3)[0] == 6
    for call in (apply, vmap_apply):
        with pytest.raises(AttributeError, match=r"the root \(list\) does not have method '__call__'"):
            call([Two()], StateTree({}), 2)
        with pytest.raises(AttributeError, match="the root .* does not have method 'missing'"):
            call(Two(), StateTree({}), method="missing")


@pytest.mark.parametrize("form", [0, 2, 3])
def test_creating_modules_in_a_pure_or_vmapped_call_is_refused(form):
    class Maker(Module):
        def make(self):
            self.new = [Linear(2, 2)]

    model = {"m": Maker()}
    with pytest.raises(ValueError, match=r"'make' created modules.*'m.new.0' \(Linear\).*__init__"):
        families(model)[form]("make")
    assert snapshot(call_all_fns(model, "make")).keys() == {("m", "new", 0, "weight")}


def test_a_deep_chain_works_at_the_default_recursion_limit():
    model = chain(3000)
    assert sys.getrecursionlimit() <= 3000
    tree = snapshot(model)
    assert len(tree) == 3000
    _, after = call_all(model, tree, "put", jnp.ones(2))
    call_all_fns(model, "put", jnp.ones(2))
    assert float(after[("next",) * 2999 + ("state",)][0]) == float(model.state.value[0]) == 1


class Link(Module):
    def __init__(self, below, value=jnp.zeros(2)):
        self.state = State(value)
        if below is not None:
            self.next = below

    def put(self, value):
        self.state.value = value


def chain(length):
    link = None
    for _ in range(length):
        link = Link(link)
    return link


def test_twenty_thousand_siblings_are_nothing_special():
    model = [Link(None) for _ in range(20_000)]
    outputs, tree = call_all(model, snapshot(model), "put", jnp.ones(2))
    assert len(tree) == 20_000 and not outputs
    assert all(float(value[0]) == 1 for value in list(tree.values())[::1000])


def test_sixteen_threads_use_one_template_at_once():
    model = Sequential(GRU(3, 3), LIF(3), Shared())
    before, results = frozen(model), {}

    def work(number):
        tree = init(model, key=jax.random.key(number % 4))
        for _ in range(2):
            tree = reset(model, tree, key=jax.random.key(number % 4))
        results[number] = tree

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({jax.tree.structure(tree) for tree in results.values()}) == 1
    assert all(same(results[number], results[number % 4]) for number in range(16))
    assert frozen(model) == before and gc.isenabled()


# ---- vmap and the vmapped calls ----------------------------------------------------------------


def fresh(tree):
    return [path for path, box in tree.states().items() if box.mapped]


def vmap_initialised(model, function=vmap_init, **options):
    """What a vmapped init returns; it has to warn where no state is mapped, and only there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(model, **options)
    messages = [str(each.message) for each in caught if "no state is mapped" in str(each.message)]
    tree = result if isinstance(result, StateTree) else snapshot(result)
    assert len(messages) == len(caught) == (not fresh(tree)), messages
    return result


@pytest.mark.parametrize("name", ["mlp", "vanilla", "gru", "stack", "lif", "shared"])
def test_every_member_equals_a_single_model_with_its_key(name):
    model, keys = MODELS[name](), jax.random.split(KEY, 3)
    before = frozen(model)
    tree = vmap_initialised(model, axis_size=3, key=KEY)
    singles = [init(model, key=key) for key in keys]
    assert all(same(member(tree, i), singles[i]) for i in range(3))
    x = noise(3, 3)
    outputs, tree = vmap_apply(model, tree, x, axis_size=3)
    stepped = [apply(model, single, each) for single, each in zip(singles, x)]
    singles = [single for _, single in stepped]
    assert all(same(outputs[i], stepped[i][0], exact=False) for i in range(3))
    assert all(same(member(tree, i), singles[i], exact=False) for i in range(3))
    tree = vmap_reset(model, tree, key=KEY, axis_size=3)
    singles = [reset(model, single, key=key) for single, key in zip(singles, keys)]
    assert all(same(member(tree, i), singles[i], exact=False) for i in range(3))
    assert frozen(model) == before


@pytest.mark.parametrize("seed", range(20))
def test_every_member_equals_a_single_model_on_random_graphs(seed):
    model, real, keys = random_graph(seed), random_graph(seed), jax.random.split(KEY, 2)
    tree = vmap_initialised(model, axis_size=2, key=KEY)
    singles = [init(model, key=key) for key in keys]
    assert all(same(member(tree, i), singles[i]) for i in range(2))
    again = vmap_reset(model, tree, axis_size=2, key=jax.random.key(1))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert not fresh(tree) or not same(again, tree)
    vmap_initialised(real, vmap_init_all_states, axis_size=2, key=KEY)
    assert same(snapshot(real), tree)
    vmap_reset_all_states(real, axis_size=2, key=jax.random.key(1))
    assert same(snapshot(real), again)


@every_model
def test_vmapped_calls_in_place_equal_pure_ones(model):
    real, tree = copy.deepcopy(model), vmap_initialised(model, axis_size=3, key=KEY)
    assert vmap_initialised(real, vmap_init_all_states, axis_size=3, key=KEY) is real
    assert same(snapshot(real), tree)
    vmap_reset_all_states(real, axis_size=3, key=jax.random.key(1))
    assert same(snapshot(real), vmap_reset(model, tree, axis_size=3, key=jax.random.key(1)))
    assert all(isinstance(leaf, jax.Array) and np.isfinite(raw(leaf)).all() for leaf in jax.tree.leaves(snapshot(real)))


def test_vmapped_calls_keep_treedef_shapes_and_dtypes_in_a_loop():
    model = Sequential(LIF(4), GRU(4, 4), VanillaRNN(4, 2))
    tree = vmap_init(model, axis_size=3, key=KEY)

    def looks(tree):
        return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    expected = looks(tree)
    for step in range(3):
        _, tree = vmap_apply(model, tree, jnp.ones((3, 4)))
        assert looks(tree) == expected
        tree = vmap_reset(model, tree, key=jax.random.key(step))
        assert looks(tree) == expected


def test_members_differ_where_they_draw():
    model = Sequential(GRU(2, 3), LIF(2))
    tree = vmap_init(model, axis_size=4, key=KEY)
    tree = vmap_reset(model, tree, key=KEY)
    for path in ("layers.0.weights", "layers.1.V"):
        leaf = jax.tree.leaves(tree[path])[0]
        assert len({raw(row).tobytes() for row in leaf}) == 4


def test_what_init_creates_is_shared_and_what_init_state_creates_is_per_member():
    tree = vmap_init(VanillaRNN(2, 3), axis_size=4)
    boxes = tree.states()
    assert (boxes["W", "weight"].mapped, boxes["h",].mapped) == (0, 1)
    assert tree["W.weight"]["bias"].shape == (3,) and tree["h"].shape == (4, 3)


def test_what_was_shared_stays_shared_on_later_calls():
    model = GRU(2, 3)
    tree = vmap_init(model, axis_size=4, key=KEY, state_to_exclude=HiddenState)
    assert tree["h"].shape == (3,) and tree["weights"]["z"].shape == (4, 5, 3)
    tree = vmap_reset(model, tree)
    assert tree["h"].shape == (3,) and tree.states()["h",].mapped == 0


class Statistics(Module):
    def __init__(self):
        self.mean = LongTermState(jnp.zeros(2))
        self.steps = LongTermState(jnp.array(0))

    def observe(self, x):
        self.steps.value = self.steps.value + 1
        self.mean.value = self.mean.value + x


def test_a_shared_state_may_change_if_it_stays_the_same_for_all():
    model = Statistics()
    for call in (lambda f: f, jax.jit):
        tree = call(lambda tree: vmap_call_all(model, tree, "observe", jnp.ones(2), axis_size=3)[1])(snapshot(model))
        assert tree["mean"].tolist() == [1, 1] and int(tree["steps"]) == 1
        assert not fresh(tree)


def test_an_outer_vmap_does_not_make_a_shared_state_differ():
    model = Statistics()

    def call(x):
        return vmap_call_all(model, snapshot(model), "observe", x, axis_size=3)[1]["mean"]

    assert jax.vmap(call)(jnp.arange(4.0).reshape(2, 2)).tolist() == [[0, 1], [2, 3]]


def test_a_plain_call_that_loses_the_mapped_axis_is_refused():
    model = Sequential(VanillaRNN(2, 3))
    tree = vmap_init(model, axis_size=4)
    with pytest.raises(ValueError, match=(
            r"leading axes of 'layers.0.h' \(HiddenState\).*with vmap_reset")):  # fmt: skip
        reset(model, tree)
    vmap_init_all_states(model, axis_size=4)
    before = frozen(model)
    with pytest.raises(ValueError, match=r"'layers.0.h' \(HiddenState\).*vmap_reset.*in place"):
        reset_all_states(model)
    with pytest.raises(ValueError, match=r"'crush'.*'model.layers.0.h'.*vmap_call_all.*vmap_apply"):
        apply(Breaker(model), snapshot(Breaker(model)), method="crush")
    assert frozen(model) == before
    reset(model, tree, 4)  # keeps the axis, so it may


class Breaker(Module):
    def __init__(self, model):
        self.model = model

    def crush(self):
        self.model.layers[0].h.value = jnp.zeros(())


def test_the_inner_axis_of_a_nested_ensemble_is_kept_too():
    model = VanillaRNN(2, 3)
    nested = stack(vmap_init(model, axis_size=4), vmap_init(model, axis_size=4))
    assert nested.states()["h",].mapped == 2 and nested["h"].shape == (2, 4, 3)
    with pytest.raises(ValueError, match="leading axes of 'h'"):
        vmap_reset(model, nested)
    assert same(member(member(nested, 1), 2), member(stack(init(model)), 0))


def test_outputs_lead_with_the_mapped_axis_and_none_is_left_out():
    model = [Statistics(), Noise()]
    outputs, _ = vmap_call_all(model, snapshot(model), "draw", axis_size=3, key=KEY, fn_if_not_exist="pass")
    keys = jax.random.split(KEY, 3)
    singles = [call_all(model, snapshot(model), "draw", key=key, fn_if_not_exist="pass")[0][1,] for key in keys]
    assert list(outputs) == [(1,)] and same(outputs[1,], jnp.stack(singles))


def test_state_tag_marks_what_was_created_without_a_tag():
    class Two(Module):
        def __init__(self):
            self.old = State(jnp.ones(1))

        def init_state(self):
            self.plain, self.own = State(jnp.ones(1)), State(jnp.ones(1), tag="own")

    model = Two()
    tags = {path[0]: box.tag for path, box in vmap_init(model, axis_size=2, state_tag="new").states().items()}
    assert tags == {"old": None, "plain": "new", "own": "own"}
    vmap_init_all_states(model, axis_size=2, state_tag="new")
    assert (model.plain.tag, model.own.tag, model.old.tag) == ("new", "own", None)


def test_states_that_a_vmapped_method_drops_stay_in_place():
    class Shrinking(Module):
        def init_state(self, number):
            self.h = [HiddenState(jnp.zeros(2)) for _ in range(number)]

    model = vmap_init_all_states(Shrinking(), 3, axis_size=2)
    assert len(vmap_init_all_states(model, 1, axis_size=2).h) == 3
    assert list(vmap_init(Shrinking(), 1, axis_size=2)) == [("h", 0)]


def test_methods_run_once_for_all_members():
    log = []
    model = [Sensor(log.append), Sensor(log.append)]
    vmap_call_all(model, StateTree({}), "measure", 1, axis_size=5)
    vmap_call_all_fns(model, "measure", 1, axis_size=5)
    jax.jit(lambda: vmap_call_all(model, StateTree({}), "measure", 1, axis_size=5)[1])()
    assert len(log) == 6


def test_a_reset_that_drops_an_axis_is_found_even_where_sizes_coincide():
    class Square(Module):
        def init_state(self):
            self.h = HiddenState(jnp.ones(4))

        def reset_state(self):
            self.h.value = jnp.zeros(4)

    tree = vmap_init(Square(), axis_size=4)
    assert vmap_reset(Square(), tree)["h"].shape == (4, 4)
    with pytest.raises(ValueError, match="leading axes of 'h'"):
        reset(Square(), tree)


def test_members_may_hold_states_without_leaves():
    class Empty(Module):
        def init_state(self):
            self.none, self.table = State(None), State({})

    tree = vmap_init(Empty(), axis_size=3)
    assert same(member(tree, 1), init(Empty()))
    assert vmap_init_all_states(Empty(), axis_size=3).none.mapped == 1


def test_a_module_that_a_vmapped_method_returns_cannot_cross():
    class Chained(Module):
        def init_state(self):
            self.h = State(jnp.zeros(2))
            return self

    with pytest.raises(TypeError, match=r"'init_state' of the root \(Chained\) returned Chained"):
        vmap_init(Chained(), axis_size=3)
    assert init(Chained())["h"].shape == (2,)


def test_a_mapped_state_that_lost_its_axis_is_named():
    tree = jax.tree.map(jnp.sum, vmap_init(VanillaRNN(2, 3), axis_size=4))
    with pytest.raises(ValueError, match=r"at odds with the mapped axis of 'h' \(\)"):
        vmap_reset(VanillaRNN(2, 3), tree)


def test_stack_and_member_are_inverse():
    model = Sequential(GRU(2, 2), Dropout(0.1))
    singles = [init(model, key=key) for key in jax.random.split(KEY, 3)]
    ensemble = stack(*singles)
    for i in range(3):
        assert same(member(ensemble, i), singles[i])
        assert same(member(ensemble, i - 3), singles[i])
        assert same(jax.jit(member)(ensemble, i), singles[i])
    assert all(box.mapped == 1 for box in ensemble.states().values())
    with pytest.raises(IndexError, match="member 3 of 3"):
        member(ensemble, 3)
    for i in (1.0, jnp.array([0, 1]), "1", None):
        with pytest.raises(TypeError, match="one integer"):
            member(ensemble, i)


def test_stack_refuses_what_differs():
    with pytest.raises(ValueError, match="at least one"):
        stack()
    for other in (tree_of(a=jnp.ones(3)), tree_of(a=jnp.ones(2, int)), tree_of(b=jnp.ones(2))):
        with pytest.raises(ValueError, match="only the values of the trees may differ.*'a'"):
            stack(tree_of(a=jnp.ones(2)), other)
    mapped = jax.tree.map(lambda leaf: leaf[0], stack(tree_of(a=jnp.ones(2))))
    for other, says in ((StateTree({"a": HiddenState(jnp.ones(2))}), "a: HiddenState, tag=None, mapped=0"),
                        (StateTree({"a": State(jnp.ones(2), tag="t")}), "a: State, tag='t', mapped=0"),
                        (mapped, "a: State, tag=None, mapped=1")):  # fmt: skip
        for use in (lambda: stack(tree_of(a=jnp.ones(2)), other), lambda: where(True, tree_of(a=jnp.ones(2)), other)):
            with pytest.raises(ValueError, match=says):  # which JAX refuses
                use()


def test_only_the_episodes_that_ended_are_reset():
    model = Sequential(VanillaRNN(2, 3))
    start = vmap_init(model, axis_size=4)
    done = jnp.array([[False] * 4, [True, False, True, False], [False] * 4])
    xs = noise(3, 4, 2)

    @jax.jit
    def rollout(state, xs, done):
        def step(state, now):
            x, ended = now
            _, state = vmap_apply(model, state, x)
            return where(ended, vmap_reset(model, state), state), state["layers.0.h"]

        return jax.lax.scan(step, state, (xs, done))

    state, hidden = rollout(start, xs, done)
    lonely = member(start, 0)
    for i, begin in ((0, 2), (1, 0), (2, 2), (3, 0)):
        single = lonely
        for x in xs[begin:, i]:
            _, single = apply(model, single, x)
        assert np.allclose(state["layers.0.h"][i], single["layers.0.h"], atol=1e-6)


def test_an_ensemble_trains_as_one_model():
    model = GRU(1, 1)
    xs = jnp.sin(jnp.arange(12.0))[:, None]

    def losses(state):
        step = lambda state, x: vmap_apply(model, state, x, in_axes=None)[::-1]  # noqa: E731
        _, outputs = jax.lax.scan(step, state, xs[:-1])
        return jnp.mean((outputs[..., 0] - xs[1:]) ** 2, axis=0)

    @jax.jit
    def train(params, rest):
        gradient = jax.grad(lambda params: jnp.sum(losses(params | rest)))(params)
        return jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope, params, gradient)

    start = vmap_init(model, axis_size=3, key=KEY)
    params, rest = partition(start, ParamState)
    for _ in range(60):
        params = train(params, rest)
    assert (losses(params | rest) < 0.95 * losses(start)).all()


def test_an_ensemble_trains_member_by_member_under_vmap_too():
    model = GRU(1, 1)
    xs = jnp.sin(jnp.arange(8.0))[:, None]

    def loss(params, rest):
        _, outputs = jax.lax.scan(lambda state, x: apply(model, state, x)[::-1], params | rest, xs)
        return jnp.mean((outputs - 0.3) ** 2)

    keys = jax.random.split(KEY, 3)
    params, rest = partition(jax.vmap(lambda key: init(model, key=key))(keys), ParamState)
    step = jax.jit(jax.vmap(lambda params, rest: jax.tree.map(
        lambda leaf, slope: leaf - 1.0 * slope, params, jax.grad(loss)(params, rest))))  # fmt: skip
    before = jax.vmap(loss)(params, rest)
    for _ in range(40):
        params = step(params, rest)
    assert (jax.vmap(loss)(params, rest) < 0.95 * before).all()


def test_an_ensemble_is_born_sharded():
    assert jax.device_count() == 8, "XLA_FLAGS came too late"
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("member",))
    model = Sequential(GRU(2, 3), VanillaRNN(3, 2))

    def born(key):
        return vmap_init(model, axis_size=8, key=key)

    def spread(box):
        axes = ("member",) if box.mapped else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    boxes = jax.eval_shape(born, KEY)
    shardings = jax.tree.unflatten(jax.tree.structure(boxes), [
        spread(box) for path, box in boxes.states().items() for _ in jax.tree.leaves(box.value)])  # fmt: skip
    sharded = jax.jit(born, out_shardings=shardings)(KEY)
    assert len(sharded["layers.0.h"].sharding.device_set) == 8
    assert same(sharded, born(KEY), exact=False)
    step = jax.jit(lambda tree, x: vmap_apply(model, tree, x))
    x = jnp.ones((8, 2))
    outputs, after = step(sharded, x)
    assert same(outputs, step(born(KEY), x)[0], exact=False)
    assert after["layers.0.h"].sharding.is_equivalent_to(sharded["layers.0.h"].sharding, 2)


def test_a_model_too_large_for_memory_can_be_looked_at():
    class Huge(Module):
        def init_state(self, *, key):
            self.weight = ParamState(jax.random.normal(key, (1 << 20, 1 << 20)))

    shapes = jax.eval_shape(lambda key: vmap_init([Huge()] * 2, axis_size=4, key=key), KEY)
    assert shapes["0.weight"].shape == (4, 1 << 20, 1 << 20)
    assert "float32[4,1048576,1048576]" in repr(shapes) and len(shapes) == 1


class Pair(Module):
    """A mapped value of several leaves, written by the method that a test names."""

    def init_state(self):
        self.h = HiddenState({"a": jnp.zeros((4, 3)), "b": [jnp.zeros(()), jnp.zeros(4)]})

    def write(self, **new):
        value = self.h.value
        self.h.value = {"a": new.get("a", value["a"]), "b": new.get("b", value["b"])} | new.get(
            "more", {}
        )


@pytest.mark.parametrize("new, name", [
    ({"a": np.zeros((4, 3))}, "h.a"),  # the axis is dropped, and the next one is as long
    ({"b": [np.zeros(()), np.zeros((4, 4))]}, "h.b.0"),
    ({"b": [np.zeros(4), np.zeros(4)]}, "h.b.1"),
    ({"b": [np.zeros(3), np.zeros((4, 4))]}, "h.b.0"),
    ({"a": np.zeros((5, 4, 3))}, "h.a"),
    ({"a": np.zeros((1, 4, 4, 3))}, "h.a"),
    ({"more": {"c": np.zeros(())}}, "h.c"),
    ({"more": {"c": np.zeros((3, 4))}}, "h.c"),
], ids=range(8))  # fmt: skip
def test_a_plain_call_changes_the_leading_axes_of_no_leaf(new, name):
    tree = vmap_init(Pair(), axis_size=4)
    model = restore(Pair(), tree)
    for use in (
        lambda: apply(Pair(), tree, method="write", **new),
        lambda: call_all([Pair()], StateTree({"0": tree}), "write", (), new),
        lambda: call_all_fns(model, "write", (), new),
    ):
        with pytest.raises(ValueError, match=f"leading axes of '(0.)?{name}' .*vmap_call_all"):
            use()
    assert same(snapshot(model), tree)


def test_a_plain_call_may_write_a_mapped_state_as_a_whole():
    tree = vmap_init(Pair(), axis_size=4)
    new = {
        "a": np.ones((4, 4, 7), np.float32),
        "b": [np.ones(4), np.ones((4, 2, 2))],
        "more": {"c": np.ones((4, 1))},
    }
    _, after = apply(Pair(), tree, method="write", **new)
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [(4, 4, 7), (4,), (4, 2, 2), (4, 1)]
    assert after.states()["h",].mapped == 1
    assert [leaf.shape for leaf in jax.tree.leaves(member(after, 0))] == [(4, 7), (), (2, 2), (1,)]


class Returning(Module):
    def __init__(self, output):
        self.output = output

    def get(self):
        return self.output

    def make(self):
        return self.output()


@pytest.mark.parametrize("make", [
    lambda: "text", lambda: State(np.ones(2)), lambda: (x for x in ()),
    lambda: [jnp.ones(2), "deep"],
    lambda: {"k": State(1)}, lambda: [Relu()], lambda: object(), lambda: StateTree,
    lambda: b"bytes",
], ids=range(9))  # fmt: skip
@pytest.mark.parametrize("form", [2, 3])
def test_an_output_that_cannot_cross_a_vmapped_call_is_refused_with_its_place(make, form):
    model = {"fine": Returning(lambda: np.ones(2)), "odd": [Returning(make)]}
    with pytest.raises(TypeError, match="'make' .*cannot cross a vmapped call") as info:
        families(model)[form]("make")
    assert "'odd.0' (Returning)" in str(info.value) and "return arrays" in str(info.value)
    assert "'fine'" not in str(info.value)
    assert "in_axes" not in str(info.value) and "out_axes" not in str(info.value)
    outputs, _ = call_all(model, StateTree({}), "make")
    assert type(outputs["odd", 0]) is type(make())


def test_vmap_apply_refuses_an_output_that_cannot_cross():
    with pytest.raises(TypeError, match="'get' .*cannot cross a vmapped call") as info:
        vmap_apply(Returning("text"), StateTree({}), axis_size=2, method="get")
    assert "the root (Returning)" in str(info.value) and "str" in str(info.value)


@pytest.mark.parametrize(
    "output", [3, 2.5, True, 1j, np.float32(1), np.ones(2), [np.ones(2), {"k": 3}], (), None]
)
def test_arrays_numbers_and_pytrees_of_them_cross_a_vmapped_call(output):
    outputs, _ = vmap_call_all(Returning(output), StateTree({}), "get", axis_size=3)
    single = call_all(Returning(output), StateTree({}), "get")[0]
    assert list(outputs) == list(single)
    expected = jax.tree.map(lambda leaf: np.stack([leaf] * 3), single)
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected))
    )


@pytest.mark.parametrize("in_axes, name", [
    ("x", "args[0]"), ((0, "x"), "args[1]"), ((0, 0.5), "args[1]"), ((0, 2), "args[1]"),
    (1, "args[0]"),
    (-3, "args[0]"),
    ((0, 0, 0), None), ((0,), None), ({"x": 0}, None), ((0, {"k": 0}), None),
], ids=range(10))  # fmt: skip
def test_bad_in_axes_are_told_in_terms_of_the_arguments(in_axes, name):
    class Sum(Module):
        def update(self, x, y):
            return x + y

    x, y = np.ones(3, np.float32), np.ones((3, 2), np.float32)
    for use in (
        lambda: vmap_apply(Sum(), StateTree({}), x, y, in_axes=in_axes),
        lambda: vmap_call_all([Sum()], StateTree({}), "update", (x, y), in_axes=in_axes),
        lambda: vmap_call_all_fns([Sum()], "update", (x, y), in_axes=in_axes),
    ):
        with pytest.raises(
            TypeError, match="in_axes is an int or None, or a tuple or tree of these"
        ) as info:
            use()
        assert (name or "float32[3]") in str(info.value), str(info.value)
        assert repr(in_axes) in str(info.value) and "vmap in_axes" not in str(info.value)


def test_a_shared_state_that_differs_names_every_way_out():
    model = {"stats": Statistics()}
    with pytest.raises(ValueError, match="'stats.mean'") as info:
        vmap_call_all(model, snapshot(model), "observe", np.ones((3, 2)), axis_size=3, in_axes=0)
    for way in (
        "init_state",
        "build the members with vmap",
        "state_to_exclude",
        "pmean",
        "axis_name",
    ):
        assert way in str(info.value)
    _, tree = vmap_call_all(Averaging(), snapshot(Averaging()), "observe", np.arange(3.0),
                            axis_name="m", in_axes=0)  # fmt: skip
    assert float(tree["mean"]) == 1 and not fresh(tree)


class Averaging(Module):
    def __init__(self):
        self.mean = LongTermState(np.float32(0))

    def observe(self, x):
        self.mean.value = jax.lax.pmean(x, "m")


def test_a_vmapped_init_after_which_no_state_is_mapped_warns_that_members_are_one():
    for use in (
        lambda: vmap_init(Linear(2, 2), axis_size=3),
        lambda: vmap_init_all_states(Linear(2, 2), axis_size=3),
    ):
        with pytest.warns(UserWarning, match=r"no state is mapped.*vmap\(lambda key: init"):
            use()
    with pytest.warns(UserWarning, match="no state is mapped"):
        vmap_init(VanillaRNN(2, 2), axis_size=3, state_to_exclude=HiddenState)


def test_a_reset_in_a_nested_ensemble_is_told_how_to_map_a_vmapped_reset():
    model = VanillaRNN(2, 3)
    nested = stack(vmap_init(model, axis_size=4), vmap_init(model, axis_size=4))
    for use in (lambda: vmap_reset(model, nested), lambda: reset(model, nested)):
        with pytest.raises(
            ValueError, match=r"leading axes of 'h'.*vmap\(functools.partial\(vmap_reset, "
        ):
            use()


class Agent(VanillaRNN):
    """Its weights come from the key of its constructor, its hidden state from `init_state`."""

    def __init__(self, key):
        super().__init__(3, 3)
        self.W.weight.value["weight"] *= jax.random.uniform(key, (), minval=0.5, maxval=1.5)

    def init_state(self):
        self.h = HiddenState(jnp.full(3, 0.1))


AGENT = Agent(KEY)  # the template of the tests below, which must not change it
KEYS = jax.random.split(KEY, 3)
EPISODES = functools.partial(vmap_init, axis_size=3)


def marks(tree):
    return {".".join(map(str, path)): box.mapped for path, box in tree.states().items()}


def members(tree, size=3):
    return [member(tree, i) for i in range(size)]


def alike(tree, singles):
    """Whether an ensemble has these members, to rounding."""
    return all(same(member(tree, i), single, exact=False) for i, single in enumerate(singles))


def stacked(results):
    return jax.tree.map(lambda *leaves: jnp.stack([*map(jnp.asarray, leaves)]), *results)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", MODELS)
def test_members_from_a_constructor_equal_a_stack_of_singles(name, wrap):
    ensemble = wrap(vmap(lambda key: init(MODELS[name](), key=key)))(KEYS)
    assert same(ensemble, stack(*[init(MODELS[name](), key=key) for key in KEYS]), exact=False)
    assert set(marks(ensemble).values()) == {1}


def test_members_from_a_constructor_that_draws_equal_a_stack_of_singles():
    ensemble = vmap(lambda key: init(Agent(key)))(KEYS)
    assert same(ensemble, stack(*[init(Agent(key)) for key in KEYS]), exact=False)
    assert len({row.tobytes() for row in raw(ensemble["W.weight"]["weight"])}) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda n: vmap(lambda key: init(Agent(key)))(jax.random.split(KEY, n)),
        lambda n: vmap_init(GRU(3, 3), axis_size=n, key=KEY),
        lambda n: vmap_apply(AGENT, EPISODES(AGENT, axis_size=n), jnp.ones((n, 3))),
        lambda n: vmap_reset(LIF(3), vmap_init(LIF(3), axis_size=n, key=KEY), key=KEY),
    ],
    ids=["constructor", "vmap_init", "vmap_apply", "vmap_reset"],
)
def test_what_is_traced_does_not_grow_with_the_number_of_members(call):
    few, many = (str(jax.make_jaxpr(lambda n=n: call(n))()).count(" = ") for n in (2, 64))
    assert few == many > 0


# A plain function of every argument and the forms of `in_axes` that fit it.
CUBE = noise(3, 3, 3)
TABLE = {"a": noise(3, 3, seed=1), "b": (noise(3, 2, seed=2), noise(3, seed=3))}


@pytest.mark.parametrize(
    "in_axes, args",
    [
        (0, (CUBE, CUBE)),
        (1, (CUBE, CUBE)),
        (-1, (CUBE, CUBE)),
        (-3, (CUBE,)),
        ((0, 2), (CUBE, CUBE)),
        ([2, -2], (CUBE, CUBE)),
        ((0, None), (CUBE, CUBE)),
        ((None, -1), (2.0, CUBE)),
        (0, (TABLE, CUBE)),
        ((None, 0), (TABLE, CUBE)),
        (({"a": 0, "b": None},), (TABLE,)),
        (({"a": 1, "b": (0, None)}, 0), (TABLE, CUBE)),
        ([{"a": None, "b": (-2, 0)}, None], (TABLE, CUBE)),
        ((0, None), (CUBE, None)),
        ((None, 0), (None, [CUBE, None])),
        (([0, None],), ([CUBE, 3],)),
        (0, (np.ones((3, 2)), CUBE)),
    ],
)
def test_plain_functions_and_arguments_are_mapped_as_by_jax_vmap(in_axes, args):
    def function(*args):
        leaves = jax.tree.leaves(args)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), {"all": args, "none": None}

    assert same(vmap(function, in_axes)(*args), jax.vmap(function, in_axes)(*args))


def test_a_function_of_nothing_is_mapped_by_its_axis_size():
    assert vmap(lambda: 2.0, axis_size=3)().tolist() == [2, 2, 2]
    tree = vmap(lambda: init(AGENT), axis_size=3)()
    assert alike(tree, [init(AGENT)] * 3) and marks(tree) == {"W.weight": 1, "h": 1}


class Halves(NamedTuple):
    left: Any
    right: Any


def test_trees_stand_anywhere_in_arguments_and_results():
    tree, xs = EPISODES(AGENT), noise(3, 3)
    old = StateTree({"old": stack(*members(tree))})

    def step(given, pair):
        output, state = apply(AGENT, given["state"], pair.right)
        params, rest = partition(state, ParamState)
        return (output, None), {"rest": [rest, Halves(pair.left, params)], "none": None}, state

    (outputs, none), table, state = vmap(step)({"state": tree, "none": None}, Halves(old, xs))
    singles = [step({"state": each}, Halves(None, x)) for each, x in zip(members(tree), xs)]
    assert same(outputs, stacked([single[0][0] for single in singles]), exact=False)
    assert none is None and marks(state) == {"W.weight": 0, "h": 1}
    assert alike(state, [single[2] for single in singles])
    rest, (left, params) = table["rest"]
    assert alike(rest | params, [single[2] for single in singles])
    assert same(left, old) and isinstance(table["rest"][1], Halves) and table["none"] is None


def test_states_that_no_argument_had_are_per_member():
    tree = EPISODES(AGENT)

    def rename(state, x):
        weight = ParamState(state["W.weight"]["bias"], tag="copy")
        return StateTree({"copied": weight, "new.0": State(x), "constant": HiddenState(1.0)})

    result = vmap(rename)(tree, jnp.arange(3.0))
    assert marks(result) == {"copied": 1, "new.0": 1, "constant": 1}
    assert result["copied"].shape == (3, 3) and result["constant"].tolist() == [1, 1, 1]
    assert result["new.0"].tolist() == [0, 1, 2] and result.states()["copied",].tag == "copy"


def test_an_argument_under_in_axes_none_is_shared_with_its_marks():
    tree, seen = EPISODES(AGENT), []

    def look(state, x):
        seen.append((marks(state), state["h"].shape))
        return state, jnp.sum(state["h"]) * x

    state, sums = vmap(look, in_axes=(None, 0))(tree, jnp.arange(2.0))
    assert seen == [({"W.weight": 0, "h": 1}, (3, 3))]
    assert same(state, tree) and np.allclose(sums, [0, 0.9])


def test_a_path_mapped_in_one_argument_goes_by_the_one_with_the_states_of_the_result():
    tree = EPISODES(AGENT)
    shared = partition(member(tree, 0), HiddenState)[0]  # just 'h', as shared by all
    state, hidden = vmap(lambda state, shared: (state, shared))(tree, shared)
    assert same(state, tree) and same(hidden, shared)


@pytest.mark.parametrize("both", [True, False], ids=["both", "none"])
def test_a_path_of_a_result_that_arguments_disagree_about_is_refused(both):
    mapped, shared = EPISODES(AGENT), member(EPISODES(AGENT), 0)

    def function(mapped, shared):
        return mapped if both else mapped | StateTree({"more": State(1.0)})

    with pytest.raises(ValueError, match=(
            r"'h' \(HiddenState\).*mapped in one argument, shared in another.*names of their own"
            r".*StateTree\(\{'actor': a, 'critic': c\}\)")):  # fmt: skip
        vmap(function)(mapped, shared)


def test_trees_with_names_of_their_own_settle_a_disagreement():
    actor, critic = EPISODES(AGENT), init(AGENT)
    both = StateTree({"actor": actor, "critic": critic})

    def step(both):
        return StateTree({"critic": subtree(both, "critic"), "actor": subtree(both, "actor")})

    assert same(vmap(step)(both), both)


# ---- Ensembles of ensembles


def nested(depth):
    """Agents, in `depth` levels of three, each with three episodes."""
    keys = KEYS if depth == 1 else jax.random.split(KEY, (3,) * depth)
    build = lambda key: EPISODES(Agent(key))  # noqa: E731
    for _ in range(depth):
        build = vmap(build)
    return build(keys), keys


def singles_of(tree, depth):
    """By indices, the single models of a nested ensemble."""
    found = {(): tree}
    for _ in range(depth):
        found = {(*at, i): member(each, i) for at, each in found.items() for i in range(3)}
    return found


@pytest.mark.parametrize("depth", [1, 2])
def test_nested_ensembles_equal_loops_over_members_though_all_sizes_are_equal(depth):
    tree, keys = nested(depth)
    assert marks(tree) == {"W.weight": depth, "h": depth + 1}
    singles = singles_of(tree, depth + 1)
    assert all(same(single, init(Agent(keys[at[:-1]])), exact=False)
               for at, single in singles.items())  # fmt: skip

    step, again = functools.partial(vmap_apply, AGENT), functools.partial(vmap_reset, AGENT)
    for _ in range(depth):
        step, again = vmap(step), vmap(again)
    xs = noise(*(3,) * (depth + 2))
    outputs, stepped = jax.jit(step)(tree, xs)
    assert jax.tree.structure(stepped) == jax.tree.structure(tree)
    for at, single in singles_of(stepped, depth + 1).items():
        output, expected = apply(AGENT, singles[at], xs[at])
        assert same(outputs[at], output, exact=False) and same(single, expected, exact=False)
    cleared = again(stepped)
    assert jax.tree.structure(cleared) == jax.tree.structure(tree)
    assert same(partition(cleared, ParamState)[0], partition(tree, ParamState)[0])
    assert cleared["h"].shape == (3,) * (depth + 2) and not cleared["h"].any()


def test_stacks_of_ensembles_step_like_vmapped_ones():
    ensembles = [vmap_init(GRU(3, 3), axis_size=3, key=key) for key in KEYS]
    xs = noise(3, 3, 3)
    outputs, state = vmap(functools.partial(vmap_apply, GRU(3, 3)))(stack(*ensembles), xs)
    loop = [vmap_apply(GRU(3, 3), each, x) for each, x in zip(ensembles, xs)]
    assert same(outputs, stacked([output for output, _ in loop]), exact=False)
    assert same(state, stack(*[each for _, each in loop]), exact=False)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_only_the_episodes_that_ended_are_reset_inside_vmap(wrap):
    tree, _ = nested(1)
    done = jnp.array([[1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
    step = wrap(vmap(lambda state, done: where(done, vmap_reset(AGENT, state), state)))
    after = step(tree, done)
    assert jax.tree.structure(after) == jax.tree.structure(tree)
    assert np.allclose(after["h"], np.where(done[..., None], 0, 0.1))
    assert same(after["W.weight"], tree["W.weight"])


def test_a_member_is_taken_inside_vmap():
    tree, _ = nested(1)
    best = vmap(lambda state, i: snapshot_of(member(state, i)))(tree, jnp.array([2, 0, 1]))
    assert alike(best, [snapshot_of(member(member(tree, i), j)) for i, j in enumerate((2, 0, 1))])


def snapshot_of(tree):
    """The same states under names of their own."""
    return StateTree({"best": tree})


def test_stack_inside_vmap_makes_an_inner_axis():
    tree = vmap(lambda key: init(Agent(key)))(KEYS)
    negative = functools.partial(jax.tree.map, jnp.negative)
    twice = vmap(lambda state: StateTree({"both": stack(state, negative(state))}))(tree)
    assert marks(twice) == {"both.W.weight": 2, "both.h": 2} and twice["both.h"].shape == (3, 2, 3)
    assert same(member(subtree(member(twice, 1), "both"), 0), member(tree, 1))


def test_partition_and_subtree_split_single_models_inside_vmap():
    model = Sequential(GRU(3, 3), VanillaRNN(3, 3))
    tree = vmap_init(model, axis_size=3, key=KEY)

    def split(state):
        params, rest = partition(state, ParamState)
        return StateTree({"gru": subtree(state, "layers.0"), "params": params}), params | rest

    parts, whole = vmap(split)(tree)
    assert same(whole, tree)
    assert alike(parts, [split(each)[0] for each in members(tree)])


# ---- Each member its own optimiser


def adam(rate):
    """An optimiser as optax has them: its state holds trees in a NamedTuple in a tuple."""

    def start(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Halves(jnp.array(0), {"first": zeros, "second": zeros}), None, {"rate": rate}

    def update(gradient, state, params):
        (count, moments), none, table = state
        count = count + 1
        first, second = (
            jax.tree.map(lambda old, new: decay * old + (1 - decay) * new**power, old, gradient)
            for decay, power, old in ((0.9, 1, moments["first"]), (0.99, 2, moments["second"])))
        params = jax.tree.map(
            lambda leaf, one, two: leaf - table["rate"] * (one / (1 - 0.9**count))
            / (jnp.sqrt(two / (1 - 0.99**count)) + 1e-3), params, first, second)  # fmt: skip
        return params, (Halves(count, {"first": first, "second": second}), none, table)

    return start, update


def test_each_member_trains_with_its_own_optimiser_as_if_alone():
    model, rates, batches = GRU(2, 2), jnp.array([0.01, 0.03, 0.1]), noise(3, 5, 2)
    tree = vmap_init(model, axis_size=3, key=KEY)
    update = adam(None)[1]

    def loss(params, rest, xs):
        _, outputs = jax.lax.scan(lambda state, x: apply(model, state, x)[::-1], params | rest, xs)
        return jnp.mean((outputs - 0.5) ** 2)

    def train_step(params, state, rest, xs):
        value, gradient = jax.value_and_grad(loss)(params, rest, xs)
        return *update(gradient, state, params), value

    def start(params, rate):
        return adam(rate)[0](params)

    def train(step, params, state, rest, xs):
        def body(carry, _):
            *carry, value = step(*carry, rest, xs)
            return tuple(carry), value

        return jax.lax.scan(body, (params, state), length=20)

    params, rest = partition(tree, ParamState)
    (ensemble, state), losses = jax.jit(functools.partial(train, vmap(train_step)))(
        params, vmap(start)(params, rates), rest, batches)
    assert marks(state[0].right["second"]) == {"weights": 1} and state[0].left.tolist() == [20] * 3
    alone = jax.jit(functools.partial(train, train_step))
    for i in range(3):
        single, other = member(params, i), member(rest, i)
        (single, _), values = alone(single, start(single, rates[i]), other, batches[i])
        assert same(member(ensemble, i), single, exact=False)
        assert np.allclose(losses[:, i], values, atol=1e-6) and values[-1] < values[0]


def test_an_optimiser_of_shared_parameters_shares_its_moments():
    params = partition(EPISODES(AGENT), ParamState)[0]
    state = vmap(adam(0.1)[0], axis_size=3)(params)
    assert marks(state[0].right["first"]) == {"W.weight": 0} and state[0].left.tolist() == [0] * 3


# ---- What all members share


class Normaliser(Module):
    """A running mean that all members share, of all that they saw."""

    def __init__(self):
        self.mean, self.count = LongTermState(jnp.zeros(2)), LongTermState(jnp.array(0))

    def init_state(self):
        self.last = ShortTermState(jnp.zeros(2))

    def update(self, x, mean=functools.partial(jax.lax.pmean, axis_name="member")):
        self.count.value += 1
        self.mean.value += (mean(x) - self.mean.value) / self.count.value
        self.last.value = x
        return x - self.mean.value


OBSERVATIONS = noise(2, 3, 2)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, s, x: vmap(lambda s, x: apply(m, s, x), axis_name="member")(s, x),
        lambda m, s, x: vmap_apply(m, s, x, axis_name="member"),
        lambda m, s, x: vmap_call_all(m, s, "update", x, axis_name="member", in_axes=0),
        lambda m, s, x: (None, snapshot(vmap_call_all_fns(
            restore(copy.deepcopy(m), s), "update", x, axis_name="member", in_axes=0))),
    ],
    ids=["vmap", "vmap_apply", "vmap_call_all", "vmap_call_all_fns"],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_statistic_shared_by_all_is_updated_by_pmean(step, wrap):
    model, mean = Normaliser(), np.mean(OBSERVATIONS, axis=1)
    start = state = vmap_init(model, axis_size=3)
    step = wrap(functools.partial(step, model))
    for xs in OBSERVATIONS:
        outputs, state = step(state, xs)
        assert jax.tree.structure(state) == jax.tree.structure(start)
    assert np.allclose(state["mean"], mean.mean(axis=0), atol=1e-6) and int(state["count"]) == 2
    assert same(state["last"], OBSERVATIONS[1])
    if outputs is not None:
        outputs = outputs.get((), outputs) if isinstance(outputs, dict) else outputs
        assert np.allclose(outputs, OBSERVATIONS[1] - mean.mean(axis=0), atol=1e-6)


def test_axis_names_of_nested_ensembles_reach_all_levels():
    model, xs = Normaliser(), noise(3, 3, 2)
    mean = functools.partial(jax.lax.pmean, axis_name=("outer", "member"))

    def step(state, xs):
        return vmap_apply(model, state, xs, axis_name="member", mean=mean)

    agents = vmap(lambda: vmap_init(model, axis_size=3), axis_size=3)()
    apart = vmap(functools.partial(vmap_apply, model, axis_name="member"))(agents, xs)[1]
    assert np.allclose(apart["mean"], xs.mean(axis=1), atol=1e-6)  # of each agent's episodes
    together = vmap(step, axis_name="outer")(agents, xs)[1]
    assert np.allclose(together["mean"], np.tile(xs.mean(axis=(0, 1)), (3, 1)), atol=1e-6)


def test_shared_states_keep_their_value_or_change_alike():
    tree = EPISODES(AGENT)
    _, stepped = vmap_apply(AGENT, tree, noise(3, 3))
    assert same(partition(stepped, ParamState)[0], partition(tree, ParamState)[0])
    halved = vmap(lambda state: jax.tree.map(lambda leaf: leaf / 2, state))(tree)
    assert same(halved, jax.tree.map(lambda leaf: leaf / 2, tree))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, s, x: vmap(lambda s, x: apply(m, s, x, jnp.sum))(s, x),
        lambda m, s, x: vmap_apply(m, s, x, jnp.sum, in_axes=(0, None)),
        lambda m, s, x: vmap_call_all(m, s, "update", (x,), {"mean": jnp.sum}, in_axes=0),
        lambda m, s, x: vmap_call_all_fns(m, "update", (x,), {"mean": jnp.sum}, 3, in_axes=0),
    ],
    ids=["vmap", "vmap_apply", "vmap_call_all", "vmap_call_all_fns"],
)
def test_a_shared_state_that_differs_per_member_is_refused_with_every_way_out(call, wrap):
    model = vmap_init_all_states(Normaliser(), axis_size=3)
    before = frozen(model)
    with pytest.raises(ValueError) as caught:
        wrap(lambda state, x: call(model, state, x) and None)(snapshot(model), OBSERVATIONS[0])
    for words in ("different per member: 'mean' (LongTermState);",
                  "create them in init_state under a vmapped call", "build the members with vmap",
                  "exclude them (state_to_exclude)", "pmean over axis_name"):
        assert words in str(caught.value)
    assert "'count'" not in str(caught.value) and frozen(model) == before


# ---- Transformations


SHARED = partition(EPISODES(AGENT), ParamState)
XS = noise(3, 3)


def total(params):
    """The sum over the members of a loss, by one vmapped call."""
    return jnp.sum(vmap_apply(AGENT, params | SHARED[1], XS)[0] ** 3)


def total_in_a_loop(params):
    singles = members(SHARED[1])
    return sum(jnp.sum(apply(AGENT, params | each, x)[0] ** 3) for each, x in zip(singles, XS))


@pytest.mark.parametrize(
    "transform",
    [
        jax.value_and_grad,
        lambda f: lambda p: jax.jvp(f, (p,), (jax.tree.map(jnp.cos, p),)),
        lambda f: lambda p: jax.linearize(f, p)[1](jax.tree.map(jnp.cos, p)),
        lambda f: lambda p: jax.vjp(f, p)[1](1.0),
        jax.hessian,
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: jax.grad(lambda p: jax.lax.scan(lambda c, _: (c + f(p), c), 0.0, length=2)[0]),
        lambda f: lambda p: jax.vmap(jax.grad(lambda s: f(jax.tree.map(lambda leaf: s * leaf, p))))(
            jnp.arange(2.0)),
    ],
    ids=["grad", "jvp", "linearize", "vjp", "hessian", "checkpoint", "scan", "vmap"],
)
def test_transformations_of_shared_parameters_equal_a_sum_over_members(transform):
    got, expected = (jax.jit(transform(f))(SHARED[0]) for f in (total, total_in_a_loop))
    assert same(got, expected, exact=False)


@pytest.mark.parametrize("transform", [jax.grad, jax.hessian], ids=["grad", "hessian"])
def test_transformations_of_mapped_parameters_are_those_of_each_member(transform):
    model, xs = Sequential(Linear(2, 2)), noise(3, 2)
    singles = [jax.tree.map(lambda leaf, i=i: leaf + i, snapshot(model)) for i in range(3)]

    def derivative(params, x):
        return transform(lambda params: jnp.sum(jnp.sin(apply(model, params, x)[0])))(params)

    got = jax.jit(vmap(derivative))(stack(*singles), xs)
    expected = [jax.jit(derivative)(single, x) for single, x in zip(singles, xs)]
    assert same(jax.tree.leaves(got), stacked([*map(jax.tree.leaves, expected)]), exact=False)


def test_gradients_flow_through_vmap_to_mapped_and_shared_states():
    tree = vmap_init(GRU(3, 3), axis_size=3, key=KEY) | StateTree({"scale": ParamState(2.0)})

    def one(state, x):
        scale, rest = partition(state, lambda path, box: path == ("scale",))
        output, rest = apply(GRU(3, 3), rest, x)
        return scale["scale"] * jnp.sum(output**2) + jnp.sum(rest["h"])

    forms = (lambda state: jnp.sum(vmap(one)(state, XS)),
             lambda state: sum(one(member(state, i), XS[i]) for i in range(3)))  # fmt: skip
    got, expected = (jax.jit(jax.grad(form))(tree) for form in forms)
    assert same(got, expected, exact=False) and jax.tree.structure(got) == jax.tree.structure(tree)


def test_a_rollout_in_scan_equals_a_loop_of_vmapped_steps():
    tree = expected = EPISODES(AGENT)
    xs, outputs = noise(4, 3, 3), []
    step = vmap(lambda state, x: apply(AGENT, state, x)[::-1])
    state, got = jax.lax.scan(jax.checkpoint(step), tree, xs)
    for x in xs:
        output, expected = vmap_apply(AGENT, expected, x)
        outputs.append(output)
    assert same(state, expected, exact=False) and same(got, jnp.stack(outputs), exact=False)


def member_loss(params, rest, x):
    return jnp.sum(apply(AGENT, params | rest, x)[0] ** 3)


def test_a_gradient_per_member_of_shared_parameters_is_refused():
    with pytest.raises(ValueError, match=(
            r"different per member: 'W.weight' \(ParamState\).*pmean over axis_name.*"
            r"A gradient or other tree per member may leave as flat_dict\(tree\)")):  # fmt: skip
        vmap(jax.grad(member_loss))(*SHARED, XS)


def test_a_mean_gradient_of_shared_parameters_is_shared():
    def gradient(params, rest, x):
        return jax.lax.pmean(jax.grad(member_loss)(params, rest, x), "member")

    got = jax.jit(vmap(gradient, axis_name="member"))(*SHARED, XS)
    expected = jax.tree.map(lambda leaf: leaf / 3, jax.jit(jax.grad(total_in_a_loop))(SHARED[0]))
    assert same(got, expected, exact=False)


def test_gradients_per_member_of_shared_parameters_leave_as_a_dict():
    def gradient(params, rest, x):
        return flat_dict(jax.grad(member_loss)(params, rest, x))

    got = vmap(gradient, in_axes=(None, 0, 0))(*SHARED, XS)
    expected = [gradient(SHARED[0], each, x) for each, x in zip(members(SHARED[1]), XS)]
    assert same(got, stacked(expected), exact=False)
    assert same(vmap(gradient)(*SHARED, XS), got)  # shared states are shared without in_axes, too


# ---- What vmapped calls create, keep and exclude


class Bag(Module):
    """Hidden states of `__init__`, one of which `init_state` makes anew."""

    def __init__(self):
        self.kept, self.made = HiddenState(jnp.zeros(2)), HiddenState(jnp.zeros(2), tag="old")
        self.spare = None

    def init_state(self, key=None):
        self.kept.value = self.kept.value + 1
        self.made = HiddenState(jnp.ones(2) if key is None else jax.random.normal(key, (2,)))

    def swap(self):
        self.kept, self.made = self.made, self.kept

    def move(self):
        self.spare, self.made = [self.made], None

    def remake(self, x):
        self.kept = HiddenState(self.kept.value + x, tag="own")

    def see(self):
        return jnp.array(self.made.value.ndim)


def test_one_set_of_parameters_serves_a_hidden_state_for_each_episode():
    model = Sequential(GRU(3, 3), Dropout(0.5))
    tree = vmap_init(model, axis_size=32, state_to_exclude=ParamState, key=KEY)
    first = init(model, key=jax.random.split(KEY, 32)[0])
    params, hidden = partition(tree, ParamState)
    assert same(params, partition(first, ParamState)[0])
    assert set(marks(params).values()) == {0} and set(marks(hidden).values()) == {1}
    assert hidden["layers.0.h"].shape == (32, 3) and hidden["layers.1.key"].shape == (32,)
    outputs, after = jax.jit(functools.partial(vmap_apply, model))(tree, jnp.ones((32, 3)))
    assert outputs.shape == (32, 3) and same(partition(after, ParamState)[0], params)


def test_an_excluded_state_has_the_first_members_value_under_jit_and_vmap_too():
    def start(key):
        return vmap_init(GRU(3, 3), axis_size=2, state_to_exclude=ParamState, key=key)

    expected = [init(GRU(3, 3), key=jax.random.split(key)[0])["weights"] for key in KEYS]
    assert same(jax.jit(start)(KEYS[0])["weights"], expected[0], exact=False)
    agents = vmap(start)(KEYS)
    assert marks(agents) == {"weights": 1, "h": 2}
    assert same(agents["weights"], stacked(expected), exact=False)


def test_a_created_state_gains_the_axis_and_an_existing_one_keeps_what_it_has():
    model = Bag()
    tree = vmap_init(model, axis_size=3)
    assert marks(tree) == {"kept": 0, "made": 1} and tree["kept"].tolist() == [1, 1]
    again = vmap_call_all(model, tree, "init_state")[1]  # made anew where it was mapped
    assert marks(again) == {"kept": 0, "made": 1} and again["made"].shape == (3, 2)
    _, remade = vmap_call_all(model, tree, "remake", jnp.arange(3.0), in_axes=0)
    assert marks(remade) == {"kept": 1, "made": 1}
    assert remade["kept"].tolist() == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("method, expected", [
    ("swap", {"kept": 1, "made": 0}), ("move", {"kept": 0, "spare.0": 1})])
def test_a_box_that_moves_takes_its_axis_along(method, expected):
    tree = vmap_init(Bag(), axis_size=3, key=KEY)
    _, after = vmap_apply(Bag(), tree, method=method)
    assert marks(after) == expected
    [place] = [name for name, mark in expected.items() if mark]
    assert same(after[place], tree["made"])


def test_excluded_mapped_states_are_seen_whole_and_stay_as_they_are():
    tree = vmap_init(Bag(), axis_size=3)
    assert vmap_call_all(Bag(), tree, "see")[0][()].tolist() == [1] * 3
    outputs, after = vmap_call_all(Bag(), tree, "see", axis_size=2, state_to_exclude=[State])
    assert outputs[()].tolist() == [2] * 2 and same(after, tree)


def test_a_state_tag_marks_what_a_call_creates_without_a_tag_and_stays_with_the_box():
    def tags(tree):
        return {path[0]: box.tag for path, box in tree.states().items()}

    tree = vmap_init(Bag(), axis_size=2, state_tag="new")
    assert tags(tree) == {"kept": None, "made": "new"}
    swapped = vmap_call_all(Bag(), tree, "swap", state_tag="newer")[1]
    assert tags(swapped) == {"kept": "new", "made": None}
    remade = vmap_call_all(Bag(), tree, "remake", 1.0, state_tag="newer")[1]
    assert tags(remade) == {"kept": "own", "made": "new"}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_target_networks_as_arguments_are_not_taken_for_the_state(wrap):
    class Learner(VanillaRNN):
        def update(self, x, target, other):
            return super().update(x) - apply(AGENT, target | other, x)[0]

    model, tree = Learner(3, 3), EPISODES(AGENT)
    target, other = partition(jax.tree.map(jnp.cos, member(tree, 0)), ParamState)
    expected = [apply(model, each, x, target, other) for each, x in zip(members(tree), XS)]
    axes = (0, None, None)
    apart = functools.partial(vmap_apply, model, in_axes=axes)
    everywhere = functools.partial(vmap_call_all, model, fn_name="update", in_axes=axes,
                                   node_to_exclude=Linear)  # fmt: skip
    for outputs, after in (wrap(apart)(tree, XS, target, other),
                           wrap(everywhere)(state=tree, args=(XS, target, other))):  # fmt: skip
        outputs = outputs[()] if isinstance(outputs, dict) else outputs
        assert same(outputs, stacked([output for output, _ in expected]), exact=False)
        assert alike(after, [each for _, each in expected]) and marks(after) == marks(tree)


def test_trees_among_the_arguments_of_a_vmapped_call_are_seen_by_member():
    class Reader(Module):
        def update(self, state, trees):
            return state["h"] + trees["other"]["h"].sum() + state["W.weight"]["bias"]

    tree = EPISODES(AGENT)
    hidden, _ = partition(tree, HiddenState)
    other = jax.tree.map(lambda leaf: leaf * jnp.arange(3.0)[:, None], hidden)
    outputs, _ = vmap_apply(Reader(), StateTree({}), tree, {"other": other})
    assert np.allclose(outputs, 0.1 + 0.3 * np.arange(3)[:, None])
    outputs, _ = vmap_apply(Reader(), StateTree({}), tree, {"other": other}, in_axes=(0, None))
    assert np.allclose(outputs, 0.1 + 0.9)


# ---- Keys


class Drop(Module):
    """Draws a mask from the key that its method is handed."""

    def update(self, x, key):
        return x * jax.random.bernoulli(key, 0.5, x.shape)


def test_every_member_of_vmap_apply_gets_a_key_of_its_own():
    x = jnp.ones((3, 16))
    outputs, _ = vmap_apply(Drop(), StateTree({}), x, key=KEY)
    assert same(outputs, jnp.stack([Drop()(each, key) for each, key in zip(x, KEYS)]))
    assert len({row.tobytes() for row in raw(outputs)}) == 3


def test_a_key_that_in_axes_share_is_the_same_for_all():
    outputs, _ = vmap_apply(Drop(), StateTree({}), jnp.ones((3, 16)), KEY, in_axes=(0, None))
    assert same(outputs, jnp.stack([Drop()(jnp.ones(16), KEY)] * 3))


def test_members_that_hold_their_keys_draw_different_masks():
    model = Sequential(Dropout(0.5), Dropout(0.5))
    tree = vmap_init(model, axis_size=3, key=KEY)
    outputs, after = vmap_apply(model, tree, jnp.ones((3, 16)))
    expected = [apply(model, init(model, key=key), jnp.ones(16)) for key in KEYS]
    assert same(outputs, jnp.stack([output for output, _ in expected]))
    assert alike(after, [each for _, each in expected])
    assert len({row.tobytes() for row in raw(outputs)}) == 3


def test_legacy_keys_are_split_like_typed_ones():
    legacy = jax.random.PRNGKey(0)
    tree = vmap_init(GRU(3, 3), axis_size=3, key=legacy)
    singles = [init(GRU(3, 3), key=key) for key in jax.random.split(legacy, 3)]
    assert all(same(member(tree, i), singles[i]) for i in range(3))


@pytest.mark.parametrize("key", [KEYS, 0, jnp.zeros(2)], ids=["three", "int", "floats"])
def test_anything_but_one_key_is_refused_by_vmapped_calls(key):
    for call in (lambda: vmap_apply(Drop(), StateTree({}), jnp.ones((3, 2)), key=key),
                 lambda: vmap_init(GRU(3, 3), axis_size=3, key=key)):  # fmt: skip
        with pytest.raises(TypeError, match="key= is one PRNG key"):
            call()


# ---- Sizes and in_axes


def test_the_size_comes_from_mapped_states_or_arguments():
    assert vmap_apply(AGENT, EPISODES(AGENT), jnp.ones(3), in_axes=None)[0].shape == (3, 3)
    output, _ = vmap_apply(Drop(), StateTree({}), jnp.ones((4, 2)), KEY, in_axes=(0, None))
    assert output.shape == (4, 2)
    assert vmap(lambda tree: tree["h"] * 2)(EPISODES(AGENT)).shape == (3, 3)
    assert vmap(lambda x, y: x + y, in_axes=(None, 1))(1.0, jnp.ones((2, 5))).shape == (5, 2)
    bags = StateTree({"0": vmap_init(Bag(), axis_size=4)})
    assert vmap_call_all([Bag()], bags, "see")[0][0,].shape == (4,)


@pytest.mark.parametrize("size", [0, -1, 2.0, "3", True, None, np.float32(3)])
def test_a_size_that_is_no_positive_int_is_refused(size):
    for call in (lambda: vmap_init(AGENT, axis_size=size),
                 lambda: vmap(lambda: 0, axis_size=size)(),
                 lambda: vmap(lambda x: x, in_axes=None, axis_size=size)(jnp.ones(3)),
                 lambda: vmap_init_all_states(Bag(), axis_size=size)):  # fmt: skip
        with pytest.raises(ValueError, match="axis_size is a positive int"):
            call()


def test_no_members_at_all_are_refused():
    with pytest.raises(ValueError, match="axis_size is a positive int.*got 0"):
        vmap(lambda x: x)(jnp.ones((0, 3)))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda tree: vmap_reset(AGENT, tree, axis_size=5), r"axis_size 5 is at odds.*'h' \(3,\)"),
        (lambda tree: vmap_apply(AGENT, tree, jnp.ones((4, 3))), r"args\[0\] \(4,\)"),
        (lambda tree: vmap(min)(tree, {"x": [jnp.ones(4)]}), r"args\[1\]\['x'\]\[0\] \(4,\)"),
        (lambda tree: vmap(min)({"x": jnp.ones(4)}, (tree,)), r"'h' of args\[1\]\[0\] \(3,\)"),
        (lambda tree: vmap(min, axis_size=2)(tree), r"axis_size 2 is .*'h' of args\[0\] \(3,\)"),
        (lambda tree: vmap(min, (1, 0))(jnp.ones((3, 2)), jnp.ones(3)), r"args\[1\] \(3,\)"),
    ],
)
def test_sizes_at_odds_are_refused_by_name(call, words):
    tree = EPISODES(AGENT)
    with pytest.raises(ValueError, match=words):
        call(tree)


@pytest.mark.parametrize(
    "in_axes, args, words",
    [
        (2, (jnp.ones((3, 2)),), r"args\[0\], float32\[3,2\]"),
        (-3, (jnp.ones((3, 2)),), r"args\[0\], float32\[3,2\]"),
        (0, (jnp.ones(3), 1.0), r"args\[1\], float"),
        ("0", (jnp.ones(3),), r"'0' does not fit args\[0\], float32\[3\]"),
        (0.0, (jnp.ones(3),), r"args\[0\]"),
        ((0, 0), (jnp.ones(3),), r"\(0, 0\) does not fit"),
        ((0,), (jnp.ones(3), jnp.ones(3)), r"\(0,\) does not fit"),
        ({"x": 0}, (jnp.ones(3),), r"\{'x': 0\} does not fit"),
        (({"x": 0},), ({"y": jnp.ones(3)},), r"does not fit the 1 arguments"),
        (({"x": (0, "1")},), ({"x": (jnp.ones(3), jnp.ones(3))},), r"args\[0\]\['x'\]\[1\]"),
        (0, ({"name": "text"},), r"args\[0\]\['name'\], str"),
        (("0",), (StateTree({}),), r"args\[0\]"),
    ],
)
def test_bad_in_axes_are_refused_in_terms_of_the_arguments(in_axes, args, words):
    class Taker(Module):
        def update(self, *args):
            return 0

    for call in (lambda: vmap(Taker(), in_axes)(*args),
                 lambda: vmap_apply(Taker(), StateTree({}), *args, in_axes=in_axes),
                 lambda: vmap_call_all(Taker(), StateTree({}), "update", args, in_axes=in_axes)):
        with pytest.raises(TypeError, match=words) as caught:
            call()
        assert "in_axes is an int or None, or a tuple or tree of these" in str(caught.value)
        assert "vmap in_axes[" not in str(caught.value)


@pytest.mark.parametrize(
    "returned, words",
    [
        ("text", "str"),
        (State(1.0), "State"),
        (len, "builtin_function_or_method"),
        ({"a": [jnp.ones(1), "text"]}, "str"),
        ([Bag()], "Bag"),
    ],
    ids=["str", "State", "function", "nested", "modules"],
)
def test_what_cannot_leave_a_vmapped_method_is_refused_by_name(returned, words):
    class Odd(Module):
        def give(self):
            return returned

    model = {"odd": [Odd()]}
    for call in (lambda: vmap_call_all(model, StateTree({}), "give", axis_size=2),
                 lambda: vmap_call_all_fns(model, "give", axis_size=2)):  # fmt: skip
        with pytest.raises(TypeError, match=rf"'give' of 'odd.0' \(Odd\) returned .*{words}"):
            call()
    with pytest.raises(TypeError, match=rf"'give' of the root \(Odd\) returned .*{words}"):
        vmap_apply(Odd(), StateTree({}), method="give", axis_size=2)


# ---- Warnings, traces, tracers and what is left unchanged


def test_a_vmapped_init_that_maps_nothing_warns_where_it_was_called():
    with pytest.warns(UserWarning, match=r"no state is mapped.*vmap\(lambda key: init") as caught:
        line = inspect.currentframe().f_lineno + 1
        vmap_init(Sequential(Linear(3, 3)), axis_size=3)
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_a_missing_method_is_warned_about_where_the_vmapped_call_stands():
    with pytest.warns(UserWarning, match="does not have method 'see'") as caught:
        vmap_call_all(Module(), StateTree({}), "see", axis_size=2, fn_if_not_exist="warn")
    assert [each.filename for each in caught] == [__file__]


def test_a_vmapped_init_whose_states_are_all_excluded_warns():
    with pytest.warns(UserWarning, match="no state is mapped"):
        vmap_init(AGENT, axis_size=3, state_to_exclude=...)


def test_a_loop_of_jitted_vmapped_steps_is_traced_once():
    model, traces = Sequential(GRU(3, 3), Dropout(0.5), LIF(3)), []
    tree = vmap_init(model, axis_size=3, key=KEY)
    template = frozen(model)

    @jax.jit
    def step(state, x, key):
        traces.append(x)
        output, state = vmap_apply(model, state, x)
        state = where(output[:, 0] > 0, vmap_reset(model, state, key=key), state)
        return vmap(lambda state: jax.tree.map(lambda leaf: leaf, state))(state)

    for number in range(4):
        tree = step(tree, jnp.ones((3, 3)), jax.random.key(number))
    assert len(traces) == 1 and frozen(model) == template


def test_no_tracer_is_left_by_vmap_and_the_vmapped_calls():
    model = Sequential(LIF(3), Linear(3, 3))
    with jax.checking_leaks():
        agents = vmap(lambda: vmap_init(AGENT, axis_size=3), axis_size=3)()
        outputs, agents = vmap(functools.partial(vmap_apply, AGENT))(agents, jnp.ones((3, 3, 3)))
        vmap_init_all_states(model, axis_size=3, key=KEY)
        vmap_call_all_fns(model, "update", jnp.ones(3), node_to_exclude=Sequential)
    leaves = jax.tree.leaves([snapshot(model), outputs, agents])
    assert len(leaves) == 11 and all(np.isfinite(raw(leaf)).all() for leaf in leaves)


def test_a_vmapped_method_that_raises_leaves_all_as_it_was():
    class Failing(Bag):
        def fail(self, x):
            self.kept.value, self.spare, self.made = x, [HiddenState(x)], None
            raise RuntimeError("at last")

    model, x = vmap_init_all_states(Failing(), axis_size=3), jnp.ones((3, 2))
    state, before = snapshot(model), frozen(model)
    for call in (lambda: vmap_call_all_fns(model, "fail", x, in_axes=0),
                 lambda: vmap_apply(model, state, x, method="fail"),
                 lambda: jax.jit(lambda x: vmap_apply(model, state, x, method="fail"))(x)):
        with pytest.raises(RuntimeError, match="at last") as caught:
            call()
        assert "raised by 'fail' of the root (Failing)" in caught.value.__notes__
        assert frozen(model) == before


def test_arguments_and_templates_come_out_as_they_went_in():
    model = GRU(3, 3)
    tree, x = vmap_init(model, axis_size=3, key=KEY), np.ones((3, 3))
    given = {"tree": tree, "x": [x, None]}

    def image():
        return frozen(model), frozen([dict(tree), tree.states(), x])

    def meddle(given):
        given["tree"]["weights"]["z"] = 0.0
        given["x"].append(3)
        return given.pop("tree")

    before = image()
    assert same(vmap(meddle)(given), tree)
    vmap_apply(model, tree, x)
    vmap_reset(model, tree)
    assert [*given] == ["tree", "x"] and given["tree"] is tree and len(given["x"]) == 2
    assert image() == before


def test_results_never_share_memory_with_numpy_arguments():
    arrays = [np.zeros(shape, "f4") for shape in ((2, 32), 32, (2, 32), 32)]
    mapped = jax.tree.map(lambda _: arrays[2], stack(*[StateTree({"a": State(jnp.zeros(32))})] * 2))
    shared = jax.tree.map(lambda _: arrays[3], StateTree({"b": State(jnp.zeros(32))}))

    def build(one, other, mapped, shared):
        return mapped | shared | StateTree({"one": State(one), "other": State(other)})

    tree = vmap(build, in_axes=(0, None, 0, 0))(*arrays[:2], mapped, shared)
    assert marks(tree) == {"a": 1, "b": 0, "one": 1, "other": 1}
    for array in arrays:
        array += 1
    assert not any(leaf.any() for leaf in jax.tree.leaves(tree))


# ---- Devices


def a_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("member",))
    assert mesh.size == 8, "XLA_FLAGS came too late"
    return mesh, jax.sharding.PartitionSpec("member")


def spread(tree, place):
    """A tree of what `place` says for each leaf, by its mark."""
    boxes = tree.states().values()
    return jax.tree.unflatten(jax.tree.structure(tree), [
        place(box.mapped) for box in boxes for _ in jax.tree.leaves(box.value)])  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda f, shardings: f, lambda f, shardings: jax.jit(
    f, out_shardings=shardings)], ids=["eager", "jit"])  # fmt: skip
def test_a_vmapped_reset_keeps_shardings(wrap):
    mesh, spec = a_mesh()
    model = Sequential(LIF(2), VanillaRNN(2, 3), Dropout(0.5))
    tree = vmap_init(model, axis_size=8, key=KEY)
    shardings = spread(tree, lambda mapped: jax.sharding.NamedSharding(
        mesh, spec if mapped else jax.sharding.PartitionSpec()))  # fmt: skip
    sharded = jax.device_put(tree, shardings)
    again = wrap(lambda tree: vmap_reset(model, tree, key=KEY), shardings)(sharded)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in zip(
        jax.tree.leaves(again), jax.tree.leaves(shardings)))  # fmt: skip
    assert same(again, vmap_reset(model, tree, key=KEY), exact=False)


def test_a_vmapped_reset_in_place_keeps_shardings():
    mesh, spec = a_mesh()
    model = vmap_init_all_states(LIF(2), axis_size=8, key=KEY)
    for box in model.states(HiddenState).values():
        box.value = jax.device_put(box.value, jax.sharding.NamedSharding(mesh, spec))
    sharding = model.V.value.sharding
    vmap_reset_all_states(model, key=KEY)
    assert model.V.value.sharding.is_equivalent_to(sharding, 2) and len(sharding.device_set) == 8


def test_vmapped_calls_run_inside_shard_map():
    try:
        shard_map = jax.shard_map
    except AttributeError:  # jax < 0.6
        from jax.experimental.shard_map import shard_map
    mesh, spec = a_mesh()
    tree, xs = vmap_init(AGENT, axis_size=16), noise(16, 3)
    specs = spread(tree, lambda mapped: spec if mapped else jax.sharding.PartitionSpec())

    def loss(state, x):
        output, state = vmap_apply(AGENT, state, x)
        return jax.lax.pmean(jnp.mean(output**2), "member"), state

    mapped = shard_map(loss, mesh=mesh, in_specs=(specs, spec), out_specs=(
        jax.sharding.PartitionSpec(), specs))  # fmt: skip
    value, after = jax.jit(mapped)(tree, xs)
    outputs, expected = vmap_apply(AGENT, tree, xs)
    assert np.allclose(value, np.mean(raw(outputs) ** 2), atol=1e-6)
    assert same(after, expected, exact=False)
    forms = (lambda tree: mapped(tree, xs)[0],
             lambda tree: jnp.mean(vmap_apply(AGENT, tree, xs)[0] ** 2))  # fmt: skip
    gradient, expected = (jax.jit(jax.grad(form))(tree) for form in forms)
    assert same(gradient, expected, exact=False)


def test_the_template_of_these_tests_is_as_it_was():
    assert frozen(AGENT) == frozen(Agent(KEY))


def test_a_tree_with_paths_of_different_lengths_is_an_argument_of_vmap():
    tree = stack(StateTree({"a.b": State(jnp.ones(2)), "c": State(jnp.ones(2))}))
    assert same(vmap(lambda state: state)(tree), tree)


def test_a_vmapped_method_that_returns_a_generator_is_refused():
    class Odd(Module):
        def give(self):
            return (each for each in ())

    with pytest.raises(TypeError, match=r"'give' of the root \(Odd\) returned .*generator"):
        vmap_apply(Odd(), StateTree({}), method="give", axis_size=2)


@pytest.mark.parametrize("returned", [np.array(["text"]), jax.ShapeDtypeStruct((2,), "float32"),
                                      jnp.float32])  # fmt: skip
def test_things_with_a_dtype_that_are_no_jax_arrays_are_refused_by_name(returned):
    class Odd(Module):
        def give(self):
            return returned

    with pytest.raises(TypeError, match=r"'give' of the root \(Odd\)"):
        vmap_call_all(Odd(), StateTree({}), "give", axis_size=2)


def test_a_vmapped_init_in_place_warns_where_it_was_called():
    with pytest.warns(UserWarning, match="no state is mapped") as caught:
        line = inspect.currentframe().f_lineno + 1
        vmap_init_all_states(Sequential(Linear(3, 3)), axis_size=3)
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_a_missing_method_is_warned_about_where_the_call_in_place_stands():
    with pytest.warns(UserWarning, match="does not have method 'see'") as caught:
        vmap_call_all_fns(Module(), "see", axis_size=2, fn_if_not_exist="warn")
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("in_axes", [True, (False,)])
def test_a_bool_in_in_axes_is_refused_in_terms_of_the_arguments(in_axes):
    with pytest.raises(TypeError, match=r"in_axes is an int or None.*args\[0\]"):
        vmap(lambda x: x, in_axes)(jnp.ones((3, 2)))


@pytest.mark.parametrize("call", [
    lambda: apply(Drop(), StateTree({}), jnp.ones(3), key=KEY, typo=1),
    lambda: apply(Drop(), StateTree({}), jnp.ones(3), KEY, key=KEY),
    lambda: vmap_apply(Drop(), StateTree({}), jnp.ones((2, 3)), key=KEY, typo=1),
], ids=["typo", "twice", "vmapped typo"])  # fmt: skip
def test_a_call_that_has_a_key_is_not_told_to_pass_one(call):
    with pytest.raises(TypeError) as caught:
        call()
    assert "requires a key" not in str(caught.value)


def test_trees_of_trees_such_as_hessians_get_their_marks_inside_too():
    params = stack(*[StateTree({"w": ParamState(jnp.ones(2))})] * 3)
    hessians = vmap(jax.hessian(lambda params: jnp.sum(params["w"] ** 3)))(params)
    assert hessians["w"]["w"].shape == (3, 2, 2)
    assert member(hessians["w"], 0)["w"].shape == (2, 2)


# ---- Assigning -----------------------------------------------------------------------------------


def numbered(tree, start=0):
    """A tree of the same structure with other values."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, start + leaf.size, leaf.dtype), tree)


@pytest.mark.parametrize("wrap", [
    lambda new: {("W", "weight"): new},
    lambda new: {("W", "weight", "bias"): new["bias"], ("W", "weight", "weight"): new["weight"]},
    lambda new: {"W.weight.bias": new["bias"], "W.weight.weight": new["weight"]},
    lambda new: {"W": {"weight": new}},
    lambda new: {"W.weight": new},
    lambda new: {("W",): {"weight.bias": new["bias"], ("weight", "weight"): new["weight"]}},
    lambda new: StateTree({"W.weight": ParamState(new)}),
    lambda new: {"W.weight": ParamState(new)},
    lambda new: {"W": StateTree({"weight": State(new)})},
], ids=range(9))  # fmt: skip
def test_one_leaf_is_reached_in_every_way_of_writing_it(wrap):
    tree = init(VanillaRNN(2, 3))
    new = {"bias": np.arange(3.0), "weight": np.ones((5, 3))}
    after, unexpected, missing = assign(tree, wrap(new))
    assert (unexpected, missing) == ([], [("h",)])
    assert after["W.weight"]["bias"].tolist() == [0, 1, 2] and float(after["W.weight"]["weight"].min()) == 1
    assert jax.tree.structure(after) == jax.tree.structure(tree)


@every_model
@pytest.mark.parametrize("members", [None, 3])
def test_saving_to_npz_and_loading_is_the_identity(model, members):
    tree = (init(model, key=KEY) if members is None else
            vmap_initialised(model, axis_size=members, key=KEY))  # fmt: skip
    file = io.BytesIO()
    np.savez(file, **flat_dict(tree))
    file.seek(0)
    other = jax.tree.map(lambda leaf: leaf if leaf.dtype == KEY.dtype else leaf * 0, tree)
    with np.load(file) as loaded:
        after, unexpected, missing = assign(other, loaded)
    assert same(after, tree) and (unexpected, missing) == ([], [])


def test_bfloat16_survives_npz():
    tree = tree_of(a=jnp.arange(4, dtype=jnp.bfloat16) / 3)
    file = io.BytesIO()
    np.savez(file, **flat_dict(tree))
    file.seek(0)
    assert same(assign(jax.tree.map(jnp.zeros_like, tree), np.load(file)).state, tree)


def test_unexpected_and_missing_are_complete_sorted_and_as_written():
    tree = init(Sequential(VanillaRNN(2, 3), VanillaRNN(3, 3)))
    bias = np.ones(3)
    result = assign(
        tree,
        {"zebra": 1.0, ("layers", 7, "h"): bias, "apple.x": {"y": 1.0}, 5: bias, "empty": {}},
        {"layers": {0: {"W": {"weight": {"bias": bias, "scale": bias}}, "other": {"a": 1.0}}}},
        {("layers", 1, "W", "weight"): {"bias": bias, "gain": bias}, "layers.1.h": bias},
    )
    assert result.unexpected == [
        5, "apple.x", "empty", ("layers", 0, "W", "weight", "scale"), ("layers", 0, "other", "a"),
        ("layers", 1, "W", "weight", "gain"), ("layers", 7, "h"), "zebra"]  # fmt: skip
    assert result.missing == [
        ("layers", 0, "W", "weight", "weight"), ("layers", 0, "h"), ("layers", 1, "W", "weight", "weight")]  # fmt: skip


def test_later_snapshots_win_leaf_by_leaf():
    tree = init(VanillaRNN(2, 3))
    after, _, missing = assign(tree, {"h": np.ones(3), "W.weight.bias": np.ones(3)}, {"h": np.full(3, 2.0)})
    assert after["h"].tolist() == [2, 2, 2] and after["W.weight"]["bias"].tolist() == [1, 1, 1]
    assert missing == [("W", "weight", "weight")]


def test_a_state_without_leaves_is_neither_missing_nor_unexpected():
    tree = tree_of(nothing=None, empty=(), a=1.0)
    assert assign(tree, tree)[1:] == ([], [])
    assert assign(tree, {"a": 2.0})[1:] == ([], [])
    assert assign(tree, {"a": {}, "none": None})[1:] == (["none"], [("a",)])


def test_dtype_sharding_and_strong_types_stay():
    devices = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("x"))
    tree = tree_of(half=jnp.zeros(8, jnp.bfloat16), spread=jax.device_put(jnp.zeros(8), sharding),
                   number=jnp.zeros(()), flag=jnp.zeros(2), whole=jnp.zeros(2, jnp.int32))  # fmt: skip
    traces = []
    step = jax.jit(lambda tree: traces.append(1) or jax.tree.map(lambda leaf: leaf + 1, tree))
    step(tree)
    after = assign(tree, {"half": np.arange(8.0), "spread": np.arange(8), "number": 3.0,
                          "flag": [], "whole": np.array([True, False])}, {"flag": np.array([1, 2])}).state  # fmt: skip
    assert [(leaf.dtype, leaf.sharding, leaf.weak_type) for leaf in jax.tree.leaves(after)] == [
        (leaf.dtype, leaf.sharding, leaf.weak_type) for leaf in jax.tree.leaves(tree)]  # fmt: skip
    assert step(after)["spread"].tolist() == list(range(1, 9)) and len(traces) == 1
    array = np.ones(8, np.float32)
    loaded = assign(tree, {"spread": array, "half": array}).state
    array[:] = 7
    assert float(loaded["spread"].max()) == 1


def test_everything_that_does_not_fit_is_listed_and_nothing_changes():
    model = Module()
    model.a, model.b, model.c = State(jnp.zeros(2)), State(jnp.zeros(2, int)), State({"d": jnp.zeros(3)})
    model.e, model.f = State(jnp.zeros(2, bool)), State(KEY)
    model.ok = State(jnp.zeros(2))
    before = frozen(model)
    bad = {"a": np.ones(2) * 1j, "b": np.ones(2), "c": {"d": "text"}, "e": np.ones(2, int), "f": np.ones(2),
           "ok": np.ones(2)}  # fmt: skip
    for load in (lambda: assign(snapshot(model), bad), lambda: assign_state_values(model, bad)):
        with pytest.raises(ValueError) as info:
            load()
        for part in ("'a' expected float32[2], got complex128[2]", "'b' expected int32[2], got float64[2]",
                     "'c.d' expected float32[3], got str", "'e' expected bool[2], got int64[2]",
                     "'f' expected key<fry>[], got float64[2]"):  # fmt: skip
            assert part in str(info.value)
        assert "'ok'" not in str(info.value)
    for bad in ({"a": None}, {"c": {"d": None}}):
        with pytest.raises(ValueError, match=r"expected float32\[.\], got NoneType"):
            assign_state_values(model, bad)
    with pytest.raises(ValueError, match=r"'a' expected float32\[2\], got float64\[3\]"):
        assign_state_values(model, {"a": np.ones(3)})
    assert frozen(model) == before


def test_a_key_with_dots_in_it_is_reached_by_name_and_by_path():
    model = Module()
    model.t = {"a.b": State(np.zeros(1)), "0": State({"x.y": np.zeros(1)}), (1, "k"): State(np.zeros(1))}
    tree = snapshot(model)
    new = {"t.a.b": np.ones(1), "t.0.x.y": np.ones(1), "t.(1, 'k')": np.ones(1)}
    for given in (new, {"t": {"a.b": np.ones(1), "0": {"x": {"y": np.ones(1)}}, ((1, "k"),): np.ones(1)}},
                  {("t", "a", "b"): np.ones(1), ("t", 0): {"x.y": np.ones(1)},
                   ("t", (1, "k")): np.ones(1)}):  # fmt: skip
        after, unexpected, missing = assign(tree, given)
        assert (unexpected, missing) == ([], [])
        assert [float(leaf[0]) for leaf in jax.tree.leaves(after)] == [1, 1, 1]
    assert list(flat_dict(tree)) == ["t.0.x.y", "t.a.b", "t.(1, 'k')"]


@pytest.mark.parametrize("snapshot_", [3, [("h", 1)], None, jnp.ones(2)])
def test_a_snapshot_is_a_mapping(snapshot_):
    with pytest.raises(TypeError, match="a snapshot is a mapping"):
        assign(tree_of(h=1.0), snapshot_)


def test_assigning_works_on_traced_values():
    tree = init(VanillaRNN(2, 3))

    @jax.jit
    def load(tree, bias):
        return assign(tree, {"W.weight.bias": bias}).state

    assert load(tree, jnp.arange(3))["W.weight"]["bias"].tolist() == [0, 1, 2]
    closed = jax.jit(lambda bias: assign(tree, {"W.weight.bias": bias}).state)(jnp.arange(3))
    assert closed["W.weight"]["bias"].dtype == jnp.float32


def test_a_traced_value_is_not_bound_to_the_device_of_the_tree():
    here, there = jax.devices()[:2]
    tree = jax.device_put(tree_of(a=jnp.zeros(2)), here)
    loaded = jax.jit(lambda new: assign(tree, {"a": new}).state)(jax.device_put(jnp.ones(2), there))
    assert loaded["a"].devices() == {there} and loaded["a"].tolist() == [1, 1]


def test_assigning_in_place_touches_only_what_is_given():
    model = Module()
    model.kept, model.set = State(np.ones(2)), State({"x": jnp.zeros(2), "y": jnp.zeros(2)})
    kept, box = model.kept.value, model.set
    unexpected, missing = assign_state_values(model, {"set": {"x": np.ones(2)}, "z": 1.0})
    assert model.kept.value is kept and model.set is box
    assert model.set.value["x"].tolist() == [1, 1] and model.set.value["y"].tolist() == [0, 0]
    assert (unexpected, missing) == (["z"], [("kept",), ("set", "y")])


# NumPy saves float8_e5m2 and cannot load it again.
LOW = [name for name in ("bfloat16", "float8_e4m3fn", "int4", "uint4") if hasattr(jnp, name)]


def through_npz(tree):
    file = io.BytesIO()
    np.savez(file, **flat_dict(tree))
    file.seek(0)
    with np.load(file) as loaded:
        return dict(loaded)


def low(name, *shape):
    """0, 1, 0, 1, ... of a dtype that npz has no name for."""
    return (
        (np.arange(np.prod(shape, dtype=int)) % 2)
        .reshape(shape)
        .astype(np.float32)
        .astype(jnp.dtype(name))
    )


@pytest.mark.parametrize("name", LOW)
def test_dtypes_that_npz_has_no_name_for_survive_it(name):
    tree = tree_of(
        array=low(name, 2, 3), number=low(name), empty=low(name, 0), deep={"x": [low(name, 4)]}
    )
    loaded = through_npz(tree)
    assert {leaf.dtype.kind for leaf in loaded.values()} == {"V"}  # or the test says nothing
    other = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1), tree)
    assert same(assign(other, loaded).state, tree)
    assert same(assign(jax.tree.map(np.asarray, other), loaded).state, tree)


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize(
    "target", ["float16", "int16", "uint16", "float32", "int8", "uint8", "bool"]
)
def test_raw_bytes_are_never_taken_for_a_dtype_that_npz_can_name(name, target):
    loaded = through_npz(tree_of(w=low(name, 3)))
    with pytest.raises(ValueError, match=rf"'w' expected {target}\[3\], got .*V"):
        assign(tree_of(w=np.zeros(3, target)), loaded)


@pytest.mark.parametrize("target", ["float32", "int32", "float16", *LOW, "complex64"])
@pytest.mark.parametrize("source", [
    np.zeros(3, [("a", "f4")]), np.zeros(3, [("a", "u1"), ("b", "u1")]), np.zeros(3, [("a", "u1")]),
    np.zeros(3, "V4"), np.zeros(3, "V3"), np.zeros(3, "V8"), np.array(["ab", "c", "d"]),
    np.zeros(3, object),
    np.zeros(3, "M8[s]"), [b"a", b"b", b"c"],
], ids=range(10))  # fmt: skip
def test_structured_arrays_and_other_non_numbers_are_refused(source, target):
    tree = tree_of(w=np.zeros(3, np.float32).astype(jnp.dtype(target)), ok=np.zeros(3))
    new = source if isinstance(source, np.ndarray) else np.array(source)
    with pytest.raises(ValueError, match=rf"'w' expected {target}\[3\], got "):
        assign(tree, {"w": new, "ok": np.ones(3)})


LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1),
          "int32": (-(2**31), 2**31 - 1),
          "uint32": (0, 2**32 - 1), "int4": (-8, 7), "uint4": (0, 15), "float16": (-65504, 65504),
          "float8_e4m3fn": (-448, 448), "float8_e5m2": (-57344, 57344)}  # fmt: skip


@pytest.mark.parametrize("target", [name for name in LIMITS if hasattr(jnp, name)])
def test_an_integer_out_of_range_is_refused_and_the_limits_themselves_fit(target):
    lowest, highest = LIMITS[target]
    tree = tree_of(w=np.zeros(2, np.float32).astype(jnp.dtype(target)))
    for wrap in (np.asarray, lambda numbers: np.asarray(numbers, object).astype(np.int64)):
        after = assign(tree, {"w": wrap([lowest, highest])}).state
        assert after["w"].astype(jnp.float32).tolist() == [np.float32(lowest), np.float32(highest)]
        assert after["w"].dtype == jnp.dtype(target)
    for numbers in ([lowest - 1, 0], [0, highest + 1], [2**40, 0], np.array([2**63, 0], np.uint64)):
        with pytest.raises(ValueError, match=rf"'w' expected {target}\[2\], got u?int64\[2\]"):
            assign(tree, {"w": np.asarray(numbers)})
    for number in (highest + 1, lowest - 1):
        with pytest.raises(ValueError, match=rf"'w' expected {target}\[\], got int"):
            assign(tree_of(w=np.float32(0).astype(jnp.dtype(target))), {"w": number})


def test_integers_that_fit_are_cast_whatever_their_own_range():
    tree = tree_of(
        a=np.zeros(2, np.int8),
        b=np.zeros((0, 3), np.uint8),
        c=np.zeros((), np.float16),
        d=np.zeros(2),
    )
    after = assign(tree, {"a": jnp.array([-128, 127]), "b": np.zeros((0, 3), np.int64), "c": 65504,
                          "d": np.array([2**62, 0])}).state  # fmt: skip
    assert (
        after["a"].tolist() == [-128, 127]
        and after["b"].shape == (0, 3)
        and float(after["c"]) == 65504
    )
    assert after["d"].tolist() == [2.0**62, 0] and after["a"].dtype == jnp.int8
    with pytest.raises(ValueError, match=r"'a' expected int8\[2\], got int32\[2\]"):
        assign(tree, {"a": jnp.array([0, 200])})
    with pytest.raises(
        ValueError,
        match=r"'a' expected int8\[2\], got uint8\[2\].*'c' expected float16\[\], got int32\[\]",
    ):
        assign(tree, {"a": np.array([0, 200], np.uint8), "c": jnp.array(65505)})


@pytest.mark.parametrize("source, target, fits", [
    ("int8", "int32", True), ("uint8", "int16", True), ("bool", "int8", True), ("int32", "float32", True),
    ("int16", "float16", True), ("float32", "float16", True), ("int32", "int8", False),
    ("uint8", "int8", False), ("int8", "uint8", False), ("int32", "float16", False),
    ("int32", "uint32", False), ("int32", "bool", False), ("float32", "int8", False),
])  # fmt: skip
def test_a_traced_integer_fits_where_every_integer_of_its_dtype_does(source, target, fits):
    tree = tree_of(w=np.zeros(2, target))
    load = jax.jit(lambda new: assign(tree, {"w": new}).state["w"])
    if fits:
        loaded = load(np.ones(2, source))
        assert loaded.dtype == target and loaded.tolist() == [1, 1]
    else:
        with pytest.raises(ValueError, match=rf"'w' expected {target}\[2\], got {source}\[2\]"):
            load(np.ones(2, source))


def compilations(call, caplog):
    """How many functions jax compiled during a call."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.block_until_ready(call())
    return sum("Compiling" in record.getMessage() for record in caplog.records)


def test_numpy_arrays_of_new_shapes_are_assigned_without_a_compilation(caplog):
    assert compilations(lambda: jnp.zeros(1031) + 1, caplog) > 0  # so these are seen
    trees = [tree_of(w=np.zeros((size, 2), np.float32), n=np.zeros(size, np.int8),
                     b=low("bfloat16", size))
             for size in range(1033, 1041)]  # fmt: skip
    given = [
        {"w": tree["w"], "n": np.ones(len(tree["w"]), int), "b": np.ones(len(tree["w"]))}
        for tree in trees
    ]
    loaded = []
    assert (
        compilations(
            lambda: loaded.extend(assign(*pair).state for pair in zip(trees, given)), caplog
        )
        == 0
    )
    assert all(
        np.asarray(leaf, np.float32).min() == 1
        for tree in loaded
        for name, leaf in tree.items()
        if name != ("w",)
    )


def test_a_spread_leaf_is_loaded_into_the_shards_that_it_has():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spec = jax.sharding.PartitionSpec
    shardings = {
        "rows": spec("x"),
        "both": spec("x", "y"),
        "whole": spec(),
        "columns": spec(None, "y"),
    }
    spread = {name: jax.sharding.NamedSharding(mesh, axes) for name, axes in shardings.items()}
    spread["second"] = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    tree = tree_of(
        **{
            name: jax.device_put(np.zeros((8, 4), np.float32), each)
            for name, each in spread.items()
        }
    )
    values = {name: np.arange(32.0).reshape(8, 4) + number for number, name in enumerate(spread)}
    for given in (
        values,
        {name: jnp.asarray(value, jnp.float32) for name, value in values.items()},
    ):
        after = assign(tree, given).state
        for name, sharding in spread.items():
            assert after[name].sharding == sharding and np.array_equal(after[name], values[name])
            assert {shard.data.shape for shard in after[name].addressable_shards} == {
                shard.data.shape for shard in tree[name].addressable_shards}  # fmt: skip


# ---- Edges -----------------------------------------------------------------------------------------


def test_a_frozen_exception_comes_through_a_call_in_place():
    # contextlib.contextmanager sets exc.__traceback__, which a frozen dataclass refuses.
    with pytest.raises(Frozen):
        call_all_fns(Freezer(), "explode")


LoudOrdered = type(
    "LoudOrdered",
    (collections.OrderedDict,),
    {name: method for name, method in LOUD.items() if name != "__new__"},
)


def loud_ordered(**parts):
    new = collections.OrderedDict.__new__(LoudOrdered)
    for name, part in parts.items():
        collections.OrderedDict.__setitem__(new, name, part)
    return new


def test_a_frozen_ordered_dict_is_copied():
    # OrderedDict.update(each, ...) calls the overridden __setitem__.
    model = Holder(loud_ordered(b=State(np.zeros(2)), a=3))
    kind, _, inside = apply(model, snapshot(model), collections.OrderedDict, method="look")[0]
    assert kind is LoudOrdered and list(inside) == ["b", "a"]


def test_a_frozen_ordered_dict_is_put_back():
    class Wrecker(Holder):
        def wreck(self):
            collections.OrderedDict.pop(self.container, "b")
            raise KeyError("half way")

    model = Wrecker(loud_ordered(b=State(np.zeros(2)), a=3))
    with pytest.raises(KeyError, match="half way"):
        call_all_fns(model, "wreck")
    assert list(dict.keys(model.container)) == ["b", "a"]


@pytest.mark.parametrize("wrap", [lambda w: [w], lambda w: (w,), lambda w: {"k": w}])
def test_tied_states_in_a_shared_container_that_each_owner_re_creates(wrap):
    class Layer(Module):
        def init_state(self, key):
            self.ws = wrap(ParamState(jax.random.uniform(key, (2,))))

    def model():
        both = Module()
        both.enc, both.dec = Layer(), Layer()
        both.enc.ws = both.dec.ws = wrap(ParamState(np.zeros(2, np.float32)))
        return both

    tree = init(model(), key=KEY)
    assert same(snapshot(init_all_states(model(), key=KEY)), tree) and len(tree) == 2
    if isinstance(wrap(0), tuple):  # which takes no new state
        with pytest.raises(ValueError, match=r"no place for .*'dec.ws.0' at 'dec.ws' \(tuple\)"):
            reset(model(), tree)
    else:
        assert same(reset(model(), tree), tree)
        assert same(snapshot(restore(model(), tree)), tree)


@pytest.mark.parametrize("form", [0, 2, 3])
def test_a_new_state_with_two_names_through_one_tuple_cannot_cross(form):
    class Twice(Module):
        def start(self):
            self.first = self.second = (HiddenState(jnp.ones(2)),)

    with pytest.raises(ValueError, match="'start' created .*'first.*'second"):
        families(Twice())[form]("start")


@pytest.mark.parametrize("name", ["1.h", "x", "1", "0"])
def test_a_tree_that_does_not_fit_a_tuple_of_modules_is_refused(name):
    with pytest.raises(ValueError, match=f"no place for.*'{name}'"):
        restore((Relu(),), StateTree({name: State(1)}))


@pytest.mark.parametrize("key", ["0", "a.b", (1, "k")])
def test_a_subtree_is_found_by_its_dotted_name_whatever_its_keys(key):
    model = Module()
    model.table = {key: Linear(2, 3)}
    tree = snapshot(model)
    name = f"table.{key}"
    assert f"{name}.weight" in tree  # so a look-up finds it
    assert list(subtree(tree, name)) == [("weight",)]


def test_a_spread_key_keeps_its_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    keys = jax.device_put(jax.random.split(KEY, 8), sharding)
    tree = tree_of(keys=keys)
    after = assign(tree, through_npz(tree)).state
    assert same(after, tree) and after["keys"].sharding == sharding


def test_a_leaf_stays_on_its_device_whatever_the_default_device_is():
    tree = tree_of(w=jax.device_put(np.zeros(2), jax.devices()[0]))
    with jax.default_device(jax.devices()[1]):
        after = assign(tree, {"w": np.ones(2)}).state
    assert after["w"].sharding == tree["w"].sharding


@pytest.mark.parametrize("target", ["float32", "int32", "float16", "int4", "complex64"])
def test_times_are_no_numbers(target):
    tree = tree_of(w=np.zeros(2).astype(jnp.dtype(target)), ok=np.zeros(2))
    with pytest.raises(ValueError, match=rf"'w' expected {target}\[2\], got "):
        assign(tree, {"w": np.array([1, 2], "m8[s]")})


@pytest.mark.parametrize(
    "use",
    [
        lambda m: call_all_fns(m, "double"),
        lambda m: restore(m, stack(snapshot(m)) and snapshot(m)),
    ],
)
def test_a_kind_whose_value_is_a_property_works_in_place_too(use):
    class Positive(State):
        @property
        def value(self):
            return jnp.exp(self.log)

        @value.setter
        def value(self, value):
            self.log = jnp.log(value)

    class Cell(Module):
        def __init__(self):
            self.w = Positive(jnp.ones(2))

        def double(self):
            self.w.value = self.w.value * 2

    assert apply(Cell(), snapshot(Cell()), method="double")[1]["w"].tolist() == [2, 2]
    assert use(Cell()).w.value.shape == (2,)


def test_equal_tags_are_one_tag_whatever_their_repr():
    one, two = frozenset([0, 8]), frozenset([8, 0])
    assert one == two and repr(one) != repr(two)
    trees = [StateTree({"w": State(np.zeros(2), tag=tag)}) for tag in (one, two)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_a_copied_tuple_keeps_the_attributes_of_its_subclass():
    class Named(tuple):
        pass

    class Cell(Module):
        def __init__(self):
            self.pair = Named((State(np.zeros(1)), 2))
            self.pair.name = "mine"

        def update(self):
            return self.pair.name

    assert apply(Cell(), snapshot(Cell()))[0] == "mine"


def test_where_has_read_a_numpy_leaf_when_it_returns():
    # A race: `jnp.where` is dispatched before it reads the memory of a NumPy operand.
    for size in range(300, 320):
        buffer = aligned(4, size)
        result = where(True, of_numpy(buffer), of_numpy(buffer.copy()))
        buffer[:] = 7
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(result))


def test_a_look_up_that_fails_in_a_deep_tree_takes_no_seconds():
    import time

    tree = snapshot(chain(1000))
    start = time.perf_counter()
    assert tree.get("nothing") is None
    assert time.perf_counter() - start < 1

def test_arguments_that_do_not_fit_are_refused_by_the_method_itself():
    for call in (lambda: init([GRU(2, 2)], 3, key=KEY), lambda: init([GRU(2, 2)], 3)):
        with pytest.raises(TypeError, match="init_state.. takes 1 positional argument but 2"):
            call()


def test_the_methods_of_a_container_are_no_methods_of_modules():
    for call in (apply, vmap_apply):
        with pytest.raises(AttributeError, match=r"the root \(list\) does not have method 'append'"):
            call([Relu()], StateTree({}), 1, method="append")
        with pytest.raises(AttributeError, match=r"the root \(dict\) does not have method 'keys'"):
            call({"a": Relu()}, StateTree({}), method="keys")


def test_an_empty_mapped_state_may_be_filled_by_a_plain_call():
    class Late(Module):
        def init_state(self):
            self.h = HiddenState(None)

        def fill(self):
            self.h.value = jnp.ones((3, 2))

    state = vmap_init(Late(), axis_size=3)
    assert apply(Late(), state, method="fill")[1]["h"].shape == (3, 2)


def test_a_size_is_in_bytes_below_a_kibibyte():
    sizes = [repr(tree_of(a=np.zeros(size, np.int8))).splitlines()[-1] for size in (1023, 1024)]
    assert sizes == ["1 leaves, 1,023 numbers, 1023 B", "1 leaves, 1,024 numbers, 1.0 KiB"]


def test_a_program_that_has_the_file_in_it_is_warned_too(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SOURCE.split("if __name__ ==")[0] + "\nvmap_init(Module(), axis_size=2)\n")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert run.returncode == 0 and "UserWarning: no state is mapped" in run.stderr


@pytest.mark.parametrize("form", [0, 2, 3])
def test_an_array_in_the_place_of_a_state_in_a_list_or_dict_is_refused(form):
    class Pile(Module):
        def __init__(self):
            self.hs, self.table = [HiddenState(jnp.zeros(2))], {"k": State(jnp.zeros(2))}

        def forget(self):
            self.hs[0] = jnp.ones(2)

        def forget_too(self):
            self.table["k"] = jnp.ones(2)

        def drop(self):
            self.hs.clear()
            self.table["k"] = None

    for method, name in (("forget", r"'hs.0' \(HiddenState\)"), ("forget_too", r"'table.k' \(State\)")):
        with pytest.raises(TypeError, match=f"'{method}' put arrays in the place of {name}.*value"):
            families(Pile())[form](method)
    families(Pile())[form]("drop")  # says what it does


# ---- Memory, time and meshes ---------------------------------------------------------------------


def test_a_pure_call_leaves_nothing_for_the_garbage_collector():
    model = Sequential(VanillaRNN(3, 3), Linear(3, 3))
    state = init(model)
    gc.collect()
    gc.disable()
    try:
        for call in (lambda: apply(model, state, jnp.ones(3)), lambda: reset(model, state)):
            call()
            before = len([each for each in gc.get_objects() if isinstance(each, VanillaRNN)])
            call()
            after = len([each for each in gc.get_objects() if isinstance(each, VanillaRNN)])
            assert after == before
    finally:
        gc.enable()


def calls_made(function):
    """How many calls a call leads to: host time that does not depend on the machine."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_tracing_a_vmapped_reset_grows_with_the_model_alone():
    def work(number):
        models = [Cheap(jnp.ones(8)) for _ in range(number)]
        state = stack(*[snapshot(models)] * 2)
        jax.jit(lambda state: vmap_reset(models, state)).lower(state)  # compiles the parts
        return calls_made(lambda: jax.jit(lambda state: vmap_reset(models, state)).lower(state))

    assert work(80) < 5 * work(20)


@pytest.mark.skipif(not hasattr(jax.sharding, "AxisType"), reason="a mesh has no kinds of axes yet")
def test_members_on_a_mesh_with_explicit_axes_are_stepped_and_reset():
    mesh = jax.make_mesh((8,), ("member",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member"))
    model = VanillaRNN(3, 3)
    hidden, rest = partition(vmap_init(model, axis_size=8), HiddenState)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(hidden, spread) | jax.device_put(rest, everywhere)
    x = jax.device_put(jnp.ones((8, 3)), spread)
    outputs, after = vmap_apply(model, state, x)
    assert same(outputs, vmap_apply(model, hidden | rest, jnp.ones((8, 3)))[0], exact=False)
    assert not vmap_reset(model, after)["h"].any()


class Remaker(Module):
    """Makes its state anew where others only write it."""

    def init_state(self, *, key):
        self.h = HiddenState(jax.random.normal(key, (3,)))

    def reset_state(self, *, key):
        self.h = HiddenState(jax.random.normal(key, (3,)))


def test_a_plain_call_that_makes_a_mapped_state_anew_is_refused():
    state = vmap_init(Remaker(), axis_size=3, key=KEY)
    with pytest.raises(ValueError, match=r"leading axes of 'h' \(HiddenState\).*vmap_reset"):
        reset(Remaker(), state, key=KEY)
    model = vmap_init_all_states(Remaker(), axis_size=3, key=KEY)
    before = frozen(model)
    with pytest.raises(ValueError, match=r"leading axes of 'h' \(HiddenState\).*vmap_reset"):
        reset_all_states(model, key=KEY)
    assert frozen(model) == before
    assert same(vmap_reset(Remaker(), state, key=KEY), state)
    init_all_states(model, key=KEY)  # begins anew, as for another number of members
    assert (model.h.mapped, model.h.value.shape) == (0, (3,))


def test_a_model_with_second_names_is_put_back():
    class Tied(Module):
        def __init__(self):
            self.first = self.second = State(np.zeros(2))
            self.table = self.alias = {"k": [State(np.ones(2))]}
            self.child = Sequential(Relu())
            self.child.parent = self

        def wreck(self):
            self.first.value += 1
            self.alias["k"].clear()
            self.second = self.table = None
            raise ValueError("half way")

    model = Tied()
    before = frozen(model)
    with pytest.raises(ValueError, match="half way"):
        call_all_fns(model, "wreck", fn_if_not_exist="pass")
    assert frozen(model) == before and model.first is model.second and model.table is model.alias


def test_integers_are_loaded_into_every_kind_of_number_that_has_room():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64, jnp.int8, jnp.uint32):
        tree = assign(tree_of(a=jnp.zeros(2, dtype)), {"a": np.array([1, 100])}).state
        assert tree["a"].dtype == dtype and [*map(complex, raw(tree["a"]))] == [1, 100]
    traced = jax.jit(lambda new: assign(tree_of(a=jnp.zeros(2, jnp.uint16)), {"a": new}).state)
    assert traced(jnp.array([0, 255], jnp.uint8))["a"].tolist() == [0, 255]


def test_keys_of_another_kind_are_refused():
    other = jax.random.key(0, impl="rbg")
    with pytest.raises(ValueError, match=r"'k' expected key<fry>\[\], got key<rbg>\[\]"):
        assign(tree_of(k=KEY), {"k": other})


# ---- What a shorter file once lost ---------------------------------------------------------------


class Rested(Module):
    def __init__(self):
        self.w = ParamState(jnp.ones(()))

    def init_state(self):
        self.h = HiddenState(jnp.zeros(2))

    def reset_state(self, x):
        self.h.value = x * jnp.ones(2)


def test_a_spread_tree_that_is_closed_over_is_reset_under_every_transformation():
    mesh = jax.sharding.Mesh(jax.devices()[:8], "d")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    params, rest = partition(vmap_init(Rested(), axis_size=8), ParamState)
    tree = params | jax.tree.map(lambda leaf: jax.device_put(leaf, spread), rest)

    def reset_to(x):
        return vmap_reset(Rested(), tree, x)["h"]

    for xs in (jnp.arange(3.0), jnp.arange(8.0)):
        expected = np.broadcast_to(np.asarray(xs)[:, None, None], (len(xs), 8, 2))
        assert np.array_equal(jax.vmap(reset_to)(xs), expected)
    assert np.array_equal(jax.jacfwd(reset_to)(2.0), np.ones((8, 2)))


def test_a_tree_that_a_vmapped_method_returns_is_an_output_of_each_member():
    class Child(Module):
        def go(self, x):
            return StateTree({"w": State(x * 2), "z": State(jnp.zeros(2))})

    class Parent(Rested):
        def __init__(self):
            super().__init__()
            self.child = Child()

    outputs, _ = vmap_call_all(Parent(), vmap_init(Parent(), axis_size=3), "go", (jnp.arange(3.0),),
                               in_axes=0, node_to_exclude=Parent)  # fmt: skip
    tree = outputs["child",]
    assert tree["w"].tolist() == [0, 2, 4] and tree["z"].shape == (3, 2)
    assert [box.mapped for box in tree.states().values()] == [1, 1]


def test_the_repr_of_a_tree_of_numpy_arrays_shows_them_as_they_are():
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree_of(a=jnp.zeros(4)))
    assert "float64[4]" in repr(tree) and repr(tree).endswith("4 numbers, 32 B")


def test_where_keeps_a_numpy_leaf_that_is_one_object_in_both():
    old = jax.device_get(vmap_init(Rested(), axis_size=3))
    (h, w), treedef = jax.tree.flatten(old)
    tree = where([True, False, True], jax.tree.unflatten(treedef, [h + 1, w]), old)
    assert tree["h"].tolist() == [[1, 1], [0, 0], [1, 1]] and tree["w"] == 1


def test_what_a_filter_is_shown_is_not_what_the_parts_hold():
    def hack(path, box):
        box.value["w"] = "hacked"
        return path == ("a",)

    tree = StateTree({name: ParamState({"w": jnp.ones(2)}) for name in "ab"})
    for part in (*partition(tree, hack), tree):
        assert all(value["w"].tolist() == [1, 1] for value in part.values())


def test_an_axis_other_than_the_first_maps_an_array_beside_a_tree():
    tree, x = StateTree({"q": State(jnp.ones(2))}), jnp.arange(6.0).reshape(2, 3)
    got = vmap(lambda state, x: x.sum() * state["q"].sum(), in_axes=1)(tree, x)
    assert got.tolist() == [6, 10, 14]


@pytest.mark.parametrize("form", ["pure", "vmapped"])
def test_arrays_in_a_container_in_the_place_of_a_state_in_a_list_are_refused(form):
    class Cell(Module):
        def __init__(self):
            self.hs = [State(jnp.zeros(2))]

        def update(self):
            self.hs[0] = (jnp.ones(2), {"c": jnp.ones(2)})

    call = {"pure": lambda: apply(Cell(), snapshot(Cell())),
            "vmapped": lambda: vmap_call_all_fns(Cell(), "update", axis_size=2)}[form]  # fmt: skip
    with pytest.raises(TypeError, match=r"' put arrays in the place of 'hs.0' \(State\)"):
        call()


def test_tags_of_named_tuples_keep_their_types():
    pair = collections.namedtuple("pair", "a b")
    for tag in (pair(1, 2), pair(True, 2), pair(1.0, 2)):
        tree = StateTree({"a": State(1.0, tag=tag)})
        assert repr(tree.states()["a",].tag) == repr(tag)


def test_a_parameter_key_that_takes_no_keyword_gets_no_key():
    class Odd(Module):
        def go(self, key=None, /):
            return jnp.array(key is None)

        def gather(self, *key):
            return jnp.array(len(key))

    assert call_all(Odd(), StateTree({}), "go", key=KEY)[0][()]
    assert call_all(Odd(), StateTree({}), "gather", 1, key=KEY)[0][()] == 1


def test_a_key_by_position_beside_another_is_refused_before_anything_runs():
    log = []

    class First(Module):
        def go(self, x):
            log.append(x)

    class Second(Module):
        def go(self, key):
            log.append(key)

    with pytest.raises(TypeError, match=r"'1' \(Second\) gets one key for 'go' by position"):
        call_all_fns([First(), Second()], "go", (3,), key=KEY)
    assert log == []


def test_a_required_key_that_takes_no_keyword_is_the_methods_own_matter():
    class Odd(Module):
        def go(self, key, /):
            return key

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'key'"):
        call_all(Odd(), StateTree({}), "go")


def test_the_names_of_a_metaclass_are_no_methods_of_its_instances():
    class Plain(Module, abc.ABC):
        pass

    assert call_all(Plain(), StateTree({}), "register", fn_if_not_exist="pass")[0] == {}
    with pytest.raises(AttributeError, match=r"\(Plain\) does not have method 'mro'"):
        call_all(Plain(), StateTree({}), "mro")


def test_a_state_that_is_a_pytree_may_be_replaced_by_another():
    class Tree(State):
        pass

    jax.tree_util.register_pytree_node(
        Tree, lambda box: ((box.value,), None), lambda _, values: Tree(*values))
    model = Module()
    model.h = Tree(jnp.ones(2))
    model.h = Tree(jnp.zeros(2))
    assert model.h.value.tolist() == [0, 0]


def test_a_method_that_changes_the_class_of_its_module_is_undone():
    class Other(Module):
        pass

    class One(Module):
        def go(self):
            self.__class__ = Other
            raise RuntimeError

    one = One()
    with pytest.raises(RuntimeError):
        call_all_fns(one, "go")
    assert type(one) is One


def test_a_state_with_an_attribute_of_its_own_and_one_without_a_value_are_put_back():
    class Own(State):
        extra = 0

    class Filler(Module):
        def go(self):
            self.a.extra, self.b.value = 2, jnp.ones(2)
            if self.fails:
                raise RuntimeError

    model = Filler()
    model.a, model.b, model.fails = Own(jnp.ones(2)), object.__new__(State), True
    model.b.tag, model.b.mapped = None, 0
    with pytest.raises(RuntimeError):
        call_all_fns(model, "go")
    assert model.a.extra == 0 and "value" not in vars(model.b)
    model.fails = False
    assert call_all_fns(model, "go").b.value.tolist() == [1, 1]


# ---- The life cycle of the documented API --------------------------------------------------------


class EncoderDecoder(Module):
    """Passes the calls on to its children, which the collective call reaches as well."""

    def __init__(self, log):
        self.encoder, self.decoder, self.log = VanillaRNN(4, 3), VanillaRNN(3, 4), log

    @call_order(0)
    def init_state(self):
        self.encoder.init_state()
        self.decoder.init_state()
        self.log("init")

    @call_order(1)
    def reset_state(self):
        self.decoder.reset_state()
        self.log("reset")


def test_a_decorated_parent_forwards_after_its_children_were_called():
    log = []
    model = init_all_states(EncoderDecoder(log.append))
    reset_all_states(model)
    assert log == ["init", "reset"]
    assert model.encoder.h.value.shape == (3,) and model.decoder.h.value.shape == (4,)


def test_init_takes_arguments_and_exclusions_and_returns_the_target():
    model = Sequential(Linear(10, 4), Gelu(), Dropout(0.1))
    assert init_all_states(model, batch_size=4) is model
    del model.layers[2].key
    assert init_all_states(model, node_to_exclude=Dropout) is model
    assert not hasattr(model.layers[2], "key")
    assert init_all_states([model, {"rnn": VanillaRNN(2, 2)}], batch_size=3)[1]["rnn"].h.value.shape == (3, 2)


def test_a_recurrent_network_is_initialised_run_and_reset():
    rnn = init_all_states(VanillaRNN(num_in=8, num_out=16), batch_size=2)
    output = rnn(jnp.ones((2, 8)))
    assert output.shape == (2, 16) and float(jnp.abs(output).sum()) > 0
    reset_all_states(rnn, batch_size=2)
    assert rnn.h.value.shape == (2, 16) and not rnn.h.value.any()


def test_an_ensemble_shares_what_init_created_and_batches_what_init_state_creates():
    policy = Sequential(Linear(4, 6), Gelu(), GRU(6, 2))
    vmap_init_all_states(policy, axis_size=8, key=KEY)
    assert policy.layers[0].weight.value["weight"].shape == (4, 6)
    assert policy.layers[2].weights.value["z"].shape == (8, 8, 2) and policy.layers[2].h.mapped == 1
    vmap_reset_all_states(policy, axis_size=8)
    assert policy.layers[2].h.value.shape == (8, 2)
    vmap_reset_all_states(policy)
    assert policy.layers[2].h.value.shape == (8, 2)
    with pytest.raises(ValueError, match="axis_size 4 is at odds"):
        vmap_init_all_states(policy, axis_size=4, key=KEY)
    vmap_init_all_states(init_all_states(policy, key=KEY), axis_size=4, key=KEY)
    assert policy.layers[2].h.value.shape == (4, 2)


def test_any_method_can_be_called_on_all_nodes():
    class Logging(Module):
        def __init__(self, size):
            self.linear, self.logged = Linear(size, size), []

        def log_stats(self, scale=1.0):
            self.logged.append(scale * jnp.mean(self.linear.weight.value["weight"]))

    net = Sequential(Logging(8), Logging(8))
    call_all_fns(net, "log_stats", (2.0,), None, None, "pass")
    expected = 2 * np.mean(Linear(8, 8).weight.value["weight"])
    assert [len(layer.logged) for layer in net.layers] == [1, 1]
    assert np.allclose(net.layers[0].logged[0], expected)
    vmap_call_all_fns(net, "log_stats", (), None, 3, None, None, "pass")
    assert [len(layer.logged) for layer in net.layers] == [1, 1]  # only states cross a vmapped call


def test_the_documented_snapshot_loop_restores_everything():
    rnn = vmap_init_all_states(VanillaRNN(num_in=4, num_out=8), axis_size=4)
    saved = {}
    for path, state in rnn.states().items():
        if isinstance(state.value, dict):
            for key, value in state.value.items():
                saved[path + (key,)] = value
        else:
            saved[path] = state.value
    before = snapshot(rnn)
    for x in noise(3, 4, 4):
        _, after = vmap_apply(rnn, snapshot(rnn), x)
        restore(rnn, jax.tree.map(lambda leaf: leaf + 1, after))
    vmap_reset_all_states(rnn, axis_size=4)
    assert not same(snapshot(rnn), before)
    assert assign_state_values(rnn, saved) == ([], [])
    assert same(snapshot(rnn), before)


# ---- The project ---------------------------------------------------------------------------------


def test_the_versions_are_stated_alike_everywhere():
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    python, floor = re.search(r"Needs Python (>= ?[\d.]+) and jax (>= ?[\d.]+)", SOURCE).groups()
    assert project["requires-python"] == python.replace(" ", "")
    assert project["dependencies"] == ["jax" + floor.replace(" ", "")]
    tested = re.search(r"tested with jax ([\d., and]+)\.", SOURCE)[1]
    assert f"tested with jax {tested}" in (HERE / "README.md").read_text()
    assert floor[3:].strip() == re.split(", | and ", tested)[0]
    assert f"jax=={floor[3:].strip()}" in (HERE / ".ci" / "run").read_text()


def test_the_file_works_alone_in_an_empty_folder(elsewhere):
    text = elsewhere("alone")
    shown = [line for line in text.splitlines() if line.startswith(">>> ")]
    for word in ("vmap_init(", "vmap_apply(", "scan(", "where(", "assign("):
        assert word in text, word
    assert len(shown) > 9
    assert "do not fit" in text and jax.__version__ in text
    assert not re.search(r"(?<!\w)_[a-z]\w*", text)


def test_only_public_jax_and_the_standard_library_are_used():
    assert not re.search(r"jax\._src|jax\.core|jaxlib|jax\.interpreters|\b_[a-z]+\._[a-z]", SOURCE)
    modules = re.findall(r"^(?:import|from) (\w+)", SOURCE, re.MULTILINE)
    assert set(modules) - set(sys.stdlib_module_names) == {"jax", "numpy"}


def test_everything_public_is_listed_documented_and_shown():
    for name in collective.__all__:
        thing = getattr(collective, name)
        if callable(thing) and name != "Path":
            assert thing.__doc__, name
            assert isinstance(thing, type) or ">>>" in thing.__doc__, name
    public = {name for name, thing in vars(collective).items()
              if getattr(thing, "__module__", "") == "collective" and not name.startswith("_")}  # fmt: skip
    assert public - {"T", "Assigned"} <= set(collective.__all__)


# ---- The costs: python -m pytest -m bench -s -----------------------------------------------------


class Cheap(Module):
    def __init__(self, value):
        self.state = State(value)

    def nothing(self):
        pass

    def reset_state(self):
        self.state.value = jnp.zeros(8)


def medians(*calls, rounds=15, repeat=1):
    """The median seconds of each call, timed in turns, so that a noisy moment hits all."""
    for call in calls:
        call()
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds.append((time.perf_counter() - start) / repeat)
    return [statistics.median(seconds) for seconds in times]


def siblings(number):
    value = jnp.zeros(8)
    return [Cheap(value) for _ in range(number)]


class Fading(Module):
    """One state that decays towards what comes in."""

    def __init__(self, value):
        self.state = State(value)

    def reset_state(self):
        self.state.value = jnp.zeros(8)

    def update(self, x):
        self.state.value = self.state.value * 0.9 + x


class Group(Module):
    def __init__(self, cells):
        self.cells = cells

    def update(self, x):
        for cell in self.cells:
            cell.update(x)


@pytest.mark.bench
def test_bench_prints_the_costs_as_ratios_to_their_limits(tmp_path):
    jax.config.update("jax_disable_most_optimizations", False)
    rows = []

    def row(what, measured, limit, unit):
        rows.append((what, f"{measured:.2f} {unit}", f"{limit:.2f} {unit}", f"{measured / limit:.2f}"))

    def compare(what, ours, bare, limit, **options):
        ours, bare = medians(ours, bare, **options)
        row(what, ours / bare, limit, "x")

    def ready(call, *args):
        return lambda: jax.block_until_ready(call(*args))

    model = siblings(1000)
    tree = snapshot(model)
    leaves = tuple(jax.tree.leaves(tree))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))
    compare("jitted step on a StateTree / on a tuple", ready(step, tree), ready(step, leaves), 1.05, rounds=51)
    for number in (1, 10):
        few = snapshot(siblings(number))
        ours, bare = medians(ready(step, few), ready(step, tuple(jax.tree.leaves(few))), rounds=51, repeat=100)
        row(f"jitted step, {number} states, more than on a tuple", (ours - bare) * 1e6, 1, "us")
    jitted = jax.jit(lambda state: reset(model, state))
    plain = jax.jit(lambda state: tuple(jnp.zeros(8) for _ in state))
    compare("jitted reset / the same arrays in a tuple", ready(jitted, tree), ready(plain, leaves), 1.05, rounds=51)

    def lowered(function, *args):
        return lambda: jax.jit(lambda *args: function(*args)).lower(*args)  # a new function each time

    def bare_step(values, x):
        return tuple(value * 0.9 + x for value in values)

    twice = [Fading(leaf) for leaf in leaves]
    state, x = snapshot(twice), jnp.ones(8)
    ensemble, many = stack(state, state), tuple(jnp.stack([leaf, leaf]) for leaf in leaves)
    step_all = Group(twice)
    state, ensemble = snapshot(step_all), stack(*[snapshot(step_all)] * 2)
    gc.collect()
    gc.freeze()  # or collections of what was made before fall to one side or the other
    compare("trace and lower apply / on a tuple", lowered(lambda s, x: apply(step_all, s, x), state, x),
            lowered(bare_step, leaves, x), 1.2, rounds=9)
    compare("trace and lower reset / on a tuple", lowered(lambda s: reset(step_all, s), state),
            lowered(lambda values: tuple(jnp.zeros(8) for _ in values), leaves), 1.2, rounds=9)
    compare("trace and lower vmap_apply / jax.vmap",
            lowered(lambda s, x: vmap_apply(step_all, s, x, in_axes=None), ensemble, x),
            lowered(jax.vmap(bare_step, in_axes=(0, None)), many, x), 1.2, rounds=9)
    gc.unfreeze()
    for number in (100, 1000, 10_000, 100_000):
        nodes = siblings(number)
        ours, bare = medians(lambda: call_all_fns(nodes, "nothing"), lambda: [node.nothing() for node in nodes],
                             rounds=max(11, min(51, 50_000 // number)))  # fmt: skip
        row(f"call_all_fns, {number:,} modules, each", (ours - bare) / number * 1e6, 2.5, "us")
    ours, bare = medians(lambda: call_all(model, tree, "nothing"), lambda: [node.nothing() for node in model],
                         rounds=51)  # fmt: skip
    row("snapshot, copy and fill, each of 1,000 modules", (ours - bare) / 1000 * 1e6, 8, "us")
    shapes = iter(range(1, 100_000))

    def fresh_arrays():
        return {f"{i}.state": np.ones((next(shapes), 3), np.float64) for i in range(50)}

    def first_assign():
        arrays = fresh_arrays()
        into = StateTree({name: State(jax.device_put(array.astype(np.float32))) for name, array in arrays.items()})
        start = time.perf_counter()
        jax.block_until_ready(assign(into, arrays).state)
        middle = time.perf_counter()
        jax.block_until_ready(jax.device_put([array.astype(np.float32) for array in arrays.values()]))
        return (middle - start) / (time.perf_counter() - middle)

    row("first assign of 50 new shapes / one device_put", statistics.median(first_assign() for _ in range(7)), 3, "x")
    flat = flat_dict(tree)
    seconds = medians(lambda: assign(tree, tree), lambda: assign(tree, flat),
                      lambda: partition(tree, State), lambda: flat_dict(tree))  # fmt: skip
    for what, each, limit in zip(("assign of a tree", "assign of JAX arrays", "partition", "flat_dict"), seconds,
                                 (8, 8, 1.5, 1.5)):  # fmt: skip
        row(f"{what}, each of 1,000 states", each / 1000 * 1e6, limit, "us")
    other, mask = jax.tree.map(lambda leaf: leaf + 1, tree), jnp.arange(8) < 4
    compare("eager where / one jnp.where for each leaf", ready(where, mask, other, tree),
            ready(lambda: [jnp.where(mask, a, b) for a, b in zip(jax.tree.leaves(other), leaves)]), 2, rounds=5)
    code = ("import time, jax; start = time.perf_counter(); import collective; "
            "print(time.perf_counter() - start)")
    cached = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    cached["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # as installed: compiled once, by the first run
    runs = [float(subprocess.run([sys.executable, "-c", code], cwd=HERE, env=cached, text=True,
                                 capture_output=True, check=True).stdout) for _ in range(6)][1:]  # fmt: skip
    row("import collective after import jax", statistics.median(runs) * 1e3, 15, "ms")
    print(f"\njax {jax.__version__} on {jax.devices()[0].platform}")
    for what, measured, limit, ratio in [("cost", "measured", "limit", "ratio"), *rows]:
        print(f"{what:<52}{measured:>12}{limit:>12}{ratio:>8}")
    assert len(rows) == 19
