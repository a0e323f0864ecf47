"""Evolution strategies as an agent: OpenAI-ES, Salimans et al. 2017, arXiv 1703.03864.

A population of networks, mirrored around the present one, each plays some episodes that are the
same for all; ranks of their mean returns weigh the noise into a gradient, which Adam follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from tuner.agent import Arrays, Network, Normaliser

Array = NDArray[np.float32]


@dataclass(frozen=True)
class EvolutionConfig:
    """The paper's, but for the weight decay: there is none."""

    pairs: int = 32  # mirrored perturbations in a generation
    sigma: float = 0.1  # deviation of a perturbation
    rate: float = 0.03  # Adam's, at the start; falls linearly to a tenth


class EvolutionAgent:
    """A population around one tanh network that takes the action with the highest score.

    Environments are shared out evenly over the population, ``2 * pairs`` networks; there must be
    a multiple of them. An environment plays one episode in a generation.
    """

    def __init__(
        self, start: Mapping[str, Array], look: Normaliser, config: EvolutionConfig
    ) -> None:
        """start: ``layer0.weight`` (out, in), ``layer0.bias`` (out,), and so on."""
        self._look, self._config = look, config
        self._shapes = {name: array.shape for name, array in start.items()}
        flat = np.concatenate([array.ravel() for array in start.values()]).astype(np.float32)
        self._weights = torch.nn.Parameter(torch.from_numpy(flat))
        self._adam = torch.optim.Adam([self._weights], lr=config.rate)

    def learn(self, envs: VectorEnv, seed: int, share: float) -> dict[str, float]:
        """One generation."""
        config, rng = self._config, np.random.default_rng(seed)
        centre = self._weights.detach().numpy()
        noise = rng.standard_normal((config.pairs, len(centre)), dtype=np.float32)
        members = centre + config.sigma * np.concatenate([noise, -noise])
        returns = self._play(envs, members, seed)
        ranks = centred_ranks(returns)
        weighed = (ranks[: config.pairs] - ranks[config.pairs :]) @ noise
        gradient = weighed / (2 * config.pairs * config.sigma)
        self._adam.param_groups[0]["lr"] = config.rate * (1.0 - 0.9 * share)
        self._weights.grad = torch.from_numpy(-gradient.astype(np.float32))
        self._adam.step()
        return {"return": float(returns.mean()), "spread": float(returns.std())}

    def network(self) -> tuple[Network, Arrays]:
        """The network in the middle of the population."""
        arrays = self._split(self._weights.detach().numpy()[None].copy())
        arrays = {name: array[0] for name, array in arrays.items()}
        weights = [array for name, array in arrays.items() if name.endswith("weight")]
        sizes = [weights[0].shape[1], *(len(weight) for weight in weights)]
        return {"kind": "mlp", "layers": sizes, "activation": "tanh"}, arrays

    def state(self) -> dict[str, Any]:
        """The weights and Adam's moments."""
        return {"weights": self._weights.detach().clone(), "adam": self._adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        with torch.no_grad():
            self._weights.copy_(state["weights"])
        self._adam.load_state_dict(state["adam"])

    def _play(self, envs: VectorEnv, members: Array, seed: int) -> NDArray[np.float64]:
        """(members, weights) -> (members,) mean returns of an episode in each environment."""
        share = envs.num_envs // len(members)
        arrays = self._split(members)
        seen, _ = envs.reset(seed=[seed + i % share for i in range(envs.num_envs)])
        total, going = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
        while going.any():
            scores = forward(arrays, self._look(seen).reshape(len(members), share, -1))
            seen, rewards, terminated, truncated, _ = envs.step(scores.argmax(-1).ravel())
            total += np.where(going, rewards, 0.0)
            going &= ~(terminated | truncated)
        return np.asarray(total.reshape(len(members), share).mean(1))

    def _split(self, members: Array) -> Arrays:
        """(members, weights) -> arrays by name, each with the members in front."""
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in self._shapes.values())])
        parts = zip(self._shapes.items(), pairwise(ends), strict=True)
        return {name: members[:, a:b].reshape(-1, *shape) for (name, shape), (a, b) in parts}


def forward(arrays: Arrays, seen: Array) -> Array:
    """(members, n, features) -> (members, n, actions) scores, each by its own network."""
    last = len(arrays) // 2 - 1
    for i in range(last + 1):
        weight, bias = arrays[f"layer{i}.weight"], arrays[f"layer{i}.bias"]
        seen = seen @ weight.swapaxes(1, 2) + bias[:, None]
        seen = np.tanh(seen) if i < last else seen
    return seen


def centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) -> (n,) ranks from -0.5 to 0.5; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return np.asarray((below + (equal - 1) / 2) / (len(values) - 1) - 0.5)
