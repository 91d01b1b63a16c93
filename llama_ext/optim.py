"""The paper's optimizer recipe: AdamW (or AdaMax), decay on matrices only, warm-up and cosine.

LLaMA, arXiv 2302.13971, section 2.3: beta 0.9, 0.95; weight decay 0.1; gradient clip 1.0; 2,000
warm-up steps; cosine schedule to 10 % of the peak learning rate.
"""

import math

import torch

BETA2 = {"adamw": 0.95, "adamax": 0.999}  # LLaMA's for AdamW, the AdaMax paper's for AdaMax


def lr_at(step, *, steps, peak, warmup=2000, final=0.1):
    """Learning rate of update `step` (1 .. steps).

    Linear from 0 to `peak` over `warmup` updates, then a cosine down to `final * peak`, reached at
    `steps` and held after it. Raises ValueError unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"lr_at: warmup expected in 0 .. steps - 1 = {steps - 1}, got {warmup}")
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / (steps - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def _decoupled_decay(optimizer, args, kwargs):
    """Step pre-hook: p <- p * (1 - lr * decay), as AdamW does (arXiv 1711.05101)."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["decoupled_weight_decay"])


def param_groups(model, weight_decay):
    """Two groups of the trainable parameters: matrices, decayed, and the rest (norm weights)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]


def build_optimizer(model, name="adamw", *, lr, beta1=0.9, beta2=None, eps=1e-8, weight_decay=0.1):
    """The optimizer `name` ("adamw" or "adamax") over `model`'s parameters.

    AdaMax is algorithm 2 of arXiv 1412.6980; weight decay is decoupled in both. beta2 None means
    0.95 for adamw and 0.999 for adamax. Raises ValueError for another name.
    """
    if name not in BETA2:
        raise ValueError(f"optimizer: expected one of {', '.join(BETA2)}, got {name!r}")
    groups = param_groups(model, weight_decay)
    betas = (beta1, BETA2[name] if beta2 is None else beta2)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    # torch's Adamax adds weight_decay * p to the gradient, where the infinity norm rescales it.
    for group in groups:
        group["decoupled_weight_decay"] = group.pop("weight_decay")
    optimizer = torch.optim.Adamax(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    optimizer.register_step_pre_hook(_decoupled_decay)
    return optimizer
