"""Replaces layers of a simulated model by kernels, where these are right and faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lm_calib_plugin.execution.base import PackedLinear, simulated
from lm_calib_plugin.execution.check import KERNELS, serving
from lm_calib_plugin.execution.facts import Activation, Device, Facts
from lm_calib_plugin.execution.levels import UnpackableError
from lm_calib_plugin.execution.report import ExecutionReport, LayerExecution, Race
from lm_calib_plugin.quantization.grids import Grid, GridSpec

# Largest relative error of a layer's output against the simulated layer. Both round weights and
# inputs to the same levels; what is left is the rounding of levels times scales to the dtype, which
# only the simulated layer has to do, and that of the output.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
PROBE_ROWS = 32
REPEATS, SECONDS = 9, 0.3

Racer = Callable[[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor], Race]


@dataclass(frozen=True)
class PackLayer:
    """One layer of a simulated model.

    Parameters
    ----------
    name
        Of the module in the model.
    spec, grid
        The levels that the weights lie on; None: pruned only.
    activation
        How inputs are quantized.
    pattern
        N:M pattern of the weights.
    quantize
        What the simulated model does to input rows ``[tokens, in]``; None: by ``activation``.
    probe
        Input rows ``[tokens, in]`` to compare outputs on; None: random ones with a few large
        channels.
    """

    name: str
    spec: GridSpec | None = None
    grid: Grid | None = field(default=None, repr=False)
    activation: Activation | None = None
    pattern: str | None = None
    quantize: Callable[[Tensor], Tensor] | None = None
    probe: Tensor | None = field(default=None, repr=False)


def pack(
    model: nn.Module,
    layers: Sequence[PackLayer],
    tokens: int = 512,
    force: bool = False,
    kernels: Sequence[type[PackedLinear]] = KERNELS,
    racer: Racer | None = None,
) -> ExecutionReport:
    """Replace layers by kernels, in place.

    A layer is packed if a kernel serves it, its output differs from that of the simulated layer by
    no more than ``TOLERANCE``, and it is faster than the *dense* layer without any quantization.
    The memory of replaced weights is freed, whoever else refers to them: count and digest weights
    before, or :func:`unpack`. Hooks of a replaced module (such as those that quantize its inputs)
    rest until then; the packed layer quantizes inputs itself.

    Parameters
    ----------
    model
        Changed.
    layers
        What lies on which levels.
    tokens
        How many tokens the evaluation multiplies at once (batch times length).
    force
        Pack also where the kernel is slower, so that the choice does not hang on timing.
    kernels
        To choose from.
    racer
        Times two functions on an input; None: by the clock.
    """
    chooser = _Chooser(model, tokens, force, kernels, racer or race)
    found = [chooser.place(layer) for layer in layers]
    device = str(Device.of(next(model.parameters()).device))
    return ExecutionReport(device, tokens, found, _failed_fusions())


def unpack(model: nn.Module) -> int:
    """Put the replaced layers back, their weights bit by bit what they were; return how many."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]
    for name, packed in found:
        (module,) = packed.replaced
        module.weight.data = packed.weight
        _put(model, name, module)
    return len(found)


def race(dense: Callable[[Tensor], Tensor], packed: Callable[[Tensor], Tensor], x: Tensor) -> Race:
    """Time two functions on an input by turns; medians of some repeats, after a warm-up."""
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    for turn in range(REPEATS + 2):
        pair = (_seconds(dense, x), _seconds(packed, x))
        if turn >= 2:
            times.append(pair)
        # One kept repeat at least, however slow.
        if times and time.perf_counter() - start > SECONDS:
            break
    return Race(*(statistics.median(side) for side in zip(*times, strict=True)))


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    run(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


@dataclass
class _Chooser:
    model: nn.Module
    tokens: int
    force: bool
    kernels: Sequence[type[PackedLinear]]
    racer: Racer
    races: dict[tuple[object, ...], Race] = field(default_factory=dict)

    @torch.no_grad()
    def place(self, layer: PackLayer) -> LayerExecution:
        """Pack one layer, or say why not."""
        try:
            module = self.model.get_submodule(layer.name)
        except AttributeError:
            return LayerExecution(layer.name, reason="is no module of its own (fused experts)")
        if isinstance(module, PackedLinear):
            return LayerExecution(layer.name, module.kernel, reason="was packed before")
        wrong = self._unfit(module)
        if wrong:
            return LayerExecution(layer.name, reason=wrong)
        weight = _weight(module)
        size = weight.numel() * weight.element_size()
        plain = LayerExecution(layer.name, bytes_before=size, bytes_after=size)
        facts = _facts(layer, weight)
        able, why = serving(facts, self.kernels)
        if not able:
            return replace(plain, reason=f"no kernel serves it ({why})")
        tried = [self._try(kernel, layer, module, facts, plain) for kernel in able]
        # The first is the fastest of those that are right; if none is, one that says why.
        tried.sort(key=lambda t: (t[1] is None, -(t[0].race.ratio if t[0].race else 0.0)))
        result, packed = tried[0]
        if packed is not None:
            packed.replaced, packed.transposed = (module,), not isinstance(module, nn.Linear)
            packed.train(module.training)
            _put(self.model, layer.name, packed)
            module.weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return result

    def _unfit(self, module: nn.Module) -> str:
        kept = module._parameters.get("weight")
        if kept is None or kept.dim() != 2:
            return "is not a linear layer"
        if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            return f"is a {type(module).__name__}, not a linear layer"
        owners = [m for m in self.model.modules() if m._parameters.get("weight") is kept]
        if len(owners) > 1:
            return "shares its weight with another module"
        if hasattr(module, "_hf_hook"):
            return "is spread over devices by accelerate"
        return ""

    def _try(
        self,
        kernel: type[PackedLinear],
        layer: PackLayer,
        module: nn.Module,
        facts: Facts,
        plain: LayerExecution,
    ) -> tuple[LayerExecution, PackedLinear | None]:
        weight = _weight(module)
        bias = module.bias
        try:
            packed = kernel.from_layer(weight, layer.grid, bias, layer.activation)  # type: ignore[arg-type]
            rows = _probe(layer, weight)
            known = rows if layer.quantize is None else layer.quantize(rows)
            rule = layer.activation if layer.quantize is None else None
            error = _distance(packed(rows), simulated(known, weight, bias, rule))  # type: ignore[arg-type]
            result = replace(plain, error=error)
            if not error <= TOLERANCE[facts.dtype]:
                reason = f"{kernel.kernel} differs from the simulated layer"
                detail = f"relative error {error:.3g}, allowed {TOLERANCE[facts.dtype]:g}"
                return replace(result, reason=reason, detail=detail), None
            timed = self._race(packed, module, facts, self.tokens)
            result = replace(result, race=timed, alone=self._race(packed, module, facts, 1))
        except UnpackableError as error:
            return replace(plain, reason=f"{kernel.kernel} cannot hold it", detail=str(error)), None
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return replace(plain, reason=f"{kernel.kernel} failed", detail=said), None
        if timed.ratio <= 1 and not self.force:
            reason = f"{kernel.kernel} is slower than dense at {self.tokens} tokens"
            return replace(result, reason=reason, detail=f"{timed.ratio:.2f} times its speed"), None
        return replace(result, kernel=kernel.kernel, bytes_after=packed.weight_bytes), packed

    def _race(self, packed: PackedLinear, module: nn.Module, facts: Facts, tokens: int) -> Race:
        key = (packed.kernel, tokens, facts.shape, facts.dtype, facts.group_size, facts.symmetric)
        key += (facts.activation and facts.activation.dynamic, module.bias is None)
        if key not in self.races:
            weight = _weight(module)
            x = _normal(tokens, weight)
            bias: Tensor | None = module.bias  # type: ignore[assignment]

            def run(rows: Tensor) -> Tensor:
                return nn.functional.linear(rows, weight, bias)

            self.races[key] = self.racer(run, packed, x)
        return self.races[key]


def _weight(module: nn.Module) -> Tensor:
    """Return the weight ``[out, in]``, contiguous; Conv1D stores ``[in, out]``."""
    weight: Tensor = module.weight.data  # type: ignore[union-attr, assignment]
    return weight if isinstance(module, nn.Linear) else weight.t().contiguous()


def _facts(layer: PackLayer, weight: Tensor) -> Facts:
    out, width = weight.shape
    common = (Device.of(weight.device), weight.dtype, (int(out), int(width)))
    spec = layer.spec
    if spec is None:
        return Facts(*common, None, activation=layer.activation, pattern=layer.pattern)
    levels = (spec.number, spec.bits, spec.group_size, spec.symmetric)
    return Facts(*common, *levels, layer.activation, layer.pattern)


def _normal(tokens: int, weight: Tensor) -> Tensor:
    own = torch.Generator().manual_seed(0)
    return torch.randn(tokens, weight.shape[1], generator=own).to(weight.device, weight.dtype)


def _probe(layer: PackLayer, weight: Tensor) -> Tensor:
    if layer.probe is not None:
        return layer.probe.to(weight.device, weight.dtype)
    rows = _normal(PROBE_ROWS, weight)
    # Real inputs have channels far larger than the others; a few elements beyond a static range.
    rows[:, :: max(weight.shape[1] // 4, 1)] *= 20
    if layer.activation is not None and layer.activation.scale is not None:
        rows *= layer.activation.scale * layer.activation.reach / 40
    return rows


def _distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _failed_fusions() -> list[str]:
    from lm_calib_plugin.execution import fp8, int8

    failures = {f.failure for f in (fp8._quantize, int8._quantize, int8._epilogue)}
    return [f"execution=packed runs without fused steps: {f}" for f in failures if f]
