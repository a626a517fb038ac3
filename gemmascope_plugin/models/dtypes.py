"""Types and devices of models: see ``gemmascope_plugin.dtypes``, which lower floors share."""

from gemmascope_plugin.dtypes import as_device, as_dtype, dtype_name

__all__ = ["as_device", "as_dtype", "dtype_name"]
