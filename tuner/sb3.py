"""PPO and DQN of stable-baselines3 as agents."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed
from torch.nn import functional

from tuner.agent import Arrays, Network, Normaliser
from tuner.vecenv import VectorAdapter

IMITATED, SMOOTH = 256, 0.02  # rows of a batch of imitation, and how much labels are smoothed


@dataclass(frozen=True)
class PPOConfig:
    """Schulman et al. 2017, with the discount of 1 that a telescoping reward asks for."""

    episodes: int = 4  # of each environment in an iteration
    rate: float = 1e-3  # at the start; falls linearly to a tenth
    epochs: int = 10
    minibatch: int = 64  # or a twentieth of the rollout, if that is more
    lambda_: float = 0.95  # Schulman et al. 2016
    clip: float = 0.2
    entropy: float = 0.01  # at the start; falls linearly to nothing
    layers: tuple[int, ...] = (64, 64)
    rate_of_imitation: float = 1e-3
    restraint: float = 1.5  # by how much the logit of *keep* is ahead at the start
    group: int = 1  # environments that have the same episodes; see `PairedBuffer`


@dataclass(frozen=True)
class DQNConfig:
    """Mnih et al. 2015, with the discount of 1."""

    episodes: int = 4
    rate: float = 1e-3
    minibatch: int = 64
    buffer: int = 50_000
    gradient_steps: int = 2  # after each step of all environments
    target_interval: int = 250  # decisions between copies of the target network, at least
    explore_from: float = 1.0
    explore_to: float = 0.05
    layers: tuple[int, ...] = (64, 64)


class PairedBuffer(RolloutBuffer):
    """A rollout in which an episode is paid, at its end, what it earned above others of its job.

    ``group`` neighbouring environments meet the same jobs, from the same rate and in the same
    data order, and act each for itself. The mean return of the others is a baseline in which an
    episode's own actions have no part, so that the gradient keeps its expectation, while what the
    job alone decides, which is most of a return, drops out (leave-one-out, Kool et al. 2019; as
    RLOO does, Ahmadian et al. 2024). Nothing is paid before the end: gains on the way are mostly
    the job's as well.
    """

    def __init__(self, *given: Any, group: int = 1, **named: Any) -> None:
        self._group = group
        super().__init__(*given, **named)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: Any) -> None:
        """The advantages, from what was earned above the others."""
        if self._group > 1:
            ends = np.concatenate([self.episode_starts[1:], np.asarray(dones)[None]]) > 0
            self.rewards[:] = above_others(self.rewards, ends, self._group)
        super().compute_returns_and_advantage(last_values, dones)


def above_others(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], group: int
) -> NDArray[np.float32]:
    """(steps, environments) rewards and last steps -> at these, returns less those of the others.

    The others: the same episode, counted from the start, of the environments in the group that
    ended theirs; without any, and at steps that are not the last, it is 0.
    """
    paid = np.zeros_like(rewards)
    count = ends.cumsum(0) - ends  # which episode a step belongs to
    for first in range(0, rewards.shape[1], group):
        part = slice(first, first + group)
        reward, end, number = rewards[:, part], ends[:, part], count[:, part]
        for episode in range(int(end.sum(0).max(initial=0))):
            mine = number == episode
            done = (mine & end).any(0)
            returns = np.where(done, (reward * mine).sum(0), 0.0)
            if (many := done.sum()) > 1:
                mean = (returns.sum() - returns) / (many - 1)
                paid[:, part] += np.where(mine & end, returns - mean, 0.0)
    return paid


class PPOAgent:
    """Proximal policy optimisation; discrete or continuous actions.

    keep: the discrete action that changes nothing, preferred at the start; None for no preference.
    In the joint view one for each seat, counted through all seats' choices.
    """

    def __init__(
        self,
        envs: VectorEnv,
        decisions: int,
        normaliser: Normaliser,
        config: PPOConfig,
        keep: int | Sequence[int] | None = None,
    ) -> None:
        self._venv = VectorAdapter(envs, normaliser, config.group)
        self._steps = decisions * config.episodes
        self._config = config
        rollout = self._steps * envs.num_envs
        most = max(config.minibatch, rollout // 20)
        minibatch = max(n for n in range(1, most + 1) if rollout % n == 0)
        self._model = PPO(
            "MlpPolicy",
            self._venv,
            learning_rate=config.rate,
            n_steps=self._steps,
            batch_size=minibatch,
            n_epochs=config.epochs,
            gamma=1.0,
            gae_lambda=config.lambda_,
            clip_range=config.clip,
            rollout_buffer_class=PairedBuffer,
            rollout_buffer_kwargs={"group": config.group},
            ent_coef=config.entropy,
            policy_kwargs={
                "net_arch": {"pi": list(config.layers), "vf": list(config.layers)},
                "activation_fn": torch.nn.Tanh,
            },
            seed=0,
            device="cpu",
        )
        if keep is not None:  # one change at a time teaches more than a random walk of the rate
            with torch.no_grad():
                kept = [keep] if isinstance(keep, int) else list(keep)
                self._model.policy.action_net.bias[kept] += config.restraint

    def learn(self, envs: VectorEnv, seed: int, share: float) -> dict[str, float]:
        """One rollout of whole episodes, then its epochs of updates."""
        model, rate = self._model, self._config.rate * (1.0 - 0.9 * share)
        model.lr_schedule = lambda _: rate
        model.ent_coef = self._config.entropy * (1.0 - share)
        fresh(model, self._venv, seed)
        model.learn(self._steps * envs.num_envs, reset_num_timesteps=False)
        values = model.logger.name_to_value
        return {
            name: float(values[f"train/{name}"])
            for name in ("entropy_loss", "value_loss", "approx_kl", "explained_variance")
            if f"train/{name}" in values
        }

    def imitate(self, seen: NDArray[np.float32], shown: NDArray[np.int64], seed: int) -> float:
        """Learn to act as shown: (n, features) raw, (n,) actions -> the share it gets right.

        Smoothed labels leave it in doubt enough to try other actions afterwards.
        """
        policy, normaliser = self._model.policy, self._venv.look
        states, labels = torch.from_numpy(normaliser(seen)), torch.from_numpy(shown)
        optimizer = torch.optim.Adam(policy.parameters(), lr=self._config.rate_of_imitation)
        order = np.random.default_rng(seed)
        for _ in range(self._config.epochs):
            shuffled = order.permutation(len(labels))
            for rows in np.split(shuffled, range(IMITATED, len(labels), IMITATED)):
                logits = policy.get_distribution(states[rows]).distribution.logits
                loss = functional.cross_entropy(logits, labels[rows], label_smoothing=SMOOTH)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            chosen = policy.get_distribution(states).distribution.logits.argmax(-1)
        return float((chosen == labels).float().mean())

    def network(self) -> tuple[Network, Arrays]:
        """The actor alone; a continuous one acts by its mean."""
        policy = self._model.policy
        layers = [*policy.mlp_extractor.policy_net, policy.action_net]
        return _mlp(layers, "tanh")

    def state(self) -> dict[str, Any]:
        """Weights, the optimizer's moments and the counters."""
        model = self._model
        return {
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "timesteps": model.num_timesteps,
            "updates": model._n_updates,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        model = self._model
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        model.num_timesteps, model._n_updates = state["timesteps"], state["updates"]


class DQNAgent:
    """Deep Q-network; discrete actions only."""

    def __init__(
        self, envs: VectorEnv, decisions: int, normaliser: Normaliser, config: DQNConfig
    ) -> None:
        self._venv = VectorAdapter(envs, normaliser)
        self._steps = decisions * config.episodes
        self._config = config
        self._model = DQN(
            "MlpPolicy",
            self._venv,
            learning_rate=config.rate,
            buffer_size=config.buffer,
            learning_starts=0,
            batch_size=config.minibatch,
            gamma=1.0,
            train_freq=1,
            gradient_steps=config.gradient_steps,
            target_update_interval=max(config.target_interval, 4 * envs.num_envs),
            policy_kwargs={"net_arch": list(config.layers)},
            seed=0,
            device="cpu",
        )

    def learn(self, envs: VectorEnv, seed: int, share: float) -> dict[str, float]:
        """Epsilon-greedy episodes with updates from the replay buffer in between."""
        config, model = self._config, self._model
        span = config.explore_to - config.explore_from
        epsilon = config.explore_from + span * min(1.0, share / 0.8)
        model.exploration_schedule = lambda _: epsilon
        model.exploration_rate = epsilon
        fresh(model, self._venv, seed)
        model.learn(self._steps * envs.num_envs, reset_num_timesteps=False)
        loss = model.logger.name_to_value.get("train/loss", float("nan"))
        return {"epsilon": epsilon, "loss": float(loss)}

    def network(self) -> tuple[Network, Arrays]:
        """The online Q-network."""
        return _mlp(list(self._model.q_net.q_net), "relu")

    def state(self) -> dict[str, Any]:
        """Weights, moments, counters, and the replay buffer up to its fill."""
        model, buffer = self._model, self._model.replay_buffer
        assert buffer is not None
        size = buffer.buffer_size if buffer.full else buffer.pos
        names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
        return {
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "timesteps": model.num_timesteps,
            "updates": model._n_updates,
            "calls": model._n_calls,
            "position": buffer.pos,
            "full": buffer.full,
            "buffer": {n: torch.from_numpy(getattr(buffer, n)[:size].copy()) for n in names},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        model, buffer = self._model, self._model.replay_buffer
        assert buffer is not None
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        model.num_timesteps, model._n_updates = state["timesteps"], state["updates"]
        model._n_calls = state["calls"]
        if state["buffer"]["actions"].shape[1:] != buffer.actions.shape[1:]:
            return  # experience of another stage: the weights alone carry over
        buffer.pos, buffer.full = state["position"], state["full"]
        for name, values in state["buffer"].items():
            getattr(buffer, name)[: len(values)] = values.numpy()


def fresh(model: PPO | DQN, venv: VectorAdapter, seed: int) -> None:
    """Begin an iteration as a pure function of the seed: new episodes, new random state."""
    set_random_seed(seed)
    model.set_logger(Logger(folder=None, output_formats=[]))  # the default makes a folder a call
    model.action_space.seed(seed)
    venv.seed(seed)
    model._last_obs = None  # so that learn() resets the environments


def _mlp(layers: list[torch.nn.Module], activation: str) -> tuple[Network, Arrays]:
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    arrays: Arrays = {}
    for i, layer in enumerate(linear):
        arrays[f"layer{i}.weight"] = layer.weight.detach().numpy().astype(np.float32).copy()
        arrays[f"layer{i}.bias"] = layer.bias.detach().numpy().astype(np.float32).copy()
    sizes = [linear[0].in_features, *(layer.out_features for layer in linear)]
    assert all(a.out_features == b.in_features for a, b in itertools.pairwise(linear))
    return {"kind": "mlp", "layers": sizes, "activation": activation}, arrays
