"""How far optimisers take weights from where AdamW takes those of fp32: benchmarks/optimizers.py [--model made_up]

Real gradients of SmolLM2-135M-Instruct (make smollm2) or --model, of the next token of GSM8K's training problems and
solutions, some hundred tokens a step. They are computed with weights of fp32, which AdamW moves, and clipped. Every
contender is given the same gradients, in the type of its own weights, and the same schedule: that of bae-train in a run
of 1024 steps, with its warm-up. All weights start as numbers that bf16 has. So each contender sees what AdamW in fp32
sees, and differs by its arithmetic alone. A process for each learning rate. Columns:

    changed     share of the weights that differ from the start
    distance    |w - w_fp32| / |w_fp32 - start|; 1 if the weights stand still
    cosine      of w - start with w_fp32 - start
    followed    (w - start) . (w_fp32 - start) / |w_fp32 - start|^2: 1 if all of fp32's way was gone, whatever else
    gain        what the loss of GSM8K's test problems fell, in nats a token
    kl          mean KL divergence of the next token there from what the weights of fp32 say
    bytes       of weight, gradient and state, a parameter
    step_ms     median of the optimiser's step

The row `rounded` is no optimiser: its weights are those of fp32, rounded to bf16 once. So it shows what bf16 can hold.
Moments of 8 bits take a CPU tens of seconds a step. So they are given every 40th tensor, their step_ms is scaled to all
of them, and they have no gain and no kl.

--model made_up --steps 1024 is a whole run, on 8192 weights of standard deviation .05. Their gradients are made up:
noise of deviation 1, about means of deviation .1 that stay. It has no gain, no kl and no times.
"""

import argparse
import json
import statistics
from time import perf_counter

from common import DATA, append, arguments, device, listed, load, measure, serve, train_config, wait

MADE_UP = "made_up"
NOTHING_SAID = {"gain": None, "kl": None}
RUN = 1024
"""Steps of the run whose schedule it is."""
CONTENDERS = {
    ("adamw", "float32"): 1,
    ("adamw_8bit", "float32"): 40,
    ("adamw", "bfloat16"): 1,
    ("adamw_stochastic", "bfloat16"): 1,
    ("adamw_8bit", "bfloat16"): 40,
    ("adamw_kahan", "bfloat16"): 1,
}
"""Each with n, if it is given every nth tensor of weights. The first is the reference."""
HELD_OUT = 8
"""Rows of held-out tokens, each of ROW."""
ROW = 256


def rows_of_text(tokenizer, file, rows, tokens):
    """(rows, tokens) ids of problems and solutions, one after the other."""
    import torch

    ids = []
    with (DATA / file).open() as lines:
        for line in lines:
            if len(ids) >= rows * tokens:
                break
            problem = json.loads(line)
            ids += tokenizer(f"{problem['question']}\n{problem['answer']}\n\n")["input_ids"]
    return torch.tensor(ids[: rows * tokens]).view(rows, tokens)


class Contender:
    """An optimiser of conf/optimizer on weights of its own, with the schedule of bae-train."""

    def __init__(self, name, dtype, lr, weights, every):
        import torch

        from bae.commands.build import make
        from bae.training.stepper import lr_share

        self.mine = slice(every // 2, None, every)
        self.weights = [torch.nn.Parameter(w.to(getattr(torch, dtype), copy=True)) for w in weights[self.mine]]
        self.share = sum(w.numel() for w in self.weights) / sum(w.numel() for w in weights)
        self.optimizer = make(train_config(f"optimizer={name}", f"lr={lr}").optimizer)(self.weights)
        warmup = train_config().training.warmup_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: lr_share(k, RUN, warmup, 1.0))
        self.seconds = []

    def step(self, gradients):
        for weight, gradient in zip(self.weights, gradients[self.mine], strict=True):
            weight.grad = gradient.to(weight.dtype, copy=True)
        wait()
        begun = perf_counter()
        self.optimizer.step()
        wait()
        self.seconds.append(perf_counter() - begun)
        self.optimizer.zero_grad()
        self.schedule.step()

    def bytes(self):
        """A parameter, with a gradient of the weights' type."""
        states = [x for state in self.optimizer.state.values() for x in state.values() if hasattr(x, "numel")]
        count = sum(w.numel() for w in self.weights)
        return (2 * sum(map(size, self.weights)) + sum(map(size, states))) / count


def size(tensor):
    """Bytes of a tensor, or of the parts of a quantised one."""
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(size(getattr(tensor, part)) for part in parts) or tensor.numel() * tensor.element_size()


def displacement(weights, start, reference):
    """The columns that compare weights, summed in fp64 over all of them."""
    changed = far = along = own = whole = count = 0.0
    for w, s, r in zip(weights, start, reference, strict=True):
        w, s, r = w.detach().float(), s.float(), r.detach().float()
        moved, way = (w - s).double().flatten(), (r - s).double().flatten()
        changed, count = changed + float((moved != 0).sum()), count + w.numel()
        far, along = far + float((moved - way).square().sum()), along + float(moved @ way)
        own, whole = own + float(moved @ moved), whole + float(way @ way)
    return {
        "changed": changed / count,
        "distance": (far / whole) ** 0.5,
        "cosine": along / (own * whole) ** 0.5 if own else 0.0,
        "followed": along / whole,
    }


def set_weights(model, weights):
    import torch

    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)


def log_probs(model, weights, ids):
    """(rows, tokens - 1, V) of the model with these weights."""
    import torch

    set_weights(model, weights)
    with torch.no_grad():
        return torch.cat([model(row[None], use_cache=False).logits[:, :-1].log_softmax(-1) for row in ids])


def loss(log_p, ids):
    """Nats a token."""
    return -float(log_p.gather(2, ids[:, 1:, None]).mean())


def said(log_p, right, before, ids):
    """The columns that compare what weights say with what those of fp32 say."""
    return {"gain": before - loss(log_p, ids), "kl": float((right.exp() * (right - log_p)).sum(2).mean())}


def one(model, lr, steps, tokens):
    """All contenders at one learning rate."""
    if model == MADE_UP:
        return made_up(lr, steps)
    policy = load(model, "float32", shared_prefix=False)
    model = policy.model
    text = rows_of_text(policy.tokenizer, "gsm8k_train.jsonl", steps, tokens).to(device())
    start = [p.detach().bfloat16() for p in model.parameters()]
    contenders = {key: Contender(*key, lr, start, every) for key, every in CONTENDERS.items()}
    reference, norm = next(iter(contenders.values())).weights, train_config().training.max_grad_norm
    for ids in text:
        set_weights(model, reference)
        model(ids[None], labels=ids[None], use_cache=False).loss.backward()
        clip([p.grad for p in model.parameters()], norm)
        for contender in contenders.values():
            contender.step([p.grad for p in model.parameters()])
        model.zero_grad()

    held_out = rows_of_text(policy.tokenizer, "gsm8k_test.jsonl", HELD_OUT, ROW).to(device())
    before = loss(log_probs(model, start, held_out), held_out)
    right = log_probs(model, reference, held_out)
    return {"rows": compared(contenders, start, lambda w: said(log_probs(model, w, held_out), right, before, held_out))}


def made_up(lr, steps):
    import torch

    torch.compiler.set_stance("force_eager")  # faster for so few weights
    draw = torch.Generator().manual_seed(0)
    start = [(0.05 * torch.randn(16, 512, generator=draw)).bfloat16().to(device())]
    mean = 0.1 * torch.randn(16, 512, generator=draw)
    contenders = {key: Contender(*key, lr, start, 1) for key in CONTENDERS}
    norm = train_config().training.max_grad_norm
    for _ in range(steps):
        gradients = [(mean + torch.randn(16, 512, generator=draw)).to(device())]
        clip(gradients, norm)
        for contender in contenders.values():
            contender.step(gradients)
    return {"rows": [row | {"step_ms": None} for row in compared(contenders, start, lambda weights: NOTHING_SAID)]}


def clip(gradients, norm):
    """Clip by their global norm."""
    factor = norm / float(sum(g.square().sum() for g in gradients) ** 0.5)
    for gradient in gradients:
        gradient.mul_(min(1.0, factor))


def compared(contenders, start, judge):
    """A row for the rounded weights of the reference, and for each contender."""
    reference = next(iter(contenders.values())).weights
    rounded = [w.detach().bfloat16() for w in reference]
    rows = [{
        "optimizer": "rounded", "weights": "bfloat16", **displacement(rounded, start, reference), **judge(rounded),
        "bytes": None, "step_ms": None,
    }]  # fmt: skip
    for (name, dtype), contender in contenders.items():
        mine, whole = contender.mine, contender.share == 1
        rows.append({
            "optimizer": name, "weights": dtype, **displacement(contender.weights, start[mine], reference[mine]),
            **(judge(contender.weights) if whole else NOTHING_SAID), "bytes": contender.bytes(),
            "step_ms": 1000 * statistics.median(contender.seconds) / contender.share,
        })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=listed(float), default=[1e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=192, help="of a step")
    given = arguments(parser, "optimizers", model=True)
    for lr in given.lr:
        request = {"model": given.model, "lr": lr, "steps": given.steps,
                   "tokens": None if given.model == MADE_UP else given.tokens}  # fmt: skip
        found = measure(__file__, request)
        for row in found["rows"] if found else ():
            append(given.csv, request | row | {"machine": found["machine"]})
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__" and not serve(one):
    main()
