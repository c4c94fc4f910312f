"""A checkpoint of a training run becomes a folder that inference servers load.

Begin with `exporter`; `hf_checkpoint` reads what was trained, `serving_format` says it in the servers'
format, `stored_weight` writes a weight in it.
"""

from ds_quant.export.exporter import COPIED, FORMATS, Exported, export

__all__ = ["COPIED", "FORMATS", "Exported", "export"]
