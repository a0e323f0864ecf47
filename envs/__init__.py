"""Fine-tuning jobs, and the Gymnasium view of them. Importing it registers the environments."""

import gymnasium

gymnasium.register(
    id="Steersman/FineTune-v0",
    entry_point="envs.env:FineTuneEnv",
    vector_entry_point="envs.vector:packed",
)
gymnasium.register(
    id="Steersman/Surrogate-v0", vector_entry_point="envs.surrogate:SurrogateVectorEnv"
)
gymnasium.register(id="Steersman/Trainer-v0", entry_point="envs.trainer_env:trainer_env")
