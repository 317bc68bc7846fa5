"""`GemmaCausalLM`: text in, text out, and `fit()` on text."""

import dataclasses
import pathlib
import tempfile

import keras
from keras import ops

from gemma_keras import (
    data,
    generation,
    hubs,
    loading,
    loss,
    samplers,
    saving,
    text_generation,
    trainer,
)
from gemma_keras.adaptation import Adaptation
from gemma_keras.calibration import Calibration, quantise
from gemma_keras.checkpoints import exporting
from gemma_keras.checkpoints.provenance import Provenance
from gemma_keras.packed import quantization_of
from gemma_keras.quantization import CALIBRATED


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLM(Adaptation, trainer.TokenTrainer):
    """A Gemma that predicts the next token, with everything that is done with one.

    Args:
        backbone: a `GemmaBackbone`.
        preprocessor: a `GemmaCausalLMPreprocessor`; without one, every method takes
            and gives token ids.
        logits_dtype: dtype of the logits, `"float32"` or `"compute"` for the compute
            dtype of the model, which halves their memory in bfloat16.
        kv_cache_dtype: what `generate`, `stream` and chats keep of the tokens they have
            read: `"auto"`, keys and values in the compute dtype, or `"int8"`, codes of
            8 bits. It may be set at any time, for the prompts that are read next
            (docs/kv_cache.md).

    Calling it on `{"token_ids": [B, T], "padding_mask": [B, T]}` gives logits
    [B, T, V]; `GemmaBackbone.call` lists the other inputs.
    """

    def __init__(
        self,
        backbone,
        preprocessor=None,
        logits_dtype="float32",
        kv_cache_dtype="auto",
        **kwargs,
    ):
        kwargs.setdefault("dtype", backbone.dtype_policy)
        super().__init__(autocast=False, **kwargs)
        if logits_dtype not in ("float32", "compute"):
            raise ValueError(
                f'logits_dtype must be "float32" or "compute", got {logits_dtype!r}.'
            )
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.logits_dtype = logits_dtype
        # Where the weights come from, for what is exported.
        self.provenance = Provenance()
        # What generates, and keeps the programs that were compiled for it.
        self.engine = generation.Engine(backbone)
        self.kv_cache_dtype = kv_cache_dtype
        self.built = True
        self.compile()

    @classmethod
    def from_preset(
        cls,
        source,
        dtype="auto",
        *,
        load_weights=True,
        quantize=None,
        logits_dtype="float32",
        kv_cache_dtype="auto",
        progress=None,
        **preprocessor_settings,
    ):
        """Load a model with its tokenizer.

        Args:
            source: a preset's name such as `"gemma_2b_en"` (`gemma-keras presets` lists
                them); a directory, Hugging Face's, KerasHub's or gemma_pytorch's; a
                `.gguf`, `.ckpt` or `.nemo` file; or `"kaggle://..."` or `"hf://..."`.
            dtype: a Keras dtype or policy, such as `"float32"` or `"mixed_bfloat16"`;
                `"auto"` keeps the checkpoint's.
            load_weights: false gives random weights of the same shapes.
            quantize: `"int8"` or `"int4"`, or a `Quantization` for more: keep matrices
                in so many bits, each rounded as it is read (docs/quantization.md).
            logits_dtype: as in the constructor.
            kv_cache_dtype: likewise.
            progress: called as `progress(done_bytes, total_bytes)` while weights load.
            **preprocessor_settings: arguments of `GemmaCausalLMPreprocessor`, such as
                `sequence_length`.

        Raises:
            ValueError: there is no such preset, or what is there is not a Gemma that
                can be read; `CheckpointError` if a file is damaged.
        """
        generation.check_kv_cache_dtype(kv_cache_dtype)
        with loading.open_source(source, dtype) as checkpoint:
            # The small things first: a bad tokenizer is told before gigabytes move.
            preprocessor = loading.load_preprocessor(
                checkpoint, **preprocessor_settings
            )
            backbone = loading.make_backbone(
                checkpoint, dtype, load_weights, quantize, progress
            )
            lm = cls(backbone, preprocessor, logits_dtype, kv_cache_dtype)
            if load_weights:
                lm.provenance = Provenance.of(checkpoint, source)
        return lm

    def save_to_preset(self, directory, *, overwrite=False, max_shard_size=10):
        """Write a directory that `from_preset`, ours and KerasHub's, loads again.

        The updates of the adapters in use are merged into the kernels that are written;
        a warning names adapters that are left out, and says what KerasHub would compute
        otherwise than this package.

        Args:
            directory: where to; it appears when it is complete.
            overwrite: replace a directory that is there.
            max_shard_size: largest weights file in GB; more makes shards.
        """
        # Here, since h5py costs every start and few runs write.
        from gemma_keras.checkpoints import keras_preset_writer

        contents = saving.model_contents(self)
        keras_preset_writer.save(
            directory,
            contents.config,
            contents.dtype,
            contents.tensors,
            tokenizer=contents.tokenizer,
            preprocessor_config=contents.preprocessor_config,
            packings=contents.packings,
            codes=contents.codes,
            provenance=contents.provenance,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            strict=False,
        )

    def export(self, filepath, format="tf_saved_model", **options):
        """Write the model for other programs.

        Low-rank updates are merged into the weights that are written. What the files
        are, and what becomes of the numbers, is in docs/export.md.

        Args:
            filepath: where to; it appears when it is complete.
            format: `"hf"` (Hugging Face: transformers, vLLM and others), `"gguf"`
                (llama.cpp and others), `"torch"` (gemma_pytorch), `"nemo"` (NVIDIA NeMo
                and Megatron-Bridge), `"flax"` (Google's library), `"maxtext"` or
                `"keras"` (KerasHub); or one of Keras' own, such as `"tf_saved_model"`
                and `"onnx"`, or `"torch"` for a name that ends in `.pt2`, which
                `keras.Model.export` writes. `"peft"` writes the adapter in use alone,
                as `save_adapter`, whose options it takes.
            **options: of the first seven: `dtype` to store the weights in,
                `max_shard_size` in bytes, `layout` of Flax and MaxText (`"flat"` or
                `"nested"` keys, `"scanned"` or `"unscanned"` layers), `overwrite` to
                replace an earlier export, `licence` if the weights are not under
                Gemma's terms, `progress`, called as
                `progress(done_bytes, total_bytes)`, and `report`, called with what the
                format does to the numbers. Else those of Keras.

        Returns:
            The path of what was written; None from Keras' formats.

        Raises:
            ValueError: the format cannot hold this model, or the place is taken;
                nothing is written then.
        """
        if format == "peft":
            self.save_adapter(filepath, **options)
            return pathlib.Path(filepath)
        # Keras has a "torch", too: torch.export's programs, whose names end so.
        program = format == "torch" and str(filepath).endswith(".pt2")
        if format not in exporting.FORMATS or program:
            try:
                return super().export(filepath, format=format, **options)
            except ValueError as error:
                if not str(error).startswith("Unrecognized format"):
                    raise
                known = ", ".join([*exporting.FORMATS, "peft"])
                raise ValueError(
                    f"{error} And those of gemma_keras: {known}."
                ) from None
        contents = saving.model_contents(self, options.pop("progress", None))
        return exporting.export(contents, filepath, format, **options)

    def quantize(
        self,
        mode=None,
        config=None,
        *,
        calibration=None,
        progress=None,
        type_check=True,
        **options,
    ):
        """Keep the model's matrices in few bits: `GemmaBackbone.quantize`.

        Args:
            mode: `"int8"`, `"int4"`, or `"gptq"` with a `config`.
            config: a config of Keras. Of `keras.quantizers.GPTQConfig` the dataset,
                `num_samples`, `sequence_length`, `hessian_damping` and `group_size`
                count.
            calibration: of int4, what to read so that outputs keep rather than weights
                (GPTQ): texts, pairs or chats, as `fit` takes them, or the path of a
                file of them; or a `Calibration`, which says how much of it.
            progress: called as `progress(done, total)` after each block that is
                calibrated.
            type_check: not used; Keras passes it.
            **options: `filters`, `group_size` and `embedding`, as there.

        Raises:
            ValueError: as there; or nothing to calibrate with.
        """
        if mode == "gptq":
            tokenizer = self.preprocessor and self.preprocessor.tokenizer
            calibration = Calibration.of_keras(config, tokenizer)
            mode, options = "int4", {"group_size": config.group_size, **options}
        quantization = quantization_of(mode, config, **options)
        if calibration is None:
            self.backbone.pack(quantization)
        else:
            quantise(
                self.backbone,
                quantization,
                Calibration.get(calibration),
                self.preprocessor,
                progress,
            )
            self.provenance = self.provenance.adding(CALIBRATED)
        # What was compiled reads the weights as they were.
        self.train_function = self.test_function = self.predict_function = None

    def push_to_hub(
        self, handle, format=None, *, private=True, directory=None, **options
    ):
        """Export the model, and upload that to Hugging Face or Kaggle.

        `gemma_keras.push` uploads what is on the disk already, and goes on with a push
        that was interrupted.

        Args:
            handle: `"hf://organisation/name"`, or
                `"kaggle://owner/model/framework/variation"`.
            format: as in `export`: `"hf"`, `"keras"`, `"gguf"`, or `"peft"` for the
                adapter in use alone; by default what belongs there.
            private: whether nobody else may see it.
            directory: where the export is kept; by default it is removed again.
            **options: those of `export`, of this format.

        Returns:
            The address of the model's page.

        Raises:
            ValueError: it cannot be exported so, or the hub refuses.
        """
        destination = hubs.Destination.read(handle)
        format = format or destination.format
        if format not in (*exporting.FORMATS, "peft"):
            raise ValueError(
                f"{handle}: say in which format, one of "
                f"{', '.join([*exporting.FORMATS, 'peft'])}; got {format!r}."
            )
        destination.check_login()
        with tempfile.TemporaryDirectory() as scratch:
            if directory is None:
                directory = pathlib.Path(scratch, destination.name)
            written = self.export(directory, format=format, **options)
            return hubs.push(written, handle, private=private)

    @property
    def config(self):
        """The `GemmaConfig` of the backbone."""
        return self.backbone.config

    @property
    def kv_cache_dtype(self):
        """`"auto"` or `"int8"`: in what keys and values of tokens are kept."""
        return self.engine.kv_cache_dtype

    @kv_cache_dtype.setter
    def kv_cache_dtype(self, value):
        self.engine.kv_cache_dtype = generation.check_kv_cache_dtype(value)

    def call(self, inputs, training=None):
        hidden = self.backbone(inputs, training=training)
        if self._gives_hidden:
            return hidden
        logits = self.backbone.logits(hidden)
        compute = self.logits_dtype == "compute"
        return ops.cast(logits, self.compute_dtype if compute else "float32")

    def compile(self, *args, sampler="greedy", **kwargs):
        """Set up training, as `TokenTrainer.compile`, and the default sampler.

        Args:
            *args: arguments of `TokenTrainer.compile`.
            sampler: what `generate` uses if it is not told: a name or a `Sampler`.
            **kwargs: likewise.
        """
        super().compile(*args, **kwargs)
        self.sampler = samplers.get(sampler)

    def get_compile_config(self):
        sampler = keras.saving.serialize_keras_object(self.sampler)
        return {**super().get_compile_config(), "sampler": sampler}

    def generate(
        self,
        inputs,
        max_length=None,
        *,
        max_new_tokens=None,
        stop=None,
        stop_token_ids="auto",
        strip_prompt=False,
        sampler=None,
        seed=None,
        return_log_probs=False,
        prompt_cache=None,
        speculation=None,
    ):
        """Continue prompts.

        Args:
            inputs: a string, or a chat (a list of messages), or a list of either; or,
                as KerasHub's, a dict of `token_ids` and `padding_mask` [B, T]; or a
                dataset of batches of these.
            max_length: most tokens of prompt and answer together; the preprocessor's
                `sequence_length` if neither this nor `max_new_tokens` is given.
            max_new_tokens: most tokens of the answer.
            stop: a string, or several, before which the answer ends.
            stop_token_ids: ids that end the answer; `"auto"` is `<eos>` and
                `<end_of_turn>`.
            strip_prompt: return the answer without the prompt.
            sampler: a name or a `Sampler`, in place of the one given to `compile`.
            seed: makes random choices repeatable on a backend.
            return_log_probs: return `Generation` objects, which hold the ids and
                log-probabilities of the new tokens too.
            prompt_cache: a `PromptCache`, which spares reading what a prompt has in
                common with the last one that was given it. Several prompts are then
                answered one after the other.
            speculation: guess tokens and check several in one pass, for the same answer
                sooner (docs/generation.md): `"prompt_lookup"` or a `PromptLookup`, or a
                smaller `GemmaCausalLM` or a `DraftModel` of it. Several prompts are
                then answered one after the other.

        Returns:
            The text of prompt and answer for a string, the reply for a chat, a list
            for a list; a dict of `token_ids` and `padding_mask` for a dict.

        Raises:
            ValueError: an argument is out of its range, or a prompt is too long.
        """
        settings = self._settings(
            sampler=sampler,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            seed=seed,
            speculation=speculation,
        )
        settings = dataclasses.replace(settings, return_log_probs=return_log_probs)
        if prompt_cache is not None and isinstance(
            settings.sampler, samplers.BeamSampler
        ):
            raise ValueError("Beam search takes no prompt_cache; use another sampler.")
        if isinstance(inputs, dict) and "token_ids" in inputs:
            return self._generate_from_ids(inputs, settings, strip_prompt, prompt_cache)
        if data.is_dataset(inputs):
            results = []
            for batch in inputs:
                x = batch[0] if isinstance(batch, tuple) else batch
                results += self._generate_texts(
                    x, settings, strip_prompt, prompt_cache
                )[0]
            single = False
        else:
            results, single = self._generate_texts(
                inputs, settings, strip_prompt, prompt_cache
            )
        if not return_log_probs:
            results = [result.text for result in results]
        return results[0] if single else results

    def _settings(self, **options):
        names = "sampler max_length max_new_tokens stop stop_token_ids seed speculation"
        names = names.split()
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise TypeError(
                f"Unknown option {', '.join(unknown)}; known are {', '.join(names)}."
            )
        options.setdefault("stop_token_ids", "auto")
        return text_generation.read_settings(
            self, **{name: options.get(name) for name in names}
        )

    def _generator(self):
        if self.preprocessor is None:
            raise ValueError(
                "This model has no preprocessor, so it takes no text: pass "
                '{"token_ids": ..., "padding_mask": ...}.'
            )
        return text_generation.TextGenerator(self.engine, self.preprocessor)

    def _generate_texts(self, inputs, settings, strip_prompt, prompt_cache):
        generator = self._generator()
        prompts, single = data.read_prompts(inputs)
        answers = generator.generate(prompts, settings, strip_prompt, prompt_cache)
        return answers, single

    def _generate_from_ids(self, inputs, settings, strip_prompt, prompt_cache):
        ids, mask = data.read_token_arrays(inputs)
        prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        if any(not prompt for prompt in prompts):
            raise ValueError("Each row of padding_mask must keep at least one token.")
        longest = settings.longest_prompt
        if longest is not None and max(map(len, prompts)) > longest:
            raise ValueError(
                f"The longest prompt has {max(map(len, prompts))} tokens and at most "
                f"{longest} leave room for an answer: raise max_length."
            )
        answers = text_generation.generate_ids(
            self.engine, prompts, settings, prompt_cache=prompt_cache
        )
        kept = [
            new if strip_prompt else [*prompt, *new]
            for prompt, (new, _) in zip(prompts, answers, strict=True)
        ]
        return data.pad_rows(kept, settings.max_length)

    def stream(self, prompt, *, prompt_cache=None, **options):
        """Yield the answer to one prompt, a string or a chat, as it is made.

        Args:
            prompt: a string, or a list of messages.
            prompt_cache: as in `generate`.
            **options: `max_length`, `max_new_tokens`, `stop`, `stop_token_ids`,
                `sampler`, `seed` and `speculation`, as in `generate`.

        Returns:
            An iterator of pieces of text; together they are the answer. Each has as
            many tokens as take up to 0.15 s.
        """
        settings = self._settings(**options)
        return self._generator().stream(prompt, settings, prompt_cache)

    def start_chat(self, system=None, **options):
        """Begin a conversation.

        Args:
            system: instructions, put before the user's first message.
            **options: as in `stream`, for every turn that does not set its own. With
                neither `max_length` nor `max_new_tokens`, a reply may fill what the
                model was trained for.

        Returns:
            A `ChatSession`: `send(message)` gives the reply, `stream(message)` gives
            it in pieces, `history` holds the messages.
        """

        def settings(**turn):
            merged = {**options, **turn}
            if not {"max_length", "max_new_tokens"} & set(merged):
                merged["max_length"] = self.config.max_position
            return self._settings(**merged)

        settings()
        return text_generation.ChatSession(self._generator(), settings, system)

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """What the model thinks of given tokens, in float32.

        Args:
            token_ids: integers [B, T].
            padding_mask: [B, T], true where there is a token; all of them if None.
            scoring_mode: `"logits"` [B, T, V]; `"log_probs"`, the natural logarithm of
                the probability of `target_ids` at each position [B, T]; or `"loss"`,
                its negative. Positions without a target that counts are 0.
            layer_intercept_fn: `fn(x, i)` that may look at and replace the token
                embeddings (i = -1, not yet scaled) and each block's output.
            target_ids: integers [B, T]. By default position t is scored on token
                t + 1 of `token_ids`, and the last position on nothing.

        Returns:
            A tensor of the backend.
        """
        modes = ("logits", "log_probs", "loss")
        if scoring_mode not in modes:
            raise ValueError(
                f"scoring_mode must be one of {', '.join(modes)}, got {scoring_mode!r}."
            )
        token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
        if len(token_ids.shape) != 2:
            raise ValueError(
                f"token_ids must have the shape [B, T], got {tuple(token_ids.shape)}."
            )
        inputs = {"token_ids": token_ids}
        if padding_mask is not None:
            inputs["padding_mask"] = ops.convert_to_tensor(padding_mask, dtype="bool")
        hidden = self.backbone(inputs, layer_intercept_fn=layer_intercept_fn)
        if scoring_mode == "logits":
            return ops.cast(self.backbone.logits(hidden), "float32")
        counted = inputs.get("padding_mask", ops.ones_like(token_ids, dtype="bool"))
        if target_ids is None:
            target_ids = ops.pad(token_ids[:, 1:], [[0, 0], [0, 1]])
            following = ops.pad(ops.cast(counted, "int32")[:, 1:], [[0, 0], [0, 1]])
            counted = ops.logical_and(counted, following > 0)
        target_ids = ops.convert_to_tensor(target_ids, dtype="int32")
        log_probs = loss.token_log_probs(hidden, target_ids, self.backbone)
        log_probs = ops.where(counted, log_probs, 0.0)
        return log_probs if scoring_mode == "log_probs" else -log_probs

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessor": keras.saving.serialize_keras_object(self.preprocessor),
            "logits_dtype": self.logits_dtype,
            "kv_cache_dtype": self.kv_cache_dtype,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for key in ("backbone", "preprocessor"):
            config[key] = keras.saving.deserialize_keras_object(config[key])
        return cls(**config)
