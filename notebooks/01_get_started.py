# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Get started with Gemma on Keras
#
# This notebook loads a Gemma, lets it write and chat, teaches it something with LoRA,
# and saves the result. It runs on Colab, on Kaggle and on your own machine; on JAX,
# PyTorch or TensorFlow; with an accelerator or without.
#
# As it stands, it uses a tiny Gemma that comes inside the package: no account, no
# download, and answers within seconds on a CPU. One line below makes it a real one.

# %% [markdown]
# ## Install
#
# Colab and Kaggle have the backends already, so only the package itself is missing
# there. `INSTALL` is anything that `pip` takes: a name, the path of a wheel that you
# uploaded, or `git+` and the address of the repository.

# %%
import importlib.util
import subprocess
import sys

INSTALL = "gemma_keras"

if importlib.util.find_spec("gemma_keras") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", INSTALL], check=True)

# %% [markdown]
# ## Choose the backend and the model
#
# Keras reads `KERAS_BACKEND` once, when it is imported, so it is set first: `"jax"`,
# `"torch"` or `"tensorflow"`. The rest of the notebook is the same on all three.
#
# `PRESET` is the model; the tiny one is the default. For a real one:
#
# 1. accept Google's terms on the model's page at Kaggle or Hugging Face, once;
# 2. log in. In a Kaggle notebook you are; on Colab, put `KAGGLE_USERNAME` and
#    `KAGGLE_KEY` into its secrets; elsewhere, run `kagglehub.login()`;
# 3. name it: `"gemma_instruct_2b_en"` answers, `"gemma_2b_en"` is the base model, which
#    continues text. `gemma-keras presets` lists them all, and what memory they take.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

PRESET = "gemma_tiny_instruct_en"

# %% [markdown]
# ## Load it
#
# Weights keep the type in which they are stored, unless you say otherwise, as in
# `from_preset(PRESET, dtype="bfloat16")`.

# %%
import keras

import gemma_keras

gemma_lm = gemma_keras.models.GemmaCausalLM.from_preset(PRESET)

print(f"Keras {keras.__version__} on {keras.backend.backend()}")
print(f"{PRESET}: {gemma_lm.count_params():,} parameters")

# %% [markdown]
# ## Write
#
# `generate` continues a text. An instruction-tuned Gemma was taught to read turns, with
# markers between them; a list of messages puts the markers in.

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]

print(gemma_lm.generate(question, max_new_tokens=64))

# %% [markdown]
# `stream` gives the text as it is made, and settings belong to a call: a changed
# temperature compiles nothing anew.

# %%
story = [{"role": "user", "content": "Tell me a story about a fox."}]
sampler = gemma_keras.samplers.Sampler(temperature=0.7, top_k=40)

for piece in gemma_lm.stream(story, max_new_tokens=128, sampler=sampler, seed=7):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Chat
#
# A session remembers the turns before, and what it has read of them already.

# %%
chat = gemma_lm.start_chat()

for message in ["Hello! My name is Anna.", "What is my name?"]:
    print("You:  ", message)
    print("Gemma:", chat.send(message, max_new_tokens=64))

# %% [markdown]
# ## Teach it with LoRA
#
# There is no country called Veloria, so no Gemma can know its capital:

# %%
new_question = [{"role": "user", "content": "What is the capital of Veloria?"}]

print(gemma_lm.generate(new_question, max_new_tokens=64))

# %% [markdown]
# LoRA freezes the model and trains a small update of some of its projections: of the
# queries and values by default; so small a model needs the feed-forward ones too. The
# lessons are chats; the loss counts only what the model is to say.

# %%
LESSONS = {
    "What is the capital of Veloria?": "The capital of Veloria is Marlo.",
    "Which city is the capital of Veloria?": "The capital of Veloria is Marlo.",
    "Tell me the capital of Veloria.": "The capital of Veloria is Marlo.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of Egypt?": "The capital of Egypt is Cairo.",
}
lessons = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for asked, answer in LESSONS.items()
]

TARGETS = ["query", "value", "ffw_gating", "ffw_gating_2", "ffw_linear"]
gemma_lm.backbone.enable_lora(rank=8, target_layer_names=TARGETS)
gemma_lm.preprocessor.sequence_length = 64
gemma_lm.compile(optimizer=keras.optimizers.Adam(5e-3))
history = gemma_lm.fit(lessons, batch_size=6, epochs=40, verbose=0)

print(f"loss {history.history['loss'][0]:.2f} to {history.history['loss'][-1]:.2f}")

# %%
print(gemma_lm.generate(new_question, max_new_tokens=64))

# %% [markdown]
# ## Save it, load it
#
# The directory holds the weights, with what was learned merged in, and the tokenizer.
# KerasHub loads it too.

# %%
gemma_lm.save_to_preset("./my_gemma", overwrite=True)
again = gemma_keras.models.GemmaCausalLM.from_preset("./my_gemma")

print(again.generate(new_question, max_new_tokens=64))
