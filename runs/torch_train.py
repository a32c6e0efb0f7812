#!/usr/bin/env python3
"""A Llama trained by PyTorch on the CPU, in full precision or with QuEST: the peer of `bench-train`.

    python runs/torch_train.py --layers 4 --hidden 256 --heads 4 --ffn 768 --vocab 4096 \\
        --context 256 --batch 8 --steps 10 --threads 2 --quantizer quest --bits 4 --json FILE
    python runs/torch_train.py ... --check MODEL.safetensors --tokens TOKENS.json

It has the model, the optimizer and the recipe of `anybit bench-train`, and JSON with the same keys:
whole optimizer steps in f32 on random tokens, the median of the speeds after three steps that are
not counted. To be as fast as plain PyTorch is, q, k and v are one linear and so are gate and up,
whose input is then rounded once; attention and AdamW are the fused ones; the Hadamard blocks of 128
are products with H_8 and H_16, which take no more time than one with H_128, and about a third or
less of that of seven butterfly passes. QuEST (arXiv 2502.05003, algorithms 1 and 2, half form), for
rows a of both operands:

    a_h = a H    c = alpha RMS(a_h) + 1e-8    D = 2c / (n - 1)    n = 2^bits
    q = clamp(floor(a_h / D), -n/2, n/2 - 1)    forward (q + 1/2) D
    backward (g * [|a_h| <= c n / (n - 1)]) H

With --check it prints the loss of the next token for given weights (f32, Hugging Face's names, as
many key as query heads) on the rows of tokens in a JSON file, [[1, 2, ...], ...], and stops.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Where grids of 2^b levels end, in units of the RMS; index b - 1. As the released code has them.
ALPHA = (
    0.7978845587140913,
    1.4935346200015913,
    2.051068354131873,
    2.513930578568423,
    2.9160938834961225,
    3.276597282593217,
    3.6010497188221655,
    3.884938678807525,
)
WARM_UP = 3


# --- Quantizer ----------------------------------------------------------------


def sylvester(size):
    """The normalized Walsh-Hadamard matrix."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(size)


class Quantizer(nn.Module):
    """QuEST of one operand, returned in the rotated basis."""

    def __init__(self, bits, block):
        super().__init__()
        self.levels, self.alpha = 2**bits, ALPHA[bits - 1]
        # s = 1.30 at one bit (appendix A.2 of the paper; 1.25 without rotation), in units of c.
        one_bit = 1.30 if block else 1.25
        self.reach = one_bit if bits == 1 else self.levels / (self.levels - 1)
        # H_128 = H_8 (x) H_16: a block is a matrix of 8 by 16 with a product from either side.
        self.block = block
        outer = 1 << (max(block, 1).bit_length() - 1) // 2
        self.register_buffer("outer", sylvester(outer), persistent=False)
        self.register_buffer("inner", sylvester(max(block, 1) // outer), persistent=False)

    def rotate(self, x):
        if not self.block:
            return x.clone()
        rows = x.reshape(-1, len(self.outer), len(self.inner))
        return (self.outer @ (rows @ self.inner)).view(x.shape)

    def forward(self, x):
        return Rounding.apply(x, self)


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantizer):
        half = quantizer.levels / 2
        a = quantizer.rotate(x)
        rms = torch.linalg.vector_norm(a, dim=-1, keepdim=True) * a.shape[-1] ** -0.5
        step = (rms * quantizer.alpha + 1e-8) * (2 / (quantizer.levels - 1))
        a /= step
        trusted = a.abs() <= quantizer.reach * (quantizer.levels - 1) / 2
        ctx.save_for_backward(trusted)
        ctx.quantizer = quantizer
        return a.floor_().clamp_(-half, half - 1).add_(0.5).mul_(step)

    @staticmethod
    def backward(ctx, grad):
        (trusted,) = ctx.saved_tensors
        return ctx.quantizer.rotate(torch.where(trusted, grad, 0.0)), None


# --- Model --------------------------------------------------------------------


class Linear(nn.Module):
    """A linear without bias that rounds both operands."""

    def __init__(self, inputs, outputs, std, quantizer):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)
        self.quantizer = quantizer

    def forward(self, x):
        if self.quantizer is None:
            return F.linear(x, self.weight)
        return F.linear(self.quantizer(x), self.quantizer(self.weight))


class Block(nn.Module):
    def __init__(self, args, quantizer):
        super().__init__()
        hidden, ffn, self.heads = args.hidden, args.ffn, args.heads
        damped = 0.02 / math.sqrt(2 * args.layers)
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = Linear(hidden, 3 * hidden, 0.02, quantizer)
        self.o = Linear(hidden, hidden, damped, quantizer)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate_up = Linear(hidden, 2 * ffn, 0.02, quantizer)
        self.down = Linear(ffn, hidden, damped, quantizer)

    def forward(self, x, cos, sin):
        batch, context, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, context, 3, self.heads, -1)
        a, b = qkv[:, :, :2].chunk(2, -1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        q, k, v = (y.transpose(1, 2) for y in (rotated[:, :, 0], rotated[:, :, 1], qkv[:, :, 2]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, context, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """From tokens and targets to the mean cross-entropy."""

    def __init__(self, args):
        super().__init__()
        quantizer = Quantizer(args.bits, args.hadamard) if args.quantizer == "quest" else None
        self.embedding = nn.Parameter(torch.randn(args.vocab, args.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(args, quantizer) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.hidden, eps=1e-5)
        self.head = Linear(args.hidden, args.vocab, 0.02, None)
        size = args.hidden // args.heads
        frequencies = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(torch.arange(args.context, dtype=torch.float64), frequencies)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            # [context, q or k, head, channel]
            self.register_buffer(name, table.float()[:, None, None], persistent=False)

    def forward(self, tokens, targets):
        cos, sin = (table[: tokens.shape[1]] for table in (self.cos, self.sin))
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


# --- Weights from a file ------------------------------------------------------


def read_safetensors(path):
    """Tensors in f32 by name."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise SystemExit(f"{path}: {name} is {entry['dtype']}, not F32")
        first, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(data[first:end], dtype=torch.float32).view(entry["shape"])
    return tensors


@torch.no_grad()
def load(model, tensors):
    """Takes tensors under Hugging Face's names."""
    model.embedding.copy_(tensors["model.embed_tokens.weight"])
    model.norm.weight.copy_(tensors["model.norm.weight"])
    model.head.weight.copy_(tensors["lm_head.weight"])
    for i, block in enumerate(model.blocks):
        fused = {
            block.attention_norm: ("input_layernorm",),
            block.qkv: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            block.o: ("self_attn.o_proj",),
            block.mlp_norm: ("post_attention_layernorm",),
            block.gate_up: ("mlp.gate_proj", "mlp.up_proj"),
            block.down: ("mlp.down_proj",),
        }
        for module, names in fused.items():
            parts = [tensors[f"model.layers.{i}.{name}.weight"] for name in names]
            module.weight.copy_(torch.cat(parts))


# --- Training -----------------------------------------------------------------


def adamw(model):
    """Decay on the blocks' linears only."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if name.startswith("blocks.") and p.dim() == 2]
    others = [p for name, p in named if not (name.startswith("blocks.") and p.dim() == 2)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    try:
        return torch.optim.AdamW(groups, fused=True, **options), True
    except RuntimeError:  # before PyTorch 2.4 not on the CPU
        return torch.optim.AdamW(groups, **options), False


def train(args):
    model = Llama(args)
    optimizer, fused = adamw(model)
    parameters = list(model.parameters())
    run = torch.compile(model) if args.compile else model
    speeds, losses = [], []
    for step in range(args.steps + WARM_UP):
        tokens, targets = torch.randint(args.vocab, (2, args.batch, args.context))
        start = time.perf_counter()
        loss = run(tokens, targets)
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= WARM_UP:
            speeds.append(args.batch * args.context / (time.perf_counter() - start))
    return {
        "tokens_per_s": statistics.median(speeds),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parameters": sum(p.numel() for p in parameters),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fused_adamw": fused,
        "compiled": args.compile,
    }


def check(args):
    model = Llama(args)
    load(model, read_safetensors(args.check))
    tokens = torch.tensor(json.loads(args.tokens.read_text()))
    with torch.no_grad():
        return {"loss": model(tokens[:, :-1], tokens[:, 1:]).item(), "torch": torch.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=10, help=f"timed, after {WARM_UP} that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantizer", choices=("none", "quest"), default="none")
    parser.add_argument("--bits", type=int, choices=range(1, 9), default=4)
    parser.add_argument("--hadamard", type=int, default=128, help="columns of a block; 0 for none")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="MODEL.safetensors")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="rows of tokens, for --check")
    args = parser.parse_args()
    if args.check and not args.tokens:
        parser.error("--check needs --tokens")
    if args.hidden % (2 * args.heads):
        parser.error("--hidden is no even number of channels per head")
    block = args.hadamard
    if args.quantizer == "quest" and block:
        if block & (block - 1) or args.hidden % block or args.ffn % block:
            parser.error(f"--hadamard {block} is no power of two that divides --hidden and --ffn")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    text = json.dumps(check(args) if args.check else train(args), indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
