"""Fine-tuning jobs, and the Gymnasium view of them. Importing it registers the environments."""

import gymnasium

gymnasium.register(id="Steersman/FineTune-v0", entry_point="envs.env:FineTuneEnv")
