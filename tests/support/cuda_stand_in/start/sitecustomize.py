"""Imported by Python as it starts: the device has to be there before torch asks for one."""

import cuda_stand_in.runtime  # noqa: F401
