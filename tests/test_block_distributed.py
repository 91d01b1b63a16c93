"""Blocks sharded by FSDP2 over two processes train as one process does."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call

import compare
import llama_ext as lx
from llama_ext import block as block_module

CONFIG = lx.LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=17, hidden_dim=48,
                        max_seq_len=16)
WORLD, STEPS, LOW = 2, 3, torch.bfloat16
MODES = ["fp32", "autocast", "bf16 parameters"]


def make():
    torch.manual_seed(0)
    return lx.Llama(CONFIG)


def in_one_process(mode):
    """What the model and fully_shard's policy compute together, as a function (model, *inputs)."""
    def low(model, *inputs):
        return functional_call(model, {n: p.to(LOW) for n, p in model.named_parameters()}, inputs)
    return low if mode == "bf16 parameters" else lx.Llama.__call__


def train(model, parts=(slice(None),), autocast=False, forward=lx.Llama.__call__):
    """The losses of a few steps of plain gradient descent, each on these parts of its batch in
    turn, and the gradients of the last."""
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(CONFIG.vocab_size, (2 * WORLD, 16), generator=generator)
        model.zero_grad()
        losses.append(torch.zeros(()))
        for tokens in (batch[part] for part in parts):
            with torch.autocast("cpu", LOW, enabled=autocast):
                loss = forward(model, tokens, tokens.roll(-1, 1)) / len(parts)
            loss.backward()
            losses[-1] = losses[-1] + loss.detach()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


def rows_of(rank):
    return slice(2 * rank, 2 * rank + 2)


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=WORLD)
    reasons = []

    def noted(block, *args):
        reasons.append(block_module.why_composed(block))
        return block_module.fused_block(block, *args)
    lx.model.fused_block = noted
    for mode in MODES:
        model = make()
        policy = MixedPrecisionPolicy(param_dtype=LOW if mode == "bf16 parameters" else None,
                                      reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        losses, grads = train(model, [rows_of(rank)], mode == "autocast")
        dist.all_reduce(losses)
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
        assert "is a DTensor" in block_module.why_composed(model.layers[0])  # outside its forward
        if rank == 0:
            torch.save((losses / WORLD, grads), folder / mode)
    assert reasons == [None] * (len(MODES) * STEPS * CONFIG.n_layers)
    dist.destroy_process_group()


def test_sharded_blocks_train_as_one_process(tmp_path, one_thread):
    torch.multiprocessing.spawn(process, (tmp_path,), WORLD)
    ref_losses, ref = train(make().double())
    for mode in MODES:
        losses, grads = torch.load(tmp_path / mode)
        if mode != "fp32":  # of the same two halves of each batch: the same bits
            one_losses, one = train(make(), [*map(rows_of, range(WORLD))], mode == "autocast",
                                    in_one_process(mode))
            assert torch.equal(losses, one_losses)
            assert all(torch.equal(grad, one[name]) for name, grad in grads.items())
            continue
        base_losses, base = train(make())
        compare.check(losses, ref_losses, base_losses, torch.float32, "losses")
        for name, grad in grads.items():
            compare.check(grad, ref[name], base[name], torch.float32, name,
                          fp32_roundings=36)  # three steps of training
