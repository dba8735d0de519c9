"""What a model and a batch must be: each check raises at once, and says what to do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from influence_framework.data import Batch, leaves
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.finite import all_finite
from influence_framework.parameters import ParameterSpace


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is a deterministic ``nn.Module`` with finite parameters and gradients exist."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise InvalidInputError(
            "Under torch.inference_mode() nothing has a gradient: fit and score outside of it, with a model "
            "made outside of it. torch.no_grad() is fine."
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"submodule {name!r}" if name else "model"
            raise InvalidInputError(
                f"The {where} is a TorchScript module: its parameters cannot be replaced and it has no "
                "second derivatives under torch.func. Pass the original nn.Module."
            )
        if hasattr(module, "_orig_mod") and type(module).__name__ == "OptimizedModule":
            raise InvalidInputError(
                "A module made by torch.compile has no second derivatives: pass the module that was compiled, "
                "which is its attribute _orig_mod."
            )
    stochastic = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training and _random_or_batch_dependent(module)
    ]
    if stochastic:
        raise InvalidInputError(
            "The model is in train mode and contains layers that are random or mix samples there: "
            f"{', '.join(stochastic)}. Call model.eval() first."
        )
    mixing = [name or "model" for name, module in model.named_modules() if _mixes_samples_always(module)]
    if mixing:
        raise InvalidInputError(
            f"{', '.join(mixing)} normalise by the statistics of the batch even in eval mode "
            "(track_running_stats=False), so no sample has a loss of its own: use running statistics."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not all_finite(tensor):
            raise NonFiniteError(f"{name!r} of the model contains NaN or infinity: training has diverged.")


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def check_unchanged(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless parameters and buffers of ``model`` are what they were when ``state`` was taken."""
    present = dict([*model.named_parameters(), *model.named_buffers()])
    for name, before in state.items():
        now = present.get(name)
        if now is None or now.shape != before.shape or now.dtype != before.dtype or now.device != before.device:
            what = "gone" if now is None else f"{tuple(now.shape)} {now.dtype} on {now.device}"
            raise InvalidInputError(
                f"{name!r} of the model was {tuple(before.shape)} {before.dtype} on {before.device} at the fit "
                f"and is {what} now: fit again, or move the influence model with its own .to(device)."
            )
        if not torch.equal(now, before):
            raise InvalidInputError(
                f"{name!r} of the model has changed since the fit, so the curvature is that of another model: "
                "fit again."
            )


def _random_or_batch_dependent(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
        return True
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.RReLU)


def _mixes_samples_always(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def check_leaves(batch: Batch, parameters: ParameterSpace, what: str) -> None:
    """Raise unless every tensor of ``batch`` is finite and on the model's device, and inputs of its dtype."""
    for tensor in leaves(batch):
        if tensor.is_inference():
            raise InvalidInputError(
                f"The {what} was made under torch.inference_mode() and cannot be differentiated through: pass "
                "a clone() of it, or make it under torch.no_grad()."
            )
        if tensor.device != parameters.device:
            raise InvalidInputError(
                f"The {what} is on {tensor.device}, the model on {parameters.device}: move one of them "
                "with .to(device)."
            )
        if tensor.is_floating_point() or tensor.is_complex():
            if tensor.dtype != parameters.dtype:
                raise InvalidInputError(
                    f"The {what} holds {tensor.dtype}, the model's parameters are {parameters.dtype}: "
                    f"convert with .to({parameters.dtype})."
                )
            if not all_finite(tensor):
                raise NonFiniteError(
                    f"There is NaN or infinity in the {what}{_where(tensor)}: drop or impute those samples."
                )


def _where(tensor: Tensor, listed: int = 8) -> str:
    """The first samples that are not finite, by their places in the batch."""
    if not tensor.ndim:
        return ""
    places: list[int] = []
    for place, sample in enumerate(tensor):
        if not all_finite(sample):
            places.append(place)
            if len(places) > listed:
                break
    names = ", ".join(map(str, places[:listed])) + (", …" if len(places) > listed else "")
    return f" (sample{'s' * (len(places) > 1)} {names} of a batch of {len(tensor)})"


def check_differentiable(batch: Batch) -> None:
    """Raise unless the input of ``batch`` is one floating-point tensor, as mode Perturbation needs it."""
    x = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInputError(
            "Mode Perturbation differentiates with respect to the input, which must be one "
            f"floating-point tensor; got {got}. Use mode='up', or feed the model embeddings."
        )
