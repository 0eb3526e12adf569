"""Batch norms that train on the images of several processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from skdim.distributed import Group

__all__ = ["shared_norms"]


@contextmanager
def shared_norms(group: Group, module: nn.Module) -> Iterator[None]:
    """Let the batch norms of a module train on the statistics of all processes' images, as long as the block lasts.

    They stay the layers that they are: `nn.BatchNorm1d` and its like, and subclasses of them.
    """
    mode = _SharedNorms(group)
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    handles = []
    for norm in norms if group.size > 1 else ():
        handles += [
            norm.register_forward_pre_hook(mode.enter),
            norm.register_forward_hook(mode.leave, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SharedNorms(TorchFunctionMode):
    """Computes `torch.nn.functional.batch_norm` with the statistics of all processes; hooks of batch norms bring it on.

    Instead of batch norms of another class, which would have to be put in place and taken out again, and would not do
    what a subclass does; and instead of a mode for whole models, which makes every operation slower.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def enter(self, norm: nn.Module, args: Any) -> None:
        if self._is_shared(norm):
            self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, norm: nn.Module, args: Any, output: Any) -> None:
        if self._is_shared(norm):
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _is_shared(self, norm: nn.Module) -> bool:
        """Tell whether it trains, which a norm without running statistics does not show otherwise, and is no copy."""
        return norm.training and self.group.size > 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self._batch_norm if function is batch_norm else function
        return call(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        values: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
        with torch.no_grad():
            dims = [dim for dim in range(values.ndim) if dim != 1]
            own = torch.stack(torch.var_mean(_at_least_float32(values), dims, correction=0))
            # Every process has as many values.
            variances, means = self.group.stack(own).unbind(1)
            mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
            if running_mean is not None and running_var is not None:
                n_values = self.group.size * values.numel() // values.shape[1]
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * n_values / (n_values - 1)).to(running_var.dtype), momentum)
        arguments = (self.group, values, weight, bias, mean, var, eps)
        normalized: Tensor = _Normalize.apply(*arguments)  # type: ignore[no-untyped-call]
        return normalized


class _Normalize(torch.autograd.Function):
    """Batch norm by given statistics, of which the backward pass takes account as those of all processes' values."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Group,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.group, ctx.eps, ctx.is_given = group, eps, (weight is not None, bias is not None)
        weight = torch.ones_like(mean) if weight is None else weight
        ctx.save_for_backward(values, weight, mean, var)
        return batch_norm(values, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, var = ctx.saved_tensors
        # As if the statistics were constants, ...
        of_values, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # ... less what reaches values through them: the parts of the gradient along a constant and along the values.
        n_values = values.numel() // values.shape[1]
        along_ones, along_values = ctx.group.mean(_at_least_float32(torch.stack([of_bias, of_weight])) / n_values)
        precision = (var + ctx.eps).rsqrt()
        slope = weight * precision * precision * along_values
        shift = weight * precision * along_ones - mean * slope
        shape = (-1, *[1] * (values.ndim - 2))
        of_values -= (slope.view(shape) * values + shift.view(shape)).to(of_values.dtype)
        of_affine = [
            gradient if is_given else None
            for gradient, is_given in zip((of_weight, of_bias), ctx.is_given, strict=True)
        ]
        return None, of_values, *of_affine, None, None, None


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
