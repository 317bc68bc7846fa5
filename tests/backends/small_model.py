"""A random Gemma of some thousand weights, and the vocabulary that goes with it."""

import io

import keras
import sentencepiece

from gemma_keras import (
    GemmaBackbone,
    GemmaCausalLM,
    GemmaCausalLMPreprocessor,
    GemmaConfig,
    GemmaTokenizer,
)

CONFIG = GemmaConfig(
    vocab_size=340,
    num_layers=2,
    hidden_dim=24,
    ffn_dim=44,
    num_query_heads=6,
    num_kv_heads=2,
    head_dim=10,
    query_pre_attn_scalar=13.0,
    layer_pattern="LG",
    sliding_window=6,
    use_qk_norm=True,
    use_post_norms=True,
    max_position=512,
)

TEXT = """The cat sat on the mat and looked at the moon for a long while.
A dog came by and asked the cat what it had seen in the sky that night.
They talked of stars, of mice, of milk and of the sea until the sun came up.
Two birds sang 12 songs; the fox counted 345 leaves and the owl counted none.
"""


def train_vocabulary():
    """A serialized SentencePiece model with Gemma's layout and settings."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return out.getvalue()


def build_model(vocabulary, **settings):
    """The model; its weights make answers vary, and random ones differ from greedy."""

    def init(path):
        deviations = {"scale": 0.4, "kernel": 0.3, "embeddings": 0.12}
        return keras.initializers.RandomNormal(stddev=deviations[path.split("/")[-1]])

    tokenizer = GemmaTokenizer(vocabulary)
    assert tokenizer.vocab_size <= CONFIG.vocab_size
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=48)
    return GemmaCausalLM(GemmaBackbone(CONFIG, init=init, **settings), preprocessor)
