"""Our kernels inside a transformers Llama, Mistral or Qwen2, in place and reversibly.

A patched module has its class replaced by a subclass with another forward: parameters, names,
hooks, PEFT's adapters and isinstance() stay as they are, and unpatch_hf() puts the class back.

B batch, T queries, S keys, H heads, Hkv key/value heads, D head dim.
"""

import collections
import functools
import inspect
import logging
import types

import torch
import torch.nn.functional as F

from .ops import attention, linear_cross_entropy, rmsnorm, rope_qk, swiglu

NAME = "llama_ext"  # of our attention among those that transformers knows
MODELS = ("Llama", "Mistral", "Qwen2")
fallbacks = collections.Counter()  # reason -> attention calls that went to torch's sdpa
_log = logging.getLogger(__name__)


# --- forwards ---

def _rmsnorm_forward(self, hidden_states):
    return rmsnorm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self, x):
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _rope(q, k, cos, sin, unsqueeze_dim=1):
    """q (B, H, T, D), k (B, Hkv, T, D) rotated; cos, sin: (B or 1, T, D), each half the same."""
    acc = torch.promote_types(q.dtype, torch.float32)
    half = cos.shape[-1] // 2
    cos, sin = (t[0, :, :half] if t.shape[0] == 1 else t[..., :half] for t in (cos, sin))
    q, k = rope_qk(q.transpose(1, 2), k.transpose(1, 2), cos.to(acc), sin.to(acc),
                   interleaved=False)
    return q.transpose(1, 2), k.transpose(1, 2)


def _with_our_rope(forward):
    """An attention's forward that finds our function under the name of transformers' own."""
    function = inspect.unwrap(forward)
    if "apply_rotary_pos_emb" not in function.__code__.co_names:
        raise ValueError("patch_hf: expected an attention that calls apply_rotary_pos_emb, got "
                         "another version of transformers")
    ours = types.FunctionType(
        function.__code__, {**function.__globals__, "apply_rotary_pos_emb": _rope},
        function.__name__, function.__defaults__, function.__closure__)
    ours.__kwdefaults__ = function.__kwdefaults__
    return ours


def _causal_lm_forward(original):
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        """As the original, but in training with labels the loss comes straight from the hidden
        states, and logits is None."""
        kwargs.update(zip(names, args))
        head = self.lm_head
        if (kwargs.get("labels") is None or not self.training or type(head) is not torch.nn.Linear
                or head.bias is not None or torch.is_tensor(kwargs.get("logits_to_keep"))
                or kwargs.get("logits_to_keep")):
            return original(self, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        labels, shifted = kwargs.pop("labels"), kwargs.pop("shift_labels", None)
        count, ignore = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", -100)
        kwargs.pop("logits_to_keep", None)
        as_dict = kwargs.pop("return_dict", None)
        outputs = self.model(**kwargs, return_dict=True)
        hidden = outputs.last_hidden_state
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        loss = linear_cross_entropy(hidden, head.weight, shifted.to(hidden.device),
                                    ignore_index=ignore,
                                    reduction="mean" if count is None else "sum")
        if count is not None:
            loss = loss / (count.to(loss.device) if torch.is_tensor(count) else count)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        result = CausalLMOutputWithPast(loss=loss, **rest)
        return result.to_tuple() if as_dict is False else result
    return forward


# --- attention ---

def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None,
          attention_mask=None, local_size=None, allow_is_causal_skip=True, use_vmap=False,
          device="cpu", **kwargs):
    """What _attention gets as its mask: None for causal, bool (B, S) where keys are padded, with
    the queries at its last T columns, or sdpa's (B, 1, T, S) for all else."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    def sdpa(skip):
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, use_vmap=use_vmap, device=device, allow_is_causal_skip=skip,
            **kwargs)

    plain = mask_function is causal_mask_function or (local_size and allow_is_causal_skip)
    if use_vmap or not plain or torch.compiler.is_compiling():
        return sdpa(allow_is_causal_skip and q_length in (1, kv_length))
    begin = int(kv_offset)
    end = int(q_offset) + q_length - begin  # a static cache has room for more keys than there are
    if attention_mask is None:
        valid = torch.ones(batch_size, end, dtype=torch.bool, device=device)
        return None if end == kv_length else valid
    if attention_mask.shape[1] < begin + end:
        return sdpa(False)
    valid = attention_mask[:, begin:begin + end]
    if end == kv_length and valid.all():
        return None
    if local_size:  # in a packed row a window would reach over a gap
        runs = valid[:, 0] + (valid[:, 1:] & ~valid[:, :-1]).sum(-1)
        if (runs > 1).any():
            return sdpa(False)
    return valid


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None,
               sliding_window=None, **kwargs):
    """transformers' attention interface: q (B, H, T, D), k, v (B, Hkv, S, D) -> (B, T, H, D)."""
    reason = ("a mask other than causal with padding" if attention_mask is not None
              and attention_mask.dim() != 2 else "dropout" if dropout else
              "not causal" if kwargs.get("is_causal") is False else None)
    if reason:
        return _sdpa(reason, module, query, key, value, attention_mask, dropout, scaling, kwargs)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if attention_mask is None:
        return attention(q, k, v, scale=scaling, window=sliding_window), None
    q_valid = attention_mask[:, -q.shape[1]:]
    k_valid = F.pad(attention_mask, (0, k.shape[1] - attention_mask.shape[1]))
    o = attention(q[q_valid], k[k_valid], v[k_valid], scale=scaling, window=sliding_window,
                  cu_seqlens=(_offsets(q_valid), _offsets(k_valid)))
    out = o.new_zeros(q.shape)
    out[q_valid] = o
    return out, None


def _offsets(valid):
    return F.pad(valid.sum(-1).cumsum(0), (1, 0)).to(torch.int32)


def _sdpa(reason, module, query, key, value, mask, dropout, scaling, kwargs):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not torch.compiler.is_compiling():
        if reason not in fallbacks:
            _log.warning("patch_hf: attention by torch's sdpa: %s", reason)
        fallbacks[reason] += 1
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, dropout=dropout,
                                           scaling=scaling, **kwargs)


# --- patching ---

@functools.cache
def _patched(cls, part):
    """The subclass of `cls` with our forward."""
    forward = {"RMSNorm": lambda f: _rmsnorm_forward, "MLP": lambda f: _mlp_forward,
               "Attention": _with_our_rope, "ForCausalLM": _causal_lm_forward}[part](cls.forward)
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__,
                                       "_llama_ext_original": cls})


def _part(module):
    """"RMSNorm", "MLP", "Attention" or "ForCausalLM" of a supported model, else None."""
    cls = type(module)
    for model in MODELS:
        if cls.__module__ == f"transformers.models.{model.lower()}.modeling_{model.lower()}":
            part = cls.__name__.removeprefix(model)
            return part if part in ("RMSNorm", "MLP", "Attention", "ForCausalLM") else None
    return None


def patch_hf(model):
    """Swap our kernels into a transformers Llama, Mistral or Qwen2, in place; returns a report.

    model: any module that holds one: with or without the output layer, PEFT's wrapper too (before
    or after this). Swapped are RMSNorm, the rotary embedding, attention (grouped heads, sliding
    window, padding on either side; other masks go to torch's sdpa: `patch.fallbacks` counts them,
    the first is logged), SwiGLU, and in training with labels the loss, which comes from the hidden
    states without any logits: `logits` of the output is then None. In eval mode logits are there.
    Saving by save_pretrained or state_dict is as ever; to pickle the model itself, unpatch it.
    Returns {"rmsnorm": n, "rope": n, "attention": n, "swiglu": n, "linear_cross_entropy": n,
    "kept": [what was left as it is, and why]}, n the modules swapped.
    Raises ValueError for a model with nothing to swap, or already patched.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if any(hasattr(type(m), "_llama_ext_original") for m in model.modules()):
        raise ValueError("patch_hf: model: expected one that is not patched, got a patched one")
    found = [(m, part) for m in model.modules() if (part := _part(m))]
    if not found:
        raise ValueError(f"patch_hf: model: expected a transformers {', '.join(MODELS)}, "
                         f"got {type(model).__name__}")
    report = dict.fromkeys(("rmsnorm", "rope", "attention", "swiglu", "linear_cross_entropy"), 0)
    kept = {}
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    for module, part in found:
        if part == "MLP" and module.config.hidden_act not in ("silu", "swish"):
            kept[f"MLP: its activation is {module.config.hidden_act}"] = None
            continue
        if part == "Attention":
            report["rope"] += 1
            if module.config.attention_dropout:
                kept["attention: it has dropout"] = None
            else:
                report["attention"] += 1
                module._llama_ext_attention = module.config._attn_implementation
        else:
            report[{"RMSNorm": "rmsnorm", "MLP": "swiglu",
                    "ForCausalLM": "linear_cross_entropy"}[part]] += 1
        module.__class__ = _patched(type(module), part)
    for module, _ in found:
        if hasattr(module, "_llama_ext_attention"):
            module.config._attn_implementation = NAME
    return {**report, "kept": list(kept)}


def unpatch_hf(model):
    """Undo patch_hf(model): every module is as it was. Raises ValueError if it is not patched."""
    patched = [m for m in model.modules() if hasattr(type(m), "_llama_ext_original")]
    if not patched:
        raise ValueError("unpatch_hf: model: expected a patched one, got one that is not")
    for module in patched:
        module.__class__ = type(module)._llama_ext_original
        if "_llama_ext_attention" in vars(module):
            module.config._attn_implementation = vars(module).pop("_llama_ext_attention")
