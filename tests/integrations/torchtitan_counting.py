"""A small Llama that learns to count, as a module of torchtitan's --module and --config."""

from __future__ import annotations

from datasets import Dataset  # type: ignore[attr-defined] # for mypy that of the benchmarks
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

_WORDS = 64


def _texts(_: str) -> Dataset:
    rows = [[(start + i * (1 + start % 3)) % 50 for i in range(64)] for start in range(256)]
    return Dataset.from_dict({"text": [" ".join(map(str, row)) for row in rows]})


DATASETS["counting"] = DatasetConfig(
    path="", loader=_texts, sample_processor=lambda sample: sample["text"]
)


def save_tokenizer(path: str) -> None:
    words = {"[UNK]": 50, **{str(number): number for number in range(50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(path)


def counting() -> Trainer.Config:
    spec = model_registry("debugmodel")
    model = spec.model
    del model.layers[1:]
    # the others of torchtitan's want a GPU
    model.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    model.vocab_size = model.tok_embeddings.num_embeddings = model.lm_head.out_features = _WORDS
    return Trainer.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=_WORDS)),
        model_spec=spec,
        optimizer=default_adamw(lr=3e-3),
        training=TrainingConfig(
            local_batch_size=2, seq_len=32, steps=20, mixed_precision_param="float32"
        ),
        parallelism=ParallelismConfig(data_parallel_replicate_degree=2),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="counting"),
        checkpoint=CheckpointManager.Config(enable=True, interval=10, last_save_model_only=False),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
        debug=DebugConfig(seed=0),
    )
