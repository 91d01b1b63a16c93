"""Training on many processes with PyTorch's own engine: FSDP2, tensor and sequence parallelism.

The processes form a mesh of dp x tp. Along tp each layer's matrices are split (Megatron-LM, arXiv
1909.08053): by columns wq, wk, wv, w1, w3, by rows wo, w2, so that a rank holds H / tp heads and
F / tp hidden units. Between those, norms and the residual stream are split along the sequence
(arXiv 2205.05198): a rank has T / tp positions, and the layers gather and scatter them. The
embeddings are split over the vocabulary; the loss is of a rank's own positions, all-reduced. Along
dp each rank has batches of its own and a part of every parameter, gradient and optimizer state
(fully_shard; ZeRO, arXiv 1910.02054).

B batch, T tokens, C width, V vocabulary, H heads, F hidden width.
"""

import warnings

import torch
import torch.distributed as dist
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput,
                                               RowwiseParallel, parallelize_module)

from .layers import RMSNorm
from .ops import linear_cross_entropy


def check(config, tensor_parallel, processes):
    """Raise ValueError unless `tensor_parallel` of that many processes can share the layers of a
    model of `config`, a LlamaConfig: it must divide what they split."""
    for what, number in (("the number of processes", processes), ("n_heads", config.n_heads),
                         ("n_kv_heads", config.n_kv_heads), ("hidden_dim", config.hidden_dim),
                         ("vocab_size", config.vocab_size), ("max_seq_len", config.max_seq_len)):
        if tensor_parallel < 1 or number % tensor_parallel:
            raise ValueError(f"tensor_parallel: expected a divisor of {what} = {number}, "
                             f"got {tensor_parallel}")


def mesh(config, tensor_parallel=1, device="cpu"):
    """The DeviceMesh ("dp", "tp") of all processes, tensor_parallel ranks along tp, for a model of
    `config`, a LlamaConfig, on "cpu" or "cuda". torch.distributed must be set up (ranks.start).

    Raises ValueError as check() does.
    """
    check(config, tensor_parallel, dist.get_world_size())
    grid = init_device_mesh(device, (dist.get_world_size() // tensor_parallel, tensor_parallel),
                            mesh_dim_names=("dp", "tp"))
    grid._flatten()  # lets DTensor reduce over both in one collective, alike on every rank
    return grid


def parallelize(model, mesh, dtype=torch.float32, *, reshard_after_forward=True, prefetch=True,
                compile=False):
    """Split `model`, a Llama, over `mesh` in place, and return it.

    The parameters become DTensors and stay fp32: optimizer, clip_grad_norm_ and checkpoints see
    those. dtype: what the computation runs in; parameters are gathered in it, gradients reduced
    along dp in fp32 (averaged). reshard_after_forward: free a layer's gathered parameters between
    its forward and backward, at the price of gathering them twice. prefetch: gather the next
    layer's parameters while this one computes (on a GPU; a CPU has no streams for it, and gathers
    them before). compile: torch.compile each layer; on GPUs with tp > 1 that makes tensor
    parallelism asynchronous: matrix products go in pieces while others are gathered or scattered.

    The model may be on the meta device: then follow with model.to_empty(device=...) and
    reset_parameters(model, seed) or checkpoint.load. model(tokens, targets) takes this dp rank's
    batch, the same on all its tp ranks, and returns that batch's mean loss on each; T must be a
    multiple of tp. With tp > 1 it is for training only: targets have to be given. For gradients
    summed over several batches see accumulate().
    """
    if mesh["tp"].size() > 1:
        _split_layers(model, mesh["tp"])
    if compile:
        _compile_layers(model, mesh["tp"])
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if next(model.parameters()).dtype == dtype:
        policy = MixedPrecisionPolicy()
    layers = list(model.layers)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh["dp"], mp_policy=policy,
                    reshard_after_forward=reshard_after_forward and module is not model)
    if prefetch:
        for module, after in zip((model, *layers), layers):
            module.set_modules_to_forward_prefetch([after])
        for module, before in zip(layers[1:], layers):
            module.set_modules_to_backward_prefetch([before])
    return model


def accumulate(model, last):
    """Before each batch of a step: its gradients are added to what is there, and averaged over
    the dp ranks only if it is the last."""
    model.set_requires_gradient_sync(last)


def mean(value):
    """The mean of a scalar tensor over all ranks."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.no_grad()
def reset_parameters(model, seed):
    """model.reset_parameters(generator) for a model that may be split: the same weights as one
    process gets from a torch.Generator with this seed, one whole parameter at a time on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        model.init_parameter(name, whole, generator)
        part, place = local_part(parameter)
        part.copy_(whole[place])


def local_part(tensor):
    """What this rank holds of a DTensor, a plain tensor, and its place in the whole, a tuple of
    slices; of a plain tensor itself and ()."""
    if not isinstance(tensor, DTensor):
        return tensor, ()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape))


def _split_layers(model, tp):
    # Nothing here works in place on what a layer returns, of which torch warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    sequence, column = Shard(1), ColwiseParallel
    for layer in model.layers:
        parallelize_module(layer, tp, {
            "attention": PrepareModuleInput(
                input_layouts=(sequence, None), desired_input_layouts=(Replicate(), None)),
            "attention.wq": column(), "attention.wk": column(), "attention.wv": column(),
            "attention.wo": RowwiseParallel(output_layouts=sequence),
            "feed_forward": PrepareModuleInput(
                input_layouts=(sequence,), desired_input_layouts=(Replicate(),)),
            "feed_forward.w1": column(), "feed_forward.w3": column(),
            "feed_forward.w2": RowwiseParallel(output_layouts=sequence)})
        for norm in (layer.attention_norm, layer.ffn_norm):
            _split_norm(norm, tp)
    _split_norm(model.norm, tp)
    plan = {"tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence)}
    if model.output is not None:
        plan["output"] = column()  # only its weight is used, by the loss
    parallelize_module(model, tp, plan)
    model.loss = _SequenceLoss(tp)
    model.register_forward_pre_hook(_check_inputs, with_kwargs=True)


def _compile_layers(model, tp):
    if tp.size() > 1:
        # A compiled layer gives a collective's result that is still on its way no gradient.
        model.tok_embeddings.register_forward_hook(lambda module, args, out: out.clone())
        if tp.device_type == "cuda":
            torch._inductor.config._micro_pipeline_tp = True
            enable_symm_mem_for_group(tp.get_group().group_name)
    for layer in model.layers:
        layer.compile(fullgraph=True)


class _SplitNorm(RMSNorm):
    """RMSNorm of a part of the sequence: its weight's gradient is to be summed over the ranks."""

    def forward(self, x, residual=None):
        return self.normalize(x, residual, _whole(self.weight))


def _split_norm(norm, tp):
    distribute_module(norm, tp)  # the whole weight on every rank
    norm.__class__ = _SplitNorm


class _SequenceLoss:
    """linear_cross_entropy where each rank has T / tp positions of hidden, all of the targets and
    V / tp rows of weight."""

    def __init__(self, tp):
        self.tp = tp

    def __call__(self, hidden, weight, targets):
        mine = targets.chunk(self.tp.size(), 1)[self.tp.get_local_rank()]
        loss = linear_cross_entropy(hidden, _whole(weight), mine, reduction="sum")
        count = (targets != -100).sum().clamp(min=1)
        return DTensor.from_local(loss / count, self.tp, [Partial()]).full_tensor()


def _whole(weight):
    """All of a weight, as a plain tensor; the gradients that the ranks get for it are summed."""
    return weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _check_inputs(model, args, kwargs):
    tokens, *rest = args
    if kwargs.get("targets", rest[0] if rest else None) is None:
        raise ValueError("Llama: targets: expected (B, T) under tensor parallelism, got None")
    ranks = model.loss.tp.size()
    if tokens.shape[1] % ranks:
        raise ValueError(f"Llama: tokens: expected a multiple of tensor_parallel = {ranks} "
                         f"positions, got {tokens.shape[1]}")
