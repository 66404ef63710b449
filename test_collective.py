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

import collections
import copy
import dataclasses
import gc
import io
import pickle
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

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
    traverse,
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


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Two other processes, which run beside the suite until the tests ask for their output."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "collective.py").write_text(SOURCE)
    codes = {
        "alone": "import collective, doctest, runpy; failed, attempted = doctest.testmod(collective);"
        "assert attempted > 50 and not failed; runpy.run_path('collective.py', {}, '__main__')",
        "keys": "import jax, collective as c\n"
        "class Noise(c.Module):\n"
        "    def draw(self, key): return jax.random.key_data(key).tolist()\n"
        "print(c.call_all({'a': [Noise()]}, c.StateTree({}), 'draw', key=jax.random.key(0))[0]['a', 0])",
    }
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
        self.weight = ParamState({"weight": weight, "bias": jnp.zeros(num_out)})

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
        "    first.weight: ParamState(bias float32[3], weight float32[3,3])",
        "  tied: Linear",
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
    with pytest.raises(TypeError, match=r"Slotted has __slots__ \['state'\]"):
        @dataclasses.dataclass(slots=True)
        class Slotted(Module):
            state: State

    class Narrow:
        __slots__ = ("state",)

    with pytest.raises(TypeError, match=r"Mixed has __slots__ \['state'\]"):
        class Mixed(Module, Narrow):
            pass

    class Base:
        __slots__ = ("__dict__", "__weakref__")

    class Fine(Module, Base):
        __slots__ = ()


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


def test_keys_of_any_kind_have_a_place_in_the_order():
    model = Module()
    model.table = {None: State(1), (1, 2): State(2), "s": State(3), 4: State(4), 2.5: State(5)}
    model.sets = {frozenset("a"): State(6), frozenset("b"): State(7)}
    first = snapshot(model)
    model.table, model.sets = ({key: part[key] for key in reversed(part)} for part in (model.table, model.sets))
    assert jax.tree.structure(first) == jax.tree.structure(snapshot(model))
    assert [path[1] for path in first if path[0] == "table"][:2] == [4, "s"]


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
    with pytest.raises(KeyError, match=r"no state 'layers.0.wieght'; the closest.*layers.0.weight"):
        tree["layers.0.wieght"]
    with pytest.raises(KeyError, match="layers.0.weight"):
        tree["layers", 0, "weigth"]
    assert tree.get("nothing") is None


def test_a_dotted_name_that_two_paths_share_is_refused():
    tree = StateTree({("a", "b"): State(1), ("a.b",): State(2)})
    with pytest.raises(KeyError, match=r"\('a', 'b'\).*\('a.b',\)"):
        tree["a.b"]
    assert "a.b" not in tree and int(tree["a", "b"]) == 1 and int(tree["a.b",]) == 2


@pytest.mark.parametrize("bad", [{3: State(1)}, {"a": 1}, {("a",): jnp.ones(2)}, {(): State(1)}])
def test_a_tree_is_made_of_paths_and_boxes(bad):
    with pytest.raises(TypeError, match="expected a tuple path, or a dotted name, and a State"):
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
    with pytest.raises(TypeError, match="unsupported operand"):
        union | {"a": State(1)}


def test_the_repr_of_a_tree_is_a_table_without_contents():
    tree = stack(*[snapshot(Sequential(Linear(2, 3)))] * 2) | StateTree({"k": State(KEY)})
    assert repr(tree).splitlines() == [
        "path             kind        value                                     mapped",
        "k                State       key<fry>[]                                0",
        "layers.0.weight  ParamState  bias float32[2,3], weight float32[2,2,3]  1",
    ]
    assert repr(StateTree({})) == "path  kind  value  mapped"


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
    with pytest.raises(ValueError, match="spell the path"):
        StateTree({"a.b": State(1), ("a", "b"): State(2)})
    assert list(StateTree({"a.01": State(1), "a.1": State(2)})) == [("a", 1), ("a", "01")]


def test_flat_dict_names_every_leaf():
    tree = snapshot(Sequential(Linear(2, 3), Linear(3, 1)))
    assert {name: leaf.shape for name, leaf in flat_dict(tree).items()} == {
        "layers.0.weight.bias": (3,), "layers.0.weight.weight": (2, 3),
        "layers.1.weight.bias": (1,), "layers.1.weight.weight": (3, 1)}  # fmt: skip
    with pytest.raises(ValueError, match=r"one dotted name.*\('a', 'b'\).*\('a.b',\)"):
        flat_dict(StateTree({"a": State({"b": 1}), ("a.b",): State(2)}))
    twice = StateTree({"a": State({"b": 1.0}), "a.b": State(2.0)})  # one leaf path, as | can make it
    with pytest.raises(ValueError, match="one dotted name"):
        flat_dict(twice)
    with pytest.raises(ValueError, match="'a.b' names several leaves"):
        assign(twice, {"a.b": 3.0})
    assert same(assign(twice, {}).state, twice)


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
            self.filled, self.pair, self.swapped, self.tuple = [1, 2], (None, None), [], (Relu(),)

        def init_state(self):
            self.list = [State(1), [State(2), State(3)]]
            self.dict = {"a": {5: State(4), 6: State(5)}, 0: State(6)}
            self.filled.append(State(7))
            self.pair = (State(8), State(9))
            self.swapped = {"k": State(10)}
            self.mixed = [0, State(11)]
            self.numbered = {0: State(1), 1: State(2)}
            self.tuple[0].state = State(12)

        def update(self):
            names = [self.list[0], self.list[1][1], self.dict["a"][6], self.dict[0], self.filled[2],
                     self.pair[1], self.swapped["k"], self.mixed[1], self.tuple[0].state]  # fmt: skip
            kinds = type(self.tuple), type(self.dict), type(self.numbered)
            return [state.value for state in names], [len(self.list), len(self.list[1]), *kinds]

    tree = init(Maker())
    values, shapes = apply(Maker(), tree)[0]
    assert [int(value) for value in values] == [1, 3, 5, 6, 7, 9, 10, 11, 12]
    assert shapes == [2, 2, tuple, dict, list]
    assert same(snapshot(restore(Maker(), tree)), tree)
    assert same(reset(Maker(), tree), tree)


def test_new_containers_take_the_place_of_empty_ones_but_of_nothing_else():
    class Maker(Module):
        def __init__(self):
            self.deep, self.gone = ((None, None), ((),)), ()
            self.pair, self.full = (3, None), ((Relu(), None), State(5))

        def init_state(self):
            self.deep = ((State(1), None), ((State(2),),))
            self.gone, self.pair = {"k": State(3)}, (3, State(4))
            self.full[0][0].state = State(6)
            self.full = ((self.full[0][0], State(7)), self.full[1], State(8))

        def update(self):
            (relu, seven), five, eight = self.full
            return (self.deep[0][0].value, self.deep[1][0][0].value, self.gone["k"].value,
                    self.pair[1].value + self.pair[0], five.value, relu.state.value, seven.value,
                    eight.value)

    assert [int(value) for value in apply(Maker(), init(Maker()))[0]] == [1, 2, 3, 7, 5, 6, 7, 8]
    vmap_init_all_states(Maker(), axis_size=2)
    model = Sequential(Relu(), Gelu())
    before = frozen(model)
    with pytest.raises(ValueError, match="no place for the state 'layers.x.h'.* list at 'layers'"):
        restore(model, StateTree({"first": State(1), "layers.0.h": State(1), "layers.x.h": State(1)}))
    assert frozen(model) == before
    for target, name in (((Relu(),), "1.h"), ([Relu()], "x"), ([Relu()], "0"),
                         ([Linear(2, 2)], "0.weight.bias"), ([Relu()], "2.h")):
        with pytest.raises(ValueError, match="no place for"):
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


def test_a_module_mixes_into_a_builtin_class_too():
    class Table(Module, dict):
        def init_state(self):
            self.h = State(jnp.zeros(2))

    class Failure(Module, Exception):
        pass

    class Pair(Module, tuple):
        def init_state(self):
            self.h = {"k": State(jnp.zeros(2))}

        def update(self):
            self.h["k"].value += 1

    model = {"pair": Pair((1, 2))}
    tree = init(model)
    assert same(snapshot(restore(model, tree)), tree) and isinstance(model["pair"], Pair)
    _, after = call_all(model, tree, "update")
    assert after["pair.h.k"].tolist() == [1, 1] and model["pair"].h["k"].value.tolist() == [0, 0]
    model = Table(a=1)
    model.failure = Failure("x")
    model.failure.state = State(jnp.ones(2))
    tree = vmap_init(model, axis_size=2)
    assert {path: value.shape for path, value in tree.items()} == {("failure", "state"): (2,), ("h",): (2, 2)}
    assert apply(model, tree, "a", method="__getitem__")[0] == 1


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
        with pytest.raises(TypeError, match="call_order takes an int"):
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
    with pytest.raises(AttributeError, match=r"'measure'.*'1' \(Relu\), '2' \(Sequential\), '2.layers.0'"):
        call("measure")
    with pytest.raises(TypeError, match=r"'measure' is an attribute, but no method, of '1' \(Odd\)"):
        families([sensor, Odd()])[form]("measure", fn_if_not_exist="pass")
    with pytest.raises(ValueError, match="fn_if_not_exist is .*; got 'ignore'"):
        call("measure", fn_if_not_exist="ignore")
    with pytest.raises(TypeError, match="the name of a method"):
        call(len)
    with pytest.raises(TypeError, match="mapping of keyword arguments"):
        call("measure", (), [1])
    assert log == []
    with pytest.warns(UserWarning, match=r"'measure' is no method of '1' \(Relu\)"):
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
        self.state = State({"list": [jnp.zeros(2)], "array": np.zeros(2)})
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
    array = model.own.value.v
    with pytest.raises(RuntimeError, match="half way"):
        call_all_fns(model, "wreck")
    assert model.own.value.v is array and array.tolist() == [1, 1] and not hasattr(model.own.value, "new")
    assert model.own.value.meta is model.own.value and model.frozen.value.tolist() == [1, 1]


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
    with pytest.raises(TypeError, match=r"'init_state' requires a key on 'b.0' \(GRU\), 'c' \(GRU\); pass key=jax.random.key\(0\)"):
        init({"a": Relu(), "b": [GRU(2, 2)], "c": GRU(2, 2)})
    with pytest.raises(TypeError, match="requires a key on the root"):
        apply(Noise(), StateTree({}), method="draw")


def test_a_key_in_kwargs_is_an_ordinary_argument():
    model = [Noise(), Noise()]
    outputs, _ = call_all(model, StateTree({}), "draw", kwargs={"key": KEY})
    assert same(outputs[0,], outputs[1,]) and same(outputs[0,], jax.random.uniform(KEY, (2,)))
    assert same(call_all(model, StateTree({}), "draw", KEY)[0], outputs)
    with pytest.raises(TypeError, match="a key came both as key="):
        call_all(model, StateTree({}), "draw", kwargs={"key": KEY}, key=KEY)


def test_one_method_does_not_get_two_keys():
    with pytest.raises(TypeError, match="'draw' gets one key by position and another by key= on the root"):
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


def test_a_created_state_crosses_once_and_its_second_names_are_dropped():
    class Twice(Module):
        def init_state(self):
            self.first = self.second = HiddenState(jnp.ones(2))

        def names(self):
            return sorted(vars(self))

    tree = init(Twice())
    assert list(tree) == [("first",)]
    assert apply(Twice(), tree, method="names")[0] == ["first"]
    assert sorted(vars(init_all_states(Twice()))) == ["first", "second"]  # in place, both stay


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
        with pytest.raises(AttributeError, match=r"'__call__' is no method of the root \(list\)"):
            call([Two()], StateTree({}), 2)
        with pytest.raises(AttributeError, match="'missing' is no method of the root"):
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


# ---- Vmapped calls -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vanilla", "gru", "stack", "lif", "shared"])
def test_every_member_equals_a_single_model_with_its_key(name):
    model, keys = MODELS[name](), jax.random.split(KEY, 3)
    before = frozen(model)
    tree = vmap_init(model, axis_size=3, key=KEY)
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
    tree = vmap_init(model, axis_size=2, key=KEY)
    singles = [init(model, key=key) for key in keys]
    assert all(same(member(tree, i), singles[i]) for i in range(2))
    again = vmap_reset(model, tree, axis_size=2, key=jax.random.key(1))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert not fresh(tree) or not same(again, tree)
    vmap_init_all_states(real, axis_size=2, key=KEY)
    assert same(snapshot(real), tree)
    vmap_reset_all_states(real, axis_size=2, key=jax.random.key(1))
    assert same(snapshot(real), again)


def fresh(tree):
    return [path for path, box in tree.states().items() if box.mapped]


@every_model
def test_vmapped_calls_in_place_equal_pure_ones(model):
    real, tree = copy.deepcopy(model), vmap_init(model, axis_size=3, key=KEY)
    assert vmap_init_all_states(real, axis_size=3, key=KEY) is real
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


def test_excluded_states_are_shared_whatever_they_were():
    class Seer(Module):
        def init_state(self):
            self.h = HiddenState(jnp.zeros(2))

        def look(self):
            return jnp.full((), self.h.value.ndim)

    tree = vmap_init(Seer(), axis_size=3)
    assert vmap_call_all(Seer(), tree, "look")[0][()].tolist() == [1, 1, 1]
    outputs, after = vmap_call_all(Seer(), tree, "look", axis_size=5, state_to_exclude=[HiddenState])
    assert outputs[()].tolist() == [2] * 5 and same(after, tree)


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


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])])
def test_a_shared_state_that_would_differ_per_member_is_refused(wrap):
    model = {"stats": Statistics()}
    before = frozen(model)

    def call(x):
        return vmap_call_all(model, snapshot(model), "observe", x, axis_size=3, in_axes=0)[1]["stats.mean"]

    with pytest.raises(ValueError, match=(
            r"different per member: 'stats.mean' \(LongTermState\); create them in init_state.*"
            "or make their values the same")):  # fmt: skip
        wrap(call)(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="'stats.mean'"):
        vmap_call_all_fns(model, "observe", jnp.ones((3, 2)), axis_size=3, in_axes=0)
    assert frozen(model) == before


def test_an_outer_vmap_does_not_make_a_shared_state_differ():
    model = Statistics()

    def call(x):
        return vmap_call_all(model, snapshot(model), "observe", x, axis_size=3)[1]["mean"]

    assert jax.vmap(call)(jnp.arange(4.0).reshape(2, 2)).tolist() == [[0, 1], [2, 3]]


def test_a_plain_call_that_loses_the_mapped_axis_is_refused():
    model = Sequential(VanillaRNN(2, 3))
    tree = vmap_init(model, axis_size=4)
    with pytest.raises(ValueError, match=r"leading axes of 'layers.0.h' \(HiddenState\).*with vmap_reset or"):
        reset(model, tree)
    vmap_init_all_states(model, axis_size=4)
    before = frozen(model)
    with pytest.raises(ValueError, match=r"'layers.0.h'.*vmap_reset_all_states"):
        reset_all_states(model)
    with pytest.raises(ValueError, match=r"'crush'.*'model.layers.0.h'.*vmap_apply or vmap_call_all"):
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


def test_sizes_that_do_not_agree_are_refused():
    model = VanillaRNN(2, 3)
    tree = vmap_init(model, axis_size=4)
    for size in (0, -1, 2.0, "3", True, None, jnp.float32(2)):
        with pytest.raises(ValueError, match="axis_size"):
            vmap_init(model, axis_size=size)
    with pytest.raises(ValueError, match=r"axis_size 5 is at odds with the mapped axis of 'h' \(4,\)"):
        vmap_reset(model, tree, axis_size=5)
    odd = tree | stack(*[StateTree({"k": State(1)})] * 3)
    with pytest.raises(ValueError, match=r"'k' \(3,\)"):
        vmap_reset(model, odd)
    assert same(member(snapshot(model), 0), snapshot(model))
    assert vmap_init(model, axis_size=np.int64(2))["h"].shape == (2, 3)


def test_arguments_are_mapped_as_in_vmap():
    class Scale(Module):
        def init_state(self, factor, offset):
            self.factor, self.offset = ParamState(factor), ParamState(offset["x"])

        def update(self, x, y, *, power=1):
            return (self.factor.value * x + y) ** power

    sweep = jnp.array([1.0, 2.0, 3.0])
    tree = vmap_init(Scale(), sweep, {"x": 5.0}, axis_size=3, in_axes=(0, None))
    assert tree["factor"].tolist() == [1, 2, 3] and tree["offset"].tolist() == [5, 5, 5]
    outputs, _ = vmap_apply(Scale(), tree, jnp.ones((2, 3)), 10.0, in_axes=(1, None), power=2)
    assert outputs.tolist() == [[121, 121], [144, 144], [169, 169]]
    assert vmap_apply(Scale(), tree, 2.0, 0.0, in_axes=None)[0].tolist() == [2, 4, 6]
    assert vmap_apply(Scale(), tree, sweep, sweep)[0].tolist() == [2, 6, 12]
    assert vmap_apply(Scale(), tree, sweep, 1.0, in_axes=[0, None])[0].tolist() == [2, 5, 10]
    with pytest.raises(ValueError, match="vmap"):
        vmap_apply(Scale(), tree, jnp.ones(2), jnp.ones(3))


def test_no_tracer_outlives_a_call():
    model = [VanillaRNN(3, 3), LIF(3)]
    model[0].peer, model[1].peer = model[1], model[0]
    with jax.checking_leaks():
        tree = vmap_reset(model, vmap_init(model, axis_size=2, key=KEY), key=KEY)
        jax.jit(lambda tree: vmap_reset(model, tree, key=KEY))(tree)
        vmap_init_all_states(model, axis_size=2, key=KEY)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(snapshot(model)))


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


def test_members_may_hold_states_without_leaves_and_return_themselves():
    class Empty(Module):
        def init_state(self):
            self.none, self.table = State(None), State({})
            return self

    tree = vmap_init(Empty(), axis_size=3)
    assert same(member(tree, 1), init(Empty()))
    assert vmap_init_all_states(Empty(), axis_size=3).none.mapped == 1


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
    for other in (tree_of(a=jnp.ones(3)), tree_of(a=jnp.ones(2, int)), tree_of(b=jnp.ones(2)),
                  StateTree({"a": HiddenState(jnp.ones(2))})):  # fmt: skip
        with pytest.raises(ValueError, match="only the values of the trees may differ.*'a'"):
            stack(tree_of(a=jnp.ones(2)), other)


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
    tree = init(model, key=KEY) if members is None else vmap_init(model, axis_size=members, key=KEY)
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
    assert result.unexpected == sorted(result.unexpected, key=collective._rank) == [
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


def test_leaves_that_share_a_dotted_name_are_told_apart_by_tuple_paths():
    tree = StateTree({("a", "b"): State(jnp.zeros(1)), ("a.b",): State(jnp.zeros(1))})
    with pytest.raises(ValueError, match=r"'a.b' names several leaves: .*\('a', 'b'\).*\('a.b',\)"):
        assign(tree, {"a.b": np.ones(1)})
    after, unexpected, missing = assign(tree, {("a", "b"): np.ones(1), ("a.b",): np.full(1, 2.0)})
    assert [float(after[path][0]) for path in tree] == [1, 2] and (unexpected, missing) == ([], [])


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


def test_assigning_in_place_touches_only_what_is_given():
    model = Module()
    model.kept, model.set = State(np.ones(2)), State({"x": jnp.zeros(2), "y": jnp.zeros(2)})
    kept, box = model.kept.value, model.set
    unexpected, missing = assign_state_values(model, {"set": {"x": np.ones(2)}, "z": 1.0})
    assert model.kept.value is kept and model.set is box
    assert model.set.value["x"].tolist() == [1, 1] and model.set.value["y"].tolist() == [0, 0]
    assert (unexpected, missing) == (["z"], [("kept",), ("set", "y")])


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
    for line in ("vmap_init: ", "rollout: ", "vmap_reset: ", "unexpected=[], missing=[]", "restore: "):
        assert line in text


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
    assert public - {"T"} <= set(collective.__all__)


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


@pytest.mark.bench
def test_bench_prints_the_costs_as_ratios_to_their_limits(tmp_path):
    jax.config.update("jax_disable_most_optimizations", False)
    rows = []

    def row(what, measured, limit, unit):
        rows.append((what, f"{measured:.2f} {unit}", f"{limit:.2f} {unit}", f"{measured / limit:.2f}"))

    model = siblings(1000)
    tree = snapshot(model)
    leaves = tuple(jax.tree.leaves(tree))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))
    ours, bare = medians(lambda: jax.block_until_ready(step(tree)),
                         lambda: jax.block_until_ready(step(leaves)), rounds=51)  # fmt: skip
    row("jitted step on a StateTree / on a tuple", ours / bare, 1.05, "x")
    jitted = jax.jit(lambda state: reset(model, state))
    plain = jax.jit(lambda state: tuple(jnp.zeros(8) for _ in state))
    ours, bare = medians(lambda: jax.block_until_ready(jitted(tree)),
                         lambda: jax.block_until_ready(plain(leaves)), rounds=51)  # fmt: skip
    row("jitted reset / the same arrays in a tuple", ours / bare, 1.05, "x")
    for number in (100, 1000, 10_000, 100_000):
        model = siblings(number)
        ours, bare = medians(lambda: call_all_fns(model, "nothing"),
                             lambda: [node.nothing() for node in model],
                             rounds=max(11, min(51, 50_000 // number)))  # fmt: skip
        row(f"call_all_fns, {number:,} modules, each", (ours - bare) / number * 1e6, 2.5, "us")
    model = siblings(1000)
    ours, bare = medians(lambda: call_all(model, tree, "nothing"),
                         lambda: [node.nothing() for node in model], rounds=51)  # fmt: skip
    row("snapshot, copy and fill, each of 1,000 modules", (ours - bare) / 1000 * 1e6, 8, "us")
    code = ("import time, jax; start = time.perf_counter(); import collective; "
            "print(time.perf_counter() - start)")
    cached = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    cached["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # as installed: compiled once, by the first run
    runs = [float(subprocess.run([sys.executable, "-c", code], cwd=HERE, env=cached, text=True,
                                 capture_output=True, check=True).stdout) for _ in range(6)][1:]  # fmt: skip
    row("import collective after import jax", statistics.median(runs) * 1e3, 15, "ms")
    print(f"\njax {jax.__version__} on {jax.devices()[0].platform}")
    for what, measured, limit, ratio in [("cost", "measured", "limit", "ratio"), *rows]:
        print(f"{what:<48}{measured:>12}{limit:>12}{ratio:>8}")
    assert len(rows) == 8
