"""Train the demo model: a byte-level BPE tokenizer and a small Llama, from the text that CPython carries.

The same CPython, torch, device and number of threads give the same bytes. The folder appears whole or not at all.

    python demo/train.py --out demo/model               the shipped model (half an hour on two cores)
    python demo/train.py --out /tmp/model --steps 20    a short run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch loads: reproducible products on a GPU

import torch
import torch.nn.functional as F
from corpus import Corpus, Document, build, difference
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 2048
MAX_POSITIONS = 1024
WINDOW_TOKENS = 512  # of the held-out measure

CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}\n"
    "{{- '<|endoftext|>' if message['role'] == 'assistant' else '\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}\n"
)

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW with warm-up and a cosine to zero; short windows first, the whole context in the last part."""

    steps: int = 2600
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    warmup_steps: int = 150
    weight_decay: float = 0.5  # of matrices; strong, since the corpus is seen four times
    clip_norm: float = 1.0
    short_window: int = 256  # attention costs half as much as at 512
    long_share: float = 0.2  # of the steps, with windows of MAX_POSITIONS
    threads: int = 2
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = (step + 1) / max(1, min(self.warmup_steps, self.steps // 2))
        return self.learning_rate * min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def window(self, step: int) -> int:
        """Tokens of each training window at a step."""
        return self.short_window if step < round(self.steps * (1 - self.long_share)) else MAX_POSITIONS


def train_tokenizer(documents: Iterable[Document]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens: any text goes through it and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents if d.source != "chat"), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> torch.Tensor:
    """All documents in a row, int64 [tokens], END after each."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer.encode(document.text).ids, end]
    return torch.tensor(ids)


def make_model(seed: int) -> LlamaForCausalLM:
    """The untrained model, float32; every width is divisible by 128."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, x_BT: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of each token but the first of every row; the products run in bf16."""
    with torch.autocast(x_BT.device.type, torch.bfloat16):
        logits_BTV = model(input_ids=x_BT[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), x_BT[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokens: torch.Tensor, windows: int | None = None) -> float:
    """Mean loss over the windows of WINDOW_TOKENS that fill the text, or over the first `windows` of them."""
    count = min(len(tokens) // WINDOW_TOKENS, windows or len(tokens))
    rows = tokens[: count * WINDOW_TOKENS].view(count, WINDOW_TOKENS)
    total = sum(loss_of(model, batch, reduction="sum").item() for batch in rows.split(8))
    return total / (count * (WINDOW_TOKENS - 1))


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def fit(model: LlamaForCausalLM, tokens: torch.Tensor, heldout: torch.Tensor, recipe: Recipe, log: Log) -> float:
    """Train the model in place; returns the mean training loss of the last hundred steps."""
    device = model.device
    optimizer = optimizer_for(model, recipe)
    draw = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(recipe.steps):
        window = recipe.window(step)
        starts = torch.randint(len(tokens) - window, (max(1, recipe.tokens_per_step // window),), generator=draw)
        batch = torch.stack([tokens[s : s + window + 1] for s in starts.tolist()]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            held = heldout_loss(model, heldout, windows=32)
            log(f"step {step + 1}: train {recent:.4f} held-out {held:.4f} after {time.monotonic() - started:.0f} s")
    return sum(losses[-100:]) / len(losses[-100:])


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """What AutoTokenizer and an OpenAI-compatible server read."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def train(corpus: Corpus, recipe: Recipe, device: str, out: Path, log: Log) -> dict[str, object]:
    """Train tokenizer and model into the folder `out`; returns what TRAINING.json says."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # 5 % of the time, and nothing here reads such memory
    torch.set_num_threads(recipe.threads)
    started = time.monotonic()
    tokenizer = train_tokenizer(corpus.train)
    tokens = encode(tokenizer, corpus.train)
    heldout = torch.tensor(tokenizer.encode(corpus.heldout).ids).to(device)
    log(f"{len(tokens):,} training tokens, {len(heldout):,} held-out tokens")
    model = make_model(recipe.seed).to(device)
    train_loss = fit(model, tokens, heldout, recipe, log)

    model.to(torch.bfloat16)
    held = heldout_loss(model, heldout)
    model.save_pretrained(out)
    write_json(out / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0, "do_sample": False})
    save_tokenizer(tokenizer, out)
    record: dict[str, object] = {
        "corpus_sha256": corpus.sha256,
        "cpython": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device == "cuda" else f"CPU, {platform.machine()}",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "recipe": asdict(recipe),
        "corpus_tokens": len(tokens),
        "trained_tokens": recipe.steps * recipe.tokens_per_step,
        "train_loss": round(train_loss, 4),
        "heldout_loss": round(held, 4),
        "heldout_perplexity": round(math.exp(held), 3),
        "model_safetensors_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "tokenizer_json_sha256": hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest(),
    }
    write_json(out / "TRAINING.json", record)
    return record


def replace_folder(new: Path, out: Path) -> None:
    """Put `new` where `out` is, in two renames."""
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from the text that CPython carries.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; replaced if it is there")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="fewer for a short run (default %(default)s)")
    parser.add_argument("--threads", type=int, default=Recipe.threads, help="another number gives other bytes")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="the shipped model is of cpu")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    corpus = build()
    print(f"corpus sha256 {corpus.sha256} from CPython {platform.python_version()}", flush=True)
    if message := difference(corpus):
        print(message, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=f".{arguments.out.name}.") as aside:
        folder = Path(aside) / "model"
        folder.mkdir()
        recipe = Recipe(steps=arguments.steps, threads=arguments.threads)
        record = train(corpus, recipe, device, folder, lambda line: print(line, flush=True))
        replace_folder(folder, arguments.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
