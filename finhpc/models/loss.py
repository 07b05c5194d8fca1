"""The next-token loss of hidden states, computed some rows at a time, so that the logits of all rows never exist.

With a vocabulary of 50,257 the logits would be the largest tensor of a step, and torch would make a float32 copy, its
log-softmax and two gradients of the same size. Here the logits of some rows are computed, overwritten by their
gradient, and multiplied into the gradients of the hidden states and of the matrix at once: the backward pass only
scales these. torch's `linear_cross_entropy` does the same, but sums a bfloat16 loss in bfloat16 (10.06 where the loss
was 11.07), and takes twenty times as long on a CPU.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes of float32 values that are processed at a time: on a CPU while they are in the cache, on a GPU by one kernel.
ROW_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# Bytes of logits at a time, but at least `WIDTHS` rows for each column of the matrix: its gradient is summed in float32
# every time, which takes as long as the softmax of that many rows, and as much memory.
LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
WIDTHS = 4
ALIGNED = 128  # a GPU's products are fast for a vocabulary that is a multiple of this


def head_loss(hidden: Tensor, module: nn.Module, targets: Tensor, cap: float | None = None) -> Tensor:
    """Return the mean cross-entropy in nats, in float32, of the output layer at `targets` (rows,).

    `cap`: see `linear_cross_entropy`. `hidden`: (rows, width). `module`: see `logits_product`. The softmax and the sum
    are float32 in any case.
    """
    return linear_cross_entropy(*logits_product(hidden, module), targets, cap)


def logits_product(hidden: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return hidden states (rows, k) and a matrix (vocab, k), in the type of products, whose product are the logits.

    `module`: a linear layer, dense or low-rank, trained or frozen; or the embedding that is tied to it. Under autocast
    products have its type.
    """
    if isinstance(module, nn.Embedding):
        weight = module.weight
    elif isinstance(module, nn.Linear):
        weight = module.weight
        assert module.bias is None, "an output layer has no bias"
    else:
        hidden, weight = module.as_product(hidden)  # type: ignore[operator]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Return the mean over rows of -log softmax(hidden weight^T)[target] in nats, in float32.

    `hidden`: (rows, width) and `weight`: (vocab, width) of one dtype. `targets`: int64 (rows,). With `cap` the logits
    are cap * tanh(hidden weight^T / cap). It can be differentiated once.
    """
    wanted = torch.is_grad_enabled()
    loss: Tensor = _linear_cross_entropy(
        hidden, weight, targets, wanted and hidden.requires_grad, wanted and weight.requires_grad, cap or 0.0
    )[0]
    return loss


@torch.library.custom_op("finhpc::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, hidden_grad: bool, weight_grad: bool, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients; a gradient that is not wanted is empty. `cap` 0: none."""
    rows, device = len(hidden), hidden.device.type
    matrix = _aligned(weight)
    vocab, width = matrix.shape
    step = _rows_at_once(rows, vocab, width, hidden.element_size(), device)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if hidden_grad else hidden.new_empty(0)
    d_weight: Tensor | None = None
    pieces = zip(hidden.split(step), targets[:, None].split(step), strict=True)
    for begin, (x, target) in zip(range(0, rows, step), pieces, strict=True):
        logits = x @ matrix.T
        slope = _cap(logits, cap) if cap else None
        total += _to_gradient(logits[:, : len(weight)], target, rows, hidden_grad or weight_grad)
        if slope is not None:
            logits.mul_(slope)
        if matrix is not weight:
            logits[:, len(weight) :] = 0
        if hidden_grad:
            torch.mm(logits, matrix, out=d_hidden[begin : begin + step])
        if weight_grad:
            product = logits.T @ x
            if d_weight is None:
                d_weight = product if step >= rows else product.float()
            else:
                d_weight += product
            del product
        del logits  # before the next ones are made
    loss = (total / rows).float()
    return loss, d_hidden, hidden.new_empty(0) if d_weight is None else d_weight[: len(weight)].to(weight.dtype)


def _rows_at_once(rows: int, vocab: int, width: int, item_bytes: int, device: str) -> int:
    most = max(1, LOGITS_BYTES[device] // (vocab * item_bytes), WIDTHS * width)
    return -(-rows // -(-rows // most))  # pieces of equal size


def peak_bytes(rows: int, vocab: int, width: int, item_bytes: int, device: str, capped: bool = False) -> int:
    """Return the most bytes that `linear_cross_entropy` allocates at a time, with both gradients.

    `item_bytes`: of a weight. `device`: cpu or cuda. `capped`: with `cap`.
    """
    padded = vocab + (-vocab % ALIGNED if device == "cuda" else 0)
    step = _rows_at_once(rows, padded, width, item_bytes, device)
    softmax_rows = min(step, max(1, ROW_BYTES[device] // (4 * vocab)))
    logits = step * padded * item_bytes * (2 if capped else 1)
    softmax = softmax_rows * vocab * (4 if item_bytes == 4 else 8)
    product, total = padded * width * item_bytes, 4 * padded * width
    if step == rows:
        return rows * width * item_bytes + logits + max(softmax, product)
    if device == "cpu" and item_bytes < 4:
        product += total  # torch converts the product before it adds it
    summing = total + logits + max(softmax, product)
    copy = padded * width * item_bytes if padded > vocab else 0
    return rows * width * item_bytes + copy + summing


def _cap(logits: Tensor, cap: float) -> Tensor:
    """Replace logits by cap * tanh(logits / cap); returns the slope of that, 1 - tanh^2."""
    share = logits.div_(cap).tanh_()
    slope = 1 - share.square()
    share.mul_(cap)
    return slope


def _to_gradient(logits: Tensor, targets: Tensor, rows: int, overwrite: bool) -> Tensor:
    """Return the summed loss of some of `rows` rows; `overwrite` their logits by the gradient of the mean."""
    step = max(1, ROW_BYTES[logits.device.type] // (4 * logits.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, wanted in zip(logits.split(step), targets.split(step), strict=True):
        values = part.float()  # the same tensor if it is float32 already
        largest, right = values.amax(1), values.gather(1, wanted)[:, 0].clone()
        p = torch.softmax(values, -1)
        total += (largest - p.amax(1).log() - right).sum()  # log sum exp = largest - log of its probability
        if overwrite:
            p.scatter_add_(1, wanted, torch.full_like(p[:, :1], -1.0))
            part.copy_(p.mul_(1 / rows))
    return total


def _aligned(weight: Tensor) -> Tensor:
    """Return the matrix, on a GPU with rows of zeros up to a multiple of `ALIGNED`."""
    missing = -len(weight) % ALIGNED if weight.device.type == "cuda" else 0
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, hidden_grad: bool, weight_grad: bool, cap: float) -> Any:
    loss = hidden.new_empty((), dtype=torch.float32)
    nothing = hidden.new_empty(0)
    return (
        loss,
        torch.empty_like(hidden) if hidden_grad else nothing,
        weight.new_empty(weight.shape) if weight_grad else nothing.clone(),
    )


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, *gradients: Tensor) -> Any:
    scale = gradients[0]
    hidden, weight = (g * scale.to(g.dtype) if g.numel() else None for g in cast(Any, ctx).saved_tensors)
    return hidden, weight, None, None, None, None


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)
