"""The public models under the names that KerasHub's users know."""

from gemma_keras.backbone import GemmaBackbone
from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.preprocessor import GemmaCausalLMPreprocessor
from gemma_keras.tokenizer import GemmaTokenizer

__all__ = [
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaTokenizer",
]
