"""Imported by Python at its start: the device must exist before torch is imported."""

import cuda_stand_in.runtime  # noqa: F401
