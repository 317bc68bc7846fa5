"""One run of fine-tuning, from a config to an adapter and a report."""

import contextlib
import json
import math
import pathlib
import shutil

from gemma_keras import backend, distribution, evaluation, optimizers
from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.console import loading, say, size
from gemma_keras.loading import load_preprocessor, open_source
from gemma_keras.sft import callbacks, snapshots, state, tensorboard
from gemma_keras.sft.examples import read_data
from gemma_keras.sft.folder import CHECKPOINTS, RunFolder, replace, versions
from gemma_keras.sft.progress import Progress
from gemma_keras.sft.report import write_report
from gemma_keras.sft.steps import Steps
from gemma_keras.sft.stopping import StopWhenAsked


def run(config):
    """Trains as `config` says, or goes on with a run that was not finished.

    Everything that can be wrong with the config and the data is found before a weight
    is loaded.

    Args:
        config: a `RunConfig`.

    Returns:
        The number of the signal that stopped it, or None if the run is finished.

    Raises:
        ValueError: the config does not fit the data, the model or the folder;
            `DivergenceError` if training fails by itself.
        OSError: the disk is full.
    """
    distribution.refuse_processes("gemma-keras sft")
    if config.devices == "all":
        distribution.use_all_devices(config.batch_size)
    with open_source(config.preset) as checkpoint:
        config = config.resolved(
            checkpoint.config, checkpoint.dtype, checkpoint.packings
        )
        preprocessor = load_preprocessor(checkpoint)
    if preprocessor is None:
        raise ValueError(f"{config.preset} holds no tokenizer.")
    folder = RunFolder(config)
    if folder.status == "finished":
        say(f"The run in {folder.path} is finished. To train anew, name another out.")
        _say_what_is_there(config, folder)
        return None
    _check_surroundings(config, folder)
    data = read_data(config, preprocessor, say)
    with folder.locked():
        folder.start(data.files)
        try:
            return _Run(config, folder, data).go()
        except BaseException as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            # The disk may be what failed.
            with contextlib.suppress(OSError):
                folder.update(status=f"failed: {reason}")
                _report(folder)
            raise


def _check_surroundings(config, folder):
    if config.tensorboard:
        tensorboard.check_installed()
    taken = config.save_preset and pathlib.Path(config.save_preset).exists()
    # One that was begun may have written it already.
    if taken and folder.status == "new":
        raise ValueError(
            f"save_preset: {config.save_preset} exists; name a new folder."
        )


class _Run:
    """The parts of one run, and their order."""

    def __init__(self, config, folder, data):
        self.config, self.folder, self.data = config, folder, data

    def go(self):
        config = self.config
        backend.set_seed(config.seed)
        total = Steps(self.data.train, config.epochs, **self._lengths()).total
        self.lm = self._model(total)
        self._make_callbacks(total)
        done = self.checkpoints.restore(self.lm)
        steps = Steps(self.data.train, config.epochs, start=done, **self._lengths())
        self.metrics.steps = steps
        if done:
            say(f"Going on after step {done:,} of {total:,}.")
        else:
            self._say_plan(steps)
        self._note_versions()
        if not done:
            self._match("before")
        stopped = None
        if done < total and not (self.validation and self.validation.has_stopped):
            stopped = self._fit(steps)
        if stopped is not None:
            self.folder.update(status="stopped")
            _report(self.folder)
            say(
                f"Stopped, and saved after step {self.checkpoints.saved:,} of "
                f"{total:,}. The same command goes on from there."
            )
            return stopped
        self._finish()
        return None

    def _lengths(self):
        return {
            "accumulation": self.config.accumulation,
            "max_steps": self.config.max_steps,
        }

    def _model(self, total):
        config = self.config
        with loading(config.preset) as progress:
            lm = GemmaCausalLM.from_preset(
                config.preset,
                dtype=config.dtype,
                quantize=config.quantize,
                progress=progress,
            )
        if not config.full:
            lm.enable_lora(
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_targets or None,
                rslora=config.rslora,
                dora=config.dora,
            )
        rate = optimizers.make_schedule(
            config.schedule, config.learning_rate, total, config.warmup
        )
        optimizer = optimizers.make_optimizer(
            config.optimizer,
            rate,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm or None,
            lora_plus_ratio=config.lora_plus_ratio,
        )
        lm.compile(
            optimizer=optimizer,
            gradient_accumulation_steps=config.accumulation,
            remat=config.remat,
        )
        trained = sum(math.prod(v.shape) for v in lm.trainable_weights)
        count = trained * (not config.full) + lm.config.num_parameters
        say(f"{trained:,} of {count:,} parameters are trained.")
        self.folder.info |= {"trainable": trained, "parameters": count}
        return lm

    def _make_callbacks(self, total):
        config, path = self.config, self.folder.path
        epoch = max(1, round(len(self.data.train) / config.accumulation))
        every = config.validate_every or epoch
        self.metrics = callbacks.StepMetrics()
        self.validation = None
        found = [self.metrics]
        if self.data.validation is not None:
            self.validation = callbacks.Validation(
                self.data.validation,
                every,
                patience=config.early_stopping,
                last=total,
                tell=self._note_before,
            )
            found.append(self.validation)
        if config.sample_prompts:
            found.append(
                callbacks.Samples(
                    path / "samples.jsonl",
                    self._prompts(),
                    config.sample_every or every,
                    max_new_tokens=config.sample_tokens,
                    last=total,
                )
            )
        found.append(callbacks.MetricsFile(path / "metrics.csv"))
        if config.tensorboard:
            found.append(tensorboard.TensorBoard(path / "tensorboard"))
        found += [Progress(total), callbacks.StopOnDivergence()]
        self.checkpoints = callbacks.Checkpoints(
            path / CHECKPOINTS,
            config.save_every,
            keep=config.keep,
            callbacks=found,
            last=total,
            say=say,
        )
        self.callbacks = [*found, self.checkpoints]

    def _prompts(self):
        prompts = self.config.sample_prompts
        if not self.data.chat:
            return list(prompts)
        return [[{"role": "user", "content": prompt}] for prompt in prompts]

    def _say_plan(self, steps):
        needed = sum(
            math.prod(shape) * kind.itemsize
            for shape, kind, _ in state.collect(self.lm).values()
        )
        kept = (self.config.keep + 1) * needed
        say(
            f"{steps.total:,} steps, {steps.steps_per_epoch:g} an epoch; each "
            f"checkpoint takes {size(needed)}."
        )
        free = shutil.disk_usage(self.folder.path).free
        if kept > free:
            raise OSError(
                f"{self.config.keep + 1} checkpoints take {size(kept)} and the disk of "
                f"{self.folder.path} has {size(free)} left: make room, lower keep, or "
                "name another folder with out."
            )

    def _note_before(self, measured):
        self.folder.update(before=measured)
        say(f"Before training: {callbacks.described(measured)}")

    def _note_versions(self):
        self.folder.update(versions=versions(backend.description()))

    def _fit(self, steps):
        with StopWhenAsked(self.checkpoints, say) as stopper:
            try:
                self.lm.fit(
                    steps,
                    shuffle=False,
                    verbose=0,
                    callbacks=[*self.callbacks, stopper],
                )
            except callbacks.DivergenceError as error:
                told = f"{error}\n{self._what_is_left()}"
                raise callbacks.DivergenceError(told) from error
            except OSError as error:
                # That of a checkpoint is explained already.
                if not snapshots.tells_of_full_disk(error) or error.strerror is None:
                    raise
                advice = snapshots.how_to_go_on(self.checkpoints.folder)
                told = f"The disk of {self.folder.path} is full. {advice}"
                raise OSError(told) from error
            finally:
                for callback in self.callbacks:
                    callback.close()
        finished = self.checkpoints.saved == steps.total
        return None if finished else stopper.signal

    def _what_is_left(self):
        """What a run that failed has to go on from, and what is allowed then."""
        if self.checkpoints.saved is None:
            return (
                "Nothing was saved, as there was no checkpoint yet: the command with "
                f"other options begins anew in {self.folder.path}."
            )
        return (
            f"The checkpoint of step {self.checkpoints.saved:,} is kept. From it the "
            "same options would lead here again, and others are for a new run: name "
            "another folder with out."
        )

    def _match(self, when):
        """Has validation examples answered, and notes how many are right."""
        if not self.config.exact_match:
            return
        examples = self.data.validation.examples
        count = min(self.config.exact_match, len(examples))
        found = evaluation.exact_match(self.lm, [examples[i] for i in range(count)])
        answers = found.pop("answers")
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        replace(self.folder.path / f"answers_{when}.jsonl", "".join(lines))
        self.folder.update(
            exact_match={**self.folder.info.get("exact_match", {}), when: found}
        )
        of = f"{found['right']} of {found['asked']} answers"
        say(f"Right to the letter, {when}: {of}.")

    def _finish(self):
        config = self.config
        if self.validation is not None and config.early_stopping:
            step = self.checkpoints.restore(self.lm, best=True)
            say(f"Back to the weights of step {step:,}, the best on validation data.")
        # Half written by one that was killed; the lock keeps out others.
        result = result_of(config)
        for path in result.parent.glob(f".{result.name}.*"):
            shutil.rmtree(path, ignore_errors=True)
        if config.full:
            self.lm.save_to_preset(result, overwrite=True)
        else:
            self.lm.save_adapter(result, overwrite=True)
        if config.save_preset:
            self.lm.save_to_preset(config.save_preset, overwrite=True)
        self._match("after")
        self.folder.update(status="finished")
        _report(self.folder)
        _say_what_is_there(config, self.folder)


def _report(folder):
    if (folder.path / "metrics.csv").exists():
        write_report(folder.path)


def result_of(config):
    """Path of what a finished run leaves: its adapter, or its model."""
    return pathlib.Path(config.out) / ("model" if config.full else "adapter")


def _say_what_is_there(config, folder):
    chat = f"gemma-keras chat {config.preset} --adapter {result_of(config)}"
    if config.full or config.save_preset:
        chat = f"gemma-keras chat {config.save_preset or result_of(config)}"
    say(f"Curves and samples: {folder.path / 'report.html'}")
    say(f"Talk with it:       {chat}")
