"""RecurrentPPO of sb3-contrib as an agent, and its network as the pilot of real runs.

A network with a memory is no policy artifact, so that it is kept here and shipped nowhere.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from sb3_contrib.ppo_recurrent import MlpLstmPolicy

from baselines.method import Arena
from envs.knobs import Actions
from envs.observe import space
from tuner.agent import Normaliser
from tuner.evaluate import steer
from tuner.policy import Policy
from tuner.sb3 import PairedBuffer, PPOConfig, fresh
from tuner.vecenv import VectorAdapter

HIDDEN = 64  # of the LSTM, as wide as a layer of PPO's network


class PairedRecurrentBuffer(PairedBuffer, RecurrentRolloutBuffer):
    """A recurrent rollout whose episodes are paid what they earned above others of their job."""


class RecurrentAgent:
    """PPO with an LSTM before one layer, for actor and critic each; discrete actions.

    keep: the action that is preferred at the start, as in `tuner.sb3.PPOAgent`.
    """

    def __init__(
        self, envs: VectorEnv, decisions: int, look: Normaliser, config: PPOConfig, keep: int
    ) -> None:
        self._venv = VectorAdapter(envs, look, config.group)
        self._steps, self._config = decisions * config.episodes, config
        self.model = RecurrentPPO(
            "MlpLstmPolicy", self._venv, learning_rate=config.rate, n_steps=self._steps,
            batch_size=max(config.minibatch, self._steps * envs.num_envs // 20),
            n_epochs=config.epochs, gamma=1.0, gae_lambda=config.lambda_, clip_range=config.clip,
            ent_coef=config.entropy, policy_kwargs=shape(), seed=0, device="cpu",
        )  # fmt: skip
        model = self.model
        model.rollout_buffer = PairedRecurrentBuffer(
            self._steps, model.observation_space, model.action_space,
            (self._steps, 1, envs.num_envs, HIDDEN), "cpu", gamma=1.0, gae_lambda=config.lambda_,
            n_envs=envs.num_envs, group=config.group,
        )  # fmt: skip
        with torch.no_grad():
            model.policy.action_net.bias[keep] += config.restraint

    def learn(self, envs: VectorEnv, seed: int, share: float) -> dict[str, float]:
        """One rollout of whole episodes, then its epochs of updates."""
        model, rate = self.model, self._config.rate * (1.0 - 0.9 * share)
        model.lr_schedule = lambda _: rate
        model.ent_coef = self._config.entropy * (1.0 - share)
        fresh(model, self._venv, seed)
        model.learn(self._steps * envs.num_envs, reset_num_timesteps=False)
        return {}

    def save(self, path: Path) -> None:
        """Write the weights."""
        save_file(self.model.policy.state_dict(), path)


def shape() -> dict[str, Any]:
    """The network: an LSTM and one layer, for actor and critic apart."""
    return {
        "lstm_hidden_size": HIDDEN,
        "net_arch": {"pi": [HIDDEN], "vf": [HIDDEN]},
        "activation_fn": torch.nn.Tanh,
    }


def network_of(path: Path, actions: Actions) -> MlpLstmPolicy:
    """The network whose weights `RecurrentAgent.save` wrote."""
    network = MlpLstmPolicy(space(), actions.space(), lambda _: 0.0, **shape())
    network.load_state_dict(load_file(path))
    return network


@dataclass
class Memory:
    """A network with what it remembers of the runs it acts on; made anew for new runs."""

    network: MlpLstmPolicy
    look: Normaliser
    state: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def __call__(self, seen: NDArray[np.float32]) -> NDArray[np.int64]:
        """(runs, features) raw -> (runs,) actions, the likeliest."""
        actions, self.state = self.network.predict(
            self.look(seen), state=self.state, deterministic=True
        )
        return np.asarray(actions)


@dataclass(frozen=True)
class RecurrentPilot:
    """What `Helm` asks of a policy, for one run. frame: its manifest and envelope are taken."""

    memory: Memory
    frame: Policy
    sha256: str

    @property
    def manifest(self) -> Any:
        """Of the frame."""
        return self.frame.manifest

    def act(self, observation: ArrayLike) -> int:
        """(features,) raw -> an action."""
        return int(self.memory(np.asarray(observation, np.float32)[None])[0])

    def outside(self, observation: ArrayLike) -> list[str]:
        """Names of the features out of the range of training."""
        return self.frame.outside(observation)


@dataclass(frozen=True)
class RecurrentMethod:
    """One run steered by a network with a memory, which begins each run empty."""

    path: Path
    frame: Policy
    look: Normaliser
    name: str

    def describe(self) -> dict[str, Any]:
        """What tells it from another: the weights, not where they lie."""
        return {"recurrent": self._sha256, "frame": self.frame.sha256}

    def pilot(self) -> RecurrentPilot:
        """For one run."""
        network = network_of(self.path, self.frame.manifest.actions)
        return RecurrentPilot(Memory(network, self.look), self.frame, self._sha256)

    def run(self, arena: Arena) -> None:
        """Steer."""
        steer(arena, self.pilot(), arena.start_rate, "explore")

    @property
    def _sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()
