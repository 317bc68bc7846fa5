"""A model that never stops by itself, for what must end in another way."""

import pytest

import gemma_keras


@pytest.fixture(scope="session")
def random_preset(tmp_path_factory):
    """A directory with a random model that has the tiny presets' tokenizer."""
    from gemma_keras.checkpoints import open_checkpoint
    from gemma_keras.registry import resolve

    with open_checkpoint(resolve("gemma_tiny_instruct_en")) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    config = gemma_keras.GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        hidden_dim=32,
        ffn_dim=48,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    lm = gemma_keras.GemmaCausalLM(
        gemma_keras.GemmaBackbone(config),
        gemma_keras.GemmaCausalLMPreprocessor(tokenizer),
    )
    directory = tmp_path_factory.mktemp("presets") / "random"
    lm.save_to_preset(directory)
    return directory
