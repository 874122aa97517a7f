"""A Llama of 23 M parameters to measure quantisation on: weights that no one has quantised before.

    python -m tritonmind_tools.bench.train_small_llama prepare ShareGPT_V3_unfiltered_cleaned_split.json data
    python -m tritonmind_tools.bench.train_small_llama train data small-llama --seconds 150

`prepare` parts the conversations into `train.json` and `heldout.json`, trains a byte-level BPE of 8192 tokens on the
first, and writes both as token ids. `train` needs a GPU and takes the time it is given: next-token prediction over
windows of packed conversations, AdamW, bf16 arithmetic on fp32 weights, one cosine. It writes a Hugging Face folder
with fp16 weights. Sizes are such that groups of 32, 64 and 128 divide every matrix.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from tritonmind.chat_template import load_chat_template
from tritonmind.errors import ConfigError, TritonmindError
from tritonmind.tokenizer import Tokenizer
from tritonmind.vocabularies.base import TOKENIZER_CONFIG_FILE
from tritonmind.vocabularies.library import TOKENIZER_FILE
from tritonmind_tools.text_data import as_document, encode, read_documents, read_entries, render

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 8192
BOS, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
WINDOW, BATCH = 1024, 64  # tokens of a window, windows of a step
PEAK_RATE, WARM_UP_STEPS, WEIGHT_DECAY = 2e-3, 100, 0.1
# The schedule needs the number of steps, and that the time of one: measured between these, before the rate's peak.
TIMED_STEPS = (10, 40)
SAVING_SECONDS = 12
HELDOUT_WINDOWS = 256
HELDOUT_SHARE = 50  # of so many conversations one is held out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_small_llama", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    preparing = commands.add_parser("prepare", help="part conversations, train a tokenizer, write token ids")
    preparing.add_argument("conversations", type=Path, help="ShareGPT's JSON, cut off or not")
    preparing.add_argument("data", type=Path, help="folder to make")
    preparing.set_defaults(run=lambda args: prepare(args.conversations, args.data))
    training = commands.add_parser("train", help="train on a GPU, for a given time")
    training.add_argument("data", type=Path, help="what prepare made")
    training.add_argument("output", type=Path, help="Hugging Face folder to make")
    training.add_argument("--seconds", type=float, default=150, help="of the whole command (default: 150)")
    training.add_argument("--steps", type=int, help="so many steps instead")
    training.add_argument("--no-compile", action="store_true", help="without torch.compile: slower steps")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(
        run=lambda args: train(
            args.data, args.output, args.steps or args.seconds, seed=args.seed, compiled=not args.no_compile
        )
    )
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (TritonmindError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(conversations: Path, data: Path) -> None:
    """Write train.json, heldout.json, the tokenizer's files, train.npy and heldout.npy (uint16) into a new folder."""
    data.mkdir(parents=True)
    part(conversations, data)
    train_tokenizer(data)
    tokenizer = Tokenizer.from_dir(data)
    template = load_chat_template(data, tokenizer.special_tokens)
    for name in ("train", "heldout"):
        ids: list[np.ndarray] = []
        for document in read_documents(data / f"{name}.json"):
            ids.append(np.array(encode(document, tokenizer, template), np.uint16))
        tokens = np.concatenate(ids)
        np.save(data / f"{name}.npy", tokens)
        print(f"{name}: {len(ids)} conversations, {len(tokens) / 1e6:.1f} M tokens")


def part(conversations: Path, data: Path) -> None:
    """One of HELDOUT_SHARE conversations into heldout.json, the others into train.json, as ShareGPT has them.

    Long conversations are cut into entries `ID_0`, `ID_1` ...: all of one go into one file.
    """
    parts: dict[str, list[Any]] = {"train": [], "heldout": []}
    for entry in read_entries(conversations):
        if not isinstance(as_document(entry), list):
            continue
        conversation = str(entry.get("id")).partition("_")[0]
        held_out = int(hashlib.sha256(conversation.encode()).hexdigest(), 16) % HELDOUT_SHARE == 0
        parts["heldout" if held_out else "train"].append(entry)
    for name, entries in parts.items():
        if not entries:
            raise ConfigError(f"{conversations}: no conversations of ShareGPT for {name}.json")
        (data / f"{name}.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def train_tokenizer(data: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, ChatML's turns behind the token that begins a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, TURN_BEGIN, TURN_END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((render(document, None) for document in read_documents(data / "train.json")), trainer)
    backend.save(str(data / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": TURN_END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (data / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def train(
    data: Path, output: Path, budget: float | int, *, seed: int = 0, compiled: bool = True, device: str = "cuda"
) -> None:
    """Train, print the held-out perplexity, and write the Hugging Face folder.

    budget: an int is a number of steps, a float the seconds that all of it may take.
    """
    started = time.monotonic()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training needs a GPU: there is none")
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    if compiled:
        # Layer by layer: one compilation serves all of them.
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    tokens = torch.from_numpy(np.load(data / "train.npy").astype(np.int32)).to(device)
    _fit(model, _windows(tokens, seed), started, budget)
    heldout = torch.from_numpy(np.load(data / "heldout.npy").astype(np.int64)).to(device)
    print(f"held-out perplexity {math.exp(_heldout_loss(model, heldout)):.2f}, {time.monotonic() - started:.0f} s")
    model.half().save_pretrained(output, max_shard_size="14MB")
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        shutil.copy(data / name, output / name)


def learning_rate(step: int, num_steps: int) -> float:
    """A linear rise, then half a cosine down to nothing."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, num_steps - WARM_UP_STEPS)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _fit(model: Any, windows: Iterator[torch.Tensor], started: float, budget: float | int) -> None:
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    step, timed_from = 0, 0.0
    num_steps = budget if isinstance(budget, int) else sys.maxsize
    while step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        loss = _loss(model, next(windows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if isinstance(budget, float) and step in TIMED_STEPS:
            loss.item()  # waits for the device
            now = time.monotonic()
            if step == TIMED_STEPS[1]:
                step_time = (now - timed_from) / (step - TIMED_STEPS[0])
                num_steps = step + int((started + budget - SAVING_SECONDS - now) / step_time)
                print(f"{num_steps} steps of {step_time * 1e3:.1f} ms, begun after {timed_from - started:.0f} s")
            timed_from = now
        if step % 100 == 0 or step == num_steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def _windows(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Batches [BATCH, WINDOW + 1] without end: every epoch all of the text, cut elsewhere, in another order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        num_windows = (len(tokens) - offset - 1) // WINDOW
        order = torch.randperm(num_windows, generator=generator).to(tokens.device)
        within = torch.arange(WINDOW + 1, device=tokens.device)
        for chosen in order.split(BATCH):
            if len(chosen) == BATCH:  # one shape, compiled once
                yield tokens[offset + chosen[:, None] * WINDOW + within].long()


def _loss(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over windows [n, WINDOW + 1], nats."""
    import torch

    # A CPU, on which only tests train, is slow in bf16.
    with torch.autocast("cuda", torch.bfloat16, enabled=windows.is_cuda):
        logits = model(windows[:, :-1].contiguous(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def _heldout_loss(model: Any, tokens: torch.Tensor) -> float:
    import torch

    num_windows = min(HELDOUT_WINDOWS, (len(tokens) - 1) // WINDOW) // BATCH * BATCH
    starts = torch.arange(num_windows, device=tokens.device)[:, None] * WINDOW
    windows = tokens[starts + torch.arange(WINDOW + 1, device=tokens.device)]
    with torch.no_grad():
        return float(torch.stack([_loss(model, batch) for batch in windows.split(BATCH)]).mean())


if __name__ == "__main__":
    sys.exit(main())
