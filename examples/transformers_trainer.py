"""The Trainer of Hugging Face Transformers with top-Q gradients, in its own checkpoints.

torchrun --nproc-per-node 2 examples/transformers_trainer.py FOLDER teaches a small GPT-2 to count
in two processes on this machine; with a checkpoint behind FOLDER, such as FOLDER/checkpoint-40, it
goes on from there.
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from topq_dist.integrations.transformers import TopQCallback

folder, resume = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
set_seed(0)
sizes = {"n_layer": 1, "n_head": 2, "n_embd": 64, "n_positions": 16}
tokens = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
rows = [(number + torch.arange(16) * (1 + number % 3)) % 50 for number in range(1024)]
arguments = TrainingArguments(
    folder,
    max_steps=80,
    save_steps=40,
    logging_steps=20,
    learning_rate=3e-3,
    ddp_find_unused_parameters=False,
    use_cpu=True,
    report_to="none",
)
data = [{"input_ids": row, "labels": row} for row in rows]
trainer = Trainer(model, arguments, train_dataset=data)
topq = TopQCallback(trainer, exchange="allgather", resume_from=resume)
trainer.add_callback(topq)
trainer.train(resume_from_checkpoint=resume)
if trainer.is_world_process_zero() and topq.state is not None:
    stats = topq.state.stats()
    print(f"{stats.steps} steps with {stats.ratio:.0f} times fewer bytes")
