"""Stand-ins for Adam and for the functions on lists of tensors."""

import torch


class FusedSGD: ...


class FusedAdam(torch.optim.Optimizer):
    """Adam whose state has dtypes of its own, by the interface that megatron-core uses.

    fp16 state has a scale, the largest value divided by half of fp16's largest. bf16 state has one,
    too, which is looked up and stays 1. With
    ``store_param_remainders`` the fp32 master weight of a bf16 weight is that weight's bits plus a
    remainder of 16 bits.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        assert master_weight_dtype in (torch.float32, torch.float16)
        self.master_weights = master_weights
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self.use_decoupled_grad = use_decoupled_grad
        self._scales = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    def initialize_state(self, param, store_param_remainders):
        names = ["exp_avg", "exp_avg_sq"] + ["master_param"] * self.master_weights
        for name in names:
            if self.name_to_dtype_map[name] != torch.float32:
                scale = torch.ones(1, device=param.device)
                self._scales.setdefault(param, {})[name] = scale
            dtype = self.name_to_dtype_map[name]
            if name == "master_param" and store_param_remainders:
                dtype = torch.int16
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
        if self.master_weights and not store_param_remainders:
            self.set_scaled_state(param, "master_param", param.clone().detach().float())

    def get_unscaled_state(self, param, state_name):
        state = self.state[param][state_name]
        if state.dtype in (torch.float32, torch.int16):
            return state
        return state.float().mul_(self._scales[param][state_name])

    def set_scaled_state(self, param, state_name, unscaled_state):
        state = self.state[param][state_name]
        if state.dtype == torch.float16:
            scale = self._scales[param][state_name]
            scale.copy_(unscaled_state.abs().max() / (torch.finfo(torch.float16).max / 2))
            unscaled_state.mul_(torch.where(scale > 0, scale.reciprocal(), 0.0))
        else:
            expected = torch.int16 if state.dtype == torch.int16 else torch.float32
            assert unscaled_state.dtype == expected
        state.copy_(unscaled_state)

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                remainders = self.store_param_remainders and param.dtype == torch.bfloat16
                if not self.state[param]:
                    self.initialize_state(param, remainders)
                name = "decoupled_grad" if self.use_decoupled_grad else "grad"
                if getattr(param, name, None) is not None:
                    self._update(group, param, getattr(param, name).float(), remainders)

    def _update(self, group, param, grad, remainders):
        beta1, beta2 = group["betas"]
        state = {name: self.get_unscaled_state(param, name) for name in self.state[param]}
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        master = state.get("master_param", param)
        if remainders:
            # A negative remainder stands for a weight that was rounded up.
            high, low = param.view(torch.int16).int() - (master < 0).int(), master.int() & 0xFFFF
            master = (high << 16 | low).view(torch.float32)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        master.mul_(1 - group["lr"] * group["weight_decay"])
        master.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** group["step"]))
        if remainders:
            bits = master.view(torch.int32)
            self.state[param]["master_param"].copy_(low := (bits & 0xFFFF).to(torch.int16))
            param.view(torch.int16).copy_((bits >> 16) + (low < 0).int())
        elif master is not param:
            param.copy_(master)
        for name, values in state.items():
            if self.state[param][name].dtype in (torch.float16, torch.bfloat16):
                self.set_scaled_state(param, name, values)


class MultiTensorApply:
    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, scale):
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    norms = torch._foreach_norm(tensor_lists[0], 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None
