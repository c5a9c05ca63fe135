"""Exported graphs in ONNX Runtime, called as a model's networks are. Tensors stay where they are: inputs and outputs are bound.

Shapes: B pictures, C latent channels, h x w latent size, L tokens, D width of the text encoder, r rank.
"""

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysd.errors import RequestError
from raysd.export.adapters import DOWN, UP, Pair, read_adapter
from raysd.models import Family
from raysd.models.base import Geometry
from raysd.registry.files import cache_folder

LIBRARIES = {
    "TensorrtExecutionProvider": ("libnvinfer.so.10", "libcuda.so.1"),
    "CUDAExecutionProvider": ("libcuda.so.1",),
    "CPUExecutionProvider": (),
}
"""Providers, the fastest first, and what each loads beyond what it ships with: a wheel that has one may lack those."""
_TYPES = {torch.float32: np.float32, torch.int64: np.int64}
_NO_MEMORY = ("Failed to allocate memory", "out of memory", "bad allocation", "bad_alloc", "ALLOC_FAILED")
"""What its errors say where something does not fit: of its arenas, CUDA, the C++ library, cuBLAS and cuDNN."""


class Runtime:
    """The graphs in a folder of one export, and the adapters put on its denoiser. Shared by threads.

    `threads` are those of one call on a CPU, as many as PyTorch's if not given. Tensors are fp32, on the CPU or `device`.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        geometry: Geometry,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
    ):
        require("onnxruntime")
        self.family, self.geometry = family, geometry
        self._folder, self._threads = folder, threads
        self._providers = tuple(providers or usable_providers())
        self._sessions = {name: self._open(name) for name in ("denoiser", "decoder", "encoder", "text_encoder")}
        self.providers: list[str] = self._sessions["denoiser"].get_providers()
        on_gpu = self.providers[0] != "CPUExecutionProvider" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        # The pairs that the denoiser takes: inputs that have a default.
        self._optional = {arg.name: arg for arg in self._sessions["denoiser"].get_overridable_initializers()}
        self._adapters: dict[str, dict[str, Any]] = {}

    def denoise(self, latents: Tensor, timesteps: Tensor, conditioning: Tensor, adapter: str | None) -> Tensor:
        """[B, C, h, w], [B], [B, L, D] -> [B, C, h, w], with that adapter or bare."""
        inputs = {"latents": latents.float(), "timesteps": timesteps.float(), "conditioning": conditioning.float()}
        return self._run("denoiser", inputs, latents.shape, self._adapters[adapter] if adapter is not None else {})

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pictures [B, 3, H, W], about [-1, 1]."""
        batch, _, height, width = latents.shape
        factor = self.geometry.factor
        return self._run("decoder", {"latents": latents.float()}, (batch, 3, factor * height, factor * width))

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> mean and log-variance of the latents' posterior [B, 2C, h, w]."""
        batch, _, height, width = pixels.shape
        factor = self.geometry.factor
        # Not the denoiser's channels, which are more where it takes a mask too.
        channels = self._sessions["encoder"].get_outputs()[0].shape[1]
        return self._run("encoder", {"pixels": pixels.float()}, (batch, channels, height // factor, width // factor))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]"""
        width = self._sessions["text_encoder"].get_outputs()[0].shape[2]
        return self._run("text_encoder", {"tokens": tokens.long()}, (*tokens.shape, width))

    def add_adapter(self, name: str, lora: Path) -> None:
        """Put an adapter file beside those that are there. Raises RequestError where the export has no inputs for it."""
        self.add_pairs(name, read_adapter(self.family, lora), str(lora.name))

    def add_pairs(self, name: str, pairs: Mapping[str, Pair], origin: str) -> None:
        """The same from tensors; `origin` names them in errors."""
        given = {
            module + side: tensor
            for module, pair in pairs.items()
            for side, tensor in zip((DOWN, UP), pair, strict=True)
        }
        unknown = sorted(given.keys() - self._optional.keys())
        if unknown:
            what = unknown[0].removesuffix(DOWN).removesuffix(UP)
            raise RequestError(
                f"{origin}: adapts {what}, for which the base's export has no input: serve it with `backend: torch`"
            )
        place = "cuda" if self.device.type == "cuda" else "cpu"
        self._adapters[name] = {key: self._value(key, tensor, place) for key, tensor in given.items()}

    def remove_adapter(self, name: str) -> None:
        del self._adapters[name]

    def _value(self, name: str, tensor: Tensor, place: str) -> Any:
        from onnxruntime import OrtValue

        kind = np.float16 if "float16" in self._optional[name].type else np.float32
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy().astype(kind)), place, 0)

    def _run(
        self, name: str, inputs: Mapping[str, Tensor], shape: Sequence[int], bound: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Call a graph, which writes its output into a new tensor of that shape. Raises torch.OutOfMemoryError."""
        session = self._sessions[name]
        binding = session.io_binding()
        ready = {key: value.to(self.device).contiguous() for key, value in inputs.items()}  # kept until the call ends
        for key, value in ready.items():
            binding.bind_input(key, self.device.type, 0, _TYPES[value.dtype], tuple(value.shape), value.data_ptr())
        for key, value in (bound or {}).items():
            binding.bind_ortvalue_input(key, value)
        output = torch.empty(tuple(shape), device=self.device)
        binding.bind_output(
            session.get_outputs()[0].name, self.device.type, 0, np.float32, tuple(shape), output.data_ptr()
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # ONNX Runtime has a stream of its own
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # all its kinds have no other base
            if any(words in str(error) for words in _NO_MEMORY):
                raise torch.OutOfMemoryError(str(error)) from None
            raise
        return output

    def _open(self, name: str) -> Any:
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or torch.get_num_threads()
        chosen = [(provider, _provider_options(provider)) for provider in self._providers]
        return InferenceSession(self._folder / f"{name}.onnx", options, providers=chosen)


def require(*modules: str) -> None:
    """Raises RequestError for a library of the optional part that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise RequestError(f"{module} is not installed, and ONNX needs it: pip install 'raysd[serve]'")


def usable_providers() -> tuple[str, ...]:
    """Execution providers that this machine can run, the fastest first."""
    import onnxruntime

    if torch.version.cuda and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # from torch's packages
    available = onnxruntime.get_available_providers()
    return tuple(name for name, needs in LIBRARIES.items() if name in available and all(map(_loads, needs)))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _provider_options(provider: str) -> dict[str, str]:
    """TensorRT builds its engines for minutes: they are kept on this machine."""
    if provider != "TensorrtExecutionProvider":
        return {}
    cache = cache_folder() / "tensorrt"
    cache.mkdir(parents=True, exist_ok=True)
    return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
