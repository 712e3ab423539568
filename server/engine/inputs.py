"""What a step reads, where a captured graph finds it again."""

import torch

from loramux.kernels.paged_attention import Rows


class StepInputs:
    """Everything that a step reads, in tensors that never move: a captured graph reads them again at every
    replay.

    Attributes:
        ids, positions: int64 [1, max tokens]; slots: int64 [max tokens].
        lengths: int32 [max running]; tables: int32 [max running, pages of the longest sequence].
    """

    def __init__(self, max_tokens: int, max_running: int, max_pages: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._staged_wide = torch.zeros(3, max_tokens, dtype=torch.int64, pin_memory=on_cuda)
        self._staged_rows = torch.zeros(1 + max_pages, max_running, dtype=torch.int32, pin_memory=on_cuda)
        self._wide = self._staged_wide.to(device) if on_cuda else self._staged_wide
        self._rows = self._staged_rows.to(device) if on_cuda else self._staged_rows
        self._on_cuda = on_cuda
        self.host_ids, self.host_positions, self.host_slots = self._staged_wide.numpy()
        tables = (max_running, max_pages)
        self.host_lengths = self._staged_rows[0].numpy()
        self.host_tables = self._staged_rows[1:].view(tables).numpy()
        self._lengths, self._tables = self._rows[0], self._rows[1:].view(tables)
        self.ids, self.positions, self.slots = self._wide[0:1], self._wide[1:2], self._wide[2]

    def rows(self, count: int) -> Rows:
        """The first rows, of single tokens."""
        return Rows(self._tables[:count], self._lengths[:count], self.slots[:count])

    def send(self) -> None:
        """What was written to the host's side goes to the device."""
        if self._on_cuda:
            self._wide.copy_(self._staged_wide, non_blocking=True)
            self._rows.copy_(self._staged_rows, non_blocking=True)
