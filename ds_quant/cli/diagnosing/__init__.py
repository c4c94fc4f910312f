"""The commands of `ds_quant diagnose`, a module each."""
