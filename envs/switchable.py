"""SwitchableOptimizer: one optimizer for a whole Trainer run whose kind may change on the way."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from envs import optim
from envs.errors import UnknownName
from envs.knobs import OPTIMIZERS, Knobs, Optimizer


class SwitchableOptimizer(torch.optim.Optimizer):
    """AdamW, SGD with momentum or RMSprop, and a change from one to another by `switch`.

    ``Trainer(..., optimizers=(SwitchableOptimizer(model.parameters(), lr=2e-4), None))`` lets
    `tuner.callback.TunerCallback` switch. The kind is part of the state dict, so that a resumed
    run goes on with the one in use, bit for bit. A Trainer takes no ``optimizers`` together with
    ``model_init`` or FSDP: override its ``create_optimizer`` to return one of these for the
    former; under FSDP the tuner does not switch.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        kind: Optimizer = "adamw",
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        """params: weights, of which matrices alone are decayed; or groups with their own settings.

        Raises `UnknownName` on a kind that there is none of.
        """
        given: list[Any] = list(params)
        if given and not isinstance(given[0], dict):
            trained = [p for p in given if p.requires_grad]
            given = optim.group(trained, Knobs(weight_decay=weight_decay))
        given = [{"weight_decay": weight_decay, **each} for each in given if each["params"]]
        super().__init__(given, {"lr": lr})
        self._take(kind, [{**each, "lr": each.get("lr", lr)} for each in given])

    def _take(self, kind: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Go on with a fresh inner optimizer."""
        if kind not in OPTIMIZERS:
            raise UnknownName("optimizer", kind, OPTIMIZERS)
        self.kind = kind
        self._inner = optim.build(kind, groups)
        self._share()
        return self._inner

    def _share(self) -> None:
        """Schedulers, scalers and snapshots act on what the inner one has."""
        inner = self._inner
        self.param_groups, self.state, self.defaults = (
            inner.param_groups, inner.state, inner.defaults
        )  # fmt: skip

    def switch(self, kind: Optimizer) -> None:
        """Another kind from the next update on, which inherits what it can of the moments.

        Rates and decays stay as they are: a comparable rate is `envs.knobs.exchange` away.
        """
        old, before = self._inner, self.kind
        if kind == before:
            return
        own = old.defaults.keys() - {"lr", "weight_decay"}
        groups = [{k: v for k, v in group.items() if k not in own} for group in old.param_groups]
        new = self._take(kind, groups)
        optim.pass_on(old, new, before, kind)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kind": self.kind, "_inner": self._inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        return self._inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and its kind."""
        return {**self._inner.state_dict(), "kind": self.kind}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, of whichever kind; one without a kind is of the kind in use."""
        kind = state_dict.get("kind", self.kind)
        if kind != self.kind:
            self._take(kind, [{"params": group["params"]} for group in self.param_groups])
        self._inner.load_state_dict({k: v for k, v in state_dict.items() if k != "kind"})
        self._share()
