"""The policy and its file: what a good one does, and that no bad one gets in."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import BadArtifact, BadInput, RunFailed
from envs.knobs import Actions, decode
from envs.observe import FEATURES, SIZE
from tuner import artifact
from tuner.policy import DEFAULT, from_bytes, load, make, save, to_bytes
from tuner.policy import PLACES as FEATURE_PLACES

EDGES = (-0.7, 0.1, 0.7)
NAMES = [feature.name for feature in FEATURES]
ALGORITHMS = ("ppo", "continuous ppo", "dqn", "q-learning", "sarsa")


def mlp(layers, scale=1.0):
    """Random arrays for a network of those layers."""
    rng, arrays = np.random.default_rng(0), {}
    for i, (inward, outward) in enumerate(pairwise(layers)):
        arrays[f"layer{i}.weight"] = rng.normal(0, scale, (outward, inward)).astype(np.float32)
        arrays[f"layer{i}.bias"] = rng.normal(0, scale, outward).astype(np.float32)
    return arrays


def plain(name="dqn", **changes):
    """The fields and arrays of a small policy; ``name`` is one of `ALGORITHMS`."""
    actions = Actions(view="continuous" if "continuous" in name else "discrete")
    if name in ("q-learning", "sarsa"):
        bins = [{"feature": key, "edges": list(EDGES)} for key in ("rate_vs_start", "age")]
        network = {"kind": "table", "bins": bins}
        table = np.random.default_rng(0).normal(size=(4, 4, actions.size))
        arrays = {"table": table.astype(np.float32)}
    else:
        layers = [SIZE, 6, 5, actions.size]
        activation = "relu" if name == "dqn" else "tanh"
        network = {"kind": "mlp", "layers": layers, "activation": activation}
        arrays = mlp(layers)
    numbers = {"mean": 0.25, "deviation": 0.5, "low": -1.0, "high": 2.0}
    fields = {
        "algorithm": name.split()[-1],
        "features": [feature._asdict() | numbers for feature in FEATURES],
        "network": network,
        "actions": actions,
        "decisions": 10,
        "start_decades": 1.5,
        "provenance": {"tasks": ["sst2", "nähe"], "seed": 7, "scores": {"a": [0.5, None]}},
        "arrays": arrays,
    }
    return fields | changes


def example(name="dqn", **changes):
    return make(**plain(name, **changes))


GOOD = to_bytes(example())
TABLE = to_bytes(example("sarsa"))


# The format, written down a second time: what an attacker who knows it can write.


def compact(value, **options):
    return json.dumps(value, separators=(",", ":"), **options)


def pack(header, body=b""):
    header = header.encode() if isinstance(header, str) else header
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def forge(manifest, entries, body, rewrite=lambda text: text):
    """A file whose hash is right, whatever it holds; ``rewrite`` changes the header's text."""

    def write(digest):
        text = compact(manifest | {"payload_sha256": digest}, sort_keys=True)
        return pack(rewrite(compact({"__metadata__": {"steersman": text}} | entries)), body)

    return write(hashlib.sha256(write("")).hexdigest())


def unpack(data=GOOD):
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return json.loads(entries.pop("__metadata__")["steersman"]), entries, data[8 + length :]


def forged(path, value, data=GOOD):
    """The file with one thing in its manifest replaced, and its hash made right again."""
    manifest, entries, body = unpack(data)
    inner = manifest
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return forge(manifest, entries, body)


def refused(data, field, source="some/policy.safetensors"):
    """``data`` is refused for ``field``: in one line, soon."""
    start = time.monotonic()
    with pytest.raises(BadArtifact) as caught:
        from_bytes(data, source)
    assert time.monotonic() - start < 2
    text = str(caught.value)
    assert text.startswith(f"{source}: {field}"), text
    assert text.isprintable()
    assert "; " in text
    assert len(text) < 700
    assert caught.value.exit_code == 2
    return text


def refused_file(path, problem, **options):
    """So is a file, and nothing is written."""
    folder = Path(path).parent if "tmp" in str(path) else None
    before = sorted(folder.iterdir()) if folder and folder.is_dir() else None
    start = time.monotonic()
    with pytest.raises(BadArtifact, match=problem) as caught:
        load(path, **options)
    assert time.monotonic() - start < 2
    assert str(caught.value).isprintable()
    assert "; " in str(caught.value)
    assert before is None or before == sorted(folder.iterdir())


# What a good policy does


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"tasks": ["trec6", "dpo"]}, {"classification", "dpo"}),
        (
            {"tasks": ["trec6"], "larger": [{"objective": "causal"}, {}]},
            {"classification", "causal"},
        ),
        ({"tasks": ["mine.csv"]}, {"classification"}),
        ({"tasks": 7}, set()),
        ("text", set()),
        (None, set()),
    ],
)
def test_a_policy_knows_what_it_was_trained_on(config, found):
    policy = example("ppo")
    manifest = policy.manifest.model_copy(update={"provenance": {"config": config}})
    assert replace(policy, manifest=manifest).objectives == found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_round_trip(name, tmp_path, capfd):
    policy = example(name)
    path = tmp_path / "policy.safetensors"
    digest = save(policy, path)
    again = load(path, sha256=digest.upper())
    assert policy.sha256 == ""
    assert again.sha256 == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert again.manifest == policy.manifest
    assert again.arrays.keys() == policy.arrays.keys()
    for key, array in again.arrays.items():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, policy.arrays[key])
    assert to_bytes(again) == to_bytes(policy) == path.read_bytes()
    assert load(str(path)).manifest.provenance["tasks"] == ["sst2", "nähe"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        observation = rng.uniform(-5, 5, SIZE).astype(np.float32)
        action = again.act(observation)
        np.testing.assert_array_equal(action, policy.act(observation))
        decode(action, again.manifest.actions)  # is in the space
        assert isinstance(action, int) == ("continuous" not in name)
        assert again.scores(observation).shape == (again.manifest.actions.size,)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_file_is_what_the_safetensors_library_writes_and_reads(name):
    policy = example(name)
    data = to_bytes(policy)
    found = safetensors.numpy.load(data)
    assert found.keys() == policy.arrays.keys()
    for key, array in found.items():
        np.testing.assert_array_equal(array, policy.arrays[key])
    text = compact(unpack(data)[0], sort_keys=True)
    assert safetensors.numpy.save(policy.arrays, {"steersman": text}) == data


def test_forge_writes_the_same_format():
    assert forge(*unpack()) == GOOD
    assert forge(*unpack(TABLE)) == TABLE


def test_what_the_format_holds():
    """Another field, here or in `Actions`, makes older files unreadable: it needs a new FORMAT."""
    manifest = unpack()[0]
    assert artifact.FORMAT == manifest["format"] == 1
    assert " ".join(sorted(manifest)) == (
        "actions algorithm decisions features format golden network observation "
        "payload_sha256 provenance start_decades"
    )
    assert " ".join(sorted(manifest["actions"])) == "multipliers optimizers rollback span view"


def test_same_policy_same_bytes_in_any_order():
    fields = plain()
    turned = {key: dict(reversed(fields[key].items())) for key in ("provenance", "arrays")}
    assert to_bytes(make(**fields | turned)) == GOOD


@pytest.mark.parametrize(("name", "activation"), [("dqn", lambda x: x.clip(0)), ("ppo", np.tanh)])
def test_scores_are_the_networks(name, activation):
    policy = example(name)
    observation = np.random.default_rng(1).uniform(-5, 5, SIZE).astype(np.float32)
    observation[FEATURE_PLACES["rows"]] = 1.5  # above 2 it would count as 2
    values = np.clip((observation.astype(float) - 0.25) / 0.5, -10, 10)
    np.testing.assert_allclose(policy.normalised(observation), values, rtol=1e-6)
    np.testing.assert_array_equal(policy.normalised(np.full(SIZE, -1e30)), np.full(SIZE, -10.0))
    for i in range(3):
        values = policy.arrays[f"layer{i}.weight"] @ values + policy.arrays[f"layer{i}.bias"]
        values = activation(values) if i < 2 else values
    np.testing.assert_allclose(policy.scores(observation), values, rtol=1e-4, atol=1e-4)
    assert policy.act(observation) == values.argmax()


@settings(max_examples=30)
@given(st.lists(st.sampled_from([*EDGES, -5.0, 0.0, 0.3, 5.0]), min_size=SIZE, max_size=SIZE))
def test_table_bins_raw_values_as_searchsorted_does(values):
    policy = from_bytes(TABLE, "table")
    observation = np.array(values, np.float32)
    places = [NAMES.index("rate_vs_start"), NAMES.index("age")]
    row = tuple(np.searchsorted(EDGES, observation[places], side="right"))
    np.testing.assert_array_equal(policy.scores(observation), policy.arrays["table"][row])


def test_first_of_ties():
    arrays = {key: 0 * value for key, value in plain()["arrays"].items()}
    assert example(arrays=arrays).act(np.ones(SIZE, np.float32)) == 0


def test_continuous_is_clipped():
    fields = plain("continuous ppo")
    fields["arrays"]["layer2.bias"] += np.array([100, -100], np.float32)
    action = make(**fields).act(np.zeros(SIZE))
    np.testing.assert_array_equal(action, np.array([1, -1], np.float32))
    assert action.dtype == np.float32


@pytest.mark.parametrize(
    "observation",
    [
        np.full(SIZE, np.nan),
        np.full(SIZE, np.inf, np.float32),
        np.full(SIZE, 1e300),
        np.zeros(SIZE - 1),
        np.zeros((1, SIZE)),
        np.float32(0),
        None,
        "observation",
        [[0.0]] * SIZE,
        [0.0, [1.0]],
    ],
)
@pytest.mark.parametrize("data", [GOOD, TABLE], ids=["mlp", "table"])
def test_observation_that_is_none(observation, data):
    with pytest.raises(BadInput, match=r"^observation: .*; "):
        from_bytes(data, "x").act(observation)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_far_observation_gives_a_valid_action(name):
    policy = example(name)
    for value in (3e38, -3e38, 1e-45):
        decode(policy.act(np.full(SIZE, value, np.float32)), policy.manifest.actions)
        assert np.isfinite(policy.scores(np.full(SIZE, value, np.float32))).all()


def test_outside_names_features_beyond_the_envelope_and_its_margin():
    policy = from_bytes(GOOD, "x")  # -1 to 2, so the margin is 0.35
    observation = np.full(SIZE, 2.34, np.float32)
    assert policy.outside(observation) == []
    observation[[0, 3, 29]] = 2.36, -1.36, np.nan
    assert policy.outside(observation) == ["progress", "rate_vs_reference", "rmsprop"]
    assert len(policy.outside(np.full(SIZE, np.inf))) == SIZE - 1  # of rows there may be more
    with pytest.raises(BadInput):
        policy.outside(np.zeros(3))


def test_more_rows_than_training_saw_count_as_the_most_it_saw():
    """A job of a million rows is steered like one of the largest known; a tiny one is not known."""
    default = load(DEFAULT)
    place = FEATURE_PLACES["rows"]
    top = default.manifest.features[place].high
    observation = np.array([each.mean for each in default.manifest.features], np.float32)
    observation[place] = top
    known = default.scores(observation)
    observation[place] = 3.0
    assert default.outside(observation) == []
    assert np.array_equal(default.scores(observation), known)
    observation[place] = -2.0
    assert default.outside(observation) == ["rows"]


@pytest.mark.slow  # a timed claim wants a quiet machine
def test_a_decision_takes_less_than_a_fifth_of_a_millisecond():
    layers = [SIZE, 64, 64, 8]
    network = {"kind": "mlp", "layers": layers, "activation": "tanh"}
    policy = example(network=network, arrays=mlp(layers))
    observation = np.full(SIZE, 0.5, np.float32)

    def batch():
        start = time.perf_counter()
        for _ in range(100):
            policy.act(observation)
        return (time.perf_counter() - start) / 100

    assert min(batch() for _ in range(10)) < 2e-4


def test_import_reaches_no_training_code():
    code = (
        "import sys, tuner.policy; "
        "print({'stable_baselines3', 'torch', 'mlflow', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Files that are no policy


def test_not_a_regular_file(tmp_path, capfd):
    good = tmp_path / "good.safetensors"
    good.write_bytes(GOOD)
    (tmp_path / "link").symlink_to(good)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    refused_file(tmp_path / "missing", "file: cannot be read: No such file")
    refused_file(tmp_path / "missing" / "policy", "file: cannot be read: No such file")
    refused_file(good / "policy", "file: cannot be read: Not a directory")
    refused_file(tmp_path, "file: cannot be read: Is a directory")
    refused_file(tmp_path / "link", "file: is a link")
    refused_file(tmp_path / "dangling", "file: is a link")
    refused_file(tmp_path / "loop", "file: is a link")
    refused_file(tmp_path / "fifo", "file: is a device, a pipe or a socket")
    refused_file(tmp_path / "socket", "file: cannot be read")
    refused_file("/dev/zero", "^/dev/zero: file: is a device")
    refused_file("/dev/null", "file: is a device")
    refused_file("", "^'': file: cannot be read")
    refused_file("nul\0", "file: cannot be read: embedded null")
    refused_file("n" * 600, "file: cannot be read: File name too long")
    refused_file("new\nline\x1b[2J", r"^new\?line\?\[2J: file: cannot be read")
    assert capfd.readouterr() == ("", "")


def test_too_large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(GOOD)
    os.truncate(path, 2**40)  # sparse
    refused_file(path, "file: is over 4194304 bytes")
    os.truncate(path, artifact.MAX_FILE + 1)
    refused_file(path, "file: is over")


def test_pinned_hash(tmp_path):
    path = tmp_path / "policy"
    digest = save(example(), path)
    assert load(path, digest).sha256 == digest
    for wrong in ("0" * 64, "", "x", digest[:-1], "\n" * 100):
        refused_file(path, "sha256: is .*, not", sha256=wrong)


def test_empty_short_or_cut():
    refused(b"", "file: 0 bytes")
    refused(GOOD[:7], "file: 7 bytes")
    refused(GOOD[:8], "header: claims")
    for data in (GOOD, TABLE):
        for i in range(16):
            refused(data[: len(data) * i // 16], "")
        refused(data[:-1], "data")
        refused(data + b"\0", "data")
        refused(data + data, "data")


def flip(data, place):
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("data", [GOOD, TABLE], ids=["mlp", "table"])
def test_one_bit_flipped(data):
    rng = random.Random(0)
    for place in [*range(128), *(rng.randrange(8 * len(data)) for _ in range(200))]:
        refused(flip(data, place), "")


@pytest.mark.slow
def test_every_seventh_bit_flipped():
    for place in range(0, 8 * len(GOOD), 7):
        refused(flip(GOOD, place), "")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, len(GOOD) - 7, 64 * 1024 + 1])
def test_header_length(length):
    refused(length.to_bytes(8, "little") + GOOD[8:], "header: claims")


BAD_JSON = [
    ("", "strict JSON"),
    ("not JSON", "strict JSON"),
    ("[]", "not a JSON object"),
    ("7", "not a JSON object"),
    ('"{}"', "not a JSON object"),
    ('{"a":1,"a":2}', "twice"),
    ('{"a":{"b":1,"\\u0062":2}}', "twice"),
    ('{"a":NaN}', "strict JSON"),
    ('{"a":[-Infinity]}', "strict JSON"),
    ('{"a":1e999}', "1e999 is no number"),
    ('{"a":' + "9" * 5000 + "}", "strict JSON"),
    ('{"a":"\n"}', "strict JSON"),
    ('{"a":1,}', "strict JSON"),
    ('\ufeff{"a":1}', "strict JSON"),
    ('{"a":1}\0', "strict JSON"),
    ('{"a":' * 5000 + "1" + "}" * 5000, "too deep"),
    ('{"a":' + "[" * 40_000, "too deep"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_JSON)
def test_text_that_is_no_strict_json(text, problem):
    assert problem in refused(pack(text), "header")
    field = "" if problem == "too deep" else "manifest"
    assert problem in refused(pack(compact({"__metadata__": {"steersman": text}})), field)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":"\xff"}',
        "{}",
        '{"__metadata__":[]}',
        '{"__metadata__":{"steersman":{}}}',
        '{"__metadata__":{"other":"{}"}}',
    ],
)
def test_header_without_a_manifest(header):
    refused(pack(header), "header")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_is_not_run(protocol, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "policy"
    content = pickle.dumps(Canary(canary), protocol)
    path.write_bytes(content)
    refused_file(path, "header: |looks like a pickle")
    assert not canary.exists()
    pickle.loads(content).close()  # negative control: the payload works
    assert canary.exists()


def test_zip_of_stable_baselines_is_not_run(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "policy"
    payload = pickle.dumps(Canary(canary)).hex()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", compact({"policy_class": {":serialized:": payload}}))
        file.writestr("policy.pth", pickle.dumps(Canary(canary)))
    refused_file(path, "looks like a zip, which can run code when loaded; train")
    assert not canary.exists()


def test_zip_bomb():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data", bytes(16 * 2**20))
    refused(target.getvalue(), "file: looks like a zip")


# Files of the right format with wrong content, their hash made right again


def test_too_many_tensors(tmp_path):
    manifest, entries, body = unpack()
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    path = tmp_path / "policy"
    path.write_bytes(pack(compact(dict.fromkeys(map(str, range(200_000)), empty))))
    refused_file(path, "file: is over")
    many = dict.fromkeys(map(str, range(2000)), empty)
    refused(forge(manifest, entries | many, body), "header: claims")
    some = dict.fromkeys(map(str, range(500)), empty)
    refused(forge(manifest, entries | some, body), "tensors.0")
    refused(forged(["network", "layers"], [SIZE, *[1] * 40, 8]), "network.mlp.layers")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layer0.weight", {"dtype": "F64"}),
        ("layer0.weight", {"dtype": "F16"}),
        ("layer0.weight", {"dtype": "BF16"}),
        ("layer0.weight", {"dtype": "I32"}),
        ("layer0.weight", {"dtype": None}),
        ("layer0.weight", {"shape": [SIZE, 6]}),  # transposed
        ("layer0.weight", {"shape": [6, SIZE, 1]}),
        ("layer0.weight", {"shape": [-6, -SIZE]}),
        ("layer0.weight", {"shape": [2**62, 2**62]}),
        ("layer0.weight", {"shape": [0, 10**12]}),
        ("layer0.weight", {"shape": "6"}),
        ("layer0.bias", {"shape": [[]]}),
        ("layer1.weight", {"data_offsets": [0, 120]}),  # overlaps
        ("layer1.weight", {"data_offsets": [764, 883]}),
        ("layer2.weight", {"data_offsets": [900, 1060]}),
        ("layer0.bias", {"data_offsets": [24, 0]}),
        ("layer0.bias", {"data_offsets": [-24, 0]}),
        ("layer0.bias", {"data_offsets": [0, 2**64]}),
        ("layer0.bias", {"data_offsets": [0]}),
        ("layer0.bias", {"data_offsets": {}}),
        ("layer0.bias", {"extra": 1}),
    ],
)
def test_tensor_entry(name, change):
    manifest, entries, body = unpack()
    refused(forge(manifest, entries | {name: entries[name] | change}, body), f"tensors.{name}")


@pytest.mark.parametrize("change", [{"shape": [6.0, SIZE]}, {"data_offsets": [24, 744.0]}])
def test_tensor_entry_equal_to_python_but_written_differently(change):
    manifest, entries, body = unpack()
    entry = entries["layer0.weight"] | change
    refused(forge(manifest, entries | {"layer0.weight": entry}, body), "payload_sha256")


def test_tensor_missing_extra_or_renamed():
    manifest, entries, body = unpack()
    without = {key: value for key, value in entries.items() if key != "layer1.bias"}
    refused(forge(manifest, without, body), "tensors.layer1.bias")
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    refused(forge(manifest, entries | {"more": entry}, body + bytes(4)), "tensors.more")
    refused(forge(manifest, entries | {"../../x\n": entry}, body + bytes(4)), "tensors.../../x?")
    refused(forge(manifest, {}, b""), "tensors.")
    refused(forge(manifest, without | {"layer1.bias": None}, body), "tensors.layer1.bias")
    refused(forge(manifest, without | {"layer1.bias": 7}, body), "tensors.layer1.bias")
    refused(forge(manifest, entries, body + bytes(4)), "data")
    refused(forge(manifest, entries, body[:-4]), "data")
    refused(forge(manifest, entries | {"layer1.bias": nest(600)}, body), "")


def nest(depth):
    value = 7
    for _ in range(depth):
        value = [value]
    return value


def test_gap_before_the_first_tensor():
    manifest, entries, body = unpack()
    for entry in entries.values():
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    refused(forge(manifest, entries, bytes(4) + body), "tensors.layer0.bias")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("data", [GOOD, TABLE], ids=["mlp", "table"])
def test_weight_that_is_not_finite(value, data):
    manifest, entries, body = unpack(data)
    for place in (0, len(body) // 8 * 4, len(body) - 4):
        changed = body[:place] + np.float32(value).tobytes() + body[place + 4 :]
        assert "not finite" in refused(forge(manifest, entries, changed), "")


def test_weights_that_would_overflow():
    manifest, entries, body = unpack()
    for size, layer in ((1e38, "layer0"), (1e15, "layer1")):
        large = np.full(len(body) // 4, size, np.float32).tobytes()
        assert "overflow" in refused(forge(manifest, entries, large), layer)
    table = np.full((4, 4, 8), 3e38, np.float32)  # in a table nothing is added up
    table[..., 0] *= -1
    policy = from_bytes(to_bytes(example("sarsa", arrays={"table": table})), "x")
    assert policy.act(np.ones(SIZE)) == 1


JSON = "manifest: is not strict JSON"
BAD_MANIFEST = [
    (["format"], 2, "format: version 2 where"),
    (["format"], 0, "format: version 0 where"),
    (["format"], "1", "format: version '1' where"),
    (["format"], True, "payload_sha256"),  # 1 to Python, but written differently
    (["format"], 10**4000, "format: version 1000"),
    (["format"], "x" * 10_000, "format: version 'xxx"),
    (["format"], nest(100), "format: version [[["),
    (["observation"], 2, "observation: version 2"),
    (["observation"], None, "observation: version None"),
    (["algorithm"], "a2c", "algorithm"),
    (["algorithm"], "sarsa", "network.kind"),
    (["unknown"], 1, "unknown: Extra"),
    (["un\nknown\x1b[31m"], 1, "un?known?[31m: Extra"),
    (["features", 3, "name"], "rate", "features.3: 'rate'"),
    (["features", 3, "unit"], "metres", "features.3: 'rate_vs_reference' ('metres')"),
    (["features", 3, "name"], NAMES[4], "features.3: "),
    (["features", 3, "deviation"], 0, "features.3.deviation"),
    (["features", 3, "deviation"], -1.0, "features.3.deviation"),
    (["features", 3, "deviation"], 9e-7, "features.3.deviation"),
    (["features", 3, "deviation"], 1e300, "features.3.deviation"),
    (["features", 3, "deviation"], float("nan"), JSON),
    (["features", 3, "deviation"], "1", "features.3.deviation"),
    (["features", 3, "deviation"], None, "features.3.deviation"),
    (["features", 3, "mean"], float("inf"), JSON),
    (["features", 3, "mean"], 1e300, "features.3.mean"),
    (["features", 3, "low"], 3.0, "features.3.low"),
    (["features", 3, "more"], 3.0, "features.3.more"),
    (["features"], [], "features"),
    (["features"], {}, "features"),
    (["network", "kind"], "cnn", "network"),
    (["network", "kind"], "table", "network"),
    (["network", "activation"], "eval", "network.mlp.activation"),
    (["network", "layers"], [SIZE, 8], "tensors."),
    (["network", "layers"], [SIZE, 6, 5, 9], "network.layers"),
    (["network", "layers"], [SIZE + 1, 6, 5, 8], "network.layers"),
    (["network", "layers"], [SIZE, 0, 5, 8], "network.layers"),
    (["network", "layers"], [SIZE, -6, 5, 8], "network.mlp.layers"),
    (["network", "layers"], [SIZE, 2**62, 5, 8], "network.mlp.layers"),
    (["network", "layers"], [SIZE, 10**6, 10**6, 8], "network: 1000"),
    (["network", "layers"], [], "network.mlp.layers"),
    (["network", "layers"], [SIZE], "network.mlp.layers"),
    (["network", "layers"], [SIZE, 6.5, 5, 8], "network.mlp.layers"),
    (["actions", "multipliers", 0], 0, "manifest: actions: multipliers"),
    (["actions", "multipliers", 0], -1, "manifest: actions: multipliers"),
    (["actions", "multipliers", 0], 1e9, "manifest: actions: multipliers"),
    (["actions", "multipliers", 0], float("nan"), JSON),
    (["actions", "multipliers", 0], "0.1", "actions.multipliers.0"),
    (["actions", "multipliers", 3], 2.0, "manifest: actions: multipliers"),
    (["actions", "multipliers", 3], 1, "payload_sha256"),
    (["actions", "multipliers"], [1.0] * 5000, "network.layers"),
    (["actions", "optimizers"], ["lion"], "actions.optimizers.0"),
    (["actions", "optimizers"], ["sgd"], "network.layers"),
    (["actions", "rollback"], 1, "actions.rollback"),
    (["actions", "rollback"], False, "network.layers"),
    (["actions", "view"], "both", "actions.view"),
    (["actions", "view"], "continuous", "actions.view"),
    (["actions", "span"], 4.0, "manifest: actions: span"),
    (["actions", "more"], 1, "actions.more"),
    (["actions"], {}, "payload_sha256"),
    (["actions"], None, "actions"),
    (["decisions"], 0, "decisions"),
    (["decisions"], 1001, "decisions"),
    (["decisions"], 10.5, "decisions"),
    (["decisions"], True, "decisions"),
    (["start_decades"], -1, "start_decades"),
    (["start_decades"], 1e9, "start_decades"),
    (["provenance"], [], "provenance"),
    (["provenance"], None, "provenance"),
    (["provenance", "x"], "y" * 33_000, "provenance: is over"),
    (["provenance", "x"], "\ud800", "manifest: "),
    (["provenance", "x"], nest(500), "manifest: "),
    (["golden"], [], "golden"),
    (["golden", 0, "observation"], [0.0], "golden.0.observation"),
    (["golden", 0, "observation", 0], 1e300, "golden.0.observation"),
    (["golden", 1, "action"], -1, "golden.1.action"),
    (["golden", 1, "action"], 99, "golden.1: acts"),
    (["golden", 1, "action"], 2**70, "golden.1.action"),
    (["golden", 1, "action"], True, "golden.1.action"),
    (["golden", 1, "action"], [], "golden.1: acts"),
    (["golden", 1, "action"], [0.5, 0.5], "golden.1: acts"),
]


@pytest.mark.parametrize(("path", "value", "field"), BAD_MANIFEST)
def test_manifest(path, value, field):
    refused(forged(path, value), field)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["network", "bins", 0, "feature"], "age", "network.bins"),
        (["network", "bins", 0, "feature"], "colour", "network.bins"),
        (["network", "bins", 0, "edges"], [], "network.table.bins.0.edges"),
        (["network", "bins", 0, "edges"], [0.1, 0.1, 0.7], "network.bins: edges do not ascend"),
        (["network", "bins", 0, "edges"], [0.7, 0.1, 0.0], "network.bins: edges do not ascend"),
        (["network", "bins", 0, "edges"], [0.1, 0.7], "tensors.table"),
        (["network", "bins", 0, "edges"], [0.1, 1e300], "network.table.bins.0.edges.1"),
        (["network", "bins", 0, "edges"], [0.1, float("inf")], JSON),
        (["network", "bins"], [], "network.table.bins"),
        (["algorithm"], "ppo", "network.kind"),
        (["actions", "view"], "continuous", "actions.view"),
    ],
)
def test_table_manifest(path, value, field):
    refused(forged(path, value, TABLE), field)


def test_table_of_astronomical_size():
    bins = [{"feature": name, "edges": [i / 99 for i in range(99)]} for name in NAMES[:16]]
    refused(forged(["network", "bins"], bins, TABLE), "network: 8")


def test_features_reordered_missing_or_twice():
    features = unpack()[0]["features"]
    refused(forged(["features"], [features[1], features[0], *features[2:]]), "features.0")
    refused(forged(["features"], features[:-1]), "features")
    refused(forged(["features"], [*features, features[0]]), "features")
    refused(forged(["features"], [features[0], *features[:-1]]), "features.1")


@pytest.mark.parametrize("key", sorted(set(unpack()[0]) - {"payload_sha256"}))
def test_manifest_without_one_of_its_fields(key):
    manifest, entries, body = unpack()
    del manifest[key]
    refused(forge(manifest, entries, body), key)


def test_golden_pairs_show_different_actions():
    assert len({pair["action"] for pair in unpack()[0]["golden"]}) > 2


def test_golden_mismatch():
    manifest, entries, body = unpack()
    for i, pair in enumerate(manifest["golden"]):
        refused(forged(["golden", i, "action"], (pair["action"] + 1) % 8), f"golden.{i}: acts")
    refused(forge(manifest, entries, (-np.frombuffer(body, "<f4")).tobytes()), "golden.")


def test_golden_of_continuous_actions_has_a_tolerance():
    data = to_bytes(example("continuous ppo"))
    value = unpack(data)[0]["golden"][2]["action"]
    shift = [-1 if number > 0 else 1 for number in value]
    near = [number + 9e-6 * way for number, way in zip(value, shift, strict=True)]
    from_bytes(forged(["golden", 2, "action"], near, data), "x")
    far = [number + 2e-5 * way for number, way in zip(value, shift, strict=True)]
    refused(forged(["golden", 2, "action"], far, data), "golden.2: acts")
    refused(forged(["golden", 2, "action"], value[:1], data), "golden.2: acts")


@pytest.mark.parametrize("value", ["0" * 64, "", None, 7, "A" * 64, "0" * 63 + "\n", "x" * 64])
def test_hash_mismatch(value):
    manifest, entries, body = unpack()
    text = compact(manifest | {"payload_sha256": value}, sort_keys=True)
    header = compact({"__metadata__": {"steersman": text}} | entries)
    refused(pack(header, body), "payload_sha256")


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace(",", ", ", 1),
        lambda text: " " + text,
        lambda text: text + " " * 8,
        lambda text: text.replace("layer0.bias", "layer\\u0030.bias"),
        lambda text: text.replace('"__metadata__":{', '"__metadata__":{"note":"x",'),
        lambda text: text.replace('\\"decisions\\":10,', '\\"decisions\\": 10,'),
        lambda text: text.replace('\\"start_decades\\":1.5', '\\"start_decades\\":1.50'),
        lambda text: text.replace("u00e4he", "u00E4he"),
        lambda text: compact(dict(reversed(json.loads(text).items()))),
    ],
)
@pytest.mark.parametrize("reseal", [True, False])
def test_header_written_another_way(rewrite, reseal):
    manifest, entries, body = unpack()
    if reseal:
        data = forge(manifest, entries, body, rewrite)
    else:
        data = pack(rewrite(GOOD[8 : -len(body)].decode().rstrip()), body)
    assert data != GOOD
    refused(data, "payload_sha256")


@pytest.mark.parametrize(
    ("old", "new"),
    [('{"dtype"', '{"dtype":"F64","dtype"'), ('\\"format', '\\"format\\":2,\\"format')],
)
def test_duplicate_keys_with_a_right_hash(old, new):
    assert "twice" in refused(forge(*unpack(), lambda text: text.replace(old, new, 1)), "")


def places(tree, path=()):
    """The way to every value in a tree of dicts and lists."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


PLACES = {data: list(places(unpack(data)[0])) for data in (GOOD, TABLE)}
ODD = [None, True, 0, -1, 1.0, 1e-300, 1e308, -0.0, 2**70, "", "x", "\0", [], [[]], {}, {"": 0}]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fuzzed_manifest_loads_or_is_refused(data):
    source = data.draw(st.sampled_from(sorted(PLACES)))
    path = data.draw(st.sampled_from(PLACES[source]))
    changed = forged(path, data.draw(st.sampled_from(ODD)), source)
    try:
        policy = from_bytes(changed, "x")
    except BadArtifact:
        refused(changed, "")
    else:
        assert to_bytes(policy) == changed
        decode(policy.act(np.zeros(SIZE)), policy.manifest.actions)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(GOOD)), st.integers(0, 200))
def test_fuzzed_bytes_are_refused(noise, place, cut):
    changed = GOOD[:place] + noise + GOOD[place + cut :]
    if changed != GOOD:
        refused(changed, "")


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1e-6, 1e6),
    st.floats(-5, 5),
    st.dictionaries(
        TEXT,
        st.floats(allow_nan=False, allow_infinity=False) | TEXT | st.integers() | st.booleans(),
    ),
)
def test_any_numbers_and_texts_survive(deviation, mean, provenance):
    fields = plain(provenance=provenance)
    fields["features"][5] |= {"deviation": deviation, "mean": mean}
    policy = from_bytes(to_bytes(make(**fields)), "x")
    assert policy.manifest.features[5].deviation == deviation
    assert policy.manifest.features[5].mean == mean
    assert policy.manifest.provenance == provenance


# Valid but hostile: it loads, and the guards of whoever applies it must hold


@pytest.mark.parametrize("action", range(8))
def test_policy_that_always_does_the_same_loads(action, tmp_path):
    arrays = {key: 0 * value for key, value in plain()["arrays"].items()}
    arrays["layer2.bias"][action] = 1
    save(example(arrays=arrays), tmp_path / "policy")
    policy = load(tmp_path / "policy")
    assert {policy.act(np.full(SIZE, value)) for value in (-5, 0, 5)} == {action}


def test_policy_that_oscillates_loads(tmp_path):
    weight = np.zeros((2, SIZE), np.float32)
    weight[0, NAMES.index("last_change")] = -100
    arrays = {"layer0.weight": weight, "layer0.bias": np.zeros(2, np.float32)}
    network = {"kind": "mlp", "layers": [SIZE, 2], "activation": "tanh"}
    save(example("continuous ppo", network=network, arrays=arrays), tmp_path / "policy")
    policy = load(tmp_path / "policy")
    up = np.zeros(SIZE)
    up[NAMES.index("last_change")] = 1
    assert (policy.act(up)[0], policy.act(-up)[0]) == (-1, 1)


# Making and saving


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"algorithm": "a2c"}, "algorithm"),
        ({"provenance": {"x": float("nan")}}, "manifest: cannot be written"),
        ({"provenance": {"x": object()}}, "manifest: cannot be written"),
        ({"provenance": {1: {(): 2}}}, "manifest: cannot be written"),
        ({"provenance": {"x": "\ud800"}}, "manifest: "),
        ({"more": 1}, "more: Extra"),
        ({"arrays": {}}, "arrays"),
        ({"arrays": {"table": np.zeros(3)}}, "arrays"),
        ({"arrays": mlp([SIZE, 6, 5, 8], 1e30)}, "layer0.weight"),
        ({"decisions": 0}, "decisions"),
        ({"features": []}, "features"),
    ],
)
def test_make_refuses_what_load_would(changes, field):
    with pytest.raises(BadArtifact, match=rf"^policy: {field}.*; "):
        example(**changes)


def test_make_refuses_what_refers_to_itself():
    loop = []
    loop.append(loop)
    for provenance in ({"x": loop}, {"x": nest(5000)}):
        with pytest.raises(BadArtifact, match=r"^policy: .*; "):
            example(provenance=provenance)


def test_make_takes_numpy_numbers_and_the_classes():
    manifest = example().manifest
    policy = example(
        provenance={"score": np.float32(0.5), "curve": np.arange(3)},
        features=manifest.features,
        network=manifest.network,
    )
    assert policy.manifest.provenance == {"score": 0.5, "curve": [0, 1, 2]}
    assert policy.manifest.features == manifest.features
    assert policy.manifest.network == manifest.network


def test_make_leaves_the_callers_arrays_alone():
    fields = plain()
    policy = make(**fields)
    fields["arrays"]["layer0.bias"][:] = np.nan
    assert to_bytes(policy) == GOOD


def test_save_never_writes_what_would_not_load(tmp_path):
    policy = example()
    for changes in (
        {"arrays": {}},
        {"arrays": {key: value * np.nan for key, value in policy.arrays.items()}},
        {"arrays": {key: value * 2 for key, value in policy.arrays.items()}},
        {"manifest": policy.manifest.model_copy(update={"decisions": 12})},
    ):
        with pytest.raises(BadArtifact, match=re.escape(str(tmp_path / "policy: "))):
            save(replace(policy, **changes), tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "policy"
    path.write_bytes(TABLE)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left"):
        save(example(), path)
    assert path.read_bytes() == TABLE
    assert list(tmp_path.iterdir()) == [path]


SAVER = """
import os, random, signal, sys, time
from pathlib import Path
from envs.errors import BadArtifact
import tuner.policy as P

def torn(path, content):  # the negative control: written in place
    with open(path, "wb") as file:
        for i in range(0, len(content), 9973):
            file.write(content[i : i + 9973])
            file.flush()
            time.sleep(0.001)

folder, kills, broken = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "broken"
policies = [P.load(folder / "old"), P.load(folder / "new")]
target, bad, seen = folder / "target", 0, set()
P.save(policies[0], target)
if broken:
    P.write_atomic = torn
for seed in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            P.save(policies[1], target)
            P.save(policies[0], target)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        seen.add(P.load(target).sha256)
    except BadArtifact:
        bad += 1
print(bad, seen <= {policy.sha256 for policy in policies})
"""


def kill_saves(folder, kills, mode):
    """How many of so many kills left a file that does not load."""
    layers = [SIZE, 400, 400, 8]
    network = {"kind": "mlp", "layers": layers, "activation": "relu"}
    for name, scale in (("old", 0.1), ("new", 0.2)):
        save(example(network=network, arrays=mlp(layers, scale)), folder / name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SAVER, str(folder), str(kills), mode],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a fork wants a single thread
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    bad, known = done.stdout.split()
    assert known == "True"
    return int(bad)


def test_save_killed_leaves_the_old_file_or_the_new(tmp_path):
    assert kill_saves(tmp_path, 10, "whole") == 0
    assert kill_saves(tmp_path, 10, "broken") > 0


@pytest.mark.slow
def test_save_killed_200_times(tmp_path):
    assert kill_saves(tmp_path, 200, "whole") == 0
