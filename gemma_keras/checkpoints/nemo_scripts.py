"""Scripts that take a Hugging Face directory into NVIDIA's programs and train it there.

One for NeMo 2, one for Megatron-Bridge; each imports the directory that it lies in, and
starts a fine-tuning with LoRA.
"""

from gemma_keras.registry import architecture_like

NEMO2, BRIDGE = "finetune_nemo2.py", "finetune_bridge.py"
USE = """\
The files are those of a Hugging Face model: transformers and vLLM load the directory
too. The scripts import it and start a fine-tuning with LoRA on `DATA/training.jsonl`
and `DATA/validation.jsonl`, a line each `{"input": "...", "output": "..."}`. They need
a GPU and NVIDIA's container.

With Megatron-Bridge (`nvcr.io/nvidia/nemo:25.09` and later; Gemma 1 up to version 0.6):

```bash
python PATH/finetune_bridge.py import OUT
torchrun --nproc-per-node=1 PATH/finetune_bridge.py finetune OUT DATA
```

With NeMo 2 (containers up to 25.x), if there is a script for it:

```bash
python PATH/finetune_nemo2.py import OUT
torchrun --nproc-per-node=1 PATH/finetune_nemo2.py finetune OUT DATA
```
"""
# What NeMo 2's importers take for granted, whatever config.json says.
_NEMO2_HEAD, _NEMO2_GEMMA3_LAYERS = 256, 26
_CLASSES = {
    "gemma": ("GemmaModel", "GemmaConfig"),
    "gemma2": ("Gemma2Model", "Gemma2Config"),
    "gemma3": ("Gemma3Model", "Gemma3Config1B"),
}
_ARGUMENTS = """\
def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["import", "finetune"])
    parser.add_argument("out", type=pathlib.Path, help="Where the results go.")
    parser.add_argument("data", nargs="?", help="Directory with training.jsonl.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="Longest example.")
    parser.add_argument("--devices", type=int, default=1, help="GPUs.")
    found = parser.parse_args()
    if found.step == "finetune" and found.data is None:
        parser.error("finetune needs DATA.")
    return found
"""
_NEMO2_SCRIPT = '''\
"""Imports this Gemma into NVIDIA NeMo 2, and fine-tunes it with LoRA.

    python finetune_nemo2.py import OUT
    torchrun --nproc-per-node=1 finetune_nemo2.py finetune OUT DATA
"""

import argparse
import pathlib

HERE = pathlib.Path(__file__).resolve().parent


{arguments}

def make_model(llm, tokenizer=None):
    config = llm.{config}({fields})
    return llm.{model}(config, tokenizer=tokenizer)


def main():
    options = arguments()
    from nemo.collections import llm

    imported = options.out / "imported"
    if options.step == "import":
        llm.import_ckpt(
            model=make_model(llm), source=f"hf://{{HERE}}", output_path=imported
        )
        return
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import (
        AutoTokenizer,
    )

    tokenizer = AutoTokenizer(str(HERE))
    optimizer = OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=True, use_distributed_optimizer=True
    )
    llm.finetune(
        model=make_model(llm, tokenizer),
        data=llm.FineTuningDataModule(
            dataset_root=options.data,
            seq_length=options.length,
            tokenizer=tokenizer,
            micro_batch_size=1,
            global_batch_size=options.batch_size,
            # Gemma wants <bos> in front.
            dataset_kwargs={{"add_bos": True}},
        ),
        trainer=nl.Trainer(
            accelerator="gpu",
            devices=options.devices,
            max_steps=options.steps,
            strategy=nl.MegatronStrategy(),
            plugins=nl.MegatronMixedPrecision(precision="bf16-mixed"),
        ),
        peft=llm.peft.LoRA(),
        optim=nl.MegatronOptimizerModule(config=optimizer),
        log=nl.NeMoLogger(log_dir=str(options.out), name="lora"),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(imported))),
    )


# NeMo starts processes that import this file.
if __name__ == "__main__":
    main()
'''
_BRIDGE_SCRIPT = '''\
"""Imports this Gemma into Megatron with Megatron-Bridge, and fine-tunes it with LoRA.

    python finetune_bridge.py import OUT
    torchrun --nproc-per-node=1 finetune_bridge.py finetune OUT DATA
"""

import argparse
import pathlib

HERE = pathlib.Path(__file__).resolve().parent


{arguments}

def main():
    options = arguments()
    from megatron.bridge import AutoBridge

    imported = str(options.out / "imported")
    if options.step == "import":
        AutoBridge.import_ckpt(hf_model_id=str(HERE), megatron_path=imported)
        return
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.recipes.utils.optimizer_utils import (
        distributed_fused_adam_with_cosine_annealing,
    )
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        FinetuningDatasetConfig,
        LoggerConfig,
        RNGConfig,
        TokenizerConfig,
        TrainingConfig,
    )
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    bridge = AutoBridge.from_hf_pretrained(str(HERE))
    model = bridge.to_megatron_provider(load_weights=False)
    model.seq_length = options.length
    optimizer, scheduler = distributed_fused_adam_with_cosine_annealing(
        lr_warmup_iters=min(50, options.steps // 10),
        lr_decay_iters=options.steps,
        max_lr=1e-4,
        min_lr=0.0,
    )
    finetune(
        config=ConfigContainer(
            model=model,
            train=TrainingConfig(
                train_iters=options.steps,
                global_batch_size=options.batch_size,
                micro_batch_size=1,
            ),
            optimizer=optimizer,
            scheduler=scheduler,
            dataset=FinetuningDatasetConfig(
                dataset_root=options.data,
                seq_length=options.length,
                # Gemma wants <bos> in front.
                dataset_kwargs={{"add_bos": True}},
                do_test=False,
            ),
            logger=LoggerConfig(log_interval=10),
            tokenizer=TokenizerConfig(
                tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(HERE)
            ),
            checkpoint=CheckpointConfig(
                pretrained_checkpoint=imported,
                save=str(options.out / "lora"),
                save_interval=max(1, options.steps // 10),
            ),
            peft=LoRA(),
            mixed_precision="bf16_mixed",
            rng=RNGConfig(seed=1234),
        ),
        forward_step_func=forward_step,
    )


if __name__ == "__main__":
    main()
'''


def write(folder, contents):
    """Writes the scripts beside the model.

    Returns:
        A sentence for everything that a user misses there.
    """
    config, told = contents.config, []
    script = _BRIDGE_SCRIPT.format(arguments=_ARGUMENTS)
    (folder / BRIDGE).write_text(script, "utf-8")
    if reason := _nemo2_cannot(config):
        told.append(f"There is no {NEMO2}: {reason}.")
    else:
        (folder / NEMO2).write_text(_nemo2_script(config), "utf-8")
    if contents.tokenizer is None:
        told.append(
            "There is no tokenizer, which NVIDIA's programs ask for: put the files of "
            "Hugging Face's beside the weights."
        )
    return told


def _nemo2_cannot(config):
    """Why NeMo 2 cannot import this Gemma; None if it can."""
    if config.head_dim != _NEMO2_HEAD:
        return f"NeMo 2 imports a Gemma with heads of {_NEMO2_HEAD} only"
    if config.family != "gemma3":
        return None
    known = architecture_like(config)
    if known is None or known.num_layers != _NEMO2_GEMMA3_LAYERS:
        return "of text-only Gemma 3, NeMo 2 imports 1B only"
    return None


def _nemo2_script(config):
    model, kind = _CLASSES[config.family]
    fields = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "ffn_hidden_size": config.ffn_dim,
        "num_attention_heads": config.num_query_heads,
        "num_query_groups": config.num_kv_heads,
        "seq_length": config.max_position,
    }
    if config.family == "gemma2":
        fields["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    # The class of 1B says all of that.
    fields = {} if config.family == "gemma3" else fields
    lines = "".join(f"\n        {key}={value}," for key, value in fields.items())
    return _NEMO2_SCRIPT.format(
        arguments=_ARGUMENTS,
        model=model,
        config=kind,
        fields=f"{lines}\n    " if lines else "",
    )
