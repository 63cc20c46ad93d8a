"""The tensors of one parameter group, with their addresses in a device table for a multi-tensor launch."""

from collections.abc import Sequence

import torch

# Elements of one program: the lookup of its tensor is cheap compared with the 210 KB that it moves.
CHUNK_ELEMENTS = 8192


class AdamWTable:
    """The tensors that `adamw` updates: weights, remainders and moments with one learning rate and decay."""

    def __init__(
        self,
        *,
        weights: Sequence[torch.Tensor],
        first_moments: Sequence[torch.Tensor],
        second_moments: Sequence[torch.Tensor],
        remainders: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Hold the tensors of parameters that share learning rate and weight decay.

        The tensors' storage may move later (offload and prefetch, `tensor.data` replaced): addresses are
        compared before every launch, and the table is rewritten when one has changed.

        Args:
            weights: all bf16 (then `remainders` is required) or all fp32, contiguous, on one device.
            first_moments: fp32, one per weight, of its shape.
            second_moments: fp32, one per weight, of its shape.
            remainders: int16, one per weight, of its shape, as `split_master` returns them; zeros to start
                from a bf16 checkpoint.

        Raises:
            ValueError: counts, shapes, dtypes, devices or layouts do not fit.
        """
        is_split = remainders is not None
        self.weights = list(weights)
        self.remainders = list(remainders) if remainders is not None else None
        self.first_moments = list(first_moments)
        self.second_moments = list(second_moments)
        self._check("weights", self.weights, torch.bfloat16 if is_split else torch.float32)
        self._check("first_moments", self.first_moments, torch.float32)
        self._check("second_moments", self.second_moments, torch.float32)
        if self.remainders is not None:
            self._check("remainders", self.remainders, torch.int16)
        self._chunks_C2: torch.Tensor | None = None
        self._addresses: list[list[int]] | None = None
        self._addresses_N6: torch.Tensor | None = None
        self._is_aligned = False

    def check_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Raise ValueError unless there is one gradient per weight, all bf16 or all fp32."""
        dtype = gradients[0].dtype if gradients else torch.float32
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"gradients[0] is {dtype}, required is torch.bfloat16 or torch.float32")
        self._check("gradients", gradients, dtype)

    def chunks(self) -> torch.Tensor:
        """Return [C, 2] int64 on the device: tensor and first element of each program's chunk."""
        if self._chunks_C2 is None:
            sizes_N = torch.tensor([weight.numel() for weight in self.weights], dtype=torch.int64)
            counts_N = (sizes_N + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS
            tensor_C = torch.repeat_interleave(torch.arange(len(self.weights)), counts_N)
            first_N = counts_N.cumsum(0) - counts_N
            start_C = (torch.arange(tensor_C.numel()) - first_N[tensor_C]) * CHUNK_ELEMENTS
            self._chunks_C2 = torch.stack((tensor_C, start_C), dim=1).to(self.weights[0].device)
        return self._chunks_C2

    def addresses(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """Return ([N, 6] int64 on the device, whether every address is a multiple of 16 bytes).

        A row holds the addresses of weight, remainder, gradient, first and second moment, and the number of
        elements.
        """
        addresses = [
            [tensor.data_ptr() for tensor in tensors]
            for tensors in (
                self.weights,
                self.remainders if self.remainders is not None else self.weights,
                gradients,
                self.first_moments,
                self.second_moments,
            )
        ]
        if addresses != self._addresses:
            sizes = [weight.numel() for weight in self.weights]
            table_6N = torch.tensor([*addresses, sizes], dtype=torch.int64)
            device = self.weights[0].device
            # From pinned memory the copy is asynchronous: the host prepares the next launches meanwhile.
            table_N6 = table_6N.T.contiguous()
            table_N6 = table_N6.pin_memory() if device.type == "cuda" else table_N6
            self._addresses_N6 = table_N6.to(device, non_blocking=True)
            self._addresses = addresses
            self._is_aligned = all(address % 16 == 0 for column in addresses for address in column)
        return self._addresses_N6, self._is_aligned

    def _check(self, name: str, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        if len(tensors) != len(self.weights):
            raise ValueError(
                f"{name} has {len(tensors)} tensors, required are {len(self.weights)}, one per weight"
            )
        for index, (tensor, weight) in enumerate(zip(tensors, self.weights, strict=True)):
            if tensor.dtype != dtype:
                raise ValueError(f"{name}[{index}] is {tensor.dtype}, required is {dtype}")
            if tensor.shape != weight.shape:
                raise ValueError(
                    f"{name}[{index}] has shape {tuple(tensor.shape)}, required is {tuple(weight.shape)}"
                )
            if tensor.device != self.weights[0].device:
                raise ValueError(
                    f"{name}[{index}] is on {tensor.device}, weights[0] on {self.weights[0].device}: move one"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{index}] is not contiguous: pass a contiguous tensor or view")
