"""The process that makes dry runs."""

import gc
import io

from ds_quant.engine import dry_start
from ds_quant.kernels import native
from ds_quant.planning import models, worker


def test_its_kernels_compute_nothing(monkeypatch):
    monkeypatch.setattr(native, "_computes", True)  # and what it was afterwards
    for owner, name in ((models, "preload"), (dry_start, "preload"), (gc, "freeze")):
        monkeypatch.setattr(owner, name, lambda: None)
    worker.serve(io.StringIO(), io.StringIO())
    # The library is not asked, or it would find that no structure has this size.
    assert native.function("ds_quant_adamw", sizes={"ds_quant_entry_size": -1})(isa=0) is None
