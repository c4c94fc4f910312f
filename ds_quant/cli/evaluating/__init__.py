"""The parts of `ds_quant evaluate`."""
