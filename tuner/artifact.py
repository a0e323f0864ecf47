"""The policy file: a manifest and its arrays <-> checked bytes.

A safetensors file with one way to write a given policy: the header's length in 8 bytes; the header,
JSON, with the manifest as JSON text under ``__metadata__.steersman``; float32 data in its order.
Nothing in it is code, and nothing is allocated before the header is what the manifest calls for.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from envs.errors import BadArtifact, BadInput
from envs.knobs import Actions, plain
from envs.observe import FEATURES, LIMIT, SIZE, VERSION

FORMAT = 1
MAX_FILE, MAX_HEADER, MAX_PROVENANCE = 4 * 2**20, 64 * 2**10, 32 * 2**10  # bytes
MAX_TENSORS, MAX_PARAMETERS = 64, 1_000_000
CLIP = 10.0  # a normalised feature stays within
REACH = 1e30  # no score may exceed this on any observation; float32 ends at 3e38
KEY = "steersman"
AGAIN = "get the file again from where it was published"
RETRAIN = "train the policy again with this version of Steersman"

Array = NDArray[np.float32]
Observed = Annotated[float, Field(ge=-LIMIT, le=LIMIT)]
Count = Annotated[int, Field(ge=0, le=MAX_PARAMETERS)]


class Part(BaseModel):
    """A piece of the manifest: frozen, no conversion of types, no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Range(Part):
    """A feature as training saw it, in its own unit: the normaliser's numbers, the envelope."""

    name: str
    unit: str
    mean: Observed
    deviation: float = Field(ge=float(np.float32(1e-6)), le=1e6)
    low: Observed
    high: Observed


class Mlp(Part):
    """Sees normalised features; ``layer0.weight`` (out, in), ``layer0.bias`` (out,), and so on."""

    kind: Literal["mlp"]
    layers: tuple[Count, ...] = Field(min_length=2, max_length=MAX_TENSORS // 2 + 1)
    activation: Literal["tanh", "relu"]  # between layers, not after the last


class Bin(Part):
    """A raw feature cut in bins: bin i holds edges[i - 1] <= value < edges[i]."""

    feature: str
    edges: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] = Field(min_length=1)


class Table(Part):
    """Tensor ``table``: one axis for each of the bins, then one value for each action."""

    kind: Literal["table"]
    bins: tuple[Bin, ...] = Field(min_length=1, max_length=16)


class Golden(Part):
    """An observation, and the action the policy took on it where it was made."""

    observation: tuple[Observed, ...] = Field(min_length=SIZE, max_length=SIZE)
    action: Count | tuple[Annotated[float, Field(ge=-1, le=1)], ...]


class Manifest(Part):
    """Everything about a policy but its weights."""

    format: Literal[1]
    algorithm: Literal["ppo", "imitation", "dqn", "evolution", "q-learning", "sarsa"]
    observation: int  # envs.observe.VERSION
    features: tuple[Range, ...] = Field(min_length=SIZE, max_length=SIZE)
    network: Mlp | Table = Field(discriminator="kind")
    actions: Actions
    decisions: int = Field(ge=1, le=1000)  # in a run of training
    start_decades: float = Field(ge=0, le=10)  # half-width of the starting rates seen
    provenance: dict[str, JsonValue]  # tasks, seeds, versions, scores, cost
    golden: tuple[Golden, ...] = Field(min_length=3, max_length=8)
    payload_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # see `seal`


def refuse(field: str, problem: str, fix: str = AGAIN) -> NoReturn:
    """Raise `BadArtifact` as ``field: problem; fix``, on one printable line."""
    line = f"{field[:80]}: {problem[:300]}; {fix}"
    raise BadArtifact("".join(c if c.isprintable() else "?" for c in line))


def read(path: str) -> bytes:
    """The bytes of a regular file of at most `MAX_FILE`; follows no link, waits for no pipe."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                refuse("file", "is a device, a pipe or a socket", "give a .safetensors file")
            if found.st_size > MAX_FILE or len(data := file.read(MAX_FILE + 1)) > MAX_FILE:
                refuse("file", f"is over {MAX_FILE} bytes", "give a policy's .safetensors file")
            return data
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            refuse("file", "is a link", "give the file it points to")
        refuse("file", f"cannot be read: {getattr(error, 'strerror', error)}", "check the path")


def decode(data: bytes) -> tuple[Manifest, dict[str, Array]]:
    """The file's manifest and arrays; `BadArtifact` unless they give the same bytes back."""
    length, most = int.from_bytes(data[:8], "little"), min(MAX_HEADER, len(data) - 8)
    if most < 0:
        refuse("file", f"{len(data)} bytes are no policy")
    if length > most:
        if kind := {b"PK": "zip", b"\x80\x04": "pickle"}.get(data[:2]):
            refuse("file", f"looks like a {kind}, which can run code when loaded", RETRAIN)
        refuse("header", f"claims {length} bytes where at most {most} can be")
    header, body = strict_json(data[8 : 8 + length], "header"), data[8 + length :]
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        refuse("header", f"has no manifest under __metadata__.{KEY}", RETRAIN)
    manifest = parse(metadata[KEY].encode(errors="surrogatepass"))
    wanted, size, arrays = layout(manifest), 4 * parameters(manifest), {}
    for name in sorted(header.keys() | wanted.keys()):
        if (found := header.get(name)) != (belongs := wanted.get(name)):
            refuse(f"tensors.{name}", f"{_dumps(found)[:150]} where {_dumps(belongs)} belongs")
    if len(body) != size:
        refuse("data", f"{len(body)} bytes where {size} belong")
    for name, entry in wanted.items():
        start, end = entry["data_offsets"]
        array = np.frombuffer(body[start:end], "<f4").astype(np.float32).reshape(entry["shape"])
        array.setflags(write=False)
        arrays[name] = array
    if encode(seal(manifest, arrays), arrays) != data:
        refuse("payload_sha256", "does not match the content: the file was damaged or changed")
    return manifest, arrays


def encode(manifest: Manifest, arrays: Mapping[str, Array]) -> bytes:
    """The file: the same policy gives the same bytes, and they are safetensors' own."""
    check_arrays(manifest, arrays)
    entries, fields = layout(manifest), manifest.model_dump(mode="json")
    fields["actions"] = plain(manifest.actions)
    text = _dumps({"__metadata__": {KEY: _dumps(fields, sort_keys=True)}} | entries).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(np.asarray(arrays[name], "<f4").tobytes() for name in entries)
    return len(text).to_bytes(8, "little") + text + body


def seal(manifest: Manifest, arrays: Mapping[str, Array]) -> Manifest:
    """The manifest with its hash: SHA-256 of the file as it is with an empty hash."""
    bare = encode(manifest.model_copy(update={"payload_sha256": ""}), arrays)
    return manifest.model_copy(update={"payload_sha256": hashlib.sha256(bare).hexdigest()})


def layout(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The header's tensors as the manifest calls for them: in order, no gap, no overlap."""
    network, shapes, entries, end = manifest.network, dict[str, list[int]](), {}, 0
    if isinstance(network, Table):
        shapes = {"table": [*(len(each.edges) + 1 for each in network.bins), manifest.actions.size]}
    else:
        for i, (inward, outward) in enumerate(pairwise(network.layers)):
            shapes |= {f"layer{i}.weight": [outward, inward], f"layer{i}.bias": [outward]}
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return entries


def parameters(manifest: Manifest) -> int:
    """How many numbers the manifest calls for."""
    return sum(math.prod(entry["shape"]) for entry in layout(manifest).values())


def check_arrays(manifest: Manifest, arrays: Mapping[str, Array]) -> None:
    """Names, shapes, finite values; and no observation may overflow the network."""
    found = {name: list(np.shape(array)) for name, array in arrays.items()}
    if found != (wanted := {name: entry["shape"] for name, entry in layout(manifest).items()}):
        refuse("arrays", f"{found} where {wanted} belong", RETRAIN)
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            refuse(name, "holds values that are not finite float32 numbers", RETRAIN)
    reach = np.full(SIZE, CLIP)
    for i in range(len(manifest.network.layers) - 1 if isinstance(manifest.network, Mlp) else 0):
        weight, bias = (abs(arrays[f"layer{i}.{part}"]) for part in ("weight", "bias"))
        reach = weight.astype(np.float64) @ reach + bias
        if reach.max() > REACH:
            refuse(f"layer{i}.weight", "weights this large overflow on some observation", RETRAIN)


def parse(text: bytes) -> Manifest:
    """JSON text -> a manifest that makes sense; every check that needs no arrays."""
    fields = strict_json(text, "manifest")
    for name, here in (("format", FORMAT), ("observation", VERSION)):
        if fields.get(name) != here:
            problem = f"version {fields.get(name)!r:.40} where this Steersman reads {here}"
            refuse(name, problem, "use the version that made it, or train the policy again")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        refuse(".".join(map(str, first["loc"])) or "manifest", first["msg"], RETRAIN)
    except BadInput as error:  # from Actions
        refuse("manifest", str(error), RETRAIN)
    for i, (range_, feature) in enumerate(zip(manifest.features, FEATURES, strict=True)):
        if (range_.name, range_.unit) != feature:
            problem = f"{range_.name[:60]!r} ({range_.unit[:60]!r}) where {feature.name!r} belongs"
            refuse(f"features.{i}", problem, RETRAIN)
        if range_.low > range_.high:
            refuse(f"features.{i}.low", f"{range_.low} is above high, {range_.high}", RETRAIN)
    network, actions, algorithm = manifest.network, manifest.actions, manifest.algorithm
    if (network.kind == "table") != (algorithm in ("q-learning", "sarsa")):
        refuse("network.kind", f"{network.kind!r} does not go with {algorithm}", RETRAIN)
    if actions.view != "discrete" and algorithm != "ppo":
        refuse("actions.view", f"{algorithm} needs the discrete view", RETRAIN)
    if actions.view == "joint":
        refuse("actions.view", "'joint' is for agents that learn together", RETRAIN)
    if isinstance(network, Mlp):
        ends = network.layers[0], network.layers[-1]
        if ends != (SIZE, actions.size) or 0 in network.layers:
            problem = f"{network.layers} do not lead from {SIZE} features to {actions.size} actions"
            refuse("network.layers", problem, RETRAIN)
    else:
        names = [each.feature for each in network.bins]
        if set(names) - {feature.name for feature in FEATURES} or len(set(names)) < len(names):
            refuse("network.bins", f"{names} are not different known features", RETRAIN)
        if any(low >= high for each in network.bins for low, high in pairwise(each.edges)):
            refuse("network.bins", "edges do not ascend", RETRAIN)
    if (count := parameters(manifest)) > MAX_PARAMETERS:
        refuse("network", f"{count} parameters are more than {MAX_PARAMETERS}", "make it smaller")
    if len(_dumps(manifest.provenance)) > MAX_PROVENANCE:
        refuse("provenance", f"is over {MAX_PROVENANCE} characters of JSON", "say less")
    return manifest


def strict_json(text: bytes, field: str) -> dict[str, Any]:
    """A JSON object; duplicate keys, NaN, infinities and numbers that overflow are refused."""
    try:
        found = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite
        )
    except ValueError as error:
        refuse(field, f"is not strict JSON ({error})")
    return found if isinstance(found, dict) else refuse(field, "is not a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return number


def _dumps(value: object, sort_keys: bool = False) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)
